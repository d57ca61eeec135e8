"""What has to change in a switch: the only place where deletes come from. Imports flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controller.flow import Flow, FlowKey, is_learned, is_ours


@dataclass(frozen=True, slots=True)
class Plan:
    """Flows to add, to change (the new ones; a flow is changed by adding it over the old), and to delete."""

    add: tuple[Flow, ...] = ()
    change: tuple[Flow, ...] = ()
    delete: tuple[Flow, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.change or self.delete)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each, as events and `plan` tell it."""
        return {"added": len(self.add), "changed": len(self.change), "deleted": len(self.delete)}


def _marked(flow: Flow) -> bool:
    return is_learned(flow.cookie)


def plan(
    desired: Mapping[FlowKey, Flow],
    installed: Mapping[FlowKey, Flow],
    ends_by_itself: Callable[[Flow], bool] = _marked,
) -> Plan:
    """What turns `installed` into `desired`.

    Only flows of our own are deleted, and those that end by themselves are left to. A flow of somebody else's is
    left alone, unless it stands exactly where one of ours belongs: then it has replaced ours, and ours comes back.
    """
    add, change, delete = [], [], []
    for key, flow in desired.items():
        there = installed.get(key)
        if there is flow:
            continue
        if there is None:
            add.append(flow)
        elif there != flow:
            change.append(flow)
    for key, flow in installed.items():
        if key not in desired and is_ours(flow.cookie) and not ends_by_itself(flow):
            delete.append(flow)
    return Plan(tuple(add), tuple(change), tuple(delete))


def foreign(installed: Mapping[FlowKey, Flow], desired: Mapping[FlowKey, Flow]) -> tuple[Flow, ...]:
    """Flows in the switch that are not ours and do not stand in the place of ours."""
    return tuple(flow for key, flow in installed.items() if not is_ours(flow.cookie) and key not in desired)
