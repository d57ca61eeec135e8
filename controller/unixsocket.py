"""Unix sockets that only their owner (and root) may connect to."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from controller.problems import BulkheadError


def bind(path: Path, backlog: int = 16) -> socket.socket:
    """Listen on `path`, mode 600. A socket that nobody serves any more is replaced; anything else there is left alone.

    Raises `BulkheadError` where somebody serves it, where it is no socket, or where it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            server.bind(str(path))
        finally:
            os.umask(before)
        server.listen(backlog)
    except OSError as exc:
        raise BulkheadError(f"cannot make the socket {path}: {exc.strerror or exc}") from exc
    return server


def _clear(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise BulkheadError(f"{path} is there already and is no socket; name another path, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()  # left behind by a controller that was killed
            return
    raise BulkheadError(
        f"a controller is running already on {path}; stop it, or give another path (--run-dir, --listen)"
    )
