"""Back-ups of a CA's directory, encrypted if there is a passphrase, and their way back. Imports disk and state.

What has been revoked since a back-up was made stays revoked when it is restored over the directory it was made of.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import io
import os
import re
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from controller.problems import BulkheadError
from controller.security.pki.disk import Disk, locked, read, staged
from controller.security.pki.state import Entry, State
from controller.wgkeys import Secret

_MAGIC = b"bulkhead pki back-up 1\n"
_SALT, _NONCE = 16, 12
_LEFT_OUT = "events"
_EXCHANGE = 2
_HERE = -100


def backup(directory: Path, file: Path, passphrase: Secret | None = None, disk: Disk | None = None) -> None:
    """Write everything but the events into one file of mode 600. Raises `BulkheadError`."""
    with locked(directory):
        State.from_json(read(directory / "state.json") or b"", str(directory / "state.json"))
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w:gz") as tar:
            for path in sorted(directory.iterdir()):
                if path.name != _LEFT_OUT and not path.name.startswith("."):
                    tar.add(path, arcname=path.name)
    data = plain.getvalue()
    (disk or Disk()).write(file, data if passphrase is None else _sealed(data, passphrase))


def restore(
    file: Path, directory: Path, passphrase: Secret | None = None, *, over: bool = False, disk: Disk | None = None
) -> Path | None:
    """Put a back-up in place of a directory, or where there is none; what was there is moved beside it, and that is
    answered. The change is one step. Raises `BulkheadError`."""
    disk = disk or Disk()
    there = directory.is_dir() and any(directory.iterdir())
    if there and not over:
        raise BulkheadError(f"{directory} is not empty; to replace it, which keeps it beside: --replace")
    data = read(file)
    if data is None:
        raise BulkheadError(f"there is no file {file}")
    if data.startswith(_MAGIC):
        data = _unsealed(data, passphrase, file)
    disk.directory(directory.parent)
    for left in directory.parent.glob(f".{directory.name}.*.new"):
        shutil.rmtree(left)
    new = staged(directory)
    _unpack(data, new, file)
    state = State.from_json(read(new / "state.json") or b"", f"state.json in {file}")
    for one in state.authorities:
        for name in ("cert.pem", "key.pem"):
            if not (new / "ca" / one.id / name).is_file():
                raise BulkheadError(f"{file} lacks {name} of the CA {one.id}; take another back-up")
    if not there:
        disk.rename(new, directory)
        return None
    with locked(directory):
        if (now := _readable(directory)) is not None:
            disk.write(new / "state.json", merged(state, now).to_json())
        kept = directory.with_name(f"{directory.name}.before-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S.%f}")
        disk.rename(new, kept)  # before, not after: whenever this ends, what was there is not swept away
        _exchange(kept, directory)
    return kept


def merged(old: State, new: State) -> State:
    """A restored state with what has been signed and revoked since."""
    entries: dict[str, Entry] = {one.serial: one for one in old.entries}
    for one in new.entries:
        known = entries.get(one.serial)
        entries[one.serial] = one if known is None or known.revoked_at is None else known
    return replace(
        old,
        entries=tuple(sorted(entries.values(), key=lambda one: one.not_before)),
        revoked={**new.revoked, **old.revoked},
    )


def _readable(directory: Path) -> State | None:
    try:
        return State.from_json(read(directory / "state.json") or b"", "")
    except BulkheadError:
        return None  # damaged, which is why a back-up is restored


def _unpack(data: bytes, to: Path, file: Path) -> None:
    try:
        to.mkdir(mode=0o700)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if not _harmless(member):
                    raise ValueError(member.name)
                tar.extract(member, to, set_attrs=False)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as exc:
        shutil.rmtree(to, ignore_errors=True)
        raise BulkheadError(f"{file} is no back-up, or damaged ({type(exc).__name__}); take another one") from None
    for path in (to, *to.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)


def _harmless(member: tarfile.TarInfo) -> bool:
    """Whether it is of the kinds that we write, and stays inside."""
    inside = re.compile(r"(?!\.)[a-z0-9._-]+(/(?!\.)[a-z0-9._-]+)*")
    if not inside.fullmatch(member.name):
        return False
    if member.issym():
        return member.linkname.startswith("../issued/") and inside.fullmatch(member.linkname[3:]) is not None
    return member.isreg() or member.isdir()


def _key(passphrase: Secret, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=32, n=2**15, r=8, p=1).derive(passphrase.reveal().encode()))


def _sealed(data: bytes, passphrase: Secret) -> bytes:
    salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
    return _MAGIC + salt + nonce + _key(passphrase, salt).encrypt(nonce, data, _MAGIC)


def _unsealed(data: bytes, passphrase: Secret | None, file: Path) -> bytes:
    if passphrase is None:
        raise BulkheadError(f"{file} is encrypted; give its passphrase with --backup-passphrase-file")
    rest = data[len(_MAGIC) :]
    salt, nonce, sealed = rest[:_SALT], rest[_SALT : _SALT + _NONCE], rest[_SALT + _NONCE :]
    try:
        return _key(passphrase, salt).decrypt(nonce, sealed, _MAGIC)
    except (InvalidTag, ValueError):
        raise BulkheadError(f"{file} cannot be opened: the passphrase is wrong, or it is damaged") from None


def _exchange(one: Path, other: Path) -> None:
    """Let two directories have each other's name, in one step."""
    call = ctypes.CDLL(None, use_errno=True).renameat2
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        raise BulkheadError(
            f"{other} cannot be replaced: {os.strerror(ctypes.get_errno())}; move it away, then restore"
        )
