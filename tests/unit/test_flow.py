"""Flows, matches, actions and cookies as values, and how they print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller import fields
from controller.fields import BY_NAME
from controller.flow import (
    OWNER,
    OWNER_MASK,
    SEND_FLOW_REM,
    Bits,
    Cookie,
    Flow,
    Learn,
    LearnLoad,
    LearnMatch,
    Load,
    Match,
    Move,
    Output,
    Raw,
    Resubmit,
    SetField,
    is_learned,
    is_ours,
    match_item,
    whole,
)
from controller.model import Ipv4, Mac, Prefix

WEB = Match.named(eth_type=0x0800, ip_proto=6, ipv4_dst=(0x0A000000, 0xFFFFFF00), tcp_dst=80)


def test_equal_matches_are_equal_whatever_the_order() -> None:
    items = list(WEB)
    assert Match.of(reversed(items)) == WEB and hash(Match.of(reversed(items))) == hash(WEB)
    assert Match.named(tcp_dst=80, ip_proto=6, eth_type=0x0800, ipv4_dst=(0x0A000000, 0xFFFFFF00)) == WEB


def test_a_field_with_an_empty_mask_matches_everything_and_is_left_out() -> None:
    assert Match.named(ipv4_dst=(0, 0), eth_type=0x0800) == Match.named(eth_type=0x0800)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tcp_dst", 0x10000),
        ("tcp_dst", -1),
        ("ipv4_dst", (0x0A000001, 0xFFFFFF00)),
        ("ip_proto", (0, 0x0F)),
        ("in_port", (1, 0xFFFF)),
        ("vlan_vid", 0x2000),
        ("eth_dst", (1, 1 << 48 | 1)),
        ("tcp_dst", "80"),
        ("tcp_dst", (80, None)),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        match_item(BY_NAME[name], value)


def test_an_unknown_field_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Match.named(no_such_field=1)


def test_get_finds_value_and_mask() -> None:
    assert WEB.get(fields.TCP_DST) == (80, 0xFFFF)
    assert WEB.get(fields.IPV4_DST) == (0x0A000000, 0xFFFFFF00)
    assert WEB.get(fields.UDP_DST) is None


@pytest.mark.parametrize(
    "one, other, meet",
    [
        ({"tcp_dst": 80}, {"tcp_dst": 81}, False),
        ({"tcp_dst": 80}, {"tcp_src": 81}, True),
        ({}, {"tcp_dst": 80}, True),
        ({"ipv4_dst": (0x0A000000, 0xFF000000)}, {"ipv4_dst": 0x0A010203}, True),
        ({"ipv4_dst": (0x0A000000, 0xFF000000)}, {"ipv4_dst": 0x0B010203}, False),
        ({"reg0": (1, 1)}, {"reg0": (2, 2)}, True),
        ({"reg0": (1, 1)}, {"reg0": (2, 3)}, False),
    ],
)
def test_overlaps(one: dict[str, object], other: dict[str, object], meet: bool) -> None:
    first, second = Match.named(**one), Match.named(**other)
    assert first.overlaps(second) is meet is second.overlaps(first)


SMALL = st.dictionaries(st.sampled_from(("reg0", "reg1")), st.tuples(st.integers(0, 7), st.integers(0, 7)))


@given(SMALL, SMALL)
def test_overlaps_is_what_trying_every_packet_says(
    one: dict[str, tuple[int, int]], other: dict[str, tuple[int, int]]
) -> None:
    first, second = (Match.named(**{n: (v & m, m) for n, (v, m) in side.items()}) for side in (one, other))

    def hit(match: Match, packet: dict[int, int]) -> bool:
        return all(packet[header] & mask == value for header, value, mask in match)

    packets = [{fields.REGS[0].header: a, fields.REGS[1].header: b} for a in range(8) for b in range(8)]
    assert first.overlaps(second) == any(hit(first, p) and hit(second, p) for p in packets)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 0xFFFF), SMALL), min_size=2, max_size=5))
def test_two_flows_have_one_key_if_and_only_if_table_priority_and_match_are_equal(
    drawn: list[tuple[int, int, dict[str, tuple[int, int]]]],
) -> None:
    flows = [
        Flow(table, priority, Match.named(**{n: (v & m, m) for n, (v, m) in match.items()}), (Output(n),), None, n)
        for n, (table, priority, match) in enumerate(drawn)
    ]
    for one in flows:
        for other in flows:
            same = (one.table, one.priority, one.match) == (other.table, other.priority, other.match)
            assert (one.key == other.key) == same


def test_effect_is_what_happens_and_not_who_did_it() -> None:
    one = Flow(1, 2, WEB, (Output(1),), 9, cookie=1)
    assert one.effect == Flow(3, 4, Match(), (Output(1),), 9, cookie=2).effect
    assert one.effect != Flow(1, 2, WEB, (Output(1),), None, cookie=1).effect


# ------------------------------------------------------------------------------------------------------------ printing


@pytest.mark.parametrize(
    "match, text",
    [
        ({}, ""),
        ({"eth_type": 0x0800}, "ip"),
        ({"eth_type": 0x0806, "arp_op": 1, "arp_tpa": 0x0A000001}, "arp,arp_op=1,arp_tpa=10.0.0.1"),
        ({"eth_type": 0x0800, "ip_proto": 6, "tcp_dst": 80}, "tcp,tcp_dst=80"),
        ({"eth_type": 0x0800, "ip_proto": 47}, "ip,ip_proto=47"),
        ({"eth_type": 0x88CC}, "eth_type=0x88cc"),
        ({"eth_type": 0x86DD, "ip_proto": 58, "icmpv6_type": 134}, "icmp6,icmpv6_type=134"),
        ({"eth_type": 0x0800, "ipv4_src": (0x0A000000, 0xFF000000)}, "ip,ip_src=10.0.0.0/8"),
        ({"eth_type": 0x0800, "ipv4_src": (0x0A000001, 0xFF0000FF)}, "ip,ip_src=10.0.0.1/255.0.0.255"),
        ({"eth_dst": (0x0180C2000000, 0xFFFFFFFFFFF0)}, "eth_dst=01:80:c2:00:00:00/ff:ff:ff:ff:ff:f0"),
        ({"in_port": fields.LOCAL}, "in_port=LOCAL"),
        ({"vlan_vid": (0x1000, 0x1000)}, "vlan_vid=0x1000/0x1000"),
        ({"reg0": 5}, "reg0=0x5"),
        ({"ip_frag": (1, 3), "eth_type": 0x0800}, "ip,nw_frag=first"),
    ],
)
def test_a_match_prints_as_ovs_ofctl_writes_it(match: dict[str, object], text: str) -> None:
    assert str(Match.named(**match)) == text


@pytest.mark.parametrize(
    "action, text",
    [
        (Output(7), "output:7"),
        (Output(fields.IN_PORT), "IN_PORT"),
        (Output(fields.LOCAL), "LOCAL"),
        (Output(fields.NORMAL), "NORMAL"),
        (Output(fields.FLOOD), "FLOOD"),
        (Output(fields.CONTROLLER, 128), "CONTROLLER:128"),
        (SetField(fields.ETH_DST.header, 0x020000000001), "set_field:02:00:00:00:00:01->eth_dst"),
        (SetField(fields.IPV4_DST.header, 0x0A000001), "set_field:10.0.0.1->ip_dst"),
        (Load(3, Bits(fields.REGS[1].header, 0, 16)), "load:0x3->reg1[0..15]"),
        (Load(1, Bits(fields.REGS[1].header, 4, 1)), "load:0x1->reg1[4]"),
        (Move(whole(fields.ARP_SPA), whole(fields.ARP_TPA)), "move:arp_spa[]->arp_tpa[]"),
        (Resubmit(60), "resubmit(,60)"),
        (Raw(b"\x01\xff"), "raw(01ff)"),
    ],
)
def test_an_action_prints_as_ovs_ofctl_writes_it(action: object, text: str) -> None:
    assert str(action) == text


def test_a_learn_action_prints_whole() -> None:
    learn = Learn(
        60,
        100,
        0xB01C860000000001,
        300,
        600,
        4096,
        (
            LearnMatch(whole(fields.ETH_TYPE), 0x0800),
            LearnMatch(whole(fields.IPV4_DST), whole(fields.IPV4_SRC)),
            LearnLoad(Bits(fields.IN_PORT_16.header, 0, 16), Bits(fields.REGS[1].header, 0, 16)),
            LearnLoad(1, whole(fields.REGS[3])),
        ),
    )
    assert str(learn) == (
        "learn(table=60,idle_timeout=300,hard_timeout=600,priority=100,send_flow_rem,cookie=0xb01c860000000001,limit=4096,"
        "eth_type=0x800,ip_dst[]=ip_src[],load:NXM_OF_IN_PORT[]->reg1[0..15],load:0x1->reg3[])"
    )


def test_a_flow_prints_whole() -> None:
    flow = Flow(40, 400, WEB, (SetField(fields.REGS[2].header, 1),), 100, 0xB01C000000000001, 3, 5, SEND_FLOW_REM)
    assert str(flow) == (
        "table=40,priority=400,cookie=0xb01c000000000001,idle_timeout=3,hard_timeout=5,send_flow_rem,"
        "tcp,ip_dst=10.0.0.0/24,tcp_dst=80,actions=set_field:0x1->reg2,goto_table:100"
    )
    assert str(Flow(1, 0, Match())) == "table=1,priority=0,actions=drop"


# ------------------------------------------------------------------------------------------------------------- cookies


@given(st.integers(0, 127), st.integers(0, (1 << 40) - 1), st.booleans())
def test_a_cookie_comes_apart_as_it_was_put_together(app: int, of: int, learned: bool) -> None:
    cookie = Cookie(app, of, learned)
    assert Cookie.of(int(cookie)) == cookie
    assert is_ours(int(cookie)) and is_learned(int(cookie)) == learned
    assert int(cookie) & OWNER_MASK == OWNER << 48


@given(st.integers(0, (1 << 64) - 1).filter(lambda cookie: cookie >> 48 != OWNER))
def test_any_other_cookie_is_not_ours(cookie: int) -> None:
    assert Cookie.of(cookie) is None and not is_ours(cookie) and not is_learned(cookie)


# ----------------------------------------------------------------------------------------------------------- addresses


def test_addresses_print_themselves_and_refuse_what_they_are_not() -> None:
    assert str(Mac.parse("02-00-00-00-00-0A")) == "02:00:00:00:00:0a" and repr(Mac(1)) == "Mac('00:00:00:00:00:01')"
    assert str(Ipv4.parse("10.0.0.1")) == "10.0.0.1" and repr(Ipv4(1)) == "Ipv4('0.0.0.1')"
    for text in ("10.0.0", "10.0.0.256", "::1", "", "010.0.0.1.2"):
        with pytest.raises(ValueError, match="IPv4"):
            Ipv4.parse(text)
    for text in ("02:00:00:00:00", "", "xx:00:00:00:00:00"):
        with pytest.raises(ValueError, match="Ethernet"):
            Mac.parse(text)
    with pytest.raises(ValueError, match="prefix"):
        Prefix.parse("10.0.0.0/33")


def test_a_derived_mac_is_local_and_unicast_and_depends_on_every_part() -> None:
    one = Mac.derive("privacy", "gateway")
    assert one >> 40 & 3 == 2
    assert one == Mac.derive("privacy", "gateway") != Mac.derive("management", "gateway")


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 32), st.integers(0, 0xFFFFFFFF), st.integers(0, 32))
def test_prefixes_overlap_if_an_address_lies_in_both(a: int, m: int, b: int, n: int) -> None:
    one, other = Prefix.parse(f"{Ipv4(a)}/{m}"), Prefix.parse(f"{Ipv4(b)}/{n}")
    assert Ipv4(a) in one and one.mask.bit_count() == m
    assert one.overlaps(other) == other.overlaps(one) == (a >> (32 - min(m, n)) == b >> (32 - min(m, n)))
    assert not one.__contains__("x")
