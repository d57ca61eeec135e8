"""The WireGuard network between servers: a router and an inference server with their roles' firewalls, in namespaces of
their own, and real tunnels. Keys are replaced under load; the load tells what was lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.agent.netns import in_namespace
from controller.hostmodel import Endpoint
from controller.model import Ipv4
from controller.problems import BulkheadError
from controller.security.wg import Public, Wg, read_public
from controller.statefile import loads
from controller.wgkeys import new_private_key, public_key
from lab.ovs import die_with_parent

pytestmark = [pytest.mark.root, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
LOST = 0
"""Pings that may be lost while a key is replaced; measured: none."""
KILLS = 6 if os.environ.get("BULKHEAD_FULL") else 2
STALL_S = 2.0
"""So long a TCP stream may stand still on a machine with much to do; measured: 0.1 s."""
SERVERS = {
    "router1": ("10.0.0.1", "192.0.2.1", "{role: router, name: router1, peers: [{name: inf1, address: 10.0.0.2}]}"),
    "inf1": (
        "10.0.0.2",
        "192.0.2.2",
        "{role: inference, name: inf1, address: 10.0.0.2, peers: [{name: router1, address: 10.0.0.1}]}",
    ),
}


class Server:
    """A machine: network and mounts of its own, so that two can have interfaces of the same name."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.address, self.outside, section = SERVERS[name]
        directory.mkdir()
        self.file = directory / "state.yaml"
        self.file.write_text(f"security: {section}\n")
        self.keeper: subprocess.Popen[bytes] | None = None
        script = "mkdir -p /run/wireguard && mount -t tmpfs none /run/wireguard && ip link set lo up && echo up && exec sleep 600"
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", script],
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert self.holder.stdout is not None and self.holder.stdout.readline() == b"up\n"
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BULKHEAD_SECURITY_DIR": str(directory / "security"),
            "BULKHEAD_RUN_DIR": str(directory / "run"),
        }

    @property
    def netns(self) -> Path:
        return Path(f"/proc/{self.holder.pid}/ns/net")

    def line(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--mount", "--", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.line(*command), capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def bulkhead(self, *arguments: str, code: int = 0) -> str:
        line = self.line(sys.executable, "-m", "controller", *arguments)
        done = subprocess.run(line, capture_output=True, text=True, env=self.env, timeout=60, check=False)
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def start(self) -> None:
        line = self.line(sys.executable, "-m", "controller", "wg", "run", str(self.file))
        with (self.directory / "log").open("ab") as log:
            self.keeper = subprocess.Popen(line, env=self.env, stderr=log, preexec_fn=die_with_parent)

    def end(self, number: signal.Signals) -> None:
        if self.keeper is not None:
            self.keeper.send_signal(number)
            self.keeper.wait(10)
            self.keeper = None

    def shown(self) -> dict[str, Any]:
        line = self.line(sys.executable, "-m", "controller", "wg", "show", str(self.file), "--json")
        done = subprocess.run(line, capture_output=True, text=True, env=self.env, timeout=60, check=False)
        return json.loads(done.stdout) if done.stdout else {}

    def interfaces(self) -> list[str]:
        return re.findall(r"bulkhead-wg\d", self.run("ip", "-o", "link"))

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.end(signal.SIGTERM)
            self.bulkhead("wg", "down")
        self.holder.kill()
        self.holder.wait()


def eventually(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "that did not come about"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    if shutil.which("wireguard-go") is None:
        pytest.skip("no wireguard-go")
    directory = tmp_path_factory.mktemp("wg")
    router, inference = (Server(name, directory / name) for name in SERVERS)
    try:
        router.run(
            "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(inference.holder.pid)
        )
        for server in (router, inference):
            server.run("ip", "address", "add", f"{server.outside}/24", "dev", "eth0")
            server.run("ip", "link", "set", "eth0", "up")
            server.bulkhead("firewall", "apply", str(server.file))
            public = str(server.directory / "public")
            # The inference server only dials.
            dialled = ("--endpoint", f"{server.outside}:51820") if server is router else ()
            server.bulkhead("wg", "init", str(server.file), *dialled, "--out", public)
        router.bulkhead("wg", "add", str(router.file), str(inference.directory / "public"))
        inference.bulkhead("wg", "add", str(inference.file), str(router.directory / "public"))
        router.start()
        inference.start()
        eventually(lambda: all(s.shown().get("peers", [{}])[0].get("fresh") for s in (router, inference)))
        yield router, inference
    finally:
        router.close()
        inference.close()


class Load:
    """Pings both ways every 10 ms, and a TCP stream from the router to the inference port."""

    def __init__(self, router: Server, inference: Server) -> None:
        self._pings = [
            subprocess.Popen(one.line("ping", "-i", "0.01", "-q", other.address), stdout=subprocess.PIPE, text=True)
            for one, other in ((router, inference), (inference, router))
        ]
        listener = in_namespace(inference.netns, lambda: socket.create_server((inference.address, 8001)))
        self._out = in_namespace(router.netns, lambda: socket.create_connection((inference.address, 8001), timeout=30))
        self._in, _ = listener.accept()
        listener.close()
        self._stop = threading.Event()
        self.sent = self.received = 0
        self.stall_s = 0.0
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stop.is_set():
            number = self.sent // 1024
            self._out.sendall(number.to_bytes(8, "big") * 128)
            self.sent += 1024
            time.sleep(0.002)
        self._out.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        rest, last = b"", time.monotonic()
        while piece := self._in.recv(65536):
            now = time.monotonic()
            self.stall_s, last = max(self.stall_s, now - last), now
            rest += piece
            while len(rest) >= 1024:
                assert rest[:8] == (self.received // 1024).to_bytes(8, "big")
                rest, self.received = rest[1024:], self.received + 1024

    def end(self) -> list[tuple[int, int]]:
        """For each direction: pings sent, and lost."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        self._in.close()
        self._out.close()
        out = []
        for ping in self._pings:
            # ping counts one that is under way as sent
            ping.send_signal(signal.SIGINT)
            text, _ = ping.communicate(timeout=10)
            found = re.search(r"(\d+) packets transmitted, (\d+) received", text)
            assert found is not None, text
            sent, received = int(found[1]), int(found[2])
            out.append((sent, max(0, sent - received - 1)))
        return out


def hand_over(source: Server, target: Server) -> None:
    target.bulkhead("wg", "add", str(target.file), str(source.directory / "public"))


def over(router: Server, inference: Server) -> bool:
    return all(server.interfaces() == ["bulkhead-wg0"] for server in (router, inference))


def test_a_key_is_replaced_without_losing_a_packet(servers: tuple[Server, Server]) -> None:
    router, inference = servers
    before = router.shown()["own"]["public_key"]
    load = Load(router, inference)
    time.sleep(1)
    router.bulkhead("wg", "rotate", "--out", str(router.directory / "public"))
    time.sleep(2)  # meanwhile the old key does it
    hand_over(router, inference)
    eventually(lambda: "bulkhead-wg1" in inference.interfaces())
    eventually(lambda: over(router, inference))
    time.sleep(1)
    pings = load.end()
    print("pings sent and lost:", pings, "TCP:", load.sent, "bytes, longest stall", round(load.stall_s, 3), "s")
    assert all(sent > 500 and lost <= LOST for sent, lost in pings), pings
    assert load.sent == load.received > 0
    assert load.stall_s < STALL_S
    after = router.shown()
    assert after["own"]["public_key"] != before and not after["own"]["rotating"]
    assert inference.shown()["peers"][0]["public_key"] == after["own"]["public_key"]
    assert before not in inference.run("wg", "show", "bulkhead-wg0", "dump")


def test_both_at_once_and_killed_on_the_way(servers: tuple[Server, Server]) -> None:
    """One of the two is killed by SIGKILL and started again, in turn; the tunnels need neither."""
    router, inference = servers
    before = {server.name: server.shown()["own"]["public_key"] for server in servers}
    load = Load(router, inference)
    for server in servers:
        server.bulkhead("wg", "rotate", "--out", str(server.directory / "public"))
    hand_over(router, inference)
    hand_over(inference, router)
    for number in range(KILLS):
        server = servers[number % 2]
        server.end(signal.SIGKILL)
        server.start()
        time.sleep(2.5)
    eventually(lambda: over(router, inference), 60)
    pings = load.end()
    print("pings sent and lost:", pings)
    assert all(lost <= LOST for _, lost in pings), pings
    assert load.sent == load.received
    for server, other in ((router, inference), (inference, router)):
        own = server.shown()["own"]
        assert own["public_key"] != before[server.name] and not own["rotating"]
        assert other.shown()["peers"][0]["public_key"] == own["public_key"]


def test_each_peer_has_exactly_its_address(servers: tuple[Server, Server]) -> None:
    for server, other in (servers, servers[::-1]):
        rows = [line.split("\t") for line in server.run("wg", "show", "bulkhead-wg0", "dump").splitlines()]
        assert len(rows) == 2 and rows[0][2] == "51820"
        assert rows[1][3] == f"{other.address}/32" and rows[1][7] == "25"
        assert stat.S_IMODE((server.directory / "security/wg/own.key").stat().st_mode) == 0o600
        assert stat.S_IMODE((server.directory / "security/wg").stat().st_mode) == 0o700
        key = (server.directory / "security/wg/own.key").read_text().strip()
        written = [path for path in server.directory.rglob("*") if path.is_file() and path.name != "own.key"]
        assert not [path for path in written if key.encode() in path.read_bytes()]
        assert key not in server.bulkhead("wg", "show", str(server.file)) + server.bulkhead("wg", "export")


def test_what_goes_away_comes_back(servers: tuple[Server, Server]) -> None:
    router, inference = servers
    (record,) = (router.directory / "run/wg/programs").glob("*.json")
    os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
    eventually(lambda: " 0% packet loss" in ping_once(router, inference.address))
    router.run("ip", "route", "del", f"{inference.address}/32")
    router.run("wg", "set", "bulkhead-wg0", "peer", public_key(new_private_key()), "allowed-ips", "10.0.0.9/32")
    eventually(lambda: " 0% packet loss" in ping_once(router, inference.address))
    eventually(lambda: len(router.run("wg", "show", "bulkhead-wg0", "peers").splitlines()) == 1)


def test_a_sealed_server_is_left_out_until_it_is_unsealed(servers: tuple[Server, Server]) -> None:
    router, inference = servers

    def peers() -> int:
        return len(router.run("wg", "show", "bulkhead-wg0", "peers").splitlines())

    text = router.bulkhead("incident", "seal", "--server", inference.address, "--reason", "a test", "--json")
    time.sleep(2.5)
    assert peers() == 0 and " 0% packet loss" not in ping_once(router, inference.address)
    router.bulkhead("incident", "unseal", json.loads(text)["id"])
    eventually(lambda: " 0% packet loss" in ping_once(router, inference.address))
    assert peers() == 1


def ping_once(server: Server, address: str) -> str:
    line = server.line("ping", "-c", "1", "-W", "1", address)
    return subprocess.run(line, capture_output=True, text=True, timeout=10, check=False).stdout


# ------------------------------------------------------------------------------------------------------------- files


def profile(text: str) -> Any:
    return loads(f"security: {text}", "test").host.security


ROUTER = profile("{role: router, name: r, peers: [{name: i, address: 10.0.0.2}]}")


def other(name: str = "i", address: str = "10.0.0.2", **more: Any) -> Public:
    return Public(name, Ipv4.parse(address), more.pop("public_key", public_key(new_private_key())), **more)


def test_what_contradicts_is_refused(tmp_path: Path) -> None:
    wg = Wg(tmp_path / "wg")
    with pytest.raises(BulkheadError, match="no WireGuard key yet"):
        wg.own()
    own = wg.init(ROUTER, Endpoint("192.0.2.1", 51820))
    assert wg.init(ROUTER).public == own.public
    first = other()
    wg.add(first, ROUTER)
    cases = [
        (other("x", "10.0.1.1"), "no host of"),
        (other("x", "10.0.0.255"), "no host of"),
        (other("x", "10.0.0.1"), "is this machine"),
        (other("r", "10.0.0.7"), "is this machine"),
        (other("x", "10.0.0.2"), "is i's"),
        (other("i", "10.0.0.3"), "known at 10.0.0.2"),
        (other("x", "10.0.0.3", public_key=first.public_key), "the key of i"),
        (other("x", "10.0.0.3", public_key=own.public.public_key), "own key"),
        (other(), "another key"),
    ]
    for public, words in cases:
        with pytest.raises(BulkheadError, match=words):
            wg.add(public, ROUTER)
    assert wg.peers(ROUTER) == (first,)
    replaced = other()
    wg.add(replaced, ROUTER, replaces=True)
    assert wg.peers(ROUTER) == (replaced,)


def test_a_peers_next_key_follows_its_key(tmp_path: Path) -> None:
    wg = Wg(tmp_path / "wg")
    wg.init(ROUTER)
    first = other()
    following = other(public_key=first.public_key, next_key=public_key(new_private_key()))
    wg.add(first, ROUTER)
    wg.add(following, ROUTER)
    # It has finished already, and hands that over: here the old key goes in its time.
    wg.add(other(public_key=following.newest_key), ROUTER)
    assert wg.peers(ROUTER) == (following,)
    wg.promote_peer("i", following.newest_key)
    assert wg.peers(ROUTER) == (other(public_key=following.newest_key),)


def test_a_rotation_can_be_abandoned(tmp_path: Path) -> None:
    wg = Wg(tmp_path / "wg")
    own = wg.init(ROUTER)
    assert wg.rotate().next_key is not None and wg.rotate() == wg.rotate()
    assert wg.abandon() and wg.own().public == own.public and not wg.abandon()
    following = wg.rotate().public.next_key
    assert wg.promote() and not wg.promote()
    assert wg.own().public.public_key == following


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[" * 3000, '{"bulkhead-wg": 1}', "x" * 100_000]
    + [
        json.dumps({"bulkhead-wg": 1, "name": "i", "address": "10.0.0.2", "public_key": "A" * 43 + "="} | more)
        for more in ({}, {"name": "../x"}, {"address": "fd00::1"}, {"endpoint": "x"}, {"next_key": 7})
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(BulkheadError):
        read_public(text, "that file")


def test_what_is_handed_over_is_read_again() -> None:
    public = other(endpoint=Endpoint("vpn.example", 51820), next_key=public_key(new_private_key()))
    assert read_public(public.text(), "x") == public
