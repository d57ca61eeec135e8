"""LXC containers as the agent makes them: real ones, in network namespaces that are there before them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from controller.agent.lxc import Init, Lxc, LxcContainer, first_id
from controller.agent.resource import Failed, Resource, Waiting
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
                done.append(str(change))
                await change.do()
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
async def test_a_container_is_there_with_its_first_packet_in_time(directory: Path) -> None:
    network()
    lxc = Lxc(directory / "lxc", directory / "log")
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
        assert (directory / "lxc/102").stat().st_mode & 0o777 == 0o700
        # Nothing to do for another one that looks, as after a restart of the agent, and the same container goes on.
        before = await init_of(lxc)
        again = Lxc(directory / "lxc", directory / "log")
        began = time.monotonic()
        container = LxcContainer(again, MEMBER, BUSYBOX, search="priv.internal")
        assert await container.diff() == [] and await init_of(again) == before
        began = time.monotonic()
        assert await container.diff() == []
        assert time.monotonic() - began < 0.01
    finally:
        await stopped(lxc)


def network_inode() -> int:
    return os.stat("/run/netns/bulkhead-102").st_ino


@apart
async def test_the_namespace_outlives_the_container(directory: Path) -> None:
    network()
    lxc = Lxc(directory / "lxc", directory / "log")
    await realize(LxcContainer(lxc, MEMBER, BUSYBOX))
    first, inode = await init_of(lxc), network_inode()
    assert first.network == inode
    stop = LxcContainer(lxc, MEMBER, replace(BUSYBOX, running=False))
    began = time.monotonic()
    assert await realize(stop) == ["- running container 102 (web): it should not run"]
    print(f"stopped after {time.monotonic() - began:.1f} s")
    assert not first.alive and await lxc.init("102") is None
    assert lxc.ids() == ["102"] and network_inode() == inode
    assert "10.0.0.102" in inside_namespace("ip -4 address show eth0")
    began = time.monotonic()
    assert await realize(LxcContainer(lxc, MEMBER, BUSYBOX)) == ["+ running container 102 (web): it is stopped"]
    print(f"started after {time.monotonic() - began:.2f} s")
    subprocess.run(["ping", "-c1", "-W1", "-q", "10.0.0.102"], check=True, stdout=subprocess.DEVNULL)
    await stopped(lxc)


def inside_namespace(script: str) -> str:
    line = ["ip", "netns", "exec", "bulkhead-102", "sh", "-ec", script]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def forget_groups() -> None:
    """Take away the control groups that a killed monitor leaves, which are the machine's: those that are empty."""
    for group in Path("/sys/fs/cgroup").rglob("lxc.*.102*"):
        with contextlib.suppress(OSError):
            for inner in sorted(group.rglob("*/"), reverse=True):
                inner.rmdir()
            group.rmdir()


@apart
async def test_what_befalls_a_container_is_healed(directory: Path) -> None:
    network()
    lxc = Lxc(directory / "lxc", directory / "log")
    container = LxcContainer(lxc, MEMBER, BUSYBOX)
    await realize(container)
    # Its first process is killed, and then what watches over it.
    for victim in ("init", "monitor"):
        init = await init_of(lxc)
        stat = Path(f"/proc/{init.pid}/stat").read_text()
        os.kill(init.pid if victim == "init" else int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        while init.alive:
            await asyncio.sleep(0.01)
        await realize(container)
        assert (await init_of(lxc)).pid != init.pid
    forget_groups()
    # Its namespace is made anew; what runs in the old one cannot be reached.
    subprocess.run(["ip", "link", "delete", "veth102"], check=True)
    subprocess.run(["ip", "netns", "delete", "bulkhead-102"], check=True)
    network()
    done = await realize(container)
    assert done[0] == "~ running container 102 (web): it is not in bulkhead-102", done
    assert (await init_of(lxc)).network == network_inode()
    # It gets other resolvers while it runs, and a new name, for which it has to be started again.
    init = await init_of(lxc)
    await realize(LxcContainer(lxc, MEMBER, replace(BUSYBOX, dns=(Ipv4.parse("10.0.0.54"),))))
    assert await init_of(lxc) == init and inside(lxc, "cat /etc/resolv.conf") == "nameserver 10.0.0.54\n"
    await realize(LxcContainer(lxc, replace(MEMBER, name="shop"), BUSYBOX))
    assert await init_of(lxc) != init and inside(lxc, "hostname") == "shop\n"
    await stopped(lxc)


@apart
async def test_the_container_has_no_power_over_the_host(directory: Path) -> None:
    network()
    lxc = Lxc(directory / "lxc", directory / "log")
    await realize(LxcContainer(lxc, MEMBER, BUSYBOX))
    for deed in (
        "ifconfig eth0 10.0.0.103",
        "ip link set eth0 address 02:00:00:00:00:99",
        "ip route add default via 10.0.0.9",
        "mknod /tmp/disk b 254 0",
        "echo 1 > /proc/sys/kernel/panic",
        "echo b > /proc/sysrq-trigger",
        "mount -t sysfs none /mnt",
        "touch /lib/x",
    ):
        assert inside(lxc, f"({deed}) 2>/dev/null || echo refused") == "refused\n", deed
    assert inside(lxc, "ls /sys/class/net").split() == ["eth0", "lo"], "of its own namespace"
    # Nobody on the host gets at its programs: its root may make them setuid.
    inside(lxc, "cp /bin/busybox /tmp/x; chmod 4755 /tmp/x; chmod 777 /tmp")
    program = directory / "lxc/102/rootfs/tmp/x"
    assert program.stat().st_mode & 0o4000
    # The shell in between: setpriv has its rights until it has become another program.
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c")
    denied = subprocess.run([*nobody, str(program)], capture_output=True, text=True)
    assert "Permission denied" in denied.stderr, denied
    # A link in place of its resolv.conf or /etc does not lead the agent out.
    secret = directory / "secret"
    secret.write_text("secret\n")
    container = LxcContainer(lxc, MEMBER, replace(BUSYBOX, dns=(Ipv4.parse("10.0.0.54"),)))
    inside(lxc, f"rm /etc/resolv.conf; ln -s {secret} /etc/resolv.conf")
    await realize(container)
    assert secret.read_text() == "secret\n" and inside(lxc, "cat /etc/resolv.conf") == "nameserver 10.0.0.54\n"
    inside(lxc, "rm -r /etc && ln -s / /etc")
    with pytest.raises(Failed, match="has no directory etc"):
        await container.diff()
    await stopped(lxc)
    assert not (directory / "lxc/102").exists() and secret.exists()


@apart
async def test_what_was_killed_half_way_is_made_again(directory: Path) -> None:
    network()
    path = directory / "lxc"
    half = path / ".new" / "tmpdead" / "102"
    half.mkdir(parents=True)
    (half / "config").write_text("half\n")
    lxc = Lxc(path, directory / "log")
    assert lxc.ids() == []
    await realize(LxcContainer(lxc, MEMBER, BUSYBOX))
    assert not half.exists() and lxc.ids() == ["102"]
    # Killed between any two steps: what is there is completed.
    (path / "102" / "config").unlink()
    init = await Lxc(path, directory / "log").init("102")
    assert init is None
    done = await realize(LxcContainer(Lxc(path, directory / "log"), MEMBER, BUSYBOX))
    assert done[0] == "~ configuration of container 102 (web): missing"
    await stopped(Lxc(path, directory / "log"))


async def made(lxc: Lxc, container_id: str) -> None:
    """Make a container, however long that takes here."""
    while not (lxc.path / container_id).exists():
        with contextlib.suppress(Waiting):
            await lxc.make(container_id, "busybox")
        await asyncio.sleep(0.1)


@apart
async def test_a_root_file_system_of_one_s_own_is_used_and_left(directory: Path) -> None:
    network()
    other = Lxc(directory / "other", directory / "log")
    await made(other, "102")
    rootfs = directory / "web-root"
    (directory / "other/102/rootfs").rename(rootfs)
    # The template's programs need the host's libraries, or are static.
    for name in ("lib", "lib64", "usr/lib", "usr/lib64", "proc", "sys", "dev"):
        (rootfs / name).mkdir(exist_ok=True, parents=True)
    lxc = Lxc(directory / "lxc", directory / "log")
    container = LxcContainer(lxc, MEMBER, replace(BUSYBOX, template=None, rootfs=rootfs))
    await realize(container)
    assert inside(lxc, "hostname") == "web\n"
    with pytest.raises(Failed, match="was made from rootfs, not from template busybox"):
        await LxcContainer(lxc, MEMBER, BUSYBOX).diff()
    await stopped(lxc)
    assert (rootfs / "etc").is_dir()


@apart
async def test_what_cannot_be_made_says_why(directory: Path) -> None:
    network()
    lxc = Lxc(directory / "lxc", directory / "log")
    with pytest.raises(Failed, match=r"there is no LXC template nope .*; there are: .*busybox"):
        await realize(LxcContainer(lxc, MEMBER, replace(BUSYBOX, template="nope")))
    rootfs = directory / "nowhere"
    with pytest.raises(Failed, match=r"nowhere of container 102 .* is not a directory"):
        await realize(LxcContainer(lxc, MEMBER, replace(BUSYBOX, template=None, rootfs=rootfs)))
    rootfs.mkdir()
    (rootfs / "etc").mkdir()
    with pytest.raises(Failed, match=r"container 102 does not start: .*everything it says is in"):
        await realize(LxcContainer(lxc, MEMBER, replace(BUSYBOX, template=None, rootfs=rootfs)))
    await stopped(lxc)


@pytest.mark.parametrize("left, right", [("102", "103"), ("1", "18001"), ("999999999", "999999998")])
def test_user_ids_are_apart(left: str, right: str) -> None:
    assert abs(first_id(left) - first_id(right)) >= 65536
    assert max(first_id(left), first_id(right)) + 65536 < 1 << 31
