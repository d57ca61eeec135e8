"""Which clients there are: a file for each, named by its id. Imports files, keys.

Whoever looks a client up reads its file, if it changed, so a revocation counts from the next request on. Files stay
when a client is revoked: its key cannot be registered again, and one can see later who it was.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from controller.problems import BulkheadError
from controller.security.hpke.files import locked, read_public, write
from controller.security.hpke.keys import PublicKey
from controller.security.hpke.suites import SUITES
from controller.security.hpke.wire import Malformed, b64, unb64

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID: Final = re.compile(r"[0-9a-f]{32}")
_FORGET_AT: Final = 10_000


@dataclass(frozen=True, slots=True)
class Client:
    """Who may ask. Times are seconds since 1970; `revoked_at` is None as long as it may."""

    name: str
    suite: str
    public: str
    registered_at: int
    revoked_at: int | None = None

    @property
    def key(self) -> PublicKey:
        """Its public key."""
        return PublicKey(self.suite, unb64(self.public))

    @property
    def id(self) -> str:
        """What it calls itself on the wire."""
        return self.key.id

    @property
    def active(self) -> bool:
        """Whether it may ask."""
        return self.revoked_at is None


class Registry:
    """The clients in a directory (`hpke`), which need not be there yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "clients"
        self._cache: dict[str, tuple[tuple[int, int], Client]] = {}
        self._told: dict[str, bool] | None = None

    def register(self, name: str, key: PublicKey, now: float | None = None) -> Client:
        """Let a client in. Raises `BulkheadError`."""
        if not _NAME.fullmatch(name):
            raise BulkheadError(f"{name!r} is no name for a client; use up to 64 letters, digits, dots and dashes")
        with locked(self._directory):
            for other in self.clients():
                if other.id == key.id:
                    state = (
                        "registered" if other.active else "revoked; a revoked key does not come back: make a new one"
                    )
                    raise BulkheadError(f"this key belongs to {other.name}, which is {state}")
                if other.name == name and other.active:
                    raise BulkheadError(f"there is a client {name} already; revoke it first, or use another name")
            client = Client(name, key.suite, b64(key.raw), int(time.time() if now is None else now))
            self._write(client)
        return client

    def revoke(self, name_or_id: str, now: float | None = None) -> Client:
        """Shut a client out, for good. Doing it again changes nothing. Raises `BulkheadError`."""
        with locked(self._directory):
            found = [client for client in self.clients() if name_or_id in (client.id, client.name)]
            client = next((c for c in found if c.active), found[-1] if found else None)
            if client is None:
                raise BulkheadError(f"there is no client {name_or_id}; `bulkhead client list` shows all")
            if client.active:
                client = replace(client, revoked_at=int(time.time() if now is None else now))
                self._write(client)
        return client

    def clients(self) -> list[Client]:
        """All, the revoked ones too, by time. Raises `BulkheadError` for a file that is not a client's."""
        try:
            names = [path.name for path in self._directory.glob("*.json")]
        except OSError as exc:
            raise BulkheadError(f"{self._directory}: {exc.strerror}; run this as the directory's owner") from exc
        clients = []
        for name in names:
            client = self.get(name.removesuffix(".json"))
            if client is None:
                raise BulkheadError(f"{self._directory / name} is not a client's file; move it away")
            clients.append(client)
        return sorted(clients, key=lambda client: (client.registered_at, client.name))

    def get(self, identity: str) -> Client | None:
        """The client of that id, as the disk has it now; None where there is none, or its file is damaged."""
        if not _ID.fullmatch(identity):
            return None
        path = self._directory / f"{identity}.json"
        try:
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns)
            cached = self._cache.get(identity)
            if cached is not None and cached[0] == stamp:
                return cached[1]
            client = _read(read_public(path))
        except (OSError, UnicodeDecodeError):
            self._cache.pop(identity, None)
            return None
        if client is None or client.id != identity:
            return None
        if len(self._cache) >= _FORGET_AT:
            self._cache.clear()
        self._cache[identity] = (stamp, client)
        return client

    def active(self, identity: str) -> bool:
        """Whether that client may ask, and be answered, now."""
        client = self.get(identity)
        return client is not None and client.active

    def changes(self) -> list[Client]:
        """Who was registered or revoked since the last call; the first call gives nothing. For the router's events."""
        now = {client.id: client for client in self.clients()}
        told = self._told
        self._told = {identity: client.active for identity, client in now.items()}
        return [] if told is None else [client for key, client in now.items() if told.get(key) != client.active]

    def _write(self, client: Client) -> None:
        write(self._directory / f"{client.id}.json", json.dumps(asdict(client), indent=2) + "\n")


def _read(text: str) -> Client | None:
    try:
        client = Client(**json.loads(text))
        revoked = client.revoked_at
        if not (isinstance(client.name, str) and client.suite in SUITES and len(unb64(client.public)) == 32):
            return None
        if not isinstance(client.registered_at, int) or not (revoked is None or isinstance(revoked, int)):
            return None
    except (ValueError, TypeError, AttributeError, Malformed):
        return None
    return client
