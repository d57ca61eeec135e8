"""What a bridge's flows may do at most, read from the desired state alone and not from what compiles it.

For each port: whose packets may come in by it (`senders`), and who may send what out of it (`receives`). Everything
that is not said here is forbidden. Imports model, grants, frame, space, rules and explore; no app.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from controller import fields
from controller.frame import LOCAL_NAME, Port
from controller.grants import crossings, zones
from controller.model import Bridge, BridgeKind, DesiredState, Ipv4, Member, Network, Prefix, Vpn
from controller.verify.explore import EST, RPL, TRK, kept_in
from controller.verify.rules import Ports
from controller.verify.space import ALL, Cube, CubeSet, bits, inside, meet

LOCAL = 0xFFFE
NONE = CubeSet()
ANY = CubeSet((ALL,))
IP, ARP, UDP = 0x0800, 0x0806, 17
PROTOCOLS = {"tcp": (6, fields.TCP_SRC, fields.TCP_DST), "udp": (UDP, fields.UDP_SRC, fields.UDP_DST)}
PROTOCOLS["sctp"] = (132, fields.SCTP_SRC, fields.SCTP_DST)

NOT_THE_WORLD = tuple(
    Prefix.parse(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.168.0.0/16", "224.0.0.0/3"),
    )
)
"""Addresses that are nobody's outside (RFC 6890)."""


def both(*cubes: Cube) -> Cube:
    """Cubes of different fields as one."""
    return sum(c[0] for c in cubes), sum(c[1] for c in cubes)


UNTAGGED = bits(fields.VLAN_VID, 0, 0x1000)
IPV4 = both(bits(fields.ETH_TYPE, IP), UNTAGGED)
ANY_ARP = both(bits(fields.ETH_TYPE, ARP), UNTAGGED)


def source(prefix: Prefix | Ipv4) -> Cube:
    """IPv4 packets from there."""
    return both(IPV4, _address(fields.IPV4_SRC, prefix))


def target(prefix: Prefix | Ipv4) -> Cube:
    """IPv4 packets for there."""
    return both(IPV4, _address(fields.IPV4_DST, prefix))


def _address(field: fields.Field, prefix: Prefix | Ipv4) -> Cube:
    if isinstance(prefix, Prefix):
        return bits(field, prefix.address, prefix.mask)
    return bits(field, prefix)


@dataclass(frozen=True, slots=True)
class Senders:
    """Packets that a port may send on: those in one of `among`, and in none of `but`."""

    among: CubeSet
    but: CubeSet = NONE


@dataclass(frozen=True, slots=True)
class Receives:
    """Packets from any of `ports`, in one of `among` and in none of `but`, may leave by a port; `why` in words.

    `ports` are folded (`Ports.fold`). Packets of a port are only those it may send on, see `Senders`. `tracked` is what
    connection tracking must have said of them.
    """

    ports: int
    among: CubeSet
    but: CubeSet = NONE
    why: str = ""
    tracked: Cube = ALL

    def within(self, other: Receives) -> bool:
        """Whether the other plainly allows all that this one does."""
        if self.ports & ~other.ports or not inside(self.tracked, other.tracked):
            return False
        return self.among.within(other.among) and other.but.within(self.but)


class Policy:
    """The policy of one bridge. `ports` gives port numbers their bits; `names` are those of the bridge's ports.

    What an `old` one says of members that are as they were is taken over.
    """

    def __init__(
        self, state: DesiredState, bridge: Bridge, there: Mapping[str, Port], ports: Ports, old: Policy | None = None
    ) -> None:
        self.ports = ports
        self.members: dict[str, _Member] = {} if old is None else dict(old.members)
        self.names = {_number(port.number): name for name, port in there.items()}
        self.senders: dict[int, Senders] = {}
        self.receives: dict[int, tuple[Receives, ...]] = {}
        for number in self.names:
            ports.one(number)
        network = state.network(bridge.network)
        numbers = {name: _number(port.number) for name, port in there.items()}
        if bridge.kind is BridgeKind.MESH:
            self._mesh_bridge(network, numbers)
        else:
            _Socket(self, state, network, numbers).fill()

    def _mesh_bridge(self, network: Network, numbers: Mapping[str, int]) -> None:
        assert network.mesh is not None
        ends = [numbers.get(name) for name in (network.mesh.leg_port, network.mesh.far_port)]
        if None in ends:
            return
        for this, other in (ends, ends[::-1]):
            assert this is not None and other is not None
            self.senders[this] = Senders(ANY)
            across = CubeSet((IPV4, ANY_ARP))
            may = Receives(self.ports.one(other), across, why="the other end of the mesh")
            self.receives[this] = (may,)

    def allows(self, number: int, port: int, header: int) -> bool:
        """Whether one packet from port `number` may leave by `port`, or by the one it came in by (`fields.IN_PORT`).

        With connections that let it, where it needs any.
        """
        packet = header, -1
        if port == fields.IN_PORT:
            return meet(packet, ANY_ARP) is not None
        senders = self.senders.get(number)
        if senders is None or not _among(packet, senders.among) or _among(packet, senders.but):
            return False
        bit = self.ports.fold(self.ports.one(number))
        return any(
            bit & r.ports and _among(packet, r.among) and not _among(packet, r.but) for r in self.receives.get(port, ())
        )

    def name(self, number: int) -> str:
        """What a port is called."""
        return self.names.get(number, f"port {number}")


def _among(packet: Cube, cubes: CubeSet) -> bool:
    return any(meet(packet, cube) is not None for cube in cubes)


def _number(number: int) -> int:
    return LOCAL if number == fields.LOCAL else number


class _Member(NamedTuple):
    """What is allowed to and from a container, whatever its port's number."""

    member: Member
    vpn: Vpn | None
    senders: Senders
    own: CubeSet
    doors: CubeSet
    answers: CubeSet
    vpn_answers: CubeSet

    @classmethod
    def of(cls, member: Member, vpn: Vpn | None) -> _Member:
        """`vpn` if this is its server."""
        own: list[Prefix | Ipv4] = [member.address, *member.routed]
        tunnel = [("udp", vpn.port)] if vpn is not None else []
        offered = [(s.protocol, s.port) for s in member.services if s.exposed] + tunnel
        return cls(
            member,
            vpn,
            Senders(CubeSet(both(source(p), bits(fields.ETH_SRC, member.mac)) for p in own)),
            CubeSet(target(p) for p in own),
            CubeSet(both(target(member.address), *_ports(proto, dst=number)) for proto, number in offered),
            CubeSet(both(source(member.address), *_ports(proto, src=number)) for proto, number in offered),
            CubeSet(both(source(member.address), *_ports(proto, src=number)) for proto, number in tunnel),
        )


@dataclass(slots=True)
class _Socket:
    """Fills in the policy of a socket bridge."""

    policy: Policy
    state: DesiredState
    network: Network
    numbers: Mapping[str, int]

    def fill(self) -> None:
        network, ports = self.network, self.policy.ports
        singled = 0
        for rule in network.rules:
            singled |= self._bit(rule.in_port)
        for member_id in crossings(self.state, network.bridge):
            singled |= self._bit(network.member(member_id).port)
        there = {m.id: self.numbers[m.port] for m in network.members if m.port in self.numbers}
        for member in network.members:
            vpn = network.vpn if network.vpn is not None and network.vpn.member_id == member.id else None
            if member.id in there and self.policy.members.get(member.id, (None, None))[:2] != (member, vpn):
                self.policy.members[member.id] = _Member.of(member, vpn)
        for member_id in self.policy.members.keys() - there.keys():
            del self.policy.members[member_id]
        every = 0
        for number in there.values():
            every |= ports.one(number)
        ports.alike = every & ~singled
        containers = ports.fold(every)
        self.policy.senders |= {there[key]: known.senders for key, known in self.policy.members.items()}
        egress = self._bit(network.egress.port if network.egress else None)
        mesh = self._bit(network.mesh.port if network.mesh else None)
        host = self._bit(LOCAL_NAME) if network.host is not None or network.vpn is not None else 0
        self._leg_senders()
        foreign = tuple(p for other in self.state.networks if other.name != network.name for p in other.prefixes)
        foreign_targets = CubeSet(map(target, foreign))
        for key, known in self.policy.members.items():
            may = Receives(containers | egress | mesh, known.own, why=known.member.name)
            self._allow(there[key], may)
            if known.doors and host:
                self._allow(there[key], Receives(host, known.doors, why=f"exposed services of {known.member.name}"))
        if network.egress is not None and egress:
            nobody = CubeSet(map(target, (*foreign, *network.prefixes, *NOT_THE_WORLD)))
            may = Receives(containers | mesh, CubeSet((IPV4,)), nobody, "the world, by the egress")
            self._allow(self.numbers[network.egress.port], may)
        if network.mesh is not None and mesh:
            across = CubeSet(map(target, network.mesh.prefixes))
            number = self.numbers[network.mesh.port]
            self._allow(number, Receives(containers | egress, across, foreign_targets, "peers across the mesh"))
            answers = CubeSet(cube for known in self.policy.members.values() for cube in known.vpn_answers)
            self._allow(number, Receives(containers, answers, foreign_targets, "answers of the VPN"))
        if host:
            answers = CubeSet(cube for known in self.policy.members.values() for cube in known.answers)
            may = Receives(containers, answers, foreign_targets, "answers of exposed services")
            self._allow(self.numbers[LOCAL_NAME], may)
        self._rules(containers, foreign_targets)
        self._grants()

    def _bit(self, name: str | None) -> int:
        number = self.numbers.get(name) if name is not None else None
        return self.policy.ports.one(number) if number is not None else 0

    def _allow(self, number: int, receives: Receives) -> None:
        self.policy.receives[number] = (*self.policy.receives.get(number, ()), receives)

    def _leg_senders(self) -> None:
        network, senders = self.network, self.policy.senders
        foreign = [p for other in self.state.networks if other.name != network.name for p in other.prefixes]
        clients: tuple[Cube, ...] = ()
        if network.vpn is not None:
            server = network.member(network.vpn.member_id)
            clients = (both(target(server.address), *_ports("udp", dst=network.vpn.port)),)
        but = tuple(source(p) for p in foreign)
        elsewhere = CubeSet(but)
        if network.egress is not None and (port := self.numbers.get(network.egress.port)) is not None:
            own_mac = bits(fields.ETH_SRC, network.egress.mac)
            senders[port] = Senders(CubeSet((both(IPV4, own_mac),)), elsewhere)
        if network.mesh is not None and (port := self.numbers.get(network.mesh.port)) is not None:
            own_mac = bits(fields.ETH_SRC, network.mesh.mac)
            local = [member.address for member in network.members]
            local += [address for address in (network.gateway, network.host) if address is not None]
            here = tuple(source(a) for a in local)
            among = tuple(both(cube, own_mac) for cube in (*map(source, network.mesh.prefixes), *clients))
            senders[port] = Senders(CubeSet(among), CubeSet((*but, *here)))
        if (port := self.numbers.get(LOCAL_NAME)) is not None:
            among = (source(network.host),) if network.host is not None else ()
            senders[port] = Senders(CubeSet((*among, *clients)), elsewhere)

    def _grants(self) -> None:
        """A granted connection, replies to it, and that no other is kept in the bridge's zone.

        So a packet that connection tracking calls a reply there is one to a packet that was granted: those that are
        kept are granted ones, and a reply is one of these the other way round.
        """
        openings = crossings(self.state, self.network.bridge)
        if not openings:
            return
        zone = zones(self.state)[self.network.bridge]
        answered = both(bits(fields.CT_STATE, TRK | EST | RPL), bits(fields.CT_ZONE, zone))
        kept: list[Receives] = []
        from_passage: dict[int, list[Cube]] = {}
        for member_id, every in openings.items():
            member = self.network.member(member_id)
            for crossing in every:
                ends = self.numbers.get(member.port), self.numbers.get(crossing.passage)
                if None in ends:
                    continue
                here, passage = ends
                assert here is not None and passage is not None
                opener, target = (member, crossing.there) if crossing.opens else (crossing.there, member)
                begins, receives = (here, passage) if crossing.opens else (passage, here)
                opened, replies = granted(opener, target, crossing.protocol, crossing.port)
                why = f"grant {crossing.grant}"
                may = Receives(self.policy.ports.one(begins), CubeSet((opened,)), why=why)
                self._allow(receives, may)
                kept.append(may)
                back = self.policy.ports.one(receives)
                self._allow(begins, Receives(back, CubeSet((replies,)), why=f"replies, {why}", tracked=answered))
                from_passage.setdefault(passage, []).append(replies if crossing.opens else opened)
        self.policy.receives[kept_in(zone)] = tuple(kept)
        self.policy.senders |= {number: Senders(CubeSet(cubes)) for number, cubes in from_passage.items()}

    def _rules(self, containers: int, foreign: CubeSet) -> None:
        """What the operator's own rules send to the host or the mesh; to members they deliver only what is theirs."""
        for rule in self.network.rules:
            if rule.output is None or rule.output not in self.numbers or rule.in_port == LOCAL_NAME:
                continue
            to_mesh = self.network.mesh is not None and rule.output == self.network.mesh.port
            if rule.output != LOCAL_NAME and not to_mesh:
                continue
            may = self._bit(rule.in_port) if rule.in_port is not None else containers
            cube = both(*(bits(fields.BY_NAME[name], value, mask) for name, value, mask in rule.match))
            cube = both(cube, UNTAGGED)
            self._allow(self.numbers[rule.output], Receives(may & containers, CubeSet((cube,)), foreign, rule.path))


def granted(source_: Member, target_: Member, protocol: str, port: int) -> tuple[Cube, Cube]:
    """The packets that a grant lets through: those of its connections, and what replies to these look like."""
    opened = both(_between(source_, target_), *_ports(protocol, dst=port))
    return opened, both(_between(target_, source_), *_ports(protocol, src=port))


def _between(one: Member, other: Member) -> Cube:
    ends = bits(fields.IPV4_SRC, one.address), bits(fields.IPV4_DST, other.address)
    return both(IPV4, *ends, bits(fields.IP_FRAG, 0, 3))


def _ports(protocol: str, *, src: int | None = None, dst: int | None = None) -> list[Cube]:
    number, source_field, target_field = PROTOCOLS[protocol]
    out = [bits(fields.IP_PROTO, number)]
    if src is not None:
        out.append(bits(source_field, src))
    if dst is not None:
        out.append(bits(target_field, dst))
    return out
