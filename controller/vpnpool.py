"""Clients of the VPN server as whoever makes them needs it: names, addresses, keys, and the file a client gets.

Nothing here looks at the host, but for the server's public key, which the agent writes down for everybody. Imports
hostmodel, model, problems, records and wgkeys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from controller.hostmodel import Endpoint, VpnServer
from controller.model import Ipv4, Prefix
from controller.problems import BulkheadError
from controller.records import ClientRecord
from controller.wgkeys import Secret, is_key, new_private_key, new_shared_key, public_key

CLIENT_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
CLIENT_NAMES = "1 to 63 letters, digits and inner hyphens"
EVERYTHING = "0.0.0.0/0, ::/0"
"""What a client sends into the tunnel: IPv6 as well, where it ends, so that none of it leaves beside the tunnel."""
PUBLIC_KEY = Path("agent", "vpn.pub")
"""The server's public key, below the run directory."""


def free_address(pool: Prefix, taken: Iterable[Ipv4]) -> Ipv4 | None:
    """The first address of the pool that nobody has; None where all are taken. The first one is the server's."""
    there = {int(address) for address in taken}
    last = pool.address | (~pool.mask & 0xFFFFFFFF)
    return next((Ipv4(a) for a in range(pool.address + 2, last) if a not in there), None)


def new_client(
    name: str, node: str, address: Ipv4, created_by: str = "", now: float = 0.0
) -> tuple[ClientRecord, Secret]:
    """A client with keys of its own, and its private key, which is the client's alone: show it once, keep it nowhere."""
    private = new_private_key()
    shared = new_shared_key().reveal()
    return ClientRecord(name, node, str(address), public_key(private), shared, created_by, now), private


def configuration(
    address: Ipv4 | str, private: Secret, shared: Secret | str, server: VpnServer, endpoint: Endpoint, server_key: str
) -> str:
    """A wg-quick file for the client's machine. It holds the client's private key: show it once."""
    return "\n".join(
        [
            "[Interface]",
            f"PrivateKey = {private.reveal()}",
            f"Address = {address}/32",
            *([f"DNS = {', '.join(map(str, server.dns))}"] if server.dns else []),
            *([f"MTU = {server.tunnel.mtu}"] if server.tunnel.mtu is not None else []),
            "",
            "[Peer]",
            f"PublicKey = {server_key}",
            f"PresharedKey = {shared.reveal() if isinstance(shared, Secret) else shared}",
            f"AllowedIPs = {EVERYTHING}",
            f"Endpoint = {endpoint}",
            "PersistentKeepalive = 25",
            "",
        ]
    )


def server_public_key(run_dir: Path) -> str:
    """The VPN server's public key, as this host's agent has written it down. Raises `BulkheadError`."""
    path = run_dir / PUBLIC_KEY
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        key = ""
    if not is_key(key):
        raise BulkheadError(f"nobody has written the VPN server's key to {path} yet; look at: bulkhead status")
    return key
