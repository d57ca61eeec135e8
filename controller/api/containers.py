"""Containers: listed, made, started, stopped, deleted. The API writes what is wanted and waits until it is so."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

from fastapi import Path, Query, Request
from starlette.responses import Response

from controller.api import allocate, models
from controller.api.context import Context, Manner, manner
from controller.api.grants import end_of_container
from controller.api.operations import Answer, Kind, Staying, Target, moment
from controller.api.problem import ApiProblem
from controller.api.view import View, encoded, plain
from controller.records import ContainerRecord, OperationRecord, Records, Scope, key
from controller.store import Change

Name = Annotated[str, Path(pattern=models.LABEL, max_length=63, description="A container's id or name.")]
OfNetwork = Annotated[str | None, Query(max_length=63, description="Only those of this network.")]
OfNode = Annotated[str | None, Query(max_length=63, description="Only those of this node.")]


def routes(api: Context) -> None:
    """Register the routes."""
    view, add, waiting = api.view, api.routes.add, manner(api.settings.limits.wait_s)

    @add("GET", "/api/containers", scope=Scope.READ, model=models.Containers, tag="containers")
    async def list_containers(request: Request, network: OfNetwork = None, node: OfNode = None) -> Response:
        """List containers"""
        return api.read(request, f"containers/{network}/{node}", lambda: view.containers(network, node))

    @add("GET", "/api/containers/{ref}", scope=Scope.READ, model=models.Container, tag="containers")
    async def show_container(request: Request, ref: Name) -> Response:
        """Show a container"""
        return api.read(request, f"container/{ref}", lambda: view.container(ref))

    later = {202: models.Operation}

    @add(
        "POST",
        "/api/containers/create",
        scope=Scope.OPERATE,
        model=models.Container,
        status=201,
        also=later,
        tag="containers",
    )
    async def create_container(request: Request, wanted: models.CreateContainer, how: Manner = waiting) -> Response:
        """Create a container
        Answers when it runs, its flows are in the switch, and its services have names; a create that fails leaves nothing
        behind.
        """
        who = api.principal(request)
        about = {"network": wanted.network}

        def function(change: Change) -> Target:
            record = allocate.container(view.declared, change.records, wanted, who.name, moment())
            end_of_container(change, record.node, record.id, who.name)  # of one that was declared, and had this id
            change.put(record)
            about.update(container=record.name, object=key(record))
            return Target(key(record), record.node, record.created_at)

        return await api.change(request, "container.create", function, how, about)

    @add(
        "DELETE",
        "/api/containers/{ref}",
        scope=Scope.OPERATE,
        model=models.Container,
        also=later,
        tag="containers",
    )
    async def delete_container(request: Request, ref: Name, how: Manner = waiting) -> Response:
        """Delete a container
        Answers the container as it was. Grants from and to it end.
        """
        who = api.principal(request)
        about: dict[str, str] = {}

        def function(change: Change) -> Target:
            record = _stored(view, change.records, ref)
            about.update(container=record.name, network=record.network, object=key(record))
            change.delete(key(record))
            end_of_container(change, record.node, record.id, who.name)
            return Target(key(record), record.node, last=plain(view.container_of(record)))

        return await api.change(request, "container.delete", function, how, about)

    def switching(word: str, running: bool) -> None:
        async def switch(request: Request, ref: Name, how: Manner = waiting) -> Response:
            about: dict[str, str] = {}

            def function(change: Change) -> Target:
                record = _stored(view, change.records, ref)
                about.update(container=record.name, network=record.network, object=key(record))
                change.put(replace(record, running=running))
                return Target(key(record), record.node)

            return await api.change(request, f"container.{word}", function, how, about)

        switch.__doc__ = f"{word.capitalize()} a container"
        path = f"/api/containers/{{ref}}/{word}"
        add("POST", path, scope=Scope.OPERATE, model=models.Container, also=later, tag="containers")(switch)

    switching("start", True)
    switching("stop", False)


def _stored(view: View, records: Records, ref: str) -> ContainerRecord:
    """A container of the store, by id or name. Raises `ApiProblem`, another where it is declared."""
    for record in records.containers:
        if ref == record.id:
            return record
    by_name = next((one for one in records.containers if one.name.lower() == ref.lower()), None)
    declared = view.declared.owner(id=ref) or (view.declared.owner(name=ref) if by_name is None else None)
    if declared is not None:
        detail = f"{ref} is {declared}. Change it there; the node follows the file."
        raise ApiProblem("declared", detail)
    if by_name is None:
        raise ApiProblem("not-found", f"There is no container {ref!r}. See which there are: GET /api/containers.")
    return by_name


class Created:
    """A container that was made; taken back as a whole."""

    stays = False

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The container."""
        found = view.container_by_key(operation.object)
        return Answer(201, encoded(found), {"Location": f"/api/containers/{found.id}"})

    def undo(self, change: Change, operation: OperationRecord) -> bool:
        """Delete it, if it is still the one that was made."""
        for record in change.records.containers:
            if key(record) == operation.object and record.created_at == operation.created_at:
                change.delete(key(record))
                return True
        return False


class Deleted(Staying):
    """A container that was deleted, which is never taken back."""

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The container as it was."""
        return Answer(200, encoded(json.loads(operation.answer)))


class Switched(Staying):
    """A container that was started or stopped; it stays as asked for."""

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The container."""
        return Answer(200, encoded(view.container_by_key(operation.object)))


KINDS: dict[str, Kind] = {
    "container.create": Created(),
    "container.delete": Deleted(),
    "container.start": Switched(),
    "container.stop": Switched(),
}
