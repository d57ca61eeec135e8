"""What goes in and out, as the OpenAPI document has it. Strict: unknown keys are errors and nothing is converted.

Times are RFC 3339 in UTC. Imports records only.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from controller.records import GrantState, Scope

Protocol = Literal["tcp", "udp", "sctp"]


def _printable(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("one line of printable characters is expected")
    return text


def _check(text: str) -> str:
    if text and text != "tcp" and not (text.startswith("http:/") and " " not in text):
        raise ValueError("expected tcp, or http:/PATH")
    return _printable(text) if text else text


LABEL = r"^[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?$"
ADDRESS = r"^(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$"
ID = r"^[1-9][0-9]{0,8}$"
DIALLED = r"^[A-Za-z0-9][A-Za-z0-9.-]{0,252}:[1-9][0-9]{0,4}$"
TOKEN = "^[0-9a-f]{10}$"
OPERATION = "^[0-9a-f]{16}$"
PATTERNS = {
    LABEL: ("1 to 63 letters, digits and hyphens, with no hyphen first or last", ""),
    ADDRESS: ("an IPv4 address, such as 10.0.0.7", ""),
    ID: ("a number, such as 12", ""),
    DIALLED: ("HOST:PORT, such as vpn.example.org:51820", ""),
    TOKEN: ("10 characters of 0-9 and a-f", "See which tokens there are: GET /api/tokens (bulkhead token list)."),
    OPERATION: (
        "16 characters of 0-9 and a-f",
        "An operation's id is in the answer to the change that was begun with wait=false (--no-wait).",
    ),
}
"""What is expected where one of these does not match, and what to do if that does not say it."""
Label = Annotated[str, Field(pattern=LABEL, max_length=63)]
Text = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_printable)]
Port = Annotated[int, Field(ge=1, le=65535)]
Id = Annotated[str, Field(pattern=ID)]
Address = Annotated[str, Field(pattern=ADDRESS)]
Ref = Annotated[str, Field(pattern=LABEL, description="A container's id or name.")]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


def rfc3339(moment: float) -> str:
    """A time as it goes out."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ------------------------------------------------------------------------------------------------------------ problems


class FaultOut(_Out):
    """What is wrong with one field."""

    field: str
    found: str
    expected: str
    fix: str


class ProblemOut(_Out):
    """A problem document (RFC 9457). `detail` says what to do; `type` is stable."""

    type: str = Field(pattern="^urn:bulkhead:problem:[a-z-]+$", examples=["urn:bulkhead:problem:duplicate-name"])
    title: str
    status: int
    detail: str
    errors: list[FaultOut] = []


# ---------------------------------------------------------------------------------------------------------- containers


class ServiceIn(_In):
    """A service that a container offers. `exposed` ones may be reached from the host. `check` is how its health is found
    out: `tcp` connects, `http:/PATH` asks."""

    name: Label
    protocol: Protocol = "tcp"
    port: Port
    exposed: bool = False
    check: Annotated[str, Field(max_length=200), AfterValidator(_check)] = ""


class CreateContainer(_In):
    """A container to be made. What is left out is chosen: the next free id of the network's range, the first free address
    of its subnet, this node."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "tor-relay",
                    "network": "privacy",
                    "services": [{"name": "tor-relay", "protocol": "tcp", "port": 9001}],
                }
            ]
        }
    )

    name: Label
    network: Label
    services: Annotated[list[ServiceIn], Field(max_length=64)] = []
    driver: Literal["netns", "lxc"] = "netns"
    command: Annotated[list[Text], Field(max_length=64)] = []
    template: Annotated[str, Field(pattern=r"^(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)?$")] = ""
    order: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    id: Id | None = None
    address: Address | None = None
    node: Label | None = None


class ContainerService(_Out):
    """A service of a container, and how it is: `up`, `down: WHY`, or `unknown`."""

    name: str
    protocol: Protocol
    port: int
    exposed: bool
    check: str
    health: str


class Container(_Out):
    """A container. `origin` is where it comes from: the state file (`declared`) or this API (`stored`)."""

    id: str
    name: str
    network: str
    node: str
    address: str
    mac: str
    port: str = Field(description="The port of the network's bridge that it is behind.")
    origin: Literal["declared", "stored"]
    running: bool
    state: Literal["ready", "pending", "failed", "stopped"]
    why: str = Field(description="What it waits for, or why it failed; empty where neither.")
    services: list[ContainerService]
    driver: str
    created_by: str
    created_at: Time | None
    revision: int


class Containers(_Out):
    """Containers, in the order of their ids."""

    containers: list[Container]


class Service(_Out):
    """A service of some container, under the name it has on its network."""

    name: str
    protocol: Protocol
    port: int
    network: str
    container: str
    container_id: str
    address: str
    fqdn: str | None = Field(description="Its container's name on its network; null where the network has no resolver.")
    exposed: bool
    origin: Literal["declared", "stored"]
    health: str


class Services(_Out):
    """Services."""

    services: list[Service]


# ------------------------------------------------------------------------------------------------------------ networks


class Network(_Out):
    """A network of this node."""

    name: str
    bridge: str
    subnet: str
    gateway: str
    host: str | None
    ids: str = Field(examples=["100-199"])
    egress: str | None = Field(description="The port by which its traffic leaves; null where it has no way out.")
    mesh: str | None = Field(description="The bridge by which it goes on to other nodes.")
    domain: str | None
    resolver: str | None
    containers: int
    free_ids: int
    free_addresses: int


class Networks(_Out):
    """Networks."""

    networks: list[Network]


class Egress(_Out):
    """How a network's traffic leaves. `up` is null where the controller cannot be asked."""

    network: str
    bridge: str
    port: str
    up: bool | None
    why: str


class EgressList(_Out):
    """Every network's way out."""

    egress: list[Egress]


# -------------------------------------------------------------------------------------------------------------- grants


class RequestGrant(_In):
    """Permission asked for: from container `source` to `port` of container `target`, for `duration_s` from the approval."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "source": "monitoring",
                    "target": "xray",
                    "protocol": "tcp",
                    "port": 8080,
                    "reason": "health check",
                    "duration_s": 3600,
                }
            ]
        }
    )

    source: Ref
    target: Ref
    protocol: Protocol = "tcp"
    port: Port
    reason: Text
    duration_s: Annotated[int, Field(ge=1, le=30 * 86_400)] = 3600


class Grant(_Out):
    """A grant. `realized` is whether what it says now (open, or shut) is so on its node; `why` what is missing."""

    id: str
    source: str
    target: str
    protocol: Protocol
    port: int
    reason: str
    requested_by: str
    requested_at: Time
    duration_s: int
    state: GrantState
    decided_by: str
    decided_at: Time | None
    expires_at: Time | None
    node: str
    revision: int
    realized: bool
    why: str


class Grants(_Out):
    """Grants, the newest first."""

    grants: list[Grant]


# --------------------------------------------------------------------------------------------------------- VPN clients


class AddClient(_In):
    """A client of this node's VPN server."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "laptop"}]})

    name: Label
    endpoint: Annotated[
        str | None,
        Field(
            pattern=DIALLED,
            description="HOST:PORT that the client dials, where it is not the declared one.",
        ),
    ] = None


class Client(_Out):
    """Who may connect to a node's VPN server."""

    name: str
    node: str
    address: str
    public_key: str
    created_by: str
    created_at: Time | None
    revision: int


class Clients(_Out):
    """VPN clients."""

    clients: list[Client]


class NewClient(Client):
    """A client that was just made. `config` is for its own machine, in wg-quick's style; it holds its private key, which is
    shown this once and not kept."""

    config: str


# -------------------------------------------------------------------------------------------------------------- tokens


class CreateToken(_In):
    """A bearer token to be made, with no more scopes than its maker has."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "ci", "scopes": ["read", "operate"], "expires_in_s": 86_400}]}
    )

    name: Label
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1, max_length=3)]
    expires_in_s: Annotated[int, Field(ge=1, le=10 * 366 * 86_400)] = 30 * 86_400


class Token(_Out):
    """A token, without itself."""

    id: str
    name: str
    scopes: list[Scope]
    created_by: str
    created_at: Time
    expires_at: Time | None
    expired: bool


class Tokens(_Out):
    """Tokens."""

    tokens: list[Token]


class NewToken(Token):
    """A token that was just made. `token` is shown this once."""

    token: str


# ---------------------------------------------------------------------------------------------------------- operations


class Operation(_Out):
    """A change that goes on by itself. `result` is what it would have been answered, null while it runs."""

    id: str
    kind: str
    object: str
    state: Literal["running", "done", "failed"]
    created_at: Time
    result: dict[str, Any] | None


# --------------------------------------------------------------------------------------------------------------- others


class Status(_Out):
    """The node as a whole. What cannot be asked is null, and says why in `unknown`."""

    node: str
    state_file: str
    state: str = Field(description="The digest of what is desired.")
    store_connected: bool
    revision: int
    problem: str | None = Field(description="Why the state file is not read any more, where it is damaged.")
    refused: dict[str, str] = Field(description="Records that what is declared contradicts, and why.")
    nodes: dict[str, Any]
    controller: dict[str, Any] | None
    agent: dict[str, Any] | None
    bridges: list[dict[str, Any]]
    unknown: list[str]


class Cell(_Out):
    """What gets from one endpoint to another."""

    model_config = ConfigDict(extra="allow")

    source: str = Field(alias="from")
    target: str = Field(alias="to")


class Endpoint(_Out):
    """A container, a mesh, the internet, the host."""

    name: str
    network: str
    role: str
    bridge: str
    port: str


class Reachability(_Out):
    """Who can reach whom, from the proof."""

    endpoints: list[Endpoint]
    cells: list[Cell]


class Why(_Out):
    """Whether one can reach the other, which rule decides, and what would have to be granted."""

    model_config = ConfigDict(extra="allow")

    source: str = Field(alias="from")
    target: str = Field(alias="to")


class Events(_Out):
    """Events in the order of their times. `next` goes into `after`, for those that come."""

    events: list[dict[str, Any]]
    next: str


class Healthy(_Out):
    """The API answers."""

    status: Literal["ok"]
