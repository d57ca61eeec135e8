"""What a router is told: where to listen, whom to ask, and its limits. Imports hostmodel, problems.

Values only, with a spelling in JSON for worker processes. No secrets: keys are named by where they are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from controller.hostmodel import Profile, SecurityRole
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


def targets(profile: Profile) -> tuple[Target, ...]:
    """Whom a machine asks: a socket here as `dev`, its peers as `router`. Raises `BulkheadError`."""
    if profile.role is SecurityRole.DEV:
        return (Target("inference", socket=profile.socket, group=profile.socket_group),)
    if profile.role is not SecurityRole.ROUTER:
        raise BulkheadError(f"security.role is {profile.role}; a router runs where it is dev or router")
    found = tuple(Target(peer.name, address=str(peer.address), port=profile.inference_port) for peer in profile.peers)
    if not found:
        raise BulkheadError("security.peers names no inference server; add one: {name: …, address: …}")
    return found


def limits(profile: Profile) -> Limits:
    """The limits of a profile."""
    given = profile.limits
    return Limits(given.body_bytes, given.request_s, given.idle_s, given.concurrency, given.per_client_per_s)
