"""The store's server: its database file, made, checked and converted; and what ovsdb-server is started with.

Standard library and the installed Open vSwitch programs. Imports rows, wire and problems.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.problems import BulkheadError
from controller.store.errors import Unavailable
from controller.store.rows import DATABASE, SCHEMA
from controller.store.wire import Tls, parse

RUN_DIR = Path("/run/bulkhead")
STATE_DIR = Path("/var/lib/bulkhead/agent")
ELECTION_TIMER_MS = 1000
"""A leader that is silent for one to two times as long is replaced, and followers give up on it. Half of what the
writers' bar of five seconds leaves, so that one election may fail."""
_LOOPBACK = ("127.0.0.1", "::1")
_MAGIC = re.compile(rb"OVSDB (JSON|CLUSTER) (\d+) ([0-9a-f]{40})\n")
_ENV = {"PATH": os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")), "LC_ALL": "C"}


@dataclass(frozen=True, slots=True)
class Places:
    """Where a store is on its host. Programs connect to `socket`; only root reaches what is in `private`."""

    run_dir: Path = RUN_DIR
    state_dir: Path = STATE_DIR

    @property
    def socket(self) -> Path:
        """The socket for everybody on the host who may."""
        return self.run_dir / "store.sock"

    @property
    def private(self) -> Path:
        """Of root alone: process id and control socket."""
        return self.run_dir / "store"

    @property
    def control(self) -> Path:
        """ovsdb-server's control socket."""
        return self.private / "control"

    @property
    def database(self) -> Path:
        """The database file."""
        return self.state_dir / "store" / "bulkhead.db"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A server of a cluster: its own address (`ssl:IP:PORT`), and others' to join; none begins a new cluster."""

    local: str
    join: tuple[str, ...] = ()
    election_timer_ms: int = ELECTION_TIMER_MS


def serve(
    places: Places,
    *,
    database: Path | None = None,
    listen: Sequence[str] = (),
    tls: Tls | None = None,
    cluster: Cluster | None = None,
    group: str = "",
) -> None:
    """Become ovsdb-server on the database, which is made or converted first. Returns only by raising."""
    database = database or places.database
    command = serve_command(places, database, listen, tls)
    group_id = _group_id(group)
    _directory(places.private)
    _directory(database.parent)
    lock(database)
    prepare(database, cluster)
    _unlink_dead(places)
    if group_id is not None:
        try:
            os.setgid(group_id)  # sockets are made with it
        except PermissionError as exc:
            raise BulkheadError(f"only root may give the socket to group {group}; run this as root") from exc
    os.umask(0o117)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **_ENV})
    except FileNotFoundError as exc:
        raise BulkheadError("ovsdb-server is not installed; run: apt-get install openvswitch-switch") from exc


def serve_command(places: Places, database: Path, listen: Sequence[str] = (), tls: Tls | None = None) -> list[str]:
    """The command line of ovsdb-server. `listen` are addresses as clients give them: `ssl:IP:PORT`, `unix:PATH`."""
    remotes = [f"--remote=punix:{places.socket}", *(f"--remote={passive(address, tls)}" for address in listen)]
    keys = []
    if tls is not None:
        for file in tls:
            if not file.is_file():
                raise BulkheadError(f"{file} is not there; give a key, its certificate and the CA, PEM")
        keys = [f"--private-key={tls.private_key}", f"--certificate={tls.certificate}", f"--ca-cert={tls.ca}"]
    own = [f"--unixctl={places.control}", f"--pidfile={places.private / 'pid'}", "--no-chdir"]
    return ["ovsdb-server", str(database), *remotes, *keys, *own, "-vsyslog:off", "-vfile:off", "-vconsole:warn"]


def passive(address: str, tls: Tls | None) -> str:
    """An address to listen on as ovsdb-server wants it. TCP without TLS is for the host itself only."""
    target = parse(address)
    scheme = address.partition(":")[0]
    if scheme == "unix":
        return f"punix:{target.address}"
    host, port = target.address
    if scheme == "tcp" and host not in _LOOPBACK:
        raise BulkheadError(f"{address} would let anybody in; listen on ssl:{host}:{port} with a key and certificates")
    if scheme == "ssl" and tls is None:
        raise BulkheadError(f"{address} needs --private-key, --certificate and --ca")
    return f"p{scheme}:{port}:{f'[{host}]' if ':' in host else host}"


def prepare(database: Path, cluster: Cluster | None = None) -> None:
    """Have a database file that ovsdb-server can open: made if there is none, checked, and brought to our schema.

    Raises `BulkheadError` for a damaged file, one of another program, and one of a newer version of this one.
    """
    _directory(database.parent)
    if not database.exists():
        _create(database, cluster)
        return
    database.chmod(0o600)
    clustered = check(database)
    if cluster is not None and not clustered:
        raise BulkheadError(
            f"{database} is a store of one server; to begin a cluster with what it holds: bulkhead store backup, move "
            "the file away, serve with --cluster, then bulkhead store restore"
        )
    if clustered:
        return  # what it holds came from the cluster, and is converted through a running server
    found = _tool("db-version", database)
    if not_newer(str(database), found):
        _tool("convert", database, SCHEMA)
        database.chmod(0o600)


def not_newer(what: str, found: str) -> bool:
    """Whether a schema version is older than ours.

    Raises `BulkheadError` if it is newer: to convert would drop what it has added.
    """
    ours = str(json.loads(SCHEMA.read_text())["version"])
    if _version(found) > _version(ours):
        raise BulkheadError(
            f"{what} is of a newer version (schema {found}, this program has {ours}); install that version, or restore "
            "an older backup"
        )
    return found != ours


def _create(database: Path, cluster: Cluster | None) -> None:
    made = database.with_name(f".{database.name}.new")
    made.unlink(missing_ok=True)
    before = os.umask(0o077)
    try:
        if cluster is None:
            _tool("create", made, SCHEMA)
        elif cluster.join:
            _tool("join-cluster", made, DATABASE, cluster.local, *cluster.join)
        else:
            _tool(f"--election-timer={cluster.election_timer_ms}", "create-cluster", made, SCHEMA, cluster.local)
    finally:
        os.umask(before)
    made.chmod(0o600)
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.rename(database)
    made.with_name(f".{made.name}.~lock~").unlink(missing_ok=True)


def check(database: Path) -> bool:
    """Whether it is a cluster's. Raises `BulkheadError` unless it is a whole database of ours.

    ovsdb-server itself drops, without a word, everything after the first damage. A last record that is cut short is no
    damage: that is how it looks when the host dies while it is written, and nobody has been told that it was.
    """
    data = database.read_bytes()
    at, kind = 0, b""
    while match := _MAGIC.match(data, at):
        length = int(match[2])
        body = data[match.end() : match.end() + length]
        if len(body) < length:
            break
        if hashlib.sha1(body).hexdigest().encode() != match[3]:
            break
        kind = kind or match[1]
        at = match.end() + length
    if not kind:
        raise BulkheadError(f"{database} is no OVSDB database; move it away, and a new one is made")
    rest = data[at:]
    if rest:
        match = _MAGIC.match(rest)
        torn = (match is None and b"\n" not in rest) or (match is not None and len(rest) - match.end() < int(match[2]))
        if not torn and rest.strip(b"\0"):
            raise BulkheadError(
                f"{database} is damaged at byte {at} of {len(data)}; move it away, start again and `bulkhead store "
                f"restore` the newest backup; or go on with what stands before the damage: truncate -s {at} {database}"
            )
        os.truncate(database, at)
        said = "the last record was cut short, was never acknowledged, and is gone"
        print(f"bulkhead: {database}: {said}", file=sys.stderr)
    name = _cluster_name(data) if kind == b"CLUSTER" else _tool("db-name", database)
    if name != DATABASE:
        raise BulkheadError(f"{database} is a database called {name}, not {DATABASE}; give another file with --db")
    return kind == b"CLUSTER"


def _cluster_name(data: bytes) -> str:
    match = _MAGIC.match(data)
    assert match is not None
    return str(json.loads(data[match.end() : match.end() + int(match[2])]).get("name"))


def lock(database: Path) -> None:
    """Be the only server of this file, for as long as this process lives, whatever program it becomes."""
    file = os.open(database.with_name(f".{database.name}.serving"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise BulkheadError(f"{database} is served already; stop that server, or give another file with --db") from None
    os.set_inheritable(file, True)


def control(places: Places, *command: str) -> str:
    """Ask the running server by its control socket."""
    if not places.control.exists():
        raise Unavailable(f"no store is served on {places.run_dir}; start it: bulkhead store serve")
    line = ("ovs-appctl", "-T", "10", "-t", str(places.control), *command)
    return _run(line, "the store's server").strip()


def _tool(*arguments: str | Path) -> str:
    return _run(("ovsdb-tool", "-vconsole:err", *map(str, arguments)), "the store's database").strip()


def _run(line: Sequence[str], what: str) -> str:
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, env={**os.environ, **_ENV}, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as exc:
        raise BulkheadError(f"{line[0]} is not installed; run: apt-get install openvswitch-switch") from exc
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit {done.returncode}"
        raise BulkheadError(f"{what}: {said.removeprefix(f'{line[0]}: ')}")
    return done.stdout


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _directory(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)  # one that is there may be shared with others
    except OSError as exc:
        raise BulkheadError(
            f"cannot make the directory {path}: {exc.strerror}; run this as root, or name others"
        ) from exc


def _unlink_dead(places: Places) -> None:
    for path in (places.socket, places.control):
        if not path.exists():
            continue
        if not path.is_socket():
            raise BulkheadError(f"{path} is there already and is no socket; remove it, or give another --run-dir")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
                continue
        raise BulkheadError(f"a store is served already on {path}; stop it, or give another --run-dir")


def _group_id(group: str) -> int | None:
    if not group:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise BulkheadError(f"there is no group {group}; make it: groupadd --system {group}") from None
