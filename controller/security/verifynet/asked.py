"""What the section `security` of a state file asks of this machine, as far as it can be verified. Imports profile and wg."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path

from controller.security.profile import SSH_PORT, WG_PORT, load_profile
from controller.security.wg import Wg

__all__ = ["WG_PORT", "Asked", "Peer", "overlapping", "read_asked"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another machine in the WireGuard network. `keys` are those it may have: two while one is being replaced. Without any
    only its address is compared."""

    name: str
    address: IPv4Address
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """A profile. `socket` is where the inference process listens in the role dev, `group` who may use it."""

    role: str
    name: str
    network: IPv4Network
    address: IPv4Address
    listen: int = 443
    names: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    socket: Path = Path("/run/inference.sock")
    group: str = ""
    inference_port: int = 8001

    @property
    def routes(self) -> bool:
        """Whether a router runs here."""
        return self.role in ("dev", "router")

    @property
    def tcp(self) -> frozenset[int]:
        """TCP ports that anybody may reach."""
        return frozenset({SSH_PORT, self.listen} if self.routes else {SSH_PORT})

    @property
    def udp(self) -> frozenset[int]:
        """UDP ports that anybody may reach."""
        return frozenset() if self.role == "dev" else frozenset({WG_PORT})


def read_asked(file: Path, security_dir: Path | None = None) -> Asked:
    """The profile in a state file, with the keys that peers have handed over to this machine, in `security_dir`.

    Raises `BulkheadError` where there is none, or it cannot be read.
    """
    found = load_profile(file)
    keys: dict[str, tuple[str, ...]] = {
        peer.name.lower(): (peer.public_key,) for peer in found.peers if peer.public_key
    }
    if security_dir is not None and found.has_wireguard and os.access(security_dir / "wg", os.R_OK | os.X_OK):
        for public in Wg(security_dir / "wg").peers(found):
            keys[public.name.lower()] = tuple(key for key in (public.public_key, public.next_key) if key)
    return Asked(
        role=str(found.role),
        name=found.name,
        network=IPv4Network(str(found.network)),
        address=IPv4Address(str(found.address)),
        listen=found.listen,
        names=found.names,
        peers=tuple(
            Peer(one.name, IPv4Address(str(one.address)), keys.get(one.name.lower(), ())) for one in found.peers
        ),
        socket=found.socket,
        group=found.socket_group,
        inference_port=found.inference_port,
    )


def overlapping(asked: Asked, address: str) -> bool:
    """Whether an address with its prefix (`10.0.0.7/8`) is of another network that overlaps the profile's."""
    other = ip_network(address, strict=False)
    own = ip_address(address.partition("/")[0]) == asked.address
    return isinstance(other, IPv4Network) and not own and other.overlaps(asked.network)
