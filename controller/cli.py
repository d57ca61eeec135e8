"""The command line. Exit codes: 0 good, 1 the answer is no (invalid, unsafe, differs), 2 could not find out.

What is printed is a table for people or, with `--json`, one JSON value. Problems go to standard error, one line each,
never a traceback. A command's module is imported when the command is asked for: most need little of what others do.
"""

from __future__ import annotations

import gc
from importlib import import_module

import click

gc.set_threshold(50_000)  # what is imported stays: looking through it again and again is a tenth of the time to start
COMMANDS = {
    "agent": "controller.agentcli:agent",
    "api": "controller.apicli:api",
    "check": "controller.checkcli:check",
    "chores": "controller.incidentcli:chores",
    "client": "controller.clientcli:client",
    "compile": "controller.controllercli:compile_command",
    "completion": "controller.completioncli:completion",
    "container": "controller.containercli:container",
    "controller": "controller.controllercli:controller",
    "down": "controller.agentcli:down",
    "events": "controller.eventscli:events",
    "firewall": "controller.firewallcli:firewall",
    "flows": "controller.controllercli:flows",
    "grant": "controller.grantcli:grant",
    "incident": "controller.incidentcli:incident",
    "inference": "controller.routercli:inference",
    "lab": "lab.cli:lab",
    "mcp": "controller.mcpcli:mcp",
    "network": "controller.containercli:network_group",
    "operation": "controller.containercli:operation",
    "pki": "controller.pkicli:pki",
    "plan": "controller.controllercli:plan",
    "reach": "controller.proofcli:reach_command",
    "router": "controller.routercli:router",
    "service": "controller.containercli:service_group",
    "status": "controller.controllercli:status",
    "store": "controller.storecli:store",
    "token": "controller.tokencli:token",
    "trace": "controller.proofcli:trace_command",
    "units": "controller.unitscli:units",
    "unseal": "controller.controllercli:unseal",
    "up": "controller.agentcli:up",
    "verify": "controller.hostcli:verify",
    "verify-network-config": "controller.networkcli:verify_network_config",
    "vpn": "controller.vpncli:vpn",
    "wg": "controller.wgcli:wg",
    "why": "controller.proofcli:why_command",
}
"""Where each command is: module and name."""


class _Late(click.Group):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command's name."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        found: click.Command = getattr(import_module(module), name)
        return found


@click.group(cls=_Late, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bulkhead")
def main() -> None:
    """Keep two networks on the same hosts apart, and prove it."""
