"""Cold install and one added container, against `ovs-ofctl --bundle add-flows` of the same flows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from datetime import datetime

from bench.harness import FLOWS_PER_CONTAINER, Controller, Figure, big_state, spread
from lab.ovs import PrivateOvs


def measure(flows: int, rounds: int) -> Iterator[Figure]:
    """Figures for about `flows` flows, alternating with the peer `rounds` times."""
    containers = max(1, flows // FLOWS_PER_CONTAINER)
    with PrivateOvs(datapath="dummy") as ovs:
        ovs.add_bridge("vmbr0")
        ovs.add_dummy_ports("vmbr0", ["warp0", "from-privacy", *(f"veth{100 + i}" for i in range(containers + rounds))])
        controller = Controller(ovs, big_state(containers))
        try:
            yield from _measure(ovs, controller, containers, rounds)
        finally:
            controller.close()


def _measure(ovs: PrivateOvs, controller: Controller, containers: int, rounds: int) -> Iterator[Figure]:
    installs, peers, connects = [], [], []
    saved = ovs.directory / "flows.txt"
    count = 0
    for _ in range(rounds + 1):
        ovs.vsctl("set-controller", "vmbr0", "tcp:127.0.0.1:6653")
        up = controller.wait_for(lambda e: e["kind"] == "switch_up")
        applied = controller.wait_for(lambda e: e["kind"] == "state_applied")
        installs.append(applied["data"]["took_ms"] / 1e3)
        connects.append((_time(applied) - _time(up)).total_seconds())
        count = applied["data"]["added"]
        dumped = ovs.ofctl("--no-stats", "dump-flows", "vmbr0").splitlines()
        saved.write_text("\n".join(line.strip() for line in dumped if "actions=" in line))
        ovs.vsctl("del-controller", "vmbr0")
        controller.wait_for(lambda e: e["kind"] == "switch_down")
        ovs.ofctl("del-flows", "vmbr0")
        began = time.monotonic()
        ovs.ofctl("--bundle", "add-flows", "vmbr0", str(saved))
        peers.append(time.monotonic() - began)
        ovs.ofctl("del-flows", "vmbr0")
    installs, peers, connects = installs[1:], peers[1:], connects[1:]  # the first round warms caches on both sides
    ratio = statistics.median(a / b for a, b in zip(installs, peers, strict=True))
    yield Figure("flows installed", count, "flows")
    yield Figure("cold install", statistics.median(installs), "s", detail=spread(installs))
    yield Figure("ovs-ofctl --bundle add-flows, same flows", statistics.median(peers), "s", detail=spread(peers))
    yield Figure("cold install / ovs-ofctl", ratio, "ratio", "at most 2.0, aim 1.0", ratio <= 2.0)
    yield Figure(
        "switch connected until applied (dump, compile, install)",
        statistics.median(connects),
        "s",
        detail=spread(connects),
    )

    ovs.vsctl("set-controller", "vmbr0", "tcp:127.0.0.1:6653")
    controller.wait_for(lambda e: e["kind"] == "state_applied")
    added, sent = [], set()
    for extra in range(1, rounds + 1):
        controller.write(big_state(containers + extra))
        applied = controller.wait_for(lambda e: e["kind"] == "state_applied")
        added.append(applied["data"]["took_ms"] / 1e3)
        sent.add(sum(applied["data"][key] for key in ("added", "changed", "deleted")))
    share = statistics.median(added) / statistics.median(installs)
    yield Figure("one container added: flows sent", max(sent), "flows", "its own only", sent == {FLOWS_PER_CONTAINER})
    yield Figure("one container added: compile, send, commit", statistics.median(added), "s", detail=spread(added))
    yield Figure("one container added / cold install", share, "ratio", "at most 0.1", share <= 0.1)
    memory = controller.memory_mb()
    yield Figure("controller memory, peak", memory, "MB", "below 150", memory < 150)


def _time(event: dict[str, str]) -> datetime:
    return datetime.fromisoformat(event["time"])
