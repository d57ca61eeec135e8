"""A packet's way, told: each table by name, whose flow it met there and what that does, and where the packet ended.

Imports node, endpoints, and compile's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from controller import fields
from controller.compile import Names
from controller.events import JSON
from controller.flow import Ct, Flow, Output, SetField
from controller.frame import LOCAL_NAME
from controller.model import BridgeKind, DesiredState, Role
from controller.pipeline import KIND, OUT, REFUSED, VIOLATION, Violation, table_name
from controller.verify.endpoints import Endpoint, endpoints
from controller.verify.node import Held, Leg
from controller.verify.packetwords import words
from controller.verify.walk import Step


@dataclass(frozen=True, slots=True)
class Line:
    """One table on the way: the flow that matched there, whose it is, and what it does. `flow` None is a miss."""

    table: int
    name: str
    depth: int
    flow: Flow | None
    app: str
    object: str
    says: str

    def as_data(self) -> dict[str, JSON]:
        """As JSON values."""
        found: dict[str, JSON] = {"table": self.table, "table_name": self.name, "app": self.app, "object": self.object}
        found["priority"] = self.flow.priority if self.flow is not None else None
        return found | {"says": self.says, "flow": str(self.flow) if self.flow is not None else None}


@dataclass(frozen=True, slots=True)
class Told:
    """One bridge's part of a packet's way. `ends` says what became of it; `decider` is the line that decided that."""

    bridge: str
    in_port: str
    packet: str
    lines: tuple[Line, ...]
    ends: str
    decider: Line | None
    delivered: bool
    doubts: tuple[str, ...]

    def as_data(self) -> dict[str, JSON]:
        """As JSON values."""
        found: dict[str, JSON] = {"bridge": self.bridge, "in_port": self.in_port, "packet": self.packet}
        found |= {"steps": [line.as_data() for line in self.lines], "ends": self.ends, "doubts": list(self.doubts)}
        return found | {"delivered": self.delivered, "decided_by": self.decider.as_data() if self.decider else None}


class Teller:
    """Tells ways through the bridges of a state, or of switches that are meant to hold it."""

    def __init__(self, state: DesiredState) -> None:
        self.state = state
        self._names = Names([state])
        self._by_end = {e.end: e for e in endpoints(state)}
        self._members = {member.id: member.name for network in state.networks for member in network.members}

    def tell(self, leg: Leg, held: Held) -> Told:
        """One bridge's part."""
        bridge = self.state.bridge(leg.bridge)
        mesh = bridge is not None and bridge.kind is BridgeKind.MESH
        lines = tuple(self._line(step, held, mesh) for step in leg.way.steps)
        decider = _decider(lines, bool(leg.sent))
        number = held.numbers[leg.in_port]
        packet = words(number, leg.packet)
        ends = self._ends(leg, decider)
        return Told(leg.bridge, leg.in_port, packet, lines, ends, decider, bool(leg.sent), leg.way.doubts)

    def port(self, bridge: str, port: str) -> str:
        """A port, and who is behind it."""
        known = self._by_end.get((bridge, port))
        if known is None:
            return port
        return f"{port} ({who(known)})"

    def _line(self, step: Step, held: Held, mesh: bool) -> Line:
        name = table_name(step.table, mesh=mesh)
        flow = step.flow
        if flow is None:
            return Line(step.table, name, step.depth, None, "", "", "no flow matches: nothing is done")
        owner = self._names.owner(flow.cookie)
        app, about = (owner[0], self.about(owner[1])) if owner else ("foreign", f"cookie {flow.cookie:#x}")
        return Line(step.table, name, step.depth, flow, app, about, _says(flow, held, mesh))

    def about(self, name: str) -> str:
        """An object of the state in words: who `member/102` is."""
        kind, _, rest = name.partition("/")
        key, _, service = rest.partition("/")
        if kind == "member":
            return self._members.get(key, name)
        if kind == "grant":
            return f"grant {rest}"
        if kind == "service":
            return f"{service} of {self._members.get(key, key)}"
        return f"network {rest}" if kind == "network" else rest if kind == "rule" else name

    def _ends(self, leg: Leg, decider: Line | None) -> str:
        if leg.sent:
            return "; ".join(self._leaves(leg, port, far) for port, far in leg.sent)
        if decider is None or decider.flow is None:
            where = f" of {decider.name}" if decider is not None else ""
            return f"dropped: no flow{where} matches it"
        kind = _kind(decider.flow)
        if kind is None:
            return f"dropped in {decider.name} by {decider.app} ({decider.object})"
        return f"dropped, and counted as a violation: {kind.words}. {self._answer(leg, kind)}"

    def _leaves(self, leg: Leg, port: str, far: tuple[str, str] | None) -> str:
        back = "back " if port == leg.in_port else ""
        onward = f", into {far[0]} by {far[1]}" if far is not None else ""
        return f"leaves {back}by {self.port(leg.bridge, port)}{onward}"

    def _answer(self, leg: Leg, kind: Violation) -> str:
        source = self._by_end.get((leg.bridge, leg.in_port))
        bridge = self.state.bridge(leg.bridge)
        refuses = bridge is not None and self.state.network(bridge.network).refuse
        if kind in REFUSED and refuses and (source is None or source.role is not Role.EGRESS):
            return "The sender is told at once: a TCP reset, or ICMP administratively prohibited"
        return "The sender is not answered"


def who(endpoint: Endpoint) -> str:
    """An endpoint in words."""
    if endpoint.member is not None:
        return endpoint.name
    what = {Role.EGRESS: "the tunnel to the world", Role.MESH: "the mesh", Role.HOST: "the host"}[endpoint.role]
    return f"{what} of {endpoint.network}"


def _decider(lines: tuple[Line, ...], sent: bool) -> Line | None:
    """The line that decided: what chose the port for a packet that leaves, what stopped one that does not."""
    if not lines:
        return None
    ours = [line for line in lines if line.name != VIOLATION.name]
    if not sent:
        return (ours or list(lines))[-1]
    return next((line for line in reversed(ours) if line.flow is not None and _chooses(line.flow)), lines[-1])


def _chooses(flow: Flow) -> bool:
    return any(isinstance(action, SetField) and action.header == OUT.header for action in flow.actions)


def _kind(flow: Flow) -> Violation | None:
    for action in flow.actions:
        if isinstance(action, SetField) and action.header == KIND.header and action.value in list(Violation):
            return Violation(action.value)
    return None


def _says(flow: Flow, held: Held, mesh: bool) -> str:
    return ", ".join(dict.fromkeys(_parts(flow, held, mesh))) or "drops"


def _parts(flow: Flow, held: Held, mesh: bool) -> Iterator[str]:
    kind = _kind(flow)
    if kind is not None:
        yield f"a violation: {kind.words}"
    for action in flow.actions:
        match action:
            case Output(fields.CONTROLLER):
                yield "shows it to the controller"
            case Output(fields.IN_PORT):
                yield "sends the answer back"
            case Output(fields.LOCAL):
                yield f"out of {LOCAL_NAME}"
            case Output(port) if port < 0xFF00:
                yield f"out of {held.port(port)}"
            case SetField(header, value) if header == KIND.header and kind is not None:
                pass
            case SetField(header, value) if header == OUT.header:
                yield f"to port {held.port(value)}"
            case Ct(commit=True):
                yield "keeps its connection"
            case Ct(table=int(table)):
                yield f"looks its connection up, then {table_name(table, mesh=mesh)}"
            case _ if isinstance(action, SetField):
                pass
            case _:
                yield _SHORT.get(type(action).__name__, str(action))
    if flow.goto is not None:
        yield f"on to {table_name(flow.goto, mesh=mesh)}"


_SHORT = {
    "Learn": "learns the way back",
    "Resubmit": "looks for a learned way back",
    "Move": "turns it into the answer",
    "DecTtl": "one hop less",
}
