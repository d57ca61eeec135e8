"""Endpoints by name: nobody waits for a resolver, a tunnel that works does not move, and one bad name harms no other."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from controller.agent.resource import Failed, Waiting
from controller.agent.wireguard import Resolver, show
from controller.hostmodel import Endpoint, Peer, Tunnel
from controller.model import Prefix
from controller.wgkeys import new_private_key, public_key

from .apart import apart
from .test_wireguard import DEVICE, LEG, World, sh

SILENT = """
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.53", 53)); print(flush=True); time.sleep(60)
"""


def own_names(directory: Path) -> Path:
    """A hosts file of one's own, and a name server that never answers."""
    hosts, servers = directory / "hosts", directory / "resolv.conf"
    hosts.write_text("")
    servers.write_text("nameserver 127.0.0.53\noptions timeout:20\n")
    sh(f"mount --bind {hosts} /etc/hosts; mount --bind {servers} /etc/resolv.conf")
    silent = subprocess.Popen([sys.executable, "-c", SILENT], stdout=subprocess.PIPE)
    assert silent.stdout is not None and silent.stdout.readline()
    return hosts


def dial(world: World, *hosts: str) -> None:
    """The far end by the first name, and a peer that is not there for each other one."""
    first = replace(world.tunnel.peers[0], endpoint=Endpoint(hosts[0], 40001))
    others = (
        Peer(public_key(new_private_key()), (Prefix.parse(f"10.77.{number}.0/24"),), Endpoint(host, 1))
        for number, host in enumerate(hosts[1:])
    )
    world.tunnel = replace(world.tunnel, peers=(first, *others))


@apart
async def test_what_is_known_stays_and_what_is_asked_holds_nobody_up(directory: Path) -> None:
    hosts = own_names(directory)
    hosts.write_text("192.0.2.1 one.example\n2001:db8::1 one.example\n192.0.2.2 one.example\n")
    names = Resolver()
    names.LIMIT_S, names.PATIENCE_S = 0.5, 10.0
    with pytest.raises(Waiting):
        names.address("one.example", "192.0.2.2")
    await names.wait()
    assert names.address("one.example", again=True) == "192.0.2.2"  # the one in use, and not asked again so soon
    assert not names._asking
    for name in ("two.example", "-h", "a..b", "\u00e4" * 70):
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(Waiting):
                names.address(name)
        assert time.monotonic() - began < 0.2
        await names.wait()
        with pytest.raises(Failed, match="does not resolve; write its address"):
            names.address(name)
    names.AGAIN_S = 0.0
    for text, wanted in (("192.0.2.3 one.example\n", "192.0.2.3"), ("", "192.0.2.3")):
        hosts.write_text(text)
        names.address("one.example", again=True)
        await names.wait()
        assert names.address("one.example") == wanted  # the last known is better than none


@apart
async def test_a_resolver_that_is_silent_does_not_keep_the_agent_from_ending(directory: Path) -> None:
    own_names(directory)
    code = """
import asyncio, time
from controller.agent.wireguard import Resolver
print(time.monotonic())
async def main():
    try: Resolver().address("nobody.example")
    except Exception as exc: print(exc)
asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    ended = time.monotonic()
    began, _, said = done.stdout.partition("\n")  # how long Python takes to start is another matter
    assert (said, done.stderr) == ("the endpoint nobody.example is being resolved\n", "")
    assert ended - float(began) < 4


@apart
async def test_a_tunnel_that_works_does_not_move_with_its_name(directory: Path) -> None:
    hosts = own_names(directory)
    hosts.write_text("192.0.2.2 far.example\n")
    world = World(directory)
    dial(world, "far.example")
    await world.settle()
    hosts.write_text("192.0.2.9 far.example\n192.0.2.2 far.example\n")
    world.wireguard._names.AGAIN_S = 0.0
    await world.look()
    world.begin()  # nor with a new agent, as long as its address is among the answers
    await world.settle()
    assert (await show(DEVICE, LEG))[0].endpoint == "192.0.2.2:40001"
    assert not [told for told in world.told if "endpoint" in told]


@apart
async def test_a_name_that_does_not_resolve_harms_no_other_peer(directory: Path) -> None:
    hosts = own_names(directory)
    hosts.write_text("192.0.2.2 far.example\n")
    world = World(directory)
    dial(world, "far.example", "nobody.example")
    world.wireguard._names.LIMIT_S = 0.5
    for _ in range(60):
        why = await world.look()
        if "does not resolve" in why:
            break
        await asyncio.sleep(0.1)
    assert "the endpoint nobody.example does not resolve" in why
    assert sorted(peer.endpoint for peer in await show(DEVICE, LEG)) == ["", "192.0.2.2:40001"]
    began = time.monotonic()
    sh(f"wg set {DEVICE} private-key /dev/null")
    await world.look()
    assert sh(f"wg show {DEVICE} private-key").strip() == world.private.reveal()
    assert time.monotonic() - began < 2  # healed, though not all is well
    hosts.write_text("192.0.2.2 far.example\n192.0.2.8 nobody.example\n")
    await world.settle()
    assert sorted(peer.endpoint for peer in await show(DEVICE, LEG)) == ["192.0.2.2:40001", "192.0.2.8:1"]


@apart
async def test_a_port_that_nobody_chose_stays(directory: Path) -> None:
    world = World(directory)
    world.tunnel = replace(world.tunnel, listen_port=None)
    await world.settle()
    port = sh(f"wg show {DEVICE} listen-port")
    sh(f"wg set {DEVICE} peer {world.tunnel.peers[0].public_key} persistent-keepalive 9")
    await world.settle()
    assert sh(f"wg show {DEVICE} listen-port") == port


@apart
async def test_what_of_a_file_is_left_out_is_told_once(directory: Path) -> None:
    world = World(directory)
    file = directory / "warp.conf"
    text = f"[Interface]\nPrivateKey = {world.private.reveal()}\nPostUp = touch {directory}/never\n"
    file.write_text(text + f"[Peer]\nPublicKey = {public_key(world.far)}\nAllowedIPs = ::/0\n")
    file.chmod(0o600)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bulkhead.agent").addHandler(handler)
    world.tunnel = Tunnel(DEVICE, config=file)
    for _ in range(4):
        await world.look()
    assert [line.split(":")[2] for line in told] == ["3", "6"]
    assert "it is not run" in told[0] and "::/0" in told[1] and world.private.reveal() not in str(told)
    assert not (directory / "never").exists()
