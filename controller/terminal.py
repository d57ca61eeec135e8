"""What every command shares: options, messages, tables, exit codes.

What is printed is a table for people or, with `--json`, one JSON value. Problems go to standard error, one line each,
never a traceback. Imports problems.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from controller.problems import BulkheadError, InvalidInput, NotAllowed, Problem, Severity

T = TypeVar("T")
NO, UNKNOWN = 1, 2
RUN_DIR = Path("/run/bulkhead")
EVENTS_DIR = Path("/var/lib/bulkhead/events")
SECURITY_DIR = Path("/var/lib/bulkhead/security")
ROUTER_DIR = Path("/var/lib/bulkhead/router")

file_argument = click.argument("file", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=RUN_DIR,
    show_default=True,
    envvar="BULKHEAD_RUN_DIR",
    help="Where the sockets of controller and API are.",
)
events_dir_option = click.option(
    "--events",
    "events_dir",
    type=click.Path(path_type=Path),
    default=EVENTS_DIR,
    show_default=True,
    envvar="BULKHEAD_EVENTS",
    help="Where the event log is.",
)
security_dir_option = click.option(
    "--security-dir",
    type=click.Path(path_type=Path),
    default=SECURITY_DIR,
    show_default=True,
    envvar="BULKHEAD_SECURITY_DIR",
    help="Where certificates (pki), WireGuard keys (wg) and clients of the router (hpke) are kept.",
)


def router_home(security_dir: Path = SECURITY_DIR) -> Path:
    """Where the router of this machine has its clients and keys: its own user's directory, where its unit has run."""
    return ROUTER_DIR if security_dir == SECURITY_DIR and ROUTER_DIR.is_dir() else security_dir


router_dir_option = click.option(
    "--security-dir",
    type=click.Path(path_type=Path),
    default=router_home,
    show_default=f"{ROUTER_DIR} if the router's unit has run, else {SECURITY_DIR}",
    envvar="BULKHEAD_SECURITY_DIR",
    help="Where the router's clients and keys (hpke) are kept.",
)


@contextmanager
def reporting() -> Iterator[None]:
    """Turn what the rest raises into messages and exit codes."""
    try:
        yield
    except InvalidInput as exc:
        print_problems(exc.problems)
        sys.exit(NO)
    except NotAllowed as exc:
        say(f"bulkhead: {exc}")
        sys.exit(NO)
    except BulkheadError as exc:
        say(f"bulkhead: {exc}")
        sys.exit(UNKNOWN)
    except BrokenPipeError:
        # The reader of our output went away. Point stdout elsewhere, or Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors become messages and exit codes."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        with reporting():
            function(*args, **kwargs)

    return wrapped


def say(text: str) -> None:
    """Tell standard error."""
    click.echo(text, err=True)


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_problems(problems: tuple[Problem, ...]) -> None:
    """Each problem with what was found, what was expected and what to do."""
    colours = {Severity.ERROR: "red", Severity.WARNING: "yellow"}
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    for problem in problems:
        colour = colours[problem.severity]
        console.print(f"[bold {colour}]{problem.severity}[/] [bold]{escape(problem.path)}[/] [dim]({problem.code})[/]")
        console.print(f"    found    {escape(problem.found)}", f"    expected {escape(problem.expected)}", sep="\n")
        console.print(f"    {escape(problem.fix)}")
        if problem.example:
            console.print(f"    example  {escape(problem.example)}")


def progress(items: Iterable[T], count: int, what: str) -> Iterator[T]:
    """Pass items on, with a bar on standard error where that is a terminal and there are many."""
    if count < 50 or not sys.stderr.isatty():
        yield from items
        return
    from rich.progress import track

    yield from track(items, description=what, total=count, console=Console(stderr=True), transient=True)


def columns(*names: str) -> Grid:
    """An empty table with these headings."""
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in names:
        grid.add_column(name, overflow="fold")
    return grid


def print_grid(grid: Grid) -> None:
    """A table, as wide as the terminal, or wide enough not to break where there is none."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=240)
    console.print(grid)
