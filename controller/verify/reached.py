"""Everything that can come of packets on one bridge, kept so that a change is followed alone.

A place is a table with what is written so far; for each, the packets that can stand before it are kept as a few regions.
Regions only ever grow, so what is kept may be more than what can be, never less. The invariant: whatever packets of a
kept region can do by the present flows has been judged, or is in a kept region of the next place. A change of flows
can only change what becomes of packets that a changed flow matches: these are followed again, up to where they are in
a kept region already. Imports explore.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from controller.flow import Flow, Learn
from controller.verify.explore import KEEP, NODES, Explorer, Learned, Overlay, Place, Region, Sent, TooLarge
from controller.verify.rules import ALIKE, ANY_PORT, Layout, Rule
from controller.verify.space import PLACES, Cube, hull, inside, meet, of_match

FEW = 16
"""So many regions of a place are kept apart; more become one, with their hull."""


class Outdated(Exception):
    """The flows have changed so that what is kept may be too little: it must be found out anew."""


@dataclass(slots=True)
class _Horizon:
    """What is common to places of one table that return to the same tables.

    `named`: the ports that flows tell apart here or later; `folded`: those that were taken for alike here so far.
    """

    table: int
    returns: tuple[int, ...]
    named: int = 0
    folded: int = 0

    def look(self, layout: Layout) -> None:
        """Follow the flows as they are now. Raises `Outdated`."""
        self.named = layout.named(self.table)
        for table in self.returns:
            self.named |= layout.after.get(table, 0)
        if self.named & self.folded:
            raise Outdated


@dataclass(slots=True, eq=False)
class _Node:
    """A place, the packets that can stand before it, and by which flows of which nodes they come."""

    place: Place
    horizon: _Horizon
    regions: list[Region] = field(default_factory=list)
    fed: set[tuple[_Node | None, Rule | None]] = field(default_factory=set)
    by: dict[Rule | None, set[_Node]] = field(default_factory=dict)
    """Which nodes it feeds by which of the table's flows; None: by none of them, on the way back from a resubmit."""
    pending: list[Region] = field(default_factory=list)
    gone: bool = False

    @property
    def cube(self) -> Cube:
        """What is written, for the index."""
        return self.place.overlay.value, self.place.overlay.mask


@dataclass(slots=True)
class _Nodes:
    """The nodes of one table, found by what is written."""

    masks: dict[int, dict[_Node, None]] = field(default_factory=dict)
    views: dict[tuple[int, int], dict[int, dict[_Node, None]]] = field(default_factory=dict)

    def add(self, node: _Node) -> None:
        value, mask = node.cube
        self.masks.setdefault(mask, {})[node] = None
        for (written, common), view in self.views.items():
            if written == mask:
                view.setdefault(value & common, {})[node] = None

    def remove(self, node: _Node) -> None:
        value, mask = node.cube
        self.masks[mask].pop(node, None)
        for (written, common), view in self.views.items():
            if written == mask:
                view.get(value & common, {}).pop(node, None)

    def meeting(self, cube: Cube) -> Iterator[_Node]:
        for mask, nodes in self.masks.items():
            common = mask & cube[1]
            view = self.views.get((mask, common))
            if view is None:
                view = self.views[mask, common] = {}
                for node in nodes:
                    view.setdefault(node.cube[0] & common, {})[node] = None
            yield from list(view.get(cube[0] & common, ()))


@dataclass(slots=True)
class _Instance:
    """A flow that `learn` could install, and the ports whose packets could make it."""

    rule: Rule
    ports: set[int]


@dataclass(slots=True)
class Reached:
    """What packets that enter can do. `judge` is told of everything that leaves; `make` of what could be learned.

    `make(learned, number)` gives the flows that packets of port `number` could make `learn` install.
    """

    explorer: Explorer
    judge: Callable[[Sent], None]
    make: Callable[[Learned, int], Iterable[Flow]]
    _tables: dict[int, _Nodes] = field(default_factory=dict)
    _places: dict[Place, _Node] = field(default_factory=dict)
    _users: dict[Rule, set[_Node]] = field(default_factory=dict)
    _senders: dict[int, set[_Node]] = field(default_factory=dict)
    _learned: dict[tuple[_Node, Rule | None], dict[tuple[Learn, Overlay], list[Region]]] = field(default_factory=dict)
    _made: dict[bytes, _Instance] = field(default_factory=dict)
    _made_by: dict[int, set[bytes]] = field(default_factory=dict)
    _horizons: dict[tuple[int, tuple[int, ...]], _Horizon] = field(default_factory=dict)
    _queue: list[tuple[int, int, _Node]] = field(default_factory=list)
    _fresh: dict[_Node, list[Region]] | None = None
    """While packets are followed again in spite of what is kept: those that were."""
    _count: int = 0
    _tags: int = 0

    # ---------------------------------------------------------------------------------------------------- questions

    def start(self, region: Region) -> None:
        """Packets of `region` may enter. Raises `TooLarge`, `Exhausted` or `Outdated`."""
        self._refresh()
        root = self._node(Place(0))
        if root is not None:
            root.fed.add((None, None))
            self._visit(root, [region])
            self._run()

    def change(self, removed: Iterable[Rule], added: Iterable[Flow]) -> list[Rule]:
        """These flows have gone and those have come, as rules. Raises as `start`."""
        gone = list(removed)
        for rule in gone:
            self.explorer.rules.remove(rule)
        new = [self.explorer.rules.add(flow) for flow in added]
        self._refresh()
        self._changed(gone, [*gone, *new])
        self._run()
        return new

    def release(self) -> None:
        """Let go of all places, which hold each other."""
        for node in self._places.values():
            node.fed.clear()
            node.by.clear()
        for known in (self._places, self._tables, self._users, self._senders, self._learned, self._made):
            known.clear()

    def forget(self, ports: int) -> None:
        """Forget what packets of these ports can do: it has to be found out again with `enter`.

        A region is as good without them: what its other packets can do was found out for each by itself.
        """
        if not ports:
            return
        for node in self._places.values():
            node.regions = _without(node.regions, ports)
            if node.pending:
                node.pending = _without(node.pending, ports)
        for learned in self._learned.values():
            for key, regions in learned.items():
                learned[key] = _without(regions, ports)
        for horizon in self._horizons.values():
            horizon.folded &= ~ports

    def enter(self, region: Region) -> None:
        """Packets of `region`, whose ports are new or forgotten, may enter. Raises as `start`."""
        self.start(region)
        for number in self.explorer.ports.numbers(region.ports):
            self._learn_again(number)
        self._run()

    def again(self, regions: list[Region]) -> None:
        """What packets of `regions`, which may enter already, may do has become less: follow them again from there.

        That they are in a kept region does not end this: from there on packets of it may have been taken for their
        port's own by what the policy said then. Only what was followed by the present one counts.
        """
        root = self._node(Place(0))
        if root is not None and regions:
            self._fresh = {}
            self._visit(root, regions)
            self._run()
            self._fresh = None

    def learn_again(self, number: int) -> None:
        """What a port's packets could make `learn` install has changed."""
        self._learn_again(number)
        self._run()

    def judge_again(self, number: int) -> None:
        """What may leave by a port has changed: judge all that does again."""
        for node in list(self._senders.get(number, ())):
            self._again(node, node.regions)
        self._run()

    def learnable(self) -> tuple[Flow, ...]:
        """Every flow that packets could make `learn` install."""
        return tuple(instance.rule.flow for instance in self._made.values())

    def could_learn(self, flow: Flow) -> bool:
        """Whether a flow is one of those that packets could make `learn` install, with what nobody knew filled in."""
        cube, port, exact = of_match(flow.match)
        ports = ANY_PORT if port is None else self.explorer.ports.one(port)
        writes = _writes(flow)
        if writes is None or not exact:
            return False
        for rule in self.explorer.rules.meeting(flow.table, cube, ports):
            if rule.tag and rule.flow.priority == flow.priority and inside(cube, rule.cube):
                could = _writes(rule.flow)
                assert could is not None
                same_bits = writes.mask == could.mask | could.unknown
                if not ports & ~rule.ports and same_bits and not (writes.value ^ could.value) & could.mask:
                    return True
        return False

    def _refresh(self) -> None:
        layout = self.explorer.rules.layout()
        if self.explorer.layout is not None and layout.alive - self.explorer.layout.alive:
            raise Outdated
        self.explorer.layout = layout
        for horizon in self._horizons.values():
            horizon.look(layout)

    # ------------------------------------------------------------------------------------------------------ changes

    def _changed(self, gone: list[Rule], changed: list[Rule]) -> None:
        for rule in gone:
            for node in list(self._users.get(rule, ())):
                self._leave(node, rule)
            self._users.pop(rule, None)
        for rule in changed:
            nodes = self._tables.get(rule.flow.table)
            for node in nodes.meeting(rule.cube) if nodes is not None else ():
                before = node.place.overlay.before(rule.cube)
                if before is None:
                    continue
                met = []
                for region in node.regions:
                    cube = meet(region.cube, before[0])
                    if cube is not None and region.ports & rule.ports:
                        met.append(region._replace(cube=cube, ports=region.ports & rule.ports))
                self._again(node, met)

    def _leave(self, node: _Node, rule: Rule | None) -> None:
        """A node does nothing by a flow any more."""
        self._learned.pop((node, rule), None)
        for target in node.by.pop(rule, ()):
            target.fed.discard((node, rule))
            if not target.fed and not target.gone:
                self._drop(target)

    def _drop(self, node: _Node) -> None:
        node.gone = True
        del self._places[node.place]
        self._tables[node.place.table].remove(node)
        for senders in self._senders.values():
            senders.discard(node)
        for rule in list(node.by):
            if rule is not None:
                self._users.get(rule, set()).discard(node)
            self._leave(node, rule)

    # ---------------------------------------------------------------------------------------------------- following

    def _again(self, node: _Node, regions: list[Region]) -> None:
        if regions and not node.gone:
            if not node.pending:
                self._count += 1
                heapq.heappush(self._queue, (node.place.table, self._count, node))
            for region in regions:
                if len(node.pending) < FEW:
                    node.pending = [other for other in node.pending if not _within(other, region)]
                node.pending.append(region)

    def _node(self, place: Place) -> _Node | None:
        """The node of a place, None where nothing can come of it."""
        assert self.explorer.layout is not None
        layout = self.explorer.layout
        node = self._places.get(place)
        if node is None and (place.then or place.table in layout.alive):
            if len(self._places) >= NODES:
                raise TooLarge(f"more than {NODES} ways through the tables")
            key = place.table, tuple(then.flow.table for then in place.then)
            horizon = self._horizons.get(key)
            if horizon is None:
                horizon = self._horizons[key] = _Horizon(*key)
                horizon.look(layout)
            node = self._places[place] = _Node(place, horizon)
            self._tables.setdefault(place.table, _Nodes()).add(node)
        return node

    def _visit(self, node: _Node, regions: Iterable[Region]) -> None:
        """Packets of `regions` come before a node."""
        for region in regions:
            new = _take(node.regions, region)
            if self._fresh is not None:
                new += _take(self._fresh.setdefault(node, []), region)
            self._again(node, new)

    def _fold(self, node: _Node, region: Region) -> Region:
        alike = region.ports & self.explorer.ports.alike & ~node.horizon.named
        if not alike:
            return region
        node.horizon.folded |= alike
        return region._replace(ports=region.ports & ~alike | ALIKE)

    def _run(self) -> None:
        while self._queue:
            _, _, node = heapq.heappop(self._queue)
            if node.gone:
                continue
            pending, node.pending = node.pending, []
            gathered: dict[_Node, list[Region]] = {}
            for region in pending:
                for rule, outcome in self.explorer.step(node.place, region, keep=KEEP):
                    match outcome:
                        case Sent(port=port):
                            self._senders.setdefault(port, set()).add(node)
                            self.judge(outcome)
                        case Learned():
                            self._learn(node, rule, outcome)
                        case (Place() as to, Region() as left):
                            # Paths that were learned for different packets are not mixed up: there are as many as
                            # ports, and what each may carry is another thing.
                            if tag := (rule and rule.tag) or node.place.tag:
                                to = to._replace(tag=tag)
                            target = self._node(to)
                            if target is None:
                                continue
                            self._feed(node, rule, target)
                            left = self._fold(target, left)
                            known = target.regions if self._fresh is None else self._fresh.get(target, ())
                            if not any(_within(left, old) for old in known):
                                _take(gathered.setdefault(target, []), left)
            for target, regions in gathered.items():
                self._visit(target, regions)

    def _feed(self, node: _Node, rule: Rule | None, target: _Node) -> None:
        target.fed.add((node, rule))
        node.by.setdefault(rule, set()).add(target)
        if rule is not None:
            self._users.setdefault(rule, set()).add(node)

    # ----------------------------------------------------------------------------------------------------- learning

    def _learn(self, node: _Node, rule: Rule | None, learned: Learned) -> None:
        if rule is not None:
            self._users.setdefault(rule, set()).add(node)
            node.by.setdefault(rule, set())
        known = self._learned.setdefault((node, rule), {}).setdefault((learned.learn, learned.overlay), [])
        added: list[Rule] = []
        for region in _take(known, learned.region):
            for number in self.explorer.ports.numbers(region.ports):
                added += self._make(learned._replace(region=region), number)
        self._refresh_if(added)
        self._changed([], added)

    def _make(self, learned: Learned, number: int) -> Iterator[Rule]:
        for flow in self.make(learned, number):
            key = flow.key + repr(flow.actions).encode()
            instance = self._made.get(key)
            if instance is None:
                instance = self._made[key] = _Instance(self._instance(flow), set())
                yield instance.rule
            instance.ports.add(number)
            self._made_by.setdefault(number, set()).add(key)

    def _instance(self, flow: Flow) -> Rule:
        """Raises `Outdated` where it names a port that nobody did before: what entered by that was among the others."""
        self._tags += 1
        named = len(self.explorer.ports)
        rule = self.explorer.rules.add(flow, sure=False, tag=self._tags)
        if len(self.explorer.ports) != named:
            raise Outdated
        return rule

    def _learn_again(self, number: int) -> None:
        """Forget what a port's packets could make `learn` install, and find it out again."""
        old = self._made_by.pop(number, set())
        bit = self.explorer.ports.one(number) if number >= 0 else 1
        alike = bit | (ALIKE if bit & self.explorer.ports.alike else 0)
        added: list[Rule] = []
        for every in list(self._learned.values()):
            for (learn, overlay), regions in every.items():
                for region in regions:
                    if region.ports & alike:
                        added += self._make(Learned(region, learn, overlay), number)
        gone = []
        for key in old - self._made_by.get(number, set()):
            instance = self._made[key]
            instance.ports.discard(number)
            if not instance.ports:
                gone.append(instance.rule)
                self.explorer.rules.remove(instance.rule)
                del self._made[key]
        self._refresh_if(gone or added)
        self._changed(gone, [*gone, *added])

    def _refresh_if(self, changed: list[Rule]) -> None:
        """Learned flows never name a port that their `learn` does not, so only the first of a table matters."""
        assert self.explorer.layout is not None
        if any(rule.flow.table not in self.explorer.layout.alive for rule in changed):
            self._refresh()


def _writes(flow: Flow) -> Overlay | None:
    """What a flow writes, None if it does more than that."""
    overlay = Overlay()
    for action in flow.actions:
        written = overlay.after(action)
        if written is None:
            return None
        overlay = written
    return overlay if flow.goto is None else None


def _take(regions: list[Region], region: Region) -> list[Region]:
    """Add a region to a few; the packets that were not in one of these before, or a few more."""
    for at, old in enumerate(regions):
        if _within(region, old):
            return []
        if old.cube == region.cube and old.minus == region.minus and old.owned == region.owned:
            regions[at] = old._replace(ports=old.ports | region.ports)
            return [region]
    regions[:] = [old for old in regions if not _within(old, region)]
    regions.append(region)
    if len(regions) <= FEW:
        return [region]
    whole = regions[0]
    for other in regions[1:]:
        whole = _around(whole, other)
    regions[:] = [whole]
    return [whole]


def _without(regions: list[Region], ports: int) -> list[Region]:
    """The regions without packets of some ports."""
    for region in regions:
        if region.ports & ports:
            break
    else:
        return regions
    left = (region._replace(ports=region.ports & ~ports) for region in regions)
    return [region for region in left if region.ports]


def _within(region: Region, other: Region) -> bool:
    """Whether every packet of `region` is plainly in `other` too."""
    if region.ports & ~other.ports or region.owned < other.owned or not inside(region.cube, other.cube):
        return False
    if region.minus == other.minus:
        return True
    taken = frozenset(region.minus)
    return all(cube in taken or _lacks(region, cube) for cube in other.minus)


def _lacks(region: Region, cube: Cube) -> bool:
    """Whether plainly no packet of `region` is in `cube`."""
    return meet(cube, region.cube) is None or any(inside(cube, taken) for taken in region.minus)


def _around(a: Region, b: Region) -> Region:
    """A region around both. Where a field differs it is not compared at all, so that this does not grow bit by bit."""
    cube = a.cube
    if not inside(b.cube, cube):
        value, mask = hull(a.cube, b.cube)
        for bits_of_field in _FIELDS:
            if bits_of_field & ~mask & (a.cube[1] | b.cube[1]):
                mask &= ~bits_of_field
        cube = value & mask, mask
    minus = tuple(m for m in dict.fromkeys((*a.minus, *b.minus)) if _lacks(a, m) and _lacks(b, m))
    return Region(a.ports | b.ports, cube, minus, a.owned and b.owned)


_FIELDS = {((1 << width) - 1) << at for at, width in PLACES.values()}
