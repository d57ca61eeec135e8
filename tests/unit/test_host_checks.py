"""What each check of a host says of what is known: good, bad, not known, not there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from controller.model import DesiredState
from controller.verify.host.checks import CHECKS, exit_code, judge
from controller.verify.host.facts import (
    Address,
    AllowedIps,
    Facts,
    Gap,
    HeldFlow,
    Link,
    NftChain,
    NftRule,
    Ovs,
    OvsBridge,
    OvsInterface,
    Place,
    Redirect,
    Route,
    RouteRule,
)
from controller.verify.host.findings import Finding, Status
from controller.verify.host.switch import FAIL_OPEN_PRIORITY
from tests.fakes.states import two_networks, wanted_ports

STATE = two_networks()
MINE = "tcp:127.0.0.1:6653"
BROKEN = Gap("the tool failed", "find out why")
NOT_THERE = Gap("it is not installed", "install it", absent=True)
JOINED = {
    "from-privacy": "to-privacy",
    "to-privacy": "from-privacy",
    "from-management": "to-management",
    "to-management": "from-management",
}
JOINED = {near[:15]: far[:15] for near, far in JOINED.items()}


def address(text: str) -> Address:
    return Address(text.partition("/")[0], ip_network(text, strict=False))


def good() -> Facts:
    """A host that keeps the two networks apart, as its tools would tell of it."""
    links: list[Link] = [Link("lo", 1, addresses=(address("127.0.0.1/8"),)), Link("eth0", 2)]
    bridges, places, drops = [], [], []
    for bridge in STATE.bridges:
        names = wanted_ports(STATE, bridge)
        host = (address("10.1.0.1/24"),) if bridge.name == "vmbr1" else ()
        links.append(Link(bridge.name, len(links) + 1, "tun", addresses=host))
        interfaces = [OvsInterface(bridge.name, "internal", index=len(links))]
        for name in names:
            number = len(links) + 1
            if name in JOINED:
                links.append(Link(name, number, "veth", lower=JOINED[name]))
            else:
                links.append(Link(name, number, "veth", lower_index=2))
                places.append(Place(f"at-{name}", (Link("eth0", 2, "veth", lower_index=number),), ()))
            interfaces.append(OvsInterface(name, index=number))
            drops.append(NftChain("netdev", "good", f"at-{name}", "ingress", "drop", (name,)))
        bridges.append(OvsBridge(bridge.name, "netdev", "", "secure", True, (MINE,), tuple(interfaces)))
    sysctls = {f"ipv{v}/conf/{d.name}/forwarding": "0" for v in (4, 6) for d in [*links, Link("all")]}
    sysctls |= {f"ipv6/conf/{d.name}/disable_ipv6": "1" for d in [*links, Link("all")]}
    return Facts(
        ovs=Ovs(tuple(bridges), remotes=("punix:/run/openvswitch/db.sock",)),
        flows={bridge.name: (HeldFlow(0, 100, "priority=100,in_port=1,actions=drop", "drop"),) for bridge in bridges},
        links=tuple(links),
        routes=(
            Route(ip_network("0.0.0.0/0"), ("eth0",)),
            Route(ip_network("10.1.0.0/24"), ("vmbr1",), protocol="kernel"),
            Route(ip_network("10.1.0.1/32"), ("vmbr1",), "local", "local", "kernel"),
        ),
        rules=(RouteRule(32766),),
        redirects=(),
        sysctls=sysctls,
        nft=tuple(drops),
        wireguard=(),
        places=tuple(places),
    )


GOOD = good()
assert isinstance(GOOD.ovs, Ovs)


def found(facts: Facts, state: DesiredState | None = STATE, *controllers: str) -> dict[str, list[Finding]]:
    """The findings by check."""
    out: dict[str, list[Finding]] = {}
    for finding in judge(facts, state, controllers or (MINE,)):
        out.setdefault(finding.check, []).append(finding)
    return out


def with_bridge(name: str, **changes: Any) -> Facts:
    assert isinstance(GOOD.ovs, Ovs)
    bridges = tuple(replace(b, **changes) if b.name == name else b for b in GOOD.ovs.bridges)
    return replace(GOOD, ovs=replace(GOOD.ovs, bridges=bridges))


def with_port(bridge: str, *interfaces: OvsInterface) -> Facts:
    """With these in place of the interfaces of their names, or besides."""
    assert isinstance(GOOD.ovs, Ovs)
    names = {interface.name for interface in interfaces}
    held = next(b for b in GOOD.ovs.bridges if b.name == bridge).interfaces
    return with_bridge(bridge, interfaces=(*(i for i in held if i.name not in names), *interfaces))


def with_ovs(**changes: Any) -> Facts:
    assert isinstance(GOOD.ovs, Ovs)
    return replace(GOOD, ovs=replace(GOOD.ovs, **changes))


def with_link(name: str, **changes: Any) -> Facts:
    assert not isinstance(GOOD.links, Gap)
    old = next((link for link in GOOD.links if link.name == name), Link(name, 99))
    return replace(GOOD, links=(*(link for link in GOOD.links if link.name != name), replace(old, **changes)))


def with_sysctl(**changes: str) -> Facts:
    assert not isinstance(GOOD.sysctls, Gap)
    return replace(GOOD, sysctls={**GOOD.sysctls, **{name.replace("__", "/"): v for name, v in changes.items()}})


def with_routes(*routes: Route, rules: tuple[RouteRule, ...] = ()) -> Facts:
    assert not isinstance(GOOD.routes, Gap)
    return replace(GOOD, routes=(*GOOD.routes, *routes), rules=rules)


def with_nft(*chains: NftChain) -> Facts:
    assert not isinstance(GOOD.nft, Gap)
    return replace(GOOD, nft=(*GOOD.nft, *chains))


def with_place(name: str, *links: Link, wireguard: tuple[AllowedIps, ...] | Gap = ()) -> Facts:
    assert not isinstance(GOOD.places, Gap)
    old = [place for place in GOOD.places if place.name != name]
    held = next((p.links for p in GOOD.places if p.name == name), ())
    assert not isinstance(held, Gap)
    return replace(GOOD, places=(*old, Place(name, (*held, *links), wireguard)))


def with_flow(priority: int, actions: str, table: int = 0) -> Facts:
    text = f"priority={priority},actions={actions}"
    return replace(GOOD, flows={**GOOD.flows, "vmbr0": (HeldFlow(table, priority, text, actions),)})


def route(network: str, *devices: str, **more: Any) -> Route:
    return Route(ip_network(network), devices, **more)


def peer(interface: str, *allowed: str) -> tuple[AllowedIps, ...]:
    return (AllowedIps(interface, 1, tuple(map(ip_network, allowed))),)


def fwd(device: str) -> NftRule:
    return NftRule(({"fwd": {"dev": device}},), 7)


WG = Link("wg", 3, "wireguard", ethernet=False)
TUN = Link("wg", 3, "tun", ethernet=False)
FORWARDING = {"ipv4__conf__vmbr0__forwarding": "1"}

BAD: dict[str, tuple[str, Facts]] = {
    "standalone": ("fail mode", with_bridge("vmbr0", fail_mode="standalone")),
    "fail mode not set": ("fail mode", with_bridge("mesh-privacy", fail_mode="")),
    "in-band": ("in-band", with_bridge("vmbr1", disable_in_band=False)),
    "another controller": ("controllers", with_bridge("vmbr0", controllers=(MINE, "tcp:192.0.2.7:6653"))),
    "a bridge that listens": ("controllers", with_bridge("vmbr0", controllers=("ptcp:6634",))),
    "a manager": ("managers", with_ovs(managers=("ssl:192.0.2.7:6640",))),
    "a manager for all": ("managers", with_ovs(managers=("ptcp:6640",))),
    "a manager for all of IPv6": ("managers", with_ovs(managers=("ptcp:6640:[::]",))),
    "a manager by name": ("managers", with_ovs(managers=("tcp:localhost.example:6640",))),
    "a remote": ("managers", with_ovs(remotes=("ptcp:6640:10.1.0.1",))),
    "a mirror": ("mirrors", with_bridge("vmbr0", copies=("mirrors",))),
    "STP": ("spanning tree", with_bridge("vmbr0", spanning=("stp_enable",))),
    "a port nobody declared": ("ports", with_port("vmbr0", OvsInterface("stray0"))),
    "a tunnel of OVS": ("ports", with_port("vmbr0", OvsInterface("veth102", "vxlan"))),
    "an internal port": ("ports", with_port("vmbr0", OvsInterface("veth102", "internal"))),
    "WireGuard as a port": ("ports", with_link("warp0", kind="wireguard", ethernet=False)),
    "wireguard-go as a port": ("ports", with_link("warp0", kind="tun", ethernet=False)),
    "a macvlan as a port": ("ports", with_link("veth102", kind="macvlan")),
    "a far end on the host": ("far ends", with_link("veth102", lower="eth7")),
    "a pair that is joined wrongly": ("far ends", with_link("from-privacy", lower="to-management"[:15])),
    "a pair whose end is nowhere": ("far ends", with_bridge("mesh-privacy", interfaces=())),
    "a namespace in both networks": ("far ends", with_place("at-veth102", Link("eth1", 2, "veth", lower_index=next(
        link.index for link in GOOD.links if link.name == "veth200")))),  # type: ignore[union-attr]
    "NORMAL": ("hidden flows", with_flow(1, "NORMAL")),
    "FLOOD among others": ("hidden flows", with_flow(1, "output:1,FLOOD")),
    "in-band flows": ("hidden flows", with_flow(180_008, "NORMAL")),
    "fail-open flow": ("hidden flows", with_flow(FAIL_OPEN_PRIORITY, "NORMAL")),
    "hidden flow of no known kind": ("hidden flows", with_flow(70_000, "drop")),
    "an address": ("addresses", with_link("vmbr0", addresses=(address("10.0.0.1/24"),))),
    "an IPv4 link-local address": ("addresses", with_link("veth102", addresses=(address("169.254.0.1/16"),))),
    "the host's address elsewhere": ("addresses", with_link("mesh-privacy", addresses=(address("10.1.0.1/24"),))),
    "the host's address, too wide": ("addresses", with_link("vmbr1", addresses=(address("10.1.0.1/8"),))),
    "forwarding": ("forwarding", with_sysctl(**FORWARDING)),
    "forwarding from a mesh bridge": ("forwarding", with_sysctl(**{"ipv4__conf__mesh-privacy__forwarding": "1"})),
    "forwarding IPv6": ("forwarding", with_sysctl(
        ipv6__conf__all__forwarding="1", ipv6__conf__vmbr0__disable_ipv6="0")),
    "forwarding IPv6 by force": ("forwarding", with_sysctl(
        ipv6__conf__vmbr0__force_forwarding="1", ipv6__conf__vmbr0__disable_ipv6="0")),
    "a route to the other bridge": ("routes", with_routes(route("10.0.0.0/24", "vmbr1"))),
    "a route to part of it": ("routes", with_routes(route("10.0.0.7/32", "vmbr1"))),
    "a route past the bridge": ("routes", with_routes(route("10.0.0.0/24", "veth102"))),
    "a default route": ("routes", with_routes(route("0.0.0.0/0", "vmbr1", table="77"))),
    "half of everything": ("routes", with_routes(route("0.0.0.0/1", "vmbr1"))),
    "a way for the VPN's clients": ("routes", with_routes(route("10.8.0.0/24", "vmbr1"))),
    "a second hop": ("routes", with_routes(route("10.0.0.0/24", "vmbr0", "vmbr1"))),
    "a rule": ("routes", with_routes(rules=(RouteRule(5, iif="vmbr0", target=ip_network("10.1.0.0/16")),))),
    "an address elsewhere": ("overlaps", with_link("eth0", addresses=(address("10.0.0.9/24"),))),
    "a route elsewhere": ("overlaps", with_routes(route("10.0.0.0/16", "eth0"))),
    "all addresses are the host's": ("overlaps", with_routes(route("10.0.0.0/24", "lo", kind="local", table="local"))),
    "a port without its drop": ("second road", replace(GOOD, nft=GOOD.nft[1:])),  # type: ignore[index]
    "a drop that asks for more": ("second road", replace(GOOD, nft=(*GOOD.nft[1:], replace(  # type: ignore[index, misc]
        GOOD.nft[0], policy="accept", rules=(  # type: ignore[index]
            NftRule(({"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                                "right": "1.2.3.4"}}, {"drop": None})),)),))),
    "a Linux bridge": ("second road", with_link("veth102", master="br0")),
    "a Linux bridge over a bridge": ("second road", with_link("vmbr0", master="br0")),
    "a macvlan over a bridge": ("second road", with_link("mv0", kind="macvlan", lower="vmbr0")),
    "a macvlan in another namespace": ("second road", with_place("x", Link("mv0", 9, "macvlan", lower_index=3))),
    "tc from a port": ("redirects", replace(GOOD, redirects=(Redirect("veth102", "ingress", "eth0"),))),
    "tc to a bridge": ("redirects", replace(GOOD, redirects=(Redirect("eth0", "root", "vmbr1"),))),
    "nft from a port": ("redirects", with_nft(
        NftChain("netdev", "t", "c", "ingress", "accept", ("veth102",), (fwd("eth0"),)))),
    "nft to a port": ("redirects", with_nft(
        NftChain("netdev", "t", "c", "ingress", "accept", ("eth0",), (fwd("veth102"),)))),
    "IPv6": ("IPv6", with_sysctl(ipv6__conf__veth102__disable_ipv6="0")),
    "proxy ARP": ("proxy ARP", with_sysctl(ipv4__conf__all__proxy_arp="1")),
    "proxy ARP within": ("proxy ARP", with_sysctl(ipv4__conf__vmbr0__proxy_arp_pvlan="1")),
    "proxy ND": ("proxy ARP", with_sysctl(ipv6__conf__vmbr1__proxy_ndp="1")),
    "a leg with the other's": ("WireGuard", with_place(
        "at-warp0", WG, wireguard=peer("wg", "0.0.0.0/0", "10.1.0.9/32"))),
    "a mesh leg with everything": ("WireGuard", with_place("at-nm-privacy", WG, wireguard=peer("wg", "0.0.0.0/0"))),
    "one tunnel for both": ("WireGuard", replace(
        GOOD, links=(*GOOD.links, WG), wireguard=peer("wg", "10.0.0.0/24", "10.0.0.0/8"))),  # type: ignore[misc]
}  # fmt: skip


def test_a_good_host_is_good() -> None:
    every = judge(GOOD, STATE, (MINE,))
    assert [f for f in every if f.status is not Status.OK and f.check != "WireGuard"] == []
    assert exit_code(every) == 0


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_told_by_its_check(name: str) -> None:
    check, facts = BAD[name]
    told = found(facts)
    wrong = [finding for finding in told[check] if finding.status is Status.BAD]
    assert wrong
    assert all(finding.mend or finding.advice for finding in wrong)
    assert exit_code(judge(facts, STATE, (MINE,))) == 1
    also = {"far ends", "ports"} if check in ("ports", "far ends", "second road", "controllers") else set()
    assert {c for c, f in told.items() if any(x.status is Status.BAD for x in f)} <= {
        check,
        *also,
        "second road",
        "IPv6",
    }


def test_every_check_has_a_bad_case() -> None:
    names = {finding.check for finding in judge(GOOD, STATE, ())}
    assert len(names) == len(CHECKS)
    assert names - {check for check, _ in BAD.values()} == {"bridges"}


def test_every_check_is_in_the_manual() -> None:
    names = {finding.check for finding in judge(GOOD, STATE, ())}
    manual = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    rows = re.findall(r"^\| ([A-Za-z0-9 -]+?)(?: \(FILE\))? \|", manual.partition("## What is looked at")[2], re.M)
    assert set(rows) - {"check"} == names
    needs_file = {check for check, (f, *_) in found(GOOD, None).items() if "no state FILE" in f.seen}
    marked = re.findall(r"^\| ([A-Za-z0-9 -]+?) \(FILE\) \|", manual, re.M)
    assert set(marked) == needs_file


HARMLESS: dict[str, Facts] = {
    "a manager on this host": with_ovs(managers=("ptcp:6640:127.0.0.1", "punix:/run/x", "ptcp:6641:[::1]")),
    "a controller written otherwise": with_bridge("vmbr0", controllers=("tcp:127.0.0.1",)),
    "no controller": with_bridge("vmbr0", controllers=()),
    "a bridge that is not declared": with_ovs(bridges=(*GOOD.ovs.bridges, OvsBridge("other"))),
    "forwarding elsewhere": with_sysctl(ipv4__conf__all__forwarding="1", ipv4__conf__eth0__forwarding="1"),
    "IPv6 elsewhere": with_sysctl(ipv6__conf__eth0__disable_ipv6="0", ipv6__conf__all__forwarding="1"),
    "a link-local address of IPv6": with_link("veth102", addresses=(address("fe80::1/64"),)),
    "an internal rule with NORMAL in its table": with_flow(2, "NORMAL", 254),
    "a default route and a closer one": with_routes(
        route("0.0.0.0/0", "vmbr1", table="77"),
        route("10.0.0.0/23", "vmbr0", table="77"),
        route("10.8.0.0/24", table="77", kind="unreachable"),
    ),
    "a route that leads nowhere": with_routes(route("10.0.0.0/24", kind="blackhole")),
    "a bridge in a VRF": replace(
        with_link("vmbr1", master="vrf0"),
        links=(*with_link("vmbr1", master="vrf0").links, Link("vrf0", 90, "vrf")),  # type: ignore[misc]
    ),
    "tc elsewhere": replace(GOOD, redirects=(Redirect("eth0", "ingress", "ifb0"), Redirect("eth0", "ingress", ""))),
    "nft elsewhere": with_nft(NftChain("netdev", "t", "c", "ingress", "accept", ("eth0",), (fwd("eth1"),))),
    "legs with their own": with_place("at-warp0", WG, wireguard=peer("wg", "0.0.0.0/0", "::/0")),
    "WireGuard of somebody else": replace(GOOD, wireguard=peer("wg9", "0.0.0.0/0", "192.168.7.0/24")),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_not_told(name: str) -> None:
    assert [f for f in judge(HARMLESS[name], STATE, (MINE,)) if f.status in (Status.BAD, Status.UNKNOWN)] == []


UNKNOWN: dict[str, tuple[Callable[[Gap], Facts], set[str]]] = {
    "Open vSwitch": (
        lambda gap: replace(GOOD, ovs=gap),
        {"bridges", "fail mode", "in-band", "controllers", "managers", "mirrors", "spanning tree", "ports", "far ends",
         "hidden flows", "second road", "addresses", "redirects", "IPv6", "proxy ARP"},
    ),
    "a bridge's flows": (lambda gap: replace(GOOD, flows={**GOOD.flows, "vmbr1": gap}), {"hidden flows"}),
    "ovsdb-server's remotes": (lambda gap: with_ovs(remotes=gap), {"managers"}),
    "interfaces": (
        lambda gap: replace(GOOD, links=gap), {"ports", "far ends", "addresses", "overlaps", "second road", "redirects"}
    ),
    "routes": (lambda gap: replace(GOOD, routes=gap), {"routes", "overlaps"}),
    "rules": (lambda gap: replace(GOOD, rules=gap), {"routes"}),
    "settings": (lambda gap: replace(GOOD, sysctls=gap), {"forwarding", "IPv6", "proxy ARP"}),
    "tc": (lambda gap: replace(GOOD, redirects=gap), {"redirects"}),
    "other namespaces": (lambda gap: replace(GOOD, places=gap), {"far ends", "WireGuard"}),
    "one namespace": (
        lambda gap: replace(GOOD, places=(Place("x", gap, ()),)), {"far ends", "WireGuard"}
    ),
    "WireGuard of a leg": (
        lambda gap: with_place("at-warp0", TUN, wireguard=gap), {"WireGuard"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("gap", [BROKEN, NOT_THERE], ids=["broken", "absent"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_never_called_good(name: str, gap: Gap) -> None:
    make, checks = UNKNOWN[name]
    told = found(make(gap))
    unknown = {check for check, findings in told.items() if any(f.status is Status.UNKNOWN for f in findings)}
    assert unknown == checks
    assert exit_code(judge(make(gap), STATE, (MINE,))) == 2


@pytest.mark.parametrize(
    "gap, checks", [(BROKEN, {"second road", "redirects"}), (NOT_THERE, {"second road"})], ids=["broken", "absent"]
)
def test_a_firewall_that_is_not_known(gap: Gap, checks: set[str]) -> None:
    told = found(replace(GOOD, nft=gap))
    assert {c for c, findings in told.items() if any(f.status is Status.UNKNOWN for f in findings)} == checks
    told = found(replace(with_sysctl(**FORWARDING), nft=gap))
    assert told["forwarding"][0].status is Status.UNKNOWN


def test_in_a_vrf_a_drop_by_the_bridges_name_drops_nothing() -> None:
    def drop(key: str) -> NftRule:
        right = {"set": ["vmbr0", "vmbr1", "mesh-privacy", "mesh-management"]}
        return NftRule(({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}}, {"drop": None}))

    def told(facts: Facts, key: str, device: str) -> Status:
        assert not isinstance(facts.nft, Gap)
        chain = NftChain("inet", "t", "c", "forward", rules=(drop(key),))
        on = with_sysctl(**{f"ipv4__conf__{device}__forwarding": "1"}).sysctls
        return found(replace(facts, nft=(*facts.nft, chain), sysctls=on))["forwarding"][0].status

    inside = HARMLESS["a bridge in a VRF"]
    assert told(GOOD, "iifname", "vmbr1") is Status.OK
    assert told(inside, "iifname", "vmbr1") is Status.BAD
    assert told(inside, "iifname", "vrf0") is Status.BAD
    assert told(inside, "oifname", "vrf0") is Status.OK


def test_programs_are_not_known_to_be_good() -> None:
    for facts in (with_link("veth102", program=True), replace(GOOD, redirects=(Redirect("veth102", "ingress", ""),))):
        assert [f.status for f in found(facts)["redirects"]] == [Status.UNKNOWN]


def test_where_nothing_is_nothing_is_wrong() -> None:
    gap = NOT_THERE
    facts = Facts(gap, {}, (), (), (), (), {"ipv4/conf/all/forwarding": "1"}, gap, gap, ())
    every = judge(facts, None, (MINE,))
    assert exit_code(every) == 0
    assert {f.status for f in every} <= {Status.OK, Status.ABSENT}
    assert exit_code(judge(facts, STATE, (MINE,))) == 2


def test_without_a_file_what_needs_none_is_judged() -> None:
    assert exit_code(judge(GOOD, None, (MINE,))) == 0
    for name in ("standalone", "in-band", "another controller", "a mirror", "in-band flows", "IPv6", "a Linux bridge"):
        assert exit_code(judge(BAD[name][1], None, (MINE,))) == 1, name


def test_the_bridges_interfaces_elsewhere_leave_the_kernel_unknown() -> None:
    assert not isinstance(GOOD.links, Gap)
    away = replace(GOOD, links=tuple(link for link in GOOD.links if link.name != "vmbr1"))
    another = with_link("vmbr1", index=98)
    for facts in (away, another):
        told = found(facts)
        assert told["forwarding"][0].status is Status.UNKNOWN
        assert told["fail mode"][0].status is Status.OK


def test_mends_name_the_database_that_was_asked_and_quote_what_is_not_ours() -> None:
    facts = with_bridge("vmbr0", controllers=("tcp:x;reboot",))
    assert not isinstance(facts.ovs, Gap)
    facts = replace(facts, ovs=replace(facts.ovs, db="unix:/tmp/db.sock", managers=("ptcp:6640",)))
    told = found(facts)
    assert told["controllers"][0].mend == ("ovs-vsctl --db=unix:/tmp/db.sock set-controller vmbr0 tcp:127.0.0.1:6653",)
    assert told["managers"][0].mend == ("ovs-vsctl --db=unix:/tmp/db.sock del-manager",)
    stray = found(with_port("vmbr0", OvsInterface("a;reboot")))["ports"][0]
    assert stray.mend == ("ovs-vsctl del-port vmbr0 'a;reboot'",)


def test_each_bridge_may_have_a_socket_of_its_own() -> None:
    sockets = [f"unix:/var/run/openvswitch/{name}.controller" for name in ("vmbr0", "vmbr1")]
    facts = with_bridge("vmbr1", controllers=("unix:/run/openvswitch/vmbr1.controller", "tcp:192.0.2.7"))
    (told,) = found(facts, STATE, MINE, *sockets)["controllers"]
    assert told.mend == ("ovs-vsctl set-controller vmbr1 unix:/run/openvswitch/vmbr1.controller",)
    facts = with_bridge("vmbr1", controllers=("tcp:192.0.2.7",))
    facts_told = [f for f in found(facts, STATE, *sockets)["controllers"] if f.seen.startswith("vmbr1 ")]
    assert facts_told[0].mend == (f"ovs-vsctl set-controller vmbr1 {sockets[1]}",)
