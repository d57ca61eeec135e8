"""What the agent is told on its command line. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUN_DIR = Path("/run/bulkhead")
STATE_DIR = Path("/var/lib/bulkhead/agent")
OVSDB = "unix:/var/run/openvswitch/db.sock"
CONTROLLER = "tcp:127.0.0.1:6653"


@dataclass(frozen=True, slots=True)
class Settings:
    """`run_dir` is shared with the controller; the agent's own files are in `agent` below it, and gone after a reboot.
    `state_dir` outlives one: keys, VPN clients, LXC containers. `controller` is what bridges are pointed at.
    `node` is this host's name in the store, which listens at `store`; `store_tls` are key, certificate and CA for it.
    `api_user` is as whom the API runs: it may ask for its listening socket."""

    state_file: Path
    run_dir: Path = RUN_DIR
    state_dir: Path = STATE_DIR
    ovsdb: str = OVSDB
    controller: str = CONTROLLER
    store: tuple[str, ...] = ()
    store_tls: tuple[Path, ...] = ()
    node: str = ""
    api_user: str | None = None

    @property
    def own_dir(self) -> Path:
        """The agent's own run directory."""
        return self.run_dir / "agent"

    @property
    def events_dir(self) -> Path:
        """The agent's event log."""
        return self.state_dir / "events"
