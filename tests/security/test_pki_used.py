"""The same certificates for OpenFlow, the store and the API: real processes that go on through renewal and revocation."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from controller.security.pki import Pki
from controller.store import Store, Tls
from tests.api.stand import stand
from tests.e2e.apart import apart
from tests.e2e.test_sockets import ADDRESS, container, serving
from tests.fakes.stores import Server, wait_for
from tests.store.test_store_cluster import free_ports

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A CA with a store's server, a node, a switch and a controller."""
    found = Pki(tmp_path / "pki")
    found.init("home")
    for name in ("store1", "node1", "node2", "switch1", "controller1"):
        found.issue(name, "peer", ["127.0.0.1"])
    return found


def pair(pki: Pki, name: str) -> tuple[Path, Path, Path]:
    """Key, certificate and CA as programs are given them."""
    return pki.holder.link(name) / "key.pem", pki.holder.link(name) / "cert.pem", pki.holder.ca


@pytest.mark.skipif(shutil.which("ovsdb-server") is None, reason="needs ovsdb-server")
def test_the_store_follows_renewal_and_a_new_ca(pki: Pki, tmp_path: Path) -> None:
    address = f"ssl:127.0.0.1:{free_ports(1)[0]}"
    server = Server(tmp_path / "store", [address], Tls(*pair(pki, "store1"))).start()

    def reachable(name: str) -> bool:
        found = Store([address], Tls(*pair(pki, name)))
        try:
            found.start(5)
            return True
        finally:
            found.close()

    try:
        assert reachable("node1")
        first = _shown(address, pki)
        pki.renew("store1")
        assert reachable("node1")
        wait_for(lambda: _shown(address, pki) != first, 10)
        for step in ("prepare", "switch", "finish"):
            pki.rotate_ca(step, settle_s=0)
            time.sleep(0.3)
            wait_for(lambda: reachable("node1"), 10)
        assert _shown(address, pki) not in ("", first)
    finally:
        server.kill()


def _shown(address: str, pki: Pki) -> str:
    """What the server shows as its certificate."""
    port = int(address.rpartition(":")[2])
    try:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=3)
    except (OSError, ssl.SSLError):
        return ""


@pytest.mark.skipif(shutil.which("ovs-vswitchd") is None, reason="needs Open vSwitch")
def test_switches_connect_with_it_and_not_when_they_are_revoked(pki: Pki) -> None:
    from tests.ovs.node import LISTEN, Controller, Node, NodeSettings

    key, certificate, ca = map(str, pair(pki, "controller1"))
    with Node(NodeSettings(target=f"ssl:127.0.0.1:{LISTEN}")) as node:
        options = ("--private-key", key, "--certificate", certificate, "--ca-cert", ca, "--crl", str(pki.holder.crl))
        node.controller = Controller(node, node.file, listen=f"ssl:127.0.0.1:{LISTEN}", options=options)
        node.ovs.vsctl("set-ssl", *map(str, pair(pki, "switch1")))
        node.controller.start(wait=False)
        node.controller.wait_steady(timeout_s=20)
        pki.renew("controller1")
        pki.revoke("switch1")
        bridges = node.ovs.vsctl("list-br").split()
        for bridge in bridges:
            node.ovs.vsctl("del-controller", bridge)  # who is connected stays so
        wait_for(lambda: node.controller.events("switch_down"), 10)
        before = len(node.controller.events("switch_up"))
        for bridge in bridges:
            node.ovs.vsctl("set-controller", bridge, f"ssl:127.0.0.1:{LISTEN}")
        wait_for(lambda: "revoked" in node.controller.log(), 10)
        assert len(node.controller.events("switch_up")) == before
        node.ovs.vsctl("set-ssl", *map(str, pair(pki, "node1")))
        wait_for(lambda: len(node.controller.events("switch_up")) > before, 10)


SERIAL = """
import ssl, socket, sys
context = ssl.create_default_context(cafile=sys.argv[1])
with context.wrap_socket(socket.create_connection((sys.argv[2], 9573), 3), server_hostname=sys.argv[2]) as found:
    print(found.getpeercert()["serialNumber"])
"""


@apart
async def test_the_api_takes_up_a_renewed_certificate(directory: Path) -> None:
    """Real processes: an agent's sockets, the API behind them, somebody in the container's namespace."""
    container()
    pki = Pki(directory / "pki")
    pki.init("home")
    pki.issue("api1", "server", [ADDRESS], ["op-dbus-api"])
    async with serving(directory):
        await asyncio.to_thread(_with_api, directory, pki)


def _with_api(directory: Path, pki: Pki) -> None:
    key, certificate, ca = map(str, pair(pki, "api1"))

    def serial() -> str:
        command = ["ip", "netns", "exec", "bulkhead-201", sys.executable, "-c", SERIAL, ca, ADDRESS]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    with stand(directory, "--certificate", certificate, "--private-key", key):
        wait_for(serial, 20)
        first = serial()
        pki.renew("api1")
        wait_for(lambda: serial() not in ("", first), 10)
        for step in ("prepare", "switch", "finish"):
            pki.rotate_ca(step, settle_s=0)
        wait_for(serial, 10)
