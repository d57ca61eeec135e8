"""LXC containers as the agent makes them: real ones, in network namespaces that are there before them."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

from controller.agent.lxc import Init, Lxc, LxcContainer, first_id
from controller.agent.resource import Resource, Waiting
from controller.hostmodel import Container, Driver
from controller.model import Ipv4, Mac, Member

from .apart import apart

MEMBER = Member("102", "web", "veth102", Mac.parse("02:00:00:00:01:02"), Ipv4.parse("10.0.0.102"))
BUSYBOX = Container("102", Driver.LXC, template="busybox", dns=(Ipv4.parse("10.0.0.53"),))


def network(namespace: str = "bulkhead-102") -> None:
    """The namespace with its interface, as the agent has made it, and a host at its other end."""
    script = f"""
        ip netns add {namespace}
        ip link add veth102 type veth peer name eth0 netns {namespace}
        ip address add 10.0.0.1/24 dev veth102; ip link set veth102 up
        ip -n {namespace} link set lo up; ip -n {namespace} link set eth0 up
        ip -n {namespace} address add 10.0.0.102/24 dev eth0"""
    subprocess.run(["sh", "-ec", script], check=True)


async def realize(resource: Resource, limit_s: float = 20) -> list[str]:
    """Do what is to be done until nothing is, as the reconciler does."""
    done = []
    deadline = time.monotonic() + limit_s
    while True:
        try:
            changes = await resource.diff()
            if not changes:
                return done
            for change in changes:
                await change.do()
                done.append(str(change))
        except Waiting as exc:
            assert time.monotonic() < deadline, exc
            await asyncio.sleep(exc.retry_s or 0.1)


def inside(lxc: Lxc, script: str) -> str:
    """What a script prints in the container."""
    line = ["lxc-attach", "-P", str(lxc.path), "-n", "102", "--clear-env", "--", "/bin/sh", "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, (script, done)
    return done.stdout


async def stopped(lxc: Lxc) -> None:
    await lxc.remove("102")
    assert lxc.ids() == []


async def init_of(lxc: Lxc) -> Init:
    init = await lxc.init("102")
    assert init is not None
    return init


@apart
async def test_a_container_is_there_with_its_first_packet_in_time(tmp_path: Path) -> None:
    network()
    lxc = Lxc(tmp_path / "lxc", tmp_path / "log")
    began = time.monotonic()
    done = await realize(LxcContainer(lxc, MEMBER, BUSYBOX, search="priv.internal"))
    subprocess.run(["ping", "-c1", "-W1", "-q", "10.0.0.102"], check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    print(f"first packet after {took:.2f} s: {done}")
    try:
        assert took < 3
        assert lxc.ids() == ["102"]
        assert inside(lxc, "hostname") == "web\n"
        assert inside(lxc, "cat /etc/resolv.conf") == "search priv.internal\nnameserver 10.0.0.53\n"
        assert inside(lxc, "id -u") == "0\n"
        assert Path(f"/proc/{(await init_of(lxc)).pid}").stat().st_uid == first_id("102")
        assert "80" in inside(lxc, "httpd -p 80 && netstat -tln")
        assert (tmp_path / "lxc/102").stat().st_mode & 0o777 == 0o700
        # Nothing to do for another one that looks, as after a restart of the agent, and the same container goes on.
        before = await init_of(lxc)
        again = Lxc(tmp_path / "lxc", tmp_path / "log")
        began = time.monotonic()
        container = LxcContainer(again, MEMBER, BUSYBOX, search="priv.internal")
        assert await container.diff() == [] and await init_of(again) == before
        began = time.monotonic()
        assert await container.diff() == []
        assert time.monotonic() - began < 0.01
    finally:
        await stopped(lxc)
