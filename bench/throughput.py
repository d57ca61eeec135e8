"""TCP through the pipeline against TCP through a bridge with a single NORMAL flow, and datapath flows per connection."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.harness import Controller, Figure, big_state, spread
from lab.ovs import Namespace, PrivateOvs

CONNECT = """
import socket, sys
n, target = int(sys.argv[1]), (sys.argv[2], int(sys.argv[3]))
for _ in range(n):
    with socket.create_connection(target, timeout=5) as s:
        s.sendall(b"x")
        s.recv(1)
"""
ECHO = """
import socket
server = socket.create_server(("0.0.0.0", 9000), backlog=256)
print("ready", flush=True)
while True:
    sock, _ = server.accept()
    with sock:
        sock.sendall(sock.recv(1))
"""


class Host:
    """A namespace behind one port of a bridge."""

    def __init__(self, ovs: PrivateOvs, bridge: str, port: str, address: str, mac: str | None = None) -> None:
        self.namespace = Namespace()
        self.address = address
        here, there = ovs.namespace, self.namespace
        here.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(there.pid))
        if mac is not None:
            there.run("ip", "link", "set", "eth0", "address", mac)
        there.run("ip", "address", "add", f"{address}/16", "dev", "eth0")
        for where, name in ((here, port), (there, "eth0")):
            where.run("ip", "link", "set", name, "up")
            where.run("ethtool", "-K", name, "tx", "off")  # the userspace datapath needs finished checksums
        ovs.vsctl("add-port", bridge, port)


def measure(seconds: int, rounds: int, connections: int) -> Iterator[Figure]:
    """Figures from iperf3 runs of `seconds` each, the two bridges in turn."""
    state = big_state(2)
    with PrivateOvs() as ovs:
        ovs.add_bridge("vmbr0")
        ovs.add_bridge("plain")
        ovs.ofctl("add-flow", "plain", "actions=normal")
        from controller.statefile import loads

        members = loads(json.dumps(state), "bench").state.networks[0].members
        hosts = [Host(ovs, "vmbr0", m.port, str(m.address), str(m.mac)) for m in members]
        peers = [Host(ovs, "plain", f"p{i}", f"10.9.0.{i}") for i in (1, 2)]
        controller = Controller(ovs, state)
        try:
            ovs.vsctl("set-controller", "vmbr0", "tcp:127.0.0.1:6653")
            controller.wait_for(lambda e: e["kind"] == "state_applied")
            yield from _throughput(hosts, peers, seconds, rounds)
            yield from _cache(ovs, hosts, connections)
        finally:
            controller.close()
            for host in (*hosts, *peers):
                host.namespace.close()


def _throughput(hosts: list[Host], peers: list[Host], seconds: int, rounds: int) -> Iterator[Figure]:
    ours, plain = [], []
    for number in range(rounds):
        order = [(hosts, ours), (peers, plain)]
        for pair, into in order if number % 2 == 0 else reversed(order):
            into.append(_iperf(pair, seconds))
    ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    yield Figure("iperf3 TCP through the pipeline", statistics.median(ours), "Gbit/s", detail=spread(ours))
    yield Figure("iperf3 TCP, a single NORMAL flow", statistics.median(plain), "Gbit/s", detail=spread(plain))
    yield Figure("pipeline / NORMAL", ratio, "ratio", "at least 0.9", ratio >= 0.9)


def _iperf(pair: list[Host], seconds: int) -> float:
    client, server = pair
    daemon = subprocess.Popen(
        server.namespace.command("iperf3", "-s", "-1", "-p", "9000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_server(server)
        command = ("iperf3", "-c", server.address, "-p", "9000", "-t", str(seconds), "-J")
        report: dict[str, Any] = json.loads(client.namespace.run(*command, timeout_s=seconds + 30))
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
    finally:
        daemon.kill()
        daemon.wait()


def _wait_for_server(host: Host) -> None:
    for _ in range(200):
        if ":9000" in host.namespace.run("ss", "-ltnH"):
            return
        time.sleep(0.02)


def _cache(ovs: PrivateOvs, hosts: list[Host], connections: int) -> Iterator[Figure]:
    client, server = hosts
    daemon = subprocess.Popen(server.namespace.command(sys.executable, "-c", ECHO), stdout=subprocess.PIPE)
    try:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        counts = {}
        for number in (max(1, connections // 10), connections):
            ovs.appctl("dpctl/del-flows")
            client.namespace.run(sys.executable, "-c", CONNECT, str(number), server.address, "9000", timeout_s=300)
            counts[number] = len([line for line in ovs.appctl("dpctl/dump-flows").splitlines() if "ipv4(" in line])
        few, many = counts.values()
        yield Figure(
            f"datapath flows for {connections} TCP connections", many, "flows", "does not grow", many <= few + 2,
            f"{few} for {max(1, connections // 10)}",
        )  # fmt: skip
    finally:
        daemon.kill()
        daemon.wait()
