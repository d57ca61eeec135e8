"""`bulkhead verify`: whether the host itself, beside the flows, keeps the networks apart.

Imports the reader of state files, the checks and what commands share.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from rich.markup import escape

from controller.statefile import load
from controller.terminal import columns, guarded, json_option, print_grid, print_json
from controller.verify.host.checks import Finding, Status, exit_code, judge
from controller.verify.host.facts import Host, gather

COLOURS = {Status.OK: "green", Status.BAD: "bold red", Status.UNKNOWN: "yellow", Status.ABSENT: "dim"}
VERDICTS = ("nothing bad", "NOT sound", "not all could be found out")


def _default_db() -> str:
    return f"unix:{os.environ.get('OVS_RUNDIR', '/var/run/openvswitch')}/db.sock"


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--db", default=_default_db, help="Where ovsdb-server listens [default: unix:$OVS_RUNDIR/db.sock].")
@click.option(
    "--controller",
    "controllers",
    multiple=True,
    default=["tcp:127.0.0.1:6653"],
    show_default=True,
    help="A controller that bridges may have; may be repeated.",
)
@json_option
@guarded
def verify(file: Path | None, db: str, controllers: tuple[str, ...], as_json: bool) -> None:
    """Say whether this host keeps the networks of a state FILE apart where flows do not reach; changes nothing.

    Looks at Open vSwitch's settings, addresses, routes, forwarding, nftables, IPv6 and WireGuard. Without FILE it judges
    every bridge, by what needs no declaration. Run it as root, in Open vSwitch's network namespace. Exit 0: nothing is
    bad; 1: something is; 2: something could not be found out.
    """
    state = load(file).state if file is not None else None
    findings = judge(gather(Host(), db), state, controllers)
    code = exit_code(findings)
    if as_json:
        print_json({"exit_code": code, "checks": [finding.as_dict() for finding in findings]})
    else:
        _print(findings, VERDICTS[code])
    sys.exit(code)


def _print(findings: tuple[Finding, ...], verdict: str) -> None:
    grid = columns("CHECK", "STATUS", "SEEN")
    told: set[str] = set()
    for finding in findings:
        # Many checks fail for the one reason that a tool is not there: that is said once.
        mend = "" if finding.mend in told else finding.mend
        told.add(mend)
        mend = f"\n[bold]mend:[/] {escape(mend)}" if mend else ""
        status = f"[{COLOURS[finding.status]}]{finding.status}[/]"
        grid.add_row(finding.check, status, escape(finding.seen) + mend)
    print_grid(grid)
    counts = {status: sum(finding.status is status for finding in findings) for status in Status}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    click.echo(f"\n{verdict}: {counted}")
