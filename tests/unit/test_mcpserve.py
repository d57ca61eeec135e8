"""The MCP endpoint as an ASGI application, where a client is not an SDK's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controller.api import mcpserve
from controller.api.mcpserve import Endpoint


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("the API was asked")


def answered(messages: list[dict[str, Any]], method: str = "POST") -> int:
    """The status that is answered to a request that comes in these messages, and then no more."""

    async def run() -> int:
        waiting = list(messages)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": "/mcp", "headers": [], "query_string": b"", "state": {}}
        endpoint = Endpoint(lambda _: _nothing)
        async with endpoint.run():
            await endpoint(scope, receive, send)
        return int(sent[0]["status"])

    return asyncio.run(run())


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcpserve, "BODY_S", 0.05)
    assert answered([part(b"{", True)]) == 408


def test_a_body_that_is_too_long_is_not_read_on() -> None:
    assert answered([part(b"x" * 40_000, True), part(b"x" * 40_000, True)]) == 413


def test_other_methods_have_nothing_to_wait_for() -> None:
    assert answered([], "GET") == 405
    assert answered([], "DELETE") == 405
