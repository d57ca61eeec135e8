"""Checks of the kernel: addresses, forwarding, routes, and who else takes the bridges' packets. Imports findings, nft."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain as joined

from controller.verify.host.facts import Address, Gap, IpNetwork, Link, NftChain, Redirect, Route
from controller.verify.host.findings import (
    Finding,
    Status,
    Subject,
    bad,
    command,
    each_bridge,
    listed,
    no_file,
    owned,
    prefixes,
    sysctl,
    told,
    unknown,
)
from controller.verify.host.nft import Packet, forward_dropped, ingress_dropped, redirected


def addresses(subject: Subject) -> list[Finding]:
    """An address on a bridge or a port makes the host itself a member, which only a declared host address may."""
    check = "addresses"
    if subject.state is None:
        return no_file(check)
    hosts = {n.bridge: (str(n.host), n) for n in subject.networks if n.host is not None}
    found = []
    for device in subject.devices:
        for address in subject.links[device].addresses if device in subject.links else ():
            text = f"{address.text}/{address.network.prefixlen}"
            remove = command("ip", "address", "del", text, "dev", device)
            host, network = hosts.get(device, ("", None))
            if network is None or address.text != host:
                if not _link_local(address):
                    found.append(bad(check, f"{device} has the address {text}, which is not declared", remove))
                continue
            others = [n for n in subject.networks if n is not network]
            foreign = [n.name for n in others if any(p.overlaps(address.network) for p in prefixes(n))]
            if foreign:
                seen = f"{device} has {text}: by its length it takes in {listed(foreign)}"
                right = f"{host}/{network.subnet.length}"
                found.append(bad(check, seen, remove, command("ip", "address", "add", right, "dev", device)))
    names = [f"{host} on {bridge}" for bridge, (host, _) in sorted(hosts.items())]
    good = f"none on bridges and ports{' but the declared ' if names else ''}{listed(names)}"
    return told(check, found, good, subject.facts.links, subject.facts.ovs)


def _link_local(address: Address) -> bool:
    # Wherever IPv6 is on there is one; whether it may be on is another check's.
    return address.network.version == 6 and address.network.is_link_local


# ---------------------------------------------------------------------------------------------------------- forwarding


def forwarding(subject: Subject) -> list[Finding]:
    """Whether the host routes what comes up at a bridge, for each IP version, and if so whether a firewall drops it."""
    check, sysctls, nft = "forwarding", subject.facts.sysctls, subject.facts.nft
    if isinstance(sysctls, Gap):
        return unknown(check, sysctls)
    out = []
    for version in (4, 6):
        name = f"IPv{version}"
        if not subject.sysctl(f"ipv{version}/conf/all/forwarding"):
            out.append(Finding(check, Status.ABSENT, f"{name}: the kernel has none"))
            continue
        on = _forwarding(subject, version)
        if not on:
            out.append(Finding(check, Status.OK, f"{name}: off at the bridges"))
            continue
        off = sysctl(*(f"net/{_switch(version, device)}" for device in on))
        if isinstance(nft, Gap):
            seen = f"{name}: on at {listed(on)}, and whether a firewall drops is not known: {nft.why}"
            out.append(Finding(check, Status.UNKNOWN, seen, (off,), nft.mend))
            continue
        open_ones = [pair for pair in subject.pairs if pair[0] in on and not _dropped(subject, nft, pair, version)]
        if open_ones:
            way = listed(f"{a} to {b}" for a, b in open_ones)
            seen = f"{name}: on at {listed(on)}, and no chain is sure to drop {way}"
            out.append(bad(check, seen, _drop_between(subject), advice=f"or turn it off: {off}"))
        else:
            out.append(Finding(check, Status.OK, f"{name}: on, and the firewall drops between the networks"))
    return out


def _forwarding(subject: Subject, version: int) -> list[str]:
    """Bridges of which the kernel would forward what comes up. It asks the interface where a packet arrives (IPv4), or
    one switch for all and another of each interface (IPv6)."""
    names = list(dict.fromkeys(source for source, _ in subject.pairs))
    if version == 4:
        asked = {name: (name, _vrf(subject, name)) for name in names}
        return [n for n in names if any(subject.sysctl(f"ipv4/conf/{d}/forwarding") not in ("", "0") for d in asked[n])]
    alive = [name for name in names if subject.sysctl(f"ipv6/conf/{name}/disable_ipv6") == "0"]
    if subject.sysctl("ipv6/conf/all/forwarding") != "0":
        return alive
    return [name for name in alive if subject.sysctl(f"ipv6/conf/{name}/force_forwarding") not in ("", "0")]


def _vrf(subject: Subject, device: str) -> str:
    """The VRF that a device is in: packets that come up at the device are said to come from that."""
    master = subject.links.get(subject.links[device].master) if device in subject.links else None
    return master.name if master is not None and master.kind == "vrf" else ""


def _switch(version: int, device: str) -> str:
    return f"ipv4/conf/{device}/forwarding=0" if version == 4 else f"ipv6/conf/{device}/disable_ipv6=1"


def _dropped(subject: Subject, chains: tuple[NftChain, ...], pair: tuple[str, str], version: int) -> bool:
    source, target = pair
    routes = subject.facts.routes
    targets: tuple[IpNetwork, ...] = ()
    # All that can leave by a bridge is what a route leads there, but for what is not routed by its target.
    if not isinstance(routes, Gap) and not _unrouted(subject, version):
        targets = tuple(r.network for r in routes if target in r.devices and r.network.version == version)
    source = "" if _vrf(subject, source) else source
    return forward_dropped(chains, Packet(source, target, version, targets)) is not None


def _unrouted(subject: Subject, version: int) -> bool:
    names = ("mc_forwarding", "accept_source_route") if version == 4 else ("mc_forwarding",)
    return any(subject.sysctl(f"ipv{version}/conf/all/{name}") not in ("", "0") for name in names)


def _drop_between(subject: Subject) -> str:
    names = ", ".join(f'"{name}"' for name in subject.names)
    hook = "{ type filter hook forward priority -10; }"
    rule = f"iifname {{ {names} }} oifname {{ {names} }} drop"
    return command(
        "nft",
        f"add table inet bulkhead-mend; add chain inet bulkhead-mend forward {hook}; insert rule inet bulkhead-mend forward {rule}",
    )


# -------------------------------------------------------------------------------------------------------------- routes

_NOWHERE = ("blackhole", "unreachable", "prohibit", "throw")
_LEADING = ("unicast", "anycast", "nat", "multipath", "")


def routes(subject: Subject) -> list[Finding]:
    """Routes and rules that take one network's addresses to another network, or past the bridge to a port."""
    check, every, rules = "routes", subject.facts.routes, subject.facts.rules
    if subject.state is None:
        return no_file(check)
    known = () if isinstance(every, Gap) else every
    found: dict[object, Finding] = {}
    for network in subject.networks:
        for prefix, route, device in _crossings(prefixes(network), known):
            owner = subject.owners.get(device)
            if owner is None or device == network.bridge or _connected(subject, route, device):
                continue
            if _covered(prefix, route, known, network.bridge):
                continue
            seen = f"{network.name}'s {prefix} is routed to {device}, {owner}'s (table {route.table})"
            found.setdefault((route, device), bad(check, seen, _unroute(route)))
    for rule in () if isinstance(rules, Gap) else rules:
        ends = [_ends(subject, rule.iif, rule.source), _ends(subject, rule.oif, rule.target)]
        if any(a != b for a in ends[0] for b in ends[1]):
            seen = f"rule {rule.priority} leads from {listed(sorted(ends[0]))} to {listed(sorted(ends[1]))}"
            found.setdefault(seen, bad(check, seen, command("ip", "rule", "del", "priority", str(rule.priority))))
    return told(check, found.values(), "none between the networks", every, rules)


def _crossings(inside: Iterable[IpNetwork], routes: Iterable[Route]) -> Iterator[tuple[IpNetwork, Route, str]]:
    for prefix in inside:
        for route in routes:
            if route.kind in _LEADING and prefix.overlaps(route.network):
                for device in route.devices:
                    yield prefix, route, device


def _connected(subject: Subject, route: Route, device: str) -> bool:
    """Whether a route is the kernel's own for an address, which is judged by itself."""
    held = subject.links[device].addresses if device in subject.links else ()
    return route.protocol == "kernel" and any(address.network == route.network for address in held)


def _covered(prefix: IpNetwork, route: Route, routes: Iterable[Route], bridge: str) -> bool:
    """Whether a closer route of the same table takes all of a prefix where it belongs, or nowhere."""
    return any(
        other.table == route.table
        and other.network.version == prefix.version
        and prefix.subnet_of(other.network)  # type: ignore[arg-type]
        and other.network.prefixlen > route.network.prefixlen
        and (other.kind in _NOWHERE[:3] or (other.kind in _LEADING and set(other.devices) == {bridge}))
        for other in routes
    )


def _unroute(route: Route) -> str:
    words = ["ip", f"-{route.network.version}", "route", "del"]
    words += ["local"] if route.kind == "local" else []
    words += [str(route.network), *(["dev", *route.devices] if len(route.devices) == 1 else [])]
    return command(*words, "table", route.table)


def _ends(subject: Subject, device: str, network: IpNetwork | None) -> set[str]:
    """Which networks an end of a rule names."""
    named = {n.name for n in subject.networks if network is not None and any(p.overlaps(network) for p in prefixes(n))}
    return named | ({subject.owners[device]} if device in subject.owners else set())


def overlaps(subject: Subject) -> list[Finding]:
    """Addresses and routes of the host's other interfaces inside a network's prefixes."""
    check, every = "overlaps", subject.facts.routes
    if subject.state is None:
        return no_file(check)
    found: dict[object, Finding] = {}
    for network in subject.networks:
        for prefix in prefixes(network):
            for link, address in _foreign_addresses(subject):
                if prefix.overlaps(address.network):
                    text = f"{address.text}/{address.network.prefixlen}"
                    seen = f"{link.name} has {text}, {network.name} has {prefix}"
                    mend = command("ip", "address", "del", text, "dev", link.name)
                    found.setdefault((link.name, address), bad(check, seen, mend, advice=_ELSE))
        for prefix, route, device in _foreign_routes(subject, prefixes(network)):
            seen = f"{route.network} is routed to {device} (table {route.table}), {network.name} has {prefix}"
            found.setdefault((device, route), bad(check, seen, _unroute(route), advice=_ELSE))
    return told(
        check, found.values(), "no other interface has addresses or routes of the networks", subject.facts.links, every
    )


_ELSE = "or give one of them other addresses"


def _foreign_addresses(subject: Subject) -> Iterator[tuple[Link, Address]]:
    for link in subject.links.values():
        if link.name not in subject.owners:  # "addresses" judges those
            yield from ((link, address) for address in link.addresses)


def _foreign_routes(subject: Subject, inside: Iterable[IpNetwork]) -> Iterator[tuple[IpNetwork, Route, str]]:
    known = () if isinstance(subject.facts.routes, Gap) else subject.facts.routes
    # A default route leads everywhere by nature. What the kernel itself calls local are the addresses judged above.
    every = [r for r in known if r.network.prefixlen > 1 and (r.kind != "local" or r.protocol != "kernel")]
    named = [replace(r, kind="") if r.kind == "local" else r for r in every]
    for prefix, route, device in _crossings(inside, named):
        if device not in subject.owners:
            yield prefix, replace(route, kind="local") if route.kind == "" else route, device


# ---------------------------------------------------------------------------------------------------- who else gets it

_STANDS = ("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap")


def second_road(subject: Subject) -> list[Finding]:
    """With the userspace datapath the kernel sees what arrives at a port too; and nobody else may have a bridge's
    interface."""
    check, nft = "second road", subject.facts.nft
    if not subject.bridges:
        return each_bridge(check, subject)
    if isinstance(subject.facts.links, Gap):
        return unknown(check, subject.facts.links)
    found = [finding for device in subject.devices for finding in _others(subject, check, device)]
    doubled = [
        interface.name
        for bridge in subject.bridges
        for interface in bridge.interfaces
        if bridge.datapath_type == "netdev"
        and interface.type in ("", "system", "afxdp", "afxdp-nonpmd")
        and interface.name in subject.links
        and interface.name != bridge.name
    ]
    if isinstance(nft, Gap):
        if doubled:
            seen = f"the kernel sees what arrives at {listed(doubled)} too; whether it drops it is not known: {nft.why}"
            found.append(Finding(check, Status.UNKNOWN, seen, (), nft.mend))
    elif undropped := [name for name in doubled if not ingress_dropped(nft, name)]:
        seen = f"the kernel takes what arrives at {owned(subject, undropped)} for the host's, past every flow"
        found.append(bad(check, seen, _drop_at(undropped)))
    good = f"the kernel drops what arrives at {len(doubled)} ports, after the flows had it"
    return told(check, found, good if doubled else "none but Open vSwitch has the bridges' interfaces")


def _drop_at(devices: Iterable[str]) -> str:
    chains = (
        f'add chain netdev bulkhead-mend drop-{name} {{ type filter hook ingress device "{name}" priority -500; policy drop; }}'
        for name in devices
    )
    return command("nft", "; ".join(("add table netdev bulkhead-mend", *chains)))


def _others(subject: Subject, check: str, device: str) -> Iterator[Finding]:
    """Who else has an interface: a Linux bridge it is in, interfaces that stand on it, here or in other namespaces."""
    link = subject.links.get(device)
    if link is None:
        return
    if link.master not in ("", "ovs-system") and not _vrf(subject, device):
        yield bad(
            check,
            f"{device} is in {link.master} too, past every flow",
            command("ip", "link", "set", device, "nomaster"),
        )
    for other in subject.links.values():
        if other.lower == device and other.kind != "veth":
            seen = f"{other.name} ({other.kind}) stands on {device}, past every flow"
            yield bad(check, seen, command("ip", "link", "del", other.name))
    for place in () if isinstance(subject.facts.places, Gap) else subject.facts.places:
        for other in () if isinstance(place.links, Gap) else place.links:
            if other.kind in _STANDS and link.index and other.lower_index == link.index:
                seen = f"{other.name} ({other.kind}) in {place.name} stands on {device}, past every flow"
                yield bad(check, seen, advice=f"delete it there: ip link del {other.name}")


def redirects(subject: Subject) -> list[Finding]:
    """Filters of traffic control and nftables that hand packets over from one interface to another, past every flow."""
    check, tc, nft, links = "redirects", subject.facts.redirects, subject.facts.nft, subject.facts.links
    if not subject.devices:
        return each_bridge(check, subject)
    ours = set(subject.devices)
    found = []
    for redirect in () if isinstance(tc, Gap) else tc:
        if ours & {redirect.device, redirect.target}:
            found.append(_redirect(check, redirect))
    for chain, rule in () if isinstance(nft, Gap) else redirected(nft, ours):
        seen = f"a rule of {chain.title} ({listed(chain.devices) or 'no device'}) hands packets over past every flow"
        words = ("nft", "delete", "rule", chain.family, chain.table, chain.name, "handle", str(rule.handle))
        found.append(bad(check, seen, command(*words)))
    for name in ours & subject.links.keys():
        if subject.links[name].program and not _xdp_is_ours(subject, name):
            seen = f"{name} has an XDP program, which may send its packets anywhere"
            found.append(Finding(check, Status.UNKNOWN, seen, (), f"if it is not yours: ip link set {name} xdp off"))
    gaps = [gap for gap in (tc, links, subject.facts.ovs) if isinstance(gap, Gap)]
    # Where there is no nft, whether its rules are there cannot be told either; but then nobody has made any.
    gaps += [nft] if isinstance(nft, Gap) and not nft.absent else []
    return told(check, found, "none from or to the bridges' interfaces", *gaps)


def _redirect(check: str, redirect: Redirect) -> Finding:
    at = f"{redirect.device} ({redirect.where})"
    mend = command(
        "tc", "filter", "del", "dev", redirect.device, *([redirect.where] if redirect.where != "root" else [])
    )
    if redirect.target:
        return bad(check, f"a tc filter hands packets of {at} over to {redirect.target}, past every flow", mend)
    seen = f"a tc program at {at} may send its packets anywhere"
    return Finding(check, Status.UNKNOWN, seen, (), f"if it is not yours: {mend}")


def _xdp_is_ours(subject: Subject, name: str) -> bool:
    return any(i.name == name and i.type.startswith("afxdp") for b in subject.bridges for i in b.interfaces)


def ipv6(subject: Subject) -> list[Finding]:
    """The networks have no IPv6: the kernel should have none on their bridges and ports either."""
    check, sysctls = "IPv6", subject.facts.sysctls
    if isinstance(sysctls, Gap):
        return unknown(check, sysctls)
    if not subject.sysctl("ipv6/conf/all/disable_ipv6"):
        return [Finding(check, Status.ABSENT, "the kernel has none")]
    devices = [d for d in subject.devices if subject.sysctl(f"ipv6/conf/{d}/disable_ipv6")]
    if not devices:
        return each_bridge(check, subject) or [Finding(check, Status.ABSENT, "no bridge has an interface here")]
    on = [d for d in devices if subject.sysctl(f"ipv6/conf/{d}/disable_ipv6") == "0"]
    with_one = [d for d in on if d in subject.links and any(a.network.version == 6 for a in subject.links[d].addresses)]
    has = f", {listed(with_one)} with an address" if with_one else ""
    seen = f"on at {listed(on)}{has}: the host talks to whoever is there"
    found = [bad(check, seen, sysctl(*(f"net/ipv6/conf/{d}/disable_ipv6=1" for d in on)))] if on else []
    return told(check, found, f"off on {len(devices)} bridges and ports", subject.facts.ovs)


def proxies(subject: Subject) -> list[Finding]:
    """A proxy answers for others' addresses, and so invites their packets."""
    check, sysctls = "proxy ARP", subject.facts.sysctls
    if isinstance(sysctls, Gap):
        return unknown(check, sysctls)
    names = ("ipv4/conf/{}/proxy_arp", "ipv4/conf/{}/proxy_arp_pvlan", "ipv6/conf/{}/proxy_ndp")
    found = []
    for name in joined.from_iterable((name.format(device) for name in names) for device in ("all", *subject.devices)):
        if subject.sysctl(name) not in ("", "0"):
            found.append(bad(check, f"{name} is on", sysctl(f"net/{name}=0")))
    return told(check, found, "off", *([subject.facts.ovs] if subject.state is not None else []))
