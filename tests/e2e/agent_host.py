"""A bare host with nothing on it but Open vSwitch, for tests that have the agent build it."""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from controller.eventfiles import EventLogError
from controller.eventread import read
from controller.events import Record
from lab.ovs import LabError, PrivateOvs, die_with_parent

from .conftest import STATE_FILE
from .host import ROOT, Machine

STATUS = "agent/status.json"


class BareHost:
    """Start it and close it. `agent` and `controller` are run by the test, `bulkhead` asks.

    `up` has no API but where `with_api` says so: it needs directories that others can pass through.
    """

    with_api = False

    def __init__(self, directory: Path, state: str | None = None) -> None:
        self.directory = directory
        self.state_file = directory / "node.yaml"
        self.state_file.write_text(state if state is not None else STATE_FILE.read_text())
        self.run_dir, self.state_dir = directory / "run", directory / "state"
        self.events_dir = directory / "events"
        self.status_file = self.run_dir / STATUS
        self.machine = Machine(private_etc=True)
        self.ovs = PrivateOvs(directory / "ovs", namespace=self.machine)
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            self.machine.sh("ip link set lo up")
            self.ovs.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of it; all else goes with its namespaces."""
        for process in self._started:
            process.kill()
            process.wait()
        self.ovs.close()

    def command(self, *arguments: str) -> list[str]:
        """A command line of ours, inside."""
        return self.machine.command(sys.executable, "-c", "from controller.cli import main; main()", *arguments)

    def options(self, *which: str) -> list[str]:
        """Options that keep a command to this host."""
        known = {
            "run": ["--run-dir", str(self.run_dir)],
            "state": ["--state-dir", str(self.state_dir)],
            "events": ["--events", str(self.events_dir)],
            "ovsdb": ["--ovsdb", self.ovs.db],
        }
        return [word for name in which for word in known[name]]

    def start(self, what: str, env: Mapping[str, str] | None = None, *more: str) -> subprocess.Popen[str]:
        """Start `agent`, `controller` or `up`; what it says goes to a log file."""
        if what == "up" and not self.with_api:
            more = (*more, "--no-api")
        wants = {"agent": "run state ovsdb", "controller": "run events ovsdb", "up": "run state events ovsdb"}[what]
        with (self.directory / f"{what}.log").open("a") as log:
            process = subprocess.Popen(
                self.command(what, str(self.state_file), *self.options(*wants.split()), *more, "-v"),
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._started.append(process)
        return process

    def bulkhead(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ours inside, to its end."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        return subprocess.run(
            self.command(*arguments), env=env, capture_output=True, text=True, timeout=60, check=False
        )

    def status(self) -> dict[str, Any]:
        """What the agent has written down about itself."""
        try:
            found: dict[str, Any] = json.loads(self.status_file.read_text())
        except (OSError, ValueError):
            return {"settled": False, "resources": []}
        return found

    def settle(self, limit_s: float = 30) -> None:
        """Wait until the host is as its state file says."""
        self.until(lambda: self.status()["settled"] and self.status()["pid"] in self.pids(), limit_s, "settled")

    def until(self, good: Callable[[], bool], limit_s: float, what: str) -> float:
        """Wait until something is so; answers how long it took."""
        began = time.monotonic()
        while not good():
            if time.monotonic() - began > limit_s:
                rows = [row for row in self.status()["resources"] if row["phase"] != "done"]
                raise AssertionError(f"not {what} after {limit_s} s: {rows}\n{self._how_it_is()}")
            time.sleep(0.02)
        return time.monotonic() - began

    def _how_it_is(self) -> str:
        """What may tell why it is not as it should be."""
        said = "\n".join(self.log(name)[-2000:] for name in ("agent", "controller", "up"))
        asked = ("ip -br address", "ip -n bulkhead-102 -br address; ip -n bulkhead-102 route; ip -n bulkhead-102 neigh")
        ports = f"ovs-vsctl --db={self.ovs.db} --columns=name,ofport,error,external_ids,type list interface"
        flows = f"ovs-ofctl dump-flows {self.ovs.ctl.parent}/vmbr0.mgmt table=0"
        return "\n".join([said, *(self.machine.sh(f"{script} || true") for script in (*asked, ports, flows))])

    def pids(self) -> set[int]:
        """Ids of the processes inside, as they see them."""
        return {int(word) for word in self.machine.run("ps", "-e", "-o", "pid=").split()}

    def log(self, what: str) -> str:
        """What a process has said."""
        path = self.directory / f"{what}.log"
        return path.read_text() if path.exists() else ""

    def events(self, kind: str) -> list[Record]:
        """Events of the agent of one kind."""
        try:
            return [record for record in read(self.state_dir / "events") if record.kind == kind]
        except EventLogError:
            return []

    def inside(self, container: str, *command: str) -> str:
        """Run a command in a container or leg. Raises `LabError` if it fails."""
        return self.machine.run("ip", "netns", "exec", f"bulkhead-{container}", *command)

    def reaches(self, container: str, address: str) -> bool:
        """Whether a ping gets through."""
        try:
            self.inside(container, "ping", "-c1", "-W1", "-n", address)
        except LabError:
            return False
        return True

    def facts(self) -> dict[str, str]:
        """Everything of the host that an agent could change, for a comparison."""
        asked = {
            "links": "ip -br link | sed 's/@.*//' | awk '{print $1}' | sort",
            "addresses": "ip -o address | awk '{print $2,$4}' | sort",
            "routes": "ip route; ip -6 route | grep -v fe80 || true",
            "rules": "nft -s list ruleset; ip rule",
            "namespaces": "ls /run/netns",
            "etc": "find /etc/netns 2>/dev/null || true",
            "bridges": f"ovs-vsctl --db={self.ovs.db} --no-heading --columns=name,fail_mode,ports list bridge | "
            "sed 's/[0-9a-f-]\\{36\\}/id/g' | sort",
            "controllers": f"ovs-vsctl --db={self.ovs.db} --no-heading --columns=target list controller | sort",
            "processes": "ps -e -ww -o args= | grep -v -e 'ps -e' -e defunct -e '^ping' -e '^sh -ec' -e grep -e sort | sort",
            "sysctls": "sysctl -a 2>/dev/null | grep -e forward -e rp_filter -e disable_ipv6 | grep -v -e '\\.mc_' | sort",
            "wireguard": "ls /run/wireguard",
        }
        return {name: self.machine.sh(script) for name, script in asked.items()}


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Lines of facts that differ."""
    pairs = [(before[name].splitlines(), after[name].splitlines()) for name in before]
    lines = [line for old, new in pairs for line in difflib.unified_diff(old, new, lineterm="", n=0)]
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def stop(process: subprocess.Popen[str]) -> int:
    """End a process that was started in a host, by SIGTERM to what runs inside."""
    # `nsenter` has become, or is waiting for, the command: its only child is in the process id namespace of the host.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children or [str(process.pid)]:
        os.kill(int(pid), signal.SIGTERM)
    return process.wait(20)
