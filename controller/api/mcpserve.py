"""The MCP server over its two transports: inside the API process at `/mcp`, and on standard input and output.

Inside the API process a tool's request goes through the whole API again, in the name of whoever made the MCP request: what
they may do is found out in the one place that does so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import httpx
from mcp.server.mcpserver import Context
from mcp.server.transport_security import TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.api.mcptools import Asked, server
from controller.client import Where, answer, given, new_key, no_api

BODY_BYTES = 64 * 1024
BODY_S = 10.0


class Endpoint:
    """An ASGI application for `/mcp` (streamable HTTP, no sessions). `run` has to surround its use.

    `within` is the API as a principal sees it; the principal of a request is in `scope["state"]["principal"]`.
    """

    def __init__(self, within: Callable[[Any], ASGIApp], *, approving: bool = False) -> None:
        made = server(_Inside(within), approving=approving)
        made.streamable_http_app(
            json_response=True,
            stateless_http=True,
            # Host and Origin are the API's business, for every path alike.
            transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
            max_request_body_size=BODY_BYTES,
        )
        self._manager = made.session_manager

    def run(self) -> AbstractAsyncContextManager[None]:
        """Be ready for requests, for as long as the API runs."""
        return self._manager.run()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. There is nothing to listen to by GET, and no session to delete."""
        if scope["method"] != "POST":
            await Response(status_code=405, headers={"Allow": "POST"})(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(receive)
        except TimeoutError:
            await Response(status_code=408, headers={"Connection": "close"})(scope, receive, send)
            return
        if body is not None:
            await self._manager.handle_request(scope, _replayed(body, receive), send)
        else:
            await Response(status_code=413, headers={"Connection": "close"})(scope, receive, send)


async def _body(receive: Receive) -> bytes | None:
    """All of a request's body; None where it is too long or its sender went away."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _Inside:
    """Asks the API inside its own process."""

    def __init__(self, within: Callable[[Any], ASGIApp]) -> None:
        self._within = within

    async def __call__(self, ctx: Context[Any, Any], asked: Asked) -> Any:
        request = ctx.request_context.request
        assert isinstance(request, Request)
        transport = httpx.ASGITransport(self._within(request.state.principal), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as http:
            return await _answered(http, asked)


async def _answered(http: httpx.AsyncClient, asked: Asked) -> Any:
    response = await http.request(
        asked.method,
        asked.path,
        params=given(asked.params),
        json=asked.body,
        headers={} if asked.method == "GET" else {"Idempotency-Key": new_key()},
        timeout=httpx.Timeout(asked.answer_s, connect=5.0),
    )
    return answer(response.status_code, response.headers.get("content-type", ""), response.content)


class _Elsewhere:
    """Asks the API by its socket or address."""

    def __init__(self, where: Where) -> None:
        self._where = where
        verify: Any = where.trust() if where.url.startswith("https:") else False
        self._http = httpx.AsyncClient(
            base_url=where.base,
            headers=where.headers,
            transport=httpx.AsyncHTTPTransport(uds=where.uds, verify=verify),
            trust_env=False,
        )

    async def __call__(self, ctx: Context[Any, Any], asked: Asked) -> Any:
        try:
            return await _answered(self._http, asked)
        except httpx.TransportError as exc:
            raise no_api(self._where, exc, "") from exc


def serve_stdio(where: Where, *, approving: bool = False) -> None:
    """Serve one client on standard input and output, until it closes them. Raises `BrokenPipeError`: it went away."""
    try:
        anyio.run(server(_Elsewhere(where), approving=approving).run_stdio_async)
    except ExceptionGroup as group:
        if group.split((BrokenPipeError, ConnectionResetError))[1] is not None:
            raise
        raise BrokenPipeError from group
