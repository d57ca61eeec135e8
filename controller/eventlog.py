"""The flow event log: records in plain files, one writer, any number of readers, and a check of the whole.

A log is a directory. `events-<first number>.jsonl` are segments of JSON Lines, one record per line, each chained to
the one before by its hash (see `controller.events`). `head` names the newest record, so that a log whose end was cut
off is found too. `writer` holds the writer's process id, for people. Readers take no locks and cannot slow the writer.

What the chain shows and what it does not: no key is involved, so it finds damage, and tampering by anyone who does
not rewrite everything after the change and the head with it. Compare `head` with a copy kept elsewhere to find that.

Standard library only; no threads, and `append` never yields, so it behaves the same under eventlet. May import
`controller.events` and `controller.problems`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time as _time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, NamedTuple, Self

from controller.events import (
    GENESIS,
    JSON,
    Event,
    GarbledRecord,
    Kind,
    Record,
    decode,
    encode,
    notice,
    seal,
)
from controller.problems import BulkheadError

MIB: Final = 1024 * 1024
MIN_SEGMENT_BYTES: Final = 4096
NOISY: Final = frozenset({Kind.VIOLATION, Kind.PATH_LEARNED, Kind.PATH_EXPIRED})
"""The kinds that whoever sends packets can cause at will."""

_MAX_LINE: Final = 64 * 1024
# Kept free below the bound, so that the record which says what is removed still fits before it is removed.
_SPARE: Final = 1024
_CHUNK: Final = 4 * _MAX_LINE
_OPEN_AHEAD: Final = 256
_SEGMENT_NAME: Final = re.compile(r"events-([0-9]{20})\.jsonl", re.ASCII)
# Not splitlines(), which also splits at carriage returns.
_LINES: Final = re.compile(rb"[^\n]*\n")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_OPEN: Final = os.O_CLOEXEC | os.O_NOFOLLOW

Clock = Callable[[], datetime]


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
class _Segment:
    """A file of the log; `first` is the number its first record has."""

    first: int
    path: Path


def _segment(directory: Path, first: int) -> _Segment:
    return _Segment(first, directory / f"events-{first:020d}.jsonl")


def _segments(directory: Path) -> list[_Segment]:
    """The segments, oldest first, without a hole that only the listing makes. Raises `OSError`.

    A directory is not listed at one moment: of two segments made meanwhile the later may show and the earlier not.
    Whatever is older than the newest of one listing is sure to be in the next.
    """
    newest = max(_listed(directory), default=0)
    return [_segment(directory, first) for first in sorted(_listed(directory)) if first <= newest]


def _listed(directory: Path) -> list[int]:
    found = (_SEGMENT_NAME.fullmatch(name) for name in os.listdir(directory))
    return [int(match[1]) for match in found if match]


def _encode_head(head: Head) -> bytes:
    """Always 95 bytes, so that it is overwritten in place and needs no room on a full disk."""
    body = f"{head.seq:020d} {head.hash}"
    return f"{body} {sha256(body.encode()).hexdigest()[:8]}\n".encode()


def _decode_head(data: bytes) -> Head | None:
    """The head, or None if that is not one."""
    seq, _, rest = data[:85].partition(b" ")
    if not seq.isdigit():
        return None
    head = Head(int(seq), rest.decode("ascii", "replace"))
    return head if _encode_head(head) == data else None


def _read_head(directory: Path) -> Head | None:
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


def last_seq(directory: Path) -> int:
    """The number of the newest record, 0 for none: where to start `follow` to see only what is new."""
    try:
        head = _read_head(directory)
    except OSError as exc:
        raise _unreadable(directory, exc) from exc
    return head.seq if head else 0


def _unreadable(directory: Path, exc: OSError) -> EventLogError:
    return EventLogError(
        f"{directory}: the event log cannot be read: {exc.strerror}. Check that the controller writes its log there "
        "and that you may read it (the files are open to their group)."
    )


# --- what the log says about itself ----------------------------------------------------------------------------------


def _lost(reason: Reason, text: str, **data: JSON) -> Event:
    return Event(Kind.LOST, text, data={"reason": str(reason), **data})


def _span(first: int, last: int) -> str:
    return f"Event {first}" if first == last else f"Events {first} to {last}"


def _were(first: int, last: int) -> str:
    return f"{_span(first, last)} {'was' if first == last else 'were'}"


def _disowned(event: Event) -> Event:
    """A caller's `lost` event must not speak for the log: a verification believes the log's own."""
    if event.kind is not Kind.LOST or "reason" not in event.data:
        return event
    data = {("cause" if key == "reason" else key): value for key, value in event.data.items()}
    return _replaced(event, None, data)


def _replaced(event: Event, limit: int | None, data: Mapping[str, JSON]) -> Event:
    """The event with its strings cut to `limit` characters and other data."""

    def cut(text: str | None) -> str | None:
        return text if text is None or limit is None or len(text) <= limit else text[: limit - 1] + "…"

    return Event(
        event.kind,
        cut(event.text) or "",
        bridge=cut(event.bridge),
        network=cut(event.network),
        app=cut(event.app),
        object=cut(event.object),
        container=cut(event.container),
        flow=cut(event.flow),
        packet=cut(event.packet),
        data=data,
    )


# --- too many of one kind --------------------------------------------------------------------------------------------


class RateGuard:
    """A token bucket per noisy kind, and the exact count of what did not get through.

    A container that sends forbidden packets as fast as it can must not push everything else out of a bounded log.
    Each kind has a bucket of its own, so that a flood of violations does not hide that a path was learned.
    """

    def __init__(self, per_second: int, kinds: frozenset[Kind] = NOISY) -> None:
        if per_second < 1:
            raise ValueError("max_per_second must be 1 or more")
        self._per_second = per_second
        self._kinds = kinds
        self._tokens: dict[Kind, float] = {}
        self._filled: dict[Kind, datetime] = {}
        self._dropped: dict[Kind, int] = {}
        self._since: datetime | None = None

    def admit(self, kind: Kind, now: datetime) -> bool:
        """Whether an event of that kind may be written now; one that may not is counted."""
        if kind not in self._kinds:
            return True
        # A clock that was set back gives nothing, but must not stop the refill until it has caught up either.
        elapsed = max(0.0, (now - self._filled.get(kind, now)).total_seconds())
        tokens = min(self._per_second, self._tokens.get(kind, self._per_second) + elapsed * self._per_second)
        self._filled[kind] = now
        admitted = tokens >= 1
        self._tokens[kind] = tokens - 1 if admitted else tokens
        if not admitted:
            self._dropped[kind] = self._dropped.get(kind, 0) + 1
            self._since = self._since or now
        return admitted

    def report(self, now: datetime, *, early: bool = False) -> Event | None:
        """What was dropped, a second or more after the first of it (or `early`); call `clear` once it is written."""
        if self._since is None:
            return None
        if not early and 0 <= (now - self._since).total_seconds() < 1:
            return None
        counts: dict[str, JSON] = {str(kind): count for kind, count in sorted(self._dropped.items())}
        words = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        text = (
            f"{sum(self._dropped.values())} events came faster than {self._per_second} per second of one kind and "
            f"were not recorded: {words}. Their packets were handled all the same; find out who sends them."
        )
        return _lost(Reason.RATE, text, counts=counts)

    def clear(self) -> None:
        """Start counting anew."""
        self._dropped.clear()
        self._since = None


# --- finding the end of an existing log ------------------------------------------------------------------------------


@dataclass(slots=True)
class _End:
    """Where an existing log ends and what was found wrong there.

    `tip` is the last sound record, `bad_lines` lines follow it that are none, `cut` bytes of an unfinished line
    follow those. `known` is the highest number that anything says was given out.
    """

    segments: list[_Segment]
    tip: Record | None = None
    bad_lines: int = 0
    cut: int = 0
    known: int = 0

    @property
    def seq(self) -> int:
        return self.tip.seq if self.tip else 0


def _find_end(directory: Path, head: Head | None) -> _End:
    """Read backwards from the end until a sound record is found: of an undamaged log, one line."""
    end = _End(_segments(directory))
    for number, segment in enumerate(reversed(end.segments)):
        data = segment.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if number == 0:
            end.cut = len(data) - whole
            end.known = segment.first - 1
        if _find_tip(end, data[:whole]):
            break
        if number == 0:
            end.known += end.bad_lines
    end.known = max(end.known, head.seq if head else 0, end.seq + end.bad_lines)
    return end


def _find_tip(end: _End, data: bytes) -> bool:
    stop = len(data) - 1
    while stop > 0:
        start = data.rfind(b"\n", 0, stop) + 1
        try:
            end.tip = decode(data[start:stop])
            return True
        except GarbledRecord:
            end.bad_lines += 1
        stop = start - 1
    return False


def _confessions(end: _End, head: Head | None) -> Iterator[Event]:
    """The `lost` events with which a writer goes on after what it found."""
    if end.cut:
        text = f"The last line was unfinished ({end.cut} bytes) and was cut off: the writer before this was killed."
        yield _lost(Reason.CUT, text, bytes=end.cut)
    if end.bad_lines:
        text = f"{end.bad_lines} lines at the end of the log are damaged and were left as they are; verify the log."
        yield _lost(Reason.DAMAGED, text, lines=end.bad_lines)
    missing = end.seq + end.bad_lines + 1
    if end.known >= missing:
        text = (
            f"{_were(missing, end.known)} written and {'is' if missing == end.known else 'are'} gone from the end of "
            "the log: removed by someone, or lost with the power. Look who can write to the log's directory."
        )
        yield _lost(Reason.REMOVED, text, first=missing, last=end.known)
    doubt = _head_doubt(end, head)
    if doubt:
        text = f"The head file {doubt}: whether records were removed from the end cannot be told. Verify the log."
        yield _lost(Reason.HEAD, text, detail=doubt)


def _head_doubt(end: _End, head: Head | None) -> str | None:
    """What is wrong with the head, seen from the log's last record. One record ahead of it is a killed writer."""
    if head is None:
        return "is missing or damaged" if end.segments else None
    if end.tip is None or end.bad_lines or head.seq > end.seq:
        return None
    if head.seq < end.seq - 1:
        return f"names event {head.seq}, but the log goes on to {end.seq}"
    if head.hash != (end.tip.hash if head.seq == end.seq else end.tip.prev):
        return f"names another event {head.seq} than the log has"
    return None


# --- writer ----------------------------------------------------------------------------------------------------------


class EventLog:
    """The one writer of a log.

    `append` never raises: what cannot be written is counted and confessed by a `lost` event when writing works again.
    The segments together stay within `max_bytes`; the oldest ones are removed, and a `lost` event says so first.
    Call `tick` about once a second, so that what was dropped is told even if nothing else happens.
    """

    # Nothing is fsynced per event. What write() took is in the kernel, so a killed process loses nothing; a power
    # failure may cut the tail, which the chain and the head show. A flush to disk per event would instead let whoever
    # causes violations slow the controller down to the speed of the disk.

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = 64 * MIB,
        segment_bytes: int = 4 * MIB,
        max_per_second: int | None = None,
        clock: Clock = utc_now,
    ) -> None:
        """Open or create the log. Raises `EventLogBusy` if it has a writer, `EventLogError` if it cannot be opened."""
        if segment_bytes < MIN_SEGMENT_BYTES or max_bytes < 3 * segment_bytes:
            raise ValueError(f"segment_bytes must be {MIN_SEGMENT_BYTES} or more, max_bytes three times as much")
        self.directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._max_line = min(_MAX_LINE, segment_bytes)
        self._clock = clock
        self._guard = RateGuard(max_per_second) if max_per_second is not None else None
        self._seq = 0
        self._hash = GENESIS
        self._lock: int | None = None
        self._head: int | None = None
        self._head_due = False
        self._current: _Segment | None = None
        self._fd: int | None = None
        self._size = 0
        self._midway = False
        self._sealed: deque[tuple[_Segment, int]] = deque()
        self._total = 0
        self._said_removed = 0
        self._confess: deque[Event] = deque()
        self._unwritten = 0
        self._why = ""
        try:
            self._open()
        except OSError as exc:
            self._release()
            raise EventLogError(
                f"{directory}: the event log cannot be opened: {exc.strerror}. Check that the directory exists or can "
                "be made, and that this user may write to it."
            ) from exc
        except BaseException:
            self._release()
            raise
        self.tick()

    # - what callers do

    @property
    def last_seq(self) -> int:
        """The number given out last; 0 before the first."""
        return self._seq

    @property
    def unwritten(self) -> int:
        """Events that could not be written and have not been confessed yet. More than 0: the disk needs attention."""
        return self._unwritten

    def append(self, event: Event) -> Record | None:
        """Write the event and return its record; None if it was dropped by the rate guard or could not be written."""
        now = self._clock()
        self._report_dropped(now)
        if self._guard and not self._guard.admit(event.kind, now):
            return None
        record = self._write(_disowned(event), now) if self._settle(now) else None
        if record is None:
            self._unwritten += 1
        return record

    def tick(self) -> None:
        """Tell what was dropped or could not be written, if it is time and writing works."""
        now = self._clock()
        self._report_dropped(now)
        self._settle(now)

    def close(self) -> None:
        """Tell what is left to tell and let go of the directory. May be called twice; `append` then does nothing."""
        if self._lock is not None:
            now = self._clock()
            self._report_dropped(now, early=True)
            self._settle(now)
        self._release()

    def _release(self) -> None:
        for fd in (self._fd, self._head, self._lock):
            if fd is not None:
                os.close(fd)
        self._fd = self._head = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # - opening

    def _open(self) -> None:
        self.directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._take_lock()
        head = _read_head(self.directory)
        end = _find_end(self.directory, head)
        self._confess.extend(_confessions(end, head))
        self._seq = end.known
        self._hash = end.tip.hash if end.tip else GENESIS
        self._adopt(end)
        if head is not None:
            self._head = os.open(self.directory / "head", os.O_RDWR | _OPEN)
        elif not end.segments:
            # Before the first segment, so that a log without a head is always a log that lost it.
            self._head_due = True
            try:
                self._finish_head()
            except OSError as exc:
                if exc.errno not in _FULL:
                    raise

    def _take_lock(self) -> None:
        """Lock the directory itself: unlike a lock file it cannot be removed and made anew beside a running writer."""
        self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        pid_path = self.directory / "writer"
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise EventLogBusy(self.directory, _read_pid(pid_path)) from None
        # The process id is only for the message above; a full disk must not keep the controller from starting.
        with contextlib.suppress(OSError):
            fd = os.open(pid_path, os.O_WRONLY | os.O_CREAT | _OPEN, 0o640)
            try:
                os.pwrite(fd, f"{os.getpid():<10}\n".encode(), 0)
            finally:
                os.close(fd)

    def _adopt(self, end: _End) -> None:
        """Go on in the last segment if it is sound; damaged lines keep a segment to themselves."""
        sizes = [(segment, segment.path.stat().st_size) for segment in end.segments]
        if sizes and end.cut:
            last, size = sizes.pop()
            os.truncate(last.path, size - end.cut)
            sizes.append((last, size - end.cut))
        self._total = sum(size for _, size in sizes)
        if sizes and not end.bad_lines:
            last, size = sizes[-1]
            if size or last.first == self._seq + 1:
                sizes.pop()
                self._fd = os.open(last.path, os.O_WRONLY | os.O_APPEND | _OPEN)
                self._current, self._size = last, size
        self._sealed.extend(sizes)

    # - what must be done before an event may be written

    def _report_dropped(self, now: datetime, *, early: bool = False) -> None:
        event = self._guard.report(now, early=early) if self._guard else None
        if self._guard and event and self._settle(now) and self._write(event, now):
            self._guard.clear()

    def _settle(self, now: datetime) -> bool:
        """Write the confessions that are due. False if writing does not work."""
        try:
            self._check_segment()
        except OSError as exc:
            self._why = exc.strerror or str(exc)
            return False
        while self._confess:
            if not self._write(self._confess[0], now):
                return False
            self._confess.popleft()
        if self._unwritten:
            count = self._unwritten
            text = f"{count} events could not be written: {self._why}. Make room or repair the disk of the event log."
            if not self._write(_lost(Reason.UNWRITTEN, text, count=count, error=self._why), now):
                return False
            self._unwritten -= count
        return True

    # - writing

    def _write(self, event: Event, now: datetime) -> Record | None:
        """Write one record, after whatever makes room for it. None, and `_why`, if that does not work."""
        if self._lock is None:
            return None
        try:
            record, line = self._seal(event, now)
            self._make_room(len(line), now)
            if record.seq != self._seq + 1:
                record, line = self._seal(event, now)  # what was said about the room made took the number
            return self._put(record, line)
        except OSError as exc:
            self._why = exc.strerror or str(exc)
            return None

    def _seal(self, event: Event, now: datetime) -> tuple[Record, bytes]:
        """The next record and its line, with strings cut short if it is longer than a line may be."""
        record = seal(event, seq=self._seq + 1, time=now, prev=self._hash)
        line = encode(record) + b"\n"
        length = len(line)
        for limit in (4096, 1024, 256, 32):
            if len(line) <= self._max_line:
                break
            short = _replaced(event, limit, {"shortened_from_bytes": length})
            record = seal(short, seq=record.seq, time=now, prev=record.prev)
            line = encode(record) + b"\n"
        return record, line

    def _put(self, record: Record, line: bytes) -> Record:
        self._finish_head()
        if self._fd is None or (self._size and self._size + len(line) > self._segment_bytes):
            self._rotate()
        assert self._fd is not None
        self._midway = True
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            # If cutting fails too, `_check_segment` does it before the next line.
            with contextlib.suppress(OSError):
                self._cut_back()
            raise
        self._midway = False
        self._size += len(line)
        self._total += len(line)
        self._seq, self._hash = record.seq, record.hash
        self._head_due = True
        self._try_head()
        return record

    def _cut_back(self) -> None:
        """Remove what a write that did not succeed has left behind the last whole line."""
        assert self._fd is not None
        os.ftruncate(self._fd, self._size)
        self._midway = False

    def _rotate(self) -> None:
        segment = _segment(self.directory, self._seq + 1)
        fd = os.open(segment.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _OPEN, 0o640)
        try:
            if os.fstat(fd).st_size:
                raise FileExistsError(errno.EEXIST, f"{segment.path.name} is not ours and in the way")
            os.fchmod(fd, 0o640)  # whatever the umask
        except OSError:
            os.close(fd)
            raise
        self._leave_segment()
        # An empty segment that a failed write left behind may be this very one.
        self._sealed = deque(entry for entry in self._sealed if entry[0] != segment)
        self._fd, self._current, self._size = fd, segment, 0

    def _leave_segment(self) -> None:
        if self._fd is not None and self._current is not None:
            os.close(self._fd)
            self._sealed.append((self._current, self._size))
            self._fd = self._current = None

    def _check_segment(self) -> None:
        """Find that somebody else touched the open segment; new records then go to a new one, away from the damage."""
        if self._fd is None or self._current is None:
            return
        stat = os.fstat(self._fd)
        if stat.st_nlink and stat.st_size == self._size:
            return
        if stat.st_nlink and (self._midway or not self._size):
            self._cut_back()
            return
        first, name = self._current.first, self._current.path.name
        self._leave_segment()
        if stat.st_nlink:
            text = f"{name} was changed by someone while it was written. Verify the log."
            self._confess.append(_lost(Reason.DAMAGED, text, segment=name))
        else:
            self._forget_sealed(self._sealed[-1][0])
            text = f"{name} was removed by someone while it was written, with what it held from event {first} on."
            self._confess.append(_lost(Reason.REMOVED, text, first=first, last=self._seq))

    # - head

    def _try_head(self) -> None:
        """Move the head to the record just written. A failure is made good before the next record."""
        with contextlib.suppress(OSError):
            self._finish_head()

    def _finish_head(self) -> None:
        """Make the head name the newest record; so the log is never more than one record ahead of it."""
        if not self._head_due:
            return
        data = _encode_head(Head(self._seq, self._hash))
        if self._head is None or not os.fstat(self._head).st_nlink:
            self._make_head(data)
        elif os.pwrite(self._head, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._head_due = False

    def _make_head(self, data: bytes) -> None:
        """Under another name first: a head that exists is always whole."""
        path = self.directory / "head.new"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _OPEN, 0o640)
        try:
            os.fchmod(fd, 0o640)
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            path.rename(self.directory / "head")
        except OSError:
            os.close(fd)
            raise
        if self._head is not None:
            os.close(self._head)
        self._head = fd

    # - bound

    def _make_room(self, length: int, now: datetime) -> None:
        """Remove the oldest segments where the new line would pass the bound.

        First the record that says so, then the files: a writer that is killed in between leaves more than it said,
        never less.
        """
        if self._total + length + _SPARE <= self._max_bytes:
            return
        excess = self._total + length + 2 * _SPARE - self._max_bytes  # the announcement takes up to _SPARE
        victims: list[_Segment] = []
        for segment, size in self._sealed:
            if excess <= 0:
                break
            victims.append(segment)
            excess -= size
        if victims:
            self._announce(victims, now)
        for segment in victims:
            segment.path.unlink(missing_ok=True)
            self._forget_sealed(segment)

    def _announce(self, victims: list[_Segment], now: datetime) -> None:
        rest = [segment.first for segment, _ in self._sealed][len(victims) :]
        rest += [self._current.first] if self._current else []
        last = (rest[0] if rest else self._seq + 1) - 1
        if last <= self._said_removed:
            return  # it was announced before, and then the files could not be removed
        text = (
            f"{_were(victims[0].first, last)} removed to keep the log within {self._max_bytes} bytes; "
            "allow it more if you need to look back further."
        )
        self._put(*self._seal(_lost(Reason.BOUNDED, text, first=1, last=last), now))
        self._said_removed = last

    def _forget_sealed(self, segment: _Segment) -> None:
        self._total -= sum(size for known, size in self._sealed if known == segment)
        self._sealed = deque(entry for entry in self._sealed if entry[0] != segment)


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None


# --- readers ---------------------------------------------------------------------------------------------------------


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


def read(directory: Path, *, since_seq: int | None = None) -> Iterator[Record]:
    """Every record there is, in order; after number `since_seq` if given. Raises `EventLogError`.

    A line that cannot be read, or segments removed under a slow reader, give a notice (`Record.is_notice`).
    """
    cursor = _Cursor(directory, since_seq)
    try:
        os.listdir(directory)
        yield from cursor.poll()
    except OSError as exc:
        raise _unreadable(directory, exc) from exc
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
    cursor = _Cursor(directory, since_seq)
    try:
        while not stop():
            for record in cursor.poll():
                yield record
                if stop():
                    return
            sleep(poll_s)
    except OSError as exc:
        raise _unreadable(directory, exc) from exc
    finally:
        cursor.close()


class _Cursor:
    """A reader's place in a log: the open segment, the offset of the next whole line, and the last number seen.

    Only whole lines are consumed. An unfinished one is read again from its start, since a writer may yet finish it
    or, after a restart, cut it off and write another in its place.
    """

    def __init__(self, directory: Path, since_seq: int | None) -> None:
        self._directory = directory
        self._after = since_seq or 0
        self._asked = since_seq is not None
        self._segment: _Segment | None = None
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

    def _following(self) -> _Segment | None:
        """The segment to read next, once there is one."""
        try:
            segments = _segments(self._directory)
        except FileNotFoundError:
            return None
        if self._segment is not None and self._fd is not None:
            # A segment made anew under the same name counts as another one.
            gone = not os.fstat(self._fd).st_nlink
            least = self._segment.first if gone else self._segment.first + 1
            segments = [segment for segment in segments if segment.first >= least]
        reached = [segment for segment in segments if segment.first <= self._after + 1]
        return reached[-1] if reached else next(iter(segments), None)

    def _enter(self, segment: _Segment) -> Iterator[Record]:
        try:
            fd = os.open(segment.path, os.O_RDONLY | _OPEN)
        except FileNotFoundError:
            return  # removed since it was listed; the next listing knows what follows
        self.close()
        self._segment, self._fd, self._offset = segment, fd, 0
        if segment.first > self._after + 1 and (self._asked or self._after):
            first, self._after = self._after + 1, segment.first - 1
            yield self._notice(f"{_were(first, self._after)} removed before being read.", first=first, last=self._after)

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
            record = decode(line)
        except GarbledRecord as exc:
            number = f" (it says it is event {exc.seq})" if exc.seq else ""
            return self._notice(f"A line after event {self._after} is damaged{number}: {exc}. Verify the log.")
        if record.seq <= self._after:
            return None
        self._after = record.seq
        return record

    def _notice(self, text: str, **data: JSON) -> Record:
        return notice(_lost(Reason.REMOVED if data else Reason.DAMAGED, text, **data), seq=self._after, time=utc_now())


# --- verification ----------------------------------------------------------------------------------------------------


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
            raise _unreadable(directory, exc) from exc
    raise EventLogError(f"{directory}: segments are removed faster than they can be verified; try again later.")


def _verify_once(directory: Path) -> Verdict:
    # The head is read before and after. What it named before must be in the log read after it; what it names after
    # may be at most one record behind the last one read. Both hold while a writer is at work.
    if not directory.is_dir():
        return Verdict(None, None, 0, (Finding(Damage.MISSING, f"there is no event log in {directory}"),))
    before = _read_head(directory)
    if before is None and not _segments(directory):
        return Verdict(None, None, 0, (Finding(Damage.MISSING, f"there is no event log in {directory}"),))
    audit = _Audit(before)
    for segment, file, is_last in _held_open(directory):
        audit.segment(segment, file, is_last=is_last)
    audit.ends(_read_head(directory))
    return audit.verdict()


def _held_open(directory: Path) -> Iterator[tuple[_Segment, BinaryIO, bool]]:
    """Each segment, open, and whether it is the last. Raises `FileNotFoundError` if a busy writer was faster.

    Many are opened ahead, since what is open can be read even after it was removed. The newest are listed only when
    the oldest are open, so that whatever says that still older ones were removed is among them.
    """
    with contextlib.ExitStack() as stack:
        held: deque[tuple[_Segment, BinaryIO]] = deque()
        listed = _segments(directory)
        for segment in listed[:_OPEN_AHEAD]:
            try:
                held.append((segment, stack.enter_context(segment.path.open("rb"))))
            except FileNotFoundError:
                if held or segment is listed[-1]:
                    raise
        rest = iter([segment for segment in _segments(directory) if held and segment > held[-1][0]])
        while held:
            segment, file = held.popleft()
            if (following := next(rest, None)) is not None:
                held.append((following, stack.enter_context(following.path.open("rb"))))
            yield segment, file, not held
            file.close()


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with their ends; a line longer than ours can be comes in pieces."""
    while line := file.readline(_MAX_LINE + 1):
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

    def segment(self, segment: _Segment, file: BinaryIO, *, is_last: bool) -> None:
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
        if not line.endswith(b"\n") and len(line) <= _MAX_LINE:
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
        self._found(Damage.REMOVED, f"{_were(first, last).lower()} removed{how}", first, last, "")

    def _found(self, damage: Damage, text: str, first: int | None, last: int | None, where: str) -> None:
        self._findings.append(Finding(damage, text, first, last, where))


def _finished(file: BinaryIO, offset: int, line: bytes) -> bytes:
    """An unfinished last line, read again until its writer has finished it or evidently never will."""
    for _ in range(5):
        _time.sleep(0.01)
        now, end, _rest = os.pread(file.fileno(), _MAX_LINE + 1, offset).partition(b"\n")
        if end:
            return now + end
    return line
