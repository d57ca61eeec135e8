"""What every app is. Imports flow and frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from controller.flow import Flow
from controller.frame import Frame, Placed, PlacedCrossings, PlacedPassage, PlacedRule, cookie
from controller.model import Member
from controller.pipeline import Table

IPV4, ARP, IPV6, LLDP = 0x0800, 0x0806, 0x86DD, 0x88CC
ICMP, TCP, UDP, ICMP6, SCTP = 1, 6, 17, 58, 132
PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP}


class App:
    """A concern of the pipeline. `id` stands in the cookie of its flows and never changes."""

    id: ClassVar[int]
    name: ClassVar[str]
    tables: ClassVar[tuple[Table, ...]]

    def shared(self, frame: Frame) -> Iterator[Flow]:
        """Flows of the network as a whole."""
        yield from ()

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        """Flows of one member. Must depend on nothing but the arguments."""
        yield from ()

    def absent(self, frame: Frame, member: Member) -> Iterator[Flow]:
        """Flows of one member whose port is not there: its addresses stay its own."""
        yield from ()

    def rule(self, frame: Frame, rule: PlacedRule) -> Iterator[Flow]:
        """Flows of one rule of the state file."""
        yield from ()

    def passage(self, frame: Frame, passage: PlacedPassage) -> Iterator[Flow]:
        """Flows of a passage to another bridge, whatever is open over it."""
        yield from ()

    def crossing(self, frame: Frame, crossings: PlacedCrossings) -> Iterator[Flow]:
        """Flows of what grants open for one member."""
        yield from ()

    def own(self, name: str) -> int:
        """The cookie of this app's flows for the object of that name."""
        return cookie(self.id, name)

    def own_network(self, frame: Frame) -> int:
        """The cookie of this app's flows for the network as a whole."""
        return self.own(f"network/{frame.network.name}")
