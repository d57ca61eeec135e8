"""Random packets that do not all die in the first table: made to meet flows, from the port that they claim to be of."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from controller import fields
from controller.fields import Field
from controller.flow import Flow
from controller.frame import Port
from controller.model import Bridge, BridgeKind, DesiredState
from controller.verify.policy import Policy
from controller.verify.rules import Ports
from controller.verify.space import ENTERING, bits, get, of_match

IP, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
_FIELDS = (
    *(fields.ETH_SRC, fields.ETH_DST, fields.ETH_TYPE, fields.IPV4_SRC, fields.IPV4_DST, fields.IP_PROTO),
    *(fields.TCP_SRC, fields.TCP_DST, fields.ARP_OP, fields.ARP_SHA, fields.ARP_THA, fields.IP_FRAG),
)
_WORLD = (0x01010101, 0xC6336401, 0x7F000001, 0xE0000001, 0xFFFFFFFF, 0xA9FE0101, 0x0A000000, 0x64400001)


class Headers:
    """Makes headers for one bridge. What the flows compare are the interesting values."""

    def __init__(
        self, rng: random.Random, state: DesiredState, bridge: Bridge, ports: Mapping[str, Port], flows: Iterable[Flow]
    ) -> None:
        self.rng = rng
        self.flows = list(flows)
        self.numbers = [0xFFFE if p.number == fields.LOCAL else p.number for p in ports.values()]
        self.policy = Policy(state, bridge, ports, Ports())
        self.mesh = bridge.kind is BridgeKind.MESH
        self.values: dict[Field, set[int]] = {field: {0, field.full} for field in _FIELDS}
        self.values[fields.ETH_TYPE] = {IP, ARP, IPV6, 0x88CC, 0x8847, 0x1234}
        self.values[fields.IP_PROTO] = {1, 6, 17, 132, 47, 2}
        self.values[fields.IP_FRAG] = {0, 1, 3}
        self.values[fields.IPV4_SRC] |= set(_WORLD)
        self.values[fields.IPV4_DST] |= set(_WORLD)
        for flow in self.flows:
            self._note(flow)
        for network in state.networks:
            for member in network.members:
                self.values[fields.IPV4_DST] |= {member.address, *(p.address + 2 for p in member.routed)}
                self.values[fields.IPV4_SRC] |= {member.address}
                self.values[fields.TCP_DST] |= {service.port for service in member.services}
        addresses = self.values[fields.IPV4_SRC] | self.values[fields.IPV4_DST]
        self.values[fields.IPV4_SRC] = self.values[fields.IPV4_DST] = addresses
        self.values[fields.TCP_SRC] = self.values[fields.TCP_DST] = (
            self.values[fields.TCP_SRC] | self.values[fields.TCP_DST] | {1, 1023, 40000, 65535}
        )

    def _note(self, flow: Flow) -> None:
        cube, _, _ = of_match(flow.match)
        for field in _FIELDS:
            mask = get(cube[1], field)
            if mask:
                value = get(cube[0], field)
                near = {value, value | (~mask & field.full & 0x0101)}
                self.values[field] |= near | ({(value + 1) & field.full} if field.bits >= 16 else set())

    def some(self, near: Sequence[Flow] = ()) -> tuple[int, int]:
        """(ingress port, header) of one packet; `near` names flows that it should rather meet."""
        rng = self.rng
        flow = rng.choice(near) if near and rng.random() < 0.6 else rng.choice(self.flows)
        (value, mask), port, _ = of_match(flow.match)
        in_port = port if port is not None and rng.random() < 0.9 else rng.choice(self.numbers)
        in_port = 0xFFFE if in_port == fields.LOCAL else in_port
        value, mask = value & ~ENTERING[1], mask & ~ENTERING[1]
        senders = self.policy.senders.get(in_port)
        if senders is not None and len(senders.among) and rng.random() < 0.7:
            own = rng.choice(senders.among.cubes)
            value, mask = own[0] | value & ~own[1], mask | own[1]
        for field in _FIELDS:
            full = bits(field, field.full)[1]
            chosen = bits(field, rng.choice(sorted(self.values[field])))[0]
            if rng.random() < 0.08:
                value ^= chosen & full
            else:
                value |= chosen & full & ~mask
        tagged = rng.random() < 0.03
        return in_port, plausible(value, tagged=tagged, rng=rng)


def plausible(header: int, *, tagged: bool, rng: random.Random) -> int:
    """A header that a packet can have: fields that its protocols do not have are 0, as Open vSwitch reads them."""
    ethertype = get(header, fields.ETH_TYPE)
    keep = [fields.ETH_SRC, fields.ETH_DST, fields.ETH_TYPE]
    if ethertype == 0 or ethertype == VLAN:
        header = _set(header, fields.ETH_TYPE, IP)
        ethertype = IP
    if ethertype == IP:
        keep += [fields.IPV4_SRC, fields.IPV4_DST, fields.IP_PROTO, fields.IP_FRAG]
        fragment = get(header, fields.IP_FRAG) & 3
        header = _set(header, fields.IP_FRAG, fragment if fragment != 2 else 0)
        if not fragment and get(header, fields.IP_PROTO) in (1, 6, 17, 132):
            keep += [fields.TCP_SRC, fields.TCP_DST]
            if get(header, fields.IP_PROTO) == 1:
                header = _set(header, fields.TCP_SRC, get(header, fields.TCP_SRC) & 0xFF)
                header = _set(header, fields.TCP_DST, get(header, fields.TCP_DST) & 0xFF)
    elif ethertype == ARP:
        keep += [fields.IPV4_SRC, fields.IPV4_DST, fields.ARP_OP, fields.ARP_SHA, fields.ARP_THA]
        header = _set(header, fields.ARP_OP, get(header, fields.ARP_OP) & 0xFF)
    elif ethertype == IPV6:
        keep += [fields.IP_PROTO]
        if get(header, fields.IP_PROTO) in (6, 17):
            keep += [fields.TCP_SRC, fields.TCP_DST]
    out = 0
    for field in keep:
        out |= bits(field, get(header, field))[0]
    return out | (bits(fields.VLAN_VID, 0x1000 | rng.choice((0, 1, 100)))[0] if tagged else 0)


def _set(header: int, field: Field, value: int) -> int:
    value_bits, mask = bits(field, value)
    return header & ~mask | value_bits
