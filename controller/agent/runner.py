"""What a resource needs of whoever keeps its program running. Standard library only."""

from __future__ import annotations

from typing import Protocol


class Runner(Protocol):
    """Whoever keeps one program running."""

    async def runs(self) -> bool:
        """Whether it runs."""

    async def start(self) -> None:
        """Start it, if it does not run."""

    async def stop(self) -> None:
        """End it, if it runs; it has ended then."""
