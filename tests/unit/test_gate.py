"""The gate: what is not proved is not sent, is told with a packet, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from apps.spoof_guard import SpoofGuard
from controller import fields
from controller.cli import main
from controller.compile import BridgeCompiler, planned_ports
from controller.events import Kind
from controller.flow import Flow, Match, Output, SetField
from controller.frame import Frame
from controller.pipeline import ADMIT, Then
from controller.signals import AddFlow, Install, Log, StateLoaded
from controller.verify.gate import try_proof
from controller.verify.prove import Unsafe, prove
from tests.fakes.states import started, two_networks

EXAMPLE = Path(__file__).parents[2] / "examples" / "oo1424oo.yaml"


def test_two_networks_are_proved() -> None:
    try_proof(two_networks())


def open_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    good = SpoofGuard.shared

    def bad(self: SpoofGuard, frame: Frame) -> Iterator[Flow]:
        yield from good(self, frame)
        flow = ADMIT.flow(650, self.own("hole"), Then((), None), in_port=1)
        yield replace(flow, actions=(Output(2),))

    monkeypatch.setattr(SpoofGuard, "shared", bad)


def test_a_defect_of_an_app_is_refused_with_a_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    open_a_hole(monkeypatch)
    with pytest.raises(Unsafe) as caught:
        try_proof(two_networks())
    assert all(finding.counterexample is not None for finding in caught.value.findings)
    assert "in_port=1" in str(caught.value)


def test_an_unsafe_state_leaves_the_old_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    wired, _ = started()
    before = {s.dpid: dict(s.flows.installed) for s in wired.core.switches.values()}
    open_a_hole(monkeypatch)
    for switch in wired.core.switches.values():
        switch.compiler = BridgeCompiler()
    state = replace(two_networks("other"), networks=tuple(replace(n, refuse=True) for n in two_networks().networks))
    effects = wired.core.handle(StateLoaded(state, "bulkhead.yaml"), 50.0)
    assert not [e for e in effects if isinstance(e, Install | AddFlow)]
    events = [e.event for e in effects if isinstance(e, Log)]
    assert [e.kind for e in events] == [Kind.STATE_REJECTED]
    assert "The old state stays in force" in events[0].text and events[0].data["findings"]
    assert {s.dpid: dict(s.flows.installed) for s in wired.core.switches.values()} == before


def test_a_packet_may_not_leave_as_another_than_came_in() -> None:
    """Allowed as it came in, it would be somebody else's at the other end: the policy judges what came in."""
    state = two_networks()
    bridge = state.bridges[0]
    ports = planned_ports(state, bridge)
    flows = BridgeCompiler().compile(state, bridge, ports).flows
    source, peer = ports["veth102"].number, ports["from-privacy"].number
    member = state.network("privacy").members[1]
    to_peer = Match.named(
        vlan_vid=(0, 0x1000),
        in_port=source,
        eth_src=member.mac,
        eth_type=0x0800,
        ipv4_src=member.address,
        ipv4_dst=0x0A0000FE,
    )
    plain = Flow(0, 40000, to_peer, (Output(peer),))
    foreign = state.network("management").members[0].address
    rewritten = replace(plain, actions=(SetField(fields.IPV4_DST.header, foreign), *plain.actions))
    assert not prove(state, bridge, ports, [*flows.values(), plain])
    found = prove(state, bridge, ports, [*flows.values(), rewritten])
    assert found and "written other addresses" in found[0].text and found[0].counterexample is not None


@pytest.mark.parametrize("command", ["check", "plan"])
def test_commands_say_what_is_not_proved(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_a_hole(monkeypatch)
    done = CliRunner().invoke(main, [command, str(EXAMPLE)])
    assert done.exit_code == 1
    assert "would open a path" in done.stderr and "packet in_port=1" in done.stderr
    assert "Traceback" not in done.stderr
