"""A worker process of the router: accepts clients, watches servers, tells its supervisor. Imports all others here."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from typing import Any, Final

from controller.problems import BulkheadError
from controller.security.hpke import Opener, Registry, RouterKeys
from controller.security.router.connection import Client, Done, described
from controller.security.router.figures import Figures
from controller.security.router.heads import Refusal
from controller.security.router.settings import Settings
from controller.security.router.shared import Shared
from controller.security.router.upstream import Unreachable, Upstream, Upstreams
from controller.security.tls import Reloading, Revocations, files

TICK_S: Final = 0.5
TELL_S: Final = 1.0
MESSAGE: Final = 1 << 18
_END: Final = "-----END CERTIFICATE-----"
_log: Final = logging.getLogger("bulkhead.router")


class Worker:
    """What the connections of one process share."""

    def __init__(
        self, settings: Settings, loop: asyncio.AbstractEventLoop, shared: Shared, control: socket.socket
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.shared = shared
        self.figures = Figures()
        self.draining = False
        self.linger_s = 1.0
        self._lingers_until = 0.0
        self.opener: Opener | None = None
        self._control = control
        self._clients: set[Client] = set()
        self._running = 0
        self._stopped = loop.create_future()
        self._servers: list[asyncio.Server] = []
        alpn = ("http/1.1",)
        self._tls = Reloading(
            settings.pki, settings.name, server=True, require_client=settings.client_certificates, alpn=alpn
        )
        over_tls = any(target.socket is None for target in settings.targets)
        self._upstream_tls = Reloading(settings.pki, settings.name, server=False, alpn=alpn) if over_tls else None
        self._revoked = Revocations(settings.pki)
        self._follows = over_tls or settings.client_certificates
        self.upstreams = Upstreams(
            [Upstream(each, loop, self._upstream_tls, self._upstream_told) for each in settings.targets]
        )
        self._shown: set[bytes] = set()
        self._shown_at = -1
        if settings.hpke is not None:
            keys = RouterKeys(settings.hpke)
            keys.ensure()
            self.opener = Opener(
                Registry(settings.hpke),
                keys,
                certificates=self._certificates,
                max_body=settings.limits.body_bytes,
                told=self._refused_told,
            )

    # - connections

    def entered(self, client: Client) -> bool:
        """A connection was made; whether there is room."""
        self.figures.add("connections")
        if len(self._clients) >= self.settings.limits.connections:
            self.figures.add("cut", "full")
            return False
        self._clients.add(client)
        return True

    def left(self, client: Client) -> None:
        """It has ended."""
        self._clients.discard(client)
        self._stop_if_left()

    def begin(self) -> None:
        """A request begins."""
        self._running += 1
        self.shared.running(self._running)

    def room(self) -> None:
        """Refuse it if there are too many."""
        most = self.settings.limits.concurrency
        if self._running > most or self.shared.total() > most:
            raise Refusal(503, "Too many requests are being answered; try again soon.", retry_after_s=1)

    def end(self, done: Done, seconds: float) -> None:
        """It has ended, one way or another."""
        self._running -= 1
        self.shared.running(self._running)
        figures = self.figures
        figures.add("requests", str(done.status or 499))
        figures.add("received_bytes", amount=done.received)
        figures.add("sent_bytes", amount=done.sent)
        figures.took(seconds)
        if self.settings.access:
            _log.info(
                "client %s status %d received %d sent %d took %.3f s server %s",
                *(done.client, done.status or 499, done.received, done.sent, seconds, done.server),
            )

    def health(self) -> tuple[int, bytes, bytes]:
        """The router's own health: status, content type, body."""
        well = sum(each.well for each in self.upstreams.servers)
        body = json.dumps({"status": "up" if well else "down"}).encode()
        return 200 if well else 503, b"application/json", body

    def config(self, binding: bytes) -> bytes:
        """What clients need for sealing."""
        assert self.opener is not None
        return json.dumps(self.opener.config(binding)).encode()

    def _certificates(self) -> set[bytes]:
        """The hashes of what clients of this process may have been shown."""
        if self._shown_at != self._tls.reloads:
            self._shown_at = self._tls.reloads
            path = files(self.settings.pki, self.settings.name).certificate
            with contextlib.suppress(OSError, ValueError):
                assert path is not None
                first = path.read_text().partition(_END)[0] + _END
                self._shown.add(hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).digest())
        return self._shown

    def defect(self, exc: BaseException) -> None:
        """Something that should not be."""
        self.figures.add("internal_errors")
        self._tell({"event": "internal_error", "text": f"The router has a defect: {described(exc)}."})

    # - telling

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full pipe loses figures, not requests
            self._control.send(json.dumps(message).encode())

    def _upstream_told(self, server: Upstream) -> None:
        self._tell({"upstream": server.target.name, "up": server.well, "why": server.why})

    def _refused_told(self, code: str, count: int) -> None:
        self._tell({"event": "client_refused", "code": code, "count": count})

    def snapshot(self) -> dict[str, Any]:
        """The figures as they are."""
        gauges = self.figures.gauges
        gauges["running", ""] = self._running
        gauges["open", ""] = len(self._clients)
        gauges["workers", ""] = 0 if self.draining else 1
        for each in self.upstreams.servers:
            gauges["upstream_up", each.target.name] = each.well
            gauges["upstream_running", each.target.name] = each.active
            self.figures.counts["upstream_failures", each.target.name] = each.failures
        reloads = self._tls.reloads + (self._upstream_tls.reloads if self._upstream_tls else 0)
        self.figures.counts["certificates_reloaded", ""] = reloads
        return self.figures.snapshot()

    # - life

    async def run(self, listening: list[socket.socket]) -> None:
        """Serve until told to stop."""
        await asyncio.gather(*(each.look() for each in self.upstreams.servers))
        self.loop.add_reader(self._control.fileno(), self._heard)
        self._servers = [
            await self.loop.create_server(
                lambda: Client(self),
                sock=each,
                ssl=self._tls.server,
                backlog=1024,
                ssl_handshake_timeout=self.settings.limits.header_s,
                ssl_shutdown_timeout=2.0,
            )
            for each in listening
        ]
        tasks = [self.loop.create_task(each) for each in (self._clock(), self._telling())]
        tasks += [self.loop.create_task(self._watch(each)) for each in self.upstreams.servers]
        self._tell({"ready": True})
        await self._stopped
        for task in tasks:
            task.cancel()
        for client in list(self._clients):
            client.cut("stopped")
        for server in self.upstreams.servers:
            server.close()
        await asyncio.sleep(0.05)
        self._tell({"figures": self.snapshot()})

    def _heard(self) -> None:
        try:
            data = self._control.recv(MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.loop.remove_reader(self._control.fileno())
            self.drain(0.0, 0.0)  # the supervisor is gone
            return
        message = json.loads(data)
        if "drain" in message:
            self.drain(message["drain"], message["linger"])
        if "look" in message:
            self._tls.look()
            if self._upstream_tls is not None:
                self._upstream_tls.look()

    def drain(self, seconds: float, linger_s: float) -> None:
        """Accept nobody any more; end after `seconds`, or when all have been answered."""
        self.linger_s = linger_s
        self._lingers_until = self.loop.time() + linger_s
        if not self.draining:
            self.draining = True
            for server in self._servers:
                server.close()
        for client in list(self._clients):
            client.drain()
        self.loop.call_later(linger_s, self._tick)
        self.loop.call_later(seconds, self._stop)

    def _stop_if_left(self) -> None:
        # Not before: there may be handshakes that are not over, and nothing tells of them.
        if self.draining and not self._clients and self.loop.time() >= self._lingers_until:
            self._stop()

    def _stop(self) -> None:
        if not self._stopped.done():
            self._stopped.set_result(None)

    def _tick(self) -> None:
        now = self.loop.time()
        for client in list(self._clients):
            client.tick(now)
        self._stop_if_left()

    async def _clock(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._tick()
            now = self.loop.time()
            for client in list(self._clients):
                if self.settings.client_certificates and client.tls is not None and self._revoked.peer(client.tls):
                    client.cut("revoked")
            for server in self.upstreams.servers:
                server.sweep(now, self._revoked if self._follows else None)

    async def _telling(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(TELL_S)
            self._tell({"figures": self.snapshot()})
            self._tls.look()
            why = self._tls.why or (self._upstream_tls.why if self._upstream_tls else "")
            if why != said:
                said = why
                self._tell({"tls": why})

    async def _watch(self, server: Upstream) -> None:
        while True:
            await asyncio.sleep(self.settings.health_s)
            try:
                await server.look()
            except Exception as exc:
                self.defect(exc)


def _on_loop_error(worker: Worker, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    exc = context.get("exception")
    if isinstance(exc, OSError | Unreachable):
        return
    worker.defect(exc if isinstance(exc, BaseException) else RuntimeError())


async def _main(settings: Settings, control: socket.socket, shared: Shared, listening: list[socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    worker = Worker(settings, loop, shared, control)
    loop.set_exception_handler(lambda loop, context: _on_loop_error(worker, loop, context))
    await worker.run(listening)


def main() -> None:
    """The process: `worker.py NUMBER CONTROL-FD TABLE-FD LISTEN-FD…`. What it is to do comes over the control socket."""
    import uvloop

    number, control_fd, shared_fd, *listen_fds = map(int, sys.argv[1:])
    for signal_number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)  # the supervisor tells
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request takes two files
    control = socket.socket(fileno=control_fd)
    try:
        settings = Settings.from_json(control.recv(MESSAGE).decode())
        level = logging.INFO if settings.access else logging.WARNING
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        control.setblocking(False)
        shared = Shared(shared_fd, number, settings.limits.per_client_per_s)
        listening = [socket.socket(fileno=fd) for fd in listen_fds]
        for each in listening:
            each.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main(settings, control, shared, listening))
        shared.running(0)
    except BulkheadError as exc:
        control.setblocking(True)
        control.send(json.dumps({"failed": str(exc)}).encode())
        sys.exit(2)
    os._exit(0)  # nothing is left that an interpreter's end would have to put in order


if __name__ == "__main__":
    main()
