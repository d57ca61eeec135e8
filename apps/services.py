"""Services: what members declare, who may reach it, and the state file's own rules."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import IPV4, PROTOCOLS, UDP, App
from apps.learning import learn_reply
from controller.flow import Flow
from controller.frame import Frame, Placed, PlacedRule
from controller.model import Prefix, Role
from controller.pipeline import SERVICE, Band, MatchValue, any_role, deliver, role_value

INSIDE = any_role(Role.CONTAINER, Role.MESH)


class Services(App):
    """SERVICE.

    1000+ rules of the state file, for packets from containers and (where it is to a container) the mesh, and to the
    mesh for its own prefixes only; 320 VPN clients
    reach the VPN server, and the way back is learned; 300 a declared service, on its own address, for containers and
    mesh; 300 an exposed service for the host's port, with the way back learned; 150 the host reaches nothing else; the
    rest is `return_path`'s.
    """

    id = 5
    name = "services"
    tables = (SERVICE,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        if frame.vpn is not None:
            member = frame.vpn.member
            to = deliver(frame.vpn.port, member.mac)
            for role in (Role.HOST, Role.MESH):
                yield SERVICE.flow(
                    Band.OWN + 20,
                    self.own(f"service/{member.id}/vpn"),
                    to.after(learn_reply(frame.vpn.port, UDP, role)),
                    reg0=role_value(role),
                    eth_type=IPV4,
                    ip_proto=UDP,
                    ipv4_dst=member.address,
                    udp_dst=frame.vpn.udp_port,
                )
        if frame.host_takes_part:
            yield SERVICE.flow(Band.REST + 50, self.own("port/host"), reg0=role_value(Role.HOST))

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        member = placed.member
        done: set[tuple[str, int]] = set()
        for service in member.services:
            if (service.protocol, service.port) in done:
                continue  # two names for one port are one flow
            done.add((service.protocol, service.port))
            own = self.own(f"service/{member.id}/{service.name}")
            to = deliver(placed.port, member.mac)
            match: dict[str, MatchValue] = {
                "eth_type": IPV4,
                "ip_proto": PROTOCOLS[service.protocol],
                "ipv4_dst": member.address,
                f"{service.protocol}_dst": service.port,
            }
            yield SERVICE.flow(Band.OWN, own, to, reg0=INSIDE, **match)
            if service.exposed and frame.network.host is not None and frame.host_takes_part:
                reply = learn_reply(placed.port, PROTOCOLS[service.protocol])
                yield SERVICE.flow(
                    Band.OWN,
                    own,
                    to.after(reply),
                    reg0=role_value(Role.HOST),
                    **match,
                )

    def rule(self, frame: Frame, rule: PlacedRule) -> Iterator[Flow]:
        match: dict[str, MatchValue] = {name: (value, mask) for name, value, mask in rule.rule.match}
        if rule.in_port is not None:
            match["in_port"] = rule.in_port
        own = self.own(f"rule/{rule.rule.path}")
        if rule.out_port is None:
            yield SERVICE.flow(Band.RULE + rule.rule.rank, own, **match)
            return
        to = deliver(rule.out_port, rule.mac)
        # The mesh may send to containers only, so a rule towards it or the host is not for what comes from it.
        senders = any_role(Role.CONTAINER) if rule.out_port in (frame.mesh_port, frame.host_port) else INSIDE
        if rule.out_port != frame.mesh_port or frame.network.mesh is None:
            yield SERVICE.flow(Band.RULE + rule.rule.rank, own, to, reg0=senders, **match)
            return
        for target in _within(match.get("ipv4_dst"), frame.network.mesh.prefixes):
            yield SERVICE.flow(Band.RULE + rule.rule.rank, own, to, reg0=senders, **{**match, "ipv4_dst": target})


def _within(target: MatchValue | None, prefixes: tuple[Prefix, ...]) -> Iterator[tuple[int, int]]:
    """What of a destination lies across the mesh: the world is reached by the egress alone."""
    value, mask = target if isinstance(target, tuple) else (0, 0) if target is None else (target, 0xFFFFFFFF)
    shared = [
        (value | prefix.address, mask | prefix.mask)
        for prefix in prefixes
        if not (value ^ prefix.address) & mask & prefix.mask
    ]
    yield from dict.fromkeys(shared)
