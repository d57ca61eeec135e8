"""The API attacked: paths that are spelt oddly, tokens that have ended, approvals by the back door, bodies made to hurt."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.api.stand import EXAMPLE, ROOT, Stand, good, stand, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to ask as other users")

GRANT = {"source": "202", "target": "102", "port": 8080, "reason": "health"}
_BODY = json.dumps({"name": "stolen", "network": "privacy"})
STOLEN = (
    "POST /api/containers/create HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(_BODY)}\r\n\r\n{_BODY}"
).encode()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with stand(tmp_path_factory.mktemp("api"), port=port) as found:
        yield found


def made(api: Stand, name: str, *scopes: str, by: str | None = None, expires_in_s: int = 600) -> str:
    """A token, made by root or by the holder of another."""
    headers = {"Authorization": f"Bearer {by}"} if by else {}
    with api.client(headers=headers) as client:
        body = {"name": name, "scopes": scopes, "expires_in_s": expires_in_s}
        answer = client.post("/api/tokens", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])


def asked(api: Stand, method: str, path: str, *, token: str | None = None, body: object = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with api.client(headers=headers) as client:
        return client.request(method, path, json=body)


@pytest.mark.parametrize(
    "end", ["%0A", "%0a", "%0A%0A", "%00", "/", "//", "%2f", "%0D", "%E2%80%A8", ";", "%20", "?", "?x=%0A"]
)
def test_no_spelling_of_a_path_needs_less_of_a_scope(api: Stand, end: str) -> None:
    read = made(api, f"reader{abs(hash(end))}", "read")
    body = {"name": "stolen", "network": "privacy"}
    for path in (
        "/api/containers/create",
        "//api/containers/create",
        "/api/./containers/create",
        "/api//containers/create",
    ):
        answer = asked(api, "POST", path + end, token=read, body=body)
        assert answer.status_code in (400, 403, 404, 405), (path + end, answer.status_code, answer.text)
    for path, what in (("/api/tokens", {"name": "more", "scopes": ["read"]}), ("/api/grants/1/approve", {})):
        answer = asked(api, "POST", path + end, token=read, body=what)
        assert answer.status_code in (400, 403, 404, 405), (path + end, answer.status_code, answer.text)
    assert asked(api, "GET", "/api/containers/stolen").status_code == 404
    operate = made(api, f"operator{abs(hash(end))}", "operate")
    for path in ("/api/containers", "/api/events", "/api/status"):
        assert asked(api, "GET", path + end, token=operate).status_code in (400, 403, 404, 405, 307), path + end


def test_a_stream_ends_with_its_token(api: Stand) -> None:
    tokens = {"revoked": made(api, "seer", "read"), "expired": made(api, "glimpse", "read", expires_in_s=4)}
    for end, token in tokens.items():
        with (
            api.client(headers={"Authorization": f"Bearer {token}"}) as reader,
            reader.stream("GET", "/api/events/stream") as stream,
        ):
            assert stream.status_code == 200
            lines = stream.iter_lines()
            next(lines)
            if end == "revoked":
                assert asked(api, "DELETE", f"/api/tokens/{token.split('_')[1]}").status_code == 200
            else:
                until(lambda: asked(api, "GET", "/api/status", token=tokens["expired"]).status_code == 401)
            asked(api, "DELETE", "/api/containers/nosuch-afterwards")
            assert "nosuch-afterwards" not in "\n".join(lines)  # and it comes to its end


def test_nobody_approves_with_a_token_of_their_own_making(api: Stand) -> None:
    first = made(api, "first", "read", "operate", "approve")
    second = made(api, "second", "approve", by=first)
    third = made(api, "third", "approve", by=second)
    other = made(api, "other", "approve")
    grant = good(asked(api, "POST", "/api/grants", token=first, body=GRANT))
    for token in (first, second, third):
        answer = asked(api, "POST", f"/api/grants/{grant['id']}/approve", token=token)
        assert answer.status_code == 403 and answer.json()["type"].endswith(":self-approval"), answer.text
    assert good(asked(api, "POST", f"/api/grants/{grant['id']}/approve", token=other))["state"] == "approved"


def test_tokens_end_with_the_one_they_were_made_with(api: Stand) -> None:
    """Else whoever has stolen one makes another before it is revoked."""
    first = made(api, "stolen", "read", "approve", expires_in_s=600)
    second = made(api, "kept", "read", "approve", by=first, expires_in_s=300)
    third = made(api, "hidden", "read", by=second, expires_in_s=200)
    unsaid = good(asked(api, "POST", "/api/tokens", token=first, body={"name": "unsaid", "scopes": ["read"]}))
    mine = next(one for one in good(asked(api, "GET", "/api/tokens"))["tokens"] if one["name"] == "stolen")
    assert unsaid["expires_at"] == mine["expires_at"]
    assert asked(api, "DELETE", f"/api/tokens/{first.split('_')[1]}").status_code == 200
    for token in (first, second, third, unsaid["token"]):
        assert asked(api, "GET", "/api/status", token=token).status_code == 401


def test_a_grant_is_not_the_next_containers(tmp_path: Path) -> None:
    """Of a container that was declared, and whose id is given out again; and of one that is gone altogether."""
    state = tmp_path / "state.yaml"
    text = EXAMPLE.read_text()
    state.write_text(text)
    with stand(tmp_path, state=state) as api:
        boss = made(api, "boss", "read", "approve")
        number, waiting = (good(asked(api, "POST", "/api/grants", body=GRANT))["id"] for _ in range(2))
        assert asked(api, "POST", f"/api/grants/{number}/approve", token=boss).status_code == 200
        whole = yaml.safe_load(text)
        _without(whole, "102")
        state.write_text(yaml.safe_dump(whole))
        until(lambda: asked(api, "GET", "/api/containers/102").status_code == 404)
        new = asked(api, "POST", "/api/containers/create", body={"name": "new", "network": "privacy", "id": "102"})
        assert new.status_code == 201, new.text
        for grant in (number, waiting):
            assert good(asked(api, "GET", f"/api/grants/{grant}"))["state"] == "revoked"
        for grant in good(asked(api, "GET", "/api/grants"))["grants"]:
            assert grant["state"] == "revoked"
        third = good(asked(api, "POST", "/api/grants", body=GRANT | {"target": "102"}))["id"]
        assert asked(api, "POST", f"/api/grants/{third}/approve", token=boss).status_code == 200
        _without(whole, "202")
        state.write_text(yaml.safe_dump(whole))
        until(lambda: good(asked(api, "GET", f"/api/grants/{third}"))["state"] == "revoked")


def _without(whole: dict[str, Any], number: str) -> None:
    """Leave out a container, and the literal flows that name its port."""
    whole["lxc"]["containers"] = [one for one in whole["lxc"]["containers"] if one["id"] != number]
    whole.pop("openflow", None)


def test_strangers_do_not_shut_out_root(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import os, socket, sys, time; os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
        f"many = [socket.create_connection(('127.0.0.1', {port})) for _ in range(700)]\n"
        "print('ready', flush=True); time.sleep(30)"
    )
    with stand(tmp_path, port=port) as api:
        stranger = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        try:
            assert stranger.stdout is not None and stranger.stdout.readline() == b"ready\n"
            for _ in range(20):
                assert asked(api, "GET", "/api/containers").status_code == 200
        finally:
            stranger.kill()
            stranger.communicate()


def test_a_port_that_was_left_to_root_is_not_roots_request(tmp_path: Path) -> None:
    """A connection is reset before it is accepted, and root connects from the same port: the kernel's tables name root."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import os, socket, struct, sys; os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
        f"s = socket.socket(); s.bind(('127.0.0.1', 0)); s.connect(('127.0.0.1', {port}))\n"
        f"s.sendall({STOLEN!r})\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
        "print(s.getsockname()[1]); s.close()"
    )
    with stand(tmp_path, port=port) as api:
        assert api.process is not None
        os.kill(api.process.pid, signal.SIGSTOP)  # it is busy, for a moment
        try:
            done = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=10
            )
            with socket.socket() as root:
                root.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                root.bind(("127.0.0.1", int(done.stdout)))
                root.connect(("127.0.0.1", port))
                os.kill(api.process.pid, signal.SIGCONT)
                root.sendall(b"GET /api/containers HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                root.settimeout(5)
                assert root.recv(100).startswith(b"HTTP/1.1 200")
        finally:
            os.kill(api.process.pid, signal.SIGCONT)
        assert asked(api, "GET", "/api/containers/stolen").status_code == 404


@pytest.mark.parametrize("words", [("--store", "nonsense"), ("--store", "ssl:1.2.3.4:5"), ("--state-dir", "/proc/x")])
def test_what_is_wrong_with_options_is_said_in_a_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    given = dict(zip(("--run-dir", "--state-dir"), (str(tmp_path), str(tmp_path / "state")), strict=True))
    given[words[0]] = words[1]
    command = [sys.executable, "-c", "from controller.cli import main; main()", "api", str(EXAMPLE)]
    done = subprocess.run(
        [*command, *(word for pair in given.items() for word in pair)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("bulkhead: ") and words[1] in done.stderr


def test_a_cursor_of_a_log_that_is_no_more_misses_nothing(api: Stand) -> None:
    """The logs were begun anew, and number from one: a reader of the old ones would wait for ever, and not be told."""
    with api.client() as client:
        client.delete("/api/containers/nosuch-before")
        old = {"after": "c900.a900.p99999"}
        assert "nosuch-before" in client.get("/api/events", params=old | {"limit": 1000}).text
        ends = client.get("/api/events").json()["next"]
        assert client.get("/api/events", params={"after": ends}).json()["events"] == []
        with client.stream("GET", "/api/events/stream", params=old) as stream:
            assert any("nosuch-before" in line for line in stream.iter_lines())
