"""What the agent keeps to itself, and what it remembers of the kernel's answers."""

from __future__ import annotations

import asyncio
import struct

from controller.agent.netlink import Known, Link, Nets, Route
from controller.agent.telling import BURST, EVERY_S, Limiter
from controller.hostderive import device

LINK, ADDRESS, ROUTE, NEIGHBOUR = 16, 20, 24, 28


def test_one_part_is_told_a_burst_and_then_now_and_again() -> None:
    limiter = Limiter()
    assert sum(limiter.admit("veth/a", 0.0) for _ in range(1000)) == BURST
    assert limiter.admit("veth/b", 0.0), "another part has a bucket of its own"
    assert limiter.withheld(0.0) == {}
    assert limiter.withheld(EVERY_S) == {"veth/a": 1000 - BURST}
    assert limiter.withheld(EVERY_S) == {}
    assert not limiter.admit("veth/a", EVERY_S)
    assert limiter.admit("veth/a", 2 * EVERY_S)


def test_a_part_that_is_quiet_is_forgotten() -> None:
    limiter = Limiter()
    for number in range(1000):
        limiter.admit(f"veth/{number}", 0.0)
    limiter.withheld(EVERY_S * (BURST + 1))
    assert not limiter._buckets


def message(kind: int, index: int) -> bytes:
    return struct.pack("=IHHIIBxHiII", 32, kind, 0, 0, 0, 0, 0, index, 0, 0)


def known() -> Known:
    found = Known()
    found.links = {name: Link(index, name, "veth", "", 1500, True, 0, 0) for index, name in ((3, "a"), (4, "b"))}
    found.links["none"] = None
    found.addresses, found.routes, found.neighbours = {}, {3: {Route("default")}}, {}
    return found


def test_only_what_changed_is_forgotten() -> None:
    found = known()
    found.hear(message(ADDRESS, 9) + message(LINK, 3))
    assert list(found.links) == ["b"]
    assert (found.addresses, found.routes, found.neighbours) == (None, None, {})
    found = known()
    found.hear(message(NEIGHBOUR, 3))
    assert len(found.links) == 3 and found.neighbours is None and found.routes and found.addresses == {}


def test_notifications_that_are_cut_off_are_survived() -> None:
    for data in (b"", b"\0" * 16, message(LINK, 3)[:17], message(ROUTE, 3) * 3 + b"\x01"):
        known().hear(data)


def test_two_long_names_that_begin_alike_stay_apart() -> None:
    assert device("warp0") == "wg-warp0"
    long = [device(f"a-very-long-pt{end}") for end in "12"]
    assert len(set(long)) == 2 and all(len(name) == 15 for name in long)


def test_many_may_ask_at_once() -> None:
    """The kernel refuses a second dump on a socket that is busy with one."""

    async def ask() -> list[object]:
        nets = Nets()
        try:
            net = await nets.get(None)
            asked = [job() for _ in range(20) for job in (net.links, lambda: net.addresses(1), lambda: net.routes(1))]
            return list(await asyncio.gather(*asked, net.link("lo")))
        finally:
            nets.close()

    found = asyncio.run(ask())
    assert all("lo" in links for links in found[:-1:3] if isinstance(links, dict))
    assert isinstance(found[-1], Link) and found[-1].index == 1
