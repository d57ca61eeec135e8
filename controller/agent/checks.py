"""Whether services answer: a connection, or an HTTP request, from inside the container's own network namespace to its own
address. Nothing of it is ever on a bridge.

Imports hostmodel, netns, resource and run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from controller.agent.netns import in_namespace
from controller.agent.resource import Failed
from controller.agent.run import NETNS_DIR, PREFIX
from controller.hostmodel import Check

LOG = logging.getLogger("bulkhead.agent")
PERIOD_S = 3.0
DOUBT_S = 0.5
"""Until the next look at one that is not what it is told to be, or was never up: it may just be starting."""
STARTS_S = 30.0
"""So long after it came one that was never up counts as starting; afterwards it is looked at as often as the others."""
TIMEOUT_S = 2.0
TURNS = 2
"""So many looks in a row have to say the same before it is told otherwise."""
AT_ONCE = 32
TICK_S = 0.1
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])\b")

UP = "up"


@dataclass(slots=True)
class _Known:
    """What is known of one service. `told` is empty before the first verdict."""

    since: float
    due: float
    told: str = ""
    doubts: int = 0
    busy: bool = False

    def judge(self, found: str, now: float) -> bool:
        """Take a look's answer in; whether something else is told now."""
        same = found.startswith(UP) == self.told.startswith(UP)
        if self.told and same:
            # Another reason for being down is told at once: nobody acts on it.
            news, self.told, self.doubts = self.told != found, found, 0
        else:
            self.doubts += 1
            # What has just been made is up as soon as it answers.
            news = self.doubts >= TURNS or (not self.told and found == UP)
            if news:
                self.told, self.doubts = found, 0
        starting = self.told != UP and now - self.since < STARTS_S
        self.due = now + (DOUBT_S if self.doubts or starting else PERIOD_S)
        return news


class Checks:
    """Looks at services again and again. `wanted` answers which; `told` hears how all of them are, whenever that changes.

    How they are is `102/xray` to `up` or `down: WHY`.
    """

    def __init__(
        self,
        wanted: Callable[[], Sequence[Check]],
        told: Callable[[Mapping[str, str]], None] = lambda _health: None,
    ) -> None:
        self._wanted = wanted
        self._told = told
        self._known: dict[Check, _Known] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._jobs: set[asyncio.Task[None]] = set()
        self.health: Mapping[str, str] = MappingProxyType({})

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._turn(time.monotonic())
                await asyncio.sleep(TICK_S)
        finally:
            for job in self._jobs:
                job.cancel()

    def _turn(self, now: float) -> None:
        wanted = self._wanted()
        if self._known.keys() != set(wanted):
            self._known = {one: self._known.get(one) or _Known(now, now) for one in wanted}
            self._tell()
        for check, known in self._known.items():
            if known.due <= now and not known.busy:
                known.busy = True
                job = asyncio.ensure_future(self._look(check, known))
                self._jobs.add(job)
                job.add_done_callback(self._jobs.discard)

    async def _look(self, check: Check, known: _Known) -> None:
        try:
            async with self._turns:
                found = await look(check)
            if known.judge(found, time.monotonic()) and self._known.get(check) is known:
                self._tell()
        except Exception:  # a defect of ours must not end the others
            LOG.exception("a look at %s failed", check.key)
            known.due = time.monotonic() + PERIOD_S
        finally:
            known.busy = False

    def _tell(self) -> None:
        now = MappingProxyType({check.key: known.told for check, known in self._known.items() if known.told})
        if now != self.health:
            self.health = now
            self._told(now)


async def look(check: Check) -> str:
    """`up`, or `down: WHY`."""
    try:
        with _socket(check) as sock:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(sock, (str(check.address), check.port))
                why = "" if check.check == "tcp" else await _http(sock, check)
    except TimeoutError:
        why = f"no answer within {TIMEOUT_S:g} s"
    except Failed:
        why = "its container is not there"
    except OSError as exc:
        why = os.strerror(exc.errno).lower() if exc.errno else str(exc)
    return f"down: {why}" if why else UP


def _socket(check: Check) -> socket.socket:
    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    return in_namespace(NETNS_DIR / f"{PREFIX}{check.container_id}", make)


async def _http(sock: socket.socket, check: Check) -> str:
    """Nothing where the answer is good."""
    loop = asyncio.get_running_loop()
    path = check.check.removeprefix("http:")
    request = f"GET {path} HTTP/1.1\r\nHost: {check.address}:{check.port}\r\nUser-Agent: bulkhead\r\nConnection: close\r\n\r\n"
    await loop.sock_sendall(sock, request.encode("ascii"))
    said = b""
    while len(said) < 12 and (more := await loop.sock_recv(sock, 1024)):
        said += more
    status = _STATUS.match(said)
    if status is None:
        return "it does not answer in HTTP"
    return "" if int(status[1]) < 400 else f"HTTP status {int(status[1])}"
