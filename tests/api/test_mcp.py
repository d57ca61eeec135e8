"""MCP by the official SDK's client, over both transports, against the API's own process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult

from controller.records import Scope, TokenRecord
from controller.store import Store
from tests.api.stand import ROOT, Stand, stand, until

READS = {
    *("status", "list_networks", "list_services", "list_events", "list_containers", "get_container"),
    *("reachability", "why", "list_grants"),
}
CHANGES = {"create_container", "start_container", "request_grant"}
DESTROYS = {"delete_container", "stop_container", "revoke_grant"}
DECIDES = {"approve_grant", "deny_grant"}
Use = Callable[[Client], Awaitable[Any]]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with stand(tmp_path_factory.mktemp("mcp"), port=free_port()) as found:
        yield found


@pytest.fixture(scope="module")
def tokens(api: Stand) -> dict[str, str]:
    """A token that may read, and one that may operate too."""
    from controller.api.access import digest, new_token

    out = {}
    store = Store([api.remote])
    store.start()
    for name, scopes in {"reader": (Scope.READ,), "operator": (Scope.READ, Scope.OPERATE)}.items():
        number, out[name] = new_token()
        record = TokenRecord(number, name, digest(out[name]), scopes)
        store.change(lambda change, record=record: change.put(record))  # type: ignore[misc]
    store.close()
    return out


def by_http(api: Stand, token: str | None, use: Use, mode: str = "auto") -> Any:
    """Do something with a client that comes by loopback."""

    async def run() -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=30) as http,
            Client(streamable_http_client(f"http://127.0.0.1:{api.port}/mcp", http_client=http), mode=mode) as client,
        ):
            return await use(client)

    return asyncio.run(run())


def by_stdio(api: Stand, token: str | None, use: Use, *options: str) -> Any:
    """Do something with a client that starts `bulkhead mcp`."""

    async def run() -> Any:
        program = "from controller.cli import main; main()"
        env = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"BULKHEAD_TOKEN": token} if token else {})
        words = ["-c", program, "mcp", "--run-dir", str(api.directory), *options]
        async with Client(StdioServerParameters(command=sys.executable, args=words, env=env)) as client:
            return await use(client)

    return asyncio.run(run())


def calling(tool: str, /, **arguments: Any) -> Use:
    return lambda client: client.call_tool(tool, arguments)


def text(result: CallToolResult) -> str:
    return "".join(part.text for part in result.content if part.type == "text")


@pytest.fixture(scope="module", params=["http", "http-legacy", "stdio"])
def ask(api: Stand, request: pytest.FixtureRequest) -> Callable[[str | None, Use], Any]:
    """How a client comes there."""
    if request.param == "stdio":
        return lambda token, use: by_stdio(api, token, use)
    return lambda token, use: by_http(api, token, use, "legacy" if request.param == "http-legacy" else "auto")


Ask = Callable[[str | None, Use], Any]


def test_tools_are_listed_with_what_they_do(ask: Ask) -> None:
    found = {tool.name: tool for tool in ask(None, lambda client: client.list_tools()).tools}
    assert set(found) == READS | CHANGES | DESTROYS
    for name, tool in found.items():
        assert tool.annotations is not None and len(tool.description or "") > 20
        assert tool.annotations.read_only_hint is (name in READS)
        assert tool.annotations.destructive_hint is (name in DESTROYS)
        assert tool.input_schema["additionalProperties"] is False
        assert all("description" in of for of in tool.input_schema["properties"].values()), name
        assert tool.output_schema is not None and tool.output_schema["type"] == "object"


def test_a_container_is_made_and_deleted(api: Stand, ask: Ask, tokens: dict[str, str]) -> None:
    async def use(client: Client) -> list[CallToolResult]:
        services = [{"name": "http", "protocol": "tcp", "port": 80}]
        made = await client.call_tool("create_container", {"name": "web", "network": "privacy", "services": services})
        return [
            made,
            await client.call_tool("get_container", {"container": "web"}),
            await client.call_tool("list_containers", {"network": "privacy"}),
            await client.call_tool("delete_container", {"container": "web"}),
            await client.call_tool("get_container", {"container": "web"}),
        ]

    made, got, listed, deleted, gone = ask(tokens["operator"], use)
    assert not made.is_error, text(made)
    assert made.structured_content["state"] == "ready" and json.loads(text(made)) == made.structured_content
    assert got.structured_content["address"] == made.structured_content["address"]
    assert "web" in {container["name"] for container in listed.structured_content["containers"]}
    assert not deleted.is_error
    assert gone.is_error and text(gone).endswith("[not-found]")
    changes = [event["data"] for event in api.audit("api_change")]
    assert any(data["who"] == "token:operator" for data in changes if isinstance(data, dict))


def each(calls: list[tuple[str, dict[str, Any]]]) -> Use:
    """All calls in one session."""

    async def use(client: Client) -> list[CallToolResult]:
        return [await client.call_tool(tool, arguments) for tool, arguments in calls]

    return use


def test_a_caller_is_refused_what_its_token_does_not_allow(ask: Ask, tokens: dict[str, str]) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("create_container", {"name": "web", "network": "privacy"}),
        ("delete_container", {"container": "102"}),
        ("start_container", {"container": "102"}),
        ("stop_container", {"container": "102"}),
        ("revoke_grant", {"grant": "1"}),
        ("request_grant", {"source": "202", "target": "102", "port": 8080, "reason": "to see"}),
    ]
    listed, *refused = ask(tokens["reader"], each([("list_containers", {}), *calls]))
    assert not listed.is_error
    for done in refused:
        assert done.is_error and text(done).endswith("[forbidden]") and "operate" in text(done), text(done)


def test_everything_can_be_read(ask: Ask, tokens: dict[str, str]) -> None:
    flow = {"source": "monitoring", "destination": "xray", "protocol": "tcp", "port": 8080}
    calls: list[tuple[str, dict[str, Any]]] = [
        *(
            (name, {})
            for name in ("status", "list_networks", "list_services", "list_grants", "list_containers", "reachability")
        ),
        ("why", flow),
        ("list_events", {"limit": 1, "kind": "api_started"}),
    ]
    for (name, _), done in zip(calls, ask(tokens["reader"], each(calls)), strict=True):
        assert not done.is_error and done.structured_content, f"{name}: {text(done)}"
    assert done.structured_content["events"][0]["kind"] == "api_started"


def test_a_grant_is_asked_for_and_revoked(ask: Ask, tokens: dict[str, str]) -> None:
    async def use(client: Client) -> tuple[CallToolResult, CallToolResult]:
        wanted = {"source": "monitoring", "target": "xray", "port": 8080, "reason": "to see"}
        made = await client.call_tool("request_grant", wanted)
        return made, await client.call_tool("revoke_grant", {"grant": made.structured_content["id"]})

    made, revoked = ask(tokens["operator"], use)
    assert made.structured_content["state"] == "requested" and revoked.structured_content["state"] == "revoked"


def test_nobody_approves_by_a_tool_that_is_not_offered(ask: Ask) -> None:
    done = ask(None, calling("approve_grant", grant="1"))
    assert done.is_error and "Unknown tool" in text(done)


def test_approving_is_offered_where_it_is_switched_on(api: Stand) -> None:
    found = by_stdio(api, None, lambda client: client.list_tools(), "--mcp-approve")
    assert {tool.name for tool in found.tools} == READS | CHANGES | DESTROYS | DECIDES


def test_arguments_out_of_bounds_are_refused(ask: Ask) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("get_container", {"container": "../tokens"}),
        ("get_container", {"container": "web", "force": True}),
        ("create_container", {"name": "a_b", "network": "privacy"}),
        ("create_container", {"name": "web"}),
        ("create_container", {"name": "web", "network": "privacy", "timeout_s": 1e9}),
        ("request_grant", {"source": "202", "target": "102", "port": 0, "reason": "x"}),
        ("list_events", {"limit": 10**6}),
    ]
    for done in ask(None, each(calls)):
        assert done.is_error and "validation error" in text(done), text(done)


def test_an_error_says_what_to_do(api: Stand, ask: Ask) -> None:
    done = ask(None, calling("delete_container", container="xray"))
    assert done.is_error and "declared in" in text(done) and text(done).endswith("[declared]")
    api.realizer.refuses["bad"] = "no such template"
    done = ask(None, calling("create_container", name="bad", network="privacy"))
    assert done.is_error and "no such template" in text(done)
    with api.client() as client:
        until(lambda: client.get("/api/containers/bad").status_code == 404)


# ------------------------------------------------------------------------------------------------ /mcp among the routes


def initialize() -> dict[str, Any]:
    info = {"name": "x", "version": "1"}
    params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": info}
    return {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}


HEADERS = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Authorization": "Bearer bh_0000000000_no"}, 401),
        ({"Host": "evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 400),
    ],
)
def test_mcp_is_guarded_as_everything_is(api: Stand, headers: dict[str, str], status: int) -> None:
    with api.client() as client:
        assert client.post("/mcp", json=initialize(), headers=HEADERS | headers).status_code == status


def test_there_is_no_session_and_no_stream(api: Stand) -> None:
    with api.client() as client:
        assert "mcp-session-id" not in client.post("/mcp", json=initialize(), headers=HEADERS).headers
        assert client.get("/mcp", headers=HEADERS).status_code == 405
        assert client.delete("/mcp").status_code == 405
        assert client.post("/mcp", content=b"[" * 70_000, headers=HEADERS).status_code == 413
        assert client.post("/mcp", content=b"{", headers=HEADERS).status_code == 400


def test_no_api_is_told_by_every_tool(tmp_path: Path) -> None:
    api = Stand(tmp_path, "", None, tmp_path)  # type: ignore[arg-type]
    done = by_stdio(api, None, calling("list_containers"))
    assert done.is_error and "Start one with: bulkhead up FILE" in text(done)


@pytest.mark.parametrize("sockets", [False, True])
def test_a_client_that_goes_away_leaves_no_noise(tmp_path: Path, sockets: bool) -> None:
    words = [sys.executable, "-m", "controller", "mcp", "--run-dir", str(tmp_path)]
    ours, theirs = (one.detach() for one in socket.socketpair()) if sockets else os.pipe()
    with subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, text=True
    ) as server:
        os.close(theirs)
        os.close(ours)
        _, said = server.communicate(json.dumps(initialize()) + "\n", timeout=30)
    assert (server.returncode, said) == (0, "")
