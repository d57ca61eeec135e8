"""Flows, matches and actions as values: comparable, hashable, printable as ovs-ofctl syntax.

The wire form is `controller.codec`'s affair, os-ken's objects are the shell's. Imports fields and address types only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from controller import fields
from controller.fields import BY_NAME, Field

MatchItem = tuple[int, int, int]
"""(OXM header, value, mask); the value has no bits outside the mask."""


class Match(tuple[MatchItem, ...]):
    """What a flow matches: items sorted by header, at most one for a field. Equal matches are equal tuples."""

    __slots__ = ()

    @classmethod
    def of(cls, items: Iterable[MatchItem]) -> Match:
        """A match of items in any order. Items with an empty mask match everything and are left out."""
        return cls(sorted(item for item in items if item[2]))

    @classmethod
    def named(cls, **values: object) -> Match:
        """A match by field name; a value is an integer or a pair (value, mask).

        Raises `KeyError` for an unknown field and `ValueError` for a value that does not fit it.
        """
        return cls.of(match_item(BY_NAME[name], value) for name, value in values.items())

    def get(self, wanted: Field) -> tuple[int, int] | None:
        """(value, mask) of that field, or None where it is not matched."""
        for header, value, mask in self:
            if header == wanted.header:
                return value, mask
        return None

    def overlaps(self, other: Match) -> bool:
        """Whether some packet matches both."""
        mine = {header: (value, mask) for header, value, mask in self}
        for header, value, mask in other:
            if header in mine:
                my_value, my_mask = mine[header]
                if (value ^ my_value) & mask & my_mask:
                    return False
        return True

    def __str__(self) -> str:
        values = {header: value for header, value, _ in self}
        eth_type, proto = values.get(fields.ETH_TYPE.header), values.get(fields.IP_PROTO.header)
        words: list[str] = []
        said: set[int] = set()
        if (eth_type, proto) in _KEYWORDS:
            words, said = [_KEYWORDS[eth_type, proto]], {fields.ETH_TYPE.header, fields.IP_PROTO.header}
        elif (eth_type, None) in _KEYWORDS:
            words, said = [_KEYWORDS[eth_type, None]], {fields.ETH_TYPE.header}
        items = [item for item in self if item[0] not in said]
        if any(header == fields.VLAN_PCP.header for header, _, _ in items):
            words += _vlan_words(items)
        words += (fields.by_header(h).text(v, m) for h, v, m in items)
        return ",".join(words)


def _vlan_words(items: list[MatchItem]) -> list[str]:
    """What is said of the VLAN tag as ovs-ofctl can say it, taken out of `items`.

    It takes a priority alone for "has a tag" as well, and no mask for it.
    """
    tag = dict.fromkeys((fields.VLAN_VID.header, fields.VLAN_PCP.header), (0, 0))
    tag |= {header: (value, mask) for header, value, mask in items if header in tag}
    (vid, vid_mask), (pcp, pcp_mask) = tag.values()
    if vid & vid_mask & 0x1000 and pcp_mask == fields.VLAN_PCP.full:
        return []
    items[:] = [item for item in items if item[0] not in tag]
    return [f"vlan_tci={pcp << 13 | vid:#06x}/{pcp_mask << 13 | vid_mask:#06x}"]


_KEYWORDS: dict[tuple[int | None, int | None], str] = {
    (0x0800, None): "ip",
    (0x0806, None): "arp",
    (0x86DD, None): "ipv6",
    (0x0800, 1): "icmp",
    (0x0800, 6): "tcp",
    (0x0800, 17): "udp",
    (0x0800, 132): "sctp",
    (0x86DD, 6): "tcp6",
    (0x86DD, 17): "udp6",
    (0x86DD, 58): "icmp6",
}


def match_item(of: Field, value: object) -> MatchItem:
    """One item; `value` is an integer or (value, mask), and bits outside the mask are an error."""
    number, mask = value if isinstance(value, tuple) else (value, of.full)
    if not isinstance(number, int) or not isinstance(mask, int):
        raise ValueError(f"{of.name}: {value!r} is not an integer or a pair of integers")
    if number & ~mask or mask & ~of.full:
        raise ValueError(f"{of.name}={number:#x}/{mask:#x} does not fit {of.bits} bits or sets bits outside its mask")
    if mask != of.full and not of.maskable:
        raise ValueError(f"{of.name} cannot be masked")
    return of.header, int(number), int(mask)


@dataclass(frozen=True, slots=True)
class Output:
    """Send to a port. `max_len` bytes of it when the port is the controller; for others 0 is all of it."""

    port: int
    max_len: int = 0

    def __str__(self) -> str:
        if self.port == fields.CONTROLLER:
            return f"CONTROLLER:{self.max_len}"
        if self.max_len:
            return f"output(port={fields.IN_PORT_FIELD.show(self.port)},max_len={self.max_len})"
        if self.port in (fields.IN_PORT, fields.LOCAL, fields.NORMAL):
            return fields.IN_PORT_FIELD.show(self.port)
        return {fields.FLOOD: "FLOOD", fields.ALL: "ALL"}.get(self.port, f"output:{self.port}")


@dataclass(frozen=True, slots=True)
class SetField:
    """Write a constant over a whole field."""

    header: int
    value: int

    def __str__(self) -> str:
        of = fields.by_header(self.header)
        if of is fields.VLAN_VID or of is fields.VLAN_PCP:
            return str(Load(self.value, whole(of)))
        # As actions call them: in_port is the one of 16 bits.
        name = {fields.IN_PORT_16: "in_port", fields.IN_PORT_FIELD: "in_port_oxm"}.get(of, of.ofctl)
        return f"set_field:{of.show(self.value)}->{name}"


class Bits(NamedTuple):
    """A run of bits of a field: `NXM_NX_REG1[0..15]`."""

    header: int
    start: int
    width: int

    def __str__(self) -> str:
        of = fields.by_header(self.header)
        name, start = of.ofctl, self.start
        if of is fields.VLAN_VID or of is fields.VLAN_PCP:
            # By these names ovs-ofctl takes them only beside a match that says there is a tag.
            name, start = "NXM_OF_VLAN_TCI", start + (13 if of is fields.VLAN_PCP else 0)
        elif of is fields.IN_PORT_FIELD:
            name = "OXM_OF_IN_PORT"  # in_port is the one of 16 bits here
        if self.start == 0 and self.width == of.bits and start == 0 and of is not fields.VLAN_VID:
            return f"{name}[]"
        return f"{name}[{start}..{start + self.width - 1}]" if self.width > 1 else f"{name}[{start}]"


def whole(of: Field) -> Bits:
    """All bits of a field."""
    return Bits(of.header, 0, of.bits)


@dataclass(frozen=True, slots=True)
class Move:
    """Copy bits from one field into another (Nicira reg_move)."""

    source: Bits
    target: Bits

    def __str__(self) -> str:
        return f"move:{self.source}->{self.target}"


@dataclass(frozen=True, slots=True)
class Load:
    """Write a constant into some bits of a field (Nicira reg_load)."""

    value: int
    target: Bits

    def __str__(self) -> str:
        return f"load:{self.value:#x}->{self.target}"


@dataclass(frozen=True, slots=True)
class Resubmit:
    """Look the packet up in another table too, then go on (Nicira resubmit_table)."""

    table: int

    def __str__(self) -> str:
        return f"resubmit(,{self.table})"


@dataclass(frozen=True, slots=True)
class LearnMatch:
    """The learned flow matches `target` against a constant, or against what `source` holds now."""

    target: Bits
    source: Bits | int

    def __str__(self) -> str:
        if not isinstance(self.source, int):
            return f"{self.target}={self.source}"
        of = fields.by_header(self.target.header)
        if self.target != whole(of) or of in (fields.VLAN_VID, fields.VLAN_PCP):
            return f"{self.target}={self.source:#x}"
        if of is fields.IN_PORT_FIELD:
            return f"in_port_oxm={of.show(self.source)}"
        return f"{of.ofctl}={of.show(self.source)}"


@dataclass(frozen=True, slots=True)
class LearnLoad:
    """The learned flow loads a constant, or what `source` holds now, into `target`."""

    source: Bits | int
    target: Bits

    def __str__(self) -> str:
        value = f"{self.source:#x}" if isinstance(self.source, int) else str(self.source)
        return f"load:{value}->{self.target}"


@dataclass(frozen=True, slots=True)
class LearnOutput:
    """The learned flow outputs to the port that `source` holds now."""

    source: Bits

    def __str__(self) -> str:
        return f"output:{self.source}"


LearnSpec = LearnMatch | LearnLoad | LearnOutput

SEND_FLOW_REM = 1
DELETE_LEARNED = 2
"""Of a learn action: the flows that it made go when the flow that it stands in does."""


@dataclass(frozen=True, slots=True)
class Learn:
    """Add or refresh a flow in `table` (Nicira learn2, with a limit: `ovs-actions(7)`).

    Times are seconds, `fin_` those after a TCP connection has ended; `limit` counts flows of that table and cookie, 0 is
    none. With `SEND_FLOW_REM` among the `flags` the switch tells us when such a flow ends.
    """

    table: int
    priority: int
    cookie: int
    idle_s: int
    hard_s: int
    limit: int
    specs: tuple[LearnSpec, ...]
    flags: int = SEND_FLOW_REM
    fin_idle_s: int = 0
    fin_hard_s: int = 0

    def __str__(self) -> str:
        head = f"table={self.table},idle_timeout={self.idle_s},hard_timeout={self.hard_s}"
        if self.fin_idle_s:
            head += f",fin_idle_timeout={self.fin_idle_s}"
        if self.fin_hard_s:
            head += f",fin_hard_timeout={self.fin_hard_s}"
        head += f",priority={self.priority}"
        if self.flags & SEND_FLOW_REM:
            head += ",send_flow_rem"
        if self.flags & DELETE_LEARNED:
            head += ",delete_learned"
        head += f",cookie={self.cookie:#x}"
        if self.limit:
            head += f",limit={self.limit}"
        return ",".join((f"learn({head}", *map(str, self.specs))) + ")"


@dataclass(frozen=True, slots=True)
class Ct:
    """Look the packet's connection up, or commit it (Nicira ct: `ovs-actions(7)`).

    With a `table` a copy of the packet goes on there and knows `ct_state`; what stands behind is done to the packet as
    it was. `nat` is its text, empty for none; `actions` set ct_mark and ct_label of a committed connection.
    """

    zone: int | Bits = 0
    table: int | None = None
    commit: bool = False
    force: bool = False
    nat: str = ""
    actions: tuple[Action, ...] = ()

    def __str__(self) -> str:
        parts = [word for word, said in (("commit", self.commit), ("force", self.force)) if said]
        if self.table is not None:
            parts.append(f"table={self.table}")
        if self.zone != 0:
            parts.append(f"zone={self.zone}")
        if self.nat:
            parts.append(self.nat)
        if self.actions:
            parts.append(f"exec({','.join(map(str, self.actions))})")
        return f"ct({','.join(parts)})"


@dataclass(frozen=True, slots=True)
class CtClear:
    """Forget what is known of the packet's connection."""

    def __str__(self) -> str:
        return "ct_clear"


@dataclass(frozen=True, slots=True)
class PopVlan:
    """Take the outer VLAN tag away."""

    def __str__(self) -> str:
        return "pop_vlan"


@dataclass(frozen=True, slots=True)
class DecTtl:
    """One hop less to live; a packet that has none left drops."""

    def __str__(self) -> str:
        return "dec_ttl"


@dataclass(frozen=True, slots=True)
class Clone:
    """Do this to a copy of the packet, and go on with the packet as it was."""

    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return f"clone({','.join(map(str, self.actions))})"


@dataclass(frozen=True, slots=True)
class Aside:
    """What does nothing to a packet nor to where it goes: a note, a queue, a meter (which may drop it)."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Raw:
    """An action of somebody else's flow that we do not decode; kept so that the flow can be compared and shown.

    `data` is as on the wire, or `text` as ovs-ofctl writes it.
    """

    data: bytes = b""
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"raw({self.data.hex()})"


Action = Output | SetField | Move | Load | Resubmit | Learn | Ct | CtClear | PopVlan | DecTtl | Clone | Aside | Raw


def every(actions: Iterable[Action]) -> Iterator[Action]:
    """The actions, and those that are done to copies."""
    for action in actions:
        yield action
        if isinstance(action, Clone):
            yield from every(action.actions)


FlowKey = bytes
"""Table, priority and match packed together: what identifies a flow in a switch. Bytes keep their hash, tuples do not."""


@lru_cache(maxsize=1 << 16)
def _item_key(item: MatchItem) -> bytes:
    header, value, mask = item
    size = (max(value, mask).bit_length() + 7) // 8
    return header.to_bytes(4, "big") + bytes([size]) + value.to_bytes(size, "big") + mask.to_bytes(size, "big")


@dataclass(frozen=True, slots=True)
class Flow:
    """One flow. `actions` empty and no `goto` means drop; `table` and `goto` are table ids; times are seconds."""

    table: int
    priority: int
    match: Match
    actions: tuple[Action, ...] = ()
    goto: int | None = None
    cookie: int = 0
    idle_s: int = 0
    hard_s: int = 0
    flags: int = 0
    key: FlowKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Four bytes of priority: what a switch hides (in-band control) stands above 65535.
        place = self.table << 32 | self.priority
        object.__setattr__(self, "key", place.to_bytes(5, "big") + b"".join(map(_item_key, self.match)))

    @property
    def effect(self) -> tuple[tuple[Action, ...], int | None]:
        """What happens to a packet; two overlapping flows of one effect do not contradict each other."""
        return self.actions, self.goto

    def __str__(self) -> str:
        head = [f"table={self.table}", f"priority={self.priority}"]
        if self.cookie:
            head.append(f"cookie={self.cookie:#x}")
        if self.idle_s:
            head.append(f"idle_timeout={self.idle_s}")
        if self.hard_s:
            head.append(f"hard_timeout={self.hard_s}")
        if self.flags & SEND_FLOW_REM:
            head.append("send_flow_rem")
        if self.match:
            head.append(str(self.match))
        return ",".join(head) + ",actions=" + self.actions_text

    @property
    def actions_text(self) -> str:
        """The actions in ovs-ofctl syntax, `drop` where there are none."""
        parts = [str(action) for action in self.actions]
        if self.goto is not None:
            parts.append(f"goto_table:{self.goto}")
        return ",".join(parts) or "drop"


OWNER = 0xB01C
"""The upper 16 bits of every cookie of ours."""
OWNER_MASK = 0xFFFF << 48
_LEARNED = 0x80


class Cookie(NamedTuple):
    """Who a flow belongs to: owner (16 bits) | app (8 bits, the top one for learned flows) | object (40 bits)."""

    app: int
    object: int
    learned: bool = False

    def __int__(self) -> int:
        return OWNER << 48 | (self.app | (_LEARNED if self.learned else 0)) << 40 | self.object

    @classmethod
    def of(cls, cookie: int) -> Cookie | None:
        """The parts of a cookie of ours, or None for somebody else's."""
        if cookie >> 48 != OWNER:
            return None
        app = cookie >> 40 & 0xFF
        return cls(app & ~_LEARNED, cookie & 0xFFFFFFFFFF, bool(app & _LEARNED))


def is_ours(cookie: int) -> bool:
    """Whether a cookie has our owner bits."""
    return cookie >> 48 == OWNER


def is_learned(cookie: int) -> bool:
    """Whether a cookie of ours belongs to a flow that the switch made itself with `learn`."""
    return is_ours(cookie) and bool(cookie >> 40 & _LEARNED)
