"""The example's flows as text, to be read by people when they change.

By names of tables, bands, apps, objects and ports; without cookies and counters. After a change that is meant, write
them anew with `BULKHEAD_UPDATE_GOLDEN=1 pytest tests/golden` and read the difference.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from controller.compile import BridgeCompiler, Names, planned_ports
from controller.flow import Flow
from controller.model import Bridge, BridgeKind, DesiredState, Grant
from controller.pipeline import Band, Violation, table_name
from controller.statefile import load

HERE = Path(__file__).parent
STATE = load(HERE.parents[1] / "examples" / "oo1424oo.yaml").state


def band(priority: int) -> str:
    """The band that a priority is in, and how far above it."""
    best = max(found for found in Band if found <= priority)
    return best.name + (f"+{priority - best}" if priority > best else "")


def dump(state: DesiredState, bridge: Bridge, *, egress_up: bool = True) -> str:
    """Every flow of a bridge, a line each, sorted as a packet meets them."""
    ports = planned_ports(state, bridge)
    numbers = {port.number: name for name, port in ports.items()}
    out = {number & 0xFFFF: name for number, name in numbers.items()}
    names, mesh = Names([state]), bridge.kind is BridgeKind.MESH

    def line(flow: Flow) -> str:
        app, of = names.owner(flow.cookie) or ("?", "?")
        text = f"{flow.match or 'any'} => {flow.actions_text}"
        text = re.sub(r"(in_port=|output:|IN_PORT=)(\d+)", lambda m: m[1] + numbers[int(m[2])], text)
        text = re.sub(r"(reg1=)0x([0-9a-f]+)", lambda m: m[1] + out[int(m[2], 16)], text)
        text = re.sub(r"(set_field:)0x([0-9a-f]+)(->reg1)", lambda m: m[1] + out[int(m[2], 16)] + m[3], text)
        text = re.sub(r"(set_field:)0x([0-9a-f]+)(->reg2)", lambda m: m[1] + Violation(int(m[2], 16)).name + m[3], text)
        text = re.sub(r"(ct\(table=)(\d+)", lambda m: m[1] + table_name(int(m[2])), text)
        text = re.sub(r"goto_table:(\d+)", lambda m: f"goto {table_name(int(m[1]), mesh=mesh)}", text)
        text = re.sub(r"(resubmit\(,|learn\(table=)(\d+)", lambda m: m[1] + table_name(int(m[2])), text)
        text = re.sub(r"cookie=0x[0-9a-f]+,", "", text)
        return f"{table_name(flow.table, mesh=mesh)} {band(flow.priority)} {app}[{of}] {text}"

    flows = BridgeCompiler().compile(state, bridge, ports, egress_up).flows.values()
    ordered = sorted((flow.table, -flow.priority, line(flow)) for flow in flows)
    return "".join(f"{text}\n" for _, _, text in ordered)


CASES = {bridge.name: (bridge, True) for bridge in STATE.bridges}
CASES["vmbr0-egress-down"] = (STATE.bridges[0], False)
GRANTED = replace(STATE, grants=(Grant("7", "202", "102", "tcp", 8080),))
CASES |= {f"{bridge.name}-granted": (bridge, True) for bridge in STATE.bridges if bridge.kind is BridgeKind.SOCKET}
"""What a grant adds to a bridge."""


def dump_case(name: str) -> str:
    """The flows of a case; of a grant's what it adds."""
    bridge, egress_up = CASES[name]
    plain = dump(STATE, bridge, egress_up=egress_up)
    if not name.endswith("-granted"):
        return plain
    return "".join(line for line in dump(GRANTED, bridge).splitlines(keepends=True) if line not in plain)


@pytest.mark.parametrize("name", CASES)
def test_flows_are_those_that_were_read(name: str) -> None:
    path, found = HERE / f"{name}.txt", dump_case(name)
    if os.environ.get("BULKHEAD_UPDATE_GOLDEN") == "1":
        path.write_text(found)
    expected = path.read_text() if path.exists() else ""
    changes = difflib.unified_diff(expected.splitlines(), found.splitlines(), "as read", "as compiled", "", "", 0, "")
    assert expected == found, "\n".join(changes)


def test_there_is_no_file_of_a_bridge_that_is_gone() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == set(CASES)


def test_nothing_in_them_depends_on_a_run() -> None:
    for path in HERE.glob("*.txt"):
        text = path.read_text()
        assert "cookie" not in text and "n_packets" not in text and "?" not in text
        assert len(set(text.splitlines())) == len(text.splitlines())


def test_bands_have_names() -> None:
    assert [band(p) for p in (0, 100, 150, 350, 630, 1003)] == [
        "MISS",
        "REST",
        "REST+50",
        "CLAIMED",
        "FRAME_DENY+30",
        "RULE+3",
    ]
