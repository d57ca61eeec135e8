"""Stores of a test's own: a real ovsdb-server in a directory of its own, that can be killed and started again."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from controller.records import ContainerRecord, ServiceRecord
from controller.store import Store, Tls
from controller.store import server as serving
from controller.store.server import Cluster, Places


class Server:
    """One server. `address` is its unix socket."""

    def __init__(
        self,
        directory: Path,
        listen: Sequence[str] = (),
        tls: Tls | None = None,
        cluster: Cluster | None = None,
        database: Path | None = None,
    ) -> None:
        self.places = Places(directory / "run", directory / "lib")
        self.database = database or self.places.database
        self._listen, self._tls, self._cluster = listen, tls, cluster
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"unix:{self.places.socket}"

    def start(self) -> Server:
        """Make or check the database file, and serve it."""
        serving.prepare(self.database, self._cluster)
        self.places.private.mkdir(parents=True, exist_ok=True)
        self.places.socket.unlink(missing_ok=True)
        command = serving.serve_command(self.places, self.database, self._listen, self._tls)
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.places.socket.exists)
        return self

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has been started, and not ended by us."""
        return self._process is not None

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGTERM."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def served() -> Iterator[Server]:
    """A running server."""
    with tempfile.TemporaryDirectory(prefix="bs-") as name:
        server = Server(Path(name)).start()
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def opened(*addresses: str, tls: Tls | None = None, lock: bool = False, patience_s: float = 10) -> Iterator[Store]:
    """A store that has started."""
    store = Store(addresses, tls, lock=lock)
    try:
        store.start(patience_s)
        yield store
    finally:
        store.close()


def container(number: int, **fields: object) -> ContainerRecord:
    """A container with id, name and address by its number."""
    record = {
        "id": str(number),
        "name": f"box{number}",
        "network": "privacy",
        "node": "n1",
        "address": f"10.0.{number // 250}.{number % 250 + 1}",
        "services": (
            ServiceRecord("web", "tcp", 443, check="http:/health"),
            ServiceRecord("dns", "udp", 53, exposed=True),
        ),
        "command": ("run", "run", "-é"),
    }
    return ContainerRecord(**{**record, **fields})  # type: ignore[arg-type]


def wait_for(condition: Callable[[], object], timeout_s: float = 10) -> None:
    """Until `condition` holds. Fails if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
