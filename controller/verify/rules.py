"""The flows of one bridge, indexed so that those which meet a cube are found without looking at the others.

Flows of one shape (the same bits compared) are kept in dictionaries by the bits a question has in common with them:
tuple space search. Imports space and flow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from controller import fields
from controller.flow import (
    Action,
    Aside,
    Clone,
    Ct,
    CtClear,
    DecTtl,
    Flow,
    Learn,
    LearnMatch,
    Load,
    Move,
    Output,
    PopVlan,
    Resubmit,
    SetField,
    every,
)
from controller.verify.space import IN_PORTS, Cube, of_match

ANY_PORT = -1
"""The set of all ports."""
OTHER = 1
"""The set of the ports that nobody names."""
ALIKE = 2
"""The set of the ports that are as good as each other (`Ports.alike`), where no flow tells them apart any more."""


class Ports:
    """Port numbers as bits of a set. Bit 0 stands for every number that was never named, bit 1 for those `alike`."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}
        self._numbers: list[int] = [-1, -1]
        self.alike = 0
        """Ports that the policy allows the same. A set may hold `ALIKE` in their place."""

    def fold(self, ports: int) -> int:
        """The same ports, those alike not told apart."""
        return ports & ~self.alike | ALIKE if ports & self.alike else ports

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
        if ports & ALIKE:
            ports = ports & ~ALIKE | self.alike
        ports &= (1 << len(self._numbers)) - 1
        out = []
        while ports:
            low = ports & -ports
            out.append(self._numbers[low.bit_length() - 1])
            ports ^= low
        return out

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def all(self) -> int:
        """Every port there is."""
        return (1 << len(self._numbers)) - 1 & ~ALIKE

    def unused(self) -> int:
        """A port number that has no name, for an example."""
        return next(number for number in range(0xFEFF, 0, -1) if number not in self._bits)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A flow as the prover sees it. `sure` False: it may or may not be there or match, so it hides nothing below it.

    `tag`: not 0 for one that `learn` could install, another for each.
    """

    flow: Flow
    cube: Cube
    ports: int
    sure: bool = True
    tag: int = 0

    @property
    def priority(self) -> int:
        """Its priority."""
        return self.flow.priority


@dataclass(slots=True)
class _Shape:
    """Rules that compare the same bits, in views by the bits that a question has in common with them."""

    mask: int
    has_port: bool
    rules: dict[Rule, None] = field(default_factory=dict)
    views: dict[tuple[int, bool], dict[tuple[int, int], dict[Rule, None]]] = field(default_factory=dict)

    def add(self, rule: Rule) -> None:
        self.rules[rule] = None
        for (common, single), view in self.views.items():
            view.setdefault((rule.cube[0] & common, rule.ports if single else 0), {})[rule] = None

    def remove(self, rule: Rule) -> None:
        del self.rules[rule]
        for (common, single), view in self.views.items():
            key = (rule.cube[0] & common, rule.ports if single else 0)
            del view[key][rule]
            if not view[key]:
                del view[key]

    def find(self, cube: Cube, ports: int) -> Iterable[Rule]:
        common = self.mask & cube[1]
        single = self.has_port and ports > 0 and not ports & (ports - 1)
        view = self.views.get((common, single))
        if view is None:
            view = self.views[common, single] = {}
            for rule in self.rules:
                view.setdefault((rule.cube[0] & common, rule.ports if single else 0), {})[rule] = None
        found = view.get((cube[0] & common, ports if single else 0), {})
        return found if single or not self.has_port else [rule for rule in found if rule.ports & ports]


_HERE, _NOWHERE = -1, -2
"""As where a flow leads: something leaves, is learned or committed, by the flow itself; or it drops."""


@dataclass(slots=True)
class _Table:
    """The rules of one table, by shape; how many lead where, and the ports that these name."""

    shapes: dict[tuple[int, bool], _Shape] = field(default_factory=dict)
    leads: Counter[int] = field(default_factory=Counter)
    resubmits: Counter[int] = field(default_factory=Counter)
    named: dict[int, Counter[int]] = field(default_factory=dict)

    def all(self) -> Iterator[Rule]:
        """Every rule."""
        for shape in self.shapes.values():
            yield from shape.rules

    def count(self, rule: Rule, by: int) -> None:
        self.resubmits.update({a.table: by for a in every(rule.flow.actions) if isinstance(a, Resubmit)})
        for target in _leads(rule.flow):
            self.leads[target] += by
            if rule.ports != ANY_PORT:
                self.named.setdefault(target, Counter())[rule.ports] += by


class Rules:
    """All flows of one bridge."""

    def __init__(self, flows: Iterable[Flow], ports: Ports) -> None:
        self.ports = ports
        self._tables: dict[int, _Table] = {}
        self._learning: Counter[tuple[int, int]] = Counter()
        for flow in flows:
            self.add(flow)

    def add(self, flow: Flow, *, sure: bool = True, tag: int = 0) -> Rule:
        """One more flow."""
        cube, port, exact = of_match(flow.match)
        rule = Rule(flow, cube, ANY_PORT if port is None else self.ports.one(port), sure and exact, tag)
        table = self._tables.setdefault(flow.table, _Table())
        key = (cube[1], port is not None)
        table.shapes.setdefault(key, _Shape(*key)).add(rule)
        table.count(rule, 1)
        self._learning.update(self._learned_ports(flow))
        return rule

    def remove(self, rule: Rule) -> None:
        """One flow less."""
        table = self._tables[rule.flow.table]
        table.shapes[rule.cube[1], rule.ports != ANY_PORT].remove(rule)
        table.count(rule, -1)
        self._learning.subtract(self._learned_ports(rule.flow))

    @property
    def learns(self) -> bool:
        """Whether any flow makes the switch learn."""
        return any(
            isinstance(a, Learn)
            for table in self._tables.values()
            for rule in table.all()
            for a in every(rule.flow.actions)
        )

    def _learned_ports(self, flow: Flow) -> Iterator[tuple[int, int]]:
        """(table, ports) that flows which this one makes the switch learn compare with the ingress port."""
        for action in every(flow.actions):
            if isinstance(action, Learn):
                for spec in action.specs:
                    if isinstance(spec, LearnMatch) and spec.target.header in IN_PORTS:
                        known = isinstance(spec.source, int)
                        yield action.table, self.ports.one(int(spec.source)) if known else ANY_PORT  # type: ignore[arg-type]

    def meeting(self, table: int, cube: Cube, ports: int, above: int = -1) -> list[Rule]:
        """The rules of a table that some header of `cube` from one of `ports` matches, highest priority first."""
        there = self._tables.get(table)
        if there is None:
            return []
        found = [
            rule for shape in there.shapes.values() for rule in shape.find(cube, ports) if rule.flow.priority > above
        ]
        found.sort(key=lambda rule: -rule.flow.priority)
        return found

    def shapes(self, table: int) -> int:
        """How many different sets of bits the rules of a table compare: what it costs to look one up."""
        there = self._tables.get(table)
        return len(there.shapes) if there is not None else 0

    def layout(self) -> Layout:
        """How the tables hang together, as of now."""
        return Layout(self._tables, self._learning)


class Layout:
    """Which tables something can come of, and which ports the flows of a table, and of those after it, tell apart."""

    def __init__(self, tables: dict[int, _Table], learning: Counter[tuple[int, int]]) -> None:
        leads = {number: {to for to, count in table.leads.items() if count} for number, table in tables.items()}
        # What a resubmit looks up comes back with other registers, even if nothing leaves from there.
        inner = {to for table in tables.values() for to, count in table.resubmits.items() if count}
        while deeper := {to for number in inner for to in leads.get(number, ())} - inner:
            inner |= deeper
        inner -= {_HERE, _NOWHERE}
        self.alive = inner | {number for number, to in leads.items() if _HERE in to}
        while more := {number for number, to in leads.items() if number not in self.alive and to & self.alive}:
            self.alive |= more
        self._named: dict[int, int] = {}
        for number, table in tables.items():
            for to, ports in table.named.items():
                if to == _HERE or to in self.alive or number in inner:
                    for one, count in ports.items():
                        if count:
                            self._named[number] = self._named.get(number, 0) | one
        for (number, ports_learned), count in learning.items():
            if count:
                self._named[number] = self._named.get(number, 0) | ports_learned
        self.after = {number: self._below(leads, to) for number, to in leads.items()}

    def _below(self, leads: dict[int, set[int]], targets: set[int]) -> int:
        seen: set[int] = set()
        todo = list(targets)
        named = 0
        while todo:
            number = todo.pop()
            if number not in seen:
                seen.add(number)
                named |= self._named.get(number, 0)
                todo += leads.get(number, ())
        return named

    def named(self, table: int) -> int:
        """The ports that matter from `table` on."""
        return self._named.get(table, 0) | self.after.get(table, 0)

    def idle(self, flow: Flow) -> bool:
        """Whether nothing can come of a flow, as of one that drops."""
        return not any(to == _HERE or to in self.alive for to in _leads(flow))


def _leads(flow: Flow) -> set[int]:
    """The tables that a flow sends packets on to, and `_HERE` if it does more than that and writing fields."""
    out = set() if flow.goto is None else {flow.goto}
    out.update(*map(_leads_by, flow.actions))
    return out or {_NOWHERE}


def _leads_by(action: Action) -> set[int]:
    match action:
        case Output(fields.CONTROLLER) | CtClear() | PopVlan() | DecTtl() | Aside():
            return set()
        case SetField(header, _) if header not in IN_PORTS:
            return set()
        case Load() | Move() if action.target.header not in IN_PORTS:
            return set()
        case Resubmit(table):
            return {table, _HERE}
        case Ct(table=table):
            return ({_HERE} if action.commit else set()) | ({table} if table is not None else set())
        case Clone(actions):
            return set().union(*map(_leads_by, actions))
    return {_HERE}
