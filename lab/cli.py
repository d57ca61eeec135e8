"""`bulkhead lab`: the whole thing on this machine, in namespaces of its own.

Exit codes as everywhere: 0 good, 1 the answer is no, 2 could not find out; `exec` answers the command's own. Problems
go to standard error in a line or two, never as a traceback. Imports `manager`, `demo`, and the reader of event logs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from lab import demo as examples
from lab import manager, ovs, places
from lab.manager import LabError, LabHost, Status

_run_dir = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="BULKHEAD_LAB_DIR",
    default=manager.DEFAULT_DIR,
    show_default=True,
    help="Where the lab keeps its sockets and logs.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")


_PROMISED = {True: "green", False: "red"}


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came; what was started has to be taken down."""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except LabError as exc:
            click.echo(f"bulkhead: {exc}", err=True)
            sys.exit(exc.code)
        except (OSError, ovs.LabError, subprocess.TimeoutExpired) as exc:
            click.echo(f"bulkhead: {exc}", err=True)
            sys.exit(LabError.code)
        except _Terminated:
            sys.exit(128 + signal.SIGTERM)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)

    return wrapped


@click.group()
def lab() -> None:
    """Run two networks, a controller and traffic on this machine, touching nothing of it."""


@lab.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--mininet", is_flag=True, help="Only one node's bridges and controller, with simulated hosts, in Mininet."
)
@_run_dir
@_json
@_command
def up(file: Path | None, mininet: bool, run_dir: Path, as_json: bool) -> None:
    """Build the node of a state FILE (default: the example), a second one, and the world around them.

    Each node has its own Open vSwitch, agent and controller; tunnels are real WireGuard.
    """
    _catch_signals()
    status = manager.up(file or places.example(), run_dir, progress=_quiet if as_json else _step, nodes=not mininet)
    if as_json:
        _print_json(_as_dict(status))
        return
    _print_status(status)
    option = "" if run_dir == manager.default_dir() else f" --run-dir {run_dir}"
    host = status.hosts[0].name if status.hosts else "host"
    click.echo(f"\nTry: bulkhead lab exec{option} {host} -- ip address\nEnd: bulkhead lab down{option}")


@lab.command()
@_run_dir
@_json
@_command
def down(run_dir: Path, as_json: bool) -> None:
    """End the lab and remove all that is left of it."""
    was_up = manager.down(run_dir)
    if as_json:
        _print_json({"was_up": was_up})
    else:
        click.echo("the lab is down" if was_up else f"no lab was up in {run_dir}")


@lab.command()
@_run_dir
@_json
@_command
def status(run_dir: Path, as_json: bool) -> None:
    """Show the running lab; exit 1 if any of its processes has ended, 2 if there is none."""
    found = manager.status(run_dir)
    if as_json:
        _print_json(_as_dict(found))
    else:
        _print_status(found)
    if not all(found.alive.values()):
        sys.exit(1)


@lab.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_run_dir
@_command
def exec_command(host: str, command: tuple[str, ...], run_dir: Path) -> None:
    """Run COMMAND in HOST: a container, a node, or a host outside, as `lab status` lists them.

    `host` is the first node. A container goes by its name, its id, its port or its address; NODE/CONTAINER does too.
    """
    node, slash, container = host.rpartition("/")
    sys.exit(manager.exec(run_dir, node if slash else None, container, command))


@lab.command()
@click.option("--follow/--no-follow", default=True, show_default=True, help="Go on with the event log until Ctrl-C.")
@click.option("--mininet", is_flag=True, help="In the lab of one node's bridges, in Mininet.")
@_run_dir
@_json
@_command
def demo(follow: bool, mininet: bool, run_dir: Path, as_json: bool) -> None:
    """Start a lab, run the architecture's traffic examples in it, and show what passed and what was blocked.

    Exit 1 if anything is not as it must be. The lab is taken down at the end.
    """
    _catch_signals()
    status = manager.up(places.example(), run_dir, progress=_quiet if as_json else _step, nodes=not mininet)
    try:
        shown = _play(status, as_json)
        if follow and not as_json:
            _follow(status)
    finally:
        # Nothing may stop this half way: whoever presses Ctrl-C twice still wants it gone.
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        manager.down(run_dir)
    sys.exit(0 if all(each.as_expected for each in shown) else 1)


@lab.command()
@_json
@_command
def guide(as_json: bool) -> None:
    """Set up the security guide's router, inference server and client, and try what the guide promises.

    The servers are machines with a systemd of their own, over a copy of this one's files. Exit 1 if anything is not as it
    must be. All of it is gone at the end.
    """
    from lab.guide import Guide
    from lab.guideshow import play

    _catch_signals()
    promises = []
    with (
        tempfile.TemporaryDirectory(prefix="bulkhead-guide-") as directory,
        Guide(Path(directory), _quiet if as_json else _step) as machines,
    ):
        machines.start()
        for each in play(machines):
            promises.append(each)
            if not as_json:
                wrong = "" if each.kept else f"   EXPECTED {each.expected}"
                click.secho(f"{each.title:72} {each.seen}{wrong}", fg=_PROMISED[each.kept])
    kept = sum(each.kept for each in promises)
    if as_json:
        _print_json([each.as_dict() for each in promises])
    else:
        click.echo(f"\n{kept} of {len(promises)} as promised")
    sys.exit(0 if kept == len(promises) else 1)


def _play(status: Status, as_json: bool) -> list[examples.Shown]:
    columns = examples.widths(examples.examples_of(status))
    shown = []
    if not as_json:
        click.echo(f"\n{click.style(examples.line(None, columns), bold=True)}")
    for each in examples.play(status):
        shown.append(each)
        if not as_json:
            click.secho(examples.line(each, columns), fg=_colour(each))
    good = sum(each.as_expected for each in shown)
    if as_json:
        _print_json([each.as_dict() for each in shown])
    else:
        click.echo(f"\n{good} of {len(shown)} as expected")
    return shown


def _colour(shown: examples.Shown) -> str:
    if not shown.as_expected:
        return "red"
    return "green" if shown.seen in ("passes", "200", "201", "told") else "yellow"


def _follow(status: Status) -> None:
    from controller.eventread import follow
    from controller.eventview import format_record

    click.echo("\nThe event log, and what happens from now on; the lab is up until Ctrl-C.")
    click.echo("In another terminal: bulkhead lab exec xray -- ping 10.1.0.201\n")
    colour = sys.stdout.isatty()
    try:
        for record in follow(status.events, stop=lambda: not manager.is_up(status.run_dir)):
            click.echo(format_record(record, colour))
            sys.stdout.flush()
    except KeyboardInterrupt:
        click.echo("\ntaking the lab down")


def _catch_signals() -> None:
    def terminate(_signum: int, _frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGHUP, terminate)


def _step(text: str) -> None:
    click.echo(f"{text} ...", err=True)


def _quiet(_text: str) -> None:
    pass


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _as_dict(status: Status) -> dict[str, Any]:
    return {
        "node": status.node,
        "run_dir": str(status.run_dir),
        "state_file": status.state_file,
        "pid": status.pid,
        "bridges": list(status.bridges),
        "hosts": [_host_dict(host) for host in status.hosts],
        "ovsdb": status.ovsdb,
        "controller_run_dir": str(status.controller_run_dir),
        "events": str(status.events),
        "alive": status.alive,
    }


def _host_dict(host: LabHost) -> dict[str, Any]:
    return {
        "name": host.name,
        "aliases": list(host.aliases),
        "kind": host.kind,
        "network": host.network,
        "port": host.port,
        "address": host.address,
    }


def _print_status(status: Status) -> None:
    click.echo(f"lab of {status.node} ({status.state_file}), process {status.pid}, bridges {' '.join(status.bridges)}")
    for process, lives in status.alive.items():
        if not lives:
            click.secho(f"{process} has ended; see the logs in {status.run_dir}", fg="red")
    rows = [("HOST", "KIND", "NETWORK", "PORT", "ADDRESS")]
    rows += [(host.name, host.kind, host.network, host.port, host.address) for host in status.hosts]
    columns = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip())
    click.echo(f"flows:  bulkhead flows --run-dir {status.controller_run_dir}")
    click.echo(f"events: bulkhead events --events {status.events} --follow")
