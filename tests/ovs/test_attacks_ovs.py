"""Attacks on a real Open vSwitch that once got through, and must not again."""

from __future__ import annotations

import time

import pytest

from apps.learning import CONTAINERS, HARD_S, IDLE_S
from tests.ovs.node import CLIENT_WORLD, HOST_WORLD, WORLD, Node, ethernet, ipv4, learned, udp, wait_for

IP = 0x0800


def datagram(node: Node, sender: str, source: str, target: str, sport: int, dport: int) -> bytes:
    """A UDP packet that the sender puts on the wire."""
    own = node[sender]
    return ethernet(0x020000000001, own.mac, IP, ipv4(source, target, 17, udp(source, target, sport, dport, b"!")))


def learn_all_kinds(node: Node) -> int:
    """Have the switch learn paths of every kind; answers how many there are."""
    node["xray"].send(datagram(node, "xray", node["xray"].address, WORLD, 9, 9))
    peer, server = node["peer_priv"], node["gateway"].address
    peer.send(datagram(node, "peer_priv", peer.address, WORLD, 9, 9))
    peer.send(datagram(node, "peer_priv", CLIENT_WORLD, server, 4500, 51820))
    node["host0"].send(datagram(node, "host0", HOST_WORLD, server, 4501, 51820))
    wait_for(lambda: len(marked(node)) >= 4, 3, lambda: str(marked(node)))
    time.sleep(0.3)  # the server's kernel may have something to say about packets to nobody
    return len(marked(node))


def marked(node: Node) -> set[str]:
    """Flows of vmbr0 whose cookie says that they were learned."""
    return {line for line in node.dump("vmbr0") if learned(line)}


def test_learned_paths_of_every_kind_are_known_as_such(fresh: Node) -> None:
    """After a restart too, when they are read back from the switch."""
    node = fresh
    node.controller.start()
    count = learn_all_kinds(node)
    wait_for(lambda: vmbr0(node)["learned"] == count, 2, lambda: str(vmbr0(node)))
    before = marked(node)
    node.controller.kill()
    node.controller.start()
    time.sleep(1)
    assert marked(node) == before and vmbr0(node)["learned"] == count
    assert not node.controller.events("tampering", "drift_repaired")


def vmbr0(node: Node) -> dict[str, object]:
    """The bridge's status."""
    rows = {row["name"]: row for row in node.controller.status()["bridges"]}
    found: dict[str, object] = rows["vmbr0"]
    return found


@pytest.mark.parametrize(
    "forged",
    [
        "table=0,priority=65535,in_port={in_},actions=output:{out}",
        f"table=0,priority=65535,idle_timeout={IDLE_S},hard_timeout={HARD_S},in_port={{in_}},actions=output:{{out}}",
        "table=60,priority=65535,ip,actions=output:{out}",
    ],
)
def test_a_flow_with_the_cookie_of_learned_ones_is_no_way_in(node: Node, forged: str) -> None:
    seen = node.controller.last_event()
    ports = {"in_": node.port_number("warp0"), "out": node.port_number("veth102")}
    node.ovs.ofctl("add-flow", "vmbr0", f"cookie={CONTAINERS:#x},{forged.format(**ports)}")
    node.controller.wait_event("tampering", seen, 2)
    wait_for(lambda: not marked(node), 2, lambda: str(marked(node)))
