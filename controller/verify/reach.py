"""Who can reach whom, from the proof: every packet that one endpoint can send, and where it can come out.

A cell is empty only if no packet at all gets there. What gets through is told by kind of packet: the services that the
target declares, the ports that flows compare, and the rest of each protocol. Imports node and endpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from controller import fields
from controller.events import JSON
from controller.grants import openings
from controller.model import DesiredState
from controller.verify import space
from controller.verify.cubes import witness
from controller.verify.endpoints import Endpoint, endpoints, services, vpn_port
from controller.verify.explore import Region
from controller.verify.node import Arrival, Node
from controller.verify.packetwords import words
from controller.verify.policy import IP, PROTOCOLS, both, granted
from controller.verify.space import ALL, Cube, bits, get, meet

_PROTOCOL_NAMES = {number: name for name, (number, _, _) in PROTOCOLS.items()}
_IPV4 = bits(fields.ETH_TYPE, IP)
FRAMES = "frames"
"""What is not IPv4."""
_DST = fields.TCP_DST
"""The destination port of any protocol: they share their bits."""


class Kind(NamedTuple):
    """A kind of packet: those in `cube` and in none of `but`. `proto` and `port` say which, None is any other."""

    label: str
    cube: Cube
    but: tuple[Cube, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """What can get from one endpoint to another. Replies to what a grant lets the other open belong to the other's cell.

    `open`: kinds of packets that get there by themselves; `answers`: those that only follow what the target has sent.
    `kinds` are all there are, `example` is a packet that gets there, in ovs-ofctl's words.
    """

    kinds: tuple[str, ...]
    open: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    example: str = ""
    doubt: bool = False

    @property
    def text(self) -> str:
        """In a word or two, for a table."""
        if not self.open:
            return "answers" if self.answers else "no"
        sure = "?" if self.doubt else ""
        closed = [label for label in self.kinds if label not in self.open and label != FRAMES]
        frames = [FRAMES] if FRAMES in self.open else []
        if not closed:
            return " ".join(["all", *frames]) + sure
        if len(closed) <= 2 < len(self.open):
            return f"all but {' '.join(closed)}" + sure
        return " ".join(self.open) + sure

    def as_data(self) -> dict[str, JSON]:
        """As JSON values."""
        found: dict[str, JSON] = {"text": self.text, "open": list(self.open), "answers": list(self.answers)}
        return found | {"kinds": list(self.kinds), "doubt": self.doubt, "example": self.example}


Pair = tuple[str, str]
"""Names of endpoints, from and to."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Everybody, and the cell of each pair but those of an endpoint with itself."""

    rows: tuple[Endpoint, ...]
    columns: tuple[Endpoint, ...]
    cells: Mapping[Pair, Cell] = field(default_factory=dict)

    def changes(self, old: Matrix) -> dict[Pair, tuple[Cell | None, Cell | None]]:
        """The cells that are others here than in `old`, as (old, new); None where one of them has no such endpoint."""
        pairs = dict.fromkeys((*old.cells, *self.cells))
        both_ = {pair: (old.cells.get(pair), self.cells.get(pair)) for pair in pairs}
        return {pair: (a, b) for pair, (a, b) in both_.items() if (a and a.text) != (b and b.text)}


def reach(state: DesiredState, sources: Iterable[Endpoint] = (), targets: Iterable[Endpoint] = ()) -> Iterator[Matrix]:
    """The matrix of a state's own flows, a row at a time. Raises `TooLarge`, `Exhausted` or `Conflict`."""
    node, everybody = Node.declared(state), endpoints(state)
    columns = tuple(targets) or everybody
    offered = {target.name: services(target, vpn_port(state, target)) for target in columns}
    replies = Replies(state)
    for source in tuple(sources) or everybody:
        yield Matrix((source,), columns, row(node, source, columns, offered, replies))


def whole(state: DesiredState) -> Matrix:
    """All of it."""
    rows = list(reach(state))
    cells = {pair: cell for matrix in rows for pair, cell in matrix.cells.items()}
    return Matrix(tuple(m.rows[0] for m in rows), rows[0].columns if rows else (), cells)


class Replies:
    """Tells replies to connections that grants let through. That nothing else looks like one is proved of each bridge."""

    def __init__(self, state: DesiredState) -> None:
        self._cubes: dict[tuple[str, str], list[Cube]] = {}
        for o in openings(state):
            replies = granted(o.source, o.target, o.protocol, o.port)[1]
            self._cubes.setdefault((o.target.id, o.source.id), []).append(replies)

    def without(self, source: Endpoint, target: Endpoint, arrivals: Iterable[Arrival]) -> list[Arrival]:
        """Those of the arrivals from `source` at `target` that are no such replies."""
        ends = source.member, target.member
        cubes = self._cubes.get((ends[0].id, ends[1].id), ()) if ends[0] is not None and ends[1] is not None else ()
        return [a for a in arrivals if not (a.learned and any(space.inside(a.region.cube, cube) for cube in cubes))]


def row(
    node: Node,
    source: Endpoint,
    targets: Iterable[Endpoint],
    offered: Mapping[str, Mapping[tuple[str, int], str]],
    replies: Replies,
) -> dict[Pair, Cell]:
    """The cells of one source. `offered` are the targets' services by their names."""
    there: dict[object, list[Arrival]] = {}
    for arrival in node.arrivals(source.end, taught=True):
        there.setdefault(arrival.end, []).append(arrival)
    numbers = node.bridges[source.end[0]].numbers
    return {
        (source.name, target.name): _cell(
            replies.without(source, target, there.get(target.end, ())), offered[target.name], numbers[source.end[1]]
        )
        for target in targets
        if target.name != source.name
    }


def _cell(arrivals: list[Arrival], offered: Mapping[tuple[str, int], str], in_port: int) -> Cell:
    kinds = kinds_of(arrivals, offered)
    open_: dict[str, None] = {}
    answers: dict[str, None] = {}
    example, doubt = "", False
    for arrival in sorted(arrivals, key=lambda a: (a.learned, a.doubt)):
        for kind in kinds:
            if kind.label in open_ or (arrival.learned and kind.label in answers):
                continue
            header = inside(arrival.region, kind)
            if header is not None:
                (answers if arrival.learned else open_)[kind.label] = None
                doubt = doubt or (arrival.doubt and not arrival.learned)
                example = example or words(in_port, header)
    ordered = tuple(kind.label for kind in kinds)
    return Cell(
        ordered,
        tuple(label for label in ordered if label in open_),
        tuple(label for label in ordered if label in answers and label not in open_),
        example,
        doubt,
    )


def inside(region: Region, kind: Kind) -> int | None:
    """A packet of `region` that is of that kind, None if there is none. Raises `Exhausted`."""
    cube = meet(region.cube, kind.cube)
    return None if cube is None else witness(cube, (*region.minus, *kind.but))


def kinds_of(arrivals: Iterable[Arrival], offered: Mapping[tuple[str, int], str]) -> tuple[Kind, ...]:
    """Kinds of packets that together are all there are, told apart as far as services and flows tell them apart."""
    ports: dict[tuple[str, int], str] = dict(offered)
    for arrival in arrivals:
        for cube in (arrival.region.cube, *arrival.region.minus):
            named = _named(cube)
            if named is not None and not _idle(cube, arrival.region):
                ports.setdefault(named, f"{named[0]}/{named[1]}")
    single = [kind_of(*key, label) for key, label in sorted(ports.items(), key=lambda item: item[0])]
    out = list(single)
    for protocol, (number, _, _) in PROTOCOLS.items():
        but = tuple(kind.cube for kind, key in zip(single, sorted(ports), strict=True) if key[0] == protocol)
        out.append(Kind(f"{protocol}/*" if but else protocol, _protocol(number), but))
    out.append(Kind("icmp", _protocol(1)))
    known = tuple(bits(fields.IP_PROTO, number) for number in (1, *_PROTOCOL_NAMES))
    out.append(Kind("other", _IPV4, known))
    return (*out, Kind(FRAMES, ALL, (_IPV4,)))


def _idle(cube: Cube, region: Region) -> bool:
    """Whether a cube is taken from a region by another that takes more: it tells nothing apart."""
    return any(other != cube and space.inside(cube, other) for other in region.minus)


def _named(cube: Cube) -> tuple[str, int] | None:
    """The protocol and destination port that a cube names, if it names both whole."""
    if get(cube[1], fields.IP_PROTO) != 0xFF or get(cube[1], _DST) != 0xFFFF:
        return None
    protocol = _PROTOCOL_NAMES.get(get(cube[0], fields.IP_PROTO))
    return (protocol, get(cube[0], _DST)) if protocol is not None else None


def _protocol(number: int) -> Cube:
    return both(_IPV4, bits(fields.IP_PROTO, number))


def kind_of(protocol: str, port: int, label: str = "") -> Kind:
    """Packets of a protocol for one port, or of ICMP."""
    if protocol == "icmp":
        return Kind(label or protocol, _protocol(1))
    number, _, target = PROTOCOLS[protocol]
    return Kind(label or f"{protocol}/{port}", both(_protocol(number), bits(target, port)))
