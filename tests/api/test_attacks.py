"""The API attacked: paths that are spelt oddly, tokens that have ended, approvals by the back door, bodies made to hurt."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.api.stand import Stand, stand

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to ask as other users")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with stand(tmp_path_factory.mktemp("api"), port=port) as found:
        yield found


def made(api: Stand, name: str, *scopes: str, by: str | None = None, expires_in_s: int = 60) -> str:
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
