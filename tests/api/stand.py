"""A whole API for tests: a real ovsdb-server, a stand-in for agent and controller that realizes what the store says, and the
API's own process or app. Everything in one temporary directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import controller.store
from controller.records import Records, key
from controller.store import Store

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "oo1424oo.yaml"
SCHEMA = Path(controller.store.__file__).parent / "bulkhead.ovsschema"
NODE = "n1"


@contextmanager
def ovsdb(directory: Path) -> Iterator[str]:
    """An ovsdb-server with an empty store; its address."""
    db, sock = directory / "bulkhead.db", directory / "store.sock"
    if not db.exists():
        subprocess.run(["ovsdb-tool", "create", str(db), str(SCHEMA)], check=True)
    command = [
        "ovsdb-server",
        str(db),
        f"--remote=punix:{sock}",
        f"--unixctl={directory / 'ovsdb.ctl'}",
        "-vconsole:off",
    ]
    process = subprocess.Popen(command)
    try:
        until(sock.exists)
        yield f"unix:{sock}"
    finally:
        process.kill()
        process.wait()


def until(what: Callable[[], object], patience_s: float = 10.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + patience_s
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError("it has not come true")
        time.sleep(0.01)


def good(answer: httpx.Response) -> Any:
    """What a good answer says; a bad one fails the test with all that it says."""
    assert answer.is_success, f"{answer.status_code} {answer.text}"
    return answer.json()


class Realizer:
    """Stands in for agent and controller: publishes that a node has realized what the store says.

    What is in `refuses` (names of containers) is refused, what is in `holds` never gets ready, `leftovers` are
    keys of what is gone and still there; while `paused` nothing is
    published at all.
    """

    def __init__(self, remote: str, node: str = NODE) -> None:
        self.node = node
        self.refuses: dict[str, str] = {}
        self.holds: dict[str, str] = {}
        self.leftovers: dict[str, str] = {}
        self.paused = False
        self._store = Store([remote])
        self._last: object = None
        self._lock = threading.Lock()
        records = self._store.start()
        self._store.subscribe(self.publish)
        self.publish(records)

    @property
    def records(self) -> Records:
        """What the store holds."""
        return self._store.records

    def publish(self, records: Records | None = None) -> None:
        """Say how far it has come."""
        records = records or self._store.records
        waiting = dict(self.leftovers)
        for one in records.containers:
            if one.name in self.refuses:
                waiting[key(one)] = f"refused: {self.refuses[one.name]}"
            elif one.name in self.holds:
                waiting[key(one)] = self.holds[one.name]
        health = {f"{one.id}/{service.name}": "up" for one in records.containers for service in one.services}
        said = (records.revision, tuple(waiting.items()), tuple(health.items()))
        with self._lock:
            if self.paused or said == self._last:
                return
            self._last = said
        self._store.publish(
            self.node,
            agent_revision=records.revision,
            agent_waiting=waiting,
            controller_revision=records.revision,
            controller_waiting={},
            health=health,
        )

    def close(self) -> None:
        """Stop."""
        self._store.close()


@dataclass
class Stand:
    """A running API: `client` asks on its unix socket as whoever runs the test."""

    directory: Path
    remote: str
    realizer: Realizer
    state: Path
    arguments: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def where(self) -> Path:
        """The API's unix socket."""
        return self.directory / "api.sock"

    def start(self) -> None:
        """Start the API's process."""
        log = (self.directory / "api.log").open("ab")
        command = [
            *(sys.executable, "-c", "from controller.cli import main; main()", "api", str(self.state)),
            *("--run-dir", str(self.directory), "--state-dir", str(self.directory / "state"), "--store", self.remote),
            *("--node", NODE, "--port", str(self.port), "--events", str(self.directory / "controller-events")),
            *("--agent-events", str(self.directory / "agent-events"), *self.arguments),
        ]
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=log, stdout=log)
        until(lambda: self.up or self.process is None or self.process.poll() is not None, 20)
        assert self.process.poll() is None, (self.directory / "api.log").read_text()

    @property
    def up(self) -> bool:
        """Whether it answers."""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(self.where))
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return sock.recv(15).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def client(self, **more: object) -> httpx.Client:
        """A client on the unix socket."""
        transport = httpx.HTTPTransport(uds=str(self.where), limits=httpx.Limits(max_connections=64))
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=30, **more)  # type: ignore[arg-type]

    def stop(self, number: int = 15) -> None:
        """End the API's process."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None

    def audit(self, *kinds: str) -> list[dict[str, object]]:
        """The API's events of some kinds."""
        lines = [
            line
            for path in sorted((self.directory / "state" / "events").glob("events-*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        return [event for line in lines if (event := json.loads(line))["kind"] in kinds]


@contextmanager
def stand(directory: Path, *arguments: str, state: Path = EXAMPLE, port: int = 0) -> Iterator[Stand]:
    """A whole API, started."""
    with ovsdb(directory) as remote:
        realizer = Realizer(remote)
        found = Stand(directory, remote, realizer, state, list(arguments), port=port)
        (directory / "agent").mkdir(exist_ok=True)
        (directory / "agent" / "vpn.pub").write_text("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n")
        try:
            found.start()
            yield found
        finally:
            found.stop()
            realizer.close()
