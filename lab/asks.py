"""What the demo asks of the node's HTTP API: as root of the node, and as whoever holds a token.

Tokens go to the probes on their standard input, and are in no argument and no message. Imports `manager` and `traffic`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

from lab import manager
from lab.manager import LabHost, Status
from lab.traffic import Result, Traffic, Try

PROGRAM = (sys.executable, "-c", "from controller.cli import main; main()")
PORT = 9573
CONTAINER = "op-dbus-api"
"""What the API is called where it listens in its container."""
PATIENCE_S = 15.0
STREAM_S = 5.0
TOKENS: Mapping[str, tuple[str, ...]] = {"admin": ("read",), "auditor": ("read", "approve")}
"""Who holds a token, and its scopes."""

CURL = (
    "curl",
    "-X",
    "POST",
    "http://localhost:9573/api/containers/create",
    "-H",
    "Content-Type: application/json",
    "-d",
    """{
    "name": "tor-relay",
    "network": "privacy",
    "services": [
      { "name": "tor-relay", "protocol": "tcp", "port": 9001 }
    ]
  }""",
)
"""The architecture's own example of how a container is made."""

_STREAM = f"curl -sN http://localhost:{PORT}/api/events/stream & read _; kill $!"
"""Until standard input ends: nobody can signal what runs inside from outside."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of the API. `token` is whose token is shown, "" for none. `answer` is what has to be in the reply."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    token: str = ""
    answer: tuple[tuple[str, Any], ...] = ()
    curl: bool = False
    told: tuple[str, ...] = ()
    """In place of a request: what the stream of events has to tell, in this order."""


class Desk:
    """Asks the API of a lab's node, and follows its events meanwhile. Use as a context manager."""

    def __init__(self, lab: Status) -> None:
        self._lab = lab
        self._tokens: dict[str, str] = {}
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the rest
        self._stream: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with ThreadPoolExecutor(len(TOKENS)) as pool:
            made = {name: pool.submit(self._make, name, scopes) for name, scopes in TOKENS.items()}
            self._tokens = {name: future.result() for name, future in made.items()}
        self._stream = manager.spawn(
            self._lab, self._lab.node, ["sh", "-c", _STREAM], stdin=subprocess.PIPE, stdout=self._told
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None and self._stream.stdin is not None:
            self._stream.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._stream.wait(5)
        self._told.close()

    def _make(self, name: str, scopes: tuple[str, ...]) -> str:
        options = [word for scope in scopes for word in ("--scope", scope)]
        command = [*PROGRAM, "token", "create", name, *options, "--json"]
        token: str = json.loads(manager.output(self._lab, self._lab.node, command))["token"]
        return token

    def _fingerprint(self) -> str:
        import hashlib
        import ssl

        path = self._lab.run_dir / "nodes" / self._lab.node / "state/api/certificate.pem"
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(path.read_text())).hexdigest()

    def ask(self, traffic: Traffic, host: str, wanted: Try, ask: Ask) -> Result:
        """Make a request from a host: by TLS where the API listens for everybody, in clear on the node itself."""
        if ask.told:
            return self._has_told(ask.told)
        if ask.curl:
            return self._curl(host)
        http: dict[str, Any] = {"method": ask.method, "path": ask.path, "body": ask.body, "host": "localhost"}
        if host != "host":
            http |= {"host": CONTAINER, "fingerprint": self._fingerprint()}
        if ask.token:
            http["token"] = self._tokens[ask.token]
        return traffic.attempt(host, replace(wanted, http=http, timeout_s=PATIENCE_S))

    def _curl(self, host: str) -> Result:
        began = time.monotonic()
        text = manager.output(self._lab, host, [*CURL, "-sS", "-w", "\n%{http_code}"])
        body, _, status = text.rpartition("\n")
        data = json.dumps([int(status), json.loads(body or "null")])
        return Result("reply", data, round(time.monotonic() - began, 4))

    def _has_told(self, wanted: tuple[str, ...]) -> Result:
        """Whether the stream of events has told all of it, in that order."""
        began = time.monotonic()
        missing = wanted[0]
        while time.monotonic() - began < STREAM_S:
            self._told.seek(0)
            text, at = self._told.read(), 0
            missing = ""
            for words in wanted:
                at = text.find(words, at)
                if at < 0:
                    missing = words
                    break
            if not missing:
                return Result("reply", '[200, "told"]', round(time.monotonic() - began, 4))
            time.sleep(0.02)
        return Result("error", f"nothing of {missing}", STREAM_S)


def created(lab: Status, answer: Mapping[str, Any]) -> LabHost:
    """A container that the API has made on the lab's node, as a host of the lab."""
    node = manager.find_host(lab, lab.node)
    assert node is not None
    return replace(
        node,
        name=answer["name"],
        aliases=(answer["id"],),
        kind="container",
        network=answer["network"],
        port=answer["port"],
        address=answer["address"],
        netns=f"bulkhead-{answer['id']}",
    )
