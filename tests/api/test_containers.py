"""Containers over the API: created whole or not at all, by one or by many at once, through restarts."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.stand import Stand, good, stand, until
from tests.fakes.stores import opened

SEED = [
    {"name": "tor-relay", "network": "privacy", "services": [{"name": "tor-relay", "protocol": "tcp", "port": 9001}]},
    {
        "name": "prometheus",
        "network": "management",
        "services": [{"name": "prometheus", "protocol": "tcp", "port": 9090}],
    },
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with stand(tmp_path_factory.mktemp("api")) as found:
        yield found


@pytest.fixture
def client(api: Stand) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client
        for one in good(client.get("/api/containers"))["containers"]:
            if one["origin"] == "stored":
                client.delete(f"/api/containers/{one['id']}")
        api.realizer.refuses.clear()
        api.realizer.holds.clear()


def create(client: httpx.Client, name: str, network: str = "privacy", **more: object) -> httpx.Response:
    return client.post("/api/containers/create", json={"name": name, "network": network, **more})


def test_the_seeds_calls(client: httpx.Client) -> None:
    answers = [client.post("/api/containers/create", json=body) for body in SEED]
    assert [answer.status_code for answer in answers] == [201, 201]
    relay, prometheus = (answer.json() for answer in answers)
    assert relay["id"] == "101" and prometheus["id"] == "203"
    assert relay["state"] == prometheus["state"] == "ready"
    assert answers[0].headers["location"] == "/api/containers/101"
    services = {one["name"]: one for one in good(client.get("/api/services"))["services"]}
    assert services["tor-relay"]["address"] == relay["address"]
    assert services["prometheus"]["origin"] == "stored" and services["api"]["origin"] == "declared"


def test_ids_and_addresses_keep_clear_of_what_is_taken(client: httpx.Client) -> None:
    made = [good(create(client, f"c{n}")) for n in range(3)]
    assert [one["id"] for one in made] == ["101", "103", "104"]
    assert [one["address"] for one in made] == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    assert good(create(client, "d", id="150", address="10.0.0.77"))["address"] == "10.0.0.77"


@pytest.mark.parametrize(
    "body, status, code, field",
    [
        ({"name": "xray", "network": "privacy"}, 409, "duplicate-name", "name"),
        ({"name": "XRAY", "network": "management"}, 409, "duplicate-name", "name"),
        ({"name": "a", "network": "privacy", "id": "102"}, 409, "duplicate-id", "id"),
        ({"name": "a", "network": "privacy", "address": "10.0.0.102"}, 409, "duplicate-address", "address"),
        ({"name": "a", "network": "privacy", "address": "10.0.0.1"}, 422, "invalid", "address"),
        ({"name": "a", "network": "privacy", "address": "10.1.0.7"}, 422, "invalid", "address"),
        ({"name": "a", "network": "privacy", "id": "205"}, 422, "invalid", "id"),
        ({"name": "a", "network": "nowhere"}, 422, "unknown-network", "network"),
        ({"name": "a", "network": "privacy", "node": "n9"}, 422, "unknown-node", "node"),
        ({"name": "a b", "network": "privacy"}, 422, "invalid", "name"),
        ({"name": "a", "network": "privacy", "colour": "red"}, 422, "invalid", "colour"),
        (
            {"name": "a", "network": "privacy", "services": [{"name": "s", "port": 0}]},
            422,
            "invalid",
            "services.0.port",
        ),
        ({"name": "a", "network": "privacy", "driver": "lxc", "command": ["x"]}, 422, "invalid", "command"),
        ({"name": "a", "network": "privacy", "command": ["\ud800"]}, 422, "invalid", "command.0"),
        (
            {"name": "a", "network": "privacy", "services": [{"name": "s", "port": 1}, {"name": "s", "port": 2}]},
            *(422, "invalid", "services[1].name"),
        ),
    ],
)
def test_what_cannot_be_is_refused_and_says_which_field(
    client: httpx.Client, body: dict[str, object], status: int, code: str, field: str
) -> None:
    answer = client.post(
        "/api/containers/create", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (status, f"urn:bulkhead:problem:{code}"), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert field in [error["field"] for error in problem["errors"]]
    assert all(error["fix"] for error in problem["errors"])


def test_a_refused_create_leaves_nothing(api: Stand, client: httpx.Client) -> None:
    api.realizer.refuses["bad"] = "the proof says it leaks"
    answer = create(client, "bad")
    assert answer.status_code == 409 and answer.json()["type"].endswith(":refused")
    assert "leaks" in answer.json()["detail"]
    assert client.get("/api/containers/bad").status_code == 404
    with opened(api.remote) as store:  # at the moment of the answer; who follows the store hears of it a moment later
        left = store.start()
    assert not left.containers and not [one for one in left.operations if one.state == "running"]


def test_a_late_create_leaves_nothing(api: Stand, client: httpx.Client) -> None:
    api.realizer.holds["slow"] = "its bridge is not there yet"
    answer = client.post("/api/containers/create?timeout=0.3", json={"name": "slow", "network": "privacy"})
    assert answer.status_code == 409 and answer.json()["type"].endswith(":not-realized")
    assert "bridge" in answer.json()["detail"]
    with opened(api.remote) as store:  # at the moment of the answer; who follows the store hears of it a moment later
        left = store.start()
    assert not left.containers and not [one for one in left.operations if one.state == "running"]


def test_what_is_declared_is_not_changed(client: httpx.Client) -> None:
    for answer in (client.delete("/api/containers/xray"), client.post("/api/containers/102/stop")):
        assert answer.status_code == 409 and answer.json()["type"].endswith(":declared")
        assert "oo1424oo.yaml" in answer.json()["detail"]


def test_start_stop_delete(client: httpx.Client) -> None:
    create(client, "c")
    assert good(client.post("/api/containers/c/stop"))["state"] == "stopped"
    assert good(client.post("/api/containers/c/start"))["state"] == "ready"
    assert good(client.delete("/api/containers/c"))["name"] == "c"
    assert client.get("/api/containers/c").status_code == 404
    assert client.delete("/api/containers/c").status_code == 404


def test_what_is_late_to_go_goes_on_going(api: Stand, client: httpx.Client) -> None:
    number = good(create(client, "late"))["id"]
    api.realizer.leftovers[f"container/{number}"] = "its process does not end"
    answer = client.delete("/api/containers/late?timeout=0.2")
    assert answer.status_code == 202 and answer.json()["state"] == "running"
    api.realizer.leftovers.clear()
    api.realizer.publish()
    until(lambda: good(client.get(answer.headers["location"]))["state"] == "done")


def test_not_waiting_gives_an_operation(api: Stand, client: httpx.Client) -> None:
    for how in ({"params": {"wait": "false"}}, {"headers": {"Prefer": "respond-async"}}):
        body = {"name": f"c{len(how)}{next(iter(how))}", "network": "privacy"}
        answer = client.post("/api/containers/create", json=body, **how)  # type: ignore[arg-type]
        assert answer.status_code == 202 and answer.json()["state"] == "running"
        until(lambda: good(client.get(answer.headers["location"]))["state"] == "done")  # noqa: B023
        assert good(client.get(answer.headers["location"]))["result"]["name"] == body["name"]


def test_the_same_key_is_carried_out_once(api: Stand, client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "k1"}
    body = {"name": "once", "network": "privacy"}
    first = client.post("/api/containers/create", json=body, headers=headers)
    second = client.post("/api/containers/create", json=body, headers=headers)
    assert first.status_code == second.status_code == 201 and first.json() == second.json()
    other = client.post("/api/containers/create", json=body | {"name": "two"}, headers=headers)
    assert other.status_code == 422 and other.json()["type"].endswith(":key-reused")
    api.stop(9)
    api.start()
    assert client.post("/api/containers/create", json=body, headers=headers).json() == first.json()
    api.realizer.holds["late"] = "not yet"
    late = {"name": "late", "network": "privacy"}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            client.post, "/api/containers/create?timeout=1", json=late, headers={"Idempotency-Key": "k2"}
        )
        until(lambda: client.get("/api/containers/late").status_code == 200)
        again = client.post("/api/containers/create?timeout=1", json=late, headers={"Idempotency-Key": "k2"})
        assert again.status_code == 409 and again.json()["type"].endswith(":in-progress")
        assert running.result().status_code == 409
    again = client.post("/api/containers/create?timeout=1", json=late, headers={"Idempotency-Key": "k2"})
    assert again.status_code == 409 and again.json() == running.result().json()


def test_the_same_key_at_once(client: httpx.Client) -> None:
    body = {"name": "atonce", "network": "privacy"}

    def ask(_: int) -> httpx.Response:
        return client.post("/api/containers/create", json=body, headers={"Idempotency-Key": "k3"})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1


def test_many_at_once_and_then_none_left(api: Stand, client: httpx.Client) -> None:
    def ask(number: int) -> httpx.Response:
        return create(client, f"m{number}", ("privacy", "management")[number % 2])

    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(220)))
    took = time.monotonic() - began
    made = [answer.json() for answer in answers if answer.status_code == 201]
    bad = [answer.json()["type"] for answer in answers if answer.status_code != 201]
    assert len(made) == 98 + 97, set(bad)
    assert set(bad) == {"urn:bulkhead:problem:ids-exhausted"}
    for what in ("id", "name", "address", "mac"):
        assert len({one[what] for one in made}) == len(made)
    assert all(100 <= int(one["id"]) < 200 for one in made if one["network"] == "privacy")
    assert took < 10
    with ThreadPoolExecutor(32) as pool:
        gone = list(pool.map(lambda one: client.delete(f"/api/containers/{one['id']}").status_code, made))
    assert set(gone) == {200}


def test_a_caller_who_goes_away_leaves_a_whole_container_or_none(api: Stand, client: httpx.Client) -> None:
    api.realizer.holds["left"] = "not yet"
    with api.client() as other, pytest.raises(httpx.ReadTimeout):
        other.post("/api/containers/create?timeout=1", json={"name": "left", "network": "privacy"}, timeout=0.2)
    assert good(client.get("/api/containers/left"))["state"] == "pending"
    until(lambda: not records(api).containers and not running(api))


def test_a_restart_goes_on_with_what_was_begun(api: Stand, client: httpx.Client) -> None:
    api.realizer.holds |= {"good": "not yet", "bad": "not yet"}
    for name in ("good", "bad"):
        threading.Thread(target=lambda name=name: _ignore(api, name), daemon=True).start()
        until(lambda: client.get(f"/api/containers/{name}").status_code == 200)  # noqa: B023
    api.stop(9)
    del api.realizer.holds["good"]
    api.realizer.refuses["bad"] = "no"
    api.realizer.publish()
    api.start()
    with api.client() as again:
        until(lambda: not running(api))
        assert [one.name for one in records(api).containers] == ["good"]
        assert good(again.get("/api/containers/good"))["state"] == "ready"


def _ignore(api: Stand, name: str) -> None:
    with api.client() as client, contextlib.suppress(httpx.HTTPError):
        create(client, name)


def test_a_damaged_state_file_leaves_all_as_it_was(tmp_path: Path) -> None:
    state = tmp_path / "state.yaml"
    state.write_text((Path(__file__).parents[2] / "examples" / "oo1424oo.yaml").read_text())
    with stand(tmp_path, state=state) as api, api.client() as client:
        declared = state.read_text()
        state.write_text("networks: [")
        until(lambda: good(client.get("/api/status"))["problem"])
        assert create(client, "c").status_code == 201
        state.write_text(declared.replace("name: xray", "name: yray"))
        until(lambda: client.get("/api/containers/yray").status_code == 200)
        assert good(client.get("/api/status"))["problem"] is None


def records(api: Stand):  # type: ignore[no-untyped-def]
    return api.realizer.records


def running(api: Stand) -> list[str]:
    return [one.id for one in records(api).operations if one.state == "running"]
