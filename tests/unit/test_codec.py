"""The wire form, held against os-ken's own parser and serialiser, and against nonsense. No switch is needed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from os_ken.ofproto import ofproto_parser, ofproto_protocol, ofproto_v1_4
from os_ken.ofproto import ofproto_v1_4_parser as parser

from apps.learning import learn_reply, learn_return
from controller import codec, fields
from controller.codec import CodecError, FlowStats, Reason, Update
from controller.compile import BridgeCompiler, planned_ports
from controller.fields import BY_NAME, Field
from controller.flow import (
    SEND_FLOW_REM,
    Action,
    Aside,
    Bits,
    Clone,
    Cookie,
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
from controller.flowwrites import note
from controller.model import Ipv4, Mac, Role
from tests.fakes.states import two_networks

DATAPATH = ofproto_protocol.ProtocolDesc(version=5)
XID = 7
STATE = two_networks()
COMPILED = [
    flow
    for bridge in STATE.bridges
    for flow in BridgeCompiler().compile(STATE, bridge, planned_ports(STATE, bridge)).flows.values()
]


def parsed(data: bytes) -> Any:
    """A message as os-ken's real parser reads it."""
    return ofproto_parser.msg(DATAPATH, *ofproto_parser.header(data), data)


def serialised(message: Any) -> bytes:
    """A message as os-ken writes it."""
    if message.xid is None:
        message.set_xid(XID)
    message.serialize()
    return bytes(message.buf)


def user(of: Field, value: int) -> object:
    """A value as os-ken shows it."""
    if of.show is fields.IPV4_SRC.show:
        return str(Ipv4(value))
    return str(Mac(value)) if of.show is fields.ETH_SRC.show else value


# ----------------------------------------------------------------------------------------------- flow mods, by os-ken


def check_match(found: Any, match: Match) -> None:
    expected = {}
    for header, value, mask in match:
        of = fields.by_header(header)
        shown = user(of, value)
        expected[of.name] = shown if mask == of.full else (shown, user(of, mask))
    assert dict(found.items()) == expected


def check_action(found: Any, action: Action) -> None:
    match action:
        case Output(port, max_len):
            assert (type(found).__name__, found.port, found.max_len) == ("OFPActionOutput", port, max_len)
        case SetField(header, value):
            of = fields.by_header(header)
            assert (type(found).__name__, found.key, found.value) == ("OFPActionSetField", of.name, user(of, value))
        case Move(source, target):
            names = (fields.by_header(source.header).name, fields.by_header(target.header).name)
            assert type(found).__name__ == "NXActionRegMove"
            assert (found.src_field, found.dst_field) == names and found.n_bits == source.width
            assert (found.src_ofs, found.dst_ofs) == (source.start, target.start)
        case Load(value, target):
            assert type(found).__name__ == "NXActionRegLoad"
            assert (found.dst, found.value) == (fields.by_header(target.header).name, value)
            assert found.ofs_nbits == target.start << 6 | target.width - 1
        case Resubmit(table):
            assert (type(found).__name__, found.table_id) == ("NXActionResubmitTable", table)
            assert found.in_port == ofproto_v1_4.OFPP_IN_PORT & 0xFFFF
        case Learn():
            assert type(found).__name__ == "NXActionUnknown" and found.subtype == 45
        case _:
            raise AssertionError(action)


def check_flow_mod(flow: Flow) -> None:
    data = codec.flow_mod(flow, codec.ADD, XID)
    found = parsed(data)
    assert isinstance(found, parser.OFPFlowMod) and found.xid == XID
    assert (found.table_id, found.priority, found.cookie, found.cookie_mask) == (
        flow.table,
        flow.priority,
        flow.cookie,
        0,
    )
    assert (found.idle_timeout, found.hard_timeout, found.flags) == (flow.idle_s, flow.hard_s, flow.flags)
    assert (found.command, found.buffer_id) == (ofproto_v1_4.OFPFC_ADD, ofproto_v1_4.OFP_NO_BUFFER)
    assert found.out_port == ofproto_v1_4.OFPP_ANY and found.out_group == ofproto_v1_4.OFPG_ANY
    check_match(found.match, flow.match)
    instructions = list(found.instructions)
    if flow.actions:
        apply = instructions.pop(0)
        assert apply.type == ofproto_v1_4.OFPIT_APPLY_ACTIONS and len(apply.actions) == len(flow.actions)
        for mine, theirs in zip(flow.actions, apply.actions, strict=True):
            check_action(theirs, mine)
    if flow.goto is not None:
        assert instructions.pop(0).table_id == flow.goto
    assert not instructions
    found.buf = None
    assert serialised(found) == data


@pytest.mark.parametrize("flow", COMPILED, ids=lambda flow: f"{flow.table}-{flow.key.hex()[:24]}")
def test_a_compiled_flow_means_the_same_to_os_ken(flow: Flow) -> None:
    check_flow_mod(flow)


def test_every_kind_of_action_is_among_them() -> None:
    kinds = {type(action) for flow in COMPILED for action in flow.actions}
    assert kinds == {Output, SetField, Move, Resubmit, Learn}


OTHER_NAMES = (fields.IP_TTL, fields.IP_FRAG, fields.TCP_FLAGS)  # os-ken calls them something else
MATCHABLE = [of for of in BY_NAME.values() if of.header >> 16 in (0x8000, 1) and of not in OTHER_NAMES]


def needs(of: Field) -> dict[str, int]:
    """What a match has to say beside it."""
    name = of.name
    for prefix, needed in {
        "tcp_": {"eth_type": 0x0800, "ip_proto": 6},
        "udp_": {"eth_type": 0x0800, "ip_proto": 17},
        "sctp_": {"eth_type": 0x0800, "ip_proto": 132},
        "icmpv4_": {"eth_type": 0x0800, "ip_proto": 1},
        "icmpv6_": {"eth_type": 0x86DD, "ip_proto": 58},
        "arp_": {"eth_type": 0x0806},
        "ipv6_": {"eth_type": 0x86DD},
        "ip": {"eth_type": 0x0800},
    }.items():
        if name.startswith(prefix):
            return {key: value for key, value in needed.items() if key != name}
    return {}


@pytest.mark.parametrize("of", MATCHABLE, ids=lambda of: of.name)
def test_every_field_means_the_same_to_os_ken(of: Field) -> None:
    assert of.name in {known.name for known in ofproto_v1_4.oxm_types}
    value = 0x0123456789ABCDEF0123456789ABCDEF & of.full
    pairs = [(value, of.full)]
    if of.maskable:
        half = of.full ^ (of.full >> of.bits // 2)
        pairs.append((value & half, half))
    for pair in pairs:
        match = Match.named(**needs(of), **{of.name: pair})
        body = codec.encode_match(match)
        assert len(body) % 8 == 0
        found = parser.OFPMatch.parser(body, 0)
        if of.name.startswith("ipv6_s") or of.name.startswith("ipv6_d"):
            assert of.name in dict(found.items())
        else:
            check_match(found, match)
        assert codec.decode_match(body, 0) == (match, len(body))


@pytest.mark.parametrize("of", BY_NAME.values(), ids=lambda of: of.name)
def test_every_field_can_be_matched_and_set(of: Field) -> None:
    if of is fields.IN_PORT_16:
        return  # a source of `learn`, nothing else
    match = Match.of([(of.header, of.full >> 1, of.full)])
    assert codec.decode_match(codec.encode_match(match), 0)[0] == match
    action = SetField(of.header, of.full >> 1)
    assert decoded(codec.encode_action(action), Match.named(**needs(of))) == (action,)


def test_a_delete_is_strict_and_bound_to_its_cookie() -> None:
    flow = COMPILED[0]
    found = parsed(codec.flow_mod(flow, codec.DELETE_STRICT, XID))
    assert found.command == ofproto_v1_4.OFPFC_DELETE_STRICT
    assert (found.cookie, found.cookie_mask) == (flow.cookie, (1 << 64) - 1)
    assert not found.instructions and found.priority == flow.priority
    check_match(found.match, flow.match)


# ------------------------------------------------------------------------------------------------------------- actions


def decoded(actions: bytes, match: Match = Match()) -> tuple[Action, ...]:  # noqa: B008  (a value)
    """Actions as they come back in flow statistics."""
    return codec.decode_flow_stats(entry(struct.pack("!HH4x", 4, 8 + len(actions)) + actions, match)).flow.actions


def entry(instructions: bytes = b"", match: Match = Match()) -> bytes:  # noqa: B008  (a value)
    """One flow statistics entry."""
    body = codec.encode_match(match) + instructions
    head = struct.pack("!HBxIIHHHHHxxQQQ", 48 + len(body), 5, 1, 500_000_000, 100, 3, 4, SEND_FLOW_REM, 0, 9, 10, 11)
    return head + body


LEARNS = [learn_return(Role.CONTAINER), learn_return(Role.MESH)]
LEARNS += [learn_reply(server, protocol) for server in (3, fields.LOCAL) for protocol in (6, 17, 132)]
ACTIONS: list[Action] = [
    Output(1),
    Output(fields.IN_PORT),
    Output(fields.CONTROLLER, 128),
    SetField(fields.ETH_DST.header, 0x020000000001),
    SetField(fields.REGS[2].header, 0xFFFFFFFF),
    Load(0xBEEF, Bits(fields.REGS[1].header, 0, 16)),
    Load(1, Bits(fields.REGS[1].header, 31, 1)),
    Move(whole(fields.ARP_SHA), whole(fields.ARP_THA)),
    Move(Bits(fields.REGS[0].header, 4, 8), Bits(fields.REGS[1].header, 16, 8)),
    Resubmit(60),
    *LEARNS,
]


@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_an_action_comes_back_as_it_went(action: Action) -> None:
    data = codec.encode_action(action)
    assert len(data) % 8 == 0 and int.from_bytes(data[2:4], "big") == len(data)
    assert decoded(data) == (action,)


def test_actions_come_back_in_order() -> None:
    assert decoded(b"".join(map(codec.encode_action, ACTIONS))) == tuple(ACTIONS)


@pytest.mark.parametrize("action", [a for a in ACTIONS if not isinstance(a, Learn)], ids=str)
def test_an_action_means_the_same_to_os_ken(action: Action) -> None:
    data = codec.encode_action(action)
    found = parser.OFPAction.parser(data, 0)
    check_action(found, action)
    buf = bytearray()
    found.serialize(buf, 0)
    assert bytes(buf) == data


@pytest.mark.parametrize("learn", LEARNS, ids=str)
def test_a_learn_action_means_the_same_to_os_ken_but_for_its_limit(learn: Learn) -> None:
    """os-ken knows the older action, without limit: cut that out (`nx_action_learn2` in nicira-ext.h) and compare."""
    data = codec.encode_action(learn)
    limit = struct.unpack_from("!I", data, 32)[0]
    assert limit == learn.limit and data[36:40] == bytes(4)
    old = bytearray(data[:32] + data[40:])
    struct.pack_into("!H", old, 2, len(old))
    struct.pack_into("!H", old, 8, 16)
    found = parser.OFPAction.parser(bytes(old), 0)
    assert isinstance(found, parser.NXActionLearn)
    assert (found.table_id, found.priority, found.cookie) == (learn.table, learn.priority, learn.cookie)
    assert (found.idle_timeout, found.hard_timeout, found.flags) == (learn.idle_s, learn.hard_s, SEND_FLOW_REM)
    assert (found.fin_idle_timeout, found.fin_hard_timeout) == (0, 0)
    for mine, theirs in zip(learn.specs, found.specs, strict=True):
        assert theirs.n_bits == mine.target.width and theirs.dst[1] == mine.target.start
        assert type(theirs).__name__ == {LearnMatch: "NXFlowSpecMatch", LearnLoad: "NXFlowSpecLoad"}[type(mine)]
        if isinstance(mine.source, int):
            assert theirs.src == mine.source
        else:
            assert theirs.src[1] == mine.source.start


def test_somebody_elses_action_is_kept_as_it_is_and_never_sent() -> None:
    strange = struct.pack("!HHIHxxxxxx", 0xFFFF, 16, 0x2320, 99)
    raw = Raw(strange)
    assert decoded(strange) == (raw,)
    with pytest.raises(CodecError):
        codec.encode_action(raw)


FOREIGN: list[Action] = [
    Output(5, 100),
    CtClear(),
    PopVlan(),
    DecTtl(),
    Aside("set_queue:5"),
    Aside("pop_queue"),
    note(b"\1\2"),
    Ct(),
    Ct(5, 3, True, True),
    Ct(Bits(fields.REGS[0].header, 0, 16), 5, actions=(SetField(fields.CT_MARK.header, 1),)),
    Clone((Output(1), Clone((SetField(fields.REGS[0].header, 5), Output(2))))),
    Learn(1, 5, 7, 1, 2, 0, (LearnOutput(Bits(fields.IN_PORT_16.header, 0, 16)),), 0, 3, 4),
    Learn(1, 5, 7, 1, 2, 9, (LearnMatch(whole(fields.ETH_DST), whole(fields.ETH_SRC)),), 3),
]


@pytest.mark.parametrize("action", FOREIGN, ids=str)
def test_an_action_of_somebody_else_comes_back_as_it_went(action: Action) -> None:
    data = codec.encode_action(action)
    assert len(data) % 8 == 0 and int.from_bytes(data[2:4], "big") == len(data)
    assert decoded(data) == (action,)


@pytest.mark.parametrize("action", [Ct(nat="nat"), Aside("meter:1"), Raw(text="exit"), Clone((Raw(b"x"),))], ids=str)
def test_what_cannot_be_sent_is_refused(action: Action) -> None:
    with pytest.raises(CodecError):
        codec.encode_action(action)


def from_os_ken(action: Any) -> tuple[Action, ...]:
    """What we make of an action that os-ken writes."""
    buf = bytearray()
    action.serialize(buf, 0)
    return decoded(bytes(buf))


NAT = parser.NXActionNAT(flags=1, range_ipv4_min="1.2.3.4", range_ipv4_max="1.2.3.5")
OS_KEN: list[tuple[Any, Action]] = [
    (parser.OFPActionPopVlan(), PopVlan()),
    (parser.OFPActionDecNwTtl(), DecTtl()),
    (parser.NXActionDecTtl(), DecTtl()),
    (parser.OFPActionSetNwTtl(5), SetField(fields.IP_TTL.header, 5)),
    (parser.OFPActionSetQueue(7), Aside("set_queue:7")),
    (parser.NXActionNote([1, 2]), Aside("note:01.02.00.00.00.00")),
    (parser.NXActionPopQueue(), Aside("pop_queue")),
    (parser.NXActionCTClear(), CtClear()),
    (parser.NXActionOutputTrunc(5, 100), Output(5, 100)),
    (parser.NXActionCT(1, "", 5, 3, 0, []), Ct(5, 3, True)),
    (parser.NXActionCT(0, "reg0", 15, 3, 0, []), Ct(Bits(fields.REGS[0].header, 0, 16), 3)),
    (parser.NXActionCT(1, "", 0, 255, 0, [NAT]), Ct(commit=True, nat="nat(src=1.2.3.4-1.2.3.5)")),
    (parser.NXActionCT(1, "", 0, 255, 0, [parser.NXActionNAT(flags=0)]), Ct(commit=True, nat="nat")),
    (
        parser.NXActionLearn(9, [parser.NXFlowSpecOutput(("in_port_nxm", 0), n_bits=16, dst="")], 1, 2, 3, 4, 0, 5, 6),
        Learn(9, 3, 4, 1, 2, 0, (LearnOutput(Bits(fields.IN_PORT_16.header, 0, 16)),), 0, 5, 6),
    ),
]


@pytest.mark.parametrize("theirs, ours", OS_KEN, ids=lambda value: type(value).__name__)
def test_what_os_ken_writes_is_read(theirs: Any, ours: Action) -> None:
    assert from_os_ken(theirs) == (ours,)


@pytest.mark.parametrize(
    "theirs",
    [
        parser.NXActionCT(1, "", 0, 255, 21, []),  # a helper
        parser.NXActionConjunction(0, 2, 1),
        parser.NXActionExit(),
        parser.NXActionResubmitTable(in_port=3, table_id=5),
        parser.NXActionController(5, 0, 0),
        parser.OFPActionGroup(5),
        parser.OFPActionPushVlan(0x8100),
        parser.OFPActionOutput(ofproto_v1_4.OFPP_TABLE),
        parser.NXActionFinTimeout(1, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_flow_values_cannot_say_is_kept_as_bytes(theirs: Any) -> None:
    (action,) = from_os_ken(theirs)
    assert isinstance(action, Raw) and action.data


def test_a_masked_write_is_a_load_for_each_run_of_bits() -> None:
    header = fields.REGS[1].header
    data = struct.pack("!HHIII", 25, 16, header & ~0xFF | 0x108, 0x81, 0x99)
    expected = (Load(1, Bits(header, 0, 1)), Load(0, Bits(header, 3, 2)), Load(1, Bits(header, 7, 1)))
    assert decoded(data) == expected


def set_oxm(header: int, value: int) -> bytes:
    """A set_field of one field, as on the wire."""
    body = header.to_bytes(4, "big") + value.to_bytes(header & 0xFF, "big")
    size = 4 + len(body) + -(4 + len(body)) % 8
    return struct.pack("!HH", 25, size) + body + bytes(size - 4 - len(body))


def test_writes_by_another_name_are_writes_of_the_fields_that_we_know() -> None:
    """The prover has no bits for these names: taken as they are it would not see the writes."""
    low, high = fields.REGS[1].header, fields.REGS[0].header
    assert decoded(set_oxm(fields.XREGS[0].header, 0x100000002)) == (SetField(low, 2), SetField(high, 1))
    tci = struct.pack("!HHIHHIQ", 0xFFFF, 24, 0x2320, 7, 0 << 6 | 15, fields.VLAN_TCI.header, 0x7005)
    assert decoded(tci) == (SetField(fields.VLAN_VID.header, 0x1005), SetField(fields.VLAN_PCP.header, 3))
    tos = struct.pack("!HHIHHIQ", 0xFFFF, 24, 0x2320, 7, 0 << 6 | 7, fields.IP_TOS.header, 184)
    assert decoded(tos) == (SetField(fields.IP_DSCP.header, 46),)
    part = struct.pack("!HHIHHIQ", 0xFFFF, 24, 0x2320, 7, 2 << 6 | 1, fields.IP_TOS.header, 1)
    assert decoded(part) == (Raw(part),)
    xregs = struct.pack("!HHIHHHHII", 0xFFFF, 24, 0x2320, 6, 64, 0, 0, fields.XREGS[0].header, fields.XREGS[1].header)
    assert decoded(xregs) == (
        Move(whole(fields.REGS[1]), whole(fields.REGS[3])),
        Move(whole(fields.REGS[0]), whole(fields.REGS[2])),
    )


def test_a_write_that_only_some_of_the_packets_get_is_not_taken_for_one_that_all_get() -> None:
    write = SetField(fields.IPV4_SRC.header, 0x01020304)
    data = codec.encode_action(write)
    assert decoded(data, Match.named(eth_type=0x0800)) == (write,)
    assert decoded(data) == decoded(data, Match.named(eth_type=0x0806)) == (Raw(text="set_field:1.2.3.4->ip_src"),)


def test_instructions_are_done_in_their_order_wherever_they_stand() -> None:
    goto = struct.pack("!HHB3x", 1, 8, 90)
    metadata = struct.pack("!HH4xQQ", 2, 24, 0x5, 0xF)
    output = codec.encode_action(Output(1))
    apply = struct.pack("!HH4x", 4, 8 + len(output)) + output
    meter = struct.pack("!HHI", 6, 8, 7)
    clear = struct.pack("!HH4x", 5, 8)
    write = struct.pack("!HH4x", 3, 8 + len(output)) + output
    flow = codec.decode_flow_stats(entry(goto + write + metadata + clear + apply + meter)).flow
    load = Load(5, Bits(fields.METADATA.header, 0, 4))
    assert flow.actions == (Aside("meter:7"), Output(1), Aside("clear_actions"), Raw(write), load)
    assert flow.goto == 90


def test_a_learn_action_that_is_not_quite_ours_never_equals_ours() -> None:
    data = bytearray(codec.encode_action(LEARNS[0]))
    seen = {decoded(bytes(data))}
    for at in (10, 12, 14, 16, 25, 26, 29, 31, 35, 37):
        changed = bytearray(data)
        changed[at] ^= 2
        seen.add(decoded(bytes(changed)))
    assert len(seen) == 11 and (LEARNS[0],) in seen


def test_actions_inside_each_other_are_read_so_deep_and_no_deeper() -> None:
    data = b""
    for _ in range(2000):
        data = struct.pack("!HHIH6x", 0xFFFF, 16 + len(data), 0x2320, 42) + data
    (action,) = decoded(data)
    depth = 0
    while isinstance(action, Clone):
        (action,), depth = action.actions, depth + 1
    assert isinstance(action, Raw) and depth == 32


def test_ethernet_is_no_match_and_tcp_flags_have_an_experimenters_number() -> None:
    """As Open vSwitch answers: OpenFlow 1.5's packet type, and ONF's TCP flags of 1.3 and 1.4."""
    ethernet = struct.pack("!IHH", 0x8000 << 16 | 44 << 9 | 4, 0, 0)
    flags = struct.pack("!IIHH", 0xFFFF << 16 | 42 << 9 | 0x100 | 8, 0x4F4E4600, 0x2, 0x12)
    for body, match in ((ethernet, Match()), (flags, Match.named(tcp_flags=(0x2, 0x12)))):
        data = struct.pack("!HH", 1, 4 + len(body)) + body
        assert codec.decode_match(data + bytes(-len(data) % 8), 0)[0] == match


def test_nicira_spellings_of_what_we_send_are_recognised() -> None:
    """Open vSwitch answers set_field with reg_load, and OXM fields inside actions with NXM ones."""
    load = struct.pack("!HHIHHIQ", 0xFFFF, 24, 0x2320, 7, 0 << 6 | 31, fields.REGS[1].header, 5)
    assert decoded(load) == (SetField(fields.REGS[1].header, 5),)
    nxm_eth_src, nxm_eth_dst = 2 << 9 | 6, 1 << 9 | 6
    move = struct.pack("!HHIHHHHII", 0xFFFF, 24, 0x2320, 6, 48, 0, 0, nxm_eth_src, nxm_eth_dst)
    assert decoded(move) == (Move(whole(fields.ETH_SRC), whole(fields.ETH_DST)),)


# ------------------------------------------------------------------------------------------------------- flow statistics


@pytest.mark.parametrize("flow", COMPILED[::7] + [f for f in COMPILED if any(isinstance(a, Learn) for a in f.actions)])
def test_a_flow_comes_back_from_statistics_as_it_went(flow: Flow) -> None:
    """What os-ken makes of our flow mod, as a switch would send it back, is what we sent."""
    body = serialised(parsed(codec.flow_mod(flow, codec.ADD, XID)))[48:]
    head = struct.pack(
        "!HBxIIHHHHHxxQQQ",
        48 + len(body),
        flow.table,
        2,
        500_000_000,
        flow.priority,
        flow.idle_s,
        flow.hard_s,
        flow.flags | 0x1E,
        0,
        flow.cookie,
        10,
        1000,
    )
    assert codec.decode_flow_stats(head + body) == FlowStats(flow, 10, 1000, 2.5)


def test_flags_that_say_nothing_of_what_a_flow_does_are_left_out() -> None:
    assert codec.decode_flow_stats(entry()).flow.flags == SEND_FLOW_REM


# --------------------------------------------------------------------------------------------------- requests, by bytes


def test_requests_are_what_os_ken_would_send() -> None:
    ofp = ofproto_v1_4
    assert codec.barrier(XID) == serialised(parser.OFPBarrierRequest(DATAPATH))
    assert codec.flow_stats_request(XID) == serialised(parser.OFPFlowStatsRequest(DATAPATH))
    assert codec.flow_stats_request(XID, 100) == serialised(parser.OFPFlowStatsRequest(DATAPATH, table_id=100))
    assert codec.meter_config_request(XID) == serialised(
        parser.OFPMeterConfigStatsRequest(DATAPATH, 0, ofp.OFPM_CONTROLLER)
    )
    out = parser.OFPPacketOut(
        DATAPATH, ofp.OFP_NO_BUFFER, ofp.OFPP_CONTROLLER, [parser.OFPActionOutput(3, 0)], data=b"abcdef"
    )
    assert codec.packet_out(3, b"abcdef", XID) == serialised(out)
    flags = ofp.OFPFMF_ADD | ofp.OFPFMF_REMOVED | ofp.OFPFMF_MODIFY | ofp.OFPFMF_INSTRUCTIONS
    monitor = parser.OFPFlowMonitorRequest(DATAPATH, 0, 5, ofp.OFPP_ANY, ofp.OFPG_ANY, flags, ofp.OFPTT_ALL, 0)
    assert codec.flow_monitor_request(XID, 5) == serialised(monitor)


@pytest.mark.parametrize("modify", [False, True])
def test_the_controller_meter_is_what_os_ken_would_send(modify: bool) -> None:
    ofp = ofproto_v1_4
    flags = ofp.OFPMF_PKTPS | ofp.OFPMF_BURST | ofp.OFPMF_STATS
    command = ofp.OFPMC_MODIFY if modify else ofp.OFPMC_ADD
    bands = [parser.OFPMeterBandDrop(50, 60)]
    meter = parser.OFPMeterMod(DATAPATH, command, flags, ofp.OFPM_CONTROLLER, bands)
    assert codec.controller_meter(50, 60, XID, modify=modify) == serialised(meter)


def messages(data: bytes) -> Iterator[bytes]:
    """A stream cut into its messages."""
    while data:
        size = int.from_bytes(data[2:4], "big")
        yield data[:size]
        data = data[size:]


def test_a_bundle_opens_deletes_and_adds_and_leaves_the_commit_to_whoever_has_seen_the_barrier() -> None:
    ofp = ofproto_v1_4
    delete, add = COMPILED[:3], COMPILED[3:8]
    opening, *inside = messages(codec.bundle(0x10, delete, add, XID))
    both = ofp.OFPBF_ATOMIC | ofp.OFPBF_ORDERED
    assert opening == serialised(parser.OFPBundleCtrlMsg(DATAPATH, 0x10, ofp.OFPBCT_OPEN_REQUEST, both, []))
    expected = [(codec.DELETE_STRICT, flow) for flow in delete] + [(codec.ADD, flow) for flow in add]
    for data, (command, flow) in zip(inside, expected, strict=True):
        assert data[:8] == struct.pack("!BBHI", 5, ofp.OFPT_BUNDLE_ADD_MESSAGE, len(data), XID)
        assert data[8:16] == struct.pack("!IHH", 0x10, 0, both)
        assert data[16:] == codec.flow_mod(flow, command, XID)
    for kind in (ofp.OFPBCT_COMMIT_REQUEST, ofp.OFPBCT_DISCARD_REQUEST):
        control = parser.OFPBundleCtrlMsg(DATAPATH, 0x10, kind, both, [])
        assert codec.bundle_control(0x10, kind, XID) == serialised(control)
    assert (codec.OPEN, codec.COMMIT, codec.DISCARD) == (
        ofp.OFPBCT_OPEN_REQUEST,
        ofp.OFPBCT_COMMIT_REQUEST,
        ofp.OFPBCT_DISCARD_REQUEST,
    )


# --------------------------------------------------------------------------------------------------- what switches say


FLOW = Flow(60, 100, Match.named(eth_type=0x0800, ipv4_dst=5), (Output(2),), 90, int(Cookie(6, 1, learned=True)), 3, 4)


def update(event: int, flow: Flow = FLOW, reason: int = 0) -> bytes:
    """One full flow update (OpenFlow 1.4.1, 7.3.5.19)."""
    body = codec.encode_match(flow.match) + codec._instructions(flow.actions, flow.goto)
    head = struct.pack("!HHBBHHH4xQ", 24 + len(body), event, flow.table, reason, 3, 4, flow.priority, flow.cookie)
    return head + body


def removed_message(flow: Flow = FLOW, reason: int = 1) -> bytes:
    """A flow-removed message (OpenFlow 1.4.1, 7.4.2)."""
    head = struct.pack("!QHBBIIHHQQ", flow.cookie, flow.priority, reason, flow.table, 1, 2, 3, 4, 50, 5000)
    body = head + codec.encode_match(flow.match)
    return struct.pack("!BBHI", 5, 11, 8 + len(body), 0) + body


PUNT = Match.named(in_port=3, reg2=1)


def packet_in_message(data: bytes = b"frame") -> bytes:
    """A packet-in message (OpenFlow 1.4.1, 7.4.1)."""
    body = struct.pack("!IHBBQ", 0xFFFFFFFF, 99, 0, 100, 0xB01C) + codec.encode_match(PUNT) + bytes(2) + data
    return struct.pack("!BBHI", 5, 10, 8 + len(body), 0) + body


@pytest.mark.parametrize("event", [Update.INITIAL, Update.ADDED, Update.REMOVED, Update.MODIFIED])
def test_a_flow_update_is_read(event: Update) -> None:
    found = codec.decode_flow_update(update(event, reason=Reason.HARD))
    assert (found.event, found.flow, found.reason) == (event, FLOW, Reason.HARD)


@pytest.mark.parametrize("event", [Update.ABBREVIATED, Update.PAUSED, Update.RESUMED])
def test_a_flow_update_without_a_flow_is_read(event: Update) -> None:
    found = codec.decode_flow_update(struct.pack("!HHI", 8, event, 77))
    assert (found.event, found.flow) == (event, None)


def test_a_flow_removed_message_is_read_as_os_ken_reads_it() -> None:
    data = removed_message()
    found, theirs = codec.decode_flow_removed(data), parsed(data)
    assert (found.flow.table, found.flow.priority, found.flow.cookie) == (
        theirs.table_id,
        theirs.priority,
        theirs.cookie,
    )
    assert (found.reason, found.packets, found.octets) == (theirs.reason, theirs.packet_count, theirs.byte_count)
    assert found.flow.match == FLOW.match and found.flow.actions == ()
    check_match(theirs.match, found.flow.match)


def test_a_packet_in_message_is_read_as_os_ken_reads_it() -> None:
    data = packet_in_message()
    found, theirs = codec.decode_packet_in(data), parsed(data)
    assert (found.table, found.cookie, found.data, found.size) == (
        theirs.table_id,
        theirs.cookie,
        bytes(theirs.data),
        theirs.total_len,
    )
    assert found.match == PUNT
    check_match(theirs.match, found.match)


# ------------------------------------------------------------------------------------------------------------ nonsense


DECODERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "match": (lambda data: codec.decode_match(data, 0), codec.encode_match(FLOW.match)),
    "statistics": (
        codec.decode_flow_stats,
        entry(codec._instructions(tuple(ACTIONS), 90), Match.named(eth_type=0x0800, ipv4_dst=(5, 7))),
    ),
    "update": (codec.decode_flow_update, update(Update.ADDED)),
    "removed": (codec.decode_flow_removed, removed_message()),
    "packet-in": (codec.decode_packet_in, packet_in_message()),
}
decoders = pytest.mark.parametrize("name", DECODERS)


def tried(decode: Callable[[bytes], object], data: bytes) -> bool:
    """Whether bytes are read; anything but `CodecError` for those that are not is an error."""
    try:
        str(decode(data))
    except CodecError:
        return False
    return True


@decoders
def test_what_is_cut_short_is_refused(name: str) -> None:
    decode, data = DECODERS[name]
    assert tried(decode, data)
    for size in range(len(data)):
        whole_message = tried(decode, data[:size])
        # Padding and the data of a packet may be missing, nothing else.
        assert not whole_message or name in ("match", "packet-in", "removed"), size
        assert not whole_message or size > len(data) - 16


@decoders
@given(noise=st.binary(max_size=300))
def test_random_bytes_raise_nothing_else(name: str, noise: bytes) -> None:
    tried(DECODERS[name][0], noise)


@decoders
@given(seed=st.integers(0, 2**32))
def test_damaged_bytes_raise_nothing_else(name: str, seed: int) -> None:
    decode, data = DECODERS[name]
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 0xFF, rng.randrange(256)))
    tried(decode, bytes(damaged))


@given(st.binary(max_size=200))
def test_random_actions_are_kept_or_refused(noise: bytes) -> None:
    padded = noise + bytes(-len(noise) % 8)
    tried(codec.decode_flow_stats, entry(struct.pack("!HH4x", 4, 8 + len(padded)) + padded))


@given(st.integers(0, 63), st.binary(max_size=120))
def test_random_nicira_actions_are_kept_or_refused(subtype: int, noise: bytes) -> None:
    body = noise + bytes(-(len(noise) + 10) % 8)
    action = struct.pack("!HHIH", 0xFFFF, 10 + len(body), 0x2320, subtype) + body
    assert tried(codec.decode_flow_stats, entry(struct.pack("!HH4x", 4, 8 + len(action)) + action))


VALUES = st.sampled_from([of for of in BY_NAME.values() if of is not fields.IN_PORT_16])


@st.composite
def any_match(draw: st.DrawFn) -> Match:
    items = []
    for of in draw(st.lists(VALUES, unique=True, max_size=8)):
        mask = draw(st.integers(1, of.full)) if of.maskable else of.full
        items.append((of.header, draw(st.integers(0, of.full)) & mask, mask))
    return Match.of(items)


@given(any_match())
def test_any_match_comes_back_as_it_went(match: Match) -> None:
    body = codec.encode_match(match)
    assert codec.decode_match(body, 0) == (match, len(body))


@given(any_match(), st.integers(0, 254), st.integers(0, 0xFFFF), st.integers(0, (1 << 64) - 1))
def test_any_flow_comes_back_as_it_went(match: Match, table: int, priority: int, cookie: int) -> None:
    flow = Flow(table, priority, match, tuple(ACTIONS), 254, cookie, 3, 4, SEND_FLOW_REM)
    body = codec.flow_mod_body(flow, codec.ADD)[40:]
    head = struct.pack("!HBxIIHHHHHxxQQQ", 48 + len(body), table, 0, 0, priority, 3, 4, SEND_FLOW_REM, 0, cookie, 1, 2)
    assert codec.decode_flow_stats(head + body).flow == flow
