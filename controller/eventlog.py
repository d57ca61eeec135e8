"""The writer of the event log: it goes on where the last one ended, keeps the bound, and says what is missing.

A log has one writer and any number of readers; these take no locks and cannot slow it. What a log consists of is
told in `controller.eventfiles`.

Standard library only; no threads, and `append` never yields, so it behaves the same under eventlet. May import
`controller.eventfiles` and `controller.events`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from controller.eventfiles import (
    MAX_LINE,
    OPEN_FLAGS,
    EventLogBusy,
    EventLogError,
    Head,
    Reason,
    Segment,
    encode_head,
    list_segments,
    lost,
    read_head,
    segment_at,
    utc_now,
    were,
)
from controller.events import GENESIS, JSON, Event, GarbledRecord, Kind, Record, decode, encode, seal

MIB: Final = 1024 * 1024
MIN_SEGMENT_BYTES: Final = 4096
NOISY: Final = frozenset({Kind.VIOLATION, Kind.PATH_LEARNED, Kind.PATH_EXPIRED, Kind.API_DENIED})
"""The kinds that whoever sends packets or requests can cause at will."""

# Kept free below the bound, so that the record which says what is removed still fits before it is removed.
_SPARE: Final = 1024
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

Clock = Callable[[], datetime]


# --- what callers may say --------------------------------------------------------------------------------------------


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
        return lost(Reason.RATE, text, counts=counts)

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

    segments: list[Segment]
    tip: Record | None = None
    bad_lines: int = 0
    cut: int = 0
    known: int = 0

    @property
    def seq(self) -> int:
        return self.tip.seq if self.tip else 0


def _find_end(directory: Path, head: Head | None) -> _End:
    """Read backwards from the end until a sound record is found: of an undamaged log, one line."""
    end = _End(list_segments(directory))
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
        yield lost(Reason.CUT, text, bytes=end.cut)
    if end.bad_lines:
        text = f"{end.bad_lines} lines at the end of the log are damaged and were left as they are; verify the log."
        yield lost(Reason.DAMAGED, text, lines=end.bad_lines)
    missing = end.seq + end.bad_lines + 1
    if end.known >= missing:
        text = (
            f"{were(missing, end.known)} written and {'is' if missing == end.known else 'are'} gone from the end of "
            "the log: removed by someone, or lost with the power. Look who can write to the log's directory."
        )
        yield lost(Reason.REMOVED, text, first=missing, last=end.known)
    doubt = _head_doubt(end, head)
    if doubt:
        text = f"The head file {doubt}: whether records were removed from the end cannot be told. Verify the log."
        yield lost(Reason.HEAD, text, detail=doubt)


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
        self._max_line = min(MAX_LINE, segment_bytes)
        self._clock = clock
        self._guard = RateGuard(max_per_second) if max_per_second is not None else None
        self._seq = 0
        self._hash = GENESIS
        self._lock: int | None = None
        self._head: int | None = None
        self._head_due = False
        self._current: Segment | None = None
        self._fd: int | None = None
        self._size = 0
        self._midway = False
        self._sealed: deque[tuple[Segment, int]] = deque()
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
        head = read_head(self.directory)
        end = _find_end(self.directory, head)
        self._confess.extend(_confessions(end, head))
        self._seq = end.known
        self._hash = end.tip.hash if end.tip else GENESIS
        self._adopt(end)
        if head is not None:
            self._head = os.open(self.directory / "head", os.O_RDWR | OPEN_FLAGS)
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
            fd = os.open(pid_path, os.O_WRONLY | os.O_CREAT | OPEN_FLAGS, 0o640)
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
                self._fd = os.open(last.path, os.O_WRONLY | os.O_APPEND | OPEN_FLAGS)
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
            if not self._write(lost(Reason.UNWRITTEN, text, count=count, error=self._why), now):
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
        segment = segment_at(self.directory, self._seq + 1)
        fd = os.open(segment.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | OPEN_FLAGS, 0o640)
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
            self._confess.append(lost(Reason.DAMAGED, text, segment=name))
        else:
            self._forget_sealed(self._sealed[-1][0])
            text = f"{name} was removed by someone while it was written, with what it held from event {first} on."
            self._confess.append(lost(Reason.REMOVED, text, first=first, last=self._seq))

    # - head

    def _try_head(self) -> None:
        """Move the head to the record just written. A failure is made good before the next record."""
        with contextlib.suppress(OSError):
            self._finish_head()

    def _finish_head(self) -> None:
        """Make the head name the newest record; so the log is never more than one record ahead of it."""
        if not self._head_due:
            return
        data = encode_head(Head(self._seq, self._hash))
        if self._head is None or not os.fstat(self._head).st_nlink:
            self._make_head(data)
        elif os.pwrite(self._head, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._head_due = False

    def _make_head(self, data: bytes) -> None:
        """Under another name first: a head that exists is always whole."""
        path = self.directory / "head.new"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | OPEN_FLAGS, 0o640)
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
        victims: list[Segment] = []
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

    def _announce(self, victims: list[Segment], now: datetime) -> None:
        rest = [segment.first for segment, _ in self._sealed][len(victims) :]
        rest += [self._current.first] if self._current else []
        last = (rest[0] if rest else self._seq + 1) - 1
        if last <= self._said_removed:
            return  # it was announced before, and then the files could not be removed
        text = (
            f"{were(victims[0].first, last)} removed to keep the log within {self._max_bytes} bytes; "
            "allow it more if you need to look back further."
        )
        self._put(*self._seal(lost(Reason.BOUNDED, text, first=1, last=last), now))
        self._said_removed = last

    def _forget_sealed(self, segment: Segment) -> None:
        self._total -= sum(size for known, size in self._sealed if known == segment)
        self._sealed = deque(entry for entry in self._sealed if entry[0] != segment)


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None
