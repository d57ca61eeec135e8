"""What is saved of a machine before it is cut off: many sources at once, one archive, no private key. Imports problems.

The archive is a tar of mode 600 with a manifest: for each file its SHA-256, when it was taken, and whether before the cut.
"""

from __future__ import annotations

import datetime as dt
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

HEAD_START_S = 0.8
"""How long a cut waits for evidence."""
PATIENCE_S = 20.0
LARGEST_FILE = 32 << 20
_SECRET = b"PRIVATE KEY-----"


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the archive, and how to get what is in it."""

    name: str
    take: Callable[[], bytes]


@dataclass(slots=True)
class _Taken:
    data: bytes
    at: float


@dataclass(slots=True)
class Collection:
    """Sources that are being taken. `begin` returns at once; `head_start` waits for most; `archive` for the rest."""

    sources: tuple[Source, ...]
    cut_at: float | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=12))
    _running: dict[str, Future[_Taken]] = field(default_factory=dict)

    def begin(self) -> None:
        """Ask all of them."""
        for source in self.sources:
            self._running[source.name] = self._pool.submit(_take, source)

    def head_start(self, wait_s: float = HEAD_START_S) -> None:
        """Wait for them, but not for long: the cut comes after."""
        wait(self._running.values(), timeout=wait_s)

    def archive(self) -> bytes:
        """The archive, once all have answered or had their time."""
        wait(self._running.values(), timeout=PATIENCE_S)
        manifest: list[dict[str, object]] = []
        files: list[tuple[str, bytes]] = []
        for name, future in self._running.items():
            if not future.done():
                manifest.append({"name": name, "missing": f"it did not answer within {PATIENCE_S:.0f} s"})
                continue
            taken = future.result()
            files.append((name, taken.data))
            manifest.append(
                {
                    "name": name,
                    "sha256": hashlib.sha256(taken.data).hexdigest(),
                    "bytes": len(taken.data),
                    "taken": dt.datetime.fromtimestamp(taken.at, dt.UTC).isoformat(timespec="milliseconds"),
                    "before_the_cut": self.cut_at is None or taken.at < self.cut_at,
                }
            )
        self._pool.shutdown(wait=False, cancel_futures=True)
        return _packed([("manifest.json", json.dumps(manifest, indent=1).encode()), *files])


def _take(source: Source) -> _Taken:
    try:
        data = source.take()
    except Exception as exc:  # what cannot be had is evidence too, and must not keep the rest from being saved
        data = f"could not be taken: {exc}\n".encode()
    return _Taken(data, time.time())


def _packed(files: Iterable[tuple[str, bytes]]) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(plain.getvalue(), compresslevel=3)


COMMANDS: dict[str, tuple[str, ...]] = {
    "addresses.txt": ("ip", "-s", "address", "show"),
    "routes.txt": ("ip", "route", "show", "table", "all"),
    "routes6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "neighbours.txt": ("ip", "neighbour", "show"),
    "sockets.txt": ("ss", "-tunaxpe"),
    "processes.txt": ("ps", "-eo", "pid,ppid,user,lstart,comm"),
    "rules.txt": ("nft", "list", "ruleset"),
    "conntrack.txt": ("conntrack", "-L", "-o", "extended"),
    "wireguard.txt": ("wg", "show", "all"),  # says that keys are there, and hides them
    "ovs.txt": ("ovs-vsctl", "--timeout=5", "show"),
    "logins.txt": ("last", "-n", "200", "-F"),
}


def host_sources(state_file: Path | None, security_dir: Path, event_dirs: Iterable[Path]) -> tuple[Source, ...]:
    """What a machine of ours has to tell. Arguments of processes are left out: programs of others have secrets there."""
    found = [Source(name, _printed(command)) for name, command in COMMANDS.items()]
    found.append(Source("flows.txt", _flows))
    paths = [path for directory in event_dirs for path in _files(directory)]
    paths += _files(security_dir / "pki", "*.pem")
    if state_file is not None:
        found.append(
            Source("hashes/state-file.sha256", lambda: hashlib.sha256(state_file.read_bytes()).digest().hex().encode())
        )
    found += [Source(f"files{path.absolute()}", _contents(path)) for path in paths]
    return tuple(found)


def _files(directory: Path, pattern: str = "*") -> Iterator[Path]:
    if directory.is_dir():
        found = (path for path in directory.rglob(pattern) if path.is_file() and path.name != "key.pem")
        # Some are other users' directories: no link of theirs is followed.
        yield from sorted(path for path in found if path.resolve().is_relative_to(directory.resolve()))


def _contents(path: Path) -> Callable[[], bytes]:
    def take() -> bytes:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE)
        return b"a private key, left out\n" if _SECRET in data else data

    return take


def _printed(command: tuple[str, ...]) -> Callable[[], bytes]:
    def take() -> bytes:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S - 2, stdin=subprocess.DEVNULL)
        return done.stdout or done.stderr

    return take


def _flows() -> bytes:
    bridges = _printed(("ovs-vsctl", "--timeout=5", "list-br"))().decode(errors="replace").split()
    dumped = [(b, _printed(("ovs-ofctl", "-O", "OpenFlow14", "dump-flows", b))()) for b in bridges]
    return b"".join(f"# {bridge}\n".encode() + flows for bridge, flows in dumped)
