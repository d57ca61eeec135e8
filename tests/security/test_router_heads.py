"""Requests that could be read in two ways, or claim things: none of that gets through the router."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.routerstand import (
    MANY,
    Behind,
    Stand,
    read_all,
)

CANARY = "xylophone-7431"


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


# - heads


def test_headers_of_one_hop_and_claims_of_clients_end_here(stand: Stand) -> None:
    behind = Behind(
        stand.socket,
        answer=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: X-Private\r\nX-Private: 1\r\nKeep-Alive: 5\r\nX-Kept: 1\r\n\r\n",
    )
    dropped = {
        "Connection": "close, X-Mine",
        "X-Mine": "1",
        "Keep-Alive": "1",
        "TE": "trailers",
        "Proxy-Authorization": "Basic x",
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Proto": "http",
        "X_Forwarded_For": "6.6.6.6",
        "Forwarded": "for=6.6.6.6",
        "X-Real-IP": "6.6.6.6",
        "X-Bulkhead-Client": "root",
    }
    with stand.router(limits=MANY):
        made = stand.client()
        made.request("GET", "/a?b=c", headers=dropped | {"X-Kept": "yes", "Authorization": "Bearer y"})
        answer = made.getresponse()
        assert answer.getheader("X-Kept") == "1" and answer.getheader("X-Private") is None
        assert answer.getheader("Keep-Alive") is None
    head = behind.requests.decode()
    assert head.startswith("GET /a?b=c HTTP/1.1\r\nHost: localhost\r\n")
    assert "X-Kept: yes" in head and "Authorization: Bearer y" in head
    assert head.lower().count("x-forwarded-for") == 1 and "X-Forwarded-For: 127.0.0.1\r\n" in head
    assert "X-Forwarded-Proto: https" in head
    for gone in ("6.6.6.6", "X-Mine", "Keep-Alive", "TE:", "Proxy-", "root", "Connection"):
        assert gone not in head, gone


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding:\r\n chunked",
        b"Content-Length: 4\r\nContent-Length: 5",
        b"Content-Length: 4\r\nContent-Length: 4",
        b"Content-Length: 4, 4",
        b"Content-Length: +4",
        b"Content-Length: 0x4",
        b"Content-Length: -1",
        b"Content-Length: 99999999999999999999",
        b"Host: b",
        b"Expect: nonsense",
        b"X: a\rTransfer-Encoding: chunked",
        b"X: a\nTransfer-Encoding: chunked",
        b"X: \0",
        b"X y: z",
        b": z",
        b"Upgrade: websocket\r\nConnection: upgrade",
    ],
)
def test_what_could_be_read_in_two_ways_does_not_get_in(smuggling: tuple[Stand, Behind], head: bytes) -> None:
    stand, behind = smuggling
    before = len(behind.got)
    answer = stand.raw(b"POST /x HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
    assert answer[9:10] in (b"4", b"5"), answer
    assert answer.count(b"application/problem+json") == 1 and b"\r\nConnection: close\r\n" in answer
    assert len(behind.got) == before


@pytest.mark.parametrize(
    "line",
    [
        b"GET http://evil/ HTTP/1.1",
        b"CONNECT evil:443 HTTP/1.1",
        b"TRACE / HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET / HTTP/2.0",
        b"GET / HTTP/0.9",
        b"GET /",
        b"GET /\xc3\xa4 HTTP/1.1",
        b"GET /#f HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"FROBNICATE / HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"\x16\x03\x01",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1",
        b"GET / HTTP/1.1\r\n" + b"\r\n".join(b"X%d: y" % n for n in range(200)),
        b"GET / HTTP/1.1\r\nX: " + b"y" * 9000,
    ],
)
def test_strange_lines_do_not_get_in(smuggling: tuple[Stand, Behind], line: bytes) -> None:
    stand, behind = smuggling
    before = len(behind.got)
    answer = stand.raw(line + b"\r\nHost: a\r\n\r\n")
    assert answer == b"" or answer[9:10] in (b"4", b"5"), answer
    assert len(behind.got) == before


@pytest.fixture(scope="module")
def smuggling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stand, Behind]]:
    stand = Stand(tmp_path_factory.mktemp("smuggling"))
    behind = Behind(stand.socket)
    with stand.router(limits=MANY):
        yield stand, behind
        assert "internal_errors" not in " ".join(stand.figures())


def test_requests_one_after_the_other_are_answered_in_turn(stand: Stand) -> None:
    behind = Behind(stand.socket)
    with stand.router(limits=MANY), stand.connected() as made:
        made.sendall(
            b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
            + b"GET /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        made.settimeout(5)
        assert read_all(made).count(b"HTTP/1.1 200 OK") == 2
        assert b"POST /1" in behind.requests and b"GET /2" in behind.requests
