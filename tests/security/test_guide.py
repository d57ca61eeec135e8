"""The whole guide on machines with a systemd of their own: what it says works, and each single damage is told by its own line."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.security.pki import Pki, making
from controller.security.pki.identity import Identity, Usage
from lab.guide import CA_FILE, INFERENCE, ROUTER, Guide, tokens
from lab.machine import LabError, Machine

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    with Guide(tmp_path_factory.mktemp("guide")) as made:
        made.start()
        yield made


def bad(guide: Guide, name: str) -> dict[str, str]:
    """The lines of a machine that are not good."""
    lines = guide.verify(guide.machines[name])
    return {check: f"{line['status']}: {line['seen']}" for check, line in lines.items() if line["status"] != "ok"}


def red(guide: Guide, name: str) -> dict[str, str]:
    """The lines of a machine that are bad, with what was seen."""
    lines = guide.verify(guide.machines[name])
    return {check: line["seen"] for check, line in lines.items() if line["status"] == "BAD"}


def until(machine: Machine, command: str, limit_s: float = 30) -> None:
    """Wait until a command succeeds there."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            machine.run("sh", "-c", command)
            return
        except LabError:
            assert time.monotonic() < deadline, f"{machine.name}: {command}"
            time.sleep(0.05)


def ready(guide: Guide) -> None:
    """Wait until both services listen, and WireGuard is as `wg run` wants it, with a handshake."""
    good = (
        "test $(wg show bulkhead-wg0 listen-port) = 51820 && test $(wg show bulkhead-wg0 peers | wc -l) = 1 && "
        "ip link show bulkhead-wg0 | grep -q 'mtu 1420' && test $(wg show bulkhead-wg0 allowed-ips | wc -w) = 2 && "
        "wg show bulkhead-wg0 persistent-keepalive | grep -q 25 && "
        "wg show bulkhead-wg0 latest-handshakes | grep -qv '[[:space:]]0$'"
    )
    until(guide.router, f"ss -Hltn sport = :443 | grep -q : && {good}")
    until(guide.inference, f"ss -Hltn src 10.0.0.2:8001 | grep -q : && {good}")


def test_a_streamed_answer_by_tls_hpke_wireguard_and_mutual_tls(guide: Guide) -> None:
    done = guide.ask("--json", '{"prompt": "alpha beta gamma delta epsilon"}', "--stream")
    assert done.returncode == 0, done.stderr
    words, times = zip(*tokens(done.stdout), strict=True)
    assert words == ("alpha", "beta", "gamma", "delta", "epsilon")
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def test_both_machines_are_green(guide: Guide) -> None:
    assert bad(guide, "router1") == {}
    assert bad(guide, "inf1") == {}


STATE = "/etc/bulkhead/state.yaml"
PAIR = "/var/lib/bulkhead/security/pki/current"
KEY = "YmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmI="
LISTEN = (
    "import socket, time; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
    "s.bind(('0.0.0.0', 8001)); s.listen(); time.sleep(600)"
)
START = "systemd-run --quiet --unit=stranger"
"""A program that runs until `systemctl stop stranger`."""
AS_INFERENCE = f"{START} -p User=inference -p SupplementaryGroups=router"
AS_ROUTER = f"{START} -p User=router -p AmbientCapabilities=CAP_NET_BIND_SERVICE"
SERVER = "/usr/bin/openssl s_server -quiet -cert /var/lib/bulkhead/{0}/pki/current/{1}/cert.pem -key /var/lib/bulkhead/{0}/pki/current/{1}/key.pem"
ROUTERS, INFERENCES = SERVER.format("router", "router1"), SERVER.format("inference", "inf1")
WG_STILL = "systemctl stop bulkhead-wg"
WG_AGAIN = "systemctl start bulkhead-wg"


@dataclass(frozen=True)
class Damage:
    """What somebody does to a machine, how it is put right, and the one line that has to tell."""

    line: str
    do: str
    undo: str
    machine: str = "router1"
    until: str = ""
    """What has to succeed before it is looked at."""


DAMAGES = {
    "rule-removed": Damage(
        "firewall rules",
        "nft delete rule inet bulkhead input handle $(nft -a list chain inet bulkhead input | sed -n 's/.*tcp dport.*443.*handle //p')",
        f"bulkhead firewall apply {STATE}",
    ),
    "rule-added": Damage(
        "firewall rules",
        "nft insert rule inet bulkhead input tcp dport 8001 accept",
        f"bulkhead firewall apply {STATE}",
        "inf1",
    ),
    "table-flushed": Damage(
        "firewall rules", "nft flush table inet bulkhead", f"bulkhead firewall apply {STATE}", "inf1"
    ),
    "overlapping-address": Damage(
        "network", "ip address add 10.0.0.77/16 dev eth0", "ip address delete 10.0.0.77/16 dev eth0"
    ),
    "router-stopped": Damage("router listens", "systemctl stop bulkhead-router", "systemctl start bulkhead-router"),
    "router-run-by-root": Damage(
        "router user",
        f"systemctl stop bulkhead-router; {START} bulkhead router {STATE}",
        "systemctl stop stranger; systemctl start bulkhead-router",
    ),
    "inference-port-on-every-address": Damage(
        "inference binding",
        f'{AS_INFERENCE} /usr/bin/python3 -c "{LISTEN}"',
        "systemctl stop stranger",
        until="ss -Hltn sport = :8001 | grep -q 8001",
    ),
    "inference-stopped": Damage(
        "inference listens", "systemctl stop bulkhead-inference", "systemctl start bulkhead-inference", "inf1"
    ),
    "user-may-log-in": Damage(
        "users", "usermod -s /bin/sh inference", "usermod -s /usr/sbin/nologin inference", "inf1"
    ),
    "unit-loosened": Damage(
        "unit hardening",
        "mkdir /etc/systemd/system/bulkhead-router.service.d; "
        "printf '[Service]\\nNoNewPrivileges=no\\n' > /etc/systemd/system/bulkhead-router.service.d/x.conf",
        "rm -r /etc/systemd/system/bulkhead-router.service.d",
    ),
    "firewall-not-at-boot": Damage(
        "starts with the host",
        "systemctl disable bulkhead-firewall",
        "systemctl enable bulkhead-firewall",
    ),
    "timer-gone": Damage(
        "chores scheduled",
        "systemctl disable --now bulkhead-minute.timer",
        "systemctl enable --now bulkhead-minute.timer",
    ),
    "wireguard-gone": Damage("wireguard interface", f"{WG_STILL}; ip link delete bulkhead-wg0", WG_AGAIN, "inf1"),
    "wireguard-port": Damage("wireguard port", f"{WG_STILL}; wg set bulkhead-wg0 listen-port 51999", WG_AGAIN),
    "peer-added": Damage(
        "wireguard peers", f"{WG_STILL}; wg set bulkhead-wg0 peer {KEY} allowed-ips 10.0.0.9/32", WG_AGAIN
    ),
    "peer-removed": Damage(
        "wireguard peers",
        f"{WG_STILL}; wg set bulkhead-wg0 peer $(wg show bulkhead-wg0 peers) remove",
        WG_AGAIN,
        "inf1",
    ),
    "peer-exchanged": Damage(
        "wireguard peers",
        f"{WG_STILL}; wg set bulkhead-wg0 peer $(wg show bulkhead-wg0 peers) remove; "
        f"wg set bulkhead-wg0 peer {KEY} allowed-ips 10.0.0.1/32 persistent-keepalive 25",
        WG_AGAIN,
        "inf1",
    ),
    "peer-may-more": Damage(
        "wireguard addresses",
        f"{WG_STILL}; wg set bulkhead-wg0 peer $(wg show bulkhead-wg0 peers) allowed-ips 10.0.0.2/32,10.0.0.3/32",
        WG_AGAIN,
    ),
    "no-keep-alive": Damage(
        "wireguard keep-alive",
        f"{WG_STILL}; wg set bulkhead-wg0 peer $(wg show bulkhead-wg0 peers) persistent-keepalive off",
        WG_AGAIN,
        "inf1",
    ),
    "wireguard-mtu": Damage("wireguard mtu", f"{WG_STILL}; ip link set bulkhead-wg0 mtu 9000", WG_AGAIN),
    "wireguard-key-readable": Damage(
        "wireguard key mode",
        "chmod 644 /var/lib/bulkhead/security/wg/own.key",
        "chmod 600 /var/lib/bulkhead/security/wg/own.key",
        "inf1",
    ),
    "wireguard-key-old": Damage(
        "wireguard key age",
        "touch -d '200 days ago' /var/lib/bulkhead/security/wg/own.key",
        "touch /var/lib/bulkhead/security/wg/own.key",
    ),
    "certificate-key-readable": Damage(
        "certificate private", f"chmod 644 {PAIR}/inf1/key.pem", f"chmod 600 {PAIR}/inf1/key.pem", "inf1"
    ),
    "another-key": Damage(
        "certificate key",
        f"cp -p {PAIR}/router1/key.pem /root/kept; openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 "
        f"-out {PAIR}/router1/key.pem 2>&1; chmod 600 {PAIR}/router1/key.pem",
        f"cp -p /root/kept {PAIR}/router1/key.pem",
    ),
    "a-name-is-missing": Damage(
        "certificate names",
        f"sed -i 's/llm.example/llm.example, other.example/' {STATE}",
        f"sed -i 's/, other.example//' {STATE}",
    ),
    "revocations-gone": Damage(
        "certificate revocation",
        "cp -p /var/lib/bulkhead/security/pki/crl.pem /root/kept; : > /var/lib/bulkhead/security/pki/crl.pem",
        "cp -p /root/kept /var/lib/bulkhead/security/pki/crl.pem",
        "inf1",
    ),
    "old-tls": Damage(
        "tls versions",
        f"systemctl stop bulkhead-router; {AS_ROUTER} {ROUTERS} -accept 443 -cipher ALL:@SECLEVEL=0",
        "systemctl stop stranger; systemctl start bulkhead-router",
    ),
    "another-certificate-is-shown": Damage(
        "tls certificate",
        "systemctl stop bulkhead-router; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x "
        "-keyout /tmp/x.key -out /tmp/x.pem 2>&1; chown router /tmp/x.*; "
        f"{AS_ROUTER} /usr/bin/openssl s_server -quiet -tls1_3 -cert /tmp/x.pem -key /tmp/x.key -accept 443",
        "systemctl stop stranger; systemctl start bulkhead-router; rm /tmp/x.*",
    ),
    "weak-suite": Damage(
        "tls suites",
        f"systemctl stop bulkhead-router; {AS_ROUTER} {ROUTERS} -accept 443 -tls1_3 "
        "-ciphersuites TLS_AES_256_GCM_SHA384:TLS_AES_128_CCM_8_SHA256",
        "systemctl stop stranger; systemctl start bulkhead-router",
    ),
    "anybody-may-ask-the-inference-server": Damage(
        "tls client certificate",
        f"systemctl stop bulkhead-inference; {AS_INFERENCE} {INFERENCES} -accept 10.0.0.2:8001 -tls1_3 -www",
        "systemctl stop stranger; systemctl start bulkhead-inference",
        "inf1",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_single_damage_turns_its_own_line_red(guide: Guide, name: str) -> None:
    damage = DAMAGES[name]
    machine = guide.machines[damage.machine]
    machine.run("sh", "-c", damage.do)
    if damage.until:
        until(machine, damage.until)
    time.sleep(0.3)
    try:
        found = red(guide, damage.machine)
    finally:
        machine.run("sh", "-c", damage.undo)
    assert set(found) == {damage.line}, found
    ready(guide)


def forged(guide: Guide) -> tuple[str, str]:
    """A certificate of router1 and its key, PEM, which the CA has signed and which has ended."""
    home = guide.directory / "home/pki"
    ca = making.certificates((home / "ca.pem").read_bytes(), "the CA")[0]
    ca_key = making.load_key(next(home.glob("ca/*/key.pem")).read_bytes(), "its key")
    who = Identity("router1", Usage.PEER, ROUTER.ips, ROUTER.dns, 60 / 86400)
    key = making.new_key()
    leaf = making.new_leaf(who, key.public_key(), ca, ca_key, ca.not_valid_before_utc)
    assert leaf.not_valid_after_utc < dt.datetime.now(dt.UTC)
    return making.pem_of(leaf).decode(), making.key_pem(key).decode()


def test_an_expired_certificate(guide: Guide) -> None:
    router, names = guide.router, ("cert.pem", "key.pem")
    kept = {name: router.run("cat", f"{PAIR}/router1/{name}") for name in names}
    try:
        for name, text in zip(names, forged(guide), strict=True):
            router.write(f"{PAIR}/router1/{name}", text)
        assert set(red(guide, "router1")) == {"certificate validity"}
    finally:
        for name, text in kept.items():
            router.write(f"{PAIR}/router1/{name}", text)


def test_another_ca_is_trusted(guide: Guide, tmp_path: Path) -> None:
    other, names = Pki(tmp_path / "pki"), ("ca.pem", "crl.pem")
    other.init("other")
    place = CA_FILE.removesuffix("/ca.pem")
    kept = {name: guide.inference.run("cat", f"{place}/{name}") for name in names}
    try:
        for name in names:
            guide.inference.write(f"{place}/{name}", (tmp_path / "pki" / name).read_text())
        assert set(red(guide, "inf1")) == {"certificate chain"}
    finally:
        for name, text in kept.items():
            guide.inference.write(f"{place}/{name}", text)


def test_a_revoked_certificate(guide: Guide) -> None:
    trust = guide.directory / "trust.pem"
    guide.home("pki", "revoke", "router1")
    guide.home("pki", "export", "--trust", "-o", str(trust))
    guide.router.write("/root/trust.pem", trust.read_text())
    guide.bulkhead(guide.router, "pki", "accept", "/root/trust.pem")
    assert set(red(guide, "router1")) == {"certificate revocation"}
    guide.home("pki", "revoke", "router1", "--undo")
    guide.certify(ROUTER)
    assert red(guide, "router1") == {}
    # The router itself, which runs as another user, shows the new one.
    assert guide.ask("--json", '{"prompt": "again"}').returncode == 0


def test_a_server_that_is_away_is_told_by_the_router(guide: Guide) -> None:
    guide.inference.run("systemctl", "stop", "bulkhead-inference")
    try:
        assert set(red(guide, "router1")) == {"upstream"}
    finally:
        guide.inference.run("systemctl", "start", "bulkhead-inference")
    ready(guide)


def test_keys_are_replaced_and_nothing_is_red_meanwhile(guide: Guide) -> None:
    def key() -> str:
        return guide.router.run("wg", "show", "bulkhead-wg0", "public-key")

    before = key()
    guide.bulkhead(guide.router, "incident", "rotate-keys")
    guide.bulkhead(guide.router, "wg", "export", "--out", "/root/router1.pub")
    guide.inference.write("/root/router1.pub", guide.router.run("cat", "/root/router1.pub"))
    assert red(guide, "router1") == red(guide, "inf1") == {}
    guide.bulkhead(guide.inference, "wg", "add", STATE, "/root/router1.pub")
    deadline = time.monotonic() + 60
    while key() == before:
        assert time.monotonic() < deadline
        assert red(guide, "router1") == red(guide, "inf1") == {}
    until(guide.router, "! ip link show bulkhead-wg1 2> /dev/null")
    assert red(guide, "router1") == red(guide, "inf1") == {}


def test_a_server_is_sealed_and_comes_back_step_by_step(guide: Guide) -> None:
    made = json.loads(
        guide.bulkhead(guide.router, "incident", "seal", "--server", "inf1", "--reason", "rehearsal", "--json")
    )
    assert guide.ask("--json", '{"prompt": "anybody?"}').returncode == 1
    assert set(red(guide, "router1")) <= {"wireguard peers", "wireguard handshakes", "upstream"}
    recover = ("bulkhead", "incident", "recover", made["id"])
    with pytest.raises(LabError):  # people have not looked at it yet
        guide.router.run(*recover)
    with pytest.raises(LabError, match=r"exit 2.*the CA is not on this machine.*bulkhead pki request"):
        guide.router.run(*recover, "--done", "review", "--done", "rebuild")
    guide.certify(ROUTER)
    with pytest.raises(LabError, match="left: verify"):  # the sealed server knows nothing of the router's new key
        guide.router.run(*recover)
    guide.bulkhead(guide.router, "wg", "export", "--out", "/root/router1.pub")
    guide.inference.write("/root/router1.pub", guide.router.run("cat", "/root/router1.pub"))
    guide.bulkhead(guide.inference, "wg", "add", "--replace", STATE, "/root/router1.pub")
    ready(guide)
    guide.router.run(*recover)
    assert guide.ask("--json", '{"prompt": "back"}').returncode == 0


def test_a_bad_state_file_and_a_restart_of_the_firewall_stop_nothing(guide: Guide) -> None:
    inside = guide.router
    inside.run("cp", "/etc/bulkhead/state.yaml", "/root/good.yaml")
    inside.write("/etc/bulkhead/state.yaml", "security: {role: router\n")
    try:
        for verb in ("reload", "restart"):
            with pytest.raises(LabError):
                inside.run("systemctl", verb, "bulkhead-firewall.service")
            inside.run("systemctl", "is-active", "bulkhead-router.service", "bulkhead-wg.service")
            inside.run("nft", "list", "table", "inet", "bulkhead")
            assert guide.ask("--json", '{"prompt": "still there"}').returncode == 0
        with pytest.raises(LabError):  # but nothing starts without a firewall
            inside.run("systemctl", "restart", "bulkhead-router.service")
    finally:
        inside.run("cp", "/root/good.yaml", "/etc/bulkhead/state.yaml")
        inside.run("systemctl", "restart", "bulkhead-firewall.service", "bulkhead-router.service")
    ready(guide)
    guide.wait()


def test_the_monthly_chores_deliver_certificates_to_another_user(guide: Guide) -> None:
    inside, ca, there = guide.inference, "/var/lib/bulkhead/security/trial", "/var/lib/bulkhead/inference/trial"
    drop_in = "/etc/systemd/system/bulkhead-chores@monthly.service.d"
    inside.write(f"{drop_in}/trial.conf", f"[Service]\nEnvironment=BULKHEAD_SECURITY_DIR={ca}\n")
    try:
        inside.run("systemctl", "daemon-reload")
        for words in ("init home", "issue probe --kind peer", f"export probe --to {there} --owner inference"):
            guide.bulkhead(inside, "pki", *words.split(), "--security-dir", ca)
        inside.run("rm", f"{there}/crl.pem")
        inside.run("sh", "-c", "systemctl start bulkhead-chores@monthly.service || true")  # here all else is unknown
        assert inside.run("stat", "-c", "%U", f"{there}/crl.pem").strip() == "inference"
    finally:
        inside.run("rm", "-rf", drop_in, ca, there)
        inside.run("systemctl", "daemon-reload")
        inside.run("sh", "-c", "systemctl reset-failed bulkhead-chores@monthly.service || true")


def test_the_plug_is_pulled_and_all_comes_back_by_itself(guide: Guide) -> None:
    guide.bulkhead(guide.router, "incident", "seal", "--server", "203.0.113.66", "--reason", "rehearsal")
    for server in (ROUTER, INFERENCE):
        guide.reboot(server)
    ready(guide)
    guide.wait()
    assert guide.ask("--json", '{"prompt": "hello"}').returncode == 0
    assert "203.0.113.66" in guide.router.run("nft", "list", "table", "inet", "bulkhead_seal")


def test_all_is_green_again(guide: Guide) -> None:
    assert bad(guide, "router1") == {}
    assert bad(guide, "inf1") == {}
