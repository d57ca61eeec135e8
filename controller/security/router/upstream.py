"""Inference servers: connections to them, which are used again; whether they are well; who is asked next.

An answer is passed to a `Sink` from within the event that brings it: nothing is buffered and no task is woken for it.
Imports problems, heads, settings, `controller.security.tls`.
"""

from __future__ import annotations

import asyncio
import grp
import os
import socket as sockets
import ssl
import stat
import struct
from collections import deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Final, Protocol, cast

import httptools

from controller.security.router.heads import Headers
from controller.security.router.settings import Target
from controller.security.tls import Reloading, Revocations

CONNECT_S: Final = 3.0
PROBE_S: Final = 3.0
KEEP_S: Final = 20.0
"""Connections idle for longer are not used again: less than servers keep theirs, so that both never act at once."""
SILENT_S: Final = 8
MOST_IDLE: Final = 256
_MOST_HEAD: Final = 256 * 1024
_FALL, _RISE = 2, 2
_CODING, _LENGTH = b"transfer-encoding", b"content-length"


class Outcome(Enum):
    """How asking a server went."""

    DONE = "done"
    UNREACHED = "unreached"
    """It was not given the request."""
    UNANSWERED = "unanswered"
    """It was, and closed the connection without a byte."""
    BROKEN = "broken"
    """It sent a part, or something that is no answer."""
    LEFT = "left"
    """We gave up: the client has gone, or time was up."""


class Unreachable(Exception):
    """No connection could be made; the text says why, for an operator."""


class Sink(Protocol):
    """Where an answer goes."""

    def head(self, status: int, headers: Headers, length: int | None, bodiless: bool) -> None:
        """It begins. `length` is None where only its end will tell."""

    def data(self, data: bytes) -> None:
        """A part of its body."""

    def end(self) -> None:
        """All of it has come."""

    def flush(self) -> None:
        """Nothing more came for now."""


class Connection(asyncio.Protocol):
    """One connection to a server, for one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, over: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._over = over
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self.done: asyncio.Future[Outcome] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused = False
        self.usable = True
        """Whether it may be used for another request."""
        self.sent_all = True
        self._reset(False)

    def _reset(self, is_head: bool) -> None:
        self._is_head = is_head
        self._headers: list[tuple[bytes, bytes]] = []
        self._begun = False
        self._has_head = False
        self._interim = False
        self._by_end = False
        self._complete = False
        self._head_bytes = 0

    # - what the router does

    def ask(self, sink: Sink, data: bytes, *, is_head: bool, whole: bool) -> asyncio.Future[Outcome]:
        """Send a request, or its beginning where it is not `whole`; what comes of it."""
        assert self.transport is not None
        self._reset(is_head)
        self._sink = sink
        self.sent_all = whole
        self.done = self._loop.create_future()
        self.transport.write(data)
        return self.done

    def write(self, data: bytes) -> None:
        """More of the request."""
        if self.transport is not None:
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the server takes more."""
        if self._paused and self.transport is not None:
            self._drained = self._loop.create_future()
            await self._drained

    def pause(self, paused: bool) -> None:
        """Whether to leave the answer where it is for now."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading() if paused else self.transport.resume_reading()

    def drop(self, outcome: Outcome = Outcome.LEFT) -> None:
        """Give up."""
        self._finish(outcome)
        if self.transport is not None:
            self.transport.abort()

    def drop_if_silent(self) -> None:
        """Give up if nobody is at the other end any more."""
        if self.transport is not None and _is_silent(self.transport):
            self.drop(Outcome.BROKEN if self._begun else Outcome.UNANSWERED)

    # - what asyncio does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop has its own classes
        _notice_silence(self.transport)

    def data_received(self, data: bytes) -> None:
        if self._sink is None:
            self.drop()  # nobody has asked
            return
        self._begun = True
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD + len(data):
                self.drop(Outcome.BROKEN)
                return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, _Garbled):
            if not self._complete:
                self.drop(Outcome.BROKEN)
                return
            self.usable = False
        if self._sink is not None:
            self._sink.flush()
        if self._complete:
            self._finish(Outcome.DONE)

    def eof_received(self) -> None:
        """asyncio closes the connection then."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self.transport = None
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._sink is not None and self._by_end and exc is None:
            self._sink.end()
            self._sink.flush()
            self._finish(Outcome.DONE)
        self._finish(Outcome.BROKEN if self._begun else Outcome.UNANSWERED)
        self._over(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _finish(self, outcome: Outcome) -> None:
        if self._sink is None:
            return
        self._sink = None
        if outcome is not Outcome.DONE or not self.sent_all or self._is_head or self._by_end:
            self.usable = False
        if self.done is not None and not self.done.done():
            self.done.set_result(outcome)

    # - what the parser finds

    def on_message_begin(self) -> None:
        if self._complete:
            raise _Garbled  # an answer that nobody has asked for
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if b"\n" in value or b"\r" in value or b"\0" in value:
            raise _Garbled
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._interim:
            if status == 101:
                raise _Garbled
            return
        self._has_head = True
        codings = [value.lower() for name, value in self._headers if len(name) == 17 and name.lower() == _CODING]
        lengths = {value for name, value in self._headers if len(name) == 14 and name.lower() == _LENGTH}
        if (codings and (codings != [b"chunked"] or lengths)) or len(lengths) > 1:
            raise _Garbled
        bodiless = self._is_head or status in (204, 304)
        self._by_end = not codings and not lengths and not bodiless
        length = int(lengths.pop()) if lengths else None
        assert self._sink is not None
        self._sink.head(status, self._headers, length, bodiless)
        if self._is_head:
            self._end()

    def on_body(self, data: bytes) -> None:
        if self._sink is not None and not self._complete:
            self._sink.data(data)

    def on_message_complete(self) -> None:
        if self._interim or self._complete:
            return
        if not self._parser.should_keep_alive():
            self.usable = False
        self._end()

    def _end(self) -> None:
        self._complete = True
        if self._sink is not None:
            self._sink.end()


class _Garbled(Exception):
    """What came is no answer, or could be read in two ways."""


class Upstream:
    """One server: its idle connections, and whether it is well."""

    def __init__(
        self,
        target: Target,
        loop: asyncio.AbstractEventLoop,
        tls: Reloading | None,
        told: Callable[[Upstream], None],
    ) -> None:
        self.target = target
        self.host = target.name.encode() if target.socket is None else b"localhost"
        self.well = True
        self.why = ""
        self.active = 0
        self.failures = 0
        self._loop, self._tls, self._told = loop, tls, told
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._fell = 0
        self._rose = 0
        self._known = False

    # - connections

    def idle(self, now: float) -> Connection | None:
        """A connection that is open already, the one used last first."""
        while self._idle:
            found = self._idle.pop()
            if found.usable and found.transport is not None and not found.transport.is_closing():
                if now - found.idle_since < KEEP_S:
                    return found
                found.transport.close()
        return None

    async def connect(self) -> Connection:
        """A new connection. Raises `Unreachable`."""
        target = self.target
        try:
            async with asyncio.timeout(CONNECT_S):
                if target.socket is not None:
                    check_socket(target.socket, target.group)
                    _, made = await self._loop.create_unix_connection(self._new, str(target.socket))
                    return made
                assert self._tls is not None and target.address is not None
                _, made = await self._loop.create_connection(
                    self._new, target.address, target.port, ssl=self._tls.current, server_hostname=target.name
                )
                return made
        except TimeoutError:
            raise Unreachable(f"no connection in {CONNECT_S:g} s") from None
        except ssl.SSLCertVerificationError as exc:
            raise Unreachable(f"its certificate is refused: {exc.verify_message}") from None
        except ssl.SSLError as exc:
            raise Unreachable(f"TLS: {exc.reason or 'failed'}") from None
        except OSError as exc:
            raise Unreachable(exc.strerror or os.strerror(exc.errno) if exc.errno else type(exc).__name__) from None

    def _new(self) -> Connection:
        made = Connection(self._loop, self._all.discard)
        self._all.add(made)
        return made

    def release(self, connection: Connection, now: float) -> None:
        """Keep a connection for another request, if it may be."""
        if connection.transport is None:
            return
        if connection.usable and len(self._idle) < MOST_IDLE:
            connection.idle_since = now
            self._idle.append(connection)
        else:
            connection.transport.abort() if not connection.sent_all else connection.transport.close()

    def sweep(self, now: float, revoked: Revocations | None) -> None:
        """Close what is idle for long, and whatever leads nowhere or to someone whose certificate is revoked by now."""
        while self._idle and now - self._idle[0].idle_since > KEEP_S:
            self._idle.popleft().drop()
        for each in list(self._all):
            each.drop_if_silent()
        if revoked is None:
            return
        for each in list(self._all):
            tls = each.transport.get_extra_info("ssl_object") if each.transport is not None else None
            if tls is not None and revoked.peer(tls):
                each.drop(Outcome.BROKEN)
                self.failed("its certificate is revoked")

    def close(self) -> None:
        """Close all."""
        for each in list(self._all):
            each.drop()

    # - health

    def failed(self, why: str) -> None:
        """It cannot be reached: it is not asked any more until it is well."""
        self._fell, self._rose = _FALL, 0
        self._set(False, why)

    async def look(self) -> None:
        """Ask how it is."""
        why = await self._probe()
        if not why:
            self._fell, self._rose = 0, self._rose + 1
            if self._rose >= _RISE or not self._known:
                self._set(True, "")
            return
        self._fell, self._rose = self._fell + 1, 0
        if self._fell >= _FALL or not self._known:
            self._set(False, why)
        else:
            self.why = why

    async def _probe(self) -> str:
        try:
            connection = await self.connect()
        except Unreachable as exc:
            return str(exc)
        answer = _Status()
        asked = b"GET /health HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % self.host
        try:
            async with asyncio.timeout(PROBE_S):
                outcome = await connection.ask(answer, asked, is_head=False, whole=True)
        except TimeoutError:
            return f"/health is not answered in {PROBE_S:g} s"
        finally:
            connection.drop()
        if outcome is not Outcome.DONE:
            return "/health is not answered"
        return "" if 200 <= answer.status < 300 else f"/health is answered with {answer.status}"

    def _set(self, well: bool, why: str) -> None:
        changed = well != self.well or not self._known
        self.well, self.why, self._known = well, why, True
        if not well:
            for each in self._idle:
                each.drop()
            self._idle.clear()
        if changed:
            self._told(self)


class _Status:
    status = 0

    def head(self, status: int, headers: Headers, length: int | None, bodiless: bool) -> None:
        self.status = status

    def data(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def flush(self) -> None: ...


class Upstreams:
    """All servers."""

    def __init__(self, servers: list[Upstream]) -> None:
        self.servers = servers
        self._turn = 0

    def choose(self, besides: set[Upstream]) -> Upstream | None:
        """Who is asked next: of those that are well the one with the fewest requests, in turn where they are equal."""
        found = [each for each in self.servers if each.well and each not in besides]
        if len(found) < 2:
            return found[0] if found else None
        self._turn += 1
        turned = found[self._turn % len(found) :] + found[: self._turn % len(found)]
        return min(turned, key=lambda each: each.active)


def check_socket(path: Path, group: str | None) -> None:
    """Raise `Unreachable` unless only the right ones can be behind `path`, and ask there."""
    try:
        found = path.stat()  # through a link, as connecting does
    except OSError as exc:
        raise Unreachable(f"{path}: {exc.strerror}") from None
    if not stat.S_ISSOCK(found.st_mode):
        raise Unreachable(f"{path} is no socket")
    mode = stat.S_IMODE(found.st_mode)
    if mode != 0o660:
        raise Unreachable(f"{path} has mode {mode:o}; expected 660")
    if group is not None and found.st_gid != _gid(group):
        raise Unreachable(f"{path} has group {_group(found.st_gid)}; expected {group}")


def _gid(group: str) -> int | None:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _notice_silence(transport: asyncio.Transport) -> None:
    """Have the kernel end a connection whose other end acknowledges nothing for `SILENT_S` while there is nothing to say: the
    way is gone, or it is cut off. A server that merely thinks for long is not meant; its kernel answers. tcp(7).

    While there is something to say see `_is_silent`: TCP_USER_TIMEOUT would end connections to a server that is there, and
    merely has no room for more of a request.
    """
    found = transport.get_extra_info("socket")
    if found is None or found.family not in (sockets.AF_INET, sockets.AF_INET6):
        return
    found.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
    found.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPIDLE, SILENT_S // 2)
    found.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPINTVL, 1)
    found.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPCNT, SILENT_S // 2)


def _is_silent(transport: asyncio.Transport) -> bool:
    """Whether the other end has acknowledged nothing for `SILENT_S`, and something is sent again and again."""
    found = transport.get_extra_info("socket")
    if found is None or found.family not in (sockets.AF_INET, sockets.AF_INET6):
        return False
    try:
        # struct tcp_info of linux/tcp.h: tcpi_probes (of a closed window), tcpi_unacked, tcpi_last_ack_recv (ms)
        probes, unacked, acknowledged_ms = struct.unpack(
            "3xB20xI28xI", found.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, 60)
        )
    except OSError:
        return False
    return bool(probes or unacked) and acknowledged_ms > SILENT_S * 1000
