"""`bulkhead api`: the HTTP API's process. Imports the API, late."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from controller.problems import BulkheadError
from controller.storeoptions import StoreOptions, store_options
from controller.terminal import events_dir_option, file_argument, guarded, run_dir_option

STATE_DIR = Path("/var/lib/bulkhead")


@click.command()
@file_argument
@run_dir_option
@events_dir_option
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=STATE_DIR / "api",
    show_default=True,
    help="Where the API keeps its event log and its certificate.",
)
@click.option(
    "--agent-events",
    type=click.Path(path_type=Path),
    default=STATE_DIR / "agent" / "events",
    show_default=True,
    help="Where the agent's event log is.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=9573, show_default=True, help="On loopback; 0 for none.")
@click.option("--certificate", type=click.Path(path_type=Path), help="For the container's address: PEM.")
@click.option("--private-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--mcp-approve", is_flag=True, help="Offer tools that approve and deny grants by MCP too.")
@click.option("-v", "--verbose", is_flag=True, help="Log every event to standard error too.")
@store_options
@guarded
def api(
    file: Path,
    run_dir: Path,
    events_dir: Path,
    state_dir: Path,
    agent_events: Path,
    port: int,
    certificate: Path | None,
    private_key: Path | None,
    mcp_approve: bool,
    verbose: bool,
    store: StoreOptions,
) -> None:
    """Serve the HTTP API for a state FILE, in the foreground. Needs no privileges.

    It answers on RUN_DIR/api.sock and on loopback, and on the address of the API container where there is one. SIGHUP (or a
    changed FILE) makes it read FILE again.
    """
    from controller.api.server import serve
    from controller.api.settings import Settings

    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if bool(certificate) != bool(private_key):
        raise BulkheadError("--certificate and --private-key go together; give both, or neither to have one made")
    serve(
        Settings(
            state_file=file.absolute(),
            run_dir=run_dir.absolute(),
            state_dir=state_dir.absolute(),
            store=store.addresses,
            store_tls=store.files,
            node=store.node,
            port=port,
            controller_events=events_dir.absolute(),
            agent_events=agent_events.absolute(),
            certificate=certificate,
            private_key=private_key,
            mcp_approve=mcp_approve,
        )
    )
