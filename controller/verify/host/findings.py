"""What a check answers, and what it is asked about. Imports model, compile, facts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from ipaddress import ip_network
from itertools import permutations

from controller.compile import planned_ports
from controller.frame import LOCAL_NAME
from controller.model import DesiredState, Network
from controller.verify.host.facts import Facts, Gap, IpNetwork, Link, OvsBridge

_DEFAULT_DBS = ("", "unix:/var/run/openvswitch/db.sock", "unix:/run/openvswitch/db.sock")


class Status(StrEnum):
    """What a check found."""

    OK = "ok"
    BAD = "BAD"
    UNKNOWN = "unknown"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at and what was seen. `mend` are commands for a shell that put it right as they stand;
    `advice` says what no command can know."""

    check: str
    status: Status
    seen: str
    mend: tuple[str, ...] = ()
    advice: str = ""

    def as_dict(self) -> dict[str, object]:
        """The finding as plain JSON values."""
        return {
            "check": self.check,
            "status": str(self.status),
            "seen": self.seen,
            "mend": list(self.mend),
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Subject:
    """A host to judge: what is known of it, and what it should be, if that was told. `controllers` are the targets that
    bridges may have."""

    facts: Facts
    state: DesiredState | None
    controllers: tuple[str, ...]

    @cached_property
    def bridges(self) -> tuple[OvsBridge, ...]:
        """OVS's bridges that are declared; all of them where nothing is."""
        ovs = self.facts.ovs
        if isinstance(ovs, Gap):
            return ()
        return tuple(b for b in ovs.bridges if self.state is None or self.state.bridge(b.name) is not None)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The bridges to judge, there or not."""
        return tuple(b.name for b in (self.bridges if self.state is None else self.state.bridges))

    @property
    def networks(self) -> tuple[Network, ...]:
        """The declared networks."""
        return self.state.networks if self.state is not None else ()

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """Interfaces of the kernel that the bridges use: their own, and their ports."""
        ports = [i.name for b in self.bridges for i in b.interfaces if i.type != "patch"]
        return tuple(dict.fromkeys([*self.names, *ports]))

    @cached_property
    def links(self) -> dict[str, Link]:
        """The kernel's interfaces by name; none if they are not known."""
        links = self.facts.links
        return {} if isinstance(links, Gap) else {link.name: link for link in links}

    @cached_property
    def owners(self) -> dict[str, str]:
        """Which network a bridge or a port of a bridge belongs to, as declared or as it is."""
        out: dict[str, str] = {}
        for bridge in self.state.bridges if self.state is not None else ():
            held = [i.name for b in self.bridges if b.name == bridge.name for i in b.interfaces]
            for name in (bridge.name, *self.planned(bridge.name), *held):
                out.setdefault(name, bridge.network)
        return out

    def planned(self, bridge: str) -> tuple[str, ...]:
        """The ports that a bridge is declared to have."""
        declared = self.state.bridge(bridge) if self.state is not None else None
        if self.state is None or declared is None:
            return ()
        return tuple(name for name in planned_ports(self.state, declared) if name != LOCAL_NAME)

    def sysctl(self, name: str) -> str:
        """A setting below /proc/sys/net; empty if there is none."""
        sysctls = self.facts.sysctls
        return "" if isinstance(sysctls, Gap) else sysctls.get(name, "")

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Bridges that must not reach each other through the host: where packets come up, and where they would go down."""
        every = permutations(self.names, 2)
        return [(a, b) for a, b in every if self.state is None or self.owners[a] != self.owners[b]]

    def vsctl(self, *words: str) -> str:
        """An ovs-vsctl command for the database that was asked."""
        db = "" if isinstance(self.facts.ovs, Gap) else self.facts.ovs.db
        return command("ovs-vsctl", *([] if db in _DEFAULT_DBS else [f"--db={db}"]), *words)


Check = Callable[[Subject], Iterable[Finding]]


def command(*words: str) -> str:
    """A command line for a shell."""
    return shlex.join(words)


def sysctl(*settings: str) -> str:
    """The command that sets these. Slashes, because an interface's name may have dots."""
    return command("sysctl", "-w", *settings)


def prefixes(network: Network) -> list[IpNetwork]:
    """All that belongs to a network."""
    return [ip_network(str(prefix)) for prefix in network.prefixes]


def bad(check: str, seen: str, *mend: str, advice: str = "") -> Finding:
    """What is not good, and how to put it right."""
    return Finding(check, Status.BAD, seen, mend, advice)


def told(check: str, found: Iterable[Finding], good: str, *gaps: object) -> list[Finding]:
    """What was found; else why that cannot be said; else that all is good."""
    known = list(found)
    missing = [finding for gap in gaps if isinstance(gap, Gap) for finding in unknown(check, gap)]
    return known + missing or [Finding(check, Status.OK, good)]


def unknown(check: str, gap: Gap, *, needed: bool = True) -> list[Finding]:
    """What is not known. A thing that is absent is only unknown where it is needed."""
    status = Status.ABSENT if gap.absent and not needed else Status.UNKNOWN
    return [Finding(check, status, gap.why, (), gap.mend)]


def no_file(check: str) -> list[Finding]:
    """A check that needs a declaration has none."""
    advice = "name one to have this checked: bulkhead verify FILE"
    return [Finding(check, Status.ABSENT, "no state FILE was given to compare with", (), advice)]


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names, but not too many."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def each_bridge(check: str, subject: Subject) -> list[Finding]:
    """Why the bridges, or some of them, cannot be judged."""
    ovs = subject.facts.ovs
    if isinstance(ovs, Gap):
        return unknown(check, ovs, needed=subject.state is not None)
    there = {bridge.name for bridge in ovs.bridges}
    missing = [name for name in subject.names if name not in there]
    if missing:
        mend = [
            subject.vsctl(
                "add-br", name, "--", "set", "bridge", name, "fail_mode=secure", "other-config:disable-in-band=true"
            )
            for name in missing
        ]
        return [Finding(check, Status.UNKNOWN, f"Open vSwitch has no bridge {listed(missing)}", tuple(mend))]
    if not there:
        return [Finding(check, Status.ABSENT, "Open vSwitch has no bridge")]
    return []


def over_bridges(
    check: str, subject: Subject, judged: Callable[[OvsBridge], Iterator[Finding]], good: str, *gaps: object
) -> list[Finding]:
    """What is found bridge by bridge."""
    if not subject.bridges:
        return each_bridge(check, subject)
    return told(check, [finding for bridge in subject.bridges for finding in judged(bridge)], good, *gaps)


def owned(subject: Subject, names: Sequence[str]) -> str:
    """Devices with the networks they belong to, for people."""
    return listed(f"{name} ({subject.owners[name]})" if name in subject.owners else name for name in names)
