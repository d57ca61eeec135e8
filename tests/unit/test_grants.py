"""What a grant opens and what it does not: packets through both bridges, and flows that the proof refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from apps.grants import GOES_ON, OPENS, REPLIES
from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.fields import Field
from controller.flow import Action, Bits, Ct, Flow, Match, SetField
from controller.grants import openings, passages, why_not, zones
from controller.model import Bridge, BridgeKind, DesiredState, Grant
from controller.pipeline import ADMIT, CROSS, GRANT
from controller.statefile import digest
from controller.verify.endpoints import CLIENT_PORT, Endpoint, find, packet
from controller.verify.explore import REL, RPL, TRK
from controller.verify.gate import try_proof
from controller.verify.lint import crossings
from controller.verify.node import Held, Leg, Node
from controller.verify.policy import PROTOCOLS
from controller.verify.prove import Unsafe, prove
from controller.verify.space import bits, get
from controller.verify.why import Verdict, why
from tests.fakes.states import two_networks

PLAIN = two_networks()
ONE = Grant("7", "201", "102", "tcp", 8080)
STATE = replace(PLAIN, grants=(ONE,))
NODE = Node.declared(STATE)
NEW, EST, ANSWERED = OPENS[0], GOES_ON[0], REPLIES[0]
SOCKET = [bridge for bridge in STATE.bridges if bridge.kind is BridgeKind.SOCKET]
VMBR0, VMBR1 = SOCKET


def arrives(legs: tuple[Leg, ...]) -> set[str]:
    """The ports at the ends that a packet leaves by."""
    return {port for leg in legs for port, far in leg.sent if far is None}


def send(
    source: str,
    target: str,
    protocol: str = "tcp",
    port: int = 8080,
    *said: int,
    node: Node = NODE,
    state: DesiredState = STATE,
    **other: int,
) -> set[str]:
    """Where a packet gets to, if connection tracking says `said`; `other` are fields to overwrite."""
    ends = find(state, source), find(state, target)
    return arrives(node.follow(ends[0].end, made(ends, protocol, port, **other), said))


def made(ends: tuple[Endpoint, Endpoint], protocol: str, port: int, **other: int) -> int:
    header = packet(*ends, protocol, port)
    for name, value in other.items():
        header = put(header, fields.BY_NAME[name], value)
    return header


def put(header: int, field: Field, value: int) -> int:
    value_bits, mask = bits(field, value)
    return header & ~mask | value_bits


def reply(protocol: str = "tcp", port: int = 8080, to: int = CLIENT_PORT) -> dict[str, int]:
    _, source, target = PROTOCOLS[protocol]
    return {source.name: port, target.name: to}


# ------------------------------------------------------------------------------------------------------------ packets


@pytest.mark.parametrize("said", [(NEW, NEW), (EST, EST), (NEW, EST), (EST, NEW)])
def test_the_granted_packets_get_there(said: tuple[int, int]) -> None:
    assert send("c201", "c102", "tcp", 8080, *said) == {"veth102"}


def test_replies_come_back() -> None:
    assert send("c102", "c201", "tcp", 0, ANSWERED, ANSWERED, **reply()) == {"veth201"}


@pytest.mark.parametrize("said", [(NEW,), (EST,), (TRK,), (TRK | REL | RPL,), (ANSWERED, NEW), (ANSWERED, EST)])
def test_what_is_no_reply_to_a_connection_does_not(said: tuple[int, ...]) -> None:
    """The granted port as a source port is not enough."""
    assert send("c102", "c201", "tcp", 0, *said, **reply()) == set()


@pytest.mark.parametrize("said", [NEW, EST, ANSWERED])
@pytest.mark.parametrize(
    ("source", "target", "protocol", "port"),
    [
        ("c201", "c102", "tcp", 8081),
        ("c201", "c102", "udp", 8080),
        ("c201", "c102", "sctp", 8080),
        ("c201", "c102", "icmp", 0),
        ("c201", "c100", "tcp", 8080),
        ("c200", "c102", "tcp", 8080),
        ("management/host", "c102", "tcp", 8080),
        ("management/mesh", "c102", "tcp", 8080),
        ("c102", "c201", "tcp", 8080),
        ("c102", "c201", "tcp", 9573),
        ("c102", "c201", "icmp", 0),
        ("c100", "c201", "tcp", 8080),
        ("privacy/mesh", "c201", "tcp", 8080),
        ("internet", "c201", "tcp", 8080),
    ],
)
def test_nothing_else_does(source: str, target: str, protocol: str, port: int, said: int) -> None:
    assert send(source, target, protocol, port, said, said) == set()


@pytest.mark.parametrize("fragment", [1, 3])
def test_fragments_do_not(fragment: int) -> None:
    """The first has ports, but nobody could tell its later pieces from others."""
    assert send("c201", "c102", "tcp", 8080, NEW, NEW, ip_frag=fragment) == set()
    assert send("c102", "c201", "tcp", 0, ANSWERED, ANSWERED, ip_frag=fragment, **reply()) == set()


def test_a_stolen_address_does_not() -> None:
    ends = find(STATE, "c200"), find(STATE, "c102")
    granted = find(STATE, "c201")
    for mac in (ends[0].mac, granted.mac):
        header = made(ends, "tcp", 8080, ipv4_src=granted.address, eth_src=mac)
        assert arrives(NODE.follow(ends[0].end, header, (NEW, NEW))) == set()


def test_what_enters_by_the_passage_must_be_granted_there_too() -> None:
    """As if the other bridge let everything out."""
    passage = passages(STATE)[0]
    source, target = find(STATE, "c201"), find(STATE, "c102")
    entry = (
        (passage.bridge, passage.port) if passage.bridge == target.end[0] else (passage.peer_bridge, passage.peer_port)
    )
    assert arrives(NODE.follow(entry, packet(source, target, "tcp", 8080))) == {"veth102"}
    others = [
        packet(source, target, "tcp", 22),
        packet(source, find(STATE, "c100"), "tcp", 8080),
        packet(find(STATE, "c200"), target, "tcp", 8080),
        put(packet(source, target, "tcp", 8080), fields.ETH_TYPE, 0x0806),
        put(packet(source, target, "tcp", 8080), fields.ETH_TYPE, 0x86DD),
        put(packet(source, target, "tcp", 8080), fields.VLAN_VID, 0x1001),
        packet(find(STATE, "internet"), target, "tcp", 8080),
        packet(source, find(STATE, "internet"), "tcp", 8080),
    ]
    for header in others:
        assert arrives(NODE.follow(entry, header, (NEW,))) == set()


def test_both_ends_see_their_gateway_and_one_hop() -> None:
    ends = find(STATE, "c201"), find(STATE, "c102")
    legs = NODE.follow(ends[0].end, made(ends, "tcp", 8080))
    arrived = legs[-1].way.sent[0][1]
    privacy = STATE.network("privacy")
    assert get(arrived, fields.ETH_DST) == ends[1].mac and get(arrived, fields.ETH_SRC) == privacy.gateway_mac
    assert arrives(NODE.follow(ends[0].end, made(ends, "tcp", 8080, nw_ttl=1))) == set()


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_each_protocol_both_ways_at_once(protocol: str) -> None:
    both = (Grant("1", "201", "102", protocol, 53), Grant("2", "102", "201", protocol, 53))  # type: ignore[arg-type]
    state = replace(PLAIN, grants=both)
    node = Node.declared(state)
    for source, target in (("c201", "c102"), ("c102", "c201")):
        assert send(source, target, protocol, 53, NEW, NEW, node=node, state=state) == {target.replace("c", "veth")}
        answer = reply(protocol, 53)
        got = send(source, target, protocol, 0, ANSWERED, ANSWERED, node=node, state=state, **answer)
        assert got == {target.replace("c", "veth")}
        assert send(source, target, protocol, 0, NEW, NEW, node=node, state=state, **answer) == set()
        # From the one's granted port to the other's it may be either, and goes by what it is.
        between = reply(protocol, 53, 53)
        for said in (NEW, EST, ANSWERED):
            got = send(source, target, protocol, 0, said, said, node=node, state=state, **between)
            assert got == {target.replace("c", "veth")}
        assert send(source, target, protocol, 0, NEW, ANSWERED, node=node, state=state, **between) != set()


def test_a_bridge_that_has_not_heard_of_it_yet_keeps_it_shut() -> None:
    """Whichever of the two is first: with its flows there and not on the other, nothing gets across."""
    for late in SOCKET:
        ports = planned_ports(STATE, late)
        numbers = {name: port.number for name, port in ports.items()}
        old = Held.of(late.name, numbers, BridgeCompiler().compile(PLAIN, late, ports).flows.values())
        node = replace(NODE, bridges={**NODE.bridges, late.name: old})
        for said in (NEW, EST, ANSWERED):
            assert send("c201", "c102", "tcp", 8080, said, said, node=node) == set()
            assert send("c102", "c201", "tcp", 0, said, said, node=node, **reply()) == set()


# ---------------------------------------------------------------------------------------------------- what it comes to


def test_grants_that_open_nothing_here_say_why() -> None:
    for grant, why_ in {
        Grant("1", "201", "999", "tcp", 80): "its target, container 999, is not on this node",
        Grant("1", "998", "102", "tcp", 80): "its source, container 998, is not on this node",
        Grant("1", "200", "201", "tcp", 80): "both in management",
        Grant("1", "200", "102", "tcp", 0): "not a port",
    }.items():
        state = replace(PLAIN, grants=(grant,))
        assert why_ in why_not(state, grant) and not openings(state) and not passages(state)
        assert digest(state) != digest(PLAIN)
    away = replace(STATE, bridges=tuple(bridge for bridge in STATE.bridges if bridge.name != "vmbr1"))
    assert "bridge vmbr1 of its source is not declared" in why_not(away, ONE) and not openings(away)
    assert why_not(STATE, ONE) == ""


def test_two_grants_for_one_cell_are_one_opening_until_both_are_gone() -> None:
    twice = replace(PLAIN, grants=(Grant("12", "201", "102", "tcp", 8080), ONE))
    assert [o.grant for o in openings(twice)] == ["7"]
    for bridge in SOCKET:
        ports = planned_ports(twice, bridge)
        flows = BridgeCompiler().compile(twice, bridge, ports).flows
        assert flows == BridgeCompiler().compile(STATE, bridge, ports).flows


def test_one_grant_more_makes_only_its_members_flows_anew() -> None:
    compiler = BridgeCompiler()
    more = replace(PLAIN, grants=(ONE, Grant("8", "200", "100", "udp", 53)))
    ports = planned_ports(STATE, VMBR0)
    before = compiler.compile(STATE, VMBR0, ports).flows
    after = compiler.compile(more, VMBR0, ports).flows
    assert all(after[key] is flow for key, flow in before.items())


def test_why_names_the_grant() -> None:
    yes = why(STATE, find(STATE, "c201"), find(STATE, "c102"), ("tcp", 8080))
    assert yes.verdict is Verdict.YES and "grant 7" in yes.answer and "grant 7" in yes.decided_by
    assert [told.bridge for told in yes.told] == ["vmbr1", "vmbr0"]
    back = why(STATE, find(STATE, "c102"), find(STATE, "c201"))
    assert back.verdict is Verdict.NO and "only replies to tcp port 8080 (grant 7)" in back.answer
    other = why(STATE, find(STATE, "c201"), find(STATE, "c102"), ("tcp", 22))
    assert other.verdict is Verdict.NO and "Open is tcp port 8080 (grant 7) alone" in other.needed
    assert "An approved grant from c201" in other.needed


# -------------------------------------------------------------------------------------------------------- the proof

Change = Callable[[Flow], Flow | None]


def changed(flow: Flow, without: Field | None = None, **values: object) -> Flow:
    match = [item for item in flow.match if without is None or item[0] != without.header]
    return replace(flow, match=Match.of([*match, *Match.named(**values)]))


def found(bridge: Bridge, change: Change, *more: Flow, tables: tuple[int, ...] = (GRANT.id, CROSS.id)) -> bool:
    """Whether the proof refuses a bridge whose grant flows are changed: None takes one away."""
    ports = planned_ports(STATE, bridge)
    flows = [
        new
        for flow in BridgeCompiler().compile(STATE, bridge, ports).flows.values()
        for new in [change(flow) if flow.table in tables else flow]
        if new is not None
    ]
    return bool(prove(STATE, bridge, ports, [*flows, *more]))


def keep(flow: Flow) -> Flow:
    return flow


def is_reply(flow: Flow) -> bool:
    return flow.match.get(fields.TCP_SRC) is not None


def lookup(flow: Flow, **changes: object) -> Flow:
    actions: list[Action] = [replace(a, **changes) if isinstance(a, Ct) else a for a in flow.actions]  # type: ignore[arg-type]
    return replace(flow, actions=tuple(actions))


DAMAGES: Mapping[str, Change] = {
    "replies need no connection": lambda f: changed(f, fields.CT_STATE) if is_reply(f) else f,
    "replies may be new": lambda f: (
        changed(f, fields.CT_STATE, ct_state=OPENS) if is_reply(f) and f.match.get(fields.CT_STATE) else f
    ),
    "replies may go on": lambda f: (
        changed(f, fields.CT_STATE, ct_state=GOES_ON) if is_reply(f) and f.match.get(fields.CT_STATE) else f
    ),
    "replies of another zone": lambda f: lookup(f, zone=9) if is_reply(f) else f,
    "replies of an unknown zone": lambda f: lookup(f, zone=Bits(fields.REGS[0].header, 0, 16)) if is_reply(f) else f,
    "replies from any port": lambda f: changed(f, fields.TCP_SRC),
    "to any port": lambda f: changed(f, fields.TCP_DST),
    "fragments": lambda f: changed(f, fields.IP_FRAG),
    "every protocol": lambda f: changed(changed(f, fields.TCP_DST), fields.IP_PROTO) if not is_reply(f) else f,
    "translated": lambda f: lookup(f, nat="nat(src=10.1.0.9)") if f.table == CROSS.id else f,
    "kept in an unknown zone": lambda f: (
        lookup(f, zone=Bits(fields.REGS[0].header, 0, 16)) if f.table == CROSS.id else f
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("bridge", SOCKET, ids=lambda bridge: bridge.name)
def test_the_proof_refuses(bridge: Bridge, damage: str) -> None:
    assert not found(bridge, keep)
    assert found(bridge, DAMAGES[damage])


def foreign(*actions: Action, **match: object) -> Flow:
    return Flow(ADMIT.id, 40000, Match.named(eth_type=0x0800, **match), actions)


@pytest.mark.parametrize("bridge", SOCKET, ids=lambda bridge: bridge.name)
def test_a_connection_that_somebody_else_keeps_in_the_zone_is_found(bridge: Bridge) -> None:
    """Or the target might open a connection as if it were a reply to that."""
    zone = zones(STATE)[bridge.name]
    assert found(bridge, keep, foreign(Ct(zone, commit=True), in_port=1))
    assert found(bridge, keep, foreign(Ct(Bits(fields.REGS[0].header, 0, 16), commit=True), in_port=1))
    assert not found(bridge, keep, foreign(Ct(zone + 1, commit=True), in_port=1))
    assert not found(bridge, keep, foreign(Ct(zone), in_port=1))


def test_without_a_grant_nobody_minds_what_is_kept() -> None:
    ports = planned_ports(PLAIN, VMBR0)
    flows = [*BridgeCompiler().compile(PLAIN, VMBR0, ports).flows.values()]
    assert not prove(PLAIN, VMBR0, ports, [*flows, foreign(Ct(zones(STATE)["vmbr0"], commit=True), in_port=1)])


def test_a_passage_that_lets_everything_in_is_found() -> None:
    shut = lambda f: None if f.table == GRANT.id and not f.actions and f.goto is None else f  # noqa: E731
    assert found(VMBR0, shut)


def test_the_gate_lets_a_granted_state_through_and_says_what_is_wrong_otherwise() -> None:
    try_proof(STATE)
    ports = planned_ports(STATE, VMBR0)
    flows = [*BridgeCompiler().compile(STATE, VMBR0, ports).flows.values()]
    zone = zones(STATE)["vmbr0"]
    findings = prove(STATE, VMBR0, ports, [*flows, foreign(Ct(zone, commit=True), in_port=1)])
    assert f"can be kept among the connections of zone {zone}" in str(Unsafe(findings))


def test_granted_flows_are_no_crossing_to_lint_and_others_are() -> None:
    assert not list(crossings(STATE, NODE))
    told = {bridge for bridge, _ in crossings(replace(PLAIN, networks=STATE.networks), NODE)}
    assert told == {"vmbr0", "vmbr1"}


def test_the_register_says_which_grant() -> None:
    flows = BridgeCompiler().compile(STATE, VMBR0, planned_ports(STATE, VMBR0)).flows.values()
    marked = {
        a.value for f in flows for a in f.actions if isinstance(a, SetField) and a.header == fields.REGS[5].header
    }
    assert len(marked) == 1
