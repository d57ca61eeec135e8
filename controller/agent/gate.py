"""The start gate: a container's interface comes up only when the controller has confirmed its port's flows.

Imports asking, netlink and resource.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from controller.agent.netlink import Nets
from controller.agent.resource import Change, Waiting
from controller.asking import ask
from controller.problems import BulkheadError

FRESH_S = 0.02
RETRY_S = 0.03
AWAY_RETRY_S = 0.5
TIMEOUT_S = 3.0


class Controller:
    """The controller of this node, asked for what several want to know at once."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._asked_at = 0.0
        self._away: str | None = None
        self._away_until = 0.0
        self._open: dict[str, set[str]] = {}

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Raises `BulkheadError` where there is none.

        One that hangs is not waited for by everybody in turn: for a moment the others are told the same.
        """
        if self._away is not None and time.monotonic() < self._away_until:
            raise BulkheadError(self._away)
        self._away = None
        began = time.monotonic()
        try:
            return await asyncio.to_thread(ask, self._run_dir, question, TIMEOUT_S)
        except BulkheadError as exc:
            if time.monotonic() - began > TIMEOUT_S / 2:
                self._away, self._away_until = str(exc), time.monotonic() + AWAY_RETRY_S
            raise

    async def open_ports(self, bridge: str) -> set[str]:
        """Ports of a bridge whose flows the switch has confirmed. Raises `BulkheadError`."""
        if time.monotonic() - self._asked_at > FRESH_S:
            bridges = (await self.ask({"ask": "status"}))["bridges"]
            self._open = {b["name"]: {p["name"] for p in b.get("ports", ()) if p["open"]} for b in bridges}
            self._asked_at = time.monotonic()
        return self._open.get(bridge, set())


class Gate:
    """Whether the port behind an interface is open. One that is up already has passed it."""

    period = 2.0

    def __init__(
        self, nets: Nets, controller: Controller, bridge: str, port: str, namespace: str, needs: tuple[str, ...]
    ) -> None:
        self._nets, self._controller = nets, controller
        self._bridge, self._port, self._namespace = bridge, port, namespace
        self.key = f"gate/{port}"
        self.needs = needs
        self.watches = (namespace,)

    async def diff(self) -> list[Change]:
        link = await (await self._nets.get(self._namespace)).link("eth0")
        if link is not None and link.up:
            return []
        try:
            opened = await self._controller.open_ports(self._bridge)
        except BulkheadError as exc:
            raise Waiting(
                f"the controller has to confirm the flows of {self._port} first: {exc}", AWAY_RETRY_S
            ) from exc
        if self._port not in opened:
            raise Waiting(f"the flows of {self._port} on {self._bridge} are not confirmed yet", RETRY_S)
        return []
