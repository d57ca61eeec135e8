"""Clients of this node's VPN server. A client's private key is made here, shown once, and kept nowhere."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request
from starlette.responses import Response

from controller import vpnpool
from controller.api import models
from controller.api.context import Context, IdempotencyKey, Manner, Timeout, manner
from controller.api.models import rfc3339
from controller.api.operations import Answer, Kind, Staying, Target, moment
from controller.api.problem import ApiProblem, Fault
from controller.api.view import View, encoded, plain
from controller.hostmodel import Endpoint, VpnServer
from controller.model import Ipv4
from controller.problems import BulkheadError
from controller.records import ClientRecord, OperationRecord, Records, Scope, key
from controller.store import Change

Name = Annotated[str, Path(pattern=models.LABEL, max_length=63, description="A client's name.")]


def routes(api: Context) -> None:
    """Register the routes."""
    view, add, waiting = api.view, api.routes.add, manner(api.settings.limits.wait_s)

    @add("GET", "/api/vpn/clients", scope=Scope.READ, model=models.Clients, tag="vpn")
    async def list_clients(request: Request) -> Response:
        """List VPN clients"""
        return api.read(
            request, "clients", lambda: models.Clients(clients=[_shown(one) for one in view.records.clients])
        )

    @add("POST", "/api/vpn/clients", scope=Scope.OPERATE, model=models.NewClient, status=201, tag="vpn")
    async def add_client(
        request: Request,
        wanted: models.AddClient,
        timeout: Timeout = api.settings.limits.wait_s,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """Add a VPN client
        Its configuration is in this answer and nowhere else.
        """
        who = api.principal(request)
        server, endpoint, server_key = _server(api, wanted.endpoint)

        def function(change: Change) -> Target:
            _free(change.records, view.node, wanted.name)
            taken = [Ipv4.parse(one.address) for one in change.records.clients if one.node == view.node]
            address = vpnpool.free_address(server.pool, taken)
            if address is None:
                detail = f"Every address of {server.pool} is taken. Remove a client, or declare a larger pool."
                raise ApiProblem("addresses-exhausted", detail)
            record, private = vpnpool.new_client(wanted.name, view.node, address, who.name, moment())
            change.put(record)
            config = vpnpool.configuration(record.address, private, record.preshared_key, server, endpoint, server_key)
            return Target(key(record), made_at=record.created_at, secret={"config": config})

        about = {"object": f"client/{view.node}/{wanted.name}"}
        return await api.change(request, "client.add", function, Manner(timeout_s=timeout, key=idempotency_key), about)

    @add(
        "DELETE",
        "/api/vpn/clients/{name}",
        scope=Scope.OPERATE,
        model=models.Client,
        also={202: models.Operation},
        tag="vpn",
    )
    async def remove_client(request: Request, name: Name, how: Manner = waiting) -> Response:
        """Remove a VPN client
        It is cut off when this answers.
        """

        def function(change: Change) -> Target:
            for record in change.records.clients:
                if record.node == view.node and record.name.lower() == name.lower():
                    change.delete(key(record))
                    return Target(key(record), last=plain(_shown(record)))
            raise ApiProblem("not-found", f"There is no VPN client {name} of {view.node}. See GET /api/vpn/clients.")

        about = {"object": f"client/{view.node}/{name}"}
        return await api.change(request, "client.remove", function, how, about)


def _server(api: Context, dialled: str | None) -> tuple[VpnServer, Endpoint, str]:
    """The VPN server, where clients dial, and its public key. Raises `ApiProblem`."""
    server = api.view.declared.host.vpn
    if server is None:
        detail = f"{api.view.declared.file} declares no VPN server; declare one under wireguard.vpn_server."
        raise ApiProblem("no-vpn-server", detail)
    endpoint = _endpoint(dialled) if dialled is not None else server.endpoint
    if endpoint is None:
        detail = (
            "Nobody says where clients connect to; send endpoint (--endpoint HOST:PORT), or write "
            "wireguard.vpn_server.endpoint: HOST:PORT."
        )
        raise ApiProblem("no-vpn-server", detail)
    try:
        return server, endpoint, vpnpool.server_public_key(api.settings.run_dir)
    except BulkheadError as exc:
        raise ApiProblem("no-vpn-server", f"{exc}.", headers={"Retry-After": "5"}) from exc


def _endpoint(text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    if int(port) > 65535:
        fault = Fault("endpoint", text, "a port up to 65535", "Send HOST:PORT.")
        raise ApiProblem("invalid", f"endpoint: {fault.fix}", [fault])
    return Endpoint(host, int(port))


def _free(records: Records, node: str, name: str) -> None:
    for other in records.clients:
        if other.node == node and other.name.lower() == name.lower():
            fault = Fault("name", name, "a name of its own", "Choose another, or remove that client first.")
            raise ApiProblem("duplicate-name", f"There is a VPN client {other.name} already. {fault.fix}", [fault])


def _shown(record: ClientRecord) -> models.Client:
    return models.Client(
        name=record.name,
        node=record.node,
        address=record.address,
        public_key=record.public_key,
        created_by=record.created_by,
        created_at=rfc3339(record.created_at) if record.created_at else None,
        revision=record.revision,
    )


class Added:
    """A client that was added. After a restart its configuration is lost, and so is the client."""

    stays = False

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The client; its configuration is put in where it is known."""
        for record in view.records.clients:
            if key(record) == operation.object:
                return Answer(201, encoded(_shown(record)))
        raise ApiProblem("conflict", f"{operation.object} was removed by somebody else meanwhile.")

    def undo(self, change: Change, operation: OperationRecord) -> bool:
        """Remove it, if it is still the one that was made."""
        for record in change.records.clients:
            if key(record) == operation.object and record.created_at == operation.created_at:
                change.delete(key(record))
                return True
        return False


class Removed(Staying):
    """A client that was removed."""

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """The client as it was."""
        return Answer(200, operation.answer.encode())


KINDS: dict[str, Kind] = {"client.add": Added(), "client.remove": Removed()}
