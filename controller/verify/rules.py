"""The flows of one bridge, indexed so that those which meet a cube are found without looking at the others.

Flows of one shape (the same bits compared) are kept in dictionaries by the bits a question has in common with them:
tuple space search. Imports space and flow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from controller.flow import Flow
from controller.verify.space import Cube, of_match

ANY_PORT = -1
"""The set of all ports."""
OTHER = 1
"""The set of the ports that nobody names."""


class Ports:
    """Port numbers as bits of a set. Bit 0 stands for every number that was never named."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}
        self._numbers: list[int] = [-1]

    def one(self, number: int) -> int:
        """The set of that port alone."""
        number = 0xFFFE if number == 0xFFFFFFFE else number
        found = self._bits.get(number)
        if found is None:
            found = self._bits[number] = 1 << len(self._numbers)
            self._numbers.append(number)
        return found

    def numbers(self, ports: int) -> list[int]:
        """The numbers in a set, -1 for all that have no name."""
        ports &= (1 << len(self._numbers)) - 1
        out = []
        while ports:
            low = ports & -ports
            out.append(self._numbers[low.bit_length() - 1])
            ports ^= low
        return out

    @property
    def all(self) -> int:
        """Every port there is."""
        return (1 << len(self._numbers)) - 1

    def unused(self) -> int:
        """A port number that has no name, for an example."""
        return next(number for number in range(0xFEFF, 0, -1) if number not in self._bits)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A flow as the prover sees it. `sure` False: it may or may not be there or match, so it hides nothing below it."""

    flow: Flow
    cube: Cube
    ports: int
    sure: bool = True

    @property
    def priority(self) -> int:
        """Its priority."""
        return self.flow.priority


@dataclass(slots=True)
class _Shape:
    """Rules that compare the same bits."""

    mask: int
    has_port: bool
    rules: list[Rule] = field(default_factory=list)
    views: dict[tuple[int, bool], dict[tuple[int, int], list[Rule]]] = field(default_factory=dict)

    def find(self, cube: Cube, ports: int) -> Iterable[Rule]:
        common = self.mask & cube[1]
        single = self.has_port and ports > 0 and not ports & (ports - 1)
        view = self.views.get((common, single))
        if view is None:
            view = self.views[common, single] = {}
            for rule in self.rules:
                view.setdefault((rule.cube[0] & common, rule.ports if single else 0), []).append(rule)
        found = view.get((cube[0] & common, ports if single else 0), ())
        return found if single or not self.has_port else [rule for rule in found if rule.ports & ports]


class Rules:
    """All flows of one bridge."""

    def __init__(self, flows: Iterable[Flow], ports: Ports) -> None:
        self.ports = ports
        self._tables: dict[int, dict[tuple[int, bool], _Shape]] = {}
        for flow in flows:
            self.add(flow)

    def add(self, flow: Flow, *, sure: bool = True) -> None:
        """One more flow."""
        cube, port, exact = of_match(flow.match)
        rule = Rule(flow, cube, ANY_PORT if port is None else self.ports.one(port), sure and exact)
        shapes = self._tables.setdefault(flow.table, {})
        shape = shapes.setdefault((cube[1], port is not None), _Shape(cube[1], port is not None))
        shape.rules.append(rule)
        shape.views.clear()

    def meeting(self, table: int, cube: Cube, ports: int, above: int = -1) -> list[Rule]:
        """The rules of a table that some header of `cube` from one of `ports` matches, highest priority first."""
        found = [
            rule
            for shape in self._tables.get(table, {}).values()
            for rule in shape.find(cube, ports)
            if rule.flow.priority > above
        ]
        found.sort(key=lambda rule: -rule.flow.priority)
        return found
