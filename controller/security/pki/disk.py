"""Changes of files that survive the death of the process and of the host at any moment. Imports problems."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.problems import BulkheadError

LARGEST = 64 << 20
"""No file of ours has more bytes; a back-up of very many certificates is the largest."""
PATIENCE_S = 10.0
"""How long a command waits for another one to end."""


def _nothing(_what: str) -> None:
    pass


class Disk:
    """Each change is whole or not at all, and on the disk when its method returns. Files are of mode 600, directories 700.

    `step` is called at each moment where a death would leave something different behind; `owner` is who gets what is made.
    Raises `BulkheadError`.
    """

    def __init__(self, step: Callable[[str], None] = _nothing, owner: tuple[int, int] | None = None) -> None:
        self._step, self._owner = step, owner

    def directory(self, path: Path) -> None:
        """Have a directory that only its owner can look into."""
        with _told(path):
            if path.is_dir():
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            self._give(path)
            _sync(path.parent)
            self._step(f"directory {path.name}")

    def write(self, path: Path, data: bytes) -> None:
        """Put data into a file; readers see the old or the new."""
        with _told(path):
            new = _new(path)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)
                file.write(data[: len(data) // 2])
                file.flush()
                self._step(f"half of {path.name}")
                file.write(data[len(data) // 2 :])
                file.flush()
                os.fsync(descriptor)
            self._give(new)
            self._step(f"before {path.name}")
            self.rename(new, path)

    def link(self, path: Path, target: str) -> None:
        """Make a symbolic link point elsewhere; readers see the old or the new."""
        with _told(path):
            new = _new(path)
            new.symlink_to(target)
            self._give(new)
            self._step(f"before link {path.name}")
            self.rename(new, path)

    def rename(self, old: Path, new: Path) -> None:
        """Give something its name."""
        with _told(new):
            old.rename(new)
            _sync(new.parent)
            self._step(f"after {new.name}")

    def remove(self, path: Path) -> None:
        """Remove a file or a whole directory, which has another name before it is taken apart."""
        with _told(path):
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                gone = _new(path)
                path.rename(gone)
                self._step(f"removing {path.name}")
                shutil.rmtree(gone)
            _sync(path.parent)
            self._step(f"removed {path.name}")

    def sweep(self, directory: Path) -> None:
        """Remove what was being made when a process died. Nobody else may be at work there."""
        with _told(directory):
            for path in directory.rglob(".*.new"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _give(self, path: Path) -> None:
        if self._owner is not None:
            os.chown(path, *self._owner, follow_symlinks=False)


def staged(path: Path) -> Path:
    """The name of something while it is being made; `Disk.sweep` knows it."""
    return _new(path)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise BulkheadError(
            f"{path} cannot be changed: {exc.strerror or exc}; make room, or run this as its owner"
        ) from exc


def read(path: Path) -> bytes | None:
    """What is in a file; None if there is none. Does not wait for anything that is no file. Raises `BulkheadError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise BulkheadError(f"{path} cannot be read: {exc.strerror}; run this as its owner") from exc
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise BulkheadError(f"{path} is no file of ours; move it away")
        return file.read(LARGEST)


@contextmanager
def locked(directory: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Be the only one to change a directory. Raises `BulkheadError` if another one stays at it."""
    deadline = time.monotonic() + patience_s
    while (lock := _taken(directory)) is None:
        if time.monotonic() > deadline:
            raise BulkheadError(f"another command changes {directory}; wait for it to end, then try again")
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(lock)


def _taken(directory: Path) -> int | None:
    """The lock, which is on the directory itself; None if another one has it or the directory was exchanged meanwhile."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise BulkheadError(f"{directory} cannot be used: {exc.strerror}; run: bulkhead pki init NAME") from exc
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), directory.stat()):
            return lock
    os.close(lock)
    return None
