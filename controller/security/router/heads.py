"""Heads of messages: what is refused, what is not passed on, what is put in its place. Values in, values out.

aiohttp's parser (llhttp, strict) has read them already; what it lets through and a server behind might read otherwise is
refused here: a request means one thing to everybody, or it does not get in. Imports nothing of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

Headers = Iterable[tuple[bytes, bytes]]

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""What may be asked twice."""

_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization")
    + (b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"expect", b"host", b"http2-settings")
)
# What a client says of who or where it is; the router says it instead, or nobody.
_CLAIMS: Final = frozenset(
    (b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip", b"x-cluster-client-ip")
)
_CLAIMED: Final = (b"x-forwarded-", b"x-bulkhead-", b"x-original-", b"x-rewrite-", b"bulkhead-")
_KEPT_BACK: Final = _HOP | {b"alt-svc", b"next-nonce"}
_TARGET: Final = re.compile(r"/[!-\"$-~]*")
_HOST: Final = re.compile(rb"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")

REASONS: Final = {status.value: f"{status.value} {status.phrase}".encode() for status in HTTPStatus}


class Refusal(Exception):
    """A request is answered by the router itself: `status`, and a sentence for the client that repeats nothing of it."""

    def __init__(self, status: int, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s

    def document(self) -> bytes:
        """As RFC 9457 has it."""
        title = HTTPStatus(self.status).phrase
        return json.dumps(
            {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail}
        ).encode()


@dataclass(frozen=True, slots=True)
class Request:
    """A request that means one thing. `length` is None where the body is chunked."""

    method: str
    target: bytes
    host: bytes
    length: int | None
    expects: bool


def checked(method: str, path: str, version: tuple[int, int], headers: Headers) -> Request:
    """The request, or a `Refusal`."""
    if version not in ((1, 1), (1, 0)):
        raise Refusal(505, "Only HTTP/1.1 is spoken here.")
    if method not in METHODS:
        raise Refusal(405 if method in ("TRACE", "CONNECT") else 501, "This method is not passed on.")
    if not _TARGET.fullmatch(path):
        raise Refusal(400, "The target is to be a path of printable ASCII that begins with a slash.")
    hosts, lengths, codings, expects = [], [], [], []
    for name, value in headers:
        lower = name.lower()
        if lower == b"host":
            hosts.append(value)
        elif lower == b"content-length":
            lengths.append(value)
        elif lower == b"transfer-encoding":
            codings.append(value)
        elif lower == b"expect":
            expects.append(value.lower())
        elif lower == b"upgrade" and value.lower() != b"h2c":
            raise Refusal(501, "Other protocols are not passed on.")
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        raise Refusal(400, "One Host header with one name is needed.")
    if expects and expects != [b"100-continue"]:
        raise Refusal(417, "Only 100-continue can be expected.")
    length: int | None = 0
    if codings:
        # With both, somebody on the way may believe the other one.
        if lengths or version == (1, 0) or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise Refusal(400, "The body is to have either one length, or the one coding chunked.")
        length = None
    elif lengths:
        if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
            raise Refusal(400, "The body is to have one length.")
        length = int(lengths[0])
    return Request(method, path.encode("ascii"), hosts[0], length, bool(expects) and version == (1, 1))


def passed_on(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What a server is given of a client's headers."""
    headers = list(headers)
    named = _named(headers)
    out = []
    for name, value in headers:
        lower = name.lower()
        if lower in _HOP or lower in named or lower in _CLAIMS or lower.startswith(_CLAIMED) or b"_" in lower:
            continue
        out.append((name, value))
    return out


def request_head(
    request: Request, headers: Headers, *, host: bytes, peer: bytes, client: bytes | None, length: int | None
) -> bytes:
    """The head of the request to a server. `length` is None for a chunked body; `client` is who asks."""
    out = [b"%s %s HTTP/1.1\r\nHost: %s\r\n" % (request.method.encode(), request.target, host)]
    out += [b"%s: %s\r\n" % pair for pair in headers]
    out.append(b"X-Forwarded-For: %s\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: %s\r\n" % (peer, request.host))
    if client is not None:
        out.append(b"X-Bulkhead-Client: %s\r\n" % client)
    if length is None:
        out.append(b"Transfer-Encoding: chunked\r\n")
    elif length or request.method in ("POST", "PUT", "PATCH"):
        out.append(b"Content-Length: %d\r\n" % length)
    out.append(b"\r\n")
    return b"".join(out)


def answered(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What a client is given of a server's headers."""
    headers = list(headers)
    named = _named(headers)
    return [pair for pair in headers if (lower := pair[0].lower()) not in _KEPT_BACK and lower not in named]


def _named(headers: Headers) -> Collection[bytes]:
    """Headers that `Connection` makes a matter of this connection alone."""
    found = [value for name, value in headers if len(name) == 10 and name.lower() == b"connection"]
    return {token.strip().lower() for value in found for token in value.split(b",")} if found else ()


def reason(status: int) -> bytes:
    """`200 OK`."""
    return REASONS.get(status) or b"%d Status" % status
