"""Records as lines for people, and moments as people write them.

Whatever comes from packets and names is escaped: a container must not be able to move the cursor, set colours or hide
text in the terminal of whoever looks at the log. May import `controller.events` only.
"""

from __future__ import annotations

import re
import textwrap
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import Final

from controller.events import Kind, Record, Severity, severity

_KIND_WIDTH: Final = max(len(kind) for kind in Kind)
_STYLES: Final = {Severity.INFO: "green", Severity.WARNING: "yellow", Severity.ALARM: "bold red"}
_INDENT: Final = " " * 4
_MIN_WIDTH: Final = 60

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}[smhdw])+", re.ASCII)
_PART: Final = re.compile(r"([0-9]+)([smhdw])", re.ASCII)
_CLOCK: Final = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?", re.ASCII)


def escape(text: str) -> str:
    """The text with everything that does not print, or prints somewhere else than it stands, written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_record(record: Record, colour: bool = False, width: int | None = None) -> str:
    """The record as text: time, number, kind, network/bridge, what it is about, the sentence, flow and packet.

    One line without `width`, so that it can be searched by line. With `width`, flow and packet stand below where they
    do not fit, and longer lines are broken and indented; nothing is left out.
    """
    kind = str(record.kind).ljust(_KIND_WIDTH)
    number = "-" if record.is_notice else str(record.seq)
    start = f"{record.time.astimezone(UTC):%H:%M:%S}.{record.time.microsecond // 1000:03d} {number:>6} "
    rest = " ".join(escape(part) for part in (*_places(record), record.text) if part)
    details = [
        f"{name}: {escape(value)}" for name, value in (("flow", record.flow), ("packet", record.packet)) if value
    ]
    lines = _laid_out(f"{start}{kind} {rest}", details, width)
    if colour:
        # The kind stands whole in the first line: no line is broken before it ends.
        lines[0] = lines[0].replace(kind.rstrip(), _coloured(kind.rstrip(), record.kind), 1)
    return "\n".join(lines)


def _places(record: Record) -> tuple[str, str]:
    """Where it happened (network/bridge) and what it is about (container/app/object), each as far as known."""
    where = "/".join(part for part in (record.network, record.bridge) if part)
    about = "/".join(part for part in (record.container, record.app, record.object) if part)
    return (f"[{where}]" if where else "", f"{about}:" if about else "")


def _laid_out(line: str, details: list[str], width: int | None) -> list[str]:
    inline = "  ".join([line, *(f"({detail})" for detail in details)])
    if width is None or len(inline) <= width:
        return [inline]
    width = max(width, _MIN_WIDTH)
    lines = _wrapped(line, width, "")
    for detail in details:
        lines += _wrapped(detail, width, _INDENT)
    return lines


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        line,
        width,
        initial_indent=indent,
        subsequent_indent=indent + _INDENT,
        replace_whitespace=False,
        drop_whitespace=False,
        break_on_hyphens=False,
    )


def _coloured(text: str, kind: Kind) -> str:
    # Only here, so that programs which want no colour do not need rich.
    from rich.color import ColorSystem
    from rich.style import Style

    return Style.parse(_STYLES[severity(kind)]).render(text, color_system=ColorSystem.STANDARD)


def parse_since(text: str, now: datetime | None = None) -> datetime:
    """The moment in UTC that is meant by `10m`, `1h30m`, `12:30` or `2026-01-01T00:00:00Z`.

    Units are s, m, h, d and w, counted back from `now`. A time of day is the last such time in UTC. A date or time
    without a zone is UTC. Raises `ValueError` that says what is understood.
    """
    now = now or datetime.now(UTC)
    text = text.strip()
    try:
        if _DURATION.fullmatch(text):
            return now - sum((timedelta(**{_UNITS[unit]: int(n)}) for n, unit in _PART.findall(text)), timedelta())
        if clock := _CLOCK.fullmatch(text):
            hour, minute, second = (int(part or 0) for part in clock.groups())
            return _last_time(time_of_day(hour, minute, second, tzinfo=UTC), now)
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise ValueError(
            f"{escape(text)!r} is not a moment. Write how long ago (10m, 2h, 1d12h), a time of day in UTC (12:30), "
            "or a date and time (2026-01-01T00:00:00Z)."
        ) from exc


def _last_time(clock: time_of_day, now: datetime) -> datetime:
    today: date = now.astimezone(UTC).date()
    moment = datetime.combine(today, clock)
    return moment if moment <= now else moment - timedelta(days=1)
