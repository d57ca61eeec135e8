"""What is read from rulesets, and what they do to packets. The texts are nft's and iptables' own."""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import Any

import pytest

from controller.verify.host.facts import NftChain, NftRule
from controller.verify.host.firewall import read_legacy, read_nft
from controller.verify.host.nft import Packet, forward_dropped, ingress_dropped, redirected

A_TO_B = Packet("vmbr0", "vmbr1", 4, (ip_network("10.1.0.0/24"),))


def meta(key: str, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}}


def daddr(right: Any, op: str = "==", protocol: str = "ip") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": "daddr"}}, "right": right}}


def prefix(address: str, length: int) -> dict[str, Any]:
    return {"prefix": {"addr": address, "len": length}}


def to(chain: str, how: str = "jump") -> dict[str, Any]:
    return {how: {"target": chain}}


def vmap(key: Any, *pairs: list[Any]) -> dict[str, Any]:
    return {"vmap": {"key": key, "data": {"set": list(pairs)}}}


IIF, OIF = meta("iifname", "vmbr0"), meta("oifname", "vmbr1")
OTHER, SAME = meta("iifname", "eth0"), meta("iifname", "vmbr*")
IIF_KEY, CONCAT = {"meta": {"key": "iifname"}}, {"concat": [{"meta": {"key": "iifname"}}, {"meta": {"key": "oifname"}}]}
MAYBE = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}
DROP: dict[str, Any] = {"drop": None}
ACCEPT: dict[str, Any] = {"accept": None}
RETURN: dict[str, Any] = {"return": None}
COUNTER: dict[str, Any] = {"counter": {"packets": 0, "bytes": 0}}

RULESETS: dict[str, tuple[bool, str, list[list[dict[str, Any]]]]] = {
    # name: dropped for sure, the chain's policy, its rules
    "policy drop": (True, "drop", []),
    "policy accept": (False, "accept", []),
    "a drop": (True, "accept", [[DROP]]),
    "a drop that is rejected": (True, "accept", [[COUNTER, {"reject": {"type": "icmpx"}}]]),
    "a drop of others": (False, "accept", [[OTHER, DROP]]),
    "a drop between them": (True, "accept", [[IIF, OIF, COUNTER, DROP]]),
    "a drop by a wildcard": (True, "accept", [[SAME, DROP]]),
    "a drop of some": (False, "accept", [[MAYBE, DROP]]),
    "a drop with a limit": (False, "accept", [[{"limit": {"rate": 1, "per": "second"}}, DROP]]),
    "an accept before": (False, "accept", [[IIF, ACCEPT], [DROP]]),
    "an accept of some before": (False, "drop", [[MAYBE, ACCEPT]]),
    "an accept of others before": (True, "drop", [[OTHER, ACCEPT], [DROP]]),
    "an accept after": (True, "accept", [[DROP], [ACCEPT]]),
    "all but others": (True, "accept", [[meta("iifname", "eth0", "!="), DROP]]),
    "all but these": (False, "accept", [[meta("iifname", "vmbr0", "!="), DROP]]),
    "of a set": (True, "accept", [[meta("iifname", {"set": ["vmbr0", "vmbr1"]}), DROP]]),
    "of a set that is not known": (False, "accept", [[meta("iifname", "@ours"), DROP]]),
    "of all but a set that is not known": (False, "accept", [[meta("iifname", "@ours", "!="), DROP]]),
    "to the target": (True, "accept", [[daddr(prefix("10.1.0.0", 16)), DROP]]),
    "to half of the target": (False, "accept", [[daddr(prefix("10.1.0.0", 25)), DROP]]),
    "to a range": (True, "accept", [[daddr({"range": ["10.0.0.0", "10.1.255.255"]}), DROP]]),
    "to all but another": (True, "accept", [[daddr(prefix("10.2.0.0", 16), "!="), DROP]]),
    "to another, accepted": (True, "drop", [[daddr("1.2.3.4"), ACCEPT]]),
    "to one of it, accepted": (False, "drop", [[daddr("10.1.0.7"), ACCEPT]]),
    "of IPv6": (False, "accept", [[daddr(prefix("::", 0), protocol="ip6"), DROP]]),
    "the target is rewritten": (
        False,
        "accept",
        [[{"mangle": {"key": {"payload": {"protocol": "ip", "field": "daddr"}}, "value": "1.2.3.4"}}],
         [daddr(prefix("10.1.0.0", 16)), DROP]],
    ),
    "a mark is set": (True, "accept", [[{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}, DROP]]),
    "this family": (True, "accept", [[meta("nfproto", "ipv4"), DROP]]),
    "the other family": (False, "accept", [[meta("nfproto", "ipv6"), DROP]]),
    "a jump": (True, "accept", [[IIF, to("drops")]]),
    "a jump of some": (False, "accept", [[MAYBE, to("drops")]]),
    "a jump that returns": (True, "accept", [[to("returns")], [DROP]]),
    "a jump that accepts": (False, "drop", [[to("accepts")]]),
    "a jump deeper": (True, "accept", [[to("deeper")]]),
    "a goto that returns": (False, "accept", [[to("returns", "goto")], [DROP]]),
    "a goto that returns to a policy": (True, "drop", [[to("returns", "goto")], [ACCEPT]]),
    "a jump nowhere": (False, "drop", [[to("nowhere")]]),
    "a jump around": (False, "drop", [[to("around")]]),
    "a return before": (False, "accept", [[RETURN], [DROP]]),
    "a return of some before": (False, "accept", [[MAYBE, RETURN], [DROP]]),
    "a return of some to a policy": (True, "drop", [[MAYBE, RETURN], [DROP]]),
    "a continue": (True, "accept", [[{"continue": None}], [DROP]]),
    "a verdict map": (True, "accept", [[vmap(IIF_KEY, ["eth0", ACCEPT], ["vmbr0", DROP])]]),
    "a verdict map that accepts": (False, "drop", [[vmap(IIF_KEY, ["vmbr0", ACCEPT])]]),
    "a verdict map of others": (True, "drop", [[vmap(IIF_KEY, ["eth0", ACCEPT])]]),
    "a verdict map with a jump": (True, "accept", [[vmap(IIF_KEY, ["vmbr*", to("drops")])]]),
    "a verdict map of pairs": (True, "accept", [[vmap(CONCAT, [{"concat": ["vmbr0", "vmbr1"]}, DROP])]]),
    "a verdict map of other pairs": (False, "accept", [[vmap(CONCAT, [{"concat": ["vmbr1", "vmbr0"]}, DROP])]]),
    "a verdict map for the rest": (False, "drop", [[vmap(IIF_KEY, ["*", ACCEPT])]]),
    "a verdict map of states": (False, "drop", [[vmap({"ct": {"key": "state"}}, ["established", ACCEPT])]]),
    "a verdict map that drops some states": (
        False, "accept", [[vmap({"ct": {"key": "state"}}, ["established", DROP])]]),
    "a verdict map that is not known": (False, "drop", [[{"vmap": {"key": IIF_KEY, "data": "@pairs"}}]]),
    "a match of iptables": (False, "accept", [[{"xt": {"type": "match", "name": "comment"}}, DROP]]),
    "a target of iptables": (False, "drop", [[{"xt": {"type": "target", "name": "X"}}]]),
    "what decides and is not known": (False, "drop", [[{"queue": {"num": 0}}]]),
}  # fmt: skip
CALLED = {
    "drops": [[DROP]],
    "returns": [[RETURN]],
    "accepts": [[MAYBE, ACCEPT]],
    "deeper": [[to("returns")], [OTHER, ACCEPT], [to("drops", "goto")]],
    "around": [[to("around")]],
}


def chains(policy: str, rules: list[list[dict[str, Any]]], family: str = "inet", **more: Any) -> list[NftChain]:
    def made(rules: list[list[dict[str, Any]]]) -> tuple[NftRule, ...]:
        return tuple(NftRule(tuple(parts)) for parts in rules)

    hook = {"hook": "forward", **more}
    return [
        NftChain(family, "t", "base", policy=policy, rules=made(rules), **hook),
        *(NftChain(family, "t", name, rules=made(held)) for name, held in CALLED.items()),
    ]


@pytest.mark.parametrize("name", RULESETS)
def test_what_a_ruleset_is_sure_to_drop(name: str) -> None:
    dropped, policy, rules = RULESETS[name]
    assert (forward_dropped(chains(policy, rules), A_TO_B) is not None) is dropped


def test_one_chain_that_drops_is_enough_whatever_others_accept() -> None:
    both = [NftChain("inet", "other", "c", "forward", "accept", (), (NftRule((ACCEPT,)),)), *chains("drop", [])]
    assert forward_dropped(both, A_TO_B) == "inet t base"


@pytest.mark.parametrize("family, version, dropped", [
    ("inet", 4, True), ("ip", 4, True), ("ip6", 4, False), ("bridge", 4, False), ("netdev", 4, False),
    ("inet", 6, True), ("ip", 6, False), ("ip6", 6, True),
])  # fmt: skip
def test_a_chain_counts_for_its_family(family: str, version: int, dropped: bool) -> None:
    packet = Packet("vmbr0", "vmbr1", version, ())
    assert (forward_dropped(chains("drop", [], family), packet) is not None) is dropped


@pytest.mark.parametrize("hook", ["", "input", "output", "prerouting", "postrouting", "ingress"])
def test_only_the_forward_hook_counts(hook: str) -> None:
    assert forward_dropped(chains("drop", [], hook=hook), A_TO_B) is None


def test_an_ingress_chain_counts_for_its_device() -> None:
    held = chains("drop", [], "netdev", hook="ingress", devices=("veth1", "veth2"))
    assert ingress_dropped(held, "veth2")
    assert not ingress_dropped(held, "veth3")
    assert not ingress_dropped(chains("drop", [[ACCEPT]], "netdev", hook="ingress", devices=("veth1",)), "veth1")
    assert not ingress_dropped(chains("drop", [], "netdev", hook="egress", devices=("veth1",)), "veth1")


def test_a_redirect_in_a_chain_that_is_jumped_to() -> None:
    jumped = NftChain("netdev", "t", "deep", rules=(NftRule(({"dup": {"addr": "eth0"}},), 9),))
    held = [*chains("accept", [[to("deep")]], "netdev", hook="ingress", devices=("veth1",)), jumped]
    assert redirected(held, ["veth1"]) == [(jumped, jumped.rules[0])]
    assert redirected(held, ["eth0"]) == [(jumped, jumped.rules[0])]
    assert redirected(held, ["veth2"]) == []


LISTED = {"nftables": [
    {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
    {"table": {"family": "inet", "name": "t", "handle": 1}},
    {"set": {"family": "inet", "name": "s", "table": "t", "type": "ifname", "handle": 2, "elem": ["vmbr0", "vmbr1"]}},
    {"set": {"family": "inet", "name": "d", "table": "t", "type": "ifname", "flags": ["timeout"], "elem": ["vmbr0"]}},
    {"map": {"family": "inet", "name": "m", "table": "t", "type": ["ifname", "ifname"], "map": "verdict",
             "elem": [[{"concat": ["vmbr0", "vmbr1"]}, {"drop": None}]]}},
    {"chain": {"family": "inet", "table": "t", "name": "c", "handle": 1, "type": "filter", "hook": "forward", "prio": 0,
               "policy": "accept"}},
    {"chain": {"family": "netdev", "table": "n", "name": "i", "handle": 1, "type": "filter", "hook": "ingress",
               "prio": -5, "policy": "drop"}},
    {"rule": {"family": "inet", "table": "t", "chain": "c", "handle": 3, "expr": [meta("iifname", "@s"), "notrack"]}},
    {"rule": {"family": "inet", "table": "t", "chain": "c", "handle": 4, "expr": [meta("iifname", "@d"), DROP]}},
    {"rule": {"family": "inet", "table": "t", "chain": "c", "handle": 5,
              "expr": [{"vmap": {"key": CONCAT, "data": "@m"}}]}},
]}  # fmt: skip
TEXT = """table inet t {
	set s {
		type ifname
	}

	chain c {
		type filter hook forward priority filter; policy accept;
	}
}
table netdev n {
	chain i {
		type filter hook ingress %s priority filter - 5; policy drop;
	}
}
"""


def test_nfts_json_is_read_with_what_only_its_text_says() -> None:
    (forward, ingress) = read_nft(json.dumps(LISTED), TEXT % 'devices = { veth1, "veth2" }')
    assert (forward.title, forward.hook, forward.policy) == ("inet t c", "forward", "accept")
    assert [rule.handle for rule in forward.rules] == [3, 4, 5]
    assert forward.rules[0].parts == (meta("iifname", {"set": ["vmbr0", "vmbr1"]}), {"notrack": None})
    assert forward.rules[1].parts[0] == meta("iifname", "@d"), "its elements go away by themselves"
    assert forward_dropped((forward,), A_TO_B) == "inet t c"
    assert ingress.devices == ("veth1", "veth2")
    (_, ingress) = read_nft(json.dumps(LISTED), TEXT % 'device "veth1"')
    assert ingress.devices == ("veth1",)


def test_a_table_that_sleeps_has_no_hooks() -> None:
    text = (TEXT % 'device "veth1"').replace("table inet t {", "table inet t {\n\tflags owner,dormant\n")
    (forward, ingress) = read_nft(json.dumps(LISTED), text)
    assert (forward.hook, ingress.hook) == ("", "ingress")
    assert forward_dropped((forward,), A_TO_B) is None


LEGACY = """# Generated by iptables-save v1.8.9 on Wed Nov 25 06:14:22 2026
*filter
:INPUT ACCEPT [0:0]
:FORWARD %s [0:0]
:OUTPUT ACCEPT [0:0]
:X - [0:0]
%s
COMMIT
# Completed on Wed Nov 25 06:14:22 2026
"""


@pytest.mark.parametrize(
    "policy, rules, dropped",
    [
        ("DROP", "", True),
        ("ACCEPT", "", False),
        ("ACCEPT", "-A FORWARD -i vmbr+ -o vmbr1 -j DROP", True),
        ("ACCEPT", "-A FORWARD -i vmbr0 -o vmbr1 -j REJECT --reject-with icmp-port-unreachable", True),
        ("ACCEPT", "-A FORWARD ! -i eth0 -j DROP", True),
        ("ACCEPT", "-A FORWARD ! -i vmbr0 -j DROP", False),
        ("ACCEPT", "-A FORWARD -d 10.1.0.0/16 -j DROP", True),
        ("ACCEPT", "-A FORWARD -s 10.0.0.0/24 -j DROP", False),
        ("ACCEPT", '-A FORWARD -m comment --comment "-i x -j DROP" -j ACCEPT\n-A FORWARD -j DROP', False),
        ("DROP", "-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT", False),
        ("DROP", "-A FORWARD -i eth0 -j ACCEPT", True),
        ("DROP", "-A FORWARD -j LOG --log-prefix x", True),
        ("DROP", "-A FORWARD -j NFQUEUE --queue-num 0", False),
        ("ACCEPT", "-A FORWARD -j X\n-A X -o eth0 -j RETURN\n-A X -j DROP", True),
        ("ACCEPT", "-A FORWARD -g X\n-A FORWARD -j DROP", False),
        ("ACCEPT", "-A INPUT -j DROP", False),
    ],
)
def test_the_old_iptables_in_the_same_terms(policy: str, rules: str, dropped: bool) -> None:
    read = read_legacy(LEGACY % (policy, rules), "ip")
    assert (forward_dropped(read, A_TO_B) is not None) is dropped
