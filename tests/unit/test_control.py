"""The control socket: who may ask what, and who is believed."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from controller.asking import ask
from controller.control import ControlSocket
from controller.problems import BulkheadError

UID = 61573
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes users")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose controller answers everything, and lets a group ask."""
    control = ControlSocket(
        tmp_path / "controller.sock", lambda question, reply: reply({"asked": question["ask"]}), UID
    )

    def serve() -> None:  # `ControlSocket.serve` would choose a thread hub for all tests
        while True:
            sock, _ = control._server.accept()
            control._serve_one(sock)

    threading.Thread(target=serve, daemon=True).start()
    yield tmp_path
    control.path.unlink()


def as_user(uid: int, function: Callable[[], Any]) -> str:
    """What a function answers, or why not, in a process of that user and group."""
    out, back = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            said = str(function())
        except BaseException as exc:
            said = f"{type(exc).__name__}: {exc}"
        os.write(back, said.encode())
        os._exit(0)
    os.close(back)
    os.waitpid(child, 0)
    with os.fdopen(out) as file:
        return file.read()


@needs_root
def test_the_group_may_ask_how_it_is_and_nothing_else(served: Path) -> None:
    for path in (served, *served.parents):
        if stat.S_IMODE(path.stat().st_mode) & 0o001 == 0:
            path.chmod(0o711)
    found = (served / "controller.sock").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, UID)
    assert ask(served, {"ask": "plan"}) == {"asked": "plan"}
    assert as_user(UID, lambda: ask(served, {"ask": "status"})) == "{'asked': 'status'}"
    for question in ("plan", "unseal", "", None, ["status"]):
        said = as_user(UID, partial(ask, served, {"ask": question}))
        assert "only the controller's own user and root" in said
    assert "Permission denied" in as_user(UID + 1, lambda: ask(served, {"ask": "status"}))


@needs_root
def test_a_stranger_in_its_place_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "controller.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        os.seteuid(UID)  # whose socket it is, is settled by listen(2)
        try:
            sock.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(BulkheadError, match=f"no controller of ours but user {UID}'s"):
            ask(tmp_path, {"ask": "status"})
