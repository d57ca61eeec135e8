"""What the store holds, as values: everything that was made while the system runs, on top of the state file.

Records are frozen and compare by value; `controller.store` reads and writes them, everybody else only looks. Times are
seconds since the epoch. Imports model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from controller.model import Protocol


class Scope(StrEnum):
    """What a caller may do: look, change things, or approve what others have asked for."""

    READ = "read"
    OPERATE = "operate"
    APPROVE = "approve"


class GrantState(StrEnum):
    """Where a grant is in its life. Only an approved one opens anything."""

    REQUESTED = "requested"
    APPROVED = "approved"
    DENIED = "denied"
    REVOKED = "revoked"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """A service of a container. `check` is empty, `tcp`, or `http:/PATH`: how its health is found out."""

    name: str
    protocol: Protocol
    port: int
    exposed: bool = False
    check: str = ""


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """A container that was created while the system runs. `node` is the host that runs it; `address` a dotted quad."""

    id: str
    name: str
    network: str
    node: str
    address: str
    services: tuple[ServiceRecord, ...] = ()
    driver: str = "netns"
    command: tuple[str, ...] = ()
    template: str = ""
    order: int = 0
    running: bool = True
    created_by: str = ""
    created_at: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A client of a node's VPN server. Its private key is nowhere; the shared one is not in any repr."""

    name: str
    node: str
    address: str
    public_key: str
    preshared_key: str = field(default="", repr=False)
    created_by: str = ""
    created_at: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class GrantRecord:
    """Permission for one flow across two networks: from container `source` to `port` of container `target`, by id.

    `duration_s` counts from the approval, which sets `expires_at` (0 before). `node` is whose containers they are: another
    one's state file may give the same ids to others.
    """

    id: str
    source: str
    target: str
    protocol: Protocol
    port: int
    reason: str
    requested_by: str
    requested_at: float
    duration_s: int
    state: GrantState = GrantState.REQUESTED
    decided_by: str = ""
    decided_at: float = 0.0
    expires_at: float = 0.0
    revision: int = 0
    node: str = ""

    def open_at(self, now: float) -> bool:
        """Whether it lets anything through at `now`."""
        return self.state is GrantState.APPROVED and now < self.expires_at


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A bearer token, by its SHA-256 digest (hexadecimal). `expires_at` 0 is never."""

    id: str
    name: str
    digest: str = field(repr=False)
    scopes: tuple[Scope, ...] = (Scope.READ,)
    created_by: str = ""
    created_at: float = 0.0
    expires_at: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """A change somebody may ask about later. `object` is a key such as `container/103`.

    `state` is `running`, `done` or `failed`; `answer` the JSON text of what was answered, a problem document where it
    failed. With `idempotency_key`, `who` and `digest` (of the request) the same request is answered the same again.
    """

    id: str
    kind: str
    object: str
    node: str
    who: str
    created_at: float
    state: str = "running"
    status: int = 0
    answer: str = ""
    idempotency_key: str = ""
    digest: str = ""
    revision: int = 0


_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """How far a node's agent and controller have come: they have realized everything up to a revision.

    What they have not is in `agent_waiting` and `controller_waiting`, by key (`container/103`, `grant/7`), with the
    reason; a reason that begins with `refused: ` will not mend itself. `health` is of services, `102/xray` to `up` or
    `down: WHY`.
    """

    name: str
    agent_revision: int = 0
    controller_revision: int = 0
    agent_waiting: Mapping[str, str] = field(default_factory=lambda: _NONE, hash=False)
    controller_waiting: Mapping[str, str] = field(default_factory=lambda: _NONE, hash=False)
    health: Mapping[str, str] = field(default_factory=lambda: _NONE, hash=False)


Record = ContainerRecord | ClientRecord | GrantRecord | TokenRecord | OperationRecord
"""What a change adds, replaces or removes. Each kind has a key that is unique: `key(record)`."""


def key(record: Record) -> str:
    """The name of a record among all: `container/103`, `client/NODE/NAME`, `grant/7`, `token/ID`, `operation/ID`."""
    if isinstance(record, ClientRecord):
        return f"client/{record.node}/{record.name}"
    kind = type(record).__name__.removesuffix("Record").lower()
    return f"{kind}/{record.id}"


@dataclass(frozen=True, slots=True)
class Records:
    """Everything the store holds at one revision. A change of any record makes a new revision; nodes' progress does not."""

    revision: int = 0
    containers: tuple[ContainerRecord, ...] = ()
    clients: tuple[ClientRecord, ...] = ()
    grants: tuple[GrantRecord, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()
    operations: tuple[OperationRecord, ...] = ()
    nodes: tuple[NodeRecord, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        yield from self.containers
        yield from self.clients
        yield from self.grants
        yield from self.tokens
        yield from self.operations

    def node(self, name: str) -> NodeRecord:
        """A node's progress; none where it never wrote any."""
        return next((node for node in self.nodes if node.name == name), NodeRecord(name))
