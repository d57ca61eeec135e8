"""What the section `security` of a state file asks of this machine, as far as it can be verified. Imports profile."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path

from controller.security.profile import SSH_PORT, WG_PORT, load_profile

__all__ = ["WG_PORT", "Asked", "Peer", "overlapping", "read_asked"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another machine in the WireGuard network. Without `public_key` only its address is compared."""

    name: str
    address: IPv4Address
    public_key: str = ""


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


def read_asked(file: Path) -> Asked:
    """The profile in a state file. Raises `BulkheadError` where there is none, or it cannot be read."""
    found = load_profile(file)
    return Asked(
        role=str(found.role),
        name=found.name,
        network=IPv4Network(str(found.network)),
        address=IPv4Address(str(found.address)),
        listen=found.listen,
        names=found.names,
        peers=tuple(Peer(one.name, IPv4Address(str(one.address)), one.public_key or "") for one in found.peers),
        socket=found.socket,
        group=found.socket_group,
        inference_port=found.inference_port,
    )


def overlapping(asked: Asked, address: str) -> bool:
    """Whether an address with its prefix (`10.0.0.7/8`) is of another network that overlaps the profile's."""
    other = ip_network(address, strict=False)
    own = ip_address(address.partition("/")[0]) == asked.address
    return isinstance(other, IPv4Network) and not own and other.overlaps(asked.network)
