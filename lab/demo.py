"""`bulkhead lab demo`: the traffic examples of the two-network architecture, run for real in the lab.

Each example is a try from one host to another and what must become of it. Order matters: nothing may have left for
the world before the world tries to come in, because what leaves opens the way back. Imports `manager` and `traffic`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum

from lab import manager
from lab.traffic import Result, Traffic, Try

WORLD = "198.51.100.10"
VPN_CLIENT = "203.0.113.7"
MESH_CLIENT = "203.0.113.50"
AT_ONCE_S = 1.0
"""A refusal that takes longer is no refusal; the first retransmission of a lost SYN comes after a second."""
SWITCH_LIMIT_S = 10.0
"""How long the tunnel may take to be used again after it has come back."""

SERVERS = {
    "inet": ("tcp:443", "udp:53"),
    "gateway": ("udp:51820", "udp:4000", "tcp:8080"),
    "xray": ("tcp:443", "udp:4000"),
    "mcp-server": ("tcp:9573",),
    "op-dbus-api": ("tcp:9573", "tcp:9574"),
}


class Expected(StrEnum):
    """What must become of a try."""

    PASSES = "passes"
    REFUSED = "refused"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True)
class Example:
    """One line of the table. `host` tries `wanted`, whose `server` is the one that must answer, or must hear nothing."""

    title: str
    host: str
    wanted: Try
    expected: Expected
    server: str
    tunnel_down: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """An example and what became of it."""

    example: Example
    seen: str
    seconds: float
    as_expected: bool

    def as_dict(self) -> dict[str, object]:
        """The line as plain JSON values."""
        example = self.example
        return {
            "example": example.title,
            "from": example.host,
            "to": target(example.wanted),
            "expected": str(example.expected),
            "seen": self.seen,
            "seconds": self.seconds,
            "as_expected": self.as_expected,
        }


EXAMPLES = (
    Example(
        "the world comes in, unasked",
        "inet", Try("udp", "10.0.0.102", 4000, say="unasked", source=WORLD), Expected.BLOCKED, "xray",
    ),
    Example(
        "a container pretends to be another",
        "xray", Try("udp", "10.0.0.100", 4000, spoof="10.0.0.50", say="forged"), Expected.BLOCKED, "gateway",
    ),
    Example(
        "SOCKS5 user, through the mesh and WARP, to the internet",
        "peer-privacy", Try("tcp", WORLD, 443), Expected.PASSES, "inet",
    ),
    Example(
        "xray, through WARP, to the internet",
        "xray", Try("tcp", WORLD, 443), Expected.PASSES, "inet",
    ),
    Example(
        "gateway, through WARP, to the internet",
        "gateway", Try("udp", WORLD, 53), Expected.PASSES, "inet",
    ),
    Example(
        "VPN client to the WireGuard server, and the reply back",
        "host", Try("udp", "10.0.0.100", 51820, source=VPN_CLIENT), Expected.PASSES, "gateway",
    ),
    Example(
        "VPN client of another node, through the mesh, and back",
        "peer-privacy", Try("udp", "10.0.0.100", 51820, source=MESH_CLIENT), Expected.PASSES, "gateway",
    ),
    Example(
        "MCP query, through the mesh, to the op-dbus API",
        "peer-management", Try("tcp", "10.1.0.201", 9573), Expected.PASSES, "op-dbus-api",
    ),
    Example(
        "MCP query to the MCP server, same port",
        "peer-management", Try("tcp", "10.1.0.200", 9573), Expected.PASSES, "mcp-server",
    ),
    Example(
        "the host to the op-dbus API",
        "host", Try("tcp", "10.1.0.201", 9574), Expected.PASSES, "op-dbus-api",
    ),
    Example(
        "xray to the op-dbus API (privacy to management)",
        "xray", Try("tcp", "10.1.0.201", 9573), Expected.REFUSED, "op-dbus-api",
    ),
    Example(
        "MCP server to xray (management to privacy)",
        "mcp-server", Try("tcp", "10.0.0.102", 443), Expected.REFUSED, "xray",
    ),
    Example(
        "MCP server to the internet (management has no way out)",
        "mcp-server", Try("tcp", WORLD, 443), Expected.REFUSED, "inet",
    ),
    Example(
        "kill switch: the tunnel is down, xray to the internet",
        "xray", Try("tcp", WORLD, 443), Expected.BLOCKED, "inet", tunnel_down=True,
    ),
    Example(
        "kill switch: the tunnel is up again",
        "xray", Try("tcp", WORLD, 443), Expected.PASSES, "inet",
    ),
)  # fmt: skip


def target(wanted: Try) -> str:
    """Where a try goes, in a few characters."""
    return f"{wanted.proto} {wanted.to}:{wanted.port}"


def play(lab: manager.Status, examples: tuple[Example, ...] = EXAMPLES) -> Iterator[Shown]:
    """Run the examples one after the other."""
    with Traffic(lab) as traffic:
        traffic.serve(SERVERS)
        was_down = False
        for example in examples:
            with tunnel_down(lab) if example.tunnel_down else nullcontext():
                yield show(traffic, example, SWITCH_LIMIT_S if was_down else 0)
            was_down = example.tunnel_down


@contextmanager
def tunnel_down(lab: manager.Status) -> Iterator[None]:
    """Take the link of the egress away for a while."""
    world = manager.find_host(lab, "inet")
    port = world.port if world else ""
    set_link(lab, port, "down")
    try:
        yield
    finally:
        set_link(lab, port, "up")


def set_link(lab: manager.Status, port: str, to: str) -> None:
    """Set the node's end of a link up or down."""
    if manager.spawn(lab, "host", ["ip", "link", "set", port, to]).wait():
        raise manager.LabError(f"could not set {port} {to}")


def show(traffic: Traffic, example: Example, patience_s: float = 0) -> Shown:
    """Run one example; what is to pass may be tried again for `patience_s`."""
    before = len(traffic.heard(example.server))
    started = time.monotonic()
    result = traffic.attempt(example.host, example.wanted)
    while result.outcome != "reply" and time.monotonic() - started < patience_s:
        result = traffic.attempt(example.host, example.wanted)
    arrived = len(traffic.heard(example.server)) > before
    return judge(example, result, arrived, round(time.monotonic() - started, 3) if patience_s else result.seconds)


def judge(example: Example, result: Result, arrived: bool, seconds: float) -> Shown:
    """What was seen, in a word, and whether it is what was expected."""
    if result.outcome == "reply":
        seen = "passes" if result.data == example.server else f"answered by {result.data}"
    elif arrived:
        seen = "arrived, no reply"
    elif result.outcome == "refused":
        seen = "refused" if seconds < AT_ONCE_S else "refused late"
    else:
        seen = "blocked" if result.outcome == "silence" else f"error: {result.data}"
    # Refusing is one way to block; silence is none to refuse.
    accepted = {example.expected.value, "refused"} if example.expected is Expected.BLOCKED else {example.expected.value}
    return Shown(example, seen, seconds, seen in accepted)


HEADINGS = ("EXAMPLE", "FROM", "TO", "EXPECTED", "SEEN", "AFTER")


def widths() -> tuple[int, ...]:
    """Column widths that fit every line, known before the first one is run."""
    rows = [HEADINGS, *(_cells(e, "passes", 0.0) for e in EXAMPLES)]
    return tuple(max(len(row[column]) for row in rows) for column in range(len(HEADINGS)))


def _cells(example: Example, seen: str, seconds: float) -> tuple[str, ...]:
    return (example.title, example.host, target(example.wanted), example.expected.value, seen, f"{seconds:.3f} s")


def line(shown: Shown | None, columns: tuple[int, ...]) -> str:
    """One line of the table; None is its heading."""
    cells = _cells(shown.example, shown.seen, shown.seconds) if shown else HEADINGS
    text = "  ".join(cell.ljust(width) for cell, width in zip(cells, columns, strict=True))
    return text.rstrip() if shown is None or shown.as_expected else f"{text.rstrip()}  <- DIFFERS"
