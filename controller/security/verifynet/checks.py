"""The lines: each is one statement of the guide, judged from what was seen. Pure. Imports asked, seen and host findings.

A line that can only be bad because another one is says `unknown` and names that one, so that what is red is the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from controller.security.verifynet.asked import WG_PORT, Asked, overlapping
from controller.security.verifynet.seen import KeyFile, Outcome, Seen, Tls, Wg, WgPeer
from controller.verify.host.facts import Gap
from controller.verify.host.findings import Finding, Status, listed

HANDSHAKE_S = 300
"""With keep-alives a handshake is made every two minutes."""
KEEPALIVE_S = 25
KEY_DAYS = 180.0
CA_DAYS = 30.0
MTU = range(1280, 1421)
SOCKET_MODE = 0o660
GOOD_SUITES = frozenset({"TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"})

Answer = tuple[Iterable[str], str, str]
"""What is bad (nothing: all is good), what is said if all is good, and how to mend it."""


@dataclass(frozen=True, slots=True)
class Line:
    """A statement of the guide: for which roles, what else has to be good first, and how it is judged."""

    name: str
    roles: frozenset[str]
    judge: Callable[[Asked, Seen], Answer | Gap]
    needs: tuple[str, ...] = ()


_DEV, _ROUTER, _INFERENCE = "dev", "router", "inference"
_ALL = frozenset({_DEV, _ROUTER, _INFERENCE})
_ROUTERS = frozenset({_DEV, _ROUTER})
_WG = frozenset({_ROUTER, _INFERENCE})


def _rules(_asked: Asked, seen: Seen) -> Answer | Gap:
    if isinstance(seen.rules, Gap):
        return seen.rules
    return [seen.rules] if seen.rules else [], "the rules loaded are the rules wanted", "bulkhead firewall apply FILE"


def _closed(protocol: str) -> Callable[[Asked, Seen], Answer | Gap]:
    def judge(asked: Asked, seen: Seen) -> Answer | Gap:
        if isinstance(seen.probes, Gap):
            return seen.probes
        allowed = asked.tcp if protocol == "tcp" else asked.udp
        tried = [p for p in seen.probes if p.protocol == protocol and p.port not in allowed]
        there = sorted({(p.address, p.outcome) for p in tried if p.outcome is not Outcome.CLOSED})
        bad = []
        for address, outcome in there:
            ports = sorted(p.port for p in tried if (p.address, p.outcome) == (address, outcome))
            bad.append(f"{protocol} {listed(map(str, ports))} on {address}: {_WORDS[outcome]}")
        good = f"{len(tried)} probes from another namespace, none answered"
        return bad, good, "see who lets it through: nft list ruleset; then bulkhead firewall apply FILE"

    return judge


_WORDS = {Outcome.OPEN: "open", Outcome.REFUSED: "let through by the firewall, though nothing listens"}


def _open(asked: Asked, seen: Seen) -> Answer | Gap:
    if isinstance(seen.probes, Gap):
        return seen.probes
    tried = [p for p in seen.probes if p.protocol == "tcp" and p.port in asked.tcp]
    bad = [f"tcp {p.port} on {p.address} does not answer" for p in tried if p.outcome is Outcome.CLOSED]
    good = ", ".join(sorted({f"{p.port} {p.outcome}" for p in tried}))
    return bad, f"from another namespace: {good or 'nothing tried'}", "bulkhead firewall apply FILE"


def _network(asked: Asked, seen: Seen) -> Answer | Gap:
    if isinstance(seen.addresses, Gap):
        return seen.addresses
    bad = [f"{d} has {a}" for d, every in seen.addresses.items() for a in every if overlapping(asked, a)]
    return (
        bad,
        f"nothing else overlaps {asked.network}",
        "choose another security.network in the state file, everywhere",
    )


def _listening(port: Callable[[Asked], int], unit: str) -> Callable[[Asked, Seen], Answer | Gap]:
    def judge(asked: Asked, seen: Seen) -> Answer | Gap:
        if isinstance(seen.listeners, Gap):
            return seen.listeners
        there = sorted({one.address for one in seen.listeners if (one.protocol, one.port) == ("tcp", port(asked))})
        bad = [] if there else [f"nothing listens on tcp {port(asked)}"]
        return bad, f"tcp {port(asked)} on {', '.join(there)}", f"systemctl start {unit}"

    return judge


def _binding(asked: Asked, seen: Seen) -> Answer | Gap:
    if isinstance(seen.listeners, Gap):
        return seen.listeners
    right = {_DEV: ("127.0.0.1", "::1"), _ROUTER: (), _INFERENCE: (str(asked.address),)}[asked.role]
    there = [one for one in seen.listeners if (one.protocol, one.port) == ("tcp", asked.inference_port)]
    bad = [f"tcp {one.port} is bound to {one.address}" for one in there if one.address not in right]
    where = f"bound to {', '.join(sorted({one.address for one in there}))}" if there else "not bound"
    return (
        bad,
        f"tcp {asked.inference_port} is {where}",
        (f"let the inference server listen on {' or '.join(right) or 'its own machine'} only, and restart it"),
    )


def _owner(port: Callable[[Asked], int]) -> Callable[[Asked, Seen], Answer | Gap]:
    def judge(asked: Asked, seen: Seen) -> Answer | Gap:
        if isinstance(seen.listeners, Gap):
            return seen.listeners
        mine = [one for one in seen.listeners if (one.protocol, one.port) == ("tcp", port(asked))]
        if any(not one.user for one in mine):
            return Gap(f"whose process listens on tcp {port(asked)} is not known", "run this as root")
        users = sorted({one.user for one in mine})
        bad = [f"tcp {port(asked)} is served by root"] if "root" in users else []
        return bad, f"served by {', '.join(users) or 'nobody yet'}", "bulkhead units install, and start the unit"

    return judge


def _socket(asked: Asked, seen: Seen) -> Answer | Gap:
    bad = [] if seen.socket else [f"there is no socket {asked.socket}"]
    return bad, f"{asked.socket} is there", "systemctl start bulkhead-inference"


def _socket_mode(asked: Asked, seen: Seen) -> Answer | Gap:
    mode = seen.socket.mode if seen.socket else SOCKET_MODE
    return [f"{asked.socket} has mode {mode:o}"] if mode != SOCKET_MODE else [], "660", f"chmod 660 {asked.socket}"


def _socket_group(asked: Asked, seen: Seen) -> Answer | Gap:
    group = seen.socket.group if seen.socket else asked.group
    bad = [f"{asked.socket} belongs to group {group}"] if asked.group and group != asked.group else []
    return bad, group or "none", f"chgrp {asked.group} {asked.socket}"


def _users(asked: Asked, seen: Seen) -> Answer | Gap:
    wanted = {_DEV: ("router", "inference"), _ROUTER: ("router",), _INFERENCE: ("inference",)}[asked.role]
    bad = [f"there is no user {name}" for name in wanted if name not in seen.users]
    bad += [
        f"{name} may log in ({seen.users[name]})"
        for name in wanted
        if name in seen.users and Path(seen.users[name]).name not in ("nologin", "false")
    ]
    return bad, f"{', '.join(wanted)}: nobody logs in as them", "bulkhead units install; systemd-sysusers"


def _units(_asked: Asked, seen: Seen) -> Answer | Gap:
    bad = [f"{name}: {what}" for name, every in seen.units.items() for what in every]
    return bad, f"{', '.join(seen.units)}: as hardened as wanted", "bulkhead units install; systemctl daemon-reload"


def _timers(_asked: Asked, seen: Seen) -> Answer | Gap:
    mend = f"bulkhead units install; systemctl daemon-reload; systemctl enable --now {' '.join(seen.timers)}"
    return (
        [f"{name} is not enabled" for name in seen.timers],
        "the timers of minute, hour, week and month are enabled",
        mend,
    )


def _at_boot(_asked: Asked, seen: Seen) -> Answer | Gap:
    bad = [f"{name} does not start with the host" for name in seen.asleep]
    return bad, "all that belongs to the role is enabled", f"systemctl enable {' '.join(seen.asleep)}"


def _wg(judge: Callable[[Asked, Wg], Answer]) -> Callable[[Asked, Seen], Answer | Gap]:
    def judged(asked: Asked, seen: Seen) -> Answer | Gap:
        if isinstance(seen.wg, Gap):
            return seen.wg
        if seen.wg is None:
            return Gap("there is no WireGuard interface", "see the line wireguard interface")
        return judge(asked, seen.wg)

    return judged


def _wg_there(asked: Asked, seen: Seen) -> Answer | Gap:
    if isinstance(seen.wg, Gap):
        return seen.wg
    bad = [] if seen.wg else [f"no WireGuard interface has {asked.address}"]
    return bad, f"{seen.wg.interface if seen.wg else ''} has {asked.address}", "bulkhead wg init FILE"


def _wg_port(_asked: Asked, wg: Wg) -> Answer:
    bad = [] if wg.listen == WG_PORT else [f"{wg.interface} listens on udp {wg.listen}"]
    return bad, f"udp {wg.listen}", f"wg set {wg.interface} listen-port {WG_PORT}"


def _ours(asked: Asked, wg: Wg) -> list[WgPeer]:
    """The peers that are declared: by key, or by address where no key is told."""
    keys = {key for peer in asked.peers for key in peer.keys}
    loose = {f"{peer.address}/32" for peer in asked.peers if not peer.keys}
    return [peer for peer in wg.peers if peer.key in keys or loose & set(peer.allowed)]


def _wg_peers(asked: Asked, wg: Wg) -> Answer:
    ours = _ours(asked, wg)
    bad = [f"a peer that is not declared: {peer.key}" for peer in wg.peers if peer not in ours]
    for peer in asked.peers:
        if not any(p.key in peer.keys if peer.keys else f"{peer.address}/32" in p.allowed for p in ours):
            bad.append(f"{peer.name} is not a peer")
    return bad, f"the {len(ours)} declared", f"wg set {wg.interface} peer KEY remove, or bulkhead wg add FILE"


def _wg_allowed(asked: Asked, wg: Wg) -> Answer:
    by_key = {key: peer for peer in asked.peers for key in peer.keys}
    bad = []
    for peer in _ours(asked, wg):
        declared = by_key.get(peer.key)
        wanted = (f"{declared.address}/32",) if declared else peer.allowed[:1]
        if peer.allowed != wanted:
            bad.append(f"{peer.key} may use {', '.join(peer.allowed) or 'nothing'}, not {wanted[0]}")
    return bad, "one /32 each", "bulkhead wg add FILE, with the peer's own address only"


def _wg_handshake(asked: Asked, wg: Wg) -> Answer:
    def old(peer: WgPeer) -> bool:
        return peer.handshake_s is None or peer.handshake_s > HANDSHAKE_S

    ours = _ours(asked, wg)
    bad = [f"{p.key}: {'never' if p.handshake_s is None else f'{p.handshake_s} s ago'}" for p in ours if old(p)]
    ages = [p.handshake_s for p in ours if p.handshake_s is not None]
    return (
        bad,
        f"the oldest {max(ages, default=0)} s ago",
        ("see whether the peer runs, knows this machine's key (bulkhead wg add there), and UDP 51820 gets through"),
    )


def _wg_keepalive(asked: Asked, wg: Wg) -> Answer:
    bad = [
        f"{p.key}: every {p.keepalive_s or 'no'} s" for p in _ours(asked, wg) if not 0 < p.keepalive_s <= KEEPALIVE_S
    ]
    return bad, f"every {KEEPALIVE_S} s or less", f"wg set {wg.interface} peer KEY persistent-keepalive {KEEPALIVE_S}"


def _mtu(_asked: Asked, wg: Wg) -> Answer:
    bad = [] if wg.mtu in MTU else [f"{wg.interface} has {wg.mtu}, not {MTU[0]} to {MTU[-1]}"]
    return bad, f"{wg.mtu}", f"ip link set {wg.interface} mtu {MTU[-1]}"


def _keys(bad: Callable[[KeyFile], str], good: str, mend: str) -> Callable[[Asked, Seen], Answer | Gap]:
    def judge(_asked: Asked, seen: Seen) -> Answer | Gap:
        if isinstance(seen.keys, Gap):
            return seen.keys
        return [text for key in seen.keys if (text := bad(key))], good, mend

    return judge


def _certificate(what: str) -> Callable[[Asked, Seen], Answer | Gap]:
    def judge(_asked: Asked, seen: Seen) -> Answer | Gap:
        if isinstance(seen.certificates, Gap):
            return seen.certificates
        found = [one for one in seen.certificates if one.what == what]
        if not found:
            return Gap("it was not looked at", "install openssl" if what == "openssl" else "")
        return [one.seen for one in found if not one.good], found[0].seen, found[0].fix

    return judge


def _ca(_asked: Asked, seen: Seen) -> Answer | Gap:
    if isinstance(seen.ca_days, Gap):
        return seen.ca_days
    bad = [f"the first CA trusted here ends in {seen.ca_days:.0f} days"] if seen.ca_days < CA_DAYS else []
    return bad, f"{seen.ca_days:.0f} days left", "bulkhead pki rotate-ca prepare"


def _tls(judge: Callable[[Tls], Answer]) -> Callable[[Asked, Seen], Answer | Gap]:
    return lambda _asked, seen: seen.tls if isinstance(seen.tls, Gap) else judge(seen.tls)


def _versions(tls: Tls) -> Answer:
    bad = [f"takes {name}" for name in tls.old] + ([] if tls.modern else ["does not take TLS 1.3"])
    return bad, "TLS 1.3 and nothing older", "let nothing but bulkhead router answer on that port"


def _suites(tls: Tls) -> Answer:
    bad = [f"takes {name}" for name in tls.suites if name not in GOOD_SUITES]
    return bad, ", ".join(tls.suites), "let nothing but bulkhead router answer on that port"


def _served(tls: Tls) -> Answer:
    bad = ["another certificate is shown than the one in use here"] if tls.wanted not in ("", tls.shown) else []
    return bad, "the port shows the certificate in use", "bulkhead pki export NAME --to DIRECTORY --owner USER, once"


def _anonymous(tls: Tls) -> Answer:
    return (
        ["answers without a client's certificate"] if tls.anonymous else [],
        "refuses who shows none",
        ("let nothing but the inference server with mutual TLS answer on that port"),
    )


def _upstreams(_asked: Asked, seen: Seen) -> Answer | Gap:
    bad = [f"{name}: {why}" for name, why in seen.upstreams.items() if why]
    return bad, f"{listed(seen.upstreams) or 'none declared'}: mutual TLS works", "see that machine's own check"


_PKI = ("private", "key", "validity", "renewal", "chain", "names", "revocation", "handshake", "openssl")
_PKI_NEEDS = {
    "renewal": ("validity", "chain", "key"),
    "revocation": ("chain",),
    "handshake": ("key", "validity", "chain", "revocation"),
    "openssl": ("key", "validity", "chain", "revocation"),
}
_CERTS = tuple(f"certificate {what}" for what in ("key", "validity", "chain", "revocation", "handshake"))

LINES: tuple[Line, ...] = (
    Line("network", _WG, _network),
    Line("firewall rules", _ALL, _rules),
    Line("tcp ports closed", _ALL, _closed("tcp"), ("firewall rules", "inference binding")),
    Line("udp ports closed", _ALL, _closed("udp"), ("firewall rules",)),
    Line("tcp ports open", _ALL, _open, ("firewall rules",)),
    Line("router listens", _ROUTERS, _listening(lambda asked: asked.listen, "bulkhead-router")),
    Line("router user", _ROUTERS, _owner(lambda asked: asked.listen), ("router listens",)),
    Line("inference binding", _ALL, _binding),
    Line(
        "inference listens",
        frozenset({_INFERENCE}),
        _listening(lambda asked: asked.inference_port, "bulkhead-inference"),
    ),
    Line("inference user", frozenset({_INFERENCE}), _owner(lambda asked: asked.inference_port), ("inference listens",)),
    Line("socket", frozenset({_DEV}), _socket),
    Line("socket mode", frozenset({_DEV}), _socket_mode, ("socket",)),
    Line("socket group", frozenset({_DEV}), _socket_group, ("socket",)),
    Line("users", _ALL, _users),
    Line("unit hardening", _ALL, _units),
    Line("starts with the host", _ALL, _at_boot),
    Line("chores scheduled", _ALL, _timers),
    Line("wireguard interface", _WG, _wg_there),
    Line("wireguard port", _WG, _wg(_wg_port), ("wireguard interface",)),
    Line("wireguard peers", _WG, _wg(_wg_peers), ("wireguard interface",)),
    Line("wireguard addresses", _WG, _wg(_wg_allowed), ("wireguard peers",)),
    Line("wireguard keep-alive", _WG, _wg(_wg_keepalive), ("wireguard peers",)),
    Line("wireguard handshakes", _WG, _wg(_wg_handshake), ("wireguard peers", "wireguard port", "firewall rules")),
    Line("wireguard mtu", _WG, _wg(_mtu), ("wireguard interface",)),
    Line(
        "wireguard key mode",
        _WG,
        _keys(
            lambda k: f"{k.path} has mode {k.mode:o}" if k.mode & 0o077 else "", "600", "chmod 600, and rotate the key"
        ),
    ),
    Line(
        "wireguard key age",
        _WG,
        _keys(
            lambda k: f"{k.path} is {k.age_days:.0f} days old" if k.age_days > KEY_DAYS else "",
            f"no more than {KEY_DAYS:.0f} days",
            "bulkhead wg rotate",
        ),
    ),
    *(
        Line(
            f"certificate {what}",
            _ALL,
            _certificate(what),
            tuple(f"certificate {need}" for need in _PKI_NEEDS.get(what, ())),
        )
        for what in _PKI
    ),
    Line("certificate authority", _ALL, _ca),
    Line("tls versions", _ALL, _tls(_versions), ("router listens", "inference listens", *_CERTS)),
    Line("tls certificate", _ALL, _tls(_served), ("tls versions",)),
    Line("tls suites", _ALL, _tls(_suites), ("tls versions",)),
    Line("tls client certificate", frozenset({_INFERENCE}), _tls(_anonymous), ("inference listens", *_CERTS)),
    Line(
        "upstream",
        frozenset({_ROUTER}),
        _upstreams,
        (
            "firewall rules",
            "wireguard interface",
            "wireguard peers",
            "wireguard addresses",
            "wireguard handshakes",
            *_CERTS,
        ),
    ),
)


def judge(asked: Asked, seen: Seen) -> list[Finding]:
    """Every line of the role, in order; a line whose cause is another one's is not bad itself."""
    chosen = [line for line in LINES if asked.role in line.roles]
    first = {line.name: _finding(line, asked, seen) for line in chosen}
    return [_after(line, first) for line in chosen]


def _finding(line: Line, asked: Asked, seen: Seen) -> Finding:
    answer = line.judge(asked, seen)
    if isinstance(answer, Gap):
        return Finding(line.name, Status.UNKNOWN, answer.why, (), answer.mend)
    bad, good, mend = answer
    if said := list(bad):
        return Finding(line.name, Status.BAD, listed(said), (), mend)
    return Finding(line.name, Status.OK, good)


def _after(line: Line, found: dict[str, Finding]) -> Finding:
    mine = found[line.name]
    causes = [need for need in _deep(line) if need in found and found[need].status is Status.BAD]
    if mine.status is not Status.BAD or not causes:
        return mine
    return Finding(line.name, Status.UNKNOWN, f"{mine.seen} (see first: {causes[0]})", (), mine.advice)


def _deep(line: Line) -> list[str]:
    out = list(line.needs)
    for need in line.needs:
        out += [more for other in LINES if other.name == need for more in _deep(other)]
    return list(dict.fromkeys(out))


def exit_code(findings: Iterable[Finding]) -> int:
    """0: nothing is bad; 1: something is; 2: something could not be found out."""
    found = {finding.status for finding in findings}
    return 1 if Status.BAD in found else 2 if Status.UNKNOWN in found else 0
