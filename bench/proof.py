"""The proof: how long it takes as flows grow, what one change costs, memory, and what hostile flows come to.

Pure computation, so no Open vSwitch and no root. Each size is measured in a process of its own, for its memory.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.harness import FLOWS_PER_CONTAINER, Figure, big_state, spread
from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow, Match
from controller.model import DesiredState
from controller.statefile import load, loads
from controller.verify.cubes import STEPS, Exhausted, Meter, _search, solve
from controller.verify.gate import try_proof
from controller.verify.prove import Prover, prove

EXAMPLE = Path(__file__).parents[1] / "examples" / "oo1424oo.yaml"
SIZES = (100, 1_000, 10_000, 100_000)
CHANGES = 200
HOSTILE = (500, 3_000)


def measure(rounds: int) -> Iterator[Figure]:
    """Figures of all sizes, the coldest and dearest of which is run once."""
    state = load(EXAMPLE).state
    times = [_timed(lambda: try_proof(state)) for _ in range(rounds)]
    median = statistics.median(times)
    yield Figure("proof: the example node, cold", median, "s", "below 0.5", median < 0.5, spread(times))
    found = {size: _in_a_process(size, rounds if size < 100_000 else 1) for size in SIZES}
    yield from _curve(found)
    yield from _bars(found)
    yield from _hostile(state)
    yield from _engines()


def _timed(what: Any) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def _in_a_process(size: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bench.proof", str(size), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return dict(json.loads(done.stdout))


def _curve(found: dict[int, dict[str, Any]]) -> Iterator[Figure]:
    before: dict[str, Any] | None = None
    for of in found.values():
        cold = statistics.median(of["cold_s"])
        each = 1e6 * cold / of["flows"]
        detail = spread(of["cold_s"])
        if before is not None:
            growth = (cold / statistics.median(before["cold_s"])) / (of["flows"] / before["flows"])
            detail += f"; {growth:.2f} of linear growth"
        yield Figure(f"proof: {of['flows']} flows, cold", cold, "s", "", None, f"{each:.0f} us a flow; {detail}")
        before = of


def _bars(found: dict[int, dict[str, Any]]) -> Iterator[Figure]:
    mid, large = found[10_000], found[100_000]
    cold, all_ = statistics.median(mid["cold_s"]), statistics.median(large["cold_s"])
    changes = sorted(mid["change_s"])
    median, late = statistics.median(changes), changes[int(len(changes) * 0.99)]
    yield Figure("proof: 10,000 flows, cold", cold, "s", "below 1", cold < 1)
    yield Figure(
        "proof: 10,000 flows, one container, median", median, "s", "below 0.02", median < 0.02, spread(changes)
    )
    yield Figure("proof: 10,000 flows, one container, 99th percentile", late, "s", "below 0.15", late < 0.15)
    yield Figure("proof: 10,000 flows, peak memory", mid["peak_mb"], "MB", "below 200", mid["peak_mb"] < 200)
    yield Figure("proof: 100,000 flows, cold", all_, "s", "below 30", all_ < 30)
    yield Figure("proof: 100,000 flows, peak memory", large["peak_mb"], "MB", "below 1000", large["peak_mb"] < 1000)


def _one_size(size: int, rounds: int) -> dict[str, Any]:
    """What `_in_a_process` runs."""
    gc.set_threshold(100_000, 20, 20)  # as the controller has it
    state = loads(json.dumps(big_state(max(1, size // FLOWS_PER_CONTAINER))), "bench").state
    bridge = state.bridges[0]
    ports = planned_ports(state, bridge)
    flows = BridgeCompiler().compile(state, bridge, ports).flows
    cold = []
    for _ in range(rounds):
        prover = Prover()
        cold.append(_timed(lambda prover=prover: prover.prove(state, bridge, ports, flows)))
        del prover
        gc.collect()  # or every round adds to the peak
    changes = list(_changes(state)) if size <= 10_000 else []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"flows": len(flows), "cold_s": cold, "change_s": changes, "peak_mb": peak}


def _changes(state: DesiredState) -> Iterator[float]:
    """Seconds to prove one container less, and one more again, in turn."""
    rng, compiler, prover = random.Random(1), BridgeCompiler(), Prover()
    bridge, network = state.bridges[0], state.networks[0]
    every = planned_ports(state, bridge)
    prover.prove(state, bridge, every, compiler.compile(state, bridge, every).flows)
    for number in range(CHANGES):
        members = list(network.members)
        if number % 2 == 0:
            members.pop(rng.randrange(len(members)))
        changed = replace(state, networks=(replace(network, members=tuple(members)),), digest=str(number))
        there = planned_ports(changed, bridge)
        ports = {name: port for name, port in every.items() if name in there}
        flows = compiler.compile(changed, bridge, ports).flows
        began = time.perf_counter()
        found = prover.prove(changed, bridge, ports, flows)
        yield time.perf_counter() - began
        assert not found, found


def _hostile(state: DesiredState) -> Iterator[Figure]:
    bridge = state.bridges[0]
    ports = planned_ports(state, bridge)
    ours = BridgeCompiler().compile(state, bridge, ports).flows
    for count in HOSTILE:
        flows = [*ours.values(), *_tangled(count)]
        began = time.perf_counter()
        found = prove(state, bridge, ports, flows)
        took = time.perf_counter() - began
        what = "refused: not proved" if found else "proved"
        yield Figure(f"proof: {count} flows of random bit masks", took, "s", "ends below 60", took < 60, what)


def _tangled(count: int) -> Iterator[Flow]:
    rng = random.Random(1)
    for _ in range(count):
        items = [(fields.ETH_TYPE.header, 0x0800, 0xFFFF)]
        for of in rng.sample((fields.IPV4_SRC, fields.IPV4_DST, fields.ETH_SRC, fields.ETH_DST), rng.randrange(1, 4)):
            mask = rng.getrandbits(of.bits) & rng.getrandbits(of.bits) & rng.getrandbits(of.bits)
            items.append((of.header, rng.getrandbits(of.bits) & mask, mask))
        yield Flow(0, rng.randrange(300, 60000), Match.of(items), (), rng.choice((10, 30, 40)))


def _engines() -> Iterator[Figure]:
    """The same questions, is this cube covered by those, to both engines."""
    rng = random.Random(3)
    ours, theirs, undecided = [], [], 0
    for _ in range(40):
        masks = [sum(1 << bit for bit in rng.sample(range(40), 3)) for _ in range(160)]
        clauses = [(rng.getrandbits(40) & mask, mask) for mask in masks]
        began = time.perf_counter()
        try:
            _search((0, 0), clauses, Meter(STEPS))
            ours.append(time.perf_counter() - began)
        except Exhausted:
            undecided += 1
            continue
        theirs.append(_timed(lambda clauses=clauses: solve((0, 0), clauses)))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    detail = f"{len(ours)} questions of 160 random clauses over 40 bits; {undecided} more went on to z3"
    yield Figure("proof: first engine / z3", ratio, "ratio", "", None, detail)


if __name__ == "__main__":
    print(json.dumps(_one_size(int(sys.argv[1]), int(sys.argv[2]))))
