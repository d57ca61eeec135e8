"""Egress: the only way out of a network, with its kill switch."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import IPV4, UDP, App
from apps.learning import learn_return
from controller.flow import Flow
from controller.frame import Frame
from controller.model import Prefix, Role
from controller.pipeline import EGRESS, FORWARD, OUTPUT_GUARD, Band, Violation, deliver, go, role_value, violation

ANY_FRAGMENT = (1, 1)
"""Of `ip_frag`: the first or a later one (`ovs-fields(7)`, nw_frag)."""

NOT_THE_WORLD = tuple(
    Prefix.parse(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
    )
)
"""Destinations that are nobody's out there (RFC 6890): private, shared, loopback, link-local, multicast, reserved."""


class Egress(App):
    """EGRESS.

    500 a learned return path has decided; 450 from the egress without one is unsolicited; 400 this network's own
    addresses go to FORWARD; 350 the VPN server's replies without a learned client, and its own UDP fragments, drop
    rather than enter the tunnel; 300 what is not the world drops; 200 containers and mesh leave through the egress,
    teaching the way back, or drop while the tunnel is down; 150 in a network without egress it is a violation; miss
    drops.
    """

    id = 7
    name = "egress"
    tables = (EGRESS,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        network, own = frame.network, self.own_network(frame)
        yield EGRESS.flow(Band.HARD_DENY, own, go(OUTPUT_GUARD), reg3=1)
        yield EGRESS.flow(Band.DENY + 50, own, violation(Violation.UNSOLICITED), reg0=role_value(Role.EGRESS))
        for prefix in frame.local:
            yield EGRESS.flow(Band.DENY, own, go(FORWARD), eth_type=IPV4, ipv4_dst=(prefix.address, prefix.mask))
        if frame.vpn is not None:
            reply = {"in_port": frame.vpn.port, "eth_type": IPV4, "ip_proto": UDP}
            vpn = self.own(f"service/{frame.vpn.member.id}/vpn")
            yield EGRESS.flow(Band.CLAIMED, vpn, udp_src=frame.vpn.udp_port, **reply)
            # A fragment shows no ports, so any of the server's own may be a piece of a reply.
            yield EGRESS.flow(Band.CLAIMED, vpn, ipv4_src=frame.vpn.member.address, ip_frag=ANY_FRAGMENT, **reply)
        for prefix in NOT_THE_WORLD:
            yield EGRESS.flow(Band.OWN, self.own("world/not"), eth_type=IPV4, ipv4_dst=(prefix.address, prefix.mask))
        if network.egress is None:
            for role in (Role.CONTAINER, Role.MESH):
                yield EGRESS.flow(
                    Band.REST + 50, own, violation(Violation.NO_EGRESS), reg0=role_value(role), eth_type=IPV4
                )
        elif frame.egress_port is None or not frame.egress_open:
            yield EGRESS.flow(Band.KNOWN, self.own("kill-switch"), eth_type=IPV4)
        else:
            to = deliver(frame.egress_port, network.egress.mac)
            for role in (Role.CONTAINER, Role.MESH):
                yield EGRESS.flow(
                    Band.KNOWN,
                    self.own(f"egress/{role}"),
                    to.after(learn_return(role)),
                    reg0=role_value(role),
                    eth_type=IPV4,
                )
        yield EGRESS.flow(Band.MISS, own)
