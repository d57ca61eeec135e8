"""Events of controller, agent and API as one: history with filters, and a stream that goes on where a reader stopped.

The place in the three logs is one cursor, `c12.a33.p5`. Each reader of the stream has its own place in the files, so that
one that stalls holds up nobody and costs no memory; it is told what was removed before it came. One look at the logs' heads
wakes all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import Annotated

from fastapi import Header, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from controller.api import models
from controller.api.context import Context
from controller.api.problem import ApiProblem, Fault
from controller.api.view import encoded
from controller.eventfiles import EventLogError, list_segments
from controller.eventread import Cursor, Filter, last_seq, read
from controller.events import GarbledRecord, Kind, Record, decode, encode
from controller.eventview import parse_since
from controller.records import Scope as Needed

LOG = logging.getLogger("bulkhead.api")
LETTERS = ("c", "a", "p")
MAX_LIMIT = 1000
LOOK_S = 0.05
BEAT_S = 15.0
STALLED_S = 300.0
"""A reader that has taken nothing for so long is hung up on; it resumes where it stopped."""
BATCH = 200
_CURSOR = re.compile(r"c([0-9]{1,18})\.a([0-9]{1,18})\.p([0-9]{1,18})")

Place = tuple[int, int, int]
"""The number of the last event seen of the controller, the agent and the API."""


def spelt(place: Place) -> str:
    """A place as a cursor."""
    return ".".join(f"{letter}{number}" for letter, number in zip(LETTERS, place, strict=True))


def parsed(text: str, field: str) -> Place:
    """The place of a cursor. Raises `ApiProblem`."""
    found = _CURSOR.fullmatch(text)
    if found is None:
        fault = Fault(field, text[:80], "a cursor such as c12.a33.p5", "Send one that this API has given out.")
        raise ApiProblem("invalid", f"{field}: {fault.fix}", [fault])
    return int(found[1]), int(found[2]), int(found[3])


_decoded = lru_cache(maxsize=512)(decode)
"""What one reader of the stream has decoded, the next one need not."""


@lru_cache(maxsize=512)
def _body(log: int, line: bytes) -> bytes:
    """An event as it goes out, but for the cursor."""
    found = {"log": ("controller", "agent", "api")[log], **json.loads(line)}
    for name in ("prev", "hash"):
        found.pop(name, None)
    return encoded(found)


@dataclass(frozen=True, slots=True)
class Numbered:
    """An event of one of the logs, by its place in LETTERS."""

    log: int
    record: Record

    def shown(self, place: Place) -> bytes:
        """The event as it goes out, with the cursor behind it."""
        return b'{"cursor":"%s",%s' % (spelt(place).encode(), _body(self.log, encode(self.record))[1:])


class Logs:
    """The three logs, and what wakes those who wait for more."""

    def __init__(self, directories: tuple[Path, Path, Path]) -> None:
        self.directories = directories
        self._news = asyncio.Event()
        self._seen: tuple[object, ...] = ()
        self._watching: asyncio.Task[None] | None = None
        self.readers: Counter[str] = Counter()

    def ends(self) -> Place:
        """Where the logs end now."""
        ends = [_end(directory) for directory in self.directories]
        return ends[0], ends[1], ends[2]

    def known(self, place: Place) -> Place:
        """A place as these logs have it. One behind a log's end is of a log that was there before: all of this is new."""
        # The head is never more than one event behind its log.
        known = [0 if number > end + 1 else number for number, end in zip(place, self.ends(), strict=True)]
        return known[0], known[1], known[2]

    async def more(self, timeout_s: float) -> bool:
        """Wait until there may be more. Answers whether there may."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def watch(self) -> None:
        """Begin to look; ends when nobody reads any more."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while self.readers.total():
            seen = tuple(_stamp(directory) for directory in self.directories)
            if seen != self._seen:
                self._seen = seen
                self._news.set()
                self._news = asyncio.Event()
            await asyncio.sleep(LOOK_S)


def _stamp(directory: Path) -> object:
    """Differs once anything was written."""
    try:
        found = os.stat(directory / "head")
        return found.st_mtime_ns, found.st_ino
    except OSError:
        return None


def _end(directory: Path) -> int:
    try:
        return last_seq(directory)
    except EventLogError:
        return 0


def _readable(directory: Path, after: int | None) -> Iterator[Record]:
    """A log's events; none where there is no log, or it may not be read."""
    try:
        yield from read(directory, since_seq=after)
    except EventLogError as exc:
        LOG.info("%s", exc)


# ------------------------------------------------------------------------------------------------------------- history


def after(logs: Logs, place: Place, wanted: Filter, limit: int) -> tuple[list[bytes], Place]:
    """The first events behind a place that are wanted, in the order of their times, and the place behind the last."""

    def numbered(log: int) -> Iterator[Numbered]:
        return (Numbered(log, record) for record in _readable(logs.directories[log], place[log]))

    out = []
    at = list(place)
    for one in merge(*(numbered(log) for log in range(len(LETTERS))), key=lambda one: one.record.time):
        at[one.log] = max(at[one.log], one.record.seq)
        if wanted.accepts(one.record):
            out.append(one.shown((at[0], at[1], at[2])))
            if len(out) >= limit:
                break
    return out, (at[0], at[1], at[2])


def newest(logs: Logs, wanted: Filter, limit: int) -> tuple[list[bytes], Place]:
    """The last events that are wanted, and the place behind the last there is."""
    ends = logs.ends()
    found = [
        Numbered(log, record)
        for log, directory in enumerate(logs.directories)
        for record in islice(_backwards(directory, wanted), limit)
    ]
    found.sort(key=lambda one: one.record.time)
    chosen = found[-limit:]
    at = [
        min((one.record.seq for one in chosen if one.log == log), default=ends[log] + 1) - 1
        for log in range(len(LETTERS))
    ]
    out = []
    for one in chosen:
        at[one.log] = max(at[one.log], one.record.seq)
        out.append(one.shown((at[0], at[1], at[2])))
    behind = [max(end, number) for end, number in zip(ends, at, strict=True)]
    return out, (behind[0], behind[1], behind[2])


def _backwards(directory: Path, wanted: Filter) -> Iterator[Record]:
    """A log's events that are wanted, from the newest back. What is damaged is left out; `bulkhead events --verify` tells."""
    try:
        segments = list_segments(directory)
    except OSError:
        return
    needles = _needles(wanted)
    for segment in reversed(segments):
        try:
            lines = segment.path.read_bytes().split(b"\n")[:-1]
        except OSError:
            return
        for line in reversed(lines):
            if not all(any(needle in line for needle in either) for either in needles):
                continue
            try:
                record = decode(line)
            except GarbledRecord:
                continue
            if wanted.since is not None and record.time < wanted.since:
                return
            if wanted.accepts(record):
                yield record


def _needles(wanted: Filter) -> list[list[bytes]]:
    """What a wanted line contains, so that most of the others need not be decoded."""
    pairs = (("kind", wanted.kinds), ("network", wanted.networks), ("container", wanted.containers))
    return [
        [f'"{name}":{json.dumps(str(value), ensure_ascii=False)}'.encode(errors="replace") for value in values]
        for name, values in pairs
        if values
    ]


def since(logs: Logs, moment: datetime) -> Place:
    """A place before everything that happened since a moment, as near as segments are."""
    out = []
    for directory in logs.directories:
        place = 0
        try:
            segments = list_segments(directory)
        except OSError:
            segments = []
        for segment in segments:
            if _first_time(segment.path) <= moment:
                place = segment.first - 1
        out.append(place)
    return out[0], out[1], out[2]


def _first_time(path: Path) -> datetime:
    """When a segment begins; the end of time where that cannot be told."""
    try:
        with path.open("rb") as file:
            return decode(file.readline(1 << 17).removesuffix(b"\n")).time
    except (OSError, GarbledRecord):
        return datetime.max.replace(tzinfo=UTC)


# -------------------------------------------------------------------------------------------------------------- stream


class Reader:
    """One reader of the stream: a place in each log."""

    def __init__(self, logs: Logs, place: Place, wanted: Filter) -> None:
        self._at = list(place)
        self._wanted = wanted
        self._cursors = [
            Cursor(directory, number, _decoded) for directory, number in zip(logs.directories, place, strict=True)
        ]

    @property
    def place(self) -> Place:
        """Behind what was read last."""
        return self._at[0], self._at[1], self._at[2]

    def batch(self) -> tuple[bytes, bool]:
        """What there is now, as server-sent events, and whether there is more already."""
        found: list[Numbered] = []
        more = False
        for log, cursor in enumerate(self._cursors):
            try:
                records = list(islice(cursor.poll(), BATCH))
            except OSError:
                continue
            more = more or len(records) == BATCH
            found += (Numbered(log, record) for record in records)
        found.sort(key=lambda one: one.record.time)
        out = []
        for one in found:
            self._at[one.log] = max(self._at[one.log], one.record.seq)
            if one.record.is_notice or self._wanted.accepts(one.record):
                out.append(b"id: %s\nevent: %s\ndata: %s\n\n" % (
                    spelt(self.place).encode(), str(one.record.kind).encode(), one.shown(self.place)
                ))  # fmt: skip
        return b"".join(out), more

    def close(self) -> None:
        """Let go of the files."""
        for cursor in self._cursors:
            cursor.close()


class Stream(Response):
    """Server-sent events until the reader goes away, takes nothing for too long, or `still` says that they may no more."""

    def __init__(self, logs: Logs, who: str, place: Place, wanted: Filter, still: Callable[[], bool]) -> None:
        super().__init__(media_type="text/event-stream")
        self._logs, self._who, self._place, self._wanted, self._still = logs, who, place, wanted, still

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, and then what happens."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        reader = Reader(self._logs, self._place, self._wanted)
        self._logs.readers[self._who] += 1
        self._logs.watch()
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b": " + spelt(reader.place).encode() + b"\n\n", "more_body": True})  # fmt: skip
            async for body in self._bodies(reader, gone):
                sending = asyncio.ensure_future(send({"type": "http.response.body", "body": body, "more_body": True}))
                await asyncio.wait({sending, gone}, timeout=STALLED_S, return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    sending.cancel()
                    return
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            reader.close()
            self._logs.readers[self._who] -= 1

    async def _bodies(self, reader: Reader, gone: asyncio.Future[None]) -> AsyncIterator[bytes]:
        beat = time.monotonic()
        while not gone.done() and self._still():
            body, more = reader.batch()
            if body:
                beat = time.monotonic()
                yield body
            if more:
                await asyncio.sleep(0)
                continue
            if not await self._logs.more(min(1.0, BEAT_S)) and time.monotonic() - beat >= BEAT_S:
                beat = time.monotonic()
                yield b": " + spelt(reader.place).encode() + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# -------------------------------------------------------------------------------------------------------------- routes


Kinds = Annotated[list[Kind] | None, Query(description="Only events of these kinds.")]
NetworkNames = Annotated[list[str] | None, Query(max_length=64, description="Only of these networks.")]
ContainerNames = Annotated[list[str] | None, Query(max_length=64, description="Only of these containers.")]


def routes(api: Context) -> None:
    """Register the routes."""
    settings, add = api.settings, api.routes.add
    logs = Logs((settings.controller_events, settings.agent_events, settings.events))
    threads = ThreadPoolExecutor(2, thread_name_prefix="events")

    @add("GET", "/api/events", scope=Needed.READ, model=models.Events, tag="events")
    async def list_events(
        kind: Kinds = None,
        network: NetworkNames = None,
        container: ContainerNames = None,
        since_: Annotated[
            str | None, Query(alias="since", max_length=40, description="10m, 12:30 or 2026-01-01T00:00:00Z.")
        ] = None,
        after_: Annotated[
            str | None, Query(alias="after", max_length=64, description="The cursor behind which to go on.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 100,
    ) -> Response:
        """List events
        Of controller, agent and API, in the order of their times. Without `after` and `since` the newest ones.
        """
        moment = _moment(since_)
        wanted = _filter(kind, network, container, moment)

        def look() -> tuple[list[bytes], Place]:
            if after_ is not None:
                return after(logs, logs.known(parsed(after_, "after")), wanted, limit)
            if moment is not None:
                return after(logs, since(logs, moment), wanted, limit)
            return newest(logs, wanted, limit)

        events, place = await asyncio.get_running_loop().run_in_executor(threads, look)
        body = b'{"events":[%s],"next":"%s"}' % (b",".join(events), spelt(place).encode())
        return Response(body, media_type="application/json")

    @add(
        "GET",
        "/api/events/stream",
        scope=Needed.READ,
        model=None,
        media_type="text/event-stream",
        tag="events",
    )
    async def stream_events(
        request: Request,
        kind: Kinds = None,
        network: NetworkNames = None,
        container: ContainerNames = None,
        after_: Annotated[
            str | None, Query(alias="after", max_length=64, description="The cursor behind which to go on.")
        ] = None,
        last_event_id: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """Follow events
        Server-sent events; each one's `id` is the cursor behind it. Without `after` or `Last-Event-ID`, from now on.
        """
        text, field = (last_event_id, "Last-Event-ID") if last_event_id else (after_, "after")
        wanted = _filter(kind, network, container, None)
        ends, known = logs.ends, logs.known
        place = await (asyncio.to_thread(known, parsed(text, field)) if text else asyncio.to_thread(ends))
        who = api.principal(request).name
        if logs.readers.total() >= settings.limits.streams or logs.readers[who] >= settings.limits.streams_each:
            detail = (
                f"{logs.readers.total()} readers follow the events already. Try again later, or ask for the history."
            )
            raise ApiProblem("too-many-requests", detail, headers={"Retry-After": "10"})
        return Stream(logs, who, place, wanted, request.state.still)


def _filter(
    kinds: list[Kind] | None, networks: list[str] | None, containers: list[str] | None, moment: datetime | None
) -> Filter:
    return Filter(frozenset(kinds or ()), frozenset(networks or ()), frozenset(containers or ()), since=moment)


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return parse_since(text)
    except ValueError as exc:
        raise ApiProblem("invalid", f"since: {exc}", [Fault("since", text[:80], "a moment", str(exc))]) from exc
