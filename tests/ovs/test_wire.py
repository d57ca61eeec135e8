"""Hostile and broken clients on the controller's own port: they cost a connection, never the controller or a flow."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.ovs.node import BRIDGES, LISTEN, ROOT, Controller, Node, inside, wait_for

VERSION = 5
HELLO, ERROR, ECHO_REQUEST, ECHO_REPLY = 0, 1, 2, 3
FEATURES_REQUEST, FEATURES_REPLY = 5, 6
PACKET_IN, FLOW_REMOVED, PORT_STATUS = 10, 11, 12
MULTIPART_REQUEST, MULTIPART_REPLY = 18, 19
BARRIER_REQUEST, BARRIER_REPLY = 20, 21
BUNDLE_CONTROL, BUNDLE_ADD = 33, 34
MP_FLOW, MP_METER_CONFIG, MP_PORT_DESC, MP_FLOW_MONITOR = 1, 10, 13, 16


def message(kind: int, body: bytes = b"", xid: int = 1, *, length: int | None = None, version: int = VERSION) -> bytes:
    """An OpenFlow message; `length` where it should lie."""
    return struct.pack("!BBHI", version, kind, 8 + len(body) if length is None else length, xid) + body


def dial(node: Node) -> socket.socket:
    """A connection to the controller."""
    with inside(node.namespace):
        sock = socket.socket()
    sock.settimeout(5)
    sock.connect(("127.0.0.1", LISTEN))
    return sock


def closed(sock: socket.socket, within_s: float) -> bool:
    """Whether the controller ends the connection."""
    sock.settimeout(0.1)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if not sock.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


class FakeSwitch:
    """Speaks just enough OpenFlow to be taken for a switch; `answers` replaces what it says to multipart requests."""

    def __init__(self, node: Node, dpid: int, name: str = "fake", answers: dict[int, bytes] | None = None) -> None:
        self.dpid, self.name = dpid, name
        self.answers = answers or {}
        self.seen: list[int] = []
        self.ended = threading.Event()
        """Set when the controller has ended the connection."""
        self.sock = dial(node)
        self._buffer = b""
        self.sock.sendall(message(HELLO))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                kind, xid, body = self._next()
                self.seen.append(kind)
                reply = self._reply(kind, xid, body)
                if reply:
                    self.sock.sendall(reply)
        self.ended.set()

    def _next(self) -> tuple[int, int, bytes]:
        while len(self._buffer) < 8 or len(self._buffer) < int.from_bytes(self._buffer[2:4], "big"):
            self.sock.settimeout(30)
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionResetError
            self._buffer += data
        length = int.from_bytes(self._buffer[2:4], "big")
        head, self._buffer = self._buffer[:length], self._buffer[length:]
        return head[1], int.from_bytes(head[4:8], "big"), head[8:]

    def _reply(self, kind: int, xid: int, body: bytes) -> bytes:
        if kind == FEATURES_REQUEST:
            return message(FEATURES_REPLY, struct.pack("!QIBB2xII", self.dpid, 0, 254, 0, 0x4F, 0), xid)
        if kind == ECHO_REQUEST:
            return message(ECHO_REPLY, body, xid)
        if kind == BARRIER_REQUEST:
            return message(BARRIER_REPLY, b"", xid)
        if kind == MULTIPART_REQUEST:
            what = int.from_bytes(body[:2], "big")
            port = struct.pack("!IHH6s2x16sII", 0xFFFFFFFE, 72, 0, b"\2\0\0\0\0\1", self.name.encode(), 0, 0)
            port += struct.pack("!HH4xIIIIII", 0, 32, 0, 0, 0, 0, 0, 0)
            parts = {MP_PORT_DESC: port, MP_FLOW: b"", MP_METER_CONFIG: b"", **self.answers}
            return message(MULTIPART_REPLY, struct.pack("!HH4x", what, 0) + parts.get(what, b""), xid)
        return b""

    def close(self) -> None:
        self.sock.close()


@pytest.fixture(scope="module")
def flows(node: Node) -> dict[str, set[str]]:
    return {bridge: node.own_dump(bridge) for bridge in BRIDGES}


@pytest.fixture(scope="module")
def silent(node: Node) -> Iterator[tuple[socket.socket, float]]:
    """A client that connects and says nothing, from the first test to the last."""
    sock = dial(node)
    yield sock, time.monotonic()
    sock.close()


@pytest.fixture(autouse=True)
def unharmed(node: Node, flows: dict[str, set[str]], silent: object) -> Iterator[None]:
    """After every test: all is as it was."""
    seen = node.controller.last_event()
    yield
    assert node.controller.alive(), node.controller.last_words()
    wait_for(node.controller.steady, 10, node.controller.last_words)
    assert {bridge: node.own_dump(bridge) for bridge in BRIDGES} == flows
    assert node.controller.status()["internal_errors"] == 0
    assert node.controller.events("internal_error", after=seen) == []
    assert "Traceback" not in node.controller.log()


def noise(count: int) -> bytes:
    return random.Random(count).randbytes(count)


HOSTILE: dict[str, bytes] = {
    "noise": noise(5000),
    "an old request of the web": b"GET / HTTP/1.1\r\nHost: controller\r\n\r\n",
    "half a header": b"\5\0\0",
    "length 0": message(HELLO, length=0) * 3,
    "length 7": message(HELLO, length=7) * 3,
    "length 7 after hello": message(HELLO) + message(ECHO_REQUEST, length=7) * 3,
    "length 0 after hello": message(HELLO) + message(ECHO_REQUEST, length=0) * 3,
    "too long for its data": message(HELLO, length=0xFFFF),
    "a body that never comes": message(HELLO) + message(FEATURES_REPLY, b"\0" * 8, length=0xFFFF),
    "hello, then noise": message(HELLO) + noise(3000),
    "a version nobody speaks": message(HELLO, version=99),
    "OpenFlow 1.0": message(HELLO, version=1),
    "hello with an element of length 0": message(HELLO, b"\0\1\0\0" * 4),
    "hello with an element too long": message(HELLO, b"\0\1\xff\xff\0\0\0\x20"),
    "hello with an element cut short": message(HELLO, b"\0\1"),
    "features of nothing": message(HELLO) + message(FEATURES_REPLY),
    "features out of turn": message(FEATURES_REPLY, bytes(24)),
    "an unknown type": message(HELLO) + message(200, bytes(100)),
    "errors": message(HELLO) + message(ERROR, b"") + message(ERROR, b"\0\0") + message(ERROR, noise(40)),
    "replies to nothing": message(HELLO) + message(MULTIPART_REPLY, b"\0\1\0\0\0\0\0\0") + message(BARRIER_REPLY) * 5,
    "a packet before it is known": message(HELLO) + message(PACKET_IN, noise(100)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_cost_a_connection_at_most(node: Node, what: str) -> None:
    for _ in range(2):
        with dial(node) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(HOSTILE[what])
            assert closed(sock, 0.2) or node.controller.status()


ENTRIES: dict[str, dict[int, bytes]] = {
    "flows of length 0": {MP_FLOW: bytes(56)},
    "flows of length 1": {MP_FLOW: b"\0\1" + bytes(54)},
    "a flow cut short": {MP_FLOW: b"\0\x38" + bytes(20)},
    "a flow longer than the message": {MP_FLOW: b"\xff\xf8" + bytes(60)},
    "a flow of noise": {MP_FLOW: b"\x01\0" + noise(254)},
    "a match of length 0": {MP_FLOW: struct.pack("!HBxIIHHHH4xQQQ", 56, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) + b"\0\1\0\0\0\0\0\0"},
    "an action of length 0": {
        MP_FLOW: struct.pack("!HBxIIHHHH4xQQQ", 72, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        + b"\0\1\0\4\0\0\0\0" + b"\0\4\0\x10\0\0\0\0" + b"\0\0\0\0\0\0\0\0"
    },
    "meters of length 0": {MP_METER_CONFIG: bytes(16)},
    "a meter whose band has length 0": {MP_METER_CONFIG: b"\0\x18\0\1\0\0\0\1" + bytes(16)},
    "monitor updates of length 0": {MP_FLOW_MONITOR: bytes(8)},
    "a monitor update of noise": {MP_FLOW_MONITOR: b"\0\x40\0\1" + noise(60)},
    "ports of length 0": {MP_PORT_DESC: bytes(72)},
    "a port cut short": {MP_PORT_DESC: bytes(20)},
    "a port whose property has length 0": {
        MP_PORT_DESC: struct.pack("!IHH6s2x16sII", 1, 72, 0, b"\2\0\0\0\0\1", b"x", 0, 0) + bytes(32)
    },
}  # fmt: skip


@pytest.mark.parametrize("what", ENTRIES)
def test_a_switch_that_answers_nonsense(node: Node, what: str) -> None:
    seen = node.controller.last_event()
    before = node.controller.status()["unreadable_messages"]
    switch = FakeSwitch(node, 0xBAD, "fake", ENTRIES[what])

    def noticed() -> bool:
        status = node.controller.status()
        told = node.controller.events("openflow_error", after=seen)
        return switch.ended.is_set() or bool(told) or status["unreadable_messages"] > before

    try:
        wait_for(noticed, 3, "nobody noticed")
    finally:
        switch.close()


@pytest.mark.parametrize(
    "kind", [PACKET_IN, FLOW_REMOVED, PORT_STATUS, MULTIPART_REPLY, ERROR, BUNDLE_CONTROL, BUNDLE_ADD]
)
def test_a_switch_that_tells_nonsense(node: Node, kind: int) -> None:
    """Once it is known: every message that a switch may send of its own accord, with nothing, little and noise in it."""
    seen = node.controller.last_event()
    switch = FakeSwitch(node, 0xBAD)
    node.controller.wait_event("switch_up", seen, 5, holding="fake")
    with contextlib.suppress(OSError):
        for size in (0, 1, 4, 8, 16, 40, 300):
            switch.sock.sendall(message(kind, noise(size)[:size]))
            switch.sock.sendall(message(kind, bytes(size)))
    time.sleep(0.3)
    assert node.controller.status()["pid"] == node.controller.pid
    switch.close()


def test_a_flood_of_echoes(node: Node) -> None:
    """Without ever reading the answers."""
    sock = dial(node)
    sock.sendall(message(HELLO))
    sock.settimeout(0.5)
    sent = 0
    with contextlib.suppress(OSError):
        for _ in range(400):
            sock.sendall(message(ECHO_REQUEST, bytes(1400)) * 50)
            sent += 50
    assert sent > 0
    began = time.monotonic()
    node.controller.status()
    assert time.monotonic() - began < 2, "others wait for it"
    sock.close()


def test_a_thousand_connections_at_once(node: Node) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    crowd: list[socket.socket] = []
    try:
        for _ in range(1000):
            with inside(node.namespace):
                sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", LISTEN))
            crowd.append(sock)
        # A real switch has to get in while they are all there.
        seen = node.controller.last_event()
        node.ovs.vsctl("del-controller", "mesh-privacy")
        node.set_controllers(bridges=("mesh-privacy",))
        node.controller.wait_event("switch_up", seen, 15, holding="mesh-privacy")
        connected = {b["name"] for b in node.controller.status()["bridges"] if b["connected"]}
        assert connected == set(BRIDGES), "switches that were there are not thrown out"
    finally:
        for sock in crowd:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_second_switch_of_the_same_datapath_id(node: Node) -> None:
    seen = node.controller.last_event()
    real = next(b["dpid"] for b in node.controller.status()["bridges"] if b["name"] == "vmbr0")
    switch = FakeSwitch(node, int(real, 16), "vmbr0")
    time.sleep(1.0)
    assert node.controller.status()["pid"] == node.controller.pid
    switch.close()
    wait_for(node.controller.steady, 15, node.controller.last_words)
    assert [e.text for e in node.controller.events("switch_up", after=seen) if e.bridge == "vmbr0"]


def test_a_second_switch_of_the_same_name(node: Node) -> None:
    """It gets nothing of what the bridge of that name should have."""
    seen = node.controller.last_event()
    switch = FakeSwitch(node, 0xBAD, "vmbr0")
    event = node.controller.wait_event("unknown_bridge", seen)
    assert event.data["dpid"] == f"{0xBAD:016x}"
    wait_for(lambda: BUNDLE_CONTROL in switch.seen, 6, "no bundle")
    time.sleep(0.3)
    assert switch.seen.count(BUNDLE_ADD) == 2, "the default drop and the canary"
    switch.close()


# ------------------------------------------------------------------------------------------------- a second controller


def second(node: Node, **differing: str) -> tuple[int, str]:
    """Start another controller; answers its exit code and what it said."""
    other = Controller(node, node.file, listen=differing.get("listen", "tcp:127.0.0.1:6654"))
    for name in ("run_dir", "events_dir"):
        if name in differing:
            setattr(other, name, node.directory / differing[name])
    done = subprocess.run(other.command(), cwd=ROOT, capture_output=True, text=True, timeout=20)
    errors = [line for line in done.stderr.splitlines() if " WARNING " not in line]
    return done.returncode, "\n".join(errors)


CONFLICTS: dict[str, tuple[dict[str, str], Callable[[str], bool]]] = {
    "run dir": ({"events_dir": "other-events"}, lambda text: "running already" in text or "run-dir" in text),
    "port": (
        {"run_dir": "other-run", "events_dir": "other-events", "listen": f"tcp:127.0.0.1:{LISTEN}"},
        lambda text: "cannot listen" in text,
    ),
    "events": ({"run_dir": "other-run"}, lambda text: "events" in text),
    "everything": ({"listen": f"tcp:127.0.0.1:{LISTEN}"}, bool),
}


@pytest.mark.parametrize("what", CONFLICTS)
def test_a_second_controller_ends_with_one_clear_line(node: Node, what: str) -> None:
    differing, clear = CONFLICTS[what]
    code, text = second(node, **differing)
    assert code == 2
    assert len(text.splitlines()) == 1 and text.startswith("bulkhead: "), text
    assert clear(text), text


# ------------------------------------------------------------------------------------------------------------ at last


def test_a_switch_that_comes_anew_is_taken(node: Node) -> None:
    seen = node.controller.last_event()
    node.ovs.vsctl("del-controller", "mesh-mgmt")
    node.set_controllers(bridges=("mesh-mgmt",))
    node.controller.wait_event("switch_up", seen, 10, holding="mesh-mgmt")


def test_who_says_nothing_is_shown_out(node: Node, silent: tuple[socket.socket, float]) -> None:
    sock, since = silent
    assert closed(sock, max(0.5, since + 12 - time.monotonic()))


def test_the_log_tells_of_them(node: Node) -> None:
    """Expected hostile input is a line each, not a traceback."""
    lines = [line for line in node.controller.log().splitlines() if "connection from" in line]
    assert len(lines) > 5
    assert all(len(line) < 500 for line in lines)
