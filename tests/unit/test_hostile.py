"""Flows made to be hard to prove end with a verdict, and what is not decided is never taken for good."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow, Match, Output
from controller.verify import cubes, prove
from controller.verify.cubes import Exhausted, Meter, empty, witness
from controller.verify.space import ALL, Cube
from tests.fakes.states import two_networks

MASKED = (fields.IPV4_SRC, fields.IPV4_DST, fields.ETH_SRC, fields.ETH_DST, fields.TCP_SRC, fields.TCP_DST)


def pigeons(holes: int) -> list[Cube]:
    """Cubes that cover everything, as holes + 1 pigeons do not fit into so many holes; hard to see by splitting."""
    bit = {(p, h): 1 << p * holes + h for p in range(holes + 1) for h in range(holes)}
    homeless = [(0, sum(bit[p, h] for h in range(holes))) for p in range(holes + 1)]
    crowded = [bit[a, h] | bit[b, h] for h in range(holes) for a, b in combinations(range(holes + 1), 2)]
    return homeless + [(both, both) for both in crowded]


def test_what_exhausts_the_first_engine_is_decided_by_the_second() -> None:
    covering = pigeons(7)
    with pytest.raises(Exhausted):
        cubes._search(ALL, covering, Meter(cubes.STEPS))
    assert witness(ALL, covering) is None
    assert empty(ALL, covering)
    left = witness(ALL, covering[1:])
    assert left is not None
    assert not any((left ^ value) & mask == 0 for value, mask in covering[1:])


def test_a_used_up_meter_raises_and_never_answers() -> None:
    for covering in (pigeons(3), pigeons(3)[1:]):
        with pytest.raises(Exhausted):
            witness(ALL, covering, Meter(left=3))


def test_a_proof_without_work_left_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    state = two_networks()
    for bridge in state.bridges:
        ports = planned_ports(state, bridge)
        flows = BridgeCompiler().compile(state, bridge, ports).flows
        monkeypatch.setattr(prove, "LEAST_WORK", 0)
        monkeypatch.setattr(prove, "WORK_A_FLOW", 1)
        (whole,) = prove.prove(state, bridge, ports, flows.values())
        assert "could not be proved" in whole.text and whole.counterexample is None
        prover = prove.Prover()
        assert prover.prove(state, bridge, ports, flows), "the incremental one says so too"
        monkeypatch.undo()
        assert not prover.prove(state, bridge, ports, flows), "and is none the worse for it"


@pytest.mark.parametrize("seed", range(6))
def test_random_masks_that_overlap_end_with_a_verdict(seed: int) -> None:
    rng = random.Random(seed)
    state = two_networks()
    bridge = state.bridges[0]
    ports = planned_ports(state, bridge)
    flows = dict(BridgeCompiler().compile(state, bridge, ports).flows)
    harmful = seed % 2 == 0
    for priority in range(300, 700):
        items = [(fields.ETH_TYPE.header, 0x0800, 0xFFFF), (fields.IP_PROTO.header, 6, 0xFF)]
        for of in rng.sample(MASKED, 3):
            mask = rng.getrandbits(of.bits) & rng.getrandbits(of.bits)
            items.append((of.header, rng.getrandbits(of.bits) & mask, mask))
        action = (Output(rng.choice([1, 2, 3, 4])),) if harmful and rng.random() < 0.5 else ()
        hostile = Flow(0, priority, Match.of(items), action)
        flows[hostile.key] = hostile
    found = prove.prove(state, bridge, ports, flows.values())
    assert bool(found) == harmful, found
    assert all(f.counterexample is not None or "could not be proved" in f.text for f in found)
