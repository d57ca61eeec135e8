"""Which port of which bridge is joined to which: what leaves one end enters the other. Imports model
and grants.
"""

from __future__ import annotations

from controller.grants import passages
from controller.model import DesiredState

End = tuple[str, str]
"""A bridge and the name of one of its ports."""


def declared_links(state: DesiredState) -> dict[End, End]:
    """The veth pairs between socket and mesh bridges that a state declares, and passages, each from both ends."""
    out: dict[End, End] = {}
    for bridge in state.bridges:
        mesh = state.network(bridge.network).mesh
        if mesh is not None and bridge.name != mesh.bridge:
            near, far = (bridge.name, mesh.port), (mesh.bridge, mesh.far_port)
            out |= {near: far, far: near}
    for passage in passages(state):
        one, other = (passage.bridge, passage.port), (passage.peer_bridge, passage.peer_port)
        out |= {one: other, other: one}
    return out
