"""Reading flows, held against a real Open vSwitch: what it dumps in any form is what it was given.

The flows are other people's and ours. Each form it tells them in (three of text, one of the wire) has to be read as
the same flow; and what we write of a flow has to make the switch hold the same.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from controller import codec
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Action, Clone, Flow, Learn, Raw, Resubmit
from controller.flowtext import read_flow, read_flows
from tests.fakes.flows import LINES, PORTS
from tests.fakes.states import two_networks
from tests.ovs.tracer import Tracer

BRIDGE = "br0"
STATE = two_networks()
OURS = [
    str(flow)
    for bridge in STATE.bridges
    for flow in BridgeCompiler().compile(STATE, bridge, planned_ports(STATE, bridge)).flows.values()
]


def told_apart(lines: list[str]) -> list[str]:
    """The lines with a cookie and a priority of its own each, so that every flow is found again and none replaces one."""
    out = []
    for number, line in enumerate(lines, start=1):
        head, actions = line.split("actions=", 1)
        out.append(f"cookie={number:#x},priority={number},{head}actions={actions}")
    return out


THEIRS = told_apart(LINES)


@pytest.fixture(scope="module")
def switch() -> Iterator[Tracer]:
    """A bridge that holds the flows of `THEIRS`."""
    with Tracer() as tracer:
        tracer.bridge(BRIDGE, PORTS)
        tracer.vsctl("set", "bridge", BRIDGE, "protocols=OpenFlow10,OpenFlow14")
        tracer.load(BRIDGE, THEIRS)
        yield tracer


def by_cookie(text: str) -> dict[int, Flow]:
    """The flows of a dump."""
    read = read_flows(text, PORTS)
    assert not [problem for problem in read.problems if problem.code != "old-dump"]
    return {flow.cookie: flow for flow in read.flows}


def from_the_wire(switch: Tracer) -> dict[int, Flow]:
    """The flows that the bridge tells over OpenFlow 1.4."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(switch.directory / f"{BRIDGE}.mgmt"))
        connection.sendall(struct.pack("!BBHI", codec.VERSION, codec.HELLO, 8, 1) + codec.flow_stats_request(7))
        found: dict[int, Flow] = {}
        with connection.makefile("rb") as stream:
            while True:
                head = stream.read(8)
                _, kind, size, _ = struct.unpack("!BBHI", head)
                body = stream.read(size - 8)
                if kind != codec.MULTIPART_REPLY:
                    continue
                at = 8
                while at < len(body):
                    length = int.from_bytes(body[at : at + 2], "big")
                    flow = codec.decode_flow_stats(body[at : at + length]).flow
                    found[flow.cookie] = flow
                    at += length
                if not body[3] & 1:  # no more to come
                    return found


def dumped(switch: Tracer, *options: str) -> str:
    return switch.ofctl("dump-flows", *options, BRIDGE)


def bare(dump: str) -> list[str]:
    """A dump without what changes by itself."""
    return sorted(re.sub(r"duration=\S+ ", "", line).strip() for line in dump.splitlines() if "actions=" in line)


def test_every_line_is_read_as_the_flow_that_the_switch_holds(switch: Tracer) -> None:
    given = {flow.cookie: flow for flow in read_flows("\n".join(THEIRS), PORTS).flows}
    held = by_cookie(dumped(switch))
    assert given.keys() == held.keys() and len(held) == len(THEIRS)
    for cookie, flow in held.items():
        assert spelled(given[cookie]) == spelled(flow), THEIRS[cookie - 1]


def spelled(flow: Flow) -> Flow:
    """The flow with what we only carry told by its name: Open vSwitch writes the rest of it its own way."""
    return replace(
        flow, actions=tuple(Raw(text=re.split(r"[:(]", str(a))[0]) if isinstance(a, Raw) else a for a in flow.actions)
    )


def test_names_and_numbers_say_the_same(switch: Tracer) -> None:
    numbers, names = by_cookie(dumped(switch)), by_cookie(dumped(switch, "--names"))
    assert {c: spelled(f) for c, f in numbers.items()} == {c: spelled(f) for c, f in names.items()}


def test_what_ovs_appctl_dumps_is_the_same(switch: Tracer) -> None:
    """It tells no cookies; here every flow has a priority of its own."""
    held = {flow.priority: replace(flow, cookie=0) for flow in by_cookie(dumped(switch)).values()}
    told = read_flows(switch.ask("bridge/dump-flows", BRIDGE), PORTS).flows
    assert {flow.priority: flow for flow in told if flow.table != 254} == held
    assert any(flow.table == 254 for flow in told)


def test_openflow_1_0_says_the_same_but_for_what_it_has_no_words_for(switch: Tracer) -> None:
    """It tells going on as a resubmit, has no instructions (a flow that writes metadata makes the dump fail), no second
    tag, and writes an IPv6 address in two parts.
    """
    lines = [
        line for line in THEIRS if not re.search(r"goto_table|write_|ipv6_src|push_vlan", line.split("actions=")[1])
    ]
    with Tracer() as other:
        other.bridge(BRIDGE, PORTS, lines)
        other.vsctl("set", "bridge", BRIDGE, "protocols=OpenFlow10,OpenFlow14")
        old = other.namespace.run("env", f"OVS_RUNDIR={other.directory}", "ovs-ofctl", "dump-flows", BRIDGE)
        assert old.startswith("NXST_FLOW reply")
        new = by_cookie(dumped(other))
        assert {c: spelled(f) for c, f in by_cookie(old).items()} == {c: spelled(f) for c, f in new.items()}


def test_openflow_1_0_leaves_out_what_would_send_a_packet() -> None:
    """Which is why reading such a dump comes with a warning."""
    with Tracer() as other:
        other.bridge(BRIDGE, PORTS, ["actions=write_actions(output:1),goto_table:5"])
        other.vsctl("set", "bridge", BRIDGE, "protocols=OpenFlow10,OpenFlow14")
        (new,) = read_flows(dumped(other), PORTS).flows
        assert new.actions == (Raw(text="write_actions(output:1)"),)
        old = read_flows(
            other.namespace.run("env", f"OVS_RUNDIR={other.directory}", "ovs-ofctl", "dump-flows", BRIDGE), {}
        )
        assert [problem.code for problem in old.problems] == ["old-dump"]
        assert old.flows[0].actions == (Resubmit(5),)


def carried(flow: Flow) -> bool:
    """Whether some of its actions are only carried."""

    def one(action: Action) -> bool:
        return isinstance(action, Raw) or (isinstance(action, Clone) and any(map(one, action.actions)))

    return any(map(one, flow.actions))


def test_the_wire_says_the_same_as_text(switch: Tracer) -> None:
    texts, wires = by_cookie(dumped(switch)), from_the_wire(switch)
    assert texts.keys() == wires.keys()
    for cookie, flow in texts.items():
        if not carried(wires[cookie]):
            assert flow == wires[cookie], THEIRS[cookie - 1]
        else:
            assert carried(flow) or "controller(" in str(flow), THEIRS[cookie - 1]
    assert sum(map(carried, wires.values())) < len(THEIRS) // 5


def test_what_we_write_makes_the_switch_hold_the_same(switch: Tracer) -> None:
    """Our text of each flow, loaded, is dumped as the same flow: only the spelling of a write may differ."""
    held = by_cookie(dumped(switch))
    with Tracer() as other:
        other.bridge(BRIDGE, PORTS, held.values())
        assert by_cookie(dumped(other)) == held
        once = bare(dumped(other))
        other.load(BRIDGE, by_cookie(dumped(other)).values())
        assert bare(dumped(other)) == once


def test_our_own_flows_are_dumped_as_we_wrote_them(switch: Tracer) -> None:
    with Tracer() as other:
        other.bridge(BRIDGE, {}, told_apart_by_place(OURS))
        wanted = {flow.key: flow for flow in read_flows("\n".join(told_apart_by_place(OURS)), {}).flows}
        assert {flow.key: flow for flow in read_flows(dumped(other), {}).flows} == wanted
        other.load(BRIDGE, wanted.values())
        first = bare(dumped(other))
        other.load(BRIDGE, read_flows(dumped(other), {}).flows)
        assert bare(dumped(other)) == first
        assert any(isinstance(a, Learn) for flow in wanted.values() for a in flow.actions)


def told_apart_by_place(lines: list[str]) -> list[str]:
    """One line for a table, priority and match: the bridges' flows are laid over each other here."""
    return [str(flow) for flow in {read_flow(line, {}).key: read_flow(line, {}) for line in lines}.values()]


def test_flows_that_the_switch_hides_are_read(switch: Tracer) -> None:
    with Tracer() as other:
        other.bridge(BRIDGE, {"veth100": 1}, ["priority=5,in_port=1,actions=drop"])
        other.vsctl("set-controller", BRIDGE, "tcp:127.0.0.1:9")  # in-band
        hidden = [f for f in read_flows(other.ask("bridge/dump-flows", BRIDGE), {}).flows if f.priority > 0xFFFF]
        assert hidden and all(str(flow.actions[0]) == "NORMAL" for flow in hidden)
        assert not [f for f in read_flows(dumped(other), {}).flows if f.priority > 0xFFFF]
