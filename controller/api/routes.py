"""Routes: each with the scope it needs and everything it may answer. One without a scope does not start."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.routing import BaseRoute, Mount, compile_path

from controller.api.models import ProblemOut
from controller.api.problem import CODES, MEDIA_TYPE
from controller.problems import BulkheadError
from controller.records import Scope

F = TypeVar("F", bound=Callable[..., Any])


class Public(Enum):
    """In place of a scope: anybody may, without being known."""

    PUBLIC = "public"


PUBLIC = Public.PUBLIC
Needed = Scope | Public

_ANY_ROUTE = (400, 413, 421, 429, 431, 500, 503)
_KNOWN = (401, 403)
_READ = (404, 422)
_CHANGE = (404, 408, 409, 415, 422)


@dataclass(frozen=True, slots=True)
class _Rule:
    method: str
    pattern: re.Pattern[str]
    needed: Needed


class Routes:
    """Registers routes with an app, and answers which scope a request needs."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._declared: set[tuple[str, str]] = set()
        self._rules: list[_Rule] = []
        self._plain: dict[tuple[str, str], Needed] = {}

    def add(
        self,
        method: str,
        path: str,
        *,
        scope: Needed,
        model: type[Any] | None,
        status: int = 200,
        also: dict[int, type[Any]] | None = None,
        media_type: str = "application/json",
        tag: str = "",
    ) -> Callable[[F], F]:
        """A decorator. `model` is what `status` answers; `also` other good answers. Problems are documented by status."""

        def register(function: F) -> F:
            summary, _, text = (function.__doc__ or "").partition("\n")
            self._app.add_api_route(
                path,
                function,
                methods=[method],
                status_code=status,
                response_model=None,
                summary=summary.strip(),
                description=f"{text.strip()}\n\nNeeds scope: **{scope.value}**.".strip(),
                responses=self._answers(method, scope, status, model, also or {}, media_type),
                openapi_extra={"security": [] if scope is PUBLIC else [{"bearer": []}, {}]},
                tags=[tag] if tag else None,
            )
            self.declare(method, path, scope)
            return function

        return register

    def declare(self, method: str, path: str, scope: Needed) -> None:
        """Say what a route needs that was registered elsewhere, or everything below a mounted path (`*` any method)."""
        self._declared.add((method, path))
        if "{" not in path and method != "*":
            self._plain[method, path] = scope
        # The router's own expression: a path that it takes for this route must not be another one here.
        pattern, _, _ = compile_path(path + ("{rest:path}" if method == "*" else ""))
        self._rules.append(_Rule(method, pattern, scope))

    def needed(self, method: str, path: str) -> Needed | None:
        """What a request needs; None where there is no such route."""
        found = self._plain.get((method, path))
        if found is not None:
            return found
        for rule in self._rules:
            if rule.method in (method, "*") and rule.pattern.match(path):
                return rule.needed
        return None

    def check(self) -> None:
        """That every route has said what it needs. Raises `BulkheadError`."""
        bare = [f"{method} {path}" for method, path in _all(self._app.routes) if not self._said(method, path)]
        if bare:
            raise BulkheadError(
                f"the API does not start: no scope is declared for {', '.join(sorted(bare))}; register it with a scope"
            )

    def _said(self, method: str, path: str) -> bool:
        return (method, path) in self._declared or ("*", path) in self._declared

    @staticmethod
    def _answers(
        method: str, scope: Needed, status: int, model: type[Any] | None, also: dict[int, type[Any]], media_type: str
    ) -> dict[int | str, dict[str, Any]]:
        out: dict[int | str, dict[str, Any]] = {}
        if media_type == "application/json" and model is not None:
            out[status] = {"model": model, "description": (model.__doc__ or "").split("\n")[0]}
        else:
            out[status] = {"description": "As asked for.", "content": {media_type: {"schema": {"type": "string"}}}}
        for other, its in also.items():
            out[other] = {"model": its, "description": (its.__doc__ or "").split("\n")[0]}
        if method == "GET":
            out[304] = {"description": "What you have is still so."}
        known = () if scope is PUBLIC else _KNOWN
        for problem in sorted({*_ANY_ROUTE, *known, *(_READ if method == "GET" else _CHANGE)}):
            codes = ", ".join(code for code, (its, _) in CODES.items() if its == problem)
            out[problem] = {
                "description": f"A problem: {codes}.",
                "content": {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{ProblemOut.__name__}"}}},
            }
        return out


def _all(routes: Iterable[BaseRoute]) -> Iterable[tuple[str, str]]:
    """Every (method, path) there is. What is not understood is there, too."""
    for route in routes:
        path = getattr(route, "path", None)
        methods = getattr(route, "methods", None)
        if isinstance(route, Mount) or path is None or not methods:
            yield "*", str(path if path is not None else route)
            continue
        for method in methods:
            yield method, path
