"""Laws that hold for any state, any packet and any history.

The oracle (`Policy`) says from the state file's words alone who may send what to whom; it knows neither apps nor
tables. Packets go through the compiled flows on the fake switch.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from controller.codec import FlowRemoved, FlowUpdate, PacketIn, Update
from controller.compile import CANARY_FLOW, UNDECLARED_FLOW, BridgeCompiler, Names, planned_ports
from controller.diff import plan
from controller.fields import BY_NAME, LOCAL
from controller.flow import Cookie, Flow, FlowKey, Load, Match, Output, SetField, is_learned, is_ours
from controller.frame import Port
from controller.model import Bridge, BridgeKind, DesiredState, Ipv4, Mac, Network, Prefix, Role
from controller.pipeline import OUT_BITS, OUTPUT_GUARD, RETURN, RETURNED, ROLE_BITS, Violation
from controller.problems import error
from controller.signals import (
    BridgeFacts,
    Committed,
    Counted,
    EgressHealth,
    FactsSeen,
    FlowGone,
    FlowsChanged,
    PacketSeen,
    Refused,
    StateLoaded,
    StateRejected,
    SwitchError,
    Tick,
)
from tests.fakes.effort import examples
from tests.fakes.states import VPN_PORT, WORLD, fake, port_maps, states
from tests.fakes.switch import Dropped, FakeSwitch, Packet, Sent, Shown, Wired, packet, show

lawful = settings(deadline=None, max_examples=examples(40), suppress_health_check=list(HealthCheck))
PACKETS = 120
IPV4, ARP, IPV6, LLDP = 0x0800, 0x0806, 0x86DD, 0x88CC
TCP, UDP = 6, 17

# Who may send to whom, as the design says it; deliberately not the app's own table.
MAY = {
    (Role.CONTAINER, Role.CONTAINER),
    (Role.CONTAINER, Role.EGRESS),
    (Role.CONTAINER, Role.MESH),
    (Role.CONTAINER, Role.HOST),
    (Role.MESH, Role.CONTAINER),
    (Role.MESH, Role.EGRESS),
    (Role.EGRESS, Role.CONTAINER),
    (Role.EGRESS, Role.MESH),
    (Role.HOST, Role.CONTAINER),
}
NOT_THE_WORLD = [Prefix.parse(t) for t in ("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")]
NOBODY = [Prefix.parse(t) for t in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")]
NOT_THE_WORLD += [Prefix.parse(t) for t in ("100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")]


def flows_of(
    state: DesiredState, bridge: Bridge, ports: Mapping[str, Port], egress_up: bool = True
) -> dict[FlowKey, Flow]:
    """The bridge's flows, compiled from nothing."""
    return dict(BridgeCompiler().compile(state, bridge, ports, egress_up).flows)


def as_core_sees(switch: FakeSwitch) -> dict[str, Port]:
    """The switch's ports by the names that the core gives them."""
    return {"LOCAL" if port.number == LOCAL else name: port for name, port in switch.ports.items()}


# --------------------------------------------------------------------------------------------------- plans and flows


@st.composite
def desired_flows(draw: st.DrawFn) -> dict[FlowKey, Flow]:
    state = draw(states())
    bridge = draw(st.sampled_from(state.bridges))
    return flows_of(state, bridge, planned_ports(state, bridge))


@given(desired_flows())
@lawful
def test_a_plan_of_a_state_against_itself_is_empty(flows: dict[FlowKey, Flow]) -> None:
    assert not plan(flows, dict(flows))
    # The same values, but other objects, as a dump gives them.
    copies = [replace(flow, actions=tuple(flow.actions)) for flow in flows.values()]
    assert not plan(flows, {flow.key: flow for flow in copies})


FOREIGN_COOKIES = st.sampled_from((0, 1, 0xDEADBEEF, 0xB01D << 48, 0xB01B << 48 | 5, 0x1C << 48))


@st.composite
def installed_flows(draw: st.DrawFn, desired: dict[FlowKey, Flow]) -> dict[FlowKey, Flow]:
    """What a switch may hold: some of it right, some of it changed, by us or by others, and things beside it."""
    installed: dict[FlowKey, Flow] = {}
    rng = random.Random(draw(st.integers(0, 2**32)))
    for flow in desired.values():
        fate = rng.choice(("right", "right", "absent", "actions", "cookie", "foreign", "learned", "goto"))
        changed = {
            "right": flow,
            "actions": replace(flow, actions=(Output(7),)),
            "cookie": replace(flow, cookie=int(Cookie(99, 1))),
            "foreign": replace(flow, cookie=draw(FOREIGN_COOKIES)),
            "learned": replace(flow, cookie=int(Cookie(6, 1, learned=True)), actions=(), goto=None),
            "goto": replace(flow, goto=None, actions=()),
        }.get(fate)
        if changed is not None:
            installed[flow.key] = changed
    cookies = [0, 7, 0xB01D << 48, int(Cookie(5, 123)), int(Cookie(200 & 0x7F, 5)), int(Cookie(6, 9, learned=True))]
    for _ in range(rng.randrange(8)):
        match = Match.named(in_port=rng.randrange(1, 9)) if rng.random() < 0.7 else Match()
        actions = rng.choice(((), (Output(rng.randrange(1, 9)),)))
        flow = Flow(rng.choice((0, 10, 60, 77)), rng.choice((0, 5, 200)), match, actions, None, rng.choice(cookies))
        installed[flow.key] = flow
    return installed


@given(st.data())
@lawful
def test_applying_a_plan_gives_what_is_desired_and_leaves_what_is_not_ours(data: st.DataObject) -> None:
    desired = data.draw(desired_flows())
    installed = data.draw(installed_flows(desired))
    todo = plan(desired, installed)
    after = dict(installed)
    for flow in todo.delete:
        assert after.pop(flow.key) == flow, "a delete is strict: it names the flow as it is"
    for flow in todo.change:
        assert flow.key in after
        after[flow.key] = flow
    for flow in todo.add:
        assert flow.key not in after
        after[flow.key] = flow
    beside = {
        k: f for k, f in installed.items() if k not in desired and (f.cookie >> 48 != 0xB01C or is_learned(f.cookie))
    }
    assert after == {**beside, **desired}
    for flow in todo.delete:
        assert flow.cookie >> 48 == 0xB01C, "somebody else's flow would be deleted"
        assert not flow.cookie >> 47 & 1, "a learned flow would be deleted"
    assert {flow.key for flow in (*todo.add, *todo.change)} <= set(desired)
    assert not plan(desired, after)


@given(st.data())
@lawful
def test_compiling_anew_after_a_change_equals_compiling_from_nothing(data: st.DataObject) -> None:
    compilers: dict[str, BridgeCompiler] = {}
    state = data.draw(states(least=1))
    for _ in range(data.draw(st.integers(2, 5))):
        state = data.draw(st.one_of(states(), st.just(state).flatmap(small_changes)))
        for bridge in state.bridges:
            ports = as_core_sees(fake(state, bridge, data.draw(port_maps(state, bridge))))
            up = data.draw(st.booleans())
            found = compilers.setdefault(bridge.name, BridgeCompiler()).compile(state, bridge, ports, up)
            fresh = BridgeCompiler().compile(state, bridge, ports, up)
            assert found == fresh


@st.composite
def small_changes(draw: st.DrawFn, state: DesiredState) -> DesiredState:
    """A state that differs a little: a member goes, moves, or offers something else; rules go."""
    networks = list(state.networks)
    place = draw(st.integers(0, len(networks) - 1))
    network = networks[place]
    members, rules = list(network.members), network.rules
    vpn_server = network.vpn.member_id if network.vpn else None
    movable = [i for i, m in enumerate(members) if m.id != vpn_server]
    if movable:
        index = draw(st.sampled_from(movable))
        change = draw(st.sampled_from(("go", "mac", "services")))
        if change == "go":
            gone = members.pop(index).port
            rules = tuple(r for r in rules if gone not in (r.in_port, r.output))
        elif change == "mac":
            members[index] = replace(members[index], mac=Mac.derive("other", members[index].id))
        else:
            members[index] = replace(members[index], services=())
    networks[place] = replace(network, members=tuple(members), rules=rules[: draw(st.integers(0, 3))])
    return replace(state, networks=tuple(networks))


@given(st.data())
@lawful
def test_every_cookie_names_its_app_and_its_object(data: st.DataObject) -> None:
    state = data.draw(states())
    names = Names([state])
    for bridge in state.bridges:
        ports = as_core_sees(fake(state, bridge, data.draw(port_maps(state, bridge))))
        for flow in flows_of(state, bridge, ports, data.draw(st.booleans())).values():
            owner = names.owner(flow.cookie)
            assert is_ours(flow.cookie) and not is_learned(flow.cookie)
            assert owner is not None and "?" not in owner and not owner[0].startswith("app "), (owner, str(flow))


@given(st.data())
@lawful
def test_no_two_flows_of_one_priority_contradict_each_other(data: st.DataObject) -> None:
    state = data.draw(states())
    for bridge in state.bridges:
        ports = as_core_sees(fake(state, bridge, data.draw(port_maps(state, bridge))))
        groups: dict[tuple[int, int], list[Flow]] = {}
        for flow in flows_of(state, bridge, ports, data.draw(st.booleans())).values():
            for other in groups.setdefault((flow.table, flow.priority), []):
                assert not meet(flow, other) or (flow.actions, flow.goto) == (other.actions, other.goto), (
                    f"{flow}\n{other}"
                )
            groups[flow.table, flow.priority].append(flow)


def meet(one: Flow, other: Flow) -> bool:
    """Whether a packet can match both: no bit is wanted as 0 by one and as 1 by the other."""
    wanted = {(header, bit): value >> bit & 1 for header, value, mask in one.match for bit in bits(mask)}
    return all(
        wanted.get((header, bit), value >> bit & 1) == value >> bit & 1
        for header, value, mask in other.match
        for bit in bits(mask)
    )


def bits(mask: int) -> Iterator[int]:
    return (bit for bit in range(mask.bit_length()) if mask >> bit & 1)


# ------------------------------------------------------------------------------------------------------------ oracle


def belongs(network: Network) -> list[Prefix]:
    """Every prefix of a network, from its declaration."""
    return [
        network.subnet,
        *(network.mesh.prefixes if network.mesh else ()),
        *(prefix for member in network.members for prefix in member.routed),
    ]


def among(address: int, prefixes: list[Prefix]) -> bool:
    return any(address & prefix.mask == prefix.address for prefix in prefixes)


@dataclass
class Path:
    """A return path that the world has to an address of ours."""

    port: int
    last_out: float
    last_in: float

    def lives(self, now: float) -> bool:
        return now <= self.last_out + 600 and now <= self.last_in + 300


class Policy:
    """What a socket bridge may do with a packet."""

    def __init__(self, state: DesiredState, bridge: Bridge, switch: FakeSwitch, open_: bool) -> None:
        self.network = network = state.network(bridge.network)
        self.own = belongs(network)
        self.foreign = [p for other in state.networks if other.name != network.name for p in belongs(other)]
        numbers = {name: port.number for name, port in as_core_sees(switch).items()}
        self.members = {numbers[m.port]: m for m in network.members if m.port in numbers}
        self.egress = numbers.get(network.egress.port) if network.egress else None
        self.mesh = numbers.get(network.mesh.port) if network.mesh else None
        self.server = next((m for m in self.members.values() if network.vpn and m.id == network.vpn.member_id), None)
        self.host = LOCAL if network.host is not None or self.server is not None else None
        self.open = open_ and self.egress is not None
        self.roles = dict.fromkeys(self.members, Role.CONTAINER)
        for port, role in ((self.egress, Role.EGRESS), (self.mesh, Role.MESH), (self.host, Role.HOST)):
            if port is not None:
                self.roles[port] = role
        self.paths: dict[int, Path] = {}

    def forwardable(self, p: Packet) -> bool:
        """Whether it is a frame of a kind that is forwarded at all."""
        tagged = p.get(BY_NAME["vlan_vid"].header, 0) & 0x1000
        reserved = get(p, "eth_dst") & ~0xF == 0x0180C2000000
        return not tagged and not reserved and get(p, "eth_type") in (IPV4, ARP)

    def genuine(self, p: Packet) -> bool:
        """Whether the sender's addresses are those of the port it came in by."""
        role = self.roles.get(get(p, "in_port"))
        arp = get(p, "eth_type") == ARP
        source = get(p, "arp_spa" if arp else "ipv4_src")
        if role is Role.CONTAINER:
            member = self.members[get(p, "in_port")]
            if get(p, "eth_src") != member.mac:
                return False
            if arp:
                return get(p, "arp_sha") == member.mac and source in (member.address, 0)
            return source == member.address or among(source, list(member.routed))
        if role is None or among(source, self.foreign):
            return False
        if role is Role.EGRESS:
            assert self.network.egress is not None
            if get(p, "eth_src") != self.network.egress.mac:
                return False
            return source == self.network.gateway if arp else not among(source, self.own + NOBODY)
        if role is Role.MESH:
            assert self.network.mesh is not None
            if get(p, "eth_src") != self.network.mesh.mac:
                return False
            local = source in {m.address for m in self.network.members}  # be they there or away
            subnet = self.network.subnet
            nobodys = (subnet.address, subnet.address | ~subnet.mask & 0xFFFFFFFF)
            if local or source in (self.network.gateway, self.network.host, *nobodys):
                return False
            return among(source, list(self.network.mesh.prefixes)) or self.from_client(p)
        if source == self.network.host and source is not None:
            return True
        return self.from_client(p) or (
            arp and get(p, "arp_op") == 1 and self.server is not None and not among(source, self.own)
        )

    def from_client(self, p: Packet) -> bool:
        """Whether it is for the VPN server, from somewhere out there."""
        if self.server is None or self.network.vpn is None or get(p, "eth_type") != IPV4:
            return False
        to = get(p, "ip_proto") == UDP and get(p, "udp_dst") == self.network.vpn.port
        return (
            to
            and get(p, "ipv4_dst") == self.server.address
            and not among(get(p, "ipv4_src"), self.own + self.foreign + NOBODY)
        )

    def check(self, p: Packet, sent: Sent, now: float) -> None:
        """A packet was delivered. Raises `AssertionError` if it should not have been."""
        in_port, out = get(p, "in_port"), sent.port
        assert self.forwardable(p), "a frame of a kind that is never forwarded"
        assert self.genuine(p), "a sender that is not what it claims to be"
        if get(p, "eth_type") == ARP:
            self.check_arp(p, sent)
            return
        assert out != in_port, "back to where it came from"
        source, target = get(p, "ipv4_src"), get(p, "ipv4_dst")
        assert not among(target, self.foreign) and not among(sent.get("ipv4_dst"), self.foreign), "another network's"
        assert (self.roles[in_port], self.roles[out]) in MAY, "a role that may not send there"
        assert not (get(p, "ip_proto") == UDP and get(p, "udp_src") == 67), "a DHCP server"
        if out != self.mesh or not self.network.rules:  # a rule of the state file may send anything across the mesh
            assert target != self.network.subnet.address | ~self.network.subnet.mask & 0xFFFFFFFF, "a broadcast"
        if self.roles[in_port] is Role.EGRESS:
            path = self.paths.get(target)
            assert path is not None and path.lives(now), "nobody inside had asked for it"
            assert path.port == out, "the answer went to somebody else"
            path.last_in = now
        if out == self.egress:
            assert self.open, "the egress is closed"
            assert not among(target, NOT_THE_WORLD) and not among(target, self.own), "that is not the world"
            assert not self.is_vpn_answer(p), "the VPN server's own packets went into the tunnel"
            self.note(source, in_port, now)
        if out == self.mesh and self.network.mesh is not None and self.roles[in_port] is Role.CONTAINER:
            across = among(target, list(self.network.mesh.prefixes))
            assert across or self.is_vpn_answer(p), "the world is reached by the egress alone"
        if out in self.members:
            member = self.members[out]
            assert target == member.address or among(target, list(member.routed)), "not meant for that container"
            assert sent.get("eth_dst") == member.mac
        if self.roles[in_port] is Role.HOST:
            assert self.exposed(p), "the host reached what is not exposed to it"

    def is_vpn_answer(self, p: Packet) -> bool:
        if self.network.vpn is None or self.server is None or self.members.get(get(p, "in_port")) is not self.server:
            return False
        piece = get(p, "ip_frag") and get(p, "ipv4_src") == self.server.address  # may be of an answer: it has no ports
        return get(p, "ip_proto") == UDP and (get(p, "udp_src") == self.network.vpn.port or bool(piece))

    def note(self, source: int, port: int, now: float) -> None:
        path = self.paths.get(source)
        if path is None or not path.lives(now) or path.port != port:
            self.paths[source] = Path(port, now, now)
        else:
            path.last_out = now

    def exposed(self, p: Packet) -> bool:
        for member in self.members.values():
            if get(p, "ipv4_dst") == member.address:
                for s in member.services:
                    number = {"tcp": 6, "udp": 17, "sctp": 132}[s.protocol]
                    if s.exposed and get(p, "ip_proto") == number and get(p, f"{s.protocol}_dst") == s.port:
                        return self.network.host is not None
        vpn = self.network.vpn
        to_vpn = vpn is not None and get(p, "ip_proto") == UDP and get(p, "udp_dst") == vpn.port
        return to_vpn and self.server is not None and get(p, "ipv4_dst") == self.server.address

    def check_arp(self, p: Packet, sent: Sent) -> None:
        """ARP is answered to whoever asked, and never passed on."""
        assert sent.port == get(p, "in_port"), "ARP went somewhere else"
        assert get(p, "arp_op") == 1 and sent.get("arp_op") == 2
        asked = get(p, "arp_tpa")
        assert not among(asked, self.foreign), "another network's address was answered for"
        assert sent.get("eth_dst") == get(p, "eth_src") and sent.get("arp_tha") == get(p, "arp_sha")
        assert sent.get("arp_spa") == asked and sent.get("arp_tpa") == get(p, "arp_spa")
        assert sent.get("arp_sha") == sent.get("eth_src") == self.mac_of(asked)

    def mac_of(self, address: int) -> int | None:
        """Who is to be answered for an address."""
        for member in self.members.values():
            if member.address == address:
                return member.mac
        if address == self.network.host:
            return Mac.derive(self.network.bridge, "port", self.network.bridge)
        if address == self.network.gateway:
            return self.network.gateway_mac
        return self.network.mesh.mac if self.network.mesh else None


def get(p: Mapping[int, int], name: str) -> int:
    return p.get(BY_NAME[name].header, 0)


# ----------------------------------------------------------------------------------------------------------- packets


class Dice:
    """Random packets, most of them nearly right: their addresses, MACs and ports are somebody's."""

    def __init__(self, state: DesiredState, policy: Policy, switch: FakeSwitch, seed: int) -> None:
        self.rng = random.Random(f"{seed} {state}")  # hypothesis likes small numbers; the state makes them differ
        self.policy = policy
        self.ports = [port.number for port in switch.ports.values()] + [41]
        networks = state.networks
        members = [m for n in networks for m in n.members]
        self.macs = [m.mac for m in members] + [n.gateway_mac for n in networks] + [Mac.parse("02:00:00:00:00:99")]
        self.macs += [n.mesh.mac for n in networks if n.mesh] + [n.egress.mac for n in networks if n.egress]
        self.addresses = [m.address for m in members] + [n.gateway for n in networks] + list(WORLD)
        self.addresses += [n.host for n in networks if n.host] + [Ipv4(0), Ipv4(0xFFFFFFFF), Ipv4.parse("224.0.0.1")]
        for prefix in (p for n in networks for p in belongs(n)):
            self.addresses += [Ipv4(prefix.address + 5), Ipv4(prefix.address | ~prefix.mask & 0xFFFFFFFF)]
        self.addresses += [Ipv4.parse("10.200.0.1"), Ipv4.parse("172.31.0.1")]
        self.services = [s.port for m in members for s in m.services] + [VPN_PORT, 53, 67, 68, 80, 9573, 40000]

    def packet(self) -> Packet:
        rng, in_port = self.rng, self.rng.choice(self.ports)
        eth_src, source = self.identity(in_port)
        if rng.random() < 0.15:
            eth_src = rng.choice(self.macs)
        if rng.random() < 0.15:
            source = rng.choice(self.addresses)
        base: dict[str, int] = {"eth_src": eth_src, "eth_dst": rng.choice(self.macs)}
        kind = rng.random()
        if kind < 0.72:
            base |= self.ipv4(source)
        elif kind < 0.92:
            base |= self.arp(source, eth_src)
        else:
            base |= rng.choice(
                (
                    {"eth_type": IPV6, "ip_proto": 58, "icmpv6_type": rng.choice((134, 135))},
                    {"eth_type": IPV6, "ip_proto": UDP, "udp_src": rng.choice((547, 53))},
                    {"eth_type": LLDP},
                    {"eth_type": 0x8847},
                )
            )
        if rng.random() < 0.04:
            base["vlan_vid"] = 0x1000 | rng.choice((0, 5, 100))
        if rng.random() < 0.04:
            base["eth_dst"] = 0x0180C2000000 | rng.choice((0, 3, 0xE))
        return packet(in_port, **base)

    def identity(self, port: int) -> tuple[int, int]:
        """A MAC and an address that the port may use."""
        policy, network, rng = self.policy, self.policy.network, self.rng
        role = policy.roles.get(port)
        if role is Role.CONTAINER:
            member = policy.members[port]
            routed = [Ipv4(p.address + 5) for p in member.routed]
            return member.mac, rng.choice([member.address, *routed])
        if role is Role.MESH and network.mesh is not None:
            prefix = rng.choice(network.mesh.prefixes)
            return network.mesh.mac, rng.choice([Ipv4(prefix.address + 6), Ipv4(prefix.address + 3), WORLD[0]])
        if role is Role.EGRESS and network.egress is not None:
            return network.egress.mac, rng.choice((*WORLD, network.gateway))
        return rng.choice(self.macs), rng.choice([*filter(None, [network.host]), *WORLD])

    def ipv4(self, source: int) -> dict[str, int]:
        rng, out = self.rng, {"eth_type": IPV4, "ipv4_src": int(source)}
        lively: list[int] = list(self.policy.paths) or [0]
        own: list[int] = [m.address for m in self.policy.members.values()] or [0]
        pools: list[Sequence[int]] = [self.addresses, self.addresses, list(WORLD), lively, own]
        out["ipv4_dst"] = int(rng.choice(rng.choice(pools)))
        protocol = rng.choice((6, 17, 17, 132, 1, 47))
        out["ip_proto"] = protocol
        name = {6: "tcp", 17: "udp", 132: "sctp"}.get(protocol)
        if name:
            out[f"{name}_src"], out[f"{name}_dst"] = rng.choice(self.services), rng.choice(self.services)
        if rng.random() < 0.1:
            # A fragment, the first or a later one: a switch sees no ports in either (ovs-fields(7)).
            out |= {"ip_frag": rng.choice((1, 3))} | {key: 0 for key in out if key.endswith(("p_src", "p_dst"))}
        return out

    def arp(self, source: int, eth_src: int) -> dict[str, int]:
        rng = self.rng
        sha = eth_src if rng.random() < 0.85 else rng.choice(self.macs)
        spa = source if rng.random() < 0.9 else 0
        target = rng.choice([*self.addresses, self.policy.network.gateway, *self.addresses[:3]])
        return {"arp_op": rng.choice((1, 1, 1, 2)), "arp_sha": sha, "arp_spa": int(spa), "arp_tpa": int(target)}


@st.composite
def bridged(
    draw: st.DrawFn, *, rules: bool = True, whole: bool = False
) -> tuple[DesiredState, Bridge, FakeSwitch, bool]:
    """A state, one of its socket bridges with ports and flows, and whether its egress is open."""
    state = draw(states(rules=rules))
    bridge = draw(st.sampled_from([b for b in state.bridges if b.kind is BridgeKind.SOCKET]))
    switch = fake(state, bridge, draw(port_maps(state, bridge, whole=whole)))
    up = draw(st.sampled_from((True, True, False)))
    switch.hold(flows_of(state, bridge, as_core_sees(switch), up).values())
    return state, bridge, switch, up


@given(bridged(), st.integers(0, 2**32))
@settings(lawful, max_examples=examples(150))
def test_no_packet_goes_where_it_may_not(given_: tuple[DesiredState, Bridge, FakeSwitch, bool], seed: int) -> None:
    state, bridge, switch, up = given_
    policy = Policy(state, bridge, switch, up)
    dice = Dice(state, policy, switch, seed)
    for _ in range(PACKETS):
        if dice.rng.random() < 0.1:
            switch.advance(switch.now + dice.rng.choice((1, 100, 250, 299, 301, 400)))
        start = dice.packet()
        outcome, _signals = switch.push(start)
        try:
            if isinstance(outcome, Sent):
                policy.check(start, outcome, switch.now)
            if not policy.forwardable(start):
                ends = (Dropped("ADMIT"), Dropped("VIOLATION"), Shown(Violation.ROGUE_RA), Shown(Violation.ROGUE_DHCP))
                assert outcome in ends, "a frame of another kind gets no further than the door"
            assert outcome != Shown(Violation.GUARD), "only a defect of the tables above ends in the guard"
        except AssertionError as exc:
            raise AssertionError(
                f"{exc}\n{show(start)}\n-> {outcome} on {bridge.name} of {policy.network.name}"
            ) from exc


@given(bridged(), st.integers(0, 2**32))
@lawful
def test_the_guard_holds_whatever_the_tables_above_it_did(
    given_: tuple[DesiredState, Bridge, FakeSwitch, bool], seed: int
) -> None:
    """Any role, any port chosen, as if every table above were wrong: what is output is what the roles may do."""
    state, bridge, switch, up = given_
    policy, rng = Policy(state, bridge, switch, up), random.Random(seed)
    outs = [port.number & 0xFFFF for port in switch.ports.values()] + [0, 41, 0xFFFD]
    roles = [*ROLE_BITS.items(), (None, 0)]
    for in_port in [port.number for port in switch.ports.values()]:
        for role, bit in roles:
            for out in outs:
                registers = {"reg0": 1 << 31 | bit if role else rng.choice((0, bit)), "reg1": out}
                outcome = switch.trace(in_port, registers, table=OUTPUT_GUARD.id, eth_type=IPV4)
                if isinstance(outcome, Sent):
                    assert role is not None and (role, policy.roles[outcome.port]) in MAY, (role, outcome)
                    assert outcome.port != in_port
                    assert outcome.port != policy.egress or policy.open, "the egress is closed"


@given(bridged(rules=False), st.integers(0, 2**32))
@lawful
def test_learned_paths_of_other_days_open_nothing(
    given_: tuple[DesiredState, Bridge, FakeSwitch, bool], seed: int
) -> None:
    """A learned path may name a port that has another role by now: the roles and the kill switch hold all the same."""
    state, bridge, switch, up = given_
    policy = Policy(state, bridge, switch, up)
    dice = Dice(state, policy, switch, seed)
    for number in range(20):
        out = dice.rng.choice(dice.ports) & 0xFFFF
        match = Match.named(eth_type=IPV4, ipv4_dst=int(dice.rng.choice(dice.addresses)))
        actions = (SetField(RETURNED.header, 1), Load(out, OUT_BITS))
        switch.hold([Flow(RETURN.id, 100 + number, match, actions, None, int(Cookie(6, number, learned=True)))])
    for _ in range(PACKETS):
        start = dice.packet()
        outcome = switch.follow(start)
        if isinstance(outcome, Sent) and get(start, "eth_type") == IPV4:
            assert policy.genuine(start) and policy.forwardable(start)
            assert (policy.roles[get(start, "in_port")], policy.roles[outcome.port]) in MAY
            assert not among(get(start, "ipv4_dst"), policy.foreign)
            assert outcome.port != policy.egress or policy.open


@given(bridged(rules=False, whole=True))
@lawful
def test_what_is_declared_works(given_: tuple[DesiredState, Bridge, FakeSwitch, bool]) -> None:
    """Members of a network reach each other, their services, the world and its answers; clients reach the VPN."""
    state, bridge, switch, up = given_
    policy = Policy(state, bridge, switch, up)
    network, at = policy.network, {m.id: port for port, m in policy.members.items()}
    for sender in network.members:
        eth = {"eth_src": int(sender.mac), "ipv4_src": int(sender.address)}
        for other in network.members:
            if other is not sender:
                for more in ({"ip_proto": 1}, {"tcp_dst": 9573, "tcp_src": 40000}, {"udp_dst": 4, "udp_src": 4}):
                    found = switch.trace(at[sender.id], eth, more, ipv4_dst=other.address)
                    assert found == Sent(at[other.id])
        if policy.open and policy.egress is not None:
            check_round_trip(policy, switch, at[sender.id], eth)
        gateway = switch.trace(
            at[sender.id],
            eth_src=sender.mac,
            arp_op=1,
            arp_sha=sender.mac,
            arp_spa=sender.address,
            arp_tpa=network.gateway,
        )
        answered = network.host == network.gateway or network.gateway_mac
        assert not answered or gateway == Sent(at[sender.id])
    check_host(policy, switch, at)
    check_vpn(policy, switch, at)
    if policy.mesh is not None and network.mesh is not None:
        peer = Ipv4(network.mesh.prefixes[-1].address + 7)
        if peer == network.subnet.address | ~network.subnet.mask & 0xFFFFFFFF:
            return
        for sender in network.members:
            eth = {"eth_src": int(sender.mac), "ipv4_src": int(sender.address)}
            assert switch.trace(at[sender.id], eth, ipv4_dst=peer) == Sent(policy.mesh)
            back = switch.trace(policy.mesh, eth_src=network.mesh.mac, ipv4_src=peer, ipv4_dst=sender.address)
            assert back == Sent(at[sender.id])


def check_round_trip(policy: Policy, switch: FakeSwitch, port: int, eth: Mapping[str, int]) -> None:
    assert policy.network.egress is not None and policy.egress is not None
    answer = {"eth_src": int(policy.network.egress.mac), "ipv4_src": int(WORLD[0]), "ipv4_dst": eth["ipv4_src"]}
    assert switch.trace(policy.egress, answer) == Shown(Violation.UNSOLICITED)
    out, _ = switch.push(packet(port, eth, ipv4_dst=WORLD[0]))
    assert out == Sent(policy.egress) and isinstance(out, Sent) and out.get("eth_dst") == policy.network.egress.mac
    assert switch.trace(policy.egress, answer) == Sent(port)


def check_host(policy: Policy, switch: FakeSwitch, at: dict[str, int]) -> None:
    network = policy.network
    if network.host is None:
        return
    for member in network.members:
        for service in member.services:
            ports = {f"{service.protocol}_src": 40000, f"{service.protocol}_dst": service.port}
            start = {"eth_src": 5, "ipv4_src": int(network.host), "ipv4_dst": int(member.address)} | ports
            found, _ = switch.push(packet(LOCAL, start))
            if service.protocol == "udp" and service.port == 67:
                continue  # a container may not be a DHCP server, whatever it declares
            is_vpn = service.protocol == "udp" and member is policy.server and service.port == network.vpn.port  # type: ignore[union-attr]
            assert (found == Sent(at[member.id])) == (service.exposed or is_vpn), service
            back = {f"{service.protocol}_dst": 40000, f"{service.protocol}_src": service.port}
            answer = {"eth_src": int(member.mac), "ipv4_src": int(member.address), "ipv4_dst": int(network.host)} | back
            assert (switch.trace(at[member.id], answer) == Sent(LOCAL)) == service.exposed


def check_vpn(policy: Policy, switch: FakeSwitch, at: dict[str, int]) -> None:
    network, server = policy.network, policy.server
    if network.vpn is None or server is None:
        return
    mac = int(network.mesh.mac) if network.mesh else 0
    for client, eth_src, port in ((LOCAL, 5, 5555), (policy.mesh, mac, 5556)):
        if client is None:
            continue
        out = {"udp_src": port, "udp_dst": network.vpn.port, "ipv4_src": int(WORLD[1]), "ipv4_dst": int(server.address)}
        found, _ = switch.push(packet(client, out, eth_src=eth_src))
        assert found == Sent(at[server.id])
        back = {
            "udp_dst": port,
            "udp_src": network.vpn.port,
            "ipv4_dst": int(WORLD[1]),
            "ipv4_src": int(server.address),
        }
        answer = switch.trace(at[server.id], back, eth_src=server.mac)
        assert answer == Sent(client) and isinstance(answer, Sent) and answer.get("eth_dst") == eth_src


@given(st.data())
@lawful
def test_a_mesh_bridge_passes_ipv4_and_arp_between_its_two_ports(data: st.DataObject) -> None:
    state = data.draw(states())
    for bridge in [b for b in state.bridges if b.kind is BridgeKind.MESH]:
        switch = fake(state, bridge, data.draw(port_maps(state, bridge)))
        switch.hold(flows_of(state, bridge, as_core_sees(switch)).values())
        mesh = state.network(bridge.network).mesh
        assert mesh is not None
        ends = [switch.ports[n].number for n in (mesh.leg_port, mesh.far_port) if n in switch.ports]
        for in_port in [port.number for port in switch.ports.values()]:
            for eth_type in (IPV4, ARP, IPV6, LLDP, 0x8847):
                for vlan in (0, 0x1005):
                    for eth_dst in (0x020000000001, 0x0180C200000E):
                        p = packet(in_port, eth_type=eth_type, vlan_vid=vlan, eth_dst=eth_dst)
                        good = not vlan and eth_type in (IPV4, ARP) and eth_dst == 0x020000000001
                        passes = good and len(ends) == 2 and in_port in ends
                        outcome = switch.follow(p)
                        assert isinstance(outcome, Sent) == passes, show(p)
                        assert not isinstance(outcome, Sent) or outcome.port == sum(ends) - in_port


# ----------------------------------------------------------------------------------------------------------- history


FOREIGN_PLACES = [(table, priority) for table in (0, 10, 60, 200) for priority in (7, 60001)]


class History(RuleBasedStateMachine):
    """A core and its switches through any history; whatever came before, rest brings what is declared."""

    @initialize(state=states())
    def begin(self, state: DesiredState) -> None:
        names = {
            "vmbr0": ("warp0", "from-privacy", "veth100", "veth101", "stray"),
            "vmbr1": ("warp1", "from-management", "veth200", "veth201"),
            "mesh-privacy": ("nm-privacy", "to-privacy"),
            "br-other": ("eth0",),
        }
        self.names = names
        switches = [
            FakeSwitch(name, dpid, {port: n for n, port in enumerate(ports[:3], 1)}, mesh=name.startswith("mesh"))
            for dpid, (name, ports) in enumerate(names.items(), 1)
        ]
        self.wired = Wired(state, *switches)
        self.by_name = {switch.name: switch for switch in switches}
        self.foreign: dict[str, set[Flow]] = {name: set() for name in names}
        self.taken: dict[str, set[Flow]] = {name: set() for name in names}
        self.unhealthy: set[str] = set()
        self.wired.up()

    bridges = st.sampled_from(("vmbr0", "vmbr0", "vmbr1", "mesh-privacy", "br-other"))

    @rule(state=states())
    def load(self, state: DesiredState) -> None:
        self.wired.load(state)

    @rule(first=states(), second=states())
    def load_twice(self, first: DesiredState, second: DesiredState) -> None:
        """Two state files before any switch has answered."""
        effects = self.wired.core.handle(StateLoaded(first), self.wired.now)
        effects += self.wired.core.handle(StateLoaded(second), self.wired.now)
        self.wired.say(*[s for switch in self.by_name.values() for s in switch.run(effects)])

    @rule()
    def reject(self) -> None:
        before = self.wired.core.state
        self.wired.say(StateRejected("state.yaml", (error("code", "path", "found", "expected", "fix"),)))
        assert self.wired.core.state is before

    @rule(bridge=bridges, pick=st.integers(0, 9), number=st.integers(1, 8), up=st.booleans())
    def plug(self, bridge: str, pick: int, number: int, up: bool) -> None:
        """A port comes, changes, or moves to another number with the old one's end untold."""
        switch = self.by_name[bridge]
        name = self.names[bridge][pick % len(self.names[bridge])]
        holder = next((n for n, p in switch.ports.items() if p.number == number and n != name), None)
        if holder is not None:
            self.wired.say(*switch.unplug(holder))
        self.wired.say(*switch.plug(name, number, up))

    @rule(bridge=bridges, pick=st.integers(0, 9))
    def reuse(self, bridge: str, pick: int) -> None:
        """A port's number goes to another port, and the old one's end is told last."""
        switch = self.by_name[bridge]
        name = self.names[bridge][pick % len(self.names[bridge])]
        holders = [n for n, p in switch.ports.items() if p.number != LOCAL and n != name]
        if holders:
            number = switch.number(holders[0])
            late = switch.unplug(holders[0])
            self.wired.say(*switch.plug(name, number))
            self.wired.say(*late)

    @rule(bridge=bridges, pick=st.integers(0, 9))
    def unplug(self, bridge: str, pick: int) -> None:
        switch = self.by_name[bridge]
        name = self.names[bridge][pick % len(self.names[bridge])]
        if name in switch.ports:
            self.wired.say(*switch.unplug(name))

    @rule(network=st.sampled_from(("privacy", "management", "nobody")), healthy=st.booleans())
    def health(self, network: str, healthy: bool) -> None:
        (self.unhealthy.discard if healthy else self.unhealthy.add)(network)
        self.wired.say(EgressHealth(network, healthy))

    @rule(bridge=bridges, times=st.integers(1, 3), what=st.sampled_from(("refuse", "before", "after", "unsure")))
    def trouble(self, bridge: str, times: int, what: str) -> None:
        """The next bundles go wrong."""
        switch = self.by_name[bridge]
        if what == "refuse":
            switch.refusing = times
        elif what == "unsure":
            switch.unsure = True
        else:
            switch.cutting = "before" if what == "before" else "after"

    @rule(bridge=bridges)
    def restart(self, bridge: str) -> None:
        self.foreign[bridge].clear()
        self.wired.say(*self.by_name[bridge].restart())

    @rule(bridge=bridges)
    def disconnect(self, bridge: str) -> None:
        self.wired.say(*self.by_name[bridge].disconnect())

    @rule()
    def reconnect(self) -> None:
        self.wired.up()

    @rule(bridge=bridges, where=st.sampled_from(FOREIGN_PLACES), port=st.integers(1, 3), cookie=FOREIGN_COOKIES)
    def add_foreign(self, bridge: str, where: tuple[int, int], port: int, cookie: int) -> None:
        match = Match.named(in_port=port, eth_type=IPV4, ip_proto=TCP, tcp_dst=7)
        flow = Flow(*where, match, (Output(port + 1),), None, cookie)
        self.foreign[bridge] = {f for f in self.foreign[bridge] if f.key != flow.key} | {flow}
        self.wired.say(*self.by_name[bridge].add_by_others(flow))

    @precondition(lambda self: any(self.foreign.values()))
    @rule()
    def remove_foreign(self) -> None:
        bridge, flows = next((b, f) for b, f in self.foreign.items() if f)
        flow = flows.pop()
        self.wired.say(*self.by_name[bridge].remove_by_others(flow))

    @rule(
        bridge=bridges, pick=st.integers(0, 10**6), how=st.sampled_from(("remove", "actions", "cookie", "extra", "all"))
    )
    def tamper(self, bridge: str, pick: int, how: str) -> None:
        switch = self.by_name[bridge]
        ours = sorted(switch.ours(), key=lambda flow: flow.key)
        if how == "all":
            self.foreign[bridge].clear()
            self.wired.say(*switch.clear_by_others())
        elif how == "extra":
            self.wired.say(*switch.add_by_others(Flow(0, 5, Match.named(in_port=3), (), 10, int(Cookie(1, pick)))))
        elif ours:
            flow = ours[pick % len(ours)]
            if how == "remove":
                self.wired.say(*switch.remove_by_others(flow))
            else:
                changed = replace(flow, cookie=77) if how == "cookie" else replace(flow, actions=(), goto=None)
                self.taken[bridge] |= {changed} if how == "cookie" else set()
                self.wired.say(*switch.add_by_others(changed))

    @rule(seconds=st.sampled_from((0.1, 0.5, 1.0, 3.0, 30.0)))
    def wait(self, seconds: float) -> None:
        self.wired.wait(seconds, step=max(0.25, seconds / 10))

    @rule(bridge=st.sampled_from(("vmbr0", "vmbr1")), seed=st.integers(0, 2**32), data=st.binary(max_size=60))
    def traffic(self, bridge: str, seed: int, data: bytes) -> None:
        """Packets come in; what is learned and shown reaches the core."""
        switch, state = self.by_name[bridge], self.wired.core.state
        declared = state.bridge(bridge)
        if declared is None:
            return
        policy = Policy(state, declared, switch, True)
        dice = Dice(state, policy, switch, seed)
        for _ in range(10):
            self.wired.say(*switch.push(dice.packet(), data)[1])

    @rule(dpid=st.integers(1, 6), number=st.integers(0, 9), data=st.binary(max_size=40))
    def nonsense(self, dpid: int, number: int, data: bytes) -> None:
        """Answers nobody asked for, of switches that may not be there."""
        flow = Flow(100, 400, Match.named(in_port=number), (), None, int(Cookie(10, 1, learned=True)))
        match = Match.named(in_port=1, reg2=number) if number % 2 else Match()
        self.wired.say(
            Committed(dpid, 1000 + number),
            Refused(dpid, 1000 + number, "late"),
            FlowGone(dpid, FlowRemoved(flow, number, 3, 300)),
            Counted(dpid, ()),
            PacketSeen(dpid, PacketIn(0, 100 if number < 7 else number, match, data, len(data))),
            FlowsChanged(dpid, (FlowUpdate(Update.PAUSED), FlowUpdate(Update.RESUMED))),
            SwitchError(dpid, "an error"),
            FactsSeen((BridgeFacts("vmbr0", 1, "", bool(number % 2)),)),
            Tick(),
        )
        assert self.wired.core.status()

    @rule()
    def rest(self) -> None:
        """Trouble ends and time passes: every switch has what is declared, what others added, and nothing else."""
        for switch in self.by_name.values():
            switch.refusing, switch.cutting, switch.unsure = 0, None, False
        self.wired.up()
        self.wired.wait(64, step=4)
        state = self.wired.core.state
        for name, switch in self.by_name.items():
            expected = self.expected(state, switch)
            assert switch.ours() == expected, name
            # What was taken over stays with its taker where nothing of ours is to stand any more.
            beside = {flow for flow in self.taken[name] if flow.key not in {ours.key for ours in expected}}
            assert self.foreign[name] <= switch.foreign() <= self.foreign[name] | beside, name
            for flow in switch.learned():
                assert flow.table in (RETURN.id, 100), flow

    def expected(self, state: DesiredState, switch: FakeSwitch) -> set[Flow]:
        bridge = state.bridge(switch.name)
        if bridge is None:
            return {UNDECLARED_FLOW, CANARY_FLOW}
        egress = state.network(bridge.network).egress
        port = switch.ports.get(egress.port) if egress else None
        up = port is not None and port.up and bridge.network not in self.unhealthy
        return set(flows_of(state, bridge, as_core_sees(switch), up).values())

    def teardown(self) -> None:
        if hasattr(self, "wired") and sys.exc_info()[0] is None:
            self.rest()


TestHistory = History.TestCase
TestHistory.settings = settings(
    deadline=None, max_examples=examples(60), stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
