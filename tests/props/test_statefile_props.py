"""State files under nonsense: whatever goes in, a `Loaded` or an `InvalidInput` comes out, and soon.

Laws of what is accepted as well: no two rules of one rank meet, a rule delivers to nobody but its receiver, and the
order in which a file says things does not matter.
"""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller import statefile
from controller.model import Network, Rule
from controller.ofparse import LiteralFlow, parse
from controller.ofrules import judge
from controller.problems import InvalidInput, Problem, Severity
from tests.fakes.effort import examples

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = (EXAMPLES / "oo1424oo.yaml").read_text()
TREE: dict[str, Any] = yaml.safe_load(TEXT)
NETWORKS = statefile.loads(TEXT, "example").state.networks
MIB = 1024 * 1024
# Far above what any of it takes, so that a busy machine does not fail; far below what a loop that explodes takes.
BOUND_S = 30.0


def outcome(text: str) -> tuple[Problem, ...]:
    """The problems of a text, of a kind and a form that can be shown."""
    try:
        loaded = statefile.loads(text, "nonsense")
    except InvalidInput as exc:
        problems = exc.problems
        assert any(problem.severity is Severity.ERROR for problem in problems)
    else:
        problems = loaded.problems
        assert all(problem.severity is Severity.WARNING for problem in problems)
    for problem in problems:
        assert problem.code and problem.path and problem.found and problem.expected and problem.fix
        assert str(problem).isprintable()
    return problems


def timed(text: str) -> tuple[Problem, ...]:
    started = time.monotonic()
    found = outcome(text)
    assert time.monotonic() - started < BOUND_S
    return found


# Words of the format and what people write by mistake, so that nonsense gets past the first check.
KEYS = (
    ["networks", "bridges", "netmaker", "networking", "wireguard", "openflow", "lxc", "containers", "properties"]
    + ["services", "flows", "id", "veth", "bridge", "subnet", "gateway", "ids", "egress", "mesh", "port", "mac", "host"]
    + ["prefixes", "vmbr0", "privacy", "management", "stateConfig", "warp_tunnel", "vpn_server", "veth_pairs", "peer1"]
    + ["peer2", "name", "interface", "post_up", "ip_pool", "listen_port", "container"]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=40),
    st.sampled_from(
        ["privacy", "management", "vmbr0", "vmbr1", "veth100", "warp0", "10.0.0.1", "10.0.0.0/24", "10.0.0.102/24"]
        + ["0.0.0.0/0", "255.255.255.255/32", "100", "100-199", "02:00:00:00:00:01", "ff:ff:ff:ff:ff:ff", "LOCAL", ""]
        + [
            "ovs-vsctl add-port vmbr0 warp0",
            "ovs-vsctl add-port vmbr0 LOCAL",
            "priority=1,actions=drop",
            "..",
            "x" * 16,
        ]
    ),
)
NONSENSE = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=40,
)


@settings(max_examples=examples(400), deadline=None)
@given(NONSENSE)
def test_nested_nonsense(value: Any) -> None:
    outcome(json.dumps(value))
    if isinstance(value, dict):
        outcome(json.dumps({"stateConfig": value}))
        outcome(json.dumps({**TREE, **value}))


@settings(max_examples=examples(400), deadline=None)
@given(st.text(max_size=300) | st.text(alphabet="{}[]:,-&*!|>?#%@`'\"~ \n\tab01.", max_size=300))
def test_any_text(text: str) -> None:
    outcome(text)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "state.yaml"
    file.write_bytes(data)
    try:
        statefile.load(file)
    except InvalidInput as exc:
        assert exc.problems


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


PLACES = [place for place in places(TREE) if place]


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    """The example with a few things removed, replaced, doubled, or moved."""
    tree = copy.deepcopy(TREE)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(PLACES))
        parent: Any = tree
        try:
            for part in place[:-1]:
                parent = parent[part]
            last: Any = place[-1]
            kind = draw(st.sampled_from(("remove", "replace", "nonsense", "double", "rename", "move")))
            if kind == "remove":
                del parent[last]
            elif kind == "replace":
                parent[last] = draw(VALUES)
            elif kind == "nonsense":
                parent[last] = draw(NONSENSE)
            elif kind == "double" and isinstance(parent, list):
                parent.append(copy.deepcopy(parent[last]))
            elif kind == "rename" and isinstance(parent, dict):
                parent[draw(st.sampled_from(KEYS) | st.text(max_size=8))] = parent.pop(last)
            elif kind == "move":
                source = draw(st.sampled_from(PLACES))
                other: Any = TREE
                for part in source:
                    other = other[part]
                parent[last] = copy.deepcopy(other)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier mutation took that place away
    return tree


@settings(max_examples=examples(600), deadline=None)
@given(mutations())
def test_mutated_example(tree: dict[str, Any]) -> None:
    outcome(json.dumps(tree))


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(TEXT) - 1), st.sampled_from(list("{}[]:,-&*!|'\"\n \t\0x0#")) | st.just("")),
        max_size=4,
    )
)
def test_mutated_text(edits: list[tuple[int, str]]) -> None:
    text = TEXT
    for position, character in edits:
        text = text[:position] + character + text[position + 1 :]
    outcome(text)


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(0, len(TEXT)))
def test_cut_off(length: int) -> None:
    outcome(TEXT[:length])


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_order_does_not_matter(shuffler: random.Random) -> None:
    tree = copy.deepcopy(TREE)
    shuffled = {key: tree[key] for key in shuffler.sample(list(tree), len(tree))}
    names = list(tree["networks"])
    shuffled["networks"] = {name: tree["networks"][name] for name in shuffler.sample(names, len(names))}
    shuffler.shuffle(shuffled["lxc"]["containers"])
    found = statefile.loads(json.dumps(shuffled), "shuffled")
    assert found.state.digest == statefile.loads(TEXT, "example").state.digest
    assert {str(p) for p in found.problems if "lxc" not in p.path} == {
        str(p) for p in statefile.loads(TEXT, "example").problems
    }


# Flows.

FIELDS = st.sampled_from(
    ["ip", "tcp", "udp", "sctp", "icmp", "arp", "ipv6", "dl_type=0x800", "nw_proto=6", "nw_proto=17", "table=0"]
    + ["in_port=veth100", "in_port=veth102", "in_port=warp0", "in_port=from-privacy", "in_port=LOCAL", "in_port=2"]
    + ["nw_dst=10.0.0.102", "nw_dst=10.0.0.0/24", "nw_dst=10.1.0.201", "nw_dst=10.8.0.3", "nw_src=10.0.0.100"]
    + ["nw_src=10.1.0.0/24", "nw_src=0.0.0.0/0", "tp_dst=80", "tp_dst=0x50/0xfff0", "tp_src=51820", "tp_dst=51820"]
    + ["tcp_dst=80", "udp_dst=51820", "icmp_type=8", "nw_tos=184", "ip_dscp=46", "tcp_flags=+syn", "dl_vlan=3"]
    + ["priority=5", "priority=5", "priority=7", "priority=65535", "cookie=1", "nonsense", "nw_dts=1"]
)
ACTIONS = st.sampled_from(
    ["drop", "normal", "flood", "output:veth100", "output:veth102", "output:veth100", "veth102", "output:warp0"]
    + ["output:from-privacy", "output:to-privacy", "output:veth201", "output:9", "LOCAL", "in_port", "controller"]
    + ["learn(table=1,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[])", "resubmit(,1)", "goto_table:1"]
    + ["ct(commit)", "set_field:1->ip_dscp", "clone(output:veth100)", "group:1", ""]
)
FLOWS = st.builds(
    lambda fields, actions: ",".join([*fields, "actions=" + ",".join(actions)]),
    st.lists(FIELDS, max_size=5, unique=True),
    st.lists(ACTIONS, min_size=1, max_size=2),
)
ANY_FLOW = (
    FLOWS | st.text(max_size=60) | st.text(alphabet="=,:()[]/->0x.actionsutpdrp ", max_size=60).map("actions=".__add__)
)


@settings(max_examples=examples(600), deadline=None)
@given(st.lists(ANY_FLOW, max_size=8), st.sampled_from(["vmbr0", "vmbr1", "mesh-privacy"]))
def test_any_flows(flows: list[str], bridge: str) -> None:
    tree = copy.deepcopy(TREE)
    tree["openflow"]["bridges"] = {bridge: {"flows": flows}}
    outcome(json.dumps(tree))


@settings(max_examples=examples(600), deadline=None)
@given(ANY_FLOW)
def test_any_flow_parses_or_has_a_fault(text: str) -> None:
    found = parse(text)
    assert isinstance(found, LiteralFlow) or (found and all(fault.code and fault.fix for fault in found))


def header(rule: Rule, rng: random.Random) -> dict[str, int]:
    """A packet that matches the rule."""
    packet: dict[str, int] = {}
    for name, value, mask in rule.match:
        width = mask.bit_length()
        packet[name] = (rng.getrandbits(width) & ~mask) | value
    return packet


def matches(rule: Rule, in_port: str | None, packet: dict[str, int]) -> bool:
    if rule.in_port is not None and rule.in_port != in_port:
        return False
    return all(name in packet and packet[name] & mask == value for name, value, mask in rule.match)


@settings(max_examples=examples(600), deadline=None)
@given(st.lists(FLOWS, min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_rules_of_one_rank_do_not_meet(flows: list[str], rng: random.Random) -> None:
    """By example: a packet made from two rules of a rank together never matches both."""
    found = judge(NETWORKS, {"vmbr0": flows})
    if any(problem.severity is Severity.ERROR and problem.code == "overlap" for problem in found.problems):
        return
    rules = found.rules["privacy"]
    for first in rules:
        for second in rules:
            if first is not second and first.rank == second.rank:
                packet = {**header(first, rng), **header(second, rng)}
                in_port = first.in_port or second.in_port
                assert not (matches(first, in_port, packet) and matches(second, in_port, packet))


@settings(max_examples=examples(600), deadline=None)
@given(st.lists(FLOWS, max_size=8))
def test_rules_keep_to_their_network_and_receiver(flows: list[str]) -> None:
    privacy: Network = NETWORKS[0]
    by_port = {member.port: member for member in privacy.members}
    for rule in judge(NETWORKS, {"vmbr0": flows}).rules["privacy"]:
        match = {name: (value, mask) for name, value, mask in rule.match}
        assert match["eth_type"] == (0x800, 0xFFFF)
        assert all(value & ~mask == 0 for value, mask in match.values())
        assert rule.output in (None, "from-privacy", *by_port)
        assert rule.output is None or rule.in_port not in ("warp0", "LOCAL", rule.output)
        if rule.output in by_port:
            member = by_port[rule.output]
            value, mask = match["ipv4_dst"]
            routed = any(value in prefix and mask & prefix.mask == prefix.mask for prefix in member.routed)
            assert routed or (value, mask) == (member.address, 0xFFFFFFFF)


# Size. Each is near the limit of what is read at all.


def filled(line: str, size: int = 4 * MIB - 1024) -> str:
    return line * (size // len(line))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\n".join(f"k{number}: v" for number in range(300_000)), id="unknown keys"),
        pytest.param("lxc:\n" + filled("  containers: []\n"), id="duplicate keys"),
        pytest.param("lxc:\n  containers:\n" + filled("  - {}\n"), id="empty containers"),
        pytest.param("lxc:\n  containers:\n" + filled("  - {id: 1, properties: {name: 5}}\n"), id="bad containers"),
        pytest.param("a: [" + filled("1,") + "]", id="one list"),
        pytest.param("a: '" + filled("x"), id="open quote"),
        pytest.param(filled("[]{}:,&*!|>'%@`\n"), id="punctuation"),
        pytest.param(filled("- "), id="nested lists"),
        pytest.param(filled("? "), id="nested keys"),
        pytest.param(filled("&a "), id="anchors"),
        pytest.param(filled("#"), id="comment"),
        pytest.param('{"a": ' + filled("9"), id="one number"),
        pytest.param('{"a": "' + filled("\\ud800") + '"}', id="surrogates"),
        pytest.param(json.dumps({"networks": {f"n{number}": {} for number in range(100_000)}}), id="networks"),
    ],
)
def test_large_nonsense(text: str) -> None:
    assert timed(text)


def test_ten_megabytes_of_nonsense(tmp_path: Path) -> None:
    rng = random.Random(1424)
    words = [rng.choice([*KEYS, ":", "- ", "\n", "  ", "{", "}", "[", "]", "&a", "*a"]) for _ in range(100_000)]
    text = " ".join(words)
    file = tmp_path / "state.yaml"
    file.write_text(text * (10 * MIB // len(text) + 1))
    started = time.monotonic()
    with pytest.raises(InvalidInput) as caught:
        statefile.load(file)
    assert [problem.code for problem in caught.value.problems] == ["too-large"]
    assert time.monotonic() - started < 1.0
    assert timed(text[: 4 * MIB])


@pytest.mark.parametrize(
    "flow",
    [
        "priority=5,in_port=veth100,actions=output:veth102",
        "tcp,tp_dst=80/0xfffe,actions=output:veth102",
        "actions=" + "clone(" * 150 + ")" * 150,
        "actions=learn(" + "table=1," * 200 + ")",
        "in_port=nobody,actions=output:nowhere",
        "ip," + "nw_dst=10.0.0.1," * 100 + "actions=drop",
    ],
)
def test_thousands_of_flows(flow: str) -> None:
    tree = copy.deepcopy(TREE)
    tree["openflow"]["bridges"] = {"vmbr0": {"flows": [flow] * min(4096, 3 * MIB // len(flow))}}
    timed(json.dumps(tree))


def test_thousands_of_different_flows_of_one_priority() -> None:
    flows = [f"priority=5,tcp,tp_src={number},actions=output:veth{(100, 102)[number % 2]}" for number in range(4095)]
    flows.append("priority=5,udp,actions=drop")
    started = time.monotonic()
    found = judge(NETWORKS, {"vmbr0": flows})
    assert len(found.rules["privacy"]) == 4096
    assert time.monotonic() - started < BOUND_S


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 200))
def test_loading_twice_says_the_same(pick: int) -> None:
    tree = copy.deepcopy(TREE)
    del tree["lxc"]["containers"][pick % 5]
    text = json.dumps(tree)
    assert [str(p) for p in outcome(text)] == [str(p) for p in outcome(text)]
