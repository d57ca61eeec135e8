"""WireGuard interfaces, with real `wireguard-go` between namespaces: what befalls them, and that they mend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from controller.agent.keys import KeyStore
from controller.agent.links import Interface, Namespace
from controller.agent.netlink import Nets
from controller.agent.process import Program, Programs
from controller.agent.reconciler import Done, Reconciler
from controller.agent.resource import Failed
from controller.agent.wireguard import WgConfig, WireGuard, read_dump, resolve
from controller.hostmodel import Endpoint, Peer, Tunnel
from controller.model import Ipv4, Prefix
from controller.wgkeys import Secret, new_private_key, new_shared_key, public_key

from .apart import apart

DEVICE, LEG = "wg-warp0", "bulkhead-warp0"
HERE, THERE = "10.9.0.1", "10.9.0.2"
ALL = Prefix(Ipv4(0), 0)
SOCKET = Path(f"/var/run/wireguard/{DEVICE}.sock")


def sh(script: str, given: str | None = None) -> str:
    done = subprocess.run(["sh", "-ec", script], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}: {done.stderr}"
    return done.stdout


def key_file(path: Path, key: Secret) -> Path:
    path.write_text(key.reveal() + "\n")
    path.chmod(0o600)
    return path


@dataclass
class World:
    """A host that dials the far end of a tunnel, which is in a namespace of its own, a veth away."""

    directory: Path
    private: Secret = field(default_factory=new_private_key)
    far: Secret = field(default_factory=new_private_key)
    shared: Secret = field(default_factory=new_shared_key)
    told: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tunnel = Tunnel(
            DEVICE,
            private_key_file=key_file(self.directory / "private", self.private),
            addresses=((Ipv4.parse(HERE), 24),),
            listen_port=40000,
            mtu=1280,
            peers=(
                Peer(
                    public_key(self.far),
                    (ALL,),
                    Endpoint("192.0.2.2", 40001),
                    7,
                    key_file(self.directory / "shared", self.shared),
                ),
            ),
        )
        sh(
            """
            ip link add up0 type veth peer name up0 netns $(ip netns add far >/dev/null; echo far)
            ip address add 192.0.2.1/24 dev up0; ip link set up0 up
            ip -n far address add 192.0.2.2/24 dev up0; ip -n far link set up0 up; ip -n far link set lo up"""
        )
        self._far = subprocess.Popen(["ip", "netns", "exec", "far", "wireguard-go", "-f", "far"])
        while not Path("/var/run/wireguard/far.sock").exists():
            time.sleep(0.01)
        text = f"""[Interface]
PrivateKey = {self.far.reveal()}
ListenPort = 40001
[Peer]
PublicKey = {public_key(self.private)}
PresharedKey = {self.shared.reveal()}
AllowedIPs = {HERE}/32
"""
        sh("wg setconf far /dev/stdin", text)
        sh(f"ip -n far address add {THERE}/24 dev far; ip -n far link set far mtu 1280 up")
        self.begin()

    def begin(self) -> None:
        """What a new agent begins with."""
        self.nets = Nets()
        self.programs = Programs(self.directory / "programs")
        self.keys = KeyStore(self.directory / "keys")
        self.wireguard = WireGuard(
            self.nets, self.programs, DEVICE, self.config, LEG, fixed=True, needs=(f"namespace/{LEG}",)
        )
        self.reconciler = Reconciler(self._done, lambda key, why: self.troubles.append(f"{key}: {why}"))
        up = Interface(self.nets, LEG, DEVICE, addresses=(f"{HERE}/24",), needs=(self.wireguard.key,), exact=True)
        self.reconciler.want([Namespace(self.nets, LEG), self.wireguard, up])

    def config(self) -> WgConfig:
        return resolve(self.tunnel, self.keys)

    def _done(self, done: Done) -> None:
        self.told.append(str(done.change))

    async def settle(self, limit_s: float = 10) -> float:
        """Look at everything again and again until a packet goes through; answers how long that took."""
        began = time.monotonic()
        while True:
            self.reconciler.touch("")
            await self.reconciler.once()
            if self.reconciler.settled and await asyncio.to_thread(reaches):
                return time.monotonic() - began
            assert time.monotonic() - began < limit_s, (self.reconciler.status, self.told[-9:])
            await asyncio.sleep(0.05)

    async def look(self) -> str:
        """One look, and why it failed."""
        self.reconciler.touch("")
        await self.reconciler.once()
        return self.reconciler.status[self.wireguard.key].why

    def pid(self) -> int:
        record = self.programs.record(f"wireguard-{DEVICE}")
        assert record is not None
        return record.pid


def reaches() -> bool:
    command = ["ip", "netns", "exec", LEG, "ping", "-n", "-q", "-c1", "-W1", THERE]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def links(namespace: str | None = None) -> str:
    return sh(f"ip {f'-n {namespace}' if namespace else ''} -br link")


@apart
async def test_a_tunnel_works_and_a_second_look_finds_nothing(directory: Path) -> None:
    world = World(directory)
    print(f"up after {await world.settle():.2f} s")
    assert DEVICE in links(LEG) and DEVICE not in links()
    assert await world.wireguard.diff() == []
    (status,) = await world.wireguard.status()
    assert status.public_key == public_key(world.far) and status.endpoint == "192.0.2.2:40001"
    assert status.age_s is not None and status.age_s < 10 and status.received > 0 and status.sent > 0
    began = time.monotonic()
    for _ in range(20):
        assert await world.wireguard.diff() == []
    print(f"a look takes {(time.monotonic() - began) / 20 * 1000:.1f} ms")
    # The next agent finds it as it is, and packets go on.
    pid, told = world.pid(), len(world.told)
    world.begin()
    await world.settle()
    assert world.pid() == pid and len(world.told) == told


DAMAGE = {
    "peer removed": f"wg set {DEVICE} peer FAR remove",
    "peer added": f"wg set {DEVICE} peer $(wg genkey | wg pubkey) allowed-ips 10.9.0.0/24",
    "allowed IPs": f"wg set {DEVICE} peer FAR allowed-ips 10.77.0.0/24",
    "more allowed IPs taken away": f"wg set {DEVICE} peer FAR allowed-ips ''",
    "endpoint": f"wg set {DEVICE} peer FAR endpoint 192.0.2.77:1",
    "private key": f"wg genkey | wg set {DEVICE} private-key /dev/stdin",
    "private key removed": f"wg set {DEVICE} private-key /dev/null",
    "pre-shared key": f"wg genpsk | wg set {DEVICE} peer FAR preshared-key /dev/stdin",
    "pre-shared key removed": f"wg set {DEVICE} peer FAR preshared-key /dev/null",
    "mark": f"wg set {DEVICE} fwmark 7",
    "listen port": f"wg set {DEVICE} listen-port 50000",
    "keepalive": f"wg set {DEVICE} peer FAR persistent-keepalive off",
    "MTU": f"ip -n {LEG} link set {DEVICE} mtu 1400",
    "down": f"ip -n {LEG} link set {DEVICE} down",
    "address": f"ip -n {LEG} address flush dev {DEVICE}",
    "device deleted": f"ip -n {LEG} link delete {DEVICE}",
    "killed": "kill -9 PID",
    "ended": "kill PID",
    "socket removed": f"rm {SOCKET}",
    "namespace": f"ip netns delete {LEG}",
    "moved back": f"ip -n {LEG} link set {DEVICE} netns 1",
    "renamed": f"ip -n {LEG} link set {DEVICE} down; ip -n {LEG} link set {DEVICE} name other",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_healed(damage: str) -> None:
    @apart
    async def test(directory: Path) -> None:
        world = World(directory)
        await world.settle()
        world.told.clear()
        sh(DAMAGE[damage].replace("FAR", public_key(world.far)).replace("PID", str(world.pid())))
        took = await world.settle()
        print(f"{damage}: {took:.2f} s: {world.told}")
        assert world.told
        # Who looks while it is ending may find a device that nobody answers for.
        assert not world.troubles or damage in ("ended", "killed", "device deleted")
        assert await world.wireguard.diff() == []
        assert sh(f"wg show {DEVICE} listen-port") == "40000\n"
        assert len(sh(f"wg show {DEVICE} peers").split()) == 1
        assert len(sh("ps -e -o args= | grep -c '[w]ireguard-go -f wg-warp0' || true").split()) == 1

    test()


@apart
async def test_a_process_that_hangs_is_replaced(directory: Path) -> None:
    world = World(directory)
    await world.settle()
    pid = world.pid()
    os.kill(pid, signal.SIGSTOP)
    took = await world.settle(25)
    print(f"replaced after {took:.1f} s")
    assert world.pid() != pid


@apart
async def test_a_stale_socket_is_in_nobodys_way(directory: Path) -> None:
    world = World(directory)
    sh(f"ip netns exec far wireguard-go -f {DEVICE} & sleep 0.5; kill -9 $!; wait $! || true")
    assert SOCKET.exists()
    await world.settle()
    assert not world.troubles


@pytest.mark.parametrize("kind", ["bridge", "tun", "tap", "veth"])
def test_a_foreign_device_is_refused_and_left_alone(kind: str) -> None:
    @apart
    async def test(directory: Path) -> None:
        world = World(directory)
        tuntap = kind in ("tun", "tap")
        sh(f"ip tuntap add {DEVICE} mode {kind}" if tuntap else f"ip link add {DEVICE} type {kind}")
        before = sh(f"ip -d link show {DEVICE}")
        why = await world.look()
        assert "wg-warp0 in the host's network namespace already, and it is not ours; remove it" in why
        assert sh(f"ip -d link show {DEVICE}") == before
        sh(f"ip link delete {DEVICE}")
        await world.settle()

    test()


@apart
async def test_a_foreign_wireguard_of_that_name_is_refused_and_left_alone(directory: Path) -> None:
    world = World(directory)
    theirs = subprocess.Popen(["ip", "netns", "exec", "far", "wireguard-go", "-f", DEVICE])
    while not SOCKET.exists():
        await asyncio.sleep(0.01)
    before = sh(f"wg show {DEVICE} listen-port")
    why = await world.look()
    assert f"another program answers on {SOCKET} already; end it" in why
    assert theirs.poll() is None and sh(f"wg show {DEVICE} listen-port") == before
    theirs.kill()
    theirs.wait()
    await world.settle()


@apart
async def test_something_else_of_that_name_in_the_leg(directory: Path) -> None:
    world = World(directory)
    sh(f"ip netns add {LEG}; ip -n {LEG} link add {DEVICE} type veth")
    assert "wg-warp0 in bulkhead-warp0 is veth; remove it" in await world.look()
    sh(f"ip -n {LEG} link delete {DEVICE}")
    await world.settle()


@apart
async def test_an_internal_port_of_that_name_is_not_taken_for_the_device_that_was_deleted(directory: Path) -> None:
    world = World(directory)
    await world.settle()
    # Of kind tun like ours, as Open vSwitch's userspace datapath makes them, while our process runs still.
    sh(f"kill -STOP {world.pid()}; ip -n {LEG} link delete {DEVICE}; ip tuntap add {DEVICE} mode tap")
    assert "it is not ours; remove it" in await world.look()
    sh(f"ip link delete {DEVICE}; ip -n {LEG} tuntap add {DEVICE} mode tap")
    assert "wg-warp0 in bulkhead-warp0 is tun; remove it" in await world.look()
    sh(f"ip -n {LEG} link delete {DEVICE}; kill -CONT {world.pid()}")
    await world.settle()


@apart
async def test_killed_after_any_step(directory: Path) -> None:
    world = World(directory)
    sh(f"ip netns add {LEG}")
    steps = len(await world.wireguard.diff())
    assert steps == 3
    for done in range(steps + 1):
        for change in (await world.wireguard.diff())[:done]:
            await change.do()
        world.begin()
        await world.settle()
        assert DEVICE not in links()
        assert len(sh("ps -e -o args= | grep '[w]ireguard-go -f wg-warp0'").splitlines()) == 1
        await world.wireguard._remove()
    # Within the first: the process is there, its device is not yet, or only just.
    for wait_s in (0.0, 0.002, 0.01, 0.05):
        world.programs.start(Program(f"wireguard-{DEVICE}", ("wireguard-go", "-f", DEVICE)))
        await asyncio.sleep(wait_s)
        world.begin()
        await world.settle()
        assert len(sh("ps -e -o args= | grep '[w]ireguard-go -f wg-warp0'").splitlines()) == 1
        await world.wireguard._remove()


@apart
async def test_a_program_that_is_not_there_or_ends_at_once_is_said_at_once(directory: Path) -> None:
    world = World(directory)
    Path("/dev/net").mkdir(exist_ok=True)
    sh("mount -t tmpfs none /dev/net")
    began = time.monotonic()
    why = await world.look()
    assert "wireguard-go makes no wg-warp0; it says: " in why and "/dev/net/tun" in why
    assert time.monotonic() - began < 2
    sh("umount /dev/net")
    await world.settle()


@apart
async def test_a_key_that_is_not_clamped(directory: Path) -> None:
    world = World(directory)
    world.private = Secret("/" * 42 + "8=")
    key_file(directory / "private", world.private)
    await world.look()
    assert world.reconciler.status[world.wireguard.key].why == "as wanted"


@apart
async def test_what_the_file_says_is_taken_over(directory: Path) -> None:
    """Changes of the configuration are taken over without making the device anew; no pre-shared key means none."""
    world = World(directory)
    await world.settle()
    pid, peer = world.pid(), world.tunnel.peers[0]
    world.tunnel = Tunnel(
        DEVICE,
        private_key_file=world.tunnel.private_key_file,
        addresses=world.tunnel.addresses,
        listen_port=40002,
        mtu=1300,
        peers=(Peer(peer.public_key, (Prefix.parse("10.9.0.0/24"), Prefix.parse("10.8.0.0/16")), peer.endpoint),),
    )
    assert await world.look() == "as wanted"
    shown = read_dump(sh(f"wg show {DEVICE} dump"))
    (only,) = shown.peers.values()
    assert (only.preshared_key, only.keepalive, shown.listen_port) == ("", 0, 40002)
    assert only.allowed == {"10.9.0.0/24", "10.8.0.0/16"}
    assert "mtu 1300" in sh(f"ip -n {LEG} link show {DEVICE}")
    sh(f"wg set far peer {public_key(world.private)} preshared-key /dev/null")
    await world.settle()
    assert world.pid() == pid


@apart
async def test_a_peer_that_moves_may_and_an_egress_may_not(directory: Path) -> None:
    world = World(directory)
    world.wireguard = WireGuard(
        world.nets, world.programs, DEVICE, world.config, LEG, fixed=False, needs=(f"namespace/{LEG}",)
    )
    up = Interface(world.nets, LEG, DEVICE, addresses=(f"{HERE}/24",), needs=(world.wireguard.key,), exact=True)
    world.reconciler.want([Namespace(world.nets, LEG), world.wireguard, up])
    await world.settle()
    sh("ip -n far address del 192.0.2.2/24 dev up0; ip -n far address add 192.0.2.3/24 dev up0")
    sh(f"wg set far listen-port 40009; ip netns exec far ping -n -q -c2 -W1 {HERE}")
    assert (await world.wireguard.status())[0].endpoint == "192.0.2.3:40009"
    assert await world.wireguard.diff() == []
    world.wireguard._fixed = True
    (change,) = await world.wireguard.diff()
    assert "the endpoint (192.0.2.3:40009) of peer" in change.why
    await change.do()
    assert await world.wireguard.diff() == []
    assert (await world.wireguard.status())[0].endpoint == "192.0.2.2:40001"


@apart
async def test_names_of_endpoints(directory: Path) -> None:
    """A resolver that does not answer keeps nothing from being healed."""
    world = World(directory)
    peer = world.tunnel.peers[0]

    def dial(host: str) -> None:
        moved = Peer(peer.public_key, peer.allowed, Endpoint(host, 40001), 7, peer.preshared_key_file)
        world.tunnel = Tunnel(
            DEVICE,
            private_key_file=world.tunnel.private_key_file,
            addresses=world.tunnel.addresses,
            listen_port=40000,
            mtu=1280,
            peers=(moved,),
        )

    # Own copies of files that the machine has.
    (directory / "hosts").write_text("192.0.2.2 far.example\n")
    (directory / "resolv.conf").write_text("nameserver 127.0.0.53\noptions timeout:1 attempts:1\n")
    sh(f"mount --bind {directory}/hosts /etc/hosts; mount --bind {directory}/resolv.conf /etc/resolv.conf")
    dial("far.example")
    await world.settle()
    dial("a..example")
    assert "the endpoint a..example does not resolve" in await world.look()
    dial("nobody.example")
    began = time.monotonic()
    why = await world.look()
    assert "nobody.example is being resolved" in why or "nobody.example does not resolve" in why
    assert time.monotonic() - began < 1.5
    dial("far.example")
    await world.settle()
    # Known, though nobody answers any more.
    (directory / "hosts").write_text("")
    world.wireguard._names._asked.clear()
    sh(DAMAGE["peer removed"].replace("FAR", peer.public_key))
    assert await world.settle() < 3
    assert not [trouble for trouble in world.troubles if "far.example" in trouble]


@apart
async def test_secrets_are_nowhere(directory: Path) -> None:
    world = World(directory)
    seen: set[bytes] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for path in Path("/proc").glob("[0-9]*"):
                for what in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        seen.add((path / what).read_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        await world.settle()
        for damage in ("private key", "pre-shared key", "peer removed", "device deleted", "killed"):
            sh(DAMAGE[damage].replace("FAR", public_key(world.far)).replace("PID", str(world.pid())))
            await world.settle()
        # A broken key, and a `wg` that fails.
        key_file(directory / "private", Secret(world.private.reveal()[:-2]))
        await world.look()
        key_file(directory / "private", world.private)
        sh(f"mount --bind /bin/false {sh('command -v wg').strip()}")
        world.told.append(await world.look())
        with pytest.raises(Failed) as caught:
            await world.wireguard.status()
    finally:
        over.set()
        thread.join()
    logs = [path.read_text() for path in (directory / "programs").iterdir()]
    config = world.config()
    texts = [*world.told, *world.troubles, *logs, str(caught.value), repr(config), str(config), repr(world.wireguard)]
    texts += [one.decode(errors="replace") for one in seen]
    assert any("wireguard-go" in text for text in texts)
    for secret in (world.private, world.shared):
        assert not [text for text in texts if secret.reveal()[:20] in text]
        assert secret.reveal()[:20].encode().hex() not in "".join(texts)
