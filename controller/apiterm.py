"""What commands that ask the HTTP API share: where it is, waiting, completion of names, exit codes.

Imports the client and what every command shares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from controller.client import ANSWER_S, LATER_S, SOCKET, Api, ApiProblem, NoApi, Where, plain, read_token
from controller.problems import BulkheadError
from controller.terminal import NO, UNKNOWN, print_json, reporting, run_dir_option, say

COMPLETE_S = 1.0
_DURATION = re.compile(r"(?:[0-9]{1,9}[smhdw])+", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_STATES = {"ready": "green", "approved": "green", "up": "green", "failed": "red", "denied": "red", "pending": "yellow"}

_API_OPTIONS = (
    click.option("--api", "api_url", envvar="BULKHEAD_API", metavar="URL", default="", help="An API elsewhere: https://…"),
    click.option(
        "--token-file",
        envvar="BULKHEAD_TOKEN_FILE",
        type=click.Path(path_type=Path),
        help="A file of mode 600 with a token (or give the token in BULKHEAD_TOKEN).",
    ),
    click.option(
        "--ca",
        envvar="BULKHEAD_CA",
        type=click.Path(path_type=Path),
        help="Certificates (PEM) that the API's one is checked with.",
    ),
    click.option(
        "--fingerprint", envvar="BULKHEAD_FINGERPRINT", default="", help="Or the SHA-256 of the API's one certificate."
    ),
    run_dir_option,
)  # fmt: skip


def where_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say where the API is; the command gets it as `where`."""

    @wraps(function)
    def wrapped(
        *args: Any,
        api_url: str,
        token_file: Path | None,
        ca: Path | None,
        fingerprint: str,
        run_dir: Path,
        **kwargs: Any,
    ) -> None:
        with reporting():
            where = Where(run_dir / SOCKET, api_url, ca, fingerprint, read_token(token_file))
            function(*args, where=where, **kwargs)

    for option in reversed(_API_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


@contextmanager
def use_api(where: Where, as_json: bool) -> Iterator[Api]:
    """A connection to the API. A no of the API ends the command with exit code 1.

    With --json the problem document is the JSON value that is printed.
    """
    try:
        with Api(where) as api:
            yield api
    except ApiProblem as exc:
        if as_json:
            print_json(exc.document)
        say(f"bulkhead: {exc}")
        sys.exit(NO if exc.is_answer else UNKNOWN)


def asks_api(function: Callable[..., None]) -> Callable[..., None]:
    """A command that asks the API; it gets the connection as `api`."""

    @where_options
    @wraps(function)
    def wrapped(*args: Any, where: Where, **kwargs: Any) -> None:
        with use_api(where, bool(kwargs.get("as_json"))) as api:
            function(*args, api=api, **kwargs)

    return wrapped


def waits(function: Callable[..., None]) -> Callable[..., None]:
    """Options of commands that change something: --wait, --timeout, --idempotency-key.

    The command gets them as `asked`: what `Api.post` and `Api.delete` are to be called with.
    """

    @wraps(function)
    def wrapped(*args: Any, wait: bool, timeout_s: float | None, key: str, **kwargs: Any) -> None:
        asked: dict[str, Any] = {"key": key, "answer_s": (timeout_s or ANSWER_S) + LATER_S}
        if not wait:
            asked["wait"] = False
        elif timeout_s is not None:
            asked["timeout"] = f"{timeout_s:g}"
        function(*args, asked=asked, **kwargs)

    for option in (
        click.option("--idempotency-key", "key", default="", help="The same key again changes nothing twice."),
        click.option(
            "--timeout", "timeout_s", type=click.FloatRange(min=0.1, max=300), help="Seconds to wait; then it is undone."
        ),
        click.option(
            "--wait/--no-wait", "wait", default=True, show_default=True, help="Until the host is so, or only begin."
        ),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on a terminal that something is being done."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(f"{escape(what)} …"):
        yield


def tell(reply: Any, done: Callable[[Any], str], as_json: bool) -> None:
    """Say what became of a change: what `done` makes of the answer or, if it was only begun, how to ask for it."""
    if as_json:
        print_json(reply)
    elif isinstance(reply, dict) and "object" in reply and "kind" in reply and "result" in reply:
        click.echo(f"{reply['kind']} of {reply['object']} is {reply['state']}; see: bulkhead operation {reply['id']}")
    else:
        click.echo(done(reply))


def may_go_on(question: str, yes: bool) -> bool:
    """Ask before something is lost; nobody is asked where there is no terminal."""
    return yes or not on_terminal() or click.confirm(question, err=True)


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def coloured(state: str) -> str:
    """A state, for a cell of a table."""
    colour = _STATES.get(state)
    return f"[{colour}]{escape(state)}[/]" if colour else escape(state)


def cells(*values: object) -> list[str]:
    """Cells of a table: texts that are no markup and do not move the cursor."""
    return [escape(_cell(value)) for value in values]


def rows(grid: Grid, values: Iterable[tuple[object, ...]]) -> Grid:
    """A table filled with rows."""
    for row in values:
        grid.add_row(*cells(*row))
    return grid


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    return plain(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)


def print_fields(fields: dict[str, object]) -> None:
    """Names and values below one another; what is empty is left out."""
    shown = {name: _cell(value) for name, value in fields.items()}
    shown = {name: text for name, text in shown.items() if text}
    width = max(map(len, shown), default=0)
    for name, text in shown.items():
        click.echo(f"{name:<{width}}  {text}")


def moment(text: object) -> str:
    """A moment of the API (RFC 3339) without what nobody reads."""
    found = str(text or "")
    day, _, clock = found.partition("T")
    return f"{day} {clock[:8]}" if clock else found


def duration_s(option: str, text: str) -> int:
    """Seconds of `90s`, `30m`, `2h`, `1d12h`."""
    if not _DURATION.fullmatch(text):
        raise BulkheadError(f"{option} {text[:40]!r}: expected a time such as 30m, 2h or 1d12h")
    return sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"([0-9]+)([smhdw])", text))


# ---------------------------------------------------------------------------------------------------- completing names


def completing(
    path: str, member: str, name: str, about: str, **params: str
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What completes a word by what the API has: quick, and silent where it does not answer."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = ctx.params
        try:
            run_dir = Path(found.get("run_dir") or ".")
            where = Where(
                run_dir / SOCKET,
                found.get("api_url") or "",
                found.get("ca"),
                found.get("fingerprint") or "",
                read_token(found.get("token_file")),
            )
            with Api(where, COMPLETE_S, COMPLETE_S) as api:
                values = api.get(path, **params)[member]
            return [
                CompletionItem(str(value[name]), help=about.format_map(value))
                for value in values
                if str(value[name]).startswith(incomplete)
            ]
        except (BulkheadError, NoApi, KeyError, TypeError, ValueError, OSError):
            return []

    return complete


container_names = completing("/api/containers", "containers", "name", "{id}, {network}, {state}")
network_names = completing("/api/networks", "networks", "name", "{subnet}")
grant_ids = completing("/api/grants", "grants", "id", "{source} to {target} {protocol}/{port}, {state}")
token_ids = completing("/api/tokens", "tokens", "id", "{name}")
client_names = completing("/api/vpn/clients", "clients", "name", "{address}")
