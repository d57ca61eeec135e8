"""The agent: a bare host built, built again, healed; containers from a state file to their first packet. Needs root."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import yaml

from bench.harness import Figure, spread
from controller.eventread import read
from controller.events import Kind
from lab.ovs import LabError, PrivateOvs, die_with_parent
from lab.world import Place

DAMAGE = {
    "veth deleted": "ip link delete veth110",
    "port removed": "ovs-vsctl --db={db} del-port vmbr0 veth110",
    "address removed": "ip -n bulkhead-110 address delete {address} dev eth0",
    "route removed": "ip -n bulkhead-110 route delete default",
    "namespace deleted": "ip netns delete bulkhead-110",
    "nft rule added": "nft insert rule inet bulkhead forward accept",
    "WireGuard key changed": "wg genkey | ip netns exec bulkhead-warp0 wg set wg-warp0 private-key /dev/stdin",
}


def _state(containers: int, lxc: tuple[int, ...] = ()) -> dict[str, Any]:
    listed: list[dict[str, Any]] = []
    for number in range(containers):
        properties = {"name": f"c{number}", "ipv4_address": f"10.0.0.{2 + number}/24", "network": "privacy"}
        listed.append({"id": str(100 + number), "properties": properties})
        if number in lxc:
            listed[-1] |= {"driver": "lxc", "template": "busybox"}
    privacy = {
        "bridge": "vmbr0", "subnet": "10.0.0.0/24", "gateway": "10.0.0.1", "ids": "100-350", "egress": {"port": "warp0"},
    }  # fmt: skip
    return {"networks": {"privacy": privacy}, "lxc": {"containers": listed}}


class Host:
    """A private host with Open vSwitch and a controller."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o755)
        self.directory = directory
        self.state_file = directory / "node.yaml"
        self.place = Place(private=True)
        self.ovs = PrivateOvs(directory / "ovs", namespace=self.place)
        self.agent = 0
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.ovs.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        with contextlib.suppress(LabError):
            self.command("down", str(self.state_file))
        self.ovs.close()

    def _line(self, *arguments: str) -> list[str]:
        line = [sys.executable, "-c", "from controller.cli import main; main()", *arguments]
        own = {
            "BULKHEAD_RUN_DIR": self.directory / "run",
            "BULKHEAD_STATE_DIR": self.directory / "state",
            "BULKHEAD_EVENTS": self.directory / "events",
            "BULKHEAD_OVSDB": self.ovs.db,
        }
        return self.place.command("env", *(f"{name}={value}" for name, value in own.items()), *line)

    def command(self, *arguments: str) -> None:
        """Run a command of ours to its end."""
        subprocess.run(self._line(*arguments), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one."""
        process = subprocess.Popen(
            self._line(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        self._running.append(process)
        return process

    def say(self, state: dict[str, Any]) -> None:
        """Have the state file say something else."""
        self.state_file.write_text(yaml.safe_dump(state, sort_keys=False))

    def wait(self, good: Callable[[], bool], limit_s: float = 120) -> float:
        """How long it takes until something is so."""
        began = time.perf_counter()
        while not good():
            if time.perf_counter() - began > limit_s:
                raise LabError(f"the host is not built after {limit_s:g} s: {self.directory}")
            time.sleep(0.002)
        return time.perf_counter() - began

    def settled(self, containers: int) -> bool:
        """Whether the agent says that all is as wanted, and means this state."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.directory / "run/agent/status.json").read_text())
            gates = sum(row["key"].startswith("gate/") for row in found["resources"])
            return bool(found["settled"]) and found["pid"] == self.agent and gates == containers
        return False

    def healed(self) -> int:
        """How often something was healed."""
        return sum(record.kind is Kind.HOST_HEALED for record in read(self.directory / "state/events"))


def measure(containers: int, rounds: int) -> Iterator[Figure]:
    """Every figure of the agent."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as directory, Host(Path(directory)) as host:
        host.say(_state(containers))
        host.start("controller", str(host.state_file))
        host.wait(lambda: (host.directory / "run/controller.sock").exists())
        cold, agent = _built(host, containers)
        peer = _by_hand(containers)
        yield Figure(f"{containers} netns containers, cold", cold, "s", "below 20", cold < 20)
        yield Figure("the same by ip and ovs-vsctl, one command each", peer, "s")
        yield Figure("cold / by hand", cold / peer, "ratio")
        agent.terminate()
        agent.wait()
        again, agent = _built(host, containers)
        yield Figure("the same, second run", again, "s", "below 2", again < 2)
        yield _memory(host.agent)
        yield from _created(host, containers, rounds)
        yield from _damaged(host, rounds)


def _built(host: Host, containers: int) -> tuple[float, subprocess.Popen[bytes]]:
    began = time.perf_counter()
    agent = host.start("agent", str(host.state_file))
    host.agent = agent.pid  # each program on the way becomes the next
    host.wait(lambda: host.settled(containers))
    return time.perf_counter() - began, agent


def _by_hand(containers: int) -> float:
    """Somebody's script that makes the same namespaces, veths, addresses and ports, and no rule, flow or watch."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as directory, Host(Path(directory)) as host:
        host.ovs.vsctl("add-br", "vmbr0", "--", "set", "bridge", "vmbr0", "datapath_type=netdev", "fail_mode=secure")
        lines = []
        for number in range(containers):
            name, port = f"c{number}", f"veth{100 + number}"
            lines += [
                f"ip netns add {name}",
                f"ip link add {port} type veth peer name eth0 netns {name}",
                f"ethtool -K {port} tx off >/dev/null",
                f"ip link set {port} up",
                f"ovs-vsctl --db={host.ovs.db} add-port vmbr0 {port}",
                f"ip -n {name} link set eth0 up",
                f"ip -n {name} address add 10.0.0.{2 + number}/24 dev eth0",
                f"ip -n {name} route add default via 10.0.0.1",
            ]
        began = time.perf_counter()
        host.place.run("sh", "-ec", "\n".join(lines), timeout_s=300)
        took = time.perf_counter() - began
        host.place.run("sh", "-ec", "\n".join(f"ip netns delete c{number}" for number in range(containers)))
        return took


def _memory(pid: int) -> Figure:
    status = Path(f"/proc/{pid}/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return Figure("agent memory, peak", peak, "MB")


def _created(host: Host, containers: int, rounds: int) -> Iterator[Figure]:
    """From the agent's first step for a new container until a packet of it has been answered."""
    for driver, bar in (("netns", 0.3), ("lxc", 3.0)):
        took = []
        for _ in range(rounds):
            new = containers
            before = time.time()
            host.say(_state(containers + 1, (new,) if driver == "lxc" else ()))
            inside = host.place.command(
                "ip", "netns", "exec", f"bulkhead-{100 + new}", "ping", "-c1", "-W1", "-n", "10.0.0.2"
            )
            host.wait(lambda inside=inside: subprocess.run(inside, capture_output=True, check=False).returncode == 0)  # type: ignore[misc]
            if driver == "lxc":
                host.wait(lambda: host.settled(containers + 1))
            end = time.time()
            first = next(
                record.time.timestamp()
                for record in read(host.directory / "state/events")
                if record.kind is Kind.HOST_CHANGED and record.time.timestamp() > before
            )
            took.append(end - first)
            host.say(_state(containers))
            host.wait(lambda: host.settled(containers))
        value = statistics.median(took)
        yield Figure(f"create to first packet, {driver}", value, "s", f"below {bar}", value < bar, spread(took))


def _damaged(host: Host, rounds: int) -> Iterator[Figure]:
    for name, script in DAMAGE.items():
        took = []
        for _ in range(rounds):
            before = host.healed()
            host.place.run("sh", "-ec", script.format(db=host.ovs.db, address="10.0.0.12/24"))
            took.append(host.wait(lambda before=before: host.healed() > before, 20))  # type: ignore[misc]
            host.wait(lambda: host.settled(_count(host)), 20)
            time.sleep(0.2)
        worst = max(took)
        yield Figure(f"healed: {name}", worst, "s", "within 2", worst < 2, spread(took))


def _count(host: Host) -> int:
    return len(yaml.safe_load(host.state_file.read_text())["lxc"]["containers"])
