"""The header space: every field that a flow may match or write, laid out as bits of one integer.

A *cube* is (value, mask): the headers that agree with `value` where `mask` has ones. Fields that Open vSwitch keeps in
one place share bits here too: an ARP sender and an IPv4 source, ports of TCP, UDP and SCTP and the ICMP type and code
(`struct flow`; what a field needs is matched beside it, OpenFlow 1.4.1, 7.2.3.8). The ingress port is not part of it:
regions hold it apart, as a set of ports. Imports fields and flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from controller import fields
from controller.fields import Field
from controller.flow import Match

Cube = tuple[int, int]

ALL: Cube = (0, 0)
"""Every header."""

_SHARED = (
    (fields.ETH_TYPE,),
    (fields.IPV4_DST, fields.ARP_TPA),
    (fields.IPV4_SRC, fields.ARP_SPA),
    (fields.ETH_SRC,),
    (fields.ETH_DST,),
    (fields.IP_PROTO,),
    (fields.TCP_SRC, fields.UDP_SRC, fields.SCTP_SRC, fields.ICMPV4_TYPE, fields.ICMPV6_TYPE),
    (fields.TCP_DST, fields.UDP_DST, fields.SCTP_DST, fields.ICMPV4_CODE, fields.ICMPV6_CODE),
    (fields.IP_FRAG,),
    (fields.VLAN_VID,),
    *((reg,) for reg in fields.REGS),
    (fields.ARP_OP,),
    (fields.ARP_SHA,),
    (fields.ARP_THA,),
    (fields.IP_DSCP,),
    (fields.IP_ECN,),
    (fields.IP_TTL,),
    (fields.VLAN_PCP,),
    (fields.TCP_FLAGS,),
    (fields.METADATA,),
    (fields.TUNNEL_ID,),
    (fields.CT_STATE,),
    (fields.CT_ZONE,),
    (fields.CT_MARK,),
    (fields.IPV6_SRC,),
    (fields.IPV6_DST,),
)


def _layout() -> tuple[dict[int, tuple[int, int]], int]:
    places, at = {}, 0
    for group in _SHARED:
        width = max(field.bits for field in group)
        for field in group:
            places[field.header] = (at, field.bits)
        at += width
    return places, at


PLACES, WIDTH = _layout()
"""OXM header to (lowest bit, width); the number of bits in all."""

IN_PORTS = frozenset((fields.IN_PORT_FIELD.header, fields.IN_PORT_16.header))


def place(header: int) -> tuple[int, int] | None:
    """(lowest bit, width) of a field, or None for one that the space does not have."""
    return PLACES.get(fields.CANONICAL.get(header, header))


def bits(field: Field, value: int, mask: int | None = None) -> Cube:
    """The cube of one field."""
    at, _ = PLACES[field.header]
    mask = field.full if mask is None else mask
    return (value & mask) << at, mask << at


@lru_cache(maxsize=1 << 17)
def of_match(match: Match) -> tuple[Cube, int | None, bool]:
    """(cube, ingress port or None for any, exact) of a match.

    `exact` is False where a field lies outside the space: the cube then holds more than the match does.
    """
    value = mask = 0
    port, exact = None, True
    for header, item_value, item_mask in match:
        if header in IN_PORTS:
            port = item_value
            continue
        where = place(header)
        if where is None:
            exact = False
            continue
        value |= item_value << where[0]
        mask |= item_mask << where[0]
    return (value, mask), port, exact


def meet(a: Cube, b: Cube) -> Cube | None:
    """The headers in both, or None where there are none."""
    if (a[0] ^ b[0]) & a[1] & b[1]:
        return None
    return a[0] | b[0], a[1] | b[1]


def inside(a: Cube, b: Cube) -> bool:
    """Whether every header of `a` is in `b`."""
    return not b[1] & ~a[1] and not (a[0] ^ b[0]) & b[1]


def hull(a: Cube, b: Cube) -> Cube:
    """The smallest cube around both."""
    mask = a[1] & b[1] & ~(a[0] ^ b[0])
    return a[0] & mask, mask


class CubeSet:
    """Some cubes, grouped by what they compare so that `holds` need not look at each."""

    def __init__(self, cubes: Iterable[Cube] = ()) -> None:
        self.cubes = tuple(cubes)
        self._groups: dict[int, set[int]] = {}
        for value, mask in self.cubes:
            self._groups.setdefault(mask, set()).add(value)
        if len(self._groups) > 4:
            self._groups = dict(sorted(self._groups.items(), key=lambda group: -len(group[1])))

    def __iter__(self) -> Iterator[Cube]:
        return iter(self.cubes)

    def __len__(self) -> int:
        return len(self.cubes)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, CubeSet) and self._groups == other._groups)

    def __hash__(self) -> int:
        return hash(frozenset(self.cubes))

    def holds(self, cube: Cube) -> bool:
        """Whether all of `cube` is in one of these."""
        value, mask = cube
        for theirs, values in self._groups.items():  # noqa: SIM110  (a generator takes thrice as long)
            if not theirs & ~mask and value & theirs in values:
                return True
        return False

    def beyond(self, other: CubeSet) -> Iterator[Cube]:
        """Those that are not one of the others."""
        for mask, values in self._groups.items():
            for value in values - other._groups.get(mask, set()):
                yield value, mask

    def within(self, other: CubeSet) -> bool:
        """Whether each of these is one of the others."""
        return all(values <= other._groups.get(mask, set()) for mask, values in self._groups.items())


def get(header: int, field: Field) -> int:
    """The value of a field in one concrete header."""
    at, width = PLACES[field.header]
    return header >> at & (1 << width) - 1


def _clear(*cleared: Field) -> Cube:
    return 0, sum(bits(field, 0)[1] for field in cleared)


ENTERING: Cube = _clear(*fields.REGS, fields.METADATA, fields.CT_STATE, fields.CT_ZONE, fields.CT_MARK)
"""Every packet that can enter by a port: registers and metadata are clear then, and no connection is tracked yet."""
