"""Health of services, with real servers in real namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from controller.agent import checks
from controller.agent.checks import Checks, look
from controller.hostmodel import Check
from controller.model import Ipv4

from .apart import apart

ADDRESS = Ipv4.parse("10.0.0.102")
SERVE = """
import socket, sys, time
sock = socket.create_server(("10.0.0.102", int(sys.argv[1])))
while True:
    one, _ = sock.accept()
    if sys.argv[2] == "hang": time.sleep(60)
    if sys.argv[2] == "close": one.close(); continue
    if sys.argv[2] != "-": one.recv(4096)
    one.sendall(sys.argv[2].replace("_", " ").encode() + b"\\r\\n\\r\\n")
    one.close()
"""


def sh(script: str) -> None:
    subprocess.run(["sh", "-ec", script], check=True)


def container(number: int = 102, address: str = "10.0.0.102") -> None:
    name = f"bulkhead-{number}"
    sh(
        f"""ip netns add {name}; ip -n {name} link set lo up; ip -n {name} link add eth0 type veth peer name far
        ip -n {name} address add {address}/24 dev eth0; ip -n {name} link set far up; ip -n {name} link set eth0 up"""
    )


def server(port: int, answer: str, number: int = 102) -> subprocess.Popen[bytes]:
    inside = ["ip", "netns", "exec", f"bulkhead-{number}"]
    return subprocess.Popen([*inside, sys.executable, "-c", SERVE, str(port), answer])


def check(port: int, how: str = "tcp", name: str = "") -> Check:
    return Check("102", name or f"s{port}", ADDRESS, port, how)


async def until(good: Callable[[], bool], limit_s: float = 8) -> float:
    began = time.monotonic()
    while not good():
        assert time.monotonic() - began < limit_s, "it takes too long"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def listening(port: int) -> None:
    for _ in range(200):
        if await look(check(port)) == "up":
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"nobody listens on {port}")


@apart
async def test_what_is_up_and_why_others_are_not(_: Path) -> None:
    assert await look(check(80)) == "down: its container is not there"
    container()
    for port, answer in ((80, "HTTP/1.1_204_No_Content"), (81, "HTTP/1.0_302_Found"), (82, "HTTP/1.1_503_Busy"),
                         (83, "SSH-2.0-OpenSSH"), (84, "hang"), (85, "close")):  # fmt: skip
        server(port, answer)
    for port in (80, 81, 82, 83, 84, 85):
        await listening(port)
    assert await look(check(80, "http:/healthz")) == "up"
    assert await look(check(81, "http:/")) == "up"
    assert await look(check(82, "http:/")) == "down: HTTP status 503"
    assert await look(check(83, "http:/")) == "down: it does not answer in HTTP"
    assert await look(check(83)) == "up"
    began = time.monotonic()
    assert await look(check(84, "http:/")) == "down: no answer within 2 s"
    assert 1.9 < time.monotonic() - began < 2.5
    assert (await look(check(85, "http:/"))).startswith("down: ")
    assert await look(check(9)) == "down: connection refused"


@apart
async def test_it_follows_what_happens(_: Path) -> None:
    container()
    wanted = [check(80), check(81)]
    told: list[Mapping[str, str]] = []
    running = Checks(lambda: wanted, told.append)
    job = asyncio.ensure_future(running.run())
    one = server(80, "x")
    assert await until(lambda: running.health.get("102/s80") == "up") < 2
    await until(lambda: running.health.get("102/s81") == "down: connection refused")
    one.kill()
    took = await until(lambda: running.health["102/s80"] == "down: connection refused")
    assert took < checks.PERIOD_S + 2 * checks.DOUBT_S + 1
    server(81, "x")
    await until(lambda: running.health["102/s81"] == "up")
    wanted.pop()
    await until(lambda: dict(running.health) == {"102/s80": "down: connection refused"})
    assert told[-1] == running.health and len(told) == len({str(dict(each)) for each in told})
    job.cancel()
    await asyncio.wait([job])


@apart
async def test_one_lost_look_is_not_told(_: Path) -> None:
    container()
    told: list[Mapping[str, str]] = []
    checks.PERIOD_S, checks.DOUBT_S = 0.1, 0.1
    answers = iter(["up", "down: x", "up", "up", "down: x", "down: y", "down: z", "up", "down: z", "up", "up"])
    real = checks.look

    async def scripted(_check: Check) -> str:
        with contextlib.suppress(StopIteration):
            return next(answers)
        await asyncio.sleep(60)
        return ""

    checks.look = scripted
    running = Checks(lambda: [check(80, name="one")], lambda health: told.append(dict(health)))
    job = asyncio.ensure_future(running.run())
    await until(lambda: len(told) == 4)
    assert [each["102/one"] for each in told] == ["up", "down: y", "down: z", "up"]
    job.cancel()
    checks.look = real


@apart
async def test_a_hundred_cost_little_and_the_hanging_hold_up_nobody(_: Path) -> None:
    for number in range(10):
        container(200 + number, f"10.0.0.{200 + number}")
    here = ["sh", "-ec", ""]
    for number in range(10):
        address = f"10.0.0.{200 + number}"
        code = (
            f"import socket,time\nkept=[socket.create_server(('{address}', 1000 + i), backlog=1024) for i in range(10)]\n"
            "print(1, flush=True)\ntime.sleep(600)"
        )
        here = ["ip", "netns", "exec", f"bulkhead-{200 + number}", sys.executable, "-c", code]
        process = subprocess.Popen(here, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
    wanted = [
        Check(str(200 + c), f"s{i}", Ipv4.parse(f"10.0.0.{200 + c}"), 1000 + i, "tcp")
        for c in range(10)
        for i in range(10)
    ]
    running = Checks(lambda: wanted)
    job = asyncio.ensure_future(running.run())
    took = await until(lambda: len(running.health) == 100)
    before = time.process_time()
    await asyncio.sleep(9)
    spent = (time.process_time() - before) / 9
    print(f"the first look at all took {took:.2f} s; then {spent:.1%} of a core")
    assert set(running.health.values()) == {"up"}
    assert spent < 0.05
    job.cancel()
