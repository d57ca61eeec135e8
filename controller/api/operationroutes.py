"""Operations: how far a change is that goes on by itself."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request
from starlette.responses import Response

from controller.api import models
from controller.api.context import Context
from controller.api.operations import shown
from controller.api.problem import ApiProblem
from controller.api.view import encoded
from controller.records import Scope


def routes(api: Context) -> None:
    """Register the routes."""

    @api.routes.add("GET", "/api/operations/{id}", scope=Scope.READ, model=models.Operation, tag="operations")
    async def show_operation(request: Request, id: Annotated[str, Path(pattern=models.OPERATION)]) -> Response:
        """Show an operation
        Operations are kept for a day.
        """
        for operation in api.view.records.operations:
            if operation.id == id:
                return Response(encoded(shown(operation)), media_type="application/json")
        raise ApiProblem("not-found", f"There is no operation {id}; they are kept for a day.")
