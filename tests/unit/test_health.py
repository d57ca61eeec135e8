"""When a tunnel counts as up or down, and who hears of it."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from controller.agent import health
from controller.agent.gate import Controller
from controller.agent.health import Health, Watched
from controller.hostmodel import Probe
from controller.model import Ipv4
from controller.problems import BulkheadError


class Told:
    """A controller that writes down what it is told; now and then it is away."""

    def __init__(self) -> None:
        self.healthy: list[bool] = []
        self.away = False

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.away:
            raise BulkheadError("no controller")
        assert (question["ask"], question["network"]) == ("health", "privacy")
        self.healthy.append(question["healthy"])
        return {}


class Scripted(Health):
    """Answers of probes, one after the other; an exception is raised."""

    def __init__(self, controller: Told, said: list[tuple[bool, str]], *answers: str | Exception) -> None:
        async def age() -> float | None:
            return None

        watched = Watched("privacy", "bulkhead-nowhere", "wg-warp0", Probe(Ipv4.parse("1.1.1.1")), age)
        super().__init__(watched, cast(Controller, controller), lambda _network, up, why: said.append((up, why)))
        self._answers = iter(answers)

    async def _probe(self) -> str:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def probed(*answers: str) -> tuple[list[bool], list[tuple[bool, str]]]:
    controller, said = Told(), []
    told = Scripted(controller, said, *answers)

    async def run() -> None:
        for _ in answers:
            await told.once()

    asyncio.run(run())
    return controller.healthy, said


def test_one_lost_packet_is_not_down_and_one_that_comes_back_is_up() -> None:
    healthy, said = probed("", "lost", "", "lost", "lost", "lost", "", "")
    assert healthy == [True, True, True, True, False, False, True, True]
    assert said == [(True, ""), (False, "lost"), (True, "")]


def test_a_tunnel_that_never_worked_is_down_at_once() -> None:
    assert probed("lost", "lost", "") == ([False, False, True], [(False, "lost"), (True, "")])


def test_a_controller_that_was_away_hears_it_later() -> None:
    controller, said = Told(), []
    told = Scripted(controller, said, "lost", "lost")

    async def run() -> None:
        controller.away = True
        await told.once()
        controller.away = False
        await told.once()

    asyncio.run(run())
    assert controller.healthy == [False] and said == [(False, "lost")]


def test_a_defect_does_not_end_the_watch() -> None:
    controller, said = Told(), []
    told = Scripted(controller, said, "", ValueError("a defect"), "lost", "lost")

    async def run() -> None:
        task = asyncio.ensure_future(told.run())
        while len(controller.healthy) < 3:
            await asyncio.sleep(0.01)
        task.cancel()

    before, health.PERIOD_S = health.PERIOD_S, 0.01
    try:
        asyncio.run(asyncio.wait_for(run(), 5))
    finally:
        health.PERIOD_S = before
    assert controller.healthy == [True, True, False]


def test_what_a_failed_probe_says() -> None:
    said: list[tuple[bool, str]] = []

    async def age() -> float | None:
        return 12.3

    for probe, what in ((Probe(Ipv4.parse("1.1.1.1")), "1.1.1.1"), (Probe(Ipv4.parse("1.1.1.1"), 443), "443")):
        watched = Watched("privacy", "bulkhead-nowhere", "wg-warp0", probe, age)
        one = Health(watched, cast(Controller, Told()), lambda _network, up, why: said.append((up, why)))
        asyncio.run(one.once())
        up, why = said.pop()
        assert not up and what in why and "does not answer through wg-warp0" in why and "\n" not in why
