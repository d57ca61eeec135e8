"""Records as rows of the database, and back. Pure. Imports records and model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from controller.model import Protocol
from controller.problems import BulkheadError
from controller.records import (
    ClientRecord,
    ContainerRecord,
    GrantRecord,
    GrantState,
    NodeRecord,
    OperationRecord,
    Record,
    Scope,
    ServiceRecord,
    TokenRecord,
    key,
)

SCHEMA = Path(__file__).with_name("bulkhead.ovsschema")
DATABASE = "Bulkhead"
Row = dict[str, Any]

TABLE: Mapping[type[Record], str] = MappingProxyType(
    {
        ContainerRecord: "Container",
        ClientRecord: "Client",
        GrantRecord: "Grant",
        TokenRecord: "Token",
        OperationRecord: "Operation",
    }
)
TYPE: Mapping[str, type[Record]] = MappingProxyType({table: kind for kind, table in TABLE.items()})
_TIMES = ("created_at", "expires_at", "requested_at", "decided_at")
INDEXES: Mapping[str, Callable[[Any], tuple[tuple[str, ...], ...]]] = MappingProxyType(
    {
        "Container": lambda r: (("name", r.name.lower()), ("address", r.address)),
        "Client": lambda r: (("address", r.node, r.address), ("name", r.node, r.name.lower())),
        "Grant": lambda _: (),
        "Token": lambda _: (),
        "Operation": lambda r: (("idempotency key", r.who, r.idempotency_key),) if r.idempotency_key else (),
    }
)
"""What has to be unique besides the key, as the schema's indexes have it; the first word says what it is."""


def tables() -> dict[str, tuple[str, ...]]:
    """The columns that are followed, by table."""
    schema = json.loads(SCHEMA.read_text())
    return {name: tuple(table["columns"]) for name, table in schema["tables"].items() if name != "Commit"}


def normal(record: Record, revision: int) -> Record:
    """The record as it will be read again: times to the millisecond, scopes in order.

    Raises `BulkheadError` for what cannot be stored.
    """
    changes: dict[str, Any] = {"revision": revision}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in _TIMES:
            if not math.isfinite(value) or abs(value) > 1e11:
                raise BulkheadError(f"{key(record)}: {field.name} is {value}, not a time in seconds since 1970")
            changes[field.name] = round(float(value), 3)
    if isinstance(record, TokenRecord):
        changes["scopes"] = tuple(scope for scope in Scope if scope in record.scopes)
    record = replace(record, **changes)
    _check(record)
    return record


def _check(record: Record) -> None:
    values = [(field.name, getattr(record, field.name)) for field in fields(record)]
    texts = [(name, value) for name, value in values if isinstance(value, str)]
    if isinstance(record, ContainerRecord):
        texts += [("command", word) for word in record.command]
        texts += [("services", text) for service in record.services for text in (service.name, service.check)]
    for name, text in texts:
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise BulkheadError(
                f"{key(record)}: {name} has a character that cannot be stored; leave zero bytes and half surrogates out"
            )
    try:
        json.dumps(encode(record))
    except (TypeError, ValueError, AttributeError) as exc:
        raise BulkheadError(f"{key(record)} has a value that cannot be stored ({type(exc).__name__})") from exc


def encode(record: Record) -> Row:
    """The columns of a record's row, as JSON of RFC 7047; a container's without its services."""
    row: Row = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name == "services":
            continue
        if field.name == "command":
            row["command"] = json.dumps(value)
        elif field.name == "scopes":
            row["scopes"] = ["set", [str(scope) for scope in value]]
        else:
            row[field.name] = value
    if isinstance(record, ContainerRecord | ClientRecord):
        row["name_key"] = record.name.lower()
    if isinstance(record, OperationRecord):
        # Unique for all: an index cannot leave out the rows without an idempotency key.
        row["once"] = (
            f"key {len(record.who)} {record.who} {record.idempotency_key}"
            if record.idempotency_key
            else f"id {record.id}"
        )
    return row


def encode_services(record: ContainerRecord) -> list[Row]:
    """The rows of a container's services."""
    return [
        {"position": n, "name": s.name, "protocol": s.protocol, "port": s.port, "exposed": s.exposed, "check": s.check}
        for n, s in enumerate(record.services)
    ]


def decode_service(row: Row) -> tuple[int, ServiceRecord]:
    """A service and its place among those of its container."""
    service = ServiceRecord(row["name"], cast(Protocol, row["protocol"]), row["port"], row["exposed"], row["check"])
    return row["position"], service


def decode(table: str, row: Row, services: tuple[ServiceRecord, ...] = ()) -> Record:
    """The record of a row."""
    kind = TYPE[table]
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == "services":
            values["services"] = services
            continue
        value = row[field.name]
        if field.name == "command":
            value = tuple(json.loads(value))
        elif field.name == "scopes":
            have = as_list(value)
            value = tuple(scope for scope in Scope if scope in have)
        elif field.name in _TIMES:
            value = float(value)
        elif kind is GrantRecord and field.name == "state":
            value = GrantState(value)
        values[field.name] = value
    return kind(**values)


def decode_node(row: Row) -> NodeRecord:
    """A node's progress."""
    maps = {name: MappingProxyType(as_map(row[name])) for name in ("agent_waiting", "controller_waiting", "health")}
    return NodeRecord(row["name"], row["agent_revision"], row["controller_revision"], **maps)


def encode_node(columns: Mapping[str, Any]) -> Row:
    """Columns of a node's row; mappings of text become OVSDB's maps."""
    return {
        name: ["map", [list(pair) for pair in value.items()]] if isinstance(value, Mapping) else value
        for name, value in columns.items()
    }


def clean(text: str) -> str:
    """Text without what cannot be stored."""
    return text.replace("\0", "").encode(errors="replace").decode()


def as_list(value: Any) -> list[Any]:
    """An OVSDB set as a list."""
    return list(value[1]) if isinstance(value, list) and value[:1] == ["set"] else [value]


def as_map(value: Any) -> dict[str, str]:
    """An OVSDB map as a dictionary."""
    return dict(value[1])


def references(value: Any) -> list[str]:
    """The UUIDs of a set of references."""
    return [atom[1] for atom in (value[1] if value[:1] == ["set"] else [value])]
