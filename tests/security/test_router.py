"""The router against real clients and servers: what passes, what is refused, what nobody ever gets to see."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from controller.security.hpke import ClientKey, Registry, RouterKeys
from controller.security.hpke.client import RouterClient, Unanswered
from controller.security.router import Limits, Target
from tests.security.routerstand import (
    INFERENCE,
    Behind,
    Stand,
    free_port,
    process,
    read_all,
    until,
)

CANARY = "xylophone-7431"
MANY = Limits(per_client_per_s=1e6, concurrency=10_000)


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


def ask(made: Any, method: str = "GET", target: str = "/", **more: Any) -> tuple[int, bytes]:
    """One request and its answer."""
    made.request(method, target, **more)
    answer = made.getresponse()
    return answer.status, answer.read()


def run(*words: str, data: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, input=data, capture_output=True, text=True, timeout=20)


# - TLS


def test_tls_as_curl_and_openssl_see_it(stand: Stand) -> None:
    Behind(stand.socket)
    ca = str(stand.directory / "pki/ca.pem")
    url, place = f"https://localhost:{stand.port}/", f"127.0.0.1:{stand.port}"
    stand.pki.issue("other", "server", [], ["other.example"])
    with stand.router(limits=MANY):
        good = run("curl", "-sS", "--tlsv1.3", "--cacert", ca, url)
        assert (good.returncode, good.stdout) == (0, "hello"), good.stderr
        for version in ("1.0", "1.1", "1.2"):
            old = run("curl", "-sS", f"--tlsv{version}", "--tls-max", version, "--cacert", ca, url)
            assert old.returncode == 35, (version, old.stderr)
        assert run("curl", "-sS", url).returncode == 60  # an unknown CA
        wrong = run(
            "curl",
            "-sS",
            "--cacert",
            ca,
            "--resolve",
            f"llm.wrong:{stand.port}:127.0.0.1",
            url.replace("localhost", "llm.wrong"),
        )
        assert wrong.returncode == 60 and "llm.wrong" in wrong.stderr
        new = run(
            "openssl", "s_client", "-connect", place, "-CAfile", ca, "-verify_return_error", "-servername", "localhost"
        )
        assert new.returncode == 0 and "TLSv1.3" in new.stdout, new.stdout
        for flag in ("-tls1_2", "-tls1_1", "-tls1"):
            old = run("openssl", "s_client", "-connect", place, "-CAfile", ca, flag, "-cipher", "ALL:@SECLEVEL=0")
            assert old.returncode != 0, flag


def test_clients_with_bad_certificates_are_refused(stand: Stand, tmp_path: Path) -> None:
    behind = Behind(stand.socket)
    elsewhere = Stand(tmp_path / "elsewhere") if (tmp_path / "elsewhere").mkdir() is None else stand
    stand.pki.issue("good", "client")
    stand.pki.issue("gone", "client")
    stand.pki.revoke("gone")
    stand.pki.issue("server-only", "server")
    stand.pki.issue("short", "client", days=1.2 / 86400)
    elsewhere.pki.issue("good", "client")
    ca = str(stand.directory / "pki/ca.pem")

    def curl(directory: Path | None, name: str = "") -> int:
        pair = directory / "pki/current" / name if directory is not None else None
        shown = ["--cert", str(pair / "cert.pem"), "--key", str(pair / "key.pem")] if pair is not None else []
        return run("curl", "-sS", "--cacert", ca, *shown, f"https://localhost:{stand.port}/").returncode

    with stand.router(limits=MANY, client_certificates=True):
        time.sleep(1.3)
        assert curl(stand.directory, "good") == 0
        before = len(behind.got)
        assert curl(None) != 0
        assert curl(tmp_path / "elsewhere", "good") != 0
        assert curl(stand.directory, "short") != 0
        assert curl(stand.directory, "gone") != 0
        assert curl(stand.directory, "server-only") != 0
        assert len(behind.got) == before


def test_a_revoked_client_is_cut_off_within_five_seconds(stand: Stand) -> None:
    Behind(stand.socket)
    stand.pki.issue("mallory", "client")
    with stand.router(limits=MANY, client_certificates=True):
        made = stand.client(name="mallory")
        assert ask(made)[0] == 200
        stand.pki.revoke("mallory")
        until(lambda: made.sock is None or made.sock.recv(1) == b"", 5)


def server_tls(directory: Path, name: str) -> ssl.SSLContext:
    """What a server behind the router shows; the router must show a certificate of the same CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = directory / "pki/current" / name
    context.load_cert_chain(pair / "cert.pem", pair / "key.pem")
    context.load_verify_locations(directory / "pki/ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_servers_with_bad_certificates_are_refused(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Stand(tmp_path / "elsewhere")
    elsewhere.pki.issue("inf-foreign", "peer")
    for name in ("inf-good", "inf-gone", "inf-other"):
        stand.pki.issue(name, "peer")
    stand.pki.issue("inf-short", "peer", days=1.2 / 86400)
    stand.pki.issue("inf-client", "client")
    shown = {
        "inf-good": server_tls(stand.directory, "inf-good"),
        "inf-foreign": server_tls(tmp_path / "elsewhere", "inf-foreign"),
        "inf-gone": server_tls(stand.directory, "inf-gone"),
        "inf-misnamed": server_tls(stand.directory, "inf-other"),
        "inf-short": server_tls(stand.directory, "inf-short"),
        "inf-client": server_tls(stand.directory, "inf-client"),
    }
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.load_cert_chain(*(stand.directory / "pki/current/inf-good" / each for each in ("cert.pem", "key.pem")))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    stand.pki.revoke("inf-gone")
    behind = {name: Behind(tls=tls) for name, tls in shown.items()}
    targets = [Target(name, address="127.0.0.1", port=each.port) for name, each in behind.items()]
    behind["inf-good "] = Behind(tls=old)
    targets.append(Target("inf-good", address="127.0.0.1", port=behind["inf-good "].port))
    time.sleep(1.3)
    for target, (name, each) in zip(targets, behind.items(), strict=True):
        with stand.router(limits=MANY, targets=(target,)):
            status, _ = ask(stand.client())
            assert status == (200 if name == "inf-good" else 503), name
            assert bool(each.got) == (name == "inf-good"), name


def test_an_inference_server_answers_its_router_alone(stand: Stand) -> None:
    stand.pki.issue("inf1", "peer", ["127.0.0.1"])
    stand.pki.issue("inf2", "peer")
    given = {
        "name": "inf1",
        "address": "127.0.0.1",
        "port": stand.port,
        "pki": str(stand.directory / "pki"),
        "routers": ["router1"],
    }
    with process(INFERENCE, json.dumps(given), log=stand.log):
        ca = ("--cacert", str(stand.directory / "pki/ca.pem"))

        def curl(name: str) -> subprocess.CompletedProcess[str]:
            pair = stand.directory / "pki/current" / name
            shown = ("--cert", str(pair / "cert.pem"), "--key", str(pair / "key.pem"))
            return run("curl", "-sS", *ca, *shown, f"https://127.0.0.1:{stand.port}/health")

        assert json.loads(curl("router1").stdout)["status"] == "up"
        assert json.loads(curl("inf2").stdout)["status"] == 403
        stand.pki.revoke("router1")
        until(lambda: curl("router1").returncode != 0, 5)


# - streams


def test_tokens_pass_one_by_one(stand: Stand) -> None:
    given = {"socket": str(stand.socket), "group": str(os.getgid()), "token_s": 0.05}
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
        assert sorted(late)[len(late) // 2] < 0.02 and max(late) < 0.25, late


def test_a_body_passes_while_it_comes(stand: Stand) -> None:
    behind = Behind(stand.socket)
    with stand.router(limits=MANY), stand.connected() as made:
        made.sendall(b"POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        until(lambda: b"first" in behind.requests)
        made.sendall(b"6\r\nsecond\r\n")
        until(lambda: b"second" in behind.requests)
        made.sendall(b"0\r\n\r\n")
        assert made.recv(4096).startswith(b"HTTP/1.1 200")


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
    with stand.router(limits=Limits(request_s=2, idle_s=1.5, header_s=1, per_client_per_s=1e6)):
        with stand.connected() as idle, stand.connected() as slow, stand.connected() as slow_body:
            slow.sendall(b"GET / HTTP/1.1\r\nX-")
            slow_body.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
            assert problem(stand.raw(b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n", patience_s=4))[0] == 504
            for made in (idle, slow, slow_body):
                made.settimeout(3)
            assert read_all(idle) == b""
            assert problem(read_all(slow))[0] == 408
            assert problem(read_all(slow_body))[0] in (408, 504)


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


# - reload


def steady(stand: Stand, stop: threading.Event, found: list[object], per_s: float, name: str | None = None) -> None:
    """Ask all the time, on connections that are kept and made anew as the router wants it."""
    made = stand.client(name=name)
    asked = 0
    while not stop.is_set():
        began = time.monotonic()
        try:
            status, body = ask(made, "POST" if asked % 2 else "GET", body=b"x" if asked % 2 else None)
            found.append(status if body == b"hello" else "wrong body")
            if asked % 20 == 19:
                made.close()
        except Exception as exc:
            found.append(repr(exc))
            made = stand.client(name=name)
        asked += 1
        time.sleep(max(0.0, 1 / per_s - (time.monotonic() - began)))


def under_load(stand: Stand, what: Any, *, name: str | None = None, per_s: float = 200, count: int = 8) -> list[object]:
    """Do something while requests come steadily; how each of them went."""
    stop, found = threading.Event(), []  # type: ignore[var-annotated]
    threads = [threading.Thread(target=steady, args=(stand, stop, found, per_s / count, name)) for _ in range(count)]
    for each in threads:
        each.start()
    began = time.monotonic()
    try:
        what()
    finally:
        stop.set()
        for each in threads:
            each.join()
    print(f"{len(found)} requests, {len(found) / (time.monotonic() - began):.0f} a second")
    return found


def test_a_reload_drops_nothing(stand: Stand) -> None:
    Behind(stand.socket)
    with stand.router(limits=MANY, workers=2) as router:

        def reload() -> None:
            for number in range(3):
                time.sleep(0.4)
                stand.write(limits=Limits(per_client_per_s=1e6, concurrency=1000 + number))
                router.send_signal(signal.SIGHUP)
                until(lambda n=number: sum(e["kind"] == "state_applied" for e in stand.events()) == n + 1)
            time.sleep(0.4)

        found = under_load(stand, reload)
        assert len(found) > 150 and set(found) == {200}, {str(each) for each in found}
        (stand.directory / "router.json").write_text(stand.settings.to_json().replace("inference.sock", "other.sock"))


def test_settings_that_cannot_be_used_change_nothing(stand: Stand) -> None:
    Behind(stand.socket)
    with stand.router(limits=MANY) as router:
        stand.write(name="nobody")
        router.send_signal(signal.SIGHUP)
        until(lambda: stand.events()[-1]["kind"] == "state_rejected")
        assert ask(stand.client())[0] == 200


def test_a_worker_that_is_killed_is_started_again(stand: Stand) -> None:
    Behind(stand.socket)
    with stand.router(limits=MANY) as router:
        worker = int(run("pgrep", "-P", str(router.pid)).stdout.split()[0])
        os.kill(worker, signal.SIGKILL)
        assert ask(stand.client())[0] == 200  # it has waited in the socket's queue
        until(lambda: [event["kind"] for event in stand.events()][-2:] == ["service_down", "service_up"])
        worker = int(run("pgrep", "-P", str(router.pid)).stdout.split()[0])
        router.kill()
        until(
            lambda: not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes(), 5
        )


def test_a_stop_lets_answers_end(stand: Stand) -> None:
    behind = Behind(stand.socket)
    behind.parts = [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", b"there"]
    with stand.router(limits=MANY) as router, stand.connected() as made:
        made.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        behind.gate.release()
        assert made.recv(4096).endswith(b"hello")
        router.terminate()
        time.sleep(0.3)
        with pytest.raises(OSError):
            stand.connected()
        behind.gate.release()
        assert made.recv(4096) == b"there"
        assert router.wait(5) == 0


def test_renewal_and_a_new_ca_under_load(stand: Stand) -> None:
    """Both sides renew, the CA is replaced, and no request that should pass fails; a revoked client is refused."""
    stand.pki.issue("inf1", "peer", ["127.0.0.1"])
    for name in ("alice", "mallory"):
        stand.pki.issue(name, "client")
    given = {
        "name": "inf1",
        "address": "127.0.0.1",
        "port": (port := free_port()),
        "pki": str(stand.directory / "pki"),
        "routers": ["router1"],
    }
    target = Target("inf1", address="127.0.0.1", port=port)
    with (
        process(INFERENCE, json.dumps(given), log=stand.log),
        stand.router(limits=MANY, targets=(target,), client_certificates=True),
    ):

        def renew() -> None:
            time.sleep(0.5)
            for name in ("router1", "inf1", "alice"):
                stand.pki.renew(name)
                time.sleep(0.4)
            for phase in ("prepare", "switch", "finish"):
                stand.pki.rotate_ca(phase, settle_s=0.5)
                time.sleep(0.7)
            time.sleep(0.5)

        found = under_load_of_chat(stand, renew, "alice")
        assert set(found) == {200}, {str(each) for each in found}
        mallory = stand.client(name="mallory")
        assert ask(mallory, target="/health")[0] == 200
        stand.pki.revoke("mallory")
        began = time.monotonic()
        found = under_load_of_chat(stand, lambda: until(lambda: _refused(stand, mallory), 5), "alice")
        assert time.monotonic() - began < 5
        assert set(found) == {200}, {str(each) for each in found}


def _refused(stand: Stand, made: Any) -> bool:
    try:
        ask(made, target="/health")
    except OSError:
        try:
            ask(stand.client(name="mallory"), target="/health")
        except OSError:
            return True
    except Exception:
        return False
    return False


def under_load_of_chat(stand: Stand, what: Any, name: str) -> list[object]:
    """As `under_load`, of the real inference server's /health."""
    stop, found = threading.Event(), []  # type: ignore[var-annotated]

    def one() -> None:
        made = stand.client(name=name)
        count = 0
        while not stop.is_set():
            began = time.monotonic()
            try:
                status, _ = ask(made, target="/health")
                found.append(status)
                count += 1
                if count % 20 == 0:
                    made.close()
                    made = stand.client(name=name)  # its certificate as it is now
            except Exception as exc:
                found.append(repr(exc))
                made = stand.client(name=name)
            time.sleep(max(0.0, 0.04 - (time.monotonic() - began)))

    threads = [threading.Thread(target=one) for _ in range(8)]
    began = time.monotonic()
    for each in threads:
        each.start()
    try:
        what()
    finally:
        stop.set()
        for each in threads:
            each.join()
    print(f"{len(found)} requests, {len(found) / (time.monotonic() - began):.0f} a second")
    return found


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
            assert len(late) == 8 and sorted(late)[4] < 0.03, late
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
    with process(INFERENCE, json.dumps(given), log=stand.log), stand.router(**settings):
        with RouterClient(f"https://127.0.0.1:{stand.port}", key, tls=stand.trust()) as client:
            began = time.monotonic()
            with pytest.raises(Exception, match=r"cut|closed|incomplete|again"):
                with client.stream("POST", "/v1/chat", asked, "application/json") as stream:
                    for number, _ in enumerate(stream):
                        if number == 1:
                            Registry(stand.directory / "hpke").revoke("laptop")
                            began = time.monotonic()
            assert time.monotonic() - began < 5


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
