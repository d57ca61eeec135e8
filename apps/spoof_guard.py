"""Spoof guard: a port may only use its own Ethernet, IPv4 and ARP sender addresses."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import ARP, ICMP, IPV4, UDP, App
from controller.flow import Flow
from controller.frame import Frame, Placed, address_range
from controller.model import Ipv4, Mac, Member, Prefix
from controller.pipeline import GRANT, NEIGHBOUR, SPOOF_GUARD, Band, MatchValue, Violation, go, violation

NOBODY = tuple(map(Prefix.parse, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))
"""Senders that no packet from elsewhere can have (RFC 6890): this network, loopback, link-local, multicast, reserved."""


UNREACHABLE, TIME_EXCEEDED = 3, 11
"""ICMP errors of a router on the way (RFC 792): 3 with code 4 is "too big"."""


class SpoofGuard(App):
    """SPOOF_GUARD.

    500 a DHCP server is a violation; 400 from the mesh, an address of a member of this host (be it there or away), of
    its gateway or host, or the first or last of the subnet, which are nobody's, is a violation; 350 from mesh, egress or
    host, another network's address is a violation; 300 own addresses go on (IPv4 to GRANT, ARP to NEIGHBOUR), and so do
    ICMP errors that the egress leg sends as the gateway; 250 from egress, host or VPN clients, this network's addresses
    and those that nobody can have are a violation; 200 egress and VPN clients may come from anywhere else; 100 the rest
    is a violation.
    """

    id = 2
    name = "spoof_guard"
    tables = (SPOOF_GUARD,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        own = self.own_network(frame)
        yield SPOOF_GUARD.flow(
            Band.HARD_DENY, own, violation(Violation.ROGUE_DHCP), eth_type=IPV4, ip_proto=UDP, udp_src=67
        )
        yield SPOOF_GUARD.flow(Band.REST, own, violation(Violation.SPOOF))
        if frame.mesh_port is not None and frame.network.mesh is not None:
            yield from self._mesh(frame, frame.mesh_port, frame.network.mesh.mac, frame.network.mesh.prefixes)
        if frame.egress_port is not None and frame.network.egress is not None:
            yield from self._egress(frame, frame.egress_port, frame.network.egress.mac)
        if frame.host_port is not None and frame.host_takes_part:
            yield from self._host(frame, frame.host_port)

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        member, port = placed.member, placed.port
        own = self.own(f"member/{member.id}")
        eth: dict[str, MatchValue] = {"in_port": port, "eth_src": member.mac}
        yield SPOOF_GUARD.flow(Band.OWN, own, go(GRANT), **eth, eth_type=IPV4, ipv4_src=member.address)
        for prefix in member.routed:
            yield SPOOF_GUARD.flow(Band.OWN, own, go(GRANT), **eth, eth_type=IPV4, ipv4_src=_pair(prefix))
        for sender in (member.address, Ipv4(0)):  # 0: an address probe (RFC 5227)
            yield SPOOF_GUARD.flow(
                Band.OWN, own, go(NEIGHBOUR), **eth, eth_type=ARP, arp_sha=member.mac, arp_spa=sender
            )
        yield from self.absent(frame, member)

    def absent(self, frame: Frame, member: Member) -> Iterator[Flow]:
        if frame.mesh_port is not None and frame.network.mesh is not None:
            if any(member.address in prefix for prefix in frame.network.mesh.prefixes):
                own = self.own(f"member/{member.id}")
                yield from self._deny_sources(frame.mesh_port, own, Band.DENY, member.address)

    def _mesh(self, frame: Frame, port: int, mac: Mac, prefixes: tuple[Prefix, ...]) -> Iterator[Flow]:
        own = self.own("port/mesh")
        yield from self._deny_foreign(frame, port, own)
        network = frame.network
        for address in dict.fromkeys(filter(None, (network.gateway, network.host, *address_range(network.subnet)))):
            yield from self._deny_sources(port, own, Band.DENY, address)
        for prefix in prefixes:
            yield SPOOF_GUARD.flow(
                Band.OWN, own, go(GRANT), in_port=port, eth_src=mac, eth_type=IPV4, ipv4_src=_pair(prefix)
            )
            yield SPOOF_GUARD.flow(
                Band.OWN, own, go(NEIGHBOUR), in_port=port, eth_src=mac, eth_type=ARP, arp_spa=_pair(prefix)
            )
        if frame.vpn is not None:
            yield from self._deny_local(frame, port, own)
            yield self._vpn_client(frame, port, own, eth_src=mac)

    def _egress(self, frame: Frame, port: int, mac: Mac) -> Iterator[Flow]:
        own = self.own("port/egress")
        yield from self._deny_foreign(frame, port, own)
        yield SPOOF_GUARD.flow(
            Band.OWN, own, go(NEIGHBOUR), in_port=port, eth_src=mac, eth_type=ARP, arp_spa=frame.network.gateway
        )
        # The leg speaks as the gateway when a packet is too big for the tunnel; nobody finds the path's MTU otherwise.
        for icmp_type in (UNREACHABLE, TIME_EXCEEDED):
            yield SPOOF_GUARD.flow(
                Band.OWN,
                own,
                go(GRANT),
                in_port=port,
                eth_src=mac,
                eth_type=IPV4,
                ip_proto=ICMP,
                icmpv4_type=icmp_type,
                ipv4_src=frame.network.gateway,
            )
        yield from self._deny_local(frame, port, own)
        yield SPOOF_GUARD.flow(Band.KNOWN, own, go(GRANT), in_port=port, eth_src=mac, eth_type=IPV4)

    def _host(self, frame: Frame, port: int) -> Iterator[Flow]:
        own = self.own("port/host")
        yield from self._deny_foreign(frame, port, own)
        if frame.network.host is not None:
            address = frame.network.host
            yield SPOOF_GUARD.flow(Band.OWN, own, go(GRANT), in_port=port, eth_type=IPV4, ipv4_src=address)
            yield SPOOF_GUARD.flow(Band.OWN, own, go(NEIGHBOUR), in_port=port, eth_type=ARP, arp_spa=address)
        if frame.vpn is not None:
            yield from self._deny_local(frame, port, own)
            yield self._vpn_client(frame, port, own)
            # The host routes clients' packets here with whatever address it has; it still has to find the gateway.
            yield SPOOF_GUARD.flow(Band.KNOWN, own, go(NEIGHBOUR), in_port=port, eth_type=ARP, arp_op=1)

    def _vpn_client(self, frame: Frame, port: int, own: int, **match: MatchValue) -> Flow:
        assert frame.vpn is not None
        return SPOOF_GUARD.flow(
            Band.KNOWN,
            own,
            go(GRANT),
            in_port=port,
            eth_type=IPV4,
            ip_proto=UDP,
            ipv4_dst=frame.vpn.member.address,
            udp_dst=frame.vpn.udp_port,
            **match,
        )

    def _deny_foreign(self, frame: Frame, port: int, own: int) -> Iterator[Flow]:
        for prefix in dict.fromkeys(prefix for _, prefix in frame.foreign):
            yield from self._deny_sources(port, own, Band.CLAIMED, prefix)

    def _deny_local(self, frame: Frame, port: int, own: int) -> Iterator[Flow]:
        for prefix in dict.fromkeys((*frame.local, *NOBODY)):
            yield from self._deny_sources(port, own, Band.KNOWN + 50, prefix)

    def _deny_sources(self, port: int, own: int, band: int, sender: Ipv4 | Prefix) -> Iterator[Flow]:
        value = _pair(sender) if isinstance(sender, Prefix) else sender
        yield SPOOF_GUARD.flow(band, own, violation(Violation.SPOOF), in_port=port, eth_type=IPV4, ipv4_src=value)
        yield SPOOF_GUARD.flow(band, own, violation(Violation.SPOOF), in_port=port, eth_type=ARP, arp_spa=value)


def _pair(prefix: Prefix) -> tuple[int, int]:
    return prefix.address, prefix.mask
