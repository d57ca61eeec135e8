"""The readers of the event log: every record in order, and those that come; damage and gaps are told in place.

A reader takes no locks, so it cannot slow the writer; one that is too slow is told what was removed before it came.

Standard library only; no threads. `follow` sleeps between looks, by `sleep` if given, so under eventlet others run.
May import `controller.eventfiles` and `controller.events`.
"""

from __future__ import annotations

import os
import re
import time as _time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from controller.eventfiles import (
    MAX_LINE,
    OPEN_FLAGS,
    Reason,
    Segment,
    list_segments,
    lost,
    read_head,
    unreadable,
    utc_now,
    were,
)
from controller.events import JSON, GarbledRecord, Kind, Record, decode, notice

_CHUNK: Final = 4 * MAX_LINE
# Not splitlines(), which also splits at carriage returns.
_LINES: Final = re.compile(rb"[^\n]*\n")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records to show. An empty set means any; `since` is the first moment in, `until` the first one out."""

    kinds: frozenset[Kind] = frozenset()
    networks: frozenset[str] = frozenset()
    containers: frozenset[str] = frozenset()
    bridges: frozenset[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        for moment in (self.since, self.until):
            if moment is not None and moment.tzinfo is None:
                raise ValueError("since and until need a time zone; give them in UTC")

    def accepts(self, record: Record) -> bool:
        """Whether the record is asked for."""
        return (
            (not self.kinds or record.kind in self.kinds)
            and (not self.networks or record.network in self.networks)
            and (not self.containers or record.container in self.containers)
            and (not self.bridges or record.bridge in self.bridges)
            and (self.since is None or record.time >= self.since)
            and (self.until is None or record.time < self.until)
        )


def last_seq(directory: Path) -> int:
    """The number of the newest record, 0 for none: where to start `follow` to see only what is new."""
    try:
        head = read_head(directory)
    except OSError as exc:
        raise unreadable(directory, exc) from exc
    return head.seq if head else 0


def read(directory: Path, *, since_seq: int | None = None) -> Iterator[Record]:
    """Every record there is, in order; after number `since_seq` if given. Raises `EventLogError`.

    A line that cannot be read, or segments removed under a slow reader, give a notice (`Record.is_notice`).
    """
    cursor = Cursor(directory, since_seq)
    try:
        os.listdir(directory)
        yield from cursor.poll()
    except OSError as exc:
        raise unreadable(directory, exc) from exc
    finally:
        cursor.close()


def follow(
    directory: Path,
    *,
    since_seq: int | None = None,
    poll_s: float = 0.2,
    stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = lambda seconds: _time.sleep(seconds),
) -> Iterator[Record]:
    """Like `read`, and then what comes, until `stop`. The directory need not exist yet. Raises `EventLogError`."""
    cursor = Cursor(directory, since_seq)
    try:
        while not stop():
            for record in cursor.poll():
                yield record
                if stop():
                    return
            sleep(poll_s)
    except OSError as exc:
        raise unreadable(directory, exc) from exc
    finally:
        cursor.close()


class Cursor:
    """A reader's place in a log: the open segment, the offset of the next whole line, and the last number seen.

    Only whole lines are consumed. An unfinished one is read again from its start, since a writer may yet finish it
    or, after a restart, cut it off and write another in its place.
    """

    def __init__(self, directory: Path, since_seq: int | None, decoder: Callable[[bytes], Record] = decode) -> None:
        self._directory = directory
        self._decode = decoder
        self._after = since_seq or 0
        self._asked = since_seq is not None
        self._segment: Segment | None = None
        self._fd: int | None = None
        self._offset = 0

    def close(self) -> None:
        """Let go of the open segment."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def poll(self) -> Iterator[Record]:
        """What can be read now."""
        yield from self._drain()
        while (following := self._following()) is not None:
            # The writer has left the open segment for good: once more to its end, then on. If it was removed
            # meanwhile, the open file still has everything.
            yield from self._drain()
            yield from self._enter(following)
            yield from self._drain()

    def _following(self) -> Segment | None:
        """The segment to read next, once there is one."""
        try:
            segments = list_segments(self._directory)
        except FileNotFoundError:
            return None
        if self._segment is not None and self._fd is not None:
            # A segment made anew under the same name counts as another one.
            gone = not os.fstat(self._fd).st_nlink
            least = self._segment.first if gone else self._segment.first + 1
            segments = [segment for segment in segments if segment.first >= least]
        reached = [segment for segment in segments if segment.first <= self._after + 1]
        return reached[-1] if reached else next(iter(segments), None)

    def _enter(self, segment: Segment) -> Iterator[Record]:
        try:
            fd = os.open(segment.path, os.O_RDONLY | OPEN_FLAGS)
        except FileNotFoundError:
            return  # removed since it was listed; the next listing knows what follows
        self.close()
        self._segment, self._fd, self._offset = segment, fd, 0
        if segment.first > self._after + 1 and (self._asked or self._after):
            first, self._after = self._after + 1, segment.first - 1
            yield self._notice(f"{were(first, self._after)} removed before being read.", first=first, last=self._after)

    def _drain(self) -> Iterator[Record]:
        """The whole lines from the offset to the end of the open segment."""
        while self._fd is not None and (chunk := os.pread(self._fd, _CHUNK, self._offset)):
            end = chunk.rfind(b"\n") + 1
            if not end and len(chunk) < _CHUNK:
                return
            # A chunk is longer than any line of ours: without a line end it is one damaged line.
            for line in _LINES.findall(chunk[:end]) if end else [chunk]:
                self._offset += len(line)
                record = self._decoded(line.removesuffix(b"\n"))
                if record is not None:
                    yield record

    def _decoded(self, line: bytes) -> Record | None:
        try:
            record = self._decode(line)
        except GarbledRecord as exc:
            number = f" (it says it is event {exc.seq})" if exc.seq else ""
            return self._notice(f"A line after event {self._after} is damaged{number}: {exc}. Verify the log.")
        if record.seq <= self._after:
            return None
        self._after = record.seq
        return record

    def _notice(self, text: str, **data: JSON) -> Record:
        return notice(lost(Reason.REMOVED if data else Reason.DAMAGED, text, **data), seq=self._after, time=utc_now())
