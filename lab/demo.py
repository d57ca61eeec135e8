"""`bulkhead lab demo`: the traffic examples of the two-network architecture, run for real in the lab.

Each example is a try from one host to another and what must become of it. Order matters: nothing may have left for
the world before the world tries to come in, because what leaves opens the way back. Imports `manager` and `traffic`.
"""

from __future__ import annotations

import configparser
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum

from lab import manager
from lab.asks import PROGRAM, Ask, Desk, created
from lab.traffic import Left, Result, Traffic, Try

WORLD, WORLD_IPV6 = "198.51.100.10", "2001:db8:7::2"
EXIT = "203.0.113.100"
"""What the internet sees of whoever leaves by WARP."""
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
    NOTHING = "nothing"
    """Leaves a node but WireGuard."""
    NO_NAME = "no name"
    """The host's resolver does not know it."""
    OK, CREATED, UNKNOWN, FORBIDDEN = "200", "201", "401", "403"
    """What an HTTP server answers."""
    TOLD = "told"


@dataclass(frozen=True, slots=True)
class Example:
    """One line of the table. `host` tries `wanted`, whose `server` is the one that must answer, or must hear nothing.

    `sender`, where it is given, is the address that the server has to see. `tunnel_down` and `routed` say how the world
    is meanwhile: no way to WARP; private addresses are routed to the node. `ask` is what is asked of the API, by the way
    that `wanted` names; what it creates answers as `serves`.
    """

    title: str
    host: str
    wanted: Try
    expected: Expected
    server: str
    tunnel_down: bool = False
    routed: bool = False
    sender: str = ""
    ask: Ask | None = None
    serves: tuple[str, ...] = ()

    def target(self) -> str:
        """Where it goes, in a few characters."""
        if self.ask is not None and self.wanted.to == LOOPBACK:
            return f"{self.ask.method} {self.ask.path}"
        return target(self.wanted)


@dataclass(frozen=True, slots=True)
class Shown:
    """An example and what became of it."""

    example: Example
    seen: str
    seconds: float
    as_expected: bool
    sender: str = ""

    def as_dict(self) -> dict[str, object]:
        """The line as plain JSON values."""
        example = self.example
        return {
            "example": example.title,
            "from": example.host,
            "to": example.target(),
            "expected": str(example.expected),
            "seen": self.seen,
            "seconds": self.seconds,
            "server_sees": self.sender,
            "as_expected": self.as_expected,
        }


FORGED = Example(
    "a container pretends to be another",
    "xray", Try("udp", "10.0.0.100", 4000, spoof="10.0.0.50", say="forged"), Expected.BLOCKED, "gateway",
)  # fmt: skip
TO_MANAGEMENT = Example(
    "xray to the op-dbus API (privacy to management)",
    "xray", Try("tcp", "10.1.0.201", 9573), Expected.REFUSED, "op-dbus-api",
)  # fmt: skip
TO_PRIVACY = Example(
    "MCP server to xray (management to privacy)",
    "mcp-server", Try("tcp", "10.0.0.102", 443), Expected.REFUSED, "xray",
)  # fmt: skip
NO_WAY_OUT = Example(
    "MCP server to the internet (management has no way out)",
    "mcp-server", Try("tcp", WORLD, 443), Expected.REFUSED, "inet",
)  # fmt: skip

EXAMPLES = (
    Example(
        "the world comes in, unasked",
        "inet", Try("udp", "10.0.0.102", 4000, say="unasked", source=WORLD), Expected.BLOCKED, "xray",
    ),
    FORGED,
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
    TO_MANAGEMENT,
    TO_PRIVACY,
    NO_WAY_OUT,
    Example(
        "kill switch: the tunnel is down, xray to the internet",
        "xray", Try("tcp", WORLD, 443), Expected.BLOCKED, "inet", tunnel_down=True,
    ),
    Example(
        "kill switch: the tunnel is up again",
        "xray", Try("tcp", WORLD, 443), Expected.PASSES, "inet",
    ),
)  # fmt: skip


VIA_PROXY = "192.0.2.10:1080"
"""The droplet's SOCKS5 proxy."""
ENTRY = "192.0.2.10"
"""The droplet, where administrators come in."""
NODE = "192.0.2.2"
"""The first node, as the internet knows it."""

LOOPBACK = "127.0.0.1"

NODE_SERVERS = {
    "inet": ("tcp:443", "udp:5353", "ipv6:eth0"),
    "gateway": ("udp:4000", "ipv6:eth0"),
    "xray": ("tcp:443", "tcp:8080", "udp:4000"),
    "relay": ("tcp:443",),
    "mcp-server": ("tcp:9573",),
    "op-dbus-api": ("tcp:9574",),
    "monitoring": ("tcp:8080",),
    "exporter": ("tcp:9100",),
}
NODE_WATCHED = {"op-dbus-api": ("eth0",)}
"""On 9573 there is the API itself, which does not tell who came."""
STORY = (
    "uid:0 from 127.0.0.1: POST /api/containers/create",
    "uid:0 from 127.0.0.1: POST /api/grants:",
    "token:auditor from 127.0.0.1: POST /api/grants/1/approve",
    "uid:0 from 127.0.0.1: POST /api/grants/1/revoke",
    "uid:0 from 127.0.0.1: DELETE /api/containers/tor-relay",
)
HEALTH = {
    "source": "202", "target": "102", "protocol": "tcp", "port": 8080, "reason": "is the relay well?", "duration_s": 600,
}  # fmt: skip


def asked_here(title: str, expected: Expected, ask: Ask, serves: tuple[str, ...] = ()) -> Example:
    """What is asked of the API on the node itself."""
    return Example(title, "host", Try("tcp", LOOPBACK, 9573), expected, "", ask=ask, serves=serves)


NODE_EXAMPLES = (
    Example(
        "the world comes in by the tunnel, unasked",
        "warp", Try("udp", "10.0.0.102", 4000, source="172.16.0.1", say="unasked"), Expected.BLOCKED, "xray",
    ),
    Example(
        "the world routes the private network to the node",
        "inet", Try("udp", "10.0.0.102", 4000, say="unasked"), Expected.BLOCKED, "xray", routed=True,
    ),
    FORGED,
    Example(
        "xray speaks IPv6, to its neighbours",
        "xray", Try("udp", "ff02::1", 4000, spoof="fe80::66", say="ipv6"), Expected.BLOCKED, "gateway",
    ),
    Example(
        "xray speaks IPv6, to the internet",
        "xray", Try("udp", WORLD_IPV6, 5353, spoof="fd00::66", say="ipv6"), Expected.BLOCKED, "inet",
    ),
    Example(
        "SOCKS5 user, droplet, privacy mesh, WARP, internet",
        "laptop", Try("tcp", WORLD, 443, socks=VIA_PROXY), Expected.PASSES, "inet", sender=EXIT,
    ),
    Example(
        "VPN client, gateway, WARP, internet",
        "laptop", Try("tcp", WORLD, 443), Expected.PASSES, "inet", sender=EXIT,
    ),
    Example(
        "xray, WARP, internet",
        "xray", Try("udp", WORLD, 5353), Expected.PASSES, "inet", sender=EXIT,
    ),
    Example(
        "relay of the second node, its own WARP, internet",
        "relay", Try("tcp", WORLD, 443), Expected.PASSES, "inet", sender=EXIT,
    ),
    Example(
        "xray to relay on the other node, privacy mesh",
        "xray", Try("tcp", "10.0.0.110", 443), Expected.PASSES, "relay", sender="10.0.0.102",
    ),
    Example(
        "admin, droplet, management mesh, op-dbus API",
        "admin", Try("tcp", ENTRY, 9573), Expected.OK, "op-dbus-api", sender="10.1.0.50",
        ask=Ask("GET", "/api/status", token="admin", answer=(("node", "oo1424oo"),)),
    ),
    Example(
        "the same without a token",
        "admin", Try("tcp", ENTRY, 9573), Expected.UNKNOWN, "op-dbus-api", sender="10.1.0.50",
        ask=Ask("GET", "/api/status"),
    ),
    Example(
        "MCP server to exporter on the other node",
        "mcp-server", Try("tcp", "10.1.0.210", 9100), Expected.PASSES, "exporter", sender="10.1.0.200",
    ),
    Example(
        "the node itself to the op-dbus API",
        "host", Try("tcp", "10.1.0.201", 9574), Expected.PASSES, "op-dbus-api",
    ),
    TO_MANAGEMENT,
    TO_PRIVACY,
    Example(
        "privacy mesh peer to the op-dbus API",
        "droplet", Try("tcp", "10.1.0.201", 9574, source="10.0.0.50"), Expected.BLOCKED, "op-dbus-api",
    ),
    Example(
        "VPN client to the op-dbus API",
        "laptop", Try("tcp", "10.1.0.201", 9573), Expected.REFUSED, "op-dbus-api",
    ),
    Example(
        "admin to the API on the node's public address",
        "admin", Try("tcp", NODE, 9573), Expected.BLOCKED, "op-dbus-api",
    ),
    NO_WAY_OUT,
    asked_here(
        "curl creates tor-relay in privacy, on the node", Expected.CREATED,
        Ask("POST", "/api/containers/create", curl=True, answer=(("state", "ready"), ("address", "10.0.0.2"))),
        serves=("tcp:9001",),
    ),
    Example(
        "xray to tor-relay, by its name",
        "xray", Try("tcp", "tor-relay", 9001), Expected.PASSES, "tor-relay", sender="10.0.0.102",
    ),
    Example(
        "MCP server to tor-relay, by its name",
        "mcp-server", Try("tcp", "tor-relay", 9001), Expected.NO_NAME, "tor-relay",
    ),
    Example(
        "MCP server to tor-relay (management to privacy)",
        "mcp-server", Try("tcp", "10.0.0.2", 9001), Expected.REFUSED, "tor-relay",
    ),
    Example(
        "monitoring to xray, without a grant",
        "monitoring", Try("tcp", "10.0.0.102", 8080), Expected.REFUSED, "xray",
    ),
    asked_here(
        "root asks for a grant: monitoring to xray, tcp 8080", Expected.CREATED,
        Ask("POST", "/api/grants", HEALTH, answer=(("id", "1"), ("state", "requested"))),
    ),
    asked_here(
        "root approves what root has asked for", Expected.FORBIDDEN,
        Ask("POST", "/api/grants/1/approve", {}),
    ),
    asked_here(
        "somebody else approves it, by a token", Expected.OK,
        Ask("POST", "/api/grants/1/approve", {}, token="auditor", answer=(("state", "approved"), ("realized", True))),
    ),
    Example(
        "monitoring to xray, granted",
        "monitoring", Try("tcp", "10.0.0.102", 8080), Expected.PASSES, "xray", sender="10.1.0.202",
    ),
    Example(
        "its neighbours: another port",
        "monitoring", Try("tcp", "10.0.0.102", 443), Expected.REFUSED, "xray",
    ),
    Example(
        "its neighbours: another source",
        "mcp-server", Try("tcp", "10.0.0.102", 8080), Expected.REFUSED, "xray",
    ),
    Example(
        "its neighbours: the other way round",
        "xray", Try("tcp", "10.1.0.202", 8080), Expected.REFUSED, "monitoring",
    ),
    asked_here(
        "root revokes the grant", Expected.OK,
        Ask("POST", "/api/grants/1/revoke", {}, answer=(("state", "revoked"), ("realized", True))),
    ),
    Example(
        "monitoring to xray, revoked",
        "monitoring", Try("tcp", "10.0.0.102", 8080), Expected.REFUSED, "xray",
    ),
    asked_here(
        "root deletes tor-relay", Expected.OK,
        Ask("DELETE", "/api/containers/tor-relay"),
    ),
    Example(
        "xray to tor-relay, deleted",
        "xray", Try("tcp", "tor-relay", 9001), Expected.NO_NAME, "tor-relay",
    ),
    asked_here(
        "who has done all this, told as it happened", Expected.TOLD,
        Ask("GET", "/api/events/stream", told=STORY),
    ),
    Example(
        "kill switch: WARP is unreachable, xray to the internet",
        "xray", Try("tcp", WORLD, 443), Expected.BLOCKED, "inet", tunnel_down=True,
    ),
    Example(
        "kill switch: WARP is back",
        "xray", Try("tcp", WORLD, 443), Expected.PASSES, "inet", sender=EXIT,
    ),
)  # fmt: skip


def target(wanted: Try) -> str:
    """Where a try goes, in a few characters."""
    if not wanted.port:
        return wanted.to
    return (
        f"{wanted.proto} [{wanted.to}]:{wanted.port}"
        if ":" in wanted.to
        else f"{wanted.proto} {wanted.to}:{wanted.port}"
    )


def examples_of(lab: manager.Status) -> tuple[Example, ...]:
    """The examples for a lab of its kind."""
    return NODE_EXAMPLES if lab.has_nodes else EXAMPLES


def play(lab: manager.Status, examples: tuple[Example, ...] | None = None) -> Iterator[Shown]:
    """Run the examples one after the other."""
    if examples is None:
        examples = examples_of(lab)
    with ExitStack() as stack:
        desk = None
        if lab.has_nodes:
            connect_vpn(lab)
            desk = stack.enter_context(Desk(lab))
        traffic = stack.enter_context(Traffic(lab))
        traffic.serve(*((NODE_SERVERS, NODE_WATCHED) if lab.has_nodes else (SERVERS,)))
        for host in lab.hosts:
            if host.kind == "node":
                traffic.watch_uplink(host.name, host.port)
        was_down = False
        for example in examples:
            with tunnel_down(lab) if example.tunnel_down else routed(lab) if example.routed else nullcontext():
                yield show(traffic, example, SWITCH_LIMIT_S if was_down else 0, desk)
            was_down = example.tunnel_down
        for node, left in traffic.uplinks().items():
            yield judge_uplink(node, left)


def judge_uplink(node: str, left: Left) -> Shown:
    """Whether all that a node has sent to the world was WireGuard, and whether it was seen at all."""
    title = f"sent besides {left.wireguard} packets of WireGuard"
    example = Example(title, node, Try("udp", "the world"), Expected.NOTHING, "")
    if left.others:
        return Shown(example, f"{left.others}: {'; '.join(left.kinds)}", 0.0, False)
    if left.lost or not left.wireguard:
        return Shown(example, f"{left.lost} not looked at" if left.lost else "no packet at all", 0.0, False)
    return Shown(example, "nothing", 0.0, True)


@contextmanager
def tunnel_down(lab: manager.Status) -> Iterator[None]:
    """Take the link of the egress away for a while; of whole nodes, the way to the tunnel's endpoint."""
    if lab.has_nodes:
        in_router(
            lab, f"nft 'add table ip cut; add chain ip cut forward {{ {FORWARD} }}'; nft add rule ip cut forward {CUT}"
        )
        try:
            yield
        finally:
            in_router(lab, "nft delete table ip cut")
        return
    world = manager.find_host(lab, "inet")
    port = world.port if world else ""
    set_link(lab, port, "down")
    try:
        yield
    finally:
        set_link(lab, port, "up")


@contextmanager
def routed(lab: manager.Status) -> Iterator[None]:
    """Have the internet route the networks' addresses to the first node for a while, as a neighbour of it could."""
    routes = [("10.0.0.0/24", NODE), ("10.1.0.0/24", NODE)]
    in_router(lab, "\n".join(f"ip route replace {prefix} via {node}" for prefix, node in routes))
    try:
        yield
    finally:
        in_router(lab, "\n".join(f"ip route delete {prefix}" for prefix, _ in routes))


FORWARD = "type filter hook forward priority filter;"
CUT = "ip daddr 192.0.2.14 drop"


def in_router(lab: manager.Status, script: str) -> None:
    """Run a shell script in the lab's first namespace: of whole nodes, the internet's router."""
    done = subprocess.run(
        manager.command_in(lab, None, ["sh", "-ec", script]), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise manager.LabError(f"{script}: {done.stderr.strip()}")


def set_link(lab: manager.Status, port: str, to: str) -> None:
    """Set the node's end of a link up or down."""
    in_router(lab, f"ip link set {port} {to}")


def connect_vpn(lab: manager.Status, name: str = "laptop") -> None:
    """Make a client of the first node's VPN server, and have the laptop connect with its configuration."""
    made = manager.output(lab, lab.node, [*PROGRAM, "vpn", "add", name, "--json"])
    wanted = configparser.ConfigParser(strict=False)
    text: str = json.loads(made)["config"]
    wanted.read_string(text)
    address, mtu = wanted["Interface"]["Address"], wanted["Interface"]["MTU"]
    endpoint = wanted["Peer"]["Endpoint"].partition(":")[0]
    kept = "\n".join(line for line in text.splitlines() if line.partition(" ")[0] not in ("Address", "MTU", "DNS"))
    script = f"""
        wireguard-go -f vpn0 >/dev/null 2>&1 &
        while ! [ -S /var/run/wireguard/vpn0.sock ]; do sleep 0.02; done
        wg setconf vpn0 /dev/stdin
        ip address add {address} dev vpn0
        ip link set vpn0 mtu {mtu} up
        ip route add {endpoint} via 203.0.113.1
        ip route add {ENTRY} via 203.0.113.1
        ip route replace default dev vpn0"""
    manager.output(lab, name, ["setsid", "sh", "-ec", script], kept)


def show(traffic: Traffic, example: Example, patience_s: float = 0, desk: Desk | None = None) -> Shown:
    """Run one example; what is to pass may be tried again for `patience_s`."""
    before = len(traffic.arrived(example.server)) if example.server else 0
    if example.ask is not None and desk is not None:
        result = desk.ask(traffic, example.host, example.wanted, example.ask)
        shown = judge_answer(example, result, traffic.came_from(example.server) if example.server else "")
        if shown.as_expected and example.serves:
            made = created(traffic.lab, json.loads(result.data)[1])
            traffic.know(made)
            traffic.serve({made.name: example.serves})
        return shown
    started = time.monotonic()
    result = traffic.attempt(example.host, example.wanted)
    while result.outcome != "reply" and time.monotonic() - started < patience_s:
        result = traffic.attempt(example.host, example.wanted)
    arrived = len(traffic.arrived(example.server)) > before
    seconds = round(time.monotonic() - started, 3) if patience_s else result.seconds
    return judge(example, result, arrived, seconds, traffic.came_from(example.server) if arrived else "")


def judge_answer(example: Example, result: Result, sender: str) -> Shown:
    """What an HTTP server has answered, and whether that is what was expected, in the status and in what it says."""
    assert example.ask is not None
    if result.outcome != "reply":
        return Shown(example, f"{result.outcome}: {result.data}", result.seconds, False, sender)
    status, body = json.loads(result.data)
    seen = body if body == Expected.TOLD else str(status)
    found = body if isinstance(body, dict) else {}
    wrong = [f"{name} {found.get(name)}" for name, value in example.ask.answer if found.get(name) != value]
    if seen == example.expected and wrong:
        seen = f"{seen}, {', '.join(wrong)}"
    elif seen == example.expected and example.sender and sender != example.sender:
        seen = f"{seen} as {sender}"
    return Shown(example, seen, result.seconds, seen == example.expected, sender)


def judge(example: Example, result: Result, arrived: bool, seconds: float, sender: str = "") -> Shown:
    """What was seen, in a word, and whether it is what was expected."""
    if result.outcome == "reply":
        seen = "passes" if result.data == example.server else f"answered by {result.data}"
        if example.sender and sender != example.sender:
            seen = f"passes as {sender}"
    elif arrived:
        seen = "arrived, no reply"
    elif result.outcome == "no name":
        seen = result.outcome
    elif result.outcome == "refused":
        seen = "refused" if seconds < AT_ONCE_S else "refused late"
    else:
        seen = "blocked" if result.outcome == "silence" else f"error: {result.data}"
    # Refusing is one way to block; silence is none to refuse.
    accepted = {example.expected.value, "refused"} if example.expected is Expected.BLOCKED else {example.expected.value}
    return Shown(example, seen, seconds, seen in accepted, sender)


HEADINGS = ("EXAMPLE", "FROM", "TO", "EXPECTED", "SEEN", "AFTER", "SERVER SEES")


def widths(examples: tuple[Example, ...]) -> tuple[int, ...]:
    """Column widths that fit every line, known before the first one is run."""
    rows = [HEADINGS, *(_cells(e, e.expected.value, 0.0, e.sender) for e in examples)]
    return tuple(max(len(row[column]) for row in rows) for column in range(len(HEADINGS)))


def _cells(example: Example, seen: str, seconds: float, sender: str) -> tuple[str, ...]:
    shown = (example.title, example.host, example.target(), example.expected.value, seen, f"{seconds:.3f} s")
    return (*shown, sender)


def line(shown: Shown | None, columns: tuple[int, ...]) -> str:
    """One line of the table; None is its heading."""
    cells = _cells(shown.example, shown.seen, shown.seconds, shown.sender) if shown else HEADINGS
    text = "  ".join(cell.ljust(width) for cell, width in zip(cells, columns, strict=True))
    return text.rstrip() if shown is None or shown.as_expected else f"{text.rstrip()}  <- DIFFERS"
