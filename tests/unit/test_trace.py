"""`bulkhead trace` without a switch: a packet's way by the declared flows, told, and what is no packet."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap, wrpcapng

from controller.cli import main
from controller.ovsctl import Looked, OvsError, captured, datapath_ports, parse_trace, top_level_numbers

EXAMPLE = Path(__file__).parents[2] / "examples" / "oo1424oo.yaml"
needs_ofctl = pytest.mark.skipif(not shutil.which("ovs-ofctl"), reason="needs Open vSwitch's tools")


def trace(*args: str) -> Result:
    return CliRunner().invoke(main, ["trace", *args, "--state", str(EXAMPLE)])


@pytest.mark.parametrize(
    ("port", "packet", "ends"),
    [
        ("xray", "tcp,nw_dst=10.0.0.100,tp_dst=443", "leaves by veth100 (gateway)"),
        ("102", "tcp,nw_dst=10.0.0.100,tp_dst=443", "leaves by veth100 (gateway)"),
        ("vmbr0:veth102", "tcp nw_dst=10.0.0.100 tp_dst=443", "leaves by veth100 (gateway)"),
        ("xray", "in_port=veth102,tcp,nw_dst=10.0.0.100", "leaves by veth100"),
        ("xray", "tcp,nw_dst=10.1.0.200,tp_dst=80", "counted as a violation: tried to reach another network"),
        ("xray", "tcp,nw_dst=8.8.8.8,tp_dst=80", "leaves by warp0 (the tunnel to the world of privacy)"),
        ("mcp-server", "udp,nw_dst=8.8.8.8,tp_dst=53", "tried to leave a network that has no egress"),
        ("nm-privacy", "tcp,nw_src=10.0.0.50,nw_dst=10.0.0.102,tp_dst=80", "leaves by veth102 (xray)"),
        ("xray", "arp,arp_tpa=10.0.0.1", "leaves back by veth102 (xray)"),
        ("xray", "icmp6,icmpv6_type=135", "dropped in ADMIT"),
        ("xray", "udp,nw_dst=10.0.0.100,nw_frag=later", "leaves by veth100"),
        ("to-mgmt", "arp", "leaves by nm-mgmt (the mesh of management)"),
    ],
)
def test_a_way_is_told_to_its_end(port: str, packet: str, ends: str) -> None:
    done = trace(port, packet)
    assert done.exit_code == 0 and ends in done.stdout.splitlines()[-1], done.output


def test_what_is_told_can_be_asked_again() -> None:
    told = trace("xray", "tcp,nw_dst=10.0.0.100,tp_dst=443").stdout
    packet = told.splitlines()[0].partition(": ")[2]
    assert trace("xray", packet).stdout == told


def test_json_has_every_step() -> None:
    done = trace("nm-mgmt", "tcp,nw_src=10.1.0.50,nw_dst=10.1.0.200,tp_dst=9573", "--json")
    found = json.loads(done.stdout)
    assert found["delivered"] == [{"bridge": "vmbr1", "port": "veth200"}]
    assert [part["bridge"] for part in found["way"]] == ["mesh-mgmt", "vmbr1"]
    steps = found["way"][1]["steps"]
    assert [steps[0]["table_name"], steps[-1]["table_name"]] == ["ADMIT", "OUTPUT_GUARD"]
    assert all(step["flow"] for step in steps if step["priority"] is not None)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nobody", "tcp"), "nobody is called 'nobody'"),
        (("vmbr9:veth102", "tcp"), "nobody is called"),
        (("xray", ""), "the packet is empty; expected words"),
        (("xray", " , "), "the packet is empty"),
        (("xray", "nonsense"), "not a field of a packet"),
        (("xray", "tcpp"), "did you mean tcp?"),
        (("xray", "tcp,tp_dst=70000"), "a number from 0 to 65535"),
        (("xray", "tcp,nw_dst=10.0.0"), "an IPv4 address"),
        (("xray", "tcp,udp"), "say one of them"),
        (("xray", "tcp,tp_dst"), "has no value"),
        (("xray", "tp_dst=80"), "say tcp too"),
        (("xray", "tcp,in_port=1"), "in_port=1: expected veth102 or 4, as PORT says"),
        (("xray", "tcp", "--number", "0"), "0 is not in the range"),
        (("xray", "tcp,nw_dst=10.0.0.100", "--ct-next", "foo"), "not a connection state"),
        (("xray", "x" * 100_000), "not a field of a packet"),
        (("xray", "x\0y"), "not a field of a packet"),
        (("xray", "/nowhere.pcap"), "No such file"),
        (("xray", "/"), "not a field of a packet"),
    ],
)
def test_what_is_no_question_says_why(args: tuple[str, ...], says: str) -> None:
    done = trace(*args)
    assert done.exit_code == 2 and says in done.stderr and not done.stdout, done.output
    assert "Traceback" not in done.stderr and len(done.stderr) < 500


def test_a_file_that_is_called_like_a_packet_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "arp").write_text("")
    monkeypatch.chdir(tmp_path)
    assert trace("to-mgmt", "arp").exit_code == 0


# ------------------------------------------------------------------------------------------------------------- captures


@needs_ofctl
def test_a_capture_is_read_packet_by_packet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Ether(src="02:7b:e8:a2:b7:bd", dst="02:00:00:00:00:01") / IP(src="10.0.0.102", dst="10.0.0.100") / TCP()
    wrpcap(str(tmp_path / "-odd name.pcap"), [frame, frame])
    monkeypatch.chdir(tmp_path)
    done = trace("xray", "./-odd name.pcap", "--number", "2")
    assert done.exit_code == 0 and "leaves by veth100" in done.stdout, done.output
    done = trace("xray", "./-odd name.pcap", "--number", "3")
    assert done.exit_code == 2 and "packets it holds: 2; expected at least 3" in done.stderr


@pytest.mark.parametrize("content", [b"", b"\x7d\x80\x8a\x32" * 99, b"tcp", b"\0" * 24])
def test_what_is_no_capture(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "some.pcap"
    file.write_bytes(content)
    done = trace("xray", str(file))
    assert done.exit_code == 2 and "not a capture" in done.stderr and "tcpdump -w" in done.stderr


@needs_ofctl
def test_a_broken_capture_and_one_of_the_newer_kind(tmp_path: Path) -> None:
    frame = Ether() / IP() / TCP()
    wrpcapng(str(tmp_path / "new.pcapng"), [frame])
    with pytest.raises(OvsError, match=r"a pcapng file.*tcpdump -r"):
        captured(tmp_path / "new.pcapng")
    wrpcap(str(tmp_path / "cut.pcap"), [frame])
    os.truncate(tmp_path / "cut.pcap", 12)
    with pytest.raises(OvsError, match="Make another"):
        captured(tmp_path / "cut.pcap")
    with pytest.raises(OvsError, match="directory"):
        captured(tmp_path)


# -------------------------------------------------------------------------------------------- Open vSwitch's own words


def test_a_trace_of_open_vswitch_is_taken_apart() -> None:
    text = """Flow: tcp,in_port=4
bridge("vmbr0")
---------------
 0. in_port=4, priority 200, cookie 0xb01c01
    goto_table:10
10. priority 0
    resubmit(,60)
    60. No match.
            drop

Final flow: unchanged
Megaflow: recirc_id=0
Datapath actions: clone(ct(commit),3),7
"""
    found = parse_trace(text, {3: ("vmbr0", 1), 7: ("vmbr1", 2)})
    assert found.looked == (
        Looked("vmbr0", 0, (200, 0xB01C01)),
        Looked("vmbr0", 10, (0, 0)),
        Looked("vmbr0", 60, None),
    )
    assert found.sent == {("vmbr0", 1), ("vmbr1", 2)}
    with pytest.raises(OvsError, match="did not say what becomes of the packet"):
        parse_trace("syntax error", {})


@pytest.mark.parametrize(
    ("actions", "numbers"),
    [
        ("drop", []),
        ("3", [3]),
        ("1,2", [1, 2]),
        ("set(eth(src=02:00:00:00:00:01)),5", [5]),
        ("ct(commit,zone=1),recirc(0x1)", []),
        ("userspace(pid=0,controller(reason=1,dont_send=0)),9", [9]),
        ("clone(push_vlan(vid=1,pcp=0),4),6", [4, 6]),
    ],
)
def test_outputs_among_datapath_actions(actions: str, numbers: list[int]) -> None:
    assert top_level_numbers(actions) == numbers


def test_ports_of_the_datapath() -> None:
    text = "netdev@ovs-netdev: hit:1 missed:2\n  vmbr0:\n    veth102 4/7: (system)\n    vmbr0 65534/2: (tap)\n    patch-a 5/none: (patch: peer=b)\n"
    assert datapath_ports(text) == {7: ("vmbr0", 4), 2: ("vmbr0", 65534)}
