"""The whole guide on machines with a systemd of their own: what it says works, from a streamed answer to an incident's end."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import time
from pathlib import Path

import pytest

from controller.security.pki import Pki, making
from controller.security.pki.identity import Identity, Usage
from lab.guide import CA_FILE, INFERENCE, ROUTER, Guide, tokens
from lab.machine import LabError
from tests.security.guidestand import STATE, bad, ready, red, until

PAIR = "/var/lib/bulkhead/security/pki/current"
pytestmark = pytest.mark.root


def test_a_streamed_answer_by_tls_hpke_wireguard_and_mutual_tls(guide: Guide) -> None:
    done = guide.ask("--json", '{"prompt": "alpha beta gamma delta epsilon"}', "--stream")
    assert done.returncode == 0, done.stderr
    words, times = zip(*tokens(done.stdout), strict=True)
    assert words == ("alpha", "beta", "gamma", "delta", "epsilon")
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def test_both_machines_are_green(guide: Guide) -> None:
    assert bad(guide, "router1") == {}
    assert bad(guide, "inf1") == {}


def test_the_chores_find_nothing_bad(guide: Guide) -> None:
    for machine in guide.machines.values():
        for chore in ("minute", "hourly", "weekly", "monthly"):
            machine.run("systemctl", "start", f"bulkhead-chores@{chore}.service")
            shown = machine.run("systemctl", "show", "-p", "ExecMainStatus", f"bulkhead-chores@{chore}.service")
            journal = machine.run("journalctl", "-b", "-u", f"bulkhead-chores@{chore}.service")
            assert shown.strip() == "ExecMainStatus=0", journal
    assert "laptop" in guide.router.run("journalctl", "-b", "-u", "bulkhead-chores@weekly.service")


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
    guide.wait()


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
    guide.wait()


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
    assert "203.0.113.66" in guide.router.run("nft", "list", "table", "inet", "bulkhead_seal")


def test_with_a_wrong_state_file_the_last_firewall_is_there_after_a_restart(guide: Guide) -> None:
    kept = guide.inference.run("cat", STATE)
    guide.inference.write(STATE, "security: {role: nonsense}\n")
    guide.reboot(INFERENCE)
    rules = guide.inference.run("nft", "list", "chain", "inet", "bulkhead", "input")
    assert "policy drop" in rules and "tcp dport 22 accept" in rules
    journal = guide.inference.run("journalctl", "-b", "-u", "bulkhead-firewall")
    assert "security.role" in journal and "what the last good one asked for is loaded" in journal
    guide.inference.write(STATE, kept)
    guide.reboot(INFERENCE)
    ready(guide)


def test_all_is_green_again(guide: Guide) -> None:
    assert bad(guide, "router1") == {}
    assert bad(guide, "inf1") == {}
