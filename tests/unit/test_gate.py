"""The gate: what is not proved is not sent, is told with a packet, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from apps.spoof_guard import SpoofGuard
from controller.compile import BridgeCompiler
from controller.events import Kind
from controller.flow import Flow, Output
from controller.frame import Frame
from controller.pipeline import ADMIT, Then
from controller.signals import AddFlow, Install, Log, StateLoaded
from controller.verify.gate import try_proof
from controller.verify.prove import Unsafe
from tests.fakes.states import started, two_networks


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
