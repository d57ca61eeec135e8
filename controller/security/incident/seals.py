"""Seals: servers and networks that are cut off by a firewall table of their own, by WireGuard, and by closed ports.

What is sealed is on the disk first, then in the kernel; every step can be done again, so that a seal that was interrupted is
completed by `resume`. The table `inet bulkhead_seal` is always made from all seals that are in force. Imports problems, disk.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from pathlib import Path
from typing import Any

from controller.problems import BulkheadError
from controller.security.incident.evidence import Collection
from controller.security.pki.disk import Disk, locked, read

TABLE = "bulkhead_seal"
PRIORITY = -310
"""Before connection tracking and everybody's address translation: connections that are open end too."""
COMMAND_S = 10
_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{8}")

Ports = Callable[[str, str, bool], str]
"""Closes or opens the ports of a network at the controller: (network, seal's id, closed); what went wrong, or nothing."""


@dataclass(frozen=True, slots=True)
class Target:
    """Who is cut off. `kind` is `server` or `network`; `prefixes` are all addresses it has."""

    kind: str
    name: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Peer:
    """A WireGuard peer as it was, to have it back. Its pre-shared key is kept apart."""

    interface: str
    key: str
    allowed: tuple[str, ...]
    endpoint: str
    keepalive: str


@dataclass(frozen=True, slots=True)
class Seal:
    """A seal. `phase`: begun, cut, sealed; unsealing, unsealed. `cut_after_s` is how long the cut took from the command."""

    id: str
    phase: str
    reason: str
    at: str
    targets: tuple[Target, ...]
    peers: tuple[Peer, ...] = ()
    cut_after_s: float | None = None
    evidence_sha256: str = ""
    notes: tuple[str, ...] = ()

    @property
    def in_force(self) -> bool:
        """Whether its targets have to be cut off."""
        return self.phase in ("begun", "cut", "sealed")

    @classmethod
    def from_json(cls, text: bytes) -> Seal:
        """What was written. Raises `ValueError` and the like."""
        data: dict[str, Any] = json.loads(text)
        data["targets"] = tuple(Target(t["kind"], t["name"], tuple(t["prefixes"])) for t in data["targets"])
        data["peers"] = tuple(Peer(**{**p, "allowed": tuple(p["allowed"])}) for p in data["peers"])
        return cls(**{**data, "notes": tuple(data["notes"])})


class Seals:
    """The seals of a machine, in a directory. `disk` may count steps; `ports` asks the controller."""

    def __init__(
        self,
        directory: Path,
        disk: Disk | None = None,
        ports: Ports | None = None,
        step: Callable[[str], None] = lambda _what: None,
    ):
        self.directory = directory
        self._disk = disk or Disk(step)
        self._ports = ports or (lambda _network, _id, _closed: "")
        self._step = step

    def all(self) -> list[Seal]:
        """Every seal, the oldest first. Raises `BulkheadError`."""
        found, damaged = self._read()
        if damaged:
            raise BulkheadError(damaged)
        return found

    def _read(self) -> tuple[list[Seal], str]:
        """Every seal that can be read, and what is wrong with one that cannot."""
        found, damaged = [], ""
        for path in sorted(self.directory.glob("*/seal.json")):
            if not _ID.fullmatch(path.parent.name):
                continue
            try:
                found.append(Seal.from_json(read(path) or b""))
            except (ValueError, KeyError, TypeError) as exc:
                damaged = f"{path} is damaged ({exc}); the cut stays; mend or move it, then try again"
        return found, damaged

    def get(self, seal_id: str) -> Seal:
        """The seal of that id, whole. Raises `BulkheadError`."""
        for seal in self.all():
            if secrets.compare_digest(seal.id.encode(), seal_id.encode()):
                return seal
        raise BulkheadError(f"there is no seal {seal_id}; see: bulkhead incident status")

    def seal(self, targets: Iterable[Target], reason: str, collection: Collection) -> Seal:
        """Cut off at once; evidence has a head start of less than a second. Raises `BulkheadError`."""
        began = time.monotonic()
        collection.begin()
        now = dt.datetime.now(dt.UTC)
        new = Seal(f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}", "begun", reason, now.isoformat(), tuple(targets))
        if not new.targets:
            raise BulkheadError("nothing to seal; name a server or a network")
        for target in new.targets:
            for prefix in target.prefixes:
                ip_network(prefix)
        self._disk.directory(self.directory)
        with locked(self.directory):
            self._disk.directory(self.directory / new.id)
            self._write(new)
            return self._complete(new, collection, began)

    def resume(self, seal_id: str, collection: Collection) -> Seal:
        """Complete what was interrupted; nothing changes if nothing was. Raises `BulkheadError`."""
        self.get(seal_id)
        with locked(self.directory):
            seal = self.get(seal_id)
            if seal.phase == "unsealing":
                return self._opened(seal)
            self._load()
            if seal.phase in ("sealed", "unsealed"):
                return seal
            collection.begin()
            return self._complete(seal, collection, time.monotonic())

    def _complete(self, seal: Seal, collection: Collection, began: float) -> Seal:
        if seal.phase == "begun":
            collection.head_start(max(0.0, 0.8 - (time.monotonic() - began)))
            self._load()
            self._step("the firewall has cut")
            collection.cut_at = time.time()
            took = round(time.monotonic() - began, 3)
            seal = replace(seal, peers=tuple({p.key: p for p in (*seal.peers, *self._peers_of(seal))}.values()))
            self._keep_shared_keys(seal)
            seal = replace(seal, phase="cut", cut_after_s=took)
            self._write(seal)
        for peer in seal.peers:
            _call("wg", "set", peer.interface, "peer", peer.key, "remove")
            self._step("a peer is removed")
        notes = [self._ports(t.name, seal.id, True) for t in seal.targets if t.kind == "network"]
        data = collection.archive()
        self._disk.write(self.directory / seal.id / "evidence.tar.gz", data)
        done = replace(
            seal,
            phase="sealed",
            evidence_sha256=hashlib.sha256(data).hexdigest(),
            notes=tuple(note for note in notes if note),
        )
        self._write(done)
        return done

    def unseal(self, seal_id: str) -> Seal:
        """Let in again what that seal cut off, unless another one does too. Raises `BulkheadError`."""
        self.get(seal_id)
        with locked(self.directory):
            seal = self.get(seal_id)
            if seal.phase == "unsealed":
                return seal
            if seal.phase in ("begun", "cut"):
                raise BulkheadError(f"seal {seal.id} was interrupted; complete it: bulkhead incident resume {seal.id}")
            return self._opened(seal)

    def _opened(self, seal: Seal) -> Seal:
        seal = replace(seal, phase="unsealing")
        self._write(seal)
        shared = json.loads(read(self.directory / seal.id / "shared-keys.json") or b"{}")
        for peer in seal.peers:
            words = ["wg", "set", peer.interface, "peer", peer.key, "allowed-ips", ",".join(peer.allowed)]
            words += ["endpoint", peer.endpoint] if peer.endpoint not in ("", "(none)") else []
            words += ["persistent-keepalive", peer.keepalive] if peer.keepalive else []
            key = shared.get(peer.key)
            _call(*words, *(["preshared-key", "/dev/stdin"] if key else []), text=key)
            self._step("a peer is back")
        self._load()
        self._step("the firewall lets in")
        held = {t.name for other in self.all() if other.in_force for t in other.targets if t.kind == "network"}
        mine = [t.name for t in seal.targets if t.kind == "network" and t.name not in held]
        notes = [self._ports(name, seal.id, False) for name in mine]
        done = replace(seal, phase="unsealed", notes=tuple(note for note in notes if note))
        self._write(done)
        return done

    def enforce(self) -> None:
        """Load the table that all seals in force ask for, in one step. Raises `BulkheadError`.

        Not while another command seals: what was read before would undo its cut. Where a seal cannot be read, a cut that is
        there stays; where there is none, after a start of the host, say, what can be read is cut off.
        """
        with locked(self.directory) if self.directory.is_dir() else nullcontext():
            found, damaged = self._read()
            if not damaged or TABLE not in _call("nft", "list", "tables", "inet").split():
                _call("nft", "-f", "-", text=table(found))
            if damaged:
                raise BulkheadError(damaged)

    def _load(self) -> None:
        _call("nft", "-f", "-", text=table(self.all()))

    def not_enforced(self) -> list[str]:
        """Prefixes that have to be cut off and are not. Raises `BulkheadError`."""
        wanted = _prefixes(self.all())
        if not wanted:
            return []
        try:
            printed = json.loads(_call("nft", "-j", "list", "table", "inet", TABLE))
        except BulkheadError:
            return wanted
        rules = [item["rule"] for item in printed["nftables"] if "rule" in item]
        if sum({"drop": None} in rule["expr"] for rule in rules) < 8:
            return wanted
        held = {
            f"{one['prefix']['addr']}/{one['prefix']['len']}" if isinstance(one, dict) and "prefix" in one else str(one)
            for item in printed["nftables"]
            for one in item.get("set", {}).get("elem", ())
        }
        full = {str(ip_network(one)) for one in held if "-" not in one and "range" not in one}
        return [prefix for prefix in wanted if prefix not in full]

    def _peers_of(self, seal: Seal) -> list[Peer]:
        """The WireGuard peers that may use an address of a server that is sealed."""
        sealed = [ip_network(p) for t in seal.targets if t.kind == "server" for p in t.prefixes]
        table: dict[tuple[str, str], dict[str, str]] = {}
        for interface in _interfaces():
            for what in ("allowed-ips", "endpoints", "persistent-keepalive"):
                for key, _, rest in (
                    line.partition("\t") for line in _call("wg", "show", interface, what).splitlines()
                ):
                    table.setdefault((interface, key), {})[what] = rest
        out = []
        for (interface, key), row in table.items():
            allowed = tuple(part for part in row.get("allowed-ips", "").split() if part != "(none)")
            nets = [ip_network(part, strict=False) for part in allowed]
            # A peer that also speaks for others is left: the firewall cuts the addresses that are sealed.
            if nets and all(any(n.version == s.version and n.subnet_of(s) for s in sealed) for n in nets):  # type: ignore[arg-type]
                keepalive = row.get("persistent-keepalive", "off")
                out.append(
                    Peer(interface, key, allowed, row.get("endpoints", ""), "" if keepalive == "off" else keepalive)
                )
        return out

    def _keep_shared_keys(self, seal: Seal) -> None:
        path = self.directory / seal.id / "shared-keys.json"
        if not seal.peers or path.exists():
            return
        kept: dict[str, str] = {}
        for interface in sorted({peer.interface for peer in seal.peers}):
            lines = (line.split("\t") for line in _call("wg", "show", interface, "preshared-keys").splitlines())
            mine = {peer.key for peer in seal.peers if peer.interface == interface}
            kept |= {key: shared for key, shared in lines if key in mine and shared != "(none)"}
        self._disk.write(path, json.dumps(kept).encode())

    def _write(self, seal: Seal) -> None:
        self._disk.write(self.directory / seal.id / "seal.json", json.dumps(asdict(seal), indent=1).encode())


def _prefixes(seals: Iterable[Seal]) -> list[str]:
    every = [ip_network(p) for s in seals if s.in_force for t in s.targets for p in t.prefixes]
    four = collapse_addresses(one for one in every if isinstance(one, IPv4Network))
    six = collapse_addresses(one for one in every if isinstance(one, IPv6Network))
    return [*map(str, four), *map(str, six)]


def table(seals: Iterable[Seal]) -> str:
    """What nft loads in one transaction: nothing of ours where nothing is sealed."""
    prefixes = _prefixes(seals)
    head = f"table inet {TABLE} {{}}\ndelete table inet {TABLE}\n"
    if not prefixes:
        return head
    sets, rules = "", ""
    for family, name in (("ip", "v4"), ("ip6", "v6")):
        mine = [p for p in prefixes if (":" in p) == (family == "ip6")]
        elements = f" elements = {{ {', '.join(mine)} }};" if mine else ""
        kind = "ipv4_addr" if family == "ip" else "ipv6_addr"
        sets += f" set {name} {{ type {kind}; flags interval;{elements} }}\n"
        rules += f"  {family} saddr @{name} drop\n  {family} daddr @{name} drop\n"
    chains = "".join(
        f" chain {hook} {{\n  type filter hook {hook} priority {priority}; policy accept;\n{rules} }}\n"
        for hook, priority in (("prerouting", PRIORITY), ("postrouting", -PRIORITY))
    )
    return f"{head}table inet {TABLE} {{\n{sets}{chains}}}\n"


def _interfaces() -> list[str]:
    """The WireGuard interfaces of our network namespace: wireguard-go's are listed wherever they are."""
    try:
        listed = _call("wg", "show", "interfaces").split()
    except BulkheadError:
        return []  # no WireGuard on this host: the firewall has cut
    here = {name for _index, name in socket.if_nameindex()}
    return [name for name in listed if name in here]


def _call(*command: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=text or "", capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BulkheadError(f"{command[0]} cannot be run ({exc}); install it, and run this as root") from exc
    if done.returncode:
        raise BulkheadError(f"{command[0]} {command[1]} failed: {done.stderr.strip()[:200]}; run this as root")
    return done.stdout
