"""The desired state of one node, frozen: networks, their members and services, and the bridges that carry them.

Addresses are integers that print themselves (`Ipv4`, `Mac`), so that they are cheap to hash, compare and put into a
flow. Everything here is a value; the readers of state files build it, apps read it. Imports nothing of ours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

import netaddr

Protocol = Literal["tcp", "udp", "sctp"]


class Mac(int):
    """A 48-bit Ethernet address."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Mac:
        """Read any notation netaddr knows. Raises `ValueError` if it is not an Ethernet address."""
        try:
            return cls(int(netaddr.EUI(text, version=48)))
        except (netaddr.AddrFormatError, TypeError) as exc:
            raise ValueError(f"{text!r} is not an Ethernet address") from exc

    @classmethod
    def derive(cls, *parts: str) -> Mac:
        """A stable, locally administered unicast address made from names (SHA-256, first five bytes)."""
        digest = hashlib.sha256("/".join(parts).encode()).digest()
        return cls(0x02 << 40 | int.from_bytes(digest[:5], "big"))

    def __str__(self) -> str:
        return ":".join(f"{byte:02x}" for byte in self.to_bytes(6, "big"))

    def __repr__(self) -> str:
        return f"Mac({str(self)!r})"


class Ipv4(int):
    """A 32-bit IPv4 address."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Ipv4:
        """Read a dotted quad. Raises `ValueError` if it is not one."""
        try:
            return cls(int(netaddr.IPAddress(text, version=4, flags=netaddr.INET_PTON)))
        except (netaddr.AddrFormatError, TypeError) as exc:
            raise ValueError(f"{text!r} is not an IPv4 address") from exc

    def __str__(self) -> str:
        return ".".join(str(byte) for byte in self.to_bytes(4, "big"))

    def __repr__(self) -> str:
        return f"Ipv4({str(self)!r})"


class Prefix(NamedTuple):
    """An IPv4 prefix; `address` has no host bits."""

    address: Ipv4
    length: int

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Read `10.0.0.0/24`; host bits are cut off. Raises `ValueError` if it is not a prefix."""
        try:
            network = netaddr.IPNetwork(text, version=4)
        except (netaddr.AddrFormatError, TypeError, ValueError) as exc:
            raise ValueError(f"{text!r} is not an IPv4 prefix") from exc
        return cls(Ipv4(network.first), network.prefixlen)

    @property
    def mask(self) -> int:
        """The netmask as a 32-bit integer."""
        return (0xFFFFFFFF << (32 - self.length)) & 0xFFFFFFFF

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and (address & self.mask) == self.address

    def overlaps(self, other: Prefix) -> bool:
        """Whether any address lies in both."""
        return other.address in self or self.address in other

    def __str__(self) -> str:
        return f"{self.address}/{self.length}"


class Role(StrEnum):
    """What a port is for; decides where its packets may go (see `controller.pipeline`)."""

    CONTAINER = "container"
    EGRESS = "egress"
    MESH = "mesh"
    HOST = "host"
    PASSAGE = "passage"


class BridgeKind(StrEnum):
    """A socket bridge holds containers; a mesh bridge joins a mesh to a socket bridge."""

    SOCKET = "socket"
    MESH = "mesh"


@dataclass(frozen=True, slots=True)
class Service:
    """A name, protocol and layer-4 port offered by a member; `exposed` ones may be reached from the host's port."""

    name: str
    protocol: Protocol
    port: int
    exposed: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """A container of a network and the OVS port it sits behind.

    `routed` are prefixes that live behind it (a VPN server's client pool).
    """

    id: str
    name: str
    port: str
    mac: Mac
    address: Ipv4
    services: tuple[Service, ...] = ()
    routed: tuple[Prefix, ...] = ()


@dataclass(frozen=True, slots=True)
class Egress:
    """The port of the leg through which a network's traffic leaves, and the MAC of the leg's far end."""

    port: str
    mac: Mac


@dataclass(frozen=True, slots=True)
class Mesh:
    """How a network goes on to other hosts.

    `port` is the socket bridge's end of the veth pair (from-privacy), `far_port` the mesh bridge's end (to-privacy),
    `leg_port` the leg on the mesh bridge (nm-privacy). Peers have addresses in `prefixes` and are reached by `mac`.
    """

    bridge: str
    port: str
    far_port: str
    leg_port: str
    mac: Mac
    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True, slots=True)
class Vpn:
    """A WireGuard server in a container: clients of anywhere reach `member_id` on UDP `port`, inside as `pool`."""

    member_id: str
    port: int
    pool: Prefix


@dataclass(frozen=True, slots=True)
class Rule:
    """A flow of the state file, checked and rewritten for the SERVICE stage.

    `match` holds (field name, value, mask) in the terms of `controller.flow`, without in_port. `in_port` and `output`
    are port names; `output` None drops. `rank` orders rules: a higher rank wins, equal ranks do not overlap.
    """

    path: str
    text: str
    rank: int
    match: tuple[tuple[str, int, int], ...]
    in_port: str | None
    output: str | None


@dataclass(frozen=True, slots=True)
class Network:
    """One isolated network on this node: a bridge, a subnet, an id range, and who is on it.

    `host` is the host's own address on the bridge, if the host takes part; `refuse` answers blocked connections
    instead of dropping them silently.
    """

    name: str
    bridge: str
    subnet: Prefix
    gateway: Ipv4
    gateway_mac: Mac
    ids: tuple[int, int]
    egress: Egress | None = None
    mesh: Mesh | None = None
    host: Ipv4 | None = None
    refuse: bool = False
    members: tuple[Member, ...] = ()
    vpn: Vpn | None = None
    rules: tuple[Rule, ...] = ()

    @property
    def prefixes(self) -> tuple[Prefix, ...]:
        """Every prefix that belongs to this network, without duplicates: subnet, mesh peers, routed prefixes."""
        found = [self.subnet]
        found += self.mesh.prefixes if self.mesh else ()
        found += (prefix for member in self.members for prefix in member.routed)
        return tuple(dict.fromkeys(found))

    def member(self, member_id: str) -> Member:
        """The member with that id. Raises `KeyError`."""
        for member in self.members:
            if member.id == member_id:
                return member
        raise KeyError(member_id)


@dataclass(frozen=True, slots=True)
class Bridge:
    """An OVS bridge we own the flows of. `datapath_id` is None where it is recognised by name alone."""

    name: str
    kind: BridgeKind
    network: str
    datapath_id: int | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """An approved crossing: the member `source` may open connections to `port` of the member `target` of another network.

    Members are named by id. What it opens is decided by `controller.grants`.
    """

    id: str
    source: str
    target: str
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True)
class DesiredState:
    """Everything one node should be. `digest` names it in events and in `status`."""

    networks: tuple[Network, ...] = ()
    bridges: tuple[Bridge, ...] = ()
    digest: str = field(default="", compare=False)
    grants: tuple[Grant, ...] = ()

    def network(self, name: str) -> Network:
        """The network of that name. Raises `KeyError`."""
        for network in self.networks:
            if network.name == name:
                return network
        raise KeyError(name)

    def bridge(self, name: str) -> Bridge | None:
        """The declared bridge of that name, or None."""
        for bridge in self.bridges:
            if bridge.name == name:
                return bridge
        return None
