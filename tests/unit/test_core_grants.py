"""What the core says of grants: open on both bridges or why not yet, and shut on both or why not yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from controller.grants import passage_ports
from controller.model import Grant
from tests.fakes.states import switch_for, two_networks
from tests.fakes.switch import Wired

PLAIN = two_networks()
STATE = replace(PLAIN, grants=(Grant("7", "201", "102", "tcp", 8080),), digest="granted")
NAMES = [bridge.name for bridge in PLAIN.bridges]


def rows(wired: Wired) -> dict[str, Any]:
    status: Any = wired.core.status()["bridges"]
    return {row["name"]: row.get("grants") for row in status}


def test_it_is_open_when_both_bridges_have_confirmed_it_and_shut_when_both_have_not() -> None:
    wired = Wired(PLAIN, *(switch_for(STATE, name) for name in NAMES))
    wired.up()
    assert wired.core.waiting_grants() == {} and rows(wired)["vmbr0"] == []
    wired.load(STATE)
    assert wired.core.waiting_grants() == {}
    assert rows(wired) | {"vmbr0": ["7"], "vmbr1": ["7"]} == rows(wired)
    wired.load(PLAIN)
    assert wired.core.waiting_grants(["7"]) == {} and rows(wired)["vmbr0"] == []


def test_without_its_passage_or_a_bridge_it_waits() -> None:
    port = passage_ports(STATE, "vmbr0")["vmbr1"]
    switches = {name: switch_for(STATE, name, without=[port] if name == "vmbr0" else []) for name in NAMES}
    wired = Wired(STATE, *switches.values())
    assert wired.core.waiting_grants() == {"7": "bridge vmbr1 is not connected"}
    assert wired.core.waiting_grants(["6"])["6"].endswith("is not connected"), "nobody knows what it holds"
    wired.up()
    assert wired.core.waiting_grants() == {"7": f"the passage {port} is not a port of vmbr0 yet; does the agent run?"}
    assert rows(wired)["vmbr0"] == [] and rows(wired)["vmbr1"] == ["7"]


def test_without_the_port_of_a_container_it_waits() -> None:
    wired = Wired(STATE, *(switch_for(STATE, name, without=["veth102"]) for name in NAMES))
    wired.up()
    assert "lacks the port of a container" in wired.core.waiting_grants()["7"]


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    odd = replace(PLAIN, grants=(Grant("8", "200", "201", "tcp", 80),), digest="odd")
    wired = Wired(odd, *(switch_for(odd, name) for name in NAMES))
    wired.up()
    assert wired.core.waiting_grants()["8"].startswith("refused: its source and target are both in management")


def test_of_two_grants_for_one_cell_one_may_end() -> None:
    both = replace(STATE, grants=(*STATE.grants, Grant("9", "201", "102", "tcp", 8080)), digest="both")
    wired = Wired(both, *(switch_for(both, name) for name in NAMES))
    wired.up()
    assert wired.core.waiting_grants() == {} and rows(wired)["vmbr0"] == ["7"]
    left = replace(both, grants=both.grants[1:], digest="left")
    wired.load(left)
    assert wired.core.waiting_grants(["7"]) == {} and rows(wired)["vmbr0"] == ["9"]
