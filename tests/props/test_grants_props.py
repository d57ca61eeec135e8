"""Laws of grants: without one nothing is different, and any set of them opens exactly its cells, by the proof too."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from apps.grants import Grants
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Cookie, Flow, FlowKey
from controller.grants import openings, passages, zones
from controller.model import Bridge, BridgeKind, DesiredState
from controller.verify.prove import Prover, prove
from controller.verify.reach import Cell, whole
from tests.fakes.effort import examples
from tests.fakes.states import granted_states, grants_of

SLOW = settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))


def flows_of(state: DesiredState, bridge: Bridge) -> dict[FlowKey, Flow]:
    return dict(BridgeCompiler().compile(state, bridge, planned_ports(state, bridge)).flows)


def is_grants(flow: Flow) -> bool:
    parts = Cookie.of(flow.cookie)
    return parts is not None and parts.app == Grants.id


@SLOW
@given(granted_states())
def test_grants_only_add_flows_and_are_proved(state: DesiredState) -> None:
    """What is not the grants' own is the very same as without any; without them in the state theirs are refused."""
    without = replace(state, grants=())
    opened = {bridge for o in openings(state) for bridge in (o.source_bridge, o.target_bridge)}
    for bridge in state.bridges:
        flows, ports = flows_of(state, bridge), planned_ports(state, bridge)
        own = {key: flow for key, flow in flows.items() if is_grants(flow)}
        assert bool(own) == (bridge.name in opened)
        plain = BridgeCompiler().compile(without, bridge, ports).flows
        assert {key: flow for key, flow in flows.items() if key not in own} == dict(plain)
        found = prove(state, bridge, ports, flows.values())
        assert not found, "\n".join(map(str, found))
        assert bool(prove(without, bridge, ports, flows.values())) == bool(own)


@settings(SLOW, max_examples=25)
@given(granted_states())
def test_the_matrix_differs_in_the_granted_cells_alone(state: DesiredState) -> None:
    before, after = whole(replace(state, grants=())), whole(state)
    granted: dict[tuple[str, str], set[tuple[str, int]]] = {}
    names = {e.member.id: e.name for e in after.rows if e.member is not None}
    for o in openings(state):
        granted.setdefault((names[o.source.id], names[o.target.id]), set()).add((o.protocol, o.port))
    for pair, cell in after.cells.items():
        if pair not in granted:
            assert cell.as_data() == before.cells[pair].as_data()
        else:
            assert before.cells[pair].text == "no"
            assert len(cell.open) == len(granted[pair]) and not cell.answers and not cell.doubt, cell
            assert _others_closed(cell, granted[pair])


def _others_closed(cell: Cell, granted: set[tuple[str, int]]) -> bool:
    unnamed = {f"{protocol}/*" for protocol, _ in granted} | {"tcp", "udp", "sctp", "icmp", "other", "frames"}
    return not unnamed & set(cell.open)


@SLOW
@given(granted_states(), st.data())
def test_grants_that_come_and_go_are_proved_like_anew(state: DesiredState, data: st.DataObject) -> None:
    """Also with the flows of before or after, and while the passage is not there: what is proved is as if proved anew."""
    bridge = data.draw(st.sampled_from([b for b in state.bridges if b.kind is BridgeKind.SOCKET]))
    compiler, prover = BridgeCompiler(), Prover()
    flows: dict[FlowKey, Flow] = {}
    for _ in range(data.draw(st.integers(2, 5))):
        state = replace(state, grants=data.draw(grants_of(state)))
        ports = planned_ports(state, bridge)
        for name in data.draw(st.sets(st.sampled_from(sorted(ports)), max_size=2)):
            del ports[name]
        compiled = dict(compiler.compile(state, bridge, ports).flows)
        assert compiled == dict(BridgeCompiler().compile(state, bridge, ports).flows)
        for held in (flows, compiled):
            found = bool(prover.prove(state, bridge, ports, held))
            assert found == bool(prove(state, bridge, ports, held.values()))
        assert not found
        flows = compiled


@SLOW
@given(granted_states())
def test_names_and_numbers_of_passages(state: DesiredState) -> None:
    found = passages(state)
    numbers = zones(state)
    assert len(set(numbers.values())) == len(numbers) and 0 not in numbers.values()
    assume(found)
    names = [name for passage in found for name in (passage.port, passage.peer_port)]
    assert all(len(name) <= 15 for name in names) and len(set(names)) == len(names)
    others = [name for bridge in state.bridges for name in planned_ports(replace(state, grants=()), bridge)]
    assert not set(names) & set(others)
    assert passages(replace(state, grants=state.grants[::-1])) == found
