"""`bulkhead client`: who may ask the router, the keys for it, and asking it."""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from controller.problems import BulkheadError
from controller.terminal import NO, columns, guarded, json_option, print_grid, print_json, router_dir_option, say

if TYPE_CHECKING:
    from controller.security.hpke import Client, RouterKeys

SUITES = ("auth", "base+ed25519")
_DAY_S = 86400


@click.group()
def client() -> None:
    """Clients of the router: their keys, who is let in, and asking."""


@client.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--suite", type=click.Choice(SUITES), default="auth", show_default=True, help="How it will seal.")
@json_option
@guarded
def keygen(file: Path, suite: str, as_json: bool) -> None:
    """Make a key in FILE, which must not exist yet, and its public half in FILE.pub.

    FILE never leaves this machine. Hand FILE.pub to whoever runs the router.
    """
    from controller.security.hpke import ClientKey
    from controller.security.hpke.files import write_new

    key = ClientKey.new(suite)
    public_file = file.with_name(f"{file.name}.pub")
    write_new(file, key.reveal() + "\n")
    try:
        write_new(public_file, f"{key.public}\n", 0o644)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    if as_json:
        print_json({"id": key.public.id, "suite": suite, "public": str(key.public), "file": str(file)})
        return
    say(f"client {key.public.id}; on the router: bulkhead client register NAME {public_file}")
    click.echo(str(key.public))


@client.command()
@click.argument("name")
@click.argument("public", metavar="FILE.pub")
@router_dir_option
@json_option
@guarded
def register(name: str, public: str, security_dir: Path, as_json: bool) -> None:
    """Let a client in under NAME. FILE.pub is what its keygen wrote, or - for standard input."""
    from controller.security.hpke import PublicKey, Registry

    key = PublicKey.parse(_text(public))
    _become_owner(security_dir)
    made = Registry(security_dir / "hpke").register(name, key)
    _tell(security_dir, made)
    if as_json:
        print_json(_row(made))
    else:
        click.echo(f"client {made.name} ({made.id}) may ask, with the suite {made.suite}")


@client.command("list")
@router_dir_option
@json_option
@guarded
def list_clients(security_dir: Path, as_json: bool) -> None:
    """List clients, the revoked ones too."""
    from controller.security.hpke import Registry

    _become_owner(security_dir)
    found = Registry(security_dir / "hpke").clients()
    if as_json:
        print_json({"clients": [_row(each) for each in found]})
        return
    grid = columns("NAME", "ID", "SUITE", "REGISTERED", "REVOKED")
    for each in found:
        grid.add_row(each.name, each.id, each.suite, _moment(each.registered_at), _moment(each.revoked_at))
    print_grid(grid)


@client.command()
@click.argument("name_or_id", metavar="NAME|ID")
@router_dir_option
@json_option
@guarded
def revoke(name_or_id: str, security_dir: Path, as_json: bool) -> None:
    """Shut a client out, for good. The running router refuses its next request."""
    from controller.security.hpke import Registry

    _become_owner(security_dir)
    gone = Registry(security_dir / "hpke").revoke(name_or_id)
    _tell(security_dir, gone)
    if as_json:
        print_json(_row(gone))
    else:
        click.echo(f"client {gone.name} ({gone.id}) is refused since {_moment(gone.revoked_at)}")


@client.command()
@click.argument("url")
@click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path),
    required=True,
    envvar="BULKHEAD_CLIENT_KEY",
    help="The file of keygen.",
)
@click.option("--json", "body", metavar="BODY", help="Send this JSON; - for standard input.")
@click.option("--method", metavar="METHOD", help="Default: POST with a body, GET without.")
@click.option("--stream", is_flag=True, help="Print the answer as it comes.")
@click.option("--ca", type=click.Path(path_type=Path), help="Certificates to believe, instead of the system's.")
@click.option("--cert", type=click.Path(path_type=Path), help="A certificate to show, with its key in --cert-key.")
@click.option("--cert-key", type=click.Path(path_type=Path), help="The key of --cert.")
@click.option("--router", "pin", metavar="IDENTITY", help="The identity that the router must have.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=600, show_default=True, help="Seconds.")
@guarded
def call(
    url: str,
    key_file: Path,
    body: str | None,
    method: str | None,
    stream: bool,
    ca: Path | None,
    cert: Path | None,
    cert_key: Path | None,
    pin: str | None,
    timeout_s: float,
) -> None:
    """Ask a router and print the answer. The exit code is 1 where it is an error."""
    import httpx

    from controller.security.hpke import ClientKey
    from controller.security.hpke.client import RouterClient, Unanswered

    key = ClientKey.load(key_file)
    content = _json(body) if body is not None else b""
    try:
        target = httpx.URL(url).raw_path.decode("ascii")
    except httpx.InvalidURL as exc:
        raise BulkheadError(f"{url} is not an address: {exc}") from exc
    asked = (method or ("POST" if body is not None else "GET"), target, content, "application/json" if content else "")
    with RouterClient(url, key, tls=_tls(ca, cert, cert_key), pin=_pin(pin), timeout_s=timeout_s) as router:
        try:
            with router.stream(*asked) as answer:
                if stream:
                    for data in answer:
                        sys.stdout.buffer.write(data)
                        sys.stdout.buffer.flush()
                else:
                    whole = b"".join(answer)  # print nothing of an answer that turns out to be cut
                    sys.stdout.buffer.write(whole)
                    sys.stdout.buffer.flush()
                status = answer.status
        except Unanswered as exc:
            say(f"bulkhead: {exc}")
            sys.exit(NO)
    if status >= 400:
        say(f"bulkhead: the server answered {status}")
        sys.exit(NO)


@client.group("router-keys")
def router_keys() -> None:
    """The router's own HPKE keys."""


@router_keys.command()
@click.option("--overlap", "overlap_h", type=click.IntRange(0, 24 * 90), default=24, show_default=True, help="Hours.")
@router_dir_option
@json_option
@guarded
def rotate(overlap_h: int, security_dir: Path, as_json: bool) -> None:
    """Make a new key. The old ones are good for --overlap more; what is past its end leaves the disk."""
    keys = _router_keys(security_dir)
    made = keys.rotate(overlap_h * 3600)
    if as_json:
        print_json(_told(keys))
    else:
        click.echo(f"router key {made.id} is used from now on, the older ones for another {overlap_h} h at most")


@router_keys.command()
@router_dir_option
@json_option
@guarded
def prune(security_dir: Path, as_json: bool) -> None:
    """Remove keys past their end from the disk."""
    keys = _router_keys(security_dir)
    count = keys.prune()
    if as_json:
        print_json({"removed": count})
    else:
        click.echo(f"{count} key(s) removed")


@router_keys.command("list")
@router_dir_option
@json_option
@guarded
def list_keys(security_dir: Path, as_json: bool) -> None:
    """List the router's keys and its identity, which clients may pin."""
    told = _told(_router_keys(security_dir))
    if as_json:
        print_json(told)
        return
    grid = columns("KEY", "MADE", "AGE", "GOOD UNTIL")
    for key in told["keys"]:
        age = f"{max(0, int(time.time()) - key['made_at']) // _DAY_S} d"
        grid.add_row(key["id"], _moment(key["made_at"]), age, _moment(key["until"]) or "the next rotation")
    print_grid(grid)
    click.echo(f"identity {told['identity']}")


def _router_keys(security_dir: Path) -> RouterKeys:
    from controller.security.hpke import RouterKeys

    _become_owner(security_dir)
    return RouterKeys(security_dir / "hpke")


def _become_owner(security_dir: Path) -> None:
    """From here on only what the router's own user may do is done there."""
    from controller.security.hpke.files import become_owner

    become_owner(security_dir, security_dir / "hpke", security_dir / "hpke/clients")


def _told(keys: RouterKeys) -> dict[str, Any]:
    from controller.security.hpke.wire import b64

    usable = keys.usable(time.time())
    rows = [{"id": k.id, "public": b64(k.public), "made_at": k.made_at, "until": k.until} for k in usable]
    return {"identity": b64(keys.identity()), "keys": rows}


def _row(who: Client) -> dict[str, Any]:
    times = {"registered_at": who.registered_at, "revoked_at": who.revoked_at}
    return {"name": who.name, "id": who.id, "suite": who.suite, "public": who.public, **times}


def _moment(at: int | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def _text(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.read(1 << 24)
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise BulkheadError(f"{name} cannot be read: {exc}; expected a text file") from exc


def _json(body: str) -> bytes:
    text = _text(body) if body == "-" else body
    try:
        json.loads(text)
        return text.encode()
    except (ValueError, RecursionError) as exc:
        raise BulkheadError(f"--json: this is not JSON: {exc}") from exc


def _pin(text: str | None) -> bytes | None:
    from controller.security.hpke.wire import Malformed, unb64

    if text is None:
        return None
    try:
        raw = unb64(text)
    except (Malformed, UnicodeEncodeError):
        raw = b""
    if len(raw) != 32:
        raise BulkheadError(f"--router {text}: expected the identity that `bulkhead client router-keys list` shows")
    return raw


def _tls(ca: Path | None, cert: Path | None, cert_key: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, cert_key)
    except OSError as exc:
        raise BulkheadError(f"--ca or --cert: {exc.strerror or exc}; expected files with certificates in PEM") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _tell(security_dir: Path, who: Client) -> None:
    """Write it to the log of events, unless a router has that open: then the router tells it."""
    from controller.eventfiles import EventLogError
    from controller.eventlog import EventLog
    from controller.events import Event, Kind

    kind = Kind.CLIENT_REGISTERED if who.active else Kind.CLIENT_REVOKED
    did = "registered" if who.active else "revoked"
    directory = security_dir / "events"
    with suppress(EventLogError, OSError):
        # A log that root began is one that the router, as another user, could not go on with.
        if directory.stat().st_uid == os.geteuid():
            with EventLog(directory) as log:
                log.append(Event(kind, f"client {who.name} is {did}", object=who.name, data={"id": who.id}))
