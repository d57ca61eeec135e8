"""OpenFlow over a unix socket, which nobody but root and the controller's own user can connect to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.ovs import PrivateOvs

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "oo1424oo.yaml"

pytestmark = [pytest.mark.ovs, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]


@pytest.fixture
def ovs() -> Iterator[PrivateOvs]:
    """An Open vSwitch with one of the example's bridges."""
    with PrivateOvs(datapath="dummy") as started:
        started.add_bridge("mesh-mgmt")
        started.add_dummy_ports("mesh-mgmt", ["nm-mgmt", "to-mgmt"])
        yield started


def events(directory: Path) -> list[dict[str, object]]:
    """What the controller has logged so far."""
    return [json.loads(line) for file in directory.glob("events-*") for line in file.read_text().splitlines()]


def test_a_switch_connects_by_unix_socket(ovs: PrivateOvs, tmp_path: Path) -> None:
    # Open vSwitch takes no other unix socket for a bridge's controller than this one.
    path = ovs.directory / "mesh-mgmt.controller"
    command = [sys.executable, "-m", "controller", "controller", str(EXAMPLE), "--listen", f"unix:{path}"]
    command += ["--run-dir", str(tmp_path), "--events", str(tmp_path / "events"), "--ovsdb", ovs.db]
    process = subprocess.Popen(command, cwd=ROOT, stderr=(tmp_path / "err").open("w"))
    try:
        ovs.vsctl("set-controller", "mesh-mgmt", f"unix:{path}")
        deadline = time.monotonic() + 20
        while not any(event["kind"] == "state_applied" for event in events(tmp_path / "events")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.05)
        assert not [event for event in events(tmp_path / "events") if event["kind"] == "switch_warning"]
        assert "actions=output:" in ovs.ofctl("dump-flows", "mesh-mgmt")
    finally:
        process.terminate()
        process.wait(timeout=10)
    assert not path.exists()
