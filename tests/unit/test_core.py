"""The core in conversation with switches: time is an argument, switches are fakes, behaviour is what is asserted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from apps.learning import HARD_S, IDLE_S, LIMIT, REPLIES
from apps.packet_in import QUIET_S
from controller.compile import CANARY_FLOW, UNDECLARED_FLOW
from controller.core import CONTESTED_S, Core
from controller.events import Event, Kind
from controller.fields import LOCAL
from controller.flow import Cookie, Flow, Match, Output
from controller.frame import Port
from controller.model import DesiredState, Mac, Member, Rule
from controller.offenders import NOISY, REPORT_S
from controller.pipeline import RETURN, VIOLATION, Violation
from controller.problems import error
from controller.signals import (
    BridgeFacts,
    Committed,
    Count,
    Dump,
    EgressHealth,
    FactsSeen,
    Install,
    Log,
    PortChanged,
    StateLoaded,
    StateRejected,
    SwitchError,
    SwitchUp,
    Tick,
)
from tests.fakes.states import member, privacy, started, state_of, switch_for, two_networks, with_network
from tests.fakes.switch import Dropped, FakeSwitch, Sent, Shown, Values, Wired

STATE = two_networks()
PRIVACY, MANAGEMENT = STATE.networks
GATEWAY, XRAY = PRIVACY.members
MCP, API = MANAGEMENT.members
WORLD = "1.1.1.1"
assert PRIVACY.egress is not None
EGRESS_MAC = PRIVACY.egress.mac
FOREIGN = Flow(0, 7, Match.named(in_port=9), (Output(3),), None, 0x77)


def sender(of: Member, target: object) -> dict[str, int | str]:
    """Addresses of an IPv4 packet from a member."""
    return {"eth_src": of.mac, "ipv4_src": of.address, "ipv4_dst": str(target)}


def answer_to(of: Member) -> dict[str, int | str]:
    """Addresses of an answer from the world."""
    return {"eth_src": EGRESS_MAC, "ipv4_src": WORLD, "ipv4_dst": of.address}


def frame(of: Member, target: object, *, dport: int = 443, flags: str = "S", size: int = 0) -> bytes:
    """A TCP packet from a member as bytes."""
    eth = Ether(src=str(of.mac), dst=str(PRIVACY.gateway_mac))
    return bytes(
        eth / IP(src=str(of.address), dst=str(target)) / TCP(sport=4000, dport=dport, flags=flags) / bytes(size)
    )


def crossing(wired: Wired, switch: FakeSwitch, times: int = 1) -> None:
    """XRAY tries to reach the other network."""
    for _ in range(times):
        found = wired.send(switch, switch.number("veth102"), sender(XRAY, MCP.address), data=frame(XRAY, MCP.address))
        assert isinstance(found, Shown | Dropped)


def bridges(wired: Wired) -> dict[str, Any]:
    """The bridges' part of the status, by name."""
    rows: Any = wired.core.status()["bridges"]
    return {row["name"]: row for row in rows}


def counts(events: list[Event]) -> int:
    """How many packets these events tell of."""
    return sum(int(str(event.data["count"])) for event in events)


# ---------------------------------------------------------------------------------------------------------- coming up


def test_a_cold_switch_gets_everything_in_one_bundle() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    assert switch.dumps == 1 and len(switch.installs) == 1
    assert not switch.installs[0].plan.delete and not switch.installs[0].plan.change
    assert CANARY_FLOW in switch.ours()
    (applied,) = [e for e in wired.of(Kind.STATE_APPLIED) if e.bridge == "vmbr0"]
    assert applied.data["adopted"] == 0 and applied.data["added"] == len(switch.ours())
    assert applied.data["state"] == STATE.digest


def test_a_new_controller_adopts_what_is_there_and_changes_nothing() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.send(switch, switch.number("veth102"), sender(XRAY, WORLD))
    before = {place: (entry.flow, entry.packets) for place, entry in switch.flows.items()}
    sent = len(switch.installs)
    switch.disconnect()
    again = Wired(STATE, switch, now=wired.now + 5)
    again.up()
    assert len(switch.installs) == sent
    assert {place: (entry.flow, entry.packets) for place, entry in switch.flows.items()} == before
    (applied,) = again.of(Kind.STATE_APPLIED)
    assert applied.data["adopted"] == len(switch.ours()) and "nothing changed" in applied.text
    assert switch.trace(switch.number("warp0"), answer_to(XRAY)) == Sent(switch.number("veth102"))


def test_a_controller_that_comes_back_mends_only_what_changed_meanwhile() -> None:
    _, switches = started()
    switch = switches["vmbr0"]
    lost = sorted(switch.ours(), key=str)[5]
    switch.disconnect()
    switch.remove_by_others(lost)
    stale = Flow(0, 3, Match(), (), None, int(Cookie(3, 3)))
    switch.add_by_others(stale)
    again = Wired(STATE, switch)
    again.up()
    plan = switch.installs[-1].plan
    assert plan.add == (lost,) and plan.delete == (stale,) and not plan.change


def test_a_restarted_switch_is_known_by_its_missing_canary() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    full = switch.ours()
    wired.say(*switch.restart())
    assert switch.ours() == set()
    wired.up()
    assert switch.ours() == full
    assert wired.events[-1].data.get("restarted") is True and "came back without its flows" in wired.events[-1].text


def test_a_reconnect_with_all_flows_is_no_restart() -> None:
    wired, switches = started()
    wired.say(*switches["vmbr0"].disconnect())
    assert wired.events[-1].kind is Kind.SWITCH_DOWN
    wired.up()
    assert "restarted" not in wired.events[-1].data and wired.events[-1].data["added"] == 0


def test_a_switch_that_never_had_our_flows_was_not_restarted() -> None:
    switch = switch_for(STATE, "vmbr0")
    wired = Wired(STATE, switch)
    switch.cutting = "before"
    wired.up()
    assert not switch.connected and not switch.ours()
    wired.up()
    (applied,) = wired.of(Kind.STATE_APPLIED)
    assert "restarted" not in applied.data


def test_all_flows_deleted_by_somebody_come_back() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    full = switch.ours()
    events = wired.say(*switch.clear_by_others())
    events += wired.wait(1)
    assert switch.ours() == full
    assert {event.kind for event in events} == {Kind.TAMPERING, Kind.DRIFT_REPAIRED}


def test_a_switch_connecting_twice_is_still_the_declared_one() -> None:
    wired, switches = started()
    wired.say(*switches["vmbr0"].connect())
    assert wired.core.switches[switches["vmbr0"].dpid].bridge == STATE.bridge("vmbr0")
    assert not wired.of(Kind.UNKNOWN_BRIDGE)


def test_a_dump_that_is_never_answered_is_asked_for_again() -> None:
    switch = switch_for(STATE, "vmbr0")
    wired = Wired(STATE, switch)
    switch.mute = True
    wired.up()
    wired.wait(5)
    switch.mute = False
    wired.wait(60)
    assert switch.dumps == 1 and switch.ours()


# ------------------------------------------------------------------------------------------------- drift and tampering


@pytest.mark.parametrize("how", ["removed", "changed", "taken over", "added"])
def test_tampering_is_told_and_put_right(how: str) -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    full = switch.ours()
    victim = next(flow for flow in full if flow.table == 40 and flow.priority == 400)
    match how:
        case "removed":
            signals = switch.remove_by_others(victim)
        case "changed":
            signals = switch.add_by_others(replace(victim, actions=(Output(1),), goto=None))
        case "taken over":
            signals = switch.add_by_others(replace(victim, actions=(Output(1),), goto=None, cookie=0x77))
        case _:
            signals = switch.add_by_others(Flow(0, 999, Match(), (Output(1),), None, victim.cookie))
    events = wired.say(*signals)
    assert switch.ours() == full and not switch.foreign()
    assert [event.kind for event in events] == [Kind.TAMPERING, Kind.DRIFT_REPAIRED]
    assert how == "taken over" or events[0].app == "isolation"


def test_somebody_who_keeps_tampering_is_answered_at_a_limited_rate() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    victim = next(flow for flow in switch.ours() if flow.table == 40)
    sent = len(switch.installs)
    for _ in range(40):
        if victim in switch.ours():
            wired.say(*switch.remove_by_others(victim))
        wired.wait(0.05, step=0.05)
    assert len(switch.installs) - sent <= 2 / 0.5 + 1
    wired.wait(1)
    assert victim in switch.ours()


def test_tampering_during_an_install_is_mended_after_it() -> None:
    wired, switches = started()
    switch, core = switches["vmbr0"], wired.core
    victim = next(flow for flow in switch.ours() if flow.table == 40)
    effects = core.handle(StateLoaded(with_network(STATE, "privacy", members=(GATEWAY,))), wired.now)
    effects += core.handle(switch.remove_by_others(victim)[0], wired.now)
    wired.say(*switch.run(effects))
    wired.wait(2)
    assert victim in switch.ours()


def test_a_foreign_flow_is_told_once_and_never_touched() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    (event,) = wired.say(*switch.add_by_others(FOREIGN))
    assert event.kind is Kind.FOREIGN_FLOW and event.flow is not None and "priority=7" in event.flow
    assert "ovs-ofctl -O OpenFlow14 del-flows vmbr0 'cookie=0x77/-1,table=0'" in event.text
    wired.load(state_of(privacy(XRAY)))
    wired.wait(40)
    assert switch.foreign() == {FOREIGN}
    assert len(wired.of(Kind.FOREIGN_FLOW)) == 1
    (gone,) = wired.say(*switch.remove_by_others(FOREIGN))
    assert gone.kind is Kind.FOREIGN_FLOW and "was removed" in gone.text


def test_foreign_flows_that_were_there_are_told_of_once() -> None:
    switch = switch_for(STATE, "vmbr0")
    switch.hold([FOREIGN])
    switch.refusing = 3
    wired = Wired(STATE, switch)
    wired.up()
    wired.wait(20)
    assert switch.foreign() == {FOREIGN} and CANARY_FLOW in switch.ours()
    (event,) = wired.of(Kind.FOREIGN_FLOW)
    assert "was there already" in event.text


# -------------------------------------------------------------------------------------------------- bundles gone wrong


def test_two_quick_state_changes_never_have_two_bundles_under_way() -> None:
    wired, switches = started()
    switch, core = switches["vmbr0"], wired.core
    one = with_network(STATE, "privacy", members=(GATEWAY,))
    two = with_network(STATE, "privacy", members=(GATEWAY, XRAY, member("privacy", 103, "10.0.0.103")))
    first = core.handle(StateLoaded(one), wired.now)
    second = core.handle(StateLoaded(two), wired.now)
    mine = [e for e in (*first, *second) if isinstance(e, Install) and e.dpid == switch.dpid]
    assert len(mine) == 1
    wired.say(*switch.run(mine))
    fresh = Wired(two, other := switch_for(STATE, "vmbr0"))
    fresh.up()
    assert switch.ours() == other.ours()


def test_a_refused_bundle_leaves_the_old_flows_and_is_tried_again_ever_more_slowly() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    before = switch.ours()
    switch.refusing = 7
    events = wired.load(with_network(STATE, "privacy", members=(GATEWAY,)))
    refused = [event for event in events if event.kind is Kind.OPENFLOW_ERROR]
    assert len(refused) == 1 and "tried again" in refused[0].text and switch.ours() == before
    tries, start = [], wired.now
    while switch.refusing and wired.now < start + 200:
        left = switch.refusing
        wired.wait(0.25)
        if switch.refusing < left:
            tries.append(wired.now - start)
    gaps = [round(b - a) for a, b in zip([0.0, *tries], tries, strict=False)]
    assert gaps == [1, 2, 4, 8, 16, 30]
    wired.wait(31)
    assert switch.ours() != before
    assert switch.trace(switch.number("veth102"), sender(XRAY, WORLD)) == Dropped("ADMIT")


def test_a_success_ends_the_growing_of_the_pause() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    for members in ((GATEWAY,), (GATEWAY, XRAY)):
        switch.refusing = 1
        wired.load(with_network(STATE, "privacy", members=members))
        wired.wait(1.25)
        assert not switch.refusing and len({flow for flow in switch.ours() if flow.table == 0})
        assert bridges(wired)["vmbr0"]["phase"] == "steady"


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_switch_lost_in_the_middle_of_a_bundle(cut: str) -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    switch.cutting = "before" if cut == "before" else "after"
    wired.load(with_network(STATE, "privacy", members=(GATEWAY,)))
    assert not switch.connected and wired.of(Kind.SWITCH_DOWN)
    wired.up()
    assert switch.trace(switch.number("veth102"), sender(XRAY, WORLD)) == Dropped("ADMIT")
    last = wired.events[-1]
    assert last.kind is Kind.STATE_APPLIED and ("nothing changed" in last.text) == (cut == "after")


def test_a_late_answer_of_an_earlier_bundle_moves_nothing() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    effects = wired.core.handle(StateLoaded(with_network(STATE, "privacy", members=(GATEWAY,))), wired.now)
    (install,) = [e for e in effects if isinstance(e, Install) and e.dpid == switch.dpid]
    assert wired.core.handle(Committed(switch.dpid, install.token - 1), wired.now) == []
    assert wired.core.switches[switch.dpid].flows.phase.name == "INSTALLING"


def test_a_bundle_whose_fate_is_unknown_is_looked_at_again() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    switch.unsure = True
    wired.load(with_network(STATE, "privacy", members=(GATEWAY,)))
    wired.wait(2)
    assert "nothing changed" in wired.events[-1].text
    assert wired.core.switches[switch.dpid].flows.phase.name == "STEADY"


# --------------------------------------------------------------------------------------------------------------- ports


def test_flows_follow_a_port_to_its_new_number() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.say(*switch.plug("veth102", 40))
    assert switch.trace(40, sender(XRAY, GATEWAY.address)) == Sent(switch.number("veth100"))
    assert switch.trace(4, sender(XRAY, GATEWAY.address)) == Dropped("ADMIT")
    assert switch.trace(switch.number("veth100"), sender(GATEWAY, XRAY.address)) == Sent(40)


def test_the_late_end_of_a_port_that_has_come_back_under_another_number_is_ignored() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    old = switch.ports["veth102"]
    wired.say(*switch.plug("veth102", 40))
    assert wired.say(PortChanged(switch.dpid, old, gone=True)) == []
    assert switch.trace(40, sender(XRAY, GATEWAY.address)) == Sent(switch.number("veth100"))


def test_a_number_that_goes_to_another_port_before_the_old_ones_end_is_told() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    number = switch.number("veth100")
    late = switch.unplug("veth100")
    events = wired.say(*switch.plug("veth102", number))
    assert [e.text for e in events if e.kind is Kind.PORT_DOWN] == ["port veth100 of vmbr0 is gone"]
    assert switch.trace(number, sender(XRAY, WORLD)) == Sent(switch.number("warp0"))
    wired.say(*late)
    assert switch.trace(number, sender(XRAY, WORLD)) == Sent(switch.number("warp0"))
    assert switch.trace(number, sender(GATEWAY, WORLD)) == Shown(Violation.SPOOF)


def test_an_interface_called_local_is_not_the_hosts_port() -> None:
    wired, switches = started()
    switch = switches["vmbr1"]
    before = switch.ours()
    wired.say(PortChanged(switch.dpid, Port(30, "LOCAL", Mac(5), True)))
    assert switch.ours() == before


def test_a_container_is_shut_until_its_flows_are_confirmed() -> None:
    state = with_network(STATE, "privacy", members=(GATEWAY, XRAY, new := member("privacy", 103, "10.0.0.103")))
    wired, switches = started(state)
    switch = switches["vmbr0"]
    wired.say(*switch.unplug("veth103"))
    effects = wired.core.handle(switch.plug("veth103", 9)[0], wired.now)
    assert switch.trace(9, sender(new, WORLD)) == Dropped("ADMIT")
    wired.say(*switch.run(effects))
    assert switch.trace(9, sender(new, WORLD)) == Sent(switch.number("warp0"))


def test_a_missing_port_is_in_the_status() -> None:
    switch = switch_for(STATE, "vmbr0", without=["veth102"])
    wired = Wired(STATE, switch)
    wired.up()
    rows = bridges(wired)
    assert rows["vmbr0"]["missing_ports"] == ["veth102"] and rows["vmbr0"]["phase"] == "steady"
    assert [row["connected"] for row in rows.values()] == [True, False, False, False]


# -------------------------------------------------------------------------------------------------------------- egress


def test_the_kill_switch_follows_the_port_and_the_health_of_the_tunnel() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    veth, warp = switch.number("veth102"), switch.number("warp0")

    def out() -> object:
        return switch.trace(veth, sender(XRAY, WORLD))

    assert out() == Sent(warp)
    (event,) = [e for e in wired.say(*switch.plug("warp0", warp, up=False)) if e.kind is Kind.EGRESS_DOWN]
    assert out() == Dropped("EGRESS") and "is down" in event.text
    wired.say(*switch.plug("warp0", warp))
    assert out() == Sent(warp) and wired.of(Kind.EGRESS_UP)
    events = wired.say(EgressHealth("privacy", False))
    assert out() == Dropped("EGRESS") and "does not carry traffic" in events[0].text
    assert not [e for e in wired.say(EgressHealth("privacy", False)) if e.kind is Kind.EGRESS_DOWN]
    wired.say(*switch.unplug("warp0"))
    assert out() == Dropped("EGRESS")
    wired.say(*switch.plug("warp0", 30))
    assert out() == Dropped("EGRESS")
    wired.say(EgressHealth("privacy", True))
    assert out() == Sent(30)


def test_an_egress_that_is_declared_again_is_as_its_tunnel_is() -> None:
    """It had been down when it was taken out of the state, and has come back meanwhile."""
    wired, switches = started()
    switch = switches["vmbr0"]
    veth, warp = switch.number("veth102"), switch.number("warp0")
    wired.say(EgressHealth("privacy", False))
    without = tuple(replace(one, egress=None) for one in STATE.networks)
    wired.say(StateLoaded(replace(STATE, networks=without)))
    wired.say(EgressHealth("privacy", True))
    wired.say(StateLoaded(STATE))
    assert switch.trace(veth, sender(XRAY, WORLD)) == Sent(warp)


def test_an_egress_that_was_never_there_is_told_of() -> None:
    switch = switch_for(STATE, "vmbr0", without=["warp0"])
    wired = Wired(STATE, switch)
    wired.up()
    (event,) = wired.of(Kind.EGRESS_DOWN)
    assert "is not there" in event.text and event.network == "privacy"


def test_members_still_reach_each_other_while_the_egress_is_closed() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.say(EgressHealth("privacy", False))
    assert switch.trace(switch.number("veth102"), sender(XRAY, GATEWAY.address)) == Sent(switch.number("veth100"))


# ------------------------------------------------------------------------------------------------------- learned paths


def test_a_return_path_lives_as_long_as_packets_come_in_and_go_out() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    veth, warp = switch.number("veth102"), switch.number("warp0")
    assert switch.trace(warp, answer_to(XRAY)) == Shown(Violation.UNSOLICITED)
    assert wired.send(switch, veth, sender(XRAY, WORLD)) == Sent(warp)
    (learned,) = wired.of(Kind.PATH_LEARNED)
    assert "10.0.0.102" in learned.text and learned.app == "return_path"
    assert switch.trace(warp, answer_to(XRAY)) == Sent(veth)
    # Packets in keep it from going idle, but not beyond the time since the last packet out.
    for _ in range(3):
        wired.wait(IDLE_S - 120, step=10)
        assert wired.send(switch, warp, answer_to(XRAY)) == Sent(veth)
    wired.wait(HARD_S - 3 * (IDLE_S - 120) + 1, step=10)
    assert switch.trace(warp, answer_to(XRAY)) == Shown(Violation.UNSOLICITED)
    (expired,) = wired.of(Kind.PATH_EXPIRED)
    assert "10.0.0.102" in expired.text and expired.text.endswith("ended: its time was up")


def test_a_return_path_without_answers_ends_idle_and_is_learned_anew() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    veth, warp = switch.number("veth102"), switch.number("warp0")
    wired.send(switch, veth, sender(XRAY, WORLD))
    wired.wait(IDLE_S + 1, step=10)
    assert switch.trace(warp, answer_to(XRAY)) == Shown(Violation.UNSOLICITED)
    assert wired.of(Kind.PATH_EXPIRED)[0].text.endswith("ended: idle")
    wired.send(switch, veth, sender(XRAY, WORLD))
    assert switch.trace(warp, answer_to(XRAY)) == Sent(veth)


def test_every_packet_out_starts_the_hard_time_anew() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    veth, warp = switch.number("veth102"), switch.number("warp0")
    for _ in range(8):
        wired.send(switch, veth, sender(XRAY, WORLD))
        wired.send(switch, warp, answer_to(XRAY))
        wired.wait(HARD_S / 4, step=10)
    assert switch.trace(warp, answer_to(XRAY)) == Sent(veth)
    assert len(wired.of(Kind.PATH_LEARNED)) == 1 and not wired.of(Kind.PATH_EXPIRED)


def test_learned_paths_outlive_a_change_of_state_and_are_not_drift() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.send(switch, switch.number("veth102"), sender(XRAY, WORLD))
    learned = switch.learned()
    assert len(learned) == 1
    more = (*PRIVACY.members, member("privacy", 103, "10.0.0.103"))
    wired.load(with_network(STATE, "privacy", members=more))
    wired.wait(5)
    assert switch.learned() == learned and not wired.of(Kind.TAMPERING)


def test_a_vpn_clients_answers_return_through_the_port_it_came_in_by() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    client: Values = {
        "eth_src": Mac(77),
        "ipv4_src": "9.9.9.9",
        "ipv4_dst": GATEWAY.address,
        "udp_src": 555,
        "udp_dst": 51820,
    }
    veth = switch.number("veth100")
    back = {**sender(GATEWAY, "9.9.9.9"), "udp_src": 51820, "udp_dst": 555}
    assert switch.trace(veth, back) == Dropped("EGRESS"), "and never into the tunnel"
    assert wired.send(switch, LOCAL, client) == Sent(veth)
    answer = switch.trace(veth, back)
    assert answer == Sent(LOCAL) and isinstance(answer, Sent) and answer.get("eth_dst") == 77
    assert switch.trace(veth, {**back, "udp_dst": 556}) == Dropped("EGRESS")


def test_a_scan_cannot_fill_the_table_of_return_paths() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    # Clients with many source ports use up the room for replies, and for nothing else.
    table = [Flow(RETURN.id, 100, Match.named(reg5=n), (), None, REPLIES) for n in range(LIMIT)]
    switch.hold(table)
    client: Values = {
        "eth_src": 77,
        "ipv4_src": "9.9.9.9",
        "ipv4_dst": GATEWAY.address,
        "udp_src": 555,
        "udp_dst": 51820,
    }
    wired.send(switch, LOCAL, client)
    assert len(switch.learned()) == LIMIT
    wired.send(switch, switch.number("veth102"), sender(XRAY, WORLD))
    assert len(switch.learned()) == LIMIT + 1


# ---------------------------------------------------------------------------------------------------------- violations


def test_a_violation_is_told_with_who_what_and_how_often() -> None:
    wired, switches = started()
    crossing(wired, switches["vmbr0"], 3)
    events = wired.of(Kind.VIOLATION) + [e for e in wired.wait(REPORT_S + 3) if e.kind is Kind.VIOLATION]
    assert counts(events) == 3
    assert events[0].container == "c102" and events[0].data["kinds"] == ("crossing",)
    assert events[0].packet is not None and "10.0.0.102:4000 > 10.1.0.200:443" in events[0].packet
    assert "tried to reach another network" in events[0].text


def test_an_offender_is_quieted_for_a_while_and_every_packet_is_counted() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    sent = 0
    for _ in range(10):
        crossing(wired, switch, NOISY + 30)
        sent += NOISY + 30
        wired.wait(1)
    (first, *_) = wired.of(Kind.VIOLATION_QUIETED)
    assert f"{QUIET_S} s" in first.text and first.data["kind"] == "crossing"
    assert len(wired.of(Kind.VIOLATION_QUIETED)) <= 10 / QUIET_S + 1
    wired.wait(QUIET_S + REPORT_S + 12)
    assert not [f for f in switch.learned() if f.table == VIOLATION.id], "the negative flow has ended by itself"
    violations = wired.of(Kind.VIOLATION)
    assert counts(violations) == sent == violations[-1].data["total"]
    assert len(violations) <= 10, "one event for many packets"


def test_what_the_meter_swallows_is_counted_all_the_same() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    switch.samples_left = 2
    crossing(wired, switch, 500)
    wired.wait(2 * REPORT_S + 5)
    assert counts(wired.of(Kind.VIOLATION)) == 500


def test_no_packet_is_forgotten_when_the_flows_are_read_anew() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    crossing(wired, switch, 2)
    wired.wait(REPORT_S)
    switch.refusing = 1
    wired.load(with_network(STATE, "privacy", members=(XRAY,), vpn=None))
    crossing(wired, switch, 5)
    wired.wait(2 * REPORT_S + 5)
    assert not switch.refusing and switch.dumps > 1
    assert counts(wired.of(Kind.VIOLATION)) == 7


def test_what_was_counted_before_we_came_is_not_reported() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    crossing(wired, switch, 5)
    switch.disconnect()
    again = Wired(STATE, switch, now=wired.now)
    again.up()
    again.wait(2 * REPORT_S)
    assert not again.of(Kind.VIOLATION)


def test_the_end_of_a_negative_flow_is_no_return_path() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    crossing(wired, switch, NOISY)
    assert [f for f in switch.learned() if f.table == VIOLATION.id]
    wired.say(*switch.disconnect())
    wired.up()
    wired.wait(QUIET_S + 1)
    assert not [f for f in switch.learned() if f.table == VIOLATION.id]
    assert not wired.of(Kind.PATH_EXPIRED, Kind.PATH_LEARNED)


def test_asking_for_an_address_of_another_network_is_told_of_too() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    ask: Values = {"eth_src": XRAY.mac, "arp_op": 1, "arp_sha": XRAY.mac, "arp_spa": XRAY.address}
    veth = switch.number("veth102")
    assert wired.send(switch, veth, ask, arp_tpa=MCP.address) == Shown(Violation.CROSSING)
    assert wired.send(switch, veth, ask, arp_tpa=GATEWAY.address) == Sent(veth)
    assert wired.send(switch, veth, ask, arp_tpa=XRAY.address) == Dropped("NEIGHBOUR"), "nobody has my address but me"
    assert not switch.packets_out


@pytest.mark.parametrize("target, source, answered", [("10.1.0.200", "10.0.0.102", True), (WORLD, "10.0.0.9", False)])
def test_only_crossing_is_refused_and_never_spoofing(target: str, source: str, answered: bool) -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    values: dict[str, int | str] = {**sender(XRAY, target), "ipv4_src": source}
    assert isinstance(wired.send(switch, switch.number("veth102"), values, data=frame(XRAY, target)), Shown)
    assert bool(switch.packets_out) == answered
    if answered:
        port, data = switch.packets_out[0]
        reset = Ether(data)
        assert port == switch.number("veth102") and reset[TCP].flags == "RA" and reset[IP].src == target


def test_a_network_that_does_not_refuse_is_silent() -> None:
    wired, switches = started(with_network(STATE, "privacy", refuse=False))
    crossing(wired, switches["vmbr0"])
    assert not switches["vmbr0"].packets_out


def test_leaving_a_network_without_egress_is_refused_where_it_says_so() -> None:
    wired, switches = started(with_network(STATE, "management", refuse=True))
    switch = switches["vmbr1"]
    udp = bytes(Ether(src=str(MCP.mac), dst="02:00:00:00:00:01") / IP(src="10.1.0.200", dst=WORLD) / UDP(dport=53))
    found = wired.send(switch, switch.number("veth200"), sender(MCP, WORLD), data=udp, udp_dst=53)
    assert found == Shown(Violation.NO_EGRESS)
    assert [port for port, _ in switch.packets_out] == [switch.number("veth200")]


def test_a_sender_behind_the_egress_is_never_answered() -> None:
    """Out there anybody may claim to be anybody."""
    wired, switches = started()
    switch = switches["vmbr0"]
    data = bytes(Ether(src=str(EGRESS_MAC), dst="02:00:00:00:00:01") / IP(src=WORLD, dst="10.1.0.200") / TCP(dport=1))
    values: dict[str, int | str] = {"eth_src": EGRESS_MAC, "ipv4_src": WORLD, "ipv4_dst": "10.1.0.200"}
    assert wired.send(switch, switch.number("warp0"), values, data=data) == Shown(Violation.CROSSING)
    assert not switch.packets_out


def test_unreadable_samples_are_counted_and_harm_nobody() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    for data in (b"", b"\xff" * 13, b"\0" * 40):
        wired.send(switch, switch.number("veth102"), sender(XRAY, MCP.address), data=data)
    wired.wait(REPORT_S)
    assert counts(wired.of(Kind.VIOLATION)) == 3
    assert bridges(wired)["vmbr0"]["unreadable"]


# ------------------------------------------------------------------------------------------------------ which bridge


def test_an_undeclared_bridge_drops_by_default_and_keeps_the_flows_of_others() -> None:
    switch = FakeSwitch("br9", 9, {"eth0": 1})
    switch.hold([FOREIGN])
    wired = Wired(STATE, switch)
    wired.up()
    assert switch.ours() == {UNDECLARED_FLOW, CANARY_FLOW} and switch.foreign() == {FOREIGN}
    assert switch.trace(1, eth_type=0x0800) == Dropped("ADMIT")
    (event,) = wired.of(Kind.UNKNOWN_BRIDGE)
    assert "ovs-vsctl del-controller br9" in event.text and event.data["dpid"] == "0000000000000009"
    assert wired.core.status()["undeclared"] == ["br9"]


def test_a_bridge_with_another_datapath_id_than_declared_is_unknown() -> None:
    pinned = replace(STATE, bridges=(replace(STATE.bridges[0], datapath_id=0xABC), *STATE.bridges[1:]))
    switch = FakeSwitch("vmbr0", 5, {"veth102": 1})
    wired = Wired(pinned, switch)
    wired.up()
    (event,) = wired.of(Kind.UNKNOWN_BRIDGE)
    assert "ovs-vsctl set bridge vmbr0 other-config:datapath-id=0000000000000abc" in event.text
    assert switch.ours() == {UNDECLARED_FLOW, CANARY_FLOW}


def test_a_declared_datapath_id_is_recognised_whatever_the_bridge_is_called() -> None:
    pinned = replace(STATE, bridges=(replace(STATE.bridges[0], datapath_id=5), *STATE.bridges[1:]))
    switch = FakeSwitch("renamed", 5, {"veth102": 1})
    wired = Wired(pinned, switch)
    wired.up()
    assert wired.core.switches[5].bridge == pinned.bridges[0] and not wired.of(Kind.UNKNOWN_BRIDGE)


def test_a_second_switch_of_one_name_is_unknown() -> None:
    wired, _ = started()
    twin = FakeSwitch("vmbr0", 55, {"veth102": 4})
    twin.now = wired.now
    wired.switches[55] = twin
    wired.up()
    wired.wait(CONTESTED_S + 1)
    assert twin.ours() == {UNDECLARED_FLOW, CANARY_FLOW}
    assert "a second switch claims to be vmbr0" in wired.of(Kind.UNKNOWN_BRIDGE)[0].text


def test_a_switch_that_claims_a_name_ovsdb_gives_to_another_is_unknown_even_if_it_comes_first() -> None:
    impostor, real = FakeSwitch("vmbr0", 55, {"veth102": 4}), switch_for(STATE, "vmbr0")
    wired = Wired(STATE, impostor)
    wired.say(FactsSeen((BridgeFacts("vmbr0", real.dpid, "secure", False),)))
    wired.up()
    wired.wait(CONTESTED_S + 1)
    real.now = wired.now
    assert impostor.ours() == {UNDECLARED_FLOW, CANARY_FLOW}
    assert "claims to be vmbr0" in wired.of(Kind.UNKNOWN_BRIDGE)[0].text
    wired.switches[real.dpid] = real
    wired.up()
    assert wired.core.switches[real.dpid].bridge == STATE.bridges[0]


def test_what_ovsdb_says_later_unmasks_an_impostor() -> None:
    impostor, real = FakeSwitch("vmbr0", 55, {"veth102": 4}), switch_for(STATE, "vmbr0")
    wired = Wired(STATE, impostor)
    wired.up()
    assert wired.core.switches[55].bridge == STATE.bridges[0]
    wired.switches[real.dpid] = real
    wired.up()
    assert wired.core.switches[real.dpid].bridge is None
    wired.say(FactsSeen((BridgeFacts("vmbr0", real.dpid, "secure", False),)))
    assert impostor.ours() == {UNDECLARED_FLOW, CANARY_FLOW}
    assert wired.core.switches[real.dpid].bridge == STATE.bridges[0]
    assert len(real.ours()) > 50


def test_a_bridge_becomes_known_and_unknown_with_the_state() -> None:
    only = state_of(MANAGEMENT)
    wired, switches = started()
    switch = switches["vmbr0"]
    full = switch.ours()
    wired.load(only)
    assert switch.ours() == {UNDECLARED_FLOW, CANARY_FLOW}
    wired.load(STATE)
    assert switch.ours() == full


def test_warnings_say_how_to_mend_and_are_said_once() -> None:
    wired, switches = started()
    dpid = switches["vmbr0"].dpid
    bad = FactsSeen((BridgeFacts("vmbr0", dpid, "", True), BridgeFacts("elsewhere", 77, "", True)))
    texts = [event.text for event in wired.say(bad)]
    assert len(texts) == 2
    assert "ovs-vsctl set-fail-mode vmbr0 secure" in texts[0]
    assert "ovs-vsctl set bridge vmbr0 other-config:disable-in-band=true" in texts[1]
    assert {event.kind for event in wired.events if event.text in texts} == {Kind.SWITCH_WARNING}
    assert wired.say(bad) == []
    assert wired.say(FactsSeen((BridgeFacts("vmbr0", dpid, "secure", False),))) == []
    assert len(wired.say(bad)) == 2


def test_a_bridge_that_is_in_order_is_not_warned_of() -> None:
    wired, switches = started()
    facts = tuple(BridgeFacts(name, switch.dpid, "secure", False) for name, switch in switches.items())
    assert wired.say(FactsSeen(facts)) == []


# -------------------------------------------------------------------------------------------------------------- states


def test_a_rejected_state_changes_nothing_and_says_why() -> None:
    wired, switches = started()
    before = [switch.ours() for switch in switches.values()]
    problems = tuple(error("code", f"path{n}", "found", "expected", "Mend it.") for n in range(5))
    (event,) = wired.say(StateRejected("state.yaml", problems))
    assert event.kind is Kind.STATE_REJECTED and "path0" in event.text and "(and 2 more)" in event.text
    assert wired.core.state == STATE and [switch.ours() for switch in switches.values()] == before


def contradiction() -> DesiredState:
    """Two rules of one rank that contradict each other; the reader of state files lets no such thing through."""
    match = (("eth_type", 0x0800, 0xFFFF),)
    rules = (
        Rule("flows[0]", "", 1, (*match, ("ip_proto", 6, 0xFF)), None, None),
        Rule("flows[1]", "", 1, (*match, ("ipv4_dst", int(XRAY.address), 0xFFFFFFFF)), None, XRAY.port),
    )
    return with_network(STATE, "privacy", rules=rules)


def test_a_state_whose_flows_contradict_each_other_is_rejected_whole() -> None:
    wired, switches = started()
    before = {name: switch.ours() for name, switch in switches.items()}
    changed = contradiction()
    changed = with_network(changed, "management", members=(MCP,))
    (event,) = wired.load(changed)
    assert event.kind is Kind.STATE_REJECTED and "match the same packet" in event.text
    assert wired.core.state == STATE
    number = switches["vmbr0"].number("veth102")
    wired.say(*switches["vmbr0"].plug("veth102", 33))
    wired.say(*switches["vmbr0"].plug("veth102", number))
    assert {name: switch.ours() for name, switch in switches.items()} == before


def test_a_state_that_changes_nothing_sends_nothing() -> None:
    wired, switches = started()
    sent = [len(switch.installs) for switch in switches.values()]
    events = wired.load(replace(STATE, digest="other"))
    assert [len(switch.installs) for switch in switches.values()] == sent
    assert {event.kind for event in events} == {Kind.STATE_APPLIED}
    assert {event.data["state"] for event in events} == {"other"}


def test_a_new_member_sends_only_its_own_flows() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.say(*switch.plug("veth103", 9))
    wired.load(with_network(STATE, "privacy", members=(*PRIVACY.members, member("privacy", 103, "10.0.0.103"))))
    plan = switch.installs[-1].plan
    assert not plan.delete and not plan.change and 5 < len(plan.add) < 20
    assert len(switches["vmbr1"].installs) == 1


def test_plan_tells_what_a_state_would_change_and_changes_nothing() -> None:
    wired, switches = started()
    sent = len(switches["vmbr0"].installs)
    rows = wired.core.plan(with_network(STATE, "privacy", members=(GATEWAY,)))
    row = next(row for row in rows if row["bridge"] == "vmbr0")
    changes: Any = row["changes"]
    assert {change["sign"] for change in changes} == {"-"}
    assert "member/102" in {change["object"] for change in changes}
    assert len(switches["vmbr0"].installs) == sent and wired.core.state == STATE


def test_a_row_of_flows_names_table_app_and_object() -> None:
    wired, switches = started()
    core_switch = wired.core.switches[switches["vmbr0"].dpid]
    rows = wired.core.flow_rows(core_switch, switches["vmbr0"].stats())
    assert {"ADMIT", "ISOLATE", "OUTPUT_GUARD", "CANARY"} <= {row["table_name"] for row in rows}
    assert ("isolation", "network/management") in {(row["app"], row["object"]) for row in rows}


# --------------------------------------------------------------------------------------------------------------- rest


def test_an_openflow_error_is_logged_with_its_bridge() -> None:
    wired, switches = started()
    (event,) = wired.say(SwitchError(switches["vmbr0"].dpid, "the switch answers something"))
    assert event.kind is Kind.OPENFLOW_ERROR and event.bridge == "vmbr0"


def test_a_quiet_switch_is_asked_for_its_counters_every_ten_seconds() -> None:
    wired, switches = started()
    asked = 0
    for _ in range(120):
        wired.now += 0.5
        effects = wired.core.handle(Tick(), wired.now)
        asked += sum(isinstance(effect, Count) and effect.dpid == 1 for effect in effects)
        wired.say(*[s for switch in switches.values() for s in switch.run(effects)])
    assert 5 <= asked <= 7


def test_nothing_is_sent_to_a_switch_before_it_has_been_read() -> None:
    core = Core(STATE)
    up = SwitchUp(1, "vmbr0", (Port(LOCAL, "vmbr0", Mac(1), True), Port(1, "warp0", Mac(2), True)))
    effects = core.handle(up, 0.0)
    effects += core.handle(PortChanged(1, Port(2, "veth102", Mac(3), True)), 0.1)
    effects += core.handle(StateLoaded(with_network(STATE, "privacy", members=(GATEWAY,))), 0.2)
    effects += core.handle(Tick(), 0.3)
    assert [type(effect) for effect in effects if not isinstance(effect, Log)] == [Dump]


def test_a_mesh_bridge_crosses_its_two_ports_over() -> None:
    _, switches = started()
    switch = switches["mesh-privacy"]
    leg, far = switch.number("nm-privacy"), switch.number("to-privacy")
    assert switch.trace(leg, eth_type=0x0800) == Sent(far) and switch.trace(far, eth_type=0x0806) == Sent(leg)
    assert switch.trace(leg, eth_type=0x86DD) == Dropped("CROSSOVER")
