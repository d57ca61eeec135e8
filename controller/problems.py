"""What is wrong with an input, in words a person can act on.

A `Problem` is a value: readers of configuration collect them and report all at once. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class Severity(StrEnum):
    """`error`: the input is refused. `warning`: it is accepted, and this is what was made of it."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input.

    `code` is stable and meant for programs (`duplicate-id`); `path` is where (`lxc.containers[1].veth`); `found`
    is what stood there, `expected` what should have, and `fix` what to do about it. `example` is a packet that shows it,
    where one does.
    """

    severity: Severity
    code: str
    path: str
    found: str
    expected: str
    fix: str
    example: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: {self.found}; expected {self.expected}. {self.fix} [{self.code}]"

    def as_dict(self) -> dict[str, str]:
        """The problem as plain JSON values."""
        return {key: str(value) for key, value in asdict(self).items()}


def error(code: str, path: str, found: str, expected: str, fix: str) -> Problem:
    """A problem for which the input is refused."""
    return Problem(Severity.ERROR, code, path, found, expected, fix)


def warning(code: str, path: str, found: str, expected: str, fix: str) -> Problem:
    """A problem that the pipeline makes harmless."""
    return Problem(Severity.WARNING, code, path, found, expected, fix)


class BulkheadError(Exception):
    """Root of every error that is shown to a user. The text says what to do next."""


class NotAllowed(BulkheadError):
    """The answer is no: what was asked for must not be."""


class InvalidInput(BulkheadError):
    """An input was refused; `problems` holds every reason, errors and warnings alike."""

    def __init__(self, what: str, problems: Iterable[Problem]) -> None:
        self.what = what
        self.problems = tuple(problems)
        errors = [p for p in self.problems if p.severity is Severity.ERROR]
        super().__init__(f"{what}: {len(errors)} error(s)\n" + "\n".join(f"  {p}" for p in errors))


class PipelineError(BulkheadError):
    """A flow was built that its table does not allow. Always a defect of an app, never of the input."""
