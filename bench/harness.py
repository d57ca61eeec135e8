"""What the measurements share: a controller process in a private namespace, big state files, figures. Needs root."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.ovs import LabError, PrivateOvs

FLOWS_PER_CONTAINER = 13


@dataclass(frozen=True, slots=True)
class Figure:
    """One result. `value` in `unit`; `bar` says what it should be, `met` whether it is (None: no bar)."""

    name: str
    value: float
    unit: str
    bar: str = ""
    met: bool | None = None
    detail: str = ""

    def as_dict(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


def spread(values: Iterable[float]) -> str:
    """Minimum, median and maximum, for the detail of a figure."""
    found = sorted(values)
    return f"min {found[0]:.4g}, median {statistics.median(found):.4g}, max {found[-1]:.4g} of {len(found)}"


def big_state(containers: int) -> dict[str, Any]:
    """A state file with one privacy network of so many containers, each with a service."""
    return {
        "networks": {
            "privacy": {
                "bridge": "vmbr0",
                "subnet": "10.0.0.0/16",
                "gateway": "10.0.0.1",
                "ids": "100-9999",
                "egress": {"port": "warp0"},
                "mesh": {
                    "bridge": "mesh-privacy",
                    "port": "from-privacy",
                    "far_port": "to-privacy",
                    "leg_port": "nm-privacy",
                },
            }
        },
        "lxc": {
            "containers": [
                {
                    "id": str(100 + i),
                    "veth": f"veth{100 + i}",
                    "bridge": "vmbr0",
                    "running": True,
                    "properties": {
                        "name": f"c{i}",
                        "ipv4_address": f"10.0.{1 + i // 250}.{1 + i % 250}/16",
                        "gateway": "10.0.0.1",
                        "network": "privacy",
                        "services": [{"name": "s", "protocol": "tcp", "port": 9000, "exposed": True}],
                    },
                }
                for i in range(containers)
            ]
        },
    }


class Controller:
    """`bulkhead controller` in the namespace of an Open vSwitch of its own."""

    def __init__(self, ovs: PrivateOvs, state: dict[str, Any]) -> None:
        self.ovs = ovs
        self.directory = Path(tempfile.mkdtemp(prefix="bulkhead-bench-", dir=ovs.directory))
        self.file = self.directory / "state.json"
        self.write(state)
        self._seen = 0
        command = [sys.executable, "-m", "controller", "controller", str(self.file), "--run-dir", str(self.directory)]
        command += ["--events", str(self.directory / "events"), "--ovsdb", ovs.db]
        self.process = subprocess.Popen(
            ovs.namespace.command(*command), stderr=(self.directory / "err").open("w"), cwd=Path(__file__).parents[1]
        )
        self.wait_for(lambda e: e["kind"] == "controller_started")

    def write(self, state: dict[str, Any]) -> None:
        """Replace the state file at once."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(state))
        fresh.rename(self.file)

    def events(self) -> list[dict[str, Any]]:
        """Everything in its event log."""
        files = sorted((self.directory / "events").glob("events-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 60) -> dict[str, Any]:
        """The next event, not looked at before, that is `wanted`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for event in self.events():
                if event["seq"] > self._seen:
                    self._seen = event["seq"]
                    if wanted(event):
                        return event
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise LabError(f"the controller did not get there: {(self.directory / 'err').read_text()[-2000:]}")

    def memory_mb(self) -> float:
        """Its peak resident memory so far, in MB (10**6 bytes)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise LabError("no VmHWM in /proc")

    def cpu_s(self) -> float:
        """Processor seconds it has used so far, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait(timeout=20)
