"""What the kernel has told is kept as long as it is true: not while another task hears of a change."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from controller.agent.netlink import Net, OneAtATime


class Kernel:
    """Answers with one address, and lets others run before it does."""

    def __init__(self) -> None:
        self.asked = 0
        self.between = asyncio.Event()
        self.begun = asyncio.Event()

    async def get_addr(self, **_about: object) -> list[dict[str, Any]]:
        self.asked += 1
        number = self.asked
        self.begun.set()
        await self.between.wait()
        return [{"address": f"10.0.0.{number}", "prefixlen": 24, "index": 7}]


def net(kernel: Kernel) -> Net:
    watching, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    watching.setblocking(False)
    return Net(None, cast(OneAtATime, kernel), watching, far, lambda _name: None)


async def _raced(forgets: bool) -> tuple[set[str], set[str], int]:
    kernel = Kernel()
    one = net(kernel)
    first = asyncio.ensure_future(one.addresses(7))
    await kernel.begun.wait()
    if forgets:
        one.known.forget()
    second = asyncio.ensure_future(one.addresses(7))
    await asyncio.sleep(0)
    kernel.between.set()
    found = await first, await second
    await one.addresses(7)
    one.watching.close()
    one.control.close()
    return *found, kernel.asked


def test_who_asks_while_another_waits_for_the_answer_gets_a_whole_one() -> None:
    first, second, _asked = asyncio.run(_raced(forgets=False))
    assert first and second


def test_an_answer_from_before_a_change_is_not_kept() -> None:
    first, second, asked = asyncio.run(_raced(forgets=True))
    assert first == {"10.0.0.1/24"} and second
    assert asked >= 2
