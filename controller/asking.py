"""Asks the running controller, by its control socket. Standard library and problems only, so that anybody may."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

from controller.problems import BulkheadError

ANSWER_S = 30.0
_PEER = struct.Struct("3i")


def ask(run_dir: Path, question: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """Ask the controller of `run_dir`. Raises `BulkheadError` where there is none, or it says no.

    Others may make sockets there: what answers has to be root's, ours, or of whoever the directory belongs to.
    """
    path = run_dir / "controller.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
            _pid, uid, _gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if uid not in (0, os.geteuid(), run_dir.stat().st_uid):
                raise BulkheadError(f"what answers on {path} is no controller of ours but user {uid}'s; remove it")
            sock.sendall(json.dumps(question).encode() + b"\n")
            line = sock.makefile("rb").readline()
        except OSError as exc:
            raise BulkheadError(
                f"no controller answers on {path} ({exc.strerror or exc}). Start one with: bulkhead controller FILE, "
                "or name its directory with --run-dir"
            ) from exc
    try:
        reply = json.loads(line)
    except ValueError as exc:
        raise BulkheadError(f"the controller on {path} ended while answering; ask again") from exc
    if not isinstance(reply, dict):
        raise BulkheadError(f"the controller on {path} answered something else than an object")
    if "error" in reply:
        raise BulkheadError(str(reply["error"]))
    return reply
