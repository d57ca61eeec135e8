"""Our commands as a process of their own, with grants that stand in a file beside the state file (.grants) and not in a
store: a JSON list of [id, source, target, protocol, port]. Whoever writes it touches the state file afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import astuple, replace
from pathlib import Path

from controller import statefile
from controller.model import DesiredState, Grant
from controller.records import Records

PROGRAM = "from tests.fakes.granting import main; main()"


def write_grants(state_file: Path, grants: Iterable[Grant]) -> None:
    """Have these grants and no others."""
    path = state_file.with_suffix(".grants")
    new = path.with_suffix(".new")
    new.write_text(json.dumps([astuple(grant) for grant in grants]))
    new.replace(path)
    os.utime(state_file)


def with_grants(state: DesiredState, grants: Iterable[Grant]) -> DesiredState:
    """A state with these grants."""
    granted = replace(state, grants=tuple(grants))
    return replace(granted, digest=statefile.digest(granted))


def main() -> None:
    """Run the command line."""
    from controller.cli import main as command

    plain = statefile.Source.with_records

    def granting(self: statefile.Source, records: Records, node: str, now: float = 0.0) -> statefile.Loaded:
        loaded = plain(self, records, node, now)
        path = Path(self.name).with_suffix(".grants")
        grants = [Grant(*each) for each in json.loads(path.read_text())] if path.exists() else []
        return replace(loaded, state=with_grants(loaded.state, grants))

    statefile.Source.with_records = granting  # type: ignore[method-assign]
    command()
