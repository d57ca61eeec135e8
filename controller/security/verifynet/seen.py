"""What was seen of a machine, as values; a test makes its own. Imports the facts of the host's checks and pki's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from controller.security.pki.report import Check
from controller.verify.host.facts import Gap


class Outcome(StrEnum):
    """What became of a probe: a connection, a refusal by the kernel behind the firewall, or no answer."""

    OPEN = "open"
    REFUSED = "refused"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that waits. `user` is whose process it is, empty if that is not known."""

    protocol: str
    address: str
    port: int
    user: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """One port, tried from another network namespace."""

    protocol: str
    address: str
    port: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A unix socket: its permissions, owner and group."""

    mode: int
    user: str
    group: str


@dataclass(frozen=True, slots=True)
class WgPeer:
    """A peer of a WireGuard interface. `handshake_s` is how long ago the last one was, None if never."""

    key: str
    allowed: tuple[str, ...]
    handshake_s: int | None
    keepalive_s: int


@dataclass(frozen=True, slots=True)
class Wg:
    """The WireGuard interface that has the profile's address."""

    interface: str
    addresses: tuple[str, ...]
    mtu: int
    listen: int
    peers: tuple[WgPeer, ...]


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A private key's file."""

    path: str
    mode: int
    age_days: float


@dataclass(frozen=True, slots=True)
class Tls:
    """What a TLS port does: versions older than 1.3 and suites that it took, whether it takes 1.3, whether it answers
    without a certificate (None where that was not tried), and the SHA-256 of the certificate it shows and of the one it
    should (empty where there is none)."""

    modern: bool
    old: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    anonymous: bool | None = None
    shown: str = ""
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """All of it. `rules` is the first difference between the firewall wanted and loaded, empty where there is none. `units`
    has for each unit what differs from the wanted one, `asleep` those that do not start with the host, `timers` those that are
    not enabled. `upstreams` has for each peer why it does not answer, or nothing."""

    rules: str | Gap
    listeners: tuple[Listener, ...] | Gap
    probes: tuple[Probe, ...] | Gap
    addresses: Mapping[str, tuple[str, ...]] | Gap
    users: Mapping[str, str]
    units: Mapping[str, tuple[str, ...]]
    timers: tuple[str, ...]
    asleep: tuple[str, ...] = ()
    socket: SocketFile | None = None
    wg: Wg | None | Gap = None
    keys: tuple[KeyFile, ...] | Gap = ()
    certificates: tuple[Check, ...] | Gap = ()
    ca_days: float | Gap = 0.0
    tls: Tls | Gap = field(default_factory=lambda: Gap("it was not looked at", ""))
    upstreams: Mapping[str, str] = field(default_factory=dict)
