"""Checks of WireGuard, here and in the legs' namespaces. Imports findings and switch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from controller.model import Network
from controller.verify.host.facts import AllowedIps, Gap, Link
from controller.verify.host.findings import Finding, Status, Subject, bad, listed, prefixes, unknown
from controller.verify.host.switch import far_ends, place_gaps


@dataclass(frozen=True, slots=True)
class _Tunnel:
    """A WireGuard interface's peer, where it was found, and which network's leg it is; `egress` if that one's egress."""

    where: str
    allowed: AllowedIps
    network: str | None
    egress: bool

    def __str__(self) -> str:
        return f"{self.allowed.interface} in {self.where}" if self.where else self.allowed.interface


def wireguard(subject: Subject) -> list[Finding]:
    """What peers may send into a network, and what of other networks' addresses goes to them."""
    check = "WireGuard"
    legs = any(network.egress is not None or network.mesh is not None for network in subject.networks)
    tunnels = _tunnels(subject)
    out = [bad(check, seen, advice=advice) for seen, advice in (*_wide(subject, tunnels), *_shared(tunnels))]
    for where, links, known in _by_place(subject):
        # A tun may be wireguard-go's, and a leg's; without wg nobody can say.
        needed = legs and not isinstance(links, Gap) and any(not link.ethernet and link.kind == "tun" for link in links)
        if isinstance(known, Gap) and (needed or not known.absent):
            out += unknown(check, replace(known, why=f"{where}: {known.why}" if where else known.why))
    if legs:
        out += [finding for gap in place_gaps(subject) for finding in unknown(check, gap)]
    if out:
        return out
    if not tunnels:
        gap = subject.facts.wireguard
        seen = gap.why if isinstance(gap, Gap) else "no WireGuard interface has a peer, here or in other namespaces"
        return [Finding(check, Status.ABSENT, seen)]
    return [Finding(check, Status.OK, f"{len(tunnels)} peers, none with another network's addresses")]


_Links = tuple[Link, ...] | Gap


def _by_place(subject: Subject) -> Iterator[tuple[str, _Links, tuple[AllowedIps, ...] | Gap]]:
    yield "", subject.facts.links, subject.facts.wireguard
    for place in () if isinstance(subject.facts.places, Gap) else subject.facts.places:
        if not isinstance(place.links, Gap):
            yield place.name, place.links, place.wireguard


def _tunnels(subject: Subject) -> list[_Tunnel]:
    legs = dict(_legs(subject))
    # wireguard-go's interfaces are listed wherever one asks: each counts where an interface of its name is.
    names = {
        where: {link.name for link in links} for where, links, _ in _by_place(subject) if not isinstance(links, Gap)
    }
    out = []
    for where, _, known in _by_place(subject):
        for allowed in () if isinstance(known, Gap) else known:
            here = allowed.interface in names.get(where, ())
            if here or not any(allowed.interface in held for held in names.values()):
                network, egress = legs.get(where) or legs.get(f"/{allowed.interface}") or (None, False)
                out.append(_Tunnel(where, allowed, network, egress))
    return out


def _legs(subject: Subject) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Whose leg a namespace holds (by the far end of its veth), or an interface is (`/name`: by its name)."""
    ends = dict(leg for network in subject.networks for leg in _leg_ports(network))
    yield from ((f"/{port}", leg) for port, leg in ends.items())
    yield from ((place, ends[port]) for place, port in far_ends(subject) if port in ends)


def _leg_ports(network: Network) -> Iterator[tuple[str, tuple[str, bool]]]:
    if network.mesh is not None:
        yield network.mesh.leg_port, (network.name, False)
    if network.egress is not None:
        yield network.egress.port, (network.name, True)


def _wide(subject: Subject, tunnels: Iterable[_Tunnel]) -> Iterator[tuple[str, str]]:
    """Peers that may send with, and are sent, addresses that are not their network's."""
    for tunnel in tunnels:
        for allowed in tunnel.allowed.networks:
            world = allowed.prefixlen <= 1  # a half is how some write all of it
            if world and (tunnel.egress or tunnel.network is None):
                continue  # the way out: all of the world's addresses are its peer's
            touched = [n.name for n in subject.networks if any(p.overlaps(allowed) for p in prefixes(n))]
            foreign = [name for name in touched if name != tunnel.network]
            if tunnel.network is None and len(touched) < 2:
                foreign = []
            if world:
                foreign = ["everything"]
            if foreign:
                whose = f", {tunnel.network}'s leg," if tunnel.network else ""
                seen = f"{tunnel}{whose} allows its peer {tunnel.allowed.peer} {allowed}: {listed(foreign)}"
                yield seen, _advice(tunnel)


def _shared(tunnels: Sequence[_Tunnel]) -> Iterator[tuple[str, str]]:
    """Addresses that legs of two networks both take to be their peers'."""
    for number, one in enumerate(tunnels):
        for other in tunnels[number + 1 :]:
            if one.network is None or other.network is None or one.network == other.network:
                continue
            for a in one.allowed.networks:
                for b in other.allowed.networks:
                    if a.prefixlen > 1 and b.prefixlen > 1 and a.overlaps(b):
                        seen = f"{a} of {one} ({one.network}) overlaps {b} of {other} ({other.network})"
                        yield seen, "give the networks' peers different addresses"


def _advice(tunnel: _Tunnel) -> str:
    where = f"nsenter into {tunnel.where}, and " if tunnel.where else ""
    return (
        f"{where}give that peer its own network's addresses: wg set {tunnel.allowed.interface} peer KEY allowed-ips …"
    )
