"""Remarks on any flows: each mistake is found, with a packet that shows it, and good flows are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controller.cli import main
from controller.compile import planned_ports
from controller.flowtext import names_in, read_flows
from controller.statefile import load
from controller.verify.lint import Remark, crossings, lint, tables
from controller.verify.node import Held, Node
from controller.verify.packetwords import parse
from tests.fakes.literal import CROSSING_BACK, CROSSING_THERE, MANAGEMENT, PRIVACY
from tests.fakes.states import two_networks

EXAMPLE = Path(__file__).parents[2] / "examples" / "oo1424oo.yaml"


def held(text: str, name: str = "br0") -> Held:
    numbers = {port: number for number, port in enumerate(names_in(text), start=1)}
    return Held.of(name, numbers | {"LOCAL": 0xFFFE}, read_flows(text, numbers).flows)


def remarks(text: str) -> dict[str, list[Remark]]:
    out: dict[str, list[Remark]] = {}
    for remark in lint(held(text)):
        out.setdefault(remark.code, []).append(remark)
    return out


def example(remark: Remark) -> tuple[str, dict[str, int]]:
    """The ingress port and the fields of a remark's packet."""
    port, given, _ = parse(remark.example.split(" ")[0])
    return str(port), given


def test_a_learned_flow_that_nobody_reads() -> None:
    """The second defect of such flows: table 1 is taught, and on the way in."""
    (dead,) = remarks(PRIVACY)["dead-learn"]
    assert example(dead)[0] == "warp0" and "table 1" in dead.fix


def test_normal_floods_what_comes_back() -> None:
    found = remarks(PRIVACY)
    assert [example(r)[0] for r in found["normal-floods"]] == ["warp0"]
    assert "any other port" in found["default-normal"][0].example


def test_two_flows_of_one_priority() -> None:
    overlaps = remarks(PRIVACY)["overlap"]
    assert {example(r)[0] for r in overlaps} == {"veth100", "veth102", "warp0"}
    assert all(example(r)[1]["udp_dst"] == 51820 and r.other is not None for r in overlaps)


def test_the_vpn_servers_answers_go_into_the_tunnel() -> None:
    (astray,) = remarks(PRIVACY)["replies-astray"]
    port, given = example(astray)
    assert port == "veth100" and given["udp_src"] == 51820 and astray.example.endswith("leaves by warp0")


def test_a_service_told_by_its_port_alone_robs_others() -> None:
    hijacks = remarks(MANAGEMENT)["hijack"]
    assert {example(r)[1]["tcp_dst"] for r in hijacks} == {9573, 9574}


def test_a_return_told_by_its_source_port() -> None:
    (found,) = remarks(CROSSING_BACK)["stateless-return"]
    port, given = example(found)
    assert (port, given["tcp_src"], given["tcp_dst"]) == ("from-privacy", 8080, 22)
    assert "stateless-return" not in remarks(CROSSING_THERE)


def test_packets_for_another_network_leave() -> None:
    state = load(EXAMPLE).state
    nodes = {}
    for name, text in (("vmbr0", PRIVACY), ("vmbr1", MANAGEMENT + CROSSING_THERE)):
        bridge = state.bridge(name)
        assert bridge is not None
        numbers = {port: known.number for port, known in planned_ports(state, bridge).items()}
        nodes[name] = Held.of(name, numbers, read_flows(text, numbers).flows)
    found = list(crossings(state, Node(nodes)))
    shown = {
        (bridge, *parse(remark.example.split(" ")[0])[:1], remark.example.split(" ", 1)[1]) for bridge, remark in found
    }
    assert ("vmbr0", "veth102", "leaves by warp0 of vmbr0") in shown
    assert ("vmbr1", "veth202", "leaves by from-mgmt of vmbr1") in shown


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("priority=9,ip,actions=drop\npriority=5,tcp,actions=output:1", "dead-flow"),
        ("priority=9,ip,nw_dst=10.0.0.0/25,actions=drop\npriority=8,ip,nw_dst=10.0.0.128/25,actions=drop\n"
         "priority=5,ip,nw_dst=10.0.0.0/24,actions=output:1", "dead-flow"),
        ("priority=5,ip,actions=output:1\ntable=7,priority=1,actions=output:2", "unreachable-table"),
        ("priority=9,tcp,tp_dst=22,actions=drop\npriority=5,ip,actions=output:2", "fragments-pass"),
        ("in_port=3,actions=output:3", "hairpin"),
        ("duration=5s, n_packets=0, n_bytes=0, priority=180008,tcp,tp_src=6653,actions=NORMAL", "hidden-flow"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_name(text: str, code: str) -> None:
    assert code in remarks(text)


@pytest.mark.parametrize(
    "text",
    [
        "priority=9,tcp,nw_dst=10.0.0.1,tp_dst=22,actions=output:1\npriority=0,actions=drop",
        "priority=5,in_port=1,actions=output:2\npriority=5,in_port=2,actions=output:1",
        "priority=9,ip,actions=drop\npriority=5,ip,actions=drop",
        "priority=5,in_port=1,actions=resubmit(,3)\ntable=3,priority=5,ip,actions=output:2",
        "priority=5,ip,actions=learn(table=3,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[]),resubmit(,3)",
        "priority=9,ip,nw_frag=later,actions=drop\npriority=8,tcp,tp_dst=22,actions=drop\npriority=5,in_port=1,ip,actions=output:2",
        "priority=5,arp,actions=in_port\npriority=5,ip,in_port=1,actions=output:2\npriority=5,ip,in_port=2,actions=output:1",
    ],
)  # fmt: skip
def test_good_flows_are_left_alone(text: str) -> None:
    found = {code for code in remarks(text) if code not in ("dead-flow",)}
    assert not found


def test_our_own_flows_have_no_errors() -> None:
    for node in (Node.declared(load(EXAMPLE).state), Node.declared(two_networks())):
        for bridge in node.bridges.values():
            assert not [r for r in lint(bridge) if r.severity == "error"]


def test_tables_say_what_a_miss_does() -> None:
    found = {
        use.table: use
        for use in tables(held("priority=5,ip,actions=resubmit(,4)\ntable=9,actions=drop\nactions=normal"))
    }
    assert (found[0].miss, found[4].miss, found[4].flows, found[9].reached) == ("NORMAL", "drop", 0, False)


# ---------------------------------------------------------------------------------------------------------- the command


def run(*args: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, ["check", *args], input=text)


def test_a_dump_is_judged_on_its_own(tmp_path: Path) -> None:
    dump = tmp_path / "dump.txt"
    dump.write_text("NXST_FLOW reply (xid=0x4):\n" + PRIVACY)
    done = run("--flows", str(dump), "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert {p["code"] for p in found["problems"]} >= {
        "overlap",
        "dead-learn",
        "hijack",
        "replies-astray",
        "default-normal",
    }
    assert all(p["path"].startswith(f"{dump}:") and p["found"] for p in found["problems"])
    assert found["tables"][0] == {"table": 0, "flows": 6, "reached": True, "miss": "NORMAL"}


def test_a_sound_dump_passes() -> None:
    done = run("--flows", "-", text="priority=5,in_port=1,actions=output:2\npriority=0,actions=drop\n")
    assert done.exit_code == 0 and "2 flows; 0 error(s)" in done.stdout


def test_flows_are_held_against_a_state() -> None:
    done = run(
        str(EXAMPLE),
        "--flows",
        "-",
        "--bridge",
        "vmbr0",
        text="priority=5,in_port=veth102,ip,actions=output:from-privacy\n",
    )
    assert done.exit_code == 1 and "not-allowed" in done.stderr and "veth102 to from-privacy" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--flows", "/nowhere/dump"), 2, "No such file"),
        ((str(EXAMPLE), "--flows", "-"), 2, "--bridge"),
        ((str(EXAMPLE), "--flows", "-", "--bridge", "br9"), 2, "declares no bridge"),
        ((), 2, "name a state FILE"),
        (("--flows", "-"), 1, "flows:1"),
    ],
)
def test_what_cannot_be_judged_says_why(args: tuple[str, ...], code: int, says: str) -> None:
    done = run(*args, text="priority=nonsense,actions=output:1\n")
    assert done.exit_code == code
    assert says in done.stderr + done.stdout or (says == "flows:1" and ":1" in done.stderr)
    assert "Traceback" not in done.stderr


OLD = "NXST_FLOW reply (xid=0x4):\n cookie=0x0, table=0, n_packets=0, priority=5,in_port=1 actions="


@pytest.mark.parametrize(
    ("text", "code", "valid"),
    [
        (OLD + "output:2\n", 2, None),
        (OLD + "NORMAL\n", 1, False),
        (OLD.replace("NXST_FLOW reply", "OFPST_FLOW reply (OF1.4)") + "output:2\n", 0, True),
        ("\x8a\x00\n", 1, False),
    ],
    ids=["a dump that leaves things out", "and worse", "a whole dump", "garbage"],
)
def test_a_dump_that_does_not_tell_everything_is_not_called_good(text: str, code: int, valid: bool | None) -> None:
    done = run("--flows", "-", "--json", text=text)
    assert done.exit_code == code and json.loads(done.stdout)["valid"] is valid
    told = run("--flows", "-", text=text)
    assert told.exit_code == code
    if code == 2:
        assert "-O OpenFlow14" in told.stderr and "could not be found out" in told.stdout


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_dump_of_nothing_is_not_called_good(text: str) -> None:
    done = run("--flows", "-", "--json", text=text)
    assert done.exit_code == 2 and "empty" in done.stderr and not done.stdout


def test_problems_of_a_state_file_have_packets_that_show_them() -> None:
    done = run(str(EXAMPLE), "--json")
    shown = {p["code"]: p["example"] for p in json.loads(done.stdout)["problems"] if p["example"]}
    assert done.exit_code == 0
    assert {"overlap", "hijack", "dead-learn", "normal-floods", "default-normal"} <= shown.keys()


def test_a_literal_flow_that_never_does_anything_is_told(tmp_path: Path) -> None:
    text = EXAMPLE.read_text().replace(
        "        - priority=10,actions=normal\n",
        "        - priority=10,actions=normal\n        - priority=8,tcp,nw_dst=10.0.0.102,tp_dst=443,actions=output:veth102\n", 1
    )  # fmt: skip
    file = tmp_path / "state.yaml"
    file.write_text(text)
    found = json.loads(run(str(file), "--json").stdout)["problems"]
    assert [p for p in found if p["code"] == "dead-flow" and "flows[6]" in p["path"]]
