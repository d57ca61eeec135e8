"""`bulkhead reach`, `why` and `trace`: what the proof says of a state's flows, or of what this machine's switches hold.

Imports the reader of state files, the proof, Open vSwitch's tools, and what commands share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from controller.asking import ask
from controller.events import JSON
from controller.model import DesiredState, Ipv4
from controller.ovsctl import Looked, Ovs, Traced, captured
from controller.problems import BulkheadError
from controller.statefile import load
from controller.storeoptions import StoreOptions, store_options
from controller.terminal import (
    NO,
    columns,
    file_argument,
    guarded,
    json_option,
    print_grid,
    print_json,
    progress,
    run_dir_option,
)
from controller.verify.endpoints import Endpoint, endpoints, find, services, vpn_port
from controller.verify.links import End, declared_links
from controller.verify.node import Held, Leg, Node
from controller.verify.packetwords import KEYWORDS, complete, parse, state_bits, words
from controller.verify.reach import Cell, Matrix, Pair, reach
from controller.verify.tell import Teller, Told
from controller.verify.why import Verdict, read_service, why

CORNER = "FROM \\ TO"
state_option = click.option(
    "--state",
    "file",
    type=click.Path(path_type=Path),
    envvar="BULKHEAD_STATE",
    help="The state file [default: the running controller's].",
)


def _state(file: Path | None, run_dir: Path) -> DesiredState:
    """The state of a file, or of the running controller: its file, and what its store holds."""
    if file is not None:
        return load(file).state
    try:
        status = ask(run_dir, {"ask": "status"})
    except BulkheadError as exc:
        raise BulkheadError(f"no state file given with --state FILE, and {exc}") from exc
    return StoreOptions(status["node"], tuple(status["store"])).load(Path(status["state_file"])).state


# --------------------------------------------------------------------------------------------------------------- reach


@click.command("reach")
@file_argument
@click.option("--from", "sources", multiple=True, metavar="NAME", help="Only this row; may be repeated.")
@click.option("--to", "targets", multiple=True, metavar="NAME", help="Only this column; may be repeated.")
@click.option("--against", type=click.Path(path_type=Path), help="Only what differs from this other state FILE.")
@json_option
@store_options
@guarded
def reach_command(
    file: Path,
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    against: Path | None,
    as_json: bool,
    store: StoreOptions,
) -> None:
    """Print who can reach whom by the flows of a state FILE, from the proof.

    Rows send, columns receive. `all`: everything gets there. Names and ports: that alone does. `answers`: only what
    answers the receiver. `no`: no packet at all. With --against, exit 1 if anything differs. With --store, what was
    created and granted counts as well.
    """
    matrix = _matrix(store.load(file).state, sources, targets, str(file))
    if against is None:
        _print_matrix(matrix, as_json)
        return
    old = _matrix(load(against).state, sources, targets, str(against))
    changes = matrix.changes(old)
    _print_changes(changes, against, file, as_json)
    if changes:
        sys.exit(NO)


def _matrix(state: DesiredState, sources: Iterable[str], targets: Iterable[str], what: str) -> Matrix:
    rows = tuple(find(state, word) for word in sources) or endpoints(state)
    to = tuple(find(state, word) for word in targets) or endpoints(state)
    cells: dict[Pair, Cell] = {}
    for part in progress(reach(state, rows, to), len(rows), f"asking for {what}"):
        cells.update(part.cells)
    return Matrix(rows, to, cells)


def _print_matrix(matrix: Matrix, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "endpoints": [_endpoint(e) for e in dict.fromkeys((*matrix.rows, *matrix.columns))],
                "cells": [{"from": a, "to": b, **cell.as_data()} for (a, b), cell in matrix.cells.items()],
            }
        )
        return
    console = Console(highlight=False, emoji=False)
    first = max(len(name) for name in (CORNER, *(e.name for e in matrix.rows)))
    widths = [max(len(target.name), *(len(_text(matrix, e, target)) for e in matrix.rows)) for target in matrix.columns]
    if not console.is_terminal:  # for other programs to cut: a row is a line
        console = Console(highlight=False, emoji=False, width=first + 2 + sum(widths) + 2 * len(widths))
    for number, part in enumerate(_fitting(widths, console.width - first - 2)):
        if number:
            console.print()
        grid = columns(CORNER, *(escape(matrix.columns[at].name) for at in part))
        for source in matrix.rows:
            cells = [matrix.cells.get((source.name, matrix.columns[at].name)) for at in part]
            grid.add_row(escape(source.name), *("-" if cell is None else _colour(cell) for cell in cells))
        console.print(grid)


def _text(matrix: Matrix, source: Endpoint, target: Endpoint) -> str:
    cell = matrix.cells.get((source.name, target.name))
    return "-" if cell is None else cell.text


def _fitting(widths: list[int], room: int) -> list[list[int]]:
    """Columns by number, in groups that fit beside each other; what fits nowhere stands alone."""
    groups: list[list[int]] = []
    left = 0
    for at, width in enumerate(widths):
        if not groups or width > left:
            groups.append([])
            left = room
        groups[-1].append(at)
        left -= width + 2
    return groups


def _endpoint(endpoint: Endpoint) -> dict[str, JSON]:
    bridge, port = endpoint.end
    found: dict[str, JSON] = {"name": endpoint.name, "network": endpoint.network, "role": endpoint.role}
    return found | {"bridge": bridge, "port": port}


def _colour(cell: Cell) -> str:
    style = "green" if cell.open else "cyan" if cell.answers else "dim"
    return f"[{style}]{escape(cell.text)}[/]"


def _print_changes(changes: dict[Pair, tuple[Cell | None, Cell | None]], old: Path, new: Path, as_json: bool) -> None:
    if as_json:
        found = [
            {"from": a, "to": b, "old": was and was.as_data(), "new": now and now.as_data()}
            for (a, b), (was, now) in changes.items()
        ]
        print_json({"old": str(old), "new": str(new), "changes": found})
        return
    if not changes:
        click.echo(f"{old} and {new}: everybody reaches the same")
        return
    grid = columns("FROM", "TO", str(old), str(new))
    for (a, b), (was, now) in changes.items():
        grid.add_row(escape(a), escape(b), _colour(was) if was else "(none)", _colour(now) if now else "(none)")
    print_grid(grid)


# ----------------------------------------------------------------------------------------------------------------- why


@click.command("why")
@click.argument("source", metavar="A")
@click.argument("target", metavar="B")
@click.argument("port", required=False)
@state_option
@run_dir_option
@json_option
@guarded
def why_command(source: str, target: str, port: str | None, file: Path | None, run_dir: Path, as_json: bool) -> None:
    """Say whether A can reach B (by PORT), which rule decides, and what would have to be granted.

    A and B are containers (name, id, port or address), `internet`, `NETWORK/mesh` or `NETWORK/host`. PORT is tcp/9573, 9573,
    udp/53, icmp, or a service's name. Exit 1 if it cannot.
    """
    state = _state(file, run_dir)
    a, b = find(state, source), find(state, target)
    if a.name == b.name:
        raise BulkheadError(f"{source} and {target} are both {a.name}; name two")
    asked = read_service(port, services(b, vpn_port(state, b))) if port is not None else None
    found = why(state, a, b, asked, to=_one_of_many(state, b))
    if as_json:
        print_json({"from": a.name, "to": b.name, **found.as_data()})
    else:
        click.secho(found.answer, fg={Verdict.YES: "green", Verdict.NO: "red"}.get(found.verdict, "yellow"))
        click.echo(f"Decided by {found.decided_by}.")
        if found.verdict is not Verdict.YES:
            click.echo(f"{found.told[-1].ends}.")
            click.echo(f"What would change that: {found.needed}.")
        click.echo("A packet of this kind on its way:")
        _print_told(found.told)
    if found.verdict is not Verdict.YES:
        sys.exit(NO)


# --------------------------------------------------------------------------------------------------------------- trace


@click.command("trace")
@click.argument("port")
@click.argument("packet")
@state_option
@click.option("--live", is_flag=True, help="Also ask this machine's Open vSwitch, for the flows it holds, and compare.")
@click.option("--number", default=1, show_default=True, type=click.IntRange(min=1), help="Which packet of a capture.")
@click.option("--ct-next", "tracked", multiple=True, metavar="STATE", help="What connection tracking says: trk,est")
@run_dir_option
@json_option
@guarded
def trace_command(
    port: str,
    packet: str,
    file: Path | None,
    live: bool,
    number: int,
    tracked: tuple[str, ...],
    run_dir: Path,
    as_json: bool,
) -> None:
    """Show the way of a PACKET that comes in by PORT: tables, whose flow it meets, why, and where it ends.

    PORT is a port's name, BRIDGE:PORT, or a container. PACKET is in ovs-ofctl's words (tcp,nw_dst=10.1.0.201,tp_dst=9573);
    what it does not say is filled in as PORT's owner would. Or it is a capture (FILE.pcap). With --live it goes through the
    flows that the switches hold; exit 1 if Open vSwitch says otherwise than we do.
    """
    state = _state(file, run_dir)
    source = _source(state, port)
    header = _header(state, source, packet, number)
    states = tuple(state_bits(word) for word in tracked)
    teller = Teller(state)
    ovs = Ovs() if live else None
    for last in (False, True):
        node = Node.declared(state) if ovs is None else _live_node(ovs, state)
        _check_port(node, source, packet)
        legs = node.follow(source, header, states)
        differs = (
            []
            if ovs is None
            else [text for part in _stretches(ovs, legs) for text in _compare(ovs, node, part, tracked)]
        )
        if last or not differs:  # flows may have come or gone between the two looks
            break
    told = tuple(teller.tell(leg, node.bridges[leg.bridge]) for leg in legs)
    if as_json:
        found: dict[str, JSON] = {"way": [t.as_data() for t in told], "delivered": _delivered(legs)}
        if live:
            found |= {"agrees": not differs, "differences": list(differs)}
        print_json(found)
    else:
        _print_told(told)
        if live:
            _print_compared(differs)
    if differs:
        sys.exit(NO)


def _check_port(node: Node, source: End, packet: str) -> None:
    """That the port is there, and that the packet names no other."""
    bridge, port = source
    numbers = node.bridges[bridge].numbers
    if port not in numbers:
        raise BulkheadError(
            f"bridge {bridge} has no port {port} on this machine; it is declared and not there. It has {', '.join(numbers)}: "
            "name one of these, or start what makes the port"
        )
    named = None if _is_capture(packet) else parse(packet)[0]
    if named not in (None, port, str(numbers[port])):
        raise BulkheadError(f"in_port={named[:40]}: expected {port} or {numbers[port]}, as PORT says; leave it out")


def _one_of_many(state: DesiredState, target: Endpoint) -> Ipv4 | None:
    """The address that was asked for, where many are behind one port."""
    return target.address if target not in endpoints(state) else None


def _is_capture(text: str) -> bool:
    if text.endswith((".pcap", ".cap", ".pcapng")):
        return True
    try:
        return "=" not in text and text not in KEYWORDS and Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or not one at all
        return False


def _source(state: DesiredState, word: str) -> End:
    """A port by its own name, with its bridge, or by who is behind it."""
    ends = [end for link in declared_links(state).items() for end in link]
    named = {end for end in ends if word in (end[1], ":".join(end))}
    return named.pop() if len(named) == 1 else find(state, word).end


def _header(state: DesiredState, source: End, text: str, number: int) -> int:
    if _is_capture(text):
        packets = captured(Path(text))
        if number > len(packets):
            raise BulkheadError(
                f"{text}: packets it holds: {len(packets)}; expected at least {number}, as --number says"
            )
        return parse(packets[number - 1], lenient=True)[2]
    if not text.strip(" ,\t\n"):
        raise BulkheadError("the packet is empty; expected words such as tcp,nw_dst=10.0.0.2,tp_dst=443, or a capture")
    owner = next((e for e in endpoints(state) if e.end == source), None)
    return complete(text, owner.mac if owner else None, owner.address if owner else None)


def _delivered(legs: tuple[Leg, ...]) -> list[JSON]:
    return [{"bridge": leg.bridge, "port": port} for leg in legs for port, far in leg.sent if far is None]


def _print_told(told: tuple[Told, ...]) -> None:
    for part in told:
        click.secho(f"{part.bridge} from {part.in_port}: {part.packet}", bold=True)
        grid = columns("TABLE", "PRIO", "APP", "OBJECT", "WHAT IT DOES")
        for line in part.lines:
            priority = str(line.flow.priority) if line.flow is not None else ""
            name = "  " * line.depth + line.name
            grid.add_row(*map(escape, (name, priority, line.app, line.object, line.says)))
        print_grid(grid)
        click.secho(part.ends, fg="green" if part.delivered else "red")
        for doubt in part.doubts:
            click.secho(f"not sure: {doubt}", fg="yellow")


# ------------------------------------------------------------------------------------------------------ the live switch


def _live_node(ovs: Ovs, state: DesiredState) -> Node:
    """The declared bridges as the switch has them, and those that patch ports lead to."""
    there = ovs.bridges()
    wanted = [bridge.name for bridge in state.bridges]
    missing = [name for name in wanted if name not in there]
    if missing:
        has = f"it has {', '.join(sorted(there))}" if there else "it has none"
        raise BulkheadError(
            f"this machine's Open vSwitch has no bridge {', '.join(missing)}; {has}. Make what the state file declares, ask "
            "without --live, or say with OVS_RUNDIR which Open vSwitch is meant"
        )
    links = declared_links(state) | ovs.patches()
    held: dict[str, Held] = {}
    while wanted:
        name = wanted.pop()
        if name not in held:
            held[name] = ovs.held(name)
            wanted += [far for (near, _), (far, _) in links.items() if near == name and far in there]
    ends = {(name, port) for name, bridge in held.items() for port in bridge.numbers}
    return Node(held, {near: far for near, far in links.items() if near in ends and far in ends})


def _stretches(ovs: Ovs, legs: tuple[Leg, ...]) -> list[tuple[Leg, ...]]:
    """Legs that one trace of Open vSwitch covers: it follows patch ports by itself, and nothing else."""
    patches = ovs.patches()
    entered_by_patch = set(patches.values())
    out: list[list[Leg]] = []
    for leg in legs:
        if out and (leg.bridge, leg.in_port) in entered_by_patch:
            out[-1].append(leg)
        else:
            out.append([leg])
    return [tuple(stretch) for stretch in out]


def _compare(ovs: Ovs, node: Node, legs: tuple[Leg, ...], tracked: tuple[str, ...]) -> list[str]:
    """Where Open vSwitch says otherwise than we do of one stretch."""
    first = legs[0]
    number = node.bridges[first.bridge].numbers[first.in_port]
    theirs = ovs.trace(first.bridge, words(number, first.packet), tracked)
    return [*_tables(legs, theirs), *_outputs(node, legs, theirs)]


def _tables(legs: tuple[Leg, ...], theirs: Traced) -> list[str]:
    ours = [
        Looked(leg.bridge, step.table, (step.flow.priority, step.flow.cookie) if step.flow is not None else None)
        for leg in legs
        for step in leg.way.steps
    ]
    out = []
    for looked in dict.fromkeys((*ours, *theirs.looked)):
        said, counted = ours.count(looked), theirs.looked.count(looked)
        if said != counted:
            flow = "a miss" if looked.flow is None else f"priority {looked.flow[0]}, cookie {looked.flow[1]:#x}"
            who = "only Open vSwitch" if counted > said else "only we"
            out.append(f"{looked.bridge}, table {looked.table}, {flow}: {who} went through it")
    return out


def _outputs(node: Node, legs: tuple[Leg, ...], theirs: Traced) -> list[str]:
    ours = {
        (leg.bridge, node.bridges[leg.bridge].numbers[port])
        for leg in legs
        for port, far in leg.sent
        if far is None or far not in {(other.bridge, other.in_port) for other in legs[1:]}
    }
    by_us = [f"{bridge}: we say it leaves by {_port(node, bridge, n)}" for bridge, n in sorted(ours - theirs.sent)]
    by_them = [
        f"{bridge}: Open vSwitch says it leaves by {_port(node, bridge, n)}" for bridge, n in sorted(theirs.sent - ours)
    ]
    return by_us + by_them


def _port(node: Node, bridge: str, number: int) -> str:
    return node.bridges[bridge].port(number) if bridge in node.bridges else str(number)


def _print_compared(differs: list[str]) -> None:
    if not differs:
        click.secho("Open vSwitch says the same.", fg="green")
    for text in differs:
        click.secho(f"differs: {text}", fg="red")
