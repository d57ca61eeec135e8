"""Files that are written whole or not at all, and directories that others can pass through. Imports resource."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from controller.agent.resource import Failed


def read(path: Path) -> str | None:
    """What is in a file; None where it is not there."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file as a whole or not at all; it never has another mode. Its name begins with a dot before."""
    new = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        file.write(text)
    new.replace(path)


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
