"""Gets the API's listening socket in the network namespace of its container from the agent, who alone may make one there.

Standard library and problems only; the agent's side is `controller.agent.sockets`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from controller.problems import BulkheadError

SOCKETS = Path("agent", "sockets")
"""The agent's socket, below the run directory."""
MAX_LINE = 4096
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Listening:
    """A TCP socket that listens on `port` of `address`. `namespace` names where: hand it in with the next question."""

    sock: socket.socket
    namespace: str
    address: str
    port: int


def listening_socket(run_dir: Path, have: str = "", timeout_s: float = TIMEOUT_S) -> Listening | None:
    """The listening socket of the API's container; None where the one of `have` is still the right one.

    Ask again and again, a second apart or so: the container may come later, and be made anew. Close the old socket once
    there is another. Raises `BulkheadError` where there is none, with the reason.
    """
    path = run_dir / SOCKETS
    descriptors: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
            sock.sendall(json.dumps({"want": "api", "have": have}).encode() + b"\n")
            answer, descriptors, _, _ = socket.recv_fds(sock, MAX_LINE, 1)
            while answer and not answer.endswith(b"\n"):
                more = sock.recv(MAX_LINE)
                answer = answer + more if more else b""
            found = json.loads(answer or b'{"error": "it says nothing"}')
            if found.get("unchanged") is True:
                return None
            if "error" in found or not descriptors:
                raise BulkheadError(f"the agent has no socket for the API: {found.get('error', 'it sent none')}")
            made = socket.socket(fileno=descriptors[0])
            descriptors = []
            return Listening(made, str(found["namespace"]), str(found["address"]), int(found["port"]))
        except OSError as exc:
            why = exc.strerror or str(exc)
            raise BulkheadError(f"no agent answers on {path} ({why}); start one: bulkhead agent FILE") from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BulkheadError(f"what answers on {path} is no agent of this version") from exc
        finally:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
