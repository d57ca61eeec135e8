"""Who reaches whom: the policy as a table, held against real packets and against `ofproto/trace`."""

from __future__ import annotations

import errno
import itertools
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import yaml

from lab.ovs import LabError
from tests.ovs.node import (
    CLIENT_WORLD,
    HOST_WORLD,
    WORLD,
    Endpoint,
    Node,
    ethernet,
    inside,
    ipv4,
    tcp,
    udp,
    wait_for,
)

POLICY = """
            gateway xray    mcp     api     monitoring peer_priv peer_mgmt inet    host0   host1
gateway     -       all     refused refused refused    all       refused   all     warp    refused
xray        all     -       refused refused refused    all       refused   all     warp    refused
mcp         refused refused -       all     all        refused   all       refused refused silent
api         refused refused all     -       all        refused   all       refused refused silent
monitoring  refused refused all     all     -          refused   all       refused refused silent
peer_priv   all     all     refused refused refused    -         refused   all     warp    refused
peer_mgmt   refused refused all     all     all        refused   -         refused refused silent
inet        silent  silent  silent  silent  silent     silent    silent    -       silent  silent
host0       vpn     silent  silent  silent  silent     silent    silent    silent  -       -
host1       refused refused service service silent     refused   silent    silent  -       -
"""
"""From the rows to the columns. `refused` is silent where the network says `refuse: false`; `warp` leaves by the tunnel,
where nobody has that address; `service` and `vpn` are open for what is declared below and silent for the rest. The row
of `inet` is for those who have not sent anything out themselves."""

SERVICES = {"mcp": {"tcp/9573"}, "api": {"tcp/9573", "tcp/9574"}, "gateway": {"udp/51820"}}

TCP_PORTS = (22, 9573, 9574)
UDP_PORTS = (53, 51820)
PROBES = ("icmp", *(f"tcp/{port}" for port in TCP_PORTS), *(f"udp/{port}" for port in UDP_PORTS))


Pair = tuple[str, str]


def parsed(text: str) -> dict[Pair, str]:
    """The table as (from, to) to word, without the diagonal."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    table = {(row[0], to): word for row in rows for to, word in zip(head, row[1:], strict=True)}
    return {pair: word for pair, word in table.items() if word != "-"}


TABLE = parsed(POLICY)
FROM_INSIDE = [pair for pair in TABLE if pair[0] != "inet"]
FROM_THE_WORLD = [pair for pair in TABLE if pair[0] == "inet"]


class Expected(NamedTuple):
    """What becomes of a probe: how its sender is answered, and where it arrives."""

    answer: str
    arrives: frozenset[str]


def expected(source: str, target: str, probe: str, *, refuse: bool) -> Expected:
    """What the table says of one probe."""
    word = TABLE[source, target]
    if word in ("service", "vpn"):
        word = "all" if probe in SERVICES[target] else "silent"
    if word == "all":
        return Expected("open", frozenset({target}))
    if word == "warp":
        return Expected("silent", frozenset({"inet"}))
    return Expected("refused" if word == "refused" and refuse else "silent", frozenset())


# ------------------------------------------------------------------------------------------------------------- probing

REQUEST, ANSWER = b"bulkhead?", b"bulkhead!"


@dataclass(slots=True)
class Attempt:
    """One probe under way."""

    source: Endpoint
    target: Endpoint
    sock: socket.socket
    number: int
    answer: str = "silent"
    took_s: float = 0.0


@dataclass
class Prober:
    """Servers on every endpoint, and probes from every endpoint at once."""

    node: Node
    servers: list[socket.socket] = field(default_factory=list)
    accepted: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        for endpoint in self.node.endpoints.values():
            for port in TCP_PORTS:
                server = endpoint.socket()
                server.bind(("", port))
                server.listen(64)
                self.servers.append(server)
            for port in UDP_PORTS:
                server = endpoint.socket(socket.SOCK_DGRAM)
                server.bind((endpoint.address, port))
                self.servers.append(server)
        # Those who would not even know whom to ask for an address are told: they are the ones to be stopped.
        for name in ("inet", "host0", "host1"):
            attacker = self.node[name]
            lines = [f"route add {prefix} dev eth0" for prefix in ("default", "10.1.0.0/24")] if name == "inet" else []
            lines += [
                f"neigh replace {other.address} lladdr {other.mac} dev {attacker.interface} nud permanent"
                for other in self.node.endpoints.values()
                if other is not attacker
            ]
            attacker.namespace.run("ip", "-batch", "-", stdin="\n".join(lines))

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def round(self, probe: str, pairs: list[Pair], hoped: set[Pair], silent_s: float) -> dict[Pair, Attempt]:
        """Probe all pairs at once. Whoever has no answer within `silent_s` gets none, but `hoped` ones are waited for:
        TCP may have to send again where the switch learns the way back at this very moment."""
        begin = time.monotonic()
        attempts = [
            self._start(probe, self.node[source], self.node[target], number)
            for number, (source, target) in enumerate(pairs, start=1000)
        ]
        waiting = {attempt.sock: attempt for attempt in attempts}
        kind = probe.partition("/")[0]
        while waiting and (left := begin + self._limit_s(waiting, hoped, silent_s) - time.monotonic()) > 0:
            writers = list(waiting) if kind == "tcp" else []
            readable, writable, _ = select.select([*waiting, *self.servers], writers, [], left)
            for server in readable:
                if server not in waiting:
                    self._serve(server)
            for sock in {*readable, *writable} & set(waiting):
                attempt = waiting[sock]
                answer = self._finish(kind, attempt)
                if answer:
                    attempt.answer, attempt.took_s = answer, time.monotonic() - begin
                    del waiting[sock]
        for sock in [attempt.sock for attempt in attempts] + self.accepted:
            abort(sock)
        self.accepted.clear()
        return {(attempt.source.name, attempt.target.name): attempt for attempt in attempts}

    @staticmethod
    def _limit_s(waiting: dict[socket.socket, Attempt], hoped: set[Pair], silent_s: float) -> float:
        return 2.5 if any((a.source.name, a.target.name) in hoped for a in waiting.values()) else silent_s

    def _start(self, probe: str, source: Endpoint, target: Endpoint, number: int) -> Attempt:
        kind, _, port = probe.partition("/")
        if kind == "icmp":
            sock = source.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP, source.address)
            message = struct.pack("!BBHHH", 8, 0, 0, number, 1) + REQUEST
            total = sum(struct.unpack(f"!{len(message + b'0') // 2}H", message + b"\0" * (len(message) % 2)))
            total = (total & 0xFFFF) + (total >> 16)
            message = message[:2] + struct.pack("!H", ~total & 0xFFFF) + message[4:]
            sock.sendto(message, (target.address, 0))
        else:
            sock = source.socket(socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM, 0, source.address)
            sock.connect_ex((target.address, int(port)))
            if kind == "udp":
                sock.send(REQUEST)
        return Attempt(source, target, sock, number)

    def _serve(self, server: socket.socket) -> None:
        try:
            if server.type == socket.SOCK_STREAM:
                self.accepted.append(server.accept()[0])
                return
            data, client = server.recvfrom(2048)
            if data == REQUEST:
                server.sendto(ANSWER, client)
        except OSError:
            pass  # the client gave up already

    @staticmethod
    def _finish(kind: str, attempt: Attempt) -> str:
        sock = attempt.sock
        if kind == "tcp":
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return {0: "open", errno.ECONNREFUSED: "refused"}.get(error, errno.errorcode.get(error, str(error)))
        try:
            data = sock.recv(2048)
        except BlockingIOError:
            return ""
        except OSError as exc:
            return "refused" if exc.errno in (errno.EHOSTUNREACH, errno.EACCES) else str(exc)
        if kind == "udp":
            return "open" if data == ANSWER else f"answered {data!r}"
        message = data[20:]
        if message[0] == 0 and message[4:6] == attempt.number.to_bytes(2, "big"):
            return "open"
        if message[:2] == b"\3\x0d" and message[8 + 24 : 8 + 26] == attempt.number.to_bytes(2, "big"):
            return "refused"
        return ""


def abort(sock: socket.socket) -> None:
    """Close without the long goodbye of TCP, whose packets would come in the middle of the next round."""
    if sock.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def requests(frames: list[bytes], probe: str) -> set[tuple[str, str]]:
    """(source, target) addresses of a probe's packets among frames, not of any answer, and not of another probe whose
    packets were sent again late."""
    kind, _, port = probe.partition("/")
    number = {"icmp": 1, "tcp": 6, "udp": 17}[kind]
    out = set()
    for frame in frames:
        if frame[12:14] != b"\x08\0" or frame[23] != number:
            continue
        if port and int.from_bytes(frame[36:38], "big") != int(port):
            continue
        pair = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
        if (
            (frame[23] == 6 and frame[47] & 0x12 == 0x02)
            or (frame[23] == 17 and frame[42:].startswith(REQUEST))
            or (frame[23] == 1 and frame[34] == 8)
        ):
            out.add(pair)
    return out


@pytest.fixture(scope="module")
def prober(node: Node) -> Iterator[Prober]:
    made = Prober(node)
    yield made
    made.close()


def refuse_everywhere(node: Node, yes: bool) -> None:
    """Have both networks answer what they block, or not."""
    networks = yaml.safe_load(node.file.read_text())["networks"]
    if {network["refuse"] for network in networks.values()} == {yes}:
        return
    before = node.controller.status()["state"]
    node.write_state({"privacy": {"refuse": yes}, "management": {"refuse": yes}})
    wait_for(lambda: node.controller.status()["state"] != before and node.controller.steady(), 5)


def forget_paths(node: Node) -> None:
    """As if nobody had sent anything out for ten minutes, nor been noisy."""
    for bridge in ("vmbr0", "vmbr1"):
        for table in (60, 100):  # what is learned or made for a while has this bit in its cookie
            node.ovs.ofctl("del-flows", bridge, f"table={table},cookie={1 << 47:#x}/{1 << 47:#x}")
    node.ovs.appctl("revalidator/purge")


@pytest.mark.parametrize("refuse", [True, False], ids=["refuse", "drop"])
def test_everybody_reaches_whom_the_table_says_and_nobody_else(node: Node, prober: Prober, refuse: bool) -> None:
    refuse_everywhere(node, refuse)
    addresses = {endpoint.address: endpoint.name for endpoint in node.endpoints.values()}
    wrong = []
    silent_s = 0.75 if refuse else 0.25  # no faster, or the refused would be taken for a flood and not be answered
    forget_paths(node)
    for pairs, probe in itertools.product((FROM_INSIDE, FROM_THE_WORLD), PROBES):
        if (pairs, probe) == (FROM_THE_WORLD, PROBES[0]):
            time.sleep(0.3)  # the last resets are on their way out
            forget_paths(node)
        hoped = {pair for pair in pairs if expected(*pair, probe, refuse=refuse).answer != "silent"}
        with node.watch() as watch:
            attempts = prober.round(probe, pairs, hoped, silent_s)
            arrived: dict[Pair, set[str]] = {pair: set() for pair in pairs}
            for at, frames in watch.frames().items():
                for source, target in requests(frames, probe):
                    arrived[addresses[source], addresses[target]].add(at)
        for pair, attempt in attempts.items():
            found = Expected(attempt.answer, frozenset(arrived[pair]))
            wanted = expected(*pair, probe, refuse=refuse)
            if found != wanted:
                wrong.append(f"{probe} {pair[0]} -> {pair[1]}: {wanted}, but {found}")
    assert not wrong, "\n".join(wrong)


def test_trace_agrees_with_the_table(node: Node) -> None:
    """Every pair and probe again, by what Open vSwitch says it would do: where it goes out, and what is a violation."""
    forget_paths(node)
    wrong = []
    numbers = {e.name: "LOCAL" if e.port == "LOCAL" else str(node.port_number(e.port)) for e in node.endpoints.values()}
    entry = {"peer_priv": ("vmbr0", "from-privacy"), "peer_mgmt": ("vmbr1", "from-mgmt")}
    ports = {name: entry.get(name, (e.bridge, e.port)) for name, e in node.endpoints.items()}
    for name in entry:
        numbers[name] = str(node.port_number(ports[name][1]))
    for (source, target), probe in itertools.product(TABLE, PROBES):
        wanted = expected(source, target, probe, refuse=True)
        kind, _, port = probe.partition("/")
        layer4 = "icmp_type=8" if kind == "icmp" else f"{kind}_src=40000,{kind}_dst={port}"
        sender, receiver = node[source], node[target]
        out = node.trace(
            ports[source][0],
            f"in_port={numbers[source]},dl_src={sender.mac},dl_dst={receiver.mac},{kind},"
            f"nw_src={sender.address},nw_dst={receiver.address},nw_ttl=64,{layer4}",
        )
        leaves = [ports[name][1] for name in wanted.arrives]
        if wanted.answer == "refused":
            leaves = ["CONTROLLER"]
        elif not leaves and out == ["CONTROLLER"]:
            leaves = out  # a violation that is not answered
        if out != leaves:
            wrong.append(f"{probe} {source} -> {target}: {leaves}, but {out}")
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------------------------------------ refusals


def connect(source: Endpoint, address: str, port: int, limit_s: float) -> tuple[int | None, float]:
    """(errno or None for no answer, seconds) of one TCP connection."""
    begin = time.monotonic()
    with source.socket() as sock:
        sock.connect_ex((address, port))
        select.select([], [sock], [], limit_s)
        took = time.monotonic() - begin
        if took >= limit_s:
            return None, took
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), took


CROSSINGS = [
    ("xray", "10.1.0.201", 9573),
    ("gateway", "10.1.0.1", 22),
    ("mcp", "10.0.0.102", 443),
    ("peer_mgmt", "10.0.0.100", 22),
    ("api", WORLD, 80),
]


@pytest.mark.parametrize(("source", "address", "port"), CROSSINGS)
def test_a_refused_connection_fails_at_once(node: Node, source: str, address: str, port: int) -> None:
    refuse_everywhere(node, True)
    error, took = connect(node[source], address, port, 1.0)
    assert error == errno.ECONNREFUSED
    assert took < 0.5


def test_without_refuse_it_times_out(node: Node) -> None:
    refuse_everywhere(node, False)
    outcomes = [connect(node[source], address, port, 0.7)[0] for source, address, port in CROSSINGS[:3]]
    refuse_everywhere(node, True)
    assert outcomes == [None, None, None]


def test_ping_across_says_packet_filtered(node: Node) -> None:
    with pytest.raises(LabError, match="Packet filtered") as caught:
        node["xray"].run("ping", "-c", "1", "-W", "2", "10.1.0.201")
    assert "100% packet loss" in str(caught.value)
    assert "From 10.0.0.1 " in str(caught.value)


def test_the_world_is_not_answered(node: Node) -> None:
    """Whoever sends from the world may claim to be anybody; an answer would go to a stranger."""
    refuse_everywhere(node, True)
    forget_paths(node)
    inet, xray = node["inet"], node["xray"]
    frames = [
        ethernet(xray.mac, inet.mac, 0x0800, ipv4(WORLD, target, 6, tcp(WORLD, target, 40000, 22)))
        for target in ("10.1.0.201", "10.0.0.102", "10.0.0.77")
    ]
    time.sleep(0.3)  # what others still had to say
    with node.watch() as watch:
        inet.send(*frames)
        time.sleep(0.5)
        got = {name: [f for f in frames if f[12:14] == b"\x08\0"] for name, frames in watch.frames().items()}
    assert not any(got.values()), got


def test_the_kernel_beside_the_switch_takes_nothing(node: Node) -> None:
    """With the userspace datapath the host's kernel gets every frame as well, and would take those to its port's MAC for
    any of its addresses, past every flow. `Node.attach` shuts that way, as whoever makes the ports has to."""
    xray = node["xray"]
    ports_mac = re.search(r"link/ether (\S+)", node.namespace.run("ip", "link", "show", "veth102"))
    assert ports_mac is not None
    with inside(node.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("10.1.0.1", 5555))
        xray.send(
            ethernet(
                ports_mac[1],
                xray.mac,
                0x0800,
                ipv4(xray.address, "10.1.0.1", 17, udp(xray.address, "10.1.0.1", 7, 5555, b"")),
            )
        )
        assert not select.select([server], [], [], 0.3)[0]


# ------------------------------------------------------------------------------------------------------- VPN, returns


def exchange(client: socket.socket, server: socket.socket, to: tuple[str, int]) -> tuple[str, int]:
    """One datagram there and back; answers whom the server saw. Fails after two seconds."""
    client.sendto(REQUEST, to)
    for sock, step in ((server, "request"), (client, "reply")):
        assert select.select([sock], [], [], 2)[0], f"no {step}"
        data, peer = sock.recvfrom(100)
        assert data == (REQUEST if sock is server else ANSWER)
        if sock is server:
            server.sendto(ANSWER, peer)
            seen: tuple[str, int] = peer
    return seen


@pytest.fixture
def vpn_server(node: Node) -> Iterator[socket.socket]:
    server = node["gateway"].socket(socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("10.0.0.100", 51820))  # more exact than any other, so it gets the datagrams
    yield server
    server.close()


@pytest.mark.parametrize(("via", "address"), [("host0", HOST_WORLD), ("peer_priv", CLIENT_WORLD)])
def test_a_vpn_client_of_the_world_gets_its_reply_the_way_it_came(
    node: Node, vpn_server: socket.socket, via: str, address: str
) -> None:
    with node.watch() as watch, node[via].socket(socket.SOCK_DGRAM, source=address) as client:
        assert exchange(client, vpn_server, ("10.0.0.100", 51820))[0] == address
        arrived = watch.holding(ANSWER)
    assert arrived == {via: 1}, "the reply must not go into the tunnel"


def test_a_vpn_reply_to_nobody_in_particular_drops(node: Node, vpn_server: socket.socket) -> None:
    with node.watch() as watch:
        for stranger in ("192.0.2.99", WORLD):
            vpn_server.sendto(b"unlearned reply", (stranger, 4500))
        time.sleep(0.3)
        assert watch.holding(b"unlearned reply") == {}
    assert node.counters("vmbr0")["EGRESS egress service/100/vpn"] >= 2


def test_pieces_of_vpn_replies_do_not_enter_the_tunnel_either(node: Node, vpn_server: socket.socket) -> None:
    """Open vSwitch sees no ports in fragments, so no piece is recognised by its source port."""
    gateway = node["gateway"]
    whole = udp(gateway.address, CLIENT_WORLD, 51820, 4500, b"in pieces " * 20)
    frames = [
        ethernet(node["inet"].mac, gateway.mac, 0x0800, ipv4(gateway.address, CLIENT_WORLD, 17, piece, **where))
        for piece, where in ((whole[:104], {"more": True}), (whole[104:], {"offset": 104}))
    ]
    with node.watch() as watch:
        gateway.send(*frames)
        time.sleep(0.3)
        assert watch.holding(b"in pieces") == {}


def test_a_learned_vpn_reply_is_for_that_client_port_only(node: Node, vpn_server: socket.socket) -> None:
    with node["host0"].socket(socket.SOCK_DGRAM, source=HOST_WORLD) as client, node.watch() as watch:
        _, port = exchange(client, vpn_server, ("10.0.0.100", 51820))
        vpn_server.sendto(b"to another port", (HOST_WORLD, port + 1 if port < 65535 else port - 1))
        with node["gateway"].socket(socket.SOCK_DGRAM) as other:
            other.bind(("10.0.0.100", 51821))
            other.sendto(b"from another port", (HOST_WORLD, port))
        time.sleep(0.3)
        assert watch.holding(b"to another port") == {}
        assert watch.holding(b"from another port") == {"inet": 1}, "the gateway's other traffic leaves by the tunnel"


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["udp", "tcp"])
def test_other_traffic_of_the_gateway_leaves_by_the_tunnel(node: Node, kind: int) -> None:
    with node["inet"].socket(kind) as server, node["gateway"].socket(kind) as client:
        server.bind((WORLD, 8080))
        if kind == socket.SOCK_STREAM:
            server.listen()
            client.connect_ex((WORLD, 8080))
            assert select.select([], [client], [], 2)[1]
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        else:
            assert exchange(client, server, (WORLD, 8080))[0] == "10.0.0.100"


def test_vpn_clients_inside_reach_the_world_and_their_replies_come_back(node: Node) -> None:
    gateway = node["gateway"]
    assert gateway.others == ("10.8.0.5",)
    with (
        node["inet"].socket(socket.SOCK_DGRAM) as server,
        gateway.socket(socket.SOCK_DGRAM, source="10.8.0.5") as client,
    ):
        server.bind((WORLD, 8081))
        assert exchange(client, server, (WORLD, 8081))[0] == "10.8.0.5"


def paths(node: Node) -> set[str]:
    """The addresses that return paths through the egress are learned for."""
    found = re.findall(r"table=60,.*nw_dst=([\d.]+) actions=", "\n".join(node.dump("vmbr0")))
    return set(found)


def test_return_paths_are_learned_outbound_only(fresh: Node) -> None:
    node = fresh
    node.controller.start()
    inet, xray, gateway = node["inet"], node["xray"], node["gateway"]

    def packet(number: int, *, back: bool) -> bytes:
        data = b"path %d" % number
        if back:
            return ethernet(
                xray.mac, inet.mac, 0x0800, ipv4(WORLD, xray.address, 17, udp(WORLD, xray.address, 9, 9, data))
            )
        return ethernet(inet.mac, xray.mac, 0x0800, ipv4(xray.address, WORLD, 17, udp(xray.address, WORLD, 9, 9, data)))

    with node.watch() as watch:
        inet.send(packet(1, back=True))
        gateway.send(  # within the network nothing is learned either
            ethernet(
                xray.mac,
                gateway.mac,
                0x0800,
                ipv4(gateway.address, xray.address, 17, udp(gateway.address, xray.address, 9, 9, b"in")),
            )
        )
        time.sleep(0.2)
        assert paths(node) == set()
        xray.send(packet(2, back=False))
        wait_for(lambda: paths(node) == {"10.0.0.102"}, 2)
        inet.send(packet(3, back=True))
        time.sleep(0.2)
        assert watch.holding(b"path 1") == {}
        assert watch.holding(b"path 2") == {"inet": 1}
        assert watch.holding(b"path 3") == {"xray": 1}
    learned = node.controller.events("path_learned")
    assert len(learned) == 1 and "10.0.0.102" in learned[0].text
    assert node.counters("vmbr0")["VIOLATION packet_in port/egress"] == 1


def test_a_learned_path_ends_with_its_member(fresh: Node) -> None:
    """A path to an address that is not a member's any more delivers nothing."""
    node = fresh
    node.controller.start()
    inet, xray = node["inet"], node["xray"]
    out = ethernet(inet.mac, xray.mac, 0x0800, ipv4(xray.address, WORLD, 17, udp(xray.address, WORLD, 9, 9, b"out")))
    back = ethernet(xray.mac, inet.mac, 0x0800, ipv4(WORLD, xray.address, 17, udp(WORLD, xray.address, 9, 9, b"back")))
    xray.send(out)
    wait_for(lambda: paths(node) == {"10.0.0.102"}, 2)
    seen = node.controller.last_event()
    text = node.file.read_text()
    tree = yaml.safe_load(text)
    tree["lxc"]["containers"] = [c for c in tree["lxc"]["containers"] if c["id"] != "102"]
    tree["openflow"]["bridges"]["vmbr0"]["flows"] = [
        flow for flow in tree["openflow"]["bridges"]["vmbr0"]["flows"] if "veth102" not in flow
    ]
    node.replace_state(yaml.safe_dump(tree))
    node.controller.wait_event("state_applied", seen, holding="vmbr0")
    with node.watch() as watch:
        inet.send(back)
        time.sleep(0.3)
        assert watch.holding(b"back") == {}
