"""Each single damage to the guide's machines, done to real ones with a systemd of their own, is told by its own line."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from lab.guide import Guide
from tests.security.guidestand import STATE, bad, ready, red, until

pytestmark = pytest.mark.root
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


def test_a_server_that_is_away_is_told_by_the_router(guide: Guide) -> None:
    guide.inference.run("systemctl", "stop", "bulkhead-inference")
    try:
        assert set(red(guide, "router1")) == {"upstream"}
    finally:
        guide.inference.run("systemctl", "start", "bulkhead-inference")
    ready(guide)


def test_all_is_green_again(guide: Guide) -> None:
    assert bad(guide, "router1") == {}
    assert bad(guide, "inf1") == {}
