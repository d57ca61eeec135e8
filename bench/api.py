"""The HTTP API: creating containers, reading them under load beside a bare server, and what that does to the controller."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from bench.harness import Figure, spread
from bench.host import Host
from lab.ovs import die_with_parent

CONNECTIONS = 16
READ_S = 5.0
ADMIT_PORT = "veth101"

# Keeps connections busy with one request after the other; prints how many were answered, and how long each took.
_READER = """
import asyncio, json, sys, time
path, connections, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ask = b"GET /api/containers HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n"
async def one(took):
    reader, writer = await asyncio.open_unix_connection(path)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        writer.write(ask)
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        took.append(time.perf_counter() - began)
    writer.close()
async def main():
    took = []
    await asyncio.gather(*(one(took) for _ in range(connections)))
    took.sort()
    print(json.dumps({"per_s": len(took) / seconds, "p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100]}))
asyncio.run(main())
"""

# The same server with nothing behind it: one answer of the same size, encoded beforehand.
_BARE = """
import sys, uvicorn
size = int(sys.argv[2])
async def app(scope, receive, send):
    if scope["type"] == "http":
        headers = [(b"content-type", b"application/json"), (b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * size})
uvicorn.run(app, uds=sys.argv[1], log_level="error", access_log=False, loop="uvloop", http="httptools", lifespan="off")
"""


def _state() -> dict[str, Any]:
    def network(bridge: str, subnet: str, ids: str) -> dict[str, Any]:
        return {"bridge": bridge, "subnet": f"{subnet}.0/24", "gateway": f"{subnet}.1", "ids": ids}

    privacy = network("vmbr0", "10.0.0", "100-399") | {"egress": {"port": "warp0"}}
    return {"networks": {"privacy": privacy, "management": network("vmbr1", "10.1.0", "400-699")}}


class _Api(Host):
    """A whole host with its API."""

    def begin(self) -> None:
        """Start all of it."""
        self.say(_state())
        self.start("up", str(self.state_file))
        self.socket = self.directory / "run/api.sock"
        self.wait(self._answers, 60)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return client.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def client(self) -> httpx.Client:
        """Asks as root, on the unix socket."""
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=60)

    def create(self, client: httpx.Client, number: int) -> float:
        """Create a container; the time until it is answered as real."""
        services = [{"name": f"s{number}", "protocol": "tcp", "port": 9000}]
        wanted = {"name": f"c{number}", "network": ("privacy", "management")[number % 2], "services": services}
        began = time.perf_counter()
        answer = client.post("/api/containers/create", json=wanted)
        assert answer.status_code == 201, answer.text
        return time.perf_counter() - began

    def repaired(self) -> float:
        """How long until a flow of ours that somebody has deleted is there again."""
        number = self.ovs.port_numbers("vmbr0")[ADMIT_PORT]
        self.ovs.ofctl("del-flows", "vmbr0", f"table=0,in_port={number}")
        took = self.wait(lambda: f"in_port={number}" in self.ovs.ofctl("dump-flows", "vmbr0", "table=0"), 30)
        time.sleep(1.0)  # whoever keeps deleting is answered at leisure
        return took


def _read(path: Path, seconds: float = READ_S) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _READER, str(path), str(CONNECTIONS), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)


def _told(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate(timeout=120)
    found: dict[str, float] = json.loads(out)
    return found


def measure(rounds: int) -> Iterator[Figure]:
    """Every figure of the API."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as directory, _Api(Path(directory)) as host:
        host.begin()
        with host.client() as client:
            for number in range(50):
                host.create(client, number)
            took = [host.create(client, number) for number in range(50, 50 + 4 * rounds)]
            middle = statistics.median(took)
            yield Figure("create over the API, 50 present", middle, "s", "below 0.3", middle < 0.3, spread(took))
            for number in range(50 + 4 * rounds, 200):
                host.create(client, number)
            size = len(client.get("/api/containers").content)
        idle = [host.repaired() for _ in range(rounds)]
        reads = _told(_read(host.socket))
        bare = _bare(host, size)
        name = "GET /api/containers, 200 there"
        yield Figure(name, reads["per_s"], "1/s", "at least 500", reads["per_s"] >= 500, f"{CONNECTIONS} connections")
        yield Figure(f"{name}, 99th percentile", reads["p99"], "s", "below 0.05", reads["p99"] < 0.05)
        yield Figure("a bare server, the same bytes", bare["per_s"], "1/s", detail=f"{size} bytes")
        yield Figure("API / bare server", reads["per_s"] / bare["per_s"], "ratio")
        reader = _read(host.socket, 3.0 * rounds)
        busy = [host.repaired() for _ in range(rounds)]
        _told(reader)
        yield Figure("a deleted flow is back, nobody reads", statistics.median(idle), "s", detail=spread(idle))
        yield Figure("a deleted flow is back, under that load", statistics.median(busy), "s", detail=spread(busy))


def _bare(host: _Api, size: int) -> dict[str, float]:
    path = host.directory / "bare.sock"
    command = [sys.executable, "-c", _BARE, str(path), str(size)]
    server = subprocess.Popen(command, preexec_fn=die_with_parent)
    try:
        host.wait(path.exists)
        time.sleep(0.2)
        return _told(_read(path))
    finally:
        server.kill()
        server.wait()
