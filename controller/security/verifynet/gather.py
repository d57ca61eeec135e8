"""Looks at this machine: tools, files, certificates, and real connections. Changes nothing that stays; never reads a key.

Root sees all of it. Imports asked, seen, probe, units, pki, tls and the host's tools.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import grp
import hashlib
import json
import os
import pwd
import re
import socket
import ssl
import stat
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives import hashes

from controller.problems import BulkheadError
from controller.security import tls, units
from controller.security.pki import Holder
from controller.security.pki.report import Check, checks
from controller.security.profile import WG_INTERFACE, WG_INTERFACES
from controller.security.verifynet import probe
from controller.security.verifynet.asked import Asked
from controller.security.verifynet.seen import KeyFile, Listener, Outcome, Probe, Seen, SocketFile, Tls, Wg, WgPeer
from controller.verify.host.facts import Gap
from controller.verify.host.tools import Host

T = TypeVar("T")
CONNECT_S = 2.0
WELL_KNOWN_TCP = (
    21,
    23,
    25,
    53,
    80,
    111,
    139,
    443,
    445,
    2375,
    3306,
    5432,
    6379,
    6640,
    6653,
    8000,
    8001,
    8080,
    8443,
    9090,
)
WELL_KNOWN_UDP = (53, 67, 69, 111, 123, 161, 500, 1900, 5353, 51820)
SUITES = (
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_128_CCM_SHA256",
    "TLS_AES_128_CCM_8_SHA256",
)
_OLD = {"TLS 1.0": ssl.TLSVersion.TLSv1, "TLS 1.1": ssl.TLSVersion.TLSv1_1, "TLS 1.2": ssl.TLSVersion.TLSv1_2}


def gather(asked: Asked, security_dir: Path, root: Path, rules: str | Gap) -> Seen:
    """Look at everything, at once. `root` is where systemd's files are; `rules` is the firewall's first difference, which
    the caller knows how to find."""
    listeners = _listeners()
    addresses = _addresses()
    wg = _wg(asked, addresses) if asked.role != "dev" else None
    with ThreadPoolExecutor(max_workers=8) as pool:
        probes = pool.submit(_probes, asked, listeners, addresses)
        certificates = pool.submit(_certificates, asked, security_dir / "pki")
        served = pool.submit(_tls, asked, security_dir / "pki")
        upstreams = pool.submit(_upstreams, asked, security_dir / "pki")
        return Seen(
            rules=rules,
            listeners=listeners,
            probes=probes.result(),
            addresses=addresses,
            users={one.pw_name: one.pw_shell for one in pwd.getpwall()},
            units=_units(asked, root),
            timers=_timers(root),
            asleep=_asleep(asked, root),
            socket=_socket(asked.socket) if asked.role == "dev" else None,
            wg=wg,
            keys=_keys(security_dir / "wg") if asked.role != "dev" else (),
            certificates=certificates.result(),
            ca_days=_ca_days(security_dir / "pki"),
            tls=served.result(),
            upstreams=upstreams.result(),
        )


def _listeners() -> tuple[Listener, ...] | Gap:
    printed = Host().run("ss", "-Hltune")
    return printed if isinstance(printed, Gap) else read_listeners(printed)


def read_listeners(text: str) -> tuple[Listener, ...]:
    """What `ss -Hltune` prints. It names no user where that is root."""
    out = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 5:
            continue
        address, _, port = words[4].rpartition(":")
        uid = re.search(r"\buid:(\d+)", line)
        plain = address.strip("[]").partition("%")[0]
        out.append(Listener(words[0], "::" if plain == "*" else plain, int(port), _user(int(uid[1]) if uid else 0)))
    return tuple(out)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _addresses() -> Mapping[str, tuple[str, ...]] | Gap:
    printed = Host().run("ip", "-j", "address", "show")
    if isinstance(printed, Gap):
        return printed
    return {
        link["ifname"]: tuple(f"{one['local']}/{one['prefixlen']}" for one in link.get("addr_info", ()))
        for link in json.loads(printed)
        if link.get("ifname") and not link["ifname"].startswith("bhp")
    }


def _probes(
    asked: Asked, listeners: tuple[Listener, ...] | Gap, addresses: Mapping[str, tuple[str, ...]] | Gap
) -> tuple[Probe, ...] | Gap:
    if os.geteuid() != 0:
        return Gap("ports can be probed from another namespace by root only", "run this as root")
    there = () if isinstance(listeners, Gap) else listeners
    try:
        with probe.neighbour() as (pid, ours, ours6):
            if not ours6 and _speaks_ipv6(addresses):
                return Gap(
                    "a new device gets no IPv6, though others have it", "sysctl net.ipv6.conf.default.disable_ipv6=0"
                )
            wanted = sorted({key for address in filter(None, (ours, ours6)) for key in _ports(asked, there, address)})
            # What is bound to one address is tried at that one.
            bound = {(one.protocol, one.address, one.port) for one in there if _is_reachable(one.address)}
            found = probe.tried(pid, [*wanted, *sorted(bound)])
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        said = getattr(exc, "stderr", None) or exc
        return Gap(f"no probe could be made: {str(said).strip()[:200]}", "install util-linux and iproute2; run as root")
    return tuple(Probe(protocol, address, port, Outcome(outcome)) for protocol, address, port, outcome in found)


def _speaks_ipv6(addresses: Mapping[str, tuple[str, ...]] | Gap) -> bool:
    """Whether strangers may reach this machine by IPv6; yes if that is not known."""
    if isinstance(addresses, Gap):
        return True
    return any(":" in address for device, every in addresses.items() if device != "lo" for address in every)


def _ports(asked: Asked, listeners: tuple[Listener, ...], address: str) -> set[tuple[str, str, int]]:
    mine = {(one.protocol, one.port) for one in listeners}
    tcp = {*WELL_KNOWN_TCP, *asked.tcp, asked.inference_port, *(port for kind, port in mine if kind == "tcp")}
    udp = {*WELL_KNOWN_UDP, *(port for kind, port in mine if kind == "udp")}
    return {("tcp", address, port) for port in tcp} | {("udp", address, port) for port in udp}


def _is_reachable(address: str) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    return not (found.is_unspecified or found.is_loopback or found.is_multicast or found.is_link_local)


def _socket(path: Path) -> SocketFile | None:
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        return None
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    return SocketFile(stat.S_IMODE(found.st_mode), _user(found.st_uid), group)


_PARTS = {"dev": ("router", "inference"), "router": ("router", "wg"), "inference": ("inference", "wg")}
"""What runs on a machine of a role, beside its firewall."""


def _units(asked: Asked, root: Path) -> dict[str, tuple[str, ...]]:
    names = (*_PARTS[asked.role], "firewall", "chores@")
    return {
        units.service_name(unit): differing(root / "etc/systemd/system" / units.service_name(unit), unit)
        for unit in units.UNITS
        if unit.name in names
    }


def _asleep(asked: Asked, root: Path) -> tuple[str, ...]:
    """What does not start with the host. The agent loads the firewall too."""
    wanted = root / "etc/systemd/system/multi-user.target.wants"
    enabled = {path.name for path in wanted.iterdir()} if wanted.is_dir() else set()
    names = [f"bulkhead-{name}.service" for name in _PARTS[asked.role]]
    if "bulkhead-agent.service" not in enabled:
        names.insert(0, "bulkhead-firewall.service")
    return tuple(name for name in names if name not in enabled)


def differing(path: Path, unit: units.Unit) -> tuple[str, ...]:
    """How a unit as it is, with its drop-ins, is less hardened than it should be."""
    if not path.is_file():
        return (f"{path} is not there",)
    wanted = _settings(units.service(unit, "bulkhead"))
    found: dict[str, list[str]] = {}
    for part in (path, *_drop_ins(path)):
        try:
            found.update(_settings(part.read_text()))
        except OSError as exc:
            return (f"{part} cannot be read: {exc.strerror}",)
    keys = ("User", "SupplementaryGroups", *units.HARDENED)
    return tuple(
        f"{key} is {' '.join(found.get(key, ['not set']))}"
        for key in keys
        if key in wanted and found.get(key) != wanted[key]
    )


def _drop_ins(path: Path) -> list[Path]:
    """The drop-ins of a unit in /etc and /run, those of its prefix and of all services too, as systemd.unit(5) has them; one
    of the same name in /etc takes the place of the one in /run."""
    root, stem = path.parents[3], path.name.removesuffix(".service")
    kinds = [f"{path.name}.d", "service.d"]
    kinds += [f"{stem[: end + 1]}.service.d" for end, letter in enumerate(stem) if letter == "-"]
    kinds += [f"{stem}{chore.name}.service.d" for chore in units.CHORES if stem.endswith("@")]
    found: dict[str, Path] = {}
    for base in ("run", "etc"):
        for kind in kinds:
            found |= {each.name: each for each in (root / base / "systemd/system" / kind).glob("*.conf")}
    return [found[name] for name in sorted(found)]


def _settings(text: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, sign, value = line.partition("=")
        if sign and not line.startswith(("#", ";")):
            out.setdefault(key.strip(), []).append(value.strip())
    return out


def _timers(root: Path) -> tuple[str, ...]:
    names = [f"bulkhead-{chore.name}.timer" for chore in units.CHORES]
    return tuple(name for name in names if not os.path.lexists(root / "etc/systemd/system/timers.target.wants" / name))


def _wg(asked: Asked, addresses: Mapping[str, tuple[str, ...]] | Gap) -> Wg | None | Gap:
    if isinstance(addresses, Gap):
        return addresses
    named = [d for d, every in addresses.items() if any(a.split("/")[0] == str(asked.address) for a in every)]
    known = Host().run("wg", "show", "interfaces")
    if isinstance(known, Gap):
        return known
    both = [device for device in named if device in known.split()]
    if not both:
        return None
    device = min(both, key=lambda name: name != WG_INTERFACE)
    # While a key is replaced there are two, and a peer is heard by either.
    devices = [
        device,
        *(name for name in WG_INTERFACES if name != device and name in addresses and name in known.split()),
    ]
    rows = [_wg_rows(name) for name in devices]
    if gaps := [row for row in rows if isinstance(row, Gap)]:
        return gaps[0]
    every = [row for row in rows if not isinstance(row, Gap)]
    heard: dict[str, int] = {}
    for row in every:
        for key, at in row["latest-handshakes"].items():
            allowed = row["allowed-ips"].get(key, key)
            heard[allowed] = max(heard.get(allowed, 0), int(at))
    peers = {key: _wg_peer(key, row, heard) for row in reversed(every) for key in row["peers"]}
    link = Host().run("ip", "-j", "link", "show", "dev", device)
    mtu = 0 if isinstance(link, Gap) else int(json.loads(link)[0]["mtu"])
    listen = int(next(iter(every[0]["listen-port"]), "0"))
    return Wg(device, addresses[device], mtu, listen, tuple(peers.values()))


def _wg_rows(device: str) -> dict[str, dict[str, str]] | Gap:
    """What `wg show` says of an interface: for each question, values by key of a peer."""
    rows: dict[str, dict[str, str]] = {}
    # One question for each, and never `dump`, which prints keys that are secret.
    for what in ("peers", "allowed-ips", "latest-handshakes", "persistent-keepalive", "listen-port"):
        text = Host().run("wg", "show", device, what)
        if isinstance(text, Gap):
            return text
        rows[what] = {key: rest for key, _, rest in (line.partition("\t") for line in text.splitlines())}
    return rows


def _wg_peer(key: str, row: dict[str, dict[str, str]], heard: Mapping[str, int]) -> WgPeer:
    allowed = row["allowed-ips"].get(key, "")
    at, every = heard.get(allowed or key, 0), row["persistent-keepalive"].get(key, "off")
    return WgPeer(
        key,
        tuple(part for part in allowed.split() if part != "(none)"),
        max(0, int(time.time()) - at) if at else None,
        int(every) if every.isdecimal() else 0,
    )


def _keys(directory: Path) -> tuple[KeyFile, ...] | Gap:
    try:
        files = [
            path for path in directory.rglob("*") if path.is_file() and "key" in path.name and "pub" not in path.name
        ]
        found = tuple(_key(path, path.stat()) for path in sorted(files))
    except OSError as exc:
        return Gap(f"{directory} cannot be looked at: {exc.strerror}", "run this as root")
    return found or Gap(f"there is no key in {directory}", "bulkhead wg init FILE")


def _key(path: Path, found: os.stat_result) -> KeyFile:
    return KeyFile(str(path), stat.S_IMODE(found.st_mode), (time.time() - found.st_mtime) / 86400)


def _known(ask: Callable[[], T], mend: str) -> T | Gap:
    try:
        return ask()
    except (OSError, ValueError, BulkheadError) as exc:
        return Gap(str(exc), mend)


def _certificates(asked: Asked, pki: Path) -> tuple[Check, ...] | Gap:
    hosts = asked.names if asked.routes else (str(asked.address),)
    return _known(lambda: tuple(checks(pki, asked.name, hosts)), f"bulkhead pki issue {asked.name}")


def _ca_days(pki: Path) -> float | Gap:
    found = _known(lambda: Holder(pki).authorities(), "bulkhead pki init NAME")
    if isinstance(found, Gap):
        return found
    if not found:
        return Gap(f"no CA is trusted in {pki}", "bulkhead pki init NAME")
    return min((one.not_valid_after_utc - dt.datetime.now(dt.UTC)).total_seconds() / 86400 for one in found)


def _tls(asked: Asked, pki: Path) -> Tls | Gap:
    where = ("127.0.0.1", asked.listen) if asked.routes else (str(asked.address), asked.inference_port)
    try:
        socket.create_connection(where, CONNECT_S).close()
    except OSError as exc:
        return Gap(f"nothing answers on {where[0]} port {where[1]}: {exc.strerror or exc}", "start the service")
    old = tuple(name for name, version in _OLD.items() if _takes(where, version))
    with ThreadPoolExecutor(max_workers=len(SUITES)) as pool:
        taken = list(pool.map(lambda suite: _takes_suite(where, suite), SUITES))
    suites = tuple(suite for suite, yes in zip(SUITES, taken, strict=True) if yes)
    anonymous = _answers(where) if asked.role == "inference" else None
    shown = _shown(where)
    current = _known(lambda: Holder(pki).current(asked.name), "")
    wanted = "" if current is None or isinstance(current, Gap) else current.fingerprint(hashes.SHA256()).hex()
    return Tls(bool(shown), old, suites, anonymous, shown, wanted)


def _anybody(version: ssl.TLSVersion) -> ssl.SSLContext:
    """A context that takes every server: what is asked is what the server takes."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made.minimum_version = made.maximum_version = version
    with contextlib.suppress(ssl.SSLError):
        made.set_ciphers("ALL:@SECLEVEL=0")
    return made


def _takes(where: tuple[str, int], version: ssl.TLSVersion) -> bool:
    try:
        with socket.create_connection(where, CONNECT_S) as plain, _anybody(version).wrap_socket(plain):
            return True
    except (OSError, ValueError):
        return False


def _shown(where: tuple[str, int]) -> str:
    """The SHA-256 of the certificate that is shown in TLS 1.3; empty where that is not taken."""
    try:
        with (
            socket.create_connection(where, CONNECT_S) as plain,
            _anybody(ssl.TLSVersion.TLSv1_3).wrap_socket(plain) as secured,
        ):
            return hashlib.sha256(secured.getpeercert(binary_form=True) or b"").hexdigest()
    except (OSError, ValueError):
        return ""


def _answers(where: tuple[str, int]) -> bool:
    """Whether a server says anything to who shows no certificate: in TLS 1.3 a refusal comes after the handshake."""
    try:
        with (
            socket.create_connection(where, CONNECT_S) as plain,
            _anybody(ssl.TLSVersion.TLSv1_3).wrap_socket(plain) as secured,
        ):
            secured.sendall(b"GET /health HTTP/1.1\r\nHost: inference\r\nConnection: close\r\n\r\n")
            return bool(secured.recv(16))
    except OSError:
        return False


def _takes_suite(where: tuple[str, int], suite: str) -> bool:
    command = ["openssl", "s_client", "-connect", f"{where[0]}:{where[1]}", "-tls1_3", "-ciphersuites", suite]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return f"Cipher is {suite}" in done.stdout


def _upstreams(asked: Asked, pki: Path) -> dict[str, str]:
    if asked.role != "router":
        return {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        peers = list(pool.map(lambda peer: _upstream(asked, pki, str(peer.address)), asked.peers))
    return {peer.name: why for peer, why in zip(asked.peers, peers, strict=True)}


def _upstream(asked: Asked, pki: Path, address: str) -> str:
    try:
        made = tls.client_context(pki, asked.name)
        with (
            socket.create_connection((address, asked.inference_port), CONNECT_S) as plain,
            made.wrap_socket(plain, server_hostname=address) as secured,
        ):
            secured.sendall(b"GET /health HTTP/1.1\r\nHost: inference\r\nConnection: close\r\n\r\n")
            return "" if secured.recv(16) else "closed the connection"
    except (OSError, BulkheadError) as exc:
        return str(exc)
