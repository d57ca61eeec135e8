"""The API as tools of the Model Context Protocol, with the official SDK.

Every tool is a request of the HTTP API, made with the credentials of whoever calls it: what a caller may do is what the
API lets them do. Imports the API's models and the client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.types import ToolAnnotations
from pydantic import BaseModel, ConfigDict, Field, create_model

from controller.api import models
from controller.client import ANSWER_S, LATER_S, ApiProblem, NoApi, segment
from controller.events import Kind

F = TypeVar("F", bound=Callable[..., Any])
NAME = "bulkhead"
LONGEST_S = 300.0
INSTRUCTIONS = """\
Bulkhead keeps networks on the same hosts apart: containers of one network cannot reach those of another, unless a grant
permits one flow for a limited time, which a person other than the requester approves. Use `why` before asking for a grant:
it says what stops a flow and what would have to be granted. Containers of origin `declared` stand in the state file and
can only be looked at. A tool that changes something answers when the hosts are so, or changes nothing and says why.
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the HTTP API, to be answered within `answer_s`."""

    method: str
    path: str
    params: Mapping[str, object] = field(default_factory=dict)
    body: Mapping[str, object] | None = None
    answer_s: float = ANSWER_S


Caller = Callable[[Context[Any, Any], Asked], Awaitable[Any]]
"""Makes a request for whoever called a tool. Raises `ApiProblem` and `NoApi`."""


ContainerRef = Annotated[models.Ref, Field(description="A container's id or name, as list_containers tells them.")]
GrantId = Annotated[str, Field(pattern="^[0-9A-Za-z]{1,32}$", description="A grant's id, as list_grants tells them.")]
EndpointRef = Annotated[
    str,
    Field(
        min_length=1,
        max_length=80,
        description="A container (id, name, port or address), `internet`, `NETWORK/mesh` or `NETWORK/host`.",
    ),
]
NetworkFilter = Annotated[str | None, Field(max_length=63, description="Only of this network.")]
Timeout = Annotated[
    float, Field(ge=1, le=LONGEST_S, description="Seconds to wait until the hosts are so. Then it is taken back.")
]

READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
MAKES = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=False)
SETS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
DESTROYS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)


def server(call: Caller, *, approving: bool = False) -> MCPServer[Any]:
    """An MCP server whose tools ask the API by `call`. `approving` offers approve_grant and deny_grant too."""
    ask, tools = _Asking(call), _Tools()
    _add_reading(tools, ask)
    _add_containers(tools, ask)
    _add_grants(tools, ask)
    if approving:
        _add_approving(tools, ask)
    return MCPServer(
        NAME, title="Bulkhead", instructions=INSTRUCTIONS, version=version(NAME), tools=tools.made, log_level="WARNING"
    )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _strict(model: type[Any]) -> Any:
    return create_model(model.__name__, __base__=(_Strict, model))


class _Tools:
    """Makes tools of functions. Arguments that a tool does not have are refused, not passed over."""

    def __init__(self) -> None:
        self.made: list[Tool] = []

    def tool(self, title: str, annotations: ToolAnnotations) -> Callable[[F], F]:
        def register(function: F) -> F:
            made = Tool.from_function(function, title=title, annotations=annotations)
            strict = _strict(made.fn_metadata.arg_model)
            made.fn_metadata.arg_model = strict
            made.parameters = strict.model_json_schema(by_alias=True)
            self.made.append(made)
            return function

        return register


class _Asking:
    """Requests whose problems become errors that a model can act on."""

    def __init__(self, call: Caller) -> None:
        self._call = call

    async def __call__(self, ctx: Context[Any, Any], asked: Asked) -> Any:
        try:
            return await self._call(ctx, asked)
        except ApiProblem as exc:
            raise ToolError(f"{exc} [{exc.code or exc.status}]") from exc
        except NoApi as exc:
            raise ToolError(str(exc)) from exc

    async def get(self, ctx: Context[Any, Any], path: str, **params: object) -> Any:
        return await self(ctx, Asked("GET", path, params))

    async def change(
        self, ctx: Context[Any, Any], method: str, path: str, timeout_s: float, body: Mapping[str, object] | None = None
    ) -> Any:
        params = {"timeout": f"{timeout_s:g}"}
        return await self(ctx, Asked(method, path, params, body, timeout_s + LATER_S))


def _add_reading(tools: _Tools, ask: _Asking) -> None:
    @tools.tool("Status", READS)
    async def status(ctx: Context[Any, Any]) -> models.Status:
        """Whether the node, its controller, its agent and its bridges are as declared, and what is not."""
        return models.Status.model_validate(await ask.get(ctx, "/api/status"))

    @tools.tool("Networks", READS)
    async def list_networks(ctx: Context[Any, Any]) -> models.Networks:
        """The networks: subnets, id ranges, how many ids and addresses are free, and how traffic leaves."""
        return models.Networks.model_validate(await ask.get(ctx, "/api/networks"))

    @tools.tool("Services", READS)
    async def list_services(ctx: Context[Any, Any], network: NetworkFilter = None) -> models.Services:
        """The services that containers offer: protocol, port, address, name in DNS, whether exposed, and health."""
        return models.Services.model_validate(await ask.get(ctx, "/api/services", network=network))

    @tools.tool("Reachability", READS)
    async def reachability(ctx: Context[Any, Any]) -> models.Reachability:
        """Who can reach whom, by which protocols and ports: proved from the flows that are desired, not measured."""
        return models.Reachability.model_validate(await ask.get(ctx, "/api/reachability"))

    @tools.tool("Why can A (not) reach B", READS)
    async def why(
        ctx: Context[Any, Any],
        source: EndpointRef,
        destination: EndpointRef,
        protocol: Annotated[Literal["tcp", "udp", "sctp", "icmp"] | None, Field(description="Of the flow.")] = None,
        port: Annotated[int | None, Field(ge=1, le=65535, description="Of the destination.")] = None,
    ) -> models.Why:
        """Whether `source` can reach `destination`, the rule that decides, and what would have to be granted."""
        params = {"source": source, "destination": destination, "protocol": protocol, "port": port}
        return models.Why.model_validate(await ask.get(ctx, "/api/why", **params))

    @tools.tool("Events", READS)
    async def list_events(
        ctx: Context[Any, Any],
        kind: Annotated[Kind | None, Field(description="Only of this kind.")] = None,
        network: NetworkFilter = None,
        container: Annotated[str | None, Field(max_length=63, description="Only about this container.")] = None,
        since: Annotated[
            str | None, Field(max_length=40, description="10m, 2h, 12:30 or 2026-01-01T00:00:00Z.")
        ] = None,
        after: Annotated[
            str | None, Field(pattern="^(c[0-9]+)?[.]?(a[0-9]+)?[.]?(p[0-9]+)?$", description="`next` of an answer.")
        ] = None,
        limit: Annotated[int, Field(ge=1, le=500, description="At most so many.")] = 50,
    ) -> models.Events:
        """What happened: flows blocked, hosts healed, grants opened, changes made and by whom. Numbered, in order."""
        params = {
            "kind": kind, "network": network, "container": container, "since": since, "after": after, "limit": limit
        }  # fmt: skip
        return models.Events.model_validate(await ask.get(ctx, "/api/events", **params))


def _add_containers(tools: _Tools, ask: _Asking) -> None:
    @tools.tool("Containers", READS)
    async def list_containers(
        ctx: Context[Any, Any],
        network: NetworkFilter = None,
        node: Annotated[str | None, Field(max_length=63, description="Only of this host.")] = None,
    ) -> models.Containers:
        """All containers with address, port, state and services, declared ones and those that were created."""
        return models.Containers.model_validate(await ask.get(ctx, "/api/containers", network=network, node=node))

    @tools.tool("Container", READS)
    async def get_container(ctx: Context[Any, Any], container: ContainerRef) -> models.Container:
        """One container: what it is, whether it runs, what it waits for, and the health of its services."""
        return models.Container.model_validate(await ask.get(ctx, f"/api/containers/{segment(container)}"))

    @tools.tool("Create a container", MAKES)
    async def create_container(
        ctx: Context[Any, Any],
        name: Annotated[models.Label, Field(description="Its name, unique among all.")],
        network: Annotated[models.Label, Field(description="The network it belongs to, as list_networks tells them.")],
        services: Annotated[list[models.ServiceIn], Field(max_length=64, description="What it offers.")] = [],  # noqa: B006
        driver: Annotated[Literal["netns", "lxc"], Field(description="How it is run.")] = "netns",
        command: Annotated[
            list[models.Text], Field(max_length=64, description="What runs in it, as words; empty for nothing.")
        ] = [],  # noqa: B006
        template: Annotated[str, Field(max_length=63, description="For lxc: what it is made from.")] = "",
        timeout_s: Timeout = 30.0,
    ) -> models.Container:
        """Create a container and wait until it runs, its flows are in place and its name resolves. Id and address are chosen.

        It is there as a whole or, after a failure, not at all.
        """
        body: dict[str, object] = {
            "name": name,
            "network": network,
            "services": [service.model_dump() for service in services],
            "driver": driver,
            "command": command,
            "template": template,
        }
        found = await ask.change(ctx, "POST", "/api/containers/create", timeout_s, body)
        return models.Container.model_validate(found)

    @tools.tool("Delete a container", DESTROYS)
    async def delete_container(
        ctx: Context[Any, Any], container: ContainerRef, timeout_s: Timeout = 30.0
    ) -> models.Container:
        """Delete a container that was created, with all it holds, and wait until nothing of it is left. Answers what it
        was."""
        found = await ask.change(ctx, "DELETE", f"/api/containers/{segment(container)}", timeout_s)
        return models.Container.model_validate(found)

    @tools.tool("Start a container", SETS)
    async def start_container(
        ctx: Context[Any, Any], container: ContainerRef, timeout_s: Timeout = 30.0
    ) -> models.Container:
        """Start a container that was stopped, and wait until it runs."""
        found = await ask.change(ctx, "POST", f"/api/containers/{segment(container)}/start", timeout_s, {})
        return models.Container.model_validate(found)

    @tools.tool("Stop a container", DESTROYS)
    async def stop_container(
        ctx: Context[Any, Any], container: ContainerRef, timeout_s: Timeout = 30.0
    ) -> models.Container:
        """Stop a container. It keeps its id, its address and its files."""
        found = await ask.change(ctx, "POST", f"/api/containers/{segment(container)}/stop", timeout_s, {})
        return models.Container.model_validate(found)


def _add_grants(tools: _Tools, ask: _Asking) -> None:
    @tools.tool("Grants", READS)
    async def list_grants(ctx: Context[Any, Any]) -> models.Grants:
        """Permissions for flows across networks, with who asked, who decided, until when, and whether they are in force."""
        return models.Grants.model_validate(await ask.get(ctx, "/api/grants"))

    @tools.tool("Ask for a grant", MAKES)
    async def request_grant(
        ctx: Context[Any, Any],
        source: Annotated[models.Ref, Field(description="The container that opens the connections: id or name.")],
        target: Annotated[models.Ref, Field(description="The container they go to, of another network: id or name.")],
        port: Annotated[models.Port, Field(description="Of the target.")],
        reason: Annotated[str, Field(min_length=1, max_length=1024, description="Whoever decides reads this.")],
        protocol: Annotated[Literal["tcp", "udp", "sctp"], Field(description="Of the flow.")] = "tcp",
        duration_s: Annotated[
            int, Field(ge=1, le=30 * 86_400, description="How long it holds, from the approval.")
        ] = 3600,
    ) -> models.Grant:
        """Ask for permission for one flow across two networks. It opens nothing until a person approves it."""
        body = {
            "source": source, "target": target, "protocol": protocol, "port": port, "reason": reason, "duration_s": duration_s
        }  # fmt: skip
        return models.Grant.model_validate(await ask(ctx, Asked("POST", "/api/grants", body=body)))

    @tools.tool("Revoke a grant", DESTROYS)
    async def revoke_grant(ctx: Context[Any, Any], grant: GrantId, timeout_s: Timeout = 30.0) -> models.Grant:
        """Close a grant before its time, and wait until every connection that it let in is cut."""
        found = await ask.change(ctx, "POST", f"/api/grants/{segment(grant)}/revoke", timeout_s, {})
        return models.Grant.model_validate(found)


def _add_approving(tools: _Tools, ask: _Asking) -> None:
    @tools.tool("Approve a grant", DESTROYS)
    async def approve_grant(ctx: Context[Any, Any], grant: GrantId, timeout_s: Timeout = 30.0) -> models.Grant:
        """Approve what somebody else has asked for, and wait until the flow is open. Only with a person's consent."""
        found = await ask.change(ctx, "POST", f"/api/grants/{segment(grant)}/approve", timeout_s, {})
        return models.Grant.model_validate(found)

    @tools.tool("Deny a grant", SETS)
    async def deny_grant(ctx: Context[Any, Any], grant: GrantId) -> models.Grant:
        """Deny what somebody has asked for. It never opens."""
        return models.Grant.model_validate(await ask(ctx, Asked("POST", f"/api/grants/{segment(grant)}/deny", body={})))
