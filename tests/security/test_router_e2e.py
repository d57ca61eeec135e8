"""From a client to an inference server by the commands alone: TLS 1.3, HPKE, the router, WireGuard, mutual TLS, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from controller.security.pki import Pki
from lab.ovs import Namespace, die_with_parent
from tests.security.routerstand import ROOT, until

pytestmark = pytest.mark.root
BULKHEAD = (sys.executable, "-c", "from controller.cli import main; main()")
STATE = """
security:
  role: {role}
  name: {name}
  network: 10.99.0.0/24
  address: {address}
  listen: 8443
  peers: [{{name: {peer}, address: {peer_address}}}]
  limits: {{per_client_per_s: 100}}
"""


class World:
    """A router and an inference server in namespaces of their own, joined by WireGuard over a veth."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self.router, self.server = Namespace(), Namespace()
        for each in (self.router, self.server):
            stack.callback(each.close)
        self.router.run(
            "ip", "link", "add", "out", "type", "veth", "peer", "name", "out", "netns", str(self.server.pid)
        )
        self._wireguard()
        pki = Pki(directory / "pki")
        pki.init("e2e")
        pki.issue("router1", "peer", ["10.99.0.1", "127.0.0.1"], ["llm.example"])
        pki.issue("inf1", "peer", ["10.99.0.2"])
        self.file("router", "router1", "10.99.0.1", "inf1", "10.99.0.2")
        self.file("inference", "inf1", "10.99.0.2", "router1", "10.99.0.1")

    def file(self, role: str, name: str, address: str, peer: str, peer_address: str) -> None:
        """The state file of a machine."""
        text = STATE.format(role=role, name=name, address=address, peer=peer, peer_address=peer_address)
        (self.directory / f"{role}.yaml").write_text(text)

    def _wireguard(self) -> None:
        ends = (self.router, self.server)
        names = [f"wgr{os.getpid()}{n}" for n in (1, 2)]
        keys = [subprocess.run(["wg", "genkey"], capture_output=True, check=True).stdout for _ in ends]
        public = [subprocess.run(["wg", "pubkey"], input=key, capture_output=True, check=True).stdout for key in keys]
        for n, (space, name) in enumerate(zip(ends, names, strict=True)):
            space.run("ip", "address", "add", f"192.0.2.{n + 1}/24", "dev", "out")
            space.run("ip", "link", "set", "out", "up")
            self.start(space, "wireguard-go", "-f", name)
            until(Path(f"/var/run/wireguard/{name}.sock").exists)
            words = ["wg", "set", name, "listen-port", "51820", "private-key", "/dev/stdin"]
            words += ["peer", public[1 - n].decode().strip(), "allowed-ips", f"10.99.0.{2 - n}/32"]
            words += ["endpoint", f"192.0.2.{2 - n}:51820"]
            subprocess.run(space.command(*words), input=keys[n], check=True)
            space.run("ip", "address", "add", f"10.99.0.{n + 1}/24", "dev", name)
            space.run("ip", "link", "set", name, "up")

    def start(self, space: Namespace, *command: str) -> subprocess.Popen[bytes]:
        """A program of a machine, until the end."""
        log = (self.directory / "log").open("ab")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "BULKHEAD_SECURITY_DIR": str(self.directory)}
        environment |= {"BULKHEAD_RUN_DIR": str(self.directory / "run"), "LOG_LEVEL": "error"}
        made = subprocess.Popen(
            space.command(*command), stdout=log, stderr=log, env=environment, preexec_fn=die_with_parent
        )
        self._stack.callback(log.close)
        self._stack.callback(made.wait)
        self._stack.callback(made.terminate)
        return made

    def bulkhead(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command on the router's machine, to its end."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "BULKHEAD_SECURITY_DIR": str(self.directory)}
        command = self.router.command(*BULKHEAD, *words)
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)

    def log(self) -> str:
        """What all of them said."""
        return (self.directory / "log").read_text()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def test_a_streamed_answer_through_everything(world: World) -> None:
    world.start(world.server, *BULKHEAD, "inference", str(world.directory / "inference.yaml"), "--token-ms", "100")
    until(lambda: "answers on 10.99.0.2" in world.log(), 20)
    world.start(world.router, *BULKHEAD, "router", str(world.directory / "router.yaml"), "--on", "127.0.0.1", "-v")
    until(lambda: "the router answers on port 8443" in world.log(), 20)
    key = world.directory / "laptop.key"
    assert world.bulkhead("client", "keygen", str(key)).returncode == 0
    assert world.bulkhead("client", "register", "laptop", f"{key}.pub").returncode == 0
    words = ["client", "call", "https://127.0.0.1:8443/v1/chat", "--key", str(key)]
    words += [
        "--ca",
        str(world.directory / "pki/ca.pem"),
        "--json",
        json.dumps({"prompt": "alpha beta gamma"}),
        "--stream",
    ]
    began = time.monotonic()
    done = world.bulkhead(*words)
    assert done.returncode == 0, (done.stderr, world.log())
    tokens = [json.loads(line[6:])["token"] for line in done.stdout.splitlines() if line.startswith("data: {")]
    assert tokens == ["alpha", "beta", "gamma"] and time.monotonic() - began > 0.3
    assert "client laptop status 200" in world.log() and "server inf1" in world.log()
    for word in ("alpha", "gamma", "/v1/chat"):
        assert word not in world.log()
    # Nobody but the router may ask the server, not even from the router's machine without its certificate.
    ca = str(world.directory / "pki/ca.pem")
    bare = subprocess.run(
        world.router.command("curl", "-sS", "-m", "5", "--cacert", ca, "https://10.99.0.2:8001/health"),
        capture_output=True,
    )
    assert bare.returncode != 0
    assert world.bulkhead("client", "revoke", "laptop").returncode == 0
    assert world.bulkhead(*words).returncode == 1
