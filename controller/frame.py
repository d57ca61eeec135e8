"""What apps see of one bridge: the network as a whole (`Frame`), and each member with its port (`Placed`).

A frame holds nothing of single members, so that a flow of one member depends on the frame and that member alone and
need not be made again when another comes or goes. Imports model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from controller.flow import Cookie
from controller.model import DesiredState, Ipv4, Mac, Member, Network, Prefix, Protocol, Rule

LOCAL_NAME = "LOCAL"


@dataclass(frozen=True, slots=True)
class Port:
    """A port as the switch reports it: OpenFlow number, name, Ethernet address, and whether the link is up."""

    number: int
    name: str
    mac: Mac
    up: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """A member together with the number of its port."""

    member: Member
    port: int


@dataclass(frozen=True, slots=True)
class PlacedRule:
    """A rule of the state file with its ports resolved; `mac` is the receiving member's, if it is a member."""

    rule: Rule
    in_port: int | None
    out_port: int | None
    mac: Mac | None


@dataclass(frozen=True, slots=True)
class PlacedVpn:
    """The VPN server's member, its port, and the UDP port clients come to."""

    member: Member
    port: int
    udp_port: int


@dataclass(frozen=True, slots=True)
class PlacedPassage:
    """A passage: the number of the port of this bridge that leads to `peer`."""

    peer: str
    port: int


@dataclass(frozen=True, slots=True)
class PlacedCrossing:
    """One opening of a member: with `there`, an address of another network, reached by port `passage`.

    `opens` says that connections begin with the member here; otherwise they are for its `port`.
    """

    grant: str
    opens: bool
    passage: int
    there: Ipv4
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True)
class PlacedCrossings:
    """All openings of a member of this bridge, whose connections are kept in `zone`."""

    member: Member
    port: int
    zone: int
    each: tuple[PlacedCrossing, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """One network on its bridge, without its single members.

    Ports are OpenFlow numbers, None where the port is not declared or not there. `local` are prefixes that belong to
    this network, `foreign` those of every other one.
    """

    network: Network
    local: tuple[Prefix, ...]
    foreign: tuple[tuple[str, Prefix], ...]
    egress_port: int | None
    egress_open: bool
    mesh_port: int | None
    host_port: int | None
    host_mac: Mac | None
    vpn: PlacedVpn | None

    @property
    def host_takes_part(self) -> bool:
        """Whether the host's port is used at all: it has an address here, or VPN clients come in by it."""
        return self.host_port is not None and (self.network.host is not None or self.vpn is not None)


def frame_of(state: DesiredState, network: Network, ports: Mapping[str, Port], egress_up: bool) -> Frame:
    """The frame of `network` on a bridge that has `ports`."""
    foreign = tuple((other.name, p) for other in state.networks if other.name != network.name for p in other.prefixes)

    def number(name: str | None) -> int | None:
        port = ports.get(name) if name is not None else None
        return port.number if port else None

    host = ports.get(LOCAL_NAME)
    vpn = None
    if network.vpn is not None:
        member = network.member(network.vpn.member_id)
        port = number(member.port)
        if port is not None:
            vpn = PlacedVpn(member, port, network.vpn.port)
    egress_port = number(network.egress.port if network.egress else None)
    return Frame(
        network=replace(network, members=(), rules=(), ids=(0, 0), refuse=False),  # what no flow depends on
        local=network.prefixes,
        foreign=foreign,
        egress_port=egress_port,
        egress_open=egress_port is not None and egress_up,
        mesh_port=number(network.mesh.port if network.mesh else None),
        host_port=host.number if host else None,
        host_mac=host.mac if host else None,
        vpn=vpn,
    )


@lru_cache(maxsize=1 << 17)
def object_id(name: str) -> int:
    """The 40 bits of a cookie that stand for an object, made from its name so that they survive a restart."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=5).digest(), "big")


def cookie(app_id: int, name: str, *, learned: bool = False) -> int:
    """The cookie of an app's flows for one object."""
    return int(Cookie(app_id, object_id(name), learned))


def address_range(prefix: Prefix) -> tuple[Ipv4, Ipv4]:
    """Network and broadcast address of a prefix."""
    return prefix.address, Ipv4(prefix.address | (~prefix.mask & 0xFFFFFFFF))
