"""A passage between two socket bridges, with connection tracking: what a grant is made of, and random flows beside ours."""

from __future__ import annotations

import random
from dataclasses import dataclass

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import (
    Action,
    Aside,
    Bits,
    Clone,
    Ct,
    CtClear,
    DecTtl,
    Flow,
    Load,
    Match,
    Move,
    Output,
    Resubmit,
    SetField,
    whole,
)
from controller.model import BridgeKind, DesiredState
from controller.verify.explore import EST, NEW, RPL, TRK
from controller.verify.node import Held, Node

IP, TCP = 0x0800, 6
HERE, THERE = "pass-here", "pass-there"


@dataclass(frozen=True)
class Granted:
    """Who may open what on whom: ports by name, addresses and a TCP port."""

    source: str
    target: str
    from_address: int
    to_address: int
    port: int


def with_passage(state: DesiredState, granted: Granted) -> Node:
    """The two socket bridges of a state with a pair of patch ports, and the flows that a grant needs on each."""
    from_bridge, to_bridge = (bridge for bridge in state.bridges if bridge.kind is BridgeKind.SOCKET)
    held = {}
    for bridge, name in ((from_bridge, HERE), (to_bridge, THERE)):
        ports = planned_ports(state, bridge)
        numbers = {port: known.number for port, known in ports.items()} | {name: 77}
        flows = list(BridgeCompiler().compile(state, bridge, ports).flows.values())
        inner = numbers[granted.source if name == HERE else granted.target]
        flows += _one_side(granted, inner, opens=name == HERE)
        held[bridge.name] = Held.of(bridge.name, numbers, flows)
    near, far = (from_bridge.name, HERE), (to_bridge.name, THERE)
    return Node(held, {near: far, far: near})


def _one_side(granted: Granted, inner: int, *, opens: bool) -> list[Flow]:
    """Where connections begin (`opens`) they come in by the member's port, elsewhere by the passage."""
    begins, replies = (inner, 77) if opens else (77, inner)
    there = {"eth_type": IP, "ip_proto": TCP, "ipv4_src": granted.from_address, "ipv4_dst": granted.to_address}
    back = {"eth_type": IP, "ip_proto": TCP, "ipv4_src": granted.to_address, "ipv4_dst": granted.from_address}
    zone = 1 if opens else 2
    tracked = {"eth_type": IP, "ip_proto": TCP}
    out, home = Output(replies), Output(begins)
    return [
        Flow(0, 2000, Match.named(in_port=begins, tcp_dst=granted.port, **there), (Ct(zone, 31),)),
        Flow(0, 2000, Match.named(in_port=replies, tcp_src=granted.port, **back), (Ct(zone, 32),)),
        Flow(31, 100, Match.named(ct_state=(TRK | NEW, TRK | NEW), **tracked), (Ct(zone, commit=True), out)),
        Flow(31, 90, Match.named(ct_state=(TRK | EST, TRK | EST | RPL), **tracked), (out,)),
        Flow(32, 100, Match.named(ct_state=(TRK | EST | RPL, TRK | EST | RPL), **tracked), (home,)),
    ]


# ------------------------------------------------------------------------------------------------------- random flows

_MATCHED = (
    *(fields.ETH_SRC, fields.IPV4_SRC, fields.IPV4_DST, fields.TCP_SRC, fields.TCP_DST),
    *(fields.REGS[0], fields.REGS[1], fields.METADATA),
)
_WRITTEN = (fields.ETH_SRC, fields.ETH_DST, fields.IPV4_SRC, fields.IPV4_DST, fields.REGS[0], fields.REGS[1])
_VALUES = (0, 1, 2, 0x0A000064, 0x0A000066, 0x0A0100C9, 53, 443)


def random_flows(rng: random.Random, ports: list[int], count: int) -> list[Flow]:
    """Flows of nobody's design: masks of any bits, every action that we follow, tables that resubmit and jump."""
    flows: dict[tuple[int, int], Flow] = {}
    for _ in range(count):
        # One priority for each flow of a table: of two that meet nobody knows which wins, which is tested elsewhere.
        table, priority = rng.choice((0, 0, 1, 2, 3)), rng.randrange(1, 60000)
        flows[table, priority] = Flow(
            table, priority, _match(rng, ports), _actions(rng, ports, table), _goto(rng, table)
        )
    return list(flows.values())


def _goto(rng: random.Random, table: int) -> int | None:
    return rng.choice((None, *range(table + 1, 4))) if rng.random() < 0.6 else None


def _match(rng: random.Random, ports: list[int]) -> Match:
    items = [(fields.ETH_TYPE.header, IP, 0xFFFF), (fields.IP_PROTO.header, TCP, 0xFF)]
    if rng.random() < 0.4:
        items.append((fields.IN_PORT_FIELD.header, rng.choice(ports), fields.IN_PORT_FIELD.full))
    matched = _MATCHED
    if rng.random() < 0.2:
        fragment = rng.choice(((0, 3), (1, 1), (3, 3), (0, 2)))
        items.append((fields.IP_FRAG.header, *fragment))
        if fragment == (3, 3):  # Open vSwitch refuses ports beside it
            matched = tuple(of for of in _MATCHED if of not in (fields.TCP_SRC, fields.TCP_DST))
    for of in rng.sample(matched, rng.randrange(0, 3)):
        mask = rng.choice((of.full, rng.getrandbits(of.bits), of.full & ~0xFF, 1 << rng.randrange(of.bits)))
        items.append((of.header, rng.choice(_VALUES) & of.full & mask, mask))
    return Match.of(items)


def _actions(rng: random.Random, ports: list[int], table: int) -> tuple[Action, ...]:
    return tuple(_action(rng, ports, table) for _ in range(rng.randrange(0, 4)))


def _action(rng: random.Random, ports: list[int], table: int) -> Action:
    of = rng.choice(_WRITTEN)
    start = rng.randrange(of.bits)
    width = rng.randrange(1, min(of.bits - start, 32) + 1)
    other = rng.choice([f for f in _WRITTEN if f.bits == of.bits])
    choices: list[Action] = [
        Output(rng.choice([*ports, fields.IN_PORT, fields.LOCAL])),
        SetField(of.header, rng.choice(_VALUES) & of.full),
        Load(rng.getrandbits(width), Bits(of.header, start, width)),
        Move(Bits(other.header, 0, width), Bits(of.header, start, width)),
        Move(whole(other), whole(of)),
        Aside("note:01.02"),
        DecTtl(),
        CtClear(),
        Clone((SetField(fields.REGS[0].header, 7), Output(rng.choice(ports)))),
    ]
    if table < 3:
        choices += [Resubmit(rng.randrange(table + 1, 4)), Resubmit(3), Ct(rng.choice((0, 5)), rng.choice((None, 3)))]
    return rng.choice(choices)
