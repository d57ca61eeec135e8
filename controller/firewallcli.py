"""`bulkhead firewall`: the host's own firewall by hand, with a way back. Imports the agent's tables, the reader of state
files and what commands share."""

from __future__ import annotations

import asyncio
import difflib
import os
import sys
from pathlib import Path

import click

from controller.agent import trial
from controller.agent.hosttable import wanted_host_table
from controller.agent.nft import as_printed, listing, rule_differences
from controller.agent.serverlinks import refuse_overlap
from controller.problems import BulkheadError, InvalidInput
from controller.security.pki.disk import Disk, read
from controller.statefile import load
from controller.terminal import (
    NO,
    file_argument,
    guarded,
    json_option,
    print_json,
    run_dir_option,
    say,
    security_dir_option,
)

LONGEST_S = 24 * 3600


@click.group()
def firewall() -> None:
    """The host's own firewall: look, load, try, confirm, roll back, verify. Root.

    Only the table `inet bulkhead` is ever read or changed. Works with the agent running and without.
    """


def _agent_dir(run_dir: Path) -> Path:
    return run_dir.absolute() / "agent"


def _require_root() -> None:
    if os.geteuid() != 0:
        raise BulkheadError("only root may read or change the host's firewall; run it with sudo")


def _wanted(file: Path) -> str:
    loaded = load(file)
    if loaded.host.security is not None and loaded.host.security.has_wireguard:
        asyncio.run(refuse_overlap(loaded.host.security))
    return wanted_host_table(loaded.state, loaded.host)


@firewall.command()
@file_argument
@json_option
@guarded
def plan(file: Path, as_json: bool) -> None:
    """Show the host table that a state FILE asks for, and how it differs from the loaded one; exit 1 if it does.

    Changes nothing. The kernel is asked whether it takes the table, in a network namespace of its own.
    """
    _require_root()
    text = _wanted(file)
    wanted, found = asyncio.run(_both(text))
    lines = difflib.unified_diff(
        (found or "").splitlines(), wanted.splitlines(), "loaded", f"wanted by {file}", lineterm="", n=2
    )
    changes = list(lines)
    if as_json:
        print_json({"text": text, "loaded": found, "diff": changes, "differs": bool(changes)})
    else:
        click.echo(text)
        for line in changes or ["the loaded table is as wanted"]:
            click.secho(line, fg={"+": "green", "-": "red"}.get(line[0]))
    sys.exit(NO if changes else 0)


async def _both(text: str) -> tuple[str, str | None]:
    return await as_printed(text), await listing(trial.FAMILY)


@firewall.command()
@file_argument
@json_option
@guarded
def verify(file: Path, as_json: bool) -> None:
    """Compare the loaded host table with the one that a state FILE asks for, rule by rule.

    Exit 0 if they are the same, 1 if not, 2 if it cannot be found out. Changes nothing.
    """
    _require_root()
    wanted, found = asyncio.run(_both(_wanted(file)))
    differences = rule_differences(found, wanted)
    if as_json:
        print_json({"loaded": found is not None, "good": not differences, "differences": list(differences)})
    else:
        rules = sum(line.startswith("\t\t") for line in wanted.splitlines())
        for line in differences or [f"the loaded table is as wanted: {rules} lines of {file}'s"]:
            click.secho(line, fg="red" if differences else "green")
        if differences:
            click.echo(f"to mend it: bulkhead firewall apply {file}")
    sys.exit(NO if differences else 0)


@firewall.command()
@file_argument
@click.option(
    "--confirm",
    "confirm_s",
    type=click.IntRange(1, LONGEST_S),
    metavar="SECONDS",
    help="Go back to what was loaded before, unless `bulkhead firewall confirm` comes within so many seconds.",
)
@click.option(
    "--at-boot", is_flag=True, help="If FILE cannot be used, load what was loaded by the last one that could, and fail."
)
@security_dir_option
@run_dir_option
@json_option
@guarded
def apply(file: Path, confirm_s: int | None, at_boot: bool, security_dir: Path, run_dir: Path, as_json: bool) -> None:
    """Load the host table that a state FILE asks for, in one transaction.

    With --confirm, open a new connection to this host before you confirm: the one you have may live on for other reasons.
    """
    _require_root()
    own, kept = _agent_dir(run_dir), security_dir / "firewall.nft"
    try:
        text = _wanted(file)
    except (InvalidInput, BulkheadError):
        if at_boot and (last := read(kept)) is not None:
            asyncio.run(trial.load_table(own, last.decode()))
            say(f"bulkhead: {file} cannot be used; what the last good one asked for is loaded")
        raise
    if at_boot:
        Disk().write(kept, text.encode())
    if confirm_s is None:
        asyncio.run(trial.load_table(own, text))
    else:
        asyncio.run(trial.try_table(own, text, confirm_s))
    if as_json:
        print_json({"loaded": True, "confirm_within_s": confirm_s})
    elif confirm_s is None:
        click.echo("the firewall is loaded")
    else:
        click.echo(f"the firewall is loaded, for {confirm_s} s. To keep it: bulkhead firewall confirm")


@firewall.command()
@run_dir_option
@json_option
@guarded
def confirm(run_dir: Path, as_json: bool) -> None:
    """Keep the firewall that is on trial.

    If the agent runs, it loads what its own state file says as soon as the trial is over.
    """
    _require_root()
    asyncio.run(trial.confirm(_agent_dir(run_dir)))
    if as_json:
        print_json({"confirmed": True})
    else:
        click.echo("the firewall stays")


@firewall.command()
@run_dir_option
@json_option
@guarded
def rollback(run_dir: Path, as_json: bool) -> None:
    """End the trial now: load what was there before it."""
    _require_root()
    done = asyncio.run(trial.roll_back(_agent_dir(run_dir)))
    if not done:
        raise BulkheadError("no firewall is on trial; nothing to roll back")
    if as_json:
        print_json({"rolled_back": True})
    else:
        click.echo("the firewall is as it was before")
