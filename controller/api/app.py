"""The app: every route, the problems they raise, and the document that describes them."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from controller.api import clients, containers, grants, history, models, operationroutes, questions, tokens
from controller.api.audit import Audit
from controller.api.context import Context, made
from controller.api.guard import Guard
from controller.api.mcpstart import LateEndpoint
from controller.api.operations import Kind, Operations
from controller.api.problem import MEDIA_TYPE, ApiProblem, Fault
from controller.api.routes import PUBLIC, Routes
from controller.api.settings import Settings
from controller.api.view import View
from controller.events import Event
from controller.events import Kind as EventKind
from controller.records import GrantRecord, GrantState, OperationRecord, Scope, key
from controller.store import Change, Store

LOG = logging.getLogger("bulkhead.api")
KINDS: dict[str, Kind] = {**containers.KINDS, **grants.KINDS, **clients.KINDS, **tokens.KINDS}
_BY_STATUS = {404: "not-found", 405: "method-not-allowed", 413: "too-large", 415: "unsupported-media-type"}


class Api:
    """Everything of the API but its sockets: `guard` is the ASGI app."""

    def __init__(self, settings: Settings, store: Store, view: View, audit: Audit) -> None:
        self.settings, self.view, self.audit = settings, view, audit
        self.app = FastAPI(
            title="Bulkhead",
            version="1",
            description="Containers, services, grants and VPN clients of a Bulkhead node, created while it runs.",
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        self.operations = Operations(store, view, settings.limits, KINDS, self._done)
        self.routes = Routes(self.app)
        self.context = Context(settings, view, self.operations, self.routes)
        self._register()
        self.guard = Guard(self.app, self.routes, lambda: view.records.tokens, audit, settings.limits)
        self.mcp = LateEndpoint(self.guard.within, approving=settings.mcp_approve)
        self.app.router.routes.append(Route("/mcp", self.mcp))
        self.routes.declare("*", "/mcp", Scope.READ)

    def check(self) -> None:
        """That every route says what scope it needs. Raises `BulkheadError`."""
        self.routes.check()

    async def housekeeping(self) -> None:
        """What is done now and then."""
        now = time.time()
        try:
            if grants.over(self.view, self.view.records, now):
                ended, _ = await self.operations.change(lambda change: self._end(change, now))
                for one in ended:
                    why = "has expired" if one.state is GrantState.EXPIRED else "has ended with its container"
                    text = f"Grant {one.id} from {one.source} to {one.target} {one.protocol}/{one.port} {why}."
                    self.audit.write(Event(EventKind.API_CHANGE, text, object=key(one), data={"who": "bulkhead"}))
            await self.operations.prune()
        except ApiProblem as problem:
            LOG.warning("what is over could not be written down: %s", problem)

    def _end(self, change: Change, now: float) -> list[GrantRecord]:
        ended = grants.over(self.view, change.records, now)
        for one in ended:
            change.put(one)
        return ended

    def _register(self) -> None:
        self.app.add_exception_handler(RequestValidationError, _invalid)
        self.app.add_exception_handler(HTTPException, _other)
        self.app.add_exception_handler(ApiProblem, _problem)
        for part in (containers, questions, grants, clients, tokens, operationroutes, history):
            part.routes(self.context)
        add = self.routes.add

        @add("GET", "/healthz", scope=PUBLIC, model=models.Healthy, tag="about")
        async def healthy() -> Response:
            """Whether the API answers"""
            return made(models.Healthy(status="ok"))

        @add("GET", "/openapi.json", scope=PUBLIC, model=dict, tag="about")
        async def openapi() -> Response:
            """The OpenAPI document"""
            return Response(_document(self.app), media_type="application/json")

    def _done(self, operation: OperationRecord, status: int) -> None:
        result = "done" if status < 400 else "not done"
        self.audit.changed(
            operation.who,
            "operation",
            f"{operation.kind} {operation.object}: {result}",
            status,
            object=operation.object,
        )


def _document(app: FastAPI) -> bytes:
    document = app.openapi()
    if "bearer" not in document.setdefault("components", {}).setdefault("securitySchemes", {}):
        document["components"]["securitySchemes"]["bearer"] = {
            "type": "http",
            "scheme": "bearer",
            "description": "A token (`bh_…`). On loopback and the unix socket, the kernel's word on who asks is enough.",
        }
        schemas = document["components"].setdefault("schemas", {})
        schemas["FaultOut"] = models.FaultOut.model_json_schema()
        problem = models.ProblemOut.model_json_schema(ref_template="#/components/schemas/{model}")
        problem.pop("$defs", None)
        schemas["ProblemOut"] = problem
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
    return json.dumps(document, ensure_ascii=False).encode()


async def _problem(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ApiProblem)
    return Response(exc.body(), exc.status, exc.headers, MEDIA_TYPE)


async def _other(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    code = _BY_STATUS.get(exc.status_code, "bad-request" if exc.status_code < 500 else "internal")
    details = {
        "not-found": "There is nothing of that path; see GET /openapi.json.",
        "method-not-allowed": "That path takes other methods; see the Allow header.",
    }
    problem = ApiProblem(code, details.get(code, f"{exc.detail}."), headers=exc.headers)
    return await _problem(_request, problem)


async def _invalid(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    faults = [_fault(error) for error in exc.errors()[:50]]
    one = faults[0]
    detail = f"{one.field or 'the body'}: {one.fix}" + (f" ({len(faults) - 1} more below.)" if faults[1:] else "")
    return await _problem(_request, ApiProblem("invalid", detail, faults))


def _fault(error: dict[str, Any]) -> Fault:
    where = [str(part) for part in error.get("loc", ())]
    if where and where[0] in ("body", "query", "path", "header"):
        where = where[1:]
    kind, message = str(error.get("type", "")), str(error.get("msg", "")).rstrip(".")
    field = ".".join(where) if kind != "json_invalid" else ""
    found = "nothing" if kind == "missing" else _shown(error.get("input"))
    fix = {"missing": "Add it.", "extra_forbidden": "Remove it, or mend its name.", "json_invalid": "Send JSON."}.get(
        kind
    )
    if kind == "string_pattern_mismatch":
        message, fix = models.PATTERNS.get(error["ctx"]["pattern"], (message, ""))
    return Fault(field, found, message, fix or f"{message[:1].upper()}{message[1:]}.")


def _shown(value: object) -> str:
    """What was sent, short and fit to be sent back."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = str(value)
    return "".join(char if char.isprintable() else "?" for char in text[:80]) + ("…" if len(text) > 80 else "")
