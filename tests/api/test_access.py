"""Who may ask, from where: real sockets, real users, tokens, and what is turned away."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from controller.api import access
from controller.api.limits import Buckets
from controller.api.routes import Routes
from controller.problems import BulkheadError
from controller.records import Scope
from tests.api.inside import inside
from tests.api.stand import Stand, stand, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to ask as other users")
NOBODY = 65534
STRANGER = 12345


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with stand(tmp_path_factory.mktemp("api"), port=port) as found:
        yield found


def raw(
    api: Stand, request: bytes, *, uid: int = 0, after: str = "", family: str = "AF_INET", host: str = "127.0.0.1"
) -> bytes:
    """What a process of some user is answered. `after` is Python that it runs when it has sent its request."""
    script = f"""
import os, socket, sys, time
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
s = socket.socket(socket.{family}); s.settimeout(5); s.connect(({host!r}, {api.port}))
s.sendall({request!r})
{after}
out = b""
while True:
    got = s.recv(65536)
    if not got: break
    out += got
sys.stdout.buffer.write(out)
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=20, check=False).stdout


def request(method: str = "GET", path: str = "/api/containers", body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {headers.pop('Host', 'localhost')}", "Connection: close"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.fixture
def token(api: Stand) -> Callable[..., str]:
    made = []

    def make(*scopes: str, expires_in_s: int = 60) -> str:
        with api.client() as client:
            name = f"t{time.monotonic_ns()}"
            body = {"name": name, "scopes": list(scopes), "expires_in_s": expires_in_s}
            answer = client.post("/api/tokens", json=body)
            assert answer.status_code == 201, answer.text
            made.append(answer.json())
            return str(answer.json()["token"])

    return make


def test_root_on_loopback_needs_no_token(api: Stand) -> None:
    assert status(raw(api, request())) == 200


@pytest.mark.parametrize("uid", [STRANGER, NOBODY])
def test_somebody_else_on_loopback_does(api: Stand, uid: int) -> None:
    answer = raw(api, request(), uid=uid)
    assert status(answer) == 401 and b"WWW-Authenticate" in answer.replace(b"www-authenticate", b"WWW-Authenticate")
    assert b"application/problem+json" in answer


def test_a_mapped_address_is_told_as_well(api: Stand) -> None:
    assert status(raw(api, request(), family="AF_INET6", host="::ffff:127.0.0.1")) == 200
    assert status(raw(api, request(), uid=STRANGER, family="AF_INET6", host="::ffff:127.0.0.1")) == 401


def test_a_socket_that_was_closed_is_not_roots(api: Stand) -> None:
    """The kernel's tables say uid 0 of a socket whose owner has closed it: the request must not be root's."""
    body = json.dumps({"name": "stolen", "network": "privacy"}).encode()
    for after in ("s.close(); time.sleep(0.2); sys.exit()", "os._exit(0)"):
        for _ in range(20):
            raw(api, request("POST", "/api/containers/create", body), uid=STRANGER, after=after)
    time.sleep(0.3)
    with api.client() as client:
        assert client.get("/api/containers/stolen").status_code == 404


def test_what_the_tables_say_of_closed_sockets(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    line = "   0: 0100007F:9C40 0100007F:2565 {} 00000000:00000000 00:00000000 00000000  {}        0 {} 1\n"
    ends = ("127.0.0.1", 40000), ("127.0.0.1", 9573)
    for state, uid, inode, expected in (
        ("01", 1000, 77, 1000),
        ("01", 0, 0, None),
        ("06", 0, 0, None),
        ("05", 0, 9, None),
    ):
        (tmp_path / "tcp").write_text(head + line.format(state, uid, inode))
        assert access.uid_of(*ends, proc=tmp_path) == expected
    assert access.uid_of(("127.0.0.1", 1), ends[1], proc=tmp_path) is None


def test_a_bad_token_is_not_made_good_by_root(api: Stand, token: Callable[..., str]) -> None:
    assert status(raw(api, request(Authorization="Bearer bh_00_nonsense"))) == 401
    assert status(raw(api, request(Authorization="Basic cm9vdDpyb290"))) == 401
    assert status(raw(api, request(Authorization=""))) == 401
    assert status(raw(api, request(Authorization=f"Bearer {token('read')[:-1]}x"))) == 401


def test_a_token_is_good_for_its_scopes(api: Stand, token: Callable[..., str]) -> None:
    read, operate = token("read"), token("operate", "read")
    body = json.dumps({"name": "c", "network": "privacy"}).encode()
    assert status(raw(api, request(Authorization=f"Bearer {read}"), uid=STRANGER)) == 200
    create = ("POST", "/api/containers/create", body)
    assert status(raw(api, request(*create, Authorization=f"Bearer {read}"), uid=STRANGER)) == 403
    assert status(raw(api, request(*create, Authorization=f"Bearer {operate}"), uid=STRANGER)) == 201
    assert status(raw(api, request("DELETE", "/api/containers/c", Authorization=f"Bearer {operate}"))) == 200
    # root who shows a token is as good as the token
    assert status(raw(api, request("DELETE", "/api/containers/c", Authorization=f"Bearer {read}"))) == 403
    more = json.dumps({"name": "more", "scopes": ["approve"]}).encode()
    assert status(raw(api, request("POST", "/api/tokens", more, Authorization=f"Bearer {operate}"))) == 403


def test_nobody_makes_more_of_a_token(api: Stand, token: Callable[..., str]) -> None:
    approve = token("approve")
    more = json.dumps({"name": "more", "scopes": ["operate"]}).encode()
    assert status(raw(api, request("POST", "/api/tokens", more, Authorization=f"Bearer {approve}"))) == 403


def test_a_token_ends(api: Stand, token: Callable[..., str]) -> None:
    short, revoked = token("read", expires_in_s=1), token("read")
    with api.client() as client:
        listed = client.get("/api/tokens").json()["tokens"]
        assert not any(revoked in json.dumps(one) for one in listed)
        name = next(one["id"] for one in listed if one["id"] == revoked.split("_")[1])
        assert client.delete(f"/api/tokens/{name}").status_code == 200
    assert status(raw(api, request(Authorization=f"Bearer {revoked}"))) == 401
    until(lambda: status(raw(api, request(Authorization=f"Bearer {short}"))) == 401)
    for path in api.directory.rglob("*"):
        if path.is_file():
            assert revoked.encode() not in path.read_bytes(), path


def test_other_names_and_other_sites_are_turned_away(api: Stand) -> None:
    for host in ("evil.example", "10.1.0.201", "localhost.evil.example:9573", ""):
        assert status(raw(api, request(Host=host))) == 421, host
    for host in ("localhost", "LOCALHOST:9573", f"127.0.0.1:{api.port}", "[::1]:9573", "[::1]"):
        assert status(raw(api, request(Host=host))) == 200, host
    assert status(raw(api, request(Origin="https://evil.example"))) == 403
    assert status(raw(api, request(Origin="null"))) == 403
    assert status(raw(api, request(Origin="http://localhost"))) == 200


def test_bodies_are_json_and_small(api: Stand) -> None:
    with api.client() as client:
        url = "/api/containers/create"
        assert client.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        assert (
            client.post(
                url, content=b"name=x", headers={"Content-Type": "application/x-www-form-urlencoded"}
            ).status_code
            == 415
        )
        assert client.post(url, content=b"{}").status_code == 415
        big = json.dumps({"name": "x", "network": "y" * 70_000}).encode()
        headers = {"Content-Type": "application/json"}
        assert client.post(url, content=big, headers=headers).status_code == 413
        assert client.post(url, content=iter([big[:30_000], big[30_000:]]), headers=headers).status_code == 413
        assert client.post(url, content=b"[" * 60_000, headers=headers).status_code in (400, 422)
        assert client.post(url, content=b"\xff\xfe", headers=headers).status_code in (400, 422)
        assert client.get("/healthz", headers={"X": "y" * 40_000}).status_code == 431


def test_slow_callers_are_hung_up_on(tmp_path: Path) -> None:
    """Headers and bodies that trickle, on limits made short."""
    with inside(tmp_path, header_s=0.5, body_s=0.5) as where:
        for first in (
            b"",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n",
            b"POST /api/tokens HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
        ):
            began = time.monotonic()
            answer = _trickled(where, first)
            assert time.monotonic() - began < 2
            assert status(answer) == 408


def _trickled(where: Path, first: bytes) -> bytes:
    """What is answered to somebody who sends the rest byte by byte, and stops when there is an answer."""
    answer = b""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(where))
        sock.sendall(first)
        sock.settimeout(0.1)
        for _ in range(50):
            try:
                got = sock.recv(65536)
            except TimeoutError:
                if first and not answer:
                    with contextlib.suppress(OSError):
                        sock.sendall(b"x")
                continue
            except ConnectionResetError:
                break
            if not got:
                break
            answer += got
    return answer


def test_too_many_requests(tmp_path: Path) -> None:
    with (
        inside(tmp_path, reads_per_s=1, burst_s=5) as where,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(where)), base_url="http://localhost") as client,
    ):
        answers = [client.get("/api/containers") for _ in range(8)]
    assert [answer.status_code for answer in answers].count(429) == 3
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_strangers_keep_nobody_out(api: Stand) -> None:
    """Neither by connections that say nothing, nor by guesses."""
    script = f"""
import os, socket, time
os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})
socks = [socket.create_connection(("127.0.0.1", {api.port})) for _ in range(150)]
print("there", flush=True)
time.sleep(30)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "there\n"
        try:
            assert status(raw(api, request())) == 200
            assert status(raw(api, request(), uid=STRANGER)) in (0, 503)  # or hung up on
        finally:
            holder.kill()
    until(lambda: status(raw(api, request(), uid=STRANGER)) == 401)
    guesses = b"GET /api/containers HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer bh_x\r\n\r\n" * 80
    answers = raw(api, guesses + request(Authorization="Bearer bh_x"), uid=STRANGER)
    assert answers.count(b"HTTP/1.1 429") > 20 and b"HTTP/1.1 200" not in answers
    assert status(raw(api, request())) == 200


def test_buckets() -> None:
    buckets = Buckets(2, 4)
    assert [buckets.take("a", 0.0) for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert buckets.take("b", 0.0) == 0 and buckets.take("a", 0.5) == 0 and buckets.take("a", 0.5) > 0


def test_the_unix_socket_is_roots_and_the_groups(api: Stand) -> None:
    assert api.where.stat().st_mode & 0o777 in (0o600, 0o660)
    assert (api.directory / "state").stat().st_mode & 0o077 == 0


def test_every_change_is_told_with_who(api: Stand, token: Callable[..., str]) -> None:
    secret = token("operate")
    raw(api, request("DELETE", "/api/containers/nosuch", Authorization=f"Bearer {secret}"), uid=STRANGER)
    raw(api, request("POST", "/api/tokens", b'{"name":"hush"}', Authorization=f"Bearer {secret}"), uid=STRANGER)
    changes = api.audit("api_change")
    last = next(one for one in reversed(changes) if "nosuch" in one["text"])  # type: ignore[operator]
    assert last["data"]["who"].startswith("token:t") and last["data"]["from"] == "127.0.0.1"  # type: ignore[index]
    assert last["data"]["status"] == 404  # type: ignore[index]
    denied = api.audit("api_denied")
    assert any("POST /api/tokens" in one["text"] for one in denied)  # type: ignore[operator]
    everything = json.dumps(changes + denied)
    assert secret not in everything and "hush" not in everything


def test_a_route_without_a_scope_does_not_start() -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    routes = Routes(app)

    @routes.add("GET", "/good", scope=Scope.READ, model=None)
    async def good() -> None:
        """Good"""

    routes.check()
    assert routes.needed("GET", "/good") is Scope.READ and routes.needed("POST", "/good") is None

    @app.get("/bare")
    async def bare() -> None:
        pass

    with pytest.raises(BulkheadError, match="GET /bare"):
        routes.check()
    mounted = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    mounted.mount("/below", good)
    with pytest.raises(BulkheadError, match="/below"):
        Routes(mounted).check()


def test_every_route_of_the_api_has_a_scope(api: Stand) -> None:
    with api.client() as client:
        document = client.get("/openapi.json").json()
    public = [path for path, ways in document["paths"].items() for way in ways.values() if way["security"] == []]
    assert sorted(public) == ["/healthz", "/openapi.json"]
    for path, ways in document["paths"].items():
        for method, way in ways.items():
            if path in public:
                continue
            where = path.replace("{ref}", "x").replace("{id}", "1").replace("{name}", "x")
            while (told := status(raw(api, request(method.upper(), where), uid=STRANGER))) == 429:
                time.sleep(0.2)  # so many strangers are told to be slower
            assert told == 401, (method, path)
            assert "401" in way["responses"] and "403" in way["responses"]
