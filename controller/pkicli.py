"""`bulkhead pki`: the CA and everybody's certificates. Imports the PKI and what commands share."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from controller.problems import BulkheadError
from controller.security.pki import archive, delivery, making, report
from controller.security.pki.authority import SETTLE_S, Issued, Move, Pki
from controller.security.pki.disk import Disk
from controller.security.pki.holder import Holder
from controller.security.pki.identity import DAYS, Identity, Usage
from controller.security.pki.state import Export
from controller.terminal import (
    NO,
    UNKNOWN,
    columns,
    guarded,
    json_option,
    print_grid,
    print_json,
    reporting,
    say,
    security_dir_option,
)
from controller.wgkeys import Secret

LONGEST_PASSPHRASE = 4096
_path = click.Path(path_type=Path)


def passphrase_options(function: Callable[..., None]) -> Callable[..., None]:
    """`passphrase`, from --passphrase-file or --passphrase-fd; never from the command line, where others see it."""

    @click.option(
        "--passphrase-file",
        type=_path,
        envvar="BULKHEAD_PKI_PASSPHRASE_FILE",
        help="Holds the passphrase of the CA's key. Only its owner may read it.",
    )
    @click.option("--passphrase-fd", type=int, help="An open file descriptor to read that passphrase from.")
    @wraps(function)
    def wrapped(*args: Any, passphrase_file: Path | None, passphrase_fd: int | None, **kwargs: Any) -> None:
        with reporting():
            kwargs["passphrase"] = read_passphrase(passphrase_file, passphrase_fd)
        function(*args, **kwargs)

    return wrapped


def read_passphrase(file: Path | None, descriptor: int | None = None) -> Secret | None:
    """The first line of a private file or of a descriptor. Raises `BulkheadError`."""
    if file is None and descriptor is None:
        return None
    if file is not None and descriptor is not None:
        raise BulkheadError("give the passphrase in a file or on a descriptor, not both")
    what = str(file) if file is not None else f"descriptor {descriptor}"
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC) if file is not None else os.dup(descriptor or 0)
        with os.fdopen(opened, "rb") as stream:
            mode = os.fstat(opened).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise BulkheadError(f"{what} may be read by others; make it private: chmod 600 {what}")
            text = stream.read(LONGEST_PASSPHRASE).partition(b"\n")[0].decode()
    except OSError as exc:
        raise BulkheadError(f"the passphrase cannot be read from {what}: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise BulkheadError(f"the passphrase in {what} is no text") from None
    if not text:
        raise BulkheadError(f"there is no passphrase in {what}; write one in its first line")
    return Secret(text)


def _directory(security_dir: Path) -> Path:
    return security_dir.absolute() / "pki"


def _pki(security_dir: Path, passphrase: Secret | None = None) -> Pki:
    return Pki(_directory(security_dir), passphrase=passphrase)


def _as_json(found: Issued) -> dict[str, str]:
    return {
        "name": found.name,
        "serial": found.serial,
        "directory": str(found.current),
        "not_after": found.not_after.isoformat(timespec="seconds"),
        "renew_at": found.renew_at.isoformat(timespec="seconds"),
    }


def _tell_issued(found: list[Issued], as_json: bool) -> None:
    if as_json:
        print_json([_as_json(one) for one in found])
        return
    for one in found:
        click.echo(f"{one.name} has a new certificate until {one.not_after:%Y-%m-%d %H:%M} UTC: {one.current}")


def _tell(as_json: bool, text: str, **value: object) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo(text)


@click.group()
def pki() -> None:
    """The CA and certificates: of router, inference servers, switches, stores and the API.

    Exit codes of needs-renewal, status and verify: 0 all is well, 1 something wants doing, 2 it could not be found out.
    """


@pki.command()
@click.argument("name")
@security_dir_option
@passphrase_options
@json_option
@guarded
def init(name: str, security_dir: Path, passphrase: Secret | None, as_json: bool) -> None:
    """Make a CA called NAME. With a passphrase its key is encrypted."""
    made = _pki(security_dir, passphrase).init(name)
    _tell(as_json, f"there is a CA, {made}, in {_directory(security_dir)}", name=name, id=made)


def names_options(function: Callable[..., None]) -> Callable[..., None]:
    """--kind, --ip, --dns and --days."""
    for option in (
        click.option("--days", type=float, default=DAYS, show_default=True, help="How long each is good for."),
        click.option("--dns", multiple=True, help="A host name it stands for, beside NAME. May be given again."),
        click.option("--ip", "ips", multiple=True, help="An address it stands for. May be given again."),
        click.option(
            "--kind",
            type=click.Choice([one.value for one in Usage]),
            help="server, client, or peer: both (switches, stores, inference).",
        ),
    ):
        function = option(function)
    return function


@pki.command()
@click.argument("name")
@names_options
@security_dir_option
@passphrase_options
@json_option
@guarded
def issue(
    name: str,
    kind: str | None,
    ips: tuple[str, ...],
    dns: tuple[str, ...],
    days: float,
    security_dir: Path,
    passphrase: Secret | None,
    as_json: bool,
) -> None:
    """Make a key and a certificate for NAME here, and use it if a handshake with it works."""
    if kind is None:
        raise BulkheadError(f"what {name} is for is missing; give --kind server, client or peer")
    _tell_issued([_pki(security_dir, passphrase).issue(name, kind, ips, dns, days)], as_json)


@pki.command()
@click.argument("name", required=False)
@click.option("--due", is_flag=True, help="Whatever is due; write revocations anew. For a timer, once an hour.")
@click.option("--back", is_flag=True, help="Use the certificate again that NAME had before.")
@click.option(
    "--all", "everything", is_flag=True, help="Every one, and revoke those before: keys may have been stolen."
)
@security_dir_option
@passphrase_options
@json_option
@guarded
def renew(
    name: str | None,
    due: bool,
    back: bool,
    everything: bool,
    security_dir: Path,
    passphrase: Secret | None,
    as_json: bool,
) -> None:
    """Make a new key and certificate for NAME. The new one is tried first; the old one stays to go back to."""
    found = _pki(security_dir, passphrase)
    if (name is not None) + due + everything != 1 or (back and name is None):
        raise BulkheadError("say whose: a NAME, --due for all that are due, or --all")
    if everything:
        done, elsewhere = found.replace_all()
        _tell_issued(done, as_json)
        if elsewhere:
            say(
                f"bulkhead: keys on other machines are as they were: {', '.join(elsewhere)}; revoke them, or sign new requests"
            )
            sys.exit(NO)
    elif name is None:
        _tell_issued(found.renew_due(), as_json)
    elif back:
        found.back(name)
        _tell(as_json, f"{name} uses an earlier certificate again", name=name)
    else:
        _tell_issued([found.renew(name)], as_json)


@pki.command("needs-renewal")
@security_dir_option
@json_option
@guarded
def needs_renewal(security_dir: Path, as_json: bool) -> None:
    """Whether anything wants doing: certificates, the CA, revocations. Exit 0: no, 1: yes, 2: could not find out."""
    directory = _directory(security_dir)
    found = report.due(directory)
    if (directory / "state.json").exists():
        try:
            Pki(directory).alarm()
        except BulkheadError as exc:
            say(f"bulkhead: what is due is not written to the events: {exc}")
    if as_json:
        print_json(
            [
                {
                    "subject": one.subject,
                    "why": one.why,
                    "fix": one.fix,
                    "ends": one.ends.isoformat(),
                    "alarm": one.alarm,
                }
                for one in found
            ]
        )
    for one in found if not as_json else ():
        click.echo(f"{one.subject}: {one.why}, ends {one.ends:%Y-%m-%d %H:%M} UTC; {one.fix}")
    sys.exit(NO if found else 0)


@pki.command()
@click.argument("name")
@click.option("--host", "hosts", multiple=True, help="A name or address it has to stand for. May be given again.")
@security_dir_option
@json_option
@guarded
def verify(name: str, hosts: tuple[str, ...], security_dir: Path, as_json: bool) -> None:
    """Check NAME's certificate in use: files, key, validity, chain, names, revocation, a handshake, and what openssl says."""
    found = report.checks(_directory(security_dir), name, hosts)
    if as_json:
        print_json([{"what": one.what, "good": one.good, "seen": one.seen, "fix": one.fix} for one in found])
    else:
        for one in found:
            click.secho(f"{'good' if one.good else 'BAD '} {one.what:<11} {one.seen}", fg=None if one.good else "red")
            if not one.good:
                click.echo(f"     to mend it: {one.fix}")
    sys.exit(0 if all(one.good for one in found) else NO)


@pki.command()
@click.argument("name")
@click.option("--undo", is_flag=True, help="NAME may have certificates again. Those before stay revoked.")
@security_dir_option
@passphrase_options
@json_option
@guarded
def revoke(name: str, undo: bool, security_dir: Path, passphrase: Secret | None, as_json: bool) -> None:
    """Revoke every certificate of NAME, and give it none any more. Programs on this host know at once."""
    found = _pki(security_dir, passphrase)
    if undo:
        found.unrevoke(name)
        _tell(as_json, f"{name} may have certificates again; issue one", name=name, revoked=False)
    else:
        found.revoke(name)
        text = f"{name} is revoked; other machines need the new list: bulkhead pki export --trust"
        _tell(as_json, text, name=name, revoked=True)


@pki.command("rotate-ca")
@click.argument("step", type=click.Choice([one.value for one in Move]))
@click.option(
    "--now", is_flag=True, help=f"Do not wait until running programs have read the last change ({SETTLE_S:g} s)."
)
@security_dir_option
@passphrase_options
@json_option
@guarded
def rotate_ca(step: str, now: bool, security_dir: Path, passphrase: Secret | None, as_json: bool) -> None:
    """Replace the CA, in steps: prepare (a new one, both are trusted), switch (certificates of the new one), finish (the
    old one is trusted no more); back undoes the last step. A step that was interrupted is completed by running it again."""
    found = _pki(security_dir, passphrase)
    if not now and step != Move.PREPARE:
        time.sleep(found.unsettled_s())
    state = found.rotate_ca(step, settle_s=0)
    _tell(
        as_json,
        f"the CA's replacement is {state.phase} now. {found.next_step(state)}",
        phase=state.phase,
        active=state.active,
        behind=found.behind(state),
        next=found.next_step(state),
    )


@pki.command()
@click.option("--metrics", is_flag=True, help="In Prometheus' text format.")
@security_dir_option
@json_option
@guarded
def status(metrics: bool, security_dir: Path, as_json: bool) -> None:
    """Show the CA, its replacement, every certificate, and what wants doing; exit 1 if anything does."""
    directory = _directory(security_dir)
    if metrics:
        click.echo(report.metrics(directory), nl=False)
        return
    found = report.status(directory)
    if as_json:
        print_json(found)
    else:
        _print_status(found)
    sys.exit(NO if found["due"] else 0)


def _print_status(found: dict[str, Any]) -> None:
    ca = found["ca"]
    if ca is not None:
        click.echo(f"CA {ca['name']}: {ca['phase']}. {ca['next']}")
        grid = columns("CA", "ROLE", "SUBJECT", "REPLACE AT", "ENDS")
        for one in ca["authorities"]:
            grid.add_row(one["id"], one["role"], one["subject"], one["replace_at"], one["not_after"])
        print_grid(grid)
    grid = columns("NAME", "KIND", "NAMES", "RENEW AT", "ENDS", "STATE")
    for one in found["certificates"]:
        state = "REVOKED" if one["revoked"] else "" if one["key_is_here"] else "key elsewhere"
        times = (one["renew_at"] or "", one["not_after"] or "none")
        grid.add_row(one["name"], one["kind"], " ".join(one["names"]), *times, state)
    print_grid(grid)
    for one in found["crl"]:
        click.echo(f"{one['revoked']} revoked by {one['ca']}; the list is good until {one['next_update']}")
    for one in found["due"]:
        click.secho(f"{one['subject']}: {one['why']}; {one['fix']}", fg="red" if one["alarm"] else "yellow")


@pki.command()
@click.argument("name")
@names_options
@click.option("-o", "--output", type=_path, help="Write it there and not to standard output.")
@security_dir_option
@guarded
def request(
    name: str,
    kind: str | None,
    ips: tuple[str, ...],
    dns: tuple[str, ...],
    days: float,
    output: Path | None,
    security_dir: Path,
) -> None:
    """Make a key for NAME on this machine, and ask for a certificate: sign it where the CA is, then accept what it sends."""
    found = Holder(_directory(security_dir)).request(Identity.checked(name, kind or Usage.PEER, ips, dns, days))
    _write(output, found)


@pki.command()
@click.argument("file", type=_path)
@click.option("--name", help="Whose request it has to be. For one that is not known yet, with --kind, --ip and --dns.")
@names_options
@click.option("-o", "--output", type=_path, help="Write what is to be sent back there and not to standard output.")
@security_dir_option
@passphrase_options
@guarded
def sign(
    file: Path,
    name: str | None,
    kind: str | None,
    ips: tuple[str, ...],
    dns: tuple[str, ...],
    days: float,
    output: Path | None,
    security_dir: Path,
    passphrase: Secret | None,
) -> None:
    """Sign the request in FILE. What is printed is to be accepted on the machine it came from; it holds no secret.

    What may be in the certificate of a name that is new is said here: whoever has the machine could ask for anything.
    """
    granted = None
    if name is not None and kind is not None:
        granted = Identity.checked(name, kind, ips, dns, days, remote=True)
    elif kind is not None or ips or dns:
        raise BulkheadError("to say what a name may have, give --name and --kind, and every --ip and --dns")
    text = _read(file)
    found = _pki(security_dir, passphrase)
    _write(output, found.sign(text, granted, name=name))


@pki.command()
@click.argument("file", type=_path)
@click.option("--new-ca", is_flag=True, help="Trust another CA than before.")
@security_dir_option
@json_option
@guarded
def accept(file: Path, new_ca: bool, security_dir: Path, as_json: bool) -> None:
    """Take up what the CA has sent, from FILE (- for standard input): certificate, trust, revocations. It is tried first."""
    holder = Holder(_directory(security_dir))
    found = holder.accept(_read(file), new_ca=new_ca)
    if failed := delivery.Deliveries(holder).refresh():
        raise BulkheadError(
            f"it is taken up here, but not everywhere: {'; '.join(failed)}; mend that, and accept it again"
        )
    if found is None:
        _tell(as_json, "trust and revocations are taken up", name=None)
        return
    name = making.name_of(found)
    text = f"{name} uses the new certificate, until {found.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    _tell(as_json, text, name=name, not_after=found.not_valid_after_utc.isoformat())


@pki.command()
@click.argument("name", required=False)
@click.option("--trust", is_flag=True, help="Trust and revocations only; they hold no secret.")
@click.option("--to", type=_path, help="A directory for the programs that use NAME, ready to use.")
@click.option("--owner", help="The user that directory is for.")
@click.option("--forget", type=_path, help="Keep that directory up to date no more.")
@click.option("--with-key", is_flag=True, help="With NAME's private key. The CA's key is never in it.")
@click.option("-o", "--output", type=_path, help="Write it there, mode 600, and not to standard output.")
@security_dir_option
@passphrase_options
@guarded
def export(
    name: str | None,
    trust: bool,
    to: Path | None,
    owner: str | None,
    forget: Path | None,
    with_key: bool,
    output: Path | None,
    security_dir: Path,
    passphrase: Secret | None,
) -> None:
    """What a server called NAME needs: to be accepted on its machine, or as a directory for another user of this one.

    With --to the directory is kept up to date by every command from then on: renewed, with new revocations.
    """
    if forget is None and trust == (name is not None):
        raise BulkheadError("say what: a NAME, or --trust")
    user = delivery.find_user(owner).pw_uid if owner else None
    directory = _directory(security_dir)
    if not Pki(directory).is_ca and (forget or (to and name)):
        here = delivery.Deliveries(Holder(directory))
        if forget is not None:
            here.forget(forget.absolute())
            click.echo(f"{forget} is left as it is")
        elif to is not None and name is not None:
            here.add(Export(str(to.absolute()), name, user))
            click.echo(f"{to} is up to date, and is kept so")
        return
    found = _pki(security_dir, passphrase)
    if forget is not None:
        found.forget_export(forget.absolute())
        click.echo(f"{forget} is left as it is")
        return
    if to is not None and name is not None:
        found.export(name, to.absolute(), user)
        click.echo(f"{to} is up to date, and is kept so")
        return
    if with_key and output is None and sys.stdout.isatty():
        raise BulkheadError("a private key is not shown on a terminal; give --output FILE")
    _write(output, found.bundle(name, key=with_key))


@pki.command()
@click.argument("file", type=_path)
@click.option("--backup-passphrase-file", type=_path, help="Encrypt it with the passphrase in that private file.")
@security_dir_option
@guarded
def backup(file: Path, backup_passphrase_file: Path | None, security_dir: Path) -> None:
    """Write everything into FILE, mode 600: CA, keys, who is revoked. Whoever reads it is the CA, so better encrypt it."""
    archive.backup(_directory(security_dir), file.absolute(), read_passphrase(backup_passphrase_file))
    click.echo(f"{file} is written")


@pki.command()
@click.argument("file", type=_path)
@click.option(
    "--replace", "over", is_flag=True, help="What is there is kept beside it; what it has revoked stays revoked."
)
@click.option("--backup-passphrase-file", type=_path, help="Holds the passphrase that FILE is encrypted with.")
@security_dir_option
@passphrase_options
@guarded
def restore(
    file: Path, over: bool, backup_passphrase_file: Path | None, security_dir: Path, passphrase: Secret | None
) -> None:
    """Put back what `backup` wrote into FILE."""
    directory = _directory(security_dir)
    kept = archive.restore(file.absolute(), directory, read_passphrase(backup_passphrase_file), over=over)
    click.echo(f"{directory} is restored" + (f"; what was there is in {kept}" if kept else ""))
    try:
        Pki(directory, passphrase=passphrase).mend()
    except BulkheadError as exc:
        say(f"bulkhead: revocations are not written anew yet: {exc}")
        sys.exit(UNKNOWN)


def _read(file: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as exc:
        raise BulkheadError(f"{file} cannot be read: {exc.strerror}") from None


def _write(file: Path | None, data: bytes) -> None:
    if file is None:
        click.echo(data, nl=False)
        return
    Disk().write(file.absolute(), data)
