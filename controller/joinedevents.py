"""The events of controller, agent and API as one, by the HTTP API, for `bulkhead events --all`."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from datetime import datetime
from typing import Any

from controller.client import Api, NoApi
from controller.events import Kind, Record
from controller.eventview import format_record

BEGINNING = "c0.a0.p0"
PAGE = 1000
LOGS = ("controller", "agent", "api")
_WIDTH = max(map(len, LOGS))
_TEXTS = ("bridge", "network", "app", "object", "container", "flow", "packet")


def joined(api: Api, *, last: int | None, following: bool, wanted: Mapping[str, object]) -> Iterator[dict[str, Any]]:
    """Events as the API tells them: the `last` ones or all, and then those that come. `wanted` are the API's filters."""
    after = ""
    if last is not None:
        found = api.get("/api/events", limit=min(max(last, 1), PAGE), **wanted)
        yield from found["events"][-last:] if last else ()
        after = found["next"]
    else:
        after = yield from _all(api, wanted)
    if following:
        rest = {name: value for name, value in wanted.items() if name != "since"}
        for _, _, data in api.events(after, **rest):
            yield _parsed(data)


def _all(api: Api, wanted: Mapping[str, object]) -> Generator[dict[str, Any], None, str]:
    """Every event since the beginning, or since a moment. Answers the cursor behind the last."""
    more: dict[str, Any] = dict(wanted) if wanted.get("since") else {**wanted, "after": BEGINNING}
    while True:
        found = api.get("/api/events", limit=PAGE, **more)
        yield from found["events"]
        if len(found["events"]) < PAGE:
            return str(found["next"])
        more = {**wanted, "since": None, "after": found["next"]}


def _parsed(data: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as exc:
        raise NoApi("what answers is not the API of Bulkhead: an event is no JSON; check --api") from exc
    if not isinstance(found, dict):
        raise NoApi("what answers is not the API of Bulkhead: an event is no object; check --api")
    return found


def line(event: Mapping[str, Any], colour: bool, width: int | None) -> str:
    """An event as people read it, with the log that it stands in."""
    kind = event["kind"]
    about: dict[str, Any] = {name: event.get(name) for name in _TEXTS}
    record = Record(
        Kind(kind) if kind in set(Kind) else Kind.INTERNAL_ERROR,
        str(event["text"]),
        **about,
        seq=int(event["seq"]),
        time=datetime.fromisoformat(event["time"]),
        prev="",
        hash="" if kind == Kind.LOST else "-",
    )
    return f"{event['log']:<{_WIDTH}} {format_record(record, colour, width and width - _WIDTH - 1)}"
