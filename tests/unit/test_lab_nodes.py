"""What the lab of whole nodes makes of a state file, without building it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from controller.statefile import loads
from lab import nodes, places
from lab.asks import Ask
from lab.demo import LOOPBACK, Example, Expected, judge_answer, judge_uplink
from lab.traffic import Left, Result, Try

KEYS = Path("/keys")
REAL = """
networks: {privacy: {bridge: vmbr0, subnet: 10.0.0.0/24, gateway: 10.0.0.1, ids: "100-199", egress: {port: warp0},
  mesh: {bridge: mesh-privacy, port: from-privacy, far_port: to-privacy, leg_port: nm-privacy}}}
wireguard: {warp_tunnel: {interface: warp0, config: /etc/wireguard/warp.conf}}
netmaker: {networks: [{name: mesh, interface: nm-privacy, bridge: mesh-privacy, server: api.example.org,
  token_file: /etc/token}]}
host: {uplinks: [enp1s0]}
"""
TINY = 'networks: {privacy: {bridge: vmbr0, subnet: 10.0.0.0/24, gateway: 10.0.0.1, ids: "100-199"}}'


def planned(tmp_path: Path, text: str, name: str = "node.yaml") -> nodes.World:
    file = tmp_path / name
    file.write_text(text)
    return nodes.plan(file, KEYS)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("oo1424oo.yaml", "oo1424oo"), ("oo1424oo.nix.json", "oo1424oo"), ("my node (1).yaml", "my-node-1"),
        ("inet.yaml", "node-inet"), ("host.json", "node-host"), (".yaml", "node"), ("ä.yaml", "node"),
        (f"{'x' * 99}.yaml", "x" * 32),
    ],
)  # fmt: skip
def test_a_node_is_called_as_its_file(file: str, name: str) -> None:
    assert nodes.node_name(Path(file)) == name


def test_two_nodes_have_two_names(tmp_path: Path) -> None:
    assert [node.name for node in planned(tmp_path, TINY, "oo1425oo.yaml").nodes] == ["oo1425oo", "oo1426oo"]


@pytest.mark.parametrize("text", [REAL, TINY, places.example().read_text()])
def test_state_files_that_are_made_are_valid(tmp_path: Path, text: str) -> None:
    for node in planned(tmp_path, text).nodes:
        loads(yaml.safe_dump(node.state), node.name)


def test_nothing_of_a_real_node_is_used(tmp_path: Path) -> None:
    """Its keys, its mesh and its uplink are not there in a lab."""
    state = planned(tmp_path, REAL).nodes[0].state
    text = yaml.safe_dump(state)
    assert not [word for word in ("warp.conf", "api.example.org", "/etc/token", "enp1s0") if word in text]
    assert state["wireguard"]["warp_tunnel"]["peers"][0]["endpoint"] == "192.0.2.14:2408"
    assert {peer["endpoint"] for peer in state["netmaker"]["networks"][0]["peers"] if "endpoint" in peer} == {
        "192.0.2.6:51821"
    }


def test_a_way_out_without_a_tunnel_is_given_one(tmp_path: Path) -> None:
    text = TINY.replace("}}", ", egress: {port: out-a}}}")
    assert planned(tmp_path, text).nodes[0].state["wireguard"]["warp_tunnel"]["interface"] == "out-a"
    assert "warp_tunnel" not in planned(tmp_path, TINY).nodes[0].state["wireguard"]


def test_private_keys_are_not_shown(tmp_path: Path) -> None:
    world = planned(tmp_path, places.example().read_text())
    secrets = [key for node in world.nodes for key in node.keys.values()]
    shown = repr(world) + "".join(yaml.safe_dump(node.state) for node in world.nodes)
    assert len(set(secrets)) == 8 and not [key for key in secrets if key in shown]


@pytest.mark.parametrize(
    ("left", "seen"),
    [
        (Left(9, 1, 0, 0, ()), "nothing"),
        (Left(0, 1, 0, 0, ()), "no packet at all"),
        (Left(9, 1, 0, 3, ()), "3 not looked at"),
        (Left(9, 1, 2, 0, ("a to b, protocol 6",)), "2: a to b, protocol 6"),
    ],
)  # fmt: skip
def test_what_leaves_is_judged(left: Left, seen: str) -> None:
    shown = judge_uplink("node", left)
    assert (shown.seen, shown.as_expected) == (seen, seen == "nothing")


@pytest.mark.parametrize(
    ("result", "sender", "seen"),
    [
        (Result("reply", '[200, {"realized": true}]', 0.1), "10.1.0.50", "200"),
        (Result("reply", '[200, {"realized": false}]', 0.1), "10.1.0.50", "200, realized False"),
        (Result("reply", '[200, {"realized": true}]', 0.1), "10.1.0.1", "200 as 10.1.0.1"),
        (Result("reply", '[401, {"status": 401}]', 0.1), "10.1.0.50", "401"),
        (Result("error", "somebody else's certificate", 0.1), "", "error: somebody else's certificate"),
        (Result("reply", "[200, null]", 0.1), "10.1.0.50", "200, realized None"),
    ],
)
def test_what_the_api_answers_is_judged(result: Result, sender: str, seen: str) -> None:
    ask = Ask("POST", "/api/grants/1/approve", answer=(("realized", True),))
    example = Example("", "host", Try("tcp", LOOPBACK, 9573), Expected.OK, "", sender="10.1.0.50", ask=ask)
    shown = judge_answer(example, result, sender)
    assert (shown.seen, shown.as_expected) == (seen, seen == "200")


def test_a_token_is_not_shown() -> None:
    assert "bh_secret" not in repr(Try("tcp", LOOPBACK, 9573, http={"token": "bh_secret"}))
    assert Try("tcp", LOOPBACK, 9573, http={"token": "bh_secret"}).as_json()["http"] == {"token": "bh_secret"}


def test_only_a_node_with_such_a_container_has_its_api_there(tmp_path: Path) -> None:
    assert [node.has_api_container for node in planned(tmp_path, places.example().read_text()).nodes] == [True, False]
