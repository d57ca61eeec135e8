"""Grants: approved crossings between two networks, followed by their connections."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import IPV4, PROTOCOLS, App
from controller import fields
from controller.flow import Ct, DecTtl, Flow, Output
from controller.frame import Frame, PlacedCrossing, PlacedCrossings, PlacedPassage, object_id
from controller.model import Mac, Role
from controller.pipeline import (
    ADMIT,
    CROSS,
    GRANT,
    GRANTED,
    OUTPUT_GUARD,
    ROLE,
    SPOOF_GUARD,
    Band,
    MatchValue,
    Then,
    Violation,
    act,
    any_role,
    deliver,
    go,
    role_value,
    set_field,
    violation,
)

UNFRAGMENTED = (0, 3)
"""Of `ip_frag`: a fragment shows no ports, so nobody could say that it belongs to a granted connection."""

_NEW, _EST, _REL, _RPL, _INV, _TRK = (1 << bit for bit in range(6))
_SAID = _NEW | _EST | _REL | _RPL | _INV | _TRK
OPENS = (_TRK | _NEW, _SAID)
"""Of `ct_state` (`ovs-fields(7)`): the first packet of a connection,"""
GOES_ON = (_TRK | _EST, _SAID)
"""a later one, the way it was opened,"""
REPLIES = (_TRK | _EST | _RPL, _SAID)
"""and one the other way."""


class Grants(App):
    """What is open between two networks. Nothing of this is there without a grant.

    ADMIT: 200 IPv4 from a passage. SPOOF_GUARD: 300 from a passage, senders and receivers of a grant; 200 nothing else.
    GRANT: 300 a granted address, protocol and port, unfragmented, and the way back, are looked up among the connections
    of this bridge's zone; 200 nothing else from a passage. CROSS: 300 where connections begin the first packet opens one,
    on both bridges, later ones follow it, and replies to it come back; 200 what is part of no connection drops; 100
    what a member sends otherwise is a violation; miss drops. OUTPUT_GUARD: 300 containers may send into a passage, and a passage to members that have a grant.
    """

    id = 15
    name = "grants"
    tables = (ADMIT, SPOOF_GUARD, GRANT, CROSS, OUTPUT_GUARD)

    def passage(self, frame: Frame, passage: PlacedPassage) -> Iterator[Flow]:
        own, port = self.own("port/passage"), passage.port
        admitted = Then((set_field(ROLE, role_value(Role.PASSAGE)),), SPOOF_GUARD)
        yield ADMIT.flow(Band.KNOWN, own, admitted, in_port=port, eth_type=IPV4)
        yield SPOOF_GUARD.flow(Band.KNOWN, own, in_port=port)
        yield GRANT.flow(Band.KNOWN, own, in_port=port)
        yield OUTPUT_GUARD.flow(Band.OWN, own, act(Output(port)), reg1=port, reg0=any_role(Role.CONTAINER))

    def crossing(self, frame: Frame, crossings: PlacedCrossings) -> Iterator[Flow]:
        member, port = crossings.member, crossings.port
        whose = self.own(f"member/{member.id}")
        yield OUTPUT_GUARD.flow(Band.OWN, whose, act(Output(port)), reg1=port, reg0=role_value(Role.PASSAGE))
        yield CROSS.flow(Band.KNOWN, whose, in_port=port, ct_state=(_TRK | _INV, _TRK | _INV))
        yield CROSS.flow(Band.REST, whose, violation(Violation.CROSSING), in_port=port)
        for passage, there, protocol in dict.fromkeys((c.passage, c.there, c.protocol) for c in crossings.each):
            yield SPOOF_GUARD.flow(
                Band.OWN,
                whose,
                go(GRANT),
                in_port=passage,
                eth_type=IPV4,
                ip_proto=PROTOCOLS[protocol],
                ipv4_src=there,
                ipv4_dst=member.address,
            )
        arrives = deliver(port, member.mac).after(set_field(fields.ETH_SRC, _gateway_mac(frame)), DecTtl())
        for crossing in crossings.each:
            yield from self._opening(crossings, crossing, arrives)

    def _opening(self, crossings: PlacedCrossings, crossing: PlacedCrossing, arrives: Then) -> Iterator[Flow]:
        own = self.own(f"grant/{crossing.grant}")
        marked = set_field(GRANTED, object_id(f"grant/{crossing.grant}") & GRANTED.full)
        here, there, protocol = crossings.member.address, crossing.there, crossing.protocol
        leaves = deliver(crossing.passage)
        sent: dict[str, MatchValue] = {"in_port": crossings.port, "ipv4_src": here, "ipv4_dst": there}
        comes: dict[str, MatchValue] = {"in_port": crossing.passage, "ipv4_src": there, "ipv4_dst": here}
        begun, answered = (sent, comes) if crossing.opens else (comes, sent)
        for way in (begun, answered):
            way |= {"eth_type": IPV4, "ip_proto": PROTOCOLS[protocol], "ip_frag": UNFRAGMENTED}
        begun[f"{protocol}_dst"] = answered[f"{protocol}_src"] = crossing.port
        looked_up = act(Ct(crossings.zone, CROSS.id))
        yield GRANT.flow(Band.OWN, own, looked_up, **begun)
        yield GRANT.flow(Band.OWN, own, looked_up, **answered)
        on, back = (leaves, arrives) if crossing.opens else (arrives, leaves)
        kept = Ct(crossings.zone, commit=True)
        yield CROSS.flow(Band.OWN, own, on.after(kept, marked), ct_state=OPENS, **begun)
        yield CROSS.flow(Band.OWN, own, on.after(marked), ct_state=GOES_ON, **begun)
        yield CROSS.flow(Band.OWN, own, back.after(marked), ct_state=REPLIES, **answered)


def _gateway_mac(frame: Frame) -> Mac:
    """Whom a member takes for its gateway, by what ARP says."""
    network = frame.network
    if network.host == network.gateway and frame.host_mac is not None:
        return frame.host_mac
    return network.gateway_mac
