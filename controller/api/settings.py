"""What the API is told on its command line, and its limits. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

RUN_DIR = Path("/run/bulkhead")
STATE_DIR = Path("/var/lib/bulkhead")
EVENTS_DIR = Path("/var/lib/bulkhead/events")
LOOPBACK_PORT = 9573
GROUP = "bulkhead"


def this_node() -> str:
    """The name of this host among the nodes, as agent and controller have it."""
    return os.uname().nodename


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller, and all of them, may ask for. Rates are per second; times in seconds."""

    body_bytes: int = 64 * 1024
    header_bytes: int = 32 * 1024
    header_s: float = 10.0
    body_s: float = 10.0
    keep_alive_s: float = 30.0
    connections: int = 512
    reads_per_s: int = 5000
    changes_per_s: int = 100
    burst_s: int = 10
    denied_per_s: int = 5
    waiting: int = 256
    streams: int = 64
    streams_each: int = 32
    questions: int = 8
    wait_s: float = 30.0
    longest_wait_s: float = 300.0
    undo_s: float = 20.0
    operations: int = 1000
    operation_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class Settings:
    """`run_dir` is shared with agent and controller; `state_dir` is the API's own and has its event log and certificate.

    `port` is that of the loopback listener, 0 for none; with `mcp_approve` grants may be decided by MCP tools too.
    """

    state_file: Path
    run_dir: Path = RUN_DIR
    state_dir: Path = STATE_DIR / "api"
    store: tuple[str, ...] = ()
    store_tls: tuple[Path, ...] = ()
    node: str = field(default_factory=this_node)
    port: int = LOOPBACK_PORT
    controller_events: Path = EVENTS_DIR
    agent_events: Path = STATE_DIR / "agent" / "events"
    certificate: Path | None = None
    private_key: Path | None = None
    mcp_approve: bool = False
    limits: Limits = Limits()

    @property
    def remotes(self) -> tuple[str, ...]:
        """Where the store listens."""
        return self.store or (f"unix:{self.run_dir / 'store.sock'}",)

    @property
    def socket(self) -> Path:
        """The API's unix socket."""
        return self.run_dir / "api.sock"

    @property
    def events(self) -> Path:
        """The API's own event log."""
        return self.state_dir / "events"
