"""Grants on a real Open vSwitch: who reaches whom while they are there, and what it says of every packet."""

from __future__ import annotations

import itertools
import random
import select
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.grants import passages
from controller.model import Bridge, BridgeKind, DesiredState, Grant
from controller.ovsctl import datapath_ports, parse_trace
from controller.pipeline import CROSS, GRANT
from controller.statefile import load
from controller.verify.explore import CT_STATES, EST, NEW, RPL, TRK
from controller.verify.node import Node as Declared
from controller.verify.packetwords import CT_WORDS, words
from controller.verify.policy import Policy
from controller.verify.rules import Ports
from controller.verify.walk import Walker
from tests.fakes.granting import PROGRAM, with_grants
from tests.ovs.headers import Headers
from tests.ovs.node import EXAMPLE, Endpoint, Node, NodeSettings, ethernet, icmp, ipv4, tcp, udp, wait_for
from tests.ovs.test_oracle import PACKETS
from tests.ovs.test_policy import (
    FROM_INSIDE,
    PROBES,
    Expected,
    Pair,
    Prober,
    connect,
    expected,
    forget_paths,
    requests,
)
from tests.ovs.tracer import Tracer

SAID = tuple(state for state in CT_STATES if state & ~TRK and (state & (NEW | RPL)) != (NEW | RPL))
"""What `--ct-next` takes."""
LIKELY = (TRK | NEW, TRK | EST, TRK | EST | RPL)
GRANTS = (
    Grant("1", "202", "102", "tcp", 9573),
    Grant("2", "102", "201", "udp", 53),
    Grant("3", "102", "202", "tcp", 9573),
    Grant("4", "202", "102", "udp", 51820),
)
"""Both ways between the same two, by the same port too."""
CELLS = {
    ("monitoring", "xray", "tcp/9573"),
    ("xray", "api", "udp/53"),
    ("xray", "monitoring", "tcp/9573"),
    ("monitoring", "xray", "udp/51820"),
}
TCP_FLAGS_ACK = 0x10


# ------------------------------------------------------------------------------------------------------- the oracle


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer() as running:
        yield running


def some_states() -> list[DesiredState]:
    """The example with the grants, and random states with random ones, the same in every run."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.fakes.states import granted_states

    out: list[DesiredState] = [with_grants(load(EXAMPLE).state, GRANTS)]

    @seed(17)
    @settings(max_examples=6, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(granted_states(least=3))
    def collect(state: DesiredState) -> None:
        if passages(state):
            out.append(state)

    collect()
    return out


def options(said: list[int]) -> list[str]:
    """How `ofproto/trace` is told what connection tracking says."""
    return [w for state in said for w in ("--ct-next", ",".join(n for n, bit in CT_WORDS.items() if state & bit))]


def test_every_packet_goes_where_open_vswitch_sends_it(tracer: Tracer) -> None:
    """Each bridge by itself, its passages as plain ports: connection tracking says anything, and the policy holds."""
    rng = random.Random(5)
    bridges = [(s, b) for s in some_states() for b in s.bridges if b.kind is BridgeKind.SOCKET]
    wrong: list[str] = []
    crossed = sum(_compare(tracer, rng, state, bridge, PACKETS // len(bridges), wrong) for state, bridge in bridges)
    assert not wrong, "\n".join(wrong[:10]) + f"\n{len(wrong)} are wrong"
    assert crossed > PACKETS / 100, f"{crossed} crossed: too few to mean anything"


def _compare(
    tracer: Tracer, rng: random.Random, state: DesiredState, bridge: Bridge, count: int, wrong: list[str]
) -> int:
    ports = planned_ports(state, bridge)
    flows = list(BridgeCompiler().compile(state, bridge, ports).flows.values())
    tracer.bridge(bridge.name, {name: port.number for name, port in ports.items()}, flows)
    walker, made = Walker(flows), Headers(rng, state, bridge, ports, flows)
    near = [flow for flow in flows if flow.table in (GRANT.id, CROSS.id) and flow.match.get(fields.IP_PROTO)]
    policy, crossed = Policy(state, bridge, ports, Ports()), 0
    for _ in range(count):
        in_port, header = made.some(near)
        said = [rng.choice(rng.choice((SAID, LIKELY))) for _ in range(2)]
        theirs = tracer.outputs(bridge.name, words(in_port, header), *options(said))
        way = walker.follow(in_port, header, iter(said))
        ours = {(bridge.name, in_port if port == fields.IN_PORT else port) for port, _ in way.sent}
        crossed += bool(theirs) and any(step.table == CROSS.id for step in way.steps)
        if way.doubts or ours != theirs:
            wrong.append(
                f"{bridge.name} {words(in_port, header)} {options(said)}: {theirs}, we say {ours} {way.doubts}"
            )
        for name, port in theirs:
            if not policy.allows(in_port, fields.IN_PORT if port == in_port else port, header):
                wrong.append(f"{bridge.name} {words(in_port, header)}: delivered to {name} {port} against the policy")
    return crossed


def test_every_packet_goes_through_both_bridges_as_open_vswitch_sends_it(tracer: Tracer) -> None:
    rng = random.Random(6)
    state = with_grants(load(EXAMPLE).state, GRANTS)
    declared = Declared.declared(state)
    _load(tracer, state, declared)
    wrong: list[str] = []
    crossed = 0
    for _ in range(PACKETS // 2):
        bridge = rng.choice([bridge for bridge in state.bridges if bridge.kind is BridgeKind.SOCKET])
        held = declared.bridges[bridge.name]
        near = [f for f in held.flows if f.table == GRANT.id and f.match.get(fields.IP_PROTO)]
        made = Headers(rng, state, bridge, planned_ports(state, bridge), held.flows)
        for _ in range(20):
            in_port, header = made.some(near)
            if (bridge.name, held.port(in_port)) in declared.links:
                continue
            said = [rng.choice(rng.choice((SAID, LIKELY))) for _ in range(2)]
            legs = [
                leg
                for leg in declared.follow((bridge.name, held.port(in_port)), header, said)
                if leg.bridge.startswith("vmbr")
            ]
            theirs = tracer.outputs(bridge.name, words(in_port, header), *options(said))
            ours = {
                (leg.bridge, declared.bridges[leg.bridge].numbers[port])
                for leg in legs
                for port, far in leg.sent
                if far is None or far[0].startswith("mesh")
            }
            crossed += len(legs) > 1
            if ours != theirs:
                wrong.append(f"{bridge.name} {words(in_port, header)} {options(said)}: {theirs}, we say {ours}")
        if crossed > 200 or wrong:
            break
    assert not wrong, "\n".join(wrong[:10])
    assert crossed > 100


def _load(tracer: Tracer, state: DesiredState, declared: Declared) -> None:
    patched = {end for p in passages(state) for end in ((p.bridge, p.port), (p.peer_bridge, p.peer_port))}
    for name, held in declared.bridges.items():
        if name.startswith("vmbr"):
            plain = {port: number for port, number in held.numbers.items() if (name, port) not in patched}
            tracer.bridge(name, plain, ())
    for bridge, port in patched:
        peer = declared.links[bridge, port][1]
        number = declared.bridges[bridge].numbers[port]
        tracer.vsctl(
            *("add-port", bridge, port, "--", "set", "interface", port, "type=patch", f"options:peer={peer}"),
            f"ofport_request={number}",
        )
    for name, held in declared.bridges.items():
        if name.startswith("vmbr"):
            tracer.load(name, held.flows)
    tracer.forget()


# ------------------------------------------------------------------------------------------------------ real packets


@pytest.fixture(scope="module")
def granting() -> Iterator[Node]:
    """A node whose controller takes grants from a file."""
    with Node(NodeSettings(program=(sys.executable, "-c", PROGRAM))) as built:
        built.controller.start()
        yield built


@pytest.fixture(scope="module")
def prober(granting: Node) -> Iterator[Prober]:
    made = Prober(granting)
    yield made
    made.close()


def table(node: Node, prober: Prober, cells: set[tuple[str, str, str]]) -> list[str]:
    """Where who reaches whom is not as the table says, `cells` being open besides."""
    addresses = {endpoint.address: endpoint.name for endpoint in node.endpoints.values()}
    wrong = []
    forget_paths(node)
    for probe in PROBES:
        wanted = {pair: expected(*pair, probe, refuse=True) for pair in FROM_INSIDE}
        wanted |= {(a, b): Expected("open", frozenset({b})) for a, b, of in cells if of == probe}
        hoped = {pair for pair, found in wanted.items() if found.answer != "silent"}
        with node.watch() as watch:
            attempts = prober.round(probe, FROM_INSIDE, hoped, 0.75)
            arrived: dict[Pair, set[str]] = {pair: set() for pair in FROM_INSIDE}
            for at, frames in watch.frames().items():
                for source, target in requests(frames, probe):
                    arrived[addresses[source], addresses[target]].add(at)
        for pair, attempt in attempts.items():
            found = Expected(attempt.answer, frozenset(arrived[pair]))
            if found != wanted[pair]:
                wrong.append(f"{probe} {pair[0]} -> {pair[1]}: {wanted[pair]}, but {found}")
    return wrong


def test_the_table_differs_in_the_granted_cells_alone(granting: Node, prober: Prober) -> None:
    granting.grant(*GRANTS)
    wrong = table(granting, prober, CELLS)
    assert not wrong, "\n".join(wrong)
    granting.grant()
    granting.ovs.appctl("dpctl/flush-conntrack")
    wrong = table(granting, prober, set())
    assert not wrong, "\n".join(wrong)


def frame(source: Endpoint, target: Endpoint, proto: int, payload: bytes, **how: int) -> bytes:
    """As a container sends it: to its gateway. Whoever that is, flows decide by address."""
    return ethernet(0x02FF00000001, source.mac, 0x0800, ipv4(source.address, target.address, proto, payload, **how))  # type: ignore[arg-type]


def got(node: Node, marker: bytes, source: Endpoint, *frames: bytes) -> set[str]:
    """Who gets a frame with that marker."""
    with node.watch() as watch:
        source.send(*frames)
        time.sleep(0.25)
        return set(watch.holding(marker)) - {source.name}


def test_what_looks_like_a_reply_is_none(granting: Node) -> None:
    """From the granted port to any port of whom the grant is for: what a filter without connections would let in."""
    granting.grant(Grant("1", "202", "102", "tcp", 8080), Grant("2", "202", "102", "udp", 5353))
    monitoring, xray = granting["monitoring"], granting["xray"]
    a, b = monitoring.address, xray.address
    for kind in (2, TCP_FLAGS_ACK, 0x12, 4, 1):
        segment = tcp(b, a, 8080, 22, flags=kind, data=b"sneaky")
        assert got(granting, b"sneaky", xray, frame(xray, monitoring, 6, segment)) == set()
    assert got(granting, b"sneaky", xray, frame(xray, monitoring, 17, udp(b, a, 5353, 53, b"sneaky"))) == set()
    # Once it has been asked, its answer to that is one, and to nothing else.
    asked = frame(monitoring, xray, 17, udp(a, b, 4000, 5353, b"question"))
    assert got(granting, b"question", monitoring, asked) == {"xray"}
    answer = frame(xray, monitoring, 17, udp(b, a, 5353, 4000, b"sneaky"))
    assert got(granting, b"sneaky", xray, answer) == {"monitoring"}
    for source_port, target_port in ((5353, 4001), (5354, 4000), (4000, 5353)):
        segment = udp(b, a, source_port, target_port, b"sneaky")
        assert got(granting, b"sneaky", xray, frame(xray, monitoring, 17, segment)) == set()


def test_fragments_and_errors_do_not_cross(granting: Node) -> None:
    granting.grant(Grant("2", "202", "102", "udp", 5353))
    monitoring, xray = granting["monitoring"], granting["xray"]
    datagram = udp(monitoring.address, xray.address, 4000, 5353, b"fragment" * 8)
    pieces = [
        frame(monitoring, xray, 17, datagram[:32], more=True, ident=9),
        frame(monitoring, xray, 17, datagram[32:], offset=32, ident=9),
    ]
    assert got(granting, b"fragment", monitoring, *pieces) == set()
    assert got(granting, b"fragment", monitoring, frame(monitoring, xray, 17, datagram)) == {"xray"}
    error = icmp(3, ipv4(monitoring.address, xray.address, 17, datagram[:8]) + b"sneaky", code=4)
    assert got(granting, b"sneaky", xray, frame(xray, monitoring, 1, error)) == set()


def test_a_live_connection_dies_with_its_grant(granting: Node) -> None:
    granting.grant(Grant("1", "202", "102", "tcp", 8080), Grant("2", "202", "102", "udp", 5353))
    monitoring, xray = granting["monitoring"], granting["xray"]
    with xray.socket() as server:
        server.bind(("", 8080))
        server.listen()
        with monitoring.socket() as client:
            client.connect_ex((xray.address, 8080))
            assert select.select([server], [], [], 3)[0]
            accepted = server.accept()[0]
            wait_for(lambda: _echo(client, accepted, b"before"), 2)
            granting.grant(Grant("2", "202", "102", "udp", 5353))
            began = time.monotonic()
            while _echo(client, accepted, b"after", 0.2):
                assert time.monotonic() - began < 2
            accepted.close()
    assert connect(monitoring, xray.address, 8080, 0.5)[0] is not None


def _echo(client: socket.socket, server: socket.socket, data: bytes, limit_s: float = 1.0) -> bool:
    """Whether what one sends gets to the other within that time."""
    client.send(data)
    if not select.select([server], [], [], limit_s)[0]:
        return False
    return bool(server.recv(100))


def test_open_vswitch_traces_every_cell_alike(granting: Node) -> None:
    """Every pair of containers, protocol and port, by `ofproto/trace`: only the granted ones get into a container across."""
    granting.grant(*GRANTS)
    members = {m.name: (n, m) for n in granting.state.networks for m in n.members}
    cells = {(g.source, g.target, g.protocol, g.port) for g in GRANTS}
    wrong = []
    ports = datapath_ports(granting.ovs.appctl("dpif/show"))
    for (near, one), (far, other) in itertools.permutations(members.values(), 2):
        if near is far:
            continue
        number = granting.port_number(one.port)
        for protocol, port in itertools.product(("tcp", "udp", "sctp"), (22, 53, 8080, 9573, 51820)):
            packet = (
                f"in_port={number},dl_src={one.mac},dl_dst={near.gateway_mac},{protocol},nw_src={one.address},"
                f"nw_dst={other.address},nw_ttl=64,{protocol}_src=40000,{protocol}_dst={port}"
            )
            out = parse_trace(granting.ovs.appctl("ofproto/trace", near.bridge, packet), ports).sent
            opened = (one.id, other.id, protocol, port) in cells
            if out != ({(far.bridge, granting.port_number(other.port))} if opened else set()):
                wrong.append(f"{packet}: {out}")
    assert not wrong, "\n".join(wrong)
