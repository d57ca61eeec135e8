"""Asks the running controller, by its control socket. Standard library and problems only, so that anybody may."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from controller.problems import BulkheadError

ANSWER_S = 30.0


def ask(run_dir: Path, question: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """Ask the controller of `run_dir`. Raises `BulkheadError` where there is none, or it says no."""
    path = run_dir / "controller.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
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
