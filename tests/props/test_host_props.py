"""Laws of what is said of a host: nothing that a tool prints makes it fall over, and a drop that is claimed is one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from ipaddress import ip_network
from itertools import product
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from controller.verify.host.checks import CHECKS, exit_code, judge
from controller.verify.host.facts import Gap, NftChain, NftRule
from controller.verify.host.findings import Status
from controller.verify.host.firewall import read_legacy, read_nft
from controller.verify.host.gather import (
    gather,
    parsed,
    read_flows,
    read_links,
    read_ovs,
    read_redirects,
    read_routes,
    read_rules,
    read_wireguard,
)
from controller.verify.host.nft import Packet, forward_dropped, ingress_dropped, redirected
from tests.fakes.states import two_networks
from tests.unit.test_host_nft import LISTED, TEXT

STATE = two_networks()

_WORDS = (
    "nftables", "chain", "rule", "set", "map", "expr", "match", "left", "right", "op", "==", "!=", "in", "meta",
    "key", "iifname", "oifname", "payload", "daddr", "ip", "vmbr0", "vmbr1", "10.0.0.1", "prefix", "addr",
    "len", "vmap", "data", "elem", "concat", "drop", "accept", "jump", "goto", "target", "forward", "hook",
    "policy", "inet", "t", "c", "family", "table", "name", "dev", "dst", "default", "gateway", "nexthops",
    "nhid", "type", "unicast", "ifname", "ifindex", "linkinfo", "info_kind", "addr_info", "local", "prefixlen",
    "link", "link_index", "priority", "src", "srclen", "headings", "uuid", "_uuid", "interfaces", "not", "-1",
    "0", "@s", "*", "mangle", "val", "range",
)  # fmt: skip
_leaves = st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.sampled_from(_WORDS), st.text(max_size=5))
_json = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=6),
    max_leaves=40,
)
_printed = st.one_of(
    st.text(max_size=60), _json.map(json.dumps), st.lists(_json, max_size=4).map(json.dumps), st.just(""), st.just("[]")
)
_rulesets = st.lists(st.dictionaries(st.sampled_from(("chain", "rule", "set", "map", "table")), _json), max_size=5).map(
    lambda items: json.dumps({"nftables": items})
)


@given(_printed | _rulesets, st.text(max_size=80))
@example("[" * 100_000, "")
@example('[{"priority": "x"}]', "")
def test_no_reader_raises(printed: str, text: str) -> None:
    readers: Sequence[Any] = (
        read_ovs, read_flows, read_links, read_wireguard, partial(read_routes, "::/0"), partial(read_rules, "::/0"),
        lambda held: read_nft(held, text), partial(read_legacy, family="ip"),
        lambda held: read_redirects(held, "x", "root"),
    )  # fmt: skip
    for reader in readers:
        parsed("what", printed, reader)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in inner:
        yield from _places(held, (*path, key))


def _with(value: Any, path: tuple[Any, ...], put: Any) -> Any:
    if not path:
        return put
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _with(value[path[0]], path[1:], put)
    return copy


@given(st.sampled_from(sorted(_places(LISTED), key=repr)), _json)
def test_a_ruleset_with_one_thing_wrong_is_a_gap_or_is_followed(path: tuple[Any, ...], put: Any) -> None:
    told = parsed("nft", json.dumps(_with(LISTED, path, put)), lambda text: read_nft(text, TEXT % 'device "vmbr0"'))
    if not isinstance(told, Gap):
        forward_dropped(told, Packet("vmbr0", "vmbr1", 4, (ip_network("10.1.0.0/24"),)))
        ingress_dropped(told, "vmbr0")
        redirected(told, ["vmbr0"])


class Garbage:
    """Tools that print what a test draws for each command."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def run(self, *command: str) -> str | Gap:
        gaps = st.builds(Gap, st.just("it failed"), st.just("mend it"), st.booleans())
        return self._data.draw(st.one_of(_printed, _rulesets, gaps), label=" ".join(command))

    def read(self, pattern: str) -> Mapping[str, str]:
        names = [pattern.replace("*", device) for device in ("all", "vmbr0", "vmbr1", "veth100")]
        return self._data.draw(st.dictionaries(st.sampled_from(names), st.text(max_size=2)))

    def exists(self, path: Path) -> bool:
        return self._data.draw(st.booleans())

    def sockets(self, directory: Path) -> Sequence[Path]:
        return [directory / "ovs-vswitchd.1.ctl", directory / "ovsdb-server.2.ctl"]

    def namespaces(self) -> Sequence[tuple[str, str]] | Gap:
        return [("x", "/run/netns/x")]


@given(st.data(), st.booleans())
def test_garbage_from_every_tool_is_judged_and_is_not_called_good(data: st.DataObject, declared: bool) -> None:
    found = judge(gather(Garbage(data), "unix:/none/db.sock"), STATE if declared else None, ())
    assert len({finding.check for finding in found}) == len(CHECKS)
    if declared:
        assert exit_code(found) != 0
        assert {finding.status for finding in found if finding.check == "bridges"} == {Status.UNKNOWN}


# ----------------------------------------------------------------------------------------------- a claimed drop is one

_UNKNOWN = ("a", "b")
"""Things that rules ask for and of which nothing is known; every combination of them is tried."""


def _asks(name: str) -> dict[str, Any]:
    return {"match": {"op": "==", "left": {"unknown": name}, "right": 1}}


def _named(key: str, op: str, *names: str) -> dict[str, Any]:
    right: Any = {"set": list(names)} if len(names) > 1 else names[0]
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}}


_names = st.lists(st.sampled_from(("vmbr0", "vmbr1", "vmbr*", "eth0")), min_size=1, max_size=2)
_matches = st.one_of(
    st.sampled_from(_UNKNOWN).map(_asks),
    st.builds(
        lambda key, op, names: _named(key, op, *names),
        st.sampled_from(("iifname", "oifname")),
        st.sampled_from(("==", "!=")),
        _names,
    ),
)
_verdicts = st.one_of(
    st.sampled_from(("drop", "accept", "return", "continue")).map(lambda name: {name: None}),
    st.builds(
        lambda how, to: {how: {"target": to}},
        st.sampled_from(("jump", "goto")),
        st.sampled_from(("one", "two", "three")),
    ),
)
_vmaps = st.builds(
    lambda key, pairs: {"vmap": {"key": key, "data": {"set": [[name, verdict] for name, verdict in pairs.items()]}}},
    st.sampled_from(("iifname", "oifname")).map(lambda key: {"meta": {"key": key}}),
    st.dictionaries(st.sampled_from(("vmbr0", "vmbr1", "eth0")), _verdicts, min_size=1, max_size=3),
)
_rules = st.lists(
    st.builds(
        lambda matches, verdict: NftRule((*matches, verdict)),
        st.lists(_matches, max_size=2),
        st.one_of(_verdicts, _vmaps),
    ),
    max_size=4,
)


def _takes(match: Mapping[str, Any], packet: Packet, holds: Mapping[str, bool]) -> bool:
    left, right = match["left"], match["right"]
    if "unknown" in left:
        return holds[left["unknown"]]
    name = packet.iif if left["meta"]["key"] == "iifname" else packet.oif
    values = right["set"] if isinstance(right, dict) else [right]
    found = any(name.startswith(v[:-1]) if v.endswith("*") else name == v for v in values)
    return found if match["op"] == "==" else not found


def _verdicts_of(rule: NftRule, packet: Packet, holds: Mapping[str, bool]) -> Iterator[tuple[str, str]]:
    for part in rule.parts:
        ((kind, value),) = part.items()
        if kind == "match":
            if not _takes(value, packet, holds):
                return
            continue
        if kind == "vmap":
            name = packet.iif if value["key"]["meta"]["key"] == "iifname" else packet.oif
            part = dict(value["data"]["set"]).get(name, {"continue": None})
            ((kind, value),) = part.items()
        yield kind, value["target"] if value else ""
        return


class _TooDeep(Exception):
    """A ruleset that nft would not load."""


def _runs(
    chains: Mapping[str, NftChain], chain: NftChain, packet: Packet, holds: Mapping[str, bool], depth: int
) -> str:
    """What one packet comes to at the end of a chain: accept, drop or on."""
    if depth > 8:
        raise _TooDeep
    for rule in chain.rules:
        for kind, target in _verdicts_of(rule, packet, holds):
            if kind in ("drop", "accept"):
                return kind
            if kind == "return":
                return "on"
            if kind in ("jump", "goto"):
                end = _runs(chains, chains[target], packet, holds, depth + 1)
                if end != "on" or kind == "goto":
                    return end
    return "on"


@given(_rules, _rules, _rules, _rules, st.sampled_from(("accept", "drop")))
def test_what_is_said_to_be_dropped_is_dropped(
    base: list[NftRule], one: list[NftRule], two: list[NftRule], three: list[NftRule], policy: str
) -> None:
    chains = {
        name: NftChain("inet", "t", name, "forward" if name == "base" else "", policy, (), tuple(rules))
        for name, rules in (("base", base), ("one", one), ("two", two), ("three", three))
    }
    packet = Packet("vmbr0", "vmbr1", 4, ())
    if forward_dropped(chains.values(), packet) is None:
        return
    for values in product((False, True), repeat=len(_UNKNOWN)):
        try:
            end = _runs(chains, chains["base"], packet, dict(zip(_UNKNOWN, values, strict=True)), 0)
        except _TooDeep:
            return
        assert end == "drop" or (end == "on" and policy == "drop")
