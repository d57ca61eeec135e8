"""The running agent: reads the state file, builds, watches, heals, tells. One per run directory.

It ends on SIGTERM and leaves everything as it is; whoever wants it gone calls `controller.agent.teardown`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from controller.agent.build import Parts, build, health
from controller.agent.files import write_atomically
from controller.agent.gate import Controller
from controller.agent.health import Health
from controller.agent.lxc import Lxc
from controller.agent.netlink import Nets
from controller.agent.ovs import Ovsdb, choose_datapath
from controller.agent.process import Programs
from controller.agent.reconciler import Done, Faults, Phase, Reconciler
from controller.agent.resource import Failed
from controller.agent.settings import Settings
from controller.agent.teardown import leftovers
from controller.agent.telling import Limiter
from controller.agent.vpn import Clients
from controller.eventlog import EventLog
from controller.events import Event, Kind
from controller.problems import BulkheadError, InvalidInput
from controller.statefile import Loaded, load

LOG = logging.getLogger("bulkhead.agent")
RELOAD_S = 0.25
AGAIN_S = 1.0
LOCK, UP_LOCK, STATUS = "agent.lock", "up.lock", "status.json"


class Agent:
    """Use `run`."""

    def __init__(self, settings: Settings, loaded: Loaded, log: EventLog) -> None:
        self._settings = settings
        self._loaded = loaded
        self._wanted: Loaded | None = None
        self._log = log
        self._started = time.monotonic()
        self._ready = False
        self._limiter = Limiter()
        self.reconciler = Reconciler(self._step, self._trouble, Faults.from_environment())
        self.nets = Nets(self.reconciler.changed)
        self.ovsdb = Ovsdb(settings.ovsdb, self.reconciler.ovsdb_changed)
        self.controller = Controller(settings.run_dir)
        self.programs = Programs(settings.own_dir / "programs")
        self.lxc = Lxc(settings.state_dir / "lxc", settings.own_dir / "lxc")
        self._clients: Clients | None = None
        self._probes: list[asyncio.Future[None]] = []
        self.stop = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        reload = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        text = f"the agent builds {self._settings.state_file}, state {self._loaded.state.digest}"
        self._tell(Kind.AGENT_STARTED, text)
        await self.nets.get(None)  # from here on nothing that happens in the host's namespace is missed
        await self._want()
        tasks: list[asyncio.Future[None]] = [
            asyncio.ensure_future(job)
            for job in (self.reconciler.run(self.stop), self._follow_file(reload), self._publish())
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        self.stop.set()
        tasks = [*tasks, *self._probes]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                LOG.error("a defect of the agent was caught", exc_info=result)
                self._tell(Kind.INTERNAL_ERROR, f"a defect of the agent was caught: {type(result).__name__}: {result}")
        self._tell(Kind.AGENT_STOPPED, "the agent stops; everything it has built stays")
        self.nets.close()
        await asyncio.to_thread(self.ovsdb.close)

    async def _want(self) -> None:
        """Make the reconciler want what the state file says, as soon as Open vSwitch answers."""
        told = ""
        while not self.stop.is_set():
            try:
                datapath = await choose_datapath(self._loaded.host.datapath, self.ovsdb)
                break
            except BulkheadError as exc:
                if str(exc) != told:
                    told = str(exc)
                    self._trouble("ovsdb", told)
                await asyncio.sleep(0.5)
        else:
            return
        parts = Parts(self._settings, self.nets, self.ovsdb, self.controller, self.programs, self.lxc, datapath)
        resources = build(self._loaded.state, self._loaded.host, parts)
        self.reconciler.want([*await leftovers(parts, resources), *resources])
        self._wanted = self._loaded
        self._clients = parts.clients
        for task in self._probes:
            task.cancel()
        watched = health(self._loaded.state, self._loaded.host, parts)
        self._probes = [asyncio.ensure_future(Health(one, self.controller, self._tunnel).run()) for one in watched]

    # ------------------------------------------------------------------------------------------------- the state file

    async def _follow_file(self, reload: asyncio.Event) -> None:
        follower = self._follower(reload)
        while not self.stop.is_set():
            await asyncio.sleep(RELOAD_S)
            try:
                await follower()
            except Exception as exc:  # what is there must go on being healed
                why = str(exc) if isinstance(exc, BulkheadError) else f"{type(exc).__name__}: {exc}"
                self._trouble("state", f"what {self._settings.state_file} says is not taken up yet: {why}")
                await asyncio.sleep(AGAIN_S)

    def _follower(self, reload: asyncio.Event) -> Callable[[], Awaitable[None]]:
        path = self._settings.state_file
        seen = before = _stamp(path)
        secrets, clients = self._secrets(), self._clients.stamp if self._clients is not None else ()

        async def look() -> None:
            nonlocal seen, before, secrets, clients
            self.programs.bound_logs()
            if self._clients is not None and clients != (now_clients := self._clients.stamp):
                clients = now_clients
                self.reconciler.touch("wireguard/")
            now_secrets = self._secrets()
            if secrets != now_secrets or self._wanted is not self._loaded:
                await self._want()
                secrets = now_secrets
            now, last = _stamp(path), before
            before = now
            # A file that is still being written is read once it has stopped changing.
            if reload.is_set() or last == now != seen:
                seen = now
                reload.clear()
                await self._reload(path)

        return look

    def _secrets(self) -> list[tuple[int, int, int] | None]:
        """Stamps of the files that the state file names: another configuration means other addresses and rules."""
        tunnels = [leg.tunnel for leg in self._loaded.host.legs]
        if self._loaded.host.vpn is not None:
            tunnels.append(self._loaded.host.vpn.tunnel)
        return [_stamp(path) for tunnel in tunnels for path in (tunnel.config, tunnel.private_key_file) if path]

    async def _reload(self, path: Path) -> None:
        try:
            loaded = await asyncio.to_thread(load, path)
        except InvalidInput as exc:
            first = next(iter(exc.problems), None)
            self._tell(Kind.STATE_REJECTED, f"{path} was refused, the host stays as it was: {first}")
            return
        if (loaded.state, loaded.host) == (self._loaded.state, self._loaded.host):
            return
        if self._loaded.state.networks and not loaded.state.networks:
            text = f"{path} was refused: it declares no network. To take everything away: bulkhead down FILE"
            self._tell(Kind.STATE_REJECTED, text)
            return
        self._loaded, self._ready = loaded, False
        self._tell(Kind.STATE_APPLIED, f"the host is made what {path} says, state {loaded.state.digest}")
        await self._want()

    # ------------------------------------------------------------------------------------------------------ telling

    def _step(self, done: Done) -> None:
        kind = Kind.HOST_HEALED if done.again else Kind.HOST_CHANGED
        verb = "healed" if done.again else "done"
        self._tell(kind, f"{verb}: {done.change}", done.key)

    def _tunnel(self, network: str, up: bool, why: str) -> None:
        if up:
            self._tell(Kind.TUNNEL_UP, f"the tunnel of {network} carries traffic", network=network)
        else:
            self._tell(Kind.TUNNEL_DOWN, f"the tunnel of {network} carries no traffic: {why}", network=network)

    def _trouble(self, key: str, why: str) -> None:
        self._tell(Kind.HOST_ERROR, f"{key}: {why}", key)

    def _tell(self, kind: Kind, text: str, key: str | None = None, network: str | None = None) -> None:
        # What the file asks for is as much as the file asks for; what somebody damages may have no end.
        if key is not None and kind is not Kind.HOST_CHANGED and not self._limiter.admit(key, time.monotonic()):
            return
        LOG.info("%s: %s", kind, text)
        try:
            self._log.append(Event(kind, text, object=key, network=network))
        except Exception as exc:  # a full disk must not keep the host from being healed
            LOG.error("an event was not written: %s", exc)

    async def _publish(self) -> None:
        """Write down how everything is, for `bulkhead status`, whenever that has changed."""
        path = self._settings.own_dir / STATUS
        before = None
        while not self.stop.is_set():
            if self.reconciler.settled and not self._ready and self.reconciler.status:
                self._ready = True
                took = time.monotonic() - self._started
                self._tell(Kind.HOST_READY, f"the host is as {self._settings.state_file} says ({took:.1f} s)")
            now = self.describe()
            if now != before:
                before = now
                with contextlib.suppress(BulkheadError):
                    write_atomically(path, json.dumps(now, indent=1), 0o644)
            for key, count in self._limiter.withheld(time.monotonic()).items():
                text = f"{key}: {count} more events of its kind were not recorded; what changes it again and again?"
                self._tell(Kind.HOST_ERROR, text)
            self._log.tick()
            await asyncio.sleep(0.05)

    def describe(self) -> dict[str, Any]:
        """Everything `bulkhead status` shows of the host."""
        return {
            "pid": os.getpid(),
            "state": self._loaded.state.digest,
            "state_file": str(self._settings.state_file),
            "settled": bool(self.reconciler.status) and self.reconciler.settled,
            "resources": [
                {"key": key, "phase": str(status.phase), "why": status.why, "healed": status.healed}
                | ({"retry_in_s": round(status.pause_s, 2)} if status.phase is not Phase.DONE else {})
                for key, status in self.reconciler.status.items()
            ],
        }


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@contextlib.contextmanager
def only_one(settings: Settings, lock: str = LOCK) -> Iterator[None]:
    """Hold a lock of the run directory. Raises `Failed` naming the process that holds it."""
    path = settings.own_dir / lock
    try:
        settings.own_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise Failed(f"{path} cannot be made: {exc.strerror}; mend it, or use another --run-dir") from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(descriptor, 32, 0).decode().strip() or "?"
            raise Failed(
                f"an agent runs already for {settings.run_dir} (process {holder}); stop that one, or use another --run-dir"
            ) from exc
        # Always as long, so that a full disk does not matter the next time.
        try:
            os.pwrite(descriptor, f"{os.getpid():<10}\n".encode(), 0)
        except OSError as exc:
            raise Failed(f"{path} cannot be written: {exc.strerror}; make room there") from exc
        yield
    finally:
        os.close(descriptor)


def holder(settings: Settings, lock: str = LOCK) -> int | None:
    """The process that holds a lock of the run directory."""
    path = settings.own_dir / lock
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode().strip()
        return int(text) if text.isdecimal() else None
    finally:
        os.close(descriptor)


def require_root() -> None:
    """Raises `Failed` for anybody else."""
    if os.geteuid() != 0:
        raise Failed("the agent makes bridges, namespaces and tunnels, which only root may; run it with sudo")


def serve(settings: Settings) -> None:
    """Run the agent until it is told to end. Raises `BulkheadError`."""
    require_root()
    loaded = load(settings.state_file)
    with only_one(settings):
        try:
            settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise Failed(
                f"{settings.state_dir} cannot be made: {exc.strerror}; mend it, or use another --state-dir"
            ) from exc
        os.umask(0o022)
        with EventLog(settings.events_dir) as log:
            asyncio.run(Agent(settings, loaded, log).run())
