"""The lab of whole nodes: what passes end to end and what does not, and that the lab is as private as it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import demo, manager, places
from lab.manager import Status
from lab.traffic import Traffic, Try

from .conftest import STATE_FILE
from .test_lab import GONE_LIMIT_S, OTHER, ROOT, assert_one_line, host_facts, inhabitants, run_cli

BULKHEAD = [sys.executable, "-c", "from controller.cli import main; main()"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Status]:
    """The lab of whole nodes for the example state file, up; the host is afterwards as it was."""
    before = host_facts()
    run_dir = tmp_path_factory.mktemp("nodes")
    status = manager.up(STATE_FILE, run_dir, nodes=True)
    yield status
    assert manager.down(run_dir)
    assert host_facts() == before
    assert not run_dir.exists()


def output(lab: Status, host: str, *command: str) -> str:
    """What a command in a host prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = manager.command_in(lab, manager.find_host(lab, host), command)
    return subprocess.run(line, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


# -- traffic ----------------------------------------------------------------------------------------------------------


def test_every_example_is_as_expected(nodes: Status) -> None:
    """SOCKS5 and VPN users leave by WARP, MCP queries arrive, the networks stay apart, and nothing leaves in clear."""
    shown = list(demo.play(nodes))
    assert [each.as_dict() for each in shown if not each.as_expected] == []
    assert len(shown) == len(demo.NODE_EXAMPLES) + 2
    seen_as = {
        each.example.host: each.sender for each in shown if each.seen == "passes" and each.example.server == "inet"
    }
    assert seen_as == dict.fromkeys(("laptop", "xray", "relay"), demo.EXIT)


def test_names_are_resolved_through_the_tunnel(nodes: Status) -> None:
    assert output(nodes, "xray", "getent", "hosts", "mcp.example.test").split()[0] == "1.2.3.4"
    assert output(nodes, "gateway", "getent", "hosts", "xray").split()[0] == "10.0.0.102"
    for unknown in ("mcp.example.test", "xray"):
        with pytest.raises(subprocess.CalledProcessError):
            output(nodes, "mcp-server", "getent", "hosts", unknown)


def test_what_the_world_routes_to_a_node_gets_that_far(nodes: Status) -> None:
    """The examples that are blocked are blocked by the node: what they send does arrive there."""
    with Traffic(nodes) as traffic, demo.routed(nodes):
        traffic.serve({"host": ("udp:4001",), "xray": ("udp:4000",)}, {"host": ["eth0"], "xray": ["eth0"]})
        assert traffic.attempt("inet", Try("udp", "10.0.0.102", 4000)).outcome != "reply"
        assert any(line.startswith("198.51.100.10 udp") and line.endswith(" 4000") for line in traffic.saw("host"))
        assert not any(line.endswith(" 4000") for line in traffic.saw("xray"))


def test_what_the_tunnel_brings_gets_that_far(nodes: Status) -> None:
    watched = [*BULKHEAD_LEG, sys.executable, "-I", str(places.PROBE), "serve", "--watch=wg-warp0", "udp:4001"]
    process = manager.spawn(nodes, "host", watched, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with Traffic(nodes) as traffic:
        traffic.serve({"xray": ("udp:4000",)})
        traffic.attempt("warp", Try("udp", "10.0.0.102", 4000, source="172.16.0.1"))
        assert traffic.heard("xray") == []
    said = process.communicate(timeout=10)[0]
    assert any(line.startswith("saw 172.16.0.1 udp ") and line.endswith(" 4000") for line in said.splitlines()), said


BULKHEAD_LEG = ["ip", "netns", "exec", "bulkhead-warp0"]


def test_a_leak_would_be_seen(nodes: Status) -> None:
    """What looks at the uplinks sees what is not WireGuard, in both families."""
    with Traffic(nodes) as traffic:
        traffic.watch_uplink("host", "eth0")
        for address in (demo.WORLD, demo.WORLD_IPV6):
            family = "AF_INET6" if ":" in address else "AF_INET"
            send = f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM).sendto(b'x' * 40, ('{address}', 4000))"
            output(nodes, "host", sys.executable, "-c", send)
        output(nodes, "xray", "ping", "-c1", "-W2", demo.WORLD)
        left = traffic.uplinks()["host"]
    assert left.others >= 2 and left.wireguard >= 1 and left.lost == 0
    assert set(left.kinds) == {
        f"192.0.2.2 to {demo.WORLD}, protocol 17",
        f"2001:db8:1::2 to {demo.WORLD_IPV6}, protocol 17",
    }


def test_ipv6_would_be_heard(nodes: Status) -> None:
    """What listens for IPv6 hears it where it does arrive."""
    program = f"import runpy; runpy.run_path({str(places.PROBE)!r})['send_ipv6']('fe80::1', 'ff02::1', b'12341234said', 'to-inet')"
    with Traffic(nodes) as traffic:
        traffic.serve({"inet": ("ipv6:eth0",)})
        subprocess.run(manager.command_in(nodes, None, [sys.executable, "-c", program]), check=True, timeout=10)
        deadline = time.monotonic() + 5
        while not traffic.heard("inet") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert traffic.heard("inet")[0].endswith(" fe80::1 said")


# -- the lab ----------------------------------------------------------------------------------------------------------


def test_status(nodes: Status) -> None:
    assert manager.status(nodes.run_dir) == nodes
    assert len(nodes.alive) == 10 and all(nodes.alive.values())
    done = run_cli("status", "--json", "--run-dir", str(nodes.run_dir))
    assert done.returncode == 0
    kinds = {host["name"]: host["kind"] for host in json.loads(done.stdout)["hosts"]}
    assert kinds["oo1424oo"] == kinds["oo1425oo"] == "node"
    assert kinds["xray"] == kinds["relay"] == "container"
    assert {name for name, kind in kinds.items() if kind == "outside"} == {"warp", "droplet", "laptop", "admin", "inet"}


@pytest.mark.parametrize("node", ["oo1424oo", "oo1425oo"])
def test_nodes_are_as_their_state_files_say(nodes: Status, node: str) -> None:
    assert "parts of the host as wanted" in output(nodes, node, *BULKHEAD, "status")
    output(nodes, node, *BULKHEAD, "verify", str(nodes.run_dir / "nodes" / node / "node.yaml"))


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("xray", "10.0.0.102"), ("102", "10.0.0.102"), ("veth102", "10.0.0.102"), ("oo1424oo/xray", "10.0.0.102"),
        ("oo1425oo/relay", "10.0.0.110"), ("oo1425oo/resolver-privacy", "10.0.0.54"), ("relay", "10.0.0.110"),
        ("host", "192.0.2.2"), ("oo1424oo", "192.0.2.2"), ("oo1425oo", "192.0.2.6"), ("laptop", "203.0.113.2"),
        ("droplet", "10.0.0.50"), ("warp", "203.0.113.100"), ("inet", "198.51.100.10"), ("admin", "203.0.113.6"),
    ],
)  # fmt: skip
def test_exec_finds_hosts_by_any_name(nodes: Status, name: str, address: str) -> None:
    done = run_cli("exec", "--run-dir", str(nodes.run_dir), name, "--", "ip", "-o", "-4", "address")
    assert done.returncode == 0, done.stderr
    assert f" {address}/" in done.stdout


@pytest.mark.parametrize("name", ["nobody", "oo1425oo/xray", "oo1424oo/relay", "other/xray", ""])
def test_unknown_host(nodes: Status, name: str) -> None:
    done = run_cli("exec", "--run-dir", str(nodes.run_dir), name, "--", "true")
    assert done.returncode == 1
    assert "the lab has: " in done.stderr
    assert_one_line(done.stderr)


def test_private_keys_are_in_their_files_only(nodes: Status) -> None:
    keys = list((nodes.run_dir / "keys").rglob("*"))
    secrets = [path.read_text().strip().encode() for path in keys if path.is_file()]
    assert len(secrets) == 8
    assert {path.stat().st_mode & 0o777 for path in keys if path.is_file()} == {0o600}
    assert (nodes.run_dir / "keys").stat().st_mode & 0o077 == 0
    shown = [
        path for path in nodes.run_dir.rglob("*") if path.is_file() and (nodes.run_dir / "keys") not in path.parents
    ]
    for process in Path("/proc").iterdir():
        shown += [process / "cmdline", process / "environ"] if process.name.isdigit() else []
    for path in shown:
        try:
            text = path.read_bytes()
        except OSError:
            continue
        assert not any(secret in text for secret in secrets), path


def test_files_of_the_host_are_neither_copied_nor_changed(nodes: Status) -> None:
    assert not list(nodes.run_dir.rglob("*shadow*"))
    with pytest.raises(subprocess.CalledProcessError):
        output(nodes, "host", "sh", "-c", "echo changed >> /etc/passwd")
    assert "bulkhead-102" in output(nodes, "host", "ls", "/etc/netns").split()
    assert not Path("/etc/netns/bulkhead-102").exists()


# -- starting and dying -----------------------------------------------------------------------------------------------


def test_what_ends_is_seen_and_a_killed_lab_leaves_nothing_behind(tmp_path: Path) -> None:
    before = host_facts()
    lab = manager.up(STATE_FILE, tmp_path / "lab", nodes=True)
    namespace = os.readlink(f"/proc/{lab.pid}/ns/pid")
    assert len(inhabitants(namespace)) > 30
    output(lab, "droplet", "sh", "-c", "kill $(ps -e -o pid=,comm= | awk '$2 == \"microsocks\" {print $1}')")
    deadline = time.monotonic() + GONE_LIMIT_S
    while all(manager.status(lab.run_dir).alive.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    done = run_cli("status", "--run-dir", str(lab.run_dir))
    assert done.returncode == 1 and "SOCKS5 proxy has ended; see the logs in " in done.stdout
    os.kill(lab.pid, signal.SIGKILL)
    deadline = time.monotonic() + GONE_LIMIT_S
    while inhabitants(namespace) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert inhabitants(namespace) == []
    assert host_facts() == before
    assert manager.down(lab.run_dir) is False
    assert not lab.run_dir.exists()


def test_another_state_file(tmp_path: Path) -> None:
    """Other names, other addresses, two egresses, no mesh, and a name that the lab has taken."""
    file = tmp_path / "inet.yaml"
    file.write_text(OTHER)
    lab = manager.up(file, tmp_path / "lab", nodes=True)
    try:
        assert lab.node == "node-inet"
        with Traffic(lab) as traffic:
            traffic.serve({"inet": ("tcp:443",), "with-a-rather-long-name": ("tcp:80",)})
            world, neighbour = Try("tcp", demo.WORLD, 443), Try("tcp", "192.168.7.50", 80)
            results = traffic.attempt_all({"one": [world, neighbour], "two": [neighbour]})
            assert traffic.came_from("inet") == demo.EXIT
        assert [result.outcome == "reply" for result in results["one"]] == [True, False]
        assert results["two"][0].outcome == "reply"
    finally:
        manager.down(lab.run_dir)
