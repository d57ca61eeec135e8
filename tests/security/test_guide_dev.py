"""The guide's role dev on a machine with a systemd of its own: router and inference server on one host, joined by a socket."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from lab.machine import LabError, Machine

pytestmark = pytest.mark.root
STATE = "/etc/bulkhead/state.yaml"
SOCKET = "/run/bulkhead-inference/inference.sock"
SETUP = """
bulkhead units install > /dev/null; systemd-sysusers; systemctl daemon-reload
systemd-tmpfiles --create /etc/tmpfiles.d/bulkhead.conf
systemctl enable --now bulkhead-firewall.service
bulkhead pki init home
bulkhead pki issue dev1 --kind server --ip 127.0.0.1 --dns llm.example
install -d -m 700 -o router -g router /var/lib/bulkhead/router
bulkhead pki export dev1 --to /var/lib/bulkhead/router/pki --owner router
systemctl enable --now bulkhead-inference bulkhead-router
systemctl enable --now bulkhead-minute.timer bulkhead-hourly.timer bulkhead-weekly.timer bulkhead-monthly.timer
bulkhead client keygen /root/laptop
bulkhead client register laptop /root/laptop.pub
"""
DAMAGES = {
    "socket-open-to-all": ("socket mode", f"chmod 666 {SOCKET}", f"chmod 660 {SOCKET}"),
    "socket-of-another-group": ("socket group", f"chgrp users {SOCKET}", f"chgrp router {SOCKET}"),
    "socket-is-a-file": (
        "socket",
        f"mv {SOCKET} /run/bulkhead-inference/kept; touch {SOCKET}",
        f"mv /run/bulkhead-inference/kept {SOCKET}",
    ),
    "rule-added": (
        "firewall rules",
        "nft insert rule inet bulkhead input tcp dport 8001 accept",
        f"bulkhead firewall apply {STATE}",
    ),
    "inference-not-at-boot": (
        "starts with the host",
        "systemctl disable bulkhead-inference",
        "systemctl enable bulkhead-inference",
    ),
    "certificate-past": (
        "certificate names",
        f"sed -i s/llm.example/x.example/ {STATE}",
        f"sed -i s/x.exa/llm.exa/ {STATE}",
    ),
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine("dev1", tmp_path_factory.mktemp("dev") / "disk")
    try:
        made.on()
        text = f"{{role: dev, name: dev1, names: [llm.example], inference: {{socket: {SOCKET}, group: router}}}}"
        made.write(STATE, f"security: {text}\n")
        made.run("sh", "-ec", SETUP)
        yield made
    finally:
        made.close()


def lines(machine: Machine) -> dict[str, str]:
    """The lines that are not good, with their status."""
    command = machine.command("bulkhead", "verify-network-config", STATE, "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)["checks"]
    return {line["check"]: f"{line['status']} {line['seen']}" for line in found if line["status"] != "ok"}


def ask(machine: Machine) -> str:
    return machine.run(
        "bulkhead", "client", "call", "https://127.0.0.1/v1/chat", "--key", "/root/laptop",
        "--ca", "/var/lib/bulkhead/security/pki/ca.pem", "--json", '{"prompt": "alpha beta"}', "--stream",
    )  # fmt: skip


def test_it_answers_and_is_green(machine: Machine) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            assert '"alpha"' in ask(machine)
            break
        except LabError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert lines(machine) == {}
    for chore in ("minute", "hourly", "weekly", "monthly"):
        machine.run("systemctl", "start", f"bulkhead-chores@{chore}.service")
        assert "ExecMainStatus=0" in machine.run("systemctl", "show", f"bulkhead-chores@{chore}.service")


@pytest.mark.parametrize("name", DAMAGES)
def test_each_single_damage_turns_its_own_line_red(machine: Machine, name: str) -> None:
    line, do, undo = DAMAGES[name]
    machine.run("sh", "-ec", do)
    try:
        found = lines(machine)
    finally:
        machine.run("sh", "-ec", undo)
    assert {check for check, seen in found.items() if seen.startswith("BAD")} == {line}, found


def test_all_is_green_again(machine: Machine) -> None:
    assert lines(machine) == {}
