"""A TLS server goes on through renewal, revocation and the replacement of the CA, under load, without a failed request."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from pathlib import Path

import pytest

from controller.problems import BulkheadError
from controller.security import tls
from controller.security.pki import Pki

RATE = 200.0 if os.environ.get("BULKHEAD_FULL") else 100.0
"""Requests per second, each on a connection of its own."""
SETTLE_S = 2 * tls.LOOK_S
STEPS = ("renew", "prepare", "switch", "back", "switch", "finish", "revoke")


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A CA with a server and two clients."""
    found = Pki(tmp_path / "pki")
    found.init("home")
    found.issue("server", "server", ["127.0.0.1"])
    found.issue("good", "client")
    found.issue("bad", "client")
    return found


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer lines with who has sent them."""
    name = tls.identity(writer.get_extra_info("ssl_object"))
    try:
        while line := await reader.readline():
            writer.write(f"{name} ".encode() + line)
            await writer.drain()
    except (ConnectionError, ssl.SSLError):
        pass
    finally:
        writer.close()


async def request(port: int, context: ssl.SSLContext) -> bytes:
    """A connection, a line, an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="127.0.0.1")
    try:
        writer.write(b"hello\n")
        await writer.drain()
        return await asyncio.wait_for(reader.readline(), 5)
    finally:
        writer.close()


def change(pki: Pki, step: str) -> None:
    """One thing that is done to certificates while requests are served."""
    if step == "renew":
        for name in ("server", "good"):
            pki.renew(name)
    elif step == "revoke":
        pki.revoke("bad")
    else:
        pki.rotate_ca(step, settle_s=0)


def test_nothing_fails_that_should_pass(pki: Pki) -> None:
    async def scenario() -> tuple[int, list[str], float]:
        serving = tls.Reloading(pki.directory, "server", server=True, require_client=True)
        calling = tls.Reloading(pki.directory, "good", server=False)
        server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=serving.server)
        port = server.sockets[0].getsockname()[1]
        stays, writes = await asyncio.open_connection("127.0.0.1", port, ssl=calling.current)
        failed: list[str] = []
        asked: set[asyncio.Task[None]] = set()
        count, doing = 0, True

        async def one() -> None:
            try:
                assert await request(port, calling.current) == b"good hello\n"
            except Exception as exc:
                failed.append(repr(exc))

        async def load() -> None:
            nonlocal count
            begin = time.monotonic()
            while doing:
                task = asyncio.create_task(one())
                asked.add(task)
                task.add_done_callback(asked.discard)
                count += 1
                await asyncio.sleep(max(0.0, begin + count / RATE - time.monotonic()))

        loading = asyncio.create_task(load())
        await asyncio.sleep(0.3)
        for step in STEPS:
            assert b"bad" in await request(port, tls.client_context(pki.directory, "bad"))
            await asyncio.to_thread(change, pki, step)
            revoked = time.monotonic()
            if step != "revoke":
                await asyncio.sleep(SETTLE_S)
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            while time.monotonic() < revoked + 5:
                assert await request(port, tls.client_context(pki.directory, "bad"))
        took = time.monotonic() - revoked
        doing = False
        await loading
        await asyncio.gather(*asked)
        writes.write(b"still\n")
        assert await stays.readline() == b"good still\n"  # it was opened before everything
        writes.close()
        server.close()
        assert serving.why == "" and serving.reloads >= len(STEPS) - 1
        return count, failed, took

    count, failed, took = asyncio.run(scenario())
    print(f"{count} requests at {RATE:g}/s, {len(failed)} failed; the revoked one was refused {took:.2f} s after")
    assert failed == [] and count > 100
    assert took < 5


def test_files_that_cannot_be_used_change_nothing(pki: Pki) -> None:
    now = 0.0
    found = tls.Reloading(pki.directory, "server", server=True, require_client=True, clock=lambda: now)
    before = found.current
    crl = pki.holder.crl.read_bytes()
    for nonsense in (b"", b"nonsense", crl[:100]):
        pki.holder.crl.write_bytes(nonsense)
        assert not found.look() and "crl.pem" in found.why
        assert found.current is before
    pki.holder.crl.write_bytes(crl)
    assert found.look() and found.why == ""
    pki.renew("server")
    assert found.current is not before
    renewed = found.current
    now += tls.LOOK_S + 0.01
    pki.renew("server")
    assert found.current is not renewed


def test_missing_files_are_told(tmp_path: Path, pki: Pki) -> None:
    with pytest.raises(BulkheadError, match="pki issue"):
        tls.server_context(pki.directory, "nobody", False)
    with pytest.raises(BulkheadError, match=r"ca\.pem"):
        tls.client_context(tmp_path)
