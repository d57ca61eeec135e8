"""Writes of somebody else's flow, told in the fields that we know: for readers of text and of the wire alike.

Open vSwitch has several names for one place (`reg0` and half of `xreg0`). A write by a name that the prover has no bits
for would be a write that it does not see, so none is left. Imports fields and flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from controller import fields
from controller.fields import Field
from controller.flow import Action, Aside, Bits, Load, Move, SetField, whole

_LOAD_BITS: Final = 64
"""So many bits one load can write."""


def written(target: Bits, value: int) -> list[Action] | None:
    """The writes of a constant into bits of a field, in fields that we know them by; None where there are no such."""
    if target.header == fields.IP_TOS.header:
        return [SetField(fields.IP_DSCP.header, value >> 2)] if target == whole(fields.IP_TOS) else None
    out: list[Action] = []
    for header, start, width in fields.parts(*target):
        out += _written(Bits(header, start, width), value & (1 << width) - 1)
        value >>= width
    return out


def _written(target: Bits, value: int) -> Iterator[Action]:
    if target == whole(fields.by_header(target.header)):
        yield SetField(target.header, value)
        return
    header, start, width = target
    while width:
        run = min(width, _LOAD_BITS)
        yield Load(value & (1 << run) - 1, Bits(header, start, run))
        value, start, width = value >> run, start + run, width - run


def masked(of: Field, value: int, mask: int) -> list[Action] | None:
    """The writes of a value where a mask has ones: one for each run of them. None as of `written`."""
    out: list[Action] = []
    at = 0
    while mask >> at:
        at += ((mask >> at) & -(mask >> at)).bit_length() - 1
        run = ((mask >> at) + 1 & ~(mask >> at)).bit_length() - 1
        run_written = written(Bits(of.header, at, run), value >> at & (1 << run) - 1)
        if run_written is None:
            return None
        out += run_written
        at += run
    return out


def moved(source: Bits, target: Bits) -> list[Action] | None:
    """The copies of bits into bits, in fields that we know them by; None where they cannot be told so."""
    if fields.IP_TOS.header in (source.header, target.header):
        return None
    sources, targets = fields.parts(*source), fields.parts(*target)
    if len(sources) == 1 and len(targets) == 1:
        return [Move(Bits(*sources[0]), Bits(*targets[0]))]
    if {part[0] for part in sources} & {part[0] for part in targets}:
        return None  # one after the other, they would read what was just written
    return [Move(one, other) for one, other in paired(sources, targets)]


def paired(sources: list[tuple[int, int, int]], targets: list[tuple[int, int, int]]) -> Iterator[tuple[Bits, Bits]]:
    """Two runs of one width in pieces that have one field each."""
    one, other = 0, 0
    (header, start, left), (to_header, to_start, to_left) = sources[0], targets[0]
    while True:
        run = min(left, to_left)
        yield Bits(header, start, run), Bits(to_header, to_start, run)
        start, left, to_start, to_left = start + run, left - run, to_start + run, to_left - run
        if not left:
            one += 1
            if one == len(sources):
                return
            header, start, left = sources[one]
        if not to_left:
            other += 1
            to_header, to_start, to_left = targets[other]


def note(data: bytes) -> Aside:
    """A note, with the zeros that the switch puts behind it."""
    size = max(6, len(data) + (-(len(data) + 2) % 8))
    return Aside("note:" + ".".join(f"{byte:02x}" for byte in data.ljust(size, b"\0")))
