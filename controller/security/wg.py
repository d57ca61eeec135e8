"""The keys of the WireGuard network between servers: this machine's, its peers', and those that will replace them.

Files alone; `bulkhead wg run` (`controller.agent.serverlinks`) makes of them what the kernel has. A key is replaced in
steps: the next one is made and handed over, everybody moves to it over a second interface, then it takes the place of
the old one. Imports hostmodel, model, problems and wgkeys.

    own.json         name, address, endpoint       own.key    private, mode 600
    peers/NAME.json  public halves of a peer       next.key   private, while the key is being replaced
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controller.hostmodel import Endpoint, Profile, SecurityPeer
from controller.model import Ipv4
from controller.problems import BulkheadError
from controller.wgkeys import Secret, is_key, new_private_key, public_key

KEEPALIVE_S = 25
FORMAT = 1
LARGEST = 4096
"""No file that is handed over has more bytes."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_ENDPOINT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Public:
    """The public half of a machine: what it hands over to the others. `next_key` is what will replace `public_key`."""

    name: str
    address: Ipv4
    public_key: str
    endpoint: Endpoint | None = None
    next_key: str | None = None

    @property
    def newest_key(self) -> str:
        """What counts in the end."""
        return self.next_key or self.public_key

    def text(self) -> str:
        """As it is handed over."""
        return json.dumps({"bulkhead-wg": FORMAT, **self.as_json()}, indent=2) + "\n"

    def as_json(self) -> dict[str, str]:
        """Plain values, without what is not known."""
        found = {
            "name": self.name,
            "address": str(self.address),
            "public_key": self.public_key,
            "endpoint": str(self.endpoint) if self.endpoint is not None else None,
            "next_key": self.next_key,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Own:
    """This machine with its private keys. `since` is when the key was made (seconds since the epoch)."""

    name: str
    address: Ipv4
    key: Secret
    since: float
    endpoint: Endpoint | None = None
    next_key: Secret | None = None

    @property
    def public(self) -> Public:
        """What is handed over."""
        following = public_key(self.next_key) if self.next_key is not None else None
        return Public(self.name, self.address, public_key(self.key), self.endpoint, following)


def read_public(text: str, source: str) -> Public:
    """What was handed over. Raises `BulkheadError`; a message repeats no key."""
    try:
        found = json.loads(text) if len(text) <= LARGEST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("bulkhead-wg") != FORMAT:
        raise BulkheadError(f"{source} is no public half of a server; make one there: bulkhead wg export --out FILE")
    return _public(found, source)


def _public(found: dict[str, Any], source: str) -> Public:
    def bad(key: str, expected: str) -> BulkheadError:
        return BulkheadError(f"{source}: {key} is not {expected}; export it again: bulkhead wg export")

    name, address, endpoint = found.get("name"), found.get("address"), found.get("endpoint")
    key, following = found.get("public_key"), found.get("next_key")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad("name", "1 to 63 letters, digits and inner hyphens")
    if not isinstance(key, str) or not is_key(key):
        raise bad("public_key", "a WireGuard key")
    if following is not None and (not isinstance(following, str) or not is_key(following) or following == key):
        raise bad("next_key", "another WireGuard key")
    try:
        read = Ipv4.parse(str(address))
    except ValueError:
        raise bad("address", "an IPv4 address") from None
    return Public(name, read, key, read_endpoint(endpoint, source) if endpoint is not None else None, following)


def read_endpoint(text: object, source: str) -> Endpoint:
    """`HOST:PORT`. Raises `BulkheadError`."""
    match = _ENDPOINT.fullmatch(text) if isinstance(text, str) else None
    if match is None or not 0 < int(match[2]) < 65535:
        raise BulkheadError(f"{source}: the endpoint is not HOST:PORT, such as 192.0.2.7:51820")
    return Endpoint(match[1], int(match[2]))


class Wg:
    """The files, in a directory that is root's alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # ------------------------------------------------------------------------------------------------- this machine

    def init(self, profile: Profile, endpoint: Endpoint | None = None) -> Own:
        """Make this machine's key, unless there is one, and remember what it is called and where it listens.

        Raises `BulkheadError`.
        """
        if not profile.has_wireguard:
            raise BulkheadError(f"security.role is {profile.role}: it has no WireGuard; nothing to make")
        with self._locked():
            if not (self.directory / "own.key").exists():
                _write(self.directory / "own.key", new_private_key().reveal() + "\n")
            before = self._read("own.json")
            kept = str(endpoint) if endpoint is not None else before.get("endpoint") if before else None
            fields = {"name": profile.name, "address": str(profile.address), "endpoint": kept}
            _write(self.directory / "own.json", json.dumps(fields) + "\n")
        return self.own()

    def own(self) -> Own:
        """This machine. Raises `BulkheadError` if it has no key yet."""
        found = self._read("own.json")
        if found is None:
            raise BulkheadError("this machine has no WireGuard key yet; make it: bulkhead wg init FILE")
        key, since = self._key("own.key")
        following = self._key("next.key")[0] if (self.directory / "next.key").exists() else None
        endpoint = found.get("endpoint")
        if following is not None and following == key:
            following = None
        return Own(
            str(found.get("name")),
            Ipv4.parse(str(found.get("address"))),
            key,
            since,
            read_endpoint(endpoint, "own.json") if endpoint else None,
            following,
        )

    def rotate(self) -> Own:
        """Make the key that is to replace this machine's, unless that is under way already."""
        with self._locked():
            self.own()
            if not (self.directory / "next.key").exists():
                _write(self.directory / "next.key", new_private_key().reveal() + "\n")
        return self.own()

    def abandon(self) -> bool:
        """Keep the old key after all; False if it is not being replaced."""
        with self._locked():
            return _unlink(self.directory / "next.key")

    def promote(self) -> bool:
        """The next key takes the place of this machine's, in one step; False if there is none."""
        with self._locked(), contextlib.suppress(FileNotFoundError):
            (self.directory / "next.key").replace(self.directory / "own.key")
            _sync(self.directory)
            return True
        return False

    # ------------------------------------------------------------------------------------------------------- peers

    def peers(self, profile: Profile) -> tuple[Public, ...]:
        """Every peer whose key is known: what was handed over, and what the state file has, by name."""
        found = {public.name.lower(): public for public in self._handed_over()}
        for declared in profile.peers:
            known = found.get(declared.name.lower())
            if known is not None:
                known = replace(known, address=declared.address, endpoint=declared.endpoint or known.endpoint)
                found[declared.name.lower()] = known
            elif declared.public_key is not None:
                found[declared.name.lower()] = Public(
                    declared.name, declared.address, declared.public_key, declared.endpoint
                )
        return tuple(found[name] for name in sorted(found))

    def add(self, public: Public, profile: Profile, *, replaces: bool = False) -> Public:
        """Take a peer, or the key that will replace a peer's. Raises `BulkheadError` where it contradicts what is known:
        with `replaces` a peer may have another key than before, at once."""
        with self._locked():
            self._check(public, profile)
            known = next((one for one in self.peers(profile) if one.name.lower() == public.name.lower()), None)
            if known is not None and not replaces:
                if public.public_key not in (known.public_key, known.next_key):
                    raise BulkheadError(
                        f"{public.name} had another key, which this one does not follow; ask its administrator, then: "
                        "bulkhead wg add --replace FILE"
                    )
                if public.public_key == known.next_key and public.next_key is None:
                    # It has moved already; here the old key goes once its packets have moved as well.
                    public = replace(public, public_key=known.public_key, next_key=known.next_key)
            self._put(public)
        return public

    def remove(self, name: str) -> bool:
        """Forget what a peer has handed over; False if it is not known. What the state file declares stays."""
        with self._locked():
            return bool(_NAME.fullmatch(name)) and _unlink(self._path(name))

    def promote_peer(self, name: str, key: str) -> None:
        """The key `key` takes the place of a peer's."""
        with self._locked():
            for public in self._handed_over():
                if public.name.lower() == name.lower() and public.next_key == key:
                    self._put(replace(public, public_key=key, next_key=None))

    def _check(self, public: Public, profile: Profile) -> None:
        own = self.own().public
        last = profile.network.address | (~profile.network.mask & 0xFFFFFFFF)
        if public.address not in profile.network or public.address in (profile.network.address, last):
            raise BulkheadError(f"{public.name} has {public.address}, which is no host of {profile.network}")
        if public.name.lower() == profile.name.lower() or public.address in (profile.address, own.address):
            raise BulkheadError(f"{public.name} ({public.address}) is this machine; add it on the others")
        if {public.public_key, public.next_key} & {own.public_key, own.next_key} - {None}:
            raise BulkheadError(
                f"{public.name} has this machine's own key; a key is never copied: bulkhead wg init there"
            )
        everybody: list[Public | SecurityPeer] = [*self.peers(profile), *profile.peers]
        for other in everybody:
            same = other.name.lower() == public.name.lower()
            if not same and other.address == public.address:
                raise BulkheadError(f"{public.address} is {other.name}'s; {public.name} needs an address of its own")
            if same and other.address != public.address:
                raise BulkheadError(
                    f"{public.name} has {public.address}, and is known at {other.address}; change the one that is wrong"
                )
            if not same and isinstance(other, Public):
                if {other.public_key, other.next_key} & {public.public_key, public.next_key} - {None}:
                    raise BulkheadError(f"{public.name} has the key of {other.name}; each makes its own")

    def _handed_over(self) -> Iterator[Public]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted((self.directory / "peers").glob("*.json")):
                found = self._read(f"peers/{path.name}")
                if found is not None:
                    yield _public(found, str(path))

    def _put(self, public: Public) -> None:
        _write(self._path(public.name), json.dumps(public.as_json()) + "\n")

    def _path(self, name: str) -> Path:
        return self.directory / "peers" / f"{name.lower()}.json"

    # -------------------------------------------------------------------------------------------------------- files

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.directory / name
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except PermissionError:
            raise BulkheadError(f"{path} is root's; run it with sudo") from None
        except (OSError, ValueError) as exc:
            raise BulkheadError(f"{path} cannot be read ({type(exc).__name__}); restore it, or remove it") from None
        if not isinstance(found, dict):
            raise BulkheadError(f"{path} is damaged; restore it, or remove it")
        return found

    def _key(self, name: str) -> tuple[Secret, float]:
        path = self.directory / name
        try:
            with path.open() as file:
                found = os.fstat(file.fileno())
                text = file.read(LARGEST).strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise BulkheadError(
                f"{path} cannot be read ({type(exc).__name__}); restore it, or: bulkhead wg init"
            ) from None
        if found.st_mode & 0o077:
            raise BulkheadError(f"{path} may be read by others; make it private: chmod 600 {path}")
        if not is_key(text):
            raise BulkheadError(f"{path} holds no WireGuard key; restore it, or remove it and: bulkhead wg init FILE")
        return Secret(text), found.st_mtime

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else changes the files meanwhile."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise BulkheadError(f"{self.directory} cannot be used: {exc.strerror}; run it with sudo") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def key_age_days(own: Own, now: float | None = None) -> float:
    """How old this machine's key is."""
    return max(0.0, ((time.time() if now is None else now) - own.since) / 86400)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
