"""LXC containers that join a network namespace of ours, so that addresses, routes and the start gate are the same code
for every driver.

A container lives in `<lxc path>/<id>`: `config`, which is ours, `rootfs`, and `made.json`, which says what it was made
from. It is made beside and moved there, so that a directory of that name is a whole one. Root in it is nobody on the
host (a range of user ids for each), and has no rights over its network namespace. Imports files, netns,
resource, run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path

from controller.agent.files import open_way, read_or_none, write_atomically
from controller.agent.netns import in_namespace
from controller.agent.resource import Change, Failed, Sign, Waiting
from controller.agent.run import NETNS_DIR, PREFIX, call
from controller.hostmodel import Container
from controller.model import Member

TEMPLATES = Path("/usr/share/lxc/templates")
COMMON = Path("/usr/share/lxc/config/common.conf")
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")

IDS = 1 << 16
"""User and group ids of one container."""
FIRST_ID = 0x3000_0000
"""Where they begin. Below 2**31 even for the last container, since ping_group_range ends there."""
NUMBERED = 18_000
"""Containers with a number below have a range of their own for sure; others get one by hash above."""

MAKE_S = 1800.0
"""A template may have a whole distribution to install."""
START_S = 30.0
STOP_S = 10.0
"""What a container has for stopping by itself."""
AT_ONCE_S = 1.0
"""What is done so soon is waited for; what takes longer goes on beside the rest."""
LOOK_AGAIN_S = 0.1
LOG_BYTES = 1 << 20

SYSCTLS = {"ip_unprivileged_port_start": "0", "ping_group_range": "0 2147483647"}
"""Of net.ipv4 in the container's namespace, over which its root has no rights: low ports and ping as everywhere."""
_STAGE = """
mount -t tmpfs -o mode=755,size=64k bulkhead /mnt
mkdir /mnt/rootfs /mnt/sys
mount --bind "$1" /mnt/rootfs
nsenter --net="$2" mount -t sysfs -o ro,nosuid,nodev,noexec sysfs /mnt/sys
shift 2
exec "$@"
"""
"""Where a container is started from, seen by LXC alone. Its root has to get to its root file system, but nobody else on
the host may: programs in there can be setuid. The namespace's own /sys cannot be mounted from inside."""
_OURS = (
    "lxc.rootfs.",
    "lxc.uts.",
    "lxc.net.",
    "lxc.namespace.",
    "lxc.idmap",
    "lxc.apparmor.",
    "lxc.mount.auto",
    "lxc.mount.entry = /sys",
)


@dataclass(frozen=True, slots=True)
class Init:
    """The first process of a running container; `start` tells it from a later process of the same id."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return _start_of(self.pid) == self.start

    @property
    def network(self) -> int:
        """The inode of the network namespace it is in, 0 if it is gone."""
        return _inode(Path(f"/proc/{self.pid}/ns/net"))


class Lxc:
    """The containers below one LXC path. The agent keeps one: it remembers what is being done to each."""

    def __init__(self, lxc_path: Path, log_dir: Path) -> None:
        self.path = lxc_path
        self._log_dir = log_dir
        self._inits: dict[str, Init] = {}
        self._jobs: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._swept = False

    # ------------------------------------------------------------------------------------------------ what is there

    def ids(self) -> list[str]:
        """Every container that is there, running or not."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(found.parent.name for found in self.path.glob("[!.]*/made.json"))
        return []

    def made_from(self, container_id: str) -> str | None:
        """What a container was made from, `template busybox` or `rootfs`; None where there is none."""
        try:
            made = json.loads((self.path / container_id / "made.json").read_text())["from"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as exc:
            raise Failed(
                f"{self.path / container_id}/made.json cannot be read: {exc}; remove {container_id} there"
            ) from exc
        return str(made)

    async def init(self, container_id: str) -> Init | None:
        """Its first process, if it runs. Raises `Waiting` while it is starting or stopping."""
        known = self._inits.get(container_id)
        if known is not None and known.alive:
            return known
        self._inits.pop(container_id, None)
        if not (self.path / container_id / "config").exists():
            return None
        told = await self._tell("lxc-info", container_id, "-s", "-p", "-H")
        state = next((word for word in told.split() if word.isalpha()), "gone")
        pid = next((int(word) for word in told.split() if word.isdecimal()), 0)
        if state == "STOPPED":
            return None
        if state in ("STARTING", "STOPPING", "ABORTING") or not pid:
            raise Waiting(f"container {container_id} is {state.lower()}", LOOK_AGAIN_S)
        start = _start_of(pid)
        if start is None:
            return None
        self._inits[container_id] = Init(pid, start)
        return self._inits[container_id]

    # -------------------------------------------------------------------------------------------------- what is done

    def busy(self, container_id: str) -> None:
        """Raises `Waiting` while something is being done to a container, and what came of it if it failed."""
        job = self._jobs.get(container_id)
        if job is None:
            return
        what, task = job
        if not task.done():
            raise Waiting(f"container {container_id} is being {what}", LOOK_AGAIN_S)
        del self._jobs[container_id]
        task.result()

    async def _work(self, container_id: str, what: str, work: Coroutine[None, None, None]) -> None:
        """Do it, beside everything else if it takes longer than a moment (then this raises `Waiting`)."""
        if container_id in self._jobs:
            work.close()
            self.busy(container_id)
            return
        task = asyncio.ensure_future(work)
        self._jobs[container_id] = (what, task)
        await asyncio.wait({task}, timeout=AT_ONCE_S)
        self.busy(container_id)

    async def make(self, container_id: str, template: str | None) -> None:
        """Make a container from a template, or around a root file system that is there (None)."""
        await self._work(container_id, "made", self._make(container_id, template))

    async def _make(self, container_id: str, template: str | None) -> None:
        new = self.path / ".new"
        self.path.mkdir(mode=0o711, parents=True, exist_ok=True)
        if not self._swept:  # what a killed agent has left half made or half removed
            await asyncio.to_thread(shutil.rmtree, new, ignore_errors=True)
            self._swept = True
        new.mkdir(mode=0o700, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=new))
        try:
            directory = room / container_id
            if template is None:
                directory.mkdir(mode=0o700)
            else:
                _check_template(template)
                command = ("lxc-create", "-P", str(room), "-n", container_id, "-t", template, "-f", os.devnull)
                await call(*command, timeout_s=MAKE_S)
                (directory / "config").replace(directory / "template.conf")
            directory.chmod(0o700)
            (directory / "made.json").write_text(json.dumps({"from": _source(template)}))
            directory.rename(self.path / container_id)
        finally:
            shutil.rmtree(room, ignore_errors=True)

    async def start(self, container_id: str, rootfs: Path, namespace: str) -> None:
        """Start a container in a network namespace. Raises `Failed` with what LXC says."""
        open_way(self.path, ours=2)  # LXC insists; what is in there is closed
        await asyncio.to_thread(in_namespace, NETNS_DIR / namespace, _open_ports)
        self._log_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        log = self._log_dir / f"{container_id}.log"
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > LOG_BYTES:
                log.unlink()
        before = log.stat().st_size if log.exists() else 0
        try:
            stage = ("unshare", "--mount", "--propagation=slave", "sh", "-ec", _STAGE, "sh")
            lxc = ("lxc-start", "-P", str(self.path), "-n", container_id, "-d", "-s", "lxc.rootfs.path=dir:/mnt/rootfs")
            told = ("-o", str(log), "-l", "WARN")
            await call(*stage, str(rootfs), str(NETNS_DIR / namespace), *lxc, *told, timeout_s=START_S)
        except Failed as exc:
            said = _errors(log, before)
            if not said:
                raise
            raise Failed(f"container {container_id} does not start: {said}; everything it says is in {log}") from exc

    async def begin_stop(self, container_id: str) -> None:
        """Stop a container, by force if it has not stopped in time; raises `Waiting` while it stops."""
        await self._work(container_id, "stopped", self._stop(container_id))

    async def stop(self, container_id: str) -> None:
        """The same, and wait until it has stopped."""
        await self._abandon(container_id)
        await self._stop(container_id)

    async def _abandon(self, container_id: str) -> None:
        """End what is being done to a container."""
        job = self._jobs.pop(container_id, None)
        if job is not None:
            job[1].cancel()
            await asyncio.gather(job[1], return_exceptions=True)

    async def _stop(self, container_id: str) -> None:
        if await self.init(container_id) is None:
            return
        try:
            await self._tell("lxc-stop", container_id, "-t", f"{STOP_S:.0f}", timeout_s=STOP_S + 10)
        except Failed:
            if await self.init(container_id) is not None:
                await self._tell("lxc-stop", container_id, "-k")
        self._inits.pop(container_id, None)

    async def remove(self, container_id: str) -> None:
        """Stop and remove a container; a root file system that was not made here stays. Waits until it is gone."""
        await self._abandon(container_id)
        await self._stop(container_id)
        new = self.path / ".new"
        new.mkdir(mode=0o700, parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=new))
        with contextlib.suppress(FileNotFoundError):
            (self.path / container_id).rename(room / container_id)
        await asyncio.to_thread(shutil.rmtree, room)
        (self._log_dir / f"{container_id}.log").unlink(missing_ok=True)

    async def _tell(self, program: str, container_id: str, *arguments: str, timeout_s: float = 10) -> str:
        return await call(program, "-P", str(self.path), "-n", container_id, *arguments, timeout_s=timeout_s)


class LxcContainer:
    """A container: there, with our configuration and its resolvers, and running in its namespace, or not running.

    `search` is the domain of bare names. Root of a `privileged` one is root of the host, with every right over its
    network namespace (raw sockets, other addresses), and nothing but dropped capabilities between it and the rest.
    """

    period = 1.0

    def __init__(
        self,
        lxc: Lxc,
        member: Member,
        container: Container,
        *,
        search: str | None = None,
        privileged: bool = False,
        needs: tuple[str, ...] = (),
    ) -> None:
        self._lxc, self._container, self._search, self._privileged = lxc, container, search, privileged
        self._id, self._name = member.id, member.name
        self._namespace = f"{PREFIX}{member.id}"
        self._directory = lxc.path / member.id
        self.key = f"lxc/{member.id}"
        self.needs = needs

    def __str__(self) -> str:
        return f"container {self._id} ({self._name})"

    async def diff(self) -> list[Change]:
        self._lxc.busy(self._id)
        made = self._lxc.made_from(self._id)
        init = await self._lxc.init(self._id)
        running = self._container.running
        out: list[Change] = []
        if made is None:
            out.append(Change(Sign.ADD, f"{self} from {self._wanted_source}", "missing", self._make))
        elif made != self._wanted_source:
            raise Failed(
                f"{self} was made from {made}, not from {self._wanted_source}; what is in it would be lost: take it out "
                "of the state file, let it be removed, and declare it again"
            )
        config = "missing" if made is None else self._config_differs()
        why = self._why_stop(init, config)
        if init is not None and why:
            out.append(Change(Sign.CHANGE if running else Sign.REMOVE, f"running {self}", why, self._stop))
        if config:
            out.append(Change(Sign.CHANGE, f"configuration of {self}", config, self._write_config))
        if self._container.dns and (made is None or self._resolvers() != self._resolver_file()):
            out.append(Change(Sign.CHANGE, f"resolvers of {self}", "other ones", self._write_resolvers))
        if running and (init is None or why):
            out.append(Change(Sign.ADD, f"running {self}", "it is stopped" if init is None else why, self._start))
        return out

    def _why_stop(self, init: Init | None, config: str) -> str:
        """Why it has to be stopped, for a start or for good; empty where it can go on."""
        if not self._container.running:
            return "it should not run"
        if config:
            return f"its configuration is {config}"
        if init is not None and init.network != _inode(NETNS_DIR / self._namespace):
            return f"it is not in {self._namespace}"
        return ""

    async def _make(self) -> None:
        if self._lxc.made_from(self._id) is None:
            if self._container.rootfs is not None:
                _check_rootfs(self, self._container.rootfs)
            await self._lxc.make(self._id, None if self._container.rootfs is not None else self._template)

    async def _start(self) -> None:
        if await self._lxc.init(self._id) is None:
            await self._lxc.start(self._id, self._rootfs, self._namespace)

    async def _stop(self) -> None:
        await self._lxc.begin_stop(self._id)

    @property
    def _template(self) -> str:
        return self._container.template or "busybox"

    @property
    def _rootfs(self) -> Path:
        return self._container.rootfs or self._directory / "rootfs"

    @property
    def _wanted_source(self) -> str:
        return _source(None if self._container.rootfs is not None else self._template)

    # ------------------------------------------------------------------------------------------------- configuration

    def config(self) -> str:
        """The configuration file it should have."""
        base = self._directory / "template.conf"
        kept = [line.strip() for line in base.read_text().splitlines()] if base.exists() else []
        own_ids = ["lxc.rootfs.options = idmap=container"]
        own_ids += [f"lxc.idmap = {kind} 0 {first_id(self._id)} {IDS}" for kind in "ug"]
        lines = [
            "# Written by bulkhead, and again when it is changed.",
            *([f"lxc.include = {COMMON}"] if COMMON.exists() else []),
            "lxc.tty.dir =",
            *(line for line in kept if line and not line.startswith(("#", *_OURS))),
            f"lxc.uts.name = {self._name}",
            f"lxc.rootfs.path = dir:{self._rootfs}",
            *([] if self._privileged else own_ids),
            "lxc.net =",
            f"lxc.namespace.share.net = {NETNS_DIR / self._namespace}",
            "lxc.mount.auto =",
            "lxc.mount.auto = proc:mixed cgroup:mixed",
            "lxc.mount.entry = /mnt/sys sys none bind,ro,optional 0 0",
            f"lxc.apparmor.profile = {'generated' if _has_apparmor() else 'unconfined'}",
            "lxc.start.auto = 0",
        ]
        return "\n".join(lines) + "\n"

    def _config_differs(self) -> str:
        found = read_or_none(self._directory / "config")
        if found is None:
            return "missing"
        return "" if found == self.config() else "not as declared"

    async def _write_config(self) -> None:
        write_atomically(self._directory / "config", self.config(), 0o644)

    def _resolvers(self) -> str:
        search = [f"search {self._search}"] if self._search else []
        return "\n".join([*search, *(f"nameserver {address}" for address in self._container.dns)]) + "\n"

    def _resolver_file(self) -> str | None:
        with self._etc() as etc, contextlib.suppress(OSError):
            descriptor = os.open("resolv.conf", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=etc)
            with os.fdopen(descriptor, "rb") as file:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return file.read(4096).decode(errors="replace")
        return None

    async def _write_resolvers(self) -> None:
        with self._etc() as etc:
            new = ".resolv.conf.bulkhead"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=etc)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=etc)
            with os.fdopen(descriptor, "w") as file:
                os.fchmod(descriptor, 0o644)
                file.write(self._resolvers())
            os.replace(new, "resolv.conf", src_dir_fd=etc, dst_dir_fd=etc)

    @contextlib.contextmanager
    def _etc(self) -> Iterator[int]:
        """/etc of the container, opened without following a link: what is in there belongs to the container."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            root = os.open(self._rootfs, flags)
            try:
                etc = os.open("etc", flags | os.O_NOFOLLOW, dir_fd=root)
            finally:
                os.close(root)
        except OSError as exc:
            raise Failed(f"{self} has no directory etc in {self._rootfs}: {exc.strerror}") from exc
        try:
            yield etc
        finally:
            os.close(etc)


def first_id(container_id: str) -> int:
    """The user id on the host of root in a container."""
    if container_id.isdecimal() and int(container_id) < NUMBERED:
        number = int(container_id)
    else:
        number = NUMBERED + int.from_bytes(hashlib.sha256(container_id.encode()).digest()[:2], "big") % 2000
    return FIRST_ID + number * IDS


def _source(template: str | None) -> str:
    return "rootfs" if template is None else f"template {template}"


def _check_template(template: str) -> None:
    if not (TEMPLATES / f"lxc-{template}").exists():
        there = " ".join(sorted(path.name.removeprefix("lxc-") for path in TEMPLATES.glob("lxc-*")))
        raise Failed(
            f"there is no LXC template {template} in {TEMPLATES}; "
            + (f"there are: {there}" if there else "run: apt-get install lxc-templates")
        )


def _check_rootfs(what: object, rootfs: Path) -> None:
    if not rootfs.is_dir():
        raise Failed(f"rootfs {rootfs} of {what} is not a directory; unpack one there, or correct rootfs")


def _has_apparmor() -> bool:
    with contextlib.suppress(OSError):
        return APPARMOR.read_text().strip() == "Y"
    return False


def _open_ports() -> None:
    for name, value in SYSCTLS.items():
        Path("/proc/sys/net/ipv4", name).write_text(value)


def _start_of(pid: int) -> int | None:
    """When a process was started, in ticks since boot; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _errors(log: Path, offset: int) -> str:
    """What LXC has called an error since, the first one: those that follow only say that something failed."""
    with contextlib.suppress(OSError), log.open(errors="replace") as file:
        file.seek(offset)
        for line in file:
            if " ERROR " in line:
                return line.rpartition(" - ")[2].strip()[:300]
    return ""
