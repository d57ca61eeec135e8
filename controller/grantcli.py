"""`bulkhead grant`: permissions for one flow across two networks, by the HTTP API."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import click

from controller.apiterm import (
    asks_api,
    cells,
    coloured,
    container_names,
    duration_s,
    grant_ids,
    moment,
    print_fields,
    tell,
    waits,
    working,
)
from controller.client import Api, plain, segment
from controller.problems import BulkheadError
from controller.terminal import columns, json_option, print_grid, print_json

STATES = ("requested", "approved", "denied", "revoked", "expired")
_PORT = re.compile(r"(?:(tcp|udp|sctp)/)?([0-9]{1,5})", re.ASCII)
grant_argument = click.argument("number", metavar="ID", shell_complete=grant_ids)


@click.group()
def grant() -> None:
    """Ask for, approve and revoke permissions for one flow across two networks."""


@grant.command("list")
@click.option("--state", type=click.Choice(STATES), help="Only those.")
@json_option
@asks_api
def list_grants(api: Api, state: str | None, as_json: bool) -> None:
    """List grants, whoever asked for them and whatever became of them."""
    found = api.get("/api/grants")
    grants = [g for g in found["grants"] if state in (None, g["state"])]
    if as_json:
        print_json({"grants": grants})
        return
    names = _names(api)
    grid = columns("ID", "FROM", "TO", "PORT", "STATE", "FLOW", "EXPIRES", "ASKED BY", "REASON")
    for g in grants:
        grid.add_row(
            *cells(g["id"], names(g["source"]), names(g["target"]), f"{g['protocol']}/{g['port']}"),
            coloured(g["state"]),
            *cells(_flow(g), moment(g["expires_at"]), g["requested_by"], g["reason"]),
        )
    print_grid(grid)


@grant.command("show")
@grant_argument
@json_option
@asks_api
def show(api: Api, number: str, as_json: bool) -> None:
    """Show one grant. Exit 1 if it is not there."""
    found = api.get(f"/api/grants/{segment(number)}")
    if as_json:
        print_json(found)
    else:
        _print_grant(found, _names(api))


def _names(api: Api) -> Callable[[str], str]:
    """What tells a container's name with its id."""
    known = {c["id"]: c["name"] for c in api.get("/api/containers")["containers"]}
    return lambda number: f"{known[number]} ({number})" if number in known else number


def _flow(g: dict[str, Any]) -> str:
    """Whether the flow is open now; what was decided may not be carried out yet."""
    if g["realized"] or g["state"] in ("requested", "denied"):
        return "open" if g["state"] == "approved" else "shut"
    return f"{'not open yet' if g['state'] == 'approved' else 'may still be open'}: {g['why']}"


def _print_grant(g: dict[str, Any], names: Callable[[str], str]) -> None:
    decided = f"{moment(g['decided_at'])} by {g['decided_by']}" if g["decided_by"] else ""
    print_fields(
        {
            "id": g["id"],
            "from": names(g["source"]),
            "to": f"{names(g['target'])} {g['protocol']}/{g['port']}",
            "reason": g["reason"],
            "asked": f"{moment(g['requested_at'])} by {g['requested_by']}, for {g['duration_s']} s",
            "state": g["state"],
            "decided": decided,
            "expires": moment(g["expires_at"]),
            "flow": _flow(g),
        }
    )


@grant.command("request")
@click.argument("source", metavar="FROM", shell_complete=container_names)
@click.argument("target", metavar="TO", shell_complete=container_names)
@click.argument("port", metavar="PORT")
@click.option("--reason", required=True, help="What for; whoever approves it reads this.")
@click.option("--for", "duration", required=True, metavar="TIME", help="How long it holds, from the approval: 30m, 2h.")
@click.option("--idempotency-key", "key", default="", help="The same key again asks for nothing twice.")
@json_option
@asks_api
def request(api: Api, source: str, target: str, port: str, reason: str, duration: str, key: str, as_json: bool) -> None:
    """Ask that container FROM may open connections to PORT of container TO, in another network.

    FROM and TO are names or ids. PORT is tcp/8080, 8080, udp/53, or the name of a service of TO. It opens nothing until
    somebody approves it.
    """
    held_s = duration_s("--for", duration)
    from_, to = (api.get(f"/api/containers/{segment(name)}") for name in (source, target))
    protocol, number = _read_port(port, to)
    body = {
        "source": from_["id"], "target": to["id"], "protocol": protocol, "port": number, "reason": reason, "duration_s": held_s
    }  # fmt: skip
    made = api.post("/api/grants", body, key=key)
    if as_json:
        print_json(made)
        return
    click.echo(
        f"grant {made['id']} is asked for: {from_['name']} to {to['name']} {protocol}/{number}. It opens nothing until "
        f"somebody approves it: bulkhead grant approve {made['id']}"
    )


def _read_port(text: str, target: dict[str, Any]) -> tuple[str, int]:
    found = _PORT.fullmatch(text)
    if found is not None and 0 < int(found[2]) < 65536:
        return found[1] or "tcp", int(found[2])
    for service in target["services"]:
        if service["name"] == text:
            return service["protocol"], service["port"]
    names = ", ".join(service["name"] for service in target["services"]) or "none"
    raise BulkheadError(
        f"PORT {text[:40]!r}: expected tcp/8080, 8080, udp/53 or a service of {plain(target['name'])}; it has {plain(names)}"
    )


def _decide(api: Api, number: str, verb: str, done: Callable[[Any], str], asked: dict[str, Any], as_json: bool) -> None:
    with working(f"{verb} of grant {number}"):
        reply = api.post(f"/api/grants/{segment(number)}/{verb}", **asked)
    tell(reply, lambda g: f"grant {number} is {done(g)}", as_json)


@grant.command("approve")
@grant_argument
@waits
@json_option
@asks_api
def approve(api: Api, number: str, asked: dict[str, Any], as_json: bool) -> None:
    """Approve what somebody else has asked for, and wait until it is open."""
    began = time.monotonic()

    def done(approved: Any) -> str:
        return f"open after {time.monotonic() - began:.1f} s, until {moment(approved['expires_at'])}"

    _decide(api, number, "approve", done, asked, as_json)


@grant.command("deny")
@grant_argument
@waits
@json_option
@asks_api
def deny(api: Api, number: str, asked: dict[str, Any], as_json: bool) -> None:
    """Deny what was asked for. It never opens."""
    _decide(api, number, "deny", lambda _: "denied", asked, as_json)


@grant.command("revoke")
@grant_argument
@waits
@json_option
@asks_api
def revoke(api: Api, number: str, asked: dict[str, Any], as_json: bool) -> None:
    """Close a grant before its time, with every connection it let in."""
    _decide(api, number, "revoke", lambda _: "revoked and closed", asked, as_json)
