"""What a switch really holds is proved: foreign and forged flows that leak are told with a packet, and sealed if asked."""

from __future__ import annotations

import random
from dataclasses import replace

from controller import fields
from controller.compile import Sealing
from controller.events import Event, Kind
from controller.flow import Flow, Load, Match, Output, whole
from controller.signals import Seal, Unseal
from tests.fakes.states import started
from tests.fakes.switch import Dropped, FakeSwitch, Sent, Wired

ABOUT_LEAKS = (Kind.LEAK, Kind.LEAK_CLOSED, Kind.SEALED, Kind.UNSEALED, Kind.UNPROVED)


def hole(switch: FakeSwitch, source: str, target: str, priority: int = 40000) -> Flow:
    match = Match.named(in_port=switch.number(source))
    return Flow(0, priority, match, (Output(switch.number(target)),), cookie=0x77)


def about_leaks(events: list[Event]) -> list[Kind]:
    return [event.kind for event in events if event.kind in ABOUT_LEAKS]


def out_of_a_container(wired: Wired, switch: FakeSwitch, target: str = "1.1.1.1") -> object:
    member = wired.core.state.network("privacy").members[1]
    number = switch.number(member.port)
    return wired.send(
        switch, number, eth_src=str(member.mac), ipv4_src=str(member.address), ipv4_dst=target, tcp_dst=443
    )


def test_a_foreign_flow_that_leaks_is_told_with_its_packet_within_two_seconds() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.say(*switch.add_by_others(hole(switch, "veth102", "from-privacy")))
    told = wired.wait(2)
    assert about_leaks(told) == [Kind.LEAK]
    leak = next(event for event in told if event.kind is Kind.LEAK)
    assert "veth102" in leak.text and "cookie=0x77/-1,table=0" in leak.text
    assert leak.packet is not None and f"in_port={switch.number('veth102')}" in leak.packet
    assert leak.data["findings"] and wired.core.status()["bridges"][0]["leaks"]  # type: ignore[index, call-overload]
    assert about_leaks(wired.wait(30)) == []
    wired.say(*switch.remove_by_others(hole(switch, "veth102", "from-privacy")))
    assert about_leaks(wired.wait(2)) == [Kind.LEAK_CLOSED]


def test_one_that_was_there_before_the_controller_is_told_too() -> None:
    wired, switches = started()
    switch = switches["vmbr1"]
    wired.say(*switch.disconnect())
    wired.say(
        *switch.add_by_others(
            hole(switch, "veth200", "LOCAL") if "LOCAL" in switch.ports else hole(switch, "veth200", "from-management")
        )
    )
    wired.up()
    assert Kind.LEAK in about_leaks(wired.wait(2))


def test_harmless_flows_are_foreign_and_nothing_more() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    drop = Flow(0, 40000, Match.named(in_port=switch.number("veth102")), cookie=0x77)
    unread = replace(hole(switch, "veth102", "from-privacy"), table=200)
    wired.say(*switch.add_by_others(drop, unread))
    assert about_leaks(wired.wait(3)) == []
    assert len(wired.of(Kind.FOREIGN_FLOW)) == 2


def test_what_the_switch_learns_by_itself_is_expected() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    assert isinstance(out_of_a_container(wired, switch), Sent)
    assert switch.learned()
    assert about_leaks(wired.wait(3)) == []


def test_a_forged_learned_path_is_told() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    out_of_a_container(wired, switch)
    path = next(iter(switch.learned()))
    to = Load(switch.number("veth100"), whole(fields.REGS[1])._replace(width=16))
    forged = replace(path, actions=tuple(to if _is_port(a) else a for a in path.actions))
    assert forged != path
    wired.say(*switch.add_by_others(forged))
    assert about_leaks(wired.wait(2)) == [Kind.LEAK]


def _is_port(action: object) -> bool:
    return isinstance(action, Load) and action.target.header == fields.REGS[1].header


def test_a_sealed_port_stays_shut_until_an_operator_clears_it() -> None:
    wired, switches = started()
    wired.core.seal = True
    switch = switches["vmbr0"]
    bad = hole(switch, "veth102", "from-privacy")
    wired.say(*switch.add_by_others(bad))
    assert about_leaks(wired.wait(2)) == [Kind.LEAK, Kind.SEALED, Kind.LEAK_CLOSED]
    assert isinstance(out_of_a_container(wired, switch), Dropped)
    wired.say(*switch.remove_by_others(bad))
    assert about_leaks(wired.wait(5)) == []
    assert isinstance(out_of_a_container(wired, switch), Dropped)
    assert wired.core.sealed() == {"vmbr0": {"veth102": Sealing.LEAK}}

    after = Wired(wired.core.state, *switches.values(), now=wired.now)  # another controller, which seals nothing itself
    for other in switches.values():
        other.connected = False
    after.up()
    after.wait(2)
    assert isinstance(out_of_a_container(after, switch), Dropped)
    assert after.core.sealed() == {"vmbr0": {"veth102": Sealing.LEAK}}
    told = after.say(Unseal("vmbr0", "veth102"))
    assert about_leaks(told) == [Kind.UNSEALED]
    assert isinstance(out_of_a_container(after, switch), Sent)
    assert after.say(Unseal("vmbr0", "veth102")) == []


def test_cleared_too_early_it_is_sealed_again() -> None:
    wired, switches = started()
    wired.core.seal = True
    switch = switches["vmbr0"]
    wired.say(*switch.add_by_others(hole(switch, "veth102", "from-privacy")))
    wired.wait(2)
    wired.say(Unseal("vmbr0", "veth102"))
    assert about_leaks(wired.wait(2)) == [Kind.LEAK, Kind.SEALED, Kind.LEAK_CLOSED]


def test_an_operator_seals_a_port_that_leaks_nothing() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    assert isinstance(out_of_a_container(wired, switch), Sent)
    assert about_leaks(wired.say(Seal("vmbr0", "veth102"))) == [Kind.SEALED]
    assert isinstance(out_of_a_container(wired, switch), Dropped)
    assert wired.say(Seal("vmbr0", "veth102")) == []
    assert wired.say(Seal("vmbr0", "nothing")) == []
    assert about_leaks(wired.say(Unseal("vmbr0", "veth102"))) == [Kind.UNSEALED]
    assert isinstance(out_of_a_container(wired, switch), Sent)


def test_why_a_port_is_sealed_outlives_the_controller_and_a_leak_is_not_forgotten() -> None:
    wired, switches = started()
    wired.core.seal = True
    switch = switches["vmbr0"]
    wired.say(*switch.add_by_others(hole(switch, "veth102", "from-privacy")))
    wired.wait(2)
    wired.say(Seal("vmbr0", "veth100"), Seal("vmbr0", "veth102"))
    sealed = {"vmbr0": {"veth100": Sealing.NETWORK, "veth102": Sealing.LEAK}}
    assert wired.core.sealed() == sealed

    after = Wired(wired.core.state, *switches.values(), now=wired.now)
    for other in switches.values():
        other.connected = False
    told = [*after.up(), *after.wait(2)]
    assert after.core.sealed() == sealed
    network, leak = sorted(event.text for event in told if event.kind is Kind.SEALED)
    assert network.startswith("port veth100 ") and "bulkhead incident" in network
    assert leak.startswith("port veth102 ") and "bulkhead unseal vmbr0 veth102" in leak


def test_without_being_asked_nothing_is_sealed() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.say(*switch.add_by_others(hole(switch, "veth102", "from-privacy")))
    wired.wait(2)
    assert wired.core.sealed() == {}


def test_where_a_seal_cannot_win_the_leak_stays_told() -> None:
    """Of two flows of the highest priority nobody knows which wins; the seal does not pretend."""
    wired, switches = started()
    wired.core.seal = True
    switch = switches["vmbr0"]
    match = Match.named(in_port=switch.number("veth102"), eth_type=0x0800)
    wired.say(*switch.add_by_others(Flow(0, 0xFFFF, match, (Output(switch.number("from-privacy")),), cookie=0x77)))
    assert about_leaks(wired.wait(3)) == [Kind.LEAK, Kind.SEALED]


def test_flows_that_take_long_to_prove_leave_time_for_everything_else() -> None:
    """Somebody who keeps changing hundreds of tangled flows does not keep the controller from its work."""
    wired, switches = started()
    switch = switches["vmbr0"]
    rng = random.Random(5)
    wired.say(*switch.add_by_others(*(tangled(rng) for _ in range(400))))
    wired.wait(1)
    (watch,) = (w for dpid, w in wired.core._watches.items() if dpid == switch.dpid)
    assert watch._prover.spent > 50_000
    looked = watch._seen
    wired.say(*switch.add_by_others(tangled(rng)))
    wired.wait(0.6)
    assert watch._seen == looked
    wired.wait(10)
    assert watch._seen != looked


def tangled(rng: random.Random) -> Flow:
    """A flow that compares random bits of four fields, and so meets most others of its kind."""
    items = [(fields.ETH_TYPE.header, 0x0800, 0xFFFF)]
    for of in (fields.IPV4_SRC, fields.IPV4_DST, fields.ETH_SRC):
        mask = rng.getrandbits(of.bits) & rng.getrandbits(of.bits) & rng.getrandbits(of.bits)
        items.append((of.header, rng.getrandbits(of.bits) & mask, mask))
    return Flow(0, rng.randrange(1000, 60000), Match.of(items), (), rng.choice((10, 30)), cookie=0x77)
