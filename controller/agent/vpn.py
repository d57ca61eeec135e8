"""Clients of the VPN server: a file each, from which the agent makes peers. Imports files, keys, resource, wireguard."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from controller.agent.files import read_or_none, write_atomically
from controller.agent.keys import KeyStore, Secret, is_key, new_private_key, new_shared_key
from controller.agent.resource import Failed
from controller.agent.run import environment
from controller.agent.wireguard import WgPeer, resolve
from controller.hostmodel import Endpoint, VpnServer
from controller.model import Ipv4, Prefix

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
EVERYTHING = "0.0.0.0/0, ::/0"
"""What a client sends into the tunnel: IPv6 as well, where it ends, so that none of it leaves beside the tunnel."""


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody who may connect. The private key is the client's alone and not kept."""

    name: str
    address: Ipv4
    public_key: str
    preshared_key: Secret = field(repr=False)
    added: str = ""


class Refused(Failed):
    """The answer is no: a name that is taken, a pool that is used up."""


class Clients:
    """The clients in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def stamp(self) -> tuple[str, ...]:
        """Differs whenever a client has come, gone or changed."""
        with contextlib.suppress(OSError):
            found = ((path.name, path.stat().st_mtime_ns) for path in self._paths())
            return tuple(f"{name}:{changed}" for name, changed in found)
        return ()

    def all(self) -> list[Client]:
        """Every client, by name. Raises `Failed` for a damaged file, and for one that has what another has."""
        out: list[Client] = []
        for path in self._paths():
            client = self._read(path)
            for other in out:
                if client.address == other.address or client.public_key == other.public_key:
                    what = "address" if client.address == other.address else "key"
                    raise Failed(f"{path} has the {what} of {other.name}; remove one of them: bulkhead vpn remove")
            out.append(client)
        return out

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob("*.json"))

    def _read(self, path: Path) -> Client:
        try:
            found = json.loads(read_or_none(path) or "")
            shared = found["preshared_key"]
            if not is_key(found["public_key"]) or not is_key(shared):
                raise ValueError
            address = Ipv4.parse(found["address"])
            return Client(str(found["name"]), address, found["public_key"], Secret(shared), str(found["added"]))
        except (ValueError, KeyError, TypeError):
            text = f"{path} is not a VPN client's file any more; remove it, and add the client again: bulkhead vpn add"
            raise Failed(text) from None

    def add(self, name: str, pool: Prefix) -> tuple[Client, Secret]:
        """A new client with the first free address of the pool, and its private key. Raises `Refused`, `Failed`.

        The first address of the pool is the server's.
        """
        if not _NAME.fullmatch(name):
            raise Refused(f"{name!r} is no name for a client; use 1 to 63 letters, digits and inner hyphens")
        with self._locked():
            there = self.all()
            if any(client.name.lower() == name.lower() for client in there):
                raise Refused(f"there is a client {name} already; remove it first, or choose another name")
            taken = {int(client.address) for client in there}
            last = pool.address | (~pool.mask & 0xFFFFFFFF)
            address = next((Ipv4(a) for a in range(pool.address + 2, last) if a not in taken), None)
            if address is None:
                raise Refused(f"all {len(there)} addresses of {pool} are taken; remove a client, or widen the pool")
            private = new_private_key()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            client = Client(name, address, public_key(private), new_shared_key(), now)
            record = {
                "name": client.name,
                "address": str(client.address),
                "public_key": client.public_key,
                "preshared_key": client.preshared_key.reveal(),
                "added": client.added,
            }
            write_atomically(self._path(name), json.dumps(record, indent=1) + "\n")
        return client, private

    def remove(self, name: str) -> str:
        """Forget a client; answers its public key, nothing where its file is damaged. Raises `Refused`."""
        with self._locked():
            try:
                key = ""
                with contextlib.suppress(Failed):
                    key = self._read(self._path(name)).public_key
                self._path(name).unlink()
            except OSError as exc:
                known = ", ".join(path.stem for path in self._paths()) or "none"
                raise Refused(f"there is no client {name!r}; there are: {known}") from exc
        return key

    def peers(self) -> tuple[WgPeer, ...]:
        """What the server's interface has to know: every client whose file is good. `all` tells of the others; they must
        not keep a client that was removed connected."""
        out: dict[Ipv4, WgPeer] = {}
        for path in self._paths():
            with contextlib.suppress(Failed):
                client = self._read(path)
                if all(client.public_key != peer.public_key for peer in out.values()):
                    peer = WgPeer(client.public_key, (Prefix(client.address, 32),), preshared_key=client.preshared_key)
                    out.setdefault(client.address, peer)
        return tuple(out.values())

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise FileNotFoundError(name)
        return self._directory / f"{name.lower()}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def public_key(private: Secret) -> str:
    """The public half of a key. Raises `Failed` where `wg` is not installed."""
    try:
        done = subprocess.run(
            ["wg", "pubkey"], input=private.reveal(), capture_output=True, text=True, env=environment(), check=True
        )
    except FileNotFoundError as exc:
        raise Failed("wg is not installed; run: apt-get install wireguard-tools") from exc
    except subprocess.CalledProcessError as exc:
        raise Failed(f"wg pubkey: exit {exc.returncode}") from None
    return done.stdout.strip()


def configuration(client: Client, private: Secret, server: VpnServer, endpoint: Endpoint, server_key: str) -> str:
    """A wg-quick file for the client's machine. It holds the client's private key: show it once."""
    return "\n".join(
        [
            "[Interface]",
            f"PrivateKey = {private.reveal()}",
            f"Address = {client.address}/32",
            *([f"DNS = {', '.join(map(str, server.dns))}"] if server.dns else []),
            *([f"MTU = {server.tunnel.mtu}"] if server.tunnel.mtu is not None else []),
            "",
            "[Peer]",
            f"PublicKey = {server_key}",
            f"PresharedKey = {client.preshared_key.reveal()}",
            f"AllowedIPs = {EVERYTHING}",
            f"Endpoint = {endpoint}",
            "PersistentKeepalive = 25",
            "",
        ]
    )


def server_public_key(server: VpnServer, keys: KeyStore) -> str:
    """The server's public key. Raises `Failed`."""
    return public_key(resolve(server.tunnel, keys).private_key)
