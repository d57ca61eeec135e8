"""`bulkhead container`, `service`, `network` and `operation`: what runs, by the HTTP API."""

from __future__ import annotations

import shlex
import sys
import time
from typing import Any

import click

from controller.apiterm import (
    asks_api,
    cells,
    coloured,
    container_names,
    may_go_on,
    moment,
    network_names,
    print_fields,
    rows,
    tell,
    waits,
    working,
)
from controller.client import Api, plain, segment
from controller.problems import BulkheadError
from controller.terminal import NO, columns, json_option, print_grid, print_json

network_option = click.option("--network", shell_complete=network_names, help="Only of this network.")
name_argument = click.argument("name", metavar="CONTAINER", shell_complete=container_names)
POLL_S = 0.2


@click.group()
def container() -> None:
    """Create, look at, start, stop and delete containers. CONTAINER is a name or an id."""


@container.command("list")
@network_option
@click.option("--node", help="Only of this host.")
@json_option
@asks_api
def list_containers(api: Api, network: str | None, node: str | None, as_json: bool) -> None:
    """List containers, the declared ones and those that were created."""
    found = api.get("/api/containers", network=network, node=node)
    if as_json:
        print_json(found)
        return
    grid = columns("ID", "NAME", "NETWORK", "ADDRESS", "PORT", "NODE", "STATE", "ORIGIN", "SERVICES")
    for c in found["containers"]:
        names = [f"{s['name']} {s['protocol']}/{s['port']}" for s in c["services"]]
        known = cells(c["id"], c["name"], c["network"], c["address"], c["port"], c["node"])
        grid.add_row(*known, coloured(c["state"]), *cells(c["origin"], ", ".join(names)))
    print_grid(grid)
    for c in found["containers"]:
        if c["why"] and c["state"] != "stopped":
            click.echo(f"{c['name']}: {plain(c['why'])}")


@container.command("show")
@name_argument
@json_option
@asks_api
def show(api: Api, name: str, as_json: bool) -> None:
    """Show one container with its services and their health. Exit 1 if it is not there."""
    found = api.get(f"/api/containers/{segment(name)}")
    if as_json:
        print_json(found)
    else:
        _print_container(found)


def _print_container(c: dict[str, Any]) -> None:
    state = f"{c['state']}: {c['why']}" if c["why"] else c["state"]
    made = f"{moment(c.get('created_at'))} by {c['created_by']}" if c.get("created_by") else ""
    print_fields(
        {
            "id": c["id"],
            "name": c["name"],
            "network": c["network"],
            "node": c["node"],
            "address": c["address"],
            "mac": c["mac"],
            "port": c["port"],
            "driver": c.get("driver"),
            "state": state,
            "origin": c["origin"],
            "created": made,
        }
    )
    if c["services"]:
        grid = columns("SERVICE", "PORT", "EXPOSED", "HEALTH")
        values = ((s["name"], f"{s['protocol']}/{s['port']}", s.get("exposed"), s.get("health")) for s in c["services"])
        print_grid(rows(grid, values))


@container.command("create")
@click.argument("name", metavar="NAME")
@click.option("--network", required=True, shell_complete=network_names, help="The network it belongs to.")
@click.option(
    "--service",
    "services",
    multiple=True,
    metavar="NAME:PROTOCOL:PORT[:exposed][:check=CHECK]",
    help="A service it offers, such as api:tcp:9001; CHECK is tcp or http:/PATH. May be repeated.",
)
@click.option("--driver", type=click.Choice(["netns", "lxc"]), help="How it is run (default: netns).")
@click.option("--template", default="", help="The lxc template it is made from.")
@click.option("--command", "command_line", default="", help="What runs in it, as one text; or after --.")
@click.option("--order", type=int, help="When it starts, among others; smaller is earlier.")
@click.option("--id", "number", help="Its id (default: the next free one of the network).")
@click.option("--address", help="Its address (default: the next free one of the network).")
@click.option("--node", help="The host that runs it (default: the API's own).")
@click.argument("words", nargs=-1, metavar="[-- CMD ARG...]", type=click.UNPROCESSED)
@waits
@json_option
@asks_api
def create(
    api: Api,
    name: str,
    network: str,
    services: tuple[str, ...],
    driver: str | None,
    template: str,
    command_line: str,
    order: int | None,
    number: str | None,
    address: str | None,
    node: str | None,
    words: tuple[str, ...],
    asked: dict[str, Any],
    as_json: bool,
) -> None:
    """Create container NAME, and wait until it runs and its flows are in place.

    It is there as a whole or, after a failure, not at all. Example: bulkhead container create web --network privacy
    --service http:tcp:8080 -- python3 -m http.server 8080
    """
    body: dict[str, object] = {"name": name, "network": network, "services": [service(text) for text in services]}
    command = list(words) or _split(command_line)
    optional = {
        "driver": driver, "template": template, "command": command, "order": order, "id": number, "address": address, "node": node
    }  # fmt: skip
    body |= {what: value for what, value in optional.items() if value not in (None, "", [])}
    with working(f"creating {name}"):
        made = api.post("/api/containers/create", body, **asked)
    tell(made, _made, as_json)


def _made(c: dict[str, Any]) -> str:
    where = f"{c['address']} on {c['network']}, port {c['port']}"
    return f"container {c['name']} ({c['id']}) is {c['state']}: {where}"


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise BulkheadError(f"--command {text[:60]!r}: {exc}; write the command after -- instead") from exc


def service(text: str) -> dict[str, object]:
    """A service as the API wants it, from `NAME:PROTOCOL:PORT[:exposed][:check=CHECK]`."""
    name, protocol, port, rest = (*text.split(":", 3), "", "", "", "")[:4]
    if not name or protocol not in ("tcp", "udp", "sctp") or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BulkheadError(f"--service {text[:80]!r}: expected NAME:PROTOCOL:PORT, such as api:tcp:9001")
    out: dict[str, object] = {"name": name, "protocol": protocol, "port": int(port)}
    word, _, more = rest.partition(":")
    if word == "exposed":
        out["exposed"] = True
        rest = more
    if rest.startswith("check="):
        out["check"] = rest.removeprefix("check=")
    elif rest:
        raise BulkheadError(
            f"--service {text[:80]!r}: after the port expected `exposed`, `check=tcp` or `check=http:/PATH`"
        )
    return out


@container.command("delete")
@name_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@waits
@json_option
@asks_api
def delete(api: Api, name: str, yes: bool, asked: dict[str, Any], as_json: bool) -> None:
    """Delete a container that was created; what it holds is lost. On a terminal it asks first."""
    found = api.get(f"/api/containers/{segment(name)}")
    if not may_go_on(f"Delete container {found['name']} ({found['id']}) of {found['network']} and all it holds?", yes):
        raise click.Abort
    with working(f"deleting {found['name']}"):
        gone = api.delete(f"/api/containers/{segment(found['id'])}", **asked)
    tell(gone, lambda _: f"container {found['name']} ({found['id']}) is deleted", as_json)


def _switch(api: Api, name: str, verb: str, done: str, asked: dict[str, Any], as_json: bool) -> None:
    with working(f"{verb} of {name}"):
        reply = api.post(f"/api/containers/{segment(name)}/{verb}", **asked)
    tell(reply, lambda c: f"container {c['name']} ({c['id']}) {done}", as_json)


@container.command("start")
@name_argument
@waits
@json_option
@asks_api
def start(api: Api, name: str, asked: dict[str, Any], as_json: bool) -> None:
    """Start a container that was stopped."""
    _switch(api, name, "start", "runs", asked, as_json)


@container.command("stop")
@name_argument
@waits
@json_option
@asks_api
def stop(api: Api, name: str, asked: dict[str, Any], as_json: bool) -> None:
    """Stop a container; it keeps its id, its address and what it holds."""
    _switch(api, name, "stop", "is stopped", asked, as_json)


@click.group("service")
def service_group() -> None:
    """Look at services."""


@service_group.command("list")
@network_option
@json_option
@asks_api
def list_services(api: Api, network: str | None, as_json: bool) -> None:
    """List the services of all containers, where they are reached, and their health."""
    found = api.get("/api/services", network=network)
    if as_json:
        print_json(found)
        return
    grid = columns("SERVICE", "PORT", "NETWORK", "CONTAINER", "ADDRESS", "NAME", "EXPOSED", "HEALTH")
    names = ("network", "container", "address", "fqdn", "exposed", "health")
    print_grid(
        rows(grid, ((s["name"], f"{s['protocol']}/{s['port']}", *(s[n] for n in names)) for s in found["services"]))
    )


@click.group("network")
def network_group() -> None:
    """Look at networks."""


@network_group.command("list")
@json_option
@asks_api
def list_networks(api: Api, as_json: bool) -> None:
    """List the networks."""
    found = api.get("/api/networks")
    if as_json:
        print_json(found)
        return
    grid = columns("NETWORK", "SUBNET", "GATEWAY")
    print_grid(rows(grid, ((n["name"], n.get("subnet"), n.get("gateway")) for n in found["networks"])))


@click.command("operation")
@click.argument("number", metavar="ID")
@click.option("--wait/--no-wait", default=False, show_default=True, help="Until it is done or has failed.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), default=60.0, show_default=True)
@json_option
@asks_api
def operation(api: Api, number: str, wait: bool, timeout_s: float, as_json: bool) -> None:
    """Say what became of a change that was begun with --no-wait. Exit 1 if it has failed, 2 if it still runs."""
    deadline = time.monotonic() + timeout_s
    with working(f"waiting for {number}"):
        found = api.get(f"/api/operations/{segment(number)}")
        while wait and found["state"] == "running" and time.monotonic() < deadline:
            time.sleep(POLL_S)
            found = api.get(f"/api/operations/{segment(number)}")
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found['kind']} of {found['object']}: {found['state']}")
        result = found.get("result") or {}
        if found["state"] == "failed":
            click.echo(plain(result.get("detail") or result.get("title") or ""))
    if found["state"] != "done":
        sys.exit(NO if found["state"] == "failed" else 2)
