"""A node run by its units, on a machine with a systemd of its own: each part as its own user, and what they need of each other."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from lab.machine import LabError, Machine

pytestmark = pytest.mark.root
UNITS = ("bulkhead-store", "bulkhead-controller", "bulkhead-agent", "bulkhead-api")
STATE = """
networks:
  privacy: {bridge: vmbr0, subnet: 10.8.0.0/24, gateway: 10.8.0.1, ids: "100-199"}
  management: {bridge: vmbr1, subnet: 10.9.0.0/24, gateway: 10.9.0.1, ids: "200-250"}
host: {datapath: netdev}
lxc:
  containers:
    - {id: 101, veth: v101, bridge: vmbr0, running: true, properties: {name: a, ipv4_address: 10.8.0.101/24}}
    - {id: 201, veth: v201, bridge: vmbr1, running: true, properties: {name: b, ipv4_address: 10.9.0.201/24}}
"""
SETUP = f"""
rm -rf /etc/openvswitch; mkdir -p /etc/openvswitch /var/log/openvswitch
bulkhead units install > /dev/null; systemd-sysusers; systemd-tmpfiles --create /etc/tmpfiles.d/bulkhead.conf
systemctl daemon-reload
systemctl enable --now openvswitch-switch
systemctl enable --now {" ".join(UNITS)}
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine("node1", tmp_path_factory.mktemp("node") / "disk")
    try:
        made.on()
        made.write("/etc/bulkhead/state.yaml", STATE)
        made.run("sh", "-ec", SETUP)
        yield made
    finally:
        made.close()


def ready(machine: Machine, names: set[str], limit_s: float = 30) -> dict[str, str]:
    """Wait until these containers are ready; their addresses."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            listed = json.loads(machine.run("bulkhead", "container", "list", "--json"))
            rows = listed["containers"] if isinstance(listed, dict) else listed
        except LabError as exc:
            rows, said = [], str(exc)
        else:
            said = json.dumps(rows)
        if {row["name"] for row in rows if row["state"] == "ready"} >= names:
            return {row["name"]: row["address"] for row in rows}
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def test_a_container_by_the_api_answers_on_its_network_alone(machine: Machine) -> None:
    ready(machine, {"a", "b"})
    machine.run("bulkhead", "container", "create", "probe", "--network", "management")
    address = ready(machine, {"probe"})["probe"]
    assert " 0% packet loss" in machine.run(
        "ip", "netns", "exec", "bulkhead-201", "ping", "-c3", "-i0.2", "-W2", address
    )
    with pytest.raises(LabError):
        machine.run("ip", "netns", "exec", "bulkhead-101", "ping", "-c1", "-W1", address)


def test_each_part_runs_as_its_own_user(machine: Machine) -> None:
    users = {}
    for unit in UNITS:
        pid = machine.run("systemctl", "show", "--value", "-p", "MainPID", unit).strip()
        users[unit] = machine.run("stat", "-c", "%U", f"/proc/{pid}").strip()
    assert users == dict(zip(UNITS, ("bulkhead", "bulkhead", "root", "bulkhead-api"), strict=True))


def test_a_restart_of_every_unit_loses_nothing(machine: Machine) -> None:
    address = ready(machine, {"a", "b", "probe"})["probe"]
    ping = f"ip netns exec bulkhead-201 ping -i 0.02 -c 500 -q {address} > /tmp/pinged & sleep 1"
    machine.run("sh", "-ec", f"{ping}; systemctl restart {' '.join(UNITS)}; wait")
    assert re.search(r"500 packets transmitted, 500 received", machine.run("cat", "/tmp/pinged"))
    ready(machine, {"a", "b", "probe"})
    assert machine.run("systemctl", "list-units", "--failed", "--no-legend", "bulkhead*") == ""


def test_the_plug_is_pulled_and_all_comes_back(machine: Machine) -> None:
    machine.off()
    machine.on()
    address = ready(machine, {"a", "b", "probe"}, 60)["probe"]
    assert " 0% packet loss" in machine.run(
        "ip", "netns", "exec", "bulkhead-201", "ping", "-c3", "-i0.2", "-W2", address
    )


def test_the_api_s_user_moves_away_nothing_that_root_keeps_beside_the_sockets(machine: Machine) -> None:
    assert machine.run("stat", "-c", "%U", "/run/bulkhead/agent").strip() == "root"
    who = ("setpriv", "--reuid=bulkhead-api", "--regid=bulkhead-api", "--init-groups")
    machine.run(*who, "test", "-w", "/run/bulkhead")
    for name in ("agent", "controller.sock"):
        with pytest.raises(LabError, match="not permitted"):
            machine.run(*who, "mv", f"/run/bulkhead/{name}", "/run/bulkhead/gone")
