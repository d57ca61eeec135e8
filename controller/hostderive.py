"""What a state file means for the host: tunnels, legs, containers, names, firewall.

`derive_host` works on networks that were derived already, and says what is wrong with the rest as `statederive` does.
Imports hostmodel, model, notes, securityderive and stateschema.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from controller.hostmodel import (
    MTU_DEFAULT,
    WARP_MTU,
    Api,
    Check,
    Container,
    Datapath,
    Driver,
    Firewall,
    HostState,
    Leg,
    Netclient,
    Peer,
    Probe,
    Tunnel,
    VethEnd,
    VpnServer,
    Zone,
)
from controller.model import Ipv4, Mac, Member, Network, Prefix, Role, Service
from controller.notes import Notes
from controller.securityderive import derive_profile, role_firewall
from controller.stateschema import IFNAMSIZ, ContainerSpec, NetmakerNetwork, PeerSpec, StateSpec, WarpTunnel

API_PORTS = (8006, 9573, 9574)
"""Proxmox's and the API's: loopback and management only, whatever a file opens."""
IPV6_MTU = 1280
"""Less, and a client's interface has no IPv6: wg-quick fails where it is to send IPv6 into the tunnel."""
NETCLIENT_DEVICE = "netmaker"
"""What Netmaker's client calls its interface, in whatever namespace it runs."""
PROBE = Probe(Ipv4.parse("1.1.1.1"))
RESOLVER_HOST = 53


def with_resolver(notes: Notes, network: Network, spec: StateSpec) -> Network:
    """The network with its resolver among the members, where one is declared."""
    declared = spec.networks.get(network.name)
    if declared is None or declared.dns is None:
        return network
    path = f"networks.{network.name}.dns.address"
    address = declared.dns.address or Ipv4(network.subnet.address + RESOLVER_HOST)
    taken = {member.address: f"container {member.id}" for member in network.members}
    taken |= {network.gateway: "the gateway"} | ({network.host: "the host"} if network.host is not None else {})
    last = network.subnet.address | (~network.subnet.mask & 0xFFFFFFFF)
    if address not in network.subnet or address in (network.subnet.address, last):
        notes.error("address-outside", path, str(address), f"a host address in {network.subnet}", "Choose another.")
        return network
    if address in taken:
        notes.error("duplicate-address", path, f"{address}, {taken[address]}'s", "a free address", "Choose another.")
        return network
    member = Member(
        id=f"dns-{network.name}",
        name=f"resolver-{network.name}",
        port=_short("dns-", network.name),
        mac=Mac.derive(network.name, "resolver"),
        address=address,
        services=(Service("dns", "udp", 53), Service("dns-tcp", "tcp", 53)),
    )
    return replace(network, members=(*network.members, member))


def derive_host(
    notes: Notes,
    spec: StateSpec,
    networks: Sequence[Network],
    containers: Sequence[tuple[str, ContainerSpec]],
    *,
    whole: bool = True,
) -> HostState:
    """What of the host is asked for. `containers` are all of them, each with its path; unless it is `whole` some may be
    missing for another reason."""
    legs = tuple(_legs(notes, spec, networks))
    zones = tuple(_zones(notes, spec, networks))
    profile = derive_profile(notes, spec, networks)
    return HostState(
        datapath=Datapath(spec.host.datapath),
        uplinks=tuple(spec.host.uplinks),
        legs=legs,
        veths=tuple(
            (VethEnd(net.mesh.far_port, net.mesh.bridge), VethEnd(net.mesh.port, net.bridge))
            for net in networks
            if net.mesh is not None
        ),
        containers=tuple(_containers(notes, containers, networks, {zone.network: zone.address for zone in zones})),
        vpn=_vpn(notes, spec, networks, zones),
        zones=zones,
        firewall=_firewall(notes, spec, networks) if profile is None else role_firewall(profile, _listening(spec)),
        api=_api(notes, spec, networks, whole=whole),
        checks=tuple(_checks(notes, networks, containers)),
        security=profile,
    )


# Legs.


def device(port: str) -> str:
    """The WireGuard interface behind a leg's port. It is made in the host's namespace, where the port has the port's
    name already."""
    return _short("wg-", port)


def _short(prefix: str, name: str) -> str:
    """An interface's name made of another name: with a digest in its place where it would be too long, so that two that
    begin alike stay apart."""
    whole = f"{prefix}{name}"
    if len(whole) <= IFNAMSIZ:
        return whole
    return f"{prefix}{hashlib.sha256(name.encode()).hexdigest()[: IFNAMSIZ - len(prefix)]}"


def _legs(notes: Notes, spec: StateSpec, networks: Sequence[Network]) -> Iterator[Leg]:
    warp = spec.wireguard.warp_tunnel
    for network in networks:
        if network.egress is not None:
            mine = warp if warp is not None and warp.interface == network.egress.port else None
            tunnel = _warp(notes, mine, network.egress.port)
            probe = Probe(mine.probe.address, mine.probe.port) if mine is not None and mine.probe is not None else PROBE
            enabled = mine is None or mine.enabled
            port = network.egress.port
            yield Leg(network.name, Role.EGRESS, network.bridge, port, tunnel, None, probe, enabled)
        if network.mesh is not None:
            found = [
                (f"netmaker.networks[{index}]", joined)
                for index, joined in enumerate(spec.netmaker.networks)
                if joined.interface == network.mesh.leg_port
            ]
            tunnel, netclient = Tunnel(device(network.mesh.leg_port), mtu=MTU_DEFAULT), None
            if found:
                tunnel, netclient = _mesh(notes, found[0][0], found[0][1], network)
            yield Leg(network.name, Role.MESH, network.mesh.bridge, network.mesh.leg_port, tunnel, netclient)


def _warp(notes: Notes, warp: WarpTunnel | None, interface: str) -> Tunnel:
    if warp is None:
        return Tunnel(device(interface), mtu=WARP_MTU)
    path = "wireguard.warp_tunnel"
    if len(warp.peers) > 1:
        fix = "A kill switch needs to know the one endpoint that packets may go to; keep one peer."
        notes.error("too-many", f"{path}.peers", f"{len(warp.peers)} peers", "one peer", fix)
    if warp.peers and warp.peers[0].endpoint is None:
        fix = "Write the address and port that the tunnel is sent to."
        notes.error("missing-key", f"{path}.peers[0].endpoint", "nothing", "the endpoint of the tunnel", fix)
    return Tunnel(
        device(interface),
        config=warp.config,
        private_key_file=warp.private_key_file,
        addresses=tuple(warp.addresses),
        mtu=warp.mtu or (None if warp.config is not None else WARP_MTU),
        peers=_peers(warp.peers),
    )


def _mesh(notes: Notes, path: str, joined: NetmakerNetwork, network: Network) -> tuple[Tunnel, Netclient | None]:
    if joined.token_file is not None and joined.server is None:
        notes.error("missing-key", f"{path}.server", "nothing", "the server the token is for", "Add it.")
    if joined.token_file is not None and joined.peers:
        fix = "Netmaker's client brings its own peers; keep either token_file or peers."
        notes.error("two-meshes", f"{path}.peers", "peers beside token_file", "one of them", fix)
    _disjoint_peers(notes, path, joined.peers)
    assert network.mesh is not None
    for index, peer in enumerate(joined.peers):
        for prefix in peer.allowed_ips:
            here = next((one for one in network.members if one.address in prefix and prefix.length == 32), None)
            if here is not None:
                fix = f"That address is here, with container {here.id}; a peer cannot have it too."
                where = f"{path}.peers[{index}].allowed_ips"
                notes.error("duplicate-address", where, str(prefix), "addresses of elsewhere", fix)
    joins = joined.server is not None and joined.token_file is not None
    tunnel = Tunnel(
        NETCLIENT_DEVICE if joins else device(joined.interface),
        config=joined.config,
        private_key_file=joined.private_key_file,
        addresses=tuple(joined.addresses),
        listen_port=joined.listen_port,
        mtu=joined.mtu or (None if joined.config is not None else MTU_DEFAULT),
        peers=_peers(joined.peers),
    )
    return tunnel, Netclient(str(joined.server), joined.token_file) if joins and joined.token_file else None


def _peers(specs: Sequence[PeerSpec]) -> tuple[Peer, ...]:
    return tuple(
        Peer(
            spec.public_key,
            tuple(spec.allowed_ips),
            spec.endpoint,
            spec.persistent_keepalive,
            spec.preshared_key_file,
        )
        for spec in specs
    )


def _disjoint_peers(notes: Notes, path: str, peers: Sequence[PeerSpec]) -> None:
    """An allowed address belongs to one peer: WireGuard gives it silently to the last one."""
    owner: dict[Prefix, str] = {}
    keys: dict[str, str] = {}
    for index, peer in enumerate(peers):
        where = f"{path}.peers[{index}]"
        before = keys.setdefault(peer.public_key, where)
        if before != where:
            notes.error("duplicate-key", f"{where}.public_key", "a public key", "a key of its own", f"{before} has it.")
        for prefix in peer.allowed_ips:
            other = owner.setdefault(prefix, where)
            if other != where:
                fix = f"{other} has it; an address belongs to one peer."
                notes.error("duplicate-prefix", f"{where}.allowed_ips", str(prefix), "a prefix of its own", fix)


# Containers.


def _containers(
    notes: Notes,
    containers: Sequence[tuple[str, ContainerSpec]],
    networks: Sequence[Network],
    resolvers: dict[str, Ipv4],
) -> Iterator[Container]:
    specs = {one.id: (path, one) for path, one in containers}
    for network in networks:
        resolver = resolvers.get(network.name)
        dns = (resolver,) if resolver is not None else ()
        for member in network.members:
            if member.id not in specs:  # the resolver
                yield Container(member.id, order=-1, dns=dns)
                continue
            path, one = specs[member.id]
            _check_container(notes, path, one)
            wants_lxc = one.template is not None or one.rootfs is not None
            driver = Driver(one.driver) if one.driver is not None else Driver.LXC if wants_lxc else Driver.NETNS
            yield Container(
                member.id,
                driver=driver,
                running=one.running,
                command=tuple(one.command),
                template=one.template or ("busybox" if driver is Driver.LXC and one.rootfs is None else None),
                rootfs=one.rootfs,
                order=one.order,
                dns=dns,
            )


def _check_container(notes: Notes, path: str, one: ContainerSpec) -> None:
    lxc = one.driver == "lxc" or (one.driver is None and (one.template or one.rootfs))
    if lxc and one.command:
        fix = "An LXC container runs its own init; remove command, or use driver netns."
        notes.error("driver-mismatch", f"{path}.command", "a command", "no command with driver lxc", fix)
    if not lxc and (one.template or one.rootfs):
        fix = "A template and a root file system are for driver lxc."
        notes.error("driver-mismatch", f"{path}.driver", "netns", "lxc", fix)
    if one.template and one.rootfs:
        notes.error("driver-mismatch", f"{path}.rootfs", "a template and a rootfs", "one of them", "Remove one.")


# VPN, names, firewall.


def _vpn(notes: Notes, spec: StateSpec, networks: Sequence[Network], zones: Sequence[Zone]) -> VpnServer | None:
    server = spec.wireguard.vpn_server
    network = next((net for net in networks if net.vpn is not None), None)
    if server is None or network is None or network.vpn is None:
        return None
    pool = network.vpn.pool
    if pool.length > 30:
        fix = "The server takes the first address and every client one more; write a larger pool."
        notes.error("bad-prefix", "wireguard.vpn_server.ip_pool", str(pool), "a pool of at least a /30", fix)
        return None
    egress = spec.wireguard.warp_tunnel
    outer = (egress.mtu if egress is not None else None) or WARP_MTU
    resolvers = tuple(zone.address for zone in zones if zone.network == network.name)
    return VpnServer(
        container_id=network.vpn.member_id,
        tunnel=Tunnel(
            server.interface,
            private_key_file=server.private_key_file,
            addresses=((Ipv4(pool.address + 1), pool.length),),
            listen_port=server.listen_port,
            mtu=max(IPV6_MTU, min(outer, MTU_DEFAULT)),
        ),
        pool=pool,
        endpoint=server.endpoint,
        dns=tuple(server.dns) or resolvers,
    )


def _zones(notes: Notes, spec: StateSpec, networks: Sequence[Network]) -> Iterator[Zone]:
    domains: dict[str, str] = {}
    for network in networks:
        declared = spec.networks.get(network.name)
        member = next((one for one in network.members if one.id == f"dns-{network.name}"), None)
        if declared is None or declared.dns is None or member is None:
            continue
        path = f"networks.{network.name}.dns"
        domain = declared.dns.domain or f"{network.name.lower()}.internal"
        other = domains.setdefault(domain, network.name)
        if other != network.name:
            notes.error("duplicate-name", f"{path}.domain", domain, "a domain of its own", f"{other} has it.")
        if declared.dns.upstream and network.egress is None and network.mesh is None:
            fix = "The network has no way out, so nobody would answer; remove upstream."
            notes.error("no-egress", f"{path}.upstream", "upstream resolvers", "none", fix)
        yield Zone(network.name, member.id, domain, member.address, tuple(declared.dns.upstream))


def _firewall(notes: Notes, spec: StateSpec, networks: Sequence[Network]) -> Firewall | None:
    declared = spec.networking.firewall
    if declared is None or not declared.enable:
        return None
    path = "networking.firewall"
    private = {
        name: network.name
        for network in networks
        if network.host is None
        for name in (network.bridge, *((network.mesh.bridge,) if network.mesh is not None else ()))
    }
    for index, name in enumerate(declared.trustedInterfaces):
        if name in private:
            fix = "The host does not take part in that network, and must not trust what comes from it; remove it."
            where = f"{path}.trustedInterfaces[{index}]"
            notes.error("untrusted", where, f"{name} of {private[name]}", "a network the host takes part in", fix)
    local = tuple(port for port in declared.allowedTCPPorts if port in (*API_PORTS, spec.api.port))
    for port in local:
        where = f"{path}.allowedTCPPorts[{declared.allowedTCPPorts.index(port)}]"
        fix = "Reachable from loopback and trusted interfaces alone: whoever reaches it controls the node."
        notes.warn("api-port-open", where, f"port {port} open to the world", "not from everywhere", fix)
    return Firewall(
        tcp=tuple(port for port in dict.fromkeys(declared.allowedTCPPorts) if port not in local),
        udp=tuple(dict.fromkeys((*declared.allowedUDPPorts, *_listening(spec)))),
        local_tcp=tuple(dict.fromkeys(local)),
        trusted=tuple(dict.fromkeys(declared.trustedInterfaces)),
    )


def _listening(spec: StateSpec) -> list[int]:
    """Where the meshes' own tunnels listen."""
    return [joined.listen_port for joined in spec.netmaker.networks if joined.listen_port is not None]


# The API, and the health of services.


def _api(notes: Notes, spec: StateSpec, networks: Sequence[Network], *, whole: bool) -> Api:
    declared = spec.api
    api = Api(
        port=declared.port,
        self_approval=declared.self_approval,
        certificate=declared.certificate,
        private_key=declared.private_key,
    )
    if (api.certificate is None) != (api.private_key is None):
        missing = "certificate" if api.certificate is None else "private_key"
        fix = "A certificate and its private key belong together; write both, or neither."
        notes.error("missing-key", f"api.{missing}", "nothing", f"the key {missing}", fix)
    found = _api_member(spec, networks)
    if found is None:
        if declared.container is not None and whole:
            fix = "Name the id of a container of a network without an egress, or null."
            notes.error("api-container", "api.container", declared.container, "a declared container", fix)
        return api
    network, member = found
    if network.egress is not None:
        was = f"container {member.id} of {network.name}"
        fix = "Everybody whose traffic leaves by that network could try to get in; choose one of the control plane."
        notes.error("api-exposed", "api.container", was, "a container of a network without an egress", fix)
        return api
    return replace(api, container_id=member.id, address=member.address)


def _api_member(spec: StateSpec, networks: Sequence[Network]) -> tuple[Network, Member] | None:
    """The container it is told, or the only one that offers it as a service, on a network without an egress."""
    everyone = [(network, member) for network in networks for member in network.members]
    if "container" in spec.api.model_fields_set:
        return next((pair for pair in everyone if pair[1].id == spec.api.container), None)
    offers = [
        (network, member)
        for network, member in everyone
        if network.egress is None
        and any((one.name.lower(), one.protocol, one.port) == ("api", "tcp", spec.api.port) for one in member.services)
    ]
    return offers[0] if len(offers) == 1 else None


def _checks(
    notes: Notes, networks: Sequence[Network], containers: Sequence[tuple[str, ContainerSpec]]
) -> Iterator[Check]:
    members = {member.id: member for network in networks for member in network.members}
    for path, one in containers:
        for number, service in enumerate(one.properties.services):
            if service.check is None:
                continue
            if service.protocol != "tcp":
                fix = "Whether anybody listens cannot be told by UDP; remove check."
                where = f"{path}.properties.services[{number}].check"
                notes.error("check-mismatch", where, f"a check of a {service.protocol} service", "none", fix)
            elif one.running and one.id in members:
                yield Check(one.id, service.name, members[one.id].address, service.port, service.check)
