"""Grants, tokens and VPN clients over the API."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from controller.wgkeys import is_key
from tests.api.stand import EXAMPLE, Stand, good, stand, until

SEED = {
    "source": "monitoring",
    "target": "xray",
    "protocol": "tcp",
    "port": 8080,
    "reason": "health",
    "duration_s": 3600,
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    directory = tmp_path_factory.mktemp("api")
    state = directory / "state.yaml"
    state.write_text(
        EXAMPLE.read_text().replace("listen_port: 51820", "listen_port: 51820\n    endpoint: vpn.example.org:51820")
    )
    with stand(directory, state=state) as found:
        yield found


@pytest.fixture
def client(api: Stand) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


@contextmanager
def somebody(api: Stand, name: str, *scopes: str) -> Iterator[httpx.Client]:
    """Somebody with a token."""
    with api.client() as root:
        made = good(root.post("/api/tokens", json={"name": name, "scopes": list(scopes)}))
        with api.client(headers={"Authorization": f"Bearer {made['token']}"}) as client:
            yield client
        good(root.delete(f"/api/tokens/{made['id']}"))


def test_one_asks_another_approves(api: Stand, client: httpx.Client) -> None:
    with somebody(api, "asker", "operate", "read") as asker:
        asked = asker.post("/api/grants", json=SEED)
        assert asked.status_code == 201, asked.text
        grant = asked.json()
        assert (grant["source"], grant["target"], grant["state"]) == ("202", "102", "requested")
        assert grant["requested_by"] == "token:asker" and grant["expires_at"] is None and grant["realized"]
        where = asked.headers["location"]
        assert asker.post(f"{where}/approve").status_code == 403
        approved = good(client.post(f"{where}/approve"))
        assert approved["state"] == "approved" and approved["realized"] and approved["decided_by"] == "uid:0"
        assert client.post(f"{where}/approve").json()["type"].endswith(":wrong-state")
        assert client.post(f"{where}/deny").status_code == 409
        assert good(asker.post(f"{where}/revoke"))["state"] == "revoked"
        assert good(asker.get("/api/grants", params={"state": "revoked"}))["grants"][0]["id"] == grant["id"]


def test_nobody_approves_their_own(api: Stand, client: httpx.Client) -> None:
    where = client.post("/api/grants", json=SEED).headers["location"]
    answer = client.post(f"{where}/approve")
    assert answer.status_code == 403 and answer.json()["type"].endswith(":self-approval")
    with somebody(api, "boss", "approve") as boss:
        assert good(boss.post(f"{where}/deny"))["state"] == "denied"
    declared = api.state.read_text()
    api.state.write_text(declared + "\napi: {self_approval: true}\n")
    mine = client.post("/api/grants", json=SEED).headers["location"]
    until(lambda: client.post(f"{mine}/approve").status_code == 200)
    assert good(client.post(f"{mine}/revoke"))["state"] == "revoked"
    api.state.write_text(declared)
    time.sleep(0.8)


def test_a_grant_ends_by_time(api: Stand, client: httpx.Client) -> None:
    where = client.post("/api/grants", json=SEED | {"duration_s": 1}).headers["location"]
    with somebody(api, "boss", "approve") as boss:
        assert good(boss.post(f"{where}/approve"))["state"] == "approved"
    until(lambda: good(client.get(where))["state"] == "expired", 3)
    until(lambda: any("expired" in str(one["text"]) for one in api.audit("api_change")), 3)
    assert client.post(f"{where}/revoke").status_code == 409


@pytest.mark.parametrize(
    "change, code, field",
    [
        ({"source": "nobody"}, "unknown-container", "source"),
        ({"target": "mcp-server"}, "invalid", "target"),
        ({"port": 0}, "invalid", "port"),
        ({"reason": ""}, "invalid", "reason"),
        ({"duration_s": 10**9}, "invalid", "duration_s"),
    ],
)
def test_what_cannot_be_granted(client: httpx.Client, change: dict[str, object], code: str, field: str) -> None:
    answer = client.post("/api/grants", json=SEED | change)
    assert answer.status_code == 422 and answer.json()["type"].endswith(f":{code}")
    assert answer.json()["errors"][0]["field"] == field


def test_an_approval_that_is_refused_is_taken_back(api: Stand, client: httpx.Client) -> None:
    where = client.post("/api/grants", json=SEED).headers["location"]
    api.realizer.leftovers[f"grant/{where.rpartition('/')[2]}"] = "refused: the proof says it opens more"
    with somebody(api, "boss", "approve") as boss:
        answer = boss.post(f"{where}/approve")
    assert answer.status_code == 409 and "opens more" in answer.json()["detail"]
    api.realizer.leftovers.clear()
    api.realizer.publish()
    assert good(client.get(where))["state"] == "requested"
    assert good(client.post(f"{where}/revoke"))["state"] == "revoked"


def test_grants_end_with_their_containers(api: Stand, client: httpx.Client) -> None:
    made = good(client.post("/api/containers/create", json={"name": "probe", "network": "management"}))
    where = client.post("/api/grants", json=SEED | {"source": "probe"}).headers["location"]
    with somebody(api, "boss", "approve") as boss:
        assert good(boss.post(f"{where}/approve"))["source"] == made["id"]
    assert client.delete("/api/containers/probe").status_code == 200
    assert good(client.get(where))["state"] == "revoked"


def test_vpn_clients(api: Stand, client: httpx.Client) -> None:
    made = client.post("/api/vpn/clients", json={"name": "laptop"})
    assert made.status_code == 201, made.text
    found = made.json()
    assert found["address"] == "10.8.0.2" and "Endpoint = vpn.example.org:51820" in found["config"]
    private = found["config"].split("PrivateKey = ")[1].split("\n")[0]
    shared = found["config"].split("PresharedKey = ")[1].split("\n")[0]
    assert is_key(private) and is_key(shared)
    listed = client.get("/api/vpn/clients").text
    assert found["public_key"] in listed and private not in listed and shared not in listed
    assert client.post("/api/vpn/clients", json={"name": "Laptop"}).json()["type"].endswith(":duplicate-name")
    for path in api.directory.rglob("*"):
        if path.is_file():
            assert private.encode() not in path.read_bytes(), path
    assert good(client.delete("/api/vpn/clients/laptop"))["name"] == "laptop"
    assert client.delete("/api/vpn/clients/laptop").status_code == 404


def test_secrets_are_shown_once(api: Stand, client: httpx.Client) -> None:
    for path, body, secret in (
        ("/api/vpn/clients", {"name": "phone"}, "config"),
        ("/api/tokens", {"name": "once", "scopes": ["read"]}, "token"),
    ):
        headers = {"Idempotency-Key": f"key-of-{secret}"}
        first = client.post(path, json=body, headers=headers)
        assert first.status_code == 201 and first.json()[secret]
        again = client.post(path, json=body, headers=headers)
        assert again.status_code == 409 and again.json()["type"].endswith(":shown-once")
        for one in api.directory.rglob("*"):
            if one.is_file() and secret == "token":
                assert first.json()[secret].encode() not in one.read_bytes()


def test_what_is_looked_at(client: httpx.Client) -> None:
    networks = {one["name"]: one for one in good(client.get("/api/networks"))["networks"]}
    assert networks["privacy"]["ids"] == "100-199" and networks["management"]["egress"] is None
    assert client.get("/api/networks/privacy").json() == networks["privacy"]
    assert client.get("/api/networks/nowhere").status_code == 404
    assert good(client.get("/api/egress"))["egress"][0]["port"] == "warp0"
    status = good(client.get("/api/status"))
    assert status["node"] == "n1" and status["store_connected"] and len(status["unknown"]) == 2
    why = good(client.get("/api/why", params={"source": "monitoring", "destination": "xray", "port": "8080"}))
    assert why["verdict"] == "no" and why["needed"]
    assert client.get("/api/why", params={"source": "xray", "destination": "nobody"}).status_code == 422
    cells = good(client.get("/api/reachability", params={"from": "monitoring", "to": "xray"}))["cells"]
    assert cells[0]["from"] == "monitoring" and cells[0]["to"] == "xray"
    assert client.get("/api/reachability").status_code == 200


def test_unchanged_answers_are_not_sent_again(client: httpx.Client) -> None:
    first = client.get("/api/containers")
    again = client.get("/api/containers", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.slow
def test_a_store_that_is_away_is_said(tmp_path: Path) -> None:
    with stand(tmp_path) as api, api.client() as client:
        server = next(
            int(one.name)
            for one in Path("/proc").iterdir()
            if one.name.isdigit() and str(tmp_path / "bulkhead.db").encode() in _cmdline(one)
        )
        os.kill(server, signal.SIGSTOP)
        try:
            answer = client.post("/api/containers/create", json={"name": "c", "network": "privacy"}, timeout=30)
            assert answer.status_code == 503 and answer.json()["type"].endswith(":unavailable")
            assert client.get("/api/containers").status_code == 200
        finally:
            os.kill(server, signal.SIGCONT)
        until(
            lambda: (
                not api.realizer.records.containers
                and not [o for o in api.realizer.records.operations if o.state == "running"]
            ),
            20,
        )


def _cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
