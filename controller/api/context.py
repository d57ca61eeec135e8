"""What the routes share: the view, the operations, and how a request is answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from controller.api.access import Principal
from controller.api.operations import Answer, Asked, Operations, Target, request_digest
from controller.api.problem import MEDIA_TYPE
from controller.api.routes import Routes
from controller.api.settings import Settings
from controller.api.view import View, encoded
from controller.store import Change

Wait = Annotated[bool, Query(description="Answer when it is real; otherwise at once, with an operation to ask for.")]
Timeout = Annotated[float, Query(ge=0.1, le=300, description="How many seconds to wait until it is real.")]
Prefer = Annotated[str | None, Header(max_length=200, description="`respond-async` is `wait=false`.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r'^[\x21\x23-\x7e]{1,255}$|^"[\x20-\x21\x23-\x7e]{1,253}"$',
        description="The same request with the same key is carried out once, and answered the same again.",
    ),
]


@dataclass(frozen=True, slots=True)
class Manner:
    """How a change is asked for: waiting until it is real, at most `timeout_s` (None: as long as the settings say)."""

    waits: bool = True
    timeout_s: float | None = None
    key: str | None = None


def manner(wait_s: float) -> Any:
    """The parameters of a request that may wait, as the default of a route's argument of type `Manner`."""

    async def read(
        wait: Wait = True, timeout: Timeout = wait_s, prefer: Prefer = None, idempotency_key: IdempotencyKey = None
    ) -> Manner:
        return Manner(wait and "respond-async" not in (prefer or ""), timeout, idempotency_key)

    return Depends(read)


@dataclass(slots=True)
class Context:
    """What a route needs."""

    settings: Settings
    view: View
    operations: Operations
    routes: Routes

    def principal(self, request: Request) -> Principal:
        """Who asks."""
        found: Principal = request.state.principal
        return found

    def read(self, request: Request, name: str, make: Callable[[], BaseModel]) -> Response:
        """An answer that is kept until something changes; nothing where the caller has it already."""
        body, tag = self.view.cached(name, make)
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"ETag": tag})
        return Response(body, media_type="application/json", headers={"ETag": tag})

    async def change(
        self,
        request: Request,
        kind: str,
        function: Callable[[Change], Target],
        how: Manner,
        about: dict[str, Any],
    ) -> Response:
        """Carry out a change and answer it; `about` is what the audit says of it. Raises `ApiProblem`."""
        request.state.about = about
        limit = self.settings.limits.wait_s if how.timeout_s is None else how.timeout_s
        path = str(request.url.path)
        asked = Asked(
            self.principal(request),
            kind,
            request_digest(request.method, path, await request.body()),
            (how.key or "").strip('"'),
            limit if how.waits else None,
        )
        return sent(await self.operations.carry_out(asked, function))


def sent(answer: Answer) -> Response:
    """An answer as Starlette sends it."""
    media_type = "application/json" if answer.good else MEDIA_TYPE
    return Response(answer.body, answer.status, dict(answer.headers), media_type)


def made(value: BaseModel, status: int = 200) -> Response:
    """A value as an answer."""
    return Response(encoded(value), status, media_type="application/json")
