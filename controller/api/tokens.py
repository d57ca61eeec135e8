"""Bearer tokens: made, listed, revoked. A token is shown once and kept as its digest."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request
from starlette.responses import Response

from controller.api import access, models
from controller.api.access import Principal
from controller.api.context import Context, IdempotencyKey, Manner
from controller.api.models import rfc3339
from controller.api.operations import Answer, Kind, Staying, Target, moment
from controller.api.problem import ApiProblem, Fault
from controller.api.view import View, encoded, plain
from controller.records import OperationRecord, Scope, TokenRecord, key
from controller.store import Change

Id = Annotated[str, Path(pattern=models.TOKEN, description="A token's id.")]
MOST = 1000


def routes(api: Context) -> None:
    """Register the routes."""
    view, add = api.view, api.routes.add

    @add("GET", "/api/tokens", scope=Scope.OPERATE, model=models.Tokens, tag="tokens")
    async def list_tokens() -> Response:
        """List tokens"""
        found = models.Tokens(tokens=[_shown(record) for record in view.records.tokens])
        return Response(encoded(found), media_type="application/json")

    @add("POST", "/api/tokens", scope=Scope.APPROVE, model=models.NewToken, status=201, tag="tokens")
    async def create_token(
        request: Request, wanted: models.CreateToken, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Create a token
        The token is in this answer and nowhere else. It ends no later than the token it is made with, and with it.
        """
        who = api.principal(request)
        beyond = [scope for scope in wanted.scopes if not who.may(scope)]
        if beyond:
            detail = f"{who.name} has not the scope {beyond[0].value} itself; ask for less."
            raise ApiProblem("forbidden", detail, [Fault("scopes", beyond[0].value, "scopes of your own", detail)])
        name, token = access.new_token()

        def function(change: Change) -> Target:
            _free(change, wanted.name)
            now = moment()
            expires_at = _end(change, wanted, who, now)
            record = TokenRecord(
                id=name,
                name=wanted.name,
                digest=access.digest(token),
                scopes=tuple(sorted(set(wanted.scopes))),
                created_by=who.name,
                created_at=now,
                expires_at=expires_at,
            )
            change.put(record)
            return Target(key(record), secret={"token": token})

        about = {"object": f"token/{name}"}
        return await api.change(request, "token.create", function, Manner(key=idempotency_key), about)

    @add("DELETE", "/api/tokens/{id}", scope=Scope.APPROVE, model=models.Token, tag="tokens")
    async def revoke_token(request: Request, id: Id, idempotency_key: IdempotencyKey = None) -> Response:
        """Revoke a token
        It is good for nothing from this answer on, nor is any token that was made with it.
        """

        def function(change: Change) -> Target:
            record = next((one for one in change.records.tokens if one.id == id), None)
            if record is None:
                raise ApiProblem("not-found", f"There is no token {id}. See which there are: GET /api/tokens.")
            for one in (record, *_made_with(change, record)):
                change.delete(key(one))
            return Target(key(record), last=plain(_shown(record)))

        about = {"object": f"token/{id}"}
        return await api.change(request, "token.revoke", function, Manner(key=idempotency_key), about)


def _free(change: Change, name: str) -> None:
    """Names tell tokens apart in the audit log."""
    now = moment()
    for other in change.records.tokens:
        if other.name.lower() != name.lower():
            continue
        if not other.expires_at or now < other.expires_at:
            fault = Fault("name", name, "a name of its own", "Choose another, or revoke that one.")
            raise ApiProblem("duplicate-name", f"Token {other.id} has the name {name} already. {fault.fix}", [fault])
        change.delete(key(other))
    if len(change.records.tokens) >= MOST:
        raise ApiProblem("conflict", f"There are {MOST} tokens already. Revoke some first.")


def _end(change: Change, wanted: models.CreateToken, who: Principal, now: float) -> float:
    """When a new token ends: no later than the one it is made with, which would otherwise live on in it."""
    maker = access.token_of(who.name, change.records.tokens)
    end = now + wanted.expires_in_s
    return min(end, maker.expires_at) if maker is not None and maker.expires_at else end


def _made_with(change: Change, token: TokenRecord) -> list[TokenRecord]:
    """The tokens that were made with this one, and with those: who has stolen one must not keep another."""
    makers = {access.token_name(token)}
    found: list[TokenRecord] = []
    for _ in change.records.tokens:
        more = [one for one in change.records.tokens if one.created_by in makers and one not in (token, *found)]
        if not more:
            break
        found += more
        makers = {access.token_name(one) for one in more}
    return found


def _shown(record: TokenRecord) -> models.Token:
    return models.Token(
        id=record.id,
        name=record.name,
        scopes=list(record.scopes),
        created_by=record.created_by,
        created_at=rfc3339(record.created_at),
        expires_at=rfc3339(record.expires_at) if record.expires_at else None,
        expired=bool(record.expires_at) and moment() >= record.expires_at,
    )


class Created:
    """A token that was made."""

    stays = False

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The token's record; the token itself is put in where it is known."""
        for record in view.records.tokens:
            if key(record) == operation.object:
                return Answer(201, encoded(_shown(record)))
        raise ApiProblem("conflict", f"{operation.object} was revoked by somebody else meanwhile.")

    def undo(self, change: Change, operation: OperationRecord) -> bool:
        """Delete it."""
        change.delete(operation.object)
        return True


class Revoked(Staying):
    """A token that was revoked."""

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The token's record as it was."""
        return Answer(200, operation.answer.encode())


KINDS: dict[str, Kind] = {"token.create": Created(), "token.revoke": Revoked()}
