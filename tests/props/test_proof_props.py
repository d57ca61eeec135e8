"""Laws of the proof: what the compiler makes is proved, and what is damaged so that something crosses is found."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow, Match, Output
from controller.model import Bridge, DesiredState
from controller.verify.cubes import empty, solve, witness
from controller.verify.prove import prove
from controller.verify.space import inside, meet
from tests.fakes.effort import examples
from tests.fakes.states import states, two_networks

SLOW = settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))


def flows_of(state: DesiredState, bridge: Bridge) -> list[Flow]:
    return list(BridgeCompiler().compile(state, bridge, planned_ports(state, bridge)).flows.values())


@SLOW
@given(states())
def test_whatever_compiles_is_proved(state: DesiredState) -> None:
    for bridge in state.bridges:
        found = prove(state, bridge, planned_ports(state, bridge), flows_of(state, bridge))
        assert not found, "\n".join(map(str, found))


@SLOW
@given(st.data())
def test_a_foreign_flow_that_sends_anything_on_is_found(data: st.DataObject) -> None:
    state = two_networks()
    bridge = data.draw(st.sampled_from(list(state.bridges)))
    ports = planned_ports(state, bridge)
    numbers = [port.number for port in ports.values()]
    source, target = data.draw(st.sampled_from(numbers)), data.draw(st.sampled_from([*numbers, fields.NORMAL, 777]))
    match = Match.named(in_port=source)
    bad = Flow(0, 65535, match, (Output(target),))
    found = prove(state, bridge, ports, [*flows_of(state, bridge), bad])
    assert bool(found) == (source != target)
    assert all(finding.counterexample is not None for finding in found)


def test_without_its_guard_a_bridge_is_not_proved() -> None:
    state = two_networks()
    bridge = state.bridges[0]
    flows = flows_of(state, bridge)
    ports = planned_ports(state, bridge)
    missed = []
    for lost in flows:
        if lost.actions or lost.goto is not None or lost.priority == 0:
            continue
        if not prove(state, bridge, ports, [flow for flow in flows if flow is not lost]):
            missed.append(str(lost))
    widened = [replace(f, match=Match(i for i in f.match if i[0] != fields.ETH_SRC.header)) for f in flows]
    assert prove(state, bridge, ports, widened), "sender addresses are not compared any more"
    # What is dropped by more than one table may be lost from one of them.
    assert len(missed) < len(flows) / 2, missed


cube = st.tuples(st.integers(0, 255), st.integers(0, 255)).map(lambda c: (c[0] & c[1], c[1]))


@given(cube, st.lists(cube, max_size=12))
def test_both_engines_agree_with_counting(start: tuple[int, int], minus: list[tuple[int, int]]) -> None:
    every = [n for n in range(256) if not (n ^ start[0]) & start[1]]
    left = [n for n in every if not any(not (n ^ m[0]) & m[1] for m in minus)]
    assert empty(start, minus) == (not left)
    for found in (witness(start, minus), solve(start, minus)):
        assert (found is None) == (not left)
        assert found is None or found in left


@given(cube, cube)
def test_meeting_and_inside(a: tuple[int, int], b: tuple[int, int]) -> None:
    inside_both = [n for n in range(256) if not (n ^ a[0]) & a[1] and not (n ^ b[0]) & b[1]]
    both = meet(a, b)
    assert (both is None) == (not inside_both)
    if both is not None:
        assert inside_both == [n for n in range(256) if not (n ^ both[0]) & both[1]]
        assert inside(both, a) and inside(both, b)
