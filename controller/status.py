"""What the controller answers when asked: rows for `status`, `flows` and `plan`, as JSON values. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from controller import diff, fields
from controller.codec import FlowStats
from controller.compile import BridgeCompiler, Names, Sealing
from controller.events import JSON
from controller.model import Bridge, DesiredState
from controller.pipeline import ADMIT, table_name
from controller.reconcile import Phase, ends_by_itself
from controller.switch import Switch, dpid_words, flow_words
from controller.verify.prove import Finding
from controller.wording import Wording

Warnings = Mapping[tuple[str, str], str]
"""(bridge, what) to a standing warning's text."""


def status(
    wording: Wording,
    switches: Collection[Switch],
    warnings: Warnings,
    leaks: Mapping[str, Iterable[Finding]],
    sealed: Mapping[str, Mapping[str, Sealing]],
) -> dict[str, JSON]:
    """Every declared bridge and what is known of it, for `bulkhead status`."""
    state = wording.state
    by_bridge = {switch.bridge: switch for switch in switches if switch.bridge is not None}
    return {
        "state": state.digest,
        "networks": [network.name for network in state.networks],
        "bridges": [
            _bridge(wording, bridge, by_bridge.get(bridge), warnings)
            | {"leaks": [finding.as_data() for finding in leaks.get(bridge.name, ())]}
            | {"sealed": {port: str(why) for port, why in sealed.get(bridge.name, {}).items()}}
            for bridge in state.bridges
        ],
        "undeclared": [switch.name for switch in switches if switch.bridge is None],
    }


def _bridge(wording: Wording, bridge: Bridge, switch: Switch | None, warnings: Warnings) -> dict[str, JSON]:
    out: dict[str, JSON] = {"name": bridge.name, "kind": bridge.kind, "network": bridge.network}
    if switch is None:
        return {**out, "connected": False, "phase": "away"}
    opened = _open_ports(switch)
    return {
        **out,
        "connected": True,
        "dpid": dpid_words(switch.dpid),
        "phase": switch.flows.phase.name.lower(),
        "flows": len(switch.flows.desired.flows),
        "learned": len(switch.flows.learned),
        "foreign": len(switch.flows.foreign),
        "egress_up": switch.egress_up,
        "missing_ports": list(switch.missing),
        "grants": sorted(map(wording.names.grant, switch.granted)),
        "unreadable": switch.offenders.unreadable,
        "warnings": [text for (name, _), text in warnings.items() if name == switch.name],
        "ports": [
            {
                "name": p.name,
                "number": p.number,
                "up": p.up,
                "open": p.number in opened,
                "container": wording.container(switch, p.name),
            }
            for p in sorted(switch.ports.values(), key=lambda p: p.number)
        ],
    }


def _open_ports(switch: Switch) -> set[int]:
    """Ports whose packets the first table lets in, by flows that the switch has confirmed."""
    if switch.flows.phase not in (Phase.STEADY, Phase.INSTALLING):
        return set()
    first = (flow for flow in switch.flows.installed.values() if flow.table == ADMIT.id and flow.goto is not None)
    return {match[0] for flow in first if (match := flow.match.get(fields.IN_PORT_FIELD)) is not None}


def plan(old: DesiredState, new: DesiredState, switches: Collection[Switch]) -> list[dict[str, JSON]]:
    """What another state would change on the connected bridges, for `bulkhead plan`. Raises `Conflict`."""
    names = Names([old, new])
    by_name = {switch.name: switch for switch in sorted(switches, key=lambda s: s.bridge is not None)}
    out: list[dict[str, JSON]] = []
    for bridge in new.bridges:
        switch = by_name.get(bridge.name)
        if switch is None:
            out.append({"bridge": bridge.name, "connected": False, "changes": []})
            continue
        compiled = BridgeCompiler().compile(new, bridge, switch.ports, switch.egress_up is not False)
        todo = diff.plan(compiled.flows, switch.flows.installed, ends_by_itself)
        changes: list[JSON] = []
        for sign, flows in (("+", todo.add), ("~", todo.change), ("-", todo.delete)):
            for flow in flows:
                app, name = names.owner(flow.cookie) or ("foreign", "?")
                changes.append({"sign": sign, "app": app, "object": name, "flow": flow_words(flow, switch)})
        out.append({"bridge": bridge.name, "connected": True, **todo.counts, "changes": changes})
    return out


def flow_rows(wording: Wording, switch: Switch, flows: Iterable[FlowStats]) -> list[dict[str, JSON]]:
    """Installed flows for `bulkhead flows`; `container` is whom an object such as `member/102` belongs to."""
    containers = {member.id: member.name for network in wording.state.networks for member in network.members}
    return [_flow_row(wording, switch, stats, containers) for stats in flows]


def _flow_row(wording: Wording, switch: Switch, stats: FlowStats, containers: Mapping[str, str]) -> dict[str, JSON]:
    flow = stats.flow
    app, name = wording.names.owner(flow.cookie) or ("foreign", f"cookie {flow.cookie:#x}")
    return {
        "table": flow.table,
        "table_name": table_name(flow.table, mesh=switch.is_mesh),
        "priority": flow.priority,
        "app": app,
        "object": name,
        "container": containers.get(name.split("/")[1]) if name.startswith(("member/", "service/")) else None,
        "packets": stats.packets,
        "bytes": stats.octets,
        "age_s": round(stats.age_s, 1),
        "match": str(flow.match),
        "actions": flow.actions_text,
        "learned": ends_by_itself(flow),
    }
