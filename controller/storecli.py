"""`bulkhead store`: serve the store, look at it, save it and bring it back.

Imports the store and what commands share.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from controller.agentcli import state_dir_option
from controller.problems import BulkheadError
from controller.records import GrantRecord, GrantState, Record, Records, TokenRecord, key
from controller.store import Change, Link, Store, Tls, Unavailable
from controller.store import server as serving
from controller.store.rows import DATABASE, SCHEMA
from controller.store.server import Cluster, Places
from controller.terminal import NO, columns, guarded, json_option, print_grid, print_json, run_dir_option, say

PATIENCE_S = 5.0
RESTORE_S = 60.0
SECRETS = ("preshared_key", "digest", "answer")
"""Left out of what is printed: keys of VPN clients, digests of tokens, and answers, which may hold either."""

_file = click.Path(path_type=Path)
store_option = click.option(
    "--store",
    "addresses",
    envvar="BULKHEAD_STORE",
    help="Where the store is: ADDRESS[,ADDRESS…], unix:PATH or ssl:IP:PORT (default: unix:RUN_DIR/store.sock).",
)


def tls_options(function: Any) -> Any:
    """--private-key, --certificate and --ca."""
    for name, what in (
        ("--ca", "the CA that the others' are of"),
        ("--certificate", "our certificate"),
        ("--private-key", "our private key"),
    ):
        function = click.option(name, type=_file, help=f"For ssl: {what}, PEM.")(function)
    return function


def tls_of(private_key: Path | None, certificate: Path | None, ca: Path | None) -> Tls | None:
    """What was given with those options; all or nothing."""
    if private_key and certificate and ca:
        return Tls(private_key.absolute(), certificate.absolute(), ca.absolute())
    if private_key or certificate or ca:
        raise BulkheadError("--private-key, --certificate and --ca go together; give all three")
    return None


def addresses_of(addresses: str | None, run_dir: Path) -> tuple[str, ...]:
    """The addresses of a `--store` option, or the host's own."""
    return tuple(
        part.strip() for part in (addresses or f"unix:{run_dir.absolute() / 'store.sock'}").split(",") if part.strip()
    )


def _places(run_dir: Path, state_dir: Path = serving.STATE_DIR) -> Places:
    return Places(run_dir.absolute(), state_dir.absolute())


@contextmanager
def _opened(addresses: str | None, run_dir: Path, tls: Tls | None = None) -> Iterator[Store]:
    store = Store(addresses_of(addresses, run_dir), tls)
    try:
        store.start(PATIENCE_S)
        yield store
    finally:
        store.close()


@click.group()
def store() -> None:
    """The store: what was made while the system runs, shared by all nodes. It is an OVSDB database."""


@store.command()
@run_dir_option
@state_dir_option
@click.option("--db", "database", type=_file, help="The database file (default: STATE_DIR/store/bulkhead.db).")
@click.option("--listen", multiple=True, metavar="ADDRESS", help="For other nodes: ssl:IP:PORT. May be given again.")
@click.option("--group", default="", help="The group that may connect to the socket RUN_DIR/store.sock.")
@click.option("--cluster", "local", metavar="ADDRESS", help="Be a server of a cluster, with this address: ssl:IP:PORT.")
@click.option("--join", multiple=True, metavar="ADDRESS", help="Servers of the cluster to join. None: begin a new one.")
@click.option(
    "--election-timer",
    type=click.IntRange(100, 600_000),
    default=serving.ELECTION_TIMER_MS,
    show_default=True,
    help="For a new cluster: milliseconds of a leader's silence before another is looked for.",
)
@tls_options
@guarded
def serve(
    run_dir: Path,
    state_dir: Path,
    database: Path | None,
    listen: tuple[str, ...],
    group: str,
    local: str | None,
    join: tuple[str, ...],
    election_timer: int,
    private_key: Path | None,
    certificate: Path | None,
    ca: Path | None,
) -> None:
    """Serve the store, in the foreground, as ovsdb-server; SIGTERM stops it.

    The database file is made if there is none, and brought to this version's schema. A file that is there is
    gone on with, whatever --join says.
    """
    tls = tls_of(private_key, certificate, ca)
    cluster = _cluster(local, join, election_timer, tls)
    places = _places(run_dir, state_dir)
    serving.serve(
        places,
        database=database.absolute() if database is not None else None,
        listen=listen,
        tls=tls,
        cluster=cluster,
        group=group,
    )


def _cluster(local: str | None, join: tuple[str, ...], election_timer: int, tls: Tls | None) -> Cluster | None:
    if local is None:
        if join:
            raise BulkheadError("--join needs --cluster ADDRESS, this server's own address")
        return None
    for address in (local, *join):
        serving.passive(address, tls)  # the same holds for what servers tell one another
    return Cluster(local, join, election_timer)


@store.command()
@store_option
@run_dir_option
@state_dir_option
@tls_options
@json_option
@guarded
def status(
    addresses: str | None,
    run_dir: Path,
    state_dir: Path,
    private_key: Path | None,
    certificate: Path | None,
    ca: Path | None,
    as_json: bool,
) -> None:
    """Show whether the store answers, what it holds, and how its cluster does; exit 1 if it does not answer."""
    link = Link(addresses_of(addresses, run_dir), tls_of(private_key, certificate, ca))
    records = _first(link)
    found: dict[str, Any] = {"connected": records is not None, "address": link.session.remote, "why": link.why}
    if records is not None:
        found |= {"revision": records.revision, "records": _counts(records), "nodes": [_node(n) for n in records.nodes]}
    link.close()
    if addresses is None:
        found |= _local(_places(run_dir, state_dir))
    if as_json:
        print_json(found)
    else:
        _print_status(found)
    if records is None:
        sys.exit(NO)


def _first(link: Link) -> Records | None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        link.poll()
        if link.connected:
            return link.records
        time.sleep(0.01)
    return None


def _counts(records: Records) -> dict[str, int]:
    return {name: len(getattr(records, name)) for name in ("containers", "clients", "grants", "tokens", "operations")}


def _node(node: Any) -> dict[str, Any]:
    return {
        "name": node.name,
        "agent_revision": node.agent_revision,
        "controller_revision": node.controller_revision,
    } | {name: dict(getattr(node, name)) for name in ("agent_waiting", "controller_waiting", "health")}


def _local(places: Places) -> dict[str, Any]:
    """What only the host that serves it can tell."""
    out: dict[str, Any] = {}
    if places.database.exists():
        out["file"] = {"path": str(places.database), "bytes": places.database.stat().st_size}
    try:
        out["cluster"] = cluster_status(serving.control(places, "cluster/status", DATABASE))
    except BulkheadError:
        out["cluster"] = None
    return out


def cluster_status(text: str) -> dict[str, Any]:
    """What `ovs-appctl cluster/status` says, as values."""
    fields = dict(line.split(": ", 1) for line in text.splitlines() if re.match(r"[A-Z][^:]*: \S", line))
    servers = re.findall(r"^ +(\w{4}) \(\w{4} at ([^)]+)\)( \(self\))?(.*)$", text, re.MULTILINE)
    return {
        "role": fields.get("Role", ""),
        "status": fields.get("Status", ""),
        "leader": fields.get("Leader", ""),
        "term": int(fields.get("Term", 0)),
        "election_timer_ms": int(fields.get("Election timer", 0)),
        "members": [
            {"id": name, "address": address, "self": bool(own), "heard_ms": _heard_ms(rest)}
            for name, address, own, rest in servers
        ],
    }


def _heard_ms(text: str) -> int | None:
    match = re.search(r"last msg (\d+) ms ago", text)
    return int(match[1]) if match else None


def _print_status(found: dict[str, Any]) -> None:
    if not found["connected"]:
        click.secho(f"the store does not answer: {found['why']}", fg="red")
    else:
        counts = ", ".join(f"{number} {name}" for name, number in found["records"].items())
        click.echo(f"{found['address']}, revision {found['revision']}: {counts}")
    if file := found.get("file"):
        click.echo(f"{file['path']}: {file['bytes']} bytes")
    if cluster := found.get("cluster"):
        click.echo(f"{cluster['status']}, {cluster['role']}, leader {cluster['leader']}, term {cluster['term']}")
        grid = columns("SERVER", "ADDRESS", "LAST HEARD OF")
        for member in cluster["members"]:
            heard = "self" if member["self"] else "" if member["heard_ms"] is None else f"{member['heard_ms']} ms ago"
            grid.add_row(member["id"], member["address"], heard)
        print_grid(grid)
    if found.get("nodes"):
        grid = columns("NODE", "AGENT", "CONTROLLER", "WAITING")
        for node in found["nodes"]:
            waiting = " ".join(sorted({*node["agent_waiting"], *node["controller_waiting"]}))
            grid.add_row(node["name"], str(node["agent_revision"]), str(node["controller_revision"]), waiting)
        print_grid(grid)


@store.command()
@store_option
@run_dir_option
@tls_options
@guarded
def dump(
    addresses: str | None, run_dir: Path, private_key: Path | None, certificate: Path | None, ca: Path | None
) -> None:
    """Print every record as JSON. Secrets are left out."""
    with _opened(addresses, run_dir, tls_of(private_key, certificate, ca)) as opened:
        records = opened.records
    groups = {name: [_public(record) for record in getattr(records, name)] for name in _counts(records)}
    print_json({"revision": records.revision, **groups, "nodes": [_node(node) for node in records.nodes]})


def _public(record: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if name not in SECRETS}


@store.command()
@click.argument("file", type=_file)
@store_option
@run_dir_option
@tls_options
@guarded
def backup(
    file: Path,
    addresses: str | None,
    run_dir: Path,
    private_key: Path | None,
    certificate: Path | None,
    ca: Path | None,
) -> None:
    """Save the running store to FILE, as it is at one moment.

    FILE holds the shared keys of VPN clients and the digests of tokens: only its owner may read it, and it belongs
    where nobody else can.
    """
    tls = tls_of(private_key, certificate, ca)
    with _opened(addresses, run_dir, tls) as opened:
        remote, revision = opened.remote, opened.records.revision
    made = file.with_name(f".{file.name}.new")
    try:
        made.unlink(missing_ok=True)
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            _client(tls, "backup", remote, DATABASE, stdout=out)
            out.flush()
            os.fsync(out.fileno())
        serving.check(made)
        made.rename(file)
    except OSError as exc:
        raise BulkheadError(f"cannot write {file}: {exc.strerror}; give a place that can be written") from exc
    finally:
        made.unlink(missing_ok=True)
    click.echo(f"saved revision {revision} or later to {file}; it holds secrets, keep it where nobody else can read it")


def _client(tls: Tls | None, command: str, *arguments: str, stdout: Any = subprocess.PIPE) -> None:
    keys = (
        [f"--private-key={tls.private_key}", f"--certificate={tls.certificate}", f"--ca-cert={tls.ca}"] if tls else []
    )
    line = ["ovsdb-client", *keys, "--timeout=60", "-vconsole:err", command, *arguments]
    done = subprocess.run(line, stdout=stdout, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=False)
    if done.returncode:
        raise BulkheadError(f"ovsdb-client {command}: {' '.join(done.stderr.decode(errors='replace').split())}")


@store.command()
@click.argument("file", type=_file)
@store_option
@run_dir_option
@tls_options
@click.option("--force", is_flag=True, help="Replace what the store holds now.")
@guarded
def restore(
    file: Path,
    addresses: str | None,
    run_dir: Path,
    private_key: Path | None,
    certificate: Path | None,
    ca: Path | None,
    force: bool,
) -> None:
    """Bring the records of FILE, a backup, back into the running store.

    All of them or none, as one change: every node follows. What has been made since the backup is gone. Into a store that
    holds records tokens do not come back that were revoked since, nor grants that have ended. An older version's backup is
    converted first.
    """
    saved = read_backup(file)
    with _opened(addresses, run_dir, tls_of(private_key, certificate, ca)) as opened:

        def replace_all(change: Change) -> int:
            now = change.records
            if not force and (have := sum(1 for _ in now)):
                raise BulkheadError(
                    f"the store holds {have} records, which would be lost; to replace them, give --force"
                )
            back = [record for each in saved if (record := _as_it_is(each, now)) is not None]
            kept = {key(record) for record in back}
            for name in [key(record) for record in now if key(record) not in kept]:
                change.delete(name)
            for record in back:
                change.put(record)
            return len(kept)

        count, revision = opened.change(replace_all, RESTORE_S, above=saved.revision)
    click.echo(f"{count} records of revision {saved.revision} are back, as revision {revision}")


def _as_it_is(saved: Record, now: Records) -> Record | None:
    """A saved record as it comes back, if at all: whoever was shut out since the backup is not let in again.

    An empty store cannot tell who that was.
    """
    if not any(True for _ in now) or not isinstance(saved, TokenRecord | GrantRecord):
        return saved
    there = next((record for record in now if key(record) == key(saved)), None)
    if isinstance(saved, TokenRecord):
        return saved if there is not None else None
    if there is not None:
        return there
    over = saved.state not in (GrantState.REQUESTED, GrantState.APPROVED)
    return saved if over else replace(saved, state=GrantState.REVOKED)


def read_backup(file: Path) -> Records:
    """The records of a backup, which is checked, and converted if it is of an older version."""
    if not file.is_file():
        raise BulkheadError(f"{file} is not there; give a file that `bulkhead store backup` has written")
    with tempfile.TemporaryDirectory(prefix="bulkhead-store-") as name:  # mode 700
        places = Places(Path(name), Path(name))
        copy = places.database
        copy.parent.mkdir(mode=0o700)
        shutil.copyfile(file, copy)
        serving.prepare(copy)
        places.private.mkdir(exist_ok=True)
        process = subprocess.Popen(
            serving.serve_command(places, copy),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            link = Link(addresses_of(None, places.run_dir))
            records = _first(link)
            why = link.why
            link.close()
        finally:
            process.terminate()
            process.wait()
    if records is None:
        raise BulkheadError(f"{file} cannot be read as a backup: {why}")
    return records


@store.command()
@run_dir_option
@guarded
def compact(run_dir: Path) -> None:
    """Rewrite the database file without its history. The server does that by itself now and then."""
    serving.control(_places(run_dir), "ovsdb-server/compact", DATABASE)
    click.echo("compacted")


@store.command()
@store_option
@run_dir_option
@tls_options
@guarded
def convert(
    addresses: str | None, run_dir: Path, private_key: Path | None, certificate: Path | None, ca: Path | None
) -> None:
    """Bring a running store to this version's schema: for clusters, once every server runs this version.

    `store serve` does it by itself for a store of one server.
    """
    tls = tls_of(private_key, certificate, ca)
    remotes = ",".join(addresses_of(addresses, run_dir))
    with tempfile.TemporaryFile() as out:
        _client(tls, "get-schema-version", remotes, DATABASE, stdout=out)
        out.seek(0)
        found = out.read().decode().strip()
    serving.not_newer("the store", found)
    _client(tls, "convert", remotes, str(SCHEMA))
    click.echo("the store has this version's schema")


@store.command()
@run_dir_option
@guarded
def leave(run_dir: Path) -> None:
    """Take this host's server out of its cluster. Its database file is of no use afterwards: move it away."""
    places = _places(run_dir)
    serving.control(places, "cluster/leave", DATABASE)
    deadline = time.monotonic() + RESTORE_S
    # It lets go of the database once the others have agreed.
    while DATABASE in serving.control(places, "ovsdb-server/list-dbs").split():
        if time.monotonic() > deadline:
            raise Unavailable("the cluster has not let this server go; see that a majority of its servers runs")
        time.sleep(0.1)
    click.echo("left the cluster; stop the server now")


@store.command()
@click.argument("server")
@run_dir_option
@guarded
def kick(server: str, run_dir: Path) -> None:
    """Take a SERVER (its id or address) that is gone for good out of the cluster of this host's server."""
    said = serving.control(_places(run_dir), "cluster/kick", DATABASE, server)
    if said:
        say(said)
    click.echo(f"{server} is being removed; see: bulkhead store status")
