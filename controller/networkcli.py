"""`bulkhead verify-network-config`: every statement of the security guide for this machine, as a line.

Imports the agent's firewall, the verification and what commands share.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from controller.agent import trial
from controller.agent.hosttable import wanted_host_table
from controller.agent.nft import as_printed, first_difference, listing
from controller.hostcli import VERDICTS, print_findings
from controller.problems import BulkheadError
from controller.security.verifynet import Seen, exit_code, gather, judge, read_asked
from controller.security.verifynet.asked import Asked
from controller.statefile import load
from controller.terminal import file_argument, guarded, json_option, print_json, security_dir_option
from controller.verify.host.facts import Gap


def firewall_difference(file: Path) -> str | Gap:
    """The first line in which the loaded table is not the one that a state FILE wants; empty if there is none."""

    async def both() -> tuple[str, str | None]:
        loaded = load(file)
        return await as_printed(wanted_host_table(loaded.state, loaded.host)), await listing(trial.FAMILY)

    try:
        wanted, found = asyncio.run(both())
    except (BulkheadError, OSError) as exc:
        return Gap(f"the firewall cannot be compared: {exc}", "run this as root; bulkhead firewall plan FILE")
    if found is None:
        return "the table inet bulkhead is not loaded"
    return "" if found.split() == wanted.split() else first_difference(found, wanted)


def look(file: Path, security_dir: Path, root: Path) -> tuple[Asked, Seen]:
    """What a state FILE asks of this machine, and how the machine is."""
    asked = read_asked(file, security_dir)
    return asked, gather(asked, security_dir, root, firewall_difference(file))


@click.command("verify-network-config")
@file_argument
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), help="Where etc/systemd/system is.")
@security_dir_option
@json_option
@guarded
def verify_network_config(file: Path, root: Path, security_dir: Path, as_json: bool) -> None:
    """Say for every statement of the security guide whether it holds for the role that a state FILE gives this machine.

    Ports are really tried, from a network namespace that is gone afterwards; nothing else is changed. Root. A line that is
    only bad because another one is says unknown and names that one. Exit 0: nothing is bad; 1: something is; 2: something
    could not be found out.
    """
    findings = judge(*look(file, security_dir, root))
    code = exit_code(findings)
    if as_json:
        print_json({"exit_code": code, "checks": [finding.as_dict() for finding in findings]})
    else:
        print_findings(findings, VERDICTS[code])
    sys.exit(code)
