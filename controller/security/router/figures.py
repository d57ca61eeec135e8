"""Counters of a worker, their sum over workers, and how Prometheus reads them. Imports nothing of ours.

Nothing of a request is in them but status, sizes and durations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 600.0)
_HELP: Final = {
    "requests": ("counter", "Requests answered, by status."),
    "cut": ("counter", "Answers cut off before their end, by why."),
    "received_bytes": ("counter", "Bytes of bodies from clients."),
    "sent_bytes": ("counter", "Bytes of bodies to clients."),
    "retries": ("counter", "Requests asked of a second server."),
    "connections": ("counter", "Connections accepted."),
    "internal_errors": ("counter", "Defects that were caught."),
    "sealed_refused": ("counter", "Sealed requests refused, by why."),
    "certificates_reloaded": ("counter", "Changed certificates taken up."),
    "running": ("gauge", "Requests being answered."),
    "open": ("gauge", "Connections open."),
    "upstream_up": ("gauge", "Whether a server is asked (1) or not (0)."),
    "upstream_running": ("gauge", "Requests that a server has."),
    "upstream_failures": ("counter", "Requests that a server did not answer, or not to the end."),
    "workers": ("gauge", "Worker processes that answer."),
}


class Figures:
    """What one worker counts."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.gauges: dict[tuple[str, str], float] = {}
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.seconds = 0.0

    def add(self, name: str, label: str = "", amount: int = 1) -> None:
        """Count something."""
        self.counts[name, label] += amount

    def took(self, seconds: float) -> None:
        """A request took so long."""
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds += seconds

    def snapshot(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "counts": [[*key, value] for key, value in self.counts.items()],
            "gauges": [[*key, value] for key, value in self.gauges.items()],
            "buckets": list(self.buckets),
            "seconds": self.seconds,
        }


def merged(snapshots: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of snapshots. A server is up where every worker says so."""
    counts: Counter[tuple[str, str]] = Counter()
    gauges: dict[tuple[str, str], float] = {}
    buckets = [0] * (len(BOUNDS_S) + 1)
    seconds = 0.0
    for each in snapshots:
        for name, label, value in each["counts"]:
            counts[name, label] += value
        for name, label, value in each["gauges"]:
            there = gauges.get((name, label))
            if there is None:
                gauges[name, label] = value
            else:
                gauges[name, label] = min(there, value) if name == "upstream_up" else there + value
        buckets = [one + other for one, other in zip(buckets, each["buckets"], strict=True)]
        seconds += each["seconds"]
    return {
        "counts": [[*key, value] for key, value in counts.items()],
        "gauges": [[*key, value] for key, value in gauges.items()],
        "buckets": buckets,
        "seconds": seconds,
    }


_LABELS: Final = {"requests": "status", "cut": "why", "sealed_refused": "why"}


def text(found: dict[str, Any]) -> str:
    """In Prometheus' text format."""
    lines: list[str] = []
    said: set[str] = set()
    for name, label, value in sorted([*found["counts"], *found["gauges"]]):
        kind, what = _HELP[name]
        full = f"bulkhead_router_{name}" + ("_total" if kind == "counter" else "")
        if name not in said:
            said.add(name)
            lines += [f"# HELP {full} {what}", f"# TYPE {full} {kind}"]
        key = _LABELS.get(name, "upstream")
        lines.append(f'{full}{{{key}="{label}"}} {value:.15g}' if label else f"{full} {value:.15g}")
    full = "bulkhead_router_request_seconds"
    lines += [f"# HELP {full} From the head of a request to the end of its answer.", f"# TYPE {full} histogram"]
    total = 0
    for bound, count in zip((*BOUNDS_S, float("inf")), found["buckets"], strict=True):
        total += count
        lines.append(f'{full}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {total}')
    lines += [f"{full}_sum {found['seconds']:.6f}", f"{full}_count {total}"]
    return "\n".join(lines) + "\n"
