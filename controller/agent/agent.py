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
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from controller.agent.build import Made, Parts, build, health, namespace_of
from controller.agent.checks import UP, Checks
from controller.agent.files import write_atomically
from controller.agent.gate import Controller
from controller.agent.health import Health
from controller.agent.identity import identity
from controller.agent.lxc import Lxc
from controller.agent.netlink import Nets
from controller.agent.ovs import Ovsdb, choose_datapath
from controller.agent.process import Programs
from controller.agent.reconciler import UNSEEN, Done, Faults, Phase, Reconciler
from controller.agent.resource import Failed
from controller.agent.settings import Settings
from controller.agent.sockets import Sockets
from controller.agent.teardown import leftovers
from controller.agent.telling import Limiter
from controller.agent.vpn import Clients
from controller.desired import Desired, Stamp, stamp
from controller.eventlog import EventLog
from controller.events import Event, Kind
from controller.grants import openings
from controller.problems import BulkheadError, InvalidInput
from controller.records import ClientRecord, Records
from controller.records import key as key_of
from controller.statefile import Loaded
from controller.store import Store, Tls

LOG = logging.getLogger("bulkhead.agent")
RELOAD_S = 0.25
AGAIN_S = 1.0
STATUS_S = 0.2
"""While much is changing, how it is is written down so often."""
_CONTAINER = re.compile(r"leftover/(?:namespace/bulkhead-|link/veth|process/container-|lxc/)([0-9]+)")
LOCK, UP_LOCK, STATUS = "agent.lock", "up.lock", "status.json"


class Agent:
    """Use `run`."""

    def __init__(self, settings: Settings, desired: Desired, log: EventLog, store: Store | None = None) -> None:
        self._settings = settings
        self._desired = desired
        self._loaded = desired.loaded
        self._wanted: Loaded | None = None
        self._store = store
        self._revision = 0
        self._made = Made()
        self._owned: dict[str, tuple[str, ...]] = {}
        self._news = asyncio.Event()
        self._look_at = 0.0
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
        self._health: Mapping[str, str] = {}
        self._clients_seen: tuple[object, ...] = ()
        self._client_keys: frozenset[str] = frozenset()
        self._grant_keys: frozenset[str] | None = None
        self._checks = Checks(lambda: self._loaded.host.checks, self._healthy)
        asker = identity(settings.api_user)
        self._sockets = Sockets(settings.run_dir, lambda: self._loaded.host.api, asker, self._trouble)
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
        await self._first_records(loop)
        await self._want()
        tasks: list[asyncio.Future[None]] = [
            asyncio.ensure_future(job)
            for job in (
                self.reconciler.run(self.stop),
                self._follow_file(reload),
                self._publish(),
                self._checks.run(),
                self._sockets.run(),
            )
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
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    async def _first_records(self, loop: asyncio.AbstractEventLoop) -> None:
        """What the store holds, before anything is done: without it, what was created would be taken for given up."""
        if self._store is None:
            return
        self._store.subscribe(lambda _records: _wake(loop, self._news))
        while not self.stop.is_set():
            try:
                records = await asyncio.to_thread(self._store.start)
                break
            except BulkheadError as exc:
                self._trouble("store", f"{exc}. The host stays as it is until the store answers")
                await asyncio.sleep(AGAIN_S)
        else:
            return
        if await asyncio.to_thread(self._hand_over_clients, records):
            records = self._store.records
        self._desired.look(records, time.time())
        self._loaded = self._desired.loaded

    def _hand_over_clients(self, records: Records) -> bool:
        """Put VPN clients that are in files, from before there was a store, into it: one place gives out addresses.

        Whether there were any. One that clashes with another stays a file.
        """
        if self._store is None or self._loaded.host.vpn is None:
            return False
        files = Clients(self._settings.state_dir / "vpn")
        there = {key_of(one) for one in records.clients}
        found = files.as_records(self._settings.node)
        for record in found:
            try:
                if key_of(record) not in there:
                    self._store.change(lambda change, record=record: change.put(record))  # type: ignore[misc]
                files.forget(record.name)
            except BulkheadError as exc:
                self._trouble(f"client/{record.name}", f"it stays a file, and is not in the store: {exc}")
        return bool(found)

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
        parts = Parts(
            self._settings,
            self.nets,
            self.ovsdb,
            self.controller,
            self.programs,
            self.lxc,
            datapath,
            self._made,
            self._client_records,
        )
        loaded, revision = self._loaded, self._desired.records.revision
        built = build(loaded.state, loaded.host, parts)
        self.reconciler.want([*await leftovers(parts, built.resources), *built.resources])
        self._owned, self._revision = built.owned, revision
        self._wanted = loaded
        self._clients = parts.clients
        for task in self._probes:
            task.cancel()
        watched = health(self._loaded.state, self._loaded.host, parts)
        self._probes = [asyncio.ensure_future(Health(one, self.controller, self._tunnel).run()) for one in watched]

    # ------------------------------------------------------------------------------------------------- the state file

    async def _follow_file(self, reload: asyncio.Event) -> None:
        follower = self._follower(reload)
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), RELOAD_S)
            self._news.clear()
            try:
                await follower()
            except Exception as exc:  # what is there must go on being healed
                why = str(exc) if isinstance(exc, BulkheadError) else f"{type(exc).__name__}: {exc}"
                self._trouble("state", f"what {self._settings.state_file} says is not taken up yet: {why}")
                await asyncio.sleep(AGAIN_S)

    def _follower(self, reload: asyncio.Event) -> Callable[[], Awaitable[None]]:
        secrets = self._secrets()

        async def look() -> None:
            nonlocal secrets
            self.programs.bound_logs()
            self._look_at_clients()
            now_secrets = self._secrets()
            if secrets != now_secrets or self._wanted is not self._loaded:
                if secrets != now_secrets:
                    self._made.forget()
                await self._want()
                secrets = now_secrets
            await self._reload(reload)

        return look

    def _client_records(self) -> tuple[ClientRecord, ...]:
        return tuple(one for one in self._desired.records.clients if one.node == self._settings.node)

    def _look_at_clients(self) -> None:
        """Have the VPN's server know its clients as they are now, if they are others than before."""
        if self._clients is not None and self._clients_seen != (now := self._clients.stamp):
            self._clients_seen = now
            self.reconciler.touch("wireguard/")

    def _secrets(self) -> list[Stamp | None]:
        """Stamps of the files that the state file names: another configuration means other addresses and rules."""
        tunnels = [leg.tunnel for leg in self._loaded.host.legs]
        if self._loaded.host.vpn is not None:
            tunnels.append(self._loaded.host.vpn.tunnel)
        return [stamp(path) for tunnel in tunnels for path in (tunnel.config, tunnel.private_key_file) if path]

    async def _reload(self, reload: asyncio.Event) -> None:
        records = self._store.records if self._store is not None else None
        again = reload.is_set()
        reload.clear()
        new = records is not None and records.revision != self._desired.records.revision
        if not new and not self._desired.due(time.time()):
            if time.monotonic() < self._look_at and not again:
                return
            self._look_at = time.monotonic() + RELOAD_S
        try:
            if not await asyncio.to_thread(partial(self._desired.look, records, time.time(), again=again)):
                return
        except InvalidInput as exc:
            first = next(iter(exc.problems), None)
            self._tell(
                Kind.STATE_REJECTED, f"{self._settings.state_file} was refused, the host stays as it was: {first}"
            )
            return
        before, self._loaded = self._loaded, self._desired.loaded
        self._look_at_clients()  # before anybody is told that they are taken up
        if (before.state, before.host) == (self._loaded.state, self._loaded.host):
            self._wanted, self._revision = self._loaded, self._desired.records.revision
            self.reconciler.changes += 1
            return
        if before.stored == self._loaded.stored:
            self._ready = False
            text = f"the host is made what {self._settings.state_file} says, state {self._loaded.state.digest}"
            self._tell(Kind.STATE_APPLIED, text)
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

    def _healthy(self, health: Mapping[str, str]) -> None:
        """Services answer, or do not, otherwise than before."""
        for name, found in health.items():
            before = self._health.get(name, "")
            if found.startswith(UP) != before.startswith(UP) or not before:
                kind = Kind.SERVICE_UP if found == UP else Kind.SERVICE_DOWN
                self._tell(kind, f"service {name} is {found}", f"service/{name}")
        self._health = health
        self.reconciler.changes += 1

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
        before, written, at = -1, -1, 0.0
        while not self.stop.is_set():
            if self.reconciler.settled and not self._ready and self.reconciler.status:
                self._ready = True
                took = time.monotonic() - self._started
                self._tell(Kind.HOST_READY, f"the host is as {self._settings.state_file} says ({took:.1f} s)")
            if before != (before := self.reconciler.changes):
                self._tell_store()
            if written != before and (self.reconciler.settled or time.monotonic() > at + STATUS_S):
                written, at = before, time.monotonic()
                with contextlib.suppress(BulkheadError):
                    write_atomically(path, json.dumps(self.describe(), indent=1), 0o644)
            for key, count in self._limiter.withheld(time.monotonic()).items():
                text = f"{key}: {count} more events of its kind were not recorded; what changes it again and again?"
                self._tell(Kind.HOST_ERROR, text)
            self._log.tick()
            await asyncio.sleep(0.01)

    def _tell_store(self) -> None:
        """How far the host has come with what the store holds."""
        if self._store is not None and self._wanted is not None:
            waiting = {name: f"refused: {problem}" for name, problem in self._wanted.refused}
            waiting |= self._unready()
            self._store.publish(
                self._settings.node, agent_revision=self._revision, agent_waiting=waiting, health=self._health
            )

    def _unready(self) -> dict[str, str]:
        """Containers that are not as wanted yet, and those that are not gone yet, each with the reason."""
        status = self.reconciler.status
        out = {}
        for name, keys in self._owned.items():
            reasons = (status[key].why for key in keys if key in status and status[key].phase is not Phase.DONE)
            if (why := next(reasons, None)) is not None:
                out[name] = why
        ports = next(
            (one for key, one in status.items() if key.startswith("ports/") and one.phase is not Phase.DONE), None
        )
        for key, one in status.items():
            if (found := _CONTAINER.fullmatch(key)) is not None:
                left = one if one.phase is not Phase.DONE else ports
                if left is not None:
                    out.setdefault(f"container/{found[1]}", f"it is not gone yet: {left.why}")
        return out | self._unready_clients() | self._unready_grants()

    def _unready_grants(self) -> dict[str, str]:
        """The same of grants: those whose way is not made yet, and those whose connections may still be known."""
        status = self.reconciler.status
        assert self._wanted is not None
        waiting = {key: one.why for key, one in status.items() if one.phase is not Phase.DONE}
        out = {}
        now = {}
        for grant in self._wanted.state.grants:
            now[f"grant/{grant.id}"] = needs = ["connections", "ports/passages"]
            for opening in openings(replace(self._wanted.state, grants=(grant,))):
                needs.append(f"names/{opening.source_network}")
                needs += (f"interface/{namespace_of(end.id)}/eth0" for end in (opening.source, opening.target))
        for key, needs in now.items():
            if why := next((waiting[need] for need in needs if need in waiting), ""):
                out[key] = why
        if "connections" in waiting:
            ended = self._grant_keys
            if ended is None:  # nothing is known of what was open before this agent began
                ended = frozenset(key_of(one) for one in self._desired.records.grants if one.expires_at)
            why = f"its connections may be known yet: {waiting['connections']}"
            out |= dict.fromkeys(ended - now.keys(), why)
        elif status and not any(key.startswith(("ports/", "names/")) and why == UNSEEN for key, why in waiting.items()):
            self._grant_keys = frozenset(now)
        else:
            out |= dict.fromkeys((self._grant_keys or frozenset()) - now.keys(), "its names and ports are looked at")
        return out

    def _unready_clients(self) -> dict[str, str]:
        """The same of clients of the VPN's server."""
        vpn, now = self._loaded.host.vpn, frozenset(key_of(one) for one in self._client_records())
        if vpn is None:
            return dict.fromkeys(
                now, "refused: the state file has no VPN server; declare one under wireguard.vpn_server"
            )
        tunnel = self.reconciler.status.get(f"wireguard/{vpn.tunnel.interface}")
        if tunnel is None or tunnel.phase is Phase.DONE:
            self._client_keys = now
            return {}
        return dict.fromkeys(now | self._client_keys, tunnel.why)

    def describe(self) -> dict[str, Any]:
        """Everything `bulkhead status` shows of the host."""
        return {
            "pid": os.getpid(),
            "state": self._loaded.state.digest,
            "state_file": str(self._settings.state_file),
            "settled": bool(self.reconciler.status) and self.reconciler.settled,
            "services": dict(self._health),
            "resources": [
                {"key": key, "phase": str(status.phase), "why": status.why, "healed": status.healed}
                | ({"retry_in_s": round(status.pause_s, 2)} if status.phase is not Phase.DONE else {})
                for key, status in self.reconciler.status.items()
            ],
        }


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop may have ended
        loop.call_soon_threadsafe(event.set)


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
    desired = Desired(settings.state_file, settings.node)
    with only_one(settings):
        try:
            settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise Failed(
                f"{settings.state_dir} cannot be made: {exc.strerror}; mend it, or use another --state-dir"
            ) from exc
        os.umask(0o022)
        with EventLog(settings.events_dir) as log:
            asyncio.run(_run(settings, desired, log))


async def _run(settings: Settings, desired: Desired, log: EventLog) -> None:
    tls = Tls(*settings.store_tls) if settings.store_tls else None
    await Agent(settings, desired, log, Store(settings.store, tls) if settings.store else None).run()
