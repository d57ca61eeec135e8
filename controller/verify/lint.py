"""What is wrong with any flows of a bridge, whoever made them: each remark names the flow and a packet that shows it.

Nothing here needs a state file; with one, what crosses from a network into another is told too (`crossings`).
Imports node, rules, cubes and packetwords.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from controller import fields
from controller.fields import Field
from controller.flow import Ct, Flow, Learn, Output, Raw, Resubmit, every
from controller.frame import LOCAL_NAME
from controller.grants import openings
from controller.model import DesiredState, Network, Prefix
from controller.problems import Severity
from controller.verify.cubes import Exhausted, witness
from controller.verify.endpoints import SOMEBODY
from controller.verify.explore import ANYWHERE, TooLarge
from controller.verify.links import End
from controller.verify.node import LOCAL, Held, Node
from controller.verify.packetwords import words
from controller.verify.policy import both, granted, source, target
from controller.verify.rules import ANY_PORT, Ports, Rule, Rules
from controller.verify.space import ALL, ENTERING, PLACES, Cube, bits, get, inside, meet
from controller.verify.walk import Walker

FLOODS = frozenset((fields.NORMAL, fields.FLOOD, fields.ALL))
HIDDEN = 0xFFFF
"""What has a higher priority is no controller's: Open vSwitch put it there, and dump-flows does not show it."""
_SRC, _DST = fields.TCP_SRC, fields.TCP_DST
_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}
_LATER = bits(fields.IP_FRAG, 3, 3)


_IPV4 = both(bits(fields.ETH_TYPE, 0x0800), bits(fields.VLAN_VID, 0), bits(fields.IP_FRAG, 0))
_ADDRESSED = both(
    *(_IPV4, bits(fields.IP_TTL, 64), bits(fields.ETH_SRC, 0x020000000001), bits(fields.ETH_DST, 0x020000000002)),
    bits(fields.IPV4_SRC, 0xC000020A),
)
_USUAL: tuple[Cube, ...] = (
    both(_ADDRESSED, bits(fields.IPV4_DST, SOMEBODY), bits(fields.IP_PROTO, 6), bits(_SRC, 40000), bits(_DST, 443)),
    both(_ADDRESSED, bits(fields.IPV4_DST, SOMEBODY), bits(fields.IP_PROTO, 6), bits(_SRC, 40000)),
    both(_ADDRESSED, bits(fields.IPV4_DST, SOMEBODY), bits(fields.IP_PROTO, 17), bits(_SRC, 40000)),
    both(_ADDRESSED, bits(fields.IPV4_DST, SOMEBODY)),
    _IPV4,
    ALL,
)
"""Packets to show things by, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing wrong with `flow`. `example` is a packet that shows it and what becomes of it, empty where none can."""

    code: str
    severity: Severity
    flow: Flow
    expected: str
    fix: str
    example: str = ""
    other: Flow | None = None


class TableUse(NamedTuple):
    """A table that flows stand in, or are sent to: how many, whether packets get there, and what a miss does."""

    table: int
    flows: int
    reached: bool
    miss: str


@dataclass(slots=True)
class _Linted:
    """The flows of one bridge, indexed."""

    held: Held
    ports: Ports = field(default_factory=Ports)
    rules: Rules = field(init=False)
    walker: Walker = field(init=False)
    every: list[Rule] = field(default_factory=list)
    dead: dict[Flow, Flow | None] = field(default_factory=dict)
    tables: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for number in self.held.numbers.values():
            self.ports.one(number)
        self.rules = Rules((), self.ports)
        self.every = [self.rules.add(flow) for flow in self.held.flows]
        self.walker = Walker(self.held.flows)
        self.tables = _reached_tables(self.held.flows)

    def above(self, rule: Rule) -> list[Cube]:
        """What of a rule's packets higher ones take, on every port that it matches."""
        higher = self.rules.meeting(rule.flow.table, rule.cube, rule.ports, rule.priority)
        return [h.cube for h in higher if h.sure and (h.ports == ANY_PORT or h.ports == rule.ports)]

    def example(self, rule: Rule, *more: Cube, but: Iterable[Cube] = (), port: int | None = None) -> int | None:
        """A packet that matches a rule and no higher one, and is in `more` too. None where there is none.

        One that people send if there is one.
        """
        for usual in _USUAL:
            found = self._example(rule, usual, *more, but=but, port=port)
            if found is not None:
                return found
        return None

    def _example(self, rule: Rule, *more: Cube, but: Iterable[Cube], port: int | None) -> int | None:
        cube: Cube | None = rule.cube
        for other in more:
            cube = meet(cube, other) if cube is not None else None
        if cube is None:
            return None
        taken = [*self.above(rule), *but]
        if rule.ports == ANY_PORT and port is not None:
            bit = self.ports.one(port)
            met = self.rules.meeting(rule.flow.table, cube, bit, rule.priority)
            taken += [h.cube for h in met if h.sure and h.ports == bit]
        return witness(cube, taken)

    def in_port(self, rule: Rule) -> int:
        """A port that a rule's packets come in by."""
        return self.in_ports(rule)[0]

    def in_ports(self, rule: Rule, but: Collection[int] = ()) -> list[int]:
        """Ports that a rule's packets can come in by, the host's last."""
        if rule.ports != ANY_PORT:
            return self.ports.numbers(rule.ports)[:1]
        return [n for n in self.held.numbers.values() if n not in but and n != LOCAL] + [LOCAL]

    def packet(self, number: int, header: int) -> str:
        """A packet in words, its port by name where it has one."""
        name = self.held.port(number)
        return words(name if name.isidentifier() or "-" in name else number, header)

    def names(self, numbers: Iterable[int]) -> str:
        """Ports by name."""
        return ", ".join(sorted(self.held.port(number) for number in numbers))


def lint(held: Held) -> tuple[Remark, ...]:
    """Everything that is wrong with a bridge's flows. What cannot be decided is a remark too."""
    linted = _Linted(held)
    linted.dead = dict(_find_dead(linted))
    out: list[Remark] = []
    for rule in linted.every:
        if rule.flow.table not in linted.tables:
            continue
        for check in _CHECKS:
            try:
                out += check(linted, rule)
            except (Exhausted, TooLarge) as exc:
                out.append(_undecided(rule.flow, exc))
    return (*_unreached(linted), *out)


def _undecided(flow: Flow, exc: Exception) -> Remark:
    return Remark("undecided", Severity.ERROR, flow, "flows that can be taken apart", f"{exc}: simplify the masks.")


def tables(held: Held) -> tuple[TableUse, ...]:
    """The tables of a bridge, and what each misses to."""
    reached = _reached_tables(held.flows)
    counts: dict[int, int] = dict.fromkeys(sorted(reached), 0)
    last: dict[int, Flow] = {}
    for flow in held.flows:
        counts[flow.table] = counts.get(flow.table, 0) + 1
        if not flow.match and (flow.table not in last or flow.priority < last[flow.table].priority):
            last[flow.table] = flow
    return tuple(
        TableUse(number, count, number in reached, last[number].actions_text if number in last else "drop")
        for number, count in sorted(counts.items())
    )


# ----------------------------------------------------------------------------------------------------- dead and unread


def _reached_tables(flows: Iterable[Flow]) -> frozenset[int]:
    """Tables that packets can get to; all of them where an action is not understood."""
    leads: dict[int, set[int]] = {}
    raw: set[int] = set()
    for flow in flows:
        to = leads.setdefault(flow.table, set())
        if flow.goto is not None:
            to.add(flow.goto)
        for action in every(flow.actions):
            if isinstance(action, Resubmit) or (isinstance(action, Ct) and action.table is not None):
                to.add(action.table)  # type: ignore[arg-type]
            if isinstance(action, Raw):
                raw.add(flow.table)
    seen, todo = {0}, [0]
    while todo:
        number = todo.pop()
        if number in raw:
            return frozenset({0, *leads})
        fresh = leads.get(number, set()) - seen
        seen |= fresh
        todo += fresh
    return frozenset(seen)


def _find_dead(linted: _Linted) -> Iterator[tuple[Flow, Flow | None]]:
    """Flows that higher ones take every packet from, each with the one that does where it is a single one."""
    for rule in linted.every:
        higher = linted.rules.meeting(rule.flow.table, rule.cube, rule.ports, rule.priority)
        higher = [h for h in higher if h.sure and h.ports in (ANY_PORT, rule.ports)]
        one = next((h for h in higher if inside(rule.cube, h.cube)), None)
        if one is not None:
            yield rule.flow, one.flow
        elif len(higher) > 1:
            try:
                if witness(rule.cube, [h.cube for h in higher]) is None:
                    yield rule.flow, None
            except Exhausted:
                continue  # not known to be dead


def _unreached(linted: _Linted) -> Iterator[Remark]:
    told: set[int] = set()
    for rule in linted.every:
        table = rule.flow.table
        if table not in linted.tables and table not in told:
            told.add(table)
            count = sum(other.flow.table == table for other in linted.every)
            fix = f"No flow that packets get to leads to table {table}: its {count} flow(s) do nothing. Remove them, or go there."
            yield Remark("unreachable-table", Severity.WARNING, rule.flow, f"a flow that leads to table {table}", fix)


def _dead(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    if rule.flow in linted.dead:
        by = linted.dead[rule.flow]
        which = f"'{by}' takes" if by is not None else "several flows of higher priorities together take"
        fix = f"{which} every packet that it matches, so it never does anything. Remove it, or raise its priority."
        yield Remark("dead-flow", Severity.WARNING, rule.flow, "packets that are left to it", fix, other=by)


def _dead_learn(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    for action in every(rule.flow.actions):
        if isinstance(action, Learn) and action.table not in linted.tables:
            example = _shown(linted, rule, then=f"teaches table {action.table} a flow that no packet ever meets")
            fix = f"No flow sends packets to table {action.table}, so what is learned there is never used."
            expected = f"a flow that consults table {action.table}"
            yield Remark("dead-learn", Severity.WARNING, rule.flow, expected, fix, example)


# ------------------------------------------------------------------------------------------------------ what goes astray


def _overlap(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    flow = rule.flow
    if flow in linted.dead:
        return
    for other in linted.rules.meeting(flow.table, rule.cube, rule.ports, rule.priority - 1):
        if other.priority != rule.priority:
            continue
        if other is rule or other.flow.effect == flow.effect or other.flow.key < flow.key:
            continue  # of two, one says it
        both = other.ports & rule.ports if other.ports != ANY_PORT or rule.ports != ANY_PORT else ANY_PORT
        cube = meet(rule.cube, other.cube)
        if not both or cube is None:
            continue
        header = linted.example(rule, other.cube, but=linted.above(other))
        if header is None:
            continue
        number = linted.in_port(other if rule.ports == ANY_PORT else rule)
        fix = f"'{other.flow}' has the same priority and meets it: which of them wins is undefined. Give them different ones."
        example = f"{linted.packet(number, header)} matches both"
        yield Remark(
            "overlap", Severity.ERROR, flow, "one flow of that priority for a packet", fix, example, other.flow
        )
        return


def _floods(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    flow = rule.flow
    flooding = [a for a in every(flow.actions) if isinstance(a, Output) and a.port in FLOODS]
    if not flooding or flow in linted.dead:
        return
    example = _shown(linted, rule, then="may leave by any other port")
    if flow.priority > HIDDEN:
        fix = "Open vSwitch itself put it above every policy. In-band control: ovs-vsctl set bridge … other-config:disable-in-band=true;"
        fix += " a bridge without its controller: ovs-vsctl set-fail-mode … secure."
        yield Remark("hidden-flow", Severity.ERROR, flow, "no flow that dump-flows hides", fix, example)
    elif not flow.match:
        fix = f"Every port reaches every other by it, the host's {LOCAL_NAME} too, and through the host what that routes to. End with drop."
        yield Remark("default-normal", Severity.ERROR, flow, "drop as the default", fix, example)
    else:
        fix = "Output teaches normal switching no address, so packets are flooded to every port. Name the port."
        yield Remark("normal-floods", Severity.ERROR, flow, "an output to a port", fix, example)


def _hijack(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    """One port's traffic is told by its number alone: whoever else offers the same is robbed."""
    flow = rule.flow
    if _single_output(flow) is None or not _names(rule, _DST) or _mask(rule, fields.IPV4_DST) or flow in linted.dead:
        return
    robbed = bits(fields.IPV4_DST, SOMEBODY)
    port = _single_output(flow)
    assert port is not None
    example = _shown(
        linted,
        rule,
        robbed,
        then=f"goes to {linted.held.port(port)}, whoever it is for",
        but=(port,),
    )
    fix = "It takes such packets to any address, from everybody who offers the same port. Add nw_dst."
    yield Remark("hijack", Severity.ERROR, flow, "the address of the service (nw_dst)", fix, example)


def _stateless(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    """A return path told by its source port is open to whoever chooses that source port."""
    flow = rule.flow
    if not _outputs(flow) or not _names(rule, _SRC) or _mask(rule, _DST) or flow in linted.dead:
        return
    ssh = bits(_DST, 22)
    example = _shown(
        linted, rule, ssh, then=f"leaves by {linted.names(_outputs(flow))}: to port 22, from a chosen source port"
    )
    source = get(rule.cube[0], _SRC)
    fix = f"Whoever sends from source port {source} reaches every port behind it. Follow connections (ct_state), or name tp_dst."
    yield Remark("stateless-return", Severity.ERROR, flow, "replies told by their connection", fix, example)


def _astray(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    """A service whose answers do not go back to where its clients come from."""
    flow = rule.flow
    port = _single_output(flow)
    protocol = get(rule.cube[0], fields.IP_PROTO)
    if port is None or not _names(rule, _DST) or protocol not in _PROTOCOLS or flow in linted.dead:
        return
    service = get(rule.cube[0], _DST)
    own = get(rule.cube[0], fields.IPV4_DST) if _mask(rule, fields.IPV4_DST) == fields.IPV4_DST.full else None
    answer = _ADDRESSED[0] | bits(fields.IPV4_DST, SOMEBODY)[0] | bits(fields.IP_PROTO, protocol)[0]
    answer |= bits(_SRC, service)[0] | bits(_DST, 40000)[0]
    if own is not None:
        answer = answer & ~bits(fields.IPV4_SRC, 0)[1] | bits(fields.IPV4_SRC, own)[0]
    leaves = {number for number, _ in linted.walker.follow(port, answer).sent}
    clients = (
        set(linted.ports.numbers(rule.ports)) if rule.ports != ANY_PORT else set(linted.held.numbers.values()) - {port}
    )
    if not leaves or ANYWHERE in leaves or clients <= leaves:
        return
    what = f"{_PROTOCOLS[protocol]} port {service}"
    fix = f"Clients of {what} come in by {linted.names(clients)}, and its answers leave by {linted.names(leaves)} alone: most never get them."
    example = f"{linted.packet(port, answer)} leaves by {linted.names(leaves)}"
    yield Remark("replies-astray", Severity.ERROR, flow, "answers that return the way their clients came", fix, example)


def _fragments(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    """A deny by port lets later fragments pass, which show no ports (`ovs-fields(7)`, nw_frag)."""
    flow = rule.flow
    if flow.actions or flow.goto is not None or not (_mask(rule, _DST) or _mask(rule, _SRC)) or flow in linted.dead:
        return
    ports = bits(_DST, 0)[1] | bits(_SRC, 0)[1]
    piece = rule.cube[0] & ~ports & ~ENTERING[1] | _LATER[0]
    number = linted.in_port(rule)
    way = linted.walker.follow(number, piece)
    leaves = {to for to, _ in way.sent}
    if leaves and flow.table == 0:
        where = "any port" if ANYWHERE in leaves else linted.names(leaves)
        fix = "Later fragments show no ports, so they pass it. Drop them too (nw_frag=later), or allow by port and drop the rest."
        example = f"{linted.packet(number, piece)} leaves by {where}"
        yield Remark("fragments-pass", Severity.WARNING, flow, "a drop that fragments do not pass", fix, example)


def _hairpin(linted: _Linted, rule: Rule) -> Iterator[Remark]:
    if rule.ports != ANY_PORT and set(linted.ports.numbers(rule.ports)) & _outputs(rule.flow):
        fix = "The switch never sends a packet back to where it came from. Write in_port as the action, or remove it."
        yield Remark("hairpin", Severity.WARNING, rule.flow, "an output that is not the in_port", fix)


_CHECKS: tuple[Callable[[_Linted, Rule], Iterator[Remark]], ...] = (
    _dead,
    _dead_learn,
    _overlap,
    _floods,
    _hijack,
    _stateless,
    _astray,
    _fragments,
    _hairpin,
)


def _shown(linted: _Linted, rule: Rule, *more: Cube, then: str, but: Collection[int] = ()) -> str:
    for number in linted.in_ports(rule, but):
        header = linted.example(rule, *more, port=number)
        if header is not None:
            return f"{linted.packet(number, header)} {then}"
    return ""


def _outputs(flow: Flow) -> set[int]:
    """Ports that a flow sends to by number."""
    outputs = {a.port for a in every(flow.actions) if isinstance(a, Output)}
    return {LOCAL if n == fields.LOCAL else n for n in outputs if n < 0xFF00 or n in (fields.LOCAL, LOCAL)}


def _single_output(flow: Flow) -> int | None:
    outputs = _outputs(flow)
    return outputs.pop() if len(outputs) == 1 and flow.goto is None else None


def _mask(rule: Rule, of: Field) -> int:
    at, width = PLACES[of.header]
    return rule.cube[1] >> at & (1 << width) - 1


def _names(rule: Rule, port: Field) -> bool:
    return _mask(rule, port) == port.full and _mask(rule, fields.IP_PROTO) == fields.IP_PROTO.full


# -------------------------------------------------------------------------------------------------- with a state's words


def crossings(state: DesiredState, node: Node) -> Iterator[tuple[str, Remark]]:
    """Flows that let a packet of one network, sent to another's address, leave at all; each with its bridge.

    A packet for another network has no business on any port, but for what is granted. Raises `TooLarge` or `Exhausted`.
    """
    told: set[tuple[str, Flow]] = set()
    opened: dict[str, list[Cube]] = {}
    answers: dict[str, list[Cube]] = {}
    for o in openings(state):
        packets, replies = granted(o.source, o.target, o.protocol, o.port)
        opened.setdefault(o.source.id, []).append(packets)
        answers.setdefault(o.target.id, []).append(replies)
    for network in state.networks:
        held = node.bridges.get(network.bridge)
        if held is None:
            continue
        foreign = [(n.name, p) for n in state.networks if n is not network for p in n.prefixes]
        there = [m for n in state.networks if n is not network for m in n.members]
        for member in network.members:
            if member.port not in held.numbers:
                continue
            usual = [both(source(member.address), bits(fields.ETH_SRC, member.mac), bits(fields.IP_TTL, 64))]
            usual = [*(both(usual[0], bits(fields.IPV4_DST, other.address)) for other in there), *usual, ALL]
            for name, prefix in foreign:
                ways = opened.get(member.id, ()), answers.get(member.id, ())
                for remark in _crossing(node, network, (network.bridge, member.port), name, prefix, usual, ways):
                    if (network.bridge, remark.flow) not in told:
                        told.add((network.bridge, remark.flow))
                        yield network.bridge, remark


def _crossing(
    node: Node,
    network: Network,
    start: End,
    name: str,
    prefix: Prefix,
    usual: list[Cube],
    ways: tuple[Collection[Cube], Collection[Cube]],
) -> Iterator[Remark]:
    """`ways` are what the sender may open, and what its replies look like."""
    for arrival in node.arrivals(start, target(prefix), taught=True):
        cubes = (meet(arrival.region.cube, cube) for cube in usual)
        headers = (witness(cube, arrival.region.minus) for cube in cubes if cube is not None)
        header = next((header for header in headers if header is not None), None)
        flow = next((hop.flow for hop in reversed(arrival.way) if hop.flow is not None), None)
        if any(inside(arrival.region.cube, c) for c in (*ways[0], *(ways[1] if arrival.learned else ()))):
            continue
        if header is None or flow is None or arrival.end == start:
            continue
        example = f"{words(start[1], header)} leaves by {arrival.end[1]} of {arrival.end[0]}"
        fix = (
            f"What {network.name} sends to {name}'s {prefix} must drop; only a grant opens a way. Add a drop above it."
        )
        yield Remark("crossing", Severity.ERROR, flow, f"no way for packets to {prefix} of {name}", fix, example)
