"""The command line. Exit codes: 0 good, 1 the answer is no (invalid, unsafe, differs), 2 could not find out.

What is printed is a table for people or, with `--json`, one JSON value. Problems go to standard error, one line each,
never a traceback. The controller's modules are imported by its own command only: they choose a thread hub.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from controller import agentcli, apicli, eventview
from controller.apiterm import use_api, where_options
from controller.asking import ask
from controller.checkcli import check
from controller.client import Where
from controller.clientcli import client
from controller.compile import BridgeCompiler, Compiled, Names, planned_ports
from controller.completioncli import completion
from controller.containercli import COMMANDS as CONTAINER_COMMANDS
from controller.eventread import Filter, follow, last_seq, read
from controller.events import Kind, Record, encode
from controller.eventverify import verify
from controller.firewallcli import firewall
from controller.grantcli import grant
from controller.hostcli import verify as verify_host
from controller.incidentcli import COMMANDS as INCIDENT_COMMANDS
from controller.mcpcli import mcp
from controller.model import BridgeKind, DesiredState
from controller.networkcli import verify_network_config
from controller.pipeline import table_name
from controller.pkicli import pki
from controller.problems import BulkheadError
from controller.proofcli import COMMANDS as PROOF_COMMANDS
from controller.routercli import COMMANDS as ROUTER_COMMANDS
from controller.statefile import load
from controller.storecli import store
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
from controller.tokencli import token
from controller.unitscli import units
from controller.verify.gate import try_proof
from controller.vpncli import vpn
from controller.wgcli import wg
from lab.cli import lab

OVSDB = "unix:/var/run/openvswitch/db.sock"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bulkhead")
def main() -> None:
    """Keep two networks on the same hosts apart, and prove it."""


main.add_command(lab)
main.add_command(verify_host)
main.add_command(firewall)
main.add_command(vpn)
main.add_command(store)
main.add_command(units)
main.add_command(verify_network_config)
main.add_command(pki)
main.add_command(wg)
main.add_command(apicli.api)
main.add_command(completion)
main.add_command(client)
for command in (
    check,
    *PROOF_COMMANDS,
    *agentcli.COMMANDS,
    *CONTAINER_COMMANDS,
    *ROUTER_COMMANDS,
    *INCIDENT_COMMANDS,
    grant,
    token,
    mcp,
):
    main.add_command(command)


@main.command("compile")
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
    click.echo(f"# {compiled.bridge.name}: {len(compiled.flows)} flows")
    table = None
    for flow in _ordered(compiled):
        if flow.table != table:
            table = flow.table
            click.echo(f"# {table_name(flow.table, mesh=compiled.bridge.kind is BridgeKind.MESH)}")
        click.echo(str(flow))


@main.command()
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


@main.command()
@file_argument
@click.option(
    "--listen", multiple=True, default=["tcp:127.0.0.1:6653"], show_default=True, help="tcp:…, ssl:… or unix:PATH"
)
@click.option("--private-key", type=click.Path(path_type=Path), help="For ssl: our private key, PEM.")
@click.option("--certificate", type=click.Path(path_type=Path), help="For ssl: our certificate, PEM.")
@click.option("--ca-cert", type=click.Path(path_type=Path), help="For ssl: the CA that switches' certificates are of.")
@click.option("--crl", type=click.Path(path_type=Path), help="For ssl: the CA's list of revoked certificates, PEM.")
@click.option("--ovsdb", default=OVSDB, show_default=True, help="Where to read bridges' names and settings; '' to not.")
@click.option("--socket-group", type=int, help="The number of a group that may ask how everything is: the API's.")
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
    socket_group: int | None,
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
        file, addresses, run_dir, events_dir, ovsdb or None, seal, store.addresses, store.tls, store.node, socket_group
    )
    shell.serve(settings)


@main.command()
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


@main.command()
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


@main.command()
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


@main.command()
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
