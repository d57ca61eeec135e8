"""Grants: asked for by one, approved by another, ended by time or by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

from fastapi import Path, Query, Request
from starlette.responses import Response

from controller.api import access, models
from controller.api.access import Principal
from controller.api.context import Context, IdempotencyKey, Manner, manner
from controller.api.operations import Answer, Kind, Target, moment
from controller.api.problem import ApiProblem, Fault
from controller.api.view import View, encoded
from controller.records import GrantRecord, GrantState, OperationRecord, Records, Scope, key
from controller.store import Change

Id = Annotated[str, Path(pattern=models.ID, description="A grant's number.")]
KEPT = 1000
"""So many grants that have ended are kept."""
OPEN_YET = (GrantState.REQUESTED, GrantState.APPROVED)
NOBODY = "bulkhead"
"""Who has decided what follows by itself."""
PENDING = 256
"""So many may wait for somebody's approval."""


def routes(api: Context) -> None:
    """Register the routes."""
    view, add, waiting = api.view, api.routes.add, manner(api.settings.limits.wait_s)
    later = {202: models.Operation}

    @add("GET", "/api/grants", scope=Scope.READ, model=models.Grants, tag="grants")
    async def list_grants(
        state: Annotated[GrantState | None, Query(description="Only those in this state.")] = None,
    ) -> Response:
        """List grants
        The newest first.
        """
        now = moment()
        found = [view.grant(record, now) for record in sorted(view.records.grants, key=lambda one: -int(one.id))]
        grants = models.Grants(grants=[grant for grant in found if state in (None, grant.state)])
        return Response(encoded(grants), media_type="application/json")

    @add("GET", "/api/grants/{id}", scope=Scope.READ, model=models.Grant, tag="grants")
    async def show_grant(id: Id) -> Response:
        """Show a grant"""
        return Response(encoded(view.grant(_grant(view.records, id))), media_type="application/json")

    @add("POST", "/api/grants", scope=Scope.OPERATE, model=models.Grant, status=201, tag="grants")
    async def request_grant(
        request: Request, wanted: models.RequestGrant, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Request a grant
        Nothing opens before somebody else approves it.
        """
        who = api.principal(request)
        about: dict[str, str] = {}

        def function(change: Change) -> Target:
            source, target = _ends(view, change.records, wanted)
            _room(change.records.grants)
            number = max((int(one.id) for one in change.records.grants), default=0) + 1
            record = GrantRecord(
                id=str(number),
                source=source,
                target=target,
                protocol=wanted.protocol,
                port=wanted.port,
                reason=wanted.reason,
                requested_by=who.name,
                requested_at=moment(),
                duration_s=wanted.duration_s,
                node=view.node,
            )
            change.put(record)
            _prune(change)
            about["object"] = key(record)
            return Target(key(record))

        return await api.change(request, "grant.request", function, Manner(key=idempotency_key), about)

    def deciding(word: str, scope: Scope, told: str) -> None:
        async def decide(request: Request, id: Id, how: Manner = waiting) -> Response:
            who = api.principal(request)

            def function(change: Change) -> Target:
                record = _grant(change.records, id)
                if word == "approve":
                    _ends_there(view, change.records, record)
                change.put(_decided(word, record, who, moment(), view, access.makers(who.name, change.records.tokens)))
                return Target(key(record), last=None)

            return await api.change(request, f"grant.{word}", function, how, {"object": f"grant/{id}"})

        decide.__doc__ = told
        add("POST", f"/api/grants/{{id}}/{word}", scope=scope, model=models.Grant, also=later, tag="grants")(decide)

    deciding("approve", Scope.APPROVE, "Approve a grant\nIt is open when this answers, until it expires or is revoked.")
    deciding("deny", Scope.APPROVE, "Deny a grant")
    deciding("revoke", Scope.OPERATE, "Revoke a grant\nIt is shut, and its connections are dead, when this answers.")


def _grant(records: Records, number: str) -> GrantRecord:
    for record in records.grants:
        if record.id == number:
            return record
    raise ApiProblem("not-found", f"There is no grant {number}. See which there are: GET /api/grants.")


def _ends(view: View, records: Records, wanted: models.RequestGrant) -> tuple[str, str]:
    """The ids of both containers. Raises `ApiProblem`: a grant is between two networks of this node."""
    places = {}
    for field, ref in (("source", wanted.source), ("target", wanted.target)):
        found = _place(view, records, ref)
        if found is None:
            fault = Fault(field, ref, "a container's id or name", "See which there are: GET /api/containers.")
            raise ApiProblem("unknown-container", f"There is no container {ref}. {fault.fix}", [fault])
        places[field] = found
        if found[2] != view.node:
            fault = Fault(field, ref, f"a container of {view.node}", f"Ask the API of {found[2]}.")
            raise ApiProblem("invalid", f"{ref} is on {found[2]}; a grant joins two networks of one node.", [fault])
    source, target = places["source"], places["target"]
    if source[1] == target[1]:
        fault = Fault("target", wanted.target, f"a container of another network than {source[1]}", "Nothing to grant.")
        raise ApiProblem("invalid", f"Both are on {source[1]}, where containers reach each other's services.", [fault])
    return source[0], target[0]


def _place(view: View, records: Records, ref: str) -> tuple[str, str, str] | None:
    """A container's id, network and node."""
    everyone = [(one.id, one.name, one.network, one.node) for one in records.containers]
    everyone += [
        (member.id, member.name, network.name, view.node)
        for network in view.declared.state.networks
        for member in network.members
    ]
    by_id = next((one for one in everyone if one[0] == ref), None)
    found = by_id or next((one for one in everyone if one[1].lower() == ref.lower()), None)
    return (found[0], found[2], found[3]) if found is not None else None


def _ends_there(view: View, records: Records, record: GrantRecord) -> None:
    if record.node != view.node:
        detail = (
            f"Grant {record.id} is of {record.node}, whose state file says what may be approved; ask the API there."
        )
        raise ApiProblem("wrong-state", detail)
    for ref in (record.source, record.target):
        if _place(view, records, ref) is None:
            raise ApiProblem("wrong-state", f"Container {ref} of grant {record.id} is gone. Request another grant.")


def _room(grants: Iterable[GrantRecord]) -> None:
    if sum(one.state is GrantState.REQUESTED for one in grants) >= PENDING:
        raise ApiProblem("conflict", f"{PENDING} grants wait for approval already. Have some decided first.")


def _prune(change: Change) -> None:
    """Forget the oldest that have ended. The newest stays, so that no number is given out twice."""
    ended = sorted((one for one in change.records.grants if one.state not in OPEN_YET), key=lambda one: -int(one.id))
    for one in ended[KEPT:]:
        change.delete(key(one))


def _decided(word: str, record: GrantRecord, who: Principal, now: float, view: View, makers: list[str]) -> GrantRecord:
    """The grant after a decision. Raises `ApiProblem` where it cannot be decided so.

    A token is its makers' other hand: what they asked for is not approved with it.
    """
    possible = {
        "approve": (GrantState.REQUESTED,),
        "deny": (GrantState.REQUESTED,),
        "revoke": (GrantState.REQUESTED, GrantState.APPROVED),
    }[word]
    if record.state not in possible:
        wanted = " or ".join(possible)
        raise ApiProblem("wrong-state", f"Grant {record.id} is {record.state}, not {wanted}. Request another one.")
    decided = replace(record, decided_by=who.name, decided_at=now)
    if word != "approve":
        return replace(decided, state=GrantState.DENIED if word == "deny" else GrantState.REVOKED)
    if record.requested_by in (who.name, *makers) and not view.declared.host.api.self_approval:
        detail = (
            f"Grant {record.id} was requested by {record.requested_by}, so that somebody else has to approve it, with a "
            "token that was not made by them. Where one person may do both, say so in the state file: api: {self_approval: true}."
        )
        raise ApiProblem("self-approval", detail)
    return replace(decided, state=GrantState.APPROVED, expires_at=now + record.duration_s)


def over(view: View, records: Records, now: float) -> list[GrantRecord]:
    """The grants that have ended by time, and those of containers of this node that are gone, as they are to be written.

    Agent and controller stop those of the first kind by their own clocks, and those of the second since there is nothing to
    join; but ids are given out again, and what was granted to a container must not be the next one's.
    """
    out = []
    there = {one.id for one in records.containers}
    there |= {member.id for network in view.declared.state.networks for member in network.members}
    for record in records.grants:
        if record.state is GrantState.APPROVED and record.expires_at <= now:
            out.append(replace(record, state=GrantState.EXPIRED))
        elif record.node == view.node and record.state in OPEN_YET and not {record.source, record.target} <= there:
            out.append(replace(record, state=GrantState.REVOKED, decided_by=NOBODY, decided_at=round(now, 3)))
    return out


def end_of_container(change: Change, node: str, container: str, who: str) -> None:
    """End every grant of a node's container, since its id is given out anew, or may be."""
    for grant in change.records.grants:
        if grant.state in OPEN_YET and grant.node == node and container in (grant.source, grant.target):
            change.put(replace(grant, state=GrantState.REVOKED, decided_by=who, decided_at=moment()))


class Requested:
    """A grant that was requested."""

    stays = False

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The grant."""
        found = view.grant(_grant(view.records, operation.object.partition("/")[2]))
        return Answer(201, encoded(found), {"Location": f"/api/grants/{found.id}"})

    def undo(self, change: Change, operation: OperationRecord) -> bool:
        """Delete it, if nobody has decided it."""
        for record in change.records.grants:
            if key(record) == operation.object and record.state is GrantState.REQUESTED:
                change.delete(key(record))
                return True
        return False


class Decided:
    """A grant that was approved, denied or revoked. An approval that does not become real is taken back."""

    def __init__(self, undone: bool) -> None:
        self._undone = undone
        self.stays = not undone

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The grant."""
        return Answer(200, encoded(view.grant(_grant(view.records, operation.object.partition("/")[2]))))

    def undo(self, change: Change, operation: OperationRecord) -> bool:
        """Have it wait for approval again."""
        for record in change.records.grants:
            if self._undone and key(record) == operation.object and record.state is GrantState.APPROVED:
                asked = replace(record, state=GrantState.REQUESTED, decided_by="", decided_at=0.0, expires_at=0.0)
                change.put(asked)
                return True
        return False


KINDS: dict[str, Kind] = {
    "grant.request": Requested(),
    "grant.approve": Decided(undone=True),
    "grant.deny": Decided(undone=False),
    "grant.revoke": Decided(undone=False),
}
