"""Isolation: nothing goes to another network's addresses."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import IPV4, App
from controller.flow import Flow
from controller.frame import Frame
from controller.pipeline import GRANT, ISOLATE, SERVICE, Band, Violation, go, violation


class Isolation(App):
    """GRANT and ISOLATE.

    GRANT: 100 everything goes on to ISOLATE (no crossing is granted). ISOLATE: 400 a foreign network's address is a
    violation; 100 the rest goes on; miss drops.
    """

    id = 4
    name = "isolation"
    tables = (GRANT, ISOLATE)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        own = self.own_network(frame)
        yield GRANT.flow(Band.REST, own, go(ISOLATE))
        for name, prefix in frame.foreign:
            yield ISOLATE.flow(
                Band.DENY,
                self.own(f"network/{name}"),
                violation(Violation.CROSSING),
                eth_type=IPV4,
                ipv4_dst=(prefix.address, prefix.mask),
            )
        yield ISOLATE.flow(Band.REST, own, go(SERVICE))
