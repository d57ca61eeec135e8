"""The API's listening socket in its container: asked for without root's rights, used from outside the namespace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from controller.agent import sockets
from controller.agent.identity import NUMBER, Identity, identity
from controller.agent.sockets import Sockets
from controller.api_socket import Listening, listening_socket
from controller.hostmodel import Api
from controller.model import Ipv4
from controller.problems import BulkheadError

from .apart import apart

ADDRESS = "10.1.0.201"
API = Api("201", Ipv4.parse(ADDRESS))
NOBODY = identity(str(NUMBER))
ASK = """
import os, sys
from pathlib import Path
os.setresgid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2])); os.setgroups([]); os.setresuid(*[int(sys.argv[3])] * 3)
from controller.api_socket import listening_socket
from controller.problems import BulkheadError
try:
    found = listening_socket(Path(sys.argv[1]), sys.argv[4])
except BulkheadError as exc:
    print(exc)
    sys.exit(1)
if found is None:
    print("unchanged")
    sys.exit(0)
print(found.address, found.port, found.sock.getsockname(), flush=True)
if len(sys.argv) > 5:
    found.sock.settimeout(5)
    one, _ = found.sock.accept()
    one.sendall(b"hello")
"""
ROOT = Path(__file__).parents[2]


def sh(script: str) -> None:
    subprocess.run(["sh", "-ec", script], check=True)


def container(address: bool = True) -> None:
    sh(
        "ip netns add bulkhead-201; ip -n bulkhead-201 link set lo up; ip -n bulkhead-201 link add eth0 type veth peer name far"
    )
    if address:
        sh(f"ip -n bulkhead-201 address add {ADDRESS}/24 dev eth0; ip -n bulkhead-201 link set eth0 up")


@contextlib.asynccontextmanager
async def serving(run_dir: Path, api: Api = API, asker: Identity | None = NOBODY):  # type: ignore[no-untyped-def]
    (run_dir / "agent").mkdir(exist_ok=True, mode=0o755)
    job = asyncio.ensure_future(Sockets(run_dir, lambda: api, asker).run())
    while not (run_dir / "agent/sockets").exists():
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.01)
    try:
        yield
    finally:
        job.cancel()
        await asyncio.wait([job])
    assert not (run_dir / "agent/sockets").exists()


async def ask(run_dir: Path, have: str = "") -> Listening | None:
    return await asyncio.to_thread(listening_socket, run_dir, have)


async def asked_by(run_dir: Path, who: Identity, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ASK, str(run_dir), str(who.gid), str(who.uid), "", *more]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@apart
async def test_it_is_used_from_outside_by_somebody_without_rights(directory: Path) -> None:
    container()
    async with serving(directory):
        mode = (directory / "agent/sockets").stat()
        assert (stat.S_IMODE(mode.st_mode), mode.st_uid, mode.st_gid) == (0o660, 0, NOBODY.gid)
        served = asyncio.ensure_future(asked_by(directory, NOBODY, "serve"))
        connect = f"import socket; print(socket.create_connection(('{ADDRESS}', 9573), 5).recv(9))"
        for _ in range(100):
            await asyncio.sleep(0.05)
            command = ["ip", "netns", "exec", "bulkhead-201", sys.executable, "-c", connect]
            said = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            if said.returncode == 0:
                break
        assert said.stdout == "b'hello'\n", said.stderr
        done = await served
        assert done.stdout == f"{ADDRESS} 9573 ('{ADDRESS}', 9573)\n", done.stderr
        with pytest.raises(OSError):
            socket.create_connection((ADDRESS, 9573), 0.5)  # not in the host's namespace


@apart
async def test_the_same_is_not_given_twice_and_a_new_container_gives_another(directory: Path) -> None:
    container(address=False)  # a socket may come before the address
    async with serving(directory):
        first = await ask(directory)
        assert first is not None and first.sock.getsockname() == (ADDRESS, 9573)
        assert await ask(directory, first.namespace) is None
        sh("ip netns delete bulkhead-201")
        with pytest.raises(BulkheadError, match="container 201 is not there yet"):
            await ask(directory, first.namespace)
        container()
        second = await ask(directory, first.namespace)
        assert second is not None and second.namespace != first.namespace
        first.sock.close()
        with pytest.raises(BulkheadError, match="9573 of container 201 is taken"):
            await ask(directory)
        second.sock.close()
        again = await ask(directory)
        assert again is not None and again.namespace == second.namespace
        again.sock.close()


@apart
async def test_nobody_else_gets_one(directory: Path) -> None:
    container()
    other = Identity("other", 4242, NOBODY.gid)
    async with serving(directory):
        done = await asked_by(directory, other)
        assert done.returncode == 1 and "user 4242" in done.stdout and "gets no socket" in done.stdout
        done = await asked_by(directory, Identity("third", 4242, 4242))
        assert done.returncode == 1 and "Permission denied" in done.stdout
    async with serving(directory, asker=None):
        done = await asked_by(directory, NOBODY)
        assert done.returncode == 1 and "Permission denied" in done.stdout
    async with serving(directory, Api()):
        with pytest.raises(BulkheadError, match="gives the API no container"):
            await ask(directory)


@apart
async def test_nonsense_is_answered_and_the_slow_do_not_hold_up_others(directory: Path) -> None:
    container()
    async with serving(directory):
        path = str(directory / "agent/sockets")

        def told(line: bytes) -> dict[str, str]:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(path)
                sock.sendall(line)
                answer: dict[str, str] = json.loads(sock.makefile("rb").readline())
                return answer

        for line in (b"x\n", b"[]\n", b'{"want": "root"}\n', b"\xff\n", b"[" * 4000 + b"\n", b"1" * 5000):
            assert "one line of JSON" in (await asyncio.to_thread(told, line))["error"]
        silent = [socket.socket(socket.AF_UNIX) for _ in range(sockets.AT_ONCE + 3)]
        for sock in silent:
            sock.connect(path)
        found = await ask(directory)
        assert found is not None
        for sock in (*silent, found.sock):
            sock.close()


@apart
async def test_it_comes_back_when_somebody_removes_it(directory: Path) -> None:
    container()
    sockets.LOOK_S, sockets.AGAIN_S = 0.05, 0.05
    async with serving(directory):
        (directory / "agent/sockets").unlink()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if (directory / "agent/sockets").exists():
                break
        await asyncio.sleep(0.05)
        assert await ask(directory) is not None


def test_no_agent_is_told(tmp_path: Path) -> None:
    with pytest.raises(BulkheadError, match="start one: bulkhead agent FILE"):
        listening_socket(tmp_path)
