"""A learned path does not outlive its port: the port's number may come back as another's."""

from __future__ import annotations

from controller.events import Kind
from controller.pipeline import RETURN, Violation
from controller.signals import PortChanged
from tests.fakes.states import started
from tests.fakes.switch import FakeSwitch, Sent, Shown, Wired
from tests.unit.test_core import GATEWAY, WORLD, XRAY, answer_to, sender


def paths(switch: FakeSwitch) -> int:
    """How many learned flows the switch holds."""
    return sum(1 for entry in switch.flows.values() if entry.flow.table == RETURN.id)


def both_talk(wired: Wired, switch: FakeSwitch) -> None:
    """GATEWAY and XRAY have sent something to the world."""
    for port, member in (("veth100", GATEWAY), ("veth102", XRAY)):
        assert wired.send(switch, switch.number(port), sender(member, WORLD)) == Sent(switch.number("warp0"))


def test_a_port_that_goes_takes_its_paths_along_and_no_other() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    both_talk(wired, switch)
    assert paths(switch) == 2
    port = next(p for p in wired.core.switches[switch.dpid].ports.values() if p.name == "veth102")
    wired.say(PortChanged(switch.dpid, port, gone=True))
    assert paths(switch) == 1
    assert switch.trace(switch.number("warp0"), answer_to(XRAY)) == Shown(Violation.UNSOLICITED)
    assert switch.trace(switch.number("warp0"), answer_to(GATEWAY)) == Sent(switch.number("veth100"))
    (ended,) = wired.of(Kind.PATH_EXPIRED)
    assert str(XRAY.address) in ended.text and "port is gone" in ended.text


def test_paths_to_ports_that_went_while_nobody_looked_are_removed_at_adoption() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    both_talk(wired, switch)
    wired.say(*switch.disconnect())
    del switch.ports["veth102"]
    wired.up()
    assert paths(switch) == 1
