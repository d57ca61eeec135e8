"""Whether what a record says has become so, from what agent and controller have written down. Imports records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from controller.records import NodeRecord

REFUSED = "refused: "
"""How a reason begins that will not mend itself."""


@dataclass(frozen=True, slots=True)
class Realized:
    """`done`, or `why` not yet; `refused` says that waiting does not help."""

    done: bool
    why: str = ""
    refused: bool = False


def realized(node: NodeRecord, revision: int, keys: Iterable[str]) -> Realized:
    """Whether everything up to a revision is so on a node, as far as it concerns `keys`.

    Keys are those of the record and of what it rests on: `container/103` and `network/privacy`. For a record that was
    deleted at `revision`, that it is gone.
    """
    wanted = tuple(keys)
    if node.controller_revision < revision:
        return Realized(False, f"the controller of {node.name} has not taken it up yet; does it run?")
    if node.agent_revision < revision:
        return Realized(False, f"the agent of {node.name} has not taken it up yet; does it run?")
    for waiting in (node.controller_waiting, node.agent_waiting):
        for key in wanted:
            if key in waiting:
                why = waiting[key]
                return Realized(False, why.removeprefix(REFUSED), why.startswith(REFUSED))
    return Realized(True)
