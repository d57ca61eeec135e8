"""`/mcp` of the API's process, made when it is first asked for: the SDK is half of what the API would import.

Imports mcpserve, late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from controller.api.mcpserve import Endpoint


class LateEndpoint:
    """An ASGI application that becomes a `mcpserve.Endpoint` with the first request. `run` has to surround its use."""

    def __init__(self, within: Callable[[Any], ASGIApp], *, approving: bool = False) -> None:
        self._within, self._approving = within, approving
        self._wanted = asyncio.Event()
        self._endpoint: asyncio.Future[Endpoint] | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Be ready for requests, for as long as the API runs."""
        self._endpoint = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._serve(self._endpoint))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _serve(self, made: asyncio.Future[Endpoint]) -> None:
        """Its own task, since what the SDK runs has to end where it has begun."""
        await self._wanted.wait()
        try:
            serving = await asyncio.to_thread(import_module, "controller.api.mcpserve")
            endpoint: Endpoint = serving.Endpoint(self._within, approving=self._approving)
            async with endpoint.run():
                made.set_result(endpoint)
                await asyncio.Event().wait()
        except Exception as exc:
            if made.done():
                raise
            made.set_exception(exc)  # told to whoever asks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        self._wanted.set()
        assert self._endpoint is not None, "run() has to surround this"
        endpoint = await asyncio.shield(self._endpoint)
        await endpoint(scope, receive, send)
