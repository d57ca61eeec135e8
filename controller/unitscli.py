"""`bulkhead units`: the systemd units of every part. Imports their text and what commands share."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from controller.problems import BulkheadError
from controller.security import units as made
from controller.terminal import NO, columns, guarded, json_option, print_grid, print_json


@click.group()
def units() -> None:
    """The systemd units of router, inference server, controller, agent, API, store and chores."""


@units.command("print")
@click.argument("name", required=False)
@json_option
@guarded
def print_units(name: str | None, as_json: bool) -> None:
    """Print every file, or the one called NAME (bulkhead-router.service)."""
    files = made.files()
    chosen = {path: text for path, text in files.items() if name in (None, Path(path).name)}
    if not chosen:
        raise BulkheadError(f"there is no unit {name}; there are {', '.join(Path(path).name for path in files)}")
    if as_json:
        print_json(chosen)
        return
    click.echo("\n".join(f"# /{path}\n{text}" for path, text in chosen.items()), nl=False)


@units.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), show_default=True, help="Write below this.")
@json_option
@guarded
def install(root: Path, as_json: bool) -> None:
    """Write the units, timers and users' file. Starts nothing; says what to run next."""
    written = made.install(root)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        click.echo(path)
    click.echo("nothing to write: all is as it should be" if not written else "next: systemd-sysusers")
    if written:
        click.echo("      systemctl daemon-reload")
        click.echo("      systemctl enable --now bulkhead-{minute,hourly,weekly,monthly}.timer")


@units.command()
@click.option(
    "--root", type=click.Path(path_type=Path), help="Judge the units installed below this; else those printed."
)
@json_option
@guarded
def score(root: Path | None, as_json: bool) -> None:
    """Let systemd-analyze say how exposed each service is, from 0 to 10; exit 1 if one is more than it may be."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-units-") as temp:
        if root is None:
            root = Path(temp)
            made.install(root)
        paths = [root / "etc/systemd/system" / made.service_name(unit) for unit in made.UNITS]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise BulkheadError(f"{missing[0]} is not there; write it: bulkhead units install")
        found = made.scores(paths)
    rows = [{"unit": name, "score": value, "limit": made.limit(name)} for name, value in found.items()]
    if as_json:
        print_json(rows)
    else:
        grid = columns("UNIT", "EXPOSURE", "AT MOST")
        for name, value in found.items():
            grid.add_row(name, f"{value:.1f}", f"{made.limit(name):.1f}")
        print_grid(grid)
    sys.exit(NO if any(value > made.limit(name) for name, value in found.items()) else 0)
