"""Asks a host's tools and reads what they print. Changes nothing; never reads a key.

Nothing here raises for what a tool prints or fails to print: that makes a `Gap`. Imports facts, tools, firewall.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

from controller.verify.host.facts import (
    Address,
    AllowedIps,
    Facts,
    Gap,
    HeldFlow,
    IpNetwork,
    Link,
    NftChain,
    Ovs,
    OvsBridge,
    OvsInterface,
    Place,
    Redirect,
    Route,
    RouteRule,
)
from controller.verify.host.firewall import read_legacy, read_nft
from controller.verify.host.tools import TIMEOUT_S, Tools

T = TypeVar("T")


def gather(tools: Tools, db: str) -> Facts:
    """Ask everything. `db` is where ovsdb-server listens, as `ovs-vsctl --db` takes it."""
    ovs = _ovs(tools, db)
    links = _links(tools)
    return Facts(
        ovs=ovs,
        flows={} if isinstance(ovs, Gap) else _flows(tools, db, [bridge.name for bridge in ovs.bridges]),
        links=links,
        routes=_both_families(tools, read_routes, "route", "show", "table", "all"),
        rules=_both_families(tools, read_rules, "rule", "show"),
        redirects=_redirects(tools),
        sysctls=_sysctls(tools),
        nft=_firewall(tools),
        wireguard=_wireguard(tools, links),
        places=links if isinstance(links, Gap) else _places(tools),  # what cannot be asked here cannot there
    )


def parsed(what: str, text: str | Gap, parse: Callable[[str], T]) -> T | Gap:
    """What a tool printed, read; a gap if it printed what it never should."""
    if isinstance(text, Gap):
        return text
    try:
        return parse(text)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return Gap(f"{what} printed what cannot be understood", f"look at what it prints: {what}")


# -------------------------------------------------------------------------------------------------------- Open vSwitch

_COPIES = ("mirrors", "sflow", "netflow", "ipfix")
_SPANNING = ("stp_enable", "rstp_enable")
_BRIDGE = ("name", "datapath_type", "datapath_id", "fail_mode", "other_config", "controller", "ports")
_COLUMNS = {
    "Bridge": ",".join((*_BRIDGE, *_COPIES, *_SPANNING)),
    "Port": "_uuid,interfaces",
    "Interface": "_uuid,name,type,options,ifindex",
    "Controller": "_uuid,target",
    "Manager": "target",
    "Open_vSwitch": "_uuid",
}


def _ovs(tools: Tools, db: str) -> Ovs | Gap:
    asked: list[str] = []
    for table, columns in _COLUMNS.items():
        asked += ["--", f"--columns={columns}", "list", table]
    text = tools.run("ovs-vsctl", f"--db={db}", f"--timeout={TIMEOUT_S // 2}", "--format=json", *asked[1:])
    ovs = parsed("ovs-vsctl", text, read_ovs)
    if isinstance(ovs, Gap):
        scheme, _, socket = db.partition(":")
        if scheme != "unix" or tools.exists(Path(socket)):
            return replace(ovs, absent=False)
        return Gap(f"no Open vSwitch runs at {db}", "start it, or say with --ovsdb where it is", absent=True)
    control, remotes = _from_daemon(tools, db, "ovsdb-server", "ovsdb-server/list-remotes")
    told = remotes if isinstance(remotes, Gap) else tuple(remotes.split())
    return replace(ovs, remotes=told, db=db, control=control or ovs.control)


def read_ovs(text: str) -> Ovs:
    """What `ovs-vsctl --format=json` lists of the tables in `_COLUMNS`. Raises what `parsed` expects."""
    decoder = json.JSONDecoder()
    rows: dict[str, list[dict[str, Any]]] = {}
    for table in _COLUMNS:
        listed, end = decoder.raw_decode(text)
        text = text[end:].lstrip()
        rows[table] = [dict(zip(listed["headings"], row, strict=True)) for row in listed["data"]]
    if not rows["Open_vSwitch"]:
        raise ValueError("no Open_vSwitch row")
    interfaces = {row["_uuid"][1]: _interface(row) for row in rows["Interface"]}
    ports = {row["_uuid"][1]: [interfaces[uuid] for uuid in _set(row["interfaces"])] for row in rows["Port"]}
    targets = {row["_uuid"][1]: str(row["target"]) for row in rows["Controller"]}
    bridges = [_bridge(row, ports, targets) for row in rows["Bridge"]]
    return Ovs(tuple(sorted(bridges, key=lambda b: b.name)), tuple(str(row["target"]) for row in rows["Manager"]))


def _interface(row: Mapping[str, Any]) -> OvsInterface:
    index = "".join(_set(row["ifindex"]))
    return OvsInterface(
        str(row["name"]), str(row["type"]), _map(row["options"]).get("peer", ""), int(index) if index else 0
    )


def _bridge(row: Mapping[str, Any], ports: Mapping[str, list[OvsInterface]], targets: Mapping[str, str]) -> OvsBridge:
    interfaces = [interface for uuid in _set(row["ports"]) for interface in ports[uuid]]
    return OvsBridge(
        name=str(row["name"]),
        datapath_type=str(row["datapath_type"]),
        datapath_id="".join(_set(row["datapath_id"])),
        fail_mode="".join(_set(row["fail_mode"])),
        disable_in_band=_map(row["other_config"]).get("disable-in-band") == "true",
        controllers=tuple(sorted(targets[uuid] for uuid in _set(row["controller"]))),
        interfaces=tuple(sorted(interfaces, key=lambda interface: interface.name)),
        copies=tuple(name for name in _COPIES if _set(row[name])),
        spanning=tuple(name for name in _SPANNING if row[name] is True),
    )


def _set(value: Any) -> list[str]:
    """An OVSDB set, or the lone value that stands for a set of one; UUIDs as their text."""
    if isinstance(value, list) and value[0] == "set":
        return [text for item in value[1] for text in _set(item)]
    return [str(value[1])] if isinstance(value, list) else [str(value)]


def _map(value: Any) -> dict[str, str]:
    return {str(key): str(item) for key, item in value[1]}


def _flows(tools: Tools, db: str, bridges: Sequence[str]) -> dict[str, tuple[HeldFlow, ...] | Gap]:
    out: dict[str, tuple[HeldFlow, ...] | Gap] = {}
    text: str | Gap = ""
    for name in bridges:
        # A daemon that does not answer is not asked for every bridge: each time costs the whole time limit.
        if not isinstance(text, Gap):
            _, text = _from_daemon(tools, db, "ovs-vswitchd", "bridge/dump-flows", name)
        out[name] = parsed("ovs-appctl bridge/dump-flows", text, read_flows)
    return out


def _from_daemon(tools: Tools, db: str, daemon: str, *command: str) -> tuple[str, str | Gap]:
    """Ask ovs-vswitchd or ovsdb-server by its control socket, which lies beside the database's; the socket, the answer."""
    scheme, _, socket = db.partition(":")
    if scheme != "unix":
        return "", Gap(f"{daemon} of {db} has its control socket elsewhere", "run this there, with --ovsdb unix:PATH")
    gap = Gap(f"{daemon} has no control socket beside {db}", f"is {daemon} running?")
    part = {"ovs-vswitchd": "vswitchd", "ovsdb-server": "ovsdb"}[daemon]
    for path in tools.sockets(Path(socket).parent):
        if part in path.name:
            said = tools.run("ovs-appctl", "-t", str(path), f"--timeout={TIMEOUT_S // 2}", *command)
            if not isinstance(said, Gap):
                return str(path), said
            gap = replace(said, absent=False)
    return "", gap


_PRIORITY = re.compile(r"(?:^|,\s*)priority=(\d+)")
_TABLE = re.compile(r"(?:^|,\s*)table_id=(\d+)")


def read_flows(text: str) -> tuple[HeldFlow, ...]:
    """What `bridge/dump-flows` prints. Raises what `parsed` expects."""
    out = []
    for line in filter(None, map(str.strip, text.splitlines())):
        head, found, actions = line.partition("actions=")
        priority, table = _PRIORITY.search(head), _TABLE.search(head)
        if not found or priority is None:
            raise ValueError(line)
        match = re.sub(r"(table_id|duration|n_packets|n_bytes)=\w+,\s*", "", head)
        out.append(HeldFlow(int(table[1]) if table else 0, int(priority[1]), f"{match}actions={actions}", actions))
    return tuple(out)


# ---------------------------------------------------------------------------------------------------------- the kernel


def _links(tools: Tools, *prefix: str) -> tuple[Link, ...] | Gap:
    return parsed("ip -j -d address", tools.run(*prefix, "ip", "-j", "-d", "address", "show"), read_links)


def _rows(text: str) -> list[dict[str, Any]]:
    """ip's JSON: a list of objects; nothing at all where there is nothing to list, an empty object here and there."""
    # Not strict: ip prints the names of interfaces as they are, and those may have control characters.
    rows = json.loads(text, strict=False) if text.strip() else []
    if not isinstance(rows, list):
        raise ValueError("not a list")
    return [row for row in rows if row]


def read_links(text: str) -> tuple[Link, ...]:
    """What `ip -j -d address` prints. Raises what `parsed` expects."""
    out = []
    for row in _rows(text):
        addresses = tuple(
            Address(str(a["local"]), ip_network(f"{a['local']}/{a['prefixlen']}", strict=False))
            for a in row.get("addr_info", ())
            if a and "local" in a
        )
        out.append(
            Link(
                name=str(row["ifname"]),
                index=int(row["ifindex"]),
                kind=str(row.get("linkinfo", {}).get("info_kind", "")),
                master=str(row.get("master", "")),
                lower=str(row.get("link") or ""),
                lower_index=int(row.get("link_index", 0)),
                addresses=addresses,
                ethernet=row.get("link_type") in ("ether", "loopback"),
                program="xdp" in row,
            )
        )
    return tuple(out)


def _both_families(tools: Tools, read: Callable[[str, str], tuple[T, ...]], *command: str) -> tuple[T, ...] | Gap:
    out: tuple[T, ...] = ()
    for family, default in (("-4", "0.0.0.0/0"), ("-6", "::/0")):
        what = " ".join(("ip", family, *command))
        found = parsed(what, tools.run("ip", "-j", family, *command), partial(read, default))
        if isinstance(found, Gap):
            return found
        out += found
    return out


def read_routes(everything: str, text: str) -> tuple[Route, ...]:
    """What `ip -j route` prints; `everything` is what it calls default. Raises what `parsed` expects."""
    out = []
    for row in _rows(text):
        hops = [row] if "dev" in row else row.get("nexthops", ())
        devices = tuple(str(hop["dev"]) for hop in hops if "dev" in hop)
        kind, table = str(row.get("type", "unicast")), str(row.get("table", "main"))
        if not devices and "nhid" in row:
            raise ValueError("a next hop of which only the number is told")
        network = ip_network(everything if row["dst"] == "default" else row["dst"], strict=False)
        out.append(Route(network, devices, table, kind, str(row.get("protocol", ""))))
    return tuple(out)


def read_rules(_everything: str, text: str) -> tuple[RouteRule, ...]:
    """What `ip -j rule` prints of rules that lead to a table: one that refuses lets nothing meet. Raises what `parsed`
    expects."""

    def prefix(row: dict[str, Any], key: str) -> IpNetwork | None:
        text = row.get(key, "all")
        return None if text == "all" else ip_network(f"{text}/{row.get(f'{key}len', '')}".rstrip("/"), strict=False)

    # "not" turns all that a rule asks for around: it says nothing of where packets come from then.
    rows = [row for row in _rows(text) if "table" in row and "not" not in row]
    return tuple(
        RouteRule(
            int(row["priority"]),
            prefix(row, "src"),
            prefix(row, "dst"),
            str(row.get("iif", "")),
            str(row.get("oif", "")),
        )
        for row in rows
    )


_SYSCTLS = (
    "ipv4/conf/*/forwarding",
    "ipv4/conf/all/accept_source_route",
    "ipv4/conf/all/mc_forwarding",
    "ipv4/conf/*/proxy_arp",
    "ipv4/conf/*/proxy_arp_pvlan",
    "ipv6/conf/*/forwarding",
    "ipv6/conf/*/force_forwarding",
    "ipv6/conf/*/disable_ipv6",
    "ipv6/conf/all/mc_forwarding",
    "ipv6/conf/*/proxy_ndp",
)


def _sysctls(tools: Tools) -> Mapping[str, str] | Gap:
    found: dict[str, str] = {}
    for pattern in _SYSCTLS:
        found |= tools.read(pattern)
    if "ipv4/conf/all/forwarding" not in found:
        return Gap("/proc/sys/net cannot be read", "is /proc mounted?")
    return found


_QDISC = re.compile(r"^qdisc (\S+) .*?dev (\S+)")
_HARMLESS = frozenset(
    ("noop", "noqueue", "mq", "pfifo", "pfifo_fast", "bfifo", "fq", "fq_codel", "sfq", "cake", "netem")
)
"""Queues that have no filters."""
_MIRRED = re.compile(r"mirred \(\w+ \w+ to device (\S+?)\)")
_PROGRAM = re.compile(r"^filter .*\bbpf\b|action order \d+: *bpf", re.M)


def _redirects(tools: Tools) -> tuple[Redirect, ...] | Gap:
    # Text, not JSON: not every filter and action prints as JSON.
    listed = tools.run("tc", "qdisc", "show")
    if isinstance(listed, Gap):
        return listed
    out: tuple[Redirect, ...] = ()
    for kind, device in filter(None, map(_qdisc, listed.splitlines())):
        for where in {"clsact": ("ingress", "egress"), "ingress": ("ingress",)}.get(kind, ("root",)):
            text = tools.run("tc", "filter", "show", "dev", device, *([where] if where != "root" else []))
            if isinstance(text, Gap):
                return text
            out += read_redirects(text, device, where)
    return out


def _qdisc(line: str) -> tuple[str, str] | None:
    found = _QDISC.match(line)
    return (found[1], found[2]) if found and found[1] not in _HARMLESS else None


def read_redirects(text: str, device: str, where: str) -> tuple[Redirect, ...]:
    """The redirects and copies among what `tc filter show` prints."""
    out = [Redirect(device, where, target) for target in _MIRRED.findall(text)]
    return tuple(out + [Redirect(device, where, "")] * bool(_PROGRAM.search(text)))


# ----------------------------------------------------------------------------------------------------------- firewalls


def _firewall(tools: Tools) -> tuple[NftChain, ...] | Gap:
    listed = tools.run("nft", "-j", "list", "ruleset")
    # The text says what nft 1.0.6 leaves out of its JSON: the device of an ingress chain, and that a table is dormant.
    text = tools.run("nft", "-t", "list", "ruleset") if not isinstance(listed, Gap) else listed
    if isinstance(text, Gap):
        return text
    chains = parsed("nft -j list ruleset", listed, lambda ruleset: read_nft(ruleset, text))
    if isinstance(chains, Gap):
        return chains
    return chains + tuple(_legacy(tools))


def _legacy(tools: Tools) -> Iterator[NftChain]:
    """The old iptables' rules, where it has any. They can only drop more, so not to know them is not to err."""
    for family, number in (("ip", ""), ("ip6", "6")):
        # To ask for a table makes it; so it is asked for only if it is there.
        tables = tools.run("cat", f"/proc/net/ip{number}_tables_names")
        if not isinstance(tables, Gap) and "filter" in tables.split():
            saved = tools.run(f"ip{number}tables-legacy-save", "-t", "filter")
            chains = parsed("iptables-legacy-save", saved, partial(read_legacy, family=family))
            yield from () if isinstance(chains, Gap) else chains


# ----------------------------------------------------------------------------------------------- WireGuard and the rest


def _wireguard(tools: Tools, links: tuple[Link, ...] | Gap, *prefix: str) -> tuple[AllowedIps, ...] | Gap:
    if isinstance(links, Gap):
        return links
    # `allowed-ips` and not `dump`: that one prints private keys.
    asked = parsed("wg show all allowed-ips", tools.run(*prefix, "wg", "show", "all", "allowed-ips"), read_wireguard)
    names = [link.name for link in links if link.kind == "wireguard"]
    if isinstance(asked, Gap) and names:
        return Gap(f"{', '.join(names)} cannot be looked at: {asked.why}", asked.mend)
    if isinstance(asked, Gap) and prefix:
        # nsenter says of a program that is not there that it failed.
        if "failed to execute wg" in asked.why:
            return Gap("wg is not installed", "install wireguard-tools", absent=True)
    return asked


def read_wireguard(text: str) -> tuple[AllowedIps, ...]:
    """What `wg show all allowed-ips` prints. Raises what `parsed` expects."""
    out = []
    peers: dict[str, int] = {}
    for line in filter(None, text.splitlines()):
        interface, _key, allowed = line.split("\t")
        peers[interface] = peers.get(interface, 0) + 1
        networks = tuple(ip_network(item, strict=False) for item in allowed.split() if item != "(none)")
        out.append(AllowedIps(interface, peers[interface], networks))
    return tuple(out)


def _places(tools: Tools) -> tuple[Place, ...] | Gap:
    namespaces = tools.namespaces()
    if isinstance(namespaces, Gap):
        return namespaces
    out = []
    for name, path in namespaces:
        prefix = ("nsenter", f"--net={path}", "--")
        links = _links(tools, *prefix)
        if isinstance(links, Gap) and not tools.exists(Path(path)):
            continue  # its last process has just ended
        # Only where there can be a WireGuard interface it is asked for: wireguard-go's are tuns.
        asks = not isinstance(links, Gap) and any(link.kind in ("wireguard", "tun") for link in links)
        out.append(Place(name, links, _wireguard(tools, links, *prefix) if asks else ()))
    return tuple(out)
