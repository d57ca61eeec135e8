"""Writes of somebody else's flow, told in the fields that we know: for readers of text and of the wire alike.

Open vSwitch has several names for one place (`reg0` and half of `xreg0`). A write by a name that the prover has no bits
for would be a write that it does not see, so none is left. Imports fields and flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from controller import fields
from controller.fields import Field
from controller.flow import Action, Aside, Bits, Clone, Load, Match, Move, Raw, SetField, whole

FOLLOWED: Final = frozenset((fields.IN_PORT, fields.NORMAL, fields.FLOOD, fields.ALL, fields.CONTROLLER, fields.LOCAL))
"""The reserved ports of which it is known what an output to them does."""
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


_NEEDS: Final = {
    **dict.fromkeys((fields.IPV4_SRC.header, fields.IPV4_DST.header), ((0x0800,), None)),
    **dict.fromkeys((fields.TCP_SRC.header, fields.TCP_DST.header), ((0x0800, 0x86DD), 6)),
    **dict.fromkeys((fields.UDP_SRC.header, fields.UDP_DST.header), ((0x0800, 0x86DD), 17)),
    **dict.fromkeys((fields.SCTP_SRC.header, fields.SCTP_DST.header), ((0x0800, 0x86DD), 132)),
}
"""The Ethernet types and the IP protocol that a packet must have for a write of these fields to do anything."""


def settled(actions: tuple[Action, ...], match: Match) -> tuple[Action, ...]:
    """The actions, with `Raw` for writes that Open vSwitch does to some of the packets only.

    OpenFlow 1.0 lets `mod_nw_src` stand in a flow that matches anything: it is done to IPv4 packets then, and other
    versions show it as `set_field`. Fields share places (`controller.verify.space`), so to do it to all is not more.
    """
    if not any(
        (isinstance(action, SetField) and action.header in _NEEDS) or isinstance(action, Clone) for action in actions
    ):
        return actions
    return tuple(_settle(action, match) for action in actions)


def _settle(action: Action, match: Match) -> Action:
    if isinstance(action, Clone):
        return Clone(settled(action.actions, match))
    needed = _NEEDS.get(action.header) if isinstance(action, SetField) else None
    if needed is None:
        return action
    eth_type, proto = match.get(fields.ETH_TYPE), match.get(fields.IP_PROTO)
    met = eth_type is not None and eth_type[0] in needed[0]
    met = met and (needed[1] is None or (proto is not None and proto[0] == needed[1]))
    return action if met else Raw(text=str(action))
