"""A whole router for tests: certificates, the router's own processes, and servers behind it that keep every byte they got."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

from controller.security.pki import Pki
from controller.security.router import Limits, Settings, Target

MANY = Limits(per_client_per_s=1e6, concurrency=10_000)
ROOT = Path(__file__).parents[2]
ROUTER = (
    "import sys\n"
    "from pathlib import Path\n"
    "from controller.problems import BulkheadError\n"
    "from controller.security.router import Settings, supervise\n"
    "try:\n"
    "    supervise(lambda: Settings.from_json(Path(sys.argv[1]).read_text()), lambda: print('ready', flush=True))\n"
    "except BulkheadError as exc:\n"
    "    sys.exit(f'bulkhead: {exc}')\n"
)
INFERENCE = (
    "import json, sys\n"
    "from pathlib import Path\n"
    "from controller.security.inference import Inference, serve\n"
    "given = json.loads(sys.argv[1])\n"
    "for name in ('socket', 'pki'):\n"
    "    given[name] = Path(given[name]) if given.get(name) else None\n"
    "serve(Inference(**given), lambda: print('ready', flush=True))\n"
)


def until(what: Callable[[], object], patience_s: float = 10.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + patience_s
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError("it has not come true")
        time.sleep(0.01)


def server_tls(directory: Path, name: str) -> ssl.SSLContext:
    """What a server behind the router shows; the router must show a certificate of the same CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = directory / "pki/current" / name
    context.load_cert_chain(pair / "cert.pem", pair / "key.pem")
    context.load_verify_locations(directory / "pki/ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def ask(made: Any, method: str = "GET", target: str = "/", **more: Any) -> tuple[int, bytes]:
    """One request and its answer."""
    made.request(method, target, **more)
    answer = made.getresponse()
    return answer.status, answer.read()


def run(*words: str, data: str = "") -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    return subprocess.run(words, input=data, capture_output=True, text=True, timeout=20)


def free_port() -> int:
    """A TCP port of loopback that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def process(code: str, *words: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that says when it is ready; it is stopped in the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("ab") as errors:
        made = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    try:
        assert made.stdout is not None
        assert made.stdout.readline() == "ready\n", log.read_text()
        yield made
    finally:
        made.send_signal(signal.SIGTERM)
        try:
            made.wait(15)
        finally:
            made.kill()
            made.wait()


class Behind:
    """A server behind the router, on a unix socket or with TLS. `got` is what came, byte by byte, for each connection."""

    def __init__(
        self, path: Path | None = None, *, answer: bytes | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.answer = answer or b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Seen: yes\r\n\r\nhello"
        self.healthy = True
        self.silent = False
        self.parts: list[bytes] | None = None
        """Instead of `answer`: parts that are sent as `gate` lets them."""
        self.gate = threading.Semaphore(0)
        self.got: list[bytearray] = []
        self.cut = threading.Event()
        """A client's going has reached it."""
        self.health = 0
        self._tls = tls
        if path is not None:
            path.unlink(missing_ok=True)
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(str(path))
            path.chmod(0o660)
        else:
            self._socket = socket.socket()
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    @property
    def requests(self) -> bytes:
        """All that came but questions of health."""
        return b"".join(bytes(each) for each in self.got)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                made, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(made,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            made = self._tls.wrap_socket(raw, server_side=True) if self._tls else raw
            self._talk(made)
        except OSError:
            self.cut.set()
        finally:
            raw.close()

    def _talk(self, made: socket.socket) -> None:
        while True:
            head = b""
            while b"\r\n\r\n" not in head:
                data = made.recv(65536)
                if not data:
                    return
                head += data
            if head.startswith(b"GET /health "):
                self.health += 1
                status = b"200 OK" if self.healthy else b"503 Service Unavailable"
                made.sendall(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % status)
                continue
            kept = bytearray(head)
            self.got.append(kept)
            if self.silent:
                made.settimeout(20)
                while made.recv(65536):
                    pass
                self.cut.set()
                return
            rest = head.partition(b"\r\n\r\n")[2]
            self._body(made, head, rest, kept)
            if self.parts is None:
                made.sendall(self.answer)
                if b"content-length" not in self.answer.lower() and b"chunked" not in self.answer.lower():
                    return
                continue
            for part in self.parts:
                if not self.gate.acquire(timeout=20):
                    return
                made.sendall(part)

    def _body(self, made: socket.socket, head: bytes, rest: bytes, kept: bytearray) -> None:
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            while not rest.endswith(b"0\r\n\r\n"):
                data = made.recv(65536)
                if not data:
                    raise OSError
                rest += data
                kept += data
        elif b"content-length: " in lower:
            length = int(lower.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            while len(rest) < length:
                data = made.recv(65536)
                if not data:
                    raise OSError
                rest += data
                kept += data


class Stand:
    """A directory with a CA, and the router `router1` with what is behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pki = Pki(directory / "pki")
        self.pki.init("test-ca")
        self.pki.issue("router1", "peer", ["127.0.0.1"], ["localhost"])
        self.port = free_port()
        self.socket = directory / "inference.sock"
        self.log = directory / "router.log"
        self.settings = Settings(
            name="router1",
            hosts=("127.0.0.1",),
            port=self.port,
            pki=directory / "pki",
            targets=(Target("inference", socket=self.socket, group=str(os.getgid())),),
            metrics=directory / "metrics.sock",
            events=directory / "events",
            health_s=0.3,
            access=True,
        )

    def write(self, **changes: Any) -> None:
        """Write the router's settings, changed so."""
        self.settings = replace(self.settings, **changes)
        (self.directory / "router.json").write_text(self.settings.to_json())

    @contextmanager
    def router(self, **changes: Any) -> Iterator[subprocess.Popen[str]]:
        """The router, running."""
        self.write(**changes)
        with process(ROUTER, str(self.directory / "router.json"), log=self.log) as made:
            yield made

    def trust(self, *, name: str | None = None) -> ssl.SSLContext:
        """What a client believes, and shows."""
        context = ssl.create_default_context(cafile=self.directory / "pki" / "ca.pem")
        if name is not None:
            pair = self.directory / "pki" / "current" / name
            context.load_cert_chain(pair / "cert.pem", pair / "key.pem")
        return context

    def client(self, *, name: str | None = None, timeout: float = 15) -> HTTPSConnection:
        """A client's connection."""
        return HTTPSConnection("127.0.0.1", self.port, context=self.trust(name=name), timeout=timeout)

    def raw(self, data: bytes, *, patience_s: float = 0.7) -> bytes:
        """Send bytes as they are, and read until the router closes or is silent."""
        with self.connected() as made:
            made.settimeout(patience_s)
            made.sendall(data)
            return read_all(made)

    def connected(self) -> ssl.SSLSocket:
        """A TLS connection, no request yet."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=15)
        return self.trust().wrap_socket(plain, server_hostname="localhost")

    def figures(self) -> dict[str, float]:
        """What /metrics says, two seconds old at most."""
        made = HTTPConnection("localhost")
        made.sock = socket.socket(socket.AF_UNIX)
        made.sock.connect(str(self.settings.metrics))
        made.request("GET", "/metrics")
        lines = made.getresponse().read().decode().splitlines()
        made.close()
        return {key: float(value) for key, _, value in (each.rpartition(" ") for each in lines if each[0] != "#")}

    def events(self) -> list[dict[str, Any]]:
        """What was told."""
        files = sorted((self.directory / "events").glob("*.jsonl")) or sorted((self.directory / "events").glob("*"))
        out = []
        for each in files:
            if each.name in ("head", "writer"):
                continue
            out += [json.loads(line) for line in each.read_text().splitlines() if line.startswith("{")]
        return out


def read_all(made: socket.socket) -> bytes:
    """Everything until the end or a silence."""
    out = b""
    try:
        while data := made.recv(65536):
            out += data
    except (TimeoutError, ssl.SSLEOFError, ConnectionResetError):
        pass
    return out
