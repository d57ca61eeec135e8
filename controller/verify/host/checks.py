"""Judges what is known of a host: does anything beside the flows lead from one network to another? Pure.

A check says `ok` only for what it has seen; what could not be seen is `unknown`, what is not on this host is `absent`.
Imports model, compile, links, facts and nft.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address, ip_network
from itertools import permutations

from controller.compile import planned_ports
from controller.model import DesiredState, Network
from controller.verify.host.facts import (
    AllowedIps,
    Facts,
    Gap,
    HeldFlow,
    IpNetwork,
    Link,
    NftChain,
    OvsBridge,
    OvsInterface,
    Place,
    Route,
)
from controller.verify.host.nft import Packet, forward_dropped, ingress_dropped
from controller.verify.links import declared_links

IN_BAND_PRIORITIES = range(180_000, 180_100)
FAIL_OPEN_PRIORITY = 0xF0F0F0
_INTERNAL_TABLE = 254
_VISIBLE = 0xFFFF
_ANYWHERE = re.compile(r"\b(?:NORMAL|FLOOD|ALL)\b")
_PLAIN_TYPES = ("", "system", "internal", "tap", "dummy", "patch", "afxdp", "afxdp-nonpmd", "dpdk")
"""OVS interfaces that end on this host. Tunnels of OVS's own are not among them: they go past the legs."""


class Status(StrEnum):
    """What a check found."""

    OK = "ok"
    BAD = "BAD"
    UNKNOWN = "unknown"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was seen, and how to mend it where it is not good."""

    check: str
    status: Status
    seen: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding as plain JSON values."""
        return {"check": self.check, "status": str(self.status), "seen": self.seen, "mend": self.mend}


@dataclass(frozen=True, slots=True)
class Subject:
    """A host to judge: what is known of it, and what it should be, if that was told."""

    facts: Facts
    state: DesiredState | None
    controllers: frozenset[str]

    @property
    def bridges(self) -> tuple[OvsBridge, ...]:
        """OVS's bridges that are declared; all of them where nothing is."""
        ovs = self.facts.ovs
        if isinstance(ovs, Gap):
            return ()
        return tuple(b for b in ovs.bridges if self.state is None or self.state.bridge(b.name) is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The bridges to judge, there or not."""
        return tuple(b.name for b in (self.bridges if self.state is None else self.state.bridges))

    @property
    def networks(self) -> tuple[Network, ...]:
        """The declared networks."""
        return self.state.networks if self.state is not None else ()

    @property
    def devices(self) -> tuple[str, ...]:
        """Interfaces of the kernel that the bridges use: their own, and their ports."""
        ports = [i.name for b in self.bridges for i in b.interfaces if i.type != "patch"]
        return tuple(dict.fromkeys([*self.names, *ports]))

    @property
    def links(self) -> dict[str, Link]:
        """The kernel's interfaces by name; none if they are not known."""
        links = self.facts.links
        return {} if isinstance(links, Gap) else {link.name: link for link in links}

    def network_of(self, device: str) -> str | None:
        """Which network a bridge or a port of a bridge belongs to."""
        if self.state is None:
            return None
        for bridge in self.state.bridges:
            if device == bridge.name or device in planned_ports(self.state, bridge):
                return bridge.network
        for held in self.bridges:
            if any(i.name == device for i in held.interfaces):
                declared = self.state.bridge(held.name)
                return declared.network if declared is not None else None
        return None

    def sysctl(self, name: str) -> str:
        """A setting below /proc/sys/net; empty if there is none."""
        sysctls = self.facts.sysctls
        return "" if isinstance(sysctls, Gap) else sysctls.get(name, "")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Bridges that must not reach each other through the host: where packets come up, and where they would go down."""
        if self.state is None:
            return list(permutations(self.names, 2))
        return [(a.bridge, b.bridge) for a, b in permutations(self.networks, 2)]


Check = Callable[[Subject], Iterable[Finding]]


def judge(facts: Facts, state: DesiredState | None, controllers: Iterable[str]) -> tuple[Finding, ...]:
    """Every check's findings, in the order of `CHECKS`; at least one each."""
    subject = Subject(facts, state, frozenset(map(normal_target, controllers)))
    elsewhere = _elsewhere(subject)
    if elsewhere is not None:
        # What the kernel says here is about another network namespace than the bridges'.
        facts = replace(facts, links=elsewhere, routes=elsewhere, rules=elsewhere, sysctls=elsewhere, nft=elsewhere)
        subject = replace(subject, facts=facts)
    return tuple(finding for check in CHECKS for finding in check(subject))


def _elsewhere(subject: Subject) -> Gap | None:
    if isinstance(subject.facts.links, Gap) or not subject.bridges:
        return None
    if any(b.name in subject.links for b in subject.bridges if b.datapath_type != "dummy"):
        return None
    return Gap(
        "the bridges' own interfaces are not in this network namespace",
        "run this where ovs-vswitchd runs: nsenter --net=/proc/$(pidof -s ovs-vswitchd)/ns/net bulkhead verify …",
    )


def exit_code(findings: Iterable[Finding]) -> int:
    """0: all is ok or absent; 1: something is BAD; 2: nothing is, but something could not be found out."""
    seen = {finding.status for finding in findings}
    return 1 if Status.BAD in seen else 2 if Status.UNKNOWN in seen else 0


def normal_target(target: str) -> str:
    """A controller's target in one spelling: the port written out, /run for /var/run."""
    scheme, _, rest = target.partition(":")
    if scheme in ("tcp", "ssl") and re.fullmatch(r"[^:]+|\[[^]]*\]", rest):
        rest += ":6653"
    if scheme == "unix" and rest.startswith("/var/run/"):
        rest = rest.removeprefix("/var")
    return f"{scheme}:{rest}"


# ------------------------------------------------------------------------------------------------------------- helpers


def _told(check: str, bad: Sequence[tuple[str, str]], good: str) -> list[Finding]:
    """What is bad, each with its mending; else that all is good."""
    return [Finding(check, Status.BAD, *pair) for pair in bad] or [Finding(check, Status.OK, good)]


def _gap(check: str, gap: Gap, *, needed: bool = True) -> list[Finding]:
    """What is not known. A thing that is absent is only unknown where the state needs it."""
    status = Status.ABSENT if gap.absent and not needed else Status.UNKNOWN
    return [Finding(check, status, gap.why, gap.mend)]


def _no_file(check: str) -> list[Finding]:
    return [
        Finding(check, Status.ABSENT, "no state FILE was given to compare with", "name it to have this checked: bulkhead verify FILE")
    ]  # fmt: skip


def _listed(names: Iterable[str], most: int = 8) -> str:
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _each_bridge(check: str, subject: Subject) -> list[Finding]:
    """Why the bridges, or some of them, cannot be judged."""
    ovs = subject.facts.ovs
    if isinstance(ovs, Gap):
        return _gap(check, ovs, needed=subject.state is not None)
    there = {bridge.name for bridge in ovs.bridges}
    missing = [name for name in subject.names if name not in there]
    if missing:
        mend = f"make it: ovs-vsctl add-br {missing[0]} -- set-fail-mode {missing[0]} secure"
        return [Finding(check, Status.UNKNOWN, f"Open vSwitch has no bridge {_listed(missing)}", mend)]
    if not there:
        return [Finding(check, Status.ABSENT, "Open vSwitch has no bridge")]
    return []


# -------------------------------------------------------------------------------------------------------- Open vSwitch


def bridges(subject: Subject) -> list[Finding]:
    """Whether the bridges can be judged at all. The checks below leave out what is missing here."""
    check = "bridges"
    return _each_bridge(check, subject) or [Finding(check, Status.OK, _listed(subject.names))]


def _over_bridges(
    check: str, subject: Subject, judged: Callable[[OvsBridge], Iterator[tuple[str, str]]], good: str
) -> list[Finding]:
    if not subject.bridges:
        return _each_bridge(check, subject)
    return _told(check, [pair for bridge in subject.bridges for pair in judged(bridge)], good)


def fail_mode(subject: Subject) -> list[Finding]:
    """Without a controller a standalone bridge becomes a plain switch."""

    def judged(bridge: OvsBridge) -> Iterator[tuple[str, str]]:
        if bridge.fail_mode != "secure":
            seen = f"{bridge.name} is {bridge.fail_mode or 'standalone (the default)'}: it becomes a plain switch"
            yield f"{seen} when its controller is away", f"ovs-vsctl set-fail-mode {bridge.name} secure"

    return _over_bridges("fail mode", subject, judged, "secure on every bridge")


def in_band(subject: Subject) -> list[Finding]:
    """In-band control makes hidden flows with NORMAL above all of ours, for each controller and manager."""

    def judged(bridge: OvsBridge) -> Iterator[tuple[str, str]]:
        if not bridge.disable_in_band:
            seen = f"{bridge.name} allows in-band control: hidden flows with NORMAL above all others"
            yield seen, f"ovs-vsctl set bridge {bridge.name} other-config:disable-in-band=true"

    return _over_bridges("in-band", subject, judged, "off on every bridge")


def controllers(subject: Subject) -> list[Finding]:
    """Whoever is a bridge's controller can replace all its flows."""

    def judged(bridge: OvsBridge) -> Iterator[tuple[str, str]]:
        foreign = [t for t in bridge.controllers if normal_target(t) not in subject.controllers]
        if foreign:
            mine = sorted(subject.controllers)[0] if subject.controllers else "tcp:127.0.0.1:6653"
            mend = f"ovs-vsctl set-controller {bridge.name} {mine} (if it is yours: --controller {foreign[0]})"
            yield f"{bridge.name} obeys {_listed(foreign)}, which is not expected", mend

    good = f"none but {_listed(sorted(subject.controllers))}"
    return _over_bridges("controllers", subject, judged, good)


def managers(subject: Subject) -> list[Finding]:
    """Whoever reaches OVSDB can change bridges, ports and controllers."""
    check, ovs = "managers", subject.facts.ovs
    if isinstance(ovs, Gap):
        return _gap(check, ovs, needed=subject.state is not None)
    bad = [(f"a manager {target}", "ovs-vsctl del-manager") for target in ovs.managers if _outward(target)]
    if isinstance(ovs.remotes, Gap):
        return [Finding(check, Status.BAD, *pair) for pair in bad] or _gap(check, ovs.remotes)
    mend = "ovs-appctl -t ovsdb-server ovsdb-server/remove-remote"
    bad += [(f"ovsdb-server has the remote {r}", f"{mend} {r}") for r in ovs.remotes if _outward(r)]
    told = [(f"{seen}: other hosts can change every bridge", mend) for seen, mend in bad]
    return _told(check, told, "OVSDB listens on this host only")


def _outward(target: str) -> bool:
    """Whether a manager's target or a remote reaches beyond this host. What is not understood does."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "punix", "db", "role"):
        return False
    if scheme in ("ptcp", "pssl"):
        rest = rest.partition(":")[2]
        host = rest[: rest.index("]")].strip("[") if rest.startswith("[") and "]" in rest else rest
    else:
        host = rest[1 : rest.index("]")] if rest.startswith("[") and "]" in rest else rest.partition(":")[0]
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return host != "localhost" or scheme in ("ptcp", "pssl")


def copies(subject: Subject) -> list[Finding]:
    """A mirror or a sampler hands packets out beside the flows."""

    def judged(bridge: OvsBridge) -> Iterator[tuple[str, str]]:
        if bridge.copies:
            seen = f"{bridge.name} has {_listed(bridge.copies)}: packets, or parts of them, are copied past every flow"
            yield seen, "; ".join(f"ovs-vsctl clear bridge {bridge.name} {name}" for name in bridge.copies)

    return _over_bridges("mirrors", subject, judged, "no mirror, sFlow, NetFlow or IPFIX")


def ports(subject: Subject) -> list[Finding]:
    """Ports that nobody declared, and declared ones that are something else than a port of this host."""
    check, state = "ports", subject.state
    if state is None:
        return _no_file(check)

    def judged(bridge: OvsBridge) -> Iterator[tuple[str, str]]:
        declared = state.bridge(bridge.name)
        assert declared is not None
        expected = {bridge.name, *planned_ports(state, declared)}
        for interface in bridge.interfaces:
            mend = f"ovs-vsctl del-port {bridge.name} {interface.name}"
            if interface.name not in expected:
                yield f"{bridge.name} has a port {interface.name} that is not declared", f"{mend}, or declare it"
            elif interface.type not in _PLAIN_TYPES:
                yield f"{interface.name} of {bridge.name} is a {interface.type}, which leads past the legs", mend

    return _over_bridges(check, subject, judged, "none but the declared ones")


def wires(subject: Subject) -> list[Finding]:
    """The far ends of ports: the other declared bridge, or somewhere that is not the host itself."""
    check, state = "far ends", subject.state
    if state is None:
        return _no_file(check)
    if not subject.bridges:
        return _each_bridge(check, subject)
    ends = declared_links(state)
    bad, judged = [], 0
    for bridge in subject.bridges:
        for interface in bridge.interfaces:
            far = ends.get((bridge.name, interface.name))
            peer = _peer(subject, interface)
            judged += peer is not None
            if peer is None or peer == (far[1] if far else ""):
                continue
            if far is not None:
                seen = f"{interface.name} of {bridge.name} is joined to {peer or 'another namespace'}, not to {far[1]}"
                bad.append((seen, f"ip link del {interface.name}, and make the pair {interface.name}, {far[1]} again"))
            else:
                seen = f"the far end of {interface.name}, {peer}, is on the host itself"
                bad.append((seen, f"move it where it belongs: ip link set {peer} netns …"))
    links = subject.facts.links
    if isinstance(links, Gap) and not bad:
        return _gap(check, links)
    return _told(check, bad, f"{judged} ports end where they should")


def _peer(subject: Subject, interface: OvsInterface) -> str | None:
    """What a veth or patch port is joined to: its name, '' if in another namespace, None if it is neither."""
    if interface.type == "patch":
        return interface.peer
    link = subject.links.get(interface.name)
    return link.lower if link is not None and link.kind == "veth" else None


def hidden_flows(subject: Subject) -> list[Finding]:
    """Flows that OpenFlow does not show, or that let the switch decide where packets go."""
    check = "hidden flows"
    if not subject.bridges:
        return _each_bridge(check, subject)
    out: list[Finding] = []
    for bridge in subject.bridges:
        held = subject.facts.flows.get(bridge.name, Gap(f"the flows of {bridge.name} were not read"))
        if isinstance(held, Gap):
            out += _gap(check, replace(held, why=f"{bridge.name}: {held.why}"))
            continue
        hidden = [flow for flow in held if flow.priority > _VISIBLE]
        if hidden:
            out.append(_hidden(check, bridge, hidden))
        loose = [
            f for f in held if f.priority <= _VISIBLE and f.table != _INTERNAL_TABLE and _ANYWHERE.search(f.actions)
        ]
        if loose and subject.state is not None:
            seen = f"{bridge.name} has {len(loose)} flow(s) that send anywhere, none of ours: {loose[0].text}"
            out.append(
                Finding(check, Status.BAD, seen, f"who made it? bulkhead status; ovs-ofctl dump-flows {bridge.name}")
            )
    return out or [Finding(check, Status.OK, "none that lets packets pass beside ours")]


def _hidden(check: str, bridge: OvsBridge, flows: Sequence[HeldFlow]) -> Finding:
    first = max(flows, key=lambda flow: flow.priority)
    if any(flow.priority == FAIL_OPEN_PRIORITY for flow in flows):
        why, mend = "it acts as a plain switch now", f"ovs-vsctl set-fail-mode {bridge.name} secure"
    elif first.priority in IN_BAND_PRIORITIES:
        why, mend = "in-band control", f"ovs-vsctl set bridge {bridge.name} other-config:disable-in-band=true"
    else:
        why, mend = "not of any kind known", f"ovs-appctl bridge/dump-flows {bridge.name}"
    seen = f"{bridge.name} has {len(flows)} hidden flow(s), {why}: {first.text}"
    return Finding(check, Status.BAD, seen, mend)


# ---------------------------------------------------------------------------------------------------------- the kernel


def addresses(subject: Subject) -> list[Finding]:
    """An address on a bridge or a port makes the host itself a member, which only a declared host address may."""
    check, links = "addresses", subject.facts.links
    if subject.state is None:
        return _no_file(check)
    if isinstance(links, Gap):
        return _gap(check, links)
    allowed = {(n.bridge, str(n.host)) for n in subject.networks if n.host is not None}
    bad = [
        (
            f"{name} has the address {address.text}",
            f"ip address del {address.text}/{address.network.prefixlen} dev {name}",
        )
        for name in subject.devices
        for address in (subject.links[name].addresses if name in subject.links else ())
        if (name, address.text) not in allowed and not address.network.is_link_local
    ]
    hosts = [f"{address} on {bridge}" for bridge, address in sorted(allowed)]
    return _told(check, bad, f"none on bridges and ports{' but the declared ' if hosts else ''}{_listed(hosts)}")


def _forwarding(subject: Subject, version: int) -> list[str]:
    """Interfaces whose packets the kernel would forward. IPv6 has one switch for all, where it is on at all."""
    if version == 6:
        alive = [d for d in subject.devices if subject.sysctl(f"ipv6/conf/{d}/disable_ipv6") == "0"]
        return alive if subject.sysctl("ipv6/conf/all/forwarding") not in ("", "0") else []
    if subject.sysctl("ipv4/conf/all/forwarding") != "0":
        return ["all"]
    return [d for d in subject.devices if subject.sysctl(f"ipv4/conf/{d}/forwarding") not in ("", "0")]


def _undropped(subject: Subject, chains: Iterable[NftChain], version: int) -> list[tuple[str, str]]:
    """Pairs of bridges between which no chain is sure to drop."""
    chains, routes = tuple(chains), subject.facts.routes
    out = []
    for source, target in subject.pairs:
        # All that can leave by a bridge is what a route leads there.
        targets: tuple[IpNetwork, ...] = ()
        if not isinstance(routes, Gap):
            targets = tuple(r.network for r in routes if target in r.devices and r.network.version == version)
        if forward_dropped(chains, Packet(source, target, version, targets)) is None:
            out.append((source, target))
    return out


def forwarding(subject: Subject) -> list[Finding]:
    """Whether the host routes at all, for each IP version, and if so whether nftables keeps the bridges apart."""
    check, sysctls, nft = "forwarding", subject.facts.sysctls, subject.facts.nft
    if isinstance(sysctls, Gap):
        return _gap(check, sysctls)
    out = []
    for version in (4, 6):
        name = f"IPv{version}"
        if version == 6 and not subject.sysctl("ipv6/conf/all/forwarding"):
            out.append(Finding(check, Status.ABSENT, "IPv6: the kernel has none"))
            continue
        on = _forwarding(subject, version)
        if not on or not subject.pairs:
            out.append(Finding(check, Status.OK, f"{name}: {'off' if not on else 'on, between no two networks'}"))
            continue
        switches = [
            f"sysctl -w net/ipv{version}/conf/{device}/forwarding=0" for device in (on if version == 4 else ["all"])
        ]
        mend = "; ".join(switches)
        if isinstance(nft, Gap):
            seen = f"{name}: on at {_listed(on)}, and whether nftables drops is not known: {nft.why}"
            out.append(Finding(check, Status.UNKNOWN, seen, f"{mend}; or {nft.mend or 'install nftables'}"))
        elif _undropped(subject, nft, version):
            seen = f"{name}: on at {_listed(on)}: the host routes between the networks"
            out.append(Finding(check, Status.BAD, seen, f"{mend}; or drop between the bridges: see forward policy"))
        else:
            out.append(Finding(check, Status.OK, f"{name}: on, but nftables drops between the bridges"))
    return out


def forward_policy(subject: Subject) -> list[Finding]:
    """What nftables does to packets between the bridges, should the host ever forward."""
    check, nft, sysctls = "forward policy", subject.facts.nft, subject.facts.sysctls
    on = [v for v in (4, 6) if isinstance(sysctls, Gap) or _forwarding(subject, v)]
    if not subject.pairs:
        return [Finding(check, Status.ABSENT, "no two networks to keep apart")]
    if isinstance(nft, Gap):
        return _gap(check, nft, needed=bool(on))
    open_pairs = {v: _undropped(subject, nft, v) for v in (4, 6)}
    if not any(open_pairs.values()):
        return [Finding(check, Status.OK, "drops between the bridges, in both directions")]
    if not any(open_pairs[v] for v in on):
        return [Finding(check, Status.OK, "nothing is forwarded, so nothing need be dropped (forwarding is off)")]
    pairs = sorted({pair for v in on for pair in open_pairs[v]})
    seen = "no chain is sure to drop " + _listed(f"{a} to {b}" for a, b in pairs)
    names = ", ".join(sorted({name for pair in pairs for name in pair}))
    rule = f"iifname {{ {names} }} oifname {{ {names} }} drop"
    hook = "{ type filter hook forward priority -10; }"
    mend = (
        f"nft 'add table inet bulkhead; add chain inet bulkhead forward {hook}; add rule inet bulkhead forward {rule}'"
    )
    return [Finding(check, Status.BAD, seen, mend)]


def _leading(routes: Iterable[Route]) -> Iterator[Route]:
    """Routes that send packets somewhere; default ones lead everywhere by nature."""
    for route in routes:
        if route.kind in ("unicast", "anycast", "nat", "multipath", "") and route.network.prefixlen > 1:
            yield route


def _prefixes(network: Network) -> list[IpNetwork]:
    return [ip_network(str(prefix)) for prefix in network.prefixes]


def routes(subject: Subject) -> list[Finding]:
    """Routes and rules that take one network's addresses to another network, or past the bridge to a port."""
    check, every, rules = "routes", subject.facts.routes, subject.facts.rules
    if subject.state is None:
        return _no_file(check)
    bad = []
    for network in subject.networks:
        for route in () if isinstance(every, Gap) else _leading(every):
            inside = [p for p in _prefixes(network) if p.overlaps(route.network)]
            for device in route.devices if inside else ():
                owner = subject.network_of(device)
                if owner is None or device == network.bridge:
                    continue
                seen = f"{network.name}'s {inside[0]} is routed to {device}, {owner}'s (table {route.table})"
                bad.append((seen, f"ip route del {route.network} dev {device} table {route.table}"))
    for rule in () if isinstance(rules, Gap) else rules:
        ends = [_owners(subject, rule.iif, rule.source), _owners(subject, rule.oif, rule.target)]
        if any(a != b for a in ends[0] for b in ends[1]):
            seen = f"rule {rule.priority} leads from {_listed(sorted(ends[0]))} to {_listed(sorted(ends[1]))}"
            bad.append((seen, f"ip rule del priority {rule.priority}"))
    for gap in (every, rules):
        if isinstance(gap, Gap) and not bad:
            return _gap(check, gap)
    return _told(check, bad, "none between the networks")


def _owners(subject: Subject, device: str, network: IpNetwork | None) -> set[str]:
    """Which networks an end of a rule names."""
    owner = subject.network_of(device) if device else None
    named = {n.name for n in subject.networks if network is not None and any(p.overlaps(network) for p in _prefixes(n))}
    return named | ({owner} if owner is not None else set())


def overlaps(subject: Subject) -> list[Finding]:
    """Addresses and routes of the host's other interfaces inside a network's prefixes."""
    check, links, every = "overlaps", subject.facts.links, subject.facts.routes
    if subject.state is None:
        return _no_file(check)
    bad, told = [], set()
    for network in subject.networks:
        for prefix in _prefixes(network):
            for link in subject.links.values():
                if subject.network_of(link.name) is not None:
                    continue  # "addresses" judges these
                for address in link.addresses:
                    if prefix.overlaps(address.network):
                        told.add((link.name, address.network))
                        seen = (
                            f"{link.name} has {address.text}/{address.network.prefixlen}, {network.name} has {prefix}"
                        )
                        bad.append(
                            (
                                seen,
                                f"give one of them other addresses, or: ip address del {address.text} dev {link.name}",
                            )
                        )
            for route in () if isinstance(every, Gap) else _leading(every):
                for device in route.devices if prefix.overlaps(route.network) else ():
                    if subject.network_of(device) is None and (device, route.network) not in told:
                        told.add((device, route.network))
                        seen = f"{route.network} is routed to {device}, {network.name} has {prefix}"
                        bad.append((seen, f"ip route del {route.network} dev {device} table {route.table}"))
    for gap in (links, every):
        if isinstance(gap, Gap) and not bad:
            return _gap(check, gap)
    return _told(check, bad, "no other interface has addresses or routes of the networks")


def second_road(subject: Subject) -> list[Finding]:
    """With the userspace datapath the kernel sees what arrives at a port too; and nobody else may have a port."""
    check, nft = "second road", subject.facts.nft
    if not subject.bridges:
        return _each_bridge(check, subject)
    if isinstance(subject.facts.links, Gap):
        return _gap(check, subject.facts.links)
    bad: list[tuple[str, str]] = []
    seen_by_kernel: list[str] = []
    for bridge in subject.bridges:
        for interface in bridge.interfaces:
            link = subject.links.get(interface.name)
            if link is None or interface.name == bridge.name:
                continue
            bad += _others(subject, link)
            if bridge.datapath_type == "netdev" and interface.type in ("", "system", "afxdp", "afxdp-nonpmd"):
                seen_by_kernel.append(interface.name)
    if isinstance(nft, Gap):
        out = [Finding(check, Status.BAD, *pair) for pair in bad]
        if seen_by_kernel:
            why = f"the kernel sees the packets of {_listed(seen_by_kernel)} too; whether it drops them is not known"
            out.append(Finding(check, Status.UNKNOWN, f"{why}: {nft.why}", nft.mend or "install nftables"))
        return out or [Finding(check, Status.OK, "the datapath takes packets away from the kernel")]
    undropped = [name for name in seen_by_kernel if not ingress_dropped(nft, name)]
    if undropped:
        why = f"the kernel takes what arrives at {_listed(undropped)} for the host, past every flow"
        chains = "; ".join(
            f'add chain netdev bulkhead {name} {{ type filter hook ingress device "{name}" priority -500; policy drop; }}'
            for name in undropped
        )
        bad.append((why, f"nft 'add table netdev bulkhead; {chains}'"))
    good = f"the kernel drops what arrives at {len(seen_by_kernel)} ports, the flows get it"
    return _told(check, bad, good if seen_by_kernel else "the datapath takes packets away from the kernel")


def _others(subject: Subject, link: Link) -> Iterator[tuple[str, str]]:
    """Who else has a port: a Linux bridge it is in, interfaces that stand on it."""
    if link.master not in ("", "ovs-system"):
        yield f"{link.name} is in {link.master} too, past every flow", f"ip link set {link.name} nomaster"
    for other in subject.links.values():
        if other.lower == link.name and other.kind != "veth":
            yield f"{other.name} ({other.kind}) stands on {link.name}, past every flow", f"ip link del {other.name}"


def ipv6(subject: Subject) -> list[Finding]:
    """The networks have no IPv6: the kernel should have none on their bridges and ports either."""
    check, sysctls = "IPv6", subject.facts.sysctls
    if isinstance(sysctls, Gap):
        return _gap(check, sysctls)
    if not subject.sysctl("ipv6/conf/all/disable_ipv6"):
        return [Finding(check, Status.ABSENT, "the kernel has none")]
    devices = [d for d in subject.devices if subject.sysctl(f"ipv6/conf/{d}/disable_ipv6")]
    if not devices:
        return _each_bridge(check, subject) or [Finding(check, Status.ABSENT, "no bridge has an interface here")]
    on = [d for d in devices if subject.sysctl(f"ipv6/conf/{d}/disable_ipv6") != "1"]
    bad = []
    if on:
        local = [
            d
            for d in on
            if any(a.network.version == 6 for a in (subject.links[d].addresses if d in subject.links else ()))
        ]
        with_address = f", and {_listed(local)} has an address" if local else ""
        mend = "sysctl -w " + " ".join(f"net/ipv6/conf/{d}/disable_ipv6=1" for d in on)
        bad.append((f"on at {_listed(on)}{with_address}: the host talks to whoever is there", mend))
    return _told(check, bad, f"off on {len(devices)} bridges and ports")


def proxies(subject: Subject) -> list[Finding]:
    """A proxy answers for others' addresses, and so invites their packets."""
    check, sysctls = "proxy ARP", subject.facts.sysctls
    if isinstance(sysctls, Gap):
        return _gap(check, sysctls)
    bad = []
    for device in ("all", *subject.devices):
        for name in (
            f"ipv4/conf/{device}/proxy_arp",
            f"ipv4/conf/{device}/proxy_arp_pvlan",
            f"ipv6/conf/{device}/proxy_ndp",
        ):
            if subject.sysctl(name) not in ("", "0"):
                bad.append((f"{name.rpartition('/')[2]} is on at {device}", f"sysctl -w net/{name}=0"))
    return _told(check, bad, "off")


def reverse_path(subject: Subject) -> list[Finding]:
    """Where the host forwards, whoever has a port could send in another network's name."""
    check, sysctls = "rp_filter", subject.facts.sysctls
    if isinstance(sysctls, Gap):
        return _gap(check, sysctls)
    if not _forwarding(subject, 4):
        return [Finding(check, Status.OK, "does not matter: nothing is forwarded")]
    everywhere = subject.sysctl("ipv4/conf/all/rp_filter") or "0"
    bad = []
    for bridge in dict.fromkeys(name for pair in subject.pairs for name in pair):
        own = subject.sysctl(f"ipv4/conf/{bridge}/rp_filter")
        # The greater of the two holds: 1 is strict, 2 loose, and loose takes any source that has a route at all.
        if own and max(own, everywhere) != "1":
            seen = (
                f"{bridge} takes packets from any source address (all {everywhere}, own {own}), and the host forwards"
            )
            bad.append((seen, f"sysctl -w net/ipv4/conf/all/rp_filter=1 net/ipv4/conf/{bridge}/rp_filter=1"))
    return _told(check, bad, "strict on the bridges")


# ----------------------------------------------------------------------------------------------------------- WireGuard


@dataclass(frozen=True, slots=True)
class _Tunnel:
    """A WireGuard interface's peer, where it was found, and which network's leg it is; `egress` if that one's egress."""

    where: str
    allowed: AllowedIps
    network: str | None
    egress: bool

    def __str__(self) -> str:
        return f"{self.allowed.interface} in {self.where}" if self.where else self.allowed.interface


def wireguard(subject: Subject) -> list[Finding]:
    """What peers may send into a network, and what of other networks' addresses goes to them."""
    check, places = "WireGuard", subject.facts.places
    out: list[Finding] = []
    for where, known in _tunnels_by_place(subject):
        if isinstance(known, Gap) and not known.absent:
            named = replace(known, why=f"{where}: {known.why}" if where else known.why)
            out += _gap(check, named)
    if isinstance(places, Gap) and (subject.state is not None or not places.absent):
        if any(_has_leg(network) for network in subject.networks):
            out += _gap(check, replace(places, why=f"the legs' namespaces: {places.why}"))
    tunnels = _tunnels(subject)
    bad = [*_wide(subject, tunnels), *_shared(tunnels)]
    out = [Finding(check, Status.BAD, *pair) for pair in bad] + out
    if out:
        return out
    if not tunnels:
        gap = subject.facts.wireguard
        seen = gap.why if isinstance(gap, Gap) else "no WireGuard interface has a peer, here or in other namespaces"
        return [Finding(check, Status.ABSENT, seen, gap.mend if isinstance(gap, Gap) else "")]
    return [Finding(check, Status.OK, f"{len(tunnels)} peers, none with another network's addresses")]


def _has_leg(network: Network) -> bool:
    return network.egress is not None or network.mesh is not None


def _tunnels_by_place(subject: Subject) -> Iterator[tuple[str, tuple[AllowedIps, ...] | Gap]]:
    yield "", subject.facts.wireguard
    for place in () if isinstance(subject.facts.places, Gap) else subject.facts.places:
        yield place.name, place.links if isinstance(place.links, Gap) else place.wireguard


def _tunnels(subject: Subject) -> list[_Tunnel]:
    legs = dict(_legs(subject))
    # wireguard-go's interfaces are listed wherever one asks: each counts where an interface of its name is.
    places = {"": subject.facts.links}
    if not isinstance(subject.facts.places, Gap):
        places |= {place.name: place.links for place in subject.facts.places}
    out = []
    for where, known in _tunnels_by_place(subject):
        links = places[where]
        for allowed in () if isinstance(known, Gap) else known:
            here = isinstance(links, Gap) or any(link.name == allowed.interface for link in links)
            elsewhere = any(
                link.name == allowed.interface for held in places.values() if not isinstance(held, Gap) for link in held
            )
            if here or not elsewhere:
                network, egress = legs.get(where) or legs.get(f"/{allowed.interface}") or (None, False)
                out.append(_Tunnel(where, allowed, network, egress))
    return out


def _legs(subject: Subject) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Whose leg a namespace holds (by the far end of its veth), or an interface is (`/name`: by its name)."""
    places: tuple[Place, ...] = () if isinstance(subject.facts.places, Gap) else subject.facts.places
    for network in subject.networks:
        ends = [(network.mesh.leg_port, False)] if network.mesh else []
        ends += [(network.egress.port, True)] if network.egress else []
        for port, egress in ends:
            yield f"/{port}", (network.name, egress)
            link = subject.links.get(port)
            for place in places if link is not None and link.lower_index else ():
                links = () if isinstance(place.links, Gap) else place.links
                if any(link and (end.index, end.lower_index) == (link.lower_index, link.index) for end in links):
                    yield place.name, (network.name, egress)


def _wide(subject: Subject, tunnels: Iterable[_Tunnel]) -> Iterator[tuple[str, str]]:
    """Peers that may send with, and are sent, addresses that are not their network's."""
    for tunnel in tunnels:
        for allowed in tunnel.allowed.networks:
            if allowed.prefixlen == 0 and (tunnel.egress or tunnel.network is None):
                continue  # the way out: all of the world's addresses are its peer's
            touched = [n.name for n in subject.networks if any(p.overlaps(allowed) for p in _prefixes(n))]
            foreign = [name for name in touched if name != tunnel.network]
            if tunnel.network is None:
                foreign = touched if len(touched) > 1 else []
            elif allowed.prefixlen == 0:
                foreign = foreign or ["everything"]
            if foreign:
                whose = f", {tunnel.network}'s leg," if tunnel.network else ""
                seen = f"{tunnel}{whose} allows its peer {tunnel.allowed.peer} {allowed}: {_listed(foreign)}"
                yield (
                    seen,
                    f"give that peer its own network's addresses only: wg set {tunnel.allowed.interface} peer … allowed-ips …",
                )


def _shared(tunnels: Sequence[_Tunnel]) -> Iterator[tuple[str, str]]:
    """Addresses that legs of two networks both take to be their peers'."""
    for number, one in enumerate(tunnels):
        for other in tunnels[number + 1 :]:
            if one.network is None or other.network is None or one.network == other.network:
                continue
            for a in one.allowed.networks:
                for b in other.allowed.networks:
                    if a.prefixlen and b.prefixlen and a.overlaps(b):
                        seen = f"{a} of {one} ({one.network}) overlaps {b} of {other} ({other.network})"
                        yield seen, "give the networks' peers different addresses"


CHECKS: tuple[Check, ...] = (
    bridges,
    fail_mode,
    in_band,
    controllers,
    managers,
    copies,
    ports,
    wires,
    hidden_flows,
    addresses,
    forwarding,
    forward_policy,
    routes,
    overlaps,
    second_road,
    ipv6,
    proxies,
    reverse_path,
    wireguard,
)
