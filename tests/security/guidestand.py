"""What the tests of the guide's machines share."""

from __future__ import annotations

import time

from lab.guide import Guide
from lab.machine import LabError, Machine

STATE = "/etc/bulkhead/state.yaml"


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
