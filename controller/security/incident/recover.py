"""The way back, step by step: done, checked, written down; stopped and gone on with at any moment. Imports problems, disk."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from controller.problems import BulkheadError
from controller.security.pki.disk import Disk, locked, read


@dataclass(frozen=True, slots=True)
class Step:
    """A step. `do` may be done again after it was interrupted; `check` says what is not good yet, or nothing. A step without
    `do` is a person's: it is passed when they say that it is done and its check agrees."""

    name: str
    text: str
    check: Callable[[], str]
    do: Callable[[], None] | None = None


class Recovery:
    """The steps for one seal, with what is done in `recover.json` beside it."""

    def __init__(self, directory: Path, steps: tuple[Step, ...], disk: Disk | None = None) -> None:
        self.directory, self.steps = directory, steps
        self._disk = disk or Disk()

    def done(self) -> dict[str, str]:
        """The steps that are done, and when. Raises `BulkheadError`."""
        try:
            return {str(k): str(v) for k, v in json.loads(read(self.directory / "recover.json") or b"{}").items()}
        except (ValueError, AttributeError) as exc:
            raise BulkheadError(
                f"{self.directory}/recover.json is damaged; remove it, and walk the steps again"
            ) from exc

    def walk(self, said: frozenset[str] = frozenset(), stop_after: str | None = None) -> Iterator[tuple[Step, str]]:
        """Go on from the first step that is not done; each with what keeps it from being done, or nothing.

        Stops at the first that is not. `said` are the steps that a person says are done. Raises `BulkheadError`.
        """
        names = [step.name for step in self.steps]
        for name in (*said, *([stop_after] if stop_after else [])):
            if name not in names:
                raise BulkheadError(f"there is no step {name}; there are {', '.join(names)}")
        with locked(self.directory):
            done = self.done()
            for step in self.steps:
                if step.name not in done:
                    why = self._pass(step, step.name in said)
                    if not why:
                        done[step.name] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
                        self._disk.write(self.directory / "recover.json", json.dumps(done, indent=1).encode())
                    yield step, why
                    if why:
                        return
                if step.name == stop_after:
                    return

    def _pass(self, step: Step, said: bool) -> str:
        if step.do is not None:
            step.do()
        elif not said:
            return f"do this, then say so with --done {step.name}: {step.text}"
        return step.check()
