"""What a node should be now: its state file and the store's records as one, followed while both change.

Whoever follows it (controller, agent, API) looks again and again; nothing here waits or runs by itself. Imports records,
statefile and problems.
"""

from __future__ import annotations

from pathlib import Path

from controller.problems import InvalidInput, error
from controller.records import Records
from controller.statefile import Loaded, Source, read

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """Names a file's content as it is now; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Desired:
    """The state of `node`. Raises `InvalidInput` if the file is not good to begin with.

    `source` is the file by itself, `loaded` what the node should be, and `records` what the store held then.
    """

    def __init__(self, path: Path, node: str, records: Records | None = None, now: float = 0.0) -> None:
        self.path, self.node = path, node
        self._seen = self._before = stamp(path)  # before it is read: what changes meanwhile is read again
        self.source: Source = read(path)
        self.records = records or Records()
        self.loaded: Loaded = self.source.with_records(self.records, node, now)

    def look(self, records: Records | None = None, now: float = 0.0, *, again: bool = False) -> bool:
        """Whether something else is desired now (seconds since the epoch). `records` are the store's newest, if any are new.

        A file that is still being written may be valid and lack half of the containers: it is read once it has stopped
        changing, or at once if told to (`again`). Raises `InvalidInput` where it is no good, once for each time it is
        written; what was desired before stays so.
        """
        if records is not None and records.revision != self.records.revision:
            self.records = records
        elif not self.due(now) and not self._news_of_file(again):
            return False
        self.loaded = self.source.with_records(self.records, self.node, now)
        return True

    def due(self, now: float) -> bool:
        """Whether a grant has ended since."""
        return self.loaded.until is not None and now >= self.loaded.until

    def leave_out(self) -> None:
        """Go without the store's records until there are newer ones."""
        self.loaded = self.source.with_records(Records(self.records.revision), self.node)

    def _news_of_file(self, again: bool) -> bool:
        now, last = stamp(self.path), self._before
        self._before = now
        if not again and not (last == now != self._seen):
            return False
        self._seen = now
        source = read(self.path)
        if self.source.state.networks and not source.state.networks:
            fix = "Everything would be shut or taken away. Mend the file; to give all of it up: bulkhead down FILE."
            problem = error("no-network", "networks", "no network", "the networks that are in force", fix)
            raise InvalidInput(source.name, (problem,))
        self.source = source
        return True
