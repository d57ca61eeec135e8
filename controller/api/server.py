"""The API's process: its sockets, its connections, what it does every second, and how it ends.

Connections are uvicorn's, with time limits for headers and word of who is at the other end.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import resource
import signal
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from controller.api import access
from controller.api.access import Peer
from controller.api.app import Api
from controller.api.audit import Audit
from controller.api.listener import Listener
from controller.api.problem import MEDIA_TYPE, ApiProblem
from controller.api.settings import GROUP, Limits, Settings
from controller.api.view import View
from controller.api_socket import Listening
from controller.events import Event, Kind
from controller.problems import BulkheadError
from controller.records import Records
from controller.store import Store, Tls

LOG = logging.getLogger("bulkhead.api")
BACKLOG = 1024
STOP_S = 3.0
HANDSHAKE_S = 10.0
LOOK_S = 0.25
"""So often the state file is looked at, and everything else every ROUNDS times."""
ROUNDS = 4
_ESTABLISHED = 1


class Connection(HttpToolsProtocol):
    """One connection. `config` has the app; the rest is per server. `strangers` are those of callers without a name."""

    def __init__(self, config: uvicorn.Config, state: ServerState, limits: Limits, held: Counter[str]) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._limits = limits
        self._held = held
        self._holder: str | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = False
        self._wrong: ApiProblem | None = None

    def connection_made(self, transport: Any) -> None:
        """Find out who it is, once: what the kernel knows of a socket ends with it."""
        super().connection_made(transport)
        peer = peer_of(transport)
        caller = peer.principal()
        holder = caller.name if caller is not None else f"@{peer.origin}"
        # Whoever is not known yet must not keep those out who are.
        most = self._limits.connections // (2 if caller is not None else 8)
        if len(self.connections) > self._limits.connections or self._held[holder] >= most:
            detail = "Too many connections. Try again later."
            self._refuse(ApiProblem("unavailable", detail, headers={"Retry-After": "1"}))
            return
        self._held[holder] += 1
        self._holder = holder
        self.app_state = {"peer": peer, "caller": caller}
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer, and who it was."""
        self._forget_head()
        if self._holder is not None:
            self._held[self._holder] -= 1
            if not self._held[self._holder]:
                del self._held[self._holder]
            self._holder = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to headers."""
        if self._in_head or self._head_timer is not None:
            self._head_bytes += len(data)
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head and self._head_bytes > self._limits.header_bytes:
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        """Headers begin."""
        super().on_message_begin()
        self._in_head = True
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        """A path is not longer than headers may be."""
        super().on_url(url)
        if len(self.url) > self._limits.header_bytes:
            self._wrong = self._too_large()
            raise httptools.HttpParserError("the path is too long")

    def on_headers_complete(self) -> None:
        """Headers are over."""
        self._in_head = False
        self._forget_head()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self._limits.header_bytes:
            self._wrong = self._too_large()
            raise httptools.HttpParserError("the headers are too large")
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP."""
        self._refuse(self._wrong or ApiProblem("bad-request", f"{msg} Send HTTP/1.1."))

    def _too_large(self) -> ApiProblem:
        detail = f"Path and headers have at most {self._limits.header_bytes} bytes; send less."
        return ApiProblem("headers-too-large", detail)

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._limits.header_s, self._too_slow)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        self._refuse(ApiProblem("too-slow", f"The headers did not come within {self._limits.header_s:g} s."))

    def _refuse(self, problem: ApiProblem) -> None:
        """Answer by hand and hang up, where there is no request yet."""
        self._forget_head()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = problem.body()
            lines = [f"HTTP/1.1 {problem.status} {_phrase(problem.status)}", f"Content-Type: {MEDIA_TYPE}"]
            lines += [f"{name}: {value}" for name, value in problem.headers.items()]
            lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
            self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()


def _phrase(status: int) -> str:
    import http

    return http.HTTPStatus(status).phrase


def peer_of(transport: Any) -> Peer:
    """The other end of a connection."""
    sock = transport.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        return access.peer_of_unix(sock)
    theirs, ours = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not theirs or not ours:
        return Peer("?")
    if transport.get_extra_info("sslcontext") is not None:
        return Peer(theirs[0])
    peer = access.peer_of_tcp(theirs[:2], ours[:2])
    # One that was reset may have left its port to somebody else, whom the kernel's tables name now.
    return peer if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED else Peer(theirs[0])


class Server:
    """Serves an app on any number of listening sockets, which may come and go."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=int(limits.keep_alive_s),
        )
        self._config.load()
        self._state = ServerState()
        self._limits = limits
        self._held: Counter[str] = Counter()
        self._servers: list[asyncio.Server] = []
        self.tick()

    async def listen(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> asyncio.Server:
        """Serve a socket that listens, with TLS if given."""
        loop = asyncio.get_running_loop()
        more: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE_S} if tls is not None else {}
        server = await loop.create_server(self._connection, sock=sock, backlog=BACKLOG, **more)
        self._servers.append(server)
        return server

    def forget(self, server: asyncio.Server) -> None:
        """Serve one of the sockets no more; what is connected stays."""
        server.close()
        self._servers.remove(server)

    def tick(self) -> None:
        """Once a second: what time it is."""
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]

    async def close(self) -> None:
        """Let requests end that are quick, and hang up."""
        for server in self._servers:
            server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            _, late = await asyncio.wait(set(self._state.tasks), timeout=STOP_S)
            for task in late:
                task.cancel()
        for connection in list(self._state.connections):
            connection.transport.abort()

    def _connection(self) -> Connection:
        return Connection(self._config, self._state, self._limits, self._held)


# ------------------------------------------------------------------------------------------------------------- sockets


def unix_listener(path: Path) -> socket.socket:
    """Listen on a unix socket, mode 660, of group `bulkhead` where there is one. Raises `BulkheadError`."""
    from controller import unixsocket

    sock = unixsocket.bind(path, BACKLOG)
    with suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
        os.chmod(path, 0o660)
    sock.setblocking(False)
    return sock


def loopback_listener(port: int) -> socket.socket:
    """Listen on 127.0.0.1. Raises `BulkheadError`."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise BulkheadError(
            f"cannot listen on 127.0.0.1:{port}: {exc.strerror}; stop what listens there, or choose another with --port"
        ) from exc
    sock.setblocking(False)
    return sock


# ------------------------------------------------------------------------------------------------------------- process


class Process:
    """The API from start to end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._reread = False

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises `BulkheadError` where it cannot start."""
        settings = self._settings
        os.umask(0o077)
        try:
            settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise BulkheadError(
                f"cannot make the directory {settings.state_dir}: {exc.strerror}; name another with --state-dir"
            ) from exc
        audit = Audit(settings.events)
        store = Store(settings.remotes, Tls(*settings.store_tls) if settings.store_tls else None, lock=True)
        try:
            records = await asyncio.to_thread(store.start, 10.0)
            view = View(settings.state_file, settings.node, records)
            api = Api(settings, store, view, audit)
            api.check()
            async with api.mcp.run():
                await self._serve(api, store, audit)
        finally:
            await asyncio.to_thread(store.close)
            audit.close()

    async def _serve(self, api: Api, store: Store, audit: Audit) -> None:
        settings, loop = self._settings, asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._again)
        server = Server(api.guard, settings.limits)
        store.subscribe(lambda records: _soon(loop, self._follow, api, records))
        self._follow(api, store.records)
        await server.listen(unix_listener(settings.socket))
        where = [str(settings.socket)]
        if settings.port:
            await server.listen(loopback_listener(settings.port))
            where.append(f"127.0.0.1:{settings.port}")
        text = f"The API of {settings.node} answers on {', '.join(where)}."
        audit.write(Event(Kind.API_STARTED, text, data={"pid": os.getpid(), "listen": where}))

        async def opened(found: Listening, tls: ssl.SSLContext, names: frozenset[str]) -> Callable[[], None]:
            served = await server.listen(found.sock, tls)
            api.guard.hosts = names
            text = f"The API answers on {found.address}:{found.port} in its container, to tokens alone."
            audit.write(Event(Kind.API_STARTED, text, data={"listen": [f"{found.address}:{found.port}"]}))
            return lambda: server.forget(served)

        listener = Listener(settings, api.view, opened)
        try:
            await self._every_second(api, server, audit, listener)
        finally:
            settings.socket.unlink(missing_ok=True)
            await server.close()
            await api.operations.close()
            audit.write(Event(Kind.API_STOPPED, "The API was stopped; what was created stays."))

    def _again(self) -> None:
        self._reread = True

    def _follow(self, api: Api, records: Records) -> None:
        api.view.follow(records)
        api.operations.told()

    async def _every_second(self, api: Api, server: Server, audit: Audit, listener: Listener) -> None:
        rounds = 0
        while not self._stop.is_set():
            again, self._reread = self._reread, False
            api.view.look(again=again)
            if rounds % ROUNDS == 0:
                server.tick()
                audit.tick()
                api.operations.resume()
                await api.housekeeping()
                await listener.look()
            rounds += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOOK_S)


def _soon(loop: asyncio.AbstractEventLoop, function: Any, *args: Any) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(function, *args)


def serve(settings: Settings) -> None:
    """Run the API. Raises `BulkheadError` where it cannot start."""
    import uvloop

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # strangers' bad requests are no news of ours
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def main() -> None:
        await Process(settings).run()

    uvloop.run(main())
