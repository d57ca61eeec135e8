"""A real switch is watched: what others put into it is proved, told with a packet that really goes there, and sealed."""

from __future__ import annotations

import subprocess
from typing import Any

from controller.asking import ask
from controller.model import Mac
from lab.ovs import run
from tests.ovs.node import BULKHEAD, ROOT, Controller, Endpoint, Node, ethernet, ipv4, udp, wait_for
from tests.ovs.node import Watch as Arrivals


def add_hole(node: Node, source: str = "veth102", target: str = "veth201", bridge: str = "vmbr0") -> str:
    numbers = node.ovs.port_numbers(bridge)
    flow = f"table=0,priority=40000,cookie=0x77,in_port={numbers[source]},actions=output:{numbers[target]}"
    node.ovs.ofctl("add-flow", bridge, flow)
    return flow


def datagram(source: Endpoint, mac: Mac, target: str, sport: int) -> bytes:
    payload = udp(source.address, target, sport, 53, b"marked")
    return ethernet(mac, source.mac, 0x0800, ipv4(source.address, target, 17, payload))


def bulkhead(node: Node, *args: str) -> subprocess.CompletedProcess[str]:
    command = node.namespace.command(*BULKHEAD, *args, "--run-dir", str(node.controller.run_dir))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def seal_network(node: Node, sealed: bool) -> dict[str, Any]:
    """What the controller says when an incident seals the privacy network, or lets it in again."""
    question = {"ask": "seal-network", "network": "privacy", "sealed": sealed}
    return ask(node.controller.run_dir, question, 5.0)


def test_a_hole_that_somebody_makes_is_told_with_a_packet_that_goes_through_it(node: Node) -> None:
    before = node.controller.last_event()
    add_hole(node, "veth102", "from-privacy")
    leak = node.controller.wait_event("leak", before)
    packet = str(leak.packet)
    trace = run("ovs-appctl", "-t", str(node.ovs.ctl), "ofproto/trace", "vmbr0", packet, env=node.ovs.env)
    assert f"output:{node.ovs.port_numbers('vmbr0')['from-privacy']}" in trace
    said = bulkhead(node, "status")
    assert said.returncode == 1 and "vmbr0 LEAKS: a packet from veth102 can leave by from-privacy" in said.stdout
    advice = leak.text.partition("take it away: ")[2]
    assert advice.startswith("ovs-ofctl -O OpenFlow14 del-flows vmbr0 ")
    node.ovs.ofctl("del-flows", "vmbr0", advice.rpartition(" ")[2].strip("'"))
    node.controller.wait_event("leak_closed", before)
    assert bulkhead(node, "status").returncode == 0


def test_normal_traffic_teaches_paths_and_alarms_nobody(node: Node) -> None:
    before = node.controller.last_event()
    xray = node["xray"]
    gateway = node.state.network("privacy").gateway_mac
    for port in range(5):
        xray.send(datagram(xray, gateway, "198.51.100.10", 4000 + port))
    node.controller.wait_event("path_learned", before)
    wait_for(lambda: bool(node.controller.status()), 2)
    add_hole(node, "veth102", "from-privacy")  # whatever comes after this has looked at the paths as well
    node.controller.wait_event("leak", before)
    node.ovs.ofctl("del-flows", "vmbr0", "cookie=0x77/-1")
    node.controller.wait_event("leak_closed", before)
    assert len(node.controller.events("leak", after=before)) == 1
    assert not node.controller.events("unproved", after=before)


def test_a_port_that_leaks_is_sealed_until_it_is_cleared(fresh: Node) -> None:
    fresh.controller = Controller(fresh, fresh.file, options=("--seal",))
    fresh.controller.start()
    before = fresh.controller.last_event()
    add_hole(fresh, "veth102", "from-privacy")
    sealed = fresh.controller.wait_event("sealed", before)
    assert "bulkhead unseal vmbr0 veth102" in sealed.text
    fresh.controller.wait_event("leak_closed", before)
    xray, peer = fresh["xray"], fresh["peer_priv"]
    frame = datagram(xray, peer.mac, peer.address, 4000)
    with Arrivals([peer]) as arrivals:
        xray.send(frame)
        fresh.controller.kill()  # the seal is the switch's, and survives
        xray.send(frame)
        fresh.controller.start()
        xray.send(frame)
        assert "veth102" in bulkhead(fresh, "status").stdout
        cut = seal_network(fresh, True)
        assert "vmbr0 veth100" in cut["ports"] and "vmbr0 veth102" not in cut["ports"]
        back = seal_network(fresh, False)  # lets in again what it has closed, not what leaked
        assert sorted(back["ports"]) == sorted(cut["ports"]) and back["leaked"] == ["vmbr0 veth102"]
        xray.send(frame)
        assert arrivals.holding(b"marked") == {}
        fresh.ovs.ofctl("del-flows", "vmbr0", "cookie=0x77/-1")
        wrong = bulkhead(fresh, "unseal", "vmbr0", "veth999")
        assert wrong.returncode == 2 and "sealed: vmbr0 veth102" in wrong.stderr
        cleared = bulkhead(fresh, "unseal", "vmbr0", "veth102")
        assert cleared.returncode == 0 and "not sealed any more" in cleared.stdout
        fresh.controller.wait_event("unsealed", before)
        fresh.controller.wait_steady()
        xray.send(frame)
        wait_for(lambda: bool(arrivals.holding(b"marked")), 5)
    assert bulkhead(fresh, "status").returncode == 0
