"""What the section `security` of a state file means: this machine's profile, and the firewall of its role.

Imports hostmodel, model, notes and stateschema.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from controller.hostmodel import (
    WG_INTERFACES,
    WG_PORT,
    Firewall,
    Limits,
    Profile,
    SecurityPeer,
    SecurityRole,
    TunnelNetwork,
)
from controller.model import Ipv4, Network, Prefix
from controller.notes import Notes
from controller.stateschema import SecuritySpec, StateSpec

DEFAULT_NETWORK = Prefix.parse("10.0.0.0/24")
LONGEST = 30
"""A network longer than this has no room for two servers."""


def derive_profile(notes: Notes, spec: StateSpec, networks: Sequence[Network]) -> Profile | None:
    """The profile, None without the section; what is wrong with it goes to the notes."""
    declared = spec.security
    if declared is None:
        return None
    role = SecurityRole(declared.role)
    network = declared.network or DEFAULT_NETWORK
    used = role is not SecurityRole.DEV or declared.network is not None
    if network.length > LONGEST:
        fix = "Two servers need an address each; write a larger network."
        notes.error("bad-prefix", "security.network", str(network), f"at most a /{LONGEST}", fix)
    elif used:
        _check_overlap(notes, declared, network, spec, networks)
    address = declared.address
    if address is None:
        if role is SecurityRole.INFERENCE:
            fix = "Write the address that this server has in the WireGuard network."
            notes.error("missing-key", "security.address", "nothing", f"a host address in {network}", fix)
        address = Ipv4(network.address + 1)
    if used or declared.address is not None:
        _check_addresses(notes, declared, network, address)
    _check_ports(notes, declared, spec, role)
    inference, limits = declared.inference, declared.limits
    return Profile(
        role=role,
        name=declared.name or role.value,
        network=network,
        address=address,
        listen=declared.listen,
        names=tuple(dict.fromkeys(declared.names)),
        peers=tuple(SecurityPeer(one.name, one.address, one.endpoint, one.public_key) for one in declared.peers),
        socket=inference.socket,
        socket_group=inference.group,
        inference_port=inference.port,
        limits=Limits(limits.body_bytes, limits.request_s, limits.idle_s, limits.concurrency, limits.per_client_per_s),
        log_dropped=declared.log_dropped,
    )


def role_firewall(profile: Profile, listening: Iterable[int] = ()) -> Firewall:
    """What of a machine with that profile can be reached: its role's ports, and where its own tunnels listen."""
    tunnel = TunnelNetwork(profile.network, profile.address, WG_INTERFACES) if profile.has_wireguard else None
    return Firewall(
        tcp=profile.tcp,
        udp=tuple(dict.fromkeys((*profile.udp, *listening))),
        tunnel=tunnel,
        inner=() if profile.routes else (profile.inference_port,),
        log=profile.log_dropped,
    )


def _check_overlap(
    notes: Notes, declared: SecuritySpec, network: Prefix, spec: StateSpec, networks: Sequence[Network]
) -> None:
    """What is of two networks would be sent to one of them only."""
    for path, other in _others(spec, networks):
        if other.overlaps(network):
            given = f"{network}, the default" if declared.network is None else str(network)
            fix = f"{path} has {other}; write another network there, the same on all servers, such as 10.77.0.0/24."
            expected = "a network that overlaps no other of this host"
            notes.error("overlapping-prefixes", "security.network", given, expected, fix)
            return


def _others(spec: StateSpec, networks: Sequence[Network]) -> Iterator[tuple[str, Prefix]]:
    for one in networks:
        yield f"networks.{one.name}.subnet", one.subnet
        for index, prefix in enumerate(one.mesh.prefixes if one.mesh is not None else ()):
            yield f"networks.{one.name}.mesh.prefixes[{index}]", prefix
        if one.vpn is not None:
            yield "wireguard.vpn_server.ip_pool", one.vpn.pool
    tunnels = [(f"netmaker.networks[{index}]", one.addresses) for index, one in enumerate(spec.netmaker.networks)]
    if spec.wireguard.warp_tunnel is not None:
        tunnels.append(("wireguard.warp_tunnel", spec.wireguard.warp_tunnel.addresses))
    for path, addresses in tunnels:
        for index, (address, length) in enumerate(addresses):
            if length > 0:
                mask = Prefix(Ipv4(0), length).mask
                yield f"{path}.addresses[{index}]", Prefix(Ipv4(address & mask), length)


def _check_addresses(notes: Notes, declared: SecuritySpec, network: Prefix, own: Ipv4) -> None:
    ends = (network.address, network.address | (~network.mask & 0xFFFFFFFF))
    places = [("security.address", own)]
    places += [(f"security.peers[{index}].address", peer.address) for index, peer in enumerate(declared.peers)]
    for path, address in places:
        if address not in network or address in ends:
            fix = "Choose an address of the WireGuard network that is not its first or last."
            notes.error("address-outside", path, str(address), f"a host address in {network}", fix)
    _once(notes, "duplicate-address", "address", places)
    name = declared.name or declared.role
    names = [("security.name", name.lower())]
    names += [(f"security.peers[{index}].name", peer.name.lower()) for index, peer in enumerate(declared.peers)]
    _once(notes, "duplicate-name", "name", names)
    keys = [(f"security.peers[{index}].public_key", peer.public_key) for index, peer in enumerate(declared.peers)]
    _once(notes, "duplicate-key", "public key", [(path, key) for path, key in keys if key is not None])


def _once(notes: Notes, code: str, what: str, items: Sequence[tuple[str, Hashable]]) -> None:
    first: dict[Hashable, str] = {}
    for path, value in items:
        before = first.setdefault(value, path)
        if before != path:
            notes.error(code, path, f"{what} {value}", f"a {what} of its own", f"{before} has it; change one.")


def _check_ports(notes: Notes, declared: SecuritySpec, spec: StateSpec, role: SecurityRole) -> None:
    firewall = spec.networking.firewall
    if firewall is not None and firewall.enable:
        fix = f"The role {role} says which ports are open; remove networking.firewall, or set its enable to false."
        notes.error("two-firewalls", "networking.firewall", "a firewall beside a role's", "one of them", fix)
    if role is not SecurityRole.INFERENCE and declared.listen == declared.inference.port:
        fix = "The inference server's port must not be open to the world; choose another for one of them."
        notes.error("service-clash", "security.listen", f"port {declared.listen}", "a port of its own", fix)
    if role is SecurityRole.INFERENCE and declared.inference.port == 22:
        fix = "SSH has that port, and everybody may reach it; choose another."
        notes.error("service-clash", "security.inference.port", "port 22", "a port of its own", fix)
    server = spec.wireguard.vpn_server
    taken = [("wireguard.vpn_server.listen_port", server.listen_port)] if server is not None else []
    taken += [
        (f"netmaker.networks[{index}].listen_port", joined.listen_port)
        for index, joined in enumerate(spec.netmaker.networks)
        if joined.listen_port is not None
    ]
    for path, port in taken:
        if role is not SecurityRole.DEV and port in (WG_PORT, WG_PORT + 1):
            fix = f"The servers' WireGuard needs {WG_PORT} and {WG_PORT + 1}; choose another port."
            notes.error("service-clash", path, f"udp {port}", "a port of its own", fix)
