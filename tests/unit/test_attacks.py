"""Attacks on the compiled flows and on the core that once got through, and must not again."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from apps.learning import APP_ID, CONTAINERS, HARD_S, IDLE_S, LIMIT, MESH_REPLIES, PRIORITY
from apps.packet_in import QUIET_S, PacketIn, quiet
from controller.compile import BridgeCompiler
from controller.control import ControlSocket
from controller.events import Kind
from controller.fields import LOCAL
from controller.flow import Cookie, Flow, Load, Match, Output, SetField
from controller.frame import Port
from controller.model import DesiredState, Mac, Member, Role, Rule
from controller.ofrules import judge
from controller.pipeline import OUT_BITS, RETURN, RETURNED, ROLE, VIOLATION, Violation, role_value
from controller.problems import InvalidInput
from controller.signals import BridgeFacts, FactsSeen, PortChanged, SwitchUp
from controller.statefile import loads
from tests.fakes.states import started, switch_for, two_networks, with_network
from tests.fakes.switch import Dropped, FakeSwitch, Sent, Shown, Wired

STATE = two_networks()
PRIVACY, MANAGEMENT = STATE.networks
GATEWAY, XRAY = PRIVACY.members
assert PRIVACY.mesh is not None and PRIVACY.egress is not None
PEER = {"eth_src": int(PRIVACY.mesh.mac)}
WORLD = "1.1.1.1"


def packet(of: Member, target: object) -> dict[str, int | str]:
    """Addresses of an IPv4 packet from a member."""
    return {"eth_src": of.mac, "ipv4_src": of.address, "ipv4_dst": str(target)}


# ------------------------------------------------------------------------------------- flows that claim to be learned

FORGED = int(Cookie(APP_ID, 1, learned=True))
PATH = Match.named(reg0=role_value(Role.EGRESS), eth_type=0x0800, ipv4_dst=int(XRAY.address))
CHOOSE = (SetField(RETURNED.header, 1), Load(3, OUT_BITS))
BRIBES = {
    "past every table": Flow(0, 65535, Match.named(in_port=3), (Output(1),), None, CONTAINERS, IDLE_S, HARD_S),
    "without end": Flow(RETURN.id, PRIORITY, PATH, CHOOSE, None, CONTAINERS),
    "an output in RETURN": Flow(RETURN.id, PRIORITY, PATH, (*CHOOSE, Output(2)), None, CONTAINERS, IDLE_S, HARD_S),
    "for everybody": Flow(RETURN.id, PRIORITY, Match(), CHOOSE, None, CONTAINERS, IDLE_S, HARD_S),
    "on top": Flow(RETURN.id, PRIORITY + 1, PATH, CHOOSE, None, CONTAINERS, IDLE_S, HARD_S),
    "of no kind": Flow(RETURN.id, PRIORITY, PATH, CHOOSE, None, FORGED, IDLE_S, HARD_S),
    "another role": Flow(RETURN.id, PRIORITY, PATH, (*CHOOSE, SetField(ROLE.header, 1)), None, CONTAINERS, IDLE_S, HARD_S),
    "violations unseen": replace(quiet(3, int(Violation.CROSSING), "quiet/3"), hard_s=0),
    "all violations unseen": Flow(VIOLATION.id, 400, Match(), (), None, int(Cookie(PacketIn.id, 1, learned=True)), 0, QUIET_S),
}  # fmt: skip


@pytest.mark.parametrize("forged", BRIBES.values(), ids=BRIBES)
@pytest.mark.parametrize("before", [True, False], ids=["found at start", "added later"])
def test_a_flow_that_only_claims_to_be_learned_is_removed_and_told_of(forged: Flow, before: bool) -> None:
    switch = switch_for(STATE, "vmbr0")
    wired = Wired(STATE, switch)
    if before:
        switch.hold([forged])
        wired.up()
    else:
        wired.up()
        wired.say(*switch.add_by_others(forged))
        assert wired.of(Kind.TAMPERING)
    wired.wait(2)
    assert forged.key not in {entry.flow.key for entry in switch.flows.values()}
    assert not switch.learned()


def test_what_is_really_learned_or_quieted_is_left_alone() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.send(switch, switch.number("veth102"), packet(XRAY, WORLD))
    wired.say(*switch.add_by_others(quiet(3, int(Violation.CROSSING), "quiet/3")))
    assert len(switch.learned()) == 2
    switch.disconnect()
    wired.up()
    wired.wait(2)
    assert len(switch.learned()) == 2 and not wired.of(Kind.TAMPERING)


def vpn_client(address: str, port: int) -> dict[str, int | str]:
    return {**PEER, "ipv4_src": address, "ipv4_dst": str(GATEWAY.address), "udp_src": port, "udp_dst": 51820}


def test_a_mesh_peer_cannot_draw_the_answers_to_a_client_of_the_host_to_itself() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    server, mesh = switch.number("veth100"), switch.number("from-privacy")
    answer = {**packet(GATEWAY, "9.9.9.9"), "udp_src": 51820, "udp_dst": 555}
    wired.send(switch, mesh, vpn_client("9.9.9.9", 555))
    assert switch.trace(server, answer) == Sent(mesh)
    wired.send(switch, LOCAL, vpn_client("9.9.9.9", 555))
    assert switch.trace(server, answer) == Sent(LOCAL)
    wired.send(switch, mesh, vpn_client("9.9.9.9", 555))
    assert switch.trace(server, answer) == Sent(LOCAL)
    assert len(wired.core.switches[switch.dpid].flows.learned) == 2 and not wired.of(Kind.TAMPERING)


def test_mesh_peers_cannot_use_up_the_room_for_clients_of_the_host() -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    switch.hold(Flow(RETURN.id, 99, Match.named(reg5=n), (), None, MESH_REPLIES) for n in range(LIMIT))
    wired.send(switch, switch.number("from-privacy"), vpn_client("9.9.9.9", 555))
    assert len(switch.learned()) == LIMIT
    wired.send(switch, LOCAL, vpn_client("9.9.9.9", 555))
    assert len(switch.learned()) == LIMIT + 1


# --------------------------------------------------------------------------------------------- members that are away


def test_nobody_across_the_mesh_takes_the_address_of_a_member_that_is_away() -> None:
    switch = switch_for(STATE, "vmbr0", without=["veth102"])
    Wired(STATE, switch).up()
    assert PRIVACY.mesh is not None
    mesh_port, gateway = switch.number("from-privacy"), switch.number("veth100")
    stolen = switch.trace(mesh_port, PEER, ipv4_src=XRAY.address, ipv4_dst=GATEWAY.address)
    assert stolen == Shown(Violation.SPOOF)
    out = switch.trace(mesh_port, PEER, ipv4_src=XRAY.address, ipv4_dst=WORLD)
    assert out == Shown(Violation.SPOOF)
    claim: dict[str, int | str] = {
        "arp_op": 1,
        "arp_sha": PRIVACY.mesh.mac,
        "arp_spa": XRAY.address,
        "arp_tpa": GATEWAY.address,
    }
    assert switch.trace(mesh_port, PEER, claim) == Shown(Violation.SPOOF)
    assert switch.trace(gateway, packet(GATEWAY, XRAY.address)) == Dropped("FORWARD")
    asked: dict[str, int | str] = {
        "eth_src": GATEWAY.mac,
        "arp_op": 1,
        "arp_sha": GATEWAY.mac,
        "arp_spa": GATEWAY.address,
    }
    assert switch.trace(gateway, asked, arp_tpa=XRAY.address) == Dropped("NEIGHBOUR")


# ----------------------------------------------------------------------------------------------- rules to the mesh


def to_mesh(*match: tuple[str, int, int]) -> DesiredState:
    rule = Rule("r", "r", 1, (("eth_type", 0x0800, 0xFFFF), *match), "veth102", "from-privacy")
    return with_network(STATE, "privacy", rules=(rule,))


@pytest.mark.parametrize("match", [(), (("ip_proto", 6, 0xFF),), (("ipv4_dst", 0x01010101, 0xFFFFFFFF),)])
def test_a_rule_to_the_mesh_is_no_way_to_the_world(match: tuple[tuple[str, int, int], ...]) -> None:
    _, switches = started(to_mesh(*match))
    switch = switches["vmbr0"]
    sent = switch.trace(switch.number("veth102"), packet(XRAY, WORLD), tcp_dst=443)
    assert sent == Sent(switch.number("warp0"))
    peer = switch.trace(switch.number("veth102"), packet(XRAY, "10.0.0.77"), tcp_dst=443)
    assert peer == Sent(switch.number("from-privacy"))


def test_a_literal_flow_of_the_world_to_the_mesh_is_told_of() -> None:
    def codes(flow: str) -> list[str]:
        return [problem.code for problem in judge(STATE.networks, {"vmbr0": [flow]}).problems]

    assert codes("tcp,in_port=veth102,actions=output:from-privacy") == ["narrowed"]
    assert codes("in_port=veth102,ip,nw_dst=1.1.1.1,actions=output:from-privacy") == ["redirect"]
    assert codes("in_port=veth102,ip,nw_dst=10.0.0.77,actions=output:from-privacy") == []


# ------------------------------------------------------------------------------------------------ impossible senders


@pytest.mark.parametrize("source", ["127.0.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "169.254.1.1"])
def test_an_address_nobody_can_have_does_not_come_in(source: str) -> None:
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.send(switch, switch.number("veth102"), packet(XRAY, WORLD))
    assert PRIVACY.egress is not None
    back: dict[str, int | str] = {"eth_src": PRIVACY.egress.mac, "ipv4_src": source, "ipv4_dst": XRAY.address}
    assert switch.trace(switch.number("warp0"), back) == Shown(Violation.SPOOF)
    for port in (switch.number("from-privacy"), 0xFFFFFFFE):
        client: dict[str, int | str] = {**PEER, "ipv4_src": source, "ipv4_dst": GATEWAY.address}
        assert switch.trace(port, client, udp_dst=51820) == Shown(Violation.SPOOF)


# ------------------------------------------------------------------------------------------------- who is which bridge


def facts(*pairs: tuple[str, int]) -> FactsSeen:
    return FactsSeen(tuple(BridgeFacts(name, dpid, "secure", False) for name, dpid in pairs))


def test_a_bridge_whose_datapath_id_changes_keeps_its_flows_while_ovsdb_lags_behind() -> None:
    """As it does when a port with a lower Ethernet address comes."""
    wired, switches = started()
    switch = switches["vmbr0"]
    wired.say(facts(("vmbr0", switch.dpid)))
    full, sent = switch.ours(), len(switch.installs)
    wired.say(*switch.disconnect())
    del wired.switches[switch.dpid]
    switch.dpid = 0xABC
    wired.switches[switch.dpid] = switch
    wired.up()
    wired.wait(1)
    assert switch.ours() == full
    wired.say(facts(("vmbr0", 0xABC)))
    assert wired.core.switches[0xABC].bridge == STATE.bridges[0]
    assert switch.ours() == full and len(switch.installs) == sent
    wired.wait(10)
    assert switch.ours() == full and wired.core.status()["undeclared"] == []


def test_a_new_bridge_that_ovsdb_does_not_know_the_id_of_yet_is_taken_by_its_name() -> None:
    switch = switch_for(STATE, "vmbr0")
    wired = Wired(STATE, switch)
    wired.say(facts(("vmbr0", 0)))
    wired.up()
    assert wired.core.switches[switch.dpid].bridge == STATE.bridges[0] and len(switch.ours()) > 50


def test_when_an_impostor_goes_the_bridge_itself_is_recognised() -> None:
    """Without OVSDB the first of a name is believed, but not for ever."""
    impostor, real = FakeSwitch("vmbr0", 55, {"veth102": 4}), switch_for(STATE, "vmbr0")
    full = flows_of(STATE, real)
    real.hold(full)
    wired = Wired(STATE, impostor)
    wired.up()
    wired.switches[real.dpid] = real
    wired.up()
    assert wired.core.switches[real.dpid].bridge is None and real.ours() == full, "nothing is lost to a claim at once"
    wired.say(*impostor.disconnect())
    assert wired.core.switches[real.dpid].bridge == STATE.bridges[0]
    wired.wait(10)
    assert real.ours() == full and not real.installs


def flows_of(state: DesiredState, switch: FakeSwitch) -> set[Flow]:
    other = switch_for(state, switch.name)
    Wired(state, other).up()
    return other.ours()


def test_what_is_asked_about_a_bridge_is_not_answered_by_an_impostor() -> None:
    impostor, real = FakeSwitch("vmbr0", 55, {"veth102": 4}), switch_for(STATE, "vmbr0")
    wired = Wired(STATE, impostor, real)
    wired.say(facts(("vmbr0", real.dpid)))
    wired.up()
    found = wired.core.by_name("vmbr0")
    assert found is not None and found.dpid == real.dpid
    (plan,) = [row for row in wired.core.plan(STATE) if row["bridge"] == "vmbr0"]
    assert plan["changes"] == []


@pytest.mark.parametrize(("number", "name"), [(0x10003, "veth100"), (0xFFFE, "veth100"), (3, "veth100"), (7, "LOCAL")])
def test_impossible_ports_do_not_keep_a_state_from_coming_into_force(number: int, name: str) -> None:
    """A switch that tells two ports of one number, or numbers that stand for others, contradicts itself, not the file."""
    mac = Mac.parse("02:00:00:00:00:09")
    wired = Wired(STATE)
    ports = [Port(LOCAL, "vmbr0", mac, True), Port(3, "veth102", mac, True), Port(number, name, mac, True)]
    wired.say(SwitchUp(1, "vmbr0", tuple(ports)), PortChanged(1, ports[-1]))
    wired.load(with_network(STATE, "privacy", refuse=False))
    assert not wired.of(Kind.STATE_REJECTED)
    assert wired.core.switches[1].ports["LOCAL"].number == LOCAL


def test_a_state_that_shows_a_defect_of_ours_leaves_the_old_one_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    wired, _ = started(STATE)

    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(BridgeCompiler, "compile", broken)
    with pytest.raises(RuntimeError):
        wired.load(with_network(STATE, "privacy", refuse=False))
    assert wired.core.state is STATE
    assert all(switch.bridge is not None for switch in wired.core.switches.values())


def test_a_state_without_networks_does_not_shut_everything() -> None:
    wired, switches = started(STATE)
    before = {name: switch.ours() for name, switch in switches.items()}
    wired.load(DesiredState())
    assert wired.of(Kind.STATE_REJECTED) and wired.core.state is STATE
    assert {name: switch.ours() for name, switch in switches.items()} == before


@pytest.mark.parametrize("address", ["127.0.0.5/24", "224.0.0.5/24", "0.0.0.5/24", "240.0.0.9/28"])
def test_no_subnet_is_derived_that_could_not_be_declared(address: str) -> None:
    properties = f"{{name: a, ipv4_address: {address}, network: privacy}}"
    with pytest.raises(InvalidInput) as refused:
        loads(f'lxc: {{containers: [{{id: "100", bridge: b0, properties: {properties}}}]}}', "t")
    assert [problem.code for problem in refused.value.problems] == ["bad-prefix"]


# ------------------------------------------------------------------------------------------------- the control socket


@pytest.mark.parametrize(
    "question", [b"[" * 4000 + b"\n", b"{}\n", b"1\n", b"\xff\n", b"\n", b'{"a":' * 800 + b"\n", b"x" * 5000]
)
def test_every_question_is_answered(tmp_path: Path, question: bytes) -> None:
    def answer(question: object, reply: object) -> None:
        raise KeyError("a defect")

    control = ControlSocket(tmp_path / "controller.sock", answer)
    asker, answerer = socket.socketpair()
    with asker:
        asker.settimeout(5)
        asker.sendall(question)
        control._serve_one(answerer)
        assert "error" in json.loads(asker.makefile("rb").readline())
    control.close()


# --------------------------------------------------------------------------------------------------- names of switches


def test_names_that_a_switch_tells_cannot_write_to_a_terminal() -> None:
    """In a process of its own: the shell chooses a thread hub."""
    code = """
from types import SimpleNamespace
from controller.shell import _port
name = b"\\x1b[2J\\x07\\n" + bytes(9)
port = _port(SimpleNamespace(name=name, config=0, state=0, port_no=3, hw_addr="02:00:00:00:00:01"))
assert port.name.isprintable() and port.name == r"\\x1b[2J\\x07\\x0a", port.name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)


# -------------------------------------------------------------------------------------- switches that never come to an end


def test_a_switch_cannot_fill_our_memory() -> None:
    """In a process of its own: the wire side chooses a thread hub."""
    code = """
from controller import codec, link
from controller.offenders import MOST_PORTS, Offenders
from controller.flow import Match
from controller.link import MOST_REQUESTS, MOST_WAITING, Link
from controller.signals import SendPacket, SwitchError
from controller.wire import Entry

class Deaf:
    id = 1
    def send(self, buf, close_socket=False): raise AssertionError
    def close(self): pass

said = []
one = Link(Deaf(), said.append)
for n in range(3 * MOST_WAITING):
    one.do(SendPacket(1, 1, b"x"))
assert one._queue.qsize() == MOST_WAITING
for n in range(3 * MOST_REQUESTS):
    one.request_flows(lambda flows: None)
assert len(one._collecting) == MOST_REQUESTS
link.MOST_FLOWS = 100
entry = Entry((48 + 8).to_bytes(2, "big") + bytes(46) + b"\\0\\1\\0\\4" + bytes(4))
xid = next(reversed(one._collecting))
for n in range(20):
    one.flows(xid, [entry] * 10, True)
assert xid not in one._collecting and [type(s) for s in said] == [SwitchError], said

found = Offenders()
for n in range(MOST_PORTS + 10):
    found.seen(codec.PacketIn(0, 100, Match.named(in_port=n, reg2=1), b"", 0), 0.0)
assert len(found._ports) == len(found._recent) == MOST_PORTS and found.unreadable == 10
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
