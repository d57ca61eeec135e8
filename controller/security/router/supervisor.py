"""The router's first process: listening sockets, workers, events, figures. Imports settings, shared, figures, eventlog.

The listening sockets are made once and handed to each worker, so that no connection is lost when a worker is replaced:
what waits in the queue of a socket waits for the next worker. Each of several workers has a socket of its own
(SO_REUSEPORT). Workers end when their end of the control socket does, so none outlives this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

from controller.eventfiles import EventLogError
from controller.eventlog import EventLog
from controller.events import Event, Kind
from controller.problems import BulkheadError
from controller.security.hpke import Registry
from controller.security.router import shared
from controller.security.router.figures import merged, text
from controller.security.router.settings import Settings
from controller.unixsocket import bind

READY_S: Final = 30.0
AGAIN_S: Final = 1.0
LINGER_S: Final = 5.0
"""At a reload an idle connection is kept for so long: its next request is answered, and told that it is the last."""
_STOP_LINGER_S: Final = 0.2
MESSAGE: Final = 1 << 18
_log: Final = logging.getLogger("bulkhead.router")


class _Worker:
    """A worker process as its supervisor sees it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.number = number
        self.process = process
        self.control = control
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.figures: dict[str, Any] | None = None
        self.draining = False
        self.up: dict[str, bool] = {}

    def say(self, message: dict[str, Any]) -> None:
        """Tell it something."""
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(message).encode())


class Supervisor:
    """Keeps a router running. `read` gives what it is told, anew at each SIGHUP."""

    def __init__(self, read: Callable[[], Settings]) -> None:
        self._read = read
        self.settings = read()
        self._workers: dict[int, _Worker] = {}
        self._old: set[_Worker] = set()
        self._listening: list[list[socket.socket]] = []
        self._table = -1
        self._events: EventLog | None = None
        self._past: list[dict[str, Any]] = []
        self._up: dict[str, bool] = {}
        self._stopping = False
        self._stop = asyncio.Event()
        self._busy = asyncio.Lock()
        self._registry = Registry(self.settings.hpke) if self.settings.hpke is not None else None

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Until SIGTERM. Raises `BulkheadError` where it cannot begin."""
        loop = asyncio.get_running_loop()
        self._open_events()
        tasks: list[asyncio.Task[None]] = []
        metrics: asyncio.Server | None = None
        try:
            self._listening = [self._listen() for _ in range(self.settings.workers)]
            self._table = shared.new()
            if self.settings.metrics is not None:
                metrics = await asyncio.start_unix_server(self._serve_figures, sock=bind(self.settings.metrics))
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            loop.add_signal_handler(signal.SIGHUP, lambda: tasks.append(loop.create_task(self._reload())))
            await self._begin()
            tasks.append(loop.create_task(self._clock()))
            ready()
            _notify("READY=1")
            await self._stop.wait()
            _notify("STOPPING=1")
            await self._end()
        finally:
            self._stopping = True
            for task in tasks:
                task.cancel()
            for worker in [*self._workers.values(), *self._old]:
                worker.process.kill()
                worker.process.wait()
            for group in self._listening:
                for each in group:
                    each.close()
            if metrics is not None and self.settings.metrics is not None:
                metrics.close()
                self.settings.metrics.unlink(missing_ok=True)
            if self._events is not None:
                self._events.close()

    # - workers

    def _listen(self) -> list[socket.socket]:
        out = []
        for host in self.settings.hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            made = socket.socket(family, socket.SOCK_STREAM)
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if self.settings.workers > 1:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.bind((host, self.settings.port))
                made.listen(1024)
            except OSError as exc:
                made.close()
                raise BulkheadError(
                    f"cannot listen on {host} port {self.settings.port}: {exc.strerror}; stop whoever listens there, "
                    "or name another address or port"
                ) from exc
            out.append(made)
        return out

    def _spawn(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE)
        listening = [each.fileno() for each in self._listening[number]]
        fds = [theirs.fileno(), self._table, *listening]
        code = "from controller.security.router.worker import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(number), *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL
        )
        theirs.close()
        ours.setblocking(False)
        worker = _Worker(number, process, ours)
        ours.send(self.settings.to_json().encode())
        asyncio.get_running_loop().add_reader(ours.fileno(), self._heard, worker)
        return worker

    async def _generation(self) -> list[_Worker]:
        """New workers, all of them ready. Raises `BulkheadError` if one is not."""
        made = [self._spawn(number) for number in range(self.settings.workers)]
        try:
            await asyncio.wait_for(asyncio.gather(*(each.ready for each in made)), READY_S)
        except TimeoutError:
            self._discard(made)
            raise BulkheadError(
                f"the router's workers were not ready in {READY_S:g} s; is the machine overloaded?"
            ) from None
        except BulkheadError:
            self._discard(made)
            raise
        return made

    def _discard(self, workers: list[_Worker]) -> None:
        self._old.update(workers)
        for each in workers:
            each.draining = True
            each.process.kill()

    async def _begin(self) -> None:
        for each in await self._generation():
            self._workers[each.number] = each

    async def _end(self) -> None:
        self._stopping = True
        for group in self._listening:
            for each in group:
                each.close()  # whoever comes now is refused, and need not wait
        for worker in [*self._workers.values(), *self._old]:
            self._drain(worker, _STOP_LINGER_S)
        everybody = [each.gone for each in [*self._workers.values(), *self._old]]
        if everybody:
            await asyncio.wait(everybody, timeout=self.settings.drain_s + 2)

    def _drain(self, worker: _Worker, linger_s: float) -> None:
        worker.draining = True
        worker.say({"drain": self.settings.drain_s, "linger": linger_s})

    async def _reload(self) -> None:
        """Take up what was changed. What cannot be used changes nothing."""
        async with self._busy:
            before = self.settings
            try:
                wanted = self._read()
                fixed = [(each.hosts, each.port, each.workers, each.metrics) for each in (before, wanted)]
                if fixed[0] != fixed[1]:
                    raise BulkheadError("addresses, port, workers and the socket of figures take a restart")
                if wanted == before:
                    for worker in self._workers.values():
                        worker.say({"look": True})
                    return
                self.settings = wanted
                fresh = await self._generation()
            except BulkheadError as exc:
                self.settings = before
                _log.error("not reloaded: %s", exc)
                self._tell(Kind.STATE_REJECTED, f"The router goes on as before: {exc}")
                return
            if self._stopping:
                self._discard(fresh)
                return
            old = list(self._workers.values())
            self._workers = {each.number: each for each in fresh}
            self._registry = Registry(wanted.hpke) if wanted.hpke is not None else None
            for worker in old:
                self._old.add(worker)
                # Answers that have begun may take as long as answers may.
                worker.draining = True
                worker.say({"drain": wanted.limits.request_s, "linger": LINGER_S})
            self._tell(Kind.STATE_APPLIED, "The router was given new settings.")

    def _heard(self, worker: _Worker) -> None:
        try:
            data = worker.control.recv(MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone(worker)
            return
        message = json.loads(data)
        if "ready" in message:
            if not worker.ready.done():
                worker.ready.set_result(None)
        elif "failed" in message:
            if not worker.ready.done():
                worker.ready.set_exception(BulkheadError(message["failed"]))
        elif "figures" in message:
            worker.figures = message["figures"]
        elif "upstream" in message:
            worker.up[message["upstream"]] = message["up"]
            self._upstream(message["upstream"], message["up"], message["why"])
        elif "tls" in message:
            self._told_tls(message["tls"])
        elif message.get("event") == "client_refused":
            count, code = message["count"], message["code"]
            text = f"{count} sealed request(s) were refused: {code}."
            self._tell(Kind.CLIENT_REFUSED, text, data={"code": code, "count": count})
        elif message.get("event") == "internal_error":
            self._tell(Kind.INTERNAL_ERROR, message["text"])

    def _gone(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(worker.control.fileno())
        worker.control.close()
        if not worker.draining:
            worker.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(2)
        if worker.figures is not None:
            self._keep(worker.figures)
            worker.figures = None
        self._old.discard(worker)
        if not worker.gone.done():
            worker.gone.set_result(None)
        if not worker.ready.done():
            worker.ready.set_exception(
                BulkheadError("a worker of the router ended before it was ready; see its messages")
            )
            worker.ready.exception()
        elif not worker.draining and not self._stopping:
            self._tell(Kind.SERVICE_DOWN, f"Worker {worker.number} of the router has ended; it is started again.")
            loop.call_later(AGAIN_S, self._again, worker)

    def _again(self, worker: _Worker) -> None:
        if self._stopping or self._workers.get(worker.number) is not worker:
            return
        fresh = self._spawn(worker.number)
        self._workers[worker.number] = fresh
        fresh.ready.add_done_callback(lambda done: self._came_back(fresh, done))

    def _came_back(self, worker: _Worker, done: asyncio.Future[None]) -> None:
        if done.cancelled() or self._stopping:
            return
        if done.exception() is None:
            self._tell(Kind.SERVICE_UP, f"Worker {worker.number} of the router answers again.")
            return
        if not worker.draining:
            asyncio.get_running_loop().call_later(AGAIN_S, self._again, worker)

    def _keep(self, figures: dict[str, Any]) -> None:
        """Counts outlive their worker; what was so at the time does not."""
        self._past = [merged([*self._past, figures | {"gauges": []}])]

    # - telling

    def _open_events(self) -> None:
        if self.settings.events is None:
            return
        try:
            self._events = EventLog(self.settings.events)
        except EventLogError as exc:
            _log.warning("events are not kept: %s", exc)

    def _tell(self, kind: Kind, what: str, *, subject: str | None = None, data: dict[str, Any] | None = None) -> None:
        _log.info("%s", what)
        if self._events is not None:
            self._events.append(Event(kind, what, app="router", object=subject, data=data or {}))

    def _upstream(self, name: str, up: bool, why: str) -> None:
        """Tell it once, not once for each worker."""
        everybody = all(each.up.get(name, True) for each in self._workers.values()) and up
        if self._up.get(name) == everybody:
            return
        self._up[name] = everybody
        if everybody:
            self._tell(Kind.UPSTREAM_UP, f"The server {name} is well; it is asked.", subject=name)
        else:
            self._tell(Kind.UPSTREAM_DOWN, f"The server {name} is not asked any more: {why}.", subject=name)

    def _told_tls(self, why: str) -> None:
        if why:
            _log.error("changed certificates are not used: %s", why)
            self._tell(Kind.STATE_REJECTED, f"Changed certificates are not used, the ones before are: {why}")

    async def _clock(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._events is not None:
                self._events.tick()
            if self._registry is None:
                continue
            try:
                changed = self._registry.changes()
            except (BulkheadError, OSError):
                continue  # the workers refuse whom they cannot look up
            for client in changed:
                kind = Kind.CLIENT_REGISTERED if client.active else Kind.CLIENT_REVOKED
                did = "registered" if client.active else "revoked"
                self._tell(kind, f"client {client.name} is {did}", subject=client.name, data={"id": client.id})

    def figures(self) -> dict[str, Any]:
        """The sum of what all workers have counted."""
        now = [each.figures for each in self._workers.values() if each.figures is not None]
        old = [each.figures | {"gauges": []} for each in self._old if each.figures is not None]
        return merged([*self._past, *old, *now])

    async def _serve_figures(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
                good = head.startswith((b"GET /metrics ", b"GET / "))
                body = text(self.figures()).encode() if good else b"ask for /metrics\n"
                status = b"200 OK" if good else b"404 Not Found"
                kind = b"text/plain; version=0.0.4"
                writer.write(
                    b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                    % (status, kind, len(body), body)
                )
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()


def _notify(state: str) -> None:
    """Tell systemd, where it asks for that."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.sendto(state.encode(), address)


def supervise(read: Callable[[], Settings], ready: Callable[[], None] = lambda: None) -> None:
    """Run a router until SIGTERM. Raises `BulkheadError`."""

    async def running() -> None:
        await Supervisor(read).run(ready)

    asyncio.run(running())
