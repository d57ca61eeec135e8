"""A law: proving change after change gives what proving all of it anew gives, whatever changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow, FlowKey, Match, Output, SetField
from controller.frame import Port
from controller.model import Bridge, BridgeKind, DesiredState
from controller.verify.prove import Prover, prove
from tests.fakes.effort import examples
from tests.fakes.states import states, two_networks

SLOW = settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
Flows = dict[FlowKey, Flow]


def compiled(state: DesiredState, bridge: Bridge, ports: dict[str, Port]) -> Flows:
    return dict(BridgeCompiler().compile(state, bridge, ports).flows)


def some_flow(data: st.DataObject, flows: Flows) -> Flow:
    return data.draw(st.sampled_from(sorted(flows.values(), key=lambda flow: flow.key)))


def put(flows: Flows, *new: Flow) -> Flows:
    return flows | {flow.key: flow for flow in new}


def lose(data: st.DataObject, flows: Flows) -> Flows:
    lost = some_flow(data, flows)
    return {key: flow for key, flow in flows.items() if flow is not lost}


def widen(data: st.DataObject, flows: Flows) -> Flows:
    flow = some_flow(data, flows)
    items = list(flow.match)
    if items:
        items.remove(data.draw(st.sampled_from(items)))
    return put({key: f for key, f in flows.items() if f is not flow}, replace(flow, match=Match(items)))


def promote(data: st.DataObject, flows: Flows) -> Flows:
    flow = some_flow(data, flows)
    return put(
        {key: f for key, f in flows.items() if f is not flow},
        replace(flow, priority=data.draw(st.sampled_from([0, 90, 325, 5000]))),
    )


def redirect(data: st.DataObject, flows: Flows) -> Flows:
    flow = some_flow(data, flows)
    wrong = data.draw(st.sampled_from([1, 2, 3, 4, fields.IN_PORT, fields.NORMAL, fields.LOCAL]))
    actions = tuple(Output(wrong) if isinstance(action, Output) else action for action in flow.actions)
    actions = tuple(
        SetField(a.header, wrong & 0xFFFF) if isinstance(a, SetField) and a.header == fields.REGS[1].header else a
        for a in actions
    )
    return put(flows, replace(flow, actions=actions))


def mix(data: st.DataObject, flows: Flows) -> Flows:
    return put(flows, replace(some_flow(data, flows), actions=some_flow(data, flows).actions))


def jump(data: st.DataObject, flows: Flows) -> Flows:
    tables = sorted({flow.table for flow in flows.values()})
    flow = some_flow(data, flows)
    return put(flows, replace(flow, goto=data.draw(st.sampled_from([None, *tables]))))


def foreign(data: st.DataObject, flows: Flows) -> Flows:
    match = Match.named(in_port=data.draw(st.integers(1, 6)))
    table = data.draw(st.sampled_from(sorted({flow.table for flow in flows.values()})))
    target = data.draw(st.sampled_from([None, 10, 60, 80, 90]))
    output = () if target is not None else (Output(data.draw(st.integers(1, 6))),)
    return put(flows, Flow(table, data.draw(st.sampled_from([1, 330, 9000])), match, output, target))


DAMAGES: list[Callable[[st.DataObject, Flows], Flows]] = [lose, widen, promote, redirect, mix, jump, foreign]


def agree(prover: Prover, state: DesiredState, bridge: Bridge, ports: dict[str, Port], flows: Flows) -> bool:
    again = prover.prove(state, bridge, ports, flows)
    anew = prove(state, bridge, ports, flows.values())
    assert bool(again) == bool(anew), f"{list(map(str, again))} is not {list(map(str, anew))}"
    return not anew


@SLOW
@given(states(), states(), st.data())
def test_ports_and_states_that_change(first: DesiredState, second: DesiredState, data: st.DataObject) -> None:
    """Ports go, come back, and come back with other numbers; the state becomes another one; flows lag behind."""
    prover = Prover()
    mesh = data.draw(st.booleans())
    state, flows = first, None
    for _ in range(data.draw(st.integers(2, 6))):
        state = data.draw(st.sampled_from([state, first, second]))
        bridges = [b for b in state.bridges if (b.kind is BridgeKind.MESH) == mesh]
        if not bridges:
            continue
        bridge = bridges[0]
        ports = planned_ports(state, bridge)
        for name in data.draw(st.sets(st.sampled_from(sorted(ports)), max_size=3)):
            del ports[name]
        if data.draw(st.booleans()) and ports:
            name, number = data.draw(st.sampled_from(sorted(ports))), data.draw(st.integers(1, 40))
            if number not in {port.number for port in ports.values()}:
                ports[name] = replace(ports[name], number=number)
        if flows is None or data.draw(st.integers(0, 4)):
            flows = compiled(state, bridge, ports)
        agree(prover, state, bridge, ports, flows)


@settings(SLOW, max_examples=examples(80))
@given(st.data())
def test_flows_that_are_damaged(data: st.DataObject) -> None:
    """Damages that are harmless pile up; one that is not is found, and the next proof begins with sound flows again."""
    state = data.draw(st.one_of(st.just(two_networks()), states()))
    bridge = data.draw(st.sampled_from(list(state.bridges)))
    ports = planned_ports(state, bridge)
    sound = flows = compiled(state, bridge, ports)
    prover = Prover()
    assert agree(prover, state, bridge, ports, flows)
    for _ in range(data.draw(st.integers(1, 5))):
        worse = data.draw(st.sampled_from(DAMAGES))(data, flows)
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(ports)))
            ports = {n: p for n, p in planned_ports(state, bridge).items() if n != name}
        flows = worse if agree(prover, state, bridge, ports, worse) else sound
        agree(prover, state, bridge, ports, flows)
