"""Small files that are read by one user and written by another, whole or not at all. Imports problems."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from controller.problems import BulkheadError


def make_directory(path: Path) -> None:
    """A directory of mode 700, owned by whoever owns the one above. Raises `BulkheadError`."""
    with _told(path):
        if path.is_dir():
            return
        if not path.parent.is_dir():
            make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        _hand_over(path, path.parent)


def write(path: Path, text: str) -> None:
    """Put a text at a path with mode 600, for the owner of the directory: the router reads what root has written.

    Readers see the old or the new, whatever happens meanwhile. The directory must be `locked`. Raises `BulkheadError`.
    """
    temporary = path.with_name(f".{path.name}.new")
    with _told(path):
        temporary.unlink(missing_ok=True)  # of a writer that was killed: it may hold keys that are gone since
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            _hand_over(temporary, path.parent)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)  # a revocation must not come undone by a power cut
        finally:
            os.close(directory)


def write_new(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that must not exist yet. Raises `BulkheadError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with _told(path):
        try:
            descriptor = os.open(path, flags, mode)
        except FileExistsError:
            raise BulkheadError(f"{path} exists already; name a new file") from None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def read_secret(path: Path) -> str:
    """A file that nobody but its owner may read. Raises `BulkheadError`."""
    with _told(path), path.open(encoding="utf-8", errors="replace") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise BulkheadError(
                f"{path} has mode {mode:03o} and holds a private key; chmod 600 it, or make a new one if others saw it"
            )
        return file.read(65536)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One writer at a time. Raises `BulkheadError`."""
    make_directory(directory)
    with _told(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _hand_over(path: Path, like: Path) -> None:
    if os.geteuid() == 0:
        owner = like.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise BulkheadError(f"{path}: {exc.strerror}; see that it is there and yours") from exc
