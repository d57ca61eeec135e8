"""What passes through the router, how, and what nobody ever gets to see."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from controller.problems import BulkheadError
from controller.security.hpke import ClientKey, Config, Registry, RouterKeys, Sealer
from controller.security.hpke.client import RouterClient, Unanswered
from controller.security.router import Limits
from tests.security.routerstand import (
    INFERENCE,
    MANY,
    Behind,
    Stand,
    ask,
    process,
    read_all,
    run,
    until,
)

CANARY = "xylophone-7431"


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


# - streams


def test_tokens_pass_one_by_one(stand: Stand) -> None:
    given = {"socket": str(stand.socket), "group": str(os.getgid()), "token_s": 0.1}
    with process(INFERENCE, json.dumps(given), log=stand.log), stand.router(limits=MANY):
        assert stand.socket.stat().st_mode & 0o777 == 0o660
        made = stand.client()
        made.request(
            "POST", "/v1/chat", json.dumps({"prompt": " ".join("abcdefghij")}), {"Content-Type": "application/json"}
        )
        answer = made.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream"
        late, tokens = [], []
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                tokens.append(event["token"])
                late.append(time.time() - event["at"])
        assert tokens == list("abcdefghij")
        assert sorted(late)[len(late) // 2] < 0.05 and max(late) < 0.5, late  # each before the next one is made


def test_a_body_passes_while_it_comes(stand: Stand) -> None:
    behind = Behind(stand.socket)
    with stand.router(limits=MANY), stand.connected() as made:
        made.sendall(b"POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        until(lambda: b"first" in behind.requests)
        made.sendall(b"6\r\nsecond\r\n")
        until(lambda: b"second" in behind.requests)
        made.sendall(b"0\r\n\r\n")
        assert made.recv(4096).startswith(b"HTTP/1.1 200")


def test_an_answer_that_has_begun_is_never_followed_by_another(stand: Stand) -> None:
    """The server answers while the body still comes, and then the body turns out too long."""
    kept: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(stand.socket))
        stand.socket.chmod(0o660)
        server.listen(8)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    made, _ = server.accept()
                    length, half = (0, b"") if made.recv(65536).startswith(b"GET /health") else (9, b"half")
                    made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (length, half))
                    kept.append(made)

        threading.Thread(target=serve, daemon=True).start()
        with stand.router(limits=Limits(body_bytes=100, per_client_per_s=1e6)), stand.connected() as made:
            made.settimeout(5)
            made.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
            assert made.recv(4096).endswith(b"half")
            made.sendall(b"c8\r\n%s\r\n" % (b"x" * 200))
            assert read_all(made) == b""
    for each in kept:
        each.close()


def test_a_client_that_goes_is_noticed_by_the_server(stand: Stand) -> None:
    behind = Behind(stand.socket)
    behind.silent = True
    with stand.router(limits=MANY):
        with stand.connected() as made:
            made.sendall(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
            until(lambda: behind.got)
        assert behind.cut.wait(5)


def test_a_slow_client_holds_the_server_back(stand: Stand) -> None:
    """64 MiB are not piled up in the router for a client that does not read."""
    size = 64 << 20
    behind = Behind(stand.socket, answer=b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
    with stand.router(limits=MANY) as router, stand.connected() as made:
        worker = int(run("pgrep", "-P", str(router.pid)).stdout.split()[0])
        made.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: behind.got)
        time.sleep(1)
        resident = int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * 4096
        assert resident < 100 << 20
        got = 0
        made.settimeout(10)
        while got < size:
            got += len(made.recv(1 << 20))


def test_the_ends_of_answers(stand: Stand) -> None:
    """Whole ones are told from cut ones, however they are framed."""
    behind = Behind(stand.socket, answer=b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
    with stand.router(limits=MANY):
        assert ask(stand.client()) == (200, b"until the end")
        made = stand.raw(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n")
        assert made.endswith(b"\r\n\r\nuntil the end") and b"Connection: close" in made and b"chunked" not in made
        behind.answer = (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        )
        assert ask(stand.client()) == (200, b"abc")
        behind.answer = b"HTTP/1.1 204 No Content\r\nX-Content-Length-Not: 1\r\n\r\n"
        assert ask(stand.client()) == (204, b"")
        behind.answer = b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n"
        made_ = stand.client()
        assert [ask(made_)[0], ask(made_)[0]] == [304, 304]
        behind.parts = [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", b"\r\n" * 0]
        behind.gate.release()
        with stand.connected() as cut:
            cut.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert cut.recv(4096).endswith(b"half")
        for wrong in (
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            b"nonsense" * 100,
        ):
            behind.parts, behind.answer = None, wrong
            assert ask(stand.client())[0] == 502, wrong


# - sealed requests


def sealed(stand: Stand) -> tuple[ClientKey, dict[str, Any]]:
    """A registered client, and the settings that need it."""
    directory = stand.directory / "hpke"
    RouterKeys(directory).ensure()
    key = ClientKey.new("auth")
    Registry(directory).register("laptop", key.public)
    return key, {"limits": MANY, "hpke": directory}


def test_sealed_requests_pass_and_others_do_not(stand: Stand) -> None:
    key, settings = sealed(stand)
    given = {"socket": str(stand.socket), "group": str(os.getgid()), "token_s": 0.05}
    asked = json.dumps({"prompt": "one two three four"}).encode()
    url = f"https://127.0.0.1:{stand.port}"
    with process(INFERENCE, json.dumps(given), log=stand.log), stand.router(**settings):
        with RouterClient(url, key, tls=stand.trust()) as client:
            late = []
            for _ in range(2):
                with client.stream("POST", "/v1/chat", asked, "application/json") as stream:
                    assert (stream.status, stream.content_type) == (200, "text/event-stream")
                    for part in stream:
                        if part.startswith(b"data: {"):
                            late.append(time.time() - json.loads(part[6:])["at"])
            assert len(late) == 8 and sorted(late)[4] < 0.05, late
            assert client.request("GET", "/nothing").status == 404
        assert ask(stand.client())[0] == 400
        assert ask(stand.client(), "POST", body=b"x")[0] == 400
        with RouterClient(url, ClientKey.new("auth"), tls=stand.trust()) as stranger, pytest.raises(Unanswered):
            stranger.request("GET", "/health")
        until(lambda: stand.figures().get('bulkhead_router_sealed_refused_total{why="unknown-client"}', 0) >= 1)
        until(lambda: any(event["kind"] == "client_refused" for event in stand.events()))


def test_a_revoked_client_loses_its_answer(stand: Stand) -> None:
    key, settings = sealed(stand)
    given = {"socket": str(stand.socket), "group": str(os.getgid()), "token_s": 0.2}
    asked = json.dumps({"prompt": "word " * 100}).encode()
    url = f"https://127.0.0.1:{stand.port}"
    with process(INFERENCE, json.dumps(given), log=stand.log), stand.router(**settings), ExitStack() as stack:
        client = stack.enter_context(RouterClient(url, key, tls=stand.trust()))
        stream = stack.enter_context(client.stream("POST", "/v1/chat", asked, "application/json"))
        parts = iter(stream)
        next(parts), next(parts)
        Registry(stand.directory / "hpke").revoke("laptop")
        began = time.monotonic()
        with pytest.raises((BulkheadError, httpx.HTTPError)):
            list(parts)
        assert time.monotonic() - began < 5


class Wire:
    """A client that can send the same bytes again, and others than it should."""

    def __init__(self, stand: Stand, key: ClientKey) -> None:
        self.made = stand.connected()
        self.made.settimeout(5)
        status, _, body = self.ask(b"GET /hpke/config HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status == 200
        self._config = Config.read(json.loads(body), time.time(), None)
        self._sealer = Sealer(key, self._config)
        self.nonce = self._config.nonce

    def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send it; status, headers and body of the answer, which has a length."""
        self.made.sendall(data)
        answer = HTTPResponse(self.made, method=data.split(b" ", 1)[0].decode("latin-1"))
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        self.nonce = headers.get("next-nonce", "")
        return answer.status, headers, answer.read()

    def sealed(self, target: str = "/x", body: bytes = b"secret", **more: Any) -> bytes:
        """A request."""
        given = {"nonce": self.nonce, "now": time.time()} | more
        made = self._sealer.seal("POST", target, body, "text/plain", **given)
        lines = "".join(f"{name}: {value}\r\n" for name, value in made.headers.items())
        return (
            f"POST {target} HTTP/1.1\r\nHost: a\r\n{lines}Content-Length: {len(made.body)}\r\n\r\n".encode() + made.body
        )


def test_attacks_on_sealed_requests_reach_no_server(stand: Stand) -> None:
    behind = Behind(stand.socket)
    key, settings = sealed(stand)
    with stand.router(**settings):
        wire = Wire(stand, key)
        good = wire.sealed()
        assert wire.ask(good)[0] == 200
        assert len(behind.got) == 1 and b"secret" in behind.requests
        later = Wire(stand, key).sealed()
        attacks = {
            "replay": lambda one: good,
            "of another connection": lambda one: later,
            "method": lambda one: one.sealed().replace(b"POST", b"PUT", 1),
            "path": lambda one: one.sealed().replace(b"/x", b"/y", 1),
            "query": lambda one: one.sealed().replace(b"/x", b"/x?a", 1),
            "body": lambda one: one.sealed()[:-1] + bytes([one.sealed()[-1] ^ 1]),
            "time": lambda one: one.sealed(now=time.time() - 100),
            "future": lambda one: one.sealed(now=time.time() + 100),
            "certificate": lambda one: one.sealed(certificate=b"another router's"),
            "nonce": lambda one: one.sealed(nonce="A" * 43),
            "header": lambda one: one.sealed().replace(b"suite=auth", b"suite=none", 1),
            "two headers": lambda one: one.sealed().replace(b"Host: a", b"Host: a\r\nBulkhead-HPKE: v=1", 1),
            "nonsense": lambda one: (
                b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Type: application/bulkhead-hpke\r\nContent-Length: 1000000\r\n\r\n"
                + os.urandom(1000000)
            ),
            "stranger": lambda one: Wire(stand, ClientKey.new("auth")).sealed(),
            "HEAD": lambda one: one.sealed().replace(b"POST", b"HEAD", 1),
        }
        for name, attack in attacks.items():
            one = Wire(stand, key)
            status, _, body = one.ask(attack(one))
            assert status in (400, 401, 405), (name, status, body)
            assert json.loads(body or b"{}").get("detail", "").count(" ") < 12
        with stand.connected() as cut:
            cut.sendall(Wire(stand, key).sealed()[:-3])
        assert len(behind.got) == 1, behind.got[1:]
        until(lambda: sum(value for name, value in stand.figures().items() if "sealed_refused" in name) >= 12)
    with stand.router(**settings):
        assert Wire(stand, key).ask(good)[0] == 401
        assert len(behind.got) == 1


# - privacy


def test_no_content_is_ever_logged(stand: Stand, tmp_path: Path) -> None:
    """Not of requests that pass, not of those that are refused or broken, not of answers; not in any file of ours."""
    behind = Behind(stand.socket)
    secret = CANARY.encode()
    with stand.router(limits=Limits(body_bytes=4000, per_client_per_s=1e6)):
        behind.answer = b"HTTP/1.1 200 OK\r\nX-A: %s\r\nContent-Length: %d\r\n\r\n%s" % (secret, len(secret), secret)
        headers = {"X-Prompt": CANARY, "Cookie": CANARY}
        assert ask(stand.client(), "POST", f"/{CANARY}?q={CANARY}", body=secret, headers=headers)[1] == secret
        for line in (
            b"GET /%s HTTP/9.9\r\nHost: a\r\n\r\n",
            b"GET /%s HTTP/1.1\r\n%s\r\nHost: a\r\n\r\n",
            b"%s / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET http://%s:x/ HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %s\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n%s",
            b"GET / HTTP/1.1\r\nHost: %s /\r\n\r\n",
            b"%s" * 300,
        ):
            answer = stand.raw(line.replace(b"%s", secret), patience_s=1)
            assert secret not in answer
        for answer in (
            b"HTTP/1.1 2%s\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n%s\r\n\r\n",
            b"%s" * 99,
            b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n",
        ):
            behind.answer = answer.replace(b"%s", secret)
            assert secret not in ask(stand.client())[1]
        time.sleep(1.2)
        stand.figures()
    seen = [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert seen == []
    assert "status 200" in stand.log.read_text()
