"""Clients of the VPN server, from which the agent makes peers: a file each, or a record of the store.

Imports files, keys, resource, wireguard.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from controller.agent.files import read_or_none, write_atomically
from controller.agent.keys import KeyStore
from controller.agent.resource import Failed
from controller.agent.wireguard import WgPeer, resolve
from controller.hostmodel import VpnServer
from controller.model import Ipv4, Prefix
from controller.records import ClientRecord
from controller.vpnpool import CLIENT_NAME, CLIENT_NAMES, free_address
from controller.wgkeys import Secret, is_key, new_private_key, new_shared_key, public_key


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


def _no_records() -> Sequence[ClientRecord]:
    return ()


class Clients:
    """The clients in one directory, and those of the store that `records` answers: this node's."""

    def __init__(self, directory: Path, records: Callable[[], Sequence[ClientRecord]] = _no_records) -> None:
        self._directory = directory
        self._records = records

    @property
    def stamp(self) -> tuple[object, ...]:
        """Differs whenever a client has come, gone or changed."""
        files: tuple[object, ...] = ()
        with contextlib.suppress(OSError):
            files = tuple((path.name, path.stat().st_mtime_ns) for path in self._paths())
        return *files, *self._records()

    def all(self) -> list[Client]:
        """Every client, by name, those in files first. Raises `Failed` for a damaged one, and for one that has what another
        has."""
        out: list[Client] = []
        for where, read in self._sources():
            client = read()
            if any((client.name, client.public_key) == (other.name, other.public_key) for other in out):
                continue  # on its way from its file into the store
            for other in out:
                if client.address == other.address or client.public_key == other.public_key:
                    what = "address" if client.address == other.address else "key"
                    raise Failed(f"{where} has the {what} of {other.name}; remove one of them: bulkhead vpn remove")
            out.append(client)
        return out

    def _sources(self) -> Iterator[tuple[str, Callable[[], Client]]]:
        for path in self._paths():
            yield str(path), partial(self._read, path)
        for record in self._records():
            yield f"VPN client {record.name}", partial(_of_record, record)

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
        if not CLIENT_NAME.fullmatch(name):
            raise Refused(f"{name!r} is no name for a client; use {CLIENT_NAMES}")
        with self._locked():
            there = self.all()
            if any(client.name.lower() == name.lower() for client in there):
                raise Refused(f"there is a client {name} already; remove it first, or choose another name")
            address = free_address(pool, (client.address for client in there))
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
        """What the server's interface has to know: every client that is good. `all` tells of the others; they must not keep a
        client that was removed connected."""
        out: dict[Ipv4, WgPeer] = {}
        keys: set[str] = set()
        for _, read in self._sources():
            with contextlib.suppress(Failed):
                client = read()
                if client.address not in out and client.public_key not in keys:
                    keys.add(client.public_key)
                    out[client.address] = WgPeer(
                        client.public_key, (Prefix(client.address, 32),), preshared_key=client.preshared_key
                    )
        return tuple(out.values())

    def as_records(self, node: str) -> list[ClientRecord]:
        """The clients in good files, as the store has them. Whoever puts them there removes the files then: `forget`."""
        out = []
        for path in self._paths():
            with contextlib.suppress(Failed):
                one = self._read(path)
                since = 0.0
                with contextlib.suppress(ValueError):
                    since = datetime.fromisoformat(one.added).timestamp()
                shared = one.preshared_key.reveal()
                out.append(ClientRecord(one.name, node, str(one.address), one.public_key, shared, "", since))
        return out

    def forget(self, name: str) -> None:
        """Remove the file of a client that is in the store. Nothing where there is none."""
        with self._locked(), contextlib.suppress(FileNotFoundError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        if not CLIENT_NAME.fullmatch(name):
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


def _of_record(record: ClientRecord) -> Client:
    """Raises `Failed` for one that is none."""
    try:
        if not is_key(record.public_key) or not is_key(record.preshared_key):
            raise ValueError
        address = Ipv4.parse(record.address)
    except ValueError:
        raise Failed(f"VPN client {record.name} has no good keys or address; remove it, and make it again") from None
    added = datetime.fromtimestamp(record.created_at, UTC).isoformat(timespec="seconds")
    return Client(record.name, address, record.public_key, Secret(record.preshared_key), added)


def server_public_key(server: VpnServer, keys: KeyStore) -> str:
    """The server's public key. Raises `Failed`."""
    return public_key(resolve(server.tunnel, keys).private_key)
