"""Files that are written as a whole or not at all, and directories that others can pass through. Imports resource."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from controller.agent.resource import Failed


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Put `text` at `path`; readers see the old or the new, whatever happens. The directory is made, for root alone.

    Raises `Failed`.
    """
    try:
        _write(path, text, mode)
    except OSError as exc:
        raise Failed(f"{path} cannot be written: {exc.strerror}; make room, or mend what is there") from exc


def _write(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)  # whatever the umask is: a resolver that runs as nobody has to read its names
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_or_none(path: Path) -> str | None:
    """The text of a file, or None where there is no such file or it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None


def open_way(path: Path, ours: int = 1) -> None:
    """Let others pass through a directory and, `ours` in all, through those above. Raises `Failed` for one further up
    that is closed."""
    for directory in (path, *path.parents)[:ours]:
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & 0o011 != 0o011:
            directory.chmod(mode | 0o011)
    for directory in path.parents:
        if not directory.stat().st_mode & 0o001:
            raise Failed(
                f"{directory} is closed to others, and what runs without root's rights has to reach {path}; "
                f"run: chmod o+x {directory}"
            )
