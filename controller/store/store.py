"""The store with a thread of its own: for the agent, the API and commands, who may read and change it from any thread.

A change is a function of the records as they are. Its writes are one transaction that holds only if nobody else has
written in between; otherwise the function runs again on what is there now. Imports link, rows and snapshot.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Generic, TypeVar

from controller.problems import BulkheadError
from controller.records import ContainerRecord, Record, Records, key
from controller.store import rows
from controller.store.errors import Clash, Unavailable
from controller.store.link import Link, failure
from controller.store.snapshot import Snapshot, table_of
from controller.store.wire import Tls

T = TypeVar("T")
Subscriber = Callable[[Records], None]

LOCK = "bulkhead_allocate"
LOCK_HELD_S = 0.1
"""Longer than this nobody keeps the lock while others may wait for it."""
BATCH = 64
COMMITS_KEPT = 1000
"""Revisions for which it can be told who wrote them. Pruned now and then."""
_PRUNE_EVERY = 64
_DOUBT = "; whether the change was written is not known, look before you try again"
_LOG = logging.getLogger(__name__)


class Change:
    """What a function that changes the store works on. Nothing is written before the function has returned."""

    def __init__(self, snapshot: Snapshot, revision: int) -> None:
        self._snapshot = snapshot
        self.revision = revision
        """The revision that this change makes. `put` stamps it on records."""
        self._taken: list[tuple[str, tuple[str, ...], str]] = []
        self.touched: set[str] = set()

    @property
    def records(self) -> Records:
        """Everything, including what this change has put so far."""
        return self._snapshot.records()

    def put(self, record: Record) -> None:
        """Add a record, or replace the one with its key."""
        record = rows.normal(record, self.revision)
        name = key(record)
        self.touched.add(name)
        self._taken += [(name, index, owner) for index, owner in self._snapshot.put(record)]

    def delete(self, key: str) -> None:
        """Take a record away, by key (`container/103`). Nothing happens if it is not there."""
        table = table_of(key)
        if table not in rows.TYPE:
            kinds = ", ".join(rows.TYPE).lower()
            raise BulkheadError(f"{key!r} is not the key of a record; that is one of {kinds}, a /, and a name")
        self.touched.add(key)
        self._snapshot.delete(table, key)

    def check(self) -> None:
        """Raises `Clash` if two records now have what only one may."""
        for name, index, owner in self._taken:
            kind = self._snapshot.kinds[table_of(name)]
            if owner != name and kind.holds(name, index) and kind.holds(owner, index):
                taken = f"{name} cannot have the {index[0]} {index[-1]}"
                raise Clash(f"{taken}: {owner} has it; choose another, or delete {owner} first")


class _Outcome(Generic[T]):
    """What a function has answered or raised."""

    __slots__ = ("answer", "error")

    def __init__(self, answer: T | None = None, error: BaseException | None = None) -> None:
        self.answer, self.error = answer, error


class _Job(Generic[T]):
    def __init__(self, fn: Callable[[Change], T], deadline: float, above: int = 0) -> None:
        self.fn, self.deadline, self.above = fn, deadline, above
        self.future: Future[tuple[T, int]] = Future()
        self.tried: dict[str, tuple[_Outcome[T], int]] = {}
        """Attempts of which nobody knows whether they were, or will be, carried out, by the commit's name: the outcome,
        and the revision that they build on."""
        self.cleared = -1
        """The revision at which none of them had been carried out."""
        self.alone = above > 0

    def settle(self, outcome: _Outcome[T], revision: int) -> None:
        """Answer the caller."""
        if outcome.error is not None:
            self.future.set_exception(outcome.error)
        else:
            self.future.set_result((outcome.answer, revision))  # type: ignore[arg-type]


class Store:
    """A store, by the addresses of its servers. With `lock` it holds the lock `bulkhead_allocate` while it writes."""

    def __init__(self, remotes: Sequence[str], tls: Tls | None = None, *, lock: bool = False) -> None:
        self._link = Link(remotes, tls, leader_only=True)
        self._lock = lock
        self._locked_at = 0.0
        self._inbox: deque[_Job[Any]] = deque()
        """Filled by any thread; all else is the store's thread's."""
        self._jobs: deque[_Job[Any]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._flying: list[_Job[Any]] = []
        self._landed: tuple[list[_Job[Any]], str, int] | None = None
        self._doubtful: list[_Job[Any]] = []
        self._asking = False
        self._subscribers: list[Subscriber] = []
        self._ready = threading.Event()
        self._closing = False
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self.records = Records()
        """The newest snapshot."""

    @property
    def connected(self) -> bool:
        """Whether the store answers just now."""
        return self._link.connected

    @property
    def remote(self) -> str:
        """The address of the server that is talked to."""
        return self._link.session.remote

    def start(self, patience_s: float = 5.0) -> Records:
        """Connect, and answer what the store holds. Raises `Unavailable` if it does not answer in time; call `start`
        again, or `close`."""
        if not self._thread.is_alive():
            self._thread.start()
        if not self._ready.wait(patience_s):
            raise Unavailable(self._unavailable())
        return self.records

    def subscribe(self, callback: Subscriber) -> None:
        """Have `callback` called, on the store's thread, with every new snapshot from now on."""
        self._subscribers.append(callback)

    def change(self, fn: Callable[[Change], T], timeout_s: float = 10.0, *, above: int = 0) -> tuple[T, int]:
        """Run `fn` on the records as they are, on the store's thread, and write what it has put.

        Answers what `fn` answered, and the revision, which is more than `above`. `fn` may run several times; only the
        last run counts. What it raises comes out here, and nothing is written. Raises `Clash` and `Unavailable`.
        """
        if threading.current_thread() is self._thread:
            raise BulkheadError("a subscriber of the store cannot change it; do that from another thread")
        if self._closing:
            raise Unavailable("the store was closed")
        job: _Job[T] = _Job(fn, time.monotonic() + timeout_s, above)
        self._inbox.append(job)
        self._wake()
        try:
            return job.future.result(timeout_s + 1.0)
        except FutureTimeout:
            # The store's own time limit comes first unless its thread is stuck in a function.
            raise Unavailable(f"the store is busy{_DOUBT}", doubtful=True) from None

    def publish(self, node: str, **columns: Any) -> None:
        """Set columns of a node's progress, some time soon. The newest wins."""
        self._calls.append(lambda: self._link.publish(node, **columns))
        self._wake()

    def close(self) -> None:
        """Stop. Changes that wait are refused."""
        self._closing = True
        self._wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5)
        self._wake_in.close()

    # the thread

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full, so it wakes; or closed
            self._wake_in.send(b"!")

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._step()
                except Exception as exc:
                    # A defect. Whatever was half done is asked for again, like after a lost connection.
                    _LOG.exception("the store's thread")
                    self._link.session.restart(f"internal error: {type(exc).__name__}")
                    self._expire()
                self._wait()
        finally:
            self._closing = True
            for job in [*self._flying, *self._doubtful, *self._jobs, *self._inbox]:
                self._fail(job, "the store was closed")
            self._link.close()

    def _step(self) -> None:
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:
                _LOG.exception("a publication was refused")
        while self._inbox:
            self._jobs.append(self._inbox.popleft())
        before = None
        while before != (before := self._state()):
            records = self._link.poll()
            if records is not None or (self._link.connected and not self._ready.is_set()):
                self._tell(self._link.records)
            self._settle()
            self._expire()
            if self._link.connected:
                self._send()

    def _state(self) -> tuple[object, ...]:
        return len(self._jobs), len(self._flying), len(self._doubtful), self._asking, self._link.records.revision

    def _wait(self) -> None:
        session = self._link.session
        now = time.monotonic()
        wait_s = session.due_s(now)
        for job in (*self._jobs, *self._doubtful):
            wait_s = min(wait_s, max(0.0, job.deadline - now))
        poller = select.poll()
        poller.register(self._wake_out, select.POLLIN)
        if session.fileno() >= 0:
            poller.register(session.fileno(), select.POLLIN | (select.POLLOUT if session.writing else 0))
        if self._jobs and self._link.connected and not self._busy and not self._waits_for_lock:
            wait_s = 0.0
        poller.poll(wait_s * 1000)
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)

    def _tell(self, records: Records) -> None:
        self.records = records
        self._ready.set()
        for subscriber in self._subscribers:
            try:
                subscriber(records)
            except Exception:
                _LOG.exception("a subscriber of the store failed")

    # changes

    @property
    def _busy(self) -> bool:
        return bool(self._flying or self._landed or self._asking)

    @property
    def _waits_for_lock(self) -> bool:
        return self._lock and not self._link.session.has_lock

    def _send(self) -> None:
        if self._busy:
            return
        if self._doubtful:
            self._ask()
            return
        if not self._jobs:
            self._link.session.unlock()
            return
        if self._lock:
            now = time.monotonic()
            session = self._link.session
            if session.has_lock and self._locked_at and now - self._locked_at > LOCK_HELD_S:
                session.unlock()
                self._locked_at = 0.0
            if not session.has_lock:
                self._locked_at = 0.0
                session.lock(LOCK)
                return
            self._locked_at = self._locked_at or now
        self._commit()

    def _commit(self) -> None:
        """Run the functions that wait and send what they want as one transaction."""
        snapshot = self._link.snapshot
        base = snapshot
        revision = base.revision + 1
        touched: set[str] = set()
        batch: list[tuple[_Job[Any], _Outcome[Any]]] = []
        while self._jobs and len(batch) < BATCH:
            if self._jobs[0].alone and batch:
                break
            job = self._jobs.popleft()
            if job.tried and job.cleared != base.revision:
                self._doubtful.append(job)
                continue
            revision = max(revision, job.above + 1)
            mine = snapshot.copy()
            change = Change(mine, revision)
            try:
                outcome = _Outcome(job.fn(change))
                change.check()
            except BaseException as exc:
                outcome = _Outcome(error=exc)
                change.touched.clear()
            if change.touched:
                snapshot, touched = mine, touched | change.touched
            elif snapshot is base:
                job.settle(outcome, base.revision)
                continue
            # Else it rests on what those before it in this batch have put, and is worth what they are.
            batch.append((job, outcome))
            if job.alone:
                break
        operations = self._operations(base, snapshot, touched)
        if not operations:
            for job, outcome in batch:
                job.settle(outcome, base.revision)
            return
        name = uuid.uuid4().hex
        for job, outcome in batch:
            job.tried[name] = outcome, base.revision
        self._flying = flying = [job for job, _ in batch]
        began = self._link.root is None
        # Without "durable" a server on its own answers before its disk has it.
        operations = [*self._guard(base.revision, revision, name), *operations, {"op": "commit", "durable": True}]
        self._link.session.transact(operations, lambda results: self._answered(flying, name, revision, began, results))

    def _guard(self, before: int, revision: int, name: str) -> list[Any]:
        """The operations that let a transaction through only if nobody has written since, and that say whose it was."""
        out: list[Any] = []
        if self._lock:
            out.append({"op": "assert", "lock": LOCK})
        if self._link.root is None:
            out.append({"op": "insert", "table": "Bulkhead", "row": {"revision": revision}})
        else:
            where = [["_uuid", "==", ["uuid", self._link.root]]]
            same = {"columns": ["revision"], "until": "==", "rows": [{"revision": before}], "timeout": 0}
            out.append({"op": "wait", "table": "Bulkhead", "where": where, **same})
            out.append({"op": "update", "table": "Bulkhead", "where": where, "row": {"revision": revision}})
        out.append({"op": "insert", "table": "Commit", "row": {"id": name, "revision": revision}})
        if revision % _PRUNE_EVERY == 0:
            old = [["revision", "<", revision - COMMITS_KEPT]]
            out.append({"op": "delete", "table": "Commit", "where": old})
        return out

    def _operations(self, base: Snapshot, wanted: Snapshot, touched: set[str]) -> list[Any]:
        """The difference between two snapshots, where they were touched."""
        out: list[Any] = []
        for name in sorted(touched):
            old, new = base.get(name), wanted.get(name)
            table = table_of(name)
            where = [["_uuid", "==", ["uuid", self._link.uuids.get(name, "")]]]
            if new is None:
                if old is not None:
                    out.append({"op": "delete", "table": table, "where": where})
                continue
            row = rows.encode(new)
            if isinstance(new, ContainerRecord) and not (
                isinstance(old, ContainerRecord) and old.services == new.services
            ):
                named = []
                for service in rows.encode_services(new):
                    names = f"s{len(out)}"
                    out.append({"op": "insert", "table": "Service", "uuid-name": names, "row": service})
                    named.append(["named-uuid", names])
                row["services"] = ["set", named]
            if old is None:
                out.append({"op": "insert", "table": table, "row": row})
                continue
            before = rows.encode(old)
            row = {column: value for column, value in row.items() if before.get(column) != value}
            if set(row) - {"revision"}:
                out.append({"op": "update", "table": table, "where": where, "row": row})
        return out

    def _answered(
        self, batch: list[_Job[Any]], name: str, revision: int, began: bool, results: list[Any] | None
    ) -> None:
        self._flying = []
        if results is None:
            # Nobody knows whether it was carried out. That is asked first when there is somebody to ask.
            self._doubtful += batch
            return
        error = failure(results)
        if error is None:
            self._landed = batch, name, revision
            return
        kind, details = str(error.get("error")), str(error.get("details", ""))
        if kind == "not owner":
            self._link.session.unlock()
        clustered = bool(self._link.session.cluster)
        if kind in ("timed out", "not owner") and clustered:
            # A server that has just lost the lead runs a transaction again by itself, on top of its own first attempt.
            self._doubtful += batch
            return
        for job in batch:
            job.tried.pop(name, None)
        if kind in ("timed out", "not owner"):
            self._jobs.extendleft(reversed(batch))
        elif kind == "constraint violation" and began and '"Bulkhead"' in details:
            # Somebody else has begun the store in this very moment.
            self._jobs.extendleft(reversed(batch))
        elif len(batch) > 1:
            # One of them is to blame, and only it shall have the blame.
            for job in batch:
                job.alone = True
            self._jobs.extendleft(reversed(batch))
        else:
            batch[0].future.set_exception(_refused(kind, details, doubtful=clustered))

    def _ask(self) -> None:
        """Ask which of the attempts that nobody knows about were carried out."""
        names = sorted({name for job in self._doubtful for name in job.tried})
        operations = [
            {"op": "select", "table": "Commit", "where": [["id", "==", name]], "columns": ["id", "revision"]}
            for name in names
        ]
        self._asking = True
        self._link.session.transact(operations, self._told)

    def _told(self, results: list[Any] | None) -> None:
        self._asking = False
        if results is None or failure(results) is not None:
            return
        written = {row["id"]: row["revision"] for result in results for row in result["rows"]}
        # What was said before this answer has been heard, so it is of this revision.
        now = self._link.snapshot.revision
        doubtful, self._doubtful = self._doubtful, []
        again = []
        for job in doubtful:
            name = next((name for name in job.tried if name in written), None)
            if name is not None:
                job.settle(job.tried[name][0], written[name])
                continue
            # An attempt may still be on its way through a cluster, and can only come next: then ours fails, and we ask
            # again.
            job.tried = {name: tried for name, tried in job.tried.items() if tried[1] >= now}
            job.cleared = now
            again.append(job)
        self._jobs.extendleft(reversed(again))

    def _settle(self) -> None:
        """Answer changes that were written, once our own copy shows them."""
        if self._landed is None or (self._link.connected and self.records.revision < self._landed[2]):
            return
        batch, name, revision = self._landed
        self._landed = None
        for job in batch:
            job.settle(job.tried[name][0], revision)

    def _expire(self) -> None:
        now = time.monotonic()
        for waiting in (self._jobs, self._doubtful):
            for job in [job for job in waiting if job.deadline < now]:
                waiting.remove(job)
                self._fail(job, self._unavailable())

    def _fail(self, job: _Job[Any], why: str) -> None:
        doubtful = bool(job.tried)
        if doubtful:
            why += _DOUBT
        job.future.set_exception(Unavailable(why, doubtful=doubtful))

    def _unavailable(self) -> str:
        if self._link.connected and self._waits_for_lock:
            return "another node keeps changing the store; try again"
        return f"the store does not answer ({self._link.why or 'it is busy'}); see that `bulkhead store serve` runs"


def _refused(kind: str, details: str, *, doubtful: bool) -> BulkheadError:
    # The protocol has one error for every constraint; only its text says which.
    if kind == "constraint violation" and "index" in details:
        return Clash(f"the store refuses the change: {details}")
    if kind in ("I/O error", "resources exhausted", "cluster error"):
        doubt = _DOUBT if doubtful else ""
        why = f"the store could not write the change ({kind}: {details}); see to its disk, then try again{doubt}"
        return Unavailable(why, doubtful=doubtful)
    return BulkheadError(f"the store refuses the change: {kind}: {details}")
