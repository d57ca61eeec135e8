"""The API's app on a unix socket in a thread of the test, with limits of its own and no store behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controller.api.app import Api
from controller.api.audit import Audit
from controller.api.server import Server, unix_listener
from controller.api.settings import Limits, Settings
from controller.api.view import View
from controller.store import Store
from tests.api.stand import EXAMPLE, NODE


@contextmanager
def inside(directory: Path, **limits: Any) -> Iterator[Path]:
    """Its socket."""
    settings = Settings(EXAMPLE, directory, directory, node=NODE, limits=Limits(**limits))
    ready, loop = threading.Event(), asyncio.new_event_loop()
    store = Store([f"unix:{directory / 'none.sock'}"])
    audit = Audit(settings.events)

    async def main() -> None:
        api = Api(settings, store, View(EXAMPLE, NODE), audit)
        server = Server(api.guard, settings.limits)
        await server.listen(unix_listener(settings.socket))
        ready.set()
        await stop.wait()
        await server.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield settings.socket
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
        audit.close()
        store.close()
