"""What the host is made of, seen by the reconciler: a `Resource` compares what is with what should be.

`Resource.diff` answers the steps that are missing, as `Change` values that say what they would do and why; carrying
them out is up to the reconciler. An empty answer means: as wanted. Imports problems.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from controller.problems import BulkheadError

Step = Callable[[], Awaitable[None]]


class Sign(StrEnum):
    """What a change does: makes something, alters it, takes it away."""

    ADD = "+"
    CHANGE = "~"
    REMOVE = "-"


@dataclass(frozen=True, slots=True)
class Change:
    """One step. `what` names the thing for a person ("address 10.0.0.1/32 of eth0 in bulkhead-warp0"), `why` says what
    was found instead ("missing", "mtu is 1500"). `do` carries it out, as a whole or not at all, and can be repeated."""

    sign: Sign
    what: str
    why: str
    do: Step = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.sign} {self.what}: {self.why}"


class Resource(Protocol):
    """Something of the host that has to be as the state file says."""

    @property
    def key(self) -> str:
        """Its name, the same from run to run: `bridge/vmbr0`, `container/102`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of the resources that have to be as wanted before this one is looked at; unknown ones do not count."""

    async def diff(self) -> list[Change]:
        """What has to be done, in order; nothing is changed by asking.

        Later steps may rest on earlier ones: what cannot be seen yet, because the thing around it is missing, counts as
        missing. Raises `Failed` where it cannot be looked at, `Waiting` where something else has to happen first.
        """


class Failed(BulkheadError):
    """A resource cannot be looked at or made; the text says why and what to do."""


class Waiting(BulkheadError):
    """A resource has to wait for something that is nobody's fault; the text says for what.

    `retry_s` is when to look again, where that is known.
    """

    def __init__(self, text: str, retry_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_s = retry_s
