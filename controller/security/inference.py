"""A small inference server, for tests, the lab and to try a router with: it streams back the words it is given.

`GET /health`, and `POST /v1/chat` with `{"messages": [{"content": "…"}]}` or `{"prompt": "…"}`. It listens on a unix socket
(mode 660, of the router's group), or on this machine's WireGuard address with mutual TLS, where only the named peers may
ask. Never on every address. Imports problems, `controller.security.tls`, unixsocket.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import ipaddress
import json
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from controller.problems import BulkheadError
from controller.security.tls import Reloading, Revocations, identity
from controller.unixsocket import bind

BODY_BYTES: Final = 8 * 1024 * 1024
_REVOKED_S: Final = 1.0
_KEEP_S: Final = 75.0
"""Longer than routers keep idle connections, so that it is they who close them."""


@dataclass(frozen=True, slots=True)
class Inference:
    """Where to listen. Either `socket` and its `group`, or `address` and `port` with the certificate of `name` in `pki`;
    `routers` may ask there. `token_s` is how long it thinks about each word."""

    name: str = "inference"
    socket: Path | None = None
    group: str | None = None
    address: str | None = None
    port: int = 8001
    pki: Path | None = None
    routers: tuple[str, ...] = ()
    token_s: float = 0.02


class _Server:
    def __init__(self, settings: Inference) -> None:
        self._settings = settings
        self._open: set[asyncio.Transport] = set()
        self._revoked = Revocations(settings.pki) if settings.pki is not None else None

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES, middlewares=[self._only_routers])
        app.add_routes([web.get("/health", self._health), web.post("/v1/chat", self._chat)])
        return app

    @web.middleware
    async def _only_routers(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        transport = request.transport
        tls = transport.get_extra_info("ssl_object") if transport is not None else None
        if self._settings.pki is not None:
            if tls is None or identity(tls) not in self._settings.routers:
                return web.json_response({"title": "Forbidden", "status": 403}, status=403)
            assert transport is not None
            self._open.add(transport)
        return await handler(request)

    async def cut_revoked(self) -> None:
        """End the connections of whoever is revoked by now."""
        while self._revoked is not None:
            await asyncio.sleep(_REVOKED_S)
            for each in list(self._open):
                tls = each.get_extra_info("ssl_object")
                if each.is_closing() or tls is None:
                    self._open.discard(each)
                elif self._revoked.peer(tls):
                    self._open.discard(each)
                    each.abort()

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "up", "name": self._settings.name})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            words = _words(await request.json())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return web.json_response(
                {"title": "expected a prompt, or messages with content", "status": 400}, status=400
            )
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        with contextlib.suppress(ConnectionResetError):  # whoever asked has gone
            await answer.prepare(request)
            for word in words:
                data = json.dumps({"token": word, "at": time.time()})
                await answer.write(f"data: {data}\n\n".encode())
                await asyncio.sleep(self._settings.token_s)
            await answer.write(b"data: [DONE]\n\n")
            await answer.write_eof()
        return answer


def _words(asked: object) -> list[str]:
    if not isinstance(asked, dict):
        raise TypeError
    text = asked["prompt"] if "prompt" in asked else asked["messages"][-1]["content"]
    return str(text).split()


async def _serve(settings: Inference, ready: Callable[[], None]) -> None:
    server = _Server(settings)
    # No access log, and no tracebacks: what is asked stays out of both.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL + 1)
    runner = web.AppRunner(server.app(), access_log=None, keepalive_timeout=_KEEP_S, handle_signals=False)
    await runner.setup()
    listening, tls = _listening(settings)
    await web.SockSite(runner, listening, ssl_context=tls, shutdown_timeout=5.0).start()
    cutting = asyncio.create_task(server.cut_revoked())
    stop = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    ready()
    try:
        await stop.wait()
    finally:
        cutting.cancel()
        await runner.cleanup()
        if settings.socket is not None:
            settings.socket.unlink(missing_ok=True)


def _listening(settings: Inference) -> tuple[socket.socket, ssl.SSLContext | None]:
    if settings.socket is not None:
        made = bind(settings.socket, backlog=128)
        try:
            if settings.group is not None:
                os.chown(settings.socket, -1, _gid(settings.group))
            os.chmod(settings.socket, 0o660)
        except OSError as exc:
            raise BulkheadError(
                f"the socket {settings.socket} cannot be given to group {settings.group}: {exc.strerror}; "
                "run this as a member of that group, or as root"
            ) from exc
        return made, None
    if settings.address is None or settings.pki is None:
        raise BulkheadError("an inference server needs a socket, or an address and certificates")
    address = ipaddress.ip_address(settings.address)
    if address.is_unspecified:
        raise BulkheadError("an inference server does not listen on every address; name its WireGuard address")
    tls = Reloading(settings.pki, settings.name, server=True, require_client=True, alpn=("http/1.1",))
    made = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.address, settings.port))
        made.listen(128)
    except OSError as exc:
        made.close()
        raise BulkheadError(
            f"cannot listen on {settings.address} port {settings.port}: {exc.strerror}; is the WireGuard interface up?"
        ) from exc
    return made, tls.server


def _gid(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise BulkheadError(
            f"there is no group {group}; make it, or name another in security.inference.group"
        ) from None


def serve(settings: Inference, ready: Callable[[], None] = lambda: None) -> None:
    """Run until SIGTERM. Raises `BulkheadError`."""
    asyncio.run(_serve(settings, ready))
