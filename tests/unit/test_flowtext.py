"""Every shape of line that ovs-ofctl and ovs-appctl write, and what is made of it."""

from __future__ import annotations

import pytest

from controller import fields
from controller.fields import REGS
from controller.flow import (
    DELETE_LEARNED,
    SEND_FLOW_REM,
    Action,
    Aside,
    Bits,
    Clone,
    Ct,
    CtClear,
    DecTtl,
    Flow,
    Learn,
    LearnLoad,
    LearnMatch,
    LearnOutput,
    Load,
    Match,
    Move,
    Output,
    PopVlan,
    Raw,
    Resubmit,
    SetField,
    whole,
)
from controller.flowtext import ReadFlows, names_in, read_flow, read_flows
from controller.problems import InvalidInput, Problem, Severity
from controller.verify.space import of_match

PORTS = {"veth100": 1, "warp0": 2, "foo-bar": 3, "x,actions=drop": 4}
IP, ARP, IPV6 = 0x0800, 0x0806, 0x86DD


def match_of(text: str) -> Match:
    """What a flow with that match matches."""
    return read_flow(f"{text},actions=drop", PORTS).match


def actions_of(text: str, match: str = "") -> tuple[Action, ...]:
    """What a flow with those actions does."""
    return read_flow(f"{match} actions={text}", PORTS).actions


def problems_of(text: str, ports: dict[str, int] | None = None) -> tuple[Problem, ...]:
    """Why a text is refused."""
    with pytest.raises(InvalidInput) as caught:
        read_flows(text, PORTS if ports is None else ports, "FILE")
    return caught.value.problems


# ------------------------------------------------------------------------------------------------------------- matches

TCP = {"eth_type": IP, "ip_proto": 6}
MATCHES = [
    ("ip", {"eth_type": IP}),
    ("dl_type=0x0800", {"eth_type": IP}),
    ("eth_type=2048", {"eth_type": IP}),
    ("rarp", {"eth_type": 0x8035}),
    ("eth,tcp", TCP),
    ("icmp,icmp_type=8,icmp_code=0", {"eth_type": IP, "ip_proto": 1, "icmpv4_type": 8, "icmpv4_code": 0}),
    ("icmp,tp_src=8", {"eth_type": IP, "ip_proto": 1, "icmpv4_type": 8}),
    ("icmp6,icmp_type=135", {"eth_type": IPV6, "ip_proto": 58, "icmpv6_type": 135}),
    ("icmp6,icmpv6_code=1", {"eth_type": IPV6, "ip_proto": 58, "icmpv6_code": 1}),
    ("tcp,tp_dst=80", TCP | {"tcp_dst": 80}),
    ("tp_dst=80,tcp", TCP | {"tcp_dst": 80}),
    ("tcp,udp_dst=80", TCP | {"tcp_dst": 80}),  # one place in Open vSwitch
    ("ip,nw_proto=6,tp_src=0x50/0xfff0", TCP | {"tcp_src": (0x50, 0xFFF0)}),
    ("udp,tp_src=53", {"eth_type": IP, "ip_proto": 17, "udp_src": 53}),
    ("udp6,udp_dst=53", {"eth_type": IPV6, "ip_proto": 17, "udp_dst": 53}),
    ("sctp6,tp_dst=5", {"eth_type": IPV6, "ip_proto": 132, "sctp_dst": 5}),
    ("ip,nw_src=10.0.0.1", {"eth_type": IP, "ipv4_src": 0x0A000001}),
    ("ip,ip_dst=10.0.0.77/24", {"eth_type": IP, "ipv4_dst": (0x0A000000, 0xFFFFFF00)}),
    ("ip,nw_dst=10.0.0.1/255.0.0.255", {"eth_type": IP, "ipv4_dst": (0x0A000001, 0xFF0000FF)}),
    ("ip,nw_dst=0.0.0.0/0", {"eth_type": IP}),
    ("ip,nw_tos=184", {"eth_type": IP, "ip_dscp": 46}),
    ("ip,ip_dscp=46,nw_ecn=1,nw_ttl=3", {"eth_type": IP, "ip_dscp": 46, "ip_ecn": 1, "nw_ttl": 3}),
    ("ip,nw_frag=first", {"eth_type": IP, "ip_frag": (1, 3)}),
    ("ip,nw_frag=not_later", {"eth_type": IP, "ip_frag": (0, 2)}),
    ("ip,ip_frag=no", {"eth_type": IP, "ip_frag": (0, 3)}),
    ("tcp,tcp_flags=+syn-ack", TCP | {"tcp_flags": (0x02, 0x12)}),
    ("tcp,tcp_flags=syn|ack", TCP | {"tcp_flags": 0x12}),
    ("tcp,tcp_flags=0x2/0x12", TCP | {"tcp_flags": (0x02, 0x12)}),
    ("arp,arp_spa=10.0.0.1,arp_op=1", {"eth_type": ARP, "arp_spa": 0x0A000001, "arp_op": 1}),
    ("arp,nw_dst=10.0.0.0/8,nw_proto=2", {"eth_type": ARP, "arp_tpa": (0x0A000000, 0xFF000000), "arp_op": 2}),
    ("arp,arp_sha=2:0:0:0:0:1", {"eth_type": ARP, "arp_sha": 0x020000000001}),
    ("dl_src=02:00:00:00:00:01", {"eth_src": 0x020000000001}),
    ("eth_dst=01:00:00:00:00:00/01:00:00:00:00:00", {"eth_dst": (1 << 40, 1 << 40)}),
    ("ipv6,ipv6_src=2001:db8::/32", {"eth_type": IPV6, "ipv6_src": (0x20010DB8 << 96, 0xFFFFFFFF << 96)}),
    ("ipv6,ipv6_dst=::1/::ff", {"eth_type": IPV6, "ipv6_dst": (1, 0xFF)}),
    ("reg0=5,reg15=0x10/0xf0", {"reg0": 5, "reg15": (0x10, 0xF0)}),
    ("reg1=0x1ff/0xf", {"reg1": (0xF, 0xF)}),
    ("xreg0=0x100000002", {"reg0": 1, "reg1": 2}),
    ("xreg1=2/3", {"reg3": (2, 3)}),
    ("xxreg0=0x00000001000000020000000300000004", {"reg0": 1, "reg1": 2, "reg2": 3, "reg3": 4}),
    ("metadata=5/7", {"metadata": (5, 7)}),
    ("tun_id=5", {"tunnel_id": 5}),
    ("tunnel_id=5/7", {"tunnel_id": (5, 7)}),
    ("ct_state=+new-est+trk", {"ct_state": (0x21, 0x23)}),
    ("ct_state=new|trk", {"ct_state": (0x21, 0xFF)}),
    ("ct_state=0x21/0x23", {"ct_state": (0x21, 0x23)}),
    ("ct_zone=5,ct_mark=1/0xf", {"ct_zone": 5, "ct_mark": (1, 0xF)}),
    ("vlan_tci=0", {"vlan_vid": 0}),
    ("vlan_tci=0x0000/0x1fff", {"vlan_vid": 0}),
    ("vlan_tci=0/0x1000", {"vlan_vid": (0, 0x1000)}),
    ("vlan_tci=0x1000/0x1000", {"vlan_vid": (0x1000, 0x1000)}),
    ("vlan_tci=0x7005", {"vlan_vid": 0x1005, "vlan_pcp": 3}),
    ("dl_vlan=5", {"vlan_vid": 0x1005}),
    ("dl_vlan=0xffff", {"vlan_vid": 0}),
    ("dl_vlan_pcp=3", {"vlan_vid": (0x1000, 0x1000), "vlan_pcp": 3}),
    ("dl_vlan=5,dl_vlan_pcp=3", {"vlan_vid": 0x1005, "vlan_pcp": 3}),
    ("vlan_pcp=3,vlan_vid=0x1005", {"vlan_vid": 0x1005, "vlan_pcp": 3}),
    ("in_port=7", {"in_port": 7}),
    ("in_port=LOCAL", {"in_port": fields.LOCAL}),
    ("in_port=65534", {"in_port": fields.LOCAL}),
    ("in_port=veth100", {"in_port": 1}),
    ('in_port="foo-bar"', {"in_port": 3}),
    ('in_port="x,actions=drop"', {"in_port": 4}),
    ("in_port_oxm=2", {"in_port": 2}),
]  # fmt: skip


@pytest.mark.parametrize("text, match", MATCHES, ids=[text for text, _ in MATCHES])
def test_a_match_is_read(text: str, match: dict[str, object]) -> None:
    assert match_of(text) == Match.named(**match)


@pytest.mark.parametrize(
    "text, header, value",
    [
        ("ct_label=0x5", fields.CT_LABEL, (5, fields.CT_LABEL.full)),
        ("ct_label=0x5/0xff", fields.CT_LABEL, (5, 0xFF)),
        ("pkt_mark=3", fields.PKT_MARK, (3, 0xFFFFFFFF)),
        ("conj_id=7", fields.CONJ_ID, (7, 0xFFFFFFFF)),
        ("tun_src=1.2.3.4", fields.TUN_SRC, (0x01020304, 0xFFFFFFFF)),
        ("tun_flags=+oam", fields.OTHERS["tun_flags"], (1, 1)),
        ("tun_metadata0=0x5", fields.OTHERS["tun_metadata0"], (5, fields.OTHERS["tun_metadata0"].full)),
        ("mpls,mpls_label=5", fields.MPLS_LABEL, (5, fields.MPLS_LABEL.full)),
        ("icmp6,icmp_type=135,nd_target=::1", fields.ND_TARGET, (1, fields.ND_TARGET.full)),
        ("icmp6,icmp_type=136,nd_tll=2:0:0:0:0:1", fields.ND_TLL, (0x020000000001, fields.ND_TLL.full)),
        ("ipv6,ipv6_label=5", fields.IPV6_LABEL, (5, fields.IPV6_LABEL.full)),
        ("packet_type=(1,0x894f)", fields.PACKET_TYPE, (0x1894F, 0xFFFFFFFF)),
        ("nsh_spi=5", fields.OTHERS["nsh_spi"], (5, fields.OTHERS["nsh_spi"].full)),
        ("recirc_id=0", fields.OTHERS["recirc_id"], (0, 0xFFFFFFFF)),
    ],
)
def test_a_field_that_the_proof_has_no_bits_for_is_kept_and_makes_it_inexact(
    text: str, header: fields.Field, value: tuple[int, int]
) -> None:
    match = match_of(text)
    assert match.get(header) == value
    assert of_match(match)[2] is False
    assert match_of(str(match)) == match


@pytest.mark.parametrize(
    "text, left, field",
    [
        ("tp_dst=80", "", "tp_dst=80"),
        ("ip,tp_dst=80", "ip", "tp_dst=80"),
        ("ip,nw_proto=47,tp_src=8", "ip,nw_proto=47", "tp_src=8"),
        ("nw_src=10.0.0.1", "", "nw_src=10.0.0.1"),
        ("ipv6,nw_src=10.0.0.1", "ipv6", "nw_src=10.0.0.1"),
        ("ip,ipv6_src=::1", "ip", "ipv6_src=::1"),
        ("nw_proto=6", "", "nw_proto=6"),
        ("nw_ttl=3", "", "nw_ttl=3"),
        ("nw_tos=16", "", "nw_tos=16"),
        ("nw_frag=first", "", "nw_frag=first"),
        ("udp,tcp_flags=+syn", "udp", "tcp_flags=+syn"),
        ("ip,arp_sha=2:0:0:0:0:1", "ip", "arp_sha=2:0:0:0:0:1"),
        ("icmp6,icmp_type=1,nd_target=::1", "icmp6,icmp_type=1", "nd_target=::1"),
        ("ip,mpls_label=5", "ip", "mpls_label=5"),
    ],
)
def test_a_field_without_its_protocol_is_left_out_as_by_ovs_and_told(text: str, left: str, field: str) -> None:
    read = read_flows(f"{text},actions=drop", PORTS, "FILE")
    assert read.flows[0].match == match_of(left)
    (problem,) = read.problems
    assert (problem.severity, problem.code, problem.path) == (Severity.WARNING, "prerequisite", "FILE:1")
    assert problem.found == field


# ------------------------------------------------------------------------------------------------------------- actions

VID, PCP = fields.VLAN_VID, fields.VLAN_PCP
ACTIONS: list[tuple[str, str, tuple[Action, ...]]] = [
    ("", "drop", ()),
    ("", "", ()),
    ("", "output:1,2,output=3", (Output(1), Output(2), Output(3))),
    ("", "output:1 output:2", (Output(1), Output(2))),
    ("", 'veth100,output:warp0,"foo-bar",output("warp0")', (Output(1), Output(2), Output(3), Output(2))),
    ("", "LOCAL,in_port,NORMAL,flood,ALL", tuple(map(Output, (0xFFFFFFFE, 0xFFFFFFF8, 0xFFFFFFFA, 0xFFFFFFFB, 0xFFFFFFFC)))),
    ("", "output:65534,output:4294967290", (Output(fields.LOCAL), Output(fields.NORMAL))),
    ("", "output(port=1,max_len=100)", (Output(1, 100),)),
    ("", "CONTROLLER:128,controller,controller(max_len=5,reason=action)",
     (Output(fields.CONTROLLER, 128), Output(fields.CONTROLLER, 0xFFFF), Output(fields.CONTROLLER, 5))),
    ("", "controller(reason=,id=3)", (Aside("controller(reason=,id=3)"),)),
    ("", "controller(userdata=01,pause)", (Raw(text="controller(userdata=01,pause)"),)),
    ("", "output:NXM_NX_REG0[0..15]", (Raw(text="output:reg0[0..15]"),)),
    ("", "TABLE,output:NONE", (Raw(text="output:TABLE"), Raw(text="output:NONE"))),
    ("", "enqueue:1:5,enqueue(warp0,6)",
     (Aside("set_queue:5"), Output(1), Aside("pop_queue"), Aside("set_queue:6"), Output(2), Aside("pop_queue"))),
    ("", "set_queue:5,pop_queue,meter:2", (Aside("set_queue:5"), Aside("pop_queue"), Aside("meter:2"))),
    ("", "note:01.02", (Aside("note:01.02.00.00.00.00"),)),
    ("", "note:", (Aside("note:00.00.00.00.00.00"),)),
    ("", "note:01.02.03.04.05.06.07", (Aside("note:01.02.03.04.05.06.07" + ".00" * 7),)),
    ("", "set_field:5->reg0", (SetField(REGS[0].header, 5),)),
    ("", "set_field:0x50/0xf0->reg0", (Load(5, Bits(REGS[0].header, 4, 4)),)),
    ("", "set_field:0x81/0x99->reg0", (Load(1, Bits(REGS[0].header, 0, 1)), Load(0, Bits(REGS[0].header, 3, 2)),
                                       Load(1, Bits(REGS[0].header, 7, 1)))),
    ("", "set_field:0/0->reg0", (Aside("set_field:0/0->reg0"),)),
    ("", "set_field:11:22:33:44:55:66->eth_src", (SetField(fields.ETH_SRC.header, 0x112233445566),)),
    ("ip", "set_field:1.2.3.4->nw_src", (SetField(fields.IPV4_SRC.header, 0x01020304),)),
    ("", "set_field:1.2.3.4->ip_src", (Raw(text="set_field:1.2.3.4->ip_src"),)),
    ("tcp6", "set_field:::1->ipv6_src", (SetField(fields.IPV6_SRC.header, 1),)),
    ("ip", "set_field:46->ip_dscp,set_field:184->nw_tos,load:5->NXM_OF_IP_TOS[]",
     (SetField(fields.IP_DSCP.header, 46), SetField(fields.IP_DSCP.header, 46), SetField(fields.IP_DSCP.header, 1))),
    ("ip", "load:1->NXM_OF_IP_TOS[2..3]", (Raw(text="load:1->NXM_OF_IP_TOS[2..3]"),)),
    ("", "load:5->NXM_NX_REG1[0..3],load:0x5->reg2[],load:1->reg3", (
        Load(5, Bits(REGS[1].header, 0, 4)), SetField(REGS[2].header, 5), SetField(REGS[3].header, 1))),
    ("", "load:1->reg1[31]", (Load(1, Bits(REGS[1].header, 31, 1)),)),
    ("", "set_field:0x100000002->xreg0", (SetField(REGS[1].header, 2), SetField(REGS[0].header, 1))),
    ("", "load:0xff->OXM_OF_PKT_REG0[28..35]",
     (Load(0xF, Bits(REGS[1].header, 28, 4)), Load(0xF, Bits(REGS[0].header, 0, 4)))),
    ("", "set_field:5->xxreg0", tuple(SetField(REGS[i].header, 5 if i == 3 else 0) for i in (3, 2, 1, 0))),
    ("", "move:NXM_NX_REG1[0..15]->NXM_NX_REG2[16..31]", (Move(Bits(REGS[1].header, 0, 16), Bits(REGS[2].header, 16, 16)),)),
    ("", "move:xreg0[]->xreg1[]", (Move(whole(REGS[1]), whole(REGS[3])), Move(whole(REGS[0]), whole(REGS[2])))),
    ("", "move:xreg0[0..31]->xreg0[16..47]", (Raw(text="move:xreg0[0..31]->xreg0[16..47]"),)),
    ("arp", "move:NXM_OF_ETH_SRC[]->NXM_OF_ETH_DST[],load:0x2->NXM_OF_ARP_OP[],move:NXM_NX_ARP_SHA[]->NXM_NX_ARP_THA[]",
     (Move(whole(fields.ETH_SRC), whole(fields.ETH_DST)), SetField(fields.ARP_OP.header, 2),
      Move(whole(fields.ARP_SHA), whole(fields.ARP_THA)))),
    ("", "load:0->NXM_OF_IN_PORT[],set_field:5->in_port",
     (SetField(fields.IN_PORT_16.header, 0), SetField(fields.IN_PORT_16.header, 5))),
    ("", "mod_dl_src:11:22:33:44:55:66,mod_dl_dst:11:22:33:44:55:66",
     (SetField(fields.ETH_SRC.header, 0x112233445566), SetField(fields.ETH_DST.header, 0x112233445566))),
    ("ip", "mod_nw_dst:1.2.3.4,mod_nw_tos:184,mod_nw_ecn:1,mod_nw_ttl:5",
     (SetField(fields.IPV4_DST.header, 0x01020304), SetField(fields.IP_DSCP.header, 46),
      SetField(fields.IP_ECN.header, 1), SetField(fields.IP_TTL.header, 5))),
    ("", "mod_nw_src:1.2.3.4,mod_nw_tos:184", (Raw(text="mod_nw_src:1.2.3.4"), Raw(text="mod_nw_tos:184"))),
    ("tcp", "mod_tp_dst:80", (SetField(fields.TCP_DST.header, 80),)),
    ("udp6", "mod_tp_src:80", (SetField(fields.UDP_SRC.header, 80),)),
    ("ip", "mod_tp_src:80", (Raw(text="mod_tp_src:80"),)),
    ("icmp", "mod_tp_src:80", (Raw(text="mod_tp_src:80"),)),
    ("", "mod_vlan_vid:5", (SetField(VID.header, 0x1005),)),
    ("", "set_vlan_pcp:3", (Load(1, Bits(VID.header, 12, 1)), SetField(PCP.header, 3))),
    ("dl_vlan=5", "set_field:4102->vlan_vid,set_field:3->vlan_pcp", (SetField(VID.header, 0x1006), SetField(PCP.header, 3))),
    ("", "load:0x7005->NXM_OF_VLAN_TCI[]", (SetField(VID.header, 0x1005), SetField(PCP.header, 3))),
    ("", "load:0x6->NXM_OF_VLAN_TCI[0..11]", (Load(6, Bits(VID.header, 0, 12)),)),
    ("vlan_tci=0", "push_vlan:0x8100,set_field:4101->vlan_vid", (SetField(VID.header, 0x1000), SetField(VID.header, 0x1005))),
    ("vlan_tci=0", "push_vlan:0x8100,push_vlan:0x8100", (SetField(VID.header, 0x1000), Raw(text="push_vlan:0x8100"))),
    ("vlan_tci=0", "push_vlan:0x88a8", (Raw(text="push_vlan:0x88a8"),)),
    ("", "push_vlan:0x8100", (Raw(text="push_vlan:0x8100"),)),
    ("dl_vlan=5", "strip_vlan,pop_vlan", (PopVlan(), PopVlan())),
    ("ip", "dec_ttl,dec_ttl(1,2)", (DecTtl(), Raw(text="dec_ttl(1,2)"))),
    ("", "set_tunnel:5,set_tunnel64:0x100000000", (SetField(fields.TUNNEL_ID.header, 5), SetField(fields.TUNNEL_ID.header, 1 << 32))),
    ("", "resubmit(,5),resubmit(in_port,6)", (Resubmit(5), Resubmit(6))),
    ("", "resubmit(1,5),resubmit:veth100,resubmit(2)",
     (Raw(text="resubmit(1,5)"), Raw(text="resubmit:1"), Raw(text="resubmit:2"))),
    ("ip", "resubmit(,5,ct)", (Raw(text="resubmit(,5,ct)"),)),
    ("", "1,write_metadata:5", (Output(1), SetField(fields.METADATA.header, 5))),
    ("", "write_metadata:5/7", (Load(5, Bits(fields.METADATA.header, 0, 3)),)),
    ("", "1,clear_actions,write_actions(output:1)", (Output(1), Aside("clear_actions"), Raw(text="write_actions(output:1)"))),
    ("ip", "ct", (Ct(),)),
    ("ip", "ct(commit,force,zone=5,table=3),ct_clear", (Ct(5, 3, True, True), CtClear())),
    ("ip", "ct(table=5,zone=NXM_NX_REG0[0..15],nat)", (Ct(Bits(REGS[0].header, 0, 16), 5, nat="nat"),)),
    ("ip", "ct(commit,nat(src=1.2.3.4-1.2.3.5:1-2,random),exec(load:0x1->NXM_NX_CT_MARK[],set_field:1/3->ct_label))",
     (Ct(commit=True, nat="nat(src=1.2.3.4-1.2.3.5:1-2,random)",
         actions=(SetField(fields.CT_MARK.header, 1), Load(1, Bits(fields.CT_LABEL.header, 0, 2)))),)),
    ("tcp", "ct(commit,alg=ftp)", (Raw(text="ct(commit,alg=ftp)"),)),
    ("", "clone(1,clone(set_field:5->reg0,2)),3", (Clone((Output(1), Clone((SetField(REGS[0].header, 5), Output(2))))), Output(3))),
    ("", "clone(drop)", (Clone(()),)),
    *[("", text, (Raw(text=text),)) for text in (
        "group:5", "bundle(eth_src,0,active_backup,ofport,members:1,2)", "exit", "conjunction(1,1/2)",
        "multipath(eth_src,50,modulo_n,1,0,NXM_NX_REG0[0..15])", "check_pkt_larger(100)->NXM_NX_REG0[0]",
        "sample(probability=5,collector_set_id=1)", "fin_timeout(idle_timeout=5)", "encap(ethernet)", "decap()",
        "delete_field:tun_metadata0", "push:NXM_NX_REG0[]", "pop:NXM_NX_REG0[]", "push_mpls:0x8847",
    )],
]  # fmt: skip


@pytest.mark.parametrize("match, text, actions", ACTIONS, ids=[f"{m}-{text}" for m, text, _ in ACTIONS])
def test_actions_are_read(match: str, text: str, actions: tuple[Action, ...]) -> None:
    flow = read_flow(f"{match} actions={text}", PORTS)
    assert flow.actions == actions
    assert read_flow(str(flow), {}) == flow


def test_where_to_go_on_is_read() -> None:
    flow = read_flow("table=3,actions=1,write_metadata:1,goto_table:5", PORTS)
    assert (flow.goto, flow.actions) == (5, (Output(1), SetField(fields.METADATA.header, 1)))


IN_PORT_16 = whole(fields.IN_PORT_16)
LEARNS = [
    ("", Learn(1, 32768, 0, 0, 0, 0, (), 0)),
    (
        "table=2,idle_timeout=1,hard_timeout=2,fin_idle_timeout=3,fin_hard_timeout=4,priority=5,cookie=0x7,limit=8,"
        "send_flow_rem,delete_learned",
        Learn(2, 5, 7, 1, 2, 8, (), SEND_FLOW_REM | DELETE_LEARNED, 3, 4),
    ),
    (
        "table=1,hard_timeout=300,priority=110,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[]",
        Learn(1, 110, 0, 0, 300, 0, (LearnMatch(whole(fields.ETH_DST), whole(fields.ETH_SRC)), LearnOutput(IN_PORT_16)), 0),
    ),
    (
        "NXM_OF_VLAN_TCI[0..11],reg1=reg2,eth_type=0x800,nw_proto=6,tcp_dst=tcp_src,reg0[0..3]=0x5",
        Learn(1, 32768, 0, 0, 0, 0, (
            LearnMatch(Bits(VID.header, 0, 12), Bits(VID.header, 0, 12)),
            LearnMatch(whole(REGS[1]), whole(REGS[2])),
            LearnMatch(whole(fields.ETH_TYPE), IP),
            LearnMatch(whole(fields.IP_PROTO), 6),
            LearnMatch(whole(fields.TCP_DST), whole(fields.TCP_SRC)),
            LearnMatch(Bits(REGS[0].header, 0, 4), 5),
        ), 0),
    ),
    (
        "in_port=veth100,in_port_oxm=LOCAL,NXM_OF_IN_PORT[],load:5->reg1[0..3],load:NXM_OF_IN_PORT[]->reg1[0..15]",
        Learn(1, 32768, 0, 0, 0, 0, (
            LearnMatch(IN_PORT_16, 1),
            LearnMatch(whole(fields.IN_PORT_FIELD), fields.LOCAL),
            LearnMatch(IN_PORT_16, IN_PORT_16),
            LearnLoad(5, Bits(REGS[1].header, 0, 4)),
            LearnLoad(IN_PORT_16, Bits(REGS[1].header, 0, 16)),
        ), 0),
    ),
    (
        "xreg0=0x100000002,load:0x7005->NXM_OF_VLAN_TCI[],xreg1[]=xreg2[]",
        Learn(1, 32768, 0, 0, 0, 0, (
            LearnMatch(whole(REGS[1]), 2),
            LearnMatch(whole(REGS[0]), 1),
            LearnLoad(0x1005, whole(VID)),
            LearnLoad(3, whole(PCP)),
            LearnMatch(whole(REGS[3]), whole(REGS[5])),
            LearnMatch(whole(REGS[2]), whole(REGS[4])),
        ), 0),
    ),
]  # fmt: skip


@pytest.mark.parametrize("text, learn", LEARNS, ids=[text for text, _ in LEARNS])
def test_a_learn_action_is_read(text: str, learn: Learn) -> None:
    assert actions_of(f"learn({text})") == (learn,)
    assert actions_of(str(learn)) == (learn,)


def test_a_learn_action_that_writes_its_result_is_more_than_a_learn_action() -> None:
    assert actions_of("learn(table=2,result_dst=reg0[0])") == (Raw(text="learn(table=2,result_dst=reg0[0])"),)


# ------------------------------------------------------------------------------------------------------- whole texts

OF10 = """NXST_FLOW reply (xid=0x4):
 cookie=0xb01c000000000001, duration=5.023s, table=3, n_packets=7, n_bytes=98, idle_age=5, hard_age=65534, \
idle_timeout=300, hard_timeout=600, priority=100,tcp,in_port=1,nw_src=10.0.0.0/24,tp_dst=80 actions=mod_tp_dst:81,output:2
 cookie=0x0, duration=5.023s, table=0, n_packets=0, n_bytes=0, idle_age=5, priority=0 actions=drop
"""
OF14 = """OFPST_FLOW reply (OF1.4) (xid=0x2):
 cookie=0xb01c000000000001, duration=5.023s, table=3, n_packets=7, n_bytes=98, idle_timeout=300, hard_timeout=600, \
priority=100,tcp,in_port=veth100,nw_src=10.0.0.0/24,tp_dst=80 actions=set_field:81->tcp_dst,output:warp0
 cookie=0x0, duration=5.023s, table=0, n_packets=0, n_bytes=0, reset_counts priority=0 actions=drop
"""
FILE = """# flows for the test
table=3,cookie=0xb01c000000000001,idle_timeout=300,hard_timeout=600,priority=100,tcp,in_port=1,nw_src=10.0.0.0/24,\
tp_dst=80,actions=set_field:81->tcp_dst,output:2  # to the world

 table=0 priority=0 actions=drop
"""


@pytest.mark.parametrize("text", [OF10, OF14, FILE], ids=["OpenFlow 1.0", "OpenFlow 1.4 --names", "file"])
def test_what_ovs_ofctl_prints_and_takes_is_read(text: str) -> None:
    read = read_flows(text, PORTS)
    match = Match.named(in_port=1, eth_type=IP, ip_proto=6, ipv4_src=(0x0A000000, 0xFFFFFF00), tcp_dst=80)
    actions = (SetField(fields.TCP_DST.header, 81), Output(2))
    first = Flow(3, 100, match, actions, None, 0xB01C000000000001, 300, 600)
    assert read == ReadFlows((first, Flow(0, 0, Match())), read.problems, read.lines)
    assert [(problem.code, problem.path) for problem in read.problems] == (
        [("old-dump", "flows:1")] if text is OF10 else []
    )
    assert [line.number for line in read.lines] == [2, 4 if text is FILE else 3]
    assert read.lines[1].text.endswith("actions=drop")


def test_what_ovs_appctl_prints_is_read_with_what_the_switch_hides() -> None:
    text = """\
duration=5s, n_packets=0, n_bytes=0, priority=180008,tcp,nw_src=127.0.0.1,tp_src=9999,actions=NORMAL
duration=5s, n_packets=0, n_bytes=0, ,actions=output:1
table_id=3, duration=5s, n_packets=0, n_bytes=0, n_offload_packets=0, n_offload_bytes=0, priority=7,ip,actions=output:1
table_id=254, duration=0s, n_packets=0, n_bytes=0, priority=2,recirc_id=0,actions=drop
table_id=254, duration=0s, n_packets=0, n_bytes=0, priority=0,reg0=0x1,actions=controller(reason=)
"""
    flows = read_flows(text, {}).flows
    assert [(flow.table, flow.priority) for flow in flows] == [(0, 180008), (0, 32768), (3, 7), (254, 2), (254, 0)]
    assert flows[0].actions == (Output(fields.NORMAL),)
    assert len({flow.key for flow in flows}) == 5


def test_a_hidden_priority_is_no_other_flows_key() -> None:
    hidden = read_flow("n_packets=0, priority=65636,actions=drop", {})
    assert hidden.key != read_flow("table=1,priority=100,actions=drop", {}).key


def test_what_is_not_said_is_what_ovs_takes_for_it() -> None:
    assert read_flow("actions=drop", {}) == Flow(0, 32768, Match())


def test_only_the_flag_that_we_keep_is_kept() -> None:
    assert read_flow("send_flow_rem,check_overlap,reset_counts,importance=3,actions=drop", {}).flags == SEND_FLOW_REM


SEED = {
    "mesh-privacy": [
        "priority=100,in_port=nm-privacy,actions=output:to-privacy",
        "priority=100,in_port=to-privacy,actions=output:nm-privacy",
        "priority=1,actions=drop",
    ],
    "vmbr0": [
        "priority=100,udp,tp_dst=51820,actions=output:veth100",
        "priority=100,in_port=veth100,actions=output:warp0",
        "priority=100,in_port=veth102,actions=output:warp0",
        "priority=100,in_port=warp0,actions=learn(table=1,hard_timeout=300,priority=110,"
        "NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[]),output:normal",
        "priority=90,in_port=from-privacy,actions=output:warp0",
        "priority=10,actions=normal",
        "priority=150,in_port=from-privacy,tcp,tp_src=8080,nw_src=10.0.0.102,actions=output:to-privacy",
    ],
    "vmbr1": [
        "priority=100,tcp,tp_dst=9573,actions=output:veth201",
        "priority=100,tcp,tp_dst=9574,actions=output:veth201",
        "priority=90,in_port=from-mgmt,actions=normal",
        "priority=150,in_port=veth202,tcp,tp_dst=8080,nw_dst=10.0.0.102,actions=output:from-mgmt",
    ],
}


@pytest.mark.parametrize("bridge", SEED)
def test_hand_written_flows_with_names_are_read(bridge: str) -> None:
    text = "\n".join(SEED[bridge])
    names = names_in(text)
    assert set(names) <= {
        "nm-privacy", "to-privacy", "veth100", "veth102", "veth201", "veth202", "warp0", "from-privacy", "from-mgmt",
    }  # fmt: skip
    read = read_flows(text, {name: number for number, name in enumerate(names, start=1)})
    assert len(read.flows) == len(SEED[bridge]) and not read.problems
    assert not any(isinstance(action, Raw) for flow in read.flows for action in flow.actions)


def test_names_are_found_wherever_they_stand() -> None:
    text = 'in_port="a b",actions=output:b,resubmit(c,3),clone(enqueue:d:1,learn(in_port=e)),f,LOCAL,7\nin_port=g,actions=b'
    assert names_in(text) == ("a b", "b", "c", "d", "e", "f", "g")


# ------------------------------------------------------------------------------------------------------------ problems

BAD = [
    ("priority=1,ip", "bad-flow", "priority=1,ip", "a flow with actions="),
    ("hello", "bad-flow", "hello", "a flow with actions="),
    ("add table=0,actions=drop", "unsupported", "add table=0", "not the command 'add'"),
    ("delete", "unsupported", "delete", "not the command 'delete'"),
    ("flow add actions=drop", "unsupported", "flow add", "not the command 'add'"),
    ("group group_id=1,type=all", "unsupported", "group", "not the command 'group'"),
    ("tpc,actions=drop", "bad-flow", "tpc", "a field that Open vSwitch has"),
    ("tcp_dts=5,actions=drop", "bad-flow", "tcp_dts=5", "a field that Open vSwitch has"),
    ("nw_src,actions=drop", "bad-flow", "nw_src", "a field that Open vSwitch has"),
    ("nw_src=,actions=drop", "bad-flow", "nw_src=", "a value for nw_src"),
    ("tcp=5,actions=drop", "bad-flow", "tcp=5", "tcp without a value"),
    ("priority=70000,actions=drop", "bad-flow", "priority=70000", "priority from 0 to 65535"),
    ("priority=-1,actions=drop", "bad-flow", "priority=-1", "priority from 0 to"),
    ("table=255,actions=drop", "bad-flow", "table=255", "a table from 0 to 254"),
    ("table=main,actions=drop", "bad-flow", "table=main", "a table number"),
    ("cookie=1/1,actions=drop", "bad-flow", "cookie=1/1", "a cookie without a mask"),
    ("reg0=010,actions=drop", "bad-flow", "reg0=010", "reg0 from 0 to"),
    ("reg0=0x100000000,actions=drop", "bad-flow", "reg0=0x1000", "reg0 from 0 to 0xffffffff"),
    ("ip,nw_src=10.0.0.256,actions=drop", "bad-flow", "nw_src=10.0.0.256", "an IPv4 address"),
    ("ip,nw_src=10.0.0.0/33,actions=drop", "bad-flow", "nw_src=33", "from 0 to 32"),
    ("dl_src=1:2:3,actions=drop", "bad-flow", "dl_src=1:2:3", "an Ethernet address"),
    ("ipv6,ipv6_src=x,actions=drop", "bad-flow", "ipv6_src=x", "ipv6_src from 0"),
    ("ip,nw_frag=maybe,actions=drop", "bad-flow", "nw_frag=maybe", "nw_frag from 0"),
    ("ct_state=+odd,actions=drop", "bad-flow", "ct_state=+odd", "ct_state of new, est"),
    ("ip,nw_proto=6/7,actions=drop", "bad-flow", "nw_proto=6/7", "without a mask"),
    ("icmp,tp_src=300,actions=drop", "bad-flow", "tp_src=300", "from 0 to 255"),
    ("reg0=1,reg0=2,actions=drop", "bad-flow", "reg0=2", "one value for a field"),
    ("reg0=1/1,reg0=2/2,actions=drop", "bad-flow", "reg0=2/2", "one value for a field"),
    ("dl_vlan=5,vlan_tci=0/0x1000,actions=drop", "bad-flow", "vlan_tci=0/0x1000", "one value for a field"),
    ("vlan_tci=0x5,actions=drop", "bad-flow", "vlan_tci=0x5", "the bit 0x1000"),
    ("vlan_tci=0x4000/0xc000,actions=drop", "bad-flow", "vlan_tci=0x4000", "a whole VLAN priority"),
    ("dl_vlan=5000,actions=drop", "bad-flow", "dl_vlan=5000", "a VLAN id"),
    ("in_port=nosuch,actions=drop", "unknown-port", "nosuch", "foo-bar, veth100, warp0"),
    ("in_port=70000,actions=drop", "bad-flow", "70000", "a port number below 0xff00"),
    ('in_port="x,actions=drop', "bad-flow", "in_port", "a flow with actions="),
    ("actions=nosuch", "unknown-action", "nosuch", "an action or a port"),
    ("actions=ouput:1", "unknown-action", "ouput:1", "an action or a port"),
    ("actions=drop,1", "bad-flow", "drop,1", "drop on its own"),
    ("actions=output:", "bad-flow", "output:", "a port"),
    ("actions=goto_table:0", "bad-flow", "goto_table:0", "a table after 0"),
    ("actions=goto_table:5,1", "bad-flow", "goto_table:5,1", "goto_table last"),
    ("actions=write_metadata:1,1", "bad-flow", "write_metadata before 1", "instructions behind actions"),
    ("actions=clone(goto_table:5)", "bad-flow", "clone(goto_table:5)", "no goto_table inside clone"),
    ("actions=set_field:5", "bad-flow", "set_field:5", "VALUE->FIELD"),
    ("actions=set_field:5->nosuch", "bad-flow", "nosuch", "a field that"),
    ("actions=load:5->reg0[0..1]", "bad-flow", "load=5", "load from 0 to 3"),
    ("actions=load:5->reg0[5..40]", "bad-flow", "reg0[5..40]", "bits of reg0 from 0 to 31"),
    ("actions=load:5->reg0[3..1]", "bad-flow", "reg0[3..1]", "the lowest first"),
    ("actions=move:reg0[0..3]->reg1[]", "bad-flow", "move:", "as many bits"),
    ("actions=move:reg0[]", "bad-flow", "move:", "as many bits"),
    ("actions=resubmit(,)", "bad-flow", "resubmit(,)", "resubmit(,TABLE)"),
    ("actions=resubmit(,300)", "bad-flow", "table=300", "from 0 to 254"),
    ("actions=learn(table=300)", "bad-flow", "table=300", "from 0 to 254"),
    ("actions=learn(nosuch=3)", "bad-flow", "nosuch", "a field that"),
    ("actions=learn(reg0=0/1)", "bad-flow", "reg0=0/1", "a value without a mask"),
    ("actions=learn(reg0[0..3]=reg1[])", "bad-flow", "reg0[0..3]=reg1[]", "4 bits on both sides"),
    ("actions=ct(wrong)", "bad-flow", "wrong", "commit, force, table"),
    ("actions=clone(1", "bad-flow", "(1", "a closing parenthesis"),
    ("actions=output:1)", "bad-flow", "1)", "no parenthesis"),
    ("actions=pop_vlan:3", "bad-flow", "pop_vlan:3", "pop_vlan without an argument"),
    ("actions=note:xyz", "bad-flow", "note:xyz", "note:HEX"),
    ("actions=" + "clone(" * 40 + ")" * 40, "bad-flow", "(((", "at most 32"),
]  # fmt: skip


@pytest.mark.parametrize("text, code, found, expected", BAD, ids=[text[:40] for text, *_ in BAD])
def test_what_cannot_be_read_is_told(text: str, code: str, found: str, expected: str) -> None:
    problems = problems_of(f"actions=drop\n{text}\n")
    (problem,) = problems
    assert (problem.severity, problem.code, problem.path) == (Severity.ERROR, code, "FILE:2")
    assert found in problem.found and expected in problem.expected and problem.fix.endswith((".", "?"))


def test_every_bad_line_is_told_and_every_bad_word_of_its_match() -> None:
    text = "reg0=x,reg1=y,actions=drop\nactions=drop\nactions=nosuch\ntp_dst=80,actions=drop\n"
    problems = problems_of(text)
    assert [(p.path, p.found) for p in problems] == [
        ("FILE:1", "reg0=x"), ("FILE:1", "reg1=y"), ("FILE:3", "nosuch"), ("FILE:4", "tp_dst=80"),
    ]  # fmt: skip
    assert [p.severity for p in problems] == [Severity.ERROR] * 3 + [Severity.WARNING]


def test_where_no_names_are_known_a_name_is_refused_with_what_to_do() -> None:
    (problem,) = problems_of("in_port=veth100,actions=drop", {})
    assert problem.expected == "a port number: no names of ports are known here" and "--names" in problem.fix


def test_a_dump_that_ends_in_the_middle_is_refused() -> None:
    assert problems_of(OF14[:-20])[0].code == "bad-flow"


def test_one_flow_is_one_flow() -> None:
    with pytest.raises(InvalidInput):
        read_flow("", {})
    with pytest.raises(InvalidInput):
        read_flow("actions=nosuch", {})
