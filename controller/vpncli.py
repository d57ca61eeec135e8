"""`bulkhead vpn`: who may connect to the VPN server.

By the HTTP API, or with `--file` on the files of this host, where none runs. Imports the agent's vpn, late.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from controller.agentcli import state_dir_option
from controller.apiterm import client_names, moment, rows, use_api, where_options
from controller.client import Where, segment
from controller.hostmodel import Endpoint, VpnServer
from controller.problems import BulkheadError
from controller.statefile import load
from controller.terminal import NO, columns, json_option, print_grid, print_json, say
from controller.vpnpool import configuration

if TYPE_CHECKING:
    from controller.agent.wireguard import PeerStatus

TAKEN_S = 3.0

file_option = click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="Without the API: of the VPN server of this state file, in files of this host. Root.",
)


@click.group()
def vpn() -> None:
    """Add, list and remove clients of the VPN server. A running agent takes them over within a second."""


def _server(file: Path) -> VpnServer:
    if os.geteuid() != 0:
        raise BulkheadError("VPN clients have keys that only root may read; run it with sudo")
    server = load(file).host.vpn
    if server is None:
        raise BulkheadError(f"{file} has no VPN server; declare one under wireguard.vpn_server")
    return server


@vpn.command()
@click.argument("name")
@click.option("--endpoint", help="HOST:PORT that the client dials (default: wireguard.vpn_server.endpoint).")
@click.option("--qr/--no-qr", default=None, help="A QR code for phones (default: on a terminal).")
@file_option
@state_dir_option
@json_option
@where_options
def add(
    where: Where,
    name: str,
    endpoint: str | None,
    qr: bool | None,
    file: Path | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Make a client NAME of the VPN server, and print its configuration in wg-quick's style.

    The configuration holds the client's private key. It is shown this once and not kept.
    """
    dialled = _endpoint(endpoint) if endpoint is not None else None
    if file is not None:
        _add_to_files(file, name, dialled, qr, state_dir, as_json)
        return
    with use_api(where, as_json) as api:
        made = api.post("/api/vpn/clients", {"name": name} | ({"endpoint": str(dialled)} if dialled else {}))
    if as_json:
        print_json(made)
        return
    _show_configuration(made["name"], made["address"], made["config"], qr)


def _show_configuration(name: str, address: str, text: str, qr: bool | None) -> None:
    say(f"client {name} has address {address}; this is shown once, the private key is not kept:")
    click.echo(text)
    if qr if qr is not None else sys.stdout.isatty():
        import segno

        segno.make(text, error="l").terminal(compact=True)


def _add_to_files(
    file: Path, name: str, endpoint: Endpoint | None, qr: bool | None, state_dir: Path, as_json: bool
) -> None:
    from controller.agent.keys import KeyStore
    from controller.agent.vpn import Clients, Refused, server_public_key

    server = _server(file)
    dialled = endpoint or server.endpoint
    if dialled is None:
        raise BulkheadError("nobody says where clients connect to; give --endpoint HOST:PORT, or write it in the file")
    server_key = server_public_key(server, KeyStore(state_dir / "keys"))  # before anything is made
    try:
        client, private = Clients(state_dir / "vpn").add(name, server.pool)
    except Refused as exc:
        say(f"bulkhead: {exc}")
        sys.exit(NO)
    text = configuration(client.address, private, client.preshared_key, server, dialled, server_key)
    taken = asyncio.run(_taken_over(server, client.public_key, there=True))
    if as_json:
        print_json({"name": client.name, "address": str(client.address), "active": taken, "config": text})
        return
    if not taken:
        say("the VPN server does not know it yet; it will once the agent runs: bulkhead status")
    _show_configuration(client.name, str(client.address), text, qr)


def _endpoint(text: str) -> Endpoint:
    found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9.-]*):([0-9]{1,5})", text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise BulkheadError(f"--endpoint {text!r} is not HOST:PORT, such as vpn.example.org:51820")
    return Endpoint(found[1], int(found[2]))


@vpn.command("list")
@file_option
@state_dir_option
@json_option
@where_options
def list_clients(where: Where, file: Path | None, state_dir: Path, as_json: bool) -> None:
    """List the clients of the VPN server; with --file also their last handshake and traffic."""
    if file is not None:
        _list_files(file, state_dir, as_json)
        return
    with use_api(where, as_json) as api:
        found = api.get("/api/vpn/clients")
    if as_json:
        print_json(found)
        return
    values = ((c["name"], c["address"], c["node"], moment(c["created_at"]), c["created_by"]) for c in found["clients"])
    print_grid(rows(columns("NAME", "ADDRESS", "NODE", "ADDED", "BY"), values))


def _list_files(file: Path, state_dir: Path, as_json: bool) -> None:
    from controller.agent.vpn import Clients
    from controller.agent.wireguard import RECENT_S

    server = _server(file)
    status = asyncio.run(_status(server))
    rows: list[dict[str, Any]] = []
    for client in Clients(state_dir / "vpn").all():
        seen = (status or {}).get(client.public_key)
        rows.append(
            {
                "name": client.name,
                "address": str(client.address),
                "added": client.added,
                "connected": seen is not None and seen.age_s is not None and seen.age_s < RECENT_S,
                "endpoint": seen.endpoint if seen is not None else "",
                "handshake_age_s": round(seen.age_s, 1) if seen is not None and seen.age_s is not None else None,
                "received": seen.received if seen is not None else 0,
                "sent": seen.sent if seen is not None else 0,
            }
        )
    if as_json:
        print_json(rows)
        return
    grid = columns("NAME", "ADDRESS", "LAST HANDSHAKE", "RECEIVED", "SENT", "FROM")
    for row in rows:
        age = row["handshake_age_s"]
        when = "never" if age is None else f"{age:.0f} s ago"
        grid.add_row(row["name"], row["address"], when, _bytes(row["received"]), _bytes(row["sent"]), row["endpoint"])
    print_grid(grid)
    if status is None:
        say("the VPN server does not run, so nothing is known of their traffic; see: bulkhead status")


async def _status(server: VpnServer) -> dict[str, PeerStatus] | None:
    from controller.agent.build import namespace_of
    from controller.agent.wireguard import show

    try:
        return {
            peer.public_key: peer for peer in await show(server.tunnel.interface, namespace_of(server.container_id))
        }
    except BulkheadError:
        return None


async def _taken_over(server: VpnServer, key: str, *, there: bool) -> bool:
    """Whether the running server knows a client, or knows it no more, as the agent has it within a second."""
    deadline = time.monotonic() + TAKEN_S
    while True:
        status = await _status(server)
        if status is None:
            return not there
        if (key in status) == there:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@vpn.command()
@click.argument("name", shell_complete=client_names)
@file_option
@state_dir_option
@json_option
@where_options
def remove(where: Where, name: str, file: Path | None, state_dir: Path, as_json: bool) -> None:
    """Remove client NAME: it cannot connect any more, and its address is free."""
    if file is not None:
        _remove_from_files(file, name, state_dir, as_json)
        return
    with use_api(where, as_json) as api:
        gone = api.delete(f"/api/vpn/clients/{segment(name)}")
    if as_json:
        print_json(gone if gone is not None else {"name": name, "removed": True})
    else:
        click.echo(f"client {name} is removed")


def _remove_from_files(file: Path, name: str, state_dir: Path, as_json: bool) -> None:
    from controller.agent.vpn import Clients, Refused

    server = _server(file)
    try:
        key = Clients(state_dir / "vpn").remove(name)
    except Refused as exc:
        say(f"bulkhead: {exc}")
        sys.exit(NO)
    cut_off = asyncio.run(_taken_over(server, key, there=False))
    if as_json:
        print_json({"name": name, "removed": True, "cut_off": cut_off})
        return
    click.echo(f"client {name} is removed" + (" and cut off" if cut_off else ""))
    if not cut_off:
        say("the VPN server still knows it; it will forget it once the agent runs: bulkhead status")
