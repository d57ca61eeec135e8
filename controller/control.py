"""The control socket: how the command line asks a running controller. One JSON object a line, each way.

A unix socket of mode 600 in the run directory; with a group, which may ask how everything is and nothing else, 660. The
server; who asks is in `controller.asking`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controller import unixsocket

MAX_QUESTION = 4096
ANSWER_S = 30.0

LOG = logging.getLogger("bulkhead.control")

FOR_THE_GROUP = frozenset({"status"})
"""What members of the group may ask. The rest changes something, or reads files that they may not."""
_PEER = struct.Struct("3i")

Reply = Callable[[dict[str, Any]], None]


class ControlSocket:
    """Binds at once; `serve` answers. Raises `BulkheadError` where a controller serves that socket already."""

    def __init__(self, path: Path, answer: Callable[[dict[str, Any], Reply], None], group: int | None = None) -> None:
        self.path = path
        self._answer = answer
        self._server = unixsocket.bind(path)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)

    def serve(self) -> None:
        """Answer until closed."""
        from controller import hub

        while True:
            try:
                sock, _ = self._server.accept()
            except OSError as exc:
                if self._server.fileno() < 0:
                    return
                LOG.warning("accept: %s", exc)  # out of descriptors, most likely: wait for some to come back
                hub.sleep(0.2)
                continue
            hub.spawn(self._serve_one, sock)

    def _serve_one(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(ANSWER_S)
            line = sock.makefile("rb").readline(MAX_QUESTION)
            question = json.loads(line)
            if not isinstance(question, dict):
                raise ValueError("not an object")
            if not _is_owner(sock) and str(question.get("ask")) not in FOR_THE_GROUP:
                _send(sock, {"error": "only the controller's own user and root may ask that; ask as one of them"})
                return
        except (OSError, ValueError, RecursionError) as exc:
            _send(sock, {"error": f"a question is one JSON object on a line: {exc}"})
            return
        try:
            self._answer(question, lambda reply: _send(sock, reply))
        except Exception as exc:  # a defect of ours must not leave the asker waiting
            LOG.exception("a question was not answered")
            _send(sock, {"error": f"a defect of the controller was caught: {type(exc).__name__}: {exc}"})

    def close(self) -> None:
        """Stop answering and take the socket away."""
        self._server.close()
        self.path.unlink(missing_ok=True)


def _is_owner(sock: socket.socket) -> bool:
    _pid, uid, _gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (0, os.geteuid())


def _send(sock: socket.socket, reply: dict[str, Any]) -> None:
    try:
        sock.sendall(json.dumps(reply).encode() + b"\n")
    except OSError as exc:
        LOG.info("the asker went away: %s", exc)
    finally:
        sock.close()
