"""Much and long data through tunnels of different width: everything arrives, or its sender is told. Nothing is lost in
silence. On the lab of whole nodes: WARP takes 1,280 bytes, meshes take 1,420."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import manager
from lab.manager import Status

BULK = Path(__file__).with_name("bulk.py")
PORT = 7100
INET = "198.51.100.10"
BYTES = 5_000_000
SERVERS = ("inet", "relay", "xray", "exporter")
PATHS = {
    "xray to the world": ("xray", INET, None),
    "the world by the mesh": ("droplet", INET, "10.0.0.50"),
    "the world by the VPN": ("laptop", INET, None),
    "the world from the VPN's server": ("gateway", INET, None),
    "the VPN's server to xray": ("gateway", "10.0.0.102", None),
    "xray to the other node": ("xray", "10.0.0.110", None),
    "the other node to xray": ("relay", "10.0.0.102", None),
    "a wider peer of the mesh to xray": ("droplet", "10.0.0.102", "10.0.0.50"),
    "management to the other node": ("mcp-server", "10.1.0.210", None),
}


@pytest.fixture(scope="module")
def bulk(nodes_lab: Status) -> Iterator[Status]:
    """Servers everywhere."""
    started = []
    for host in SERVERS:
        command = [sys.executable, "-I", str(BULK), "serve", str(PORT)]
        process = manager.spawn(nodes_lab, host, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield nodes_lab
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


def run(lab: Status, path: str, *asked: dict[str, Any]) -> list[Any]:
    """Have the path's sender do it."""
    host, to, source = PATHS[path]
    told = json.dumps([{"to": to, "port": PORT, "from": source} | one for one in asked])
    line = manager.command_in(lab, manager.find_host(lab, host), [sys.executable, "-I", str(BULK), "run"])
    done = subprocess.run(line, input=told, capture_output=True, text=True, timeout=120, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("path", PATHS)
def test_five_megabytes_each_way(bulk: Status, path: str) -> None:
    found = run(bulk, path, *({"way": way, "bytes": BYTES} for way in ("push", "pull")))
    assert all(outcome["ok"] for outcome in found), found
    # A path that loses what is too long gets on by time-outs alone.
    assert all(outcome["s"] < 10 for outcome in found), found


# The VPN's server sends no fragments of its own into the tunnel: they could be pieces of replies to clients.
@pytest.mark.parametrize("path", [path for path in PATHS if path != "the world from the VPN's server"])
def test_long_datagrams(bulk: Status, path: str) -> None:
    """Those that may be cut up arrive, and so does what comes back; of others the sender learns that they are too long."""
    sizes = (1200, 1400, 4000)
    cases = [(size, df) for size in sizes for df in (False, True)]
    found = run(bulk, path, *({"way": "udp", "bytes": size, "df": df} for size, df in cases))
    wanted = {(size, df): "reply" if size == 1200 or not df else "too long" for size, df in cases}
    assert dict(zip(cases, found, strict=True)) == wanted


WG_QUICK = """
mount -t tmpfs own /run && mkdir /run/wireguard
umask 077 && cat > /run/client.conf
wg-quick up /run/client.conf && ip -6 route show table 51820 default
"""


def test_a_clients_configuration_works_with_wg_quick(bulk: Status) -> None:
    """Also where IPv6 goes into the tunnel, so that none of it leaves beside it."""
    state_file = bulk.run_dir / "nodes" / bulk.node / "node.yaml"
    command = [sys.executable, "-c", "from controller.cli import main; main()"]
    line = manager.command_in(
        bulk, manager.find_host(bulk, bulk.node), [*command, "vpn", "add", "--file", str(state_file), "phone"]
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    made = subprocess.run([*line, "--json"], capture_output=True, text=True, timeout=60, env=env, check=True)
    text = json.loads(made.stdout)["config"]
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("DNS"))  # needs a resolvconf
    apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", WG_QUICK]
    done = subprocess.run(apart, input=kept, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "dev client" in done.stdout
