"""What every request passes before a route sees it: host, origin, who it is, how often, how much; and what every answer has.

Plain ASGI. A request's caller is in `scope["state"]["principal"]`; `within` lets a part of this process ask in somebody's
name. Whatever is raised inside becomes a problem document, and every change an audit event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.api.access import Peer, Principal, bearer, unauthenticated
from controller.api.audit import Audit
from controller.api.limits import Buckets
from controller.api.problem import MEDIA_TYPE, ApiProblem
from controller.api.routes import PUBLIC, Routes
from controller.api.settings import Limits
from controller.records import TokenRecord

LOG = logging.getLogger("bulkhead.api")
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", "unix"})
CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_SAFE = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-cache, private")]


class Guard:
    """An ASGI app in front of `app`. `tokens` are those of the store as it is now; `hosts` names this API goes by elsewhere
    than on loopback, in lower case."""

    def __init__(
        self, app: ASGIApp, routes: Routes, tokens: Callable[[], Iterable[TokenRecord]], audit: Audit, limits: Limits
    ) -> None:
        self._app = app
        self._routes = routes
        self._tokens = tokens
        self._audit = audit
        self._limits = limits
        self.hosts: frozenset[str] = frozenset()
        self._reads = Buckets(limits.reads_per_s, limits.reads_per_s * limits.burst_s)
        self._changes = Buckets(limits.changes_per_s, limits.changes_per_s * limits.burst_s)
        self._denials = Buckets(limits.denied_per_s, limits.denied_per_s * 10)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request of the outside."""
        if scope["type"] == "lifespan":
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        peer: Peer = scope.setdefault("state", {}).get("peer") or Peer("?")
        await self._handle(scope, receive, send, peer, None)

    def within(self, principal: Principal) -> ASGIApp:
        """The API as that caller sees it, for a part of this process that asks in their name."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope.setdefault("state", {})
            await self._handle(scope, receive, send, Peer(principal.origin), principal)

        return app

    async def _handle(
        self, scope: Scope, receive: Receive, send: Send, peer: Peer, principal: Principal | None
    ) -> None:
        answer = _Answer(send)
        headers = _headers(scope)
        try:
            if not scope["path"].isprintable():
                raise ApiProblem("not-found", "There is nothing of that path; see GET /openapi.json.")
            if principal is None:
                self._check_host(scope, headers, peer)
                principal = self._known(scope, headers, peer)
            self._check_scope(scope, principal)
            self._check_rate(scope, principal, peer)
            if scope["method"] in CHANGING and not scope["path"].startswith("/mcp"):
                receive = await self._body(headers, receive)
            scope["state"]["principal"] = principal
            scope["state"]["still"] = lambda: self._still(scope, headers, peer)
            await self._app(scope, receive, answer)
        except ApiProblem as problem:
            await answer.problem(problem, close=problem.status in (408, 413))
            if problem.status in (401, 403, 421):
                self._denied(scope, principal, peer, problem)
                return
        except asyncio.CancelledError:
            raise
        except Exception:
            LOG.exception("a defect was caught at %s %s", scope["method"], scope["path"])
            detail = "A defect of the API was caught; see its log. Whether anything was changed: GET what you changed."
            await answer.problem(ApiProblem("internal", detail))
        if scope["method"] in CHANGING and principal is not None and not scope["path"].startswith("/mcp"):
            self._changed(scope, principal, answer.status)

    # ------------------------------------------------------------------------------------------------------- questions

    def _check_host(self, scope: Scope, headers: dict[bytes, bytes], peer: Peer) -> None:
        """A name that leads here by somebody else's DNS is not ours, nor is a page of another site us."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name not in (LOCAL_HOSTS if peer.local else self.hosts):
            there = ", ".join(sorted(LOCAL_HOSTS if peer.local else self.hosts)) or "none"
            raise ApiProblem("wrong-host", f"This API goes by other names; ask for one of: {there}.")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() != f"{scope.get('scheme', 'http')}://{host}":
            raise ApiProblem(
                "foreign-origin", "Pages of other sites may not use this API; leave the Origin header out."
            )

    def _known(self, scope: Scope, headers: dict[bytes, bytes], peer: Peer) -> Principal | None:
        """Who asks; None for nobody, where nobody has to be known."""
        if self._routes.needed(scope["method"], scope["path"]) is PUBLIC:
            return None
        try:
            shown = headers.get(b"authorization")
            if shown is not None:
                return bearer(shown.decode("latin-1"), self._tokens(), time.time(), peer.origin)
            found: Principal | None = scope["state"].get("caller")
            if found is None:
                detail = (
                    "Send a token: Authorization: Bearer bh_…. On this host root and members of the group bulkhead need "
                    "none; one of them makes a token: bulkhead token create."
                )
                raise unauthenticated(detail)
        except ApiProblem:
            late = self._denials.take(peer.origin, time.monotonic())
            if late:  # no time for somebody who keeps guessing
                raise too_many(late) from None
            raise
        return found

    def _still(self, scope: Scope, headers: dict[bytes, bytes], peer: Peer) -> bool:
        """Whether who asked may still have what they get, for answers that take long."""
        try:
            self._check_scope(scope, self._known(scope, headers, peer))
        except ApiProblem:
            return False
        return True

    def _check_scope(self, scope: Scope, principal: Principal | None) -> None:
        needed = self._routes.needed(scope["method"], scope["path"])
        if needed is None or needed is PUBLIC or principal is None:
            return  # no such route, which the router says, or nothing to ask for
        if not principal.may(needed):
            has = ", ".join(sorted(principal.scopes)) or "none"
            detail = f"This needs the scope {needed.value}; {principal.name} has: {has}. Have a token with it made."
            raise ApiProblem("forbidden", detail)

    def _check_rate(self, scope: Scope, principal: Principal | None, peer: Peer) -> None:
        name = principal.name if principal is not None else f"@{peer.origin}"
        buckets = self._changes if scope["method"] in CHANGING else self._reads
        late = buckets.take(name, time.monotonic())
        if late:
            raise too_many(late)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Read the whole body, within its limits, so that no route waits for a caller."""
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self._limits.body_s)
        except TimeoutError:
            detail = f"The body did not come within {self._limits.body_s:g} s; send it at once."
            raise ApiProblem("too-slow", detail) from None
        if body and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise ApiProblem("unsupported-media-type", "Send JSON, and Content-Type: application/json.")
        return _replay(body, receive)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self._limits.body_bytes
        length = headers.get(b"content-length", b"0")
        size = int(length) if length.isdigit() and len(length) < 12 else 0 if length == b"0" else limit + 1
        body = b""
        while size <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiProblem("bad-request", "The caller went away before the body had come.")
            body += message.get("body", b"")
            size = len(body)
            if not message.get("more_body", False):
                break
        if size > limit:
            raise ApiProblem("too-large", f"A body has at most {limit} bytes; send less.")
        return body

    # ----------------------------------------------------------------------------------------------------------- audit

    def _denied(self, scope: Scope, principal: Principal | None, peer: Peer, problem: ApiProblem) -> None:
        who = principal.name if principal is not None else "nobody"
        self._audit.denied(who, peer.origin, _what(scope), problem.status, problem.code)

    def _changed(self, scope: Scope, principal: Principal, status: int) -> None:
        about: dict[str, Any] = scope["state"].get("about", {})
        self._audit.changed(principal.name, principal.origin, _what(scope), status, **about)


class _Answer:
    """`send`, which remembers what was sent and adds what every answer has."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            has = {name for name, _ in message.get("headers", ())}
            message["headers"] = [*message.get("headers", ()), *(pair for pair in _SAFE if pair[0] not in has)]
        await self._send(message)

    async def problem(self, problem: ApiProblem, *, close: bool = False) -> None:
        """Answer a problem, if nothing was answered yet."""
        if self.status:
            return
        body = problem.body()
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in problem.headers.items()]
        if close:
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def too_many(late_s: float) -> ApiProblem:
    """The answer to somebody who asks too often."""
    detail = f"Too many requests. Try again in {max(1, round(late_s))} s."
    return ApiProblem("too-many-requests", detail, headers={"Retry-After": str(max(1, round(late_s)))})


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope.get("headers", ()))


def _what(scope: Scope) -> str:
    path = "".join(char if char.isprintable() else "?" for char in scope["path"][:200])
    return f"{scope['method']} {path}"


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
