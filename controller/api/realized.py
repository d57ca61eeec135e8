"""How far a node has come with a record. Pure; imports records only."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from controller.records import NodeRecord, Records

REFUSED = "refused: "


class Phase(Enum):
    """`done`: agent and controller have it. `waiting`: not yet. `refused`: it will not mend itself."""

    DONE = "done"
    WAITING = "waiting"
    REFUSED = "refused"


class Verdict(NamedTuple):
    """Where it stands, and what it waits for or why it is refused."""

    phase: Phase
    why: str = ""


def judge(records: Records, key: str, node: str, revision: int, *, fresh: bool = False) -> Verdict:
    """How far `node` has come with `key` as it is since `revision`.

    `fresh`: nothing of that key was there before, so that what is said of it is said of this one.
    """
    found = records.node(node)
    late = ""
    for who, reached, waiting in _sides(found):
        why = waiting.get(key, "")
        told = reached >= revision or fresh
        if told and why.startswith(REFUSED):
            return Verdict(Phase.REFUSED, f"{who}: {why.removeprefix(REFUSED)}")
        if why and told:
            late = late or f"{who}: {why}"
        elif reached < revision:
            late = late or f"the {who} of {node} has realized revision {reached} of {revision}"
    return Verdict(Phase.WAITING, late) if late else Verdict(Phase.DONE)


def _sides(node: NodeRecord) -> Iterator[tuple[str, int, dict[str, str]]]:
    yield "agent", node.agent_revision, dict(node.agent_waiting)
    yield "controller", node.controller_revision, dict(node.controller_waiting)
