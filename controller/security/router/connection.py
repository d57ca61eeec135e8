"""A client's connection: reads requests with aiohttp's parser, has them let in, passes them on. Imports the others here.

Nothing that a client says is ever logged: exceptions of the parser quote it, so only their class is counted.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from controller.problems import BulkheadError
from controller.security.hpke import NEXT_NONCE, Opened, Refused, new_binding
from controller.security.router import heads
from controller.security.router.answers import Plain, Sealed, own, refused
from controller.security.router.heads import Refusal, Request
from controller.security.router.upstream import Connection, Outcome, Unreachable, Upstream
from controller.security.tls import identity

if TYPE_CHECKING:
    from controller.security.router.worker import Worker

MOST_PIPELINED: Final = 16
MOST_HEAD: Final = 64 * 1024
_WINDOW: Final = 64 * 1024
_NOT_UNDERSTOOD: Final = (400, 405, 417, 501, 505)
_LINGER_S: Final = 1.0
_LINGER_BYTES: Final = 4 * 1024 * 1024
_SEALED_EXTRA: Final = 8192
"""How much longer than its content a sealed body may be: `Opener` says exactly."""
CONFIG: Final = b"/hpke/config"
HEALTH: Final = b"/healthz"


@dataclass(slots=True)
class Let:
    """A request that was let in. `body` is all of it where it was sealed."""

    request: Request
    client: str
    known: bool
    opened: Opened | None = None


class Client(BaseProtocol):
    """One connection. A task reads requests in turn; answers go out of the server's events."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker.loop)
        self._worker = worker
        self._reader = self._parser = HttpRequestParser(
            self,
            worker.loop,
            _WINDOW,
            max_line_size=8190,
            max_headers=100,
            max_field_size=8190,
            auto_decompress=False,
        )
        self._queue: deque[tuple[RawRequestMessage, StreamReader]] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._asked: Connection | None = None
        self._out: Plain | Sealed | None = None
        self._payload: StreamReader | None = None
        self._head_bytes = 0
        self._garbled = False
        self._discarding = 0
        self._late = False
        self.busy = False
        self.deadline = math.inf
        self.moved_at = 0.0
        """When a byte was last read or written."""
        self._closes = False
        self.opened: Opened | None = None
        self.peer = b""
        self.name: str | None = None
        self.tls: ssl.SSLObject | None = None
        self.binding = b""

    # - what asyncio does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        worker = self._worker
        address = transport.get_extra_info("peername")
        self.peer = str(address[0]).encode() if isinstance(address, tuple) else b"unix"
        self.tls = transport.get_extra_info("ssl_object")
        if worker.settings.client_certificates and self.tls is not None:
            self.name = identity(self.tls)
        if worker.opener is not None:
            self.binding = new_binding()
        if not worker.entered(self):
            assert self.transport is not None
            self.transport.abort()
            return
        self.deadline = self._loop.time() + worker.settings.limits.header_s
        self._task = self._loop.create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            self._discarding -= len(data)
            if self._discarding <= 0:
                self._abort()
            return
        if self._garbled:
            return
        self.moved_at = self._loop.time()
        if self._payload is None or self._payload.is_eof():
            self._head_bytes += len(data)
        try:
            messages, upgraded, _ = self._reader.feed_data(data)
        except Exception as exc:  # the parser's, which quotes what it has read
            self._broken(type(exc))
            return
        for message, payload in messages:
            self._payload = payload
            self._head_bytes = 0
            self._queue.append((message, payload))
        if upgraded or self._head_bytes > MOST_HEAD or len(self._queue) > MOST_PIPELINED:
            self._garbled = True  # what comes after is not read any more
        if self._waiting is not None and not self._waiting.done() and (self._queue or self._garbled):
            self._waiting.set_result(None)

    def _broken(self, kind: type[BaseException]) -> None:
        self._garbled = True
        self._worker.figures.add("cut", "garbled")
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(_Garbled())
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def eof_received(self) -> None:
        """asyncio closes the connection then."""

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(None)
        self._worker.left(self)
        if self._asked is not None:
            self._asked.drop()
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(_Gone())
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._asked is not None:
            self._asked.pause(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.moved_at = self._loop.time()
        if self._asked is not None:
            self._asked.pause(False)

    # - what answers need

    def write(self, data: bytes) -> None:
        """Send it."""
        if self.transport is not None:
            self.moved_at = self._loop.time()
            self.transport.write(data)

    @property
    def extra(self) -> bytes:
        """Header lines that every answer has on this connection."""
        opener = self._worker.opener
        return b"" if opener is None else b"%s: %s\r\n" % (NEXT_NONCE.encode(), opener.nonce(self.binding).encode())

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this answer. Once its head is out the client knows, so it stays as it was said."""
        if self._worker.draining:
            self._closes = True
        return self._closes

    def must_close(self) -> None:
        """Only the end of the connection tells the end of the answer."""
        self._closes = True

    # - what the worker's clock does

    def tick(self, now: float) -> None:
        """Whether time is up."""
        limits = self._worker.settings.limits
        if now >= self.deadline or (self.busy and now - self.moved_at > limits.idle_s):
            self._time_is_up()
        elif self.opened is not None and self._worker.opener is not None:
            if not self._worker.opener.active(self.opened.client):
                self._worker.figures.add("cut", "revoked")
                self._abort()

    def _time_is_up(self) -> None:
        self._late = True
        if self.busy and self._asked is not None:
            self._asked.drop()  # the task tells the client, if nothing was told yet
            self.deadline = self._loop.time() + _LINGER_S
            self.moved_at = self._loop.time()
        elif self.busy and self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(_Late())
            self.deadline = self._loop.time() + _LINGER_S
            self.moved_at = self._loop.time()
        elif self._head_bytes and not self.busy:
            self._closes = True
            self.write(refused(self, Refusal(408, "The head of the request took too long."), is_head=False))
            self._close()
        else:
            self._close()

    def drain(self) -> None:
        """The next answer, or the one whose head is not out yet, is the last; an idle connection ends after a while."""
        if not self.busy:
            self.deadline = min(self.deadline, self._loop.time() + self._worker.linger_s)

    def cut(self, why: str) -> None:
        """End it at once."""
        self._worker.figures.add("cut", why)
        self._abort()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        self.deadline = self._loop.time() + _LINGER_S

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    # - requests

    async def _serve(self) -> None:
        worker = self._worker
        try:
            while self.transport is not None:
                if not self._queue:
                    if self._garbled:
                        self._refuse_garbled()
                        return
                    self._waiting = self._loop.create_future()
                    await self._waiting
                    continue
                message, payload = self._queue.popleft()
                await self._one(message, payload)
                if self._closes:
                    self._linger(payload)
                    return
                # A head that was begun has less time than an idle connection.
                limits = worker.settings.limits
                patience_s = worker.linger_s if worker.draining else limits.idle_s
                self.deadline = self._loop.time() + (limits.header_s if self._head_bytes else patience_s)
        except asyncio.CancelledError:
            pass
        except Exception as exc:
            worker.defect(exc)
            self._abort()

    def _refuse_garbled(self) -> None:
        self._closes = True
        self.write(refused(self, Refusal(400, "This is not a request as HTTP/1.1 has it."), is_head=False))
        self._worker.figures.add("requests", "400")
        self._linger(None)

    def _linger(self, payload: StreamReader | None) -> None:
        """Close, but read for a moment what the client still sends: it may otherwise lose the answer."""
        if self.transport is None:
            return
        if payload is not None and payload.is_eof() and not self._garbled:
            self._close()
            return
        self._discarding = _LINGER_BYTES
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()
        self._loop.call_later(_LINGER_S / 4, self._close)
        self.deadline = self._loop.time() + _LINGER_S

    async def _one(self, message: RawRequestMessage, payload: StreamReader) -> None:
        worker = self._worker
        began = time.monotonic()  # the loop's own time has milliseconds only
        self.moved_at = self._loop.time()
        self.deadline = self.moved_at + worker.settings.limits.request_s
        self._closes = message.should_close
        self.busy = True
        worker.begin()
        done = _Done("-")
        is_head = message.method == "HEAD"
        try:
            await self._answer(message, payload, done)
        except Refusal as exc:
            # What comes after a request that was not understood is not read as one.
            if not payload.is_eof() or exc.status in _NOT_UNDERSTOOD:
                self._closes = True
            if self._out is not None and self._out.status:
                # Part of an answer is out already: another one in its middle would be taken for its body.
                worker.figures.add("cut", "refused")
                self._abort()
                raise asyncio.CancelledError from None
            done.status = exc.status
            self.write(refused(self, exc, is_head=is_head))
        finally:
            self.busy = False
            self._asked = None
            self._out = None
            self.opened = None
            worker.end(done, time.monotonic() - began)

    async def _answer(self, message: RawRequestMessage, payload: StreamReader, done: _Done) -> None:
        raw = message.raw_headers
        request = heads.checked(message.method, message.path, (message.version[0], message.version[1]), raw)
        if message.upgrade:
            raise Refusal(501, "Other protocols are not passed on.")
        if request.target == HEALTH:
            self._own(message, done, *self._worker.health())
            return
        worker = self._worker
        opener = worker.opener
        if opener is not None and request.target == CONFIG and request.method == "GET":
            self._admit(self.peer)
            try:
                told = worker.config(self.binding)
            except BulkheadError as exc:
                worker.defect(exc)
                raise Refusal(503, "The router's keys cannot be used.", retry_after_s=60) from None
            self._own(message, done, 200, b"application/json", told)
            return
        most = worker.settings.limits.body_bytes
        if request.length is not None and request.length > most + (_SEALED_EXTRA if opener is not None else 0):
            raise Refusal(413, f"Bodies may have {most} bytes.")
        worker.room()
        if request.expects and not payload.is_eof():
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body: bytes | None = b"" if payload is EMPTY_PAYLOAD else None
        headers = heads.passed_on(raw)
        client = self.name
        chunks = message.version >= (1, 1)
        if opener is not None:
            if request.method == "HEAD":
                raise Refusal(405, "An answer without a body cannot be sealed.")
            body = await self._whole(payload, most + _SEALED_EXTRA)
            opened = self._open(message, body)
            self.opened = opened
            body, client = opened.body, opened.client.name
            done.client = client
            self._admit(opened.client.id.encode())
            headers = [pair for pair in headers if pair[0].lower() != b"content-type"]
            if body and opened.content_type:
                headers.append((b"Content-Type", opened.content_type.encode("latin-1")))
            answer: Plain | Sealed = Sealed(self, opened.answer(), chunks=chunks)
        else:
            done.client = client or self.peer.decode()
            self._admit(done.client.encode())
            if body is None and payload.is_eof():
                body = payload.read_nowait()
                if len(body) > most:
                    raise Refusal(413, f"Bodies may have {most} bytes.")
            answer = Plain(self, is_head=message.method == "HEAD", chunks=chunks)
        self._out = answer
        length = request.length if body is None else len(body)
        done.received = length or 0
        outgoing = _Outgoing(request, headers, _label(client), body, length)
        await self._pass_on(outgoing, payload, answer, done)

    def _own(self, message: RawRequestMessage, done: _Done, status: int, kind: bytes, body: bytes) -> None:
        done.status = status
        self.write(own(self, status, kind, body, is_head=message.method == "HEAD"))

    def _admit(self, who: bytes) -> None:
        wait = self._worker.shared.admit(who, self._loop.time())
        if wait > 0:
            raise Refusal(429, "You ask too often.", retry_after_s=math.ceil(wait))

    def _open(self, message: RawRequestMessage, body: bytes) -> Opened:
        opener = self._worker.opener
        assert opener is not None
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.raw_headers]
        try:
            return opener.open(message.method, message.path, headers, body, self.binding)
        except Refused as exc:
            self._worker.figures.add("sealed_refused", exc.code)
            raise Refusal(exc.status, str(exc)) from None
        except BulkheadError as exc:
            self._worker.defect(exc)
            raise Refusal(503, "The router's keys cannot be used.", retry_after_s=60) from None

    async def _whole(self, payload: StreamReader, most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while part := await self._part(payload):
            size += len(part)
            if size > most:
                raise Refusal(413, "The body is too long.")
            parts.append(part)
        return b"".join(parts)

    async def _part(self, payload: StreamReader) -> bytes:
        try:
            return await payload.readany()
        except _Garbled:
            raise Refusal(400, "The body is not as HTTP/1.1 has it.") from None
        except _Late:
            raise Refusal(408, "The body took too long.") from None
        except _Gone:
            raise asyncio.CancelledError from None

    # - servers

    async def _pass_on(self, out: _Outgoing, payload: StreamReader, answer: Plain | Sealed, done: _Done) -> None:
        worker = self._worker
        tried: set[Upstream] = set()
        again = out.request.method in heads.SAFE and out.body == b""
        while True:
            server = worker.upstreams.choose(tried)
            if server is None:
                if tried:
                    raise Refusal(502, "The server did not answer.")
                raise Refusal(503, "No server is there to answer; try again soon.", retry_after_s=2)
            outcome = await self._ask(server, out, payload, answer, done)
            done.server = server.target.name
            if answer.status:
                done.status, done.sent = answer.status, answer.sent
                if outcome is Outcome.DONE:
                    return
                # Part of an answer is out: only a broken connection tells the client so.
                worker.figures.add("cut", outcome.value)
                self._abort()
                raise asyncio.CancelledError
            if self._late:
                raise Refusal(504, "The server took too long.")
            if self.transport is None:
                raise asyncio.CancelledError
            if outcome is Outcome.DONE or outcome is Outcome.BROKEN:
                raise Refusal(502, "The server did not answer as HTTP has it.")
            if outcome is Outcome.UNANSWERED and not again:
                raise Refusal(502, "The server did not answer.")
            tried.add(server)
            worker.figures.add("retries")

    async def _ask(
        self, server: Upstream, out: _Outgoing, payload: StreamReader, answer: Plain | Sealed, done: _Done
    ) -> Outcome:
        """Ask one server."""
        now = self._loop.time()
        server.active += 1
        connection: Connection | None = None
        try:
            connection = server.idle(now)
            used = connection is not None
            if connection is None:
                try:
                    connection = await server.connect()
                except Unreachable as exc:
                    server.failed(str(exc))
                    return Outcome.UNREACHED
            outcome = await self._exchange(server, connection, out, payload, answer, done)
            if outcome is Outcome.UNANSWERED and used and out.request.method in heads.SAFE and out.body == b"":
                # It had closed an idle connection just then; that says nothing of how it is.
                connection = await server.connect()
                outcome = await self._exchange(server, connection, out, payload, answer, done)
            if outcome not in (Outcome.DONE, Outcome.LEFT):
                server.failures += 1
            return outcome
        except Unreachable as exc:
            server.failed(str(exc))
            return Outcome.UNREACHED
        finally:
            server.active -= 1
            if connection is not None:
                server.release(connection, self._loop.time())

    async def _exchange(
        self,
        server: Upstream,
        connection: Connection,
        out: _Outgoing,
        payload: StreamReader,
        answer: Plain | Sealed,
        done: _Done,
    ) -> Outcome:
        if self.transport is None:
            return Outcome.LEFT
        head = heads.request_head(
            out.request, out.headers, host=server.host, peer=self.peer, client=out.client, length=out.length
        )
        self._asked = connection
        whole = out.body is not None
        future = connection.ask(answer, head + (out.body or b""), is_head=out.request.method == "HEAD", whole=whole)
        if not whole:
            await self._pump(connection, future, out, payload, done)
        try:
            return await future
        except asyncio.CancelledError:
            connection.drop()
            raise

    async def _pump(
        self,
        connection: Connection,
        answered: asyncio.Future[Outcome],
        out: _Outgoing,
        payload: StreamReader,
        done: _Done,
    ) -> None:
        """Send the body as it comes, until it ends or the answer does."""
        pumping = self._loop.create_task(self._send_body(connection, out, payload, done))
        try:
            await asyncio.wait((pumping, answered), return_when=asyncio.FIRST_COMPLETED)
            if pumping.done():
                pumping.result()
            else:
                self._closes = True
        except BaseException:
            connection.drop()
            raise
        finally:
            pumping.cancel()

    async def _send_body(self, connection: Connection, out: _Outgoing, payload: StreamReader, done: _Done) -> None:
        most = self._worker.settings.limits.body_bytes
        size = 0
        while part := await self._part(payload):
            size += len(part)
            done.received = size
            if size > most:
                raise Refusal(413, f"Bodies may have {most} bytes.")
            connection.write(part if out.length is not None else b"%x\r\n%s\r\n" % (len(part), part))
            await connection.drain()
        if out.length is None:
            connection.write(b"0\r\n\r\n")
        connection.sent_all = True


def _label(client: str | None) -> bytes | None:
    """A client's name as a header's value."""
    return client.encode("ascii", "replace") if client is not None and client.isprintable() else None


@dataclass(slots=True)
class _Outgoing:
    """A request as it goes to a server. `body` is None where it is still coming, `length` None where it is chunked."""

    request: Request
    headers: list[tuple[bytes, bytes]]
    client: bytes | None
    body: bytes | None
    length: int | None


@dataclass(slots=True)
class _Done:
    """What is counted of a request."""

    client: str
    status: int = 0
    received: int = 0
    sent: int = 0
    server: str = "-"


Done = _Done


class _Garbled(Exception):
    """The client's bytes are no body."""


class _Late(Exception):
    """They took too long."""


class _Gone(Exception):
    """The client has closed the connection."""


def described(value: Any) -> str:
    """What may be said of an unexpected error: its class and where it was raised, nothing of its text."""
    trace = getattr(value, "__traceback__", None)
    place = ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(value).__name__} at {place}" if place else type(value).__name__
