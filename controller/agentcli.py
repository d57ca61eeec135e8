"""`bulkhead agent`, `up`, `down` and the host's part of `plan` and `status`. Imports the agent, late."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from controller.agent.settings import CONTROLLER, OVSDB, STATE_DIR, Settings
from controller.problems import BulkheadError
from controller.storeoptions import StoreOptions, store_options
from controller.terminal import (
    NO,
    columns,
    events_dir_option,
    file_argument,
    guarded,
    json_option,
    print_grid,
    print_json,
    run_dir_option,
    say,
)

RESTART_S = 1.0
STOP_S = 10.0
_PR_SET_PDEATHSIG = 1

state_dir_option = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=STATE_DIR,
    show_default=True,
    envvar="BULKHEAD_STATE_DIR",
    help="Where the agent keeps keys, VPN clients and containers.",
)
ovsdb_option = click.option(
    "--ovsdb",
    default=OVSDB,
    show_default=True,
    envvar="BULKHEAD_OVSDB",
    help="Where Open vSwitch's database listens.",
)
controller_option = click.option(
    "--controller", default=CONTROLLER, show_default=True, help="What the bridges are pointed at."
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Log every event to standard error too.")


def _logging(verbose: bool) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("ovsdbapp").setLevel(logging.ERROR)


def _settings(
    file: Path,
    run_dir: Path,
    state_dir: Path,
    ovsdb: str,
    controller: str = CONTROLLER,
    store: StoreOptions | None = None,
) -> Settings:
    given = store or StoreOptions("")
    return Settings(
        file.absolute(),
        run_dir.absolute(),
        state_dir.absolute(),
        ovsdb,
        controller,
        given.addresses,
        given.files,
        given.node,
    )


@click.command()
@file_argument
@run_dir_option
@state_dir_option
@ovsdb_option
@controller_option
@verbose_option
@store_options
@guarded
def agent(
    file: Path, run_dir: Path, state_dir: Path, ovsdb: str, controller: str, verbose: bool, store: StoreOptions
) -> None:
    """Make this host what a state FILE says, and keep it so, in the foreground. Root.

    SIGHUP (or a changed FILE) makes it read FILE again; SIGTERM stops it, and everything it has built stays.
    """
    from controller.agent.agent import serve

    _logging(verbose)
    serve(_settings(file, run_dir, state_dir, ovsdb, controller, store))


@click.command()
@file_argument
@run_dir_option
@events_dir_option
@state_dir_option
@ovsdb_option
@controller_option
@verbose_option
@guarded
def up(
    file: Path, run_dir: Path, events_dir: Path, state_dir: Path, ovsdb: str, controller: str, verbose: bool
) -> None:
    """Run agent and controller for a state FILE together, in the foreground. Root.

    Whichever of the two dies is started again. SIGTERM stops both, and everything stays as it is; `bulkhead down FILE`
    takes it away.
    """
    from controller.agent.agent import UP_LOCK, holder, only_one, require_root
    from controller.statefile import load

    require_root()
    load(file)
    settings = _settings(file, run_dir, state_dir, ovsdb, controller)
    if (other := holder(settings)) is not None:
        raise BulkheadError(f"an agent runs already for {run_dir} (process {other}); stop it, or use another --run-dir")
    again = [sys.executable, "-c", "from controller.cli import main; main()"]
    common = ["--run-dir", str(settings.run_dir), "--ovsdb", ovsdb, *(["-v"] if verbose else [])]
    commands = {
        "controller": [*again, "controller", str(settings.state_file), "--listen", controller, *common, "--events", str(events_dir)],
        "agent": [*again, "agent", str(settings.state_file), *common, "--state-dir", str(settings.state_dir), "--controller", controller],
    }  # fmt: skip
    with only_one(settings, UP_LOCK):
        _Pair(commands).run()


def _end_with_parent() -> None:
    """Have this process told to end when its parent is killed: nobody else would ever stop it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


class _Pair:
    """Two processes that are kept running until SIGTERM."""

    def __init__(self, commands: dict[str, list[str]]) -> None:
        self._commands = commands
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = False

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then both are ended, which leaves all they have built."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._signalled)
        try:
            while not self._stopping:
                for name, command in self._commands.items():
                    self._keep(name, command)
                time.sleep(0.1)
        finally:
            self._end()

    def _keep(self, name: str, command: list[str]) -> None:
        process = self._running.get(name)
        if process is not None and process.poll() is None:
            return
        if process is not None:
            say(f"bulkhead: the {name} has ended with exit code {process.returncode}; starting it again")
            time.sleep(RESTART_S)
        if not self._stopping:
            self._running[name] = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)

    def _signalled(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            for process in self._running.values():
                process.send_signal(number)
            return
        self._stopping = True

    def _end(self) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


@click.command()
@file_argument
@run_dir_option
@state_dir_option
@ovsdb_option
@click.option("--purge", is_flag=True, help="Remove keys, VPN clients and LXC containers too.")
@json_option
@guarded
def down(file: Path, run_dir: Path, state_dir: Path, ovsdb: str, purge: bool, as_json: bool) -> None:
    """Take away everything that was built for a state FILE; stops the agent first. Root.

    Keys, VPN clients and the files of LXC containers stay in the state directory unless --purge is given.
    """
    from controller.agent.agent import require_root
    from controller.agent.teardown import take_down

    require_root()
    _logging(False)
    settings = _settings(file, run_dir, state_dir, ovsdb)
    _stop_agent(settings)
    steps: list[str] = []

    def told(text: str) -> None:
        steps.append(text)
        if not as_json:
            click.echo(text)

    failures = asyncio.run(take_down(settings, told, purge=purge))
    if as_json:
        print_json({"steps": steps, "failures": failures})
    for failure in failures:
        say(f"bulkhead: {failure}")
    if failures:
        sys.exit(NO)
    if not steps and not as_json:
        click.echo("nothing of ours is left")


def _stop_agent(settings: Settings) -> None:
    """Whoever keeps it running comes first, or it would be started again."""
    from controller.agent.agent import LOCK, UP_LOCK, holder

    for lock, what in ((UP_LOCK, "bulkhead up"), (LOCK, "the agent")):
        pid = holder(settings, lock)
        if pid is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 2 * STOP_S + 1  # `up` gives each of its two so long
        while holder(settings, lock) is not None:
            if time.monotonic() > deadline:
                raise BulkheadError(f"{what} (process {pid}) does not end; stop it: kill -9 {pid}")
            time.sleep(0.05)


def plan_host(
    file: Path, run_dir: Path, state_dir: Path, ovsdb: str, store: StoreOptions | None = None
) -> list[dict[str, str]]:
    """What the agent would do, as rows of key, sign, what, why; `sign` is `?` where it cannot be told."""
    from controller.agent.teardown import plan_all

    return asyncio.run(plan_all(_settings(file, run_dir, state_dir, ovsdb, store=store)))


def print_plan(rows: list[dict[str, str]]) -> None:
    """The plan of the host as people read it."""
    colours = {"+": "green", "~": "yellow", "-": "red", "?": "magenta"}
    counts = {sign: sum(row["sign"] == sign for row in rows) for sign in "+~-"}
    click.echo(f"host: {counts['+']} to add, {counts['~']} to change, {counts['-']} to remove")
    for row in rows:
        click.secho(f"  {row['sign']} {row['what']}: {row['why']}", fg=colours[row["sign"]])


def host_status(run_dir: Path) -> dict[str, Any] | None:
    """What the agent has written down about itself, None if none runs."""
    from controller.agent.agent import STATUS, holder

    settings = Settings(Path("/"), run_dir.absolute())
    pid = holder(settings)
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((settings.own_dir / STATUS).read_text())
        return found if pid is not None and found.get("pid") == pid else None
    return None


def print_host_status(found: dict[str, Any]) -> None:
    """The agent's resources that are not as wanted, or that all are."""
    rows = [row for row in found["resources"] if row["phase"] != "done"]
    ready = len(found["resources"]) - len(rows)
    healed = sum(row["healed"] for row in found["resources"])
    click.echo(
        f"agent pid {found['pid']}, {ready} of {len(found['resources'])} parts of the host as wanted, {healed} healed"
    )
    if rows:
        grid = columns("PART", "STATE", "WHY", "NEXT TRY")
        for row in rows:
            grid.add_row(row["key"], row["phase"], row["why"], f"within {row['retry_in_s']} s")
        print_grid(grid)


COMMANDS: tuple[click.Command, ...] = (agent, up, down)
