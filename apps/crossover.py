"""Crossover: a mesh bridge joins one leg to one socket bridge, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from apps.admission import RESERVED_MULTICAST
from apps.base import ARP, IPV4, IPV6, LLDP
from controller.flow import Flow, Output
from controller.frame import cookie
from controller.pipeline import CROSSOVER, Band, Table, act

UNTAGGED = 0


class Crossover:
    """CROSSOVER.

    620 reserved multicast drops; 500 IPv6 and LLDP drop, counted; 200 untagged IPv4 and ARP from each port go out of
    the other; miss drops.
    """

    id: ClassVar[int] = 11
    name: ClassVar[str] = "crossover"
    tables: ClassVar[tuple[Table, ...]] = (CROSSOVER,)

    def flows(self, network: str, leg_port: int | None, far_port: int | None) -> Iterator[Flow]:
        """Flows of the mesh bridge of `network`; a port that is not there is None, and then nothing crosses."""
        yield CROSSOVER.flow(
            Band.FRAME_DENY + 20, cookie(self.id, "frames/reserved-multicast"), eth_dst=RESERVED_MULTICAST
        )
        yield CROSSOVER.flow(Band.HARD_DENY, cookie(self.id, "frames/ipv6"), eth_type=IPV6)
        yield CROSSOVER.flow(Band.HARD_DENY, cookie(self.id, "frames/lldp"), eth_type=LLDP)
        yield CROSSOVER.flow(Band.MISS, cookie(self.id, "frames/unknown-port-or-type"))
        if leg_port is None or far_port is None:
            return
        own = cookie(self.id, f"network/{network}")
        for source, target in ((leg_port, far_port), (far_port, leg_port)):
            for eth_type in (IPV4, ARP):
                yield CROSSOVER.flow(
                    Band.KNOWN,
                    own,
                    act(Output(target)),
                    in_port=source,
                    eth_type=eth_type,
                    vlan_vid=UNTAGGED,
                )
