"""`bulkhead wg`: the WireGuard network between servers. Imports the agent's links, the security guide's keys and what
commands share."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import Any

import click

from controller.agent.resource import Failed
from controller.agent.run import call
from controller.agent.serverlinks import ServerLinks, refuse_overlap, tear_down
from controller.agent.wireguard import Shown, read_dump
from controller.eventlog import EventLog
from controller.events import Event, Kind
from controller.hostmodel import WG_INTERFACE, WG_INTERFACES, WG_SPARE
from controller.problems import BulkheadError
from controller.security.incident.seals import Seals
from controller.security.profile import load_profile
from controller.security.wg import LARGEST, Own, Public, Wg, key_age_days, read_endpoint, read_public
from controller.terminal import (
    NO,
    columns,
    file_argument,
    guarded,
    json_option,
    print_grid,
    print_json,
    run_dir_option,
    security_dir_option,
)

FRESH_S = 180
_path = click.Path(path_type=Path)
out_option = click.option("--out", type=_path, help="Write the public half there as well, to hand it over.")


@click.group()
def wg() -> None:
    """The WireGuard network between servers: make keys, exchange public halves, keep it up, replace a key. Root.

    Each server makes its own key and hands its public half to the others; the private one never leaves it.
    """


def _require_root() -> None:
    if os.geteuid() != 0:
        raise BulkheadError("only root may read WireGuard keys and change interfaces; run it with sudo")


def _wg(security_dir: Path) -> Wg:
    _require_root()
    return Wg(security_dir.absolute() / "wg")


def _hand_over(own: Own, out: Path | None, as_json: bool, done: str) -> None:
    public = own.public
    if out is not None:
        try:
            out.write_text(public.text())
        except OSError as exc:
            raise BulkheadError(f"{out} cannot be written: {exc.strerror}") from exc
    if as_json:
        print_json(public.as_json() | {"key_age_days": round(key_age_days(own), 2)})
        return
    click.echo(f"{done}\n{public.name} {public.address} {public.newest_key}")
    if out is not None:
        click.echo(f"hand {out} over to the other servers; there: bulkhead wg add STATE_FILE {out.name}")


@wg.command()
@file_argument
@click.option("--endpoint", metavar="HOST:PORT", help="Where the others reach this machine, such as 192.0.2.7:51820.")
@out_option
@security_dir_option
@json_option
@guarded
def init(file: Path, endpoint: str | None, out: Path | None, security_dir: Path, as_json: bool) -> None:
    """Make this machine's key, unless it has one, for the profile in a state FILE; print the public half."""
    _require_root()
    profile = load_profile(file)
    asyncio.run(refuse_overlap(profile))
    given = read_endpoint(endpoint, "--endpoint") if endpoint is not None else None
    _hand_over(_wg(security_dir).init(profile, given), out, as_json, "the key is there")


@wg.command()
@out_option
@security_dir_option
@json_option
@guarded
def export(out: Path | None, security_dir: Path, as_json: bool) -> None:
    """Print this machine's public half, and the next one while the key is being replaced."""
    _hand_over(_wg(security_dir).own(), out, as_json, "the public half of")


@wg.command()
@file_argument
@click.argument("public", type=_path)
@click.option("--replace", "replaces", is_flag=True, help="Take another key than before at once. Packets are lost.")
@security_dir_option
@json_option
@guarded
def add(file: Path, public: Path, replaces: bool, security_dir: Path, as_json: bool) -> None:
    """Take a peer's PUBLIC half, as its `bulkhead wg export` wrote it; FILE is this machine's state file."""
    own, profile = _wg(security_dir), load_profile(file)
    try:
        with public.open() as stream:
            text = stream.read(LARGEST + 1)
    except (OSError, UnicodeDecodeError) as exc:
        raise BulkheadError(f"{public} cannot be read: {getattr(exc, 'strerror', 'it is no text')}") from None
    added = own.add(read_public(text, str(public)), profile, replaces=replaces)
    if as_json:
        print_json(added.as_json())
    else:
        click.echo(f"{added.name} {added.address} is known" + (", and its next key" if added.next_key else ""))


@wg.command()
@click.argument("name")
@security_dir_option
@json_option
@guarded
def remove(name: str, security_dir: Path, as_json: bool) -> None:
    """Forget what the peer NAME has handed over. A peer with a key in the state file stays."""
    if not _wg(security_dir).remove(name):
        raise BulkheadError(f"nothing was handed over by {name}; see who is known: bulkhead wg show STATE_FILE")
    if as_json:
        print_json({"removed": name})
    else:
        click.echo(f"{name} is forgotten")


@wg.command()
@click.option("--finish", is_flag=True, help="Do not wait any longer for peers that have not moved.")
@click.option("--abandon", is_flag=True, help="Keep the old key after all.")
@out_option
@security_dir_option
@json_option
@guarded
def rotate(finish: bool, abandon: bool, out: Path | None, security_dir: Path, as_json: bool) -> None:
    """Replace this machine's key, without losing a packet.

    Hands over the next public half. Once every other server has added it all go over to the new key by themselves;
    `bulkhead wg show` says who has not.
    """
    keys = _wg(security_dir)
    if finish and abandon:
        raise BulkheadError("give --finish or --abandon, not both")
    if finish or abandon:
        if not (keys.promote() if finish else keys.abandon()):
            raise BulkheadError("no key is being replaced; begin it: bulkhead wg rotate")
        _hand_over(keys.own(), out, as_json, "the new key counts" if finish else "the old key stays")
        return
    _hand_over(keys.rotate(), out, as_json, "the next key is there; hand its public half over:")


@wg.command()
@file_argument
@run_dir_option
@security_dir_option
@guarded
def run(file: Path, run_dir: Path, security_dir: Path) -> None:
    """Keep the network up for the profile in a state FILE, and replace keys. Ends by SIGTERM, and leaves it up."""
    keys, profile = _wg(security_dir), load_profile(file)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keys.own()
    with EventLog(keys.directory / "events") as log:

        def told(kind: Kind, text: str) -> None:
            log.append(Event(kind, text, object=profile.name))

        seals = Seals(security_dir.absolute() / "seals")
        asyncio.run(ServerLinks(profile, keys, _run_dir(run_dir), told, lambda: _cut_off(seals)).run())


def _cut_off(seals: Seals) -> list[IPv4Network]:
    """The networks of the servers that are sealed now. Raises `BulkheadError`."""
    prefixes = [
        ip_network(prefix)
        for seal in seals.all()
        if seal.in_force
        for target in seal.targets
        if target.kind == "server"
        for prefix in target.prefixes
    ]
    return [prefix for prefix in prefixes if isinstance(prefix, IPv4Network)]


def _run_dir(run_dir: Path) -> Path:
    return run_dir.absolute() / "wg"


@wg.command()
@run_dir_option
@guarded
def down(run_dir: Path) -> None:
    """Take the network's interfaces away. Keys stay."""
    _require_root()
    asyncio.run(tear_down(_run_dir(run_dir)))


@wg.command()
@file_argument
@security_dir_option
@json_option
@guarded
def show(file: Path, security_dir: Path, as_json: bool) -> None:
    """Show peers with their handshakes; exit 1 unless each has had one within 3 minutes."""
    keys, profile = _wg(security_dir), load_profile(file)
    own, peers = keys.own(), keys.peers(profile)
    shown = {name: found for name in WG_INTERFACES if (found := asyncio.run(_shown(name))) is not None}
    if not shown:
        raise BulkheadError(f"there is no interface {WG_INTERFACE}; bring it up: bulkhead wg run {file}")
    rows = [_row(peer, shown) for peer in peers]
    keyless = [one.name for one in profile.peers if all(one.name.lower() != peer.name.lower() for peer in peers)]
    good = bool(rows) and not keyless and all(row["fresh"] for row in rows)
    if as_json:
        rotating = own.next_key is not None
        about = own.public.as_json() | {"key_age_days": round(key_age_days(own), 2), "rotating": rotating}
        print_json({"own": about, "interfaces": sorted(shown), "peers": rows, "without_key": keyless})
    else:
        _print(own, rows, keyless)
    sys.exit(0 if good else NO)


async def _shown(name: str) -> Shown | None:
    try:
        return read_dump(await call("wg", "show", name, "dump", timeout_s=2, secret=True))
    except Failed:
        return None


def _row(peer: Public, shown: dict[str, Shown]) -> dict[str, Any]:
    best: dict[str, Any] = {"handshake_s": None, "received": 0, "sent": 0, "at": None, "moved": False}
    for name, found in shown.items():
        seen = found.peers.get(peer.newest_key if name == WG_SPARE else peer.public_key)
        if seen is None:
            continue
        best["received"] += seen.received
        best["sent"] += seen.sent
        age = max(0, round(time.time() - seen.handshake)) if seen.handshake else None
        if age is not None and (best["handshake_s"] is None or age < best["handshake_s"]):
            best["handshake_s"], best["at"] = age, seen.endpoint
        best["moved"] = best["moved"] or (name == WG_SPARE and age is not None and age < FRESH_S)
    fresh = best["handshake_s"] is not None and best["handshake_s"] < FRESH_S
    return peer.as_json() | best | {"fresh": fresh}


def _print(own: Own, rows: list[dict[str, Any]], keyless: list[str]) -> None:
    click.echo(f"{own.name} {own.address} {own.public.public_key} (made {key_age_days(own):.1f} days ago)")
    if own.next_key is not None:
        late = [row["name"] for row in rows if not row["moved"]]
        click.echo(f"its key is being replaced; not there yet: {', '.join(late) or 'nobody, it ends by itself'}")
    grid = columns("peer", "address", "at", "handshake", "received", "sent", "key")
    for row in rows:
        age = f"{row['handshake_s']} s ago" if row["handshake_s"] is not None else "never"
        grid.add_row(
            *(row["name"], row["address"], row["at"] or row.get("endpoint", ""), age, str(row["received"])),
            *(str(row["sent"]), row["public_key"] + (" (being replaced)" if row.get("next_key") else "")),
        )
    print_grid(grid)
    for name in keyless:
        click.echo(f"{name} has handed over nothing yet: bulkhead wg add STATE_FILE PUBLIC")
