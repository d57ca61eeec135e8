"""One packet's way through the tables of one bridge: which flow it matched in each, and where it left.

The same flows and the same reading of them as the proof's, on a set of one packet. Imports explore.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from controller.flow import Flow
from controller.verify.explore import ANYWHERE, DEPTH, NEW, TRK, Explorer, Learned, Place, Region, Sent, is_kept
from controller.verify.rules import OTHER, Ports, Rule, Rules
from controller.verify.space import ENTERING, PLACES

_WIDTH = max(at + width for at, width in PLACES.values())
FULL = (1 << _WIDTH) - 1
MOST_STEPS = 4096
"""What Open vSwitch gives up at (`ovs-actions(7)`, resubmit)."""


@dataclass(frozen=True, slots=True)
class Step:
    """A table looked up, and the flow that matched: None is a miss. `depth` counts resubmits; `packet` as it came."""

    table: int
    flow: Flow | None
    depth: int
    packet: int


@dataclass(frozen=True, slots=True)
class Way:
    """All that becomes of one packet.

    `sent`: the ports it leaves by (`ANYWHERE` is any), each with the packet as it is then. `doubts` say where this is
    a guess: more may become of it than told.
    """

    steps: tuple[Step, ...]
    sent: tuple[tuple[int, int], ...]
    learned: tuple[Learned, ...]
    doubts: tuple[str, ...]


class Walker:
    """Follows packets through flows; those added `sure=False` may or may not be there."""

    def __init__(self, flows: Iterable[Flow]) -> None:
        self.ports = Ports()
        self.explorer = Explorer(Rules(flows, self.ports))

    def follow(self, in_port: int, header: int, tracked: Iterator[int] | None = None) -> Way:
        """The way of a packet from port `in_port`; `header` is laid out as in `space`.

        `tracked` gives what connection tracking answers, in turn; then it is always a new connection.
        """
        answers = iter(()) if tracked is None else tracked
        explorer = replace(self.explorer, states=lambda: (next(answers, TRK | NEW),))
        return _Walk(explorer, self.ports.one(in_port) if in_port >= 0 else OTHER, in_port, header).result()


class _Walk:
    def __init__(self, explorer: Explorer, port: int, in_port: int, header: int) -> None:
        self.explorer = explorer
        self.in_port = 0xFFFE if in_port == 0xFFFFFFFE else in_port
        self.steps: list[Step] = []
        self.sent: list[tuple[int, int]] = []
        self.learned: list[Learned] = []
        self.doubts: dict[str, None] = {}
        entering = header & ~ENTERING[1]
        self._look(Place(0), Region(port, (entering, FULL)))

    def result(self) -> Way:
        return Way(tuple(self.steps), tuple(self.sent), tuple(self.learned), tuple(self.doubts))

    def _look(self, place: Place, region: Region) -> None:
        if len(self.steps) >= MOST_STEPS:
            self.doubts["it goes in circles, which Open vSwitch ends"] = None
            return
        now = place.overlay.known(region.cube)
        depth = len(place.then)
        rules = self.explorer.rules.meeting(place.table, now, region.ports)
        floor = next((rule.priority for rule in rules if _certain(rule, place)), -1)
        # Two flows of one priority that do the same do not contradict each other: one stands for both.
        matched = {rule.flow.effect: rule for rule in reversed(rules) if rule.priority >= floor}
        if not matched:
            self.steps.append(Step(place.table, None, depth, now[0]))
            self._go_on(self.explorer.back(place.overlay, place.then, region))
        if len(matched) > 1:
            self.doubts[f"several flows of table {place.table} may match, and nobody knows which"] = None
        for rule in matched.values():
            if not _certain(rule, place):
                self.doubts["a flow compares what is not known of the packet"] = None
            self.steps.append(Step(place.table, rule.flow, depth, now[0]))
            self._go_on(self.explorer.perform(rule.flow, rule.flow.actions, rule.flow.goto, place, region))

    def _go_on(self, outcomes: Iterator[Sent | Learned | tuple[Place, Region]]) -> None:
        for outcome in outcomes:
            match outcome:
                case Sent(region=region, port=port, overlay=overlay):
                    if port == ANYWHERE:
                        self.doubts["NORMAL, FLOOD, ALL or an action that is not understood: it may leave anywhere"] = (
                            None
                        )
                    if port != self.in_port and not is_kept(
                        port
                    ):  # Open vSwitch skips an output to where the packet came from
                        self.sent.append((port, overlay.known(region.cube)[0]))
                case Learned():
                    self.learned.append(outcome)
                case (Place() as to, Region() as left):
                    if len(to.then) >= DEPTH:
                        self.doubts["it is resubmitted deeper than Open vSwitch goes"] = None
                    else:
                        self._look(to, left)


def _certain(rule: Rule, place: Place) -> bool:
    """Whether a flow that may match does: it is there, and compares nothing that nobody knows of the packet."""
    before = place.overlay.before(rule.cube)
    return rule.sure and before is not None and before[1]
