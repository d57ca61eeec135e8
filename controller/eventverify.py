"""The check of a whole event log: every record, the chain, and the head.

What the chain shows and what it does not: no key is involved, so it finds damage, and tampering by anyone who does
not rewrite everything after the change and the head with it. Compare `head` with a copy kept elsewhere to find that.

Standard library only; no threads and no locks, so a log can be checked while it is written. May import
`controller.eventfiles` and `controller.events`.
"""

from __future__ import annotations

import contextlib
import os
import time as _time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final

from controller.eventfiles import (
    MAX_LINE,
    EventLogError,
    Head,
    Reason,
    Segment,
    list_segments,
    read_head,
    unreadable,
    were,
)
from controller.events import GENESIS, GarbledRecord, Kind, Record, decode

_OPEN_AHEAD: Final = 256


class Damage(StrEnum):
    """What can be wrong with a log."""

    ALTERED = "altered"
    REMOVED = "removed"
    REORDERED = "reordered"
    DUPLICATED = "duplicated"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    HEAD = "head"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong: the numbers it concerns, as far as they are known, and where (`file:line`)."""

    damage: Damage
    text: str
    first: int | None = None
    last: int | None = None
    where: str = ""

    def __str__(self) -> str:
        return f"{self.damage}: {self.where + ': ' if self.where else ''}{self.text}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found. `count` is the number of sound records."""

    first_seq: int | None
    last_seq: int | None
    count: int
    problems: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(directory: Path) -> Verdict:
    """Check every record, the chain and the head; in one pass, and also while the log is written.

    Raises `EventLogError` if it cannot be read. A log that begins later than 1 is accepted only if one of its own
    sound records says that everything before was removed to keep the bound.
    """
    for _ in range(100):
        try:
            return _verify_once(directory)
        except FileNotFoundError:
            continue  # the writer removed its oldest segment before we had it open: begin anew
        except OSError as exc:
            raise unreadable(directory, exc) from exc
    raise EventLogError(f"{directory}: segments are removed faster than they can be verified; try again later.")


def _verify_once(directory: Path) -> Verdict:
    # The head is read before and after. What it named before must be in the log read after it; what it names after
    # may be at most one record behind the last one read. Both hold while a writer is at work.
    if not directory.is_dir():
        return Verdict(None, None, 0, (Finding(Damage.MISSING, f"there is no event log in {directory}"),))
    before = read_head(directory)
    if before is None and not list_segments(directory):
        return Verdict(None, None, 0, (Finding(Damage.MISSING, f"there is no event log in {directory}"),))
    audit = _Audit(before)
    for segment, file, is_last in _held_open(directory):
        audit.segment(segment, file, is_last=is_last)
    audit.ends(read_head(directory))
    return audit.verdict()


def _held_open(directory: Path) -> Iterator[tuple[Segment, BinaryIO, bool]]:
    """Each segment, open, and whether it is the last. Raises `FileNotFoundError` if a busy writer was faster.

    Many are opened ahead, since what is open can be read even after it was removed. The newest are listed only when
    the oldest are open, so that whatever says that still older ones were removed is among them.
    """
    with contextlib.ExitStack() as stack:
        held: deque[tuple[Segment, BinaryIO]] = deque()
        listed = list_segments(directory)
        for segment in listed[:_OPEN_AHEAD]:
            try:
                held.append((segment, stack.enter_context(segment.path.open("rb"))))
            except FileNotFoundError:
                if held or segment is listed[-1]:
                    raise
        rest = iter([segment for segment in list_segments(directory) if held and segment > held[-1][0]])
        while held:
            segment, file = held.popleft()
            if (following := next(rest, None)) is not None:
                held.append((following, stack.enter_context(following.path.open("rb"))))
            yield segment, file, not held
            file.close()


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with their ends; a line longer than ours can be comes in pieces."""
    while line := file.readline(MAX_LINE + 1):
        yield line


class _Audit:
    """One pass over a log.

    `_due` is the number that comes next. A damaged line takes a number too, but which is uncertain (it may have been
    put in), so `_unsure` counts the damaged lines since the last sound record. `_gaps` are the ranges of numbers that
    were skipped, in rising order; `_late` those of them that turned up further down.
    """

    def __init__(self, head: Head | None) -> None:
        self._head = head
        self._findings: list[Finding] = []
        self._count = 0
        self._first: int | None = None
        self._due = 1
        self._unsure = 0
        self._last: Record | None = None
        self._linked = False
        self._bounded = 0
        self._gaps: list[tuple[int, int]] = []
        self._late: list[int] = []

    def verdict(self) -> Verdict:
        """The result; call `ends` before."""
        reached = self._due + self._unsure - 1
        last = reached if self._first is not None and reached >= self._first else None
        return Verdict(self._first if last else None, last, self._count, tuple(self._findings))

    # - segments and lines

    def segment(self, segment: Segment, file: BinaryIO, *, is_last: bool) -> None:
        """Check the lines of one file."""
        name = segment.path.name
        offset = 0
        for number, line in enumerate(_lines_of(file), start=1):
            if number == 1:
                self._begin(segment.first)
            whole = line if line.endswith(b"\n") or not is_last else _finished(file, offset, line)
            offset += len(line)
            self._line(whole, f"{name}:{number}")

    def _begin(self, first: int) -> None:
        """The name of a segment tells where it starts, even if its first line is damaged."""
        if self._first is None:
            self._first = self._due = first
        elif first > self._due + self._unsure:
            self._gaps.append((self._due + self._unsure, first - 1))
            self._due, self._unsure, self._linked = first, 0, False

    def _line(self, line: bytes, where: str) -> None:
        if not line.endswith(b"\n") and len(line) <= MAX_LINE:
            self._damaged(Damage.TRUNCATED, "the line was cut off before its end", None, where)
            return
        try:
            record = decode(line.removesuffix(b"\n"))
        except GarbledRecord as exc:
            self._damaged(Damage.ALTERED if exc.altered else Damage.UNREADABLE, exc.reason, exc.seq, where)
        else:
            self._sound(record, where)

    def _damaged(self, damage: Damage, reason: str, claimed: int | None, where: str) -> None:
        place = self._due + self._unsure
        number = claimed if claimed is not None and self._due <= claimed <= place else place
        says = f", though it says {claimed}" if claimed not in (None, number) else ""
        self._found(damage, f"the line in the place of event {number}{says}: {reason}", number, number, where)
        self._unsure += 1
        self._linked = False

    def _sound(self, record: Record, where: str) -> None:
        self._count += 1
        if record.seq < self._due:
            self._behind(record.seq, where)
            return
        if record.seq > self._due + self._unsure:
            self._gaps.append((self._due + self._unsure, record.seq - 1))
        elif not self._follows(record):
            text = f"event {record.seq} does not follow from what stands before it: one of the two was replaced"
            self._found(Damage.ALTERED, text, record.seq, record.seq, where)
        if self._head is not None and record.seq == self._head.seq and record.hash != self._head.hash:
            text = f"the head names another event {record.seq} than the log has"
            self._found(Damage.HEAD, text, record.seq, record.seq, where)
        self._due, self._unsure = record.seq + 1, 0
        self._last, self._linked = record, True
        if record.kind is Kind.LOST:
            self._admits(record, where)

    def _follows(self, record: Record) -> bool:
        """Whether the chain holds. After a gap or damage it cannot be followed; those were reported already."""
        if record.seq == 1:
            return record.prev == GENESIS
        return not self._linked or self._last is None or record.prev == self._last.hash

    def _behind(self, seq: int, where: str) -> None:
        """A record with a number that should have come before."""
        self._linked = False
        if self._skipped(seq) or (self._first is not None and seq < self._first):
            self._late.append(seq)
            self._found(Damage.REORDERED, f"event {seq} is not in its place", seq, seq, where)
        else:
            self._found(Damage.DUPLICATED, f"event {seq} stands here again", seq, seq, where)

    def _skipped(self, seq: int) -> bool:
        index = bisect_right(self._gaps, seq, key=lambda gap: gap[0]) - 1
        return index >= 0 and self._gaps[index][1] >= seq

    def _admits(self, record: Record, where: str) -> None:
        """What a `lost` event of the log itself says about the log."""
        reason, last = record.data.get("reason"), record.data.get("last")
        if reason == Reason.BOUNDED and record.data.get("first") == 1 and isinstance(last, int):
            self._bounded = max(self._bounded, last)
        elif reason == Reason.HEAD:
            text = f"event {record.seq} says that the head file {record.data.get('detail')} when the log was opened"
            self._found(Damage.HEAD, text, None, None, where)

    # - the end

    def ends(self, after: Head | None) -> None:
        """Everything is read; `after` is what the head names now."""
        self._check_start()
        late = sorted(set(self._late))
        for first, last in self._gaps:
            self._missing(first, last, late)
        if self._head is None or after is None:
            self._found(
                Damage.HEAD, "the head file is missing or damaged, so the end cannot be checked", None, None, ""
            )
            return
        reached = self._due + self._unsure - 1 if self._first is not None else 0
        if self._head.seq > reached:
            self._removed(reached + 1, self._head.seq, " from the end (the head names the last of them)")
        if self._last is not None and after.seq < self._last.seq - 1:
            text = f"the head names event {after.seq}, but the log goes on to {self._last.seq}: the head was set back"
            self._found(Damage.HEAD, text, after.seq, self._last.seq, "")

    def _check_start(self) -> None:
        """A killed writer may leave more than it said it would remove, so beginning earlier than said is fine."""
        if self._first is not None and self._first - 1 > self._bounded:
            self._removed(self._bounded + 1, self._first - 1, " from the beginning, and not by the bound")

    def _missing(self, first: int, last: int, late: list[int]) -> None:
        """Report a gap, without the numbers that turned up elsewhere."""
        for seq in late[bisect_right(late, first - 1) : bisect_right(late, last)]:
            if seq > first:
                self._removed(first, seq - 1, "")
            first = seq + 1
        if first <= last:
            self._removed(first, last, "")

    def _removed(self, first: int, last: int, how: str) -> None:
        self._found(Damage.REMOVED, f"{were(first, last).lower()} removed{how}", first, last, "")

    def _found(self, damage: Damage, text: str, first: int | None, last: int | None, where: str) -> None:
        self._findings.append(Finding(damage, text, first, last, where))


def _finished(file: BinaryIO, offset: int, line: bytes) -> bytes:
    """An unfinished last line, read again until its writer has finished it or evidently never will."""
    for _ in range(5):
        _time.sleep(0.01)
        now, end, _rest = os.pread(file.fileno(), MAX_LINE + 1, offset).partition(b"\n")
        if end:
            return now + end
    return line
