"""The router's own keys: one that signs what it tells, and those that requests are sealed to. Imports files, wire.

A rotation makes a new key and gives the older ones an end; until then both are good. A key past its end is refused at
once and removed from the disk by the next rotation or `prune`: only then is what was sealed to it safe from a thief.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from controller.problems import BulkheadError
from controller.security.hpke.files import locked, make_directory, read_secret, write
from controller.security.hpke.wire import Malformed, b64, unb64


@dataclass(frozen=True, slots=True)
class RouterKey:
    """A key that requests are sealed to, from `made_at` until `until` (None: no end yet), in seconds since 1970."""

    private: X25519PrivateKey = field(repr=False)
    made_at: int
    until: int | None = None

    @property
    def public(self) -> bytes:
        """The public half."""
        return self.private.public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return key_id(self.public)

    def good(self, now: float) -> bool:
        """Whether requests may still be sealed to it."""
        return self.until is None or now < self.until


@dataclass(frozen=True, slots=True)
class _Held:
    identity: Ed25519PrivateKey = field(repr=False)
    keys: tuple[RouterKey, ...]
    """The newest first."""

    @property
    def by_id(self) -> dict[str, RouterKey]:
        return {key.id: key for key in self.keys}


def key_id(public: bytes) -> str:
    """What a router's key is called on the wire."""
    return hashlib.sha256(b"bulkhead-hpke/1 router" + public).hexdigest()[:16]


class RouterKeys:
    """The keys in a directory (`hpke`). Changes made by another process count from the next call on."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "router-keys.json"
        self._stamp: tuple[int, int] | None = None
        self._held: _Held | None = None
        self._by_id: dict[str, RouterKey] = {}

    def ensure(self, now: float | None = None) -> None:
        """Make the keys if there are none. Raises `BulkheadError`."""
        if not self._path.exists():
            self.rotate(0, now, only_first=True)

    def rotate(self, overlap_s: int, now: float | None = None, *, only_first: bool = False) -> RouterKey:
        """Make a new key; the older ones are good for another `overlap_s` at most. Raises `BulkheadError`."""
        at = int(time.time() if now is None else now)
        make_directory(self._path.parent)
        with locked(self._path.parent):
            held = self._load() if self._path.exists() else _Held(Ed25519PrivateKey.generate(), ())
            if only_first and held.keys:
                return held.keys[0]
            old = [
                replace(key, until=at + overlap_s if key.until is None else min(key.until, at + overlap_s))
                for key in held.keys
            ]
            new = RouterKey(X25519PrivateKey.generate(), at)
            self._write(held.identity, [new, *(key for key in old if key.good(at))])
        return new

    def prune(self, now: float | None = None) -> int:
        """Remove keys past their end from the disk; how many there were. Raises `BulkheadError`."""
        at = time.time() if now is None else now
        with locked(self._path.parent):
            held = self._load()
            kept = [key for key in held.keys if key.good(at)]
            if len(kept) < len(held.keys):
                self._write(held.identity, kept)
        return len(held.keys) - len(kept)

    def usable(self, now: float) -> list[RouterKey]:
        """Those that are good now, the newest first. Raises `BulkheadError`."""
        return [key for key in self._load().keys if key.good(now)]

    def get(self, identity: str, now: float) -> RouterKey | None:
        """The key of that id, if it is good now. Raises `BulkheadError`."""
        self._load()
        key = self._by_id.get(identity)
        return key if key is not None and key.good(now) else None

    def identity(self) -> bytes:
        """The public half of the key that signs. It never changes: clients may pin it. Raises `BulkheadError`."""
        return self._load().identity.public_key().public_bytes_raw()

    def sign(self, statement: bytes) -> bytes:
        """Say something as this router. Raises `BulkheadError`."""
        return self._load().identity.sign(statement)

    def _load(self) -> _Held:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            raise BulkheadError(f"{self._path} is not there; `bulkhead client router-keys rotate` makes it") from None
        except OSError as exc:
            raise BulkheadError(f"{self._path}: {exc.strerror}; run this as the directory's owner") from exc
        stamp = (stat.st_ino, stat.st_mtime_ns)
        if self._held is None or stamp != self._stamp:
            self._held = _parse(read_secret(self._path), self._path)
            self._stamp = stamp
            self._by_id = self._held.by_id
        return self._held

    def _write(self, identity: Ed25519PrivateKey, keys: Iterable[RouterKey]) -> None:
        rows: list[dict[str, Any]] = [
            {"private": b64(key.private.private_bytes_raw()), "made_at": key.made_at, "until": key.until}
            for key in keys
        ]
        held = {"identity": b64(identity.private_bytes_raw()), "keys": rows}
        write(self._path, json.dumps(held, indent=2) + "\n")


def _parse(text: str, path: Path) -> _Held:
    try:
        read = json.loads(text)
        keys = [
            RouterKey(
                X25519PrivateKey.from_private_bytes(unb64(row["private"])),
                int(row["made_at"]),
                None if row["until"] is None else int(row["until"]),
            )
            for row in read["keys"]
        ]
        return _Held(Ed25519PrivateKey.from_private_bytes(unb64(read["identity"])), tuple(keys))
    except (ValueError, KeyError, TypeError, Malformed):
        # What it says stays out of the message, and out of the chain of causes.
        raise BulkheadError(f"{path} is damaged; put it back from the back-up, or move it away and rotate") from None
