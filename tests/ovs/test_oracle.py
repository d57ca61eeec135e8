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
from controller.verify.packetwords import words
from controller.verify.policy import Policy
from controller.verify.rules import Ports
from controller.verify.walk import Walker
from tests.fakes.states import states, two_networks
from tests.fakes.switch import learned_flow
from tests.ovs.headers import Headers
from tests.ovs.node import EXAMPLE
from tests.ovs.tracer import Tracer

PACKETS = int(os.environ.get("BULKHEAD_ORACLE", "3000"))
_RANDOM_STATES = max(2, PACKETS // 2500)


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
