"""`bulkhead compile`, `plan`, `controller`, `status`, `unseal` and `flows`.

The controller's own modules are imported by its command only: they choose a thread hub.
"""

from __future__ import annotations

import grp
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from controller import agentcli
from controller.asking import ask
from controller.model import BridgeKind
from controller.problems import BulkheadError
from controller.storeoptions import StoreOptions, store_options
from controller.terminal import (
    NO,
    UNKNOWN,
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
    from controller.compile import Compiled, Names
    from controller.model import DesiredState

OVSDB = "unix:/var/run/openvswitch/db.sock"


@click.command("compile")
@file_argument
@click.option("--bridge", help="Only this bridge.")
@click.option("--format", "form", type=click.Choice(["ofctl", "json"]), default="ofctl", show_default=True)
@click.option("--ports", help="Port numbers, as name=number,name=number (default: 1, 2, … in declared order).")
@guarded
def compile_command(file: Path, bridge: str | None, form: str, ports: str | None) -> None:
    """Print the flows that a state FILE compiles to.

    The ofctl form is what `ovs-ofctl -O OpenFlow14 add-flows BRIDGE -` loads. On a bridge whose ports are numbered
    otherwise, give their numbers with --ports.
    """
    from controller.compile import Names
    from controller.statefile import load

    state = load(file).state
    names = Names([state])
    if bridge is not None and state.bridge(bridge) is None:
        raise BulkheadError(f"{file} declares no bridge {bridge!r}; it has {', '.join(b.name for b in state.bridges)}")
    numbers = _port_numbers(ports)
    chosen = [b for b in state.bridges if bridge in (None, b.name)]
    compiled = [_compile(state, b.name, numbers) for b in chosen]
    if form == "json":
        print_json({c.bridge.name: [_flow_json(c, flow, names) for flow in _ordered(c)] for c in compiled})
        return
    for c in compiled:
        _print_ofctl(c, names)


def _port_numbers(text: str | None) -> dict[str, int]:
    out = {}
    for part in filter(None, (text or "").split(",")):
        name, _, number = part.partition("=")
        if not number.isdecimal() or not 0 < int(number) < 0xFF00:
            raise BulkheadError(f"--ports: {part!r} is not name=number, with a number from 1 to 65279")
        out[name] = int(number)
    return out


def _compile(state: DesiredState, name: str, numbers: dict[str, int]) -> Compiled:
    from dataclasses import replace

    from controller.compile import BridgeCompiler, planned_ports

    bridge = state.bridge(name)
    assert bridge is not None
    ports = planned_ports(state, bridge)
    ports = {n: replace(port, number=numbers.get(n, port.number)) for n, port in ports.items()}
    taken: dict[int, str] = {}
    for port in ports.values():
        if port.number in taken:
            raise BulkheadError(
                f"{name}: ports {taken[port.number]} and {port.name} both have number {port.number}; "
                "give every port of the bridge with --ports"
            )
        taken[port.number] = port.name
    return BridgeCompiler().compile(state, bridge, ports)


def _ordered(compiled: Compiled) -> list[Any]:
    return sorted(compiled.flows.values(), key=lambda f: (f.table, -f.priority, f.key))


def _flow_json(compiled: Compiled, flow: Any, names: Names) -> dict[str, object]:
    from controller.pipeline import table_name

    app, name = names.owner(flow.cookie) or ("?", "?")
    mesh = compiled.bridge.kind is BridgeKind.MESH
    return {
        "table": flow.table,
        "table_name": table_name(flow.table, mesh=mesh),
        "priority": flow.priority,
        "app": app,
        "object": name,
        "cookie": f"{flow.cookie:#x}",
        "match": str(flow.match),
        "actions": flow.actions_text,
    }


def _print_ofctl(compiled: Compiled, names: Names) -> None:
    from controller.pipeline import table_name

    click.echo(f"# {compiled.bridge.name}: {len(compiled.flows)} flows")
    table = None
    for flow in _ordered(compiled):
        if flow.table != table:
            table = flow.table
            click.echo(f"# {table_name(flow.table, mesh=compiled.bridge.kind is BridgeKind.MESH)}")
        click.echo(str(flow))


def _group(name: str | None) -> int | None:
    """The number of a group. Raises `BulkheadError`."""
    if name is None or name.isdecimal():
        return int(name) if name else None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise BulkheadError(f"there is no group {name}; name another with --socket-group") from None


@click.command()
@file_argument
@run_dir_option
@agentcli.state_dir_option
@agentcli.ovsdb_option
@json_option
@store_options
@guarded
def plan(file: Path, run_dir: Path, state_dir: Path, ovsdb: str, as_json: bool, store: StoreOptions) -> None:
    """Show what a state FILE would change on this host and in its switches; exit 1 if anything. Changes nothing.

    The host's part needs root; the flows' part needs the running controller. What cannot be told is said.
    """
    from controller.statefile import load
    from controller.verify.gate import try_proof

    try_proof(load(file).state)  # every problem, before asking
    host, no_host = _planned_host(file, run_dir, state_dir, ovsdb, store.or_running(run_dir))
    flows, no_flows = _planned_flows(file, run_dir)
    if as_json:
        print_json({"host": host, "bridges": flows} | ({"unknown": list(filter(None, (no_host, no_flows)))}))
    else:
        if host is not None:
            agentcli.print_plan(host)
        for bridge in flows or ():
            _print_plan(bridge)
    for why in filter(None, (no_host, no_flows)):
        say(f"bulkhead: {why}")
    if host is None and flows is None:
        sys.exit(UNKNOWN)
    if host or any(bridge["changes"] for bridge in flows or ()):
        sys.exit(NO)


def _planned_host(
    file: Path, run_dir: Path, state_dir: Path, ovsdb: str, store: StoreOptions
) -> tuple[list[dict[str, str]] | None, str]:
    if os.geteuid() != 0:
        return None, "the host's part of the plan needs root; run this with sudo"
    try:
        return agentcli.plan_host(file, run_dir, state_dir, ovsdb, store), ""
    except BulkheadError as exc:
        return None, f"the host's part of the plan cannot be told: {exc}"


def _planned_flows(file: Path, run_dir: Path) -> tuple[list[dict[str, Any]] | None, str]:
    try:
        bridges: list[dict[str, Any]] = ask(run_dir, {"ask": "plan", "file": str(file.resolve())})["bridges"]
    except BulkheadError as exc:
        return None, f"the flows' part of the plan cannot be told: {exc}"
    return bridges, ""


def _print_plan(bridge: dict[str, Any]) -> None:
    if not bridge["connected"]:
        click.echo(f"{bridge['bridge']}: not connected")
        return
    click.echo(
        f"{bridge['bridge']}: {bridge['added']} to add, {bridge['changed']} to change, {bridge['deleted']} to delete"
    )
    colours = {"+": "green", "~": "yellow", "-": "red"}
    for change in bridge["changes"]:
        line = f"  {change['sign']} {change['app']} {change['object']}  {change['flow']}"
        click.secho(line, fg=colours[change["sign"]])


@click.command()
@file_argument
@click.option(
    "--listen", multiple=True, default=["tcp:127.0.0.1:6653"], show_default=True, help="tcp:…, ssl:… or unix:PATH"
)
@click.option("--private-key", type=click.Path(path_type=Path), help="For ssl: our private key, PEM.")
@click.option("--certificate", type=click.Path(path_type=Path), help="For ssl: our certificate, PEM.")
@click.option("--ca-cert", type=click.Path(path_type=Path), help="For ssl: the CA that switches' certificates are of.")
@click.option("--crl", type=click.Path(path_type=Path), help="For ssl: the CA's list of revoked certificates, PEM.")
@click.option("--ovsdb", default=OVSDB, show_default=True, help="Where to read bridges' names and settings; '' to not.")
@click.option("--socket-group", help="A group, by name or number, that may ask how everything is: the API's.")
@click.option("--seal", is_flag=True, help="Drop all from a port whose packets leak by foreign flows, until cleared.")
@click.option("-v", "--verbose", is_flag=True, help="Log every event to standard error too.")
@run_dir_option
@events_dir_option
@store_options
@guarded
def controller(
    file: Path,
    listen: tuple[str, ...],
    private_key: Path | None,
    certificate: Path | None,
    ca_cert: Path | None,
    crl: Path | None,
    ovsdb: str,
    socket_group: str | None,
    seal: bool,
    verbose: bool,
    run_dir: Path,
    events_dir: Path,
    store: StoreOptions,
) -> None:
    """Run the OpenFlow controller for a state FILE, in the foreground.

    SIGHUP (or a changed FILE) makes it read FILE again; SIGTERM stops it, and the switches keep their flows.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from controller import shell  # here, not above: it chooses the thread hub
    from controller.listen import Tls, parse

    given = (private_key, certificate, ca_cert)
    if any(given) and not all(given):
        raise BulkheadError("--private-key, --certificate and --ca-cert go together; give all three")
    if crl and not any(given):
        raise BulkheadError("--crl goes with --private-key, --certificate and --ca-cert; give all four")
    tls = Tls(private_key, certificate, ca_cert, crl) if private_key and certificate and ca_cert else None
    addresses = tuple(parse(text, tls) for text in listen)
    settings = shell.Settings(
        file,
        addresses,
        run_dir,
        events_dir,
        ovsdb or None,
        seal,
        store.addresses,
        store.tls,
        store.node,
        _group(socket_group),
    )
    shell.serve(settings)


@click.command()
@run_dir_option
@json_option
@guarded
def status(run_dir: Path, as_json: bool) -> None:
    """Show the running controller and its bridges, and the agent's host; exit 1 if any is not as declared, leaks or is
    sealed."""
    reply = ask(run_dir, {"ask": "status"})
    host = agentcli.host_status(run_dir)
    good = all(b["phase"] == "steady" and not b["leaks"] and not b["sealed"] for b in reply["bridges"])
    good = good and (host is None or host["settled"])
    if as_json:
        print_json(reply | {"host": host})
    else:
        _print_status(reply)
        if host is not None:
            agentcli.print_host_status(host)
    if not good:
        sys.exit(NO)


@click.command()
@click.argument("bridge")
@click.argument("port")
@run_dir_option
@json_option
@guarded
def unseal(bridge: str, port: str, run_dir: Path, as_json: bool) -> None:
    """Let the packets of a sealed PORT of BRIDGE in again. If they still leak, `--seal` seals it again."""
    reply = ask(run_dir, {"ask": "unseal", "bridge": bridge, "port": port})
    if as_json:
        print_json(reply)
    else:
        click.echo(f"port {port} of {bridge} is not sealed any more")


def _print_status(reply: dict[str, Any]) -> None:
    click.echo(
        f"controller pid {reply['pid']}, up {reply['uptime_s']:.0f} s, {' '.join(reply['listen'])}, "
        f"state {reply['state']} of {reply['state_file']}"
    )
    grid = columns("BRIDGE", "KIND", "NETWORK", "STATE", "FLOWS", "LEARNED", "FOREIGN", "EGRESS", "MISSING PORTS")
    for b in reply["bridges"]:
        if not b["connected"]:
            grid.add_row(b["name"], b["kind"], b["network"], "away", "", "", "", "", "")
            continue
        egress = {None: "", True: "up", False: "DOWN"}[b["egress_up"]]
        counts = [str(b[key]) for key in ("flows", "learned", "foreign")]
        grid.add_row(b["name"], b["kind"], b["network"], b["phase"], *counts, egress, " ".join(b["missing_ports"]))
    print_grid(grid)
    for b in reply["bridges"]:
        for warning in b.get("warnings", ()):
            click.echo(warning)
        for leak in b["leaks"]:
            click.secho(f"{b['name']} LEAKS: {leak['text']}", fg="red")
        for port, why in b["sealed"].items():
            then = (
                f"when it is mended: bulkhead unseal {b['name']} {port}"
                if why == "leak"
                else "bulkhead incident status"
            )
            click.echo(f"port {port} of {b['name']} is sealed ({why}); {then}")
    if reply["undeclared"]:
        click.echo(f"connected but not declared: {', '.join(reply['undeclared'])}")
    if reply["internal_errors"]:
        click.echo(f"{reply['internal_errors']} internal error(s); see: bulkhead events --kind internal_error")


@click.command()
@click.argument("bridges", nargs=-1)
@run_dir_option
@json_option
@guarded
def flows(bridges: tuple[str, ...], run_dir: Path, as_json: bool) -> None:
    """Show the flows that BRIDGES (default: all) hold right now, with table, app and object names."""
    names = bridges or tuple(b["name"] for b in ask(run_dir, {"ask": "status"})["bridges"] if b["connected"])
    replies = [ask(run_dir, {"ask": "flows", "bridge": name}) for name in names]
    if as_json:
        print_json({reply["bridge"]: reply["flows"] for reply in replies})
        return
    for reply in replies:
        click.echo(f"{reply['bridge']}: {len(reply['flows'])} flows")
        grid = columns("TABLE", "PRIO", "APP", "OBJECT", "PACKETS", "MATCH", "ACTIONS")
        for f in reply["flows"]:
            app = f"{f['app']}*" if f["learned"] else f["app"]
            name = f"{f['object']} ({f['container']})" if f["container"] else f["object"]
            row = (f["table_name"], str(f["priority"]), app, name, str(f["packets"]), f["match"], f["actions"])
            grid.add_row(*map(escape, row))
        print_grid(grid)
