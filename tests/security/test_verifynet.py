"""`bulkhead verify-network-config`: each single damage turns exactly its own line red, and what is asked is really asked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from controller.security import units
from controller.security.pki.report import Check
from controller.security.verifynet import Asked, Peer, Seen, exit_code, judge, probe, read_asked
from controller.security.verifynet.gather import _probes, differing, read_listeners
from controller.security.verifynet.seen import KeyFile, Listener, Outcome, Probe, SocketFile, Tls, Wg, WgPeer
from controller.verify.host.facts import Gap
from controller.verify.host.findings import Status
from lab.ovs import Namespace

ROOT = Path(__file__).parents[2]
KEY = "a" * 43 + "="
PKI = ("private", "key", "validity", "renewal", "chain", "names", "revocation", "handshake", "openssl")


def asked(role: str) -> Asked:
    peer = Peer("other", IPv4Address("10.0.0.1" if role == "inference" else "10.0.0.2"), (KEY,))
    return Asked(
        role,
        "me",
        IPv4Network("10.0.0.0/24"),
        IPv4Address("10.0.0.2" if role == "inference" else "10.0.0.1"),
        peers=() if role == "dev" else (peer,),
        group="router",
    )


def good(role: str) -> Seen:
    """A machine on which all is well."""
    me = asked(role)
    listeners = [Listener("tcp", "0.0.0.0", 22, "root")]
    if role != "inference":
        listeners.append(Listener("tcp", "0.0.0.0", 443, "router"))
    if role != "router":
        listeners.append(Listener("tcp", "127.0.0.1" if role == "dev" else "10.0.0.2", 8001, "inference"))
    allowed = {("tcp", port) for port in me.tcp}
    ports = [("tcp", 22), ("tcp", 443), ("tcp", 8001), ("udp", 53), ("udp", 51820)]
    peers = tuple(WgPeer(KEY, (f"{peer.address}/32",), 40, 25) for peer in me.peers)
    return Seen(
        rules="",
        listeners=tuple(listeners),
        probes=tuple(
            Probe(p[0], "169.254.77.1", p[1], Outcome.OPEN if p in allowed else Outcome.CLOSED) for p in ports
        ),
        addresses={"eth0": ("192.0.2.1/24",), "wg0": (f"{me.address}/24",)},
        users={"router": "/usr/sbin/nologin", "inference": "/usr/sbin/nologin"},
        units={"bulkhead-x.service": ()},
        timers=(),
        socket=SocketFile(0o660, "inference", "router"),
        wg=Wg("wg0", (f"{me.address}/24",), 1420, 51820, peers),
        keys=(KeyFile("/wg/private.key", 0o600, 3.0),),
        certificates=tuple(Check(what, True, "good") for what in PKI),
        ca_days=700.0,
        tls=Tls(True, (), ("TLS_AES_256_GCM_SHA384",), False),
        upstreams={"other": ""} if role == "router" else {},
    )


def listening(protocol: str, address: str, port: int, user: str) -> Callable[[Seen], Seen]:
    """Somebody listens there instead of who did."""

    def damage(seen: Seen) -> Seen:
        assert not isinstance(seen.listeners, Gap)
        others = tuple(one for one in seen.listeners if one.port != port)
        return replace(seen, listeners=(*others, Listener(protocol, address, port, user)))

    return damage


def probed(protocol: str, port: int, outcome: Outcome) -> Callable[[Seen], Seen]:
    """A probe ends otherwise."""

    def damage(seen: Seen) -> Seen:
        assert not isinstance(seen.probes, Gap)
        changed = tuple(
            replace(p, outcome=outcome) if (p.protocol, p.port) == (protocol, port) else p for p in seen.probes
        )
        return replace(seen, probes=changed)

    return damage


def set_(**changes: Any) -> Callable[[Seen], Seen]:
    return lambda seen: replace(seen, **changes)


def wg(**changes: Any) -> Callable[[Seen], Seen]:
    return lambda seen: replace(seen, wg=dataclasses.replace(seen.wg, **changes))  # type: ignore[type-var]


def wg_peer(**changes: Any) -> Callable[[Seen], Seen]:
    def damage(seen: Seen) -> Seen:
        assert isinstance(seen.wg, Wg)
        return replace(seen, wg=replace(seen.wg, peers=tuple(replace(peer, **changes) for peer in seen.wg.peers)))

    return damage


def added_peer(seen: Seen) -> Seen:
    assert isinstance(seen.wg, Wg)
    return replace(seen, wg=replace(seen.wg, peers=(*seen.wg.peers, WgPeer("b" * 43 + "=", ("10.0.0.9/32",), 3, 25))))


def pki(*broken: str) -> Callable[[Seen], Seen]:
    return lambda seen: replace(
        seen, certificates=tuple(Check(what, what not in broken, "seen", "mend") for what in PKI)
    )


def both(*damages: Callable[[Seen], Seen]) -> Callable[[Seen], Seen]:
    def damage(seen: Seen) -> Seen:
        for one in damages:
            seen = one(seen)
        return seen

    return damage


REFUSED = {"other": "certificate required"}
# The line, the role, and what is seen then: consequences included, for one damage is seen in many places.
DAMAGES: list[tuple[str, str, Callable[[Seen], Seen]]] = [
    ("firewall rules", "router", both(set_(rules="a line is missing"), probed("tcp", 8001, Outcome.REFUSED))),
    ("tcp ports closed", "router", probed("tcp", 8001, Outcome.OPEN)),
    ("udp ports closed", "dev", probed("udp", 53, Outcome.REFUSED)),
    ("tcp ports open", "router", probed("tcp", 443, Outcome.CLOSED)),
    ("network", "router", set_(addresses={"eth0": ("10.0.0.77/8",)})),
    ("router user", "router", listening("tcp", "0.0.0.0", 443, "root")),
    (
        "inference binding",
        "inference",
        both(listening("tcp", "0.0.0.0", 8001, "inference"), probed("tcp", 8001, Outcome.OPEN)),
    ),
    ("inference binding", "dev", listening("tcp", "::", 8001, "inference")),
    ("inference user", "inference", listening("tcp", "10.0.0.2", 8001, "root")),
    ("socket", "dev", set_(socket=None)),
    ("socket mode", "dev", set_(socket=SocketFile(0o666, "inference", "router"))),
    ("socket group", "dev", set_(socket=SocketFile(0o660, "inference", "users"))),
    ("users", "dev", set_(users={"router": "/bin/bash", "inference": "/usr/sbin/nologin"})),
    ("unit hardening", "router", set_(units={"bulkhead-router.service": ("NoNewPrivileges is no",)})),
    ("chores scheduled", "router", set_(timers=("bulkhead-weekly.timer",))),
    ("starts with the host", "router", set_(asleep=("bulkhead-wg.service",))),
    ("wireguard interface", "router", set_(wg=None, upstreams=REFUSED)),
    ("wireguard port", "router", wg(listen=4000)),
    ("wireguard mtu", "router", wg(mtu=1500)),
    ("wireguard peers", "inference", added_peer),
    ("wireguard peers", "router", both(wg(peers=()), set_(upstreams=REFUSED))),
    ("wireguard addresses", "router", both(wg_peer(allowed=("10.0.0.0/24",)))),
    ("wireguard keep-alive", "router", wg_peer(keepalive_s=0)),
    ("wireguard handshakes", "router", both(wg_peer(handshake_s=4000), set_(upstreams=REFUSED))),
    ("wireguard key mode", "router", set_(keys=(KeyFile("k", 0o644, 1.0),))),
    ("wireguard key age", "router", set_(keys=(KeyFile("k", 0o600, 400.0),))),
    (
        "certificate validity",
        "router",
        both(pki("validity", "renewal", "handshake", "openssl"), set_(upstreams=REFUSED)),
    ),
    ("certificate renewal", "router", pki("renewal")),
    ("certificate revocation", "router", both(pki("revocation", "handshake", "openssl"), set_(upstreams=REFUSED))),
    ("certificate chain", "inference", pki("chain", "revocation", "handshake", "openssl")),
    ("certificate names", "router", pki("names")),
    ("certificate private", "router", pki("private")),
    ("certificate key", "router", pki("key", "handshake", "openssl")),
    ("certificate authority", "router", set_(ca_days=5.0)),
    ("tls versions", "router", set_(tls=Tls(True, ("TLS 1.2",), ("TLS_AES_256_GCM_SHA384",)))),
    ("tls suites", "router", set_(tls=Tls(True, (), ("TLS_AES_128_CCM_8_SHA256",)))),
    ("tls client certificate", "inference", set_(tls=Tls(True, (), ("TLS_AES_256_GCM_SHA384",), True))),
    ("upstream", "router", set_(upstreams=REFUSED)),
]


@pytest.mark.parametrize("role", ["dev", "router", "inference"])
def test_a_good_machine_is_green(role: str) -> None:
    findings = judge(asked(role), good(role))
    assert [finding for finding in findings if finding.status is not Status.OK] == []
    assert exit_code(findings) == 0


@pytest.mark.parametrize("line, role, damage", DAMAGES, ids=[f"{line}-{role}" for line, role, _ in DAMAGES])
def test_a_single_damage_turns_exactly_its_own_line_red(line: str, role: str, damage: Callable[[Seen], Seen]) -> None:
    findings = judge(asked(role), damage(good(role)))
    assert [finding.check for finding in findings if finding.status is Status.BAD] == [line]
    assert all(finding.advice for finding in findings if finding.status is Status.BAD)
    assert exit_code(findings) == 1


def test_what_is_not_known_is_not_good() -> None:
    gap = Gap("no", "look")
    seen = replace(good("router"), rules=gap, listeners=gap, probes=gap, addresses=gap, wg=gap, keys=gap, tls=gap)
    findings = judge(asked("router"), seen)
    assert exit_code(findings) == 2
    assert not [finding for finding in findings if finding.status is Status.BAD]


def test_sockets_are_read_with_their_users() -> None:
    text = (
        "tcp   LISTEN 0 128    0.0.0.0:22   0.0.0.0:* ino:1 sk:1 cgroup:x <->\n"
        "tcp   LISTEN 0 128       [::]:443     [::]:* uid:65534 ino:2 sk:2\n"
        "udp   UNCONN 0 0    127.0.0.1%lo:53 0.0.0.0:* ino:3\n"
    )
    found = read_listeners(text)
    assert [(one.protocol, one.address, one.port, one.user) for one in found] == [
        ("tcp", "0.0.0.0", 22, "root"),
        ("tcp", "::", 443, "nobody"),
        ("udp", "127.0.0.1", 53, "root"),
    ]


def test_a_drop_in_that_loosens_a_unit_is_seen(tmp_path: Path) -> None:
    units.install(tmp_path, "/bin/true")
    path = tmp_path / "etc/systemd/system/bulkhead-router.service"
    unit = next(unit for unit in units.UNITS if unit.name == "router")
    assert differing(path, unit) == ()
    for kind in ("etc/systemd/system/bulkhead-router.service.d", "run/systemd/system/bulkhead-.service.d",
                 "run/systemd/system/service.d"):  # fmt: skip
        drop = tmp_path / kind / "loose.conf"
        drop.parent.mkdir(parents=True, exist_ok=True)
        drop.write_text("[Service]\nNoNewPrivileges=no\n")
        assert differing(path, unit) == ("NoNewPrivileges is no",), kind
        drop.unlink()


def test_the_profile_is_read_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    file = tmp_path / "state.yaml"
    file.write_text("security: {role: inference, name: i, address: 10.0.0.2, peers: [{name: r, address: 10.0.0.1}]}\n")
    found = read_asked(file)
    assert (found.role, str(found.address), found.udp, found.peers[0].name) == (
        "inference",
        "10.0.0.2",
        frozenset({51820}),
        "r",
    )


# - the real thing


def _probe(place: Namespace, *words: str) -> subprocess.Popen[str]:
    code = (
        "from controller.security.verifynet import probe\nimport json, sys, time\n"
        "with probe.neighbour() as (pid, a, b):\n"
        " print(json.dumps(probe.tried(pid, [(p, x, int(n)) for x in (a, b) for p, n in json.loads(sys.argv[1])])))\n"
        " sys.stdout.flush(); time.sleep(float(sys.argv[2]))\n"
    )
    command = place.command(sys.executable, "-c", code, *words)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
def test_probes_tell_open_from_closed_and_leave_nothing_even_when_killed() -> None:
    place = Namespace()
    server = None
    try:
        rules = (
            "table inet t { chain input { type filter hook input priority 0; policy drop; iif lo accept;"
            " icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; ct state established accept;"
            " tcp dport { 22, 443 } accept; }; }"
        )
        subprocess.run(place.command("nft", "-f", "-"), input=rules, text=True, check=True)
        listen = "import socket,time\nfor p in (443, 8001):\n s=socket.create_server(('::', p), family=socket.AF_INET6, dualstack_ipv6=True); globals()[f's{p}']=s\nprint(1, flush=True)\ntime.sleep(60)"
        server = subprocess.Popen(place.command(sys.executable, "-c", listen), stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline()
        before = place.run("ip", "-o", "link")
        run = _probe(place, json.dumps([["tcp", 22], ["tcp", 443], ["tcp", 8001], ["udp", 53]]), "30")
        assert run.stdout is not None
        found = {(p, a.count(":") > 1, n): outcome for p, a, n, outcome in json.loads(run.stdout.readline())}
        for six in (False, True):
            assert found["tcp", six, 22] == "refused"
            assert found["tcp", six, 443] == "open"
            assert found["tcp", six, 8001] == "closed"
            assert found["udp", six, 53] == "closed"
        run.kill()
        run.wait()
        end = time.monotonic() + 5
        while place.run("ip", "-o", "link") != before and time.monotonic() < end:
            time.sleep(0.05)
        assert place.run("ip", "-o", "link") == before
    finally:
        if server is not None:
            server.kill()
            server.wait()
        place.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
def test_without_ipv6_ports_are_tried_by_ipv4() -> None:
    place = Namespace()
    code = "from controller.security.verifynet import probe\nwith probe.neighbour() as (pid, a, b): print(probe.tried(pid, [('tcp', a, 22)]), [b])"
    try:
        off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"
        place.run("sh", "-ec", off)
        found = place.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code)
        assert "'refused'" in found and found.strip().endswith("['']")
    finally:
        place.close()


def test_it_is_said_where_other_devices_have_ipv6_and_the_probe_s_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def neighbour() -> Iterator[tuple[int, str, str]]:
        yield 1, "169.254.77.1", ""

    monkeypatch.setattr(probe, "neighbour", neighbour)
    monkeypatch.setattr(probe, "tried", lambda _pid, keys: [(*key, "closed") for key in keys])
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    role = asked("router")
    assert isinstance(_probes(role, (), {"lo": ("::1/128",), "eth0": ("192.0.2.1/24",)}), tuple)
    found = _probes(role, (), {"eth0": ("192.0.2.1/24", "fe80::1/64")})
    assert isinstance(found, Gap) and "disable_ipv6=0" in found.mend
