"""Admission and start gate: which ports may send anything at all, and in which role."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import ARP, ICMP6, IPV4, IPV6, LLDP, UDP, App
from controller.flow import Flow
from controller.frame import Frame, Placed
from controller.model import Role
from controller.pipeline import ADMIT, ROLE, SPOOF_GUARD, Band, Then, Violation, role_value, set_field, violation

VLAN_TAGGED = (0x1000, 0x1000)
RESERVED_MULTICAST = (0x0180C2000000, 0xFFFFFFFFFFF0)
"""01:80:c2:00:00:0x, which bridges must not forward (IEEE 802.1Q, table 8-1): STP, LACP, LLDP and the like."""


class Admission(App):
    """ADMIT.

    630 tagged frames drop; 620 reserved multicast drops; 610 LLDP drops; 520 router advertisements and DHCPv6 servers
    are violations; 500 other IPv6 drops, counted; 200 a known port gives its IPv4 and ARP packets its role; miss drops.

    A port has no flow here until the bundle that brings all its other flows is committed, so a new container is shut
    until its policy is confirmed.
    """

    id = 1
    name = "admission"
    tables = (ADMIT,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        own = self.own_network(frame)
        yield ADMIT.flow(Band.FRAME_DENY + 30, self.own("frames/vlan-tagged"), vlan_vid=VLAN_TAGGED)
        yield ADMIT.flow(Band.FRAME_DENY + 20, self.own("frames/reserved-multicast"), eth_dst=RESERVED_MULTICAST)
        yield ADMIT.flow(Band.FRAME_DENY + 10, self.own("frames/lldp"), eth_type=LLDP)
        yield ADMIT.flow(
            Band.HARD_DENY + 20, own, violation(Violation.ROGUE_RA), eth_type=IPV6, ip_proto=ICMP6, icmpv6_type=134
        )
        yield ADMIT.flow(
            Band.HARD_DENY + 20, own, violation(Violation.ROGUE_DHCP), eth_type=IPV6, ip_proto=UDP, udp_src=547
        )
        yield ADMIT.flow(Band.HARD_DENY, self.own("frames/ipv6"), eth_type=IPV6)
        yield ADMIT.flow(Band.MISS, self.own("frames/unknown-port-or-type"))
        if frame.egress_port is not None:
            yield from self._admit(frame.egress_port, Role.EGRESS)
        if frame.mesh_port is not None:
            yield from self._admit(frame.mesh_port, Role.MESH)
        if frame.host_port is not None and frame.host_takes_part:
            yield from self._admit(frame.host_port, Role.HOST)

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        return self._admit(placed.port, Role.CONTAINER, f"member/{placed.member.id}")

    def _admit(self, port: int, role: Role, name: str | None = None) -> Iterator[Flow]:
        own = self.own(name or f"port/{role}")
        for eth_type in (IPV4, ARP):
            yield ADMIT.flow(
                Band.KNOWN,
                own,
                Then((set_field(ROLE, role_value(role)),), SPOOF_GUARD),
                in_port=port,
                eth_type=eth_type,
            )
