"""The event log: numbering, recovery, bound, readers and verification, on real files and real processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypedDict

import pytest

from controller.eventfiles import EventLogBusy, EventLogError, Reason
from controller.eventlog import MIN_SEGMENT_BYTES, EventLog, RateGuard
from controller.eventread import Filter, follow, last_seq, read
from controller.events import GENESIS, JSON, Event, Kind, Record, decode, encode, seal
from controller.eventverify import Damage, Verdict, verify

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2026, 1, 1, tzinfo=UTC)


class Sizes(TypedDict):
    """How large a log may be."""

    segment_bytes: int
    max_bytes: int


SMALL = Sizes(segment_bytes=MIN_SEGMENT_BYTES, max_bytes=3 * MIN_SEGMENT_BYTES)
UNBOUND = Sizes(segment_bytes=MIN_SEGMENT_BYTES, max_bytes=1000 * MIN_SEGMENT_BYTES)


class Clock:
    """A clock that goes on when told."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def event(number: int = 0, kind: Kind = Kind.PORT_UP) -> Event:
    return Event(kind, f"port {number} is up", bridge="vmbr0")


def fill(directory: Path, count: int, sizes: Sizes = UNBOUND) -> None:
    with EventLog(directory, **sizes) as log:
        for number in range(count):
            assert log.append(event(number)) is not None


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("events-*.jsonl"))


def lost(directory: Path, reason: Reason) -> list[Record]:
    return [r for r in read(directory) if r.kind is Kind.LOST and r.data.get("reason") == reason]


def damages(verdict: Verdict) -> list[tuple[Damage, int | None, int | None]]:
    return [(finding.damage, finding.first, finding.last) for finding in verdict.problems]


def cut_lines(path: Path, count: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) - count]))


class TestFormat:
    def test_one_line_per_record_chained_and_named_after_the_first(self, tmp_path: Path) -> None:
        clock = Clock()
        with EventLog(tmp_path, clock=clock) as log:
            first, second = log.append(event(1)), log.append(event(2))
        assert first == seal(event(1), seq=1, time=START, prev=GENESIS)
        assert second == seal(event(2), seq=2, time=START, prev=first.hash)
        (path,) = segments(tmp_path)
        assert path.name == "events-00000000000000000001.jsonl"
        assert path.read_bytes() == encode(first) + b"\n" + encode(second) + b"\n"
        assert (tmp_path / "head").read_text().split()[:2] == ["00000000000000000002", second.hash]

    @pytest.mark.parametrize("umask", [0o000, 0o077])
    def test_files_are_open_to_their_group_only(self, tmp_path: Path, umask: int) -> None:
        old = os.umask(umask)
        try:
            fill(tmp_path, 1)
        finally:
            os.umask(old)
        for path in [*segments(tmp_path), tmp_path / "head"]:
            assert path.stat().st_mode & 0o7777 == 0o640

    def test_an_event_longer_than_a_line_may_be_is_cut_short(self, tmp_path: Path) -> None:
        long = Event(Kind.PORT_UP, "\x01" * 100_000, packet="p" * 9000, data={"x": "y" * 9000})
        with EventLog(tmp_path, **SMALL) as log:
            record = log.append(long)
        assert record is not None
        assert record.data["shortened_from_bytes"] > 600_000  # type: ignore[operator]
        assert record.text.startswith("\x01" * 31)
        assert len(encode(record)) < MIN_SEGMENT_BYTES
        assert list(read(tmp_path)) == [record]

    def test_sizes_that_cannot_work_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="segment_bytes"):
            EventLog(tmp_path, segment_bytes=MIN_SEGMENT_BYTES - 1)
        with pytest.raises(ValueError, match="max_bytes"):
            EventLog(tmp_path, segment_bytes=MIN_SEGMENT_BYTES, max_bytes=3 * MIN_SEGMENT_BYTES - 1)

    def test_append_after_close_does_not_raise(self, tmp_path: Path) -> None:
        log = EventLog(tmp_path)
        log.close()
        log.close()
        assert log.append(event()) is None
        assert segments(tmp_path) == []


class TestReopen:
    def test_numbers_and_chain_go_on(self, tmp_path: Path) -> None:
        for _ in range(5):
            fill(tmp_path, 7)
        assert [record.seq for record in read(tmp_path)] == list(range(1, 36))
        assert verify(tmp_path) == Verdict(1, 35, 35, ())

    def test_an_opened_log_without_records_is_sound(self, tmp_path: Path) -> None:
        EventLog(tmp_path).close()
        assert verify(tmp_path) == Verdict(None, None, 0, ())

    def test_an_unfinished_line_is_cut_off_and_told(self, tmp_path: Path) -> None:
        fill(tmp_path, 3)
        path = segments(tmp_path)[-1]
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"bridge":"vm')
        assert damages(verify(tmp_path)) == [(Damage.TRUNCATED, 4, 4)]
        fill(tmp_path, 1)
        assert path.read_bytes().startswith(whole + b'{"data"')
        assert lost(tmp_path, Reason.CUT)[0].data["bytes"] == 13
        assert verify(tmp_path) == Verdict(1, 5, 5, ())

    def test_an_unfinished_first_line_of_a_segment(self, tmp_path: Path) -> None:
        fill(tmp_path, 3)
        (tmp_path / "events-00000000000000000004.jsonl").write_bytes(b"{")
        fill(tmp_path, 1)
        assert [path.name[-7:] for path in segments(tmp_path)] == ["1.jsonl", "4.jsonl"]
        assert verify(tmp_path) == Verdict(1, 5, 5, ())

    def test_an_empty_last_segment_is_used(self, tmp_path: Path) -> None:
        fill(tmp_path, 3)
        (tmp_path / "events-00000000000000000004.jsonl").touch()
        fill(tmp_path, 1)
        assert [path.name[-7:] for path in segments(tmp_path)] == ["1.jsonl", "4.jsonl"]
        assert verify(tmp_path) == Verdict(1, 4, 4, ())

    def test_one_record_ahead_of_the_head_is_a_killed_writer(self, tmp_path: Path) -> None:
        fill(tmp_path, 3)
        head = (tmp_path / "head").read_bytes()
        fill(tmp_path, 1)
        (tmp_path / "head").write_bytes(head)
        assert verify(tmp_path) == Verdict(1, 4, 4, ())
        fill(tmp_path, 1)
        assert verify(tmp_path) == Verdict(1, 5, 5, ())
        assert not [record for record in read(tmp_path) if record.kind is Kind.LOST]

    def test_a_head_set_back_is_found_and_stays_found(self, tmp_path: Path) -> None:
        fill(tmp_path, 3)
        head = (tmp_path / "head").read_bytes()
        fill(tmp_path, 2)
        (tmp_path / "head").write_bytes(head)
        assert damages(verify(tmp_path)) == [(Damage.HEAD, 3, 5)]
        fill(tmp_path, 1)
        (told,) = lost(tmp_path, Reason.HEAD)
        assert told.seq == 6
        assert told.data["detail"] == "names event 3, but the log goes on to 5"
        assert [damage for damage, _, _ in damages(verify(tmp_path))] == [Damage.HEAD]

    @pytest.mark.parametrize("content", [None, b"", b"0" * 95, b"\xff" * 95])
    def test_a_head_that_is_gone_or_damaged_is_found_and_stays_found(
        self, tmp_path: Path, content: bytes | None
    ) -> None:
        fill(tmp_path, 3)
        (tmp_path / "head").unlink()
        if content is not None:
            (tmp_path / "head").write_bytes(content)
        assert [damage for damage, _, _ in damages(verify(tmp_path))] == [Damage.HEAD]
        fill(tmp_path, 1)
        assert last_seq(tmp_path) == 5
        assert [damage for damage, _, _ in damages(verify(tmp_path))] == [Damage.HEAD]

    def test_a_head_with_another_hash_is_found(self, tmp_path: Path) -> None:
        fill(tmp_path / "a", 3)
        fill(tmp_path / "b", 3)
        shutil.copy(tmp_path / "a" / "head", tmp_path / "b" / "head")
        assert damages(verify(tmp_path / "b")) == [(Damage.HEAD, 3, 3)]
        fill(tmp_path / "b", 1)
        assert lost(tmp_path / "b", Reason.HEAD)[0].seq == 4

    @pytest.mark.parametrize("removed", [1, 2, 10])
    def test_numbers_of_removed_newest_records_are_not_used_again(self, tmp_path: Path, removed: int) -> None:
        fill(tmp_path, 10)
        cut_lines(segments(tmp_path)[0], removed)
        gone = (Damage.REMOVED, 11 - removed, 10)
        assert damages(verify(tmp_path)) == [gone]
        fill(tmp_path, 1)
        (told,) = lost(tmp_path, Reason.REMOVED)
        assert (told.seq, told.data["first"], told.data["last"]) == (11, 11 - removed, 10)
        assert damages(verify(tmp_path)) == [gone]
        assert last_seq(tmp_path) == 12

    def test_everything_removed(self, tmp_path: Path) -> None:
        fill(tmp_path, 40)
        for path in segments(tmp_path):
            path.unlink()
        fill(tmp_path, 1)
        assert [record.seq for record in read(tmp_path)] == [41, 42]
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, 1, 40)]

    def test_damaged_lines_at_the_end_are_left_and_not_written_behind(self, tmp_path: Path) -> None:
        fill(tmp_path, 5)
        path = segments(tmp_path)[0]
        damaged = path.read_bytes().replace(b"port 4 is", b"port 9 is")
        path.write_bytes(damaged)
        fill(tmp_path, 1)
        assert path.read_bytes() == damaged
        assert [record.seq for record in read(tmp_path) if not record.is_notice] == [1, 2, 3, 4, 6, 7]
        assert damages(verify(tmp_path)) == [(Damage.ALTERED, 5, 5)]

    def test_a_last_segment_of_garbage_alone(self, tmp_path: Path) -> None:
        fill(tmp_path, 40)
        path = segments(tmp_path)[-1]
        first = int(path.name[7:27])
        path.write_bytes(b"garbage\n" * (41 - first))
        fill(tmp_path, 1)
        assert last_seq(tmp_path) == 42
        verdict = verify(tmp_path)
        assert damages(verdict) == [(Damage.UNREADABLE, seq, seq) for seq in range(first, 41)]

    def test_garbage_is_all_that_is_left(self, tmp_path: Path) -> None:
        fill(tmp_path, 40)
        (tmp_path / "head").unlink()
        *others, last = segments(tmp_path)
        for path in others:
            path.unlink()
        first = int(last.name[7:27])
        last.write_bytes(b"garbage\n" * 3)
        fill(tmp_path, 1)
        assert last.read_bytes() == b"garbage\n" * 3
        assert next(record.seq for record in read(tmp_path) if not record.is_notice) == first + 3

    def test_the_name_of_an_empty_segment_shows_which_numbers_were_given_out(self, tmp_path: Path) -> None:
        fill(tmp_path, 3)
        (tmp_path / "events-00000000000000000010.jsonl").touch()
        fill(tmp_path, 1)
        assert [record.seq for record in read(tmp_path) if not record.is_notice] == [1, 2, 3, 10, 11]
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, 4, 9)]

    def test_a_directory_that_cannot_be_made_says_what_to_do(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(EventLogError, match="Check that"):
            EventLog(tmp_path / "file" / "log")


class TestOneWriter:
    def test_a_second_writer_in_another_process_is_refused_by_pid(self, tmp_path: Path) -> None:
        script = f"from controller.eventlog import *\nEventLog(Path({str(tmp_path)!r}))"
        with EventLog(tmp_path) as log:
            log.append(event())
            done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
            assert f"EventLogBusy: {tmp_path}: process {os.getpid()} is writing" in done.stderr
        assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0

    def test_a_second_writer_in_the_same_process_is_refused_and_harms_nothing(self, tmp_path: Path) -> None:
        with EventLog(tmp_path) as log:
            log.append(event())
            with pytest.raises(EventLogBusy) as caught:
                EventLog(tmp_path)
            assert caught.value.pid == os.getpid()
            log.append(event())
        assert verify(tmp_path) == Verdict(1, 2, 2, ())

    def test_removing_every_file_does_not_let_a_second_writer_in(self, tmp_path: Path) -> None:
        with EventLog(tmp_path) as log:
            log.append(event())
            for path in tmp_path.iterdir():
                path.unlink()
            with pytest.raises(EventLogBusy, match="another process"):
                EventLog(tmp_path)


BUSY = """
import os, sys
from pathlib import Path
from controller.eventlog import EventLog
from controller.events import Event, Kind
log = EventLog(Path(sys.argv[1]), segment_bytes=4096, max_bytes=int(sys.argv[2]))
while True:
    record = log.append(Event(Kind.PORT_UP, "x" * (log.last_seq * 37 % 500)))
    os.write(1, b"%d\\n" % record.seq)
"""


@contextmanager
def busy_writer(directory: Path, max_bytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that writes as fast as it can."""
    command = [sys.executable, "-c", BUSY, str(directory), str(max_bytes)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


class TestKill:
    def test_kill_at_any_moment_loses_nothing_that_was_written(self, tmp_path: Path) -> None:
        chance = random.Random(7)
        reached = 0
        for _ in range(15):
            command = [sys.executable, "-c", BUSY, str(tmp_path), "40960"]
            child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
            assert child.stdout is not None
            acknowledged = int(child.stdout.readline())
            assert acknowledged > reached
            time.sleep(chance.random() * 0.02)
            child.send_signal(signal.SIGKILL)
            acknowledged = max(acknowledged, *map(int, child.stdout.read().split()), 0)
            child.stdout.close()
            child.wait()
            reached = max(record.seq for record in read(tmp_path))
            assert reached >= acknowledged
            EventLog(tmp_path).close()
            verdict = verify(tmp_path)
            assert verdict.ok, verdict.problems
        assert verdict.first_seq is not None
        assert verdict.first_seq > 1, "the bound was never reached, so removal was not tried"
        assert not lost(tmp_path, Reason.REMOVED) and not lost(tmp_path, Reason.HEAD)

    def test_killed_between_announcing_a_removal_and_removing(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **SMALL) as log:
            log.append(event())
            while not lost(tmp_path, Reason.BOUNDED):
                kept = segments(tmp_path)[0].read_bytes()
                log.append(event())
        (tmp_path / "events-00000000000000000001.jsonl").write_bytes(kept)
        verdict = verify(tmp_path)
        assert verdict.ok and verdict.first_seq == 1
        fill(tmp_path, 1, SMALL)
        assert verify(tmp_path).ok


class TestBound:
    def test_never_more_than_the_bound_and_the_log_says_what_went(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **SMALL) as log:
            for number in range(400):
                log.append(event(number))
                assert sum(path.stat().st_size for path in segments(tmp_path)) <= SMALL["max_bytes"]
                assert all(path.stat().st_size <= MIN_SEGMENT_BYTES for path in segments(tmp_path))
        verdict = verify(tmp_path)
        assert verdict.ok
        first = next(read(tmp_path)).seq
        assert first > 100
        newest = lost(tmp_path, Reason.BOUNDED)[-1]
        assert (newest.data["first"], newest.data["last"]) == (1, first - 1)
        assert sum(path.stat().st_size for path in segments(tmp_path)) > SMALL["max_bytes"] // 3

    def test_a_smaller_bound_is_reached_at_the_next_record(self, tmp_path: Path) -> None:
        fill(tmp_path, 400)
        fill(tmp_path, 1, SMALL)
        assert sum(path.stat().st_size for path in segments(tmp_path)) <= SMALL["max_bytes"]
        assert verify(tmp_path).ok

    def test_one_segment_more_than_the_log_says_is_found(self, tmp_path: Path) -> None:
        fill(tmp_path, 400, SMALL)
        oldest, second = segments(tmp_path)[:2]
        first, after = int(oldest.name[7:27]), int(second.name[7:27])
        oldest.unlink()
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, first, after - 1)]

    def test_a_callers_event_cannot_vouch_for_a_removal(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:
            for number in range(40):
                log.append(event(number))
            second = int(segments(tmp_path)[1].name[7:27])
            claim: dict[str, JSON] = {"reason": str(Reason.BOUNDED), "first": 1, "last": second - 1}
            record = log.append(Event(Kind.LOST, "trust me", data=claim))
        assert record is not None and "reason" not in record.data
        segments(tmp_path)[0].unlink()
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, 1, second - 1)]


DISK_FULL = """
import os, sys
from pathlib import Path
from controller.eventfiles import Reason
from controller.eventlog import EventLog
from controller.eventread import read
from controller.events import Event, Kind
from controller.eventverify import verify

top = Path(sys.argv[1])
full_at_start = sys.argv[2] == "start"
log_dir = top / "log"
ballast = top / "ballast"

def use_up():
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

def event(number):
    return Event(Kind.PORT_UP, f"{number} " + "x" * (number * 61 % 700))

if full_at_start:
    log_dir.mkdir()
    use_up()
log = EventLog(log_dir, segment_bytes=8192, max_bytes=1 << 20)
written, failed = [], 0
for round in range(4):
    use_up()
    for number in range(60):
        record = log.append(event(number))
        if record is None:
            failed += 1
        else:
            written.append(record)
    assert failed and log.unwritten, "the disk was never full"
    for path in log_dir.glob("events-*"):
        assert path.read_bytes()[-1:] in (b"", b"\\n"), "half a line was left"
    os.truncate(ballast, 4096 * (round + 1))
    if round % 2:
        log.tick()
        assert log.unwritten == 0
written.append(log.append(event(1)))
assert log.unwritten == 0
log.close()
records = list(read(log_dir))
assert [r.seq for r in records] == list(range(1, len(records) + 1)), "numbers have gaps"
told = sum(r.data["count"] for r in records if r.data.get("reason") == Reason.UNWRITTEN)
assert told == failed, (told, failed)
assert any("No space left" in r.text for r in records)
assert set(written) <= set(records)
assert verify(log_dir).ok, verify(log_dir).problems
print("good", failed, len(written))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
class TestDiskFull:
    @pytest.mark.parametrize("when", ["running", "start"])
    def test_what_a_full_disk_swallowed_is_counted_and_told(self, tmp_path: Path, when: str) -> None:
        (tmp_path / "check.py").write_text(DISK_FULL)
        (tmp_path / "disk").mkdir()
        command = (
            'mount -t tmpfs -o size=256k tmpfs "$1/disk" && PYTHONPATH="$2" "$3" "$1/check.py" "$1/disk" "$4"; '
            'result=$?; umount "$1/disk"; exit $result'
        )
        arguments = ["unshare", "-m", "sh", "-c", command, "sh", str(tmp_path), str(ROOT), sys.executable, when]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("good")


class TestHands:
    """Somebody else's hands in the directory while the log is written."""

    def test_the_open_segment_is_removed(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:
            for number in range(5):
                log.append(event(number))
            segments(tmp_path)[0].unlink()
            log.append(event(5))
        assert [record.seq for record in read(tmp_path)] == [6, 7]
        assert lost(tmp_path, Reason.REMOVED)[0].data == {"reason": "removed", "first": 1, "last": 5}
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, 1, 5)]

    def test_the_open_segment_is_emptied(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:
            for number in range(5):
                log.append(event(number))
            os.truncate(segments(tmp_path)[0], 0)
            log.append(event(5))
        assert [record.seq for record in read(tmp_path)] == [6, 7]
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, 1, 5)]

    def test_something_is_written_behind_the_last_line(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:
            log.append(event(1))
            with segments(tmp_path)[0].open("ab") as file:
                file.write(b"half a li")
            record = log.append(event(2))
        assert record in list(read(tmp_path)), "the new record was written into the damage"
        assert not verify(tmp_path).ok

    def test_the_head_is_removed(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:
            log.append(event(1))
            (tmp_path / "head").unlink()
            log.append(event(2))
            assert last_seq(tmp_path) == 2

    def test_a_head_that_cannot_be_written_never_lags_by_more_than_one(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:
            log.append(event(1))
            (tmp_path / "head").unlink()
            (tmp_path / "head.new").mkdir()
            assert log.append(event(2)) is not None
            assert log.append(event(3)) is None
            assert log.unwritten == 1
            (tmp_path / "head.new").rmdir()
            assert log.append(event(4)) is not None
        assert lost(tmp_path, Reason.UNWRITTEN)[0].data["count"] == 1
        assert verify(tmp_path) == Verdict(1, 4, 4, ())

    def test_a_segment_that_cannot_be_removed_is_announced_once(self, tmp_path: Path) -> None:
        fill(tmp_path, 30, SMALL)
        oldest = segments(tmp_path)[0]
        with EventLog(tmp_path, **SMALL) as log:
            oldest.unlink()
            oldest.mkdir()
            for number in range(60):
                log.append(event(number))
            assert log.unwritten > 10
            oldest.rmdir()
            assert log.append(event()) is not None
        assert len(lost(tmp_path, Reason.BOUNDED)) == 1
        assert verify(tmp_path).ok


class TestRateGuard:
    def test_counts_are_exact_and_told_once_a_second(self, tmp_path: Path) -> None:
        clock = Clock()
        with EventLog(tmp_path, max_per_second=10, clock=clock) as log:
            for tenth in range(35):
                clock.now = START + timedelta(milliseconds=100 * tenth)
                for number in range(20):
                    log.append(event(number, Kind.VIOLATION))
                log.append(event(tenth, Kind.PATH_LEARNED))
                log.append(event(tenth, Kind.PORT_UP))
        records = list(read(tmp_path))
        kept = sum(record.kind is Kind.VIOLATION for record in records)
        assert kept == 10 + 34  # the full bucket, then one per tenth of a second
        assert sum(record.kind is Kind.PATH_LEARNED for record in records) == 35
        assert sum(record.kind is Kind.PORT_UP for record in records) == 35
        told = lost(tmp_path, Reason.RATE)
        assert sum(record.data["counts"]["violation"] for record in told) == 35 * 20 - kept  # type: ignore[index,call-overload,misc]
        assert [record.time for record in told] == [START + timedelta(seconds=s) for s in (1, 2, 3, 3.4)]
        assert verify(tmp_path).ok

    def test_each_kind_has_its_own_bucket_and_count(self, tmp_path: Path) -> None:
        clock = Clock()
        log = EventLog(tmp_path, max_per_second=2, clock=clock)
        for kind, count in ((Kind.VIOLATION, 5), (Kind.PATH_LEARNED, 3), (Kind.PATH_EXPIRED, 2)):
            for number in range(count):
                log.append(event(number, kind))
        log.tick()
        assert not lost(tmp_path, Reason.RATE)
        clock.pass_s(1)
        log.tick()
        log.tick()
        (told,) = lost(tmp_path, Reason.RATE)
        assert told.data["counts"] == {"path_learned": 1, "violation": 3}
        log.close()

    def test_without_a_limit_nothing_is_dropped(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, clock=Clock()) as log:
            assert all(log.append(event(number, Kind.VIOLATION)) for number in range(1000))

    def test_a_clock_that_is_set_back_stops_neither_refill_nor_report(self) -> None:
        guard = RateGuard(1)
        assert guard.admit(Kind.VIOLATION, START)
        assert not guard.admit(Kind.VIOLATION, START)
        earlier = START - timedelta(hours=1)
        assert guard.report(earlier) is not None
        assert not guard.admit(Kind.VIOLATION, earlier)
        assert guard.admit(Kind.VIOLATION, earlier + timedelta(seconds=1))

    def test_a_limit_that_lets_nothing_through_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="max_per_second"):
            EventLog(tmp_path, max_per_second=0)


class Follower:
    """A `follow` whose pauses run the test's next step, so that nothing waits."""

    def __init__(self, directory: Path, *steps: object, since_seq: int | None = None) -> None:
        self._steps = iter(steps)
        self._over = False
        self.records: Iterator[Record] = follow(
            directory, since_seq=since_seq, stop=lambda: self._over, sleep=self._sleep
        )

    def _sleep(self, _: float) -> None:
        step = next(self._steps, None)
        if callable(step):
            step()
        else:
            self._over = True


class TestReaders:
    def test_since_a_number(self, tmp_path: Path) -> None:
        fill(tmp_path, 60)
        assert len(segments(tmp_path)) > 2
        for since in (0, 1, 29, 59, 60, 99):
            assert [record.seq for record in read(tmp_path, since_seq=since)] == list(range(since + 1, 61))

    def test_no_log_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(EventLogError, match="Check that"):
            list(read(tmp_path / "none"))
        assert last_seq(tmp_path / "none") == 0
        assert [damage for damage, _, _ in damages(verify(tmp_path / "none"))] == [Damage.MISSING]

    def test_a_damaged_line_is_told_and_the_rest_is_read(self, tmp_path: Path) -> None:
        fill(tmp_path, 3)
        path = segments(tmp_path)[0]
        path.write_bytes(path.read_bytes().replace(b"port 1", b"port 7"))
        records = list(read(tmp_path))
        assert [(record.seq, record.is_notice) for record in records] == [(1, False), (1, True), (3, False)]
        assert "event 2" in records[1].text

    def test_a_line_longer_than_any_does_not_stop_a_reader(self, tmp_path: Path) -> None:
        fill(tmp_path, 2)
        path = segments(tmp_path)[0]
        one, two = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(one + b"x" * 1_000_000 + b"\n" + two)
        assert [record.seq for record in read(tmp_path) if not record.is_notice] == [1, 2]
        assert {finding.damage for finding in verify(tmp_path).problems} == {Damage.UNREADABLE}

    def test_follow_sees_everything_once_across_rotation(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:

            def grow() -> None:
                for number in range(25):
                    log.append(event(number))

            follower = Follower(tmp_path, grow, grow, lambda: None, grow)
            assert [record.seq for record in follower.records] == list(range(1, 76))
        assert len(segments(tmp_path)) > 3

    def test_follow_waits_for_a_log_and_stops_when_told(self, tmp_path: Path) -> None:
        follower = Follower(tmp_path / "later", lambda: None, lambda: fill(tmp_path / "later", 2))
        assert [record.seq for record in follower.records] == [1, 2]

    def test_follow_only_what_is_new(self, tmp_path: Path) -> None:
        fill(tmp_path, 50)
        follower = Follower(tmp_path, lambda: fill(tmp_path, 2), since_seq=last_seq(tmp_path))
        assert [record.seq for record in follower.records] == [51, 52]

    def test_follow_does_not_take_half_a_line_that_a_new_writer_cuts_off(self, tmp_path: Path) -> None:
        fill(tmp_path, 2)
        path = segments(tmp_path)[0]

        def half() -> None:
            with path.open("ab") as file:
                file.write(b'{"bridge":"half')

        follower = Follower(tmp_path, half, lambda: None, lambda: fill(tmp_path, 1))
        records = list(follower.records)
        assert [(record.seq, record.kind) for record in records[2:]] == [(3, Kind.LOST), (4, Kind.PORT_UP)]
        assert not any(record.is_notice for record in records)

    def test_follow_goes_over_to_a_segment_made_anew_under_the_same_name(self, tmp_path: Path) -> None:
        fill(tmp_path, 2)
        path = segments(tmp_path)[0]

        def renew() -> None:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
            fill(tmp_path, 1)

        assert [record.seq for record in Follower(tmp_path, renew).records] == [1, 2, 3]

    def test_a_slow_reader_is_told_what_it_missed_and_does_not_hold_the_writer(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **SMALL) as log:
            for number in range(30):
                log.append(event(number))
            open_one = int(segments(tmp_path)[1].name[7:27])
            follower = Follower(tmp_path)
            seen = [next(follower.records) for _ in range(3)]
            for number in range(400):
                assert log.append(event(number)) is not None
            oldest = int(segments(tmp_path)[0].name[7:27])
            assert oldest > open_one
            seen += follower.records
            end = log.last_seq
        (remark,) = [record for record in seen if record.is_notice]
        assert remark.data == {"reason": "removed", "first": open_one, "last": oldest - 1}
        assert [record.seq for record in seen] == [*range(1, open_one), oldest - 1, *range(oldest, end + 1)]

    def test_a_reader_that_comes_back_too_late_is_told(self, tmp_path: Path) -> None:
        fill(tmp_path, 400, SMALL)
        oldest = int(segments(tmp_path)[0].name[7:27])
        first, second = list(read(tmp_path, since_seq=20))[:2]
        assert first.is_notice and (first.data["first"], first.data["last"]) == (21, oldest - 1)
        assert second.seq == oldest
        assert next(read(tmp_path, since_seq=0)).is_notice
        assert not any(record.is_notice for record in read(tmp_path)), "nobody asked for the removed ones"

    def test_verify_while_the_log_is_written(self, tmp_path: Path) -> None:
        with busy_writer(tmp_path, 1 << 18) as child:
            give_up = time.monotonic() + 30
            while last_seq(tmp_path) < 500:
                assert time.monotonic() < give_up
                time.sleep(0.01)
            begun = last_seq(tmp_path)
            for _ in range(50):
                before = last_seq(tmp_path)
                verdict = verify(tmp_path)
                assert verdict.ok, verdict.problems
                assert verdict.last_seq is not None and verdict.last_seq >= before
            assert child.poll() is None and last_seq(tmp_path) > begun, "the writer was not at work"

    def test_follow_while_the_log_is_written(self, tmp_path: Path) -> None:
        # They make listing the directory slow, so that the writer gets on while the reader looks for the next segment.
        for number in range(1000):
            (tmp_path / f"other-{number}").touch()
        with busy_writer(tmp_path, 1 << 30):
            seen = [record.seq for record, _ in zip(follow(tmp_path, poll_s=0), range(1500), strict=False)]
        assert seen == list(range(1, 1501))
        assert len(segments(tmp_path)) > 100

    def test_filter(self) -> None:
        record = seal(Event(Kind.VIOLATION, "x", bridge="vmbr0", network="privacy"), seq=1, time=START, prev=GENESIS)
        second = timedelta(seconds=1)
        for accepted in (
            Filter(),
            Filter(kinds=frozenset({Kind.VIOLATION, Kind.LOST}), networks=frozenset({"privacy"})),
            Filter(bridges=frozenset({"vmbr0"}), since=START, until=START + second),
        ):
            assert accepted.accepts(record)
        for refused in (
            Filter(kinds=frozenset({Kind.LOST})),
            Filter(networks=frozenset({"management"})),
            Filter(bridges=frozenset({"vmbr1"})),
            Filter(containers=frozenset({"xray"})),
            Filter(since=START + second),
            Filter(until=START),
        ):
            assert not refused.accepts(record)
        with pytest.raises(ValueError, match="zone"):
            Filter(since=datetime(2026, 1, 1))


class TestVerify:
    def test_a_segment_removed_and_the_next_damaged_at_its_start(self, tmp_path: Path) -> None:
        fill(tmp_path, 60)
        gone, damaged = segments(tmp_path)[1:3]
        first, after = int(gone.name[7:27]), int(damaged.name[7:27])
        gone.unlink()
        damaged.write_bytes(b"x" + damaged.read_bytes())
        assert damages(verify(tmp_path)) == [(Damage.UNREADABLE, after, after), (Damage.REMOVED, first, after - 1)]

    def test_a_first_segment_of_one_record_is_missed(self, tmp_path: Path) -> None:
        with EventLog(tmp_path, **UNBOUND) as log:
            log.append(Event(Kind.PORT_UP, "x" * (MIN_SEGMENT_BYTES - 300)))
            log.append(Event(Kind.PORT_UP, "x" * 300))
        first, _ = segments(tmp_path)
        first.unlink()
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, 1, 1)]

    def test_a_replaced_record_whose_hash_fits_is_found(self, tmp_path: Path) -> None:
        fill(tmp_path, 5)
        path = segments(tmp_path)[0]
        lines = path.read_bytes().splitlines()
        old = decode(lines[2])
        lines[2] = encode(seal(event(99), seq=old.seq, time=old.time, prev=old.prev))
        path.write_bytes(b"\n".join(lines) + b"\n")
        assert damages(verify(tmp_path)) == [(Damage.ALTERED, 4, 4)]
        path.write_bytes(b"\n".join(lines[:3]) + b"\n")
        assert damages(verify(tmp_path)) == [(Damage.REMOVED, 4, 5)]

    def test_a_replaced_last_record_does_not_fit_the_head(self, tmp_path: Path) -> None:
        fill(tmp_path, 5)
        path = segments(tmp_path)[0]
        lines = path.read_bytes().splitlines()
        old = decode(lines[4])
        lines[4] = encode(seal(event(99), seq=5, time=old.time, prev=old.prev))
        path.write_bytes(b"\n".join(lines) + b"\n")
        assert damages(verify(tmp_path)) == [(Damage.HEAD, 5, 5)]

    def test_a_first_record_of_another_log_is_found(self, tmp_path: Path) -> None:
        fill(tmp_path, 1)
        path = segments(tmp_path)[0]
        path.write_bytes(encode(seal(event(), seq=1, time=START, prev="1" * 64)) + b"\n")
        assert (Damage.ALTERED, 1, 1) in damages(verify(tmp_path))

    def test_a_renamed_first_segment_is_found(self, tmp_path: Path) -> None:
        fill(tmp_path, 5)
        segments(tmp_path)[0].rename(tmp_path / "events-00000000000000000003.jsonl")
        assert not verify(tmp_path).ok

    def test_many_records_in_many_segments(self, tmp_path: Path) -> None:
        fill(tmp_path, 20_000, Sizes(segment_bytes=1 << 18, max_bytes=1 << 28))
        assert verify(tmp_path) == Verdict(1, 20_000, 20_000, ())


GREEN = """
import eventlet
eventlet.monkey_patch()
import sys
from pathlib import Path
from controller.eventlog import EventLog
from controller.eventread import follow
from controller.events import Event, Kind
from controller.eventverify import verify

directory = Path(sys.argv[1])
log = EventLog(directory, segment_bytes=4096, max_bytes=1 << 20)
seen = []

def watch():
    for record in follow(directory, poll_s=0.001, stop=lambda: len(seen) >= 300):
        seen.append(record.seq)

def write(name):
    for number in range(100):
        log.append(Event(Kind.PORT_UP, f"{name} {number}"))
        eventlet.sleep(0)

watcher = eventlet.spawn(watch)
for writer in [eventlet.spawn(write, name) for name in "abc"]:
    writer.wait()
with eventlet.Timeout(10):
    watcher.wait()
log.close()
assert seen == list(range(1, 301)), seen
assert verify(directory).ok
print("good")
"""


def test_under_eventlet_writers_do_not_mix_and_followers_let_them_run(tmp_path: Path) -> None:
    pytest.importorskip("eventlet")
    command = [sys.executable, "-W", "ignore", "-c", GREEN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "good\n", done.stderr
