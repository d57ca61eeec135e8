"""Forwarding: within a network, by address to port."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import IPV4, App
from controller.flow import Flow
from controller.frame import Frame, Placed, address_range
from controller.model import Member, Role
from controller.pipeline import FORWARD, Band, deliver, role_value


class Forwarding(App):
    """FORWARD.

    350 the subnet's own broadcast and network address drop; 300 a member; 250 what lives behind a member; both drop
    while the member is away; 200 peers across the mesh, for containers; miss drops: an address of this network that
    nobody has.
    """

    id = 8
    name = "forwarding"
    tables = (FORWARD,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        network, own = frame.network, self.own_network(frame)
        for address in address_range(network.subnet):
            yield FORWARD.flow(Band.CLAIMED, own, eth_type=IPV4, ipv4_dst=address)
        for address in dict.fromkeys(filter(None, (network.gateway, network.host))):
            # The gateway and the host are not across the mesh, and answer for themselves through learned paths only.
            yield FORWARD.flow(Band.OWN, own, eth_type=IPV4, ipv4_dst=address)
        if network.mesh is not None and frame.mesh_port is not None:
            for prefix in network.mesh.prefixes:
                yield FORWARD.flow(
                    Band.KNOWN,
                    self.own("port/mesh"),
                    deliver(frame.mesh_port, network.mesh.mac),
                    reg0=role_value(Role.CONTAINER),
                    eth_type=IPV4,
                    ipv4_dst=(prefix.address, prefix.mask),
                )
        yield FORWARD.flow(Band.MISS, own)

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        own = self.own(f"member/{placed.member.id}")
        to = deliver(placed.port, placed.member.mac)
        yield FORWARD.flow(Band.OWN, own, to, eth_type=IPV4, ipv4_dst=placed.member.address)
        for prefix in placed.member.routed:
            yield FORWARD.flow(Band.KNOWN + 50, own, to, eth_type=IPV4, ipv4_dst=(prefix.address, prefix.mask))

    def absent(self, frame: Frame, member: Member) -> Iterator[Flow]:
        own = self.own(f"member/{member.id}")
        yield FORWARD.flow(Band.OWN, own, eth_type=IPV4, ipv4_dst=member.address)
        for prefix in member.routed:
            yield FORWARD.flow(Band.KNOWN + 50, own, eth_type=IPV4, ipv4_dst=(prefix.address, prefix.mask))
