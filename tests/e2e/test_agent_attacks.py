"""What was done to the agent on purpose, and by what it was broken once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.agent.telling import BURST
from lab.ovs import die_with_parent

from .agent_host import BareHost, stop
from .conftest import STATE_FILE
from .host import ROOT

PEER = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
COMMAND = '      command: [sh, -c, "sleep 777 & exec sleep 778"]\n'
HEALED_S = 2.0


def rich() -> str:
    """The example with a resolver, a peer and a container that runs something."""
    text = STATE_FILE.read_text()
    peer = f'    peers: [{{public_key: "{PEER}", endpoint: "192.0.2.1:51820", allowed_ips: [0.0.0.0/0]}}]\n'
    for old, new in (
        ("    egress: {port: warp0}\n", "    egress: {port: warp0}\n    dns: {}\n"),
        ('    - id: "102"\n', f'    - id: "102"\n{COMMAND}'),
        ("    enabled: true\n", f"    enabled: true\n    addresses: [172.16.0.2/32]\n{peer}"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    return text


@contextlib.contextmanager
def _host() -> Iterator[BareHost]:
    """Where a resolver that runs as nobody gets to, which is not below pytest's directories."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        with BareHost(Path(directory), rich()) as host:
            yield host


@pytest.fixture(scope="module")
def host() -> Iterator[BareHost]:
    """A host that has been built; whoever damages it sees it healed."""
    with _host() as built:
        built.start("up")
        built.settle(60)
        yield built


@pytest.fixture
def bare() -> Iterator[BareHost]:
    """A host with nothing on it."""
    with _host() as host:
        yield host


def told(host: BareHost, after: int = 0) -> list[dict[str, object]]:
    """The agent's events, read as they are: asking for them takes too long to measure by."""
    lines = [
        line for path in sorted((host.state_dir / "events").glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["seq"] > after]


def down(host: BareHost) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = host.bulkhead(
        "down", str(host.state_file), *host.options("run", "state", "ovsdb")
    )
    return done


def inner(process: subprocess.Popen[str]) -> int:
    """The process that was started inside."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else process.pid


def differences(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: (before[name], text) for name, text in after.items() if text != before[name]}


DAMAGE = {
    "forwarding": "ip netns exec bulkhead-warp0 sysctl -qw net.ipv4.ip_forward=0",
    "host-forwarding": "sysctl -qw net.ipv4.conf.vmbr1.forwarding=1",
    "rule-added": "nft insert rule inet bulkhead forward accept",
    "chain-flushed": "nft flush chain inet bulkhead forward",
    "table-deleted": "nft delete table inet bulkhead",
    "ingress-deleted": "nft delete table netdev bulkhead",
    "leg-rules-flushed": "ip netns exec bulkhead-warp0 nft flush table inet bulkhead",
    "veth-renamed": "ip link set veth102 down; ip link set veth102 name other",
    "eth0-renamed": "ip -n bulkhead-102 link set eth0 down; ip -n bulkhead-102 link set eth0 name other",
    "port-moved": "ovs-vsctl --db={db} del-port vmbr0 veth102 -- add-port vmbr1 veth102",
    "port-type": "ovs-vsctl --db={db} set interface veth102 type=internal",
    "port-mark": "ovs-vsctl --db={db} clear port veth102 external_ids",
    "datapath-type": "ovs-vsctl --db={db} set bridge vmbr0 datapath_type=system",
    "datapath-id": "ovs-vsctl --db={db} set bridge vmbr0 other_config:datapath-id=0000000000000042",
    "protocols": "ovs-vsctl --db={db} set bridge vmbr0 protocols=OpenFlow10",
    "peer-removed": f"wg set wg-warp0 peer {PEER} remove",
    "peer-added": "wg set wg-warp0 peer BmXOC+F1FxEMF9dyiK2H5/1SUtzH0JuVo51h2wPfgyo= allowed-ips 1.1.1.1/32",
    "endpoint": f"wg set wg-warp0 peer {PEER} endpoint 192.0.2.9:1",
    "tunnel-killed": "kill -9 $(pgrep -x -f 'wireguard-go -f wg-warp0')",
    "resolv.conf": "echo nameserver 9.9.9.9 > /etc/netns/bulkhead-102/resolv.conf",
    "etc-removed": "rm -r /etc/netns/bulkhead-102",
    "resolver-killed": "kill -9 $(pgrep -x dnsmasq)",
    "names": "echo 10.0.0.9 xray > {run}/agent/names/privacy.hosts/hosts",
    "command-killed": "kill -9 $(pgrep -x -f 'sleep 778')",
    "neighbour": "ip -n bulkhead-warp0 neigh replace 169.254.0.1 lladdr 02:00:00:00:00:77 dev eth0",
    "loopback": "ip -n bulkhead-102 link set lo down",
    "ipv6": "ip netns exec bulkhead-102 sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0",
    "ipv6-leg": "ip netns exec bulkhead-warp0 sysctl -qw net.ipv6.conf.wg-warp0.disable_ipv6=0",
    "second-address": "ip -n bulkhead-102 address add 10.0.0.177/24 dev eth0",
    "bridge-down": "ip link set vmbr1 down",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_healed_with_an_event(host: BareHost, damage: str) -> None:
    seen = max(int(str(event["seq"])) for event in told(host))
    host.machine.sh(DAMAGE[damage].format(db=host.ovs.db, run=host.run_dir))
    took = host.until(lambda: any(e["kind"] == "host_healed" for e in told(host, seen)), 10, "healed")
    host.settle(10)
    host.until(lambda: host.reaches("100", "10.0.0.102"), 10, "reachable")
    assert not host.reaches("102", "10.1.0.201")
    # The bar, and what a machine that is busy with other tests may add.
    assert took < 2 * HEALED_S
    done = host.bulkhead("plan", str(host.state_file), *host.options("run", "state", "ovsdb"))
    assert done.stdout.startswith("host: 0 to add, 0 to change, 0 to remove\n")


def test_a_wish_for_another_port_number_does_not_cut_a_container_off(host: BareHost) -> None:
    host.ovs.vsctl("set", "interface", "veth102", "ofport_request=77")
    host.until(lambda: host.reaches("100", "10.0.0.102"), 10, "reachable")
    host.ovs.vsctl("clear", "interface", "veth102", "ofport_request")
    host.until(lambda: host.reaches("100", "10.0.0.102"), 10, "reachable")


def test_a_state_file_that_is_none_is_refused(host: BareHost) -> None:
    good, pid = host.state_file.read_text(), host.status()["pid"]
    for content in (None, os.urandom(5000), b"x" * 6_000_000):
        seen = max(int(str(event["seq"])) for event in told(host))
        host.state_file.unlink()
        if content is not None:
            host.state_file.write_bytes(content)
        host.until(lambda s=seen: any(e["kind"] == "state_rejected" for e in told(host, s)), 10, "refused")
        host.state_file.write_text(good)
    host.settle(10)
    assert host.status()["pid"] == pid
    assert host.reaches("100", "10.0.0.102")


def test_what_the_file_changes_is_no_healing_and_leaves_nothing(host: BareHost) -> None:
    good = host.state_file.read_text()
    seen = max(int(str(event["seq"])) for event in told(host))
    host.state_file.write_text(good.replace("10.0.0.102/24", "10.0.0.103/24"))
    host.until(lambda: host.reaches("100", "10.0.0.103"), 10, "reachable")
    host.settle(10)
    addresses = re.findall(r"inet (\S+)", host.inside("102", "ip", "address", "show", "eth0"))
    assert addresses == ["10.0.0.103/24"]
    assert not [event for event in told(host, seen) if event["kind"] == "host_healed"]
    host.state_file.write_text(good)
    host.until(lambda: host.reaches("100", "10.0.0.102"), 10, "reachable")


def test_another_name_for_a_bridge(host: BareHost) -> None:
    good = host.state_file.read_text()
    host.state_file.write_text(good.replace("vmbr0", "brpriv"))
    host.until(lambda: "brpriv" in host.ovs.vsctl("list-br").split(), 10, "made")
    host.until(lambda: host.reaches("100", "10.0.0.102"), 20, "reachable")
    assert "vmbr0" not in host.ovs.vsctl("list-br").split()
    host.state_file.write_text(good)
    host.until(lambda: "vmbr0" in host.ovs.vsctl("list-br").split(), 10, "made")
    host.until(lambda: host.reaches("100", "10.0.0.102"), 20, "reachable")
    host.settle()


def test_a_command_that_always_ends_is_not_told_for_ever(host: BareHost) -> None:
    good = host.state_file.read_text()
    seen = max(int(str(event["seq"])) for event in told(host))
    host.state_file.write_text(good.replace("sleep 777 & exec sleep 778", "echo no such thing; sleep 0.3"))
    host.until(lambda: any("no such thing" in str(e["text"]) for e in told(host, seen)), 15, "told")
    time.sleep(8)
    assert len(told(host, seen)) < 25
    host.state_file.write_text(good)
    host.until(lambda: "sleep 778" in host.machine.run("ps", "-e", "-o", "args="), 10, "running")
    host.settle()


def test_what_flaps_does_not_flood_the_log(host: BareHost) -> None:
    seen = max(int(str(event["seq"])) for event in told(host))
    flap = "for i in 1 2 3 4 5 6 7 8; do ip -n bulkhead-102 route delete default || true; sleep 0.03; done"
    until = time.monotonic() + 60
    while len(told(host, seen)) < BURST and time.monotonic() < until:
        host.machine.sh(flap)
    for _ in range(10):
        host.machine.sh(flap)
    host.settle(10)
    assert 5 < len(told(host, seen)) < 60
    # Told once there is room again.
    host.until(lambda: any("were not recorded" in str(e["text"]) for e in told(host, seen)), 15, "counted")


def test_a_database_that_is_away_holds_up_nothing_else(bare: BareHost) -> None:
    bare.start("up")
    bare.settle(60)
    pid = bare.machine.sh(f"pgrep -f '^ovsdb-server .*{bare.ovs.db}'").strip()
    line = bare.machine.sh(f"tr '\\0' '\\n' < /proc/{pid}/cmdline").split("\n")[:-1]
    bare.machine.sh(
        f"kill -9 {pid}; sleep 0.3; ip link delete veth102; ip -n bulkhead-201 address delete 10.1.0.201/24 dev eth0"
    )
    took = bare.until(lambda: "10.1.0.201/24" in bare.machine.run("ip", "-n", "bulkhead-201", "address"), 20, "healed")
    assert took < 2 * HEALED_S
    (bare.directory / "ovs" / "db.sock").unlink()
    again = subprocess.Popen(bare.machine.command(*line), stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    try:
        bare.until(lambda: bare.reaches("100", "10.0.0.102"), 20, "reachable once it is back")
        bare.settle()
    finally:
        again.kill()
        again.wait()


def test_down_takes_away_what_commands_have_started(bare: BareHost) -> None:
    before = bare.facts()
    up = bare.start("up")
    bare.settle(60)
    assert "sleep 777" in bare.facts()["processes"]
    stop(up)
    done = down(bare)
    assert (done.returncode, done.stderr) == (0, "")
    assert differences(before, bare.facts()) == {}


def test_down_killed_again_and_again_ends_what_it_began(bare: BareHost) -> None:
    before = bare.facts()
    stop_when_settled(bare)
    for lines in (1, 2, 3, 1, 4, 2):
        command = bare.command("down", str(bare.state_file), *bare.options("run", "state", "ovsdb"))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert process.stdout is not None
        for _, _line in zip(range(lines), process.stdout, strict=False):
            pass
        if process.poll() is None:
            os.kill(inner(process), signal.SIGKILL)
        process.stdout.close()
        process.wait()
    done = down(bare)
    assert (done.returncode, done.stderr) == (0, "")
    assert differences(before, bare.facts()) == {}


def stop_when_settled(host: BareHost) -> None:
    up = host.start("up")
    host.settle(60)
    stop(up)


def test_down_stops_an_up_that_was_started_elsewhere(bare: BareHost) -> None:
    before = bare.facts()
    words = [sys.executable, "-c", "from controller.cli import main; main()", "up", "node.yaml"]
    place = f"--wd={bare.directory}"
    with (bare.directory / "up.log").open("w") as log:
        up = subprocess.Popen(
            ["nsenter", f"--target={bare.machine.pid}", "--net", "--mount", "--pid", place, "--", *words]
            + bare.options("run", "state", "events", "ovsdb"),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    bare.settle(60)
    done = down(bare)
    assert (done.returncode, done.stderr) == (0, "")
    assert up.wait(10) == 0
    assert differences(before, bare.facts()) == {}


def test_an_up_that_is_killed_leaves_no_agent_and_no_controller(bare: BareHost) -> None:
    up = bare.start("up")
    bare.settle(60)
    os.kill(inner(up), signal.SIGKILL)
    bare.until(lambda: "controller.cli" not in bare.machine.run("ps", "-e", "-o", "args="), 10, "gone")
    bare.start("up")
    bare.settle()
    assert bare.reaches("100", "10.0.0.102")


def test_two_at_once_are_one(bare: BareHost) -> None:
    both = [bare.start("up"), bare.start("up")]
    bare.settle(60)
    bare.until(lambda: any(up.poll() is not None for up in both), 10, "refused")
    assert sorted(str(up.poll()) for up in both) == ["2", "None"]
    assert "runs already" in bare.log("up")
    assert "starting it again" not in bare.log("up")


def test_a_full_disk_is_told_and_got_over(bare: BareHost) -> None:
    for directory in (bare.run_dir, bare.state_dir):
        directory.mkdir()
        bare.machine.sh(
            f"mount -t tmpfs -o size=40k,mode=755 small {directory}; head -c 1M /dev/zero > {directory}/full || true"
        )
    agent = bare.start("agent")
    assert agent.wait(20) == 2
    assert "No space left" in bare.log("agent") and "Traceback" not in bare.log("agent")
    for directory in (bare.run_dir, bare.state_dir):
        bare.machine.sh(f"mount -o remount,size=20m {directory}; rm {directory}/full")
    bare.start("controller")
    agent = bare.start("agent")
    bare.until(lambda: bare.reaches("100", "10.0.0.102"), 30, "reachable")
    for directory in (bare.run_dir, bare.state_dir):
        bare.machine.sh(f"head -c 30M /dev/zero > {directory}/full || true")
    bare.machine.sh("ip link delete veth102")
    bare.until(lambda: bare.reaches("100", "10.0.0.102"), 10, "healed on a full disk")
    assert agent.poll() is None
    assert "defect" not in bare.log("agent")
