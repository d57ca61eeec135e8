"""The limits of the router, and its choice among servers."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from controller.security.router import Limits, Target
from tests.security.routerstand import (
    MANY,
    Behind,
    Stand,
    ask,
    read_all,
    until,
)

CANARY = "xylophone-7431"


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


# - limits


def problem(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and problem document of an answer's bytes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, answer
    return int(head.split()[1]), json.loads(body)


def test_bodies_are_limited(stand: Stand) -> None:
    behind = Behind(stand.socket)
    with stand.router(limits=Limits(body_bytes=1000, per_client_per_s=1e6)):
        status, told = problem(stand.raw(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001))
        assert status == told["status"] == 413
        assert behind.got == []
        chunks = (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"1f4\r\n%s\r\n" % (b"x" * 500) * 3
            + b"0\r\n\r\n"
        )
        assert problem(stand.raw(chunks))[0] == 413
        assert ask(stand.client(), "POST", body=b"x" * 1000)[0] == 200
        waits = stand.raw(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
        assert problem(waits)[0] == 413
        with stand.connected() as made:
            made.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
            assert made.recv(99) == b"HTTP/1.1 100 Continue\r\n\r\n"
            made.sendall(b"ab")
            assert made.recv(99).startswith(b"HTTP/1.1 200")


def test_each_client_has_its_rate_in_all_workers_together(stand: Stand) -> None:
    behind = Behind(stand.socket)
    with stand.router(limits=Limits(per_client_per_s=5), workers=2):
        found = [ask(stand.client()) for _ in range(12)]
        assert 5 <= sum(status == 200 for status, _ in found) <= 7
        assert len(behind.got) <= 7
        made = stand.client()
        made.request("GET", "/")
        answer = made.getresponse()
        assert answer.status == 429 and int(answer.getheader("Retry-After") or 0) >= 1
        time.sleep(1.2)
        assert ask(stand.client())[0] == 200


def test_there_are_so_many_requests_at_a_time_and_no_more(stand: Stand) -> None:
    behind = Behind(stand.socket)
    behind.silent = True
    with stand.router(limits=Limits(concurrency=3, per_client_per_s=1e6)), ExitStack() as stack:
        for _ in range(3):
            made = stack.enter_context(stand.connected())
            made.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: len(behind.got) == 3)
        assert ask(stand.client())[0] == 503
        stack.close()
        behind.silent = False
        until(lambda: ask(stand.client())[0] == 200)


def test_time_is_limited(stand: Stand) -> None:
    behind = Behind(stand.socket)
    behind.silent = True
    limits = Limits(request_s=2, idle_s=1.5, header_s=1, per_client_per_s=1e6)
    with stand.router(limits=limits), stand.connected() as idle, stand.connected() as slow, stand.connected() as body:
        slow.sendall(b"GET / HTTP/1.1\r\nX-")
        body.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
        assert problem(stand.raw(b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n", patience_s=4))[0] == 504
        for made in (idle, slow, body):
            made.settimeout(3)
        assert read_all(idle) == b""
        assert problem(read_all(slow))[0] == 408
        assert problem(read_all(body))[0] in (408, 504)


# - servers


def test_the_socket_must_be_as_it_should(stand: Stand) -> None:
    behind = Behind(stand.socket)
    with stand.router(limits=MANY):
        assert ask(stand.client())[0] == 200
        stand.socket.chmod(0o666)
        until(lambda: ask(stand.client())[0] == 503)
        before = len(behind.got)
        assert ask(stand.client())[0] == 503 and len(behind.got) == before
        until(lambda: "mode 666; expected 660" in stand.events()[-1]["text"])
        assert stand.events()[-1]["kind"] == "upstream_down"
        stand.socket.chmod(0o660)
        until(lambda: ask(stand.client())[0] == 200)
        os.chown(stand.socket, -1, 12345)
        until(lambda: ask(stand.client())[0] == 503)
        stand.socket.unlink()
        stand.socket.write_text("no socket")
        assert ask(stand.client())[0] == 503
        assert ask(stand.client(), target="/healthz") == (503, b'{"status": "down"}')


def two(stand: Stand, tmp: Path) -> tuple[Behind, Behind, dict[str, Any]]:
    one, other = Behind(tmp / "1.sock"), Behind(tmp / "2.sock")
    targets = tuple(Target(f"inf{n}", socket=tmp / f"{n}.sock") for n in (1, 2))
    return one, other, {"targets": targets, "limits": MANY}


def test_the_server_with_the_fewest_requests_is_asked(stand: Stand, tmp_path: Path) -> None:
    one, other, settings = two(stand, tmp_path)
    one.silent = True
    with stand.router(**settings), ExitStack() as stack:
        while not one.got:
            made = stack.enter_context(stand.connected())
            made.sendall(b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n")
            time.sleep(0.05)
        before = len(other.got)
        for _ in range(10):
            assert ask(stand.client())[0] == 200
        assert len(one.got) == 1 and len(other.got) == before + 10


def test_a_server_that_is_ill_is_not_asked_and_comes_back(stand: Stand, tmp_path: Path) -> None:
    one, other, settings = two(stand, tmp_path)
    with stand.router(**settings):
        one.healthy = False
        until(lambda: any(event["kind"] == "upstream_down" for event in stand.events()))
        before = len(one.got)
        assert {ask(stand.client())[0] for _ in range(6)} == {200}
        assert len(one.got) == before and other.got
        one.healthy = True
        until(lambda: [event["kind"] for event in stand.events()][-1] == "upstream_up")
        assert {ask(stand.client())[0] for _ in range(6)} == {200}
        assert len(one.got) > before
        until(lambda: stand.figures()['bulkhead_router_upstream_up{upstream="inf1"}'] == 1)


def test_only_what_is_safe_is_asked_twice(stand: Stand, tmp_path: Path) -> None:
    one, other, settings = two(stand, tmp_path)
    one.answer = b""  # takes the request and hangs up
    with stand.router(**settings, health_s=60):
        assert {ask(stand.client())[0] for _ in range(6)} == {200}
        assert one.got
        one.got, other.got = [], []
        statuses = [ask(stand.client(), "POST", body=b"pay")[0] for _ in range(6)]
        assert set(statuses) == {200, 502}
        assert len(one.got) + len(other.got) == 6  # none was sent twice
        one.close()
        (tmp_path / "1.sock").unlink()
        assert {ask(stand.client(), "POST", body=b"pay")[0] for _ in range(6)} <= {200, 502}
        assert [ask(stand.client(), "POST", body=b"pay")[0] for _ in range(4)] == [200] * 4
