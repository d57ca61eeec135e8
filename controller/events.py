"""What happened, as values: events, numbered and chained records of them, and their one spelling as JSON.

An `Event` is what a part of the program reports. A `Record` is an event that was written: it has a number, a time and
the hash of the record before it, so that a record that is altered, removed or moved later is found. Everything here
is pure; `controller.eventfiles` tells how records are kept in files. Imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeAlias

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"


class Kind(StrEnum):
    """What kind of thing happened. The values are stable: programs filter by them."""

    SWITCH_UP = "switch_up"
    SWITCH_DOWN = "switch_down"
    SWITCH_WARNING = "switch_warning"
    PORT_UP = "port_up"
    PORT_DOWN = "port_down"
    STATE_APPLIED = "state_applied"
    STATE_REJECTED = "state_rejected"
    UNPROVED = "unproved"
    LEAK = "leak"
    LEAK_CLOSED = "leak_closed"
    SEALED = "sealed"
    UNSEALED = "unsealed"
    PATH_LEARNED = "path_learned"
    PATH_EXPIRED = "path_expired"
    VIOLATION = "violation"
    VIOLATION_QUIETED = "violation_quieted"
    FOREIGN_FLOW = "foreign_flow"
    TAMPERING = "tampering"
    DRIFT_REPAIRED = "drift_repaired"
    EGRESS_UP = "egress_up"
    EGRESS_DOWN = "egress_down"
    OPENFLOW_ERROR = "openflow_error"
    UNKNOWN_BRIDGE = "unknown_bridge"
    CONTROLLER_STARTED = "controller_started"
    CONTROLLER_STOPPED = "controller_stopped"
    AGENT_STARTED = "agent_started"
    AGENT_STOPPED = "agent_stopped"
    HOST_CHANGED = "host_changed"
    HOST_HEALED = "host_healed"
    HOST_ERROR = "host_error"
    HOST_READY = "host_ready"
    TUNNEL_UP = "tunnel_up"
    TUNNEL_DOWN = "tunnel_down"
    API_STARTED = "api_started"
    API_STOPPED = "api_stopped"
    API_CHANGE = "api_change"
    API_DENIED = "api_denied"
    SERVICE_UP = "service_up"
    SERVICE_DOWN = "service_down"
    CERT_EXPIRING = "cert_expiring"
    CERT_RENEWED = "cert_renewed"
    CERT_REVOKED = "cert_revoked"
    CA_ROTATED = "ca_rotated"
    CLIENT_REGISTERED = "client_registered"
    CLIENT_REVOKED = "client_revoked"
    CLIENT_REFUSED = "client_refused"
    UPSTREAM_UP = "upstream_up"
    UPSTREAM_DOWN = "upstream_down"
    KEY_ROTATED = "key_rotated"
    SERVER_SEALED = "server_sealed"
    SERVER_UNSEALED = "server_unsealed"
    CHECK_FAILED = "check_failed"
    LOST = "lost"
    INTERNAL_ERROR = "internal_error"


class Severity(StrEnum):
    """`info`: nothing to do. `warning`: look at it. `alarm`: isolation or the program itself is in question."""

    INFO = "info"
    WARNING = "warning"
    ALARM = "alarm"


_WARNINGS: Final = frozenset(
    {
        Kind.SWITCH_DOWN,
        Kind.SWITCH_WARNING,
        Kind.PORT_DOWN,
        Kind.STATE_REJECTED,
        Kind.VIOLATION_QUIETED,
        Kind.FOREIGN_FLOW,
        Kind.DRIFT_REPAIRED,
        Kind.EGRESS_DOWN,
        Kind.OPENFLOW_ERROR,
        Kind.UNKNOWN_BRIDGE,
        Kind.HOST_HEALED,
        Kind.HOST_ERROR,
        Kind.TUNNEL_DOWN,
        Kind.API_DENIED,
        Kind.SERVICE_DOWN,
        Kind.CERT_EXPIRING,
        Kind.CLIENT_REFUSED,
        Kind.UPSTREAM_DOWN,
        Kind.SERVER_SEALED,
        Kind.CHECK_FAILED,
        Kind.LOST,
    }
)
_ALARMS: Final = frozenset({Kind.UNPROVED, Kind.LEAK, Kind.SEALED, Kind.VIOLATION, Kind.TAMPERING, Kind.INTERNAL_ERROR})


def severity(kind: Kind) -> Severity:
    """How urgent events of that kind are."""
    if kind in _ALARMS:
        return Severity.ALARM
    return Severity.WARNING if kind in _WARNINGS else Severity.INFO


class GarbledRecord(ValueError):
    """A line is not a record as we write them.

    `seq` is the number the line claims, where it could be read. `altered` tells a well-formed record whose content
    does not fit its hash from a line that is no record at all. Reading it again does not help: run a verification.
    """

    def __init__(self, reason: str, *, seq: int | None = None, altered: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.seq = seq
        self.altered = altered


_NOTHING: Final[Mapping[str, JSON]] = MappingProxyType({})
_TEXTS: Final = ("text", "bridge", "network", "app", "object", "container", "flow", "packet")
_MAX_DEPTH: Final = 16


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    `text` is a sentence for a person and says what to do where something can be done. `object` is what the event is
    about inside an app (a grant, a service), `flow` is in ovs-ofctl's words, `packet` is a packet in words, `data`
    holds counts and the like for programs; it is copied and frozen, lists become tuples.
    """

    kind: Kind
    text: str
    _: KW_ONLY
    bridge: str | None = None
    network: str | None = None
    app: str | None = None
    object: str | None = None
    container: str | None = None
    flow: str | None = None
    packet: str | None = None
    data: Mapping[str, JSON] = field(default_factory=lambda: _NOTHING, hash=False)

    def __post_init__(self) -> None:
        """Refuse what JSON cannot say here, where the mistake is made, and not when the event is written."""
        if not isinstance(self.kind, Kind):
            raise TypeError(f"kind is {self.kind!r}, not a Kind")
        for name in _TEXTS:
            value = getattr(self, name)
            if value is None and name != "text":
                continue
            if not isinstance(value, str):
                raise TypeError(f"{name} is {value!r}, not a string")
            _set(self, name, _plain(value))
        if self.data is not _NOTHING:
            if not isinstance(self.data, Mapping):
                raise TypeError(f"data is {self.data!r}, not a mapping")
            _set(self, "data", _frozen(self.data, "data", 0))


@dataclass(frozen=True, slots=True)
class Record(Event):
    """An event as it was written: its number, when, the hash of the record before it, and its own.

    Made by `seal` or `decode`. A `notice` is a remark of a reader that stands in no file; it has no hash.
    """

    _: KW_ONLY
    seq: int
    time: datetime
    prev: str
    hash: str

    @property
    def is_notice(self) -> bool:
        """Whether a reader made this up to tell something, so that no file contains it."""
        return not self.hash


GENESIS: Final = "0" * 64
"""What the very first record names as the hash before it."""

_set = object.__setattr__


def _plain(text: str) -> str:
    """The string without lone surrogates (names read from the kernel may have them): UTF-8 cannot carry those."""
    if text.isascii():
        return str.__str__(text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _frozen(value: object, where: str, depth: int) -> JSON:
    """A deep copy that cannot change. Raises `TypeError` or `ValueError` for what canonical JSON cannot say."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{where} does not fit 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot say")
        return float(value)
    if isinstance(value, Mapping):
        return MappingProxyType({_key(k, where): _frozen(v, f"{where}.{k}", depth + 1) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
    raise TypeError(f"{where} is {value!r}, which JSON cannot say")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}, not a string")
    return _plain(key)


def _thawed(value: object) -> dict[str, JSON]:
    """For the encoder, which knows dict but not the read-only view of one."""
    if isinstance(value, MappingProxyType):
        return dict(value)
    raise TypeError(f"{value!r} is not JSON")


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# Built once: json.dumps with options would build an encoder per record.
_ENCODER: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_thawed
)
_DECODER: Final = json.JSONDecoder(parse_constant=_refused)
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KINDS: Final = {str(kind): kind for kind in Kind}
_NEEDED: Final = frozenset({"kind", "text", "seq", "time", "prev", "hash"})
_ALLOWED: Final = _NEEDED | frozenset(_TEXTS) | {"data"}


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(fields).encode("utf-8")


def format_time(time: datetime) -> str:
    """UTC in ISO 8601, always with microseconds and Z, so that one moment has one spelling."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def _fields(event: Event, seq: int, time: datetime, prev: str) -> dict[str, Any]:
    """Everything of a record but its hash. What is None or empty is left out, to keep lines short."""
    fields: dict[str, Any] = {"kind": str(event.kind), "seq": seq, "time": format_time(time), "prev": prev}
    for name in _TEXTS:
        value = getattr(event, name)
        if value is not None:
            fields[name] = value
    if event.data:
        fields["data"] = event.data
    return fields


def _digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical line without `hash`."""
    return hashlib.sha256(_canonical(fields)).hexdigest()


def _record(event: Event, seq: int, time: datetime, prev: str, digest: str) -> Record:
    return Record(
        event.kind,
        event.text,
        bridge=event.bridge,
        network=event.network,
        app=event.app,
        object=event.object,
        container=event.container,
        flow=event.flow,
        packet=event.packet,
        data=event.data,
        seq=seq,
        time=time.astimezone(UTC),
        prev=prev,
        hash=digest,
    )


def seal(event: Event, *, seq: int, time: datetime, prev: str) -> Record:
    """The event as record number `seq`, chained to the record whose hash is `prev`."""
    if time.tzinfo is None:
        raise ValueError("time has no time zone; give it in UTC")
    return _record(event, seq, time, prev, _digest(_fields(event, seq, time, prev)))


def notice(event: Event, *, seq: int, time: datetime) -> Record:
    """A remark of a reader among records, without a hash; `seq` is the last number it speaks of."""
    return _record(event, seq, time, "", "")


def encode(record: Record) -> bytes:
    """The record's one line, canonical JSON in UTF-8 (sorted keys, no spaces), without a line end."""
    fields = _fields(record, record.seq, record.time, record.prev)
    fields["hash"] = record.hash
    return _canonical(fields)


def decode(line: bytes) -> Record:
    """The record that is written in the line. Raises `GarbledRecord` for anything that `encode` would not write.

    The line must be spelt exactly as `encode` spells it and fit its own hash, so no byte can be changed unnoticed.
    Whether it follows the record before it is for the caller to see.
    """
    fields = _parsed(line)
    seq = fields.get("seq")
    if type(seq) is not int or not 1 <= seq < 2**63:
        raise GarbledRecord("it has no number")
    _check_shape(fields, seq)
    # Two spellings of one value (an escape, a repeated key, a blank) would otherwise share a hash.
    if _spelt(fields, seq) != line:
        raise GarbledRecord("it is not spelt as we write it", seq=seq, altered=True)
    digest = fields.pop("hash")
    if _digest(fields) != digest:
        raise GarbledRecord("its content does not fit its hash", seq=seq, altered=True)
    return _built(fields, seq, digest)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        fields = _DECODER.decode(line.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise GarbledRecord("it is not JSON in UTF-8") from exc
    if not isinstance(fields, dict):
        raise GarbledRecord("it is not a JSON object")
    return fields


def _check_shape(fields: Mapping[str, Any], seq: int) -> None:
    def refuse(reason: str) -> NoReturn:
        raise GarbledRecord(reason, seq=seq, altered=True)

    if not _NEEDED <= fields.keys() <= _ALLOWED:
        refuse(f"it lacks or has beside what is known: {sorted(_NEEDED ^ (fields.keys() - (_ALLOWED - _NEEDED)))}")
    for name in fields.keys() - {"seq", "data"}:
        if not isinstance(fields[name], str):
            refuse(f"{name} is not a string")
    if fields["kind"] not in _KINDS:
        refuse(f"its kind {fields['kind']!r} is unknown")
    if not _TIME.fullmatch(fields["time"]):
        refuse(f"its time {fields['time']!r} is not in UTC with microseconds")
    if not _HASH.fullmatch(fields["prev"]) or not _HASH.fullmatch(fields["hash"]):
        refuse("a hash in it is not 64 hexadecimal digits")
    if "data" in fields and (not isinstance(fields["data"], dict) or not fields["data"]):
        refuse("its data is not a filled object")


def _spelt(fields: Mapping[str, Any], seq: int) -> bytes:
    try:
        return _canonical(fields)
    except (ValueError, RecursionError) as exc:
        raise GarbledRecord("it holds what JSON in UTF-8 cannot say", seq=seq, altered=True) from exc


def _built(fields: Mapping[str, Any], seq: int, digest: str) -> Record:
    try:
        return Record(
            _KINDS[fields["kind"]],
            fields["text"],
            bridge=fields.get("bridge"),
            network=fields.get("network"),
            app=fields.get("app"),
            object=fields.get("object"),
            container=fields.get("container"),
            flow=fields.get("flow"),
            packet=fields.get("packet"),
            data=fields.get("data", _NOTHING),
            seq=seq,
            time=datetime.fromisoformat(fields["time"]),
            prev=fields["prev"],
            hash=digest,
        )
    except (ValueError, TypeError) as exc:
        raise GarbledRecord(f"it cannot be: {exc}", seq=seq, altered=True) from exc
