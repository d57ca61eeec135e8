"""`bulkhead token`: who may ask the HTTP API from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from controller.apiterm import asks_api, duration_s, moment, rows, token_ids
from controller.client import Api, segment
from controller.problems import BulkheadError
from controller.terminal import columns, json_option, print_grid, print_json, say

SCOPES = ("read", "operate", "approve")


@click.group()
def token() -> None:
    """Make, list and revoke bearer tokens for the API."""


@token.command("create")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    default=("read",),
    show_default=True,
    help="What it may do: look, change, approve. May be repeated.",
)
@click.option("--expires-in", "expires", metavar="TIME", help="30d, 12h (default: 30d).")
@click.option("--output", type=click.Path(path_type=Path), help="Write it to this new file, of mode 600.")
@json_option
@asks_api
def create(
    api: Api, name: str, scopes: tuple[str, ...], expires: str | None, output: Path | None, as_json: bool
) -> None:
    """Make a token called NAME. It is shown this once, on standard output alone; what is kept is only its digest."""
    body: dict[str, object] = {"name": name, "scopes": list(dict.fromkeys(scopes))}
    if expires is not None:
        body["expires_in_s"] = duration_s("--expires-in", expires)
    where = _new_file(output) if output is not None else None
    try:
        made = api.post("/api/tokens", body)
    except BaseException:
        if output is not None and where is not None:
            os.close(where)
            output.unlink(missing_ok=True)
        raise
    if where is not None:
        with os.fdopen(where, "w") as sink:
            sink.write(made.pop("token") + "\n")
    if as_json:
        print_json(made)
        return
    may = ", ".join(made["scopes"])
    say(f"token {made['id']} ({made['name']}) may {may}, until {moment(made['expires_at']) or 'it is revoked'}")
    if output is not None:
        say(f"it is in {output}; use it with --token-file")
        return
    say("it is shown this once:")
    click.echo(made["token"])


def _new_file(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise BulkheadError(f"--output {path}: {exc.strerror}; name a new file in a directory of yours") from exc


@token.command("list")
@json_option
@asks_api
def list_tokens(api: Api, as_json: bool) -> None:
    """List tokens, without what makes them work."""
    found: dict[str, Any] = api.get("/api/tokens")
    if as_json:
        print_json(found)
        return
    grid = columns("ID", "NAME", "MAY", "MADE", "BY", "EXPIRES")
    values = (
        (t["id"], t["name"], t["scopes"], moment(t["created_at"]), t["created_by"], moment(t["expires_at"]) or "never")
        for t in found["tokens"]
    )
    print_grid(rows(grid, values))


@token.command("revoke")
@click.argument("number", metavar="ID", shell_complete=token_ids)
@json_option
@asks_api
def revoke(api: Api, number: str, as_json: bool) -> None:
    """Take a token's power away, at once."""
    gone = api.delete(f"/api/tokens/{segment(number)}")
    if as_json:
        print_json(gone if gone is not None else {"id": number})
    else:
        click.echo(f"token {number} is worth nothing any more")
