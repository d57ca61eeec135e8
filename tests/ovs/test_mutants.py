"""Damaged flows: what the proof finds Open vSwitch confirms, and what Open vSwitch lets across the proof has found.

How many: BULKHEAD_MUTANTS=1000 for the long run.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import pytest

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow, FlowKey, Match, Move, Output, SetField
from controller.frame import Port
from controller.model import Bridge, DesiredState
from controller.statefile import load
from controller.verify.packetwords import parse, words
from controller.verify.policy import Policy
from controller.verify.prove import Counterexample, Prover
from controller.verify.rules import Ports
from controller.verify.walk import Walker
from lab.ovs import LabError
from tests.fakes.states import two_networks
from tests.ovs.headers import Headers
from tests.ovs.node import EXAMPLE
from tests.ovs.tracer import Tracer

MUTANTS = int(os.environ.get("BULKHEAD_MUTANTS", "150"))
PACKETS = 30
"""So many packets are tried on each mutant that is said to be harmless."""

Flows = dict[FlowKey, Flow]
Damage = Callable[[random.Random, Flows], "tuple[Flows, Flow]"]


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer() as running:
        yield running


# ------------------------------------------------------------------------------------------------------------ damages


def _any(rng: random.Random, flows: Flows) -> Flow:
    return rng.choice(sorted(flows.values(), key=lambda flow: flow.key))


def _instead(flows: Flows, old: Flow, *new: Flow) -> Flows:
    return {key: f for key, f in flows.items() if f is not old} | {flow.key: flow for flow in new}


def dropped(rng: random.Random, flows: Flows) -> tuple[Flows, Flow]:
    lost = _any(rng, flows)
    return _instead(flows, lost), lost


def lost_guard(rng: random.Random, flows: Flows) -> tuple[Flows, Flow]:
    guards = {key: f for key, f in flows.items() if f.priority and (f.goto in (None, 100)) and not _outputs(f)}
    lost = _any(rng, guards or flows)
    return _instead(flows, lost), lost


def widened(rng: random.Random, flows: Flows) -> tuple[Flows, Flow]:
    flow = _any(rng, flows)
    items = list(flow.match)
    if items:
        header, value, mask = items.pop(rng.randrange(len(items)))
        of = fields.by_header(header)
        if of.maskable and rng.random() < 0.5:
            shorter = mask & mask << rng.randrange(1, of.bits) & of.full
            items += [(header, value & shorter, shorter)] if shorter else []
    wide = replace(flow, match=Match(sorted(items)))
    return _instead(flows, flow, wide), wide


def added(rng: random.Random, flows: Flows) -> tuple[Flows, Flow]:
    port = rng.choice(_ports(flows))
    match = Match.named(in_port=port) if rng.random() < 0.6 else Match.named(eth_type=0x0800)
    target = rng.choice([10, 30, 50, 70, 80, 90, None])
    output = () if target is not None else (Output(rng.choice([*_ports(flows), fields.NORMAL])),)
    new = Flow(
        rng.choice(sorted({f.table for f in flows.values()})), rng.choice([150, 330, 30000]), match, output, target
    )
    new = new if new.goto is None or new.goto > new.table else replace(new, goto=None, actions=(Output(1),))
    return flows | {new.key: new}, new


def reprioritised(rng: random.Random, flows: Flows) -> tuple[Flows, Flow]:
    flow = _any(rng, flows)
    other = replace(flow, priority=rng.choice([1, 50, 99, 210, 310, 420, 700]))
    return _instead(flows, flow, other), other


def wrong_output(rng: random.Random, flows: Flows) -> tuple[Flows, Flow]:
    flow = _any(rng, {key: f for key, f in flows.items() if _outputs(f)} or flows)
    actions = tuple(Output(rng.choice(_ports(flows))) if isinstance(a, Output) else a for a in flow.actions)
    wrong = replace(flow, actions=actions)
    return _instead(flows, flow, wrong), wrong


def wrong_register(rng: random.Random, flows: Flows) -> tuple[Flows, Flow]:
    writers = {key: f for key, f in flows.items() if any(isinstance(a, SetField) for a in f.actions)}
    flow = _any(rng, writers or flows)
    values = [a.value for f in writers.values() for a in f.actions if isinstance(a, SetField) and _is_register(a)]
    actions = tuple(
        SetField(a.header, rng.choice(values)) if isinstance(a, SetField) and _is_register(a) else a
        for a in flow.actions
    )
    wrong = replace(flow, actions=actions)
    return _instead(flows, flow, wrong), wrong


def _is_register(action: SetField) -> bool:
    return action.header in {reg.header for reg in fields.REGS}


def _outputs(flow: Flow) -> bool:
    return any(isinstance(action, Output) and action.port != fields.CONTROLLER for action in flow.actions)


def _ports(flows: Flows) -> list[int]:
    return sorted({item[1] for f in flows.values() for item in f.match if item[0] == fields.IN_PORT_FIELD.header})


DAMAGES: tuple[Damage, ...] = (dropped, lost_guard, widened, added, reprioritised, wrong_output, wrong_register)

# -------------------------------------------------------------------------------------------------------------- tests


@dataclass
class Site:
    state: DesiredState
    bridge: Bridge
    ports: Mapping[str, Port]
    flows: Flows

    @property
    def numbers(self) -> dict[str, int]:
        return {name: port.number for name, port in self.ports.items()}


def sites() -> list[Site]:
    out = []
    for state in (load(EXAMPLE).state, two_networks()):
        for bridge in state.bridges:
            ports = planned_ports(state, bridge)
            flows = dict(BridgeCompiler().compile(state, bridge, ports).flows)
            out.append(Site(state, bridge, ports, flows))
    return out


def test_every_damage_that_lets_something_cross_is_found(tracer: Tracer) -> None:
    rng = random.Random(4711)
    verdicts: Counter[str] = Counter()
    wrong: list[str] = []
    every = sites()
    provers = [Prover() for _ in every]
    for number in range(MUTANTS):
        index = rng.randrange(len(every))
        site, damage = every[index], DAMAGES[number % len(DAMAGES)]
        flows, touched = damage(rng, site.flows)
        if flows == site.flows:
            continue
        assert not provers[index].prove(site.state, site.bridge, site.ports, site.flows)
        findings = provers[index].prove(site.state, site.bridge, site.ports, flows)
        verdicts["unsafe" if findings else "harmless"] += 1
        about = f"{damage.__name__} on {site.bridge.name}: {touched}"
        try:
            tracer.bridge(site.bridge.name, site.numbers, flows.values())
        except LabError as exc:  # no such flow can get into a switch
            assert "OFPBAC_MATCH_INCONSISTENT" in str(exc), exc
            continue
        for finding in findings:
            if finding.counterexample is None:
                wrong.append(f"{about}: not decided: {finding.text}")
            elif not _confirmed(tracer, site, flows, finding.counterexample):
                wrong.append(f"{about}: Open vSwitch does not do this:\n{finding}")
        if not findings:
            wrong += [f"{about}: {text}" for text in _crossings(tracer, rng, site, flows, touched)]
    assert not wrong, "\n".join(wrong[:8]) + f"\n{len(wrong)} wrong, {dict(verdicts)}"
    assert min(verdicts.values()) > MUTANTS / 10 and len(verdicts) == 2, verdicts


def _confirmed(tracer: Tracer, site: Site, flows: Flows, example: Counterexample) -> bool:
    """Whether Open vSwitch sends the packet there. Learned flows on its way are put there first."""
    learned = [flow for flow in example.way if flow.key not in flows]
    if learned:
        known = [replace(f, actions=tuple(a for a in f.actions if not isinstance(a, Move))) for f in learned]
        tracer.load(site.bridge.name, [*flows.values(), *known])
    port, _, header = parse(example.packet)
    number = 0xFFFE if port == "LOCAL" else int(str(port))
    if example.in_port not in site.numbers:
        interface = (
            "--",
            "set",
            "interface",
            f"stray-{site.bridge.name}"[:15],
            "type=dummy",
            f"ofport_request={number}",
        )
        tracer.vsctl("--may-exist", "add-port", site.bridge.name, f"stray-{site.bridge.name}"[:15], *interface)
        tracer.forget()
    wanted = site.numbers.get(example.out_port)
    if wanted is None and example.out_port == "the port it came in by":
        wanted = site.numbers[example.in_port]
    elif wanted is None:
        wanted = int(example.out_port.removeprefix("port "))
    wanted = 0xFFFE if wanted == fields.LOCAL else wanted
    if (site.bridge.name, wanted) in tracer.outputs(site.bridge.name, example.packet):
        return True
    # Where two flows of one priority contradict each other nobody knows which one wins; the proof says: either.
    way = Walker([*flows.values(), *learned]).follow(number, header)
    return any("several flows" in doubt for doubt in way.doubts) and wanted in {port for port, _ in way.sent}


def _crossings(tracer: Tracer, rng: random.Random, site: Site, flows: Flows, touched: Flow) -> Iterator[str]:
    policy = Policy(site.state, site.bridge, site.ports, Ports())
    made = Headers(rng, site.state, site.bridge, site.ports, flows.values())
    for _ in range(PACKETS):
        in_port, header = made.some([touched])
        packet = words(in_port, header)
        for name, port in tracer.outputs(site.bridge.name, packet):
            answered = port == in_port and policy.allows(in_port, fields.IN_PORT, header)
            if not answered and not policy.allows(in_port, port, header):
                yield f"{packet} leaves by {name} {port}, and the proof found nothing"
