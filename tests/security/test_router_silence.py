"""A way that is cut is noticed, whatever is under way; a server that takes no more of a request for long is waited for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab.ovs import Namespace

pytestmark = pytest.mark.root

PROGRAM = """
import asyncio, subprocess, sys
from controller.security.router import upstream
from controller.security.router.settings import Target

upstream.SILENT_S = 2

async def serve(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    if head.startswith(b"POST"):
        await asyncio.sleep(5)
        await reader.readexactly(16 << 20)
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")

async def main(case):
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = Target("inf1", address="127.0.0.1", port=server.sockets[0].getsockname()[1])
    up = upstream.Upstream(target, loop, None, lambda _up: None)
    _, made = await loop.create_connection(up._new, target.address, target.port)
    body = b"" if case == "thinks" else b"x" * (16 << 20)
    if case == "cut before":
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    asked = b"%s /v1/chat HTTP/1.1\\r\\nContent-Length: %d\\r\\n\\r\\n" % (b"POST" if body else b"GET", len(body))
    done = made.ask(upstream._Status(), asked + body, is_head=False, whole=True)
    began = loop.time()
    while not done.done() and loop.time() - began < 12:
        await asyncio.sleep(0.1)
        up.sweep(loop.time(), None)
        if case in ("cut while it reads nothing", "thinks") and 0.9 < loop.time() - began < 1.1:
            subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    print(done.result().value if done.done() else "nothing", flush=True)

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A network of its own."""
    made = Namespace()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        ("reads late", "done"),
        ("cut before", "unanswered"),
        ("cut while it reads nothing", "unanswered"),
        ("thinks", "unanswered"),
    ],
)
def test_what_becomes_of_a_request(space: Namespace, case: str, outcome: str) -> None:
    command = space.command(sys.executable, "-c", PROGRAM, case)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == outcome, done.stderr
