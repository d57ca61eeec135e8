"""A container that breaks the rules as fast as it can harms nobody else, and is counted to the last packet."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.ovs.node import WORLD, Endpoint, Node, ethernet, ipv4, tcp, udp, wait_for

RATE = 50_000
"""Packets a second."""
SECONDS = 6

FLOODER = r"""
import socket, sys, time
interface, rate, seconds, *frames = sys.argv[1:]
rate, seconds = int(rate), float(seconds)
frames = [bytes.fromhex(frame) for frame in frames]
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
sock.bind((interface, 0))
begin, sent, total = time.monotonic(), 0, int(rate * seconds)
while sent < total:
    due = min(total, int((time.monotonic() - begin) * rate))
    if due <= sent:
        time.sleep(0.001)
    for number in range(sent, due):
        try:
            sock.send(frames[number % len(frames)])
        except OSError:
            pass  # the queue is full; the packet counts as sent for the pace only
    sent = due
    if time.monotonic() - begin > 2 * seconds:
        break
print(sent)
"""


@dataclass(slots=True)
class Outcome:
    """What was seen during and after the flood."""

    seconds: float = 0.0
    pings: list[tuple[str, int, int]] = field(default_factory=list)
    """(who, sent, lost)."""
    controller_cpu: float = 0.0
    """Share of one processor."""
    refused_s: list[float | None] = field(default_factory=list)
    """How long others' forbidden connections took to be refused; None: they were not."""
    received: int = 0
    """Packets that the switch took from the flooding port."""
    on_the_wire: int = 0
    """Packets that arrived at the port; what the switch's own socket had no room for is among them."""
    noted: int = 0
    """Packets in the event log."""
    quieted: int = 0
    internal_errors: int = 0
    events: int = 0
    arrived: dict[str, int] = field(default_factory=dict)


def frames(node: Node) -> list[bytes]:
    """Violations of three kinds."""
    xray, gateway = node["xray"], node["gateway"]
    mac = node.state.network("privacy").gateway_mac
    own, mark = xray.address, b"flood flood flood"
    return [
        ethernet(mac, xray.mac, 0x0800, ipv4(own, "10.1.0.201", 17, udp(own, "10.1.0.201", 7, 7, mark))),
        ethernet(mac, xray.mac, 0x0800, ipv4(own, "10.1.0.201", 6, tcp(own, "10.1.0.201", 7, 9573, data=mark))),
        ethernet(
            gateway.mac,
            xray.mac,
            0x0800,
            ipv4("10.0.0.9", gateway.address, 17, udp("10.0.0.9", gateway.address, 7, 7, mark)),
        ),
    ]


def received(node: Node) -> int:
    """Packets that the pipeline has taken from xray's port."""
    node.settle()
    rows = node.controller.flows("vmbr0")
    return sum(row["packets"] for row in rows if row["table_name"] == "ADMIT" and row["object"] == "member/102")


def on_the_wire(node: Node) -> int:
    return int(node.ovs.vsctl("get", "interface", "veth102", "statistics:rx_packets"))


def noted(node: Node) -> int:
    """Packets of xray's port in the event log."""
    counts = [e.data["count"] for e in node.controller.events("violation") if e.data["port"] == "veth102"]
    return sum(count for count in counts if isinstance(count, int))


def refused_s(source: Endpoint, address: str) -> float | None:
    """How long it took until a connection was refused, None if it was not within 0.5 s."""
    with source.socket() as sock:
        begin = time.monotonic()
        sock.connect_ex((address, 22))
        if not select.select([], [sock], [], 0.5)[1]:
            return None
        return time.monotonic() - begin if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) else None


@pytest.fixture(scope="module")
def outcome(node: Node) -> Iterator[Outcome]:
    out = Outcome()
    pairs = [(node["gateway"], WORLD), (node["mcp"], node["api"].address), (node["peer_priv"], node["gateway"].address)]
    for source, target in pairs:
        source.run("ping", "-c", "2", "-i", "0.2", "-W", "2", target)
    assert refused_s(node["gateway"], "10.1.0.201") is not None
    before, wire_before, noted_before = received(node), on_the_wire(node), noted(node)
    pings = [
        subprocess.Popen(
            source.namespace.command("ping", "-n", "-q", "-i", "0.02", "-c", str(SECONDS * 50), "-W", "3", target),
            stdout=subprocess.PIPE,
            text=True,
        )
        for source, target in pairs
    ]
    xray = node["xray"]
    with node.watch("xray") as watch:
        cpu, began = node.controller.cpu_s(), time.monotonic()
        flooder = subprocess.Popen(
            xray.namespace.command(
                sys.executable, "-c", FLOODER, "eth0", str(RATE), str(SECONDS), *(f.hex() for f in frames(node))
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        while flooder.poll() is None:
            for who, address in (("gateway", "10.1.0.201"), ("mcp", "10.0.0.102")):
                out.refused_s.append(refused_s(node[who], address))
            time.sleep(0.3)
        flooder.communicate()
        out.seconds = time.monotonic() - began
        out.controller_cpu = (node.controller.cpu_s() - cpu) / out.seconds
        for (source, target), ping in zip(pairs, pings, strict=True):
            text, _ = ping.communicate(timeout=20)
            found = re.search(r"(\d+) packets transmitted, (\d+) received", text)
            assert found is not None, text
            out.pings.append((f"{source.name} > {target}", int(found[1]), int(found[1]) - int(found[2])))
        out.arrived = watch.holding(b"flood flood flood")
    time.sleep(1)
    out.received, out.on_the_wire = received(node) - before, 0
    wait_for(
        lambda: noted(node) - noted_before == out.received,
        25,
        lambda: f"{noted(node) - noted_before} of {out.received} noted",
    )
    out.noted = noted(node) - noted_before
    wait_for(lambda: on_the_wire(node) - wire_before >= out.received, 10)  # it is brought up to date every 5 s
    out.on_the_wire = on_the_wire(node) - wire_before
    out.quieted = len(node.controller.events("violation_quieted"))
    out.events = len(node.controller.events())
    out.internal_errors = node.controller.status()["internal_errors"]
    print(out)
    yield out


def test_there_was_a_flood(outcome: Outcome) -> None:
    assert outcome.received > 10_000 * outcome.seconds


def test_the_others_lose_nothing(outcome: Outcome) -> None:
    assert [(who, lost) for who, _, lost in outcome.pings if lost] == []
    assert all(sent > 100 for _, sent, _ in outcome.pings)


def test_the_controller_stays_cool(outcome: Outcome) -> None:
    assert outcome.controller_cpu < 0.20


def test_every_packet_is_in_the_event_log(outcome: Outcome) -> None:
    assert outcome.noted == outcome.received
    assert outcome.on_the_wire >= outcome.received


def test_the_log_is_not_flooded(outcome: Outcome) -> None:
    assert outcome.events < 200
    assert outcome.quieted > 0
    assert outcome.internal_errors == 0


def test_others_are_refused_meanwhile(outcome: Outcome) -> None:
    refused = [took for took in outcome.refused_s if took is not None]
    assert len(refused) >= len(outcome.refused_s) * 0.8, outcome.refused_s


def test_nothing_of_it_arrives(outcome: Outcome) -> None:
    assert outcome.arrived == {}
