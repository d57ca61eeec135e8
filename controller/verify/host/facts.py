"""What a host's own tools say about it, as frozen values. Reads only; changes nothing; never reads a key.

Every fact is there or is a `Gap` that says why not, and whether the thing itself is absent. Nothing here raises for what
a tool prints or fails to print. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Protocol, TypeVar

TIMEOUT_S = 10
MOST_NAMESPACES = 256
"""More network namespaces than this are not looked into."""

IpNetwork = IPv4Network | IPv6Network
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gap:
    """Why a fact is not known and what to do. `absent`: because the thing it is about is not on this host."""

    why: str
    mend: str = ""
    absent: bool = False


@dataclass(frozen=True, slots=True)
class OvsInterface:
    """One row of OVS's Interface table; `peer` is a patch port's other end."""

    name: str
    type: str = ""
    peer: str = ""


@dataclass(frozen=True, slots=True)
class OvsBridge:
    """One row of OVS's Bridge table. `copies` names what hands packets out beside the flows: mirrors, sFlow and such."""

    name: str
    datapath_type: str = ""
    fail_mode: str = ""
    disable_in_band: bool = False
    controllers: tuple[str, ...] = ()
    interfaces: tuple[OvsInterface, ...] = ()
    copies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ovs:
    """OVS's configuration. `remotes` is where ovsdb-server itself listens."""

    bridges: tuple[OvsBridge, ...] = ()
    managers: tuple[str, ...] = ()
    remotes: tuple[str, ...] | Gap = ()


@dataclass(frozen=True, slots=True)
class HeldFlow:
    """A line of `bridge/dump-flows`, hidden flows included."""

    table: int
    priority: int
    text: str
    actions: str


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface; `network` has the interface's prefix length."""

    text: str
    network: IpNetwork


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `lower` is a veth's far end, or what a VLAN or macvlan stands on, if it is in the same
    namespace; `lower_index` its index if it is in another."""

    name: str
    index: int = 0
    kind: str = ""
    master: str = ""
    lower: str = ""
    lower_index: int = 0
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """A route of any table that leads somewhere; `devices` are several where it has several next hops."""

    network: IpNetwork
    devices: tuple[str, ...]
    table: str = "main"
    kind: str = "unicast"
    protocol: str = ""


@dataclass(frozen=True, slots=True)
class RouteRule:
    """A policy routing rule; empty where it does not say."""

    priority: int
    source: IpNetwork | None = None
    target: IpNetwork | None = None
    iif: str = ""
    oif: str = ""
    table: str = ""


@dataclass(frozen=True, slots=True)
class NftChain:
    """A chain of nftables. `rules` are the expressions of each rule as `nft -j` prints them."""

    family: str
    table: str
    name: str
    hook: str = ""
    policy: str = "accept"
    devices: tuple[str, ...] = ()
    rules: tuple[tuple[Mapping[str, Any], ...], ...] = ()

    @property
    def title(self) -> str:
        """How nft names it."""
        return f"{self.family} {self.table} {self.name}"


@dataclass(frozen=True, slots=True)
class AllowedIps:
    """What a WireGuard interface takes from and sends to one of its peers (counted from 1)."""

    interface: str
    peer: int
    networks: tuple[IpNetwork, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A network namespace other than the one we are in."""

    name: str
    links: tuple[Link, ...] | Gap
    wireguard: tuple[AllowedIps, ...] | Gap


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a host. `sysctls` has names as below /proc/sys/net: `ipv4/conf/all/forwarding`."""

    ovs: Ovs | Gap
    flows: Mapping[str, tuple[HeldFlow, ...] | Gap]
    links: tuple[Link, ...] | Gap
    routes: tuple[Route, ...] | Gap
    rules: tuple[RouteRule, ...] | Gap
    sysctls: Mapping[str, str] | Gap
    nft: tuple[NftChain, ...] | Gap
    wireguard: tuple[AllowedIps, ...] | Gap
    places: tuple[Place, ...] | Gap


class Tools(Protocol):
    """How facts are asked for; a test has its own."""

    def run(self, *command: str) -> str | Gap:
        """What a command printed, or why it did not."""

    def read(self, pattern: str) -> Mapping[str, str]:
        """Files below /proc/sys/net that match a pattern, by their path there."""

    def sockets(self, directory: Path) -> Sequence[Path]:
        """The control sockets (`*.ctl`) in a directory."""

    def namespaces(self) -> Sequence[tuple[str, str]] | Gap:
        """Names and paths of the other network namespaces of this machine."""


class Host:
    """The tools of the machine and the network namespace that this process is in."""

    def run(self, *command: str) -> str | Gap:
        """What a command printed, or why it did not."""
        # Not everybody has the administrator's programs on the path.
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                env={**os.environ, "PATH": path, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except FileNotFoundError:
            return Gap(f"{command[0]} is not installed", absent=True)
        except subprocess.TimeoutExpired:
            return Gap(f"{command[0]} did not answer within {TIMEOUT_S} s", f"find out why: {' '.join(command)}")
        except OSError as exc:
            return Gap(f"{command[0]} cannot be run: {exc.strerror}", f"find out why: {' '.join(command)}")
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split()) or f"exit {done.returncode}"
            return Gap(f"{command[0]} failed: {said[:200]}", _how(said, command))
        return done.stdout

    def read(self, pattern: str) -> Mapping[str, str]:
        """Files below /proc/sys/net that match a pattern, by their path there."""
        base = Path("/proc/sys/net")
        out = {}
        for path in base.glob(pattern):
            try:
                out[str(path.relative_to(base))] = path.read_text().strip()
            except OSError:  # an interface that has just gone
                continue
        return out

    def sockets(self, directory: Path) -> Sequence[Path]:
        """The control sockets (`*.ctl`) in a directory."""
        try:
            return sorted(directory.glob("*.ctl"))
        except OSError:
            return ()

    def namespaces(self) -> Sequence[tuple[str, str]] | Gap:
        """Names and paths of the other network namespaces: named ones, and those that only processes hold."""
        if os.geteuid():
            return Gap("only root can look into other network namespaces", "run this as root")
        found: dict[int, tuple[str, str]] = {}
        for path in [*sorted(Path("/run/netns").glob("*")), *Path("/proc").glob("[0-9]*/ns/net")]:
            try:
                name = path.name if path.parent.name == "netns" else f"process {path.parts[2]}"
                found.setdefault(path.stat().st_ino, (name, str(path)))
            except OSError:  # a process that has just ended
                continue
        found.pop(os.stat("/proc/self/ns/net").st_ino, None)
        if len(found) > MOST_NAMESPACES:
            return Gap(f"{len(found)} network namespaces are too many to look into", "look into the legs' by hand")
        return tuple(found.values())


def _how(said: str, command: Sequence[str]) -> str:
    if re.search(r"permitted|permission|must be root", said, re.IGNORECASE):
        return "run this as root"
    return f"find out why: {' '.join(command)}"


def gather(tools: Tools, db: str) -> Facts:
    """Ask everything. `db` is where ovsdb-server listens, as `ovs-vsctl --db` takes it."""
    ovs = _ovs(tools, db)
    names = () if isinstance(ovs, Gap) else tuple(bridge.name for bridge in ovs.bridges)
    links = _links(tools)
    return Facts(
        ovs=ovs,
        flows=_flows(tools, db, names),
        links=links,
        routes=_both_families(tools, _routes, "route", "show", "table", "all"),
        rules=_both_families(tools, _rules, "rule", "show"),
        sysctls=_sysctls(tools),
        nft=_nft(tools),
        wireguard=_wireguard(tools, links),
        places=_places(tools),
    )


def _parsed(what: str, text: str | Gap, parse: Callable[[str], T]) -> T | Gap:
    """What a tool printed, read; a gap if it printed what it never should."""
    if isinstance(text, Gap):
        return text
    try:
        return parse(text)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return Gap(f"{what} printed what cannot be understood", f"look at what it prints: {what}")


# -------------------------------------------------------------------------------------------------------- Open vSwitch

_COLUMNS = {
    "Bridge": "name,datapath_type,fail_mode,other_config,controller,ports,mirrors,sflow,netflow,ipfix",
    "Port": "_uuid,interfaces",
    "Interface": "_uuid,name,type,options",
    "Controller": "_uuid,target",
    "Manager": "target",
    "Open_vSwitch": "_uuid",
}
_COPIES = ("mirrors", "sflow", "netflow", "ipfix")


def _ovs(tools: Tools, db: str) -> Ovs | Gap:
    scheme, _, socket = db.partition(":")
    if scheme == "unix" and not os.path.exists(socket):
        return Gap(f"no Open vSwitch runs at {db}", "start it, or say with --db where it is", absent=True)
    asked: list[str] = []
    for table, columns in _COLUMNS.items():
        asked += ["--", f"--columns={columns}", "list", table]
    text = tools.run("ovs-vsctl", f"--db={db}", f"--timeout={TIMEOUT_S // 2}", "--format=json", *asked[1:])
    ovs = _parsed("ovs-vsctl", text, _read_ovs)
    if isinstance(ovs, Gap):
        return ovs
    remotes = _from_daemon(tools, db, "ovsdb-server", "ovsdb-server/list-remotes")
    if isinstance(remotes, Gap):
        return replace(ovs, remotes=remotes)
    return replace(ovs, remotes=tuple(remotes.split()))


def _read_ovs(text: str) -> Ovs:
    decoder = json.JSONDecoder()
    rows: dict[str, list[dict[str, Any]]] = {}
    for table in _COLUMNS:
        listed, end = decoder.raw_decode(text)
        text = text[end:].lstrip()
        rows[table] = [dict(zip(listed["headings"], row, strict=True)) for row in listed["data"]]
    if not rows["Open_vSwitch"]:
        raise ValueError("no Open_vSwitch row")
    interfaces = {
        row["_uuid"][1]: OvsInterface(str(row["name"]), str(row["type"]), _map(row["options"]).get("peer", ""))
        for row in rows["Interface"]
    }
    ports = {row["_uuid"][1]: [interfaces[uuid] for uuid in _set(row["interfaces"])] for row in rows["Port"]}
    targets = {row["_uuid"][1]: str(row["target"]) for row in rows["Controller"]}
    bridges = [
        OvsBridge(
            name=str(row["name"]),
            datapath_type=str(row["datapath_type"]),
            fail_mode="".join(_set(row["fail_mode"])),
            disable_in_band=_map(row["other_config"]).get("disable-in-band") == "true",
            controllers=tuple(sorted(targets[uuid] for uuid in _set(row["controller"]))),
            interfaces=tuple(
                sorted((i for uuid in _set(row["ports"]) for i in ports[uuid]), key=lambda interface: interface.name)
            ),
            copies=tuple(name for name in _COPIES if _set(row[name])),
        )
        for row in rows["Bridge"]
    ]
    return Ovs(tuple(sorted(bridges, key=lambda b: b.name)), tuple(str(row["target"]) for row in rows["Manager"]))


def _set(value: Any) -> list[str]:
    """An OVSDB set, or the lone value that stands for a set of one; UUIDs as their text."""
    if isinstance(value, list) and value[0] == "set":
        return [text for item in value[1] for text in _set(item)]
    return [str(value[1])] if isinstance(value, list) else [str(value)]


def _map(value: Any) -> dict[str, str]:
    return {str(key): str(item) for key, item in value[1]}


def _flows(tools: Tools, db: str, bridges: Sequence[str]) -> dict[str, tuple[HeldFlow, ...] | Gap]:
    return {
        name: _parsed(
            "ovs-appctl bridge/dump-flows",
            _from_daemon(tools, db, "ovs-vswitchd", "bridge/dump-flows", name),
            _read_flows,
        )
        for name in bridges
    }


def _from_daemon(tools: Tools, db: str, daemon: str, *command: str) -> str | Gap:
    """Ask ovs-vswitchd or ovsdb-server by its control socket, which lies beside the database's."""
    scheme, _, socket = db.partition(":")
    if scheme != "unix":
        return Gap(f"{daemon} of {db} has its control socket elsewhere", "run this where it runs, with --db unix:PATH")
    gap = Gap(f"{daemon} has no control socket beside {db}", f"is {daemon} running?")
    part = daemon.rpartition("-")[2] if daemon == "ovs-vswitchd" else daemon.partition("-")[0]
    for path in tools.sockets(Path(socket).parent):
        if part in path.name:
            said = tools.run("ovs-appctl", "-t", str(path), f"--timeout={TIMEOUT_S // 2}", *command)
            if not isinstance(said, Gap):
                return said
            gap = said
    return gap


_PRIORITY = re.compile(r"(?:^|,\s*)priority=(\d+)")
_TABLE = re.compile(r"(?:^|,\s*)table_id=(\d+)")


def _read_flows(text: str) -> tuple[HeldFlow, ...]:
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
    return _parsed("ip -j -d address", tools.run(*prefix, "ip", "-j", "-d", "address", "show"), _read_links)


def _rows(text: str) -> list[dict[str, Any]]:
    """ip's JSON: a list of objects; nothing at all where there is nothing to list, an empty object here and there."""
    rows = json.loads(text) if text.strip() else []
    if not isinstance(rows, list):
        raise ValueError("not a list")
    return [row for row in rows if row]


def _read_links(text: str) -> tuple[Link, ...]:
    out = []
    for row in _rows(text):
        addresses = tuple(
            Address(str(item["local"]), ip_network(f"{item['local']}/{item['prefixlen']}", strict=False))
            for item in row.get("addr_info", ())
            if "local" in item
        )
        out.append(
            Link(
                str(row["ifname"]),
                int(row["ifindex"]),
                str(row.get("linkinfo", {}).get("info_kind", "")),
                str(row.get("master", "")),
                str(row.get("link") or ""),
                int(row.get("link_index", 0)),
                addresses,
            )
        )
    return tuple(out)


def _both_families(
    tools: Tools, read: Callable[[list[dict[str, Any]], str], tuple[T, ...]], *command: str
) -> tuple[T, ...] | Gap:
    out: tuple[T, ...] = ()
    for family, everything in (("-4", "0.0.0.0/0"), ("-6", "::/0")):
        what = " ".join(("ip", family, *command))
        found = _parsed(
            what,
            tools.run("ip", "-j", family, *command),
            lambda text, everything=everything: read(_rows(text), everything),  # type: ignore[misc]
        )
        if isinstance(found, Gap):
            return found
        out += found
    return out


def _routes(rows: list[dict[str, Any]], everything: str) -> tuple[Route, ...]:
    out = []
    for row in rows:
        devices = [row["dev"]] if "dev" in row else [hop["dev"] for hop in row.get("nexthops", ()) if "dev" in hop]
        target = everything if row["dst"] == "default" else row["dst"]
        kind, table = row.get("type", "unicast"), row.get("table", "main")
        network = ip_network(target, strict=False)
        out.append(Route(network, tuple(map(str, devices)), str(table), str(kind), str(row.get("protocol", ""))))
    return tuple(out)


def _rules(rows: list[dict[str, Any]], _everything: str) -> tuple[RouteRule, ...]:
    def prefix(row: dict[str, Any], key: str) -> IpNetwork | None:
        text = row.get(key, "all")
        if text == "all":
            return None
        length = row.get(f"{key}len")
        return ip_network(text if length is None else f"{text}/{length}", strict=False)

    return tuple(
        RouteRule(
            int(row["priority"]),
            prefix(row, "src"),
            prefix(row, "dst"),
            str(row.get("iif", "")),
            str(row.get("oif", "")),
            str(row.get("table", row.get("action", ""))),
        )
        for row in rows
    )


_SYSCTLS = (
    "ipv4/conf/*/forwarding",
    "ipv4/conf/*/rp_filter",
    "ipv4/conf/*/proxy_arp",
    "ipv4/conf/*/proxy_arp_pvlan",
    "ipv6/conf/*/forwarding",
    "ipv6/conf/*/disable_ipv6",
    "ipv6/conf/*/proxy_ndp",
)


def _sysctls(tools: Tools) -> Mapping[str, str] | Gap:
    found: dict[str, str] = {}
    for pattern in _SYSCTLS:
        found |= tools.read(pattern)
    if "ipv4/conf/all/forwarding" not in found:
        return Gap("/proc/sys/net cannot be read", "is /proc mounted?")
    return found


# ------------------------------------------------------------------------------------------------------------ nftables


def _nft(tools: Tools) -> tuple[NftChain, ...] | Gap:
    listed = tools.run("nft", "-j", "list", "ruleset")
    if isinstance(listed, Gap):
        return listed
    # Which device an ingress chain is for is missing in the JSON of nft before 1.0.7; the text has it.
    text = tools.run("nft", "list", "chains")
    if isinstance(text, Gap):
        return text
    return _parsed("nft -j list ruleset", listed, lambda ruleset: _read_nft(ruleset, _ingress_devices(text)))


def _read_nft(ruleset: str, ingress: Mapping[tuple[str, str, str], tuple[str, ...]]) -> tuple[NftChain, ...]:
    chains: dict[tuple[str, str, str], dict[str, Any]] = {}
    rules: dict[tuple[str, str, str], list[tuple[Mapping[str, Any], ...]]] = {}
    for item in json.loads(ruleset)["nftables"]:
        if chain := item.get("chain"):
            chains[chain["family"], chain["table"], chain["name"]] = chain
        elif rule := item.get("rule"):
            key = (rule["family"], rule["table"], rule["chain"])
            rules.setdefault(key, []).append(tuple(_expression(part) for part in rule["expr"]))
    out = []
    for key, chain in chains.items():
        told = chain.get("dev", ())
        devices = (told,) if isinstance(told, str) else tuple(map(str, told)) or ingress.get(key, ())
        hook, policy = str(chain.get("hook", "")), str(chain.get("policy", "accept"))
        family, table, name = map(str, key)
        out.append(NftChain(family, table, name, hook, policy, devices, tuple(rules.get(key, ()))))
    return tuple(out)


def _expression(part: Any) -> Mapping[str, Any]:
    """One expression of a rule. nft prints some, like `counter`, as a bare word."""
    if isinstance(part, str):
        return {part: None}
    if not isinstance(part, dict) or not part:
        raise ValueError("not an expression")
    return part


def _ingress_devices(text: str) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """The devices of ingress chains, from what `nft list chains` prints for people."""
    out: dict[tuple[str, str, str], tuple[str, ...]] = {}
    family = table = chain = ""
    for line in map(str.strip, text.splitlines()):
        if found := re.match(r"table (\S+) (\S+) \{", line):
            family, table = found.groups()
        elif found := re.match(r"chain (\S+) \{", line):
            chain = found[1]
        elif found := re.search(r'hook ingress device "?([^"\s]+)"?', line):
            out[family, table, chain] = (found[1],)
        elif found := re.search(r"hook ingress devices = \{([^}]*)\}", line):
            out[family, table, chain] = tuple(name.strip(' "') for name in found[1].split(","))
    return out


# ----------------------------------------------------------------------------------------------- WireGuard and the rest


def _wireguard(tools: Tools, links: tuple[Link, ...] | Gap, *prefix: str) -> tuple[AllowedIps, ...] | Gap:
    # `allowed-ips` and not `dump`: that one prints private keys.
    if isinstance(links, Gap):
        return links
    names = [link.name for link in links if link.kind == "wireguard"]
    asked = tools.run(*prefix, "wg", "show", "all", "allowed-ips")
    if not isinstance(asked, Gap):
        return _parsed("wg show all allowed-ips", asked, _read_wireguard)
    if names:
        return Gap(f"{', '.join(names)} cannot be looked at: {asked.why}", asked.mend or "install wireguard-tools")
    return replace(asked, mend=asked.mend or "if WireGuard is in use here, install wireguard-tools")


def _read_wireguard(text: str) -> tuple[AllowedIps, ...]:
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
        kinds = () if isinstance(links, Gap) else {link.kind for link in links}
        # A tun may be wireguard-go's; where neither is, there is nothing to ask for.
        asks = "wireguard" in kinds or "tun" in kinds
        out.append(Place(name, links, _wireguard(tools, links, *prefix) if asks else ()))
    return tuple(out)
