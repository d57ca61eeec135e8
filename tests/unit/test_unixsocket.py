"""Sockets in the file system: private, never in place of something else, and replaced only when nobody serves them."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from controller import unixsocket
from controller.problems import BulkheadError


def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    with unixsocket.bind(tmp_path / "new" / "s") as server:
        assert stat.S_IMODE(Path(server.getsockname()).stat().st_mode) == 0o600


def test_a_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    unixsocket.bind(path).close()
    with unixsocket.bind(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_served_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unixsocket.bind(path), socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(BulkheadError, match="running already"):
            unixsocket.bind(path)
        client.connect(str(path))


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    other.write_text("precious")
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(other)
    with pytest.raises(BulkheadError, match="is no socket"):
        unixsocket.bind(path)
    assert path.is_dir() or path.read_text() == "precious"
    assert other.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BulkheadError, match="cannot make the socket"):
        unixsocket.bind(tmp_path / ("x" * 120))
