"""What the store answers where it cannot do what was asked. Imports problems."""

from __future__ import annotations

from controller.problems import BulkheadError


class Unavailable(BulkheadError):
    """The store does not answer; a retry helps.

    `doubtful`: the change was sent, and whether it was written could not be found out in time. Otherwise nothing was.
    """

    def __init__(self, text: str, *, doubtful: bool = False) -> None:
        super().__init__(text)
        self.doubtful = doubtful


class Clash(BulkheadError):
    """A record was refused because another one has the id, name or address that it asks for."""
