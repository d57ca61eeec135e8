"""What is only looked at: the node's status, networks, services, egress, and what the proof says of who reaches whom."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import Path, Query, Request
from starlette.responses import Response

from controller.api import models
from controller.api.context import Context
from controller.api.problem import ApiProblem, Fault
from controller.api.view import encoded
from controller.asking import ask
from controller.events import JSON
from controller.model import DesiredState
from controller.problems import BulkheadError
from controller.records import Scope
from controller.verify.endpoints import Endpoint, endpoints, find, services, vpn_port
from controller.verify.reach import Cell, reach
from controller.verify.why import read_service, why

T = TypeVar("T")
ASK_S = 3.0
AGENT_STATUS = ("agent", "status.json")
KEPT = 64
"""So many answers of the proof are kept."""

Word = Annotated[str, Query(min_length=1, max_length=100)]


class Proofs:
    """Asks the proof in a thread of its own, one question at a time, and keeps the answers for as long as the state is the
    same."""

    def __init__(self, most: int) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="proof")
        self._most = most
        self._running: dict[tuple[str, ...], asyncio.Future[Any]] = {}
        self._kept: OrderedDict[tuple[str, ...], Any] = OrderedDict()

    async def ask(self, key: tuple[str, ...], question: Callable[[], T]) -> T:
        """The answer to a question; `key` names it together with the state it is about."""
        if key in self._kept:
            self._kept.move_to_end(key)
            kept: T = self._kept[key]
            return kept
        if key not in self._running:
            if len(self._running) >= self._most:
                detail = "The proof is being asked by many already. Try again in a few seconds."
                raise ApiProblem("too-many-requests", detail, headers={"Retry-After": "5"})
            task = asyncio.get_running_loop().run_in_executor(self._threads, question)
            self._running[key] = task
            task.add_done_callback(lambda done: self._done(key, done))
        found: T = await asyncio.shield(self._running[key])
        return found

    def _done(self, key: tuple[str, ...], task: asyncio.Future[Any]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        self._kept[key] = task.result()
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Answer nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def routes(api: Context) -> None:
    """Register the routes."""
    view, add = api.view, api.routes.add
    proofs = Proofs(api.settings.limits.questions)

    @add("GET", "/api/status", scope=Scope.READ, model=models.Status, tag="status")
    async def status() -> Response:
        """Show the node as a whole
        What agent and controller say of themselves is passed on as it is.
        """
        controller, no_controller = await asyncio.to_thread(_controller, api)
        agent, no_agent = await asyncio.to_thread(_agent, api)
        found = models.Status(
            node=view.node,
            state_file=str(view.path),
            state=view.loaded.state.digest,
            store_connected=api.operations.connected,
            revision=view.records.revision,
            problem=view.problem,
            refused={name: str(problem) for name, problem in view.loaded.refused},
            nodes={
                node.name: {
                    "agent_revision": node.agent_revision,
                    "controller_revision": node.controller_revision,
                    "agent_waiting": dict(node.agent_waiting),
                    "controller_waiting": dict(node.controller_waiting),
                }
                for node in view.records.nodes
            },
            controller=None if controller is None else {k: v for k, v in controller.items() if k != "bridges"},
            agent=agent,
            bridges=[] if controller is None else controller.get("bridges", []),
            unknown=[why for why in (no_controller, no_agent) if why],
        )
        return Response(encoded(found), media_type="application/json")

    @add("GET", "/api/networks", scope=Scope.READ, model=models.Networks, tag="networks")
    async def list_networks(request: Request) -> Response:
        """List networks"""
        return api.read(request, "networks", view.networks)

    @add("GET", "/api/networks/{name}", scope=Scope.READ, model=models.Network, tag="networks")
    async def show_network(request: Request, name: Annotated[str, Path(max_length=63)]) -> Response:
        """Show a network"""
        return api.read(request, f"network/{name}", lambda: view.network(name))

    @add("GET", "/api/services", scope=Scope.READ, model=models.Services, tag="services")
    async def list_services(request: Request, network: Annotated[str | None, Query(max_length=63)] = None) -> Response:
        """List services
        Each with its name on its network, and how it is.
        """
        return api.read(request, f"services/{network}", lambda: view.services(network))

    @add("GET", "/api/egress", scope=Scope.READ, model=models.EgressList, tag="networks")
    async def list_egress() -> Response:
        """List ways out
        Networks without one have no way to the internet at all.
        """
        controller, no_controller = await asyncio.to_thread(_controller, api)
        up = {bridge["name"]: bridge.get("egress_up") for bridge in (controller or {}).get("bridges", ())}
        found = [
            models.Egress(
                network=network.name,
                bridge=network.bridge,
                port=network.egress.port,
                up=up.get(network.bridge),
                why=no_controller,
            )
            for network in view.declared.state.networks
            if network.egress is not None
        ]
        return Response(encoded(models.EgressList(egress=found)), media_type="application/json")

    @add("GET", "/api/reachability", scope=Scope.READ, model=models.Reachability, tag="proof")
    async def reachability(
        source: Annotated[list[str] | None, Query(alias="from", max_length=64)] = None,
        target: Annotated[list[str] | None, Query(alias="to", max_length=64)] = None,
    ) -> Response:
        """Show who can reach whom
        From the proof over all flows, as `bulkhead reach` prints it. `from` and `to` narrow it down to some rows and columns.
        """
        state = view.loaded.state
        rows, columns = tuple(source or ()), tuple(target or ())
        for field, words in (("from", rows), ("to", columns)):
            for word in words:
                _found(state, field, word)
        key = ("reach", state.digest, *rows, "\0", *columns)
        body = await proofs.ask(key, lambda: _matrix(state, rows, columns))
        return Response(body, media_type="application/json")

    @add("GET", "/api/why", scope=Scope.READ, model=models.Why, tag="proof")
    async def why_route(
        source: Word,
        destination: Word,
        protocol: Annotated[str | None, Query(pattern="^(tcp|udp|sctp|icmp)$")] = None,
        port: Annotated[str | None, Query(min_length=1, max_length=63)] = None,
    ) -> Response:
        """Say why one can reach another, or cannot
        Which rule decides, and what would have to be granted. `source` and `destination` are containers, addresses, `internet`,
        `NETWORK/mesh` or `NETWORK/host`; `port` a number or a service's name.
        """
        state = view.loaded.state
        key = ("why", state.digest, source, destination, protocol or "", port or "")
        body = await proofs.ask(key, lambda: _why(state, source, destination, protocol, port))
        return Response(body, media_type="application/json")


def _controller(api: Context) -> tuple[dict[str, Any] | None, str]:
    try:
        return ask(api.settings.run_dir, {"ask": "status"}, ASK_S), ""
    except BulkheadError as exc:
        return None, str(exc)


def _agent(api: Context) -> tuple[dict[str, Any] | None, str]:
    path = api.settings.run_dir.joinpath(*AGENT_STATUS)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found, ""
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or "it is damaged"
        return None, f"the agent's status {path} cannot be read ({why}); see that it runs: bulkhead agent FILE"


def _found(state: DesiredState, field: str, word: str) -> Endpoint:
    try:
        return find(state, word)
    except BulkheadError as exc:
        raise ApiProblem("invalid", f"{exc}.", [Fault(field, word[:80], "somebody there is", f"{exc}.")]) from exc


def _matrix(state: DesiredState, sources: tuple[str, ...], targets: tuple[str, ...]) -> bytes:
    rows = tuple(find(state, word) for word in sources) or endpoints(state)
    to = tuple(find(state, word) for word in targets) or endpoints(state)
    cells: dict[tuple[str, str], Cell] = {}
    for part in reach(state, rows, to):
        cells.update(part.cells)
    found: dict[str, JSON] = {
        "endpoints": [_endpoint(one) for one in dict.fromkeys((*rows, *to))],
        "cells": [{"from": a, "to": b, **cell.as_data()} for (a, b), cell in cells.items()],
    }
    return json.dumps(found).encode()


def _endpoint(endpoint: Endpoint) -> dict[str, JSON]:
    bridge, port = endpoint.end
    return {
        "name": endpoint.name,
        "network": endpoint.network,
        "role": str(endpoint.role),
        "bridge": bridge,
        "port": port,
    }


def _why(state: DesiredState, source: str, target: str, protocol: str | None, port: str | None) -> bytes:
    a, b = _found(state, "source", source), _found(state, "destination", target)
    if a.name == b.name:
        fault = Fault("destination", target, f"somebody else than {a.name}", "Name two.")
        raise ApiProblem("invalid", f"{source} and {target} are both {a.name}; name two.", [fault])
    asked = None
    if port is not None or protocol is not None:
        text = "icmp" if protocol == "icmp" else f"{protocol}/{port}" if protocol and (port or "").isdigit() else port
        try:
            asked = read_service(text or f"{protocol}/", services(b, vpn_port(state, b)))
        except BulkheadError as exc:
            raise ApiProblem(
                "invalid", f"{exc}.", [Fault("port", str(port), "a port or a service", f"{exc}.")]
            ) from exc
    address = b.address if b not in endpoints(state) else None
    found = why(state, a, b, asked, to=address)
    return json.dumps({"from": a.name, "to": b.name, **found.as_data()}).encode()
