"""The firewalls with real packets: what passes and what does not, in both families; and that nobody else's rules move."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.agent import firewall, nft, sysctls, trial
from controller.agent.hosttable import HostTable, default_uplinks
from controller.agent.netns import in_namespace
from controller.agent.nft import NftTable
from controller.agent.resource import Failed
from controller.agent.sysctls import Sysctls
from controller.hostmodel import Firewall, HostState, Leg
from controller.model import Ipv4, Role
from controller.statefile import load
from controller.verify.host.firewall import read_nft
from controller.verify.host.nft import Packet, forward_dropped

from .conftest import STATE_FILE
from .nets import Net, eventually, maximum_segment, path_of

ROOT = Path(__file__).parents[2]
LOADED = load(STATE_FILE)
STATE = LOADED.state
ALLOWED = Firewall(tcp=(22,), udp=(4000,), local_tcp=(9573,), trusted=("vmbr1", "vmbr0"))
HOST = replace(LOADED.host, firewall=ALLOWED)
OTHERS = """table inet bulkhead-of-others {
	chain input {
		type filter hook input priority filter; policy accept;
		tcp dport 4711 counter packets 7 bytes 8 drop comment "not ours"
	}
}
table ip bulkhead {
	chain forward { type filter hook forward priority filter; policy accept; }
}
"""


def table(net: Net, name: str, text: str, run_dir: Path, family: str = "inet") -> NftTable:
    """A resource of a namespace, as wanted."""
    made = NftTable(family, text, run_dir, net.path(name))
    settle(made)
    return made


def settle(resource: NftTable | Sysctls) -> list[str]:
    """Carry out what is missing, and see that nothing is missing then."""

    async def go() -> list[str]:
        changes = await resource.diff()
        for change in changes:
            await change.do()
        assert await resource.diff() == []
        return [str(change) for change in changes]

    return asyncio.run(go())


def missing(resource: NftTable | Sysctls) -> list[str]:
    """What would be done."""
    return [str(change) for change in asyncio.run(resource.diff())]


# ------------------------------------------------------------------------------------------------------------ the host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """A host between the world, another LAN and the two networks, that forwards everything as careless software makes
    it, with our table loaded."""
    with Net("host", "inet", "lan", "gw", "mgmt") as net:
        net.wire(
            ("host", "up0", ["192.0.2.1/24", "2001:db8::1/64"]), ("inet", "eth0", ["192.0.2.9/24", "2001:db8::9/64"])
        )
        net.wire(("host", "lan0", ["172.20.0.1/24"]), ("lan", "eth0", ["172.20.0.9/24"]))
        net.wire(("host", "vmbr0", ["2001:db8:a::1/64"]), ("gw", "eth0", ["10.0.0.100/24", "2001:db8:a::9/64"]))
        net.wire(("host", "vmbr1", ["10.1.0.1/24", "2001:db8:b::1/64"]), ("mgmt", "eth0", ["10.1.0.200/24", "2001:db8:b::9/64"]))  # fmt: skip
        net.ip("host", "route add default via 192.0.2.9", "route add 10.0.0.100 dev vmbr0")
        net.ip(
            "inet",
            "address add 10.0.0.102/32 dev lo",
            "route add default via 192.0.2.1",
            "route add ::/0 via 2001:db8::1",
        )
        net.ip("lan", "route add default via 172.20.0.1")
        net.ip("gw", "route add default dev eth0", "route add ::/0 via 2001:db8:a::1")
        net.ip("mgmt", "route add default via 10.1.0.1", "route add ::/0 via 2001:db8:b::1")
        for name in ("host", "inet", "gw", "mgmt"):
            net.sysctl(name, ipv4__conf__all__rp_filter=0, ipv4__conf__default__rp_filter=0)
        for card in ("up0", "vmbr0", "vmbr1", "lan0"):
            net.sysctl("host", **{f"ipv4__conf__{card}__rp_filter": 0})
        net.sysctl(
            "host",
            ipv4__ip_forward=1,
            ipv6__conf__all__forwarding=1,
            ipv4__conf__vmbr0__proxy_arp=1,
            ipv4__neigh__vmbr0__proxy_delay=0,
        )
        net.run("host", "nft", "-f", "-", stdin=OTHERS)
        yield net


@pytest.fixture(scope="module")
def walled(host: Net, tmp_path_factory: pytest.TempPathFactory) -> Net:
    """The same once the table is loaded."""
    for ends in (("gw", "10.0.0.100", "mgmt", "10.1.0.200"), ("gw", "2001:db8:a::9", "mgmt", "2001:db8:b::9")):
        assert eventually(lambda ends=ends: host.udp(*ends, 4000)), "without our table it is open"  # type: ignore[misc]
    table(host, "host", firewall.host_table(STATE, HOST, ("up0",)), tmp_path_factory.mktemp("run"))
    return host


def test_vpn_clients_reach_the_gateway_and_get_answers_from_the_host(walled: Net) -> None:
    seen = walled.udp("inet", "192.0.2.9", "gw", "192.0.2.1", 51820, at="10.0.0.100")
    assert seen == "192.0.2.9>192.0.2.1", "with the client's real address, and the host's in the answer"


def test_an_error_about_a_vpn_packet_reaches_who_sent_it(walled: Net) -> None:
    with walled.socket("gw", 2, ("10.0.0.100", 51820)) as server, walled.socket("inet", 2, ("192.0.2.9", 0)) as client:
        client.sendto(b"in", ("192.0.2.1", 51820))
        assert eventually(lambda: in_namespace(path_of(walled.spaces["gw"]), lambda: server.recv(8, 0x40)) == b"in")
    with walled.socket("inet", 2, ("192.0.2.9", 0)) as client:
        client.connect(("192.0.2.1", 51820))
        client.send(b"nobody listens")
        client.settimeout(1)
        with pytest.raises(ConnectionRefusedError):
            client.recv(8)


@pytest.mark.parametrize(
    "sender, source, receiver, target, port",
    [
        ("inet", "192.0.2.9", "gw", "10.0.0.100", 51820),  # not by way of the host's own address
        ("inet", "192.0.2.9", "gw", "10.0.0.100", 4000),
        ("inet", "192.0.2.9", "mgmt", "10.1.0.200", 4000),
        ("inet", "2001:db8::9", "gw", "2001:db8:a::9", 51820),
        ("inet", "2001:db8::9", "mgmt", "2001:db8:b::9", 4000),
        ("lan", "172.20.0.9", "mgmt", "10.1.0.200", 4000),
        ("gw", "10.0.0.100", "inet", "192.0.2.9", 4000),
        ("gw", "10.0.0.100", "mgmt", "10.1.0.200", 4000),
        ("gw", "2001:db8:a::9", "inet", "2001:db8::9", 4000),
        ("gw", "2001:db8:a::9", "mgmt", "2001:db8:b::9", 4000),
        ("mgmt", "10.1.0.200", "gw", "10.0.0.100", 51820),
        ("mgmt", "10.1.0.200", "inet", "192.0.2.9", 4000),
        ("mgmt", "2001:db8:b::9", "gw", "2001:db8:a::9", 4000),
        ("mgmt", "2001:db8:b::9", "inet", "2001:db8::9", 4000),
        ("gw", "10.0.0.100", "host", "192.0.2.1", 4000),  # the host takes no part in privacy
        ("gw", "2001:db8:a::9", "host", "2001:db8:a::1", 4000),
        ("inet", "10.1.0.200", "host", "192.0.2.1", 4000),  # forged
        ("inet", "10.8.0.5", "host", "192.0.2.1", 4000),
        ("inet", "10.0.0.102", "host", "192.0.2.1", 4000),
        ("mgmt", "10.0.0.102", "host", "10.1.0.1", 4000),
        ("inet", "192.0.2.9", "host", "192.0.2.1", 4001),  # not listed
        ("inet", "2001:db8::9", "host", "2001:db8::1", 4001),
        ("host", "192.0.2.1", "inet", "10.0.0.102", 4000),  # a private address, by the default route
        ("host", "10.1.0.1", "inet", "192.0.2.9", 4000),
    ],
)
def test_does_not_pass(walled: Net, sender: str, source: str, receiver: str, target: str, port: int) -> None:
    assert walled.udp(sender, source, receiver, target, port) == ""


def test_the_vpn_server_cannot_speak_first(walled: Net) -> None:
    assert walled.udp("gw", "10.0.0.100", "inet", "192.0.2.9", 4000, sport=51820) == ""


@pytest.mark.parametrize(
    "sender, source, receiver, target, port",
    [
        ("lan", "172.20.0.9", "inet", "192.0.2.9", 4001),  # other software's forwarding
        ("inet", "192.0.2.9", "host", "192.0.2.1", 4000),
        ("inet", "2001:db8::9", "host", "2001:db8::1", 4000),
        ("mgmt", "10.1.0.200", "host", "10.1.0.1", 4001),  # trusted
        ("host", "10.1.0.1", "mgmt", "10.1.0.200", 4001),
        ("host", "192.0.2.1", "inet", "192.0.2.9", 4001),
        ("host", "2001:db8::1", "inet", "2001:db8::9", 4001),
        ("host", "127.0.0.1", "host", "127.0.0.1", 4001),
        ("host", "10.1.0.1", "host", "10.1.0.1", 4001),
    ],
)
def test_passes_and_is_answered(walled: Net, sender: str, source: str, receiver: str, target: str, port: int) -> None:
    assert walled.udp(sender, source, receiver, target, port) == f"{source}>{target}"


@pytest.mark.parametrize(
    "passes, sender, source, target, port",
    [
        (True, "inet", "192.0.2.9", "192.0.2.1", 22),
        (True, "inet", "2001:db8::9", "2001:db8::1", 22),
        (False, "inet", "192.0.2.9", "192.0.2.1", 9573),
        (False, "inet", "2001:db8::9", "2001:db8::1", 9573),
        (False, "inet", "192.0.2.9", "192.0.2.1", 23),
        (True, "mgmt", "10.1.0.200", "10.1.0.1", 9573),
        (True, "host", "127.0.0.1", "127.0.0.1", 9573),
        (False, "gw", "10.0.0.100", "192.0.2.1", 22),
        (False, "gw", "2001:db8:a::9", "2001:db8:a::1", 22),
    ],
)
def test_tcp_to_the_host(walled: Net, passes: bool, sender: str, source: str, target: str, port: int) -> None:
    assert walled.connects(sender, source, "host", target, port) == passes


def test_echo_is_answered_where_the_host_takes_part(walled: Net) -> None:
    asked = [("inet", "192.0.2.1"), ("inet", "2001:db8::1"), ("mgmt", "10.1.0.1"), ("gw", "2001:db8:a::1")]
    assert [walled.pings(*each) for each in asked] == [True, True, True, False]


def test_what_is_dropped_is_counted(walled: Net) -> None:
    walled.udp("gw", "10.0.0.100", "mgmt", "10.1.0.200", 4000)
    rules = json.loads(walled.run("host", "nft", "-j", "list", "chain", "inet", "bulkhead", "forward"))["nftables"]
    drops = [rule["rule"]["expr"] for rule in rules if "rule" in rule and {"drop": None} in rule["rule"]["expr"]]
    assert drops and all(any("counter" in part for part in expr) for expr in drops)
    assert any(part["counter"]["packets"] for expr in drops for part in expr if "counter" in part)


def test_without_a_known_uplink_every_other_interface_is_one(walled: Net, tmp_path: Path) -> None:
    loaded = table(walled, "host", firewall.host_table(STATE, HOST, ()), tmp_path)
    assert walled.udp("inet", "192.0.2.9", "gw", "192.0.2.1", 51820, at="10.0.0.100") == "192.0.2.9>192.0.2.1"
    assert walled.udp("mgmt", "10.1.0.200", "gw", "10.1.0.1", 51820, at="10.0.0.100") == ""
    assert walled.udp("inet", "192.0.2.9", "mgmt", "10.1.0.200", 4000) == ""
    asyncio.run(loaded.load(firewall.host_table(STATE, HOST, ("up0",))))


def test_without_a_firewall_of_its_own_the_host_is_reached_and_the_networks_stay_apart(
    walled: Net, tmp_path: Path
) -> None:
    loaded = table(walled, "host", firewall.host_table(STATE, replace(HOST, firewall=None), ("up0",)), tmp_path)
    assert walled.udp("inet", "192.0.2.9", "host", "192.0.2.1", 4001)
    assert walled.udp("gw", "10.0.0.100", "mgmt", "10.1.0.200", 4000) == ""
    asyncio.run(loaded.load(firewall.host_table(STATE, HOST, ("up0",))))


# ------------------------------------------------------------------------------------------------------------ legs


@pytest.fixture(scope="module")
def leg() -> Iterator[Net]:
    """A leg between a network's member (10.0.0.102, and others' addresses) and what is behind its tunnel, a veth here."""
    with Net("member", "leg", "far") as net:
        net.wire(("leg", "eth0", ["10.0.0.1/24", "2001:db8:a::1/64"]), ("member", "eth0", ["10.0.0.102/24", "10.0.0.100/24", "192.168.9.9/24", "2001:db8:a::9/64"]))  # fmt: skip
        net.wire(("leg", "warp0", ["172.16.0.2/24", "2001:db8:b::1/64"]), ("far", "eth0", ["172.16.0.9/24", "10.5.0.7/24", "203.0.113.5/24", "2001:db8:b::9/64"]))  # fmt: skip
        net.ip("leg", "link set warp0 mtu 1280", "route add default via 172.16.0.9", "route add 192.168.9.9 dev eth0")
        net.ip("member", "route add default via 10.0.0.1", "route add ::/0 via 2001:db8:a::1")
        net.ip("far", "route add default via 172.16.0.2", "route add ::/0 via 2001:db8:b::1")
        for card in ("eth0", "warp0"):
            net.sysctl("leg", **{f"ipv4__conf__{card}__rp_filter": 0})
        net.sysctl("leg", ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv4__conf__all__rp_filter=0)
        assert eventually(lambda: net.udp("member", "2001:db8:a::9", "far", "2001:db8:b::9", 4000)), "open at first"
        yield net


def leg_of(role: Role) -> Leg:
    """Privacy's leg of that role, its tunnel called as it is here."""
    found = next(one for one in HOST.legs if one.role is role and one.network == "privacy")
    return replace(found, tunnel=replace(found.tunnel, interface="warp0"))


@pytest.fixture
def egress(leg: Net, tmp_path: Path) -> Net:
    """The leg of privacy's egress."""
    text = firewall.leg_table(
        leg_of(Role.EGRESS), STATE.network("privacy"), tunnel_addresses=(Ipv4.parse("172.16.0.2"),)
    )
    table(leg, "leg", text, tmp_path)
    return leg


@pytest.fixture
def mesh(leg: Net, tmp_path: Path) -> Net:
    """The leg of privacy's mesh, with peers in 10.5.0.0/24."""
    network = STATE.network("privacy")
    assert network.mesh is not None
    network = replace(network, mesh=replace(network.mesh, prefixes=(network.subnet, *prefixes("10.5.0.0/24"))))
    table(leg, "leg", firewall.leg_table(leg_of(Role.MESH), network), tmp_path)
    return leg


def prefixes(*texts: str) -> tuple[firewall.Prefix, ...]:
    """Prefixes of their texts."""
    return tuple(map(firewall.Prefix.parse, texts))


def test_the_egress_lets_the_network_out_under_the_tunnels_address(egress: Net) -> None:
    assert egress.udp("member", "10.0.0.102", "far", "203.0.113.5", 4000) == "172.16.0.2>203.0.113.5"
    assert egress.udp("member", "10.0.0.100", "far", "203.0.113.5", 4000) == "172.16.0.2>203.0.113.5"


def test_without_one_address_of_the_tunnel_the_egress_takes_the_interfaces(leg: Net, tmp_path: Path) -> None:
    table(leg, "leg", firewall.leg_table(leg_of(Role.EGRESS), STATE.network("privacy")), tmp_path)
    assert leg.udp("member", "10.0.0.102", "far", "203.0.113.5", 4000) == "172.16.0.2>203.0.113.5"


@pytest.mark.parametrize(
    "sender, source, receiver, target",
    [
        ("member", "192.168.9.9", "far", "203.0.113.5"),  # not the network's address
        ("member", "2001:db8:a::9", "far", "2001:db8:b::9"),
        ("member", "10.0.0.102", "leg", "10.0.0.1"),
        ("member", "10.0.0.102", "leg", "172.16.0.2"),
        ("member", "2001:db8:a::9", "leg", "2001:db8:a::1"),
        ("far", "203.0.113.5", "member", "10.0.0.102"),  # unasked
        ("far", "10.0.0.55", "member", "10.0.0.102"),
        ("far", "2001:db8:b::9", "member", "2001:db8:a::9"),
        ("far", "203.0.113.5", "leg", "172.16.0.2"),
        ("far", "2001:db8:b::9", "leg", "2001:db8:b::1"),
        ("leg", "10.0.0.1", "member", "10.0.0.102"),  # the leg's own goes through the tunnel alone
        ("leg", "172.16.0.2", "member", "10.0.0.102"),
        ("leg", "2001:db8:a::1", "member", "2001:db8:a::9"),
        ("leg", "2001:db8:b::1", "far", "2001:db8:b::9"),
    ],
)
def test_the_egress_does_not_pass(egress: Net, sender: str, source: str, receiver: str, target: str) -> None:
    assert egress.udp(sender, source, receiver, target, 4000) == ""


def test_the_egress_keeps_the_networks_addresses_out_of_the_tunnel(egress: Net) -> None:
    egress.ip("leg", "route add 10.8.0.0/24 via 172.16.0.9")  # the way home has been lost
    try:
        assert egress.udp("member", "10.0.0.102", "far", "10.8.0.7", 4000) == ""
    finally:
        egress.ip("leg", "route del 10.8.0.0/24")


def test_the_probe_of_the_leg_goes_through_the_tunnel(egress: Net) -> None:
    assert egress.connects("leg", "172.16.0.2", "far", "203.0.113.5", 4000)
    assert egress.pings("leg", "203.0.113.5")


def test_the_gateway_answers_echo_to_the_network_alone(egress: Net) -> None:
    assert [egress.pings("member", "10.0.0.1"), egress.pings("far", "172.16.0.2")] == [True, False]


def test_the_sender_is_told_that_its_packet_is_too_big(egress: Net) -> None:
    with pytest.raises(Exception, match=r"(?i)message too long|frag needed"):
        egress.run("member", "ping", "-n", "-c2", "-i0.2", "-W1", "-M", "do", "-s", "1400", "203.0.113.5")
    egress.ip("member", "route flush cache")


def test_tcp_is_clamped_to_the_tunnel_on_both_ends(egress: Net) -> None:
    with egress.tcp("member", "10.0.0.102", "far", "203.0.113.5", 4000) as ends:
        assert ends
        assert [maximum_segment(end) <= 1240 for end in ends] == [True, True]


@pytest.mark.parametrize(
    "sender, source, receiver, target, port",
    [
        ("member", "10.0.0.102", "far", "10.5.0.7", 4000),
        ("far", "10.5.0.7", "member", "10.0.0.102", 4000),
        ("far", "203.0.113.5", "member", "10.0.0.100", 51820),  # a VPN client that came in at a peer
        ("far", "10.5.0.7", "member", "192.168.9.9", 4000),  # a peer, to the world
        ("leg", "172.16.0.2", "far", "203.0.113.5", 4000),
    ],
)
def test_the_mesh_passes(mesh: Net, sender: str, source: str, receiver: str, target: str, port: int) -> None:
    assert mesh.udp(sender, source, receiver, target, port) == f"{source}>{target}"


@pytest.mark.parametrize(
    "sender, source, receiver, target, port",
    [
        ("member", "10.0.0.102", "far", "203.0.113.5", 4000),  # the mesh is no way out
        ("member", "192.168.9.9", "far", "10.5.0.7", 4000),
        ("member", "2001:db8:a::9", "far", "2001:db8:b::9", 4000),
        ("far", "203.0.113.5", "member", "10.0.0.102", 4000),
        ("far", "203.0.113.5", "member", "10.0.0.100", 4000),
        ("far", "2001:db8:b::9", "member", "2001:db8:a::9", 4000),
        ("far", "10.5.0.7", "leg", "10.0.0.1", 4000),
        ("leg", "10.0.0.1", "member", "10.0.0.102", 4000),
    ],
)
def test_the_mesh_does_not_pass(mesh: Net, sender: str, source: str, receiver: str, target: str, port: int) -> None:
    assert mesh.udp(sender, source, receiver, target, port) == ""


# -------------------------------------------------------------------------------------------------------- the gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """The VPN server's container, its WireGuard interface a veth with two clients behind it."""
    assert HOST.vpn is not None
    vpn = replace(HOST.vpn, tunnel=replace(HOST.vpn.tunnel, interface="wg0"))
    with Net("client", "gw", "member") as net:
        net.wire(("gw", "wg0", ["10.8.0.1/24"]), ("client", "wg0", ["10.8.0.5/32", "10.8.0.6/32", "10.0.0.55/32"]))
        net.wire(("gw", "eth0", ["10.0.0.100/24"]), ("member", "eth0", ["10.0.0.102/24"]))
        net.ip("client", "route add default via 10.8.0.1 dev wg0 onlink")
        net.ip("member", "route add 10.8.0.0/24 via 10.0.0.100", "route add 10.0.0.55 via 10.0.0.100")
        net.ip("gw", "link set wg0 mtu 1220", "route add 10.0.0.55 dev wg0")
        for name in ("gw", "client"):
            net.sysctl(name, ipv4__conf__all__rp_filter=0, ipv4__conf__wg0__rp_filter=0)
        net.sysctl("gw", ipv4__ip_forward=1)
        table(net, "gw", firewall.gateway_table(vpn), tmp_path_factory.mktemp("run"))
        yield net


def test_vpn_clients_go_out_under_their_own_addresses(gateway: Net) -> None:
    assert gateway.udp("client", "10.8.0.5", "member", "10.0.0.102", 4000) == "10.8.0.5>10.0.0.102"
    assert gateway.udp("client", "10.8.0.5", "gw", "10.8.0.1", 4000) == "10.8.0.5>10.8.0.1"


@pytest.mark.parametrize(
    "sender, source, receiver, target",
    [
        ("member", "10.0.0.102", "client", "10.8.0.5"),  # unasked
        ("client", "10.0.0.55", "member", "10.0.0.102"),  # as if it were a member
        ("client", "10.0.0.55", "gw", "10.8.0.1"),
    ],
)
def test_the_gateway_does_not_pass(gateway: Net, sender: str, source: str, receiver: str, target: str) -> None:
    assert gateway.udp(sender, source, receiver, target, 4000) == ""


def test_a_client_does_not_reach_another(gateway: Net) -> None:
    before = _counted(gateway)
    with gateway.socket("client", 2, ("10.8.0.5", 0)) as sender:
        sender.sendto(b"hello", ("10.8.0.77", 4000))
        assert eventually(lambda: _counted(gateway) > before)


def _counted(net: Net) -> int:
    last = net.run("gw", "nft", "list", "chain", "inet", "bulkhead", "forward").splitlines()[-3]
    assert last.split()[-1] == "drop"
    return int(last.split()[2])


def test_tcp_of_vpn_clients_is_clamped(gateway: Net) -> None:
    with gateway.tcp("client", "10.8.0.5", "member", "10.0.0.102", 4000) as ends:
        assert [maximum_segment(end) <= 1180 for end in ends] == [True, True]


# ------------------------------------------------------------------------------------------------------------ ports


def test_the_kernel_gets_nothing_from_a_port_and_ports_come_and_go(tmp_path: Path) -> None:
    with Net("host", "container") as net:
        net.wire(("host", "veth1", ["10.9.0.1/24"]), ("container", "eth0", ["10.9.0.2/24"]))
        net.wire(("host", "odd@&;|{$*", ["10.9.1.1/24"]), ("container", "eth1", ["10.9.1.2/24"]))
        there = ["veth1"]
        guarded = NftTable("netdev", lambda: firewall.ingress_table(there), tmp_path, net.path("host"))
        assert net.pings("container", "10.9.0.1") and net.pings("container", "10.9.1.1")
        assert "missing" in settle(guarded)[0]
        assert not net.pings("container", "10.9.0.1")
        assert net.pings("container", "10.9.1.1")
        there.append("odd@&;|{$*")
        assert "other rules are wanted" in settle(guarded)[0]
        assert not net.pings("container", "10.9.1.1")
        net.ip("host", "link del veth1")
        there.remove("veth1")
        settle(guarded)
        net.wire(("host", "veth1", ["10.9.0.1/24"]), ("container", "eth0", ["10.9.0.2/24"]))
        there.append("veth1")
        settle(guarded)
        assert not net.pings("container", "10.9.0.1")
        there.append("nobody")
        # Kernels before 6.16 refuse a device that is not there; later ones wait for it.
        with contextlib.suppress(Failed):
            settle(guarded)
        assert not net.pings("container", "10.9.0.1")


# ------------------------------------------------------------------------------------------------------ the resource

PLAIN = 'table inet bulkhead {\n\tchain c {\n\t\ttype filter hook input priority 0;\n\t\ttcp dport 1 counter drop\n\t\ttcp dport 2 counter drop\n\t}\n}\n'  # fmt: skip


@pytest.fixture(scope="module")
def place() -> Iterator[Net]:
    """One namespace, with somebody else's tables in it."""
    with Net("it") as net:
        net.run("it", "nft", "-f", "-", stdin=OTHERS)
        yield net


def others(net: Net, name: str = "it") -> str:
    """Everybody else's rules, handles and counters and all."""
    return "".join(net.run(name, "nft", "-a", "list", "table", *t.split()) for t in ("inet bulkhead-of-others", "ip bulkhead"))  # fmt: skip


def test_no_other_table_is_touched(place: Net, tmp_path: Path) -> None:
    before = others(place)
    ours = table(place, "it", PLAIN, tmp_path)
    assert others(place) == before
    asyncio.run(ours.remove())
    assert others(place) == before
    assert asyncio.run(nft.listing("inet", place.path("it"))) is None
    asyncio.run(ours.remove())


@pytest.mark.parametrize("text", ["table inet bulkhead { nonsense }", PLAIN.replace("dport 2", "dport nobody")])
def test_a_broken_text_changes_nothing(place: Net, tmp_path: Path, text: str) -> None:
    ours = table(place, "it", PLAIN, tmp_path)
    broken = NftTable("inet", text, tmp_path, place.path("it"))
    with pytest.raises(Failed, match="nft"):
        asyncio.run(broken.load())
    assert missing(ours) == []


@pytest.mark.parametrize(
    "damage, why",
    [
        ("flush chain inet bulkhead c", "expected 'tcp dport 1 counter"),
        ("add rule inet bulkhead c tcp dport 3 drop", "found 'tcp dport 3 drop'"),
        ("insert rule inet bulkhead c accept", "found 'accept'"),
        ("add chain inet bulkhead other", "found 'chain other {'"),
        ("chain inet bulkhead c { policy drop; }", "policy drop"),
        ("add table inet bulkhead { flags dormant; }", "dormant"),
        ("delete table inet bulkhead", "missing"),
    ],
)
def test_damage_is_seen_and_mended(place: Net, tmp_path: Path, damage: str, why: str) -> None:
    ours = table(place, "it", PLAIN, tmp_path)
    place.run("it", "nft", "-f", "-", stdin=damage)
    assert why in missing(ours)[0]
    settle(ours)


def test_counters_are_no_damage(place: Net, tmp_path: Path) -> None:
    ours = table(place, "it", PLAIN, tmp_path)
    place.connects("it", "127.0.0.1", "it", "127.0.0.1", 1)
    assert "packets 0" not in place.run("it", "nft", "list", "table", "inet", "bulkhead").split("dport 2")[0]
    assert missing(ours) == []


def test_killed_between_loading_and_remembering_it_loads_again(place: Net, tmp_path: Path) -> None:
    table(place, "it", PLAIN, tmp_path)
    nft.kept_path(tmp_path, "inet", place.path("it")).write_text("{")
    assert "not known" in settle(NftTable("inet", PLAIN, tmp_path, place.path("it")))[0]


def test_a_namespace_that_is_not_there_counts_as_missing(tmp_path: Path) -> None:
    gone = NftTable("inet", PLAIN, tmp_path, "bulkhead-nobody")
    assert missing(gone) == ["+ nftables table inet bulkhead in bulkhead-nobody: missing"]
    asyncio.run(gone.remove())


def test_a_change_while_it_is_loaded_is_not_taken_for_wanted(
    place: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = NftTable("inet", PLAIN, tmp_path, place.path("it"))
    real, times = nft.call, 0

    async def meddling(*command: str, **how: Any) -> str:
        nonlocal times
        said = await real(*command, **how)
        times += "-f" in command
        if "-f" in command and times == 1:
            place.run("it", "nft", "insert rule inet bulkhead c accept")
        return said

    monkeypatch.setattr(nft, "call", meddling)
    settle(ours)
    assert (
        times == 2
        and " accept" not in (asyncio.run(nft.listing("inet", place.path("it"))) or "").split("policy")[1][8:]
    )


def test_a_new_namespace_of_the_old_name_is_looked_at_again(tmp_path: Path) -> None:
    with Net("it") as first, Net("it") as second:
        name = tmp_path / "name"
        name.symlink_to(first.path("it"))
        ours = NftTable("inet", PLAIN, tmp_path, str(name))
        settle(ours)
        name.unlink()
        name.symlink_to(second.path("it"))
        second.run("it", "nft", "add table inet other")
        assert missing(ours)


def test_the_networks_are_seen_to_be_apart(place: Net, tmp_path: Path) -> None:
    """By `bulkhead verify`, which doubts whatever it does not know."""
    for uplinks in (("up0",), ()):
        table(place, "it", firewall.host_table(STATE, HOST, uplinks), tmp_path)
        chains = read_nft(
            place.run("it", "nft", "-j", "list", "ruleset"), place.run("it", "nft", "-t", "list", "ruleset")
        )
        for way in (("vmbr0", "vmbr1"), ("vmbr1", "vmbr0")):
            for version in (4, 6):
                assert forward_dropped(chains, Packet(*way, version, ())) == "inet bulkhead forward"


def test_looking_is_quick(place: Net, tmp_path: Path) -> None:
    ours = table(place, "it", firewall.host_table(STATE, HOST, ("up0",)), tmp_path)
    began = time.perf_counter()
    for _ in range(10):
        assert missing(ours) == []
    assert (time.perf_counter() - began) / 10 < 0.1


# ------------------------------------------------------------------------------------------------------------ sysctls


def test_settings_are_made_healed_and_kept_to_their_namespace(tmp_path: Path) -> None:
    with Net("leg", "far") as net:
        net.wire(("leg", "eth0", []), ("far", "x.1", []))
        mine = Path("/proc/sys/net/ipv4/ip_forward").read_text()
        wanted = Sysctls(sysctls.leg("warp0"), net.path("leg"))
        assert any("net/ipv4/ip_forward=1" in change for change in settle(wanted))
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == mine
        net.sysctl("leg", ipv4__conf__eth0__rp_filter=2, ipv6__conf__all__disable_ipv6=0)
        healed = settle(wanted)
        assert any("conf/eth0/rp_filter=0" in change and "is 2" in change for change in healed)
        net.wire(("leg", "warp0", []), ("far", "y.1", []))
        settle(wanted)
        assert net.run("leg", "cat", "/proc/sys/net/ipv4/conf/warp0/rp_filter") == "0\n"
        assert settle(Sysctls(sysctls.ports(["x.1", "nobody"]), net.path("far"))) == [
            f"~ sysctl net/ipv6/conf/x.1/disable_ipv6=1 in {net.path('far')}: is 0"
        ]


def test_the_hosts_settings_are_put_back(tmp_path: Path) -> None:
    with Net("host", "far") as net:
        for name in ("up0", "vmbr0", "vmbr1"):
            net.wire(("host", name, []), ("far", f"far-{name}", []))
        net.sysctl("host", ipv4__conf__vmbr1__forwarding=1)
        script = (
            "import asyncio, sys; from pathlib import Path; from controller.agent import sysctls as s; d = Path(sys.argv[1])\n"
            "async def go(w):\n"
            "    r = s.Sysctls(w, state_dir=d)\n"
            "    for c in await r.diff(): await c.do()\n"
            "    assert await r.diff() == []\n"
            "w = {**s.bridges(['vmbr0', 'vmbr1']), **s.host_vpn(['up0', 'gone0'], 'vmbr0')}\n"
            "asyncio.run(go(w)); asyncio.run(go(w))\n"
            "show = lambda: [Path(f'/proc/sys/net/ipv4/conf/{n}/forwarding').read_text().strip() for n in ('all', 'up0', 'vmbr0', 'vmbr1')]\n"
            "print(*show()); s.restore(d); print(*show(), (d / s.BEFORE).exists())\n"
        )
        shown = net.run("host", "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", script, str(tmp_path))
    assert shown.splitlines() == ["0 1 1 0", "0 0 0 1 False"]


# --------------------------------------------------------------------------------------------------------- the command


class Desk:
    """`bulkhead firewall` on a host of its own."""

    def __init__(self, net: Net, directory: Path) -> None:
        self.net, self.run_dir = net, directory / "run"
        self.own = self.run_dir / "agent"
        text = STATE_FILE.read_text()
        self.file, self.other = directory / "node.yaml", directory / "other.yaml"
        self.file.write_text(_with_firewall(text, 22))
        self.other.write_text(_with_firewall(text, 2222))

    def command(self, *words: str) -> list[str]:
        """The command line; `plan` takes no run directory."""
        where = [] if words[0] == "plan" else ["--run-dir", str(self.run_dir)]
        main = [sys.executable, "-c", "from controller.cli import main; main()", "firewall", *words, *where]
        return self.net.spaces["host"].command("env", f"PYTHONPATH={ROOT}", *main)

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=False, cwd=ROOT, timeout=30)

    def listing(self) -> str | None:
        """Our table."""
        return asyncio.run(nft.listing("inet", self.net.path("host")))

    def has(self, port: int) -> bool:
        """Whether the loaded table is the one of that port."""
        return f"tcp dport {port} accept" in (self.listing() or "")

    def agent(self, what: str) -> str:
        """What the agent's resource of `file` says, in the host's namespace; with `settle` it does it."""
        script = (
            "import asyncio, sys; from pathlib import Path; from controller.agent.hosttable import HostTable\n"
            "from controller.statefile import load; from controller.problems import BulkheadError\n"
            "async def go():\n"
            "    l = load(sys.argv[1]); r = HostTable(l.state, l.host, Path(sys.argv[2]))\n"
            "    for c in await r.diff():\n"
            "        print(c)\n"
            "        if sys.argv[3] == 'settle': await c.do()\n"
            "try: asyncio.run(go())\n"
            "except BulkheadError as exc: print('Failed:', exc)\n"
        )
        file = self.other if what == "other" else self.file
        words = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", script, str(file), str(self.own), what)
        return self.net.run("host", *words)


def _with_firewall(text: str, port: int) -> str:
    assert "\nnetworking:\n" in text
    return text.replace("\nnetworking:\n", f"\nnetworking:\n  firewall: {{enable: true, allowedTCPPorts: [{port}]}}\n")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A host with an uplink and the first table loaded."""
    with Net("host", "inet") as net:
        net.wire(("host", "up0", ["192.0.2.1/24"]), ("inet", "eth0", ["192.0.2.9/24"]))
        net.ip("host", "route add default via 192.0.2.9")
        net.run("host", "nft", "-f", "-", stdin=OTHERS)
        yield Desk(net, tmp_path)


def test_plan_shows_and_changes_nothing(desk: Desk) -> None:
    first = desk("plan", str(desk.file))
    assert first.returncode == 1 and "tcp dport 22 accept" in first.stdout and "+table inet bulkhead" in first.stdout
    assert desk.listing() is None
    assert desk("apply", str(desk.file)).returncode == 0
    assert desk("plan", str(desk.file)).returncode == 0
    other = desk("plan", str(desk.other), "--json")
    lines = json.loads(other.stdout)["diff"]
    changed = [line.replace("\t", "") for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert other.returncode == 1 and changed == ["-tcp dport 22 accept", "+tcp dport 2222 accept"]
    assert desk.has(22)
    assert 'iifname "up0"' in (desk.listing() or ""), "the default route says which the uplink is"


def test_what_is_confirmed_stays(desk: Desk) -> None:
    assert desk("apply", str(desk.file)).returncode == 0
    before = others(desk.net, "host")
    tried = desk("apply", str(desk.other), "--confirm", "30")
    assert tried.returncode == 0 and "firewall confirm" in tried.stdout
    tried_now = trial.read_trial(desk.own)
    assert desk.has(2222) and tried_now is not None and _guard(tried_now.mark)
    assert desk("apply", str(desk.file)).returncode == 2, "not while another is on trial"
    assert desk("confirm").returncode == 0
    assert not trial.pending(desk.own)
    assert eventually(lambda: not _guard(tried_now.mark)), "nobody waits for the end of what is confirmed"
    assert desk.has(2222)
    assert desk("confirm").returncode == 2
    assert others(desk.net, "host") == before


def test_what_nobody_confirms_is_rolled_back_and_the_agent_does_not_load_it_again(desk: Desk) -> None:
    assert "missing" in desk.agent("settle")
    assert desk.has(22)
    assert desk("apply", str(desk.other), "--confirm", "1").returncode == 0
    assert desk.agent("settle") == "", "left alone meanwhile"
    assert eventually(lambda: desk.has(22), 10)
    assert eventually(lambda: not trial.pending(desk.own))
    assert desk.agent("look") == "", "the agent finds its own table again"
    assert "tried and not confirmed" in desk.agent("other")
    assert "too late" in desk("confirm").stderr or "rolled back" in desk("confirm").stderr
    assert desk("apply", str(desk.other)).returncode == 0
    assert desk.agent("other") == ""


def test_the_roll_back_comes_in_whatever_surroundings(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for _ in range(3):
        assert desk("apply", str(desk.file), "--confirm", "1").returncode == 0
        assert eventually(lambda: desk.listing() is None and not trial.pending(desk.own))


def test_rollback_ends_a_trial_at_once(desk: Desk) -> None:
    assert desk("rollback").returncode == 2
    assert desk("apply", str(desk.file), "--confirm", "60").returncode == 0
    assert desk("rollback").returncode == 0
    assert desk.listing() is None, "there was none before"


def test_what_was_changed_by_hand_before_is_what_it_goes_back_to(desk: Desk) -> None:
    assert desk("apply", str(desk.file)).returncode == 0
    desk.net.run("host", "nft", "insert", "rule", "inet", "bulkhead", "input", "tcp", "dport", "77", "accept")
    before = desk.listing()
    assert desk("apply", str(desk.other), "--confirm", "60").returncode == 0
    assert desk("rollback").returncode == 0
    assert desk.listing() == before


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.15, 0.4])
def test_killed_at_any_time_the_roll_back_comes(desk: Desk, delay_s: float) -> None:
    assert desk("apply", str(desk.file)).returncode == 0
    before = desk.listing()
    # As a lost connection does it: the whole session ends, and nobody is asked.
    process = subprocess.Popen(
        desk.command("apply", str(desk.other), "--confirm", "1"), cwd=ROOT, start_new_session=True, stdout=-3, stderr=-3
    )
    assert eventually(lambda: trial.pending(desk.own), 15)
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if eventually(lambda: not trial.pending(desk.own), 3):
        assert desk.listing() == before
        return
    # Killed before there was anybody to roll back, and before anything was loaded: whoever comes next cleans up.
    assert desk.listing() == before
    assert eventually(lambda: (left := trial.read_trial(desk.own)) is None or left.overdue)
    assert "nobody has confirmed" in desk.agent("settle")
    assert not trial.pending(desk.own) and desk.listing() == before


def test_with_the_guard_killed_the_agent_rolls_back(desk: Desk) -> None:
    assert desk("apply", str(desk.file)).returncode == 0
    before = desk.listing()
    assert desk("apply", str(desk.other), "--confirm", "8").returncode == 0
    mark = trial.read_trial(desk.own)
    assert mark is not None
    watching = _guard(mark.mark)
    assert watching
    os.kill(watching, signal.SIGKILL)
    assert desk.has(2222) and desk.agent("settle") == ""
    time.sleep(max(0, mark.left_s) + trial.LATE_S)
    assert "nobody has confirmed" in desk.agent("settle")
    assert desk.listing() == before


def _guard(mark: str) -> int:
    """The process that watches a trial, 0 if none does."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    return int(entry.name)
            except OSError:
                continue
    return 0


def test_a_table_that_nft_refuses_leaves_no_trial(desk: Desk) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path; from controller.agent import trial\n"
        "asyncio.run(trial.try_table(Path(sys.argv[1]), 'table inet bulkhead { nonsense }', 60))"
    )
    assert desk("apply", str(desk.file)).returncode == 0
    with pytest.raises(Exception, match="nonsense"):
        desk.net.run("host", "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", script, str(desk.own))
    assert desk.has(22) and not trial.pending(desk.own)
    assert desk.agent("look") == ""


def test_only_root_may(desk: Desk) -> None:
    words = ["setpriv", "--reuid=65534", "--clear-groups", *desk.command("plan", str(desk.file))[2:]]
    os.chmod(desk.file.parent, 0o755)
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "only root" in done.stderr


def test_uplinks_are_where_default_routes_lead() -> None:
    with Net("host", "far") as net:
        net.wire(("host", "up0", ["192.0.2.1/24"]), ("far", "far0", []))
        net.wire(("host", "up1", ["2001:db8::1/64"]), ("far", "far1", []))
        net.ip("host", "route add default via 192.0.2.9", "route add ::/0 via 2001:db8::9")
        net.ip("host", "route add unreachable default metric 9999", "route add unreachable ::/0 metric 9999")
        words = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", "from controller.agent.hosttable import *; print(default_uplinks())")  # fmt: skip
        assert net.run("host", *words) == "('up0', 'up1')\n"
    assert isinstance(default_uplinks(), tuple)
    assert HostTable(STATE, HostState(), Path("/nowhere")).key == "nft/inet/bulkhead"
