"""Where can packets go? Symbolic execution of one bridge's flows on sets of packets.

A region is a set of ports, a cube and cubes taken from it, all in terms of the packet *as it came in*; what flows have
written lies over it as an `Overlay`. Copies (`move`) are kept as what they are, so regions stay exact. `step` says what
becomes of packets in one table, `paths` follows them way by way; `reached` merges what stands before the same table.

Over-approximated, on purpose: the lesser of two flows of one priority, learned flows (anything `learn` could ever
install), unknown actions (may send anything anywhere), NORMAL, FLOOD and ALL (any port). Imports rules and cubes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from controller import fields
from controller.flow import (
    Action,
    Bits,
    Clone,
    Ct,
    CtClear,
    DecTtl,
    Flow,
    Learn,
    LearnLoad,
    LearnOutput,
    Load,
    Match,
    Move,
    Output,
    PopVlan,
    Raw,
    Resubmit,
    SetField,
)
from controller.problems import BulkheadError
from controller.verify import space
from controller.verify.cubes import Meter, empty
from controller.verify.rules import Layout, Ports, Rule, Rules
from controller.verify.space import Cube, inside, meet

DEPTH = 64
"""How deep Open vSwitch resubmits (`ovs-actions(7)`): what goes deeper is dropped there."""
FEW_RULES = 24
"""Among so many flows it is quicker to look at each than to ask the index again."""
KEEP = 64
"""So many taken-away cubes outlive a merge; dropping one makes the region larger."""
NODES = 400_000
"""More places than this in one exploration are given up."""

ANYWHERE = -1
"""As the port of a `Sent`: any port there is, because of NORMAL, FLOOD, ALL or an action that is not understood."""


ANY_ZONE = -2
"""As the port of a `Sent`: nothing leaves, but a connection is committed to a zone that nobody knows."""


def kept_in(zone: int) -> int:
    """As the port of a `Sent`: nothing leaves, but a connection is committed to that zone."""
    return ANY_ZONE - 1 - zone


def is_kept(port: int) -> bool:
    """Whether a `Sent` by that port is a connection that is committed."""
    return port <= ANY_ZONE


class TooLarge(BulkheadError):
    """The flows make more different ways than can be followed: not proved."""


class Overlay(NamedTuple):
    """What the flows so far have written: constants, bits nobody knows, and copies (target bit, width, source bit)."""

    value: int = 0
    mask: int = 0
    unknown: int = 0
    copies: tuple[tuple[int, int, int], ...] = ()

    def _without(self, bits: int) -> Overlay:
        copies = tuple(c for c in self.copies if not ((1 << c[1]) - 1) << c[0] & bits)
        lost = sum(((1 << w) - 1) << t for t, w, _ in self.copies if ((1 << w) - 1) << t & bits) & ~bits
        return Overlay(self.value & ~bits, self.mask & ~bits, (self.unknown | lost) & ~bits, copies)

    def write(self, value: int, mask: int) -> Overlay:
        """With constants written."""
        clean = self._without(mask) if self.copies else self
        unknown = clean.unknown & ~mask
        return Overlay(clean.value & ~mask | value & mask, clean.mask | mask, unknown, clean.copies)

    def blur(self, mask: int) -> Overlay:
        """With bits written that nobody knows."""
        clean = self._without(mask)
        return clean._replace(unknown=clean.unknown | mask)

    def copy(self, target: int, width: int, source: int) -> Overlay:
        """With bits copied from elsewhere in the packet."""
        ones = (1 << width) - 1
        there, here = ones << source, ones << target
        if self.mask & there == there:
            return self.write((self.value >> source & ones) << target, here)
        if not (self.mask | self.unknown | self.copied) & there:
            clean = self._without(here)
            return clean._replace(copies=tuple(sorted((*clean.copies, (target, width, source)))))
        for t, w, s in self.copies:
            if t <= source and source + width <= t + w and not (self.mask | self.unknown) & there:
                clean = self._without(here)
                return clean._replace(copies=tuple(sorted((*clean.copies, (target, width, s + source - t)))))
        return self.blur(here)

    def after(self, action: Action) -> Overlay | None:
        """With what an action writes, None for an action that does something else."""
        match action:
            case SetField(header, value):
                return self._load(Bits(header, 0, fields.by_header(header).bits), value)
            case Load(value, target):
                return self._load(target, value)
            case Move(source, target):
                return self._move(source, target)
            case CtClear():
                return self.write(0, _TRACKED)
            case PopVlan():
                return self.blur(_VLAN)  # a tag may stand behind it
            case DecTtl():
                return self.blur(_TTL)
        return None

    def tracked(self, ct: Ct, state: int) -> Overlay:
        """What a packet is like that connection tracking says `state` of."""
        out = self.write(*space.bits(fields.CT_STATE, state)).blur(_mask(fields.CT_MARK))
        if isinstance(ct.zone, int):
            out = out.write(*space.bits(fields.CT_ZONE, ct.zone))
        else:
            out = out.blur(_mask(fields.CT_ZONE))
        return out.blur(_TRANSLATED) if ct.nat else out

    def _load(self, target: Bits, value: int) -> Overlay:
        out = self
        for header, start, width in fields.parts(*target):  # an extended register is the registers it is made of
            where = space.place(header)
            if where is not None:
                out = out.write(value << where[0] + start, ((1 << width) - 1) << where[0] + start)
            value >>= width
        return out

    def _move(self, source: Bits, target: Bits) -> Overlay:
        to = space.place(target.header)
        if to is None:
            pieces = [(place[0] + start, w) for h, start, w in fields.parts(*target) if (place := space.place(h))]
            return self.blur(sum(((1 << width) - 1) << at for at, width in pieces))
        at = to[0] + target.start
        where = space.place(source.header) if source.header not in space.IN_PORTS else None
        if where is None:
            return self.blur(((1 << target.width) - 1) << at)
        return self.copy(at, target.width, where[0] + source.start)

    @property
    def copied(self) -> int:
        """The bits that are copies."""
        return sum(((1 << w) - 1) << t for t, w, _ in self.copies)

    def known(self, cube: Cube) -> Cube:
        """What is known of the packet as it is now, if it was in `cube` when it came in."""
        hidden = self.mask | self.unknown | self.copied
        value, mask = cube[0] & ~hidden | self.value, cube[1] & ~hidden | self.mask
        for t, w, s in self.copies:
            ones = (1 << w) - 1
            value |= (cube[0] >> s & ones) << t
            mask |= (cube[1] >> s & ones) << t
        return value, mask

    def before(self, cube: Cube) -> tuple[Cube, bool] | None:
        """The packets, as they came in, that are in `cube` now; and whether exactly they are, not some of them."""
        value, mask = cube
        if (value ^ self.value) & mask & self.mask:
            return None
        mask &= ~self.mask
        exact = not mask & self.unknown
        mask &= ~self.unknown
        if self.copies:
            out: Cube | None = (value & mask & ~self.copied, mask & ~self.copied)
            for t, w, s in self.copies:
                ones = (1 << w) - 1
                assert out is not None
                out = meet(out, ((value & mask) >> t << s & ones << s, mask >> t << s & ones << s))
                if out is None:
                    return None
            assert out is not None
            return out, exact
        return (value & mask, mask), exact


def _mask(*these: fields.Field) -> int:
    out = 0
    for field_ in these:
        out |= space.bits(field_, 0)[1]
    return out


_TRACKED = _mask(fields.CT_STATE, fields.CT_ZONE, fields.CT_MARK)
_VLAN = _mask(fields.VLAN_VID, fields.VLAN_PCP)
_TTL = _mask(fields.IP_TTL)
_TRANSLATED = _mask(
    *(fields.IPV4_SRC, fields.IPV4_DST, fields.TCP_SRC, fields.TCP_DST, fields.IPV6_SRC, fields.IPV6_DST)
)

NEW, EST, REL, RPL, INV, TRK, SNAT, DNAT = (1 << bit for bit in range(8))
"""Bits of ct_state (`ovs-fields(7)`)."""
CT_STATES = tuple(
    TRK | state
    for state in (NEW, EST, EST | RPL, REL, REL | RPL, REL | NEW, REL | NEW | RPL, REL | EST, REL | EST | RPL, INV, 0)
)
"""All that connection tracking can say of a packet, but for address translation."""

NOTHING_WRITTEN = Overlay()


class Region(NamedTuple):
    """Packets: from one of `ports`, in `cube`, in none of `minus`. `owned`: all have senders their port may use."""

    ports: int
    cube: Cube
    minus: tuple[Cube, ...] = ()
    owned: bool = False


class Then(NamedTuple):
    """What a resubmit comes back to."""

    actions: tuple[Action, ...]
    goto: int | None
    flow: Flow


class Place(NamedTuple):
    """Before a table, with what is written and what is still to be done; `tag`: by which learned flow, if by one."""

    table: int
    overlay: Overlay = NOTHING_WRITTEN
    then: tuple[Then, ...] = ()
    tag: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """Packets of `region` may leave by `port`, by an action of `flow`. IN_PORT is the port they came in by.

    Or a connection may be committed for them, where `is_kept(port)`.
    """

    region: Region
    port: int
    flow: Flow
    overlay: Overlay


class Learned(NamedTuple):
    """Packets of `region` may make `learn` install a flow."""

    region: Region
    learn: Learn
    overlay: Overlay


Owned = Callable[[Region], bool]


@dataclass(slots=True)
class Explorer:
    """One bridge's flows. `owned` tells of a region whether its senders are its port's own.

    With a `layout`, flows that nothing can come of are passed over.
    """

    rules: Rules
    owned: Owned = lambda region: False
    layout: Layout | None = None
    meter: Meter = field(default_factory=Meter)
    """What it may do; reading our own flows takes about 100 for each."""
    states: Callable[[], Iterable[int]] = lambda: CT_STATES
    """What connection tracking may say of a packet."""

    @property
    def ports(self) -> Ports:
        """The bridge's ports."""
        return self.rules.ports

    def lookup(self, place: Place, region: Region, *, keep: int | None) -> Iterator[tuple[Rule, Region]]:
        """The rules that packets of `region` can match at `place`, each with the packets that do.

        `keep` bounds how many cubes are kept taken away, None keeps all.
        """
        known = place.overlay.known(region.cube)
        floor = -1
        self.meter.spend(self.rules.shapes(place.table))
        rules = self.rules.meeting(place.table, known, region.ports)
        few = rules if len(rules) <= FEW_RULES else None
        for rule in rules:
            if rule.priority < floor:
                return
            if place.then or not self._idle(rule.flow):
                yield from self._residual(rule, place, region, keep, few)
            if rule.sure and self._covers(rule, place, region):
                floor = rule.priority  # another of the same priority may win as well

    def _idle(self, flow: Flow) -> bool:
        if self.layout is not None:
            return self.layout.idle(flow)
        return not flow.actions and flow.goto is None

    def _covers(self, rule: Rule, place: Place, region: Region) -> bool:
        if region.ports & ~rule.ports:
            return False
        before = place.overlay.before(rule.cube)
        return before is not None and before[1] and inside(region.cube, before[0])

    def _residual(
        self, rule: Rule, place: Place, region: Region, keep: int | None, among: list[Rule] | None
    ) -> Iterator[tuple[Rule, Region]]:
        """What higher flows leave to `rule`; `among` are all that can be met, if they are few."""
        before = place.overlay.before(rule.cube)
        if before is None:
            return
        cube = meet(region.cube, before[0])
        if cube is None:
            return
        ports = region.ports & rule.ports
        minus = [m for m in region.minus if meet(m, cube) is not None]
        partial: list[tuple[int, Cube]] = []
        if among is None:
            self.meter.spend(self.rules.shapes(place.table))
            among = self.rules.meeting(place.table, place.overlay.known(cube), ports, rule.flow.priority)
        self.meter.spend(1 + len(among) + len(region.minus))
        actions, goto = rule.flow.actions, rule.flow.goto
        for higher in among:
            if higher.flow.priority <= rule.flow.priority:
                break
            if not higher.sure or not higher.ports & ports:
                continue
            if higher.flow.goto == goto and higher.flow.actions == actions:
                continue
            theirs = place.overlay.before(higher.cube)
            if theirs is None or not theirs[1] or meet(theirs[0], cube) is None:
                continue
            if not ports & ~higher.ports:
                if inside(cube, theirs[0]):
                    return
                minus.append(theirs[0])
            elif inside(cube, theirs[0]):
                ports &= ~higher.ports
                if not ports:
                    return
            else:
                partial.append((higher.ports, theirs[0]))
        pieces = [(ports, minus)]
        for theirs_ports, theirs_cube in partial[:8] if keep is not None else partial:
            split = []
            for piece_ports, piece_minus in pieces:
                if within := piece_ports & theirs_ports:
                    split.append((within, [*piece_minus, theirs_cube]))
                if beside := piece_ports & ~theirs_ports:
                    split.append((beside, piece_minus))
            pieces = split
        for piece_ports, piece_minus in pieces:
            if piece_minus and empty(cube, piece_minus, self.meter):
                continue
            narrow, rest = _propagate(cube, piece_minus)
            left = Region(piece_ports, narrow, rest, region.owned)
            if not left.owned:
                left = left._replace(owned=self.owned(left))
            if keep is not None and len(rest) > keep:
                left = left._replace(minus=_widest(rest, keep))
            yield rule, left

    def perform(
        self, flow: Flow, actions: tuple[Action, ...], goto: int | None, place: Place, region: Region
    ) -> Iterator[Sent | Learned | tuple[Place, Region]]:
        """What actions do to packets of `region` that are at `place`: what leaves, what is learned, where they go on."""
        overlay, then = place.overlay, place.then
        for index, action in enumerate(actions):
            match action:
                case Output(fields.CONTROLLER):
                    pass
                case Output(fields.NORMAL | fields.FLOOD | fields.ALL):
                    yield Sent(region, ANYWHERE, flow, overlay)
                case Output(port):
                    yield Sent(region, 0xFFFE if port == fields.LOCAL else port, flow, overlay)
                case DecTtl():
                    ends = _ends(overlay.known(region.cube))
                    if ends is not False:  # this flow is done then, but what resubmitted the packet goes on
                        yield from self.back(overlay, then, region)
                    if ends:
                        return
                    overlay = overlay.blur(_TTL)
                case SetField() | Load() | Move() | CtClear() | PopVlan():
                    overlay = overlay.after(action) or overlay
                case Learn():
                    yield Learned(region, action, overlay)
                case Ct(zone=zone, table=table):
                    if action.commit:
                        what = overlay.blur(_TRANSLATED) if action.nat else overlay
                        yield Sent(region, kept_in(zone) if isinstance(zone, int) else ANY_ZONE, flow, what)
                    if table is not None:
                        yield from self._tracked(action, table, overlay, region)
                    overlay = overlay.write(0, _TRACKED)
                    if action.nat:  # later flows see it as it was, but translated it leaves: anything, to be safe
                        overlay = overlay.blur(_TRANSLATED)
                case Clone(copied):
                    yield from self.perform(flow, copied, None, Place(place.table, overlay), region)
                case Resubmit(table):
                    if len(then) < DEPTH:
                        rest = Then(actions[index + 1 :], goto, flow)
                        yield Place(table, overlay, (*then, rest)), region
                    return
                case Raw():
                    yield Sent(region, ANYWHERE, flow, overlay)
            if (isinstance(action, SetField) and action.header in space.IN_PORTS) or (
                isinstance(action, Load | Move) and action.target.header in space.IN_PORTS
            ):
                yield Sent(region, ANYWHERE, flow, overlay)  # what IN_PORT means from here on is not followed
        if goto is not None:
            yield Place(goto, overlay, then), region
        else:
            yield from self.back(overlay, then, region)

    def _tracked(self, ct: Ct, table: int, overlay: Overlay, region: Region) -> Iterator[tuple[Place, Region]]:
        """A copy goes on by itself, and does not come back to what had resubmitted the packet."""
        for state in self.states():
            for translated in (0, SNAT, DNAT, SNAT | DNAT) if ct.nat else (0,):
                yield Place(table, overlay.tracked(ct, state | translated)), region

    def back(
        self, overlay: Overlay, then: tuple[Then, ...], region: Region
    ) -> Iterator[Sent | Learned | tuple[Place, Region]]:
        """What becomes of packets that have done with a table, where a resubmit waits for them."""
        if then:
            *rest, last = then
            yield from self.perform(last.flow, last.actions, last.goto, Place(0, overlay, tuple(rest)), region)

    def step(
        self, place: Place, region: Region, *, keep: int | None
    ) -> Iterator[tuple[Rule | None, Sent | Learned | tuple[Place, Region]]]:
        """Everything that can become of packets of `region` at `place`."""
        for rule, matched in self.lookup(place, region, keep=keep):
            for outcome in self.perform(rule.flow, rule.flow.actions, rule.flow.goto, place, matched):
                yield rule, outcome
        if place.then:  # a miss comes back too; taken for possible always, which allows more
            for outcome in self.back(place.overlay, place.then, region):
                yield None, outcome

    def could_install(self, learned: Learned, number: int, own: Iterable[Cube] = (space.ALL,)) -> Iterator[Flow]:
        """Every flow that these packets, from port `number` and in `own`, could make `learn` install.

        What is not known of a packet is not compared.
        """
        region, learn, overlay = learned
        for cubes in own:
            cube = meet(region.cube, cubes)
            if cube is not None and not empty(cube, region.minus, self.meter):
                yield _instance(learn, overlay.known(cube), number)

    # -------------------------------------------------------------------------------------------------------- exact

    def paths(
        self, start: Region, limit: int, budget: list[int] | None = None
    ) -> Iterator[tuple[Sent, tuple[Rule | None, ...]]]:
        """Everything that packets of `start` can leave by, each with the flows on the way.

        Raises `TooLarge` after `limit` steps, or when a `budget`, which it uses up, comes to 0.
        """
        stack: list[tuple[Place, Region, tuple[Rule | None, ...]]] = [(Place(0), start, ())]
        while stack:
            limit -= 1
            if budget is not None:
                budget[0] -= 1
            if limit < 0 or (budget is not None and budget[0] < 0):
                raise TooLarge("too many different ways to follow one by one")
            place, region, way = stack.pop()
            for rule, outcome in self.step(place, region, keep=None):
                here = (*way, rule)
                match outcome:
                    case Sent():
                        yield outcome, here
                    case (Place() as to, Region() as left):
                        stack.append((to, left, here))


def _ends(now: Cube) -> bool | None:
    """Whether packets have no hop left; None if some may. Only IP counts hops: Open vSwitch leaves others as they are."""
    value, mask = now
    more = _TTL & ~space.bits(fields.IP_TTL, 1, 1)[1]
    if value & mask & more:
        return False
    if all(meet(now, kind) is None for kind in _COUNTING):
        return False
    return True if mask & more == more and any(inside(now, kind) for kind in _COUNTING) else None


_COUNTING = (space.bits(fields.ETH_TYPE, 0x0800), space.bits(fields.ETH_TYPE, 0x86DD))

_NOBODY_KNOWS = Bits(0, 0, 0)
"""As the source of a copy: what comes of it is not known."""


def _instance(learn: Learn, now: Cube, port: int) -> Flow:
    items: dict[int, tuple[int, int]] = {}
    loads: list[Action] = []
    for spec in learn.specs:
        source = spec.source
        width = spec.source.width if isinstance(spec, LearnOutput) else spec.target.width
        ones = (1 << width) - 1
        if isinstance(source, int):
            value, known = source, ones
        elif source.header in space.IN_PORTS:
            local = fields.LOCAL if source.header == fields.IN_PORT_FIELD.header else 0xFFFE
            number = local if port == 0xFFFE else port
            value, known = (number >> source.start & ones, ones) if port >= 0 else (0, 0)
        elif (where := space.place(source.header)) is not None:
            value, known = now[0] >> where[0] + source.start & ones, now[1] >> where[0] + source.start & ones
        else:
            value, known = 0, 0
        if isinstance(spec, LearnOutput):
            loads.append(Output(value) if known == ones else Raw(text=str(spec)))
        elif isinstance(spec, LearnLoad):
            loads.append(Load(value, spec.target) if known == ones else Move(_NOBODY_KNOWS, spec.target))
        else:
            header = spec.target.header
            header = fields.IN_PORT_FIELD.header if header in space.IN_PORTS else header
            if header == fields.IN_PORT_FIELD.header:
                if known == ones and spec.target.start == 0 and width >= 16:  # a part of it is taken for any port
                    items[header] = (fields.LOCAL if value == 0xFFFE else value, fields.IN_PORT_FIELD.full)
                continue
            old = items.get(header, (0, 0))
            start = spec.target.start
            items[header] = (old[0] | (value & known) << start, old[1] | known << start)
    match = Match.of((header, value, mask) for header, (value, mask) in items.items())
    return Flow(learn.table, learn.priority, match, tuple(loads), cookie=learn.cookie)


def _widest(cubes: Iterable[Cube], most: int) -> tuple[Cube, ...]:
    """The cubes with the fewest bits, as many as there may be, but all of one width or none.

    Of hundreds of single addresses some help nobody, and make the region another with each that comes or goes.
    """
    widths: dict[int, list[Cube]] = {}
    for cube in dict.fromkeys(cubes):
        widths.setdefault(cube[1].bit_count(), []).append(cube)
    out: list[Cube] = []
    for _, group in sorted(widths.items()):
        if len(out) + len(group) > most:
            break
        out += group
    return tuple(out)


def _propagate(cube: Cube, minus: list[Cube]) -> tuple[Cube, tuple[Cube, ...]]:
    """The same packets, with every taken-away cube that only one bit tells from the rest made part of the cube."""
    value, mask = cube
    changed = bool(minus)
    while changed:
        changed = False
        rest = []
        for theirs in minus:
            free = theirs[1] & ~mask
            if free and not free & (free - 1) and not (theirs[0] ^ value) & theirs[1] & mask:
                value |= free & ~theirs[0]
                mask |= free
                changed = True
            elif not (theirs[0] ^ value) & theirs[1] & mask:
                rest.append(theirs)
        minus = rest
    return (value, mask), tuple(minus)
