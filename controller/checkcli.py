"""`bulkhead check`: everything that is wrong with a state file, or with any flows in ovs-ofctl's syntax.

Imports the readers of state files and of flows, the proof, and what commands share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from controller import statetext
from controller.compile import planned_ports
from controller.events import JSON
from controller.flow import Flow
from controller.flowtext import ReadFlows, names_in, read_flow, read_flows
from controller.frame import LOCAL_NAME
from controller.model import DesiredState
from controller.problems import BulkheadError, InvalidInput, Problem, Severity, warning
from controller.statefile import load
from controller.terminal import NO, UNKNOWN, columns, guarded, json_option, print_grid, print_json, print_problems
from controller.verify.gate import try_proof
from controller.verify.lint import Remark, TableUse, crossings, lint, tables
from controller.verify.node import Held, Node
from controller.verify.prove import Finding, prove

SAME = {"replies-astray": "vpn-replies-into-warp"}
"""What the reader of state files calls the same thing."""
ADDED = frozenset(("dead-flow", "unreachable-table", "fragments-pass", "hidden-flow"))
"""What only looking at the flows together can tell; the rest the reader of state files has said in its own words."""
FINDINGS = 60
PARTIAL = "old-dump"
"""The warning about a dump that does not tell everything: that nothing bad is in it says nothing of the switch."""


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--flows", "dump", metavar="FLOWS", help="Judge these flows: a file of ovs-ofctl's, or - for standard input."
)
@click.option(
    "--bridge", help="With FILE and --flows: the bridge that holds them; they are held against what FILE allows."
)
@json_option
@guarded
def check(file: Path | None, dump: str | None, bridge: str | None, as_json: bool) -> None:
    """Say everything that is wrong with a state FILE, or with any flows of a switch; exit 1 if they cannot be used.

    Exit 2 if that cannot be found out: a dump of OpenFlow 1.0 leaves out what flows write (take ovs-ofctl -O OpenFlow14).
    FLOWS is what `ovs-ofctl dump-flows`, `ovs-ofctl add-flows` or `ovs-appctl bridge/dump-flows` print or read: overlaps, flows
    that never do anything, learned flows nobody reads, services robbed, flooding. Every remark has a packet that shows it.
    """
    if dump is None:
        if file is None:
            raise click.UsageError("name a state FILE, or flows with --flows FLOWS")
        if bridge is not None:
            raise click.UsageError("--bridge goes with --flows")
        _check_state(file, as_json)
    else:
        _check_flows(file, dump, bridge, as_json)


# ---------------------------------------------------------------------------------------------------------- state files


def _check_state(file: Path, as_json: bool) -> None:
    try:
        loaded = load(file)
        try_proof(loaded.state)
    except InvalidInput as exc:
        problems = _shown(file, exc.problems)
        if as_json:
            print_json({"valid": False, "problems": [p.as_dict() for p in problems]})
        else:
            print_problems(problems)
        sys.exit(NO)
    problems = _shown(file, loaded.problems)
    if as_json:
        print_json({"valid": True, "state": loaded.state.digest, "problems": [p.as_dict() for p in problems]})
        return
    print_problems(problems)
    networks = ", ".join(f"{n.name} ({len(n.members)} members)" for n in loaded.state.networks)
    click.echo(f"{file} is valid: {networks}; {len(problems)} warning(s); state {loaded.state.digest}")


def _shown(file: Path, problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The problems, with packets that show them, and what only looking at the literal flows together can tell."""
    remarks: dict[tuple[str, str], Remark] = {}
    for bridge, texts in _literal(file).items():
        for path, remark in _judged(f"openflow.bridges.{bridge}", texts):
            remarks.setdefault((path, SAME.get(remark.code, remark.code)), remark)
    out = []
    for problem in problems:
        shows = remarks.get((problem.path, problem.code))
        out.append(replace(problem, example=shows.example) if shows is not None else problem)
    told = {(problem.path, problem.code) for problem in out}
    for (path, code), remark in remarks.items():
        if code in ADDED and (path, code) not in told:
            out.append(_problem(remark, path, str(remark.flow), warns=True))
    return tuple(out)


def _literal(file: Path) -> dict[str, list[str]]:
    """The flows that stand in a state file, by bridge, as far as it has the shape of one."""
    try:
        tree: Any = statetext.parse(statetext.read(file), str(file))[0]
    except InvalidInput:
        return {}
    tree = tree.get("stateConfig", tree)
    for key in ("openflow", "bridges"):
        tree = tree.get(key) if isinstance(tree, dict) else None
    found = tree.items() if isinstance(tree, dict) else ()
    flows = {str(name): of.get("flows") if isinstance(of, dict) else None for name, of in found}
    return {
        name: [text for text in texts if isinstance(text, str)]
        for name, texts in flows.items()
        if isinstance(texts, list)
    }


def _judged(where: str, texts: list[str]) -> list[tuple[str, Remark]]:
    """Remarks on literal flows as if a switch held them as they stand, each with its path."""
    numbers = _numbered(names_in("\n".join(texts)))
    paths: dict[Flow, str] = {}
    for index, text in enumerate(texts):
        try:
            paths.setdefault(read_flow(text, numbers), f"{where}.flows[{index}]")
        except InvalidInput:
            continue  # told already, in the words of state files
    return [(paths[remark.flow], remark) for remark in lint(Held.of(where, numbers, paths))]


# ------------------------------------------------------------------------------------------------------------ any flows


def _check_flows(file: Path | None, dump: str, bridge: str | None, as_json: bool) -> None:
    text = _text(dump)
    if not text.strip():
        raise BulkheadError(
            f"{dump}: empty, so there is nothing to judge; expected flows. Did the command that dumps them fail?"
        )
    state = load(file).state if file is not None else None
    name = _bridge(state, bridge, dump)
    numbers = _numbers(state, name, text)
    try:
        read = read_flows(text, numbers, dump)
    except InvalidInput as exc:
        if not as_json:
            raise
        print_json({"valid": False, "flows": 0, "problems": [p.as_dict() for p in exc.problems], "tables": []})
        sys.exit(NO)
    held = Held.of(name, numbers, read.flows)
    remarks = [*lint(held), *(_against(state, held) if state is not None else ())]
    where = {id(flow): line for flow, line in zip(read.flows, read.lines, strict=True)}
    problems = [*read.problems, *(_at(remark, dump, where) for remark in dict.fromkeys(remarks))]
    problems.sort(key=lambda p: (p.severity is not Severity.ERROR, int(p.path.rpartition(":")[2] or 0)))
    bad = any(p.severity is Severity.ERROR for p in problems)
    partial = any(p.code == PARTIAL for p in problems)
    if as_json:
        print_json(_as_data(problems, read, tables(held)) | ({"valid": None} if partial and not bad else {}))
    else:
        print_problems(tuple(problems))
        _print_tables(tables(held))
        errors = sum(p.severity is Severity.ERROR for p in problems)
        click.echo(f"{dump}: {len(read.flows)} flows; {errors} error(s), {len(problems) - errors} warning(s)")
        if partial and not bad:
            click.echo(
                "What the switch holds could not be found out from this dump: it leaves out what the flows write"
            )
    if bad:
        sys.exit(NO)
    if partial:
        sys.exit(UNKNOWN)


def _text(dump: str) -> str:
    if dump == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    try:
        return Path(dump).read_text(errors="replace")
    except OSError as exc:
        raise BulkheadError(f"{dump}: {exc.strerror}; expected a file with flows, or - for standard input") from exc


def _bridge(state: DesiredState | None, bridge: str | None, dump: str) -> str:
    if state is None:
        return bridge or Path(dump).name
    names = [b.name for b in state.bridges]
    if bridge is None:
        raise BulkheadError(f"which bridge holds the flows of {dump}? Say it with --bridge: {', '.join(names)}")
    if bridge not in names:
        raise BulkheadError(f"the state file declares no bridge {bridge!r}; it has {', '.join(names)}")
    return bridge


def _numbers(state: DesiredState | None, bridge: str, text: str) -> dict[str, int]:
    """Numbers for the ports: those of the state's own order, and free ones for names that only the flows know."""
    known: dict[str, int] = {}
    if state is not None:
        declared = state.bridge(bridge)
        assert declared is not None
        known = {name: port.number for name, port in planned_ports(state, declared).items()}
    return _numbered(names_in(text), known)


def _numbered(names: Iterable[str], known: Mapping[str, int] | None = None) -> dict[str, int]:
    numbers = dict(known or {})
    for name in names:
        if name.isdecimal():
            numbers.setdefault(f"port {name}", int(name))
    free = (n for n in range(1, 0xFF00) if n not in set(numbers.values()))
    for name in names:
        if name != LOCAL_NAME and not name.isdecimal() and name not in numbers:
            numbers[name] = next(free)
    return numbers | {LOCAL_NAME: 0xFFFE}


def _against(state: DesiredState, held: Held) -> list[Remark]:
    """What the flows let through that the state does not allow, one remark a flow."""
    bridge = state.bridge(held.name)
    assert bridge is not None
    declared = planned_ports(state, bridge)
    out = [remark for _, remark in crossings(state, Node({held.name: held}))]
    found: dict[Flow, list[Finding]] = {}
    for finding in prove(state, bridge, declared, held.flows, most=FINDINGS):
        if finding.counterexample is None or not finding.counterexample.way:
            raise BulkheadError(f"{held.name}: {finding.text}")
        found.setdefault(finding.counterexample.way[-1], []).append(finding)
    return out + [_not_allowed(held, flow, findings) for flow, findings in found.items()]


def _not_allowed(held: Held, flow: Flow, findings: list[Finding]) -> Remark:
    """What of a flow the state does not allow: the ports, and a packet between the first two that are declared."""
    findings.sort(key=lambda finding: finding.ports[0] not in held.numbers)
    example = findings[0].counterexample
    assert example is not None
    pairs = ", ".join(" to ".join(finding.ports) for finding in findings[:6])
    more = f" and {len(findings) - 6} more" if len(findings) > 6 else ""
    fix = f"The state allows no such packets from {pairs}{more}. Take the flow away, or narrow it."
    packet = f"in_port={example.in_port},{example.packet.partition(',')[2]}"
    text = f"{packet} leaves by {example.out_port}"
    return Remark("not-allowed", Severity.ERROR, flow, "what the state allows, and no more", fix, text)


def _at(remark: Remark, dump: str, where: Mapping[int, tuple[int, str]]) -> Problem:
    line, text = where[id(remark.flow)]
    if remark.other is not None and id(remark.other) in where:  # in the words of whoever wrote it
        at, theirs = where[id(remark.other)]
        remark = replace(remark, fix=remark.fix.replace(f"'{remark.other}'", f"'{theirs}' (line {at})"))
    return _problem(remark, f"{dump}:{line}", text)


def _problem(remark: Remark, path: str, text: str, *, warns: bool = False) -> Problem:
    found = f"'{text}'"
    if warns:
        return replace(warning(remark.code, path, found, remark.expected, remark.fix), example=remark.example)
    return Problem(remark.severity, remark.code, path, found, remark.expected, remark.fix, remark.example)


def _as_data(problems: list[Problem], read: ReadFlows, used: tuple[TableUse, ...]) -> dict[str, JSON]:
    return {
        "valid": not any(p.severity is Severity.ERROR for p in problems),
        "flows": len(read.flows),
        "problems": [p.as_dict() for p in problems],
        "tables": [dict(use._asdict()) for use in used],
    }


def _print_tables(used: tuple[TableUse, ...]) -> None:
    grid = columns("TABLE", "FLOWS", "REACHED", "A MISS")
    for use in used:
        grid.add_row(str(use.table), str(use.flows), "yes" if use.reached else "no", use.miss)
    print_grid(grid)
