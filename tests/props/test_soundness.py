"""Attacks on the proof: what may leave by the flows and is not allowed is found, also when it comes change by change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import (
    Action,
    Bits,
    Ct,
    DecTtl,
    Flow,
    FlowKey,
    Learn,
    LearnMatch,
    LearnOutput,
    Match,
    Output,
    Resubmit,
    SetField,
    whole,
)
from controller.frame import Port
from controller.model import Bridge, DesiredState, Rule
from controller.verify.prove import Prover, prove
from tests.fakes.states import management, member, state_of, two_networks, with_network

IP, TCP = 0x0800, 6
LEG, FAR = 1, 2
REG = fields.REGS

Flows = dict[FlowKey, Flow]


def keyed(flows: Iterable[Flow]) -> Flows:
    return {flow.key: flow for flow in flows}


def mesh_bridge(leg: int = LEG, far: int = FAR) -> tuple[DesiredState, Bridge, dict[str, Port]]:
    """A bridge whose policy is short: IPv4 and ARP from one end to the other, as they are."""
    state = two_networks()
    bridge = next(b for b in state.bridges if b.name == "mesh-privacy")
    mesh = state.network(bridge.network).mesh
    assert mesh is not None
    planned = planned_ports(state, bridge)
    ports = {
        mesh.leg_port: replace(planned[mesh.leg_port], number=leg),
        mesh.far_port: replace(planned[mesh.far_port], number=far),
    }
    return state, bridge, ports


def across(*actions: Action, table: int = 0, goto: int | None = None, **match: object) -> Flow:
    """A flow for TCP, unless told, from the leg."""
    return Flow(
        table,
        100,
        Match.named(**{"eth_type": IP, "ip_proto": TCP, "in_port": LEG, "vlan_vid": (0, 0x1000)} | match),
        actions,
        goto,
    )


def is_found(where: tuple[DesiredState, Bridge, Mapping[str, Port]], *flows: Flow) -> bool:
    whole_proof = prove(*where, flows)
    assert bool(Prover().prove(*where, keyed(flows))) == bool(whole_proof)
    return bool(whole_proof)


# ------------------------------------------------------------------------------------------------------------- actions


def test_what_goes_across_a_mesh_as_it_is_may() -> None:
    assert not is_found(mesh_bridge(), across(Output(FAR)))


def test_a_packet_with_no_hop_left_comes_back_as_it_was_before_its_hop_was_taken() -> None:
    one, none = SetField(REG[1].header, 1), SetField(REG[1].header, 0)
    flows = (
        across(Resubmit(1), goto=2),
        across(one, DecTtl(), none, table=1),
        Flow(2, 100, Match.named(reg1=1), (Output(fields.LOCAL),)),
    )
    assert is_found(mesh_bridge(), *flows)
    harmless = (flows[0], across(one, none, table=1), flows[2])
    assert not is_found(mesh_bridge(), *harmless)


def test_a_hop_is_taken_from_ip_alone() -> None:
    """Open vSwitch leaves other packets as they are, and goes on."""
    cube = Match.of([(fields.IN_PORT_FIELD.header, LEG, fields.IN_PORT_FIELD.full), (fields.IP_TTL.header, 0, 0xFF)])
    assert is_found(mesh_bridge(), Flow(0, 100, cube, (DecTtl(), Output(fields.LOCAL))))


def test_an_address_that_connection_tracking_translates_is_rewritten() -> None:
    """With a table or without one: what stands behind in the list gets the packet as translated."""
    for table in (None, 5):
        ct = Ct(1, table, commit=True, nat="nat(src=10.0.0.9)")
        assert is_found(mesh_bridge(), across(ct, Output(FAR)))
        assert not is_found(mesh_bridge(), across(replace(ct, nat=""), Output(FAR)))


def test_an_extended_register_is_the_registers_it_is_made_of() -> None:
    flows = [
        across(SetField(REG[0].header, 1), SetField(fields.XREGS[0].header, 2), goto=1),
        Flow(1, 100, Match.named(reg1=2), (Output(fields.LOCAL),)),
    ]
    assert is_found(mesh_bridge(), *flows[::-1]), "reg1 holds the low half"


# ------------------------------------------------------------------------------------------------------------- learning


def _learn(*specs: LearnMatch | LearnOutput) -> Learn:
    return Learn(0, 200, 0, 10, 10, 0, specs)


def test_a_learned_flow_for_a_port_that_nobody_named_before() -> None:
    port, out = Bits(REG[0].header, 0, 16), Bits(REG[2].header, 0, 16)
    learn = _learn(LearnMatch(whole(fields.IN_PORT_16), port), LearnOutput(out))
    for number, found in ((9, True), (LEG, False)):
        writes = SetField(REG[0].header, number), SetField(REG[2].header, FAR)
        flow = Flow(0, 100, Match.named(in_port=LEG, eth_type=IP, vlan_vid=(0, 0x1000)), (*writes, learn, Output(FAR)))
        kind = LearnMatch(whole(fields.ETH_TYPE), IP)
        untagged = LearnMatch(Bits(fields.VLAN_VID.header, 12, 1), 0)
        flow = replace(flow, actions=(*writes, replace(learn, specs=(kind, untagged, *learn.specs)), Output(FAR)))
        assert is_found(mesh_bridge(), flow) == found


def test_a_part_of_the_ingress_port_is_learned_as_that_part() -> None:
    leg = 0x0201
    where = mesh_bridge(leg=leg, far=3)
    learn = _learn(
        LearnMatch(whole(fields.IN_PORT_16), whole(fields.IN_PORT_16)),
        LearnOutput(Bits(fields.IN_PORT_16.header, 8, 8)),
    )
    assert is_found(where, Flow(0, 100, Match.named(in_port=leg), (learn,))), "by port 2, any packet"


# ------------------------------------------------------------------------------------------------------------ anywhere


def test_what_may_leave_anywhere_may_leave_by_a_port_that_is_still_to_come() -> None:
    for action in (Output(fields.NORMAL), Output(fields.FLOOD), SetField(fields.IN_PORT_16.header, 7)):
        assert is_found(mesh_bridge(), across(action)), str(action)


# ------------------------------------------------------------------------------------------------------------- changes


def test_the_second_of_the_ports_that_are_alike_is_told_from_the_first() -> None:
    """What may come back to the port it came from alone is harmless until another one sends it there too."""
    first, second = member("management", 200, "10.1.0.200"), member("management", 201, "10.1.0.201")
    alone, both = state_of(management(first)), state_of(management(first, second))
    bridge = alone.bridges[0]
    ports = planned_ports(both, bridge)
    x, y = ports[first.port].number, ports[second.port].number
    prover = Prover()
    send = [Flow(0, 9, Match.named(in_port=x), (), 50), Flow(50, 9, Match(), (Output(x),))]
    without = {name: port for name, port in ports.items() if name != second.port}
    assert not prover.prove(alone, bridge, without, keyed(send))
    flows = [*send, Flow(0, 9, Match.named(in_port=y), (), 50)]
    assert prove(both, bridge, ports, flows)
    assert prover.prove(both, bridge, ports, keyed(flows))


def test_what_one_rule_excepts_another_that_meets_it_does_not_allow() -> None:
    """Two rules of the operator that overlap: neither lets anything to the other network's addresses."""
    base = two_networks()
    network = base.network("privacy")
    assert network.mesh is not None
    port = network.members[0].port
    tcp = (("eth_type", IP, 0xFFFF), ("ip_proto", TCP, 0xFF))
    https = (*tcp, ("tcp_dst", 443, 0xFFFF))
    to = network.mesh.port
    rules = tuple(Rule(f"rules[{rank}]", "", rank, match, port, to) for rank, match in enumerate((tcp, https)))
    state = with_network(base, "privacy", rules=rules)
    bridge = state.bridges[0]
    ports = planned_ports(state, bridge)
    foreign = state.network("management").members[0].address
    mine = network.members[0]
    match = Match.named(
        in_port=ports[port].number, eth_type=IP, ip_proto=TCP, tcp_dst=443, ipv4_dst=foreign,
        ipv4_src=mine.address, eth_src=mine.mac, vlan_vid=(0, 0x1000),
    )  # fmt: skip
    bad = Flow(0, 60000, match, (Output(ports[network.mesh.port].number),))
    assert prove(state, bridge, ports, [bad])
    assert compiled(state, bridge, ports)


def compiled(state: DesiredState, bridge: Bridge, ports: Mapping[str, Port]) -> Flows:
    return dict(BridgeCompiler().compile(state, bridge, ports).flows)
