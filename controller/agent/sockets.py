"""Gives the API, which has no rights of its own, a listening socket inside the network namespace of its container.

A unix socket in the run directory: whoever runs with the API's identity (or root's) asks in one line of JSON and is
answered in one, with the listening TCP socket attached (unix(7), SCM_RIGHTS). It listens on the container's own address,
and nothing else can be asked for. The asking half is `controller.api_socket`. Imports identity, netns, resource and run.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from controller import unixsocket
from controller.agent.identity import Identity
from controller.agent.netns import in_namespace
from controller.agent.resource import Failed
from controller.agent.run import NETNS_DIR, PREFIX
from controller.api_socket import MAX_LINE, SOCKETS
from controller.hostmodel import Api
from controller.problems import BulkheadError

LOG = logging.getLogger("bulkhead.agent")
ASK_S = 2.0
LOOK_S = 2.0
AGAIN_S = 1.0
AT_ONCE = 8
"""So many are answered at the same time; the others wait in the backlog."""
BACKLOG = 128
_IP_FREEBIND = 15
_PEER = struct.Struct("3i")


class Sockets:
    """Serves one run directory. `api` answers what the state file says of the API now; `asker` is who is given sockets,
    beside root; `trouble` hears why nobody can ask, where that is so."""

    def __init__(
        self,
        run_dir: Path,
        api: Callable[[], Api],
        asker: Identity | None = None,
        trouble: Callable[[str, str], None] = lambda _key, _why: None,
    ) -> None:
        self.path = run_dir / SOCKETS
        self._api = api
        self._asker = asker
        self._trouble = trouble

    async def run(self) -> None:
        """Until cancelled. A socket that somebody takes away is made again."""
        while True:
            try:
                with self._listening() as server:
                    await self._serve_all(server)
            except (BulkheadError, OSError) as exc:
                self._trouble("sockets", f"nobody can ask for the API's socket: {exc}")
            await asyncio.sleep(AGAIN_S)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        with unixsocket.bind(self.path) as server:
            try:
                server.setblocking(False)
                if self._asker is not None:
                    os.chown(self.path, 0, self._asker.gid)
                    self.path.chmod(0o660)
                yield server
            finally:
                self.path.unlink(missing_ok=True)

    async def _serve_all(self, server: socket.socket) -> None:
        """Until its path is somebody else's, or cancelled."""
        loop, ours = asyncio.get_running_loop(), self.path.stat().st_ino
        jobs: set[asyncio.Task[None]] = set()
        turns = asyncio.Semaphore(AT_ONCE)
        accepting: asyncio.Task[Any] | None = None
        try:
            while True:
                await turns.acquire()
                # One and the same goes on: an accept that is cancelled too late has lost who asked.
                accepting = accepting or loop.create_task(loop.sock_accept(server))
                if not (await asyncio.wait({accepting}, timeout=LOOK_S))[0]:
                    turns.release()
                    if not self.path.exists() or self.path.stat().st_ino != ours:
                        return
                    continue
                asking, _ = accepting.result()
                accepting = None
                job = asyncio.ensure_future(self._serve(asking))
                jobs.add(job)
                job.add_done_callback(jobs.discard)
                job.add_done_callback(lambda _: turns.release())
        finally:
            for job in (*jobs, *([accepting] if accepting is not None else [])):
                job.cancel()

    async def _serve(self, asking: socket.socket) -> None:
        with asking:
            asking.setblocking(False)
            made: socket.socket | None = None
            try:
                answer, made = await self._answer(asking)
            except Failed as exc:
                answer = {"error": str(exc)}
            except (ValueError, RecursionError):
                answer = {"error": 'a question is one line of JSON: {"want": "api", "have": ""}'}
            except (OSError, TimeoutError):
                return
            except Exception as exc:
                LOG.exception("a question for a socket was not answered")
                answer = {"error": f"a defect of the agent was caught: {type(exc).__name__}: {exc}"}
            try:
                # Some hundred bytes always fit into an empty buffer.
                text = json.dumps(answer).encode() + b"\n"
                socket.send_fds(asking, [text], [made.fileno()] if made is not None else [])
            except OSError as exc:
                LOG.info("the asker went away: %s", exc)
            finally:
                if made is not None:
                    made.close()  # the API's alone from here on: it ends with the API

    async def _answer(self, asking: socket.socket) -> tuple[dict[str, Any], socket.socket | None]:
        line = await asyncio.wait_for(_line(asking), ASK_S)  # before it is refused: or it would not hear why
        _pid, uid, gid = _PEER.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != 0 and (self._asker is None or uid != self._asker.uid):
            raise Failed(f"user {uid} (group {gid}) gets no socket; run the API as the user that --api-user names")
        question = json.loads(line)
        if not isinstance(question, dict) or question.get("want") != "api":
            raise ValueError
        return await asyncio.to_thread(self._make, str(question.get("have", "")))

    def _make(self, have: str) -> tuple[dict[str, Any], socket.socket | None]:
        api = self._api()
        if api.container_id is None or api.address is None:
            raise Failed("the state file gives the API no container; name one under api.container, or leave it so")
        namespace = NETNS_DIR / f"{PREFIX}{api.container_id}"
        try:
            # A namespace that is there no more keeps its number as long as the API has a socket in it.
            token = f"{namespace.stat().st_ino}/{api.address}:{api.port}"
        except OSError:
            raise Failed(f"container {api.container_id} is not there yet; see why: bulkhead status") from None
        if token == have:
            return {"unchanged": True}, None
        try:
            made = in_namespace(namespace, lambda: _listen(str(api.address), api.port))
        except OSError as exc:
            what = f"port {api.port} of container {api.container_id}"
            if exc.errno == errno.EADDRINUSE:
                raise Failed(
                    f"{what} is taken by a program of the container, or by an API that still runs; stop that, or choose "
                    "another port under api.port"
                ) from exc
            raise Failed(f"{what} cannot be listened on: {exc.strerror}; see: bulkhead status") from exc
        return {"namespace": token, "address": str(api.address), "port": api.port}, made


async def _line(asking: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n") and len(line) <= MAX_LINE:
        more = await loop.sock_recv(asking, MAX_LINE)
        if not more:
            break
        line += more
    return line


def _listen(address: str, port: int) -> socket.socket:
    """A socket that may be there before its address is."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except BaseException:
        with contextlib.suppress(OSError):
            sock.close()
        raise
    return sock
