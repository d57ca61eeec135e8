"""`bulkhead agent`, `up`, `down` and the host's part of `plan` and `status`. Imports the agent, late."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from controller.agent.settings import CONTROLLER, OVSDB, STATE_DIR, Settings
from controller.problems import BulkheadError
from controller.storeoptions import SOCKET, StoreOptions, store_options
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

if TYPE_CHECKING:
    from controller.agent.identity import Identity
    from controller.agent.keeper import Kept
    from controller.hostmodel import Api

STOP_S = 10.0

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
api_user_option = click.option(
    "--api-user",
    envvar="BULKHEAD_API_USER",
    help="As whom the API runs, by name or number [default: bulkhead, if there is such a user; else a number of nobody's].",
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
@api_user_option
@guarded
def agent(
    file: Path,
    run_dir: Path,
    state_dir: Path,
    ovsdb: str,
    controller: str,
    verbose: bool,
    store: StoreOptions,
    api_user: str | None,
) -> None:
    """Make this host what a state FILE says, and keep it so, in the foreground. Root.

    SIGHUP (or a changed FILE) makes it read FILE again; SIGTERM stops it, and everything it has built stays.
    """
    from controller.agent.agent import serve

    _logging(verbose)
    serve(replace(_settings(file, run_dir, state_dir, ovsdb, controller, store), api_user=api_user))


@click.command()
@file_argument
@run_dir_option
@events_dir_option
@state_dir_option
@ovsdb_option
@controller_option
@verbose_option
@store_options
@api_user_option
@click.option("--no-store", is_flag=True, help="Run no store, and so no API: the state file alone counts.")
@click.option("--no-api", is_flag=True, help="Run no API.")
@click.option(
    "--api-port", type=click.IntRange(0, 65535), default=9573, show_default=True, help="On loopback; 0 for none there."
)
@guarded
def up(
    file: Path,
    run_dir: Path,
    events_dir: Path,
    state_dir: Path,
    ovsdb: str,
    controller: str,
    verbose: bool,
    store: StoreOptions,
    api_user: str | None,
    no_store: bool,
    no_api: bool,
    api_port: int,
) -> None:
    """Run store, controller, agent and API for a state FILE together, in the foreground. Root.

    Whichever of them dies is started again. SIGTERM stops them all, and everything stays as it is; `bulkhead down FILE`
    takes it away. With --store the store of a cluster is used, and none is run here.
    """
    from controller.agent.agent import UP_LOCK, holder, only_one, require_root
    from controller.agent.identity import identity
    from controller.agent.keeper import Keeper
    from controller.statefile import load

    require_root()
    if no_store and store.addresses:
        raise BulkheadError("--no-store and --store contradict each other; leave one of them out")
    loaded = load(file)
    own_store = not no_store and not store.addresses
    if own_store:
        store = replace(store, addresses=(f"unix:{run_dir.absolute() / SOCKET}",))
    settings = _settings(file, run_dir, state_dir, ovsdb, controller, store)
    if (other := holder(settings)) is not None:
        raise BulkheadError(f"an agent runs already for {run_dir} (process {other}); stop it, or use another --run-dir")
    api = None if no_store or no_api else identity(api_user)
    with only_one(settings, UP_LOCK):
        if api is not None:
            _prepare(settings, events_dir, api, loaded.host.api)
        kept = _processes(settings, store, events_dir.absolute(), api, api_port, own_store=own_store, verbose=verbose)
        Keeper(kept, lambda text: say(f"bulkhead: {text}")).run()


def _prepare(settings: Settings, events_dir: Path, who: Identity, api: Api) -> None:
    from controller.agent.ground import Ground, explain

    ground = Ground(settings.run_dir, settings.state_dir, (settings.events_dir, events_dir.absolute()))
    ground.prepare(who)
    keys = [path for path in (api.certificate, api.private_key, *settings.store_tls) if path is not None]
    if (path := ground.missing(who, (settings.state_file, *keys))) is not None:
        raise BulkheadError(explain(path, who))


def _processes(
    settings: Settings,
    store: StoreOptions,
    events_dir: Path,
    api: Identity | None,
    api_port: int,
    *,
    own_store: bool,
    verbose: bool,
) -> list[Kept]:
    """In the order in which they are started."""
    from controller.agent.keeper import Kept

    again = [sys.executable, "-c", "from controller.cli import main; main()"]
    file, own = str(settings.state_file), settings.run_dir / SOCKET
    run, state = ["--run-dir", str(settings.run_dir)], ["--state-dir", str(settings.state_dir)]
    events, loud = ["--events", str(events_dir)], ["-v"] if verbose else []
    common = [*run, "--ovsdb", settings.ovsdb, *store.words(), *loud]
    group = api.gid if api is not None else None
    user = ["--api-user", str(api.uid)] if api is not None else []
    out = []
    if own_store:
        command = (*again, "store", "serve", *run, *state)
        out.append(Kept("store", command, group=group, ready=own, reads_again=False))
    words = ["--listen", settings.controller, *common, *events]
    words += ["--socket-group", str(group)] if group is not None else []
    out.append(Kept("controller", (*again, "controller", file, *words)))
    words = [*common, *state, "--controller", settings.controller, *user]
    out.append(Kept("agent", (*again, "agent", file, *words)))
    if api is not None:
        words = [
            *run,
            *events,
            "--state-dir",
            str(settings.state_dir / "api"),
            "--agent-events",
            str(settings.events_dir),
        ]
        words += [*store.words(), "--port", str(api_port), *loud]
        out.append(Kept("api", (*again, "api", file, *words), user=api))
    return out


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
        deadline = time.monotonic() + 4 * STOP_S + 1  # `up` gives each of its four so long
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
