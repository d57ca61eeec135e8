"""Our reading of flows and packets against Open vSwitch's: the same flows loaded, random packets, the same answer.

How many packets: BULKHEAD_ORACLE=50000 for the long run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow
from controller.model import Bridge, DesiredState
from controller.statefile import load
from controller.verify.explore import CT_STATES, NEW, RPL, TRK
from controller.verify.node import Held, Node
from controller.verify.packetwords import CT_WORDS, words
from controller.verify.policy import Policy
from controller.verify.rules import Ports
from controller.verify.walk import Walker
from tests.fakes.states import states, two_networks
from tests.fakes.switch import learned_flow
from tests.ovs.headers import Headers
from tests.ovs.node import EXAMPLE
from tests.ovs.passages import HERE, THERE, Granted, random_flows, with_passage
from tests.ovs.tracer import Tracer

PACKETS = int(os.environ.get("BULKHEAD_ORACLE", "3000"))
_RANDOM_STATES = max(2, PACKETS // 2500)


SAID = tuple(state for state in CT_STATES if state & ~TRK and (state & (NEW | RPL)) != (NEW | RPL))
"""What `--ct-next` takes."""


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer() as running:
        yield running


def some_states() -> list[DesiredState]:
    """The example, a small one, and random ones, the same in every run."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found: list[DesiredState] = []

    @seed(11)
    @settings(
        max_examples=_RANDOM_STATES, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(states())
    def collect(state: DesiredState) -> None:
        found.append(state)

    collect()
    return [load(EXAMPLE).state, two_networks(), *found]


def learned(walker: Walker, made: Headers, rng: random.Random) -> list[Flow]:
    """Flows that packets really teach the switch: what `learn` makes of some that reach it."""
    found: dict[bytes, Flow] = {}
    for _ in range(400):
        in_port, header = made.some([flow for flow in made.flows if any("learn" in str(a) for a in flow.actions)])
        for hit in walker.follow(in_port, header).learned:
            now = hit.overlay.known(hit.region.cube)[0]
            concrete = {field.header: now >> at & (1 << width) - 1 for field, at, width in _layout()}
            concrete[fields.IN_PORT_FIELD.header] = concrete[fields.IN_PORT_16.header] = in_port
            flow = learned_flow(hit.learn, concrete)
            found[flow.key] = flow
    return rng.sample(list(found.values()), min(len(found), 12))


def _layout() -> list[tuple[fields.Field, int, int]]:
    from controller.verify.space import PLACES

    return [(fields.by_header(header), *place) for header, place in PLACES.items()]


def test_every_packet_goes_where_open_vswitch_sends_it(tracer: Tracer) -> None:
    rng = random.Random(20261124)
    states_ = some_states()
    bridges = [(state, bridge) for state in states_ for bridge in state.bridges]
    each = -(-PACKETS // len(bridges))
    sent = delivered = 0
    wrong: list[str] = []
    for state, bridge in bridges:
        checked, through = _compare(tracer, rng, state, bridge, each, wrong)
        sent, delivered = sent + checked, delivered + through
    assert not wrong, "\n".join(wrong[:10]) + f"\n{len(wrong)} of {sent} packets"
    assert sent >= PACKETS and delivered > sent / 20, f"{delivered} of {sent} delivered: too few to mean anything"


def _compare(
    tracer: Tracer, rng: random.Random, state: DesiredState, bridge: Bridge, count: int, wrong: list[str]
) -> tuple[int, int]:
    ports = planned_ports(state, bridge)
    flows = list(BridgeCompiler().compile(state, bridge, ports).flows.values())
    flows += learned(Walker(flows), Headers(rng, state, bridge, ports, flows), rng)
    tracer.bridge(bridge.name, {name: port.number for name, port in ports.items()}, flows)
    walker, made = Walker(flows), Headers(rng, state, bridge, ports, flows)
    policy = Policy(state, bridge, ports, Ports())
    delivered = 0
    for _ in range(count):
        in_port, header = made.some()
        packet = words(in_port, header)
        theirs = tracer.outputs(bridge.name, packet)
        way = walker.follow(in_port, header)
        ours = {(bridge.name, in_port if port == fields.IN_PORT else port) for port, _ in way.sent}
        delivered += bool(theirs)
        if way.doubts or ours != theirs:
            wrong.append(f"{bridge.name} {packet}: {sorted(theirs)}, we say {sorted(ours)} {way.doubts}")
        for name, port in theirs:
            answered = port == in_port and policy.allows(in_port, fields.IN_PORT, header)
            if not answered and not policy.allows(in_port, port, header):
                wrong.append(f"{bridge.name} {packet}: delivered to {name} {port} against the policy")
    return count, delivered


# ------------------------------------------------------------------------------------------------- several bridges, ct


def test_packets_go_through_a_passage_as_open_vswitch_lets_them(tracer: Tracer) -> None:
    """Two bridges, patch ports, connection tracking that says anything at all, and everything else that we do."""
    rng = random.Random(31)
    state = load(EXAMPLE).state
    privacy, management = state.network("privacy"), state.network("management")
    xray, monitoring = privacy.members[1], management.members[2]
    for granted in (
        Granted(monitoring.port, xray.port, monitoring.address, xray.address, 8080),
        Granted(xray.port, monitoring.port, xray.address, monitoring.address, 9573),
    ):
        flip = state if granted.source == xray.port else _flipped(state)
        node = with_passage(flip, granted)
        _load(tracer, node)
        crossed = _packets(tracer, rng, flip, node, PACKETS // 4)
        assert crossed > PACKETS / 400, "too few crossed to mean anything"


def _flipped(state: DesiredState) -> DesiredState:
    from dataclasses import replace

    return replace(state, bridges=tuple(sorted(state.bridges, key=lambda b: b.name, reverse=True)))


def _load(tracer: Tracer, node: Node) -> None:
    for held in node.bridges.values():
        numbers = {name: number for name, number in held.numbers.items() if name not in (HERE, THERE)}
        tracer.bridge(held.name, numbers, ())
    for (bridge, port), (_, peer) in node.links.items():
        calls = ["add-port", bridge, port, "--", "set", "interface", port, "type=patch", f"options:peer={peer}"]
        tracer.vsctl(*calls, f"ofport_request={node.bridges[bridge].numbers[port]}")
    for held in node.bridges.values():
        tracer.load(held.name, held.flows)
    tracer.forget()


def _packets(tracer: Tracer, rng: random.Random, state: DesiredState, node: Node, count: int) -> int:
    makers = []
    for name, held in node.bridges.items():
        bridge = state.bridge(name)
        assert bridge is not None
        makers.append((name, held, Headers(rng, state, bridge, planned_ports(state, bridge), held.flows)))
    crossed = 0
    wrong: list[str] = []
    for _ in range(count):
        name, held, made = rng.choice(makers)
        near = [flow for flow in held.flows if flow.priority == 2000]
        in_port, header = made.some(near)
        answers = [rng.choice(SAID) for _ in range(2)]
        legs = node.follow((name, held.port(in_port)), header, answers)
        crossed += len(legs) > 1
        wrong += _differences(tracer, node, legs, in_port, header, answers)
    assert not wrong, "\n".join(wrong[:8]) + f"\n{len(wrong)} of {count}"
    return crossed


def _differences(tracer, node, legs, in_port: int, header: int, answers: list[int]) -> list[str]:  # type: ignore[no-untyped-def]
    options = [w for state in answers for w in ("--ct-next", ",".join(n for n, bit in CT_WORDS.items() if state & bit))]
    packet = words(in_port, header)
    theirs = tracer.outputs(legs[0].bridge, packet, *options)
    ours = {
        (leg.bridge, node.bridges[leg.bridge].numbers[port]) for leg in legs for port, far in leg.sent if far is None
    }
    doubts = [doubt for leg in legs for doubt in leg.way.doubts]
    if not doubts and ours == theirs:
        return []
    return [f"{legs[0].bridge} {packet} {options}: {sorted(theirs)}, we say {sorted(ours)} {doubts}"]


def test_random_flows_do_what_open_vswitch_does_with_them(tracer: Tracer) -> None:
    """Any masks, writes, copies, resubmits, clones and connection tracking: where we are sure we are right."""
    rng = random.Random(8)
    state = two_networks()
    bridge = state.bridges[0]
    numbers = {name: port.number for name, port in planned_ports(state, bridge).items()}
    wrong: list[str] = []
    sure = delivered = 0
    rounds = max(4, PACKETS // 250)
    for _ in range(rounds):
        flows = random_flows(rng, [n for n in numbers.values() if n < 0xFF00], 40)
        node = Node({bridge.name: Held.of(bridge.name, numbers, flows)})
        tracer.bridge(bridge.name, numbers, flows)
        made = Headers(rng, state, bridge, planned_ports(state, bridge), flows)
        for _ in range(PACKETS // rounds // 2):
            in_port, header = made.some()
            answers = [rng.choice(SAID) for _ in range(6)]
            legs = node.follow((bridge.name, node.bridges[bridge.name].port(in_port)), header, answers)
            if legs[0].way.doubts:
                continue
            sure, delivered = sure + 1, delivered + bool(legs[0].sent)
            wrong += _differences(tracer, node, legs, in_port, header, answers)
    assert not wrong, "\n".join(wrong[:8]) + f"\n{len(wrong)} of {sure}"
    assert sure > PACKETS / 8 and delivered > sure / 20, f"{sure} sure, {delivered} delivered"
