"""A switch without I/O: holds flows, carries out the core's effects, and passes packets through its tables.

It does what Open vSwitch does as far as our flows go (`ovs-actions(7)`, `ovs-ofctl(8)`): strict deletes bound to a
cookie, one answer for a whole bundle, a flow monitor that tells of other people's changes and abbreviates ours, time-
outs, `learn` with a limit, and no output to the port a packet came in by. Time moves only when `advance` is called.
`FakeSwitch` is one switch, `Wired` is a core with several. Of the codec only the values that signals carry are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from controller import fields
from controller.codec import FlowRemoved, FlowStats, FlowUpdate, PacketIn, Reason, Update
from controller.core import Core
from controller.events import Event, Kind
from controller.fields import BY_NAME, Field
from controller.flow import (
    SEND_FLOW_REM,
    Action,
    Bits,
    Flow,
    Learn,
    LearnLoad,
    LearnMatch,
    Load,
    Match,
    Move,
    Output,
    Resubmit,
    SetField,
    is_learned,
    is_ours,
)
from controller.frame import Port
from controller.model import DesiredState, Ipv4, Mac
from controller.pipeline import KIND, VIOLATION, Violation, table_name
from controller.signals import (
    AddFlow,
    Committed,
    Count,
    Counted,
    Dump,
    Dumped,
    Effect,
    FlowGone,
    FlowsChanged,
    Install,
    Log,
    PacketSeen,
    PortChanged,
    Refused,
    SendPacket,
    Signal,
    StateLoaded,
    SwitchDown,
    SwitchUp,
    Tick,
)

Packet = dict[int, int]
"""Header fields by OXM header; what is not there is 0."""
Place = tuple[int, int, Match]
"""Table, priority and match: what identifies a flow in a switch."""


# ----------------------------------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True, slots=True)
class Sent:
    """The packet left by a port. `packet` is how it looked then; two outcomes are equal if the port is."""

    port: int
    packet: Mapping[int, int] = field(default_factory=dict, compare=False)

    def get(self, name: str) -> int:
        """A header field of the packet that left."""
        return self.packet.get(BY_NAME[name].header, 0)


@dataclass(frozen=True, slots=True)
class Dropped:
    """No output and no further table; `table` is where it ended."""

    table: str


@dataclass(frozen=True, slots=True)
class Shown:
    """The packet went to the controller as a violation of this kind (0: of none)."""

    kind: int
    packet: Mapping[int, int] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return f"Shown({Violation(self.kind).name if self.kind else 0})"


Outcome = Sent | Dropped | Shown


class Ambiguous(AssertionError):
    """Two flows of one priority match one packet and differ in what they do."""


# ------------------------------------------------------------------------------------------------------------ packets


Values = Mapping[str, int | str]
"""Header fields by name; texts are addresses."""


def packet(in_port: int, *headers: Values, **more: int | str) -> Packet:
    """A packet by field names. The protocol fields that others imply are filled in."""
    values = {name: value for header in (*headers, more) for name, value in header.items()}
    found = {BY_NAME[name].header: _number(BY_NAME[name], value) for name, value in values.items()}
    found[fields.IN_PORT_FIELD.header] = in_port
    for prefix, header, value in _IMPLIED:
        if any(name.startswith(prefix) for name in values):
            found.setdefault(header, value)
    return found


_ETH_TYPE, _IP_PROTO = fields.ETH_TYPE.header, fields.IP_PROTO.header
_IMPLIED = (
    ("tcp_", _IP_PROTO, 6),
    ("udp_", _IP_PROTO, 17),
    ("sctp_", _IP_PROTO, 132),
    ("icmpv4_", _IP_PROTO, 1),
    ("icmpv6_", _IP_PROTO, 58),
    ("arp_", _ETH_TYPE, 0x0806),
    ("ipv6_", _ETH_TYPE, 0x86DD),
    ("icmpv6_", _ETH_TYPE, 0x86DD),
    ("ip", _ETH_TYPE, 0x0800),
    ("tcp_", _ETH_TYPE, 0x0800),
    ("udp_", _ETH_TYPE, 0x0800),
    ("sctp_", _ETH_TYPE, 0x0800),
    ("icmpv4_", _ETH_TYPE, 0x0800),
)


def _number(of: Field, value: int | str) -> int:
    if isinstance(value, int):
        return int(value)
    return int(Mac.parse(value) if of.bits == 48 else Ipv4.parse(value))


def show(of: Mapping[int, int]) -> str:
    """A packet in words, for messages of failing tests."""
    return ",".join(fields.by_header(h).text(v, fields.by_header(h).full) for h, v in sorted(of.items()))


# A field is only there in packets of its protocol, and a match or an action on it has to say so (OpenFlow 1.4.1,
# 7.2.3.8); Open vSwitch refuses a flow that does not.
_IPV4_ONLY, _IP = {0x0800}, {0x0800, 0x86DD}
_ARP = {0x0806}
_NEEDS_ETH_TYPE: dict[int, set[int]] = {
    **{f.header: _ARP for f in (fields.ARP_OP, fields.ARP_SPA, fields.ARP_TPA, fields.ARP_SHA, fields.ARP_THA)},
    **{f.header: _IPV4_ONLY for f in (fields.IPV4_SRC, fields.IPV4_DST)},
    **{f.header: {0x86DD} for f in (fields.IPV6_SRC, fields.IPV6_DST)},
    **{f.header: _IP for f in (fields.IP_PROTO, fields.IP_DSCP, fields.IP_ECN, fields.IP_FRAG, fields.IP_TTL)},
}
_NEEDS_PROTO: dict[int, int] = {
    **{f.header: 6 for f in (fields.TCP_SRC, fields.TCP_DST, fields.TCP_FLAGS)},
    **{f.header: 17 for f in (fields.UDP_SRC, fields.UDP_DST)},
    **{f.header: 132 for f in (fields.SCTP_SRC, fields.SCTP_DST)},
    **{f.header: 1 for f in (fields.ICMPV4_TYPE, fields.ICMPV4_CODE)},
    **{f.header: 58 for f in (fields.ICMPV6_TYPE, fields.ICMPV6_CODE)},
}


def _ready(header: int, known: Mapping[int, int]) -> bool:
    """Whether a packet that has the `known` fields is sure to have this one."""
    proto = _NEEDS_PROTO.get(header)
    if proto is not None:
        eth_types = {0x86DD} if proto == 58 else _IPV4_ONLY if proto == 1 else _IP
        return known.get(_IP_PROTO) == proto and known.get(_ETH_TYPE) in eth_types
    needed = _NEEDS_ETH_TYPE.get(header)
    return needed is None or known.get(_ETH_TYPE) in needed


def refusal(flow: Flow) -> str | None:
    """Why Open vSwitch would refuse a flow, or None. Table ids, prerequisites and ports, as far as we use them."""
    known: dict[int, int] = {}
    # In the order of the wire, OpenFlow's own fields first: what a field needs has to come before it.
    for header, value, mask in sorted(flow.match, key=lambda item: item[0] >> 16 != fields.OPENFLOW_BASIC):
        if not _ready(header, known):
            return f"bad match: prerequisite of {fields.by_header(header).name}"
        if mask == fields.by_header(header).full:
            known[header] = value
    if flow.goto is not None and flow.goto <= flow.table:
        return "bad instruction: goto backwards"
    for action in flow.actions:
        for header in _touched(action, known):
            return f"bad action: prerequisite of {fields.by_header(header).name}"
    return None


def _touched(action: Action, known: Mapping[int, int]) -> Iterator[int]:
    """Fields that an action uses and that the packet may not have."""
    match action:
        case SetField(header, _):
            used = [header]
        case Move(source, target):
            used = [source.header, target.header]
        case Load(_, target):
            used = [target.header]
        case Learn(specs=specs):
            learned: dict[int, int] = {}
            used = []
            for spec in specs:
                if not isinstance(spec.source, int):
                    used.append(spec.source.header)
                if not _ready(spec.target.header, learned if isinstance(spec, LearnMatch) else {**known, **learned}):
                    yield spec.target.header
                if isinstance(spec, LearnMatch) and isinstance(spec.source, int):
                    learned[spec.target.header] = spec.source
        case _:
            used = []
    yield from (header for header in used if not _ready(header, known))


# ------------------------------------------------------------------------------------------------------------- switch


@dataclass(slots=True)
class Entry:
    """A flow in the switch. `used_at` is its last packet, `renewed_at` when it was added or learned anew."""

    flow: Flow
    added_at: float
    used_at: float
    renewed_at: float
    packets: int = 0

    def ends_at(self) -> tuple[float, Reason] | None:
        """When it ends if nothing happens, and of what."""
        ends = []
        if self.flow.hard_s:
            ends.append((self.renewed_at + self.flow.hard_s, Reason.HARD))
        if self.flow.idle_s:
            ends.append((self.used_at + self.flow.idle_s, Reason.IDLE))
        return min(ends) if ends else None


@dataclass(slots=True)
class _Walk:
    """One packet on its way through the tables."""

    packet: Packet
    in_port: int
    real: bool
    outcomes: list[Outcome] = field(default_factory=list)
    last: int = 0
    punts: list[PacketIn] = field(default_factory=list)
    updates: list[FlowUpdate] = field(default_factory=list)
    data: bytes = b""


class FakeSwitch:
    """One switch. `ports` are numbers by name; LOCAL is added under the switch's own name.

    Every method that makes the switch say something returns the signals that the shell would feed the core.
    """

    def __init__(self, name: str, dpid: int, ports: Mapping[str, int], *, mesh: bool = False, now: float = 0.0) -> None:
        self.name = name
        self.dpid = dpid
        self.mesh = mesh
        self.now = now
        self.ports: dict[str, Port] = {}
        self.flows: dict[Place, Entry] = {}
        self.connected = False
        self.monitoring = False
        self.packets_out: list[tuple[int, bytes]] = []
        self.log: list[Event] = []
        self.installs: list[Install] = []
        self.dumps = 0
        self.refusing = 0
        """How many bundles from now on are refused."""
        self.cutting: Literal["before", "after"] | None = None
        """The connection breaks in the next bundle: `before` or `after` it is committed."""
        self.unsure = False
        """The next bundle is committed, but its answer is lost and the link gives it up."""
        self.mute = False
        """Effects are taken and never answered."""
        self.samples_left: int | None = None
        """Packet-ins that the controller meter still lets through; None is all."""
        self._add_port(name, fields.LOCAL)
        for port, number in ports.items():
            self._add_port(port, number)

    # -------------------------------------------------------------------------------------------------- connection

    def connect(self) -> list[Signal]:
        """The controller's connection is there (again)."""
        self.connected, self.monitoring = True, False
        return [SwitchUp(self.dpid, self.name, tuple(self.ports.values()), "test")]

    def disconnect(self) -> list[Signal]:
        """The connection breaks; flows stay."""
        if not self.connected:
            return []
        self.connected = self.monitoring = False
        return [SwitchDown(self.dpid)]

    def restart(self) -> list[Signal]:
        """The daemon is restarted: every flow is lost, and so is the connection."""
        self.flows.clear()
        return self.disconnect()

    def _say(self, *signals: Signal) -> list[Signal]:
        return list(signals) if self.connected else []

    def _tell(self, updates: Iterable[FlowUpdate]) -> list[Signal]:
        told = tuple(updates)
        return self._say(FlowsChanged(self.dpid, told)) if told and self.monitoring else []

    # ------------------------------------------------------------------------------------------------------- ports

    def _add_port(self, name: str, number: int, up: bool = True) -> Port:
        assert number not in {p.number for n, p in self.ports.items() if n != name}, f"two ports have number {number}"
        self.ports[name] = Port(number, name, Mac.derive(self.name, "port", name), up)
        return self.ports[name]

    def number(self, name: str) -> int:
        """The number of a port by its name."""
        return self.ports[name].number

    def plug(self, name: str, number: int, up: bool = True) -> list[Signal]:
        """A port comes, or changes its link."""
        return self._say(PortChanged(self.dpid, self._add_port(name, number, up)))

    def unplug(self, name: str) -> list[Signal]:
        """A port goes."""
        return self._say(PortChanged(self.dpid, self.ports.pop(name), gone=True))

    # ----------------------------------------------------------------------------------------------------- effects

    def run(self, effects: Iterable[Effect]) -> list[Signal]:
        """Carry out effects. Those of other switches and all of them while disconnected are lost; logs are kept."""
        out: list[Signal] = []
        for effect in effects:
            if isinstance(effect, Log):
                self.log.append(effect.event)
            elif effect.dpid == self.dpid and self.connected and not self.mute:
                out += self._run(effect)
        return out

    def _run(self, effect: Dump | Install | AddFlow | SendPacket | Count) -> list[Signal]:
        match effect:
            case Dump():
                self.monitoring = True
                self.dumps += 1
                return [Dumped(self.dpid, self.stats())]
            case Count():
                return [Counted(self.dpid, tuple(s for s in self.stats() if s.flow.table == VIOLATION.id))]
            case Install():
                return self._install(effect)
            case AddFlow(_, flow):
                assert refusal(flow) is None, refusal(flow)
                self._put(flow)
                return self._tell([FlowUpdate(Update.ABBREVIATED)])
            case SendPacket(_, port, data):
                self.packets_out.append((port, data))
                return []

    def stats(self) -> tuple[FlowStats, ...]:
        """Every flow with its counters."""
        return tuple(FlowStats(e.flow, e.packets, 100 * e.packets, self.now - e.added_at) for e in self.flows.values())

    def _install(self, install: Install) -> list[Signal]:
        self.installs.append(install)
        if self.cutting == "before":
            self.cutting = None
            return self.disconnect()
        todo = install.plan
        why = next((why for why in map(refusal, (*todo.change, *todo.add)) if why), None)
        if self.refusing:
            self.refusing -= 1
            why = why or "'bundle failed' (type 17, code 0)"
        if why:
            return [Refused(self.dpid, install.token, why)]
        gone = [signal for flow in todo.delete for signal in self._delete(flow)]
        for flow in (*todo.change, *todo.add):
            self._put(flow)
        if self.cutting == "after":
            self.cutting = None
            return self.disconnect()
        if self.unsure:
            self.unsure = False
            return [
                *gone,
                *self._tell([FlowUpdate(Update.ABBREVIATED)]),
                Refused(self.dpid, install.token, "no answer"),
            ]
        return [*gone, *self._tell([FlowUpdate(Update.ABBREVIATED)]), Committed(self.dpid, install.token)]

    def _delete(self, flow: Flow) -> list[Signal]:
        entry = self.flows.get(place(flow))
        if entry is None or entry.flow.cookie != flow.cookie:
            return []
        return self._end(entry, Reason.DELETE, told=False)

    def _put(self, flow: Flow) -> Entry:
        before = self.flows.get(place(flow))
        entry = Entry(flow, self.now, self.now, self.now, before.packets if before else 0)
        self.flows[place(flow)] = entry
        return entry

    def _end(self, entry: Entry, reason: Reason, *, told: bool = True) -> list[Signal]:
        del self.flows[place(entry.flow)]
        out = self._tell([FlowUpdate(Update.REMOVED, _seen(entry.flow), int(reason))]) if told else []
        if entry.flow.flags & SEND_FLOW_REM:
            bare = Flow(entry.flow.table, entry.flow.priority, entry.flow.match, (), None, entry.flow.cookie)
            out += self._say(FlowGone(self.dpid, FlowRemoved(bare, int(reason), entry.packets, 100 * entry.packets)))
        return out

    def hold(self, flows: Iterable[Flow]) -> None:
        """Have these flows, with nobody told: for tests without a core. What Open vSwitch would refuse fails."""
        for flow in flows:
            assert refusal(flow) is None, f"{refusal(flow)}: {flow}"
            self._put(flow)

    # ------------------------------------------------------------------------------------------------ other people

    def add_by_others(self, *flows: Flow) -> list[Signal]:
        """Somebody else adds flows, or puts them over those that are there."""
        updates = []
        for flow in flows:
            event = Update.MODIFIED if place(flow) in self.flows else Update.ADDED
            self._put(flow)
            updates.append(FlowUpdate(event, _seen(flow)))
        return self._tell(updates)

    def remove_by_others(self, *flows: Flow) -> list[Signal]:
        """Somebody else removes flows."""
        out: list[Signal] = []
        for flow in flows:
            out += self._end(self.flows[place(flow)], Reason.DELETE)
        return out

    def clear_by_others(self) -> list[Signal]:
        """Somebody else deletes every flow (`ovs-ofctl del-flows`)."""
        return self.remove_by_others(*[entry.flow for entry in self.flows.values()])

    # -------------------------------------------------------------------------------------------------------- time

    def advance(self, now: float) -> list[Signal]:
        """It is later: flows whose time is up end, the earliest first."""
        out: list[Signal] = []
        while True:
            due = [(end[0], end[1], entry) for entry in self.flows.values() if (end := entry.ends_at()) is not None]
            due = [item for item in due if item[0] < now]
            if not due:
                break
            at, reason, entry = min(due, key=lambda item: item[0])
            self.now = max(self.now, at)
            out += self._end(entry, reason)
        self.now = max(self.now, now)
        return out

    # ------------------------------------------------------------------------------------------------------- views

    def ours(self) -> set[Flow]:
        """Flows with our cookie that the controller made."""
        return {e.flow for e in self.flows.values() if is_ours(e.flow.cookie) and not is_learned(e.flow.cookie)}

    def learned(self) -> set[Flow]:
        """Flows that `learn` made."""
        return {e.flow for e in self.flows.values() if is_learned(e.flow.cookie)}

    def foreign(self) -> set[Flow]:
        """Flows of other people."""
        return {e.flow for e in self.flows.values() if not is_ours(e.flow.cookie)}

    # ------------------------------------------------------------------------------------------------------ packets

    def trace(self, in_port: int, *headers: Values, table: int = 0, **more: int | str) -> Outcome:
        """What would become of a packet; changes nothing. `table` starts it further down, with registers as given."""
        return self.follow(packet(in_port, *headers, **more), table)

    def follow(self, start: Mapping[int, int], table: int = 0) -> Outcome:
        """The same for a packet that is there already."""
        return self._outcome(self._walk(_Walk(dict(start), start[fields.IN_PORT_FIELD.header], real=False), table))

    def send(
        self, in_port: int, *headers: Values, data: bytes = b"", **more: int | str
    ) -> tuple[Outcome, list[Signal]]:
        """Send a packet in: counters count, `learn` learns, the controller is shown what it is to be shown."""
        return self.push(packet(in_port, *headers, **more), data)

    def push(self, start: Mapping[int, int], data: bytes = b"") -> tuple[Outcome, list[Signal]]:
        """The same for a packet that is there already."""
        walk = _Walk(dict(start), start[fields.IN_PORT_FIELD.header], real=True, data=data)
        outcome = self._outcome(self._walk(walk, 0))
        out = self._tell(walk.updates)
        for punt in walk.punts:
            if self.samples_left is not None:
                if self.samples_left <= 0:
                    continue
                self.samples_left -= 1
            out += self._say(PacketSeen(self.dpid, punt))
        return outcome, out

    def _outcome(self, walk: _Walk) -> Outcome:
        assert len(walk.outcomes) <= 1, f"one packet became several: {walk.outcomes}"
        return walk.outcomes[0] if walk.outcomes else Dropped(self.table_name(walk.last))

    def table_name(self, number: int) -> str:
        """The name of a table of this switch."""
        return table_name(number, mesh=self.mesh)

    def _walk(self, walk: _Walk, table: int | None) -> _Walk:
        while table is not None:
            walk.last = table
            entry = self._lookup(table, walk.packet)
            if entry is None:
                break
            if walk.real:
                entry.packets += 1
                entry.used_at = self.now
            for action in entry.flow.actions:
                self._act(walk, entry.flow, action)
            table = entry.flow.goto
        return walk

    def _lookup(self, table: int, header: Mapping[int, int]) -> Entry | None:
        found = [e for e in self.flows.values() if e.flow.table == table and _matches(e.flow, header)]
        if not found:
            return None
        best = max(entry.flow.priority for entry in found)
        winners = [entry for entry in found if entry.flow.priority == best]
        for other in winners[1:]:
            if (other.flow.actions, other.flow.goto) != (winners[0].flow.actions, winners[0].flow.goto):
                raise Ambiguous(f"{show(header)} matches\n  {winners[0].flow}\n  {other.flow}")
        return winners[0]

    def _act(self, walk: _Walk, flow: Flow, action: Action) -> None:
        match action:
            case Output(port, max_len):
                self._output(walk, flow, port, max_len)
            case SetField(header, value):
                walk.packet[header] = value
            case Load(value, target):
                _write(walk.packet, target, value)
            case Move(source, target):
                _write(walk.packet, target, _read(walk.packet, source))
            case Resubmit(table):
                last = walk.last
                self._walk(walk, table)
                walk.last = last
            case Learn():
                if walk.real:
                    self._learn(walk, action)
            case _:
                raise AssertionError(f"the fake switch does not know {action}")

    def _output(self, walk: _Walk, flow: Flow, port: int, max_len: int) -> None:
        if port == fields.CONTROLLER:
            kind = walk.packet.get(KIND.header, 0)
            walk.outcomes.append(Shown(kind, dict(walk.packet)))
            items = [(fields.IN_PORT_FIELD.header, walk.in_port, 0xFFFFFFFF)]
            items += [
                (reg.header, walk.packet[reg.header], 0xFFFFFFFF) for reg in fields.REGS if reg.header in walk.packet
            ]
            data = walk.data[:max_len]
            walk.punts.append(PacketIn(flow.cookie, flow.table, Match.of(items), data, len(walk.data)))
        elif port == fields.IN_PORT:
            walk.outcomes.append(Sent(walk.in_port, dict(walk.packet)))
        elif port != walk.in_port and port in {p.number for p in self.ports.values()}:
            walk.outcomes.append(Sent(port, dict(walk.packet)))

    def _learn(self, walk: _Walk, learn: Learn) -> None:
        flow = learned_flow(learn, walk.packet)
        there = self.flows.get(place(flow))
        if there is not None and there.flow == flow:
            there.renewed_at = self.now
            return
        alike = [e for e in self.flows.values() if (e.flow.table, e.flow.cookie) == (learn.table, learn.cookie)]
        if there is None and learn.limit and len(alike) >= learn.limit:
            return
        event = Update.MODIFIED if there is not None else Update.ADDED
        self._put(flow)
        walk.updates.append(FlowUpdate(event, _seen(flow)))


def place(flow: Flow) -> Place:
    """What identifies the flow in a switch."""
    return flow.table, flow.priority, flow.match


def _seen(flow: Flow) -> Flow:
    """The flow as the monitor tells it: without flags."""
    return Flow(flow.table, flow.priority, flow.match, flow.actions, flow.goto, flow.cookie, flow.idle_s, flow.hard_s)


def _matches(flow: Flow, header: Mapping[int, int]) -> bool:
    return all(header.get(of, 0) & mask == value for of, value, mask in flow.match)


def _read(header: Mapping[int, int], bits: Bits) -> int:
    if bits.header == fields.IN_PORT_16.header:
        value = header[fields.IN_PORT_FIELD.header] & 0xFFFF
    else:
        value = header.get(bits.header, 0)
    return value >> bits.start & ((1 << bits.width) - 1)


def _write(header: Packet, bits: Bits, value: int) -> None:
    mask = (1 << bits.width) - 1
    assert value & ~mask == 0, f"{value:#x} does not fit {bits}"
    header[bits.header] = header.get(bits.header, 0) & ~(mask << bits.start) | value << bits.start


def learned_flow(learn: Learn, header: Mapping[int, int]) -> Flow:
    """The flow that a learn action makes of a packet."""
    items: dict[int, tuple[int, int]] = {}
    actions: list[Action] = []
    for spec in learn.specs:
        value = spec.source if isinstance(spec.source, int) else _read(header, spec.source)
        target = spec.target
        if isinstance(spec, LearnLoad):
            whole = target.start == 0 and target.width == fields.by_header(target.header).bits
            actions.append(SetField(target.header, value) if whole else Load(value, target))
        elif target.header == fields.IN_PORT_16.header:
            # OpenFlow 1.4 ports have 32 bits, the reserved ones with all high bits set.
            items[fields.IN_PORT_FIELD.header] = (value if value < 0xFF00 else value | 0xFFFF0000, 0xFFFFFFFF)
        else:
            old, old_mask = items.get(target.header, (0, 0))
            mask = ((1 << target.width) - 1) << target.start
            items[target.header] = (old | value << target.start, old_mask | mask)
    match = Match.of((of, value, mask) for of, (value, mask) in items.items())
    return Flow(
        learn.table,
        learn.priority,
        match,
        tuple(actions),
        None,
        learn.cookie,
        learn.idle_s,
        learn.hard_s,
        SEND_FLOW_REM,
    )


# -------------------------------------------------------------------------------------------------------------- wired


class Wired:
    """A core and its switches in conversation; nothing happens and no time passes unless a test says so."""

    def __init__(self, state: DesiredState, *switches: FakeSwitch, now: float = 1000.0) -> None:
        self.core = Core(state)
        self.now = now
        self.switches = {switch.dpid: switch for switch in switches}
        self.events: list[Event] = []
        for switch in switches:
            switch.now = now

    def up(self) -> list[Event]:
        """Connect every switch that is not."""
        signals = [s for switch in self.switches.values() if not switch.connected for s in switch.connect()]
        return self.say(*signals)

    def say(self, *signals: Signal) -> list[Event]:
        """Feed signals, carry out what comes of them and feed the answers, until all is quiet. Returns the events."""
        waiting, events = list(signals), list[Event]()
        for _ in range(10_000):
            if not waiting:
                self.events += events
                return events
            effects = self.core.handle(waiting.pop(0), self.now)
            events += [effect.event for effect in effects if isinstance(effect, Log)]
            for switch in self.switches.values():
                waiting += switch.run(effect for effect in effects if not isinstance(effect, Log))
        raise AssertionError("the core and its switches do not come to rest")

    def load(self, state: DesiredState) -> list[Event]:
        """A new state file."""
        return self.say(StateLoaded(state, "state.yaml"))

    def send(self, switch: FakeSwitch, in_port: int, *headers: Values, data: bytes = b"", **more: int | str) -> Outcome:
        """Send a packet into a switch and let the core hear of what it is told."""
        outcome, signals = switch.send(in_port, *headers, data=data, **more)
        self.say(*signals)
        return outcome

    def wait(self, seconds: float, step: float = 0.25) -> list[Event]:
        """Let time pass, with a tick every `step` seconds."""
        end, events = self.now + seconds, list[Event]()
        while self.now < end:
            self.now = min(self.now + step, end)
            for switch in self.switches.values():
                events += self.say(*switch.advance(self.now))
            events += self.say(Tick())
        return events

    def of(self, *kinds: Kind) -> list[Event]:
        """The events so far of these kinds."""
        return [event for event in self.events if event.kind in kinds]
