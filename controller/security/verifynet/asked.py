"""What the section `security` of a state file asks of this machine, as far as it can be verified. Imports problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import yaml

from controller.problems import BulkheadError

ROLES = ("dev", "router", "inference")
WG_PORT = 51820
SSH_PORT = 22


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
    try:
        whole = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as exc:
        raise BulkheadError(f"{file} cannot be read: {exc}; see what is wrong with it: bulkhead check {file}") from exc
    section = whole.get("security") if isinstance(whole, dict) else None
    if not isinstance(section, dict):
        raise BulkheadError(f"{file} has no section security; add one: security: {{role: router, name: router1}}")
    try:
        return _read(section)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise BulkheadError(
            f"the section security of {file} cannot be understood ({exc}); see what is wrong: bulkhead check {file}"
        ) from exc


def _read(section: Mapping[str, Any]) -> Asked:
    role = str(section["role"])
    if role not in ROLES:
        raise ValueError(f"role is {role}, not one of {', '.join(ROLES)}")
    network = IPv4Network(section.get("network", "10.0.0.0/24"))
    inference = section.get("inference") or {}
    return Asked(
        role=role,
        name=str(section.get("name", role)),
        network=network,
        address=IPv4Address(section.get("address", network[1])),
        listen=int(section.get("listen", 443)),
        names=tuple(str(name) for name in section.get("names") or ()),
        peers=tuple(
            Peer(str(peer["name"]), IPv4Address(peer["address"]), str(peer.get("public_key", "")))
            for peer in section.get("peers") or ()
        ),
        socket=Path(inference.get("socket", "/run/inference.sock")),
        group=str(inference.get("group", "")),
        inference_port=int(inference.get("port", 8001)),
    )


def overlapping(asked: Asked, address: str) -> bool:
    """Whether an address with its prefix (`10.0.0.7/8`) is of another network that overlaps the profile's."""
    other = ip_network(address, strict=False)
    own = ip_address(address.partition("/")[0]) == asked.address
    return isinstance(other, IPv4Network) and not own and other.overlaps(asked.network)
