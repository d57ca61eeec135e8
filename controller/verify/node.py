"""Several bridges as one: what leaves by one end of a link comes in by the other.

A packet keeps what was written into it on its way from bridge to bridge, but registers and what is known of its
connection are cleared (`ovs-fields(7)`). Regions stay those of the packet as it entered the first bridge. Imports explore,
walk, links, prove and compile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow
from controller.model import DesiredState
from controller.verify.explore import (
    ANYWHERE,
    EST,
    REL,
    Explorer,
    Learned,
    Overlay,
    Place,
    Region,
    Sent,
    TooLarge,
    is_kept,
)
from controller.verify.links import End, declared_links
from controller.verify.policy import both
from controller.verify.prove import learnable
from controller.verify.rules import Ports, Rule, Rules
from controller.verify.space import ALL, ENTERING, Cube, bits
from controller.verify.walk import Walker, Way

STEPS = 200_000
"""So many places are looked at for one question before it is given up."""
BRIDGES = 16
"""A packet that crosses more links than this goes in circles."""
LOCAL = 0xFFFE
_CONNECTED = bits(fields.CT_STATE, EST | REL)[0]
"""Bits that connection tracking says of packets of a connection only that it has seen before."""


@dataclass(frozen=True, slots=True)
class Held:
    """One bridge as it is asked about: its ports' numbers by name, and the flows it holds."""

    name: str
    numbers: Mapping[str, int]
    flows: tuple[Flow, ...]

    @classmethod
    def of(cls, name: str, numbers: Mapping[str, int], flows: Iterable[Flow]) -> Held:
        """With the host's port as the tables hold it."""
        local = {port: LOCAL if number == fields.LOCAL else number for port, number in numbers.items()}
        return cls(name, local, tuple(flows))

    def port(self, number: int) -> str:
        """The name of a port, or its number where it has none."""
        return next((name for name, known in self.numbers.items() if known == number), str(number))


class Hop(NamedTuple):
    """A flow of a bridge that packets match; None: a table's miss, which a resubmit comes back from."""

    bridge: str
    flow: Flow | None


class Arrival(NamedTuple):
    """Packets that can leave the bridges by `end`: those of `region`, looking as `overlay` says by then.

    `learned`: only once the switch has learned a flow for them, or knows their connection. `doubt`: only if NORMAL or the like sends them there.
    """

    end: End
    region: Region
    overlay: Overlay
    way: tuple[Hop, ...]
    learned: bool
    doubt: bool


class Leg(NamedTuple):
    """One packet's way through one bridge, and the ports it leaves by, by name, each with where that leads."""

    bridge: str
    in_port: str
    packet: int
    way: Way
    sent: tuple[tuple[str, End | None], ...]


@dataclass(slots=True)
class _Side:
    """One bridge, explored."""

    held: Held
    ports: Ports
    explorer: Explorer


@dataclass
class Node:
    """Bridges and the links between them. Flows of a switch that learns are asked for with what it may have learned."""

    bridges: Mapping[str, Held]
    links: Mapping[End, End] = field(default_factory=dict)
    learnable: Mapping[str, tuple[Flow, ...]] | None = None
    """What each switch could ever learn, by bridge, if that is known already."""

    @classmethod
    def declared(cls, state: DesiredState) -> Node:
        """What a state compiles to, all ports there and numbered as declared. Raises `Conflict`."""
        held, learned = {}, {}
        for bridge in state.bridges:
            ports = planned_ports(state, bridge)
            flows = BridgeCompiler().compile(state, bridge, ports).flows.values()
            held[bridge.name] = Held.of(bridge.name, {name: port.number for name, port in ports.items()}, flows)
            learned[bridge.name] = learnable(state, bridge, ports, flows)
        return cls(held, declared_links(state), learned)

    # ---------------------------------------------------------------------------------------------------- all packets

    def arrivals(self, start: End, cube: Cube = ALL, *, taught: bool = False, steps: int = STEPS) -> Iterator[Arrival]:
        """Where packets of `cube` that enter by `start` can leave, if each switch has learned nothing yet.

        With `taught`: if it has learned everything that anybody's packets could ever make it learn. Raises `TooLarge`.
        """
        for outcome in _Search(self, self._taught if taught else self._fresh, steps).run(start, cube):
            if isinstance(outcome, Arrival):
                yield outcome

    @cached_property
    def _fresh(self) -> dict[str, _Side]:
        return {name: _side(held) for name, held in self.bridges.items()}

    @cached_property
    def _taught(self) -> dict[str, _Side]:
        """With every flow that could be learned: found out by letting everybody send, until nothing new comes of it."""
        sides = {name: _side(held) for name, held in self.bridges.items()}
        if self.learnable is not None:
            for name, flows in self.learnable.items():
                for tag, flow in enumerate(flows, start=1):
                    sides[name].explorer.rules.add(flow, sure=False, tag=tag)
            return sides
        if not any(side.explorer.rules.learns for side in sides.values()):
            return sides
        made: dict[str, set[bytes]] = {name: set() for name in sides}
        while True:
            new = [
                (name, flow)
                for start in self.ends()
                for name, learned in self._lessons(sides, start)
                for number in sides[name].ports.numbers(learned.region.ports)
                for flow in sides[name].explorer.could_install(learned, number)
                if flow.key + repr(flow.actions).encode() not in made[name]
            ]
            if not new:
                return sides
            for name, flow in new:
                key = flow.key + repr(flow.actions).encode()
                if key not in made[name]:
                    made[name].add(key)
                    sides[name].explorer.rules.add(flow, sure=False, tag=len(made[name]))

    def _lessons(self, sides: dict[str, _Side], start: End) -> list[tuple[str, Learned]]:
        search = _Search(self, sides, STEPS)
        return [outcome for outcome in search.run(start, ALL) if not isinstance(outcome, Arrival)]

    def ends(self) -> Iterator[End]:
        """Every port of every bridge that is not joined to another."""
        for name, held in self.bridges.items():
            for port in held.numbers:
                if (name, port) not in self.links:
                    yield name, port

    # ----------------------------------------------------------------------------------------------------- one packet

    @cached_property
    def _walkers(self) -> dict[str, Walker]:
        return {name: Walker(held.flows) for name, held in self.bridges.items()}

    def follow(self, start: End, header: int, tracked: Iterable[int] = ()) -> tuple[Leg, ...]:
        """The way of one packet through all bridges, in the order it takes.

        `tracked` says what connection tracking answers, one after the other; then it is always a new connection.
        Raises `TooLarge` where it goes in circles.
        """
        answers = iter(tuple(tracked))
        todo = [(start, header)]
        legs: list[Leg] = []
        while todo:
            if len(legs) >= BRIDGES:
                raise TooLarge(f"the packet crosses more than {BRIDGES} bridges: it goes in circles")
            (bridge, in_port), packet = todo.pop(0)
            held = self.bridges[bridge]
            way = self._walkers[bridge].follow(held.numbers[in_port], packet, answers)
            sent: list[tuple[str, End | None]] = []
            for number, after in way.sent:
                names = [held.port(held.numbers[in_port] if number == fields.IN_PORT else number)]
                if number == ANYWHERE:
                    names = [name for name in held.numbers if name != in_port]
                for name in names:
                    far = self.links.get((bridge, name))
                    sent.append((name, far))
                    if far is not None:
                        todo.append((far, after))
            legs.append(Leg(bridge, in_port, packet, way, tuple(sent)))
        return tuple(legs)


def _side(held: Held) -> _Side:
    ports = Ports()
    for number in held.numbers.values():
        ports.one(number)
    return _Side(held, ports, Explorer(Rules(held.flows, ports)))


class _At(NamedTuple):
    """Packets under way: on which bridge, whence they came there, and how."""

    bridge: str
    in_port: str
    place: Place
    region: Region
    way: tuple[Hop, ...]
    crossed: int
    learned: bool
    doubt: bool


@dataclass(slots=True)
class _Search:
    """Follows packets from one end without merging, each way once."""

    node: Node
    sides: dict[str, _Side]
    steps: int
    seen: dict[tuple[str, str, Place, Region], bool] = field(default_factory=dict)
    """What is or was under way, and whether by something learned alone."""
    stack: list[_At] = field(default_factory=list)

    def run(self, start: End, cube: Cube) -> Iterator[Arrival | tuple[str, Learned]]:
        bridge, port = start
        first = Region(self._bit(bridge, port), entering(cube))
        self._push(_At(bridge, port, Place(0), first, (), 0, False, False))
        while self.stack:
            at = self.stack.pop()
            self.steps -= 1
            if self.steps < 0:
                raise TooLarge("too many different ways to follow one by one")
            explorer = self.sides[at.bridge].explorer
            for rule, outcome in explorer.step(at.place, at.region, keep=None):
                here = at._replace(way=(*at.way, Hop(at.bridge, rule.flow if rule else None)))
                here = here._replace(learned=at.learned or _is_learned(rule))
                match outcome:
                    case Sent():
                        yield from self._sent(here, outcome)
                    case Learned():
                        yield at.bridge, outcome
                    case (Place() as to, Region() as left):
                        known = here.learned or bool(to.overlay.value & to.overlay.mask & _CONNECTED)
                        self._push(here._replace(place=to, region=left, learned=known))

    def _bit(self, bridge: str, port: str) -> int:
        side = self.sides[bridge]
        return side.ports.one(side.held.numbers[port])

    def _push(self, at: _At) -> None:
        key = at.bridge, at.in_port, at.place, at.region
        if self.seen.get(key, True) and (key not in self.seen or not at.learned):
            self.seen[key] = at.learned  # a way that needs nothing learned says more than one that does
            self.stack.append(at)

    def _sent(self, at: _At, sent: Sent) -> Iterator[Arrival]:
        held = self.sides[at.bridge].held
        if is_kept(sent.port):
            return
        if sent.port == ANYWHERE:
            names = [name for name in held.numbers if name != at.in_port]
        elif sent.port == fields.IN_PORT:
            names = [at.in_port]
        else:
            name = held.port(sent.port)
            names = [name] if name != at.in_port else []  # Open vSwitch skips it
        doubt = at.doubt or sent.port == ANYWHERE
        for name in names:
            far = self.node.links.get((at.bridge, name))
            if far is None:
                yield Arrival((at.bridge, name), sent.region, sent.overlay, at.way, at.learned, doubt)
            elif far[0] in self.sides:
                self._cross(at._replace(doubt=doubt), far, sent)

    def _cross(self, at: _At, far: End, sent: Sent) -> None:
        if at.crossed >= BRIDGES:
            raise TooLarge(f"packets cross more than {BRIDGES} bridges: they go in circles")
        bridge, port = far
        cleared = sent.overlay.write(*ENTERING)
        region = sent.region._replace(ports=self._bit(bridge, port), owned=False)
        self._push(
            at._replace(bridge=bridge, in_port=port, place=Place(0, cleared), region=region, crossed=at.crossed + 1)
        )


def _is_learned(rule: Rule | None) -> bool:
    return rule is not None and rule.tag != 0


def entering(cube: Cube) -> Cube:
    """The packets of a cube as they enter by a port."""
    return both((cube[0] & ~ENTERING[1], cube[1] & ~ENTERING[1]), ENTERING)
