"""WireGuard keys in files that only root reads. Imports files, resource and wgkeys."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from controller.agent.files import read_or_none, write_atomically
from controller.agent.resource import Failed
from controller.wgkeys import Secret, is_key, new_private_key

LARGEST = 1 << 20
"""No file with keys has more bytes."""


def read_secret_file(path: Path, what: str) -> str:
    """The text of a file that nobody but its owner may read. Raises `Failed`."""
    try:
        found = path.stat()
    except OSError as exc:
        raise Failed(
            f"{what} {path} cannot be read: {exc.strerror}; create it, mode 600, or mend the state file"
        ) from exc
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
        raise Failed(f"{what} {path} is not a text file; write the key there in base64")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise Failed(f"{what} {path} may be read by others (mode {mode:o}); make it private: chmod 600 {path}")
    text = read_or_none(path)
    if text is None:
        raise Failed(f"{what} {path} is not a text file; write the key there in base64")
    return text


def read_key(path: Path, what: str) -> Secret:
    """The key in a file. Raises `Failed`."""
    text = read_secret_file(path, what).strip()
    if not is_key(text):
        raise Failed(f"{what} {path} holds no WireGuard key (44 characters of base64); make one: wg genkey > {path}")
    return Secret(text)


class KeyStore:
    """Keys that the agent makes itself, each by its name, in a directory of mode 700."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def private_key(self, name: str) -> Secret:
        """The key of that name; made at the first use. Raises `Failed` if what is kept is damaged.

        Whoever asks at the same time, the agent or a command, is answered the same key.
        """
        path = self._directory / f"{name}.key"
        if not path.exists():
            made = path.with_name(f".{name}.{os.getpid()}.made")
            write_atomically(made, new_private_key().reveal() + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(made, path)
            made.unlink()
        return read_key(path, "the private key")
