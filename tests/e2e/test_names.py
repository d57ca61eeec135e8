"""Names as dnsmasq answers them, in the namespace of a resolver, asked by hand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from scapy.layers.dns import DNS, DNSQR, DNSRR

from controller.agent.names import Names, dnsmasq_command, namespace_of
from controller.agent.netns import in_namespace
from controller.agent.resource import Resource
from controller.agent.run import NETNS_DIR, environment, inside
from controller.hostmodel import Container, HostState, Zone
from controller.model import DesiredState, Ipv4, Mac, Member, Network, Prefix, Service

from .apart import apart

NOERROR, NXDOMAIN = 0, 3


def member(number: int, name: str, address: str, *services: Service) -> Member:
    return Member(str(number), name, f"veth{number}", Mac(0x020000000000 | number), Ipv4.parse(address), services)


WEB, DNS_TCP = Service("http", "tcp", 8080), Service("xmpp", "tcp", 5222)
A, B = member(100, "web", "10.0.0.100", WEB), member(101, "Xray", "10.0.0.101", DNS_TCP, WEB)
RESOLVER = Member("dns-privacy", "resolver-privacy", "dns-privacy", Mac(2), Ipv4.parse("10.0.0.53"))
PRIVACY = Network(
    "privacy",
    "vmbr0",
    Prefix.parse("10.0.0.0/24"),
    Ipv4.parse("10.0.0.1"),
    Mac(1),
    (100, 199),
    members=(A, B, RESOLVER),
)
MANAGEMENT = Network(
    "management",
    "vmbr1",
    Prefix.parse("10.1.0.0/24"),
    Ipv4.parse("10.1.0.1"),
    Mac(3),
    (200, 299),
    members=(member(200, "db", "10.1.0.200", Service("sql", "tcp", 5432)),),
)
STATE = DesiredState((PRIVACY, MANAGEMENT))
ZONE = Zone("privacy", RESOLVER.id, "privacy.internal", RESOLVER.address)
FOREIGN = Zone("management", "dns-management", "management.internal", Ipv4.parse("10.1.0.53"))
UPSTREAM = Ipv4.parse("10.0.0.254")


@dataclass
class Running:
    """A process in a namespace, for as long as the test runs."""

    command: tuple[str, ...]
    namespace: str
    process: subprocess.Popen[bytes] | None = None
    started: int = 0

    async def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    async def start(self) -> None:
        if not await self.runs():
            self.started += 1
            self.process = subprocess.Popen(inside(self.namespace, *self.command), env=environment())

    async def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


@dataclass
class World:
    """A resolver's namespace, and what is answered there."""

    directory: Path
    state: DesiredState = STATE
    host: HostState = field(default_factory=lambda: HostState(zones=(ZONE, FOREIGN)))

    def __post_init__(self) -> None:
        script = f"""
            ip netns add {namespace_of(ZONE)}
            ip -n {namespace_of(ZONE)} link set lo up
            ip -n {namespace_of(ZONE)} link add eth0 type veth peer name far
            ip -n {namespace_of(ZONE)} address add {ZONE.address}/24 dev eth0
            ip -n {namespace_of(ZONE)} address add {UPSTREAM}/24 dev eth0
            ip -n {namespace_of(ZONE)} link set eth0 up; ip -n {namespace_of(ZONE)} link set far up"""
        subprocess.run(["sh", "-ec", script], check=True)
        self.runner = Running(dnsmasq_command(self.directory / "names", ZONE), namespace_of(ZONE))

    async def realize(self) -> list[str]:
        names = Names(self.state, self.host, self.host.zones[0], self.directory / "names", self.runner)
        done = await realize(names)
        assert await names.diff() == []
        return done

    def here(self, do: Callable[[], socket.socket]) -> socket.socket:
        return in_namespace(NETNS_DIR / namespace_of(ZONE), do)

    def client(self) -> socket.socket:
        return self.here(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def ask(self, name: str, kind: str = "A") -> tuple[int, list[str]]:
        """The code of the answer and what it says."""
        with self.client() as client:
            client.settimeout(2)
            client.sendto(bytes(DNS(id=7, rd=1, qd=DNSQR(qname=name, qtype=kind))), (str(ZONE.address), 53))
            answer = DNS(client.recv(4096))
        return answer.rcode, sorted(text(record) for record in answer.an)


def text(record: DNSRR) -> str:
    if record.type == 33:
        return f"{record.target.decode()}:{record.port}"
    return record.rdata.decode() if isinstance(record.rdata, bytes) else record.rdata


async def realize(resource: Resource) -> list[str]:
    done = []
    for _ in range(3):
        changes = await resource.diff()
        for change in changes:
            await change.do()
            done.append(str(change))
        if not changes:
            return done
    raise AssertionError(done)


@apart
async def test_names_of_the_network(directory: Path) -> None:
    world = World(directory)
    began = time.monotonic()
    await world.realize()
    print(f"resolver up after {time.monotonic() - began:.3f} s")
    for name in ("web", "web.privacy.internal", "WEB.Privacy.Internal"):
        assert world.ask(name) == (NOERROR, ["10.0.0.100"])
    assert world.ask("xray.privacy.internal") == (NOERROR, ["10.0.0.101"])
    assert world.ask("gateway.privacy.internal") == (NOERROR, ["10.0.0.1"])
    assert world.ask("web.privacy.internal", "AAAA") == (NOERROR, [])
    assert world.ask("100.0.0.10.in-addr.arpa", "PTR") == (NOERROR, ["web.privacy.internal."])
    assert world.ask("101.0.0.10.in-addr.arpa", "PTR") == (NOERROR, ["xray.privacy.internal."])
    # Services: by container, and by all that offer them.
    assert world.ask("_http._tcp.web.privacy.internal", "SRV") == (NOERROR, ["web.privacy.internal.:8080"])
    both = ["web.privacy.internal.:8080", "xray.privacy.internal.:8080"]
    assert world.ask("_http._tcp.privacy.internal", "SRV") == (NOERROR, both)
    assert world.ask("http.privacy.internal") == (NOERROR, ["10.0.0.100", "10.0.0.101"])
    assert world.ask("xmpp.privacy.internal") == (NOERROR, ["10.0.0.101"])
    await world.runner.stop()


@apart
async def test_nothing_else_exists_without_an_upstream(directory: Path) -> None:
    world = World(directory)
    await world.realize()
    for name in ("nobody", "nobody.privacy.internal", "db", "db.management.internal", "example.com", "privacy.test"):
        assert world.ask(name) == (NXDOMAIN, []), name
    for name in ("200.0.1.10", "8.8.8.8", "1.1.168.192", "77.0.0.10"):
        assert world.ask(f"{name}.in-addr.arpa", "PTR") == (NXDOMAIN, []), name
    assert world.ask("_sql._tcp.management.internal", "SRV") == (NXDOMAIN, [])
    await world.runner.stop()


class Upstream:
    """A resolver of the world: it writes down what it is asked, and knows one address for everything."""

    def __init__(self, world: World) -> None:
        self.asked: list[tuple[str, int]] = []
        self.options = 0
        self.answer = "198.41.0.4"
        self._socket = world.here(self._open)
        threading.Thread(target=self._serve, daemon=True).start()

    def _open(self) -> socket.socket:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((str(UPSTREAM), 53))
        return server

    def _serve(self) -> None:
        while True:
            data, sender = self._socket.recvfrom(4096)
            query = DNS(data)
            name = query.qd[0].qname
            self.asked.append((name.decode(), query.qd[0].qtype))
            self.options += sum(len(getattr(record, "rdata", ())) for record in query.ar)
            record = DNSRR(rrname=name, type="A", rdata=self.answer, ttl=60)
            self._socket.sendto(bytes(DNS(id=query.id, qr=1, ra=1, qd=query.qd, an=record)), sender)


@apart
async def test_the_upstream_is_asked_only_what_is_nobody_s_here(directory: Path) -> None:
    world = World(directory)
    upstream = Upstream(world)
    world.host = replace(world.host, zones=(replace(ZONE, upstream=(UPSTREAM,)), FOREIGN))
    await world.realize()
    for name in ("web", "nobody", "nobody.privacy.internal", "db.management.internal", "x.y.management.internal"):
        world.ask(name)
    for name in ("200.0.1.10", "77.0.0.10", "1.1.168.192"):
        assert world.ask(f"{name}.in-addr.arpa", "PTR") == (NXDOMAIN, [])
    world.ask("_sql._tcp.management.internal", "SRV")
    world.ask("web.privacy.internal", "TXT")
    assert upstream.asked == []
    assert world.ask("example.com") == (NOERROR, ["198.41.0.4"])
    assert world.ask("example.com") == (NOERROR, ["198.41.0.4"])
    assert upstream.asked == [("example.com.", 1)], "the second time it is known"
    assert upstream.options == 0, "nothing about who asks goes along"
    # An address of a private network that comes from outside is a trick.
    upstream.answer = "10.1.0.200"
    assert world.ask("rebind.example")[1] == []
    # The upstream goes away again, and with it the world.
    world.host = HostState(zones=(ZONE, FOREIGN))
    await world.realize()
    assert world.ask("example.com") == (NXDOMAIN, [])
    await world.runner.stop()


@apart
async def test_changes_are_answered_at_once(directory: Path) -> None:
    world = World(directory)
    await world.realize()
    # A new container without services, and one gone: dnsmasq reads them itself and answers all the while.
    without = replace(PRIVACY, members=(A, member(102, "new", "10.0.0.102"), RESOLVER))
    only_names = replace(without, members=(*without.members, replace(B, services=B.services)))
    world.state = DesiredState((only_names, MANAGEMENT))
    answered: list[float] = []
    stop = threading.Event()
    asking = threading.Thread(target=ask_on, args=(world, answered, stop))
    asking.start()
    await asyncio.sleep(0.1)
    began = time.monotonic()
    assert await world.realize() == ["~ names of privacy (privacy.internal): not as declared"]
    while world.ask("new.privacy.internal") != (NOERROR, ["10.0.0.102"]):
        assert time.monotonic() - began < 1
    print(f"a name is seen after {time.monotonic() - began:.3f} s")
    assert world.runner.started == 1
    # One with services less: started anew.
    world.state = DesiredState((without, MANAGEMENT))
    began = time.monotonic()
    await world.realize()
    while world.ask("xray.privacy.internal") != (NXDOMAIN, []):
        assert time.monotonic() - began < 1
    assert world.ask("_xmpp._tcp.privacy.internal", "SRV") == (NXDOMAIN, [])
    assert world.ask("_http._tcp.privacy.internal", "SRV") == (NOERROR, ["web.privacy.internal.:8080"])
    print(f"a service is gone after {time.monotonic() - began:.3f} s")
    await asyncio.sleep(0.1)
    stop.set()
    asking.join()
    assert world.runner.started == 2
    longest = max(after - before for before, after in itertools.pairwise(answered))
    print(f"{len(answered)} answers, none for {longest:.3f} s at most")
    assert len(answered) > 20 and longest < 0.5
    # A container that is stopped on purpose keeps its name, and offers nothing.
    world.host = replace(world.host, containers=(Container("100", running=False),))
    await world.realize()
    assert world.ask("web.privacy.internal") == (NOERROR, ["10.0.0.100"])
    assert world.ask("_http._tcp.privacy.internal", "SRV") == (NXDOMAIN, [])
    await world.runner.stop()


def ask_on(world: World, answered: list[float], stop: threading.Event) -> None:
    """Ask without end, and write down when there was an answer."""
    query = bytes(DNS(id=7, rd=1, qd=DNSQR(qname="web.privacy.internal")))
    with world.client() as client:
        client.connect((str(ZONE.address), 53))
        client.settimeout(0.1)
        while not stop.is_set():
            with contextlib.suppress(OSError):
                client.send(query)
                client.recv(4096)
                answered.append(time.monotonic())
            time.sleep(0.001)


@apart
async def test_a_resolver_that_died_or_listens_elsewhere_is_healed(directory: Path) -> None:
    world = World(directory)
    await world.realize()
    assert world.runner.process is not None
    world.runner.process.kill()
    world.runner.process.wait()
    assert await world.realize() == ["+ resolver of privacy (privacy.internal): it does not run"]
    # Its namespace is made again: the old process still listens, where nobody can ask it.
    subprocess.run(["ip", "netns", "delete", namespace_of(ZONE)], check=True)
    process = world.runner.process
    World(directory)
    await world.realize()
    assert world.runner.process is not process
    assert world.ask("web") == (NOERROR, ["10.0.0.100"])
    # Its files are damaged.
    (directory / "names" / "privacy.conf").write_text("port=5353\n")
    (directory / "names" / "privacy.hosts" / "hosts").unlink()
    await world.realize()
    await asyncio.sleep(0.1)
    assert world.ask("web") == (NOERROR, ["10.0.0.100"])
    # It runs as nobody.
    assert Path(f"/proc/{world.runner.process.pid}").stat().st_uid == 65534
    await world.runner.stop()
