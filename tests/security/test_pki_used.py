"""The same certificates for OpenFlow, the store and the API: real processes that go on through renewal and revocation."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import time
from pathlib import Path

import pytest

from controller.security.pki import Pki
from controller.store import Store, Tls
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


def test_the_api_takes_up_a_renewed_certificate(pki: Pki, tmp_path: Path) -> None:
    """Its listener, on a socket of this process: connections stay, new ones see the new certificate."""
    import socket
    from types import SimpleNamespace

    from controller.api import listener
    from controller.api_socket import Listening

    sock = socket.create_server(("127.0.0.1", 0))
    offers = [Listening(sock, "ns:1", "127.0.0.1", sock.getsockname()[1]), None, None]
    key, certificate, _ = pair(pki, "node1")
    state = SimpleNamespace(networks=[SimpleNamespace(subnet=["127.0.0.1"], egress=None, members=[], name="n")])
    host = SimpleNamespace(api=SimpleNamespace(container_id=1, address="127.0.0.1", port=offers[0].port), zones=[])
    settings = SimpleNamespace(run_dir=tmp_path, certificate=certificate, private_key=key)
    view = SimpleNamespace(declared=SimpleNamespace(state=state, host=host))

    async def scenario() -> None:
        async def opened(found: Listening, tls: ssl.SSLContext, _names: frozenset[str]) -> object:
            server = await asyncio.start_server(_echo, sock=found.sock, ssl=tls)
            return server.close

        found = listener.Listener(settings, view, opened)  # type: ignore[arg-type]
        await found.look()
        assert found.why == ""
        context = ssl.create_default_context(cafile=pki.holder.ca)
        reader, writer = await asyncio.open_connection("127.0.0.1", offers_port, ssl=context)
        first = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
        await asyncio.to_thread(pki.renew, "node1")
        await found.look()
        assert found.why == ""
        _, other = await asyncio.open_connection("127.0.0.1", offers_port, ssl=context)
        assert other.get_extra_info("ssl_object").getpeercert()["serialNumber"] != first
        writer.write(b"still\n")
        assert await reader.readline() == b"still\n"
        for each in (writer, other):
            each.close()
        found.close()

    offers_port = offers[0].port
    before = listener.listening_socket
    listener.listening_socket = lambda *_: offers.pop(0)  # type: ignore[assignment]
    try:
        asyncio.run(scenario())
    finally:
        listener.listening_socket = before


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line)
    writer.close()
