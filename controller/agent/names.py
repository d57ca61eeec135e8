"""The names of a network: what its resolver answers, as files for dnsmasq, and the resolver itself.

A name of one network does not exist in another but while a grant leads there, and neither is ever asked of an upstream. What changes with containers
is in a hosts file that dnsmasq reads again by itself; services and upstreams need a new start. Imports files, netns,
resource, run, runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from controller.agent.files import open_way, read_or_none, write_atomically
from controller.agent.netns import in_namespace
from controller.agent.resource import Change, Failed, Sign
from controller.agent.run import NETNS_DIR, PREFIX
from controller.agent.runner import Runner
from controller.grants import Opening, openings
from controller.hostmodel import HostState, Zone
from controller.model import DesiredState, Ipv4, Member, Network, Prefix

PORT = 53
CACHED = 1000
READY_S = 3.0
"""So long may the resolver take until it listens."""
GATEWAY = "gateway"


# The files.


def reverse_zones(prefix: Prefix) -> list[str]:
    """The zones of in-addr.arpa that cover a prefix and nothing else. At most 128: names end at octets."""
    octets = max(1, (prefix.length + 7) // 8)
    step = 1 << (32 - 8 * octets)
    first = prefix.address & ~(step - 1)
    count = 1 << (8 * octets - prefix.length)
    return [_reversed(Ipv4(first + index * step), octets) for index in range(count)]


def _reversed(address: Ipv4, octets: int) -> str:
    return ".".join(reversed(str(address).split(".")[:octets])) + ".in-addr.arpa"


def _serving(network: Network, host: HostState) -> Iterator[Member]:
    """Members whose services are there: those of a container that is stopped on purpose are not."""
    stopped = {container.id for container in host.containers if not container.running}
    return (member for member in network.members if member.id not in stopped)


def dnsmasq_hosts(state: DesiredState, host: HostState, zone: Zone) -> str:
    """The hosts file: every member by its name, with and without the domain, and services and the gateway by theirs.

    A name is a container's before it is a service's, and a service's before it is the gateway's. The first line of an
    address is what asking for the address answers.
    """
    network = state.network(zone.network)
    lines = [_line(member.address, f"{member.name}.{zone.domain}", member.name) for member in network.members]
    taken = {member.name.lower() for member in network.members}
    offered: dict[str, dict[Ipv4, None]] = {}
    for member in _serving(network, host):
        for service in member.services:
            if service.name.lower() not in taken:
                offered.setdefault(service.name.lower(), {})[member.address] = None
    for name, addresses in offered.items():
        lines += (_line(address, f"{name}.{zone.domain}") for address in addresses)
    if GATEWAY not in taken | offered.keys():
        lines.append(_line(network.gateway, f"{GATEWAY}.{zone.domain}"))
    lines += dict.fromkeys(_line(o.target.address, name) for o, name in _granted(state, host, zone))
    return "".join(lines)


def _granted(state: DesiredState, host: HostState, zone: Zone) -> Iterator[tuple[Opening, str]]:
    """What grants open from this network, each with the full name of its target. Its other names stay unknown here."""
    domains = {other.network: other.domain for other in host.zones}
    for opening in openings(state):
        if opening.source_network == zone.network and opening.target_network in domains:
            yield opening, f"{opening.target.name}.{domains[opening.target_network]}"


def _line(address: Ipv4, *names: str) -> str:
    fitting = [name.lower() for name in names if _fits(name)]
    return f"{address} {' '.join(fitting)}\n" if fitting else ""


def _fits(name: str) -> bool:
    """Whether DNS has room for a name: dnsmasq does not start with one that is too long."""
    return len(name) <= 253 and all(len(label) <= 63 for label in name.split("."))


def dnsmasq_conf(state: DesiredState, host: HostState, zone: Zone, hosts_dir: Path) -> str:
    """The configuration file. Whatever is not answered from here goes to the upstreams, or does not exist."""
    network = state.network(zone.network)
    others = [other for other in state.networks if other.name != network.name]
    domains = [zone.domain, *(other.domain for other in host.zones if other.network != zone.network)]
    prefixes = [*network.prefixes, *(prefix for other in others for prefix in other.prefixes)]
    local = domains + [name for prefix in prefixes for name in reverse_zones(prefix)]
    lines = [
        "# Written by bulkhead, and again when it is changed.",
        "keep-in-foreground",
        "log-facility=-",
        "pid-file=",
        "user=nobody",
        "bind-interfaces",
        f"listen-address={zone.address}",
        f"port={PORT}",
        "no-resolv",
        "no-hosts",
        "no-poll",
        f"hostsdir={hosts_dir}",
        "domain-needed",
        "bogus-priv",
        "stop-dns-rebind",
        "edns-packet-max=1232",
        f"cache-size={CACHED}",
        *(f"local=/{name.lower()}/" for name in dict.fromkeys(local)),
        *(_services(network, host, zone)),
        *dict.fromkeys(_granted_services(state, host, zone)),
        *(f"server={address}" for address in zone.upstream),
        *([] if zone.upstream else ["address=/#/"]),  # nobody to ask: it does not exist
    ]
    return "\n".join(lines) + "\n"


def _services(network: Network, host: HostState, zone: Zone) -> Iterator[str]:
    for member in _serving(network, host):
        target = f"{member.name}.{zone.domain}"
        for service in member.services:
            for owner in (target, zone.domain):
                name = f"_{service.name}._{service.protocol}.{owner}"
                if _fits(name) and _fits(target):
                    yield f"srv-host={name},{target},{service.port}".lower()


def _granted_services(state: DesiredState, host: HostState, zone: Zone) -> Iterator[str]:
    for opening, target in _granted(state, host, zone):
        serving = {member.id for member in _serving(state.network(opening.target_network), host)}
        for service in opening.target.services if opening.target.id in serving else ():
            name = f"_{service.name}._{service.protocol}.{target}"
            if (service.protocol, service.port) == (opening.protocol, opening.port) and _fits(name) and _fits(target):
                yield f"srv-host={name},{target},{service.port}".lower()


# The resolver.


def conf_path(directory: Path, zone: Zone) -> Path:
    """Where the configuration of a zone's resolver is."""
    return directory / f"{zone.network}.conf"


def dnsmasq_command(directory: Path, zone: Zone) -> tuple[str, ...]:
    """The resolver's command line; it stays in the foreground. To be run in `namespace_of(zone)`."""
    return ("dnsmasq", f"--conf-file={conf_path(directory, zone)}")


def namespace_of(zone: Zone) -> str:
    """The network namespace of a zone's resolver."""
    return f"{PREFIX}{zone.member_id}"


class Names:
    """A network's names: the files in `directory`, and the resolver that runs with them and listens."""

    period = 1.0

    def __init__(
        self,
        state: DesiredState,
        host: HostState,
        zone: Zone,
        directory: Path,
        runner: Runner,
        *,
        needs: tuple[str, ...] = (),
    ) -> None:
        self._zone, self._directory, self._runner = zone, directory, runner
        self._conf_file = conf_path(directory, zone)
        self._hosts_file = directory / f"{zone.network}.hosts" / "hosts"
        self._conf = dnsmasq_conf(state, host, zone, self._hosts_file.parent)
        self._hosts = dnsmasq_hosts(state, host, zone)
        self.key = f"names/{zone.network}"
        self.needs = needs

    async def diff(self) -> list[Change]:
        what = f"of {self._zone.network} ({self._zone.domain})"
        why = self._why_stop()
        runs = await self._runner.runs()
        out = []
        if runs and why:
            out.append(Change(Sign.CHANGE, f"resolver {what}", why, self._runner.stop))
        if read_or_none(self._conf_file) != self._conf:
            out.append(Change(Sign.CHANGE, f"services and upstreams {what}", "not as declared", self._write_conf))
        if read_or_none(self._hosts_file) != self._hosts:
            out.append(Change(Sign.CHANGE, f"names {what}", "not as declared", self._write_hosts))
        if not runs or why:
            out.append(Change(Sign.ADD, f"resolver {what}", "it does not run" if not runs else why, self._start))
        return out

    def _why_stop(self) -> str:
        if read_or_none(self._conf_file) != self._conf:
            return "its configuration is not as declared"
        if not self._listens():
            return f"it does not listen on {self._zone.address} in {namespace_of(self._zone)}"
        return ""

    async def _write_conf(self) -> None:
        self._make_directories()
        write_atomically(self._conf_file, self._conf, 0o644)

    async def _write_hosts(self) -> None:
        self._make_directories()
        write_atomically(self._hosts_file, self._hosts, 0o644)

    def _make_directories(self) -> None:
        self._hosts_file.parent.mkdir(parents=True, exist_ok=True)
        for path in (self._directory, self._hosts_file.parent):
            path.chmod(0o755)  # it reads them as nobody

    async def _start(self) -> None:
        open_way(self._hosts_file.parent, ours=3)
        await self._runner.start()
        deadline = asyncio.get_running_loop().time() + READY_S
        while not self._listens():
            if asyncio.get_running_loop().time() > deadline or not await self._runner.runs():
                raise Failed(
                    f"the resolver of {self._zone.network} does not listen on {self._zone.address}; "
                    f"to see why: dnsmasq --test --conf-file={self._conf_file}, and its log"
                )
            await asyncio.sleep(0.01)

    def _listens(self) -> bool:
        """Whether somebody listens on its address, in the namespace that is called so now."""
        native = struct.unpack("=I", socket.inet_aton(str(self._zone.address)))[0]
        wanted = f"{native:08X}:{PORT:04X}"
        with contextlib.suppress(Failed):
            table = in_namespace(NETNS_DIR / namespace_of(self._zone), _udp_sockets)
            return any(line.split()[1] == wanted for line in table.splitlines()[1:])
        return False


def _udp_sockets() -> str:
    return Path("/proc/thread-self/net/udp").read_text()
