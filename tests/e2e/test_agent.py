"""The agent on a bare host: what it builds, what it heals, what it leaves."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.ovs import LabError
from tests.fakes.effort import FULL

from .agent_host import BareHost, difference, stop

STEPS = ("1+", "3", "5+", "8", "9+") if FULL else ("1+", "6", "10+", "13", "16+")
"""Before or after which step of its own an agent is killed."""
CONTAINERS = ("100", "102", "200", "201", "202")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareHost]:
    """A host that has been built; whoever damages it sees it healed."""
    with BareHost(tmp_path_factory.mktemp("host")) as built:
        built.start("up")
        built.settle()
        yield built


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[BareHost]:
    """A host with nothing on it."""
    with BareHost(tmp_path) as host:
        yield host


def test_a_bare_host_becomes_the_node(host: BareHost) -> None:
    bridges = host.ovs.vsctl("list-br").split()
    assert sorted(bridges) == ["mesh-mgmt", "mesh-privacy", "vmbr0", "vmbr1"]
    for bridge in bridges:
        assert host.ovs.vsctl("get-fail-mode", bridge).strip() == "secure"
        assert host.ovs.vsctl("get", "bridge", bridge, "other_config:disable-in-band").strip() == '"true"'
    assert sorted(host.ovs.vsctl("list-ports", "vmbr0").split()) == ["from-privacy", "veth100", "veth102", "warp0"]
    assert host.reaches("100", "10.0.0.102")
    assert host.reaches("201", "10.1.0.200")
    assert not host.reaches("102", "10.1.0.201")
    assert not host.reaches("200", "10.0.0.102")
    assert host.bulkhead("status", *host.options("run")).returncode == 0


def test_a_second_look_finds_nothing_to_do(host: BareHost) -> None:
    done = host.bulkhead("plan", str(host.state_file), *host.options("run", "state", "ovsdb"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("host: 0 to add, 0 to change, 0 to remove\n")


def test_a_second_agent_is_refused(host: BareHost) -> None:
    done = host.bulkhead("agent", str(host.state_file), *host.options("run", "state", "ovsdb"))
    assert done.returncode == 2
    assert "an agent runs already" in done.stderr and "Traceback" not in done.stderr


def test_verify_finds_the_host_sound(host: BareHost) -> None:
    done = host.bulkhead("verify", str(host.state_file), *host.options("ovsdb"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    listed = host.machine.run("nft", "list", "table", "netdev", "bulkhead")
    ports = [name for bridge in ("vmbr0", "vmbr1", "mesh-privacy", "mesh-mgmt") for name in host.ovs.vsctl("list-ports", bridge).split()]  # fmt: skip
    assert len(ports) == 12
    assert all(f'device "{name}"' in listed for name in ports)


DAMAGE = {
    "veth": "ip link delete veth102",
    "port": "ovs-vsctl --db={db} del-port vmbr0 veth102",
    "bridge": "ovs-vsctl --db={db} del-br vmbr0",
    "fail-mode": "ovs-vsctl --db={db} set-fail-mode vmbr0 standalone",
    "controller": "ovs-vsctl --db={db} del-controller vmbr0",
    "in-band": "ovs-vsctl --db={db} remove bridge vmbr0 other-config disable-in-band",
    "address": "ip -n bulkhead-102 address delete 10.0.0.102/24 dev eth0",
    "route": "ip -n bulkhead-102 route delete default",
    "wrong-route": "ip -n bulkhead-102 route replace default via 10.0.0.100",
    "mac": "ip -n bulkhead-102 link set eth0 address 02:00:00:00:00:99",
    "mtu": "ip -n bulkhead-102 link set eth0 mtu 1500",
    "down": "ip -n bulkhead-102 link set eth0 down",
    "port-down": "ip link set veth102 down",
    "namespace": "ip netns delete bulkhead-102",
    "leg-address": "ip -n bulkhead-warp0 address add 10.9.9.9/24 dev eth0",
    "neighbour": "ip -n bulkhead-warp0 neighbour delete 169.254.0.1 dev eth0",
    "leg-route": "ip -n bulkhead-warp0 route delete 10.0.0.0/24",
    "pair": "ip link delete to-privacy",
    "rule": "nft insert rule inet bulkhead forward accept",
    "table": "nft delete table inet bulkhead",
    "ingress": "nft delete table netdev bulkhead",
    "leg-rule": "ip netns exec bulkhead-warp0 nft insert rule inet bulkhead forward accept",
    "sysctl": "sysctl -qw net.ipv6.conf.veth102.disable_ipv6=0",
    "leg-sysctl": "ip netns exec bulkhead-warp0 sysctl -qw net.ipv4.ip_forward=0",
    "tunnel": "ip -n bulkhead-warp0 link delete wg-warp0",
    "tunnel-route": "ip -n bulkhead-warp0 route delete default",
    "tunnel-key": "wg genkey | ip netns exec bulkhead-warp0 wg set wg-warp0 private-key /dev/stdin",
    "host-address": "ip address delete 10.1.0.1/24 dev vmbr1",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_healed_with_an_event(host: BareHost, damage: str) -> None:
    before = len(host.events("host_healed"))
    host.machine.sh(DAMAGE[damage].format(db=host.ovs.db))
    # From the moment of the damage; the bar is two seconds, and the machine may be busy with other tests.
    host.until(lambda: len(host.events("host_healed")) > before, 10, "healed")
    host.settle(10)
    assert host.bulkhead("plan", str(host.state_file), *host.options("run", "state", "ovsdb")).returncode == 0
    host.until(lambda: host.reaches("100", "10.0.0.102"), 10, "reachable")
    assert not host.reaches("102", "10.1.0.201")


def test_what_is_not_ours_is_left_alone(host: BareHost) -> None:
    host.machine.sh("ip tuntap add mine mode tap; ip netns add theirs; nft add table inet theirs")
    host.ovs.vsctl("add-br", "br-theirs", "--", "set", "bridge", "br-theirs", "datapath_type=netdev")
    host.ovs.vsctl("add-port", "br-theirs", "mine")
    state = host.state_file.read_text()
    host.state_file.write_text(state.replace('ids: "100-199"', 'ids: "100-198"'))
    time.sleep(1)
    host.settle()
    host.machine.sh("ip link show mine; ip netns exec theirs true; nft list table inet theirs")
    assert host.ovs.vsctl("list-ports", "br-theirs").split() == ["mine"]
    host.state_file.write_text(state)
    host.ovs.vsctl("del-br", "br-theirs")
    host.machine.sh("ip link delete mine; ip netns delete theirs; nft delete table inet theirs")


def test_a_container_comes_and_goes_with_the_file(host: BareHost) -> None:
    state = host.state_file.read_text()
    added = """
    - id: "103"
      properties: {name: relay, ipv4_address: 10.0.0.103/24, network: privacy}
"""
    host.state_file.write_text(state.rstrip() + added)
    host.until(lambda: host.reaches("100", "10.0.0.103"), 10, "reachable")
    host.state_file.write_text(state)
    host.until(lambda: "bulkhead-103" not in host.machine.run("ip", "netns", "list"), 10, "gone")
    host.until(lambda: "veth103" not in host.ovs.vsctl("list-ports", "vmbr0").split(), 10, "off the bridge")
    with pytest.raises(LabError):
        host.machine.run("ip", "link", "show", "veth103")


def test_a_bad_file_changes_nothing(host: BareHost) -> None:
    state = host.state_file.read_text()
    host.state_file.write_text(state.replace("10.0.0.102/24", "10.0.0.300/24"))
    host.until(lambda: bool(host.events("state_rejected")), 10, "rejected")
    assert "10.0.0.300" in host.events("state_rejected")[-1].text
    assert host.reaches("100", "10.0.0.102")
    host.state_file.write_text(state)


def test_stopping_leaves_everything_and_down_takes_it_away(bare: BareHost) -> None:
    before = bare.facts()
    up = bare.start("up")
    bare.settle()
    assert stop(up) == 0
    assert bare.reaches("100", "10.0.0.102")
    done = bare.bulkhead("down", str(bare.state_file), *bare.options("run", "state", "ovsdb"))
    assert (done.returncode, done.stderr) == (0, "")
    assert difference(before, bare.facts()) == []
    again = bare.bulkhead("down", str(bare.state_file), *bare.options("run", "state", "ovsdb"))
    assert (again.returncode, again.stdout) == (0, "nothing of ours is left\n")


def test_down_stops_a_running_agent_first(bare: BareHost) -> None:
    before = bare.facts()
    up = bare.start("up")
    bare.settle()
    done = bare.bulkhead("down", str(bare.state_file), *bare.options("run", "state", "ovsdb"))
    assert (done.returncode, done.stderr) == (0, "")
    assert up.wait(10) == 0
    assert difference(before, bare.facts()) == []


def test_a_bridge_that_was_there_is_taken_over_and_given_back(bare: BareHost) -> None:
    for name in ("vmbr0", "vmbr1"):
        bare.ovs.vsctl("add-br", name, "--", "set", "bridge", name, "datapath_type=netdev")
    bare.machine.sh("ip link add theirs type veth peer name theirs-far; ip link set theirs up; ip link set vmbr1 up")
    bare.machine.sh("ip address add 192.0.2.77/32 dev vmbr1; ip route add 192.0.2.78/32 dev vmbr1")
    bare.ovs.vsctl("add-port", "vmbr0", "theirs")
    before = bare.facts()
    up = bare.start("up")
    bare.settle()
    assert bare.ovs.vsctl("get-fail-mode", "vmbr0").strip() == "secure"
    assert "theirs" in bare.ovs.vsctl("list-ports", "vmbr0").split()
    assert "10.1.0.1/24" in bare.machine.run("ip", "address", "show", "dev", "vmbr1")
    assert "vmbr0" in bare.machine.run("ip", "route")
    stop(up)
    assert bare.bulkhead("down", str(bare.state_file), *bare.options("run", "state", "ovsdb")).returncode == 0
    assert difference(before, bare.facts()) == []
    assert "UP" not in bare.machine.run("ip", "-br", "link", "show", "vmbr0").split("<")[1].split(",")


def test_a_stranger_of_that_name_is_told_and_left_alone(bare: BareHost) -> None:
    bare.machine.sh("ip tuntap add veth102 mode tap")
    bare.start("up")
    bare.until(lambda: any("veth102" in event.text for event in bare.events("host_error")), 20, "told")
    text = next(event.text for event in bare.events("host_error") if "veth102" in event.text)
    assert "is there already" in text and "tun" in text
    bare.until(lambda: bare.reaches("201", "10.1.0.200"), 20, "the others built")
    assert "tun" in bare.machine.run("ip", "-d", "link", "show", "veth102")
    bare.machine.sh("ip link delete veth102")
    bare.until(lambda: bare.reaches("100", "10.0.0.102"), 20, "built once it is gone")


def test_a_key_file_that_goes_bad_takes_no_tunnel_down(bare: BareHost) -> None:
    key = bare.directory / "warp.key"
    key.write_text("GAo65ymUXE7e8FrXbuSITPYUqeUUDCxMmzOn9DWkK3M=\n")
    key.chmod(0o600)
    state = bare.state_file.read_text()
    bare.state_file.write_text(state.replace("    enabled: true\n", f"    private_key_file: {key}\n", 1))
    bare.start("up")
    bare.settle()
    before = bare.inside("warp0", "wg", "show", "wg-warp0", "public-key")
    key.chmod(0o644)
    bare.until(lambda: any("chmod 600" in event.text for event in bare.events("host_error")), 10, "told")
    assert bare.inside("warp0", "wg", "show", "wg-warp0", "public-key") == before
    assert "warp0" in bare.ovs.vsctl("list-ports", "vmbr0").split()
    assert bare.bulkhead("status", *bare.options("run")).returncode == 1
    key.chmod(0o600)
    bare.settle()
    assert bare.inside("warp0", "wg", "show", "wg-warp0", "public-key") == before


def test_no_open_vswitch_is_told_and_waited_for(bare: BareHost) -> None:
    socket = bare.directory / "ovs" / "db.sock"
    hidden = socket.with_name("hidden")
    socket.rename(hidden)
    bare.start("agent")
    bare.until(lambda: any("Open vSwitch does not answer" in e.text for e in bare.events("host_error")), 20, "told")
    hidden.rename(socket)
    bare.start("controller")
    bare.settle()


def test_without_a_controller_no_container_comes_up(bare: BareHost) -> None:
    bare.start("agent")
    bare.until(lambda: any(row["key"] == "ports/vmbr0" and row["phase"] == "done" for row in bare.status()["resources"]), 20, "ports made")  # fmt: skip
    time.sleep(0.5)
    assert "DOWN" in bare.machine.run("ip", "-n", "bulkhead-102", "-br", "link", "show", "eth0")
    row = next(row for row in bare.status()["resources"] if row["key"] == "gate/veth102")
    assert row["phase"] == "pending" and "controller" in row["why"]
    bare.start("controller")
    bare.settle()
    assert bare.reaches("100", "10.0.0.102")


def test_killed_again_and_again_it_goes_on(bare: BareHost) -> None:
    """The agent is killed right before or right after a step, run after run, until there is nothing left to do."""
    bare.start("controller")
    chance = random.Random(4)
    kills = 0
    while True:
        agent = bare.start("agent", {"BULKHEAD_DIE_AT": chance.choice(STEPS)})
        bare.until(lambda a=agent: a.poll() is not None or bare.status()["settled"], 20, "killed or settled")  # type: ignore[misc]
        if agent.poll() is None:
            break
        kills += 1
        bare.status_file.unlink(missing_ok=True)
    assert kills > 15
    rough = bare.facts()
    stop(agent)
    assert bare.bulkhead("down", str(bare.state_file), *bare.options("run", "state", "ovsdb")).returncode == 0
    bare.start("agent")
    bare.settle()
    assert difference(bare.facts(), rough) == []


def test_not_root_is_said() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "true"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("cannot become somebody else")
    command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c"]
    code = "from controller.cli import main; main(['agent', '/dev/null'])"
    done = subprocess.run([*command, code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 2
    assert "sudo" in done.stderr or "No module" in done.stderr
