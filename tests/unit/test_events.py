"""Events and records as values, their one spelling, and how they look to people."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from controller.events import (
    GENESIS,
    Event,
    GarbledRecord,
    Kind,
    Record,
    Severity,
    decode,
    encode,
    notice,
    seal,
    severity,
)
from controller.eventview import escape, format_record, parse_since

NOON = datetime(2026, 1, 2, 12, 0, 0, 42, tzinfo=UTC)


def violation() -> Event:
    return Event(
        Kind.VIOLATION,
        "xray tried to reach management; ask its owner",
        bridge="vmbr0",
        network="privacy",
        container="xray",
        flow="table=4,priority=100,ip,nw_dst=10.1.0.0/24",
        packet="tcp 10.0.0.100:40000 > 10.1.0.200:22",
        data={"count": 3, "ports": [1, 2], "more": {"b": None, "a": 1.5}},
    )


def sealed(event: Event | None = None, seq: int = 1) -> Record:
    return seal(event or violation(), seq=seq, time=NOON, prev=GENESIS)


def respelt(record: Record, **changes: object) -> bytes:
    """The record's line with other fields and a hash that fits them, as a forger would write it."""
    fields = {**json.loads(encode(record)), **changes}
    del fields["hash"]
    fields = {key: value for key, value in fields.items() if value != "gone"}
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    fields["hash"] = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class TestEvent:
    def test_data_is_a_copy_that_cannot_change(self) -> None:
        ports = [1, 2]
        data = {"ports": ports}
        event = Event(Kind.STATE_APPLIED, "applied", data=data)
        ports.append(3)
        data["more"] = []
        assert event.data == {"ports": (1, 2)}
        with pytest.raises(TypeError):
            event.data["ports"] = 1  # type: ignore[index]

    def test_equal_events_are_equal_and_hash_alike(self) -> None:
        assert violation() == violation()
        assert hash(violation()) == hash(violation())
        assert violation() != Event(Kind.VIOLATION, "another")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**64, -(2**63) - 1])
    def test_numbers_json_cannot_carry_are_refused(self, value: float) -> None:
        with pytest.raises(ValueError, match=r"data\.x\[0\]"):
            Event(Kind.LOST, "text", data={"x": [value]})

    @pytest.mark.parametrize("value", [b"bytes", {1, 2}, Path("/"), {1: 2}])
    def test_values_json_does_not_know_are_refused(self, value: object) -> None:
        with pytest.raises(TypeError):
            Event(Kind.LOST, "text", data={"x": value})  # type: ignore[dict-item]

    def test_endless_nesting_is_refused(self) -> None:
        data: dict[str, object] = {}
        data["self"] = data
        with pytest.raises(ValueError, match="nested"):
            Event(Kind.LOST, "text", data=data)  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["text", "bridge", "object", "packet"])
    def test_a_field_that_is_no_string_is_refused(self, name: str) -> None:
        with pytest.raises(TypeError, match=name):
            Event(**{"kind": Kind.LOST, "text": "text", name: 7})  # type: ignore[arg-type]

    def test_a_kind_that_is_a_plain_string_is_refused(self) -> None:
        with pytest.raises(TypeError, match="Kind"):
            Event("lost", "text")  # type: ignore[arg-type]

    def test_a_lone_surrogate_of_a_name_can_be_written(self) -> None:
        record = sealed(Event(Kind.PORT_UP, "up", object="veth\udcff", data={"\udc80": "\udc80"}))
        assert decode(encode(record)) == record
        assert record.object == "veth\\udcff"

    def test_severities(self) -> None:
        assert severity(Kind.VIOLATION) is Severity.ALARM
        assert severity(Kind.LOST) is Severity.WARNING
        assert severity(Kind.PORT_UP) is Severity.INFO
        assert {severity(kind) for kind in Kind} == set(Severity)


class TestSpelling:
    def test_a_line_is_canonical_json_and_its_hash_covers_the_rest(self) -> None:
        line = encode(sealed(Event(Kind.PORT_UP, "é up", bridge="vmbr0")))
        body = (
            f'{{"bridge":"vmbr0","kind":"port_up","prev":"{GENESIS}",'
            '"seq":1,"text":"é up","time":"2026-01-02T12:00:00.000042Z"}'
        )
        digest = hashlib.sha256(body.encode()).hexdigest()
        assert line.decode() == body.replace('"kind"', f'"hash":"{digest}","kind"')

    def test_encode_and_decode_are_inverse(self) -> None:
        record = sealed()
        assert decode(encode(record)) == record
        assert isinstance(decode(encode(record)).kind, Kind)

    def test_another_zone_is_the_same_moment(self) -> None:
        elsewhere = NOON.astimezone(timezone(timedelta(hours=5)))
        assert seal(violation(), seq=1, time=elsewhere, prev=GENESIS).hash == sealed().hash

    def test_a_time_without_zone_is_refused(self) -> None:
        with pytest.raises(ValueError, match="zone"):
            seal(violation(), seq=1, time=datetime(2026, 1, 1), prev=GENESIS)

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b"\x00" * 40,
            b"\xff",
            b"[]",
            b"17",
            b"{}",
            b'{"seq":NaN}',
            b'{"seq":true}',
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"seq":' + b"9" * 5000 + b"}",
        ],
    )
    def test_garbage_is_a_typed_error(self, line: bytes) -> None:
        with pytest.raises(GarbledRecord) as caught:
            decode(line)
        assert not caught.value.altered

    def test_an_altered_record_tells_its_number(self) -> None:
        with pytest.raises(GarbledRecord, match="hash") as caught:
            decode(encode(sealed(seq=12)).replace(b"xray tried", b"nobody    "))
        assert caught.value.seq == 12
        assert caught.value.altered

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"seq":12', b'"seq": 12'),
            (b'"seq":12', b'"seq":12,"seq":12'),
            (b"xray tried", b"xr\\u0061y tried"),
            (b'{"bridge"', b'{"app":null,"bridge"'),
        ],
    )
    def test_another_spelling_of_the_same_record_is_refused(self, old: bytes, new: bytes) -> None:
        line = encode(sealed(seq=12))
        with pytest.raises(GarbledRecord):
            decode(line.replace(old, new, 1))

    def test_respelt_is_the_spelling_of_encode(self) -> None:
        assert respelt(sealed()) == encode(sealed())

    @pytest.mark.parametrize(
        "changes",
        [
            {"kind": "no_such"},
            {"kind": "gone"},
            {"time": "2026-01-02T12:00:00Z"},
            {"time": "2026-13-02T12:00:00.000042Z"},
            {"prev": "0"},
            {"seq": 0},
            {"seq": 2**63},
            {"seq": "1"},
            {"text": None},
            {"bridge": 7},
            {"data": {}},
            {"data": []},
            {"data": {"x": 2**70}},
            {"extra": "x"},
        ],
    )
    def test_a_forged_record_of_another_shape_is_refused(self, changes: dict[str, object]) -> None:
        with pytest.raises(GarbledRecord):
            decode(respelt(sealed(), **changes))


class TestView:
    def test_one_line_with_everything(self) -> None:
        assert format_record(sealed(seq=17)) == (
            "12:00:00.000     17 violation          [privacy/vmbr0] xray: xray tried to reach management; ask its "
            "owner  (flow: table=4,priority=100,ip,nw_dst=10.1.0.0/24)  (packet: tcp 10.0.0.100:40000 > 10.1.0.200:22)"
        )

    def test_what_is_unknown_leaves_no_trace(self) -> None:
        line = format_record(sealed(Event(Kind.CONTROLLER_STARTED, "started")))
        assert line == "12:00:00.000      1 controller_started started"

    @pytest.mark.parametrize("colour", [False, True])
    @pytest.mark.parametrize("field", ["text", "bridge", "network", "app", "object", "container", "flow", "packet"])
    @pytest.mark.parametrize("evil", ["\x1b[2J", "\r", "\n", "\x9b31m", "\u202e", "\x7f", "\u2028", "\x00"])
    def test_nothing_from_outside_reaches_the_terminal(self, field: str, evil: str, colour: bool) -> None:
        event = Event(**{"kind": Kind.PORT_UP, "text": "up", field: f"a{evil}b"})  # type: ignore[arg-type]
        out = format_record(sealed(event), colour=colour).replace("\x1b[32m", "").replace("\x1b[0m", "")
        assert out.isprintable()
        assert f"a{escape(evil)}b" in out

    def test_markup_of_the_colouring_library_is_text(self) -> None:
        out = format_record(sealed(Event(Kind.PORT_UP, "[bold red]x[/]")), colour=True)
        assert "[bold red]x[/]" in out

    def test_colour_only_if_told_and_by_severity(self) -> None:
        assert "\x1b" not in format_record(sealed())
        assert "\x1b[1;31mviolation\x1b[0m" in format_record(sealed(), colour=True)
        assert "\x1b[33mlost\x1b[0m" in format_record(sealed(Event(Kind.LOST, "lost 2 events")), colour=True)

    def test_a_narrow_terminal_gets_indented_lines_and_loses_nothing(self) -> None:
        lines = format_record(sealed(), width=80).split("\n")
        assert all(len(line) <= 80 for line in lines)
        assert "    flow: table=4,priority=100,ip,nw_dst=10.1.0.0/24" in lines
        assert "    packet: tcp 10.0.0.100:40000 > 10.1.0.200:22" in lines
        assert "".join("".join(lines).split()) == "".join(
            format_record(sealed())
            .replace("(flow", "flow")
            .replace("/24)", "/24")
            .replace("(pack", "pack")[:-1]
            .split()
        )

    def test_a_wide_terminal_gets_one_line(self) -> None:
        assert format_record(sealed(), width=500) == format_record(sealed())

    def test_a_notice_has_no_number(self) -> None:
        remark = notice(Event(Kind.LOST, "removed before being read"), seq=9, time=NOON)
        assert remark.is_notice
        assert format_record(remark) == "12:00:00.000      - lost               removed before being read"


class TestSince:
    @pytest.mark.parametrize(
        ("text", "ago"),
        [
            ("10m", timedelta(minutes=10)),
            ("2h", timedelta(hours=2)),
            ("1d12h", timedelta(days=1, hours=12)),
            (" 1w ", timedelta(weeks=1)),
            ("0s", timedelta()),
            ("11:30", timedelta(minutes=30, microseconds=42)),
            ("12:00:00", timedelta(microseconds=42)),
            ("12:01", timedelta(hours=23, minutes=59, microseconds=42)),
        ],
    )
    def test_relative(self, text: str, ago: timedelta) -> None:
        assert parse_since(text, NOON) == NOON - ago

    @pytest.mark.parametrize(
        "text", ["2026-01-01T00:00:00Z", "2026-01-01", "2026-01-01 00:00", "2026-01-01T02:00:00+02:00"]
    )
    def test_absolute(self, text: str) -> None:
        moment = parse_since(text, NOON)
        assert moment == datetime(2026, 1, 1, tzinfo=UTC)
        assert moment.utcoffset() == timedelta()

    @pytest.mark.parametrize("text", ["", "10", "m", "10 minutes", "25:00", "12:60", "999999999w", "-5m", "\x1b[2J"])
    def test_nonsense_is_answered_with_what_is_understood(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"10m, 2h.*12:30.*2026-01-01T00:00:00Z") as caught:
            parse_since(text, NOON)
        assert str(caught.value).isprintable()
