"""What a bridge's flows may do at most, read from the desired state alone and not from what compiles it.

For each port: whose packets may come in by it (`senders`), and who may send what out of it (`receives`). Everything
that is not said here is forbidden. Imports model, frame, space and rules; no app.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from controller import fields
from controller.frame import LOCAL_NAME, Port
from controller.model import Bridge, BridgeKind, DesiredState, Ipv4, Network, Prefix
from controller.verify.rules import Ports
from controller.verify.space import ALL, Cube, bits

LOCAL = 0xFFFE
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

    among: tuple[Cube, ...]
    but: tuple[Cube, ...] = ()


@dataclass(frozen=True, slots=True)
class Receives:
    """Packets from any of `ports`, in one of `among` and in none of `but`, may leave by a port; `why` in words."""

    ports: int
    among: tuple[Cube, ...]
    but: tuple[Cube, ...] = ()
    why: str = ""


class Policy:
    """The policy of one bridge. `ports` gives port numbers their bits; `names` are those of the bridge's ports."""

    def __init__(self, state: DesiredState, bridge: Bridge, there: Mapping[str, Port], ports: Ports) -> None:
        self.ports = ports
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
            self.senders[this] = Senders((ALL,))
            may = Receives(self.ports.one(other), (IPV4, ANY_ARP), why="the other end of the mesh")
            self.receives[this] = (may,)

    def name(self, number: int) -> str:
        """What a port is called."""
        return self.names.get(number, f"port {number}")


def _number(number: int) -> int:
    return LOCAL if number == fields.LOCAL else number


@dataclass(slots=True)
class _Socket:
    """Fills in the policy of a socket bridge."""

    policy: Policy
    state: DesiredState
    network: Network
    numbers: Mapping[str, int]

    def fill(self) -> None:
        network = self.network
        containers = 0
        for member in network.members:
            if (port := self.numbers.get(member.port)) is not None:
                containers |= self.policy.ports.one(port)
                own: list[Prefix | Ipv4] = [member.address, *member.routed]
                mine = [both(source(p), bits(fields.ETH_SRC, member.mac)) for p in own]
                self.policy.senders[port] = Senders(tuple(mine))
        egress = self._bit(network.egress.port if network.egress else None)
        mesh = self._bit(network.mesh.port if network.mesh else None)
        host = self._bit(LOCAL_NAME) if network.host is not None or network.vpn is not None else 0
        self._leg_senders()
        foreign = tuple(p for other in self.state.networks if other.name != network.name for p in other.prefixes)
        self._to_containers(containers, egress | mesh, host, foreign)
        if network.egress is not None and egress:
            nobody = tuple(map(target, (*foreign, *network.prefixes, *NOT_THE_WORLD)))
            self._allow(network.egress.port, Receives(containers | mesh, (IPV4,), nobody, "the world, by the egress"))
        if network.mesh is not None and mesh:
            across = tuple(map(target, network.mesh.prefixes))
            self._allow(
                network.mesh.port,
                Receives(containers | egress, across, tuple(map(target, foreign)), "peers across the mesh"),
                *self._replies(foreign, vpn_only=True),
            )
        if host:
            self._allow(LOCAL_NAME, *self._replies(foreign, vpn_only=False))
        self._rules(containers, tuple(target(p) for p in foreign))

    def _bit(self, name: str | None) -> int:
        number = self.numbers.get(name) if name is not None else None
        return self.policy.ports.one(number) if number is not None else 0

    def _allow(self, name: str, *receives: Receives) -> None:
        number = self.numbers[name]
        self.policy.receives[number] = (*self.policy.receives.get(number, ()), *receives)

    def _leg_senders(self) -> None:
        network, senders = self.network, self.policy.senders
        foreign = [p for other in self.state.networks if other.name != network.name for p in other.prefixes]
        clients: tuple[Cube, ...] = ()
        if network.vpn is not None:
            server = network.member(network.vpn.member_id)
            clients = (both(target(server.address), *_ports("udp", dst=network.vpn.port)),)
        but = tuple(source(p) for p in foreign)
        if network.egress is not None and (port := self.numbers.get(network.egress.port)) is not None:
            own_mac = bits(fields.ETH_SRC, network.egress.mac)
            senders[port] = Senders((both(IPV4, own_mac),), but)
        if network.mesh is not None and (port := self.numbers.get(network.mesh.port)) is not None:
            own_mac = bits(fields.ETH_SRC, network.mesh.mac)
            local = [member.address for member in network.members]
            local += [address for address in (network.gateway, network.host) if address is not None]
            here = tuple(source(a) for a in local)
            among = tuple(both(cube, own_mac) for cube in (*map(source, network.mesh.prefixes), *clients))
            senders[port] = Senders(among, (*but, *here))
        if (port := self.numbers.get(LOCAL_NAME)) is not None:
            among = (source(network.host),) if network.host is not None else ()
            senders[port] = Senders((*among, *clients), but)

    def _to_containers(self, containers: int, legs: int, host: int, foreign: tuple[Prefix, ...]) -> None:
        vpn = self.network.vpn
        for member in self.network.members:
            port = self.numbers.get(member.port)
            if port is None:
                continue
            own: list[Prefix | Ipv4] = [member.address, *member.routed]
            here = tuple(target(p) for p in own)
            self._allow(member.port, Receives(containers | legs, here, why=member.name))
            offered = [(s.protocol, s.port) for s in member.services if s.exposed]
            if vpn is not None and vpn.member_id == member.id:
                offered.append(("udp", vpn.port))
            doors = tuple(both(target(member.address), *_ports(proto, dst=number)) for proto, number in offered)
            if doors and host:
                self._allow(member.port, Receives(host, doors, why=f"exposed services of {member.name}"))

    def _rules(self, containers: int, foreign: tuple[Cube, ...]) -> None:
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
            self._allow(rule.output, Receives(may & containers, (cube,), foreign, rule.path))

    def _replies(self, foreign: tuple[Prefix, ...], *, vpn_only: bool) -> Iterator[Receives]:
        vpn = self.network.vpn
        for member in self.network.members:
            port = self.numbers.get(member.port)
            if port is None:
                continue
            offered = [] if vpn_only else [(s.protocol, s.port) for s in member.services if s.exposed]
            if vpn is not None and vpn.member_id == member.id:
                offered.append(("udp", vpn.port))
            answers = tuple(both(source(member.address), *_ports(proto, src=number)) for proto, number in offered)
            if answers:
                but = tuple(map(target, foreign))
                yield Receives(self.policy.ports.one(port), answers, but, f"answers of {member.name}")


def _ports(protocol: str, *, src: int | None = None, dst: int | None = None) -> list[Cube]:
    number, source_field, target_field = PROTOCOLS[protocol]
    out = [bits(fields.IP_PROTO, number)]
    if src is not None:
        out.append(bits(source_field, src))
    if dst is not None:
        out.append(bits(target_field, dst))
    return out
