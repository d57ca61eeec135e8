"""What an event log consists of: its directory, segments and head, and what its writer and its readers share.

A log is a directory. `events-<first number>.jsonl` are segments of JSON Lines, one record per line, each chained to
the one before by its hash (see `controller.events`). `head` names the newest record, so that a log whose end was cut
off is found too. `writer` holds the writer's process id, for people. `controller.eventlog` writes a log,
`controller.eventread` reads it, `controller.eventverify` checks the whole.

Standard library only; no threads. May import `controller.events` and `controller.problems`.
"""

from __future__ import annotations

import os
import re
import time as _time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from controller.events import JSON, Event, Kind
from controller.problems import BulkheadError

MAX_LINE: Final = 64 * 1024
"""The longest line there can be, with its end."""
OPEN_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW
"""Besides for what: a symbolic link in place of a file of the log is not followed."""

_SEGMENT_NAME: Final = re.compile(r"events-([0-9]{20})\.jsonl", re.ASCII)


class Reason(StrEnum):
    """Why the log wrote a `lost` event; it stands in the event's data as `reason`."""

    BOUNDED = "bounded size"
    REMOVED = "removed"
    CUT = "cut tail"
    DAMAGED = "damaged"
    HEAD = "head"
    UNWRITTEN = "not written"
    RATE = "rate"


class EventLogError(BulkheadError):
    """The log cannot be opened or read. The text says what to do."""


class EventLogBusy(EventLogError):
    """Another process writes this log; `pid` is its process id, if known."""

    def __init__(self, directory: Path, pid: int | None) -> None:
        self.pid = pid
        owner = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{directory}: {owner} is writing this event log. Stop it, or give this one a directory of its own; "
            "trying again helps only when the other has ended."
        )


def utc_now() -> datetime:
    """The clock that is used where no other is given."""
    return datetime.now(UTC)


# --- files -----------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The newest record's number and hash, as the head file has them."""

    seq: int
    hash: str


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """A file of the log; `first` is the number its first record has."""

    first: int
    path: Path


def segment_at(directory: Path, first: int) -> Segment:
    """The segment whose first record has that number; its file need not exist."""
    return Segment(first, directory / f"events-{first:020d}.jsonl")


def list_segments(directory: Path) -> list[Segment]:
    """The segments, oldest first, without a hole that only the listing makes. Raises `OSError`.

    A directory is not listed at one moment: of two segments made meanwhile the later may show and the earlier not.
    Whatever is older than the newest of one listing is sure to be in the next.
    """
    newest = max(_listed(directory), default=0)
    return [segment_at(directory, first) for first in sorted(_listed(directory)) if first <= newest]


def _listed(directory: Path) -> list[int]:
    found = (_SEGMENT_NAME.fullmatch(name) for name in os.listdir(directory))
    return [int(match[1]) for match in found if match]


def encode_head(head: Head) -> bytes:
    """Always 95 bytes, so that it is overwritten in place and needs no room on a full disk."""
    body = f"{head.seq:020d} {head.hash}"
    return f"{body} {sha256(body.encode()).hexdigest()[:8]}\n".encode()


def _decode_head(data: bytes) -> Head | None:
    """The head, or None if that is not one."""
    seq, _, rest = data[:85].partition(b" ")
    if not seq.isdigit():
        return None
    head = Head(int(seq), rest.decode("ascii", "replace"))
    return head if encode_head(head) == data else None


def read_head(directory: Path) -> Head | None:
    """The head as it stands in the file, or None if there is none or it is damaged. Raises `OSError`."""
    for attempt in range(3):
        try:
            data = (directory / "head").read_bytes()
        except FileNotFoundError:
            return None
        head = _decode_head(data)
        if head is not None:
            return head
        # It may have been read in the middle of being overwritten.
        _time.sleep(0.001 * attempt)
    return None


def unreadable(directory: Path, exc: OSError) -> EventLogError:
    """What a reader raises for an `OSError`."""
    return EventLogError(
        f"{directory}: the event log cannot be read: {exc.strerror}. Check that the controller writes its log there "
        "and that you may read it (the files are open to their group)."
    )


# --- what the log says about itself ----------------------------------------------------------------------------------


def lost(reason: Reason, text: str, **data: JSON) -> Event:
    """A `lost` event of the log itself."""
    return Event(Kind.LOST, text, data={"reason": str(reason), **data})


def _span(first: int, last: int) -> str:
    return f"Event {first}" if first == last else f"Events {first} to {last}"


def were(first: int, last: int) -> str:
    """The start of a sentence about the events of these numbers."""
    return f"{_span(first, last)} {'was' if first == last else 'were'}"
