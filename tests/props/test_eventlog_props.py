"""Laws of the event log: no damage goes unnoticed, none is laundered by a writer, and no history of use breaks it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.eventlog import MIN_SEGMENT_BYTES, EventLog
from controller.eventread import read
from controller.events import Event, Kind, decode, encode, seal
from controller.eventverify import Damage, Verdict, verify
from tests.fakes.effort import examples

COUNT = 60
HEAD = "head"

Files = dict[str, bytes]
lawful = settings(deadline=None)


def in_files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "writer"}


@cache
def sound_log() -> tuple[Files, tuple[bytes, ...]]:
    """A log of several segments, and the head after each number of records."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        heads = []
        with EventLog(directory, segment_bytes=MIN_SEGMENT_BYTES, max_bytes=100 * MIN_SEGMENT_BYTES) as log:
            heads.append((directory / HEAD).read_bytes())
            for number in range(COUNT):
                log.append(Event(Kind.PORT_UP, f"é {number}", bridge="vmbr0", data={"n": [number, 1.5]}))
                heads.append((directory / HEAD).read_bytes())
        assert verify(directory) == Verdict(1, COUNT, COUNT, ())
        return in_files(directory), tuple(heads)


NAMES = sorted(name for name in sound_log()[0] if name != HEAD)
assert len(NAMES) >= 4


def lines() -> list[tuple[str, bytes]]:
    """Every line with the segment it is in; index 0 is number 1."""
    files, _ = sound_log()
    return [(name, line) for name in NAMES for line in files[name].splitlines(keepends=True)]


def joined(pairs: list[tuple[str, bytes]]) -> Files:
    files = {name: b"".join(line for where, line in pairs if where == name) for name in NAMES}
    return {**files, HEAD: sound_log()[0][HEAD]}


@contextmanager
def on_disk(files: Files) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for path, data in files.items():
            (directory / path).write_bytes(data)
        yield directory


def found(files: Files) -> Verdict:
    """The verdict on damaged files, after seeing that no writer can go on from them as if nothing had been.

    A writer must start, give out only numbers never used, be able to write, and leave the damage to be found.
    """
    with on_disk(files) as directory:
        verdict = verify(directory)
        assert not verdict.ok
        with EventLog(directory, segment_bytes=MIN_SEGMENT_BYTES, max_bytes=100 * MIN_SEGMENT_BYTES) as log:
            record = log.append(Event(Kind.PORT_UP, "on we go"))
        assert record is not None and record.seq > COUNT
        assert record in list(read(directory))
        assert not verify(directory).ok
        return verdict


def removed(verdict: Verdict) -> set[int]:
    return {
        seq
        for finding in verdict.problems
        if finding.damage is Damage.REMOVED and finding.first is not None and finding.last is not None
        for seq in range(finding.first, finding.last + 1)
    }


def named(verdict: Verdict, damage: Damage) -> list[int | None]:
    return [finding.first for finding in verdict.problems if finding.damage is damage]


indexes = st.integers(0, COUNT - 1)


@given(st.data(), st.sampled_from(NAMES), st.integers(0, 255))
@settings(lawful, max_examples=examples(300))
def test_any_altered_byte_is_found_and_its_record_named(data: st.DataObject, name: str, byte: int) -> None:
    files, _ = sound_log()
    content = files[name]
    at = data.draw(st.integers(0, len(content) - 1))
    if content[at] == byte:
        byte ^= 1
    verdict = found({**files, name: content[:at] + bytes([byte]) + content[at + 1 :]})
    number = int(name[7:27]) + content[:at].count(b"\n")
    assert any(f.first is not None and f.last is not None and f.first <= number <= f.last for f in verdict.problems)


@given(st.sets(indexes, min_size=1))
@lawful
def test_any_removed_lines_are_found_and_named_exactly(gone: set[int]) -> None:
    verdict = found(joined([pair for index, pair in enumerate(lines()) if index not in gone]))
    assert removed(verdict) == {index + 1 for index in gone}
    assert {finding.damage for finding in verdict.problems} == {Damage.REMOVED}


@given(indexes, indexes)
@lawful
def test_any_two_swapped_lines_are_found_and_nothing_is_called_removed(one: int, other: int) -> None:
    pairs = lines()
    if one == other:
        other = (one + 1) % COUNT
    texts = [text for _, text in pairs]
    texts[one], texts[other] = texts[other], texts[one]
    verdict = found(joined([(name, text) for (name, _), text in zip(pairs, texts, strict=True)]))
    assert named(verdict, Damage.REORDERED)
    assert not removed(verdict)


@given(indexes, indexes)
@lawful
def test_any_repeated_line_is_found_and_named(which: int, where: int) -> None:
    pairs = lines()
    name, _ = pairs[where]
    pairs.insert(where, (name, pairs[which][1]))
    verdict = found(joined(pairs))
    assert named(verdict, Damage.DUPLICATED) == [which + 1]
    assert not removed(verdict)


@given(indexes, st.binary(max_size=200).filter(lambda data: b"\n" not in data))
@lawful
def test_any_inserted_line_is_found_and_nothing_is_called_removed(where: int, line: bytes) -> None:
    pairs = lines()
    pairs.insert(where, (pairs[where][0], line + b"\n"))
    verdict = found(joined(pairs))
    assert named(verdict, Damage.UNREADABLE) == [where + 1]
    assert not removed(verdict)


@given(indexes)
@lawful
def test_a_record_replaced_with_a_fitting_hash_is_found(which: int) -> None:
    pairs = lines()
    name, line = pairs[which]
    old = decode(line.rstrip(b"\n"))
    forged = seal(Event(Kind.PORT_UP, "nothing happened"), seq=old.seq, time=old.time, prev=old.prev)
    pairs[which] = (name, encode(forged) + b"\n")
    verdict = found(joined(pairs))
    # The one after it no longer follows, or, for the last, the head names another.
    expected = (Damage.ALTERED, which + 2) if which + 1 < COUNT else (Damage.HEAD, COUNT)
    assert [(finding.damage, finding.first) for finding in verdict.problems] == [expected]


@given(st.data(), st.sampled_from(NAMES))
@lawful
def test_any_cut_is_found_and_what_is_missing_named(data: st.DataObject, name: str) -> None:
    files, _ = sound_log()
    keep = data.draw(st.integers(0, len(files[name]) - 1))
    left = files[name][:keep]
    verdict = found({**files, name: left})
    first = int(name[7:27])
    whole, partial = left.count(b"\n"), not left.endswith(b"\n") and bool(left)
    missing = set(range(first + whole, first + files[name].count(b"\n")))
    assert removed(verdict) | set(named(verdict, Damage.TRUNCATED)) == missing
    assert bool(named(verdict, Damage.TRUNCATED)) == partial


@given(st.sets(st.sampled_from(NAMES), min_size=1))
@lawful
def test_any_dropped_segments_are_found_and_named_exactly(gone: set[str]) -> None:
    files, _ = sound_log()
    verdict = found({name: data for name, data in files.items() if name not in gone})
    assert removed(verdict) == {index + 1 for index, (name, _) in enumerate(lines()) if name in gone}


@given(st.integers(0, COUNT))
@lawful
def test_a_head_set_back_is_found_unless_a_killed_writer_leaves_the_same(seq: int) -> None:
    files, heads = sound_log()
    rolled = {**files, HEAD: heads[seq]}
    if seq < COUNT - 1:
        assert named(found(rolled), Damage.HEAD) == [seq]
    else:
        with on_disk(rolled) as directory:
            assert verify(directory).ok


@given(st.integers(0, 94), st.integers(0, 255))
@lawful
def test_any_altered_byte_of_the_head_is_found(at: int, byte: int) -> None:
    files, _ = sound_log()
    head = files[HEAD]
    assert len(head) == 95
    if head[at] == byte:
        byte ^= 1
    assert named(found({**files, HEAD: head[:at] + bytes([byte]) + head[at + 1 :]}), Damage.HEAD)


sizes = st.integers(MIN_SEGMENT_BYTES, 2 * MIN_SEGMENT_BYTES)
texts = st.builds(str.__mul__, st.text(max_size=8), st.integers(0, 300))
uses = st.lists(st.tuples(sizes, st.lists(st.tuples(st.sampled_from(Kind), texts), max_size=40)), max_size=6)


@given(uses, st.sampled_from([None, 1, 5]))
@settings(lawful, max_examples=examples(60))
def test_no_history_of_use_breaks_numbers_chain_bound_or_count(
    history: list[tuple[int, list[tuple[Kind, str]]]], limit: int | None
) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def clock() -> datetime:
        return now

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        written, offered = [], 0
        for size, events in history:
            with EventLog(directory, segment_bytes=size, max_bytes=3 * size, max_per_second=limit, clock=clock) as log:
                for kind, text in events:
                    now += timedelta(milliseconds=300)
                    offered += 1
                    record = log.append(Event(kind, text))
                    written += [record] if record else []
                    if record:
                        assert sum(path.stat().st_size for path in directory.glob("events-*")) <= 3 * size
        if not history:
            return
        records = list(read(directory))
        verdict = verify(directory)
        assert verdict.ok, verdict.problems
        first = records[0].seq if records else 1
        assert [record.seq for record in records] == list(range(first, first + len(records)))
        assert [r for r in written if r.seq >= first] == [r for r in records if not r.data.get("reason")]
        if first == 1:
            counts = [record.data["counts"] for record in records if record.data.get("reason") == "rate"]
            dropped = sum(sum(count.values()) for count in counts)  # type: ignore[union-attr,misc,arg-type]
            assert dropped == offered - len(written)
