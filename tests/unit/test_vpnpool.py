"""Clients of the VPN server: addresses, keys, and what comes out of files and records together."""

from __future__ import annotations

import base64
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.agent.resource import Failed
from controller.agent.vpn import Clients
from controller.hostmodel import Endpoint, Tunnel, VpnServer
from controller.model import Ipv4, Prefix
from controller.problems import BulkheadError
from controller.records import ClientRecord
from controller.vpnpool import PUBLIC_KEY, configuration, free_address, new_client, server_public_key
from controller.wgkeys import Secret, public_key

POOL = Prefix.parse("10.8.0.0/29")


@given(st.sets(st.integers(0, 7)))
def test_a_free_address_is_nobodys(taken: set[int]) -> None:
    there = {Ipv4(POOL.address + number) for number in taken}
    free = free_address(POOL, there)
    wanted = sorted(set(range(2, 7)) - taken)
    assert free == (Ipv4(POOL.address + wanted[0]) if wanted else None)


@given(st.binary(min_size=32, max_size=32))
def test_public_halves_are_those_that_wg_makes(raw: bytes) -> None:
    key = base64.b64encode(raw).decode()
    done = subprocess.run(["wg", "pubkey"], input=key, capture_output=True, text=True, check=True)
    assert public_key(Secret(key)) == done.stdout.strip()


def test_a_new_client_and_its_file() -> None:
    record, private = new_client("phone", "one", Ipv4.parse("10.8.0.2"), "uid:0", 12.0)
    assert (record.name, record.node, record.address, record.created_at) == ("phone", "one", "10.8.0.2", 12.0)
    assert record.public_key == public_key(private)
    server = VpnServer("100", Tunnel("wg0", mtu=1280), POOL, dns=(Ipv4.parse("10.0.0.53"),))
    text = configuration(record.address, private, record.preshared_key, server, Endpoint("192.0.2.1", 51820), "KEY=")
    assert f"PrivateKey = {private.reveal()}\nAddress = 10.8.0.2/32\nDNS = 10.0.0.53\nMTU = 1280\n" in text
    assert f"PresharedKey = {record.preshared_key}\n" in text
    assert private.reveal() not in repr((record, private)) and record.preshared_key not in repr(record)


def test_peers_come_from_files_and_records(tmp_path: Path) -> None:
    records: list[ClientRecord] = []
    clients = Clients(tmp_path, lambda: records)
    filed, _ = clients.add("laptop", POOL)
    before = clients.stamp
    record, _ = new_client("phone", "one", Ipv4.parse("10.8.0.3"))
    records.append(record)
    assert clients.stamp != before
    assert [peer.public_key for peer in clients.peers()] == [filed.public_key, record.public_key]
    assert clients.add("tablet", POOL)[0].address == Ipv4.parse("10.8.0.4")
    records.append(replace(record, name="twin", address="10.8.0.5"))
    with pytest.raises(Failed, match="twin has the key of phone"):
        clients.all()
    records[1:] = [replace(record, name="bad", public_key="x")]
    with pytest.raises(Failed, match="bad has no good keys"):
        clients.all()
    assert len(clients.peers()) == 3
    del records[1:]
    with pytest.raises(Failed, match="Phone already"):
        clients.add("Phone", POOL)


def test_files_become_records(tmp_path: Path) -> None:
    files = Clients(tmp_path)
    client, _ = files.add("laptop", POOL)
    moved = files.as_records("one")
    assert Clients(tmp_path, lambda: moved).all() == [client]
    files.forget("laptop")
    files.forget("laptop")
    assert files.all() == [] and moved[0].created_at > 0
    assert Clients(tmp_path, lambda: moved).all() == [client]


def test_the_servers_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(BulkheadError, match="bulkhead status"):
        server_public_key(tmp_path)
    _, private = new_client("phone", "one", Ipv4.parse("10.8.0.3"))
    (tmp_path / PUBLIC_KEY).parent.mkdir()
    (tmp_path / PUBLIC_KEY).write_text(public_key(private) + "\n")
    assert server_public_key(tmp_path) == public_key(private)
