"""`python -m bench`: run the measurements, print a table, write JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench import api, host, hpke, install, proof, router, throughput
from bench.harness import Figure


@click.command()
@click.option("--flows", default=10_000, show_default=True, help="Size of the cold install.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Repetitions; medians count.")
@click.option("--seconds", default=3, show_default=True, help="Length of one iperf3 run.")
@click.option("--connections", default=1000, show_default=True, help="TCP connections for the cache figure.")
@click.option("--containers", default=100, show_default=True, help="Containers of the host that the agent builds.")
@click.option(
    "--only",
    type=click.Choice(["install", "throughput", "proof", "host", "api", "router", "hpke"]),
    help="Just one of the parts.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(
    flows: int, rounds: int, seconds: int, connections: int, containers: int, only: str | None, out: Path | None
) -> None:
    """Measure, in private namespaces, against peers of the same run. Exit 1 if a bar is not met."""
    if os.geteuid() != 0:
        raise click.ClickException("network namespaces need root: sudo make bench")
    figures = list(_measure(flows, rounds, seconds, connections, containers, only))
    report = {"machine": _machine(), "figures": [figure.as_dict() for figure in figures]}
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
    Console(width=150, highlight=False).print(_table(figures))
    if any(figure.met is False for figure in figures):
        raise SystemExit(1)


def _measure(
    flows: int, rounds: int, seconds: int, connections: int, containers: int, only: str | None
) -> Iterator[Figure]:
    if only in (None, "install"):
        click.echo(f"cold install of {flows} flows, {rounds} rounds …", err=True)
        yield from install.measure(flows, rounds)
    if only in (None, "throughput"):
        click.echo(f"iperf3, {rounds} rounds of {seconds} s on each bridge …", err=True)
        yield from throughput.measure(seconds, rounds, connections)
    if only in (None, "proof"):
        click.echo(f"proofs of up to {proof.SIZES[-1]} flows, {rounds} rounds …", err=True)
        yield from proof.measure(rounds)
    if only in (None, "host"):
        click.echo(f"a host of {containers} containers built, built again, damaged, {rounds} rounds …", err=True)
        yield from host.measure(containers, rounds)
    if only in (None, "api"):
        click.echo(f"the API with 200 containers, {rounds} rounds …", err=True)
        yield from api.measure(rounds)
    if only in (None, "router"):
        click.echo(f"the router beside nginx, {rounds} rounds …", err=True)
        yield from router.measure(rounds)
    if only in (None, "hpke"):
        click.echo(f"requests sealed, opened and answered, {rounds} rounds …", err=True)
        yield from hpke.measure(rounds)


def _table(figures: list[Figure]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("FIGURE", "left"), ("VALUE", "right"), ("UNIT", "left"), ("BAR", "left"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("DETAIL")
    for figure in figures:
        met = {None: "", True: "met", False: "NOT MET"}[figure.met]
        table.add_row(figure.name, f"{figure.value:.4g}", figure.unit, figure.bar, met, figure.detail)
    return table


def _machine() -> dict[str, object]:
    ovs = subprocess.run(["ovs-vswitchd", "--version"], capture_output=True, text=True, check=True).stdout
    return {"cores": os.cpu_count(), "python": platform.python_version(), "ovs": ovs.splitlines()[0]}


main()
