"""The egress leg may tell that a packet was too big for the tunnel, and nothing else in the gateway's name."""

from __future__ import annotations

import pytest

from controller.pipeline import Violation
from tests.fakes.states import started
from tests.fakes.switch import FakeSwitch, Outcome, Sent, Shown, Values, Wired
from tests.unit.test_core import EGRESS_MAC, PRIVACY, WORLD, XRAY, sender

FROM_GATEWAY = {"eth_src": EGRESS_MAC, "ipv4_src": PRIVACY.gateway, "ipv4_dst": XRAY.address}


def icmp(kind: int) -> Values:
    """An ICMP message of a type."""
    return {"ip_proto": 1, "icmpv4_type": kind}


def from_leg(switch: FakeSwitch, kind: int, **more: int) -> Outcome:
    """What becomes of such a message from the leg to XRAY."""
    return switch.trace(switch.number("warp0"), {**FROM_GATEWAY, **more}, icmp(kind))


def asked(wired: Wired, switch: FakeSwitch) -> None:
    """XRAY has sent something to the world."""
    assert wired.send(switch, switch.number("veth102"), sender(XRAY, WORLD)) == Sent(switch.number("warp0"))


@pytest.mark.parametrize("kind", [3, 11])
def test_an_error_reaches_whoever_sends_to_the_world(kind: int) -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    assert from_leg(switch, kind) == Shown(Violation.UNSOLICITED)
    asked(wired, switch)
    assert from_leg(switch, kind) == Sent(switch.number("veth102"))


@pytest.mark.parametrize("kind", [0, 5, 8, 13])
def test_other_messages_in_the_gateways_name_are_spoofed(kind: int) -> None:
    wired, switches = started()
    asked(wired, switches["vmbr0"])
    assert from_leg(switches["vmbr0"], kind) == Shown(Violation.SPOOF)


def test_an_error_from_another_mac_or_member_is_spoofed() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    asked(wired, switch)
    assert from_leg(switch, 3, eth_src=0x020000000001) == Shown(Violation.SPOOF)
    assert from_leg(switch, 3, ipv4_src=PRIVACY.members[0].address) == Shown(Violation.SPOOF)
