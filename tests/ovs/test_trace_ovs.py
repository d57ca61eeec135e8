"""`bulkhead trace --live` on a real switch: what we say of a packet is what Open vSwitch says, and bad luck has a message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.utils import wrpcap

from controller.cli import main
from tests.ovs.node import WORLD, Node, wait_for

SAME = "Open vSwitch says the same."


@pytest.fixture(autouse=True)
def asked(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tools ask the node's Open vSwitch. Its control socket gets the name that a packaged one has."""
    directory = node.ovs.directory
    (directory / "ovs-vswitchd.pid").write_text("1\n")
    usual = directory / "ovs-vswitchd.1.ctl"
    usual.unlink(missing_ok=True)
    usual.symlink_to(node.ovs.ctl)
    monkeypatch.setenv("OVS_RUNDIR", str(directory))
    monkeypatch.setenv("BULKHEAD_STATE", str(node.file))
    yield


def trace(*args: str) -> Result:
    return CliRunner().invoke(main, ["trace", *args, "--live"])


PACKETS = {
    "delivered": ("xray", "tcp,nw_dst=10.0.0.100,tp_src=40000,tp_dst=443", "leaves by veth100 (gateway)"),
    "refused": ("xray", "tcp,nw_dst=10.1.0.201,tp_src=40000,tp_dst=9573", "tried to reach another network"),
    "spoofed": ("xray", "tcp,nw_src=10.0.0.100,nw_dst=8.8.8.8,tp_dst=80", "not its own"),
    "world": ("xray", "udp,nw_dst=198.51.100.10,tp_src=40000,tp_dst=53", "leaves by warp0"),
    "unsolicited": ("warp0", "udp,nw_src=198.51.100.9,nw_dst=10.0.0.102,tp_dst=53", "nobody inside had asked for"),
    "mesh, two bridges": ("nm-mgmt", "tcp,nw_src=10.1.0.50,nw_dst=10.1.0.200,tp_dst=9573", "leaves by veth200"),
    "out by the mesh": ("mcp-server", "icmp,icmp_type=8,nw_dst=10.1.0.50", "leaves by nm-mgmt"),
    "arp": ("xray", "arp,arp_tpa=10.0.0.1", "leaves back by veth102"),
    "arp, foreign": ("xray", "arp,arp_tpa=10.1.0.200", "dropped"),
    "vpn client": ("vmbr0:LOCAL", "udp,nw_src=192.0.2.33,nw_dst=10.0.0.100,tp_src=4000,tp_dst=51820", "veth100 (gateway)"),
    "vpn answer": ("gateway", "udp,nw_dst=192.0.2.34,tp_src=51820,tp_dst=4000", ""),
    "exposed": ("management/host", "tcp,nw_dst=10.1.0.200,tp_dst=9573", "leaves by veth200"),
    "ipv6": ("xray", "tcp6,ipv6_dst=2001:db8::1,tp_dst=80", "dropped"),
    "fragment": ("xray", "udp,nw_dst=10.0.0.100,nw_frag=later", "leaves by veth100"),
    "vlan": ("xray", "dl_vlan=5,tcp,nw_dst=10.0.0.100", "dropped"),
    "lldp": ("xray", "dl_type=0x88cc", "dropped"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKETS)
def test_open_vswitch_says_the_same(name: str) -> None:
    port, packet, ends = PACKETS[name]
    done = trace(port, packet)
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(SAME + "\n")
    assert ends in done.stdout


def test_after_a_path_was_learned_the_answer_comes_in(node: Node) -> None:
    with node["xray"].socket(source=node["xray"].address) as sock:
        sock.connect_ex((WORLD, 443))
        wait_for(lambda: "nw_dst=10.0.0.102" in node.ovs.ofctl("dump-flows", "vmbr0", "table=60"), 5)
    mac = node["inet"].mac
    packet = f"tcp,dl_src={mac},nw_src={WORLD},nw_dst=10.0.0.102,tp_src=443,tp_dst=40000"
    done = trace("warp0", packet, "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["agrees"]) == (0, True), found
    assert found["delivered"] == [{"bridge": "vmbr0", "port": "veth102"}]


def test_a_foreign_flow_is_followed_and_shown_as_one(node: Node) -> None:
    flow = "table=0,priority=60000,cookie=0x77,in_port=veth102,tcp,tp_dst=8443"
    node.ovs.ofctl("--names", "add-flow", "vmbr0", f"{flow},actions=output:veth100")
    try:
        done = trace("xray", "tcp,nw_dst=10.1.0.200,tp_dst=8443")
    finally:
        node.ovs.ofctl(
            "--names", "--strict", "del-flows", "vmbr0", "table=0,priority=60000,in_port=veth102,tcp,tp_dst=8443"
        )
    assert done.exit_code == 0, done.output
    assert "foreign" in done.stdout and "cookie 0x77" in done.stdout and "leaves by veth100" in done.stdout


def test_a_patch_port_to_an_undeclared_bridge_is_followed(node: Node) -> None:
    ovs = node.ovs
    ovs.add_bridge("stray")
    try:
        for bridge, port, peer in (("vmbr0", "patch-a", "patch-b"), ("stray", "patch-b", "patch-a")):
            ovs.vsctl("add-port", bridge, port, "--", "set", "interface", port, "type=patch", f"options:peer={peer}")
        flow = "priority=60000,cookie=0x78,in_port=veth102,udp,tp_dst=8444"
        ovs.ofctl("--names", "add-flow", "vmbr0", f"{flow},actions=output:patch-a")
        ovs.ofctl("--names", "add-flow", "stray", "priority=1,in_port=patch-b,actions=output:LOCAL")
        done = trace("xray", "udp,nw_dst=10.1.0.200,tp_dst=8444")
        assert done.exit_code == 0, done.output
        assert "into stray by patch-b" in done.stdout and done.stdout.endswith(SAME + "\n")
    finally:
        ovs.ofctl("del-flows", "vmbr0", "cookie=0x78/-1")
        ovs.vsctl("del-br", "stray", "--", "del-port", "patch-a")


def test_a_capture_of_the_wire_works(tmp_path: Path, node: Node) -> None:
    file, mac = tmp_path / "some.pcap", str(node["xray"].mac)
    ethernet = Ether(src=mac, dst="02:00:00:00:00:01")
    packets = [
        ethernet / IP(src="10.0.0.102", dst="10.0.0.100") / TCP(sport=40000, dport=443, flags="S"),
        ethernet / ARP(hwsrc=mac, psrc="10.0.0.102", pdst="10.0.0.1"),
        ethernet / IP(src="10.0.0.102", dst="10.0.0.100", frag=100) / UDP(),
    ]
    wrpcap(str(file), packets)
    for number, ends in enumerate(("leaves by veth100", "leaves back by veth102", "leaves by veth100"), start=1):
        done = trace("xray", str(file), "--number", str(number))
        assert (done.exit_code, done.stdout.endswith(SAME + "\n")) == (0, True), done.output
        assert ends in done.stdout
    done = trace("xray", str(file), "--number", "4")
    assert done.exit_code == 2 and "packets it holds: 3" in done.stderr


def test_a_port_that_is_not_there_and_one_it_would_lead_to(node: Node) -> None:
    node.ovs.vsctl("del-port", "veth102")
    node.ovs.vsctl("del-port", "from-mgmt")
    try:
        gone = trace("xray", "tcp,nw_dst=10.0.0.100")
        ends = trace("nm-mgmt", "tcp,nw_src=10.1.0.50,nw_dst=10.1.0.200,tp_dst=9573")
    finally:
        node.ovs.vsctl("add-port", "vmbr0", "veth102")
        node.ovs.vsctl("add-port", "vmbr1", "from-mgmt")
        node.controller.wait_steady()
    assert gone.exit_code == 2 and "no port veth102" in gone.stderr and "warp0" in gone.stderr
    assert ends.exit_code == 0 and "leaves by to-mgmt\n" in ends.stdout, ends.output


def test_what_cannot_be_found_out_says_what_to_do(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    packet = "tcp,nw_dst=10.0.0.100"
    monkeypatch.setenv("OVS_RUNDIR", "/nonexistent")
    done = trace("xray", packet)
    assert done.exit_code == 2 and "OVS_RUNDIR" in done.stderr and "/nonexistent/db.sock" in done.stderr
    monkeypatch.setenv("OVS_RUNDIR", str(node.ovs.directory))
    monkeypatch.setenv("PATH", "/nonexistent")
    done = trace("xray", packet)
    assert done.exit_code == 2 and "install Open vSwitch" in done.stderr


def test_a_dead_switch_is_said_so(node: Node) -> None:
    """Last in this file: nothing goes on after it."""
    node.ovs.kill_vswitchd()
    done = trace("xray", "tcp,nw_dst=10.0.0.100", "--json")
    assert done.exit_code == 2 and not done.stdout
    assert "Start Open vSwitch" in done.stderr and "Traceback" not in done.stderr
    (node.ovs.directory / "ovs-vswitchd.pid").unlink()
    done = trace("xray", "tcp,nw_dst=10.0.0.100")
    assert done.exit_code == 2 and "expected a running ovs-vswitchd" in done.stderr
