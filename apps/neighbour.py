"""Neighbour: ARP is answered by flows, so that nothing is flooded and nobody can answer for another."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import ARP, App
from controller.flow import Flow
from controller.frame import Frame, Placed
from controller.model import Member
from controller.pipeline import NEIGHBOUR, Band, MatchValue, Violation, arp_reply, violation

REQUEST = 1


class Neighbour(App):
    """NEIGHBOUR.

    400 asking for a foreign network's address is a violation; 350 nobody is told that its own address is taken; 300
    the gateway, the host and every member are answered for (while one is away, nobody answers for it); 250 the mesh is not told about its own peers; 200 peers
    across the mesh are answered for; miss drops, answers included: we give them all.
    """

    id = 3
    name = "neighbour"
    tables = (NEIGHBOUR,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        network, own = frame.network, self.own_network(frame)
        for name, prefix in frame.foreign:
            yield NEIGHBOUR.flow(
                Band.DENY,
                self.own(f"network/{name}"),
                violation(Violation.CROSSING),
                eth_type=ARP,
                arp_op=REQUEST,
                arp_tpa=(prefix.address, prefix.mask),
            )
        if network.host is not None and frame.host_mac is not None:
            yield from self._answer(own, network.host, frame.host_mac)
            if frame.host_port is not None:
                yield self._silence(own, frame.host_port, network.host)
        if network.host != network.gateway:
            yield from self._answer(own, network.gateway, network.gateway_mac)
            if frame.egress_port is not None:
                yield self._silence(own, frame.egress_port, network.gateway)
        if network.mesh is not None and frame.mesh_port is not None:
            for prefix in network.mesh.prefixes:
                match: dict[str, MatchValue] = {
                    "eth_type": ARP,
                    "arp_op": REQUEST,
                    "arp_tpa": (prefix.address, prefix.mask),
                }
                yield NEIGHBOUR.flow(Band.KNOWN + 50, own, in_port=frame.mesh_port, **match)
                yield NEIGHBOUR.flow(Band.KNOWN, own, arp_reply(network.mesh.mac), **match)
        yield NEIGHBOUR.flow(Band.MISS, own)

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        own = self.own(f"member/{placed.member.id}")
        yield from self._answer(own, placed.member.address, placed.member.mac)
        yield self._silence(own, placed.port, placed.member.address)

    def absent(self, frame: Frame, member: Member) -> Iterator[Flow]:
        own = self.own(f"member/{member.id}")
        yield NEIGHBOUR.flow(Band.OWN, own, eth_type=ARP, arp_op=REQUEST, arp_tpa=member.address)

    def _answer(self, own: int, address: int, mac: int) -> Iterator[Flow]:
        yield NEIGHBOUR.flow(Band.OWN, own, arp_reply(mac), eth_type=ARP, arp_op=REQUEST, arp_tpa=address)

    def _silence(self, own: int, port: int, address: int) -> Flow:
        return NEIGHBOUR.flow(Band.CLAIMED, own, in_port=port, eth_type=ARP, arp_op=REQUEST, arp_tpa=address)
