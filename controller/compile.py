"""From a desired state to the flows of each bridge.

`BridgeCompiler` asks every app, refuses two flows that contradict each other, and remembers what each member and rule
contributed: when one changes, only its flows are made again, and all others are the very same objects. What it answers
is a function of its arguments alone; the memory only saves time (`tests/props` holds it to that). Imports apps, frame
and below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from apps import APP_NAMES, MESH_APP, SOCKET_APPS
from controller.fields import IN_PORT_FIELD
from controller.flow import Cookie, Flow, FlowKey, Match
from controller.frame import (
    LOCAL_NAME,
    Frame,
    Placed,
    PlacedCrossing,
    PlacedCrossings,
    PlacedPassage,
    PlacedRule,
    Port,
    cookie,
    frame_of,
    object_id,
)
from controller.grants import crossings, passage_ports, zones
from controller.model import Bridge, BridgeKind, DesiredState, Member, Network
from controller.pipeline import ADMIT, CANARY, Band
from controller.problems import NotAllowed

CANARY_APP = 12
UNDECLARED_APP = 13
SEAL_APP = 14

CANARY_FLOW = CANARY.flow(Band.MISS, cookie(CANARY_APP, "canary"))
"""There as long as the switch holds what we gave it: a restarted one has lost it with all the others."""

UNDECLARED_FLOW = ADMIT.flow(Band.MISS, cookie(UNDECLARED_APP, "bridge"))
"""All that a bridge gets that nobody declared: what it does not forward by somebody else's flows, drops."""


class Sealing(StrEnum):
    """Why nothing may come in by a port: by it something leaked, or an operator has cut its network off."""

    LEAK = "leak"
    NETWORK = "network"


Ports = Mapping[str, Port]
_PartKey = tuple[str, str]
_Part = Placed | Member | PlacedRule | PlacedPassage | PlacedCrossings | Frame
"""What flows are made of: a member with its port, one that is away, a rule, a passage, what grants open for a member, or
the network as a whole."""


class Conflict(NotAllowed):
    """Two flows of one table and priority match the same packet and do different things with it."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """The flows one bridge should have, the declared ports that it lacks, and the numbers of all that it has.

    `ports` None says that nothing is known of them.
    """

    bridge: Bridge
    flows: Mapping[FlowKey, Flow]
    missing: tuple[str, ...] = ()
    ports: frozenset[int] | None = None

    def sealed(self, numbers: Mapping[int, Sealing]) -> Compiled:
        """With everything dropped that comes in by these ports."""
        seals = {flow.key: flow for flow in (_seal(number, why) for number, why in numbers.items())}
        return replace(self, flows={**self.flows, **seals}) if seals else self


class OverlapIndex:
    """Flows by table, priority and shape, to find at once whether a new one overlaps another with a different effect.

    Flows of one shape (same fields, same masks) overlap only when equal. Two shapes are compared on the bits both
    compare, through a table of projected values made when first needed.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    def add(self, flow: Flow) -> None:
        """Raises `Conflict` naming both flows."""
        self._buckets.setdefault((flow.table, flow.priority), _Bucket()).add(flow)

    def remove(self, flow: Flow) -> None:
        """Forget a flow that was added."""
        self._buckets[flow.table, flow.priority].remove(flow)


_Shape = tuple[tuple[int, int], ...]
_Values = tuple[int, ...]


@dataclass(slots=True)
class _Bucket:
    shapes: dict[_Shape, dict[_Values, Flow]] = field(default_factory=dict)
    projections: dict[tuple[_Shape, _Shape], dict[_Values, dict[_Values, Flow]]] = field(default_factory=dict)
    common: dict[tuple[_Shape, _Shape], _Shape] = field(default_factory=dict)

    def add(self, flow: Flow) -> None:
        shape, values = _shape(flow.match), _values(flow.match)
        same = self.shapes.setdefault(shape, {})
        self._refuse(flow, same.get(values), same_key=True)
        for other in self.shapes:
            if other is shape or other == shape:
                continue
            common = self._common(shape, other)
            for found in self._projected(other, common).get(_project(flow.match, common), {}).values():
                self._refuse(flow, found)
        same[values] = flow
        for (other, common), table in self.projections.items():
            if other == shape:
                table.setdefault(_project(flow.match, common), {})[values] = flow

    def remove(self, flow: Flow) -> None:
        shape, values = _shape(flow.match), _values(flow.match)
        del self.shapes[shape][values]
        if not self.shapes[shape]:
            del self.shapes[shape]
        for (other, common), table in self.projections.items():
            if other == shape:
                table[_project(flow.match, common)].pop(values, None)

    def _refuse(self, flow: Flow, other: Flow | None, *, same_key: bool = False) -> None:
        if other is not None and (same_key or other.effect != flow.effect):
            raise Conflict(f"two flows of one priority match the same packet:\n  {describe(other)}\n  {describe(flow)}")

    def _common(self, shape: _Shape, other: _Shape) -> _Shape:
        found = self.common.get((shape, other))
        if found is None:
            theirs = dict(other)
            both = ((header, mask & theirs.get(header, 0)) for header, mask in shape)
            found = self.common[shape, other] = tuple(item for item in both if item[1])
        return found

    def _projected(self, shape: _Shape, common: _Shape) -> dict[_Values, dict[_Values, Flow]]:
        found = self.projections.get((shape, common))
        if found is None:
            found = self.projections[shape, common] = {}
            for values, flow in self.shapes[shape].items():
                found.setdefault(_project(flow.match, common), {})[values] = flow
        return found


def _shape(match: Match) -> _Shape:
    return tuple([(header, mask) for header, _, mask in match])


def _values(match: Match) -> _Values:
    return tuple([value for _, value, _ in match])


def _project(match: Match, common: _Shape) -> _Values:
    values = {header: value for header, value, _ in match}
    return tuple([values[header] & mask for header, mask in common])


class BridgeCompiler:
    """Compiles one bridge again and again, quickly when little has changed."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._frame: Frame | None = None
        self._inputs: dict[_PartKey, _Part] = {}
        self._parts: dict[_PartKey, tuple[Flow, ...]] = {}
        self._flows: dict[FlowKey, Flow] = {}
        self._index = OverlapIndex()

    def compile(self, state: DesiredState, bridge: Bridge, ports: Ports, egress_up: bool = True) -> Compiled:
        """The flows of `bridge` in `state`, given the ports it has. A member without a port has no flows.

        `egress_up` False closes the egress. Raises `Conflict`.
        """
        network = state.network(bridge.network)
        if bridge.kind is BridgeKind.MESH:
            return _compile_mesh(bridge, network, ports)
        frame = frame_of(state, network, ports, egress_up)
        try:
            self._update(frame, dict((*_inputs(frame, network, ports), *_granted(state, bridge, network, ports))))
        except Exception:
            self._forget()
            raise
        missing = tuple(name for name in _wanted_ports(state, bridge, network) if name not in ports)
        return Compiled(bridge, dict(self._flows), missing, frozenset(port.number for port in ports.values()))

    def _update(self, frame: Frame, inputs: dict[_PartKey, _Part]) -> None:
        if frame != self._frame:
            self._forget()
            self._frame = frame
        old = self._inputs
        changed = [key for key, value in inputs.items() if old.get(key) != value]
        for key in [key for key in old if key not in inputs] + [key for key in changed if key in old]:
            for flow in self._parts.pop(key):
                self._index.remove(flow)
                del self._flows[flow.key]
        for key in changed:
            part = self._parts[key] = tuple(_flows_of(frame, inputs[key]))
            for flow in part:
                self._index.add(flow)
                self._flows[flow.key] = flow
        self._inputs = inputs


def _flows_of(frame: Frame, part: _Part) -> Iterator[Flow]:
    for app in SOCKET_APPS:
        match part:
            case Placed():
                yield from app.member(frame, part)
            case Member():
                yield from app.absent(frame, part)
            case PlacedRule():
                yield from app.rule(frame, part)
            case PlacedPassage():
                yield from app.passage(frame, part)
            case PlacedCrossings():
                yield from app.crossing(frame, part)
            case Frame():
                yield from app.shared(frame)
    if isinstance(part, Frame):
        yield CANARY_FLOW


def _inputs(frame: Frame, network: Network, ports: Ports) -> Iterator[tuple[_PartKey, _Part]]:
    yield ("shared", ""), frame
    by_port: dict[str, Member] = {}
    for member in network.members:
        by_port[member.port] = member
        port = ports.get(member.port)
        yield ("member", member.id), Placed(member, port.number) if port is not None else member
    for rule in network.rules:
        used = [ports.get(name) if name else None for name in (rule.in_port, rule.output)]
        if any(name and port is None for name, port in zip((rule.in_port, rule.output), used, strict=True)):
            continue
        receiver = by_port.get(rule.output or "")
        in_port, out_port = (port.number if port else None for port in used)
        yield ("rule", rule.path), PlacedRule(rule, in_port, out_port, receiver.mac if receiver else None)


def _granted(
    state: DesiredState, bridge: Bridge, network: Network, ports: Ports
) -> Iterator[tuple[_PartKey, PlacedPassage | PlacedCrossings]]:
    if not state.grants:
        return
    for peer, name in passage_ports(state, bridge.name).items():
        if name in ports:
            yield ("passage", peer), PlacedPassage(peer, ports[name].number)
    zone = zones(state)[bridge.name]
    for member_id, every in crossings(state, bridge.name).items():
        member = network.member(member_id)
        each = tuple(
            PlacedCrossing(c.grant, c.opens, ports[c.passage].number, c.there.address, c.protocol, c.port)
            for c in every
            if c.passage in ports
        )
        if each and member.port in ports:
            yield ("crossing", member_id), PlacedCrossings(member, ports[member.port].number, zone, each)


def _wanted_ports(state: DesiredState, bridge: Bridge, network: Network) -> Iterator[str]:
    if network.egress is not None:
        yield network.egress.port
    if network.mesh is not None:
        yield network.mesh.port
    for member in network.members:
        yield member.port
    yield from passage_ports(state, bridge.name).values()


def _compile_mesh(bridge: Bridge, network: Network, ports: Ports) -> Compiled:
    assert network.mesh is not None, f"{bridge.name} is the mesh bridge of a network without a mesh"
    wanted = (network.mesh.leg_port, network.mesh.far_port)
    leg, far = (ports[name].number if name in ports else None for name in wanted)
    flows = {flow.key: flow for flow in (*MESH_APP.flows(network.name, leg, far), CANARY_FLOW)}
    return Compiled(bridge, flows, tuple(name for name in wanted if name not in ports))


def undeclared(name: str) -> Compiled:
    """What a bridge gets that nobody declared."""
    bridge = Bridge(name, BridgeKind.SOCKET, "")
    return Compiled(bridge, {flow.key: flow for flow in (UNDECLARED_FLOW, CANARY_FLOW)})


def planned_ports(state: DesiredState, bridge: Bridge) -> dict[str, Port]:
    """Ports numbered 1, 2, … in declared order, for compiling without a switch."""
    network = state.network(bridge.network)
    if bridge.kind is BridgeKind.MESH and network.mesh is not None:
        names = [network.mesh.leg_port, network.mesh.far_port]
    else:
        names = list(_wanted_ports(state, bridge, network))
    ports = {name: Port(number, name, network.gateway_mac, True) for number, name in enumerate(names, start=1)}
    ports[LOCAL_NAME] = Port(0xFFFFFFFE, LOCAL_NAME, network.gateway_mac, True)
    return ports


def _seal(port: int, why: Sealing) -> Flow:
    return Flow(ADMIT.id, 0xFFFF, Match.named(in_port=port), cookie=cookie(SEAL_APP, f"seal/{why}"))


def sealed_port(flow: Flow) -> tuple[int, Sealing] | None:
    """The number of the port that a flow seals, and why; None if it seals none."""
    port = flow.match.get(IN_PORT_FIELD)
    if port is None:
        return None
    return next(((port[0], why) for why in Sealing if flow == _seal(port[0], why)), None)


_APP_NAMES = {**APP_NAMES, CANARY_APP: "canary", UNDECLARED_APP: "undeclared", SEAL_APP: "seal"}

_FIXED_OBJECTS = (
    "canary",
    *(f"seal/{why}" for why in Sealing),
    "bridge",
    "frames/vlan-tagged",
    "frames/reserved-multicast",
    "frames/lldp",
    "frames/ipv6",
    "frames/unknown-port-or-type",
    "port/egress",
    "port/mesh",
    "port/host",
    "port/passage",
    "port/unknown",
    "world/not",
    "kill-switch",
    "egress/container",
    "egress/mesh",
    "returns/containers",
    "returns/mesh",
    "returns/replies",
    "returns/mesh-replies",
)


class Names:
    """Cookies to names: which app a flow belongs to, and which object of the state it is for."""

    def __init__(self, states: Iterable[DesiredState] = ()) -> None:
        self._objects = {object_id(name): name for name in _FIXED_OBJECTS}
        for state in states:
            for name in _object_names(state):
                self._objects[object_id(name)] = name

    def grant(self, number: int) -> str:
        """The id of a grant, by the object of its flows' cookies; `?` for one that is in no state that is known."""
        return self._objects.get(number, "?").removeprefix("grant/")

    def owner(self, cookie_value: int) -> tuple[str, str] | None:
        """(app, object) of a cookie of ours, None for somebody else's. An object of an older state is `?`."""
        parts = Cookie.of(cookie_value)
        if parts is None:
            return None
        return _APP_NAMES.get(parts.app, f"app {parts.app}"), self._objects.get(parts.object, "?")


def _object_names(state: DesiredState) -> Iterator[str]:
    for grant in state.grants:
        yield f"grant/{grant.id}"
    for network in state.networks:
        yield f"network/{network.name}"
        for member in network.members:
            yield f"member/{member.id}"
            for service in member.services:
                yield f"service/{member.id}/{service.name}"
        if network.vpn is not None:
            yield f"service/{network.vpn.member_id}/vpn"
        for rule in network.rules:
            yield f"rule/{rule.path}"


def describe(flow: Flow) -> str:
    """A flow in words for messages: its app, then ovs-ofctl syntax."""
    parts = Cookie.of(flow.cookie)
    return f"{_APP_NAMES.get(parts.app, '?') if parts else 'foreign'}: {flow}"
