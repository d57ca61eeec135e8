"""What the grants of a state open: which members, over which passage, in which zone of connection tracking.

A passage is a pair of patch ports between two socket bridges; it exists while a grant needs it. Everything here is a
function of the state alone, so that the controller and the agent find the same names and numbers. Imports model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, TypeVar

from controller.model import Bridge, BridgeKind, DesiredState, Grant, Member, Network, Protocol

ZONES = range(0xB000, 0xC000)
"""Zones of connection tracking that are ours: one for each socket bridge. The datapath has them in common with others."""


_T = TypeVar("_T")


class Passage(NamedTuple):
    """A pair of patch ports: `port` of `bridge` leads to `peer_port` of `peer_bridge`. `bridge` comes first by name."""

    bridge: str
    port: str
    peer_bridge: str
    peer_port: str


@dataclass(frozen=True, slots=True)
class Opening:
    """What a grant opens: `source` may open connections to `port` of `target`, a member of another network.

    `grant` is its id; of several that open the same, the first. Networks and bridges are by name.
    """

    grant: str
    source_network: str
    source_bridge: str
    source: Member
    target_network: str
    target_bridge: str
    target: Member
    protocol: Protocol
    port: int

    @property
    def cell(self) -> tuple[str, str, Protocol, int]:
        """What is open, by ids: two grants of one cell are one opening."""
        return self.source.id, self.target.id, self.protocol, self.port


def _remembering(function: Callable[[DesiredState], _T]) -> Callable[[DesiredState], _T]:
    """The same, not found out again for the very state that was asked about last: many ask, one after the other."""
    last: list[tuple[DesiredState, _T]] = []

    @wraps(function)
    def answer(state: DesiredState) -> _T:
        known = next((found for of, found in last if of is state), None)
        if known is None:
            known = function(state)
            last[:] = [(state, known)]
        return known

    return answer


@_remembering
def openings(state: DesiredState) -> tuple[Opening, ...]:
    """What is open on this node, once for each cell. A grant that cannot be here opens nothing (see `why_not`)."""
    if not state.grants:
        return ()
    where = {member.id: (network, member) for network in state.networks for member in network.members}
    found: dict[tuple[str, str, Protocol, int], Opening] = {}
    for grant in sorted(state.grants, key=_order):
        if not why_not(state, grant, where):
            (near, source), (far, target) = where[grant.source], where[grant.target]
            ends = (near.name, near.bridge, source, far.name, far.bridge, target)
            opening = Opening(grant.id, *ends, grant.protocol, grant.port)
            found.setdefault(opening.cell, opening)
    return tuple(found.values())


def why_not(state: DesiredState, grant: Grant, where: dict[str, tuple[Network, Member]] | None = None) -> str:
    """Why a grant opens nothing on this node, empty if it does."""
    if where is None:
        where = {member.id: (network, member) for network in state.networks for member in network.members}
    for what, key in (("source", grant.source), ("target", grant.target)):
        if key not in where:
            return f"its {what}, container {key}, is not on this node"
        network = where[key][0]
        bridge = state.bridge(network.bridge)
        if bridge is None or bridge.kind is not BridgeKind.SOCKET:
            return f"bridge {network.bridge} of its {what} is not declared on this node"
    near, far = where[grant.source][0], where[grant.target][0]
    if near.name == far.name:
        return f"its source and target are both in {near.name}, where nothing is closed between containers"
    if near.bridge == far.bridge:
        return f"{near.name} and {far.name} are on one bridge, {near.bridge}"
    if not 0 < grant.port < 0x10000:
        return f"{grant.port} is not a port from 1 to 65535"
    return ""


def _order(grant: Grant) -> tuple[int, str]:
    return len(grant.id), grant.id


@_remembering
def passages(state: DesiredState) -> tuple[Passage, ...]:
    """The pairs of patch ports that the grants need, in order of their bridges."""
    pairs = sorted({tuple(sorted((o.source_bridge, o.target_bridge))) for o in openings(state)})
    if not pairs:
        return ()
    taken = set(_declared_ports(state))
    return tuple(Passage(a, _name(a, b, taken), b, _name(b, a, taken)) for a, b in pairs)


def _name(bridge: str, peer: str, taken: set[str]) -> str:
    """At most 15 characters, the same every time, and nobody else's."""
    attempt = 0
    while True:
        name = "pass-" + hashlib.sha256(f"{bridge}/{peer}/{attempt}".encode()).hexdigest()[:8]
        if name not in taken:
            taken.add(name)
            return name
        attempt += 1


def _declared_ports(state: DesiredState) -> Iterator[str]:
    for bridge in state.bridges:
        yield bridge.name
    for network in state.networks:
        if network.egress is not None:
            yield network.egress.port
        if network.mesh is not None:
            yield from (network.mesh.bridge, network.mesh.port, network.mesh.far_port, network.mesh.leg_port)
        for member in network.members:
            yield member.port


def passage_ports(state: DesiredState, bridge: str) -> dict[str, str]:
    """The passage ports of a bridge, by the bridge that they lead to."""
    out = {}
    for passage in passages(state):
        if passage.bridge == bridge:
            out[passage.peer_bridge] = passage.port
        elif passage.peer_bridge == bridge:
            out[passage.bridge] = passage.peer_port
    return out


@_remembering
def zones(state: DesiredState) -> Mapping[str, int]:
    """The zone of each socket bridge: the same every time, and no two of a node alike."""
    found: dict[str, int] = {}
    for name in sorted(bridge.name for bridge in state.bridges if _is_socket(bridge)):
        number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % len(ZONES)
        while ZONES[number] in found.values():
            number = (number + 1) % len(ZONES)
        found[name] = ZONES[number]
    return found


def _is_socket(bridge: Bridge) -> bool:
    return bridge.kind is BridgeKind.SOCKET


class Crossing(NamedTuple):
    """One opening as the bridge of one of its ends sees it: `there` is the member at the other end.

    `opens` says that connections begin here; `passage` is the name of the port they cross by.
    """

    grant: str
    opens: bool
    passage: str
    there: Member
    protocol: Protocol
    port: int


def crossings(state: DesiredState, bridge: str) -> dict[str, tuple[Crossing, ...]]:
    """What is open for each member of a bridge, by the member's id."""
    found: dict[str, list[Crossing]] = {}
    ports = passage_ports(state, bridge)
    for o in openings(state):
        if o.source_bridge == bridge:
            port = ports[o.target_bridge]
            found.setdefault(o.source.id, []).append(Crossing(o.grant, True, port, o.target, o.protocol, o.port))
        elif o.target_bridge == bridge:
            port = ports[o.source_bridge]
            found.setdefault(o.target.id, []).append(Crossing(o.grant, False, port, o.source, o.protocol, o.port))
    return {member: tuple(each) for member, each in found.items()}
