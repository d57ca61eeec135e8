"""`bulkhead mcp`: the API as tools of the Model Context Protocol, on standard input and output."""

from __future__ import annotations

import click

from controller.apiterm import where_options
from controller.client import Where


@click.command("mcp")
@click.option("--mcp-approve", "approving", is_flag=True, help="Offer approve_grant and deny_grant too.")
@where_options
def mcp(where: Where, approving: bool) -> None:
    """Serve the Model Context Protocol on standard input and output, for a program that starts this command.

    Its tools may do what you may do through the API; give it a token of its own (BULKHEAD_TOKEN or --token-file) that may
    do less.
    """
    from controller.api.mcpserve import serve_stdio

    serve_stdio(where, approving=approving)
