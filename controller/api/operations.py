"""Changes that take until agent and controller have made them real: written, waited for, undone where refused.

A change and the operation that stands for it are one transaction, so that whatever dies in between, what was asked for is
there as a whole and is gone on with, or undone, after a restart. Nobody who waits holds anything up: the waiting goes on
when they go away.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Protocol, TypeVar

from controller.api.access import Principal
from controller.api.problem import ApiProblem
from controller.api.settings import Limits
from controller.api.view import View, encoded, plain
from controller.realized import Realized, realized
from controller.records import OperationRecord, Records, key
from controller.store import Change, Clash, Store, Unavailable

LOG = logging.getLogger("bulkhead.api")
T = TypeVar("T")
THREADS = 32
MAX_ANSWER = 256 * 1024
FINISH_TRIES = 5
SECRETS = frozenset({"client.add", "token.create"})
"""Kinds whose answers hold what nobody knows any more after a restart: they are taken back then."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered: a status, JSON, headers."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether the answer is yes."""
        return self.status < 400


def problem_answer(problem: ApiProblem) -> Answer:
    """A problem as an answer."""
    return Answer(problem.status, problem.body(), problem.headers)


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks for a change, and how: `key` and `digest` are of the idempotency key and the request, `wait_s` how long to
    wait until it is real, None to not wait at all."""

    who: Principal
    kind: str
    digest: str = ""
    key: str = ""
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What a change is about: the key of a record, and the node that has to make it real; without a node nothing is waited
    for. `last` is what is answered of it where it is gone afterwards; `secret` goes into this answer alone. `made_at` is
    the creation time of what was made, by which it is known again."""

    object: str
    node: str | None = None
    made_at: float = 0.0
    last: Mapping[str, Any] | None = None
    secret: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Kind(Protocol):
    """What is to be known of a kind of change, so that it can be gone on with after a restart as well."""

    @property
    def stays(self) -> bool:
        """Whether it stays as asked for though it is late, instead of being taken back."""

    def result(self, view: View, operation: OperationRecord) -> Answer:
        """What is answered once it is real."""

    def undo(self, change: Change, operation: OperationRecord) -> bool:
        """Take it back. Answers whether there was anything to take back."""


class Staying:
    """What kinds share that are never taken back."""

    stays = True

    def undo(self, change: Change, operation: OperationRecord) -> bool:
        """Nothing."""
        return False


class Operations:
    """Carries out changes. Belongs to the event loop; the store's own thread does the writing.

    `done` is called with every operation that has ended with nobody waiting for it, and its answer's status.
    """

    def __init__(
        self,
        store: Store,
        view: View,
        limits: Limits,
        kinds: Mapping[str, Kind],
        done: Callable[[OperationRecord, int], None] = lambda operation, status: None,
    ) -> None:
        self._store = store
        self._view = view
        self._limits = limits
        self._kinds = kinds
        self._done = done
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="change")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._following: set[str] = set()
        self._unwanted: set[str] = set()
        self._news = asyncio.Event()
        self.waiting = 0

    # ------------------------------------------------------------------------------------------------------ the outside

    @property
    def connected(self) -> bool:
        """Whether the store answers just now."""
        return self._store.connected

    def told(self) -> None:
        """The view is newer now."""
        self._news.set()
        self._news = asyncio.Event()

    async def change(self, function: Callable[[Change], T], timeout_s: float = 10.0) -> tuple[T, int]:
        """Change the store from the loop. Raises `ApiProblem` and what the function raises."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._store.change, function, timeout_s)
        except Unavailable as exc:
            raise ApiProblem("unavailable", f"{exc}.", headers={"Retry-After": "2"}) from exc
        except Clash as exc:
            raise ApiProblem("conflict", f"{exc}.") from exc

    async def carry_out(self, asked: Asked, function: Callable[[Change], Target]) -> Answer:
        """Make a change and, if asked to, wait until it is real. Raises `ApiProblem`.

        What was begun goes on to its end though whoever waits for it be cancelled.
        """
        if self.waiting >= self._limits.waiting:
            detail = f"{self.waiting} changes are being waited for already. Try again in a few seconds."
            raise ApiProblem("too-many-requests", detail, headers={"Retry-After": "2"})
        self.waiting += 1
        task = self._start(self._carry_out(asked, function))
        task.add_done_callback(self._less)
        return await asyncio.shield(task)

    def _less(self, _task: asyncio.Task[Any]) -> None:
        self.waiting -= 1

    def resume(self) -> None:
        """Go on with what this node's API has left when it ended, and forget what is old."""
        for operation in self._view.records.operations:
            mine = operation.node == self._view.node and operation.state == "running"
            if mine and operation.id not in self._following and operation.kind in self._kinds:
                if operation.kind in SECRETS:
                    self._unwanted.add(operation.id)
                self._following.add(operation.id)
                self._start(self._follow(operation, self._limits.wait_s, {}, keep=True))
        self._unwanted &= {one.id for one in self._view.records.operations}

    async def prune(self) -> None:
        """Forget operations that are old, or too many."""
        now = time.time()
        ended = [one for one in self._view.records.operations if one.state != "running"]
        ended.sort(key=lambda one: one.created_at, reverse=True)
        old = [one for one in ended if now - one.created_at > self._limits.operation_s]
        surplus = {key(one) for one in (*old, *ended[self._limits.operations :])}

        def forget(change: Change) -> None:
            for name in surplus:
                change.delete(name)

        if surplus:
            await self.change(forget)

    async def close(self, patience_s: float = 1.0) -> None:
        """Let what goes on end if it is quick; the rest is gone on with by the next API."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience_s)
            for task in late:
                task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None and not isinstance(exc, ApiProblem):
            LOG.error("an operation was not carried out", exc_info=exc)

    # -------------------------------------------------------------------------------------------------------- the inside

    async def _carry_out(self, asked: Asked, function: Callable[[Change], Target]) -> Answer:
        name = secrets.token_hex(8)

        def write(change: Change) -> tuple[OperationRecord, Target | None]:
            again = _same(change.records, asked)
            if again is not None:
                return again, None
            target = function(change)
            operation = OperationRecord(
                id=name,
                kind=asked.kind,
                object=target.object,
                node=self._view.node,
                who=asked.who.name,
                created_at=target.made_at or moment(),
                answer=json.dumps(target.last) if target.last is not None else "",
                idempotency_key=asked.key,
                digest=asked.digest if asked.key else "",
                revision=change.revision,
            )
            change.put(operation)
            return operation, target

        self._following.add(name)  # before it is written: what the store shows is not to be taken for what was left
        target = None
        try:
            (operation, target), revision = await self._written(write)
        except ApiProblem as problem:
            if isinstance(problem.__cause__, Unavailable) and problem.__cause__.doubtful:
                self._unwanted.add(name)  # the caller is told that it failed: if it was written, it is taken back
            raise
        finally:
            if target is None:
                self._following.discard(name)
        if target is None:
            return self._replayed(operation)
        operation = replace(operation, revision=revision)
        keep = bool(asked.key) or asked.wait_s is None
        if asked.wait_s is None:
            self._start(self._alone(operation, target.secret))
            return accepted(operation)
        return await self._follow(operation, asked.wait_s, target.secret, keep=keep)

    async def _written(self, write: Callable[[Change], T]) -> tuple[T, int]:
        """Changes that ask for the same key at once clash; the second one then finds the first."""
        try:
            return await self.change(write)
        except ApiProblem as problem:
            if problem.code != "conflict":
                raise
            return await self.change(write)

    def _replayed(self, operation: OperationRecord) -> Answer:
        if operation.state == "running":
            detail = (
                "The first request with this idempotency key is still being carried out. Ask for the operation, or send "
                "the request again in a few seconds."
            )
            headers = {"Retry-After": "1", "Location": f"/api/operations/{operation.id}"}
            raise ApiProblem("in-progress", detail, headers=headers)
        if not operation.answer:
            detail = (
                "This request was carried out before. Its answer held a secret, which is shown once; delete what was made "
                "and make it again with another idempotency key."
            )
            raise ApiProblem("shown-once", detail)
        return Answer(operation.status, operation.answer.encode(), {"Idempotency-Replayed": "true"})

    async def _alone(self, operation: OperationRecord, secret: Mapping[str, Any]) -> None:
        """Nobody waits for this one, so that its end is told."""
        kind = self._kinds[operation.kind]
        wait_s = self._limits.longest_wait_s if kind.stays else self._limits.wait_s
        answer = await self._follow(operation, wait_s, secret, keep=True, patient=False)
        self._done(operation, answer.status)

    async def _follow(
        self, operation: OperationRecord, wait_s: float, secret: Mapping[str, Any], *, keep: bool, patient: bool = True
    ) -> Answer:
        """Wait until an operation is real; undo it where it is refused or late. Writes down how it ended.

        What stays as asked for is waited for with nobody waiting once it is late, if there is patience.
        """
        self._following.add(operation.id)
        handed_on = False
        try:
            kind = self._kinds[operation.kind]
            found = Realized(False, "the store did not answer in time")
            if operation.id not in self._unwanted:
                found = await self._wait(operation, wait_s)
            if kind.stays and not found.done and not found.refused and patient:
                handed_on = True
                self._start(self._alone(operation, secret))
                return accepted(operation)
            answer = await self._outcome(operation, kind, found, wait_s)
            await self._finish(operation, answer, keep=keep, secret=bool(secret))
            if secret and answer.good:
                answer = replace(answer, body=encoded(json.loads(answer.body) | dict(secret)))
            return answer
        finally:
            if not handed_on:
                self._following.discard(operation.id)

    async def _outcome(self, operation: OperationRecord, kind: Kind, found: Realized, wait_s: float) -> Answer:
        if not found.done:
            return await self._undone(operation, kind, found, wait_s)
        try:
            return kind.result(self._view, operation)
        except ApiProblem as problem:  # somebody else has taken it away meanwhile
            return problem_answer(problem)

    async def _wait(self, operation: OperationRecord, wait_s: float) -> Realized:
        node, keys = self._watched(operation)
        if node is None:
            return Realized(True)
        deadline = time.monotonic() + wait_s
        while True:
            news = self._news
            records = self._view.records
            found = Realized(False, "the store has not shown it yet")
            if records.revision >= operation.revision:
                found = realized(records.node(node), operation.revision, keys)
            left = deadline - time.monotonic()
            if found.done or found.refused or left <= 0:
                return found
            try:
                await asyncio.wait_for(news.wait(), min(left, 1.0))
            except TimeoutError:
                continue

    def _watched(self, operation: OperationRecord) -> tuple[str | None, tuple[str, ...]]:
        """Who makes an operation's object real, and the keys under which they would say that it is not."""
        what, _, name = operation.object.partition("/")
        last = json.loads(operation.answer) if operation.answer else {}
        if what == "container":
            node, network = last.get("node"), last.get("network")
            for record in self._view.records.containers:
                if record.id == name and not last:
                    node, network = record.node, record.network
            return node or self._view.node, (operation.object, f"network/{network}")
        if what == "client":
            return name.partition("/")[0], (operation.object,)
        if what == "grant":
            grant = next((one for one in self._view.records.grants if one.id == name), None)
            return grant.node if grant is not None else self._view.node, (operation.object,)
        return None, ()

    async def _undone(self, operation: OperationRecord, kind: Kind, found: Realized, wait_s: float) -> Answer:
        there, revision = await self.change(lambda change: kind.undo(change, operation))
        gone = True
        if there:
            gone = (await self._wait(replace(operation, revision=revision), self._limits.undo_s)).done
        after = "It was taken back" if there else "It stays as asked for"
        if there and not gone:
            after += ", which the node has not carried out yet"
        if found.refused:
            return problem_answer(ApiProblem("refused", f"{found.why}. {after}."))
        detail = (
            f"Not realized within {wait_s:g} s: {found.why}. {after}. See GET /api/status; try again, with a longer "
            "timeout if the node is only slow."
        )
        return problem_answer(ApiProblem("not-realized", detail, headers={"Retry-After": "5"}))

    async def _finish(self, operation: OperationRecord, answer: Answer, *, keep: bool, secret: bool) -> None:
        ended = replace(
            operation,
            state="done" if answer.good else "failed",
            status=answer.status,
            answer="" if secret and answer.good else answer.body.decode()[:MAX_ANSWER],
        )

        def write(change: Change) -> None:
            if keep:
                change.put(ended)
            else:
                change.delete(key(operation))

        # Before anybody is told that it is done: an operation that still runs is undone where it is found late.
        for attempt in range(FINISH_TRIES):
            try:
                await self.change(write)
                return
            except ApiProblem as problem:
                LOG.warning("how operation %s ended could not be written: %s", operation.id, problem)
                await asyncio.sleep(min(0.1 * 2**attempt, 2.0))


def moment() -> float:
    """What time it is, in the milliseconds that the store keeps whole."""
    return round(time.time(), 3)


def _same(records: Records, asked: Asked) -> OperationRecord | None:
    """The operation of the same request by the same caller. Raises `ApiProblem` where the request was another one."""
    if not asked.key:
        return None
    for one in records.operations:
        if one.idempotency_key == asked.key and one.who == asked.who.name:
            if one.digest != asked.digest or one.kind != asked.kind:
                detail = "This idempotency key was used for another request; choose a new one for each request."
                raise ApiProblem("key-reused", detail)
            return one
    return None


def accepted(operation: OperationRecord) -> Answer:
    """The answer to somebody who does not wait."""
    return Answer(202, encoded(shown(operation)), {"Location": f"/api/operations/{operation.id}"})


def shown(operation: OperationRecord) -> dict[str, Any]:
    """An operation as it goes out."""
    from controller.api.models import Operation, rfc3339

    ended = operation.state != "running" and operation.answer
    return plain(
        Operation.model_validate(
            {
                "id": operation.id,
                "kind": operation.kind,
                "object": operation.object,
                "state": operation.state,
                "created_at": rfc3339(operation.created_at),
                "result": json.loads(operation.answer) if ended else None,
            }
        )
    )


def request_digest(method: str, path: str, body: bytes) -> str:
    """Names a request, so that another one with its key is told from it."""
    return sha256(b"\0".join((method.encode(), path.encode(), body))).hexdigest()
