"""What is known of a host, as frozen values. Every fact is there, or is a `Gap` that says why not. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any

IpNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Gap:
    """Why a fact is not known and what to do. `absent`: because the thing it is about is not on this host."""

    why: str
    mend: str = ""
    absent: bool = False


@dataclass(frozen=True, slots=True)
class OvsInterface:
    """One row of OVS's Interface table; `peer` is a patch port's other end, `index` the kernel's, 0 if it has none."""

    name: str
    type: str = ""
    peer: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class OvsBridge:
    """One row of OVS's Bridge table. `copies` names what hands packets out beside the flows: mirrors, sFlow and such.

    `datapath_id` is what it is called in OpenFlow; `spanning` names the spanning tree protocols that are on.
    """

    name: str
    datapath_type: str = ""
    datapath_id: str = ""
    fail_mode: str = ""
    disable_in_band: bool = False
    controllers: tuple[str, ...] = ()
    interfaces: tuple[OvsInterface, ...] = ()
    copies: tuple[str, ...] = ()
    spanning: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ovs:
    """OVS's configuration. `db` is where it was asked for; `remotes` is where ovsdb-server itself listens, `control` its
    own control socket."""

    bridges: tuple[OvsBridge, ...] = ()
    managers: tuple[str, ...] = ()
    remotes: tuple[str, ...] | Gap = ()
    db: str = ""
    control: str = "ovsdb-server"


@dataclass(frozen=True, slots=True)
class HeldFlow:
    """A line of `bridge/dump-flows`, hidden flows included."""

    table: int
    priority: int
    text: str
    actions: str


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface; `network` has the interface's prefix length."""

    text: str
    network: IpNetwork


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `lower` is a veth's far end, or what a VLAN or macvlan stands on, if it is in the same
    namespace; `lower_index` its index if it is in another. Not `ethernet`: WireGuard's, a tun. `program`: it has XDP."""

    name: str
    index: int = 0
    kind: str = ""
    master: str = ""
    lower: str = ""
    lower_index: int = 0
    addresses: tuple[Address, ...] = ()
    ethernet: bool = True
    program: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """A route of any table; `devices` are several where it has several next hops, none where it leads nowhere."""

    network: IpNetwork
    devices: tuple[str, ...]
    table: str = "main"
    kind: str = "unicast"
    protocol: str = ""


@dataclass(frozen=True, slots=True)
class RouteRule:
    """A policy routing rule that sends packets to a table; empty where it does not say."""

    priority: int
    source: IpNetwork | None = None
    target: IpNetwork | None = None
    iif: str = ""
    oif: str = ""


@dataclass(frozen=True, slots=True)
class Redirect:
    """A traffic control filter that moves packets of `device` to `target`; '' if a program decides where to.

    `where` is ingress, egress or root.
    """

    device: str
    where: str
    target: str


@dataclass(frozen=True, slots=True)
class NftRule:
    """A rule's expressions as `nft -j` prints them, with named sets written out."""

    parts: tuple[Mapping[str, Any], ...]
    handle: int = 0


@dataclass(frozen=True, slots=True)
class NftChain:
    """A chain of nftables, or of iptables-legacy in the same terms. Only a base chain has a hook; a dormant table's has
    none."""

    family: str
    table: str
    name: str
    hook: str = ""
    policy: str = "accept"
    devices: tuple[str, ...] = ()
    rules: tuple[NftRule, ...] = ()

    @property
    def title(self) -> str:
        """How nft names it."""
        return f"{self.family} {self.table} {self.name}"


@dataclass(frozen=True, slots=True)
class AllowedIps:
    """What a WireGuard interface takes from and sends to one of its peers (counted from 1)."""

    interface: str
    peer: int
    networks: tuple[IpNetwork, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A network namespace other than the one we are in."""

    name: str
    links: tuple[Link, ...] | Gap
    wireguard: tuple[AllowedIps, ...] | Gap


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a host. `sysctls` has names as below /proc/sys/net: `ipv4/conf/all/forwarding`."""

    ovs: Ovs | Gap
    flows: Mapping[str, tuple[HeldFlow, ...] | Gap]
    links: tuple[Link, ...] | Gap
    routes: tuple[Route, ...] | Gap
    rules: tuple[RouteRule, ...] | Gap
    redirects: tuple[Redirect, ...] | Gap
    sysctls: Mapping[str, str] | Gap
    nft: tuple[NftChain, ...] | Gap
    wireguard: tuple[AllowedIps, ...] | Gap
    places: tuple[Place, ...] | Gap
