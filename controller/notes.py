"""Problems of an input, collected while it is read. Imports problems."""

from __future__ import annotations

from dataclasses import dataclass, field

from controller.problems import Problem, error, warning


@dataclass(slots=True)
class Notes:
    """Problems, as they are found."""

    problems: list[Problem] = field(default_factory=list)

    def error(self, code: str, path: str, found: str, expected: str, fix: str) -> None:
        """The input is refused."""
        self.problems.append(error(code, path, found, expected, fix))

    def warn(self, code: str, path: str, found: str, expected: str, fix: str) -> None:
        """The input is taken, and this is what was made of it."""
        self.problems.append(warning(code, path, found, expected, fix))
