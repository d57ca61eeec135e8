"""Grants on a host as it is: what the store holds is open, for that and for no longer, and its end ends what is under way."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from controller.records import GrantRecord, GrantState
from lab.ovs import LabError, die_with_parent

from .agent_host import BareHost
from .test_agent_attacks import inner, rich
from .test_store_follow import NODE, Stored

DEAD_S = 2.0
"""So soon a connection is dead whose grant is over."""
SERVER = """
import socketserver, sys
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
print("ready", flush=True)
Server(("", int(sys.argv[1])), Echo).serve_forever()
"""
CLIENT = """
import socket, sys, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)
sock.settimeout(0.2)
number = 0
while True:
    number += 1
    sock.send(b"%d\\n" % number)
    try:
        print(time.time(), sock.recv(65536).decode().split()[-1], flush=True)
    except TimeoutError:
        pass
    time.sleep(0.02)
"""
BULK = """
import socket, sys, threading
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)
sock.settimeout(5)
data, got = bytes(300_000), 0
threading.Thread(target=sock.sendall, args=(data,), daemon=True).start()
while got < len(data):
    got += len(sock.recv(65536))
print(got, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))
"""
RESOLVE = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"


def state() -> str:
    """The example with resolvers in both networks, xray with a service on 8080, and privacy's tunnel narrow."""
    tree = yaml.safe_load(rich())
    tree["networks"]["management"]["dns"] = {}
    for container in tree["lxc"]["containers"]:
        if str(container["id"]) == "102":
            services = container.setdefault("properties", {}).setdefault("services", [])
            services.append({"name": "panel", "protocol": "tcp", "port": 8080})
    return yaml.safe_dump(tree)


@pytest.fixture(scope="module")
def stored() -> Iterator[Stored]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        with BareHost(Path(directory), state()) as host:
            found = Stored(host)
            try:
                host.settle(60)
                found.store.start()
                with running(host, "102", SERVER, "8080"), running(host, "202", SERVER, "8080"):
                    yield found
            finally:
                found.close()


@contextlib.contextmanager
def running(host: BareHost, container: str, script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program of Python in a container."""
    command = host.machine.command("ip", "netns", "exec", f"bulkhead-{container}", "python3", "-uc", script, *arguments)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=die_with_parent
    )
    try:
        assert process.stdout is not None
        if script is SERVER:
            assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(inner(process), signal.SIGKILL)
        process.wait()


def grant(number: str, source: str = "202", target: str = "102", port: int = 8080, lasts_s: float = 600) -> GrantRecord:
    """One that is approved."""
    now = time.time()
    record = GrantRecord(number, source, target, "tcp", port, "to see", "ann", now, 600, node=NODE)
    return replace(record, state=GrantState.APPROVED, decided_by="bob", decided_at=now, expires_at=now + lasts_s)


def put(stored: Stored, *records: GrantRecord) -> float:
    """Store them, and wait until they are so; answers how long that took."""
    began = time.monotonic()
    _, revision = stored.store.change(lambda change: [change.put(record) for record in records])
    stored.wait(revision, *(f"grant/{record.id}" for record in records))
    return time.monotonic() - began


def revoke(stored: Stored, *records: GrantRecord) -> float:
    return put(stored, *(replace(record, state=GrantState.REVOKED, decided_at=time.time()) for record in records))


def connects(host: BareHost, container: str, address: str, port: int = 8080) -> bool:
    script = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1).close()"
    try:
        host.inside(container, "python3", "-c", script, address, str(port))
    except LabError:
        return False
    return True


def resolves(host: BareHost, container: str, name: str) -> str:
    try:
        return host.inside(container, "python3", "-c", RESOLVE, name).strip()
    except LabError:
        return ""


def patches(host: BareHost) -> list[str]:
    return [n for bridge in ("vmbr0", "vmbr1") for n in host.ovs.vsctl("list-ports", bridge).split() if "pass-" in n]


def kept(host: BareHost) -> list[str]:
    return [line for line in host.ovs.appctl("dpctl/dump-conntrack").splitlines() if "zone=" in line]


def test_the_granted_service_is_reached_by_name_and_nothing_else_is(stored: Stored) -> None:
    host = stored.host
    assert not connects(host, "202", "10.0.0.102") and patches(host) == []
    one = grant("1")
    took = put(stored, one)
    assert connects(host, "202", "10.0.0.102"), "at once, when it is said to be open"
    assert took < 3, took
    assert resolves(host, "202", "xray.privacy.internal") == "10.0.0.102"
    for name in ("gateway.privacy.internal", "panel.privacy.internal", "xray"):
        assert resolves(host, "202", name) == "", name
    assert resolves(host, "102", "monitoring.management.internal") == ""
    srv = host.inside("202", "cat", f"{host.run_dir}/agent/names/management.conf")
    assert "srv-host=_panel._tcp.xray.privacy.internal,xray.privacy.internal,8080" in srv
    for source, target, port in (
        ("201", "10.0.0.102", 8080),
        ("200", "10.0.0.102", 8080),
        ("202", "10.0.0.102", 22),
        ("202", "10.0.0.100", 8080),
        ("102", "10.1.0.202", 8080),
        ("100", "10.1.0.202", 8080),
    ):
        assert not connects(host, source, target, port), (source, target, port)
    assert not host.reaches("202", "10.0.0.102") and not host.reaches("102", "10.1.0.202")
    assert len(patches(host)) == 2
    revoke(stored, one)
    assert not connects(host, "202", "10.0.0.102")
    host.until(lambda: patches(host) == [] and kept(host) == [], 2, "gone")
    host.until(lambda: resolves(host, "202", "xray.privacy.internal") == "", 2, "unknown")
    host.settle(10)


@contextlib.contextmanager
def talking(host: BareHost, container: str, address: str) -> Iterator[list[float]]:
    """A connection that asks something 50 times a second; the times at which it was answered, as they come."""
    with running(host, container, CLIENT, address, "8080") as process:
        answered: list[float] = []

        def follow() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if len(words := line.split()) == 2:
                    answered.append(float(words[0]))

        threading.Thread(target=follow, daemon=True).start()
        host.until(lambda: len(answered) > 10, 5, "answered")
        yield answered


def test_a_connection_that_is_under_way_dies_with_its_grant_and_another_lives(stored: Stored) -> None:
    host = stored.host
    one, other = grant("2"), grant("3", "102", "202")
    put(stored, one, other)
    with talking(host, "202", "10.0.0.102") as dying, talking(host, "102", "10.1.0.202") as living:
        began = time.time()
        took = revoke(stored, one)
        said_gone = time.time()
        time.sleep(DEAD_S)
        assert dying[-1] - began < DEAD_S, f"it lived for {dying[-1] - began:.2f} s"
        assert dying[-1] < said_gone + 0.1, "it was said to be gone before it was"
        assert took < DEAD_S, took
        assert living[-1] > said_gone + 1.5, "the other grant's connection goes on"
        assert max(b - a for a, b in itertools.pairwise(living)) < 0.5
        assert all("src=10.0.0.102,dst=10.1.0.202" in line.partition("reply=")[0] for line in kept(host))
    revoke(stored, other)
    assert kept(host) == []
    host.until(lambda: patches(host) == [], 2, "gone")


def test_it_ends_by_itself(stored: Stored) -> None:
    host = stored.host
    one = grant("4", lasts_s=4)
    put(stored, one)
    with talking(host, "202", "10.0.0.102") as answered:
        time.sleep(max(0.0, one.expires_at - time.time()) + DEAD_S)
        assert -0.3 < answered[-1] - one.expires_at < DEAD_S
    assert not connects(host, "202", "10.0.0.102")
    host.until(lambda: patches(host) == [] and kept(host) == [], 5, "gone")


def test_what_is_too_long_for_one_end_gets_there_in_pieces_that_fit(stored: Stored) -> None:
    """Privacy's containers take less than management's. Both directions, and whoever has opened the connection."""
    host = stored.host
    one, other = grant("5"), grant("6", "102", "202")
    put(stored, one, other)
    narrow, wide = _mtu(host, "102"), _mtu(host, "202")
    assert narrow < wide
    for container, address in (("202", "10.0.0.102"), ("102", "10.1.0.202")):
        got, segment = map(int, host.inside(container, "python3", "-c", BULK, address, "8080").split())
        assert got == 300_000 and segment <= narrow - 40
    assert f"mtu {narrow}" in host.inside("202", "ip", "route", "get", "10.0.0.102")
    revoke(stored, one, other)
    host.until(lambda: f"mtu {narrow}" not in host.inside("202", "ip", "route", "get", "10.0.0.102"), 2, "without it")


def _mtu(host: BareHost, container: str) -> int:
    return int(host.inside(container, "cat", "/sys/class/net/eth0/mtu"))


def test_what_ended_while_the_agent_was_dead_is_forgotten_when_it_is_back(stored: Stored) -> None:
    host = stored.host
    one = grant("7")
    put(stored, one)
    with talking(host, "202", "10.0.0.102"):
        os.kill(inner(stored.agent), signal.SIGKILL)
        stored.agent.wait()
        ended = replace(one, state=GrantState.REVOKED, decided_at=time.time())
        _, revision = stored.store.change(lambda change: change.put(ended))
        time.sleep(0.5)
        assert kept(host), "nobody has flushed them"
        stored.agent = host.start("agent", stored.env)
        stored.wait(revision, "grant/7")
        assert kept(host) == []
    host.settle(20)
    assert patches(host) == []


def test_a_passage_that_somebody_damages_is_healed(stored: Stored) -> None:
    host = stored.host
    one = grant("8")
    put(stored, one)
    here, there = patches(host)
    for damage in (
        ("del-port", here),
        ("set", "interface", here, "options:peer=elsewhere"),
        ("set", "interface", there, "type=internal"),
    ):
        host.ovs.vsctl(*damage)
        host.until(
            lambda: connects(host, "202", "10.0.0.102") and len(patches(host)) == 2, 10, f"healed after {damage}"
        )
    host.ovs.vsctl(
        *("add-port", "vmbr0", "pass-stray", "--", "set", "interface", "pass-stray", "type=patch", "options:peer=x"),
        *("--", "set", "port", "pass-stray", "external_ids:bulkhead=made"),
    )
    host.until(lambda: len(patches(host)) == 2, 5, "the stray gone")
    revoke(stored, one)
    host.settle(20)
