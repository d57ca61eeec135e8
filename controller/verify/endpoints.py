"""Who there is to ask about: containers, and each network's egress, mesh and host; and packets as these would send them.

Imports model, compile's words for ports, and space.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from controller import fields
from controller.frame import LOCAL_NAME
from controller.model import DesiredState, Ipv4, Mac, Member, Network, Prefix, Role
from controller.problems import BulkheadError
from controller.verify.links import End
from controller.verify.policy import IP, PROTOCOLS
from controller.verify.space import bits

SOMEBODY = Ipv4.parse("198.51.100.10")
"""Somebody in the world, for an example (RFC 5737)."""
CLIENT_PORT = 40000


class NotFound(BulkheadError):
    """Nobody, or more than one, has that name."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Somebody who sends and receives: by `end`, with this Ethernet and IPv4 address.

    `name` is a container's, or `NETWORK/egress`, `NETWORK/mesh`, `NETWORK/host`. `mac` is whose frames come in by `end`.
    """

    name: str
    network: str
    role: Role
    end: End
    mac: Mac
    address: Ipv4
    member: Member | None = None


def endpoints(state: DesiredState) -> tuple[Endpoint, ...]:
    """Everybody, network by network."""
    taken: dict[str, int] = {}
    for network in state.networks:
        for member in network.members:
            taken[member.name] = taken.get(member.name, 0) + 1
    return tuple(e for network in state.networks for e in _of(network, taken))


def _of(network: Network, taken: dict[str, int]) -> Iterator[Endpoint]:
    name, bridge = network.name, network.bridge
    for member in network.members:
        called = member.name if taken[member.name] == 1 else f"{name}/{member.name}"
        yield Endpoint(called, name, Role.CONTAINER, (bridge, member.port), member.mac, member.address, member)
    if network.egress is not None:
        yield Endpoint(f"{name}/egress", name, Role.EGRESS, (bridge, network.egress.port), network.egress.mac, SOMEBODY)
    if network.mesh is not None:
        end = network.mesh.bridge, network.mesh.leg_port
        peer = _free(network, network.mesh.prefixes)
        yield Endpoint(f"{name}/mesh", name, Role.MESH, end, network.mesh.mac, peer)
    host = network.host or network.gateway
    yield Endpoint(f"{name}/host", name, Role.HOST, (bridge, LOCAL_NAME), network.gateway_mac, host)


def _free(network: Network, prefixes: tuple[Prefix, ...]) -> Ipv4:
    """An address across the mesh that nobody has here: the last that is free."""
    mine = {member.address for member in network.members} | {network.gateway, network.host}
    for prefix in prefixes:
        last = prefix.address | ~prefix.mask & 0xFFFFFFFF
        for address in range(last - 1, max(prefix.address, last - 4096), -1):
            if address not in mine:
                return Ipv4(address)
    return Ipv4(prefixes[0].address)


def find(state: DesiredState, word: str) -> Endpoint:
    """The endpoint of that name, container id, port, or address; an address across a mesh is the mesh's, one outside
    every network the egress's; both are then asked about with that address.

    `internet` is the only egress there is, `egress`, `mesh` and `host` likewise. Raises `NotFound`, with who there is.
    """
    everybody = endpoints(state)
    found = [e for e in everybody if word in _names(e)]
    if not found:
        found = list(_by_address(state, everybody, word))
    if len(found) == 1:
        return found[0]
    names = [e.name for e in everybody]
    if found:
        raise NotFound(f"{word!r} is more than one: say {' or '.join(e.name for e in found)}")
    close = [name for name in names if word and word in name][:1]
    close = close or (difflib.get_close_matches(word, names, n=1) if len(names) <= 2000 else [])
    hint = (
        f"did you mean {close[0]}?" if close else f"there are {', '.join(names[:12])}{' …' if len(names) > 12 else ''}"
    )
    raise NotFound(
        f"nobody is called {word[:60]!r}; {hint}. An IPv4 address, a container's id or a port's name will do too"
    )


def _names(endpoint: Endpoint) -> set[str]:
    bridge, port = endpoint.end
    names = {endpoint.name, f"{bridge}:{port}", f"{endpoint.network}/{endpoint.role}"}
    if port != LOCAL_NAME:
        names.add(port)
    if endpoint.member is not None:
        names |= {endpoint.member.id, endpoint.member.name, f"{endpoint.network}/{endpoint.member.name}"}
        return names - {f"{endpoint.network}/{endpoint.role}"}
    names.add(str(endpoint.role))
    return names | {"internet"} if endpoint.role is Role.EGRESS else names


def _by_address(state: DesiredState, everybody: tuple[Endpoint, ...], word: str) -> Iterator[Endpoint]:
    try:
        address = Ipv4.parse(word)
    except ValueError:
        return
    here = [e for e in everybody if e.member is not None and _has(e.member, address)]
    if here:
        yield from here
        return
    for network in state.networks:
        mine = [e for e in everybody if e.network == network.name]
        if address in (network.host, network.gateway):
            yield from (e for e in mine if e.role is Role.HOST)
            return
    for network in state.networks:
        if any(address in prefix for prefix in (network.mesh.prefixes if network.mesh else ())):
            mesh = (e for e in everybody if e.network == network.name and e.role is Role.MESH)
            yield from (replace(e, address=address) for e in mesh)
            return
    if not any(address in prefix for network in state.networks for prefix in network.prefixes):
        yield from (replace(e, address=address) for e in everybody if e.role is Role.EGRESS)


def _has(member: Member, address: Ipv4) -> bool:
    return address == member.address or any(address in prefix for prefix in member.routed)


def packet(source: Endpoint, target: Endpoint, protocol: str = "tcp", port: int = 80, *, to: Ipv4 | None = None) -> int:
    """A packet as `source` would send it to `target`, as a header of `space`. `protocol` may be icmp: an echo request."""
    header = _ethernet(source) | bits(fields.ETH_TYPE, IP)[0] | bits(fields.IP_TTL, 64)[0]
    header |= bits(fields.IPV4_SRC, source.address)[0] | bits(fields.IPV4_DST, target.address if to is None else to)[0]
    if protocol == "icmp":
        return header | bits(fields.IP_PROTO, 1)[0] | bits(fields.ICMPV4_TYPE, 8)[0]
    number, from_field, to_field = PROTOCOLS[protocol]
    return header | bits(fields.IP_PROTO, number)[0] | bits(from_field, CLIENT_PORT)[0] | bits(to_field, port)[0]


def _ethernet(source: Endpoint) -> int:
    # Whom a packet is sent to does not matter here: the gateway answers for everybody, and so does ARP by flow.
    return bits(fields.ETH_SRC, source.mac)[0] | bits(fields.ETH_DST, Mac.derive("bulkhead", "anybody"))[0]


def services(target: Endpoint, vpn_port: int | None = None) -> dict[tuple[str, int], str]:
    """What a container offers: protocol and port to name."""
    if target.member is None:
        return {}
    found: dict[tuple[str, int], str] = {} if vpn_port is None else {("udp", vpn_port): "vpn"}
    return found | {(s.protocol, s.port): s.name for s in reversed(target.member.services)}


def vpn_port(state: DesiredState, target: Endpoint) -> int | None:
    """The UDP port of the VPN server that an endpoint is, if it is one."""
    vpn = state.network(target.network).vpn
    return vpn.port if vpn is not None and target.member is not None and vpn.member_id == target.member.id else None
