"""Two networks on the same nodes: nothing crosses from one to the other, or comes in, by whatever way and family.

From containers, from peers of the meshes, and from a neighbour on the uplink who routes the private networks to the node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import demo
from lab.manager import Status
from lab.traffic import Traffic, Try

from .leaks import Program, until

NODE, INET, EXIT = "192.0.2.2", "198.51.100.10", "203.0.113.100"
PRIVACY = {"gateway": "10.0.0.100", "xray": "10.0.0.102", "relay": "10.0.0.110"}
MANAGEMENT = {"mcp-server": "10.1.0.200", "op-dbus-api": "10.1.0.201", "exporter": "10.1.0.210"}
HOST = "10.1.0.1"
UDP, TCP = 4000, 9574  # on 9573 there is the API itself
SERVERS = (*PRIVACY, *MANAGEMENT, "oo1424oo")


@pytest.fixture
def traffic(nodes_lab: Status) -> Iterator[Traffic]:
    """Servers everywhere, which hear each other where they may."""
    with Traffic(nodes_lab) as made:
        made.serve(dict.fromkeys(SERVERS, (f"udp:{UDP}", f"tcp:{TCP}")))
        honest = {
            "xray": [Try("udp", address, UDP, say="honest") for host, address in PRIVACY.items() if host != "xray"],
            "gateway": [Try("udp", PRIVACY["xray"], UDP, say="honest")],
            "mcp-server": [
                Try("udp", address, UDP, say="honest") for host, address in MANAGEMENT.items() if host != "mcp-server"
            ],
            "op-dbus-api": [Try("udp", MANAGEMENT["mcp-server"], UDP, say="honest")],
            "oo1424oo": [Try("udp", HOST, UDP, say="honest")],
        }
        found = made.attempt_all(honest)
        assert {result.outcome for results in found.values() for result in results} == {"reply"}, found
        yield made


def assert_nobody_heard(traffic: Traffic) -> None:
    """That servers have heard what they may hear, and nothing else."""
    heard = {line for host in SERVERS for line in traffic.heard(host) if not line.endswith(" honest")}
    assert not heard, heard
    assert all(traffic.heard(host) for host in SERVERS)


def tries(targets: dict[str, str], source: str | None = None) -> list[Try]:
    """Every protocol to every one."""
    ways = [("udp", UDP), ("udp", 51820), ("tcp", TCP), ("tcp", 9573), ("tcp", 443), ("icmp", 0)]
    return [Try(proto, to, port, source=source) for to in targets.values() for proto, port in ways]  # type: ignore[arg-type]


def forged(sources: list[str], targets: list[str]) -> list[Try]:
    """Datagrams with sources that are not the sender's."""
    return [Try("udp", to, UDP, spoof=source, say="forged") for source in sources for to in targets]


def assert_none_passes(traffic: Traffic, wanted: dict[str, list[Try]]) -> None:
    """Try all at once."""
    found = traffic.attempt_all(wanted)
    passed = [
        f"{host}: {each} {result}"
        for host, results in found.items()
        for each, result in zip(wanted[host], results, strict=True)
        if result.outcome == "reply"
    ]
    assert not passed, "\n".join(passed)
    assert_nobody_heard(traffic)


def test_containers(traffic: Traffic) -> None:
    """Each network's containers, of both nodes, to the other network, the host, and the other's host."""
    host = {"host": HOST, "gateway of the other": "10.0.0.1"}
    # By way of the internet, where it answers a ping as it does anybody's.
    closed = [each for each in tries({"node": NODE}) if each.proto != "icmp"]
    assert_none_passes(
        traffic,
        {
            "xray": tries(MANAGEMENT | {"host": HOST}) + closed,
            "relay": tries(MANAGEMENT | {"host": HOST}) + closed,
            "mcp-server": tries(PRIVACY | host | {"world": INET}),
            "exporter": tries(PRIVACY | host | {"world": INET}),
        },
    )


def test_forged_by_containers(traffic: Traffic) -> None:
    sources = {
        "xray": ["10.0.0.50", "10.0.0.110", "10.1.0.200", HOST, "10.8.0.2", INET],
        "mcp-server": ["10.1.0.50", "10.1.0.201", "10.0.0.102", HOST, INET],
    }
    targets = {**PRIVACY, **MANAGEMENT, "host": HOST}
    others = {name: [address for host, address in targets.items() if host != name] for name in sources}
    assert_none_passes(traffic, {name: forged(sources[name], others[name]) for name in sources})


def test_peers_of_meshes(traffic: Traffic) -> None:
    """A peer that is in both meshes: with one's address to the other network, by either mesh, and as somebody else."""
    wanted = tries(MANAGEMENT | {"host": HOST}, "10.0.0.50") + tries(PRIVACY, "10.1.0.50")
    wanted += forged(["10.0.0.50", "10.0.0.110", "10.1.0.210", HOST, INET], list(MANAGEMENT.values()))
    wanted += forged(["10.1.0.50", "10.1.0.210", "10.0.0.110", "10.8.0.2", INET], list(PRIVACY.values()))
    assert_none_passes(traffic, {"droplet": wanted})
    # Its own addresses may.
    for source, to in (("10.0.0.50", PRIVACY["xray"]), ("10.1.0.50", MANAGEMENT["op-dbus-api"])):
        assert traffic.attempt("droplet", Try("udp", to, UDP, source=source, say="honest")).outcome == "reply"


def test_clients_of_the_vpn(traffic: Traffic) -> None:
    """A client goes to the world, not to management, and not as somebody else."""
    wanted = tries(MANAGEMENT | {"host": HOST})
    wanted += forged(["10.8.0.77", "10.0.0.50", "10.0.0.102", "10.1.0.50"], [*PRIVACY.values(), *MANAGEMENT.values()])
    assert_none_passes(traffic, {"laptop": wanted})


@contextlib.contextmanager
def routed_to_the_node(lab: Status) -> Iterator[None]:
    """The router sends what is the networks' to the node."""
    prefixes = ("10.0.0.0/24", "10.1.0.0/24", "10.8.0.0/24", "172.16.0.2/32")
    script = "\n".join(f"ip route add {prefix} via {NODE}" for prefix in prefixes)
    demo.in_router(lab, f"{script}\nip -6 route add 2001:db8:99::/64 via 2001:db8:1::2")
    try:
        yield
    finally:
        script = "\n".join(f"ip route del {prefix} via {NODE}" for prefix in prefixes)
        demo.in_router(lab, f"{script}\nip -6 route del 2001:db8:99::/64")


def test_neighbour_on_the_uplink(traffic: Traffic, nodes_lab: Status, tmp_path: Path) -> None:
    """Whoever can send packets for the networks to the node, with whatever source, gets nothing in."""
    targets = PRIVACY | MANAGEMENT | {"host": HOST, "a client": "10.8.0.2", "a tunnel": "172.16.0.2"}
    sources = ["10.0.0.50", "10.0.0.102", "10.1.0.50", "10.1.0.200", HOST, "10.8.0.2", "172.16.0.1", EXIT]
    tap = Program(nodes_lab, nodes_lab.node, "watch", "eth0", out=tmp_path / "uplink.seen")
    with routed_to_the_node(nodes_lab):
        assert_none_passes(
            traffic,
            {
                "inet": tries(targets) + forged(sources, [*targets.values(), NODE]),
                "admin": tries(targets) + [each for each in tries({"node": NODE}) if each.proto != "icmp"],
                "droplet": forged(["192.0.2.10", "10.1.0.50"], [NODE]),
            },
        )
        demo.in_router(nodes_lab, "ping -6 -c1 -W1 2001:db8:99::1 >/dev/null || true")
    tap.close()
    came = [line for line in tap.lines() if isinstance(line, list) and line[0] == "in"]
    reached = {line[5] for line in came}
    assert set(targets.values()) | {"2001:db8:99::1"} <= reached, reached  # or it was the router that stopped them
    assert {line[3] for line in came} >= set(sources)


def test_ipv6_and_frames(traffic: Traffic, nodes_lab: Status, tmp_path: Path) -> None:
    """Containers that send frames of their own making: none of IPv6 gets out of a port, nor any to the other network."""
    places = dict.fromkeys((*PRIVACY, *MANAGEMENT), "eth0") | {"oo1424oo": "vmbr1", "droplet": "any"}
    del places["xray"], places["mcp-server"]
    taps = {host: Program(nodes_lab, host, "watch", where, out=tmp_path / host) for host, where in places.items()}
    presser = Program(nodes_lab, "oo1424oo", "press", "bulkhead-102", "bulkhead-200", out=tmp_path / "pressed")
    until(lambda: all(kinds.get("ipv6", 0) >= 5 for kinds in presser.ask().values()), 10, "both press")
    presser.close()
    for host, address, source in (
        ("gateway", PRIVACY["relay"], None),
        ("op-dbus-api", MANAGEMENT["exporter"], None),
        ("droplet", PRIVACY["relay"], "10.0.0.50"),
    ):
        assert traffic.attempt(host, Try("udp", address, UDP, source=source, say="honest")).outcome == "reply"
    wrong = []
    for host, tap in taps.items():
        tap.close()
        lines = [line for line in tap.lines() if isinstance(line, list)]
        assert lines or host == "oo1424oo"
        foreign = "10.0.0." if host in MANAGEMENT or host == "oo1424oo" else "10.1.0."
        for way, interface, protocol, source, *_ in lines:
            if host == "droplet" and interface not in ("nm-privacy", "nm-mgmt"):
                continue
            if way == "in" and (
                protocol == "icmp6" or ":" in source or (source.startswith(foreign) and host != "droplet")
            ):
                wrong.append(f"{host} {interface}: {protocol} from {source}")
    assert not wrong, "\n".join(wrong)
    assert_nobody_heard(traffic)
