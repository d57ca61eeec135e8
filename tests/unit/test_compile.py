"""From states to flows: contradictions are found, and a small change makes few flows anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps import SOCKET_APPS, App
from controller.compile import (
    CANARY_FLOW,
    UNDECLARED_FLOW,
    BridgeCompiler,
    Conflict,
    Names,
    OverlapIndex,
    describe,
    planned_ports,
    undeclared,
)
from controller.fields import IN_PORT_FIELD
from controller.flow import Cookie, Flow, FlowKey, Match, Output
from controller.frame import LOCAL_NAME, Port, object_id
from controller.model import DesiredState, Grant, Network, Rule, Service
from controller.pipeline import ADMIT, OUTPUT_GUARD, SERVICE, SOCKET_TABLES, Band
from tests.fakes.states import management, member, privacy, state_of, two_networks, with_network
from tests.fakes.switch import Dropped, FakeSwitch, Sent, Values

STATE = two_networks()
PRIVACY, MANAGEMENT = STATE.networks
VMBR0, VMBR1, MESH0, _ = STATE.bridges
PORTS = planned_ports(STATE, VMBR0)
MORE = with_network(STATE, "privacy", members=(*PRIVACY.members, member("privacy", 103, "10.0.0.103")))


def with_grants() -> tuple[DesiredState, dict[str, Port]]:
    state = replace(STATE, grants=(Grant("1", "102", "201", "tcp", 80), Grant("2", "200", "102", "udp", 53)))
    return state, planned_ports(state, state.bridges[0])


def compiled(state: DesiredState = STATE, ports: dict[str, Port] = PORTS, up: bool = True) -> dict[FlowKey, Flow]:
    return dict(BridgeCompiler().compile(state, state.bridges[0], ports, up).flows)


# -------------------------------------------------------------------------------------------------------- contradictions


def flow(out: int, priority: int = 5, table: int = 1, /, **match: object) -> Flow:
    return Flow(table, priority, Match.named(**match), (Output(out),) if out else ())


A, B = {"ipv4_dst": (0x0A000000, 0xFF000000)}, {"tcp_dst": 80}


@pytest.mark.parametrize(
    "one, other",
    [
        (flow(1, in_port=1), flow(2, in_port=1)),
        (flow(1), flow(2)),
        (flow(1), flow(2, in_port=1)),
        (flow(1, **A), flow(2, **B)),
        (flow(1, **A), flow(2, ipv4_dst=0x0A010203)),
        (flow(1, **A), flow(2, ipv4_dst=(0x0A010000, 0xFFFF0000))),
        (flow(1, **A, **B), flow(2, in_port=3, **B)),
        (flow(1, reg0=(1, 1)), flow(2, reg0=(2, 2))),
        (flow(1, ipv4_dst=(0x0A000001, 0xFF0000FF)), flow(2, ipv4_dst=(0x0A020000, 0xFFFF0000))),
        (flow(0, in_port=1), flow(1)),
        (flow(1, in_port=1), flow(1, in_port=1)),
    ],
    ids=str,
)
def test_two_flows_for_one_packet_are_refused(one: Flow, other: Flow) -> None:
    for first, second in ((one, other), (other, one)):
        index = OverlapIndex()
        index.add(first)
        with pytest.raises(Conflict, match="two flows of one priority match the same packet") as caught:
            index.add(second)
        assert str(first) in str(caught.value) and str(second) in str(caught.value)


@pytest.mark.parametrize(
    "one, other",
    [
        (flow(1, in_port=1), flow(2, in_port=2)),
        (flow(1, 5, in_port=1), flow(2, 6, in_port=1)),
        (flow(1, 5, 1, in_port=1), flow(2, 5, 2, in_port=1)),
        (flow(1), flow(1, in_port=1)),
        (flow(1, **A), flow(1, **B)),
        (flow(1, **A), flow(2, ipv4_dst=0x0B000001)),
        (flow(1, reg0=(1, 3)), flow(2, reg0=(2, 3))),
        (flow(1, reg0=(1, 1), in_port=1), flow(2, reg0=(0, 1))),
        (flow(1, ipv4_dst=(0x0A000001, 0xFF0000FF)), flow(2, ipv4_dst=(0x0A000002, 0xFFFFFFFF))),
    ],
    ids=str,
)
def test_two_flows_that_agree_or_never_meet_are_not(one: Flow, other: Flow) -> None:
    for first, second in ((one, other), (other, one)):
        index = OverlapIndex()
        index.add(first)
        index.add(second)


def test_what_was_removed_is_in_nobodys_way() -> None:
    index = OverlapIndex()
    index.add(flow(1, **A))
    index.add(flow(1, **B))
    index.remove(flow(1, **A))
    index.add(flow(2, tcp_dst=81, **A))
    with pytest.raises(Conflict):
        index.add(flow(3, **A))
    index.remove(flow(2, tcp_dst=81, **A))
    index.remove(flow(1, **B))
    index.add(flow(3, **A))


SMALL = st.builds(
    lambda out, one, other: Flow(
        1,
        5,
        Match.named(reg0=(one[0] & one[1], one[1]), reg1=(other[0] & other[1], other[1])),
        (Output(out),) if out else (),
    ),
    st.integers(0, 2),
    st.tuples(st.integers(0, 7), st.integers(0, 7)),
    st.tuples(st.integers(0, 7), st.integers(0, 7)),
)


@given(st.lists(st.tuples(SMALL, st.booleans()), max_size=14))
def test_the_index_finds_what_comparing_with_every_flow_finds(steps: list[tuple[Flow, bool]]) -> None:
    index, held = OverlapIndex(), list[Flow]()
    for new, remove in steps:
        if remove and held:
            index.remove(held.pop(0))
        bad = [
            old for old in held if old.key == new.key or (old.match.overlaps(new.match) and old.effect != new.effect)
        ]
        if bad:
            with pytest.raises(Conflict):
                index.add(new)
        else:
            index.add(new)
            held.append(new)


def contradiction() -> DesiredState:
    match = (("eth_type", 0x0800, 0xFFFF),)
    rules = (
        Rule("flows[0]", "", 1, match, None, None),
        Rule("flows[1]", "", 1, (*match, ("ipv4_dst", int(PRIVACY.members[1].address), 0xFFFFFFFF)), None, "veth102"),
    )
    return with_network(STATE, "privacy", rules=rules)


def test_a_conflict_names_both_flows_and_the_next_compile_is_as_good_as_new() -> None:
    compiler = BridgeCompiler()
    before = compiler.compile(STATE, VMBR0, PORTS)
    with pytest.raises(Conflict, match=r"(?s)services: table=50,priority=1001.*services: table=50,priority=1001"):
        compiler.compile(contradiction(), VMBR0, PORTS)
    assert compiler.compile(STATE, VMBR0, PORTS) == before
    with pytest.raises(Conflict):
        compiler.compile(contradiction(), VMBR0, PORTS)
    assert compiler.compile(MORE, VMBR0, PORTS) == BridgeCompiler().compile(MORE, VMBR0, PORTS)


# ----------------------------------------------------------------------------------------------------------- increments


def test_a_new_member_makes_its_own_flows_and_no_other_anew() -> None:
    compiler, ports = BridgeCompiler(), planned_ports(MORE, VMBR0)
    before = compiler.compile(STATE, VMBR0, ports).flows
    after = compiler.compile(MORE, VMBR0, ports).flows
    assert all(after[key] is flow for key, flow in before.items())
    names = Names([MORE])
    assert {names.owner(after[key].cookie) for key in after.keys() - before.keys()} == {
        (app, "member/103")
        for app in ("admission", "spoof_guard", "neighbour", "forwarding", "output_guard", "packet_in")
    }
    again = compiler.compile(STATE, VMBR0, ports).flows
    assert again == before and all(again[key] is flow for key, flow in before.items())


def test_a_change_of_the_network_makes_everything_anew_and_right() -> None:
    compiler = BridgeCompiler()
    compiler.compile(STATE, VMBR0, PORTS)
    for state, up in ((state_of(PRIVACY), True), (STATE, False), (with_network(STATE, "privacy", mesh=None), True)):
        bridge = state.bridges[0]
        assert compiler.compile(state, bridge, PORTS, up) == BridgeCompiler().compile(state, bridge, PORTS, up)


def test_a_compilers_answer_does_not_change_behind_its_readers_back() -> None:
    compiler = BridgeCompiler()
    first = compiler.compile(STATE, VMBR0, PORTS)
    size = len(first.flows)
    compiler.compile(MORE, VMBR0, planned_ports(MORE, VMBR0))
    assert len(first.flows) == size


# ---------------------------------------------------------------------------------------------------------------- ports


def without(*names: str) -> dict[str, Port]:
    return {name: port for name, port in PORTS.items() if name not in names}


def test_missing_ports_are_named_and_have_no_way_in_or_out() -> None:
    found = BridgeCompiler().compile(STATE, VMBR0, without("veth102", "warp0"))
    assert found.missing == ("warp0", "veth102")
    for flow in found.flows.values():
        for gone in ("veth102", "warp0"):
            if flow.table == ADMIT.id:
                assert flow.match.get(IN_PORT_FIELD) != (PORTS[gone].number, 0xFFFFFFFF)
            assert Output(PORTS[gone].number) not in flow.actions


def test_without_its_egress_port_a_network_is_shut() -> None:
    switch = FakeSwitch("vmbr0", 1, {n: p.number for n, p in without("warp0").items() if n != LOCAL_NAME})
    switch.hold(compiled(ports=without("warp0")).values())
    xray = PRIVACY.members[1]
    found = switch.trace(switch.number("veth102"), eth_src=xray.mac, ipv4_src=xray.address, ipv4_dst="1.1.1.1")
    assert found == Dropped("EGRESS")


def test_a_mesh_bridge_with_one_end_lets_nothing_across() -> None:
    ports = planned_ports(STATE, MESH0)
    both = BridgeCompiler().compile(STATE, MESH0, ports)
    assert not both.missing and any(flow.actions for flow in both.flows.values())
    one = BridgeCompiler().compile(STATE, MESH0, {n: p for n, p in ports.items() if n != "to-privacy"})
    assert one.missing == ("to-privacy",) and not any(flow.actions for flow in one.flows.values())
    assert CANARY_FLOW in one.flows.values()


def test_planned_ports_are_numbered_in_declared_order() -> None:
    names = [name for name, _ in sorted(PORTS.items(), key=lambda item: item[1].number)]
    assert names == ["warp0", "from-privacy", "veth100", "veth102", LOCAL_NAME]
    assert PORTS[LOCAL_NAME].number == 0xFFFFFFFE
    assert list(planned_ports(STATE, MESH0)) == ["nm-privacy", "to-privacy", LOCAL_NAME]


def test_an_undeclared_bridge_gets_a_drop_and_a_canary() -> None:
    found = undeclared("br9")
    assert set(found.flows.values()) == {UNDECLARED_FLOW, CANARY_FLOW} and found.bridge.name == "br9"
    assert UNDECLARED_FLOW.effect == ((), None) and UNDECLARED_FLOW.priority == 0


# ---------------------------------------------------------------------------------------------------------------- apps


def test_every_table_has_a_miss_that_drops_by_name_or_a_rest_that_goes_on() -> None:
    flows = compiled().values()
    for table in SOCKET_TABLES:
        lowest = min((flow for flow in flows if flow.table == table.id), key=lambda flow: flow.priority, default=None)
        if table.name not in ("RETURN", "CROSS"):  # the latter has flows while something is granted only
            assert lowest is not None and lowest.match == Match(), table.name


@pytest.mark.parametrize("app", SOCKET_APPS, ids=lambda app: app.name)
def test_an_app_makes_flows_of_its_own_tables_and_cookie(app: App) -> None:
    flows = compiled(*with_grants()) if app.name == "grants" else compiled()
    own = [flow for flow in flows.values() if (parts := Cookie.of(flow.cookie)) and parts.app == app.id]
    assert own and {flow.table for flow in own} <= {table.id for table in app.tables}


def test_two_names_for_one_port_are_one_flow() -> None:
    twice = member("management", 202, "10.1.0.202", Service("a", "tcp", 80), Service("b", "tcp", 80, exposed=True))
    state = state_of(management(twice))
    flows = BridgeCompiler().compile(state, state.bridges[0], planned_ports(state, state.bridges[0])).flows.values()
    assert len([flow for flow in flows if flow.table == SERVICE.id and flow.priority == Band.OWN]) == 1


def rule(output: str | None, in_port: str | None = None, **match: tuple[int, int]) -> Rule:
    items = {"eth_type": (0x0800, 0xFFFF), **match}
    return Rule("flows[7]", "", 7, tuple((name, *pair) for name, pair in items.items()), in_port, output)


def traced(network: Network, port: str, values: Values) -> object:
    state = state_of(network, MANAGEMENT)
    ports = planned_ports(state, state.bridges[0])
    switch = FakeSwitch("vmbr0", 1, {n: p.number for n, p in ports.items() if n != LOCAL_NAME})
    switch.hold(compiled(state, ports).values())
    return switch.trace(switch.number(port), values)


def test_a_rule_of_the_state_file_stands_above_services_and_below_isolation() -> None:
    server, xray = PRIVACY.members
    to_server: Values = {"eth_src": xray.mac, "ipv4_src": xray.address, "ipv4_dst": server.address}
    assert traced(PRIVACY, "veth102", to_server) == Sent(3)
    dropping = replace(PRIVACY, rules=(rule(None, "veth102", ipv4_dst=(int(server.address), 0xFFFFFFFF)),))
    assert traced(dropping, "veth102", to_server) == Dropped("SERVICE")
    stealing = replace(PRIVACY, rules=(rule("veth100"),))
    crossing = {**to_server, "ipv4_dst": "10.1.0.200"}
    assert "CROSSING" in str(traced(stealing, "veth102", crossing))
    spoofing = {**to_server, "ipv4_src": "10.0.0.9"}
    assert "SPOOF" in str(traced(stealing, "veth102", spoofing))


def test_a_rule_never_sends_back_where_it_came_from_nor_from_the_egress() -> None:
    server = PRIVACY.members[0]
    stealing = replace(PRIVACY, rules=(rule("veth100"),))
    own: Values = {"eth_src": server.mac, "ipv4_src": server.address, "ipv4_dst": "10.0.0.102"}
    assert traced(stealing, "veth100", own) == Dropped("OUTPUT_GUARD")
    assert PRIVACY.egress is not None
    world: Values = {"eth_src": PRIVACY.egress.mac, "ipv4_src": "1.1.1.1", "ipv4_dst": server.address}
    assert "UNSOLICITED" in str(traced(stealing, "warp0", world))


def test_a_rule_whose_port_is_away_has_no_flow() -> None:
    state = with_network(
        STATE, "privacy", rules=(rule("veth102", ipv4_dst=(int(PRIVACY.members[1].address), 0xFFFFFFFF)),)
    )
    names = Names([state])
    with_port = [f for f in compiled(state).values() if names.owner(f.cookie) == ("services", "rule/flows[7]")]
    away = [
        f
        for f in compiled(state, without("veth102")).values()
        if names.owner(f.cookie) == ("services", "rule/flows[7]")
    ]
    assert len(with_port) == 1 and not away


# --------------------------------------------------------------------------------------------------------------- names


def test_names_know_apps_and_objects_of_all_the_states_given() -> None:
    names = Names([STATE, MORE])
    owners = {names.owner(flow.cookie) for flow in compiled(MORE, planned_ports(MORE, VMBR0)).values()}
    assert ("admission", "member/103") in owners and ("canary", "canary") in owners
    assert ("isolation", "network/management") in owners and ("services", "service/100/vpn") in owners
    assert Names([STATE]).owner(int(Cookie(1, object_id("member/103")))) == ("admission", "?")
    assert names.owner(int(Cookie(99, 5))) == ("app 99", "?")
    assert names.owner(0x77) is None


def test_objects_keep_their_number() -> None:
    """They stand in cookies, and have to survive a restart and an update."""
    assert object_id("member/100") == 0xAB1FBE553C
    assert len({object_id(f"member/{n}") for n in range(5000)}) == 5000


def test_describe_names_the_app() -> None:
    assert describe(CANARY_FLOW).startswith("canary: table=250")
    assert describe(Flow(1, 1, Match(), (), None, 5)).startswith("foreign: ")
    assert describe(Flow(1, 1, Match(), (), None, int(Cookie(99, 1)))).startswith("?: ")


def test_the_host_takes_part_only_where_it_is_declared_to() -> None:
    xray = member("privacy", 102, "10.0.0.102")
    state = state_of(privacy(xray))
    flows = BridgeCompiler().compile(state, state.bridges[0], planned_ports(state, state.bridges[0])).flows.values()
    local = Output(0xFFFFFFFE)
    assert not [flow for flow in flows if local in flow.actions]
    assert [flow for flow in compiled().values() if local in flow.actions and flow.table == OUTPUT_GUARD.id]
