"""Desired states for tests: two networks as most hosts have them, and hypothesis strategies for any valid state.

"Valid" is what the reader of state files lets through: disjoint prefixes, unique names, addresses and MACs, members
inside their subnet and not on a reserved address, rules narrowed to what their receiver may get.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from hypothesis import strategies as st

from controller.grants import passage_ports
from controller.model import (
    Bridge,
    BridgeKind,
    DesiredState,
    Egress,
    Grant,
    Ipv4,
    Mac,
    Member,
    Mesh,
    Network,
    Prefix,
    Protocol,
    Rule,
    Service,
    Vpn,
)
from tests.fakes.switch import FakeSwitch, Wired

VPN_PORT = 51820
WORLD = tuple(map(Ipv4.parse, ("1.1.1.1", "8.8.8.8", "93.184.216.34")))


def member(network: str, number: int, address: str, *services: Service, routed: tuple[Prefix, ...] = ()) -> Member:
    """A container; its id is `number`, its port veth<number>."""
    mac = Mac.derive(network, "container", str(number))
    return Member(str(number), f"c{number}", f"veth{number}", mac, Ipv4.parse(address), services, routed)


def mesh(network: str, *prefixes: Prefix) -> Mesh:
    """A mesh; its ports are from-, to- and nm-<network>."""
    ports = (f"from-{network}"[:15], f"to-{network}"[:15], f"nm-{network}"[:15])
    return Mesh(f"mesh-{network}", *ports, Mac.derive(network, "mesh"), prefixes)


def privacy(*members: Member) -> Network:
    """Users' traffic on vmbr0: an egress, a mesh, a VPN server (100) and another container (102), unless told."""
    name, subnet, pool = "privacy", Prefix.parse("10.0.0.0/24"), Prefix.parse("10.8.0.0/24")
    mac = Mac.derive(name, "gateway")
    return Network(
        name,
        "vmbr0",
        subnet,
        Ipv4.parse("10.0.0.1"),
        mac,
        (100, 199),
        egress=Egress("warp0", mac),
        mesh=mesh(name, subnet),
        refuse=True,
        members=members or (member(name, 100, "10.0.0.100", routed=(pool,)), member(name, 102, "10.0.0.102")),
        vpn=None if members else Vpn("100", VPN_PORT, pool),
    )


def management(*members: Member) -> Network:
    """The control plane on vmbr1: a mesh, the host as gateway, and two containers with services, unless told."""
    name, subnet = "management", Prefix.parse("10.1.0.0/24")
    return Network(
        name,
        "vmbr1",
        subnet,
        Ipv4.parse("10.1.0.1"),
        Mac.derive(name, "gateway"),
        (200, 299),
        mesh=mesh(name, subnet),
        host=Ipv4.parse("10.1.0.1"),
        members=members
        or (
            member(name, 200, "10.1.0.200", Service("mcp", "tcp", 9573, exposed=True)),
            member(name, 201, "10.1.0.201", Service("api", "tcp", 9573), Service("dns", "udp", 53)),
        ),
    )


def state_of(*networks: Network, digest: str = "") -> DesiredState:
    """A state of these networks and the bridges they need."""
    bridges = [Bridge(network.bridge, BridgeKind.SOCKET, network.name) for network in networks]
    bridges += [Bridge(n.mesh.bridge, BridgeKind.MESH, n.name) for n in networks if n.mesh is not None]
    return DesiredState(networks, tuple(bridges), digest)


def two_networks(digest: str = "two") -> DesiredState:
    """privacy and management."""
    return state_of(privacy(), management(), digest=digest)


def with_network(state: DesiredState, name: str, **changes: object) -> DesiredState:
    """The state with some fields of one network replaced."""
    networks = [replace(n, **changes) if n.name == name else n for n in state.networks]  # type: ignore[arg-type]
    return state_of(*networks, digest=state.digest + "'")


def wanted_ports(state: DesiredState, bridge: Bridge) -> list[str]:
    """Names of the ports that a bridge is declared to have, without LOCAL."""
    network = state.network(bridge.network)
    if bridge.kind is BridgeKind.MESH:
        assert network.mesh is not None
        return [network.mesh.leg_port, network.mesh.far_port]
    passages = list(passage_ports(state, bridge.name).values())
    names = [network.egress.port] if network.egress else []
    names += [network.mesh.port] if network.mesh else []
    return names + [member.port for member in network.members] + passages


def switch_for(state: DesiredState, name: str, *, dpid: int = 0, without: Iterable[str] = ()) -> FakeSwitch:
    """A fake of that bridge with its ports numbered from 1, in declared order."""
    bridge = state.bridge(name)
    assert bridge is not None
    left_out = set(without)
    names = [port for port in wanted_ports(state, bridge) if port not in left_out]
    ports = {port: number for number, port in enumerate(names, start=1)}
    dpid = dpid or 1 + [b.name for b in state.bridges].index(name)
    return FakeSwitch(name, bridge.datapath_id or dpid, ports, mesh=bridge.kind is BridgeKind.MESH)


def started(state: DesiredState | None = None) -> tuple[Wired, dict[str, FakeSwitch]]:
    """A core with a switch for every bridge, all of them up and steady, and the switches by name."""
    state = state or two_networks()
    switches = {bridge.name: switch_for(state, bridge.name) for bridge in state.bridges}
    wired = Wired(state, *switches.values())
    wired.up()
    return wired, switches


# --------------------------------------------------------------------------------------------------------- strategies


class _Site(NamedTuple):
    """Prefixes that one random network may have; no two sites overlap."""

    subnet: Prefix
    more: Prefix
    pool: Prefix


_SITES = tuple(
    _Site(*map(Prefix.parse, texts))
    for texts in (
        ("10.0.0.0/24", "10.0.64.0/20", "10.8.0.0/24"),
        ("10.1.0.0/24", "10.1.0.0/16", "10.9.0.0/25"),
        ("198.51.100.0/25", "203.0.113.0/24", "198.18.0.0/24"),
        ("192.168.0.0/16", "172.20.0.0/14", "100.64.0.0/16"),
        ("10.2.0.8/29", "10.2.1.0/24", "10.9.0.128/25"),
    )
)
_MOSTLY = st.sampled_from((True, True, True, False))
_PROTOCOLS: tuple[Protocol, ...] = ("tcp", "udp", "sctp")
_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_SERVICE_PORTS = (53, 67, 80, 9573, 9574, VPN_PORT)


@st.composite
def _members(draw: st.DrawFn, name: str, index: int, site: _Site, reserved: set[int]) -> tuple[Member, ...]:
    room = [Ipv4(site.subnet.address + offset) for offset in (2, 3, 4, 5, 6)]
    free = [address for address in room if address not in reserved]
    addresses = draw(
        st.lists(st.sampled_from(free), min_size=draw(st.sampled_from((0, 1, 2, 2))), max_size=4, unique=True)
    )
    members = []
    for place, address in enumerate(addresses):
        offered = draw(
            st.lists(
                st.tuples(st.sampled_from(_PROTOCOLS), st.sampled_from(_SERVICE_PORTS), st.booleans()),
                max_size=3,
                unique_by=lambda service: service[:2],
            )
        )
        services = [Service(f"s{n}", *service) for n, service in enumerate(offered)]
        members.append(member(name, 100 * (index + 1) + place, str(address), *services))
    return tuple(members)


def _vpn(network: Network, port: int, pool: Prefix) -> Network:
    """The first member becomes a VPN server."""
    server = network.members[0]
    services = tuple(s for s in server.services if (s.protocol, s.port) != ("udp", port))
    server = replace(server, services=services, routed=(pool,))
    return replace(network, members=(server, *network.members[1:]), vpn=Vpn(server.id, port, pool))


@st.composite
def _networks(draw: st.DrawFn, index: int, site: _Site, rules: bool) -> Network:
    name = ("privacy", "management", "guests")[index]
    gateway = Ipv4(site.subnet.address + 1)
    gateway_mac = Mac.derive(name, "gateway")
    host = draw(st.sampled_from((gateway, Ipv4(site.subnet.address + 2), None)))
    prefixes = draw(st.sampled_from(((site.subnet,), (site.more,), (site.subnet, site.more))))
    egress_mac = draw(st.sampled_from((gateway_mac, Mac.derive(name, "egress"))))
    network = Network(
        name,
        f"vmbr{index}",
        site.subnet,
        gateway,
        gateway_mac,
        (100 * (index + 1), 100 * (index + 1) + 99),
        egress=Egress(f"warp{index}", egress_mac) if draw(_MOSTLY) else None,
        mesh=mesh(name, *prefixes) if draw(_MOSTLY) else None,
        host=host,
        refuse=draw(st.booleans()),
        members=draw(_members(name, index, site, {gateway, host or gateway})),
    )
    serves: bool = draw(st.booleans())
    if network.members and serves:
        network = _vpn(network, draw(st.sampled_from((VPN_PORT, 9573))), site.pool)
    return replace(network, rules=draw(_rules(network))) if rules else network


@st.composite
def _rules(draw: st.DrawFn, network: Network) -> tuple[Rule, ...]:
    return tuple(draw(_rule(network, rank)) for rank in range(1, 1 + draw(st.integers(0, 3))))


@st.composite
def _rule(draw: st.DrawFn, network: Network, rank: int) -> Rule:
    """A rule as literal flows become: a receiver gets its own addresses only, and nobody sends to the egress by one."""
    inside = [member.port for member in network.members] + ([network.mesh.port] if network.mesh else [])
    host = ["LOCAL"] if network.host is not None else []
    egress = [network.egress.port] if network.egress else []
    output = draw(st.sampled_from([None, *inside, *host]))
    sources = [port for port in inside if port != output] + ([*host, *egress] if output is None else [])
    in_port = draw(st.sampled_from([None, *sources]))
    match: dict[str, tuple[int, int]] = {"eth_type": (0x0800, 0xFFFF)}
    receiver = next((member for member in network.members if member.port == output), None)
    if receiver is not None:
        own = [(int(receiver.address), 0xFFFFFFFF), *((int(p.address), p.mask) for p in receiver.routed)]
        match["ipv4_dst"] = draw(st.sampled_from(own))
    elif output == "LOCAL":
        match["ipv4_dst"] = (int(network.host or 0), 0xFFFFFFFF)
    elif draw(st.booleans()):
        prefix = draw(st.sampled_from([*network.prefixes, Prefix.parse("8.8.0.0/16")]))
        match["ipv4_dst"] = (int(prefix.address), prefix.mask)
    protocol = draw(st.sampled_from((None, *_PROTOCOLS)))
    if protocol is not None:
        match["ip_proto"] = (_NUMBERS[protocol], 0xFF)
        if draw(st.booleans()):
            match[f"{protocol}_dst"] = (draw(st.sampled_from(_SERVICE_PORTS)), 0xFFFF)
    path = f"openflow.bridges.{network.bridge}.flows[{rank}]"
    return Rule(path, path, rank, tuple((n, *pair) for n, pair in match.items()), in_port, output)


@st.composite
def states(draw: st.DrawFn, *, max_networks: int = 3, rules: bool = True, least: int = 1) -> DesiredState:
    """Any valid state of one to three networks."""
    count = draw(st.integers(least, max_networks))
    sites = draw(st.permutations(_SITES))[:count]
    networks = [draw(_networks(index, site, rules)) for index, site in enumerate(sites)]
    return state_of(*networks, digest="random")


@st.composite
def granted_states(draw: st.DrawFn, *, least: int = 1) -> DesiredState:
    """A valid state of two or three networks with some grants, `least` at least where there are members to grant to."""
    state = draw(states(least=2))
    return replace(state, grants=draw(grants_of(state, least=least)), digest="granted")


@st.composite
def grants_of(draw: st.DrawFn, state: DesiredState, *, least: int = 0) -> tuple[Grant, ...]:
    """Some grants between the members of a state: the same cell twice, both ways at once, and ones that cannot be."""
    ids = [member.id for network in state.networks for member in network.members]
    if len(ids) < 2:
        return ()
    pair = st.tuples(st.sampled_from(ids), st.sampled_from([*ids, "999"]))
    cell = st.tuples(pair, st.sampled_from(_PROTOCOLS), st.sampled_from((22, 53, 8080, VPN_PORT)))
    drawn = draw(st.lists(cell, min_size=least, max_size=6))
    return tuple(Grant(str(n), *ends, protocol, port) for n, (ends, protocol, port) in enumerate(drawn, start=1))


@st.composite
def port_maps(draw: st.DrawFn, state: DesiredState, bridge: Bridge, *, whole: bool = False) -> dict[str, int]:
    """Ports a bridge may have: some of the declared ones (or all, if `whole`), and some that nobody declared."""
    names = wanted_ports(state, bridge)
    if not whole and names and not draw(_MOSTLY):
        absent = draw(st.sets(st.sampled_from(names)))
        names = [name for name in names if name not in absent]
    names = names + draw(st.sampled_from(([], [], ["stray0"])))
    numbers = draw(st.lists(st.integers(1, 40), min_size=len(names), max_size=len(names), unique=True))
    return dict(zip(names, numbers, strict=True))


def fake(state: DesiredState, bridge: Bridge, ports: Mapping[str, int]) -> FakeSwitch:
    """A fake of a declared bridge with these ports."""
    dpid = 1 + [b.name for b in state.bridges].index(bridge.name)
    return FakeSwitch(bridge.name, dpid, ports, mesh=bridge.kind is BridgeKind.MESH)
