"""`bulkhead verify`: whether the host itself, beside the flows, keeps the networks apart.

Imports the reader of state files, the checks and what commands share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import click
from rich.markup import escape

from controller.storeoptions import StoreOptions, store_options
from controller.terminal import columns, guarded, json_option, print_grid, print_json, run_dir_option
from controller.verify.host.checks import exit_code, judge
from controller.verify.host.findings import Finding, Status
from controller.verify.host.gather import gather
from controller.verify.host.tools import Host

COLOURS = {Status.OK: "green", Status.BAD: "bold red", Status.UNKNOWN: "yellow", Status.ABSENT: "dim"}
VERDICTS = ("nothing bad", "NOT sound", "not all could be found out")


def _default_db() -> str:
    return f"unix:{os.environ.get('OVS_RUNDIR', '/var/run/openvswitch')}/db.sock"


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--ovsdb", default=_default_db, help="Where ovsdb-server listens [default: unix:$OVS_RUNDIR/db.sock].")
@click.option(
    "--controller",
    "controllers",
    multiple=True,
    default=["tcp:127.0.0.1:6653"],
    show_default=True,
    help="A controller that bridges may have; may be repeated.",
)
@run_dir_option
@json_option
@store_options
@guarded
def verify(
    file: Path | None, ovsdb: str, controllers: tuple[str, ...], run_dir: Path, as_json: bool, store: StoreOptions
) -> None:
    """Say whether this host keeps the networks of a state FILE apart where flows do not reach; changes nothing.

    Looks at Open vSwitch's settings, addresses, routes, forwarding, firewalls, redirects, IPv6 and WireGuard. Without
    FILE it judges every bridge, by what needs no declaration. Run it as root, in Open vSwitch's network namespace. Exit
    0: nothing is bad; 1: something is; 2: something could not be found out.
    """
    state = store.or_running(run_dir).load(file).state if file is not None else None
    findings = judge(gather(Host(), ovsdb), state, controllers)
    code = exit_code(findings)
    if as_json:
        print_json({"exit_code": code, "checks": [finding.as_dict() for finding in findings]})
    else:
        print_findings(findings, VERDICTS[code])
    sys.exit(code)


def print_findings(findings: Iterable[Finding], verdict: str) -> None:
    """The lines as a table, then what to do, then the verdict."""
    every = tuple(findings)
    grid = columns("CHECK", "STATUS", "SEEN")
    for finding in every:
        status = f"[{COLOURS[finding.status]}]{finding.status}[/]"
        grid.add_row(finding.check, status, escape(_printable(finding.seen)))
    print_grid(grid)
    _print_mends(every)
    counts = {status: sum(finding.status is status for finding in every) for status in Status}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    click.echo(f"\n{verdict}: {counted}")


def _print_mends(findings: Iterable[Finding]) -> None:
    """What to do, outside the table: a command that is broken into lines is no command."""
    told: set[str] = set()
    heading = ""
    for finding in findings:
        if finding.status in (Status.OK, Status.ABSENT):
            continue
        # Many checks fail for the one reason that a tool is not there: that is said once.
        lines = [line for line in (*finding.mend, f"# {finding.advice}") if line != "# " and line not in told]
        told.update(lines)
        if lines and finding.check != heading:
            heading = finding.check
            click.echo(f"\nto mend {heading}:")
        for line in lines:
            click.echo(f"    {_printable(line)}")


def _printable(text: str) -> str:
    """Without what would move the cursor: names of interfaces and bridges are not ours."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
