"""Who changed what, and who was turned away: the API's own event log. Never bodies, tokens or keys."""

from __future__ import annotations

import logging
from pathlib import Path

from controller.eventlog import EventLog
from controller.events import JSON, Event, Kind

LOG = logging.getLogger("bulkhead.api")
DENIED_PER_S = 20
"""So many denials are written down; the others are counted."""


class Audit:
    """Writes to the log at `directory`. Raises `EventLogError` where it cannot be opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._log = EventLog(directory, max_per_second=DENIED_PER_S)

    def changed(
        self,
        who: str,
        origin: str,
        what: str,
        status: int,
        *,
        object: str | None = None,
        container: str | None = None,
        network: str | None = None,
        **data: JSON,
    ) -> None:
        """A change was asked for, and answered with `status`."""
        result = "done" if status < 300 else "refused" if status < 500 else "failed"
        text = f"{who} from {origin}: {what}: {result} ({status})"
        more: dict[str, JSON] = {"who": who, "from": origin, "what": what, "status": status, **data}
        self.write(Event(Kind.API_CHANGE, text, object=object, container=container, network=network, data=more))

    def denied(self, who: str, origin: str, what: str, status: int, why: str) -> None:
        """Somebody was turned away."""
        data: dict[str, JSON] = {"who": who, "from": origin, "what": what, "status": status}
        self.write(Event(Kind.API_DENIED, f"{who} from {origin}: {what}: {why} ({status})", data=data))

    def write(self, event: Event) -> None:
        """Write any event."""
        self._log.append(event)
        LOG.info("%s %s", event.kind, event.text)

    def tick(self) -> None:
        """Tell what was dropped."""
        self._log.tick()

    def close(self) -> None:
        """Let go of the directory."""
        self._log.close()
