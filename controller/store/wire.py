"""One connection to an OVSDB server (RFC 7047): kept up, polled, never blocking, without a thread.

The `ovs` library's own client reads JSON in pure Python, one character at a time, writes every message to the log,
and says "try again" of a transaction that may have been carried out. This one says which it was. Works in a thread of
its own and in eventlet's loop alike. Imports problems.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from controller.problems import BulkheadError

_LOG = logging.getLogger(__name__)
Json = Any
Answer = Callable[[list[Json] | None], None]
"""Called once with the results of a transaction's operations, or None: the connection was lost, nobody knows."""

BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
CONNECT_S = 1.0
PROBE_S = 1.5
"""Silence after which the server is asked for an echo; as much again, and the connection is given up."""
_CHUNK = 1 << 18
_WAITS = (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN)


class Tls(NamedTuple):
    """Files, PEM: ours, and the authority that the servers' certificates are of."""

    private_key: Path
    certificate: Path
    ca: Path


class Target(NamedTuple):
    """Where a server listens."""

    family: int
    address: Any
    tls: bool


def parse(remote: str) -> Target:
    """`unix:PATH`, `tcp:IP:PORT` or `ssl:IP:PORT`, IPv6 in brackets."""
    scheme, _, rest = remote.partition(":")
    if scheme == "unix" and rest:
        return Target(socket.AF_UNIX, rest, False)
    host, _, port = rest.rpartition(":")
    if scheme in ("tcp", "ssl") and host and port.isdecimal() and 0 < int(port) < 65536:
        host = host.removeprefix("[").removesuffix("]")
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                socket.inet_pton(family, host)
            except OSError:
                continue
            return Target(family, (host, int(port)), scheme == "ssl")
    raise BulkheadError(f"{remote!r} is no address of a store; give unix:PATH, tcp:IP:PORT or ssl:IP:PORT")


class Session:
    """Keeps a copy of some tables' rows coming, and sends transactions.

    `heard(updates, whole)` is called from `run` with `<table-updates>` of RFC 7047; `whole` where it is everything,
    after each connect; False refuses this server. With `leader_only` only the leader of a cluster will do.
    """

    def __init__(
        self,
        remotes: Sequence[str],
        tls: Tls | None,
        database: str,
        tables: Mapping[str, Sequence[str]],
        heard: Callable[[dict[str, Any], bool], bool],
        *,
        leader_only: bool = False,
    ) -> None:
        if not remotes:
            raise BulkheadError(
                "no address of a store was given; give at least one, e.g. unix:/run/bulkhead/store.sock"
            )
        self._targets = [(remote, parse(remote)) for remote in remotes]
        needs_tls = any(target.tls for _, target in self._targets)
        if needs_tls and tls is None:
            raise BulkheadError("an ssl: address of a store needs --private-key, --certificate and --ca")
        self._files = tls
        self._context = _context(tls) if tls is not None and needs_tls else None
        self._database, self._tables, self._heard, self._leader_only = database, tables, heard, leader_only
        random.shuffle(self._targets)
        self._turn = -1
        self._failures = 0
        self._next_try = 0.0
        self._sock: socket.socket | None = None
        self._number = 0
        self._closed = False
        self.up = False
        """Whether the copy is complete and transactions can be sent."""
        self.why = "not connected yet"
        """What stands in the way of being up."""
        self.cluster = ""
        """Which cluster it is, empty for a server on its own."""
        self._clear()

    def _clear(self) -> None:
        self._phase = "down"
        self._tls: ssl.SSLObject | None = None
        self._bio_in, self._bio_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._in = bytearray()
        self._out = bytearray()
        self._answers: dict[int, Callable[[Json, Json], None]] = {}
        self._lost: list[Answer] = []
        self._lock = ""
        self.has_lock = False
        self._since = self._probed = 0.0

    @property
    def remote(self) -> str:
        """The address that is talked to, or tried."""
        return self._targets[self._turn][0]

    def fileno(self) -> int:
        """The socket to wait for, -1 where there is none."""
        return self._sock.fileno() if self._sock is not None else -1

    @property
    def writing(self) -> bool:
        """Whether it waits to be able to send."""
        return bool(self._out) or self._phase == "connecting"

    def due_s(self, now: float) -> float:
        """After how long `run` has something to do even if nothing arrives."""
        if self._sock is None:
            return max(0.0, self._next_try - now)
        if self._phase == "connecting":
            return 0.02
        return max(0.0, (self._probed or self._since) + PROBE_S - now)

    def restart(self, why: str) -> None:
        """Give the connection up, and begin again."""
        self._drop(why)
        self._next_try = time.monotonic() + BACKOFF_S[0]

    def close(self) -> None:
        """End the connection, for good."""
        self._drop("closed")
        self._closed = True

    # what is sent

    def transact(self, operations: list[Json], answer: Answer) -> None:
        """Send a transaction. The session has to be up."""
        assert self.up

        def done(result: Json, error: Json) -> None:
            self._lost.remove(answer)
            answer(result if error is None else [error if isinstance(error, dict) else {"error": str(error)}])

        self._lost.append(answer)
        self._ask("transact", [self._database, *operations], done)

    def lock(self, name: str) -> None:
        """Ask for a lock of the server's; `has_lock` says when it is ours."""
        if self._lock == name or not self.up:
            return
        self._lock = name
        self._ask("lock", [name], self._locked)

    def _locked(self, result: Json, error: Json) -> None:
        if error is not None:
            self._drop(f"{self.remote} refuses the lock {self._lock}: {error}")
        elif result.get("locked"):
            self.has_lock = True

    def unlock(self) -> None:
        """Give the lock, or the place in the queue for it, back."""
        if self._lock:
            self._ask("unlock", [self._lock], lambda _result, _error: None)
            self._lock, self.has_lock = "", False

    def _ask(self, method: str, params: list[Json], done: Callable[[Json, Json], None]) -> None:
        self._number += 1
        self._answers[self._number] = done
        self._send({"method": method, "params": params, "id": self._number})

    def _send(self, message: dict[str, Json]) -> None:
        data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
        if self._tls is not None:
            self._tls.write(data)
            data = self._bio_out.read()
        self._out += data
        self._flush()

    def _flush(self) -> None:
        if not self._out or self._sock is None or self._phase == "connecting":
            return
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as exc:
            self._drop(f"{self.remote}: {exc.strerror or exc}")

    # the connection

    def run(self) -> None:
        """Everything that can be done now: connect, read, answer."""
        if self._closed:
            return
        now = time.monotonic()
        if self._sock is None:
            if now < self._next_try:
                return
            self._open(now)
        if self._phase == "connecting":
            self._connect(now)
        if self._phase not in ("down", "connecting"):
            self._flush()
            self._read(now)
        if self._sock is not None:
            self._probe(now)

    def _open(self, now: float) -> None:
        self._turn = (self._turn + 1) % len(self._targets)
        self._sock = socket.socket(self._targets[self._turn][1].family, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._phase, self._since = "connecting", now

    def _connect(self, now: float) -> None:
        assert self._sock is not None
        remote, target = self._targets[self._turn]
        problem = self._sock.connect_ex(target.address)
        if problem in _WAITS:
            if now - self._since > CONNECT_S:
                self._drop(f"{remote}: no answer within {CONNECT_S:g} s")
            return
        if problem not in (0, errno.EISCONN):
            self._drop(f"{remote}: {_said(problem)}")
            return
        if target.family != socket.AF_UNIX:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._since = now
        if target.tls:
            assert self._context is not None and self._files is not None
            with contextlib.suppress(BulkheadError):
                self._context = _context(self._files)  # certificates are renewed; a half of a new pair can wait
            self._phase = "handshake"
            self._tls = self._context.wrap_bio(self._bio_in, self._bio_out)
            self._shake()
        else:
            self._greet()

    def _shake(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            self._drop(
                f"{self.remote}: {exc.verify_message if isinstance(exc, ssl.SSLCertVerificationError) else exc.reason}"
            )
            return
        else:
            self._phase = "greeting"
        self._out += self._bio_out.read()
        self._flush()
        if self._phase == "greeting":
            self._greet()

    def _greet(self) -> None:
        self._phase = "greeting"
        columns = ["name", "model", "connected", "leader", "schema", "cid"]
        self._ask("monitor", ["_Server", "server", {"Database": {"columns": columns}}], self._met)

    def _met(self, result: Json, error: Json) -> None:
        if error is not None:
            self._drop(f"{self.remote} is no OVSDB server that we know how to talk to")
        elif self._right(result) and self._phase == "greeting":
            wanted = {table: {"columns": list(columns)} for table, columns in self._tables.items()}
            self._phase = "asking"
            self._ask("monitor", [self._database, "data", wanted], self._whole)

    def _right(self, updates: Json) -> bool:
        """Whether this server will do, from its own account of its databases."""
        for update in updates.get("Database", {}).values():
            row = update.get("new")
            if row is None or row["name"] != self._database:
                continue
            if row["model"] == "clustered":
                if not row["connected"]:
                    self._drop(f"{self.remote} has no majority of its cluster")
                    return False
                if self._leader_only and not row["leader"]:
                    self._drop(f"{self.remote} is not the leader, and who is it does not answer")
                    return False
                self.cluster = str(row["cid"])
            return True
        if self._phase == "greeting":
            self._drop(f"{self.remote} has no database {self._database}")
            return False
        return True

    def _whole(self, result: Json, error: Json) -> None:
        if error is not None:
            self._drop(
                f"the store at {self.remote} is of another version ({_details(error)}); "
                "bring it to this one: bulkhead store convert"
            )
            return
        if not self._heard(result, True):
            self._drop(f"{self.remote} is behind the rest of its cluster")
            return
        self._phase, self.up = "up", True
        self._failures, self.why = 0, ""

    def _read(self, now: float) -> None:
        assert self._sock is not None
        got = False
        while self._sock is not None:
            try:
                chunk = self._sock.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError as exc:
                self._drop(f"{self.remote}: {exc.strerror or exc}")
                return
            if not chunk:
                self._parse()
                self._drop(f"{self.remote} has closed the connection")
                return
            got = True
            self._since, self._probed = now, 0.0
            if self._tls is None:
                self._in += chunk
            else:
                self._bio_in.write(chunk)
                if self._phase == "handshake":
                    self._shake()
                self._decrypt()
            if len(chunk) < _CHUNK:
                break
        if got:
            self._parse()

    def _decrypt(self) -> None:
        if self._tls is None or self._phase == "handshake":
            return
        try:
            while data := self._tls.read(_CHUNK):
                self._in += data
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            self._drop(f"{self.remote}: {exc.reason}")
            return
        self._out += self._bio_out.read()  # TLS has things of its own to say
        self._flush()

    def _parse(self) -> None:
        # A message that is not whole yet does not end so, mostly; it is looked at again when there is more.
        if not self._in.endswith(b"}"):
            return
        try:
            text = self._in.decode()
        except UnicodeDecodeError:
            return
        at, messages = 0, []
        try:
            while at < len(text):
                message, at = _DECODER.raw_decode(text, at)
                messages.append(message)
        except ValueError:
            pass
        self._in = bytearray(text[at:].encode())
        for message in messages:
            if self._sock is None:
                return
            try:
                self._take(message)
            except Exception as exc:
                _LOG.exception("a message of %s", self.remote)
                self._drop(f"{self.remote} has sent what we cannot make sense of ({type(exc).__name__})")

    def _take(self, message: Json) -> None:
        method = message.get("method")
        if method is None:
            done = self._answers.pop(message.get("id"), None)
            if done is not None:
                done(message.get("result"), message.get("error"))
        elif method == "echo":
            self._send({"result": message["params"], "error": None, "id": message["id"]})
        elif method == "update":
            name, updates = message["params"]
            if name == "server":
                self._right(updates)
            elif self.up:
                self._heard(updates, False)
        elif method == "locked" and message["params"] == [self._lock]:
            self.has_lock = True
        elif method == "stolen" and message["params"] == [self._lock]:
            self._lock, self.has_lock = "", False

    def _probe(self, now: float) -> None:
        # From when it was asked: whoever polls may have been busy elsewhere for long.
        if self._phase == "connecting" or now - (self._probed or self._since) < PROBE_S:
            return
        if self._probed:
            self._drop(f"{self.remote} does not answer")
            return
        self._probed = now
        if self._phase == "up":
            self._ask("echo", [], lambda _result, _error: None)

    def _drop(self, why: str) -> None:
        """End this connection; the next address is tried, at once if this one was good."""
        if self._sock is None:
            return
        was_up, self.up, self.why = self.up, False, why
        self._sock.close()
        self._sock = None
        self._failures = 0 if was_up else self._failures + 1
        rounds = self._failures // len(self._targets)
        self._next_try = time.monotonic() + (BACKOFF_S[min(rounds, len(BACKOFF_S)) - 1] if rounds else 0.0)
        lost = self._lost
        self._clear()
        for answer in lost:
            answer(None)


_DECODER = json.JSONDecoder()


def _context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # servers are known by their authority, which signs nothing else
        context.load_verify_locations(tls.ca)
        context.load_cert_chain(tls.certificate, tls.private_key)
    except (OSError, ssl.SSLError) as exc:
        files = f"{tls.private_key}, {tls.certificate} and {tls.ca}"
        raise BulkheadError(
            f"cannot use {files} for the store: {exc.strerror or exc}; give a key, its certificate and the CA, PEM"
        ) from exc
    return context


def _said(number: int) -> str:
    return os.strerror(number)


def _details(error: Json) -> str:
    return str(error.get("details") or error.get("error")) if isinstance(error, dict) else str(error)
