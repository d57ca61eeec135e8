"""Agent and controller follow the store: what it holds is built, what it gives up goes, and its end changes nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.realized import Realized, realized
from controller.records import ContainerRecord, ServiceRecord
from controller.store import Store
from lab.ovs import die_with_parent

from .agent_host import BareHost
from .test_agent_attacks import inner, rich, told

SCHEMA = Path(__file__).parents[2] / "controller/store/bulkhead.ovsschema"
NODE = "oo1424oo"
TOR = ContainerRecord("103", "tor-relay", "privacy", NODE, "10.0.0.2", (ServiceRecord("tor", "tcp", 9001),))


class Stored:
    """A host with a store, agent and controller that follow it."""

    def __init__(self, host: BareHost) -> None:
        self.host = host
        self.address = f"unix:{host.run_dir}/store.sock"
        self.env = {"BULKHEAD_STORE": self.address, "BULKHEAD_NODE": NODE}
        self._db = host.directory / "store.db"
        host.run_dir.mkdir()
        subprocess.run(["ovsdb-tool", "create", self._db, SCHEMA], check=True)
        self.serve()
        self.store = Store([self.address])
        self.agent = host.start("agent", self.env)
        host.start("controller", self.env)

    def serve(self) -> None:
        """Start the server."""
        command = ["ovsdb-server", self._db, f"--remote=p{self.address}", f"--unixctl={self.host.directory}/store.ctl"]
        self.server = subprocess.Popen([*command, "-vconsole:off"], preexec_fn=die_with_parent)

    def end(self) -> None:
        """Kill the server."""
        self.server.kill()
        self.server.wait()

    def close(self) -> None:
        """End it all."""
        self.store.close()
        self.end()

    def wait(self, revision: int, *keys: str, limit_s: float = 20) -> None:
        """Until a revision is realized."""
        found = Realized(False)
        deadline = time.monotonic() + limit_s
        while not found.done:
            assert time.monotonic() < deadline, (found, self.host.log("agent")[-1000:])
            time.sleep(0.01)
            found = realized(self.store.records.node(NODE), revision, (*keys, "network/privacy"))

    def put(self, record: ContainerRecord) -> None:
        """Store a container, and wait until it is there."""
        self.wait(self.store.change(lambda change: change.put(record))[1], f"container/{record.id}")

    def delete(self, key: str) -> None:
        """Delete it, and wait until it is gone."""
        self.wait(self.store.change(lambda change: change.delete(key))[1], key)


@pytest.fixture(scope="module")
def stored() -> Iterator[Stored]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        with BareHost(Path(directory), rich()) as host:
            found = Stored(host)
            try:
                host.settle(60)
                found.store.start()
                yield found
            finally:
                found.close()


def test_a_stored_container_is_reached_and_has_a_name_and_goes(stored: Stored) -> None:
    host = stored.host
    stored.put(TOR)
    assert host.reaches("100", "10.0.0.2")
    assert not host.reaches("103", "10.1.0.201")
    names = host.inside(
        "100", "python3", "-c", "import socket; print(socket.gethostbyname('tor-relay.privacy.internal'))"
    )
    assert names.strip() == "10.0.0.2"
    before = host.facts()["namespaces"]
    stored.delete("container/103")
    assert host.facts()["namespaces"].split() == [name for name in before.split() if name != "bulkhead-103"]
    assert "veth103" not in host.facts()["links"]
    assert "veth103" not in host.ovs.vsctl("list-ports", "vmbr0").split()


def test_what_contradicts_the_file_is_refused_by_name(stored: Stored) -> None:
    _, revision = stored.store.change(
        lambda change: change.put(ContainerRecord("104", "xray", "privacy", NODE, "10.0.0.3"))
    )
    deadline = time.monotonic() + 10
    while not (found := realized(stored.store.records.node(NODE), revision, ["container/104"])).refused:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    assert "duplicate-name" in found.why and "lxc.containers[1]" in found.why
    assert not stored.host.reaches("100", "10.0.0.3")
    stored.delete("container/104")


def test_nothing_is_taken_away_while_the_store_is_gone(stored: Stored) -> None:
    """Not by agent and controller that run, nor by those that are started meanwhile; and all goes on when it is back."""
    host = stored.host
    stored.put(TOR)
    stored.end()
    assert host.reaches("100", "10.0.0.2")
    seen = max(int(str(event["seq"])) for event in told(host))
    os.kill(inner(stored.agent), signal.SIGKILL)
    stored.agent.wait()
    stored.agent = host.start("agent", stored.env)
    host.until(lambda: any(one["object"] == "store" for one in told(host, seen) if "object" in one), 20, "told")
    assert host.reaches("100", "10.0.0.2")
    stored.serve()
    stored.put(ContainerRecord("105", "late", "privacy", NODE, "10.0.0.4"))
    host.settle(20)
    assert host.reaches("105", "10.0.0.2")
    for key in ("container/103", "container/105"):
        stored.delete(key)


def test_the_flows_of_stored_containers_outlive_a_restart_of_the_controller(stored: Stored) -> None:
    host = stored.host
    stored.put(TOR)
    number = host.ovs.port_numbers("vmbr0")["veth103"]
    for pid in host.machine.run("pgrep", "-f", "main.. controller").split():
        host.machine.run("kill", "-9", pid)
    began, ended = len(host.log("controller")), time.monotonic()
    host.start("controller", stored.env)
    host.until(lambda: "vmbr0 adopted" in host.log("controller")[began:], 20, "adopted")
    mine = [flow for flow in host.ovs.ofctl("dump-flows", "vmbr0").splitlines() if f"in_port={number}" in flow]
    ages = [float(re.findall(r"duration=([0-9.]+)s", flow)[0]) for flow in mine]
    assert len(ages) > 3 and min(ages) > time.monotonic() - ended
    assert host.reaches("100", "10.0.0.2")
    stored.delete("container/103")


def test_vpn_clients_from_before_the_store_are_handed_over(stored: Stored) -> None:
    host = stored.host
    os.kill(inner(stored.agent), signal.SIGKILL)
    stored.agent.wait()
    where = ["--file", str(host.state_file), "--endpoint", "192.0.2.1:51820", *host.options("run", "state")]
    added = host.bulkhead("vpn", "add", "phone", *where)
    assert added.returncode == 0, added.stderr
    stored.agent = host.start("agent", stored.env)
    host.until(lambda: [one.name for one in stored.store.records.clients] == ["phone"], 20, "handed over")
    (client,) = stored.store.records.clients
    assert client.preshared_key and client.preshared_key not in repr(client)
    host.until(lambda: not list((host.state_dir / "vpn").glob("*.json")), 5, "no file")
    host.settle(20)
    assert f"{client.address}/32" in host.inside("100", "wg", "show", "wg0", "allowed-ips")
