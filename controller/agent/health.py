"""Whether tunnels carry traffic: a probe through each egress tunnel, told to the controller, which opens and closes the
egress by it. Imports gate, hostmodel, netns and run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from controller.agent.gate import Controller
from controller.agent.netns import in_namespace
from controller.agent.resource import Failed
from controller.agent.run import NETNS_DIR, call
from controller.hostmodel import Probe
from controller.problems import BulkheadError

LOG = logging.getLogger("bulkhead.agent")
PERIOD_S = 1.0
PROBE_S = 1.0
FAILURES = 2
"""So many probes in a row have to fail before a tunnel counts as down: one packet may get lost. One that comes back
is enough for up."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A tunnel to probe. `age_s` answers how long ago its last handshake was, None if there was none."""

    network: str
    namespace: str
    interface: str
    probe: Probe
    age_s: Callable[[], Awaitable[float | None]]


class Health:
    """Probes one tunnel again and again. `told(network, up, why)` hears of every change."""

    def __init__(self, watched: Watched, controller: Controller, told: Callable[[str, bool, str], None]) -> None:
        self._watched = watched
        self._controller = controller
        self._told = told
        self.up: bool | None = None
        self._failures = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.once()
            except Exception:  # a defect of ours must not leave an egress open that nobody looks at any more
                LOG.exception("a probe of %s failed", self._watched.interface)
            await asyncio.sleep(PERIOD_S)

    async def once(self) -> None:
        """Probe, judge, tell."""
        why = await self._probe()
        self._failures = self._failures + 1 if why else 0
        up = not why if self.up is None or not why else self.up and self._failures < FAILURES
        if up != self.up:
            self.up = up
            self._told(self._watched.network, up, why)
        # Every time: a controller that has just started thinks that every tunnel works.
        with contextlib.suppress(BulkheadError):
            await self._controller.ask({"ask": "health", "network": self._watched.network, "healthy": up})

    async def _probe(self) -> str:
        """Nothing if a packet went through the tunnel and came back; else why not."""
        watched, probe = self._watched, self._watched.probe
        try:
            if probe.port is None:
                wait = f"{PROBE_S:g}"
                command = ("ping", "-n", "-q", "-c1", f"-W{wait}", f"-I{watched.interface}", str(probe.address))
                await call(*command, namespace=watched.namespace, timeout_s=PROBE_S + 1)
            else:
                await connect(watched.namespace, str(probe.address), probe.port)
            return ""
        except (Failed, OSError, TimeoutError) as exc:
            what = f"{probe.address}" + (f" TCP port {probe.port}" if probe.port else "")
            said = str(exc) if isinstance(exc, Failed) and "there is no network namespace" in str(exc) else ""
            return f"{what} does not answer through {watched.interface}; {said or await self._handshake()}"

    async def _handshake(self) -> str:
        try:
            age = await self._watched.age_s()
        except BulkheadError as exc:
            return str(exc)
        return "there was no handshake yet" if age is None else f"the last handshake was {age:.0f} s ago"


async def connect(namespace: str, address: str, port: int, timeout_s: float = PROBE_S) -> None:
    """Open and close a TCP connection from inside a namespace. Raises `OSError`, `TimeoutError`, or `Failed`."""

    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    with in_namespace(NETNS_DIR / namespace, make) as sock:
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (address, port)), timeout_s)
