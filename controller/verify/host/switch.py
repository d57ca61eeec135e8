"""Checks of Open vSwitch's own settings: who may rule it, and what passes beside the flows. Imports findings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_address

from controller.verify.host.facts import Gap, HeldFlow, Link, OvsBridge, OvsInterface
from controller.verify.host.findings import (
    Finding,
    Subject,
    bad,
    command,
    each_bridge,
    listed,
    no_file,
    over_bridges,
    told,
    unknown,
)
from controller.verify.links import declared_links

IN_BAND_PRIORITIES = range(180_000, 180_100)
FAIL_OPEN_PRIORITY = 0xF0F0F0
_INTERNAL_TABLE = 254
_VISIBLE = 0xFFFF
_ANYWHERE = re.compile(r"\b(?:NORMAL|FLOOD|ALL)\b")
_PLAIN_TYPES = ("", "system", "internal", "tap", "dummy", "patch", "afxdp", "afxdp-nonpmd", "dpdk")
"""OVS interfaces that end on this host. Tunnels of OVS's own are not among them: they go past the legs."""
_PLAIN_KINDS = ("", "veth", "tun", "vlan", "dummy", "openvswitch")
"""Kinds of kernel interface that may be a port: a veth, hardware, a virtual machine's tap. The others lead elsewhere."""


def bridges(subject: Subject) -> list[Finding]:
    """Whether the bridges can be judged at all. The checks below leave out what is missing here."""
    check = "bridges"
    missing = each_bridge(check, subject)
    if missing:
        return missing
    wrong = []
    for bridge in subject.bridges:
        declared = subject.state.bridge(bridge.name) if subject.state is not None else None
        if declared is not None and declared.datapath_id is not None and bridge.datapath_id:
            if int(bridge.datapath_id, 16) != declared.datapath_id:
                told_id = f"{declared.datapath_id:016x}"
                seen = (
                    f"{bridge.name} has the datapath-id {bridge.datapath_id}, {told_id} is declared: nobody controls it"
                )
                mend = subject.vsctl("set", "bridge", bridge.name, f"other-config:datapath-id={told_id}")
                wrong.append(bad(check, seen, mend))
    return told(check, wrong, listed(subject.names))


def fail_mode(subject: Subject) -> list[Finding]:
    """Without a controller a standalone bridge becomes a plain switch."""
    check = "fail mode"

    def judged(bridge: OvsBridge) -> Iterator[Finding]:
        if bridge.fail_mode != "secure":
            seen = f"{bridge.name} is {bridge.fail_mode or 'standalone (the default)'}: it becomes a plain switch"
            mend = subject.vsctl("set-fail-mode", bridge.name, "secure")
            yield bad(check, f"{seen} when its controller is away", mend)

    return over_bridges(check, subject, judged, "secure on every bridge")


def in_band(subject: Subject) -> list[Finding]:
    """In-band control makes hidden flows with NORMAL above all of ours, for each controller and manager."""
    check = "in-band"

    def judged(bridge: OvsBridge) -> Iterator[Finding]:
        if not bridge.disable_in_band:
            seen = f"{bridge.name} allows in-band control: hidden flows with NORMAL above all others"
            mend = subject.vsctl("set", "bridge", bridge.name, "other-config:disable-in-band=true")
            yield bad(check, seen, mend)

    return over_bridges(check, subject, judged, "off on every bridge")


def normal_target(target: str) -> str:
    """A controller's target in one spelling: the port written out, /run for /var/run."""
    scheme, _, rest = target.partition(":")
    if scheme in ("tcp", "ssl") and re.fullmatch(r"[^:]+|\[[^]]*\]", rest):
        rest += ":6653"
    if scheme == "unix" and rest.startswith("/var/run/"):
        rest = rest.removeprefix("/var")
    return f"{scheme}:{rest}"


def controllers(subject: Subject) -> list[Finding]:
    """Whoever is a bridge's controller can replace all its flows."""
    check = "controllers"
    expected = {normal_target(target) for target in subject.controllers}

    def judged(bridge: OvsBridge) -> Iterator[Finding]:
        foreign = [t for t in bridge.controllers if normal_target(t) not in expected]
        if foreign:
            kept = [t for t in bridge.controllers if t not in foreign]
            ours = kept or [t for t in subject.controllers if bridge.name in t] or list(subject.controllers[:1])
            words = ["set-controller", bridge.name, *ours] if ours else ["del-controller", bridge.name]
            advice = f"if it is yours, say so: --controller {foreign[0]}"
            seen = f"{bridge.name} obeys {listed(foreign)}, which is not expected"
            yield bad(check, seen, subject.vsctl(*words), advice=advice)

    good = f"none but {listed(sorted(expected))}" if expected else "none"
    return over_bridges(check, subject, judged, good)


def managers(subject: Subject) -> list[Finding]:
    """Whoever reaches OVSDB can change bridges, ports and controllers."""
    check, ovs = "managers", subject.facts.ovs
    if isinstance(ovs, Gap):
        return unknown(check, ovs, needed=subject.state is not None)
    found = []
    outward = [target for target in ovs.managers if _outward(target)]
    if outward:
        kept = [target for target in ovs.managers if target not in outward]
        mend = subject.vsctl("set-manager", *kept) if kept else subject.vsctl("del-manager")
        found.append(bad(check, f"a manager {listed(outward)}: other hosts can change every bridge", mend))
    for remote in () if isinstance(ovs.remotes, Gap) else filter(_outward, ovs.remotes):
        mend = command("ovs-appctl", "-t", ovs.control, "ovsdb-server/remove-remote", remote)
        seen = f"ovsdb-server has the remote {remote}: other hosts can change every bridge"
        found.append(bad(check, seen, mend, advice="and remove it from ovsdb-server's command line"))
    return told(check, found, "OVSDB listens on this host only", ovs.remotes)


def _outward(target: str) -> bool:
    """Whether a manager's target or a remote reaches beyond this host. What is not understood does."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "punix", "db", "role"):
        return False
    if scheme in ("ptcp", "pssl"):
        rest = rest.partition(":")[2]
    host = rest[1 : rest.index("]")] if rest.startswith("[") and "]" in rest else rest.partition(":")[0]
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return True


def copies(subject: Subject) -> list[Finding]:
    """A mirror or a sampler hands packets out beside the flows."""
    check = "mirrors"

    def judged(bridge: OvsBridge) -> Iterator[Finding]:
        if bridge.copies:
            seen = f"{bridge.name} has {listed(bridge.copies)}: packets, or parts of them, are copied past every flow"
            yield bad(check, seen, *(subject.vsctl("clear", "bridge", bridge.name, name) for name in bridge.copies))

    return over_bridges(check, subject, judged, "no mirror, sFlow, NetFlow or IPFIX")


def spanning_tree(subject: Subject) -> list[Finding]:
    """With a spanning tree protocol the switch itself speaks to whoever is at a port, and shuts ports as they ask it to."""
    check = "spanning tree"

    def judged(bridge: OvsBridge) -> Iterator[Finding]:
        if bridge.spanning:
            seen = f"{bridge.name} has {listed(bridge.spanning)}: it takes and sends frames beside the flows"
            mend = subject.vsctl("set", "bridge", bridge.name, *(f"{name}=false" for name in bridge.spanning))
            yield bad(check, seen, mend)

    return over_bridges(check, subject, judged, "off on every bridge")


def ports(subject: Subject) -> list[Finding]:
    """Ports that nobody declared, and declared ones that cannot be what they are declared to be."""
    check = "ports"
    if subject.state is None:
        return no_file(check)

    def judged(bridge: OvsBridge) -> Iterator[Finding]:
        expected = {bridge.name, *subject.planned(bridge.name)}
        for interface in bridge.interfaces:
            mend = subject.vsctl("del-port", bridge.name, interface.name)
            if interface.name not in expected:
                seen = f"{bridge.name} has a port {interface.name} that is not declared"
                yield bad(check, seen, mend, advice="or declare it")
            elif interface.name != bridge.name and (why := _odd(subject, interface)):
                yield bad(check, f"{interface.name} of {bridge.name} {why}", mend, advice="make it a veth")

    return over_bridges(check, subject, judged, "none but the declared ones", subject.facts.links)


def _odd(subject: Subject, interface: OvsInterface) -> str:
    """Why an interface cannot be a declared port. Its kind counts, not its name."""
    if interface.type not in _PLAIN_TYPES:
        return f"is a {interface.type}, which leads past the legs"
    link = subject.links.get(interface.name)
    if interface.type in ("internal", "tap"):
        return "is an internal port: the host itself is behind it, not what is declared" if link is not None else ""
    if link is None:
        return ""
    if link.kind == "wireguard" or not link.ethernet:
        return f"is no Ethernet interface ({link.kind or 'layer 3'}): it carries nothing, and its tunnel is the host's"
    return f"is a {link.kind}, which leads past the legs" if link.kind not in _PLAIN_KINDS else ""


def wires(subject: Subject) -> list[Finding]:
    """The far ends of ports: the declared other bridge, or a namespace that has none of another network's."""
    check, state = "far ends", subject.state
    if state is None:
        return no_file(check)
    ends = declared_links(state)
    holders = {i.name: b.name for b in subject.bridges for i in b.interfaces}

    def judged(bridge: OvsBridge) -> Iterator[Finding]:
        for interface in bridge.interfaces:
            far = ends.get((bridge.name, interface.name))
            peer = _peer(subject, interface)
            if peer is None or (far is None and not peer):
                continue
            if far is None and interface.type == "patch":
                seen = (
                    f"{interface.name} of {bridge.name} is a patch port to {peer} of {holders.get(peer, 'no bridge')}"
                )
                yield bad(
                    check, seen, advice=f"nothing of ours makes such: {subject.vsctl('del-port', interface.name)}"
                )
            elif far is None:
                seen = f"the far end of {interface.name}, {peer}, is on the host itself"
                yield bad(check, seen, advice=f"move it where it belongs: ip link set {peer} netns NAMESPACE")
            elif peer != far[1]:
                seen = f"{interface.name} of {bridge.name} is joined to {peer or 'another namespace'}, not to {far[1]}"
                yield bad(check, seen, advice=f"make the pair {interface.name}, {far[1]} again")
            elif holders.get(peer) != far[0]:
                where = holders.get(peer)
                seen = f"{peer}, the far end of {interface.name}, is a port of {where or 'no declared bridge'}"
                mend = [subject.vsctl("--if-exists", "del-port", where, peer)] if where else []
                yield bad(check, f"{seen}, not of {far[0]}", *mend, subject.vsctl("add-port", far[0], peer))

    if not subject.bridges:
        return each_bridge(check, subject)
    found = [finding for bridge in subject.bridges for finding in judged(bridge)]
    good = "where they should be, and no namespace has those of two networks"
    return told(check, [*found, *_mixed(subject)], good, subject.facts.links, *place_gaps(subject))


def _peer(subject: Subject, interface: OvsInterface) -> str | None:
    """What a veth or patch port is joined to: its name, '' if in another namespace, None if it is neither."""
    if interface.type == "patch":
        return interface.peer
    link = subject.links.get(interface.name)
    return link.lower if link is not None and link.kind == "veth" else None


def far_ends(subject: Subject) -> Iterator[tuple[str, str]]:
    """Namespaces, and the ports whose far ends are in them."""
    near = {(link.lower_index, link.index): link.name for link in subject.links.values() if _leaves(link)}
    for place in () if isinstance(subject.facts.places, Gap) else subject.facts.places:
        for end in () if isinstance(place.links, Gap) else place.links:
            port = near.get((end.index, end.lower_index)) if end.kind == "veth" else None
            if port in subject.owners:
                assert port is not None
                yield place.name, port


def place_gaps(subject: Subject) -> Iterator[Gap]:
    """Why some or all of the other namespaces could not be looked into."""
    places = subject.facts.places
    if isinstance(places, Gap):
        yield replace(places, why=f"other namespaces: {places.why}")
        return
    for place in places:
        if isinstance(place.links, Gap):
            yield replace(place.links, why=f"{place.name}: {place.links.why}")


def _leaves(link: Link) -> bool:
    return link.kind == "veth" and link.lower_index != 0


def _mixed(subject: Subject) -> Iterator[Finding]:
    held: dict[str, list[str]] = {}
    for place, port in far_ends(subject):
        held.setdefault(place, []).append(port)
    for place, names in held.items():
        if len({subject.owners[name] for name in names}) > 1:
            told = listed(f"{name} ({subject.owners[name]})" for name in names)
            yield bad("far ends", f"namespace {place} has the far ends of {told}", advice="give each network its own")


def hidden_flows(subject: Subject) -> list[Finding]:
    """Flows that OpenFlow does not show, or that let the switch decide where packets go."""
    check = "hidden flows"
    if not subject.bridges:
        return each_bridge(check, subject)
    out: list[Finding] = []
    for bridge in subject.bridges:
        held = subject.facts.flows.get(bridge.name, Gap("its flows were not read"))
        if isinstance(held, Gap):
            out += unknown(check, replace(held, why=f"{bridge.name}: {held.why}"))
            continue
        hidden = [flow for flow in held if flow.priority > _VISIBLE]
        if hidden:
            out.append(_hidden(check, subject, bridge, hidden))
        seen_ones = (flow for flow in held if flow.priority <= _VISIBLE and flow.table != _INTERNAL_TABLE)
        loose = [flow for flow in seen_ones if _ANYWHERE.search(flow.actions)]
        if loose and subject.state is not None:
            seen = f"{bridge.name} has {len(loose)} flow(s) that send anywhere, none of ours: {loose[0].text}"
            advice = f"who made it? bulkhead status; ovs-ofctl dump-flows {bridge.name}"
            out.append(bad(check, seen, advice=advice))
    return told(check, out, "none that lets packets pass beside ours")


def _hidden(check: str, subject: Subject, bridge: OvsBridge, flows: Sequence[HeldFlow]) -> Finding:
    first = max(flows, key=lambda flow: flow.priority)
    seen = f"{bridge.name} has {len(flows)} hidden flow(s)"
    if any(flow.priority == FAIL_OPEN_PRIORITY for flow in flows):
        mend = subject.vsctl("set-fail-mode", bridge.name, "secure")
        return bad(check, f"{seen}, it acts as a plain switch now: {first.text}", mend)
    if first.priority in IN_BAND_PRIORITIES:
        mend = subject.vsctl("set", "bridge", bridge.name, "other-config:disable-in-band=true")
        return bad(check, f"{seen}, in-band control: {first.text}", mend)
    advice = f"find out what they are: ovs-appctl bridge/dump-flows {bridge.name}"
    return bad(check, f"{seen}, not of any kind known: {first.text}", advice=advice)
