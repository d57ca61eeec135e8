"""`bulkhead incident`: cut off, save evidence, replace keys, walk the way back. `bulkhead chores`: what is to be looked at
every week and month. Imports security, the network's verification and what commands share."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import click

from controller.asking import ask
from controller.eventlog import EventLog
from controller.events import Event, Kind
from controller.networkcli import firewall_difference, look
from controller.problems import BulkheadError
from controller.security.hpke import Registry
from controller.security.incident import Collection, Recovery, Seal, Seals, Step, Target
from controller.security.incident.evidence import host_sources
from controller.security.pki import Pki, archive, delivery, report
from controller.security.pki.disk import Disk
from controller.security.verifynet import judge, read_asked
from controller.statefile import load
from controller.terminal import (
    NO,
    UNKNOWN,
    columns,
    guarded,
    json_option,
    print_grid,
    print_json,
    router_home,
    run_dir_option,
    say,
    security_dir_option,
)
from controller.verify.host.facts import Gap
from controller.verify.host.findings import Status

STATE_FILE = Path("/etc/bulkhead/state.yaml")
STORE_DB = Path("/var/lib/bulkhead/store/bulkhead.db")
EVENT_DIRS = (
    Path("/var/lib/bulkhead/events"),
    Path("/var/lib/bulkhead/agent/events"),
    Path("/var/lib/bulkhead/api/events"),
    Path("/var/lib/bulkhead/router/events"),
)

state_option = click.option(
    "--state",
    "file",
    type=click.Path(path_type=Path),
    default=STATE_FILE,
    show_default=True,
    help="The state file, for the names of servers and networks.",
)


@click.group()
def incident() -> None:
    """Cut servers or networks off with evidence saved, replace every certificate and key, and walk the way back. Root."""


def _seals(security_dir: Path, run_dir: Path) -> Seals:
    def ports(network: str, _seal: str, closed: bool) -> str:
        try:
            reply = ask(run_dir, {"ask": "seal-network", "network": network, "sealed": closed}, 5.0)
        except BulkheadError as exc:
            return f"flows of {network} are as they were, the firewall alone cuts: {exc}" if closed else ""
        gone, leaked = reply.get("not_connected") or [], reply.get("leaked") or []
        told = [f"not connected, and so not changed: {', '.join(gone)}"] if gone else []
        told += [f"stays closed, for it leaked; when that is mended: bulkhead unseal {port}" for port in leaked]
        return "; ".join(told)

    return Seals(security_dir / "seals", ports=ports)


def _collection(file: Path, security_dir: Path) -> Collection:
    dirs = (*EVENT_DIRS, *(security_dir / part for part in ("events", "pki/events", "wg/events", "seals/events")))
    return Collection(host_sources(file if file.is_file() else None, security_dir, dirs))


def _targets(file: Path, servers: tuple[str, ...], networks: tuple[str, ...]) -> list[Target]:
    out = []
    for name in servers:
        prefixes = _address(name)
        if not prefixes:
            peers = read_asked(file).peers
            prefixes = [f"{peer.address}/32" for peer in peers if peer.name == name]
            if not prefixes:
                there = ", ".join(peer.name for peer in peers) or "none"
                raise BulkheadError(f"{file} has no peer {name}, and that is no address; peers: {there}")
        out.append(Target("server", name, tuple(prefixes)))
    if networks:
        declared = {one.name: one for one in load(file).state.networks}
        for name in networks:
            if name not in declared:
                raise BulkheadError(f"{file} declares no network {name}; there are {', '.join(declared) or 'none'}")
            out.append(Target("network", name, tuple(str(prefix) for prefix in declared[name].prefixes)))
    return out


def _address(name: str) -> list[str]:
    try:
        return [str(ip_network(name))]
    except ValueError:
        return []


@contextmanager
def _events(security_dir: Path) -> Iterator[Callable[[Event], object]]:
    """Where to tell events; that they cannot be told stops no incident's command."""
    try:
        log = EventLog(security_dir / "seals" / "events")
    except BulkheadError as exc:
        say(f"bulkhead: not logged: {exc}")
        yield lambda _event: None
        return
    with log:
        yield log.append


@incident.command()
@click.option("--server", "servers", multiple=True, metavar="NAME|ADDRESS", help="A peer of the profile; repeatable.")
@click.option("--network", "networks", multiple=True, metavar="NAME", help="A network of the state file; repeatable.")
@click.option("--reason", required=True, help="For the record.")
@state_option
@security_dir_option
@run_dir_option
@json_option
@guarded
def seal(
    servers: tuple[str, ...],
    networks: tuple[str, ...],
    reason: str,
    file: Path,
    security_dir: Path,
    run_dir: Path,
    as_json: bool,
) -> None:
    """Cut servers or networks off at once, after saving evidence; prints the seal's id, without which nothing unseals.

    Evidence has a head start of 0.8 s; what takes longer is saved after the cut, and the archive says so.
    """
    targets = _targets(file, servers, networks)
    made = _seals(security_dir, run_dir).seal(targets, reason, _collection(file, security_dir))
    with _events(security_dir) as tell:
        names = ", ".join(target.name for target in targets)
        tell(Event(Kind.SERVER_SEALED, f"{names} cut off: {reason}", object=made.id))
    _print_seal(made, security_dir, as_json)


def _print_seal(one: Seal, security_dir: Path, as_json: bool) -> None:
    if as_json:
        print_json(asdict(one))
        return
    click.echo(one.id)
    for note in one.notes:
        say(f"bulkhead: {note}")
    if one.phase == "sealed":
        say(f"cut after {one.cut_after_s} s; evidence: {security_dir / 'seals' / one.id / 'evidence.tar.gz'}")


@incident.command()
@click.argument("seal_id")
@security_dir_option
@run_dir_option
@json_option
@guarded
def unseal(seal_id: str, security_dir: Path, run_dir: Path, as_json: bool) -> None:
    """Let in again what the seal SEAL_ID cut off; the whole id is needed."""
    done = _seals(security_dir, run_dir).unseal(seal_id)
    with _events(security_dir) as tell:
        tell(Event(Kind.SERVER_UNSEALED, f"{', '.join(t.name for t in done.targets)} let in again", object=done.id))
    _print_seal(done, security_dir, as_json)


@incident.command()
@click.argument("seal_id")
@state_option
@security_dir_option
@run_dir_option
@json_option
@guarded
def resume(seal_id: str, file: Path, security_dir: Path, run_dir: Path, as_json: bool) -> None:
    """Complete the seal SEAL_ID where it was interrupted, and load its cut again, after a restart of the host, say."""
    done = _seals(security_dir, run_dir).resume(seal_id, _collection(file, security_dir))
    _print_seal(done, security_dir, as_json)


@incident.command()
@security_dir_option
@run_dir_option
@guarded
def enforce(security_dir: Path, run_dir: Path) -> None:
    """Load into the firewall what every seal cuts off; done when the host starts, and nothing changes otherwise."""
    _seals(security_dir, run_dir).enforce()


@incident.command()
@security_dir_option
@run_dir_option
@json_option
@guarded
def status(security_dir: Path, run_dir: Path, as_json: bool) -> None:
    """Show every seal; exit 1 if one is not complete or what it cuts off is not cut off in the kernel."""
    seals = _seals(security_dir, run_dir)
    every, missing = seals.all(), seals.not_enforced()
    wrong = bool(missing) or any(one.phase in ("begun", "cut", "unsealing") for one in every)
    if as_json:
        print_json({"seals": [asdict(one) for one in every], "not_enforced": missing})
    else:
        grid = columns("SEAL", "PHASE", "SINCE", "CUTS OFF", "REASON")
        for one in every:
            grid.add_row(one.id, one.phase, one.at[:19], ", ".join(t.name for t in one.targets), one.reason)
        print_grid(grid)
        if missing:
            say(f"bulkhead: NOT cut off: {', '.join(missing)}; run: bulkhead incident resume SEAL")
    sys.exit(NO if wrong else 0)


@incident.command()
@click.option("--out", type=click.Path(path_type=Path), help="The archive [default: seals/evidence-TIME.tar.gz].")
@state_option
@security_dir_option
@guarded
def evidence(out: Path | None, file: Path, security_dir: Path) -> None:
    """Save the same evidence without cutting anything off."""
    collection, disk = _collection(file, security_dir), Disk()
    collection.begin()
    disk.directory(security_dir / "seals")
    path = out or security_dir / "seals" / f"evidence-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}.tar.gz"
    disk.write(path.absolute(), collection.archive())
    click.echo(path)


@incident.command("revoke-all")
@security_dir_option
@json_option
@guarded
def revoke_all(security_dir: Path, as_json: bool) -> None:
    """Replace every certificate that we have a key of, and revoke what was before. Where the CA is."""
    made, left = Pki(security_dir / "pki").replace_all()
    if as_json:
        print_json({"replaced": [one.name for one in made], "not_replaced": left})
    else:
        click.echo("\n".join(one.name for one in made))
    if left:
        say(f"bulkhead: not replaced, their keys are elsewhere: {', '.join(left)}; request and sign them anew")
    sys.exit(NO if left else 0)


def _rotate_keys(security_dir: Path) -> None:
    command = [sys.executable, "-m", "controller", "wg", "rotate", "--security-dir", str(security_dir)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise BulkheadError(
            f"the WireGuard key is as it was: {said or f'exit {done.returncode}'}; run: bulkhead wg rotate"
        )


@incident.command("rotate-keys")
@security_dir_option
@guarded
def rotate_keys(security_dir: Path) -> None:
    """Replace this machine's WireGuard keys: `bulkhead wg rotate`. To be run on every machine."""
    _rotate_keys(security_dir)
    click.echo("rotated")


def recovery(seals: Seals, one: Seal, file: Path, security_dir: Path, root: Path) -> Recovery:
    """The steps after the seal `one`."""

    def evidence_kept() -> str:
        import hashlib

        path = seals.directory / one.id / "evidence.tar.gz"
        try:
            same = hashlib.sha256(path.read_bytes()).hexdigest() == one.evidence_sha256
        except OSError as exc:
            return f"{path} cannot be read: {exc.strerror}"
        return "" if same else f"{path} is not what was saved; find out who changed it"

    def certificates_new() -> str:
        sealed = dt.datetime.fromisoformat(one.at)
        holder = Pki(security_dir / "pki").holder
        found = {name: holder.current(name) for name in holder.names()}
        # A certificate is made valid a little before it is made.
        old = [
            n for n, c in found.items() if c is not None and c.not_valid_before_utc < sealed - dt.timedelta(minutes=5)
        ]
        return f"from before the incident: {', '.join(old)}" if old else ""

    def lines(but: frozenset[str] = frozenset()) -> str:
        bad = [f for f in judge(*look(file, security_dir, root)) if f.status is Status.BAD and f.check not in but]
        return "; ".join(f"{f.check}: {f.seen}" for f in bad)

    def firewall() -> str:
        found = firewall_difference(file)
        return found.why if isinstance(found, Gap) else found

    def unsealed() -> str:
        return "" if seals.get(one.id).phase == "unsealed" else "it is sealed"

    while_sealed = frozenset({"wireguard peers", "wireguard handshakes", "upstream"})
    return Recovery(
        seals.directory / one.id,
        (
            Step("evidence", "the evidence is what was saved", evidence_kept, lambda: None),
            Step("review", "read the logs and the evidence, and find out how it happened", lambda: ""),
            Step("rebuild", "rebuild the servers that are cut off, from clean images", lambda: ""),
            Step(
                "certificates",
                "replace every certificate",
                certificates_new,
                lambda: _replace(security_dir, certificates_new()),
            ),
            Step("keys", "replace the WireGuard keys", lambda: "", lambda: _rotate_keys(security_dir)),
            Step("firewall", "the rules are the wanted ones", firewall, lambda: None),
            Step("network", "all that can be green before unsealing is", lambda: lines(while_sealed), lambda: None),
            Step("unseal", "let in again", unsealed, lambda: _ignore(seals.unseal(one.id))),
            Step("verify", "the whole network is green", lines, lambda: None),
        ),
    )


def _replace(security_dir: Path, left: str) -> None:
    """Replace every certificate; where the CA is elsewhere people do it, and it is done when none is `left`."""
    pki = Pki(security_dir / "pki")
    if not pki.is_ca:
        if not left:
            return
        raise BulkheadError(
            f"the CA is not on this machine. For each of {', '.join(pki.holder.names())}: bulkhead pki request NAME here, "
            "bulkhead pki sign where the CA is, bulkhead pki accept here; then run this again"
        )
    pki.replace_all()


def _ignore(_value: object) -> None:
    pass


@incident.command()
@click.argument("seal_id")
@click.option("--done", "said", multiple=True, metavar="STEP", help="A step that people do is done; repeatable.")
@click.option("--stop-after", metavar="STEP", help="Go no further than this step.")
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), help="Where etc/systemd/system is.")
@state_option
@security_dir_option
@run_dir_option
@json_option
@guarded
def recover(
    seal_id: str,
    said: tuple[str, ...],
    stop_after: str | None,
    root: Path,
    file: Path,
    security_dir: Path,
    run_dir: Path,
    as_json: bool,
) -> None:
    """Walk the way back from the seal SEAL_ID, step by step; run it again to go on where it stopped. Exit 1: not done yet."""
    seals = _seals(security_dir, run_dir)
    walk = recovery(seals, seals.get(seal_id), file, security_dir, root)
    told: dict[str, str] = {}
    for step, why in walk.walk(frozenset(said), stop_after):
        told[step.name] = why
        if not as_json:
            click.echo(f"{step.name:14} {why or 'done'}")
    done = walk.done()
    left = [step.name for step in walk.steps if step.name not in done]
    if as_json:
        print_json({"done": done, "left": left, "why": told})
    elif left:
        say(f"left: {', '.join(left)}")
    sys.exit(NO if left else 0)


# - chores


@click.command()
@click.argument("which", type=click.Choice(["minute", "hourly", "weekly", "monthly"]))
@click.argument("file", type=click.Path(path_type=Path), default=STATE_FILE)
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), help="Where etc/systemd/system is.")
@click.option(
    "--store-db", type=click.Path(path_type=Path), default=STORE_DB, show_default=True, help="The store's file."
)
@security_dir_option
@run_dir_option
@json_option
@guarded
def chores(
    which: str, file: Path, root: Path, store_db: Path, security_dir: Path, run_dir: Path, as_json: bool
) -> None:
    """Do what the guide wants every minute, hour, week or month, of the machine that FILE describes; exit 1 if something is bad.

    minute: health and configuration. hourly: certificates that are due are renewed where the CA is, lists of revocations are
    made anew, and what other users' directories have is brought up to date. weekly: health, who has access, what expires, the
    firewall. monthly: all of that, and back-ups of certificates and store are restored aside and looked at.
    """
    notes: dict[str, Any] = {}
    tasks: dict[str, Callable[[], str]] = {"renewal": lambda: _renewed(security_dir, notes)}
    if which != "hourly":
        tasks = {
            "network": lambda: _network(file, security_dir, root),
            "seals": lambda: ", ".join(_seals(security_dir, run_dir).not_enforced()),
        }
    if which in ("weekly", "monthly"):
        tasks |= {
            "access": lambda: _access(security_dir, notes),
            "expiry": lambda: "; ".join(f"{d.subject}: {d.why}" for d in report.due(security_dir / "pki")),
            "firewall": lambda: _text(firewall_difference(file)),
        }
    if which == "monthly":
        tasks = {"renewal": lambda: _renewed(security_dir, notes)} | tasks
        tasks |= {
            "restore pki": lambda: _rehearse_pki(security_dir, notes),
            "restore store": lambda: _rehearse_store(store_db, notes),
        }
    found: dict[str, str] = {}
    unknown = False
    for name, task in tasks.items():
        try:
            found[name] = task()
        except (BulkheadError, OSError) as exc:
            found[name], unknown = f"could not be found out: {exc}", True
    bad = {name: why for name, why in found.items() if why}
    if bad:
        with _events(security_dir) as tell:
            for name, why in bad.items():
                tell(Event(Kind.CHECK_FAILED, f"{which} chores: {name}: {why}"[:2000], object=name))
    if as_json:
        print_json({"chores": found, "notes": notes})
    else:
        grid = columns("CHORE", "FOUND")
        for name, why in found.items():
            grid.add_row(name, why or notes.get(name, "good"))
        print_grid(grid)
    sys.exit(
        0 if not bad else UNKNOWN if unknown and len(bad) == sum("could not be" in w for w in bad.values()) else NO
    )


def _text(found: str | Gap) -> str:
    return found.why if isinstance(found, Gap) else found


def _network(file: Path, security_dir: Path, root: Path) -> str:
    bad = [f for f in judge(*look(file, security_dir, root)) if f.status is Status.BAD]
    return "; ".join(f"{f.check}: {f.seen}" for f in bad)


def _access(security_dir: Path, notes: dict[str, Any]) -> str:
    """Who may do what, for a person to read: nothing of it is bad by itself."""
    names = [client.name for client in Registry(router_home(security_dir) / "hpke").clients()]
    notes["access"] = (
        f"clients that may ask: {', '.join(names) or 'none'}; revoke who should not: bulkhead client revoke"
    )
    return ""


def _renewed(security_dir: Path, notes: dict[str, Any]) -> str:
    pki = Pki(security_dir / "pki")
    if pki.is_ca:
        notes["renewal"] = f"renewed: {', '.join(one.name for one in pki.renew_due()) or 'none was due'}"
        return ""
    notes["renewal"] = "the CA is elsewhere; what is due is renewed there"
    return "; ".join(delivery.Deliveries(pki.holder).refresh())


def _rehearse_pki(security_dir: Path, notes: dict[str, Any]) -> str:
    """Make a back-up, restore it elsewhere and look whether every certificate of it works."""
    if not Pki(security_dir / "pki").is_ca:
        notes["restore pki"] = "the CA is elsewhere; it is rehearsed there"
        return ""
    with tempfile.TemporaryDirectory(prefix="bulkhead-rehearsal-") as temp:
        file, there = Path(temp, "pki.backup"), Path(temp, "pki")
        archive.backup(security_dir / "pki", file)
        archive.restore(file, there)
        names = Pki(there).holder.names()
        bad = [
            f"{name}: {c.what}"
            for name in names
            for c in report.checks(there, name)
            if not c.good and c.what != "renewal"
        ]
    return "; ".join(bad)


def _rehearse_store(database: Path, notes: dict[str, Any]) -> str:
    """Read the store's file as another server would, from a copy."""
    if not database.is_file():
        notes["restore store"] = f"there is no store in {database}"
        return ""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bulkhead-rehearsal-") as temp:
        copy = Path(temp, "store.db")
        copy.write_bytes(database.read_bytes())
        name = subprocess.run(["ovsdb-tool", "db-name", str(copy)], capture_output=True, text=True)
    if name.returncode:
        return f"{database} cannot be read: {name.stderr.strip()[:200]}"
    notes["restore store"] = f"{name.stdout.strip()} read back in {time.monotonic() - began:.1f} s"
    return ""
