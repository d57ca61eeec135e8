"""`bulkhead events`: the event logs, from their files or by the API."""

from __future__ import annotations

import json
import sys
from collections import deque
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console

from controller import agentcli, eventview
from controller.apiterm import use_api, where_options
from controller.client import Where
from controller.eventread import Filter, follow, last_seq, read
from controller.events import Kind, Record, encode
from controller.eventverify import verify
from controller.problems import BulkheadError
from controller.terminal import NO, events_dir_option, json_option, print_json, say


@click.command()
@events_dir_option
@click.option("-f", "--follow", "following", is_flag=True, help="Go on with what happens from now.")
@click.option("-n", "--last", type=click.IntRange(min=0), help="Only the newest so many (default with --follow: 10).")
@click.option("--since", help="10m, 2h, 12:30 or 2026-01-01T00:00:00Z.")
@click.option("--until", help="Likewise.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice([kind.value for kind in Kind]))
@click.option("--network", "networks", multiple=True)
@click.option("--container", "containers", multiple=True)
@click.option("--bridge", "bridge_names", multiple=True)
@click.option("--verify", "verifying", is_flag=True, help="Check numbers and hashes; exit 1 if any is wrong.")
@click.option("--host", is_flag=True, help="The agent's log instead of the controller's: what it did to the host.")
@click.option("--all", "joining", is_flag=True, help="Controller, agent and API as one, by the API.")
@agentcli.state_dir_option
@json_option
@where_options
def events(
    where: Where,
    events_dir: Path,
    following: bool,
    last: int | None,
    since: str | None,
    until: str | None,
    kinds: tuple[str, ...],
    networks: tuple[str, ...],
    containers: tuple[str, ...],
    bridge_names: tuple[str, ...],
    verifying: bool,
    host: bool,
    joining: bool,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Show the flow event log; with --host the agent's, with --all those two and the API's as one."""
    if joining:
        if host or verifying or until or bridge_names:
            raise BulkheadError(
                "--host, --verify, --until and --bridge are of one log's files; leave them out with --all"
            )
        _moment("--since", since)
        wanted_by_api: dict[str, object] = {"kind": kinds, "network": networks, "container": containers, "since": since}
        _show_joined(where, last, following, wanted_by_api, as_json)
        return
    if host:
        events_dir = state_dir / "events"
    if verifying:
        _print_verdict(events_dir, as_json)
        return
    begin, end = _moment("--since", since), _moment("--until", until)
    wanted = Filter(
        frozenset(map(Kind, kinds)), frozenset(networks), frozenset(containers), frozenset(bridge_names), begin, end
    )
    colour = sys.stdout.isatty()
    width = Console().width if colour else None

    def show(record: Record) -> None:
        text = encode(record).decode() if as_json else eventview.format_record(record, colour, width)
        click.echo(text.rstrip("\n"))

    if following and last is None and begin is None:
        last = 10
    past = (record for record in read(events_dir) if record.is_notice or wanted.accepts(record))
    seen = 0
    if events_dir.is_dir() or not following:
        for record in past if last is None else deque(past, maxlen=last):
            show(record)
        seen = last_seq(events_dir)
    if following:
        for record in follow(events_dir, since_seq=seen):
            if record.is_notice or wanted.accepts(record):
                show(record)
                sys.stdout.flush()


def _show_joined(where: Where, last: int | None, following: bool, wanted: dict[str, object], as_json: bool) -> None:
    from controller import joinedevents

    if following and last is None and not wanted["since"]:
        last = 10
    colour = sys.stdout.isatty()
    width = Console().width if colour else None
    with use_api(where, as_json) as api:
        for event in joinedevents.joined(api, last=last, following=following, wanted=wanted):
            text = json.dumps(event, ensure_ascii=False) if as_json else joinedevents.line(event, colour, width)
            click.echo(text)


def _moment(option: str, text: str | None) -> datetime | None:
    try:
        return eventview.parse_since(text) if text else None
    except ValueError as exc:
        raise BulkheadError(f"{option}: {exc}") from exc


def _print_verdict(events_dir: Path, as_json: bool) -> None:
    verdict = verify(events_dir)
    if as_json:
        print_json(
            {
                "ok": verdict.ok,
                "first_seq": verdict.first_seq,
                "last_seq": verdict.last_seq,
                "count": verdict.count,
                "problems": [str(finding) for finding in verdict.problems],
            }
        )
    else:
        for finding in verdict.problems:
            say(str(finding))
        state = "sound" if verdict.ok else "NOT sound"
        click.echo(f"{events_dir}: {verdict.count} events, {verdict.first_seq} to {verdict.last_seq}, {state}")
    if not verdict.ok:
        sys.exit(NO)
