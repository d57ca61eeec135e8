"""Brings resources to what is wanted, one after the other, again and again.

A resource is looked at when something has changed around it, when its period is over, or when its next try is due. What
it lacks is done step by step; what cannot be done is tried again after a pause that doubles. Imports resource.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controller.agent.resource import Change, Failed, Resource, Waiting
from controller.problems import BulkheadError

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
LONGEST_WAIT_S = 1.0
"""Whoever waits for something that nobody announces looks again so often."""
ROUNDS = 3
"""How often a resource is looked at again after its steps, before it counts as failed: others may be changing it."""


UNSEEN = "not looked at yet"
"""Why something is pending that was not looked at since it is wanted."""


class Phase(StrEnum):
    """How a resource is: not yet looked at or waiting, as wanted, or failed."""

    PENDING = "pending"
    DONE = "done"
    ERROR = "error"


@dataclass(slots=True)
class Status:
    """How a resource is, why, and when (monotonic clock) it is looked at again."""

    phase: Phase = Phase.PENDING
    why: str = UNSEEN
    due: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    healed: int = 0
    was_done: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was carried out. `again` says that the resource had been as wanted before: somebody damaged it."""

    key: str
    change: Change
    again: bool


@dataclass(slots=True)
class Faults:
    """For tests: the process ends by SIGKILL right before its nth step, or right after it (`after`)."""

    step: int = 0
    after: bool = False
    counted: int = field(default=0)

    @classmethod
    def from_environment(cls) -> Faults:
        """`BULKHEAD_DIE_AT=7` or `7+`, if set."""
        text = os.environ.get("BULKHEAD_DIE_AT", "")
        return cls(int(text.rstrip("+") or 0), text.endswith("+"))

    def before_step(self) -> None:
        """Count a step; die here if it is the one."""
        self.counted += 1
        if self.counted == self.step and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self) -> None:
        """Die here if it is the one."""
        if self.counted == self.step and self.after:
            os.kill(os.getpid(), signal.SIGKILL)


class Reconciler:
    """Resources in order. `told` hears of every step and every failure that is new."""

    def __init__(
        self,
        told: Callable[[Done], None] = lambda _done: None,
        failed: Callable[[str, str], None] = lambda _key, _why: None,
        faults: Faults | None = None,
    ) -> None:
        self._resources: list[Resource] = []
        self.status: dict[str, Status] = {}
        self.changes = 0
        """Grows with every change of a status."""
        self._told, self._failed = told, failed
        self._faults = faults or Faults()
        self._wake = asyncio.Event()

    def want(self, resources: Sequence[Resource]) -> None:
        """What is wanted from now on, in an order in which each comes after what it needs.

        A resource that was among them before, the very same, is wanted as it was, and not looked at again for that.
        """
        known = {resource.key: resource for resource in self._resources}
        self._resources = list(resources)
        before = self.status
        # Others begin anew: a look at what was wanted before may be under way, and must not speak for what is wanted now.
        self.status = {
            one.key: before[one.key] if known.get(one.key) is one else _anew(before.get(one.key)) for one in resources
        }
        self.changes += 1
        self._wake.set()

    def changed(self, namespace: str | None) -> None:
        """Something has changed in a network namespace (None: the host's)."""
        self._mark(r for r in self._resources if namespace in getattr(r, "watches", ()))

    def ovsdb_changed(self) -> None:
        """Something has changed in OVSDB."""
        self._mark(r for r in self._resources if r.key.startswith(("bridge/", "ports/")))

    def _mark(self, resources: Iterable[Resource]) -> None:
        now = time.monotonic()
        for resource in resources:
            status = self.status[resource.key]
            # What failed keeps its pause, or its own attempts would wake it again at once.
            if status.phase is not Phase.ERROR:
                status.due = min(status.due, now)
                self._wake.set()

    def touch(self, prefix: str) -> None:
        """Look at every resource whose key begins so, now: something else is wanted of them."""
        for key, status in self.status.items():
            if key.startswith(prefix):
                status.due, status.was_done = 0.0, False
                if status.phase is Phase.DONE:
                    status.phase, status.why = Phase.PENDING, "something else is wanted of it"
                self.changes += 1
        self._wake.set()

    @property
    def settled(self) -> bool:
        """Whether everything is as wanted."""
        return all(status.phase is Phase.DONE for status in self.status.values())

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        while not stop.is_set():
            self._wake.clear()
            await self.once()
            due = min((status.due for status in self.status.values()), default=time.monotonic() + 1)
            waits = [asyncio.ensure_future(self._wake.wait()), asyncio.ensure_future(stop.wait())]
            await asyncio.wait(waits, timeout=max(0.0, due - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            # What changes together is told one by one; a moment later it is one look.
            await asyncio.sleep(0.01)

    async def once(self) -> None:
        """Look at everything that is due."""
        resources = self._resources
        for resource in resources:
            if resources is not self._resources:
                return
            status = self.status[resource.key]
            if status.due <= time.monotonic():
                await self._look(resource, status)

    async def _look(self, resource: Resource, status: Status) -> None:
        lacking = [need for need in resource.needs if need in self.status and self.status[need].phase is not Phase.DONE]
        if lacking:
            self._wait(status, f"{lacking[0]} is not ready: {self.status[lacking[0]].why}")
            return
        try:
            for _ in range(ROUNDS):
                changes = await resource.diff()
                if not changes:
                    self._good(resource, status)
                    return
                status.healed += status.was_done
                self.changes += status.was_done
                for change in changes:
                    if self.status.get(resource.key) is not status:
                        return  # something else is wanted meanwhile
                    await self._carry_out(resource.key, change, again=status.was_done)
            raise Failed(f"{changes[0].what} does not stay: {changes[0].why}; is another program changing it?")
        except Waiting as exc:
            self._wait(status, str(exc), exc.retry_s)
        except BulkheadError as exc:
            self._bad(resource.key, status, str(exc))
        except Exception as exc:  # a defect of ours must not stop the rest from being healed
            self._bad(resource.key, status, f"a defect of the agent was caught: {type(exc).__name__}: {exc}")

    async def _carry_out(self, key: str, change: Change, *, again: bool) -> None:
        self._faults.before_step()
        await change.do()
        self._faults.after_step()
        self._told(Done(key, change, again))

    def _good(self, resource: Resource, status: Status) -> None:
        news = status.phase is not Phase.DONE
        status.phase, status.why, status.was_done, status.pause_s = Phase.DONE, "as wanted", True, FIRST_PAUSE_S
        self.changes += news
        status.due = time.monotonic() + float(getattr(resource, "period", 1.0))
        if news:  # whoever waited for it need not wait any longer
            for other in self._resources:
                if resource.key in other.needs:
                    self.status[other.key].due = 0.0
                    self._wake.set()

    def _wait(self, status: Status, why: str, retry_s: float | None = None) -> None:
        self.changes += (status.phase, status.why) != (Phase.PENDING, why)
        status.phase, status.why = Phase.PENDING, why
        status.due = time.monotonic() + (retry_s or min(status.pause_s, LONGEST_WAIT_S))
        status.pause_s = min(status.pause_s * 2, LONGEST_WAIT_S)

    def _bad(self, key: str, status: Status, why: str) -> None:
        if status.phase is not Phase.ERROR or status.why != why:
            self._failed(key, why)
        self.changes += 1
        status.phase, status.why = Phase.ERROR, why
        status.due = time.monotonic() + status.pause_s
        status.pause_s = min(status.pause_s * 2, LONGEST_PAUSE_S)


def _anew(before: Status | None) -> Status:
    """Not looked at yet; what is done next is no healing, since something else may be wanted."""
    return Status(healed=before.healed) if before is not None else Status()


async def plan(resources: Sequence[Resource]) -> list[tuple[str, Change | str]]:
    """What would be done, by the key of the resource; a text where it cannot be told. Changes nothing."""
    out: list[tuple[str, Change | str]] = []
    for resource in resources:
        try:
            out += [(resource.key, change) for change in await resource.diff()]
        except BulkheadError as exc:
            out.append((resource.key, str(exc)))
    return out
