"""Flows of other people for tests: lines as ovs-ofctl takes them, and hypothesis strategies for any flow value."""

from __future__ import annotations

from hypothesis import strategies as st

from controller import fields
from controller.fields import BY_NAME, REGS, Field
from controller.flow import (
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
    LearnSpec,
    Load,
    Match,
    MatchItem,
    Move,
    Output,
    PopVlan,
    Raw,
    Resubmit,
    SetField,
    whole,
)

PORTS = {"veth100": 1, "warp0": 2, "foo-bar": 3, "to.x": 4, "x,actions=drop": 5}
"""Ports of the bridge that these lines are for."""

MATCHES = """
tp_dst=80
tcp_dst=80
tcp,udp_dst=80
ip,tcp_flags=+syn
tcp,tcp_flags=+syn-ack
tcp,tcp_flags=syn|ack
tcp,tcp_flags=0x2/0x12
tcp,tcp_flags=2
nw_src=10.0.0.1
nw_proto=6
arp,nw_proto=2,nw_src=10.0.0.0/24,arp_sha=00:00:00:00:00:01
arp,arp_tpa=10.0.0.1,arp_tha=00:00:00:00:00:01,arp_op=1,dl_src=00:00:00:00:00:01
ipv6,nw_src=10.0.0.1
ip,ipv6_src=::1
nw_frag=first
nw_ttl=3
nw_tos=16
ip,ip_dscp=46,nw_ecn=1,nw_ttl=3,nw_frag=not_later
ip,nw_tos=184,nw_frag=yes
icmp,icmp_type=8,icmp_code=0
icmp,tp_src=8
icmp6,icmp_type=135,nd_target=::1,nd_sll=00:00:00:00:00:01
icmp6,icmp_type=136,nd_tll=00:00:00:00:00:01
ct_state=+new-est+trk,ct_zone=5,ct_mark=1/0xf,ct_label=0x5,ip
ct_state=new|trk
ct_state=0/0x20
vlan_tci=0
vlan_tci=0x1000/0x1000
vlan_tci=0x1005/0x1fff
dl_vlan=5
dl_vlan=0xffff
dl_vlan_pcp=3
dl_vlan=5,dl_vlan_pcp=3
vlan_vid=0x1005
vlan_vid=0x1000/0x1000
vlan_vid=0x1005,vlan_pcp=3
xreg0=0x100000002
xxreg0=0x100000002
reg15=5,reg3=0x10/0xf0
tun_id=5,tun_src=1.2.3.4
tun_flags=+oam
metadata=5/7,pkt_mark=3
conj_id=5
in_port=LOCAL
in_port=65534
in_port=foo-bar
in_port="to.x",ip
in_port=5
eth_dst=01:00:00:00:00:00/01:00:00:00:00:00
ipv6,ipv6_src=2001::/64,ipv6_label=5
ipv6,ipv6_dst=2001::/ffff::1
mpls,mpls_label=5,mpls_tc=1,mpls_bos=1
rarp
dl_type=0x88cc
udp6,tp_dst=53
sctp6,sctp_dst=53
sctp,tp_src=5
nw_proto=6,ip,tp_src=0x50/0xfff0
ip,nw_src=10.0.0.1/255.0.0.255
ip,nw_src=10.0.0.1/8,nw_dst=192.168.0.0/255.255.0.0
ip,nw_proto=47,tp_src=8
""".strip().split("\n")

ACTIONS = """
|drop
|veth100,output:"to.x",output("warp0"),3,LOCAL,NORMAL,FLOOD,ALL,IN_PORT
|output(port=1,max_len=100)
|CONTROLLER:5,controller,controller(max_len=5)
|controller(reason=no_match,id=5),controller(userdata=01.02,pause)
tcp|set_field:5->tcp_dst,set_field:0x5/0xf->reg1,set_field:11:22:33:44:55:66->eth_src,set_field:1.2.3.4->nw_src
tcp|load:5->NXM_NX_REG1[0..3],load:0x5->reg2[],move:reg1[0..15]->NXM_NX_REG2[16..31],output:reg0[0..15]
|set_field:0x81/0x99->reg0
tcp|mod_dl_src:11:22:33:44:55:66,mod_nw_dst:1.2.3.4,mod_tp_src:80,mod_nw_tos:184,mod_nw_ecn:1,mod_nw_ttl:5
udp|mod_tp_dst:80
dl_vlan=5|mod_vlan_vid:6,mod_vlan_pcp:2
dl_vlan=5|set_field:0x1006->vlan_vid,set_field:3->vlan_pcp
dl_vlan=5|set_field:0x6/0xf->vlan_vid
dl_vlan=5|strip_vlan,1
|load:0x1006->vlan_tci[],1
|load:0x6->NXM_OF_VLAN_TCI[0..11],1
|push_vlan:0x8100,set_field:0x1006->vlan_vid,1
ip|dec_ttl,dec_ttl(1,2),1
|resubmit(,5),resubmit(1,5),resubmit:1,resubmit(in_port,5),resubmit(1)
|goto_table:5
|1,write_metadata:5,goto_table:6
|1,write_metadata:5/7,goto_table:6
|note:01.02,note:,1
|note:01.02.03.04.05.06.07,1
|set_queue:5,1,pop_queue
|enqueue:1:5
|clear_actions,goto_table:5
|exit
tcp|fin_timeout(idle_timeout=5),1
|bundle(eth_src,0,active_backup,ofport,members:1,2)
|multipath(eth_src,50,modulo_n,1,0,NXM_NX_REG0[0..15])
|check_pkt_larger(100)->NXM_NX_REG0[0]
|conjunction(1,1/2)
|push_mpls:0x8847,1
ip|ct(commit,zone=5,nat(src=1.2.3.4-1.2.3.5:1-2,random),exec(set_field:1->ct_mark,set_field:1/3->ct_label))
ip|ct(commit,nat(dst=1.2.3.4,persistent,hash),exec(move:reg0[]->ct_mark[]))
ip|ct(commit,nat(src))
ipv6|ct(commit,nat(src=2001::1-2001::5))
tcp6|ct(commit,nat(dst=[2001::1]:80,random))
ip|ct(table=5,zone=NXM_NX_REG0[0..15])
ip|ct(table=5,zone=reg0[0..15],nat)
ip|ct(commit,force),ct_clear,ct
tcp|ct(commit,alg=ftp)
|clone(1,clone(set_field:5->reg0,2)),3
|clone()
|learn(table=1,hard_timeout=300,priority=110,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[]),output:normal
|learn(NXM_OF_VLAN_TCI[0..11],NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],load:NXM_OF_IN_PORT[]->NXM_NX_REG0[0..15]),1
|learn(table=2,fin_idle_timeout=1,fin_hard_timeout=2,cookie=0x7,send_flow_rem,delete_learned,limit=5,reg1=5)
|learn(table=2,limit=5,result_dst=reg0[0],reg1=5)
tcp|learn(table=2,eth_type=0x800,nw_proto=6,NXM_OF_TCP_DST[]=NXM_OF_TCP_SRC[],in_port=1,reg0[0..3]=5,load:5->reg1[0..3])
|learn(table=2,in_port_oxm=1,OXM_OF_IN_PORT[])
|learn(table=2,in_port=LOCAL,reg0=reg1,eth_dst=eth_src,reg1[0..3]=reg2[4..7])
|learn()
|load:5->NXM_OF_IN_PORT[],1
|set_field:0x100000002->xreg0,load:0xff->xreg0[28..35],move:xreg0[]->xreg1[],set_field:0x5->xxreg0
tcp6|set_field:::1->ipv6_src,load:5->NXM_NX_IPV6_SRC[0..31],set_field:::5/::ff->ipv6_dst
|set_field:5->metadata,set_field:5->tun_id,set_field:1.2.3.4->tun_dst,set_field:1->pkt_mark
ip|load:5->NXM_OF_IP_TOS[],set_field:46->ip_dscp,set_field:184->nw_tos
arp|move:NXM_OF_ETH_SRC[]->NXM_OF_ETH_DST[],load:0x2->NXM_OF_ARP_OP[],move:arp_sha[]->arp_tha[],IN_PORT
|set_tunnel:5
""".strip().split("\n")

LINES = [f"{match},actions=1" for match in MATCHES] + [
    (match + "," if match else "") + f"actions={actions}" for match, actions in (line.split("|", 1) for line in ACTIONS)
]
"""Lines that `ovs-ofctl -O OpenFlow14 add-flows` takes on a bridge with these ports."""

# --------------------------------------------------------------------------------------------------------- strategies

_ANYWHERE = ["in_port", "eth_src", "eth_dst", "metadata", "tunnel_id", "ct_state", "ct_zone", "ct_mark", "vlan_vid"]
_ANYWHERE += [reg.name for reg in REGS]
_IN_IP = ["ip_dscp", "ip_ecn", "nw_ttl", "ip_frag"]
_IN_IPV4 = [*_IN_IP, "ipv4_src", "ipv4_dst"]
_IN_IPV6 = [*_IN_IP, "ipv6_src", "ipv6_dst"]
_KINDS: list[tuple[dict[str, int], list[str]]] = [
    ({}, []),
    ({"eth_type": 0x88CC}, []),
    ({"eth_type": 0x0800}, _IN_IPV4),
    ({"eth_type": 0x0800, "ip_proto": 6}, [*_IN_IPV4, "tcp_src", "tcp_dst", "tcp_flags"]),
    ({"eth_type": 0x0800, "ip_proto": 17}, [*_IN_IPV4, "udp_src", "udp_dst"]),
    ({"eth_type": 0x0800, "ip_proto": 132}, [*_IN_IPV4, "sctp_src", "sctp_dst"]),
    ({"eth_type": 0x0800, "ip_proto": 1}, [*_IN_IPV4, "icmpv4_type", "icmpv4_code"]),
    ({"eth_type": 0x0800, "ip_proto": 47}, _IN_IPV4),
    ({"eth_type": 0x0806}, ["arp_spa", "arp_tpa", "arp_sha", "arp_tha"]),
    ({"eth_type": 0x86DD}, _IN_IPV6),
    ({"eth_type": 0x86DD, "ip_proto": 6}, [*_IN_IPV6, "tcp_src", "tcp_dst", "tcp_flags"]),
    ({"eth_type": 0x86DD, "ip_proto": 58}, [*_IN_IPV6, "icmpv6_type", "icmpv6_code"]),
]


def _value(of: Field) -> st.SearchStrategy[int]:
    if of is fields.IN_PORT_FIELD:
        return st.sampled_from((1, 2, 0xFEFF, fields.LOCAL))
    return st.integers(0, of.full)


@st.composite
def _item(draw: st.DrawFn, of: Field) -> MatchItem:
    mask = draw(st.one_of(st.just(of.full), st.integers(1, of.full))) if of.maskable else of.full
    return of.header, draw(_value(of)) & mask, mask


@st.composite
def matches(draw: st.DrawFn) -> Match:
    """Any match of fields that the proof knows, each with what it needs beside it."""
    base, more = draw(st.sampled_from(_KINDS))
    names = draw(st.lists(st.sampled_from([*_ANYWHERE, *more]), unique=True, max_size=6))
    items = [(BY_NAME[name].header, value, BY_NAME[name].full) for name, value in base.items()]
    return Match.of([*items, *[draw(_item(BY_NAME[name])) for name in names]])


_CHECKED = ("ipv4_", "tcp_", "udp_", "sctp_")  # written only beside their protocol
WRITABLE = [of for name, of in BY_NAME.items() if not name.startswith(_CHECKED) and of is not fields.IP_FRAG]


@st.composite
def runs(draw: st.DrawFn, width: int = 0) -> Bits:
    """Bits of some field; of `width` if given."""
    of = draw(st.sampled_from([of for of in WRITABLE if of.bits >= width]))
    width = width or draw(st.integers(1, min(of.bits, 64)))
    return Bits(of.header, draw(st.integers(0, of.bits - width)), width)


@st.composite
def _writes(draw: st.DrawFn) -> Action:
    target = draw(runs())
    if draw(st.booleans()):
        return Move(draw(runs(target.width)), target)
    of = fields.by_header(target.header)
    if target == whole(of) or draw(st.booleans()):
        return SetField(of.header, draw(_value(of)))
    return Load(draw(st.integers(0, (1 << target.width) - 1)), target)


@st.composite
def _specs(draw: st.DrawFn) -> LearnSpec:
    target = draw(runs())
    kind = draw(st.sampled_from((LearnMatch, LearnLoad, LearnOutput)))
    if kind is LearnOutput:
        return LearnOutput(target)
    known = fields.by_header(target.header) not in (fields.IN_PORT_FIELD, fields.IN_PORT_16)
    source = (
        draw(st.integers(0, (1 << target.width) - 1)) if known and draw(st.booleans()) else draw(runs(target.width))
    )
    return LearnMatch(target, source) if kind is LearnMatch else LearnLoad(source, target)


_SHORT = st.integers(0, 0xFFFF)
_LEARNS = st.builds(
    Learn, st.integers(0, 254), _SHORT, st.integers(0, (1 << 64) - 1), _SHORT, _SHORT, _SHORT,
    st.lists(_specs(), max_size=4).map(tuple), st.integers(0, 3), _SHORT, _SHORT,
)  # fmt: skip
_SIMPLE: st.SearchStrategy[Action] = st.one_of(
    st.builds(Output, st.integers(0, 0xFEFF), st.one_of(st.just(0), st.integers(14, 0xFFFF))),
    st.builds(Output, st.sampled_from((fields.LOCAL, fields.NORMAL, fields.FLOOD, fields.ALL, fields.IN_PORT))),
    st.builds(Output, st.just(fields.CONTROLLER), _SHORT),
    _writes(),
    st.builds(Resubmit, st.integers(0, 254)),
    _LEARNS,
    st.sampled_from((CtClear(), PopVlan(), DecTtl(), Aside("pop_queue"), Aside("note:01.02.00.00.00.00"))),
    st.builds("set_queue:{}".format, _SHORT).map(Aside),
    st.sampled_from(("exit", "group:5", "bundle(eth_src,0,active_backup,ofport,members:1,2)")).map(
        lambda t: Raw(text=t)
    ),
)


def _nested(inner: st.SearchStrategy[Action]) -> st.SearchStrategy[Action]:
    some = st.lists(inner, max_size=3).map(tuple)
    zone = st.one_of(_SHORT, st.sampled_from((Bits(REGS[0].header, 0, 16), Bits(REGS[3].header, 4, 8))))
    nat = st.sampled_from(("", "nat", "nat(src=1.2.3.4-1.2.3.5:1-2,random)"))
    table = st.one_of(st.none(), st.integers(0, 254))
    return st.one_of(st.builds(Clone, some), st.builds(Ct, zone, table, st.booleans(), st.booleans(), nat, some))


actions = st.recursive(_SIMPLE, _nested, max_leaves=6)
"""Any action."""


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """Any flow whose text says all of it."""
    table = draw(st.integers(0, 250))
    goto = draw(st.one_of(st.none(), st.integers(table + 1, 254)))
    done = tuple(draw(st.lists(actions, max_size=4)))
    cookie, idle, hard = draw(st.integers(0, (1 << 64) - 1)), draw(_SHORT), draw(_SHORT)
    return Flow(table, draw(_SHORT), draw(matches()), done, goto, cookie, idle, hard, draw(st.integers(0, 1)))
