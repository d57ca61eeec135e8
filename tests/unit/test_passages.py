"""What is forgotten of connections, when, and how Open vSwitch is asked: with fakes for the switch and the controller."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from controller.agent.passages import Connections, Kept, Tracker, read_entries
from controller.agent.resource import Failed, Waiting
from controller.grants import openings, zones
from controller.model import DesiredState, Grant
from controller.problems import BulkheadError
from tests.fakes.states import two_networks

STATE = replace(two_networks(), grants=(Grant("7", "201", "102", "tcp", 8080),))
ZONES = zones(STATE)
HERE, THERE = ZONES["vmbr0"], ZONES["vmbr1"]
OPEN = Kept(HERE, "tcp", "10.1.0.201", "10.0.0.102", 8080)
OVER = Kept(HERE, "udp", "10.0.0.102", "10.1.0.201", 53)

DUMP = f"""
tcp,orig=(src=10.1.0.201,dst=10.0.0.102,sport=40732,dport=8080),reply=(src=10.0.0.102,dst=10.1.0.201,sport=8080,dport=40732),zone={HERE},protoinfo=(state=ESTABLISHED)
tcp,orig=(src=10.1.0.201,dst=10.0.0.102,sport=40733,dport=8080),reply=(src=10.0.0.102,dst=10.1.0.201,sport=8080,dport=40733),zone={HERE},protoinfo=(state=SYN_SENT)
udp,orig=(src=10.0.0.102,dst=10.1.0.201,sport=4000,dport=53),reply=(src=10.1.0.201,dst=10.0.0.102,sport=53,dport=4000),zone={HERE}
tcp,orig=(src=10.1.0.201,dst=10.0.0.102,sport=40732,dport=8080),reply=(src=10.0.0.102,dst=10.1.0.201,sport=8080,dport=40732),zone=7
icmp,orig=(src=10.0.0.9,dst=10.0.0.8,id=1,type=8,code=0),reply=(src=10.0.0.8,dst=10.0.0.9,id=1,type=0,code=0),zone={THERE}
udp,orig=(src=fe80::1,dst=fe80::2,sport=1,dport=2),reply=(src=fe80::2,dst=fe80::1,sport=2,dport=1)
nonsense
"""


def test_entries_of_our_zones_are_read_and_counted() -> None:
    icmp = Kept(THERE, "icmp", "10.0.0.9", "10.0.0.8", 0)
    assert read_entries(DUMP) == Counter({OPEN: 2, OVER: 1, icmp: 1})


class Switch:
    """Connection tracking, the controller and OVSDB in one."""

    def __init__(self, *kept: Kept, grants: Iterable[str] = (), phase: str = "steady", patched: bool = False) -> None:
        self.kept = list(kept)
        self.grants, self.phase, self.patched = list(grants), phase, patched
        self.away = False
        self.asked = 0

    async def entries(self, zones: Iterable[int]) -> Counter[Kept]:
        return Counter(kept for kept in self.kept if kept.zone in set(zones))

    async def forget(self, kept: Kept) -> None:
        self.kept = [one for one in self.kept if one != kept]

    async def forget_all(self, zone: int) -> None:
        self.kept = [one for one in self.kept if one.zone != zone]

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        if self.away:
            raise BulkheadError("nobody answers")
        rows = [{"name": name, "phase": self.phase, "grants": self.grants} for name in ZONES]
        return {"bridges": rows}

    async def bridges(self) -> dict[str, Any]:
        port = SimpleNamespace(ours=True, type="patch")
        return {name: SimpleNamespace(ports={"p": port} if self.patched else {}) for name in ZONES}


def connections(switch: Switch, state: DesiredState = STATE, *, before: bool = False) -> Connections:
    fake: Any = switch
    return Connections(fake, fake, openings(state), ZONES, fake, before=before)


def heal(resource: Connections) -> list[str]:
    """Carry out what it wants; what that was."""

    async def run() -> list[str]:
        told = []
        for change in await resource.diff():
            await change.do()
            told.append(str(change))
        assert await resource.diff() == []
        return told

    return asyncio.run(run())


def test_what_no_grant_covers_is_forgotten_and_the_rest_stays() -> None:
    switch = Switch(OPEN, OVER, OPEN._replace(zone=THERE), grants=["7"])
    assert heal(connections(switch)) == [
        "- 1 connections of grants that are over: they are still known to the datapath"
    ]
    assert switch.kept == [OPEN, OPEN._replace(zone=THERE)]


@pytest.mark.parametrize(
    "same", [{"port": 8081}, {"protocol": "udp"}, {"source": "10.1.0.200"}, {"target": "10.0.0.100"}]
)
def test_another_cell_is_another_connection(same: dict[str, Any]) -> None:
    switch = Switch(OPEN, OPEN._replace(**same), grants=["7"])
    heal(connections(switch))
    assert switch.kept == [OPEN]


def test_nothing_is_forgotten_while_a_flow_may_be_left() -> None:
    plain = replace(STATE, grants=())
    switch = Switch(OPEN, grants=["7"])
    resource = connections(switch, plain)
    with pytest.raises(Waiting, match="still has flows of grant 7"):
        asyncio.run(resource.diff())
    switch.grants, switch.phase = [], "installing"
    with pytest.raises(Waiting, match="not confirmed yet"):
        asyncio.run(resource.diff())
    switch.phase, switch.away = "steady", True
    with pytest.raises(Waiting, match="which grants it has shut: nobody answers"):
        asyncio.run(resource.diff())
    switch.away = False
    assert switch.kept == [OPEN]
    heal(resource)
    assert switch.kept == []


def test_a_grant_of_a_state_that_is_gone_counts_as_left() -> None:
    with pytest.raises(Waiting, match="flows of grant \\?"):
        asyncio.run(connections(Switch(grants=["?"], patched=True), replace(STATE, grants=())).diff())


def test_where_nothing_was_ever_granted_nobody_is_asked() -> None:
    plain = replace(STATE, grants=())
    for switch, before, asked in (
        (Switch(), False, 0),
        (Switch(), True, 1),
        (Switch(patched=True), False, 1),
        (Switch(OVER), False, 1),
    ):
        switch.away = not asked
        heal(connections(switch, plain, before=before))
        assert bool(switch.asked) == bool(asked)


class Appctl(Tracker):
    """Open vSwitch's answers: `refused` says of a command line whether it fails."""

    def __init__(self, refused: Any) -> None:
        super().__init__("unix:/nowhere/db.sock", "netdev")
        self.refused = refused
        self.lines: list[tuple[str, ...]] = []

    async def _ask(self, *command: str) -> str:
        if self.refused(command):
            raise Failed("invalid")
        self.lines.append(command[1:])
        return ""


TUPLE = "ct_nw_src=10.1.0.201,ct_nw_dst=10.0.0.102,ct_nw_proto=6,ct_tp_dst=8080"


@pytest.mark.parametrize(
    ("refused", "line"),
    [
        (lambda _: False, (f"zone={HERE}", TUPLE)),
        (lambda c: "netdev@ovs-netdev" not in c, ("netdev@ovs-netdev", f"zone={HERE}", TUPLE)),
        (lambda c: TUPLE in c, (f"zone={HERE}",)),
        (lambda c: TUPLE in c or "netdev@ovs-netdev" not in c, ("netdev@ovs-netdev", f"zone={HERE}")),
    ],
    ids=["3.1", "two datapaths", "before 3.1", "before 3.1, two datapaths"],
)
def test_every_open_vswitch_is_asked_as_it_understands(refused: Any, line: tuple[str, ...]) -> None:
    tracker = Appctl(refused)
    asyncio.run(tracker.forget(OPEN))
    assert tracker.lines == [line]


def test_what_has_no_ports_goes_with_its_zone() -> None:
    tracker = Appctl(lambda _: False)
    asyncio.run(tracker.forget(Kept(THERE, "icmp", "10.0.0.9", "10.0.0.8", 0)))
    assert tracker.lines == [(f"zone={THERE}",)]
