"""Small files that are read by one user and written by another, whole or not at all. Imports problems."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from controller.problems import BulkheadError

LARGEST: Final = 65536


def become_owner(*places: Path) -> None:
    """Give up root's rights, for good, for those of the first other user that one of these directories belongs to, the outer
    ones first: whoever owns a directory may put links there, and root would follow them. Raises `BulkheadError`.
    """
    if os.geteuid() != 0:
        return
    for place in places:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = place.stat()
            if found.st_uid != 0:
                os.setgroups([])
                os.setgid(found.st_gid)
                os.setuid(found.st_uid)
                return


def make_directory(path: Path) -> None:
    """A directory of mode 700, owned by whoever owns the one above. Raises `BulkheadError`."""
    with _told(path):
        if path.is_dir():
            return
        if not path.parent.is_dir():
            make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


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
                if os.geteuid() == 0:  # the file itself, whatever has its name by now
                    owner = path.parent.stat()
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
                os.fsync(descriptor)
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
        return file.read(LARGEST)


def read_public(path: Path) -> str:
    """A small file of text. Raises `OSError`, also for what is no file: nobody waits for a pipe, or reads a device without
    end. Raises `UnicodeDecodeError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        return file.read(LARGEST)


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


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise BulkheadError(f"{path}: {exc.strerror}; see that it is there and yours") from exc
