"""Changes that are under way when the API looks for what an earlier one has left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controller.api import tokens
from controller.api.access import Principal
from controller.api.operations import Answer, Asked, Operations, Target
from controller.api.settings import Limits
from controller.api.view import View
from controller.records import Scope, TokenRecord, key
from controller.store import Change, Store
from tests.api.stand import EXAMPLE, NODE, ovsdb


class Slow(Store):
    """A store whose caller hears of a change later than everybody else does."""

    def change(self, fn: Callable[[Change], Any], timeout_s: float = 10.0, *, above: int = 0) -> tuple[Any, int]:
        answer = super().change(fn, timeout_s, above=above)
        time.sleep(0.3)
        return answer


def test_what_was_just_begun_is_not_taken_for_what_was_left(tmp_path: Path) -> None:
    record = TokenRecord("abc", "boss", "d" * 64, (Scope.READ,), "uid:0", 1.0, 0.0)

    def create(change: Change) -> Target:
        change.put(record)
        return Target(key(record), secret={"token": "bh_secret"})

    async def made(store: Store) -> Answer:
        view = View(EXAMPLE, NODE, store.records)
        operations = Operations(store, view, Limits(), tokens.KINDS)
        loop = asyncio.get_running_loop()
        store.subscribe(lambda records: loop.call_soon_threadsafe(view.follow, records))
        who = Principal("uid:0", frozenset(Scope), "unix")
        asked = asyncio.create_task(operations.carry_out(Asked(who, "token.create", wait_s=5.0), create))
        while not view.records.operations:
            await asyncio.sleep(0.01)
        operations.resume()
        try:
            return await asked
        finally:
            await operations.close()

    with ovsdb(tmp_path) as remote:
        store = Slow([remote], lock=True)
        store.start()
        try:
            answer = asyncio.run(made(store))
            assert answer.status == 201, answer.body
            assert [one.name for one in store.records.tokens] == ["boss"]
        finally:
            store.close()
