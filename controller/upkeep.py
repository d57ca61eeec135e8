"""What the controller has to do with the state file and the store: follow both, and tell the store how far it has come.

No I/O of its own besides reading the file; time is an argument. Imports desired, records, signals, core and below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from controller.compile import Conflict
from controller.core import Core
from controller.desired import Desired
from controller.problems import InvalidInput
from controller.records import Records, key
from controller.signals import Signal, StateLoaded, StateRejected
from controller.verify.gate import try_proof
from controller.verify.prove import Unsafe

WATCH_S = 0.25


class Following(Protocol):
    """The store, as `controller.store.Link` has it."""

    def poll(self) -> Records | None:
        """The newest records, if anything has changed since the last call. Does not block."""

    def publish(
        self, node: str, *, controller_revision: int | None = None, controller_waiting: Mapping[str, str] | None = None
    ) -> None:
        """Write a node's progress down as soon as that is possible. Does not block."""


class Upkeep:
    """Call `look` often, feed the core what it answers, then `publish`."""

    def __init__(self, desired: Desired, store: Following | None) -> None:
        self.desired = desired
        self._store = store
        self._look_at = 0.0
        self._refused: dict[str, str] = {}
        self._good: dict[str, int] = {}
        self._published: tuple[int, dict[str, str]] | None = None

    def first(self) -> None:
        """Prove what is desired to begin with. Raises `Conflict` or `Unsafe` where the state file itself is no good.

        A stored record that would make it so is left out, as it is later on.
        """
        try:
            try_proof(self.desired.loaded.state)
        except (Conflict, Unsafe) as exc:
            if not self.desired.loaded.stored:
                raise
            self._refuse(str(exc))
            self.desired.leave_out()
            try_proof(self.desired.loaded.state)

    def look(self, now: float, clock: float, *, again: bool = False) -> Signal | None:
        """What is new, if anything is. `again` reads the file whether it has changed or not.

        `now` is of a monotonic clock; `clock` is the time of day, in seconds since the epoch, by which grants end.
        """
        records = self._store.poll() if self._store is not None else None
        news = records is not None and records.revision != self.desired.records.revision
        news = news or self.desired.due(clock)
        if not news and now < self._look_at and not again:
            return None
        if not news:
            self._look_at = now + WATCH_S
        try:
            if self.desired.look(records if news else None, clock, again=again):
                return StateLoaded(self.desired.loaded.state, str(self.desired.path), whole=not news)
        except InvalidInput as exc:
            return StateRejected(str(self.desired.path), exc.problems)
        return None

    def taken(self, core: Core, why: str) -> None:
        """The core was fed a state; `why` is what it said, for the case that it refused."""
        if core.state == self.desired.loaded.state:
            self._refused = {}
            self._good = {key(record): record.revision for record in self.desired.records}
        else:
            self._refuse(why)

    def _refuse(self, why: str) -> None:
        """Whatever has come since the last good state may be to blame."""
        suspects = [key(one) for one in self.desired.records if self._good.get(key(one)) != one.revision]
        self._refused = dict.fromkeys(suspects, f"refused: {why}")

    def publish(self, core: Core) -> None:
        """Tell the store, if there is anything new to tell."""
        if self._store is None:
            return
        waiting = {name: f"refused: {problem}" for name, problem in self.desired.loaded.refused}
        waiting |= self._refused | {f"network/{name}": why for name, why in core.waiting().items()}
        aside = self.desired.loaded.stored | waiting.keys()
        ended = [one.id for one in self.desired.records.grants if one.expires_at and key(one) not in aside]
        waiting |= {f"grant/{number}": why for number, why in core.waiting_grants(ended).items()}
        told = (self.desired.records.revision, waiting)
        if told != self._published:
            self._published = told
            self._store.publish(self.desired.node, controller_revision=told[0], controller_waiting=waiting)
