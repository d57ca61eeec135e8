"""How an answer reaches a client: as it is, or sealed. Imports heads, upstream's names, `controller.security.hpke`."""

from __future__ import annotations

from typing import Final, Protocol

from controller.security.hpke import MEDIA_TYPE, AnswerSealer
from controller.security.router.heads import Headers, Refusal, answered, reason

_LAST: Final = b"0\r\n\r\n"
# Of our own answers and of sealed ones: nothing on the way keeps or guesses.
_OURS: Final = b"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"


class Client(Protocol):
    """The connection that an answer goes to."""

    def write(self, data: bytes) -> None:
        """Send it."""

    @property
    def extra(self) -> bytes:
        """Header lines that every answer has on this connection."""

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this answer, decided when its head is sent."""

    def must_close(self) -> None:
        """It does: only the end of the connection tells the end of the answer."""


class Plain:
    """Passes an answer on, part by part. What came with one event goes out with one write."""

    def __init__(self, client: Client, *, is_head: bool, chunks: bool) -> None:
        self._client = client
        self._is_head = is_head
        self._may_chunk = chunks
        self._chunked = False
        self._silent = False
        self._out: list[bytes] = []
        self.status = 0
        self.sent = 0
        self.ended = False

    def head(self, status: int, headers: Headers, length: int | None, bodiless: bool) -> None:
        self.status = status
        self._silent = bodiless
        self._chunked = length is None and not bodiless and self._may_chunk
        if length is None and not bodiless and not self._chunked:
            self._client.must_close()
        out = [b"HTTP/1.1 %s\r\n" % reason(status)]
        out += [b"%s: %s\r\n" % pair for pair in answered(headers)]
        if length is not None and status != 204:
            out.append(b"Content-Length: %d\r\n" % length)
        elif self._chunked:
            out.append(b"Transfer-Encoding: chunked\r\n")
        out.append(self._client.extra)
        if self._client.closes:
            out.append(b"Connection: close\r\n")
        out.append(b"\r\n")
        self._out += out

    def data(self, data: bytes) -> None:
        if self._silent or not data:
            return
        self.sent += len(data)
        self._out += [b"%x\r\n" % len(data), data, b"\r\n"] if self._chunked else [data]

    def end(self) -> None:
        self.ended = True
        if self._chunked:
            self._out.append(_LAST)

    def flush(self) -> None:
        if self._out:
            self._client.write(b"".join(self._out))
            self._out = []


class Sealed:
    """Seals an answer for whoever sealed the request. Status and content type go inside; outside it is always 200."""

    def __init__(self, client: Client, sealer: AnswerSealer, *, chunks: bool) -> None:
        self._client = client
        self._sealer = sealer
        self._chunks = chunks
        self._out: list[bytes] = []
        self.status = 0
        self.sent = 0
        self.ended = False

    def head(self, status: int, headers: Headers, length: int | None, bodiless: bool) -> None:
        self.status = status
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        if not self._chunks:
            self._client.must_close()
        framing = b"Transfer-Encoding: chunked\r\n" if self._chunks else b""
        closing = b"Connection: close\r\n" if self._client.closes else b""
        self._client.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s%s%s%s\r\n"
            % (MEDIA_TYPE.encode(), framing, _OURS, self._client.extra, closing)
        )
        self._put(self._sealer.begin(status, kind.decode("latin-1")))

    def data(self, data: bytes) -> None:
        if data:
            self.sent += len(data)
            self._put(self._sealer.chunk(data))

    def end(self) -> None:
        self.ended = True
        self._put(self._sealer.end())
        if self._chunks:
            self._out.append(_LAST)

    def flush(self) -> None:
        if self._out:
            self._client.write(b"".join(self._out))
            self._out = []

    def _put(self, data: bytes) -> None:
        self._out += [b"%x\r\n" % len(data), data, b"\r\n"] if self._chunks else [data]


def own(client: Client, status: int, content_type: bytes, body: bytes, extra: bytes = b"", *, is_head: bool) -> bytes:
    """An answer of the router itself, in one piece."""
    closing = b"Connection: close\r\n" if client.closes else b""
    head = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n" % (reason(status), content_type, len(body))
    return head + _OURS + extra + client.extra + closing + b"\r\n" + (b"" if is_head else body)


def refused(client: Client, refusal: Refusal, *, is_head: bool) -> bytes:
    """The answer that says why there is none."""
    wait = refusal.retry_after_s
    extra = b"Retry-After: %d\r\n" % wait if wait is not None else b""
    return own(client, refusal.status, b"application/problem+json", refusal.document(), extra, is_head=is_head)
