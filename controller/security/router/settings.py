"""What a router is told: where to listen, whom to ask, and its limits. Imports problems.

Values only, with a spelling in JSON for worker processes. No secrets: keys are named by where they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from controller.problems import BulkheadError


@dataclass(frozen=True, slots=True)
class Limits:
    """`body_bytes` of a request, `request_s` for a whole request, `idle_s` without a byte, `concurrency` requests at a
    time, `per_client_per_s` requests (a second's worth at once). `header_s` for handshake and head of a request."""

    body_bytes: int = 1024 * 1024
    request_s: float = 600.0
    idle_s: float = 60.0
    concurrency: int = 256
    per_client_per_s: float = 20.0
    header_s: float = 10.0
    connections: int = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """An inference server: at `socket`, whose group is `group`, or at `address`:`port` with the certificate of `name`."""

    name: str
    socket: Path | None = None
    group: str | None = None
    address: str | None = None
    port: int = 8001


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it. `hpke` is the directory of clients and keys, None where requests need not be sealed. `metrics` is the
    unix socket that figures are read from. `drain_s` is how long answers that have begun are waited for at a stop."""

    name: str
    hosts: tuple[str, ...]
    port: int
    pki: Path
    targets: tuple[Target, ...]
    limits: Limits = field(default_factory=Limits)
    hpke: Path | None = None
    client_certificates: bool = False
    metrics: Path | None = None
    events: Path | None = None
    workers: int = 1
    drain_s: float = 30.0
    health_s: float = 2.0
    access: bool = False

    def to_json(self) -> str:
        """For a worker."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        read: dict[str, Any] = json.loads(text)
        targets = [dict(each) for each in read.pop("targets")]
        for each in targets:
            each["socket"] = _path(each["socket"])
        paths = {name: _path(read.pop(name)) for name in ("pki", "hpke", "metrics", "events")}
        limits = Limits(**read.pop("limits"))
        hosts = tuple(read.pop("hosts"))
        return cls(**read, **paths, hosts=hosts, limits=limits, targets=tuple(Target(**each) for each in targets))  # type: ignore[arg-type]


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class _Peer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def address(self) -> object: ...


class _Limits(Protocol):
    @property
    def body_bytes(self) -> int: ...
    @property
    def request_s(self) -> float: ...
    @property
    def idle_s(self) -> float: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def per_client_per_s(self) -> float: ...


def targets(role: str, peers: Iterable[_Peer], socket: Path | None, group: str | None, port: int) -> tuple[Target, ...]:
    """Whom a machine of that role asks: a socket here in `dev`, its peers as a `router`. Raises `BulkheadError`."""
    if role == "dev":
        return (Target("inference", socket=socket or Path("/run/inference.sock"), group=group),)
    if role != "router":
        raise BulkheadError(f"security.role is {role}; a router runs where it is dev or router")
    found = tuple(Target(peer.name, address=str(peer.address), port=port) for peer in peers)
    if not found:
        raise BulkheadError("security.peers names no inference server; add one: {name: …, address: …}")
    return found


def limits(given: _Limits) -> Limits:
    """The limits of a profile."""
    return Limits(given.body_bytes, given.request_s, given.idle_s, given.concurrency, given.per_client_per_s)
