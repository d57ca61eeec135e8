"""Programs that outlive the agent: started once, found again by the next agent, stopped by exact process id.

A program writes its own record before it becomes what was asked for, so that none is ever lost to an agent that was
killed; until then it holds a lock, so that no other agent starts a second one. A record counts as long as the process
it names is the one that wrote it. Imports files, resource and run.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controller.agent.files import read_or_none
from controller.agent.resource import Change, Failed, Sign
from controller.agent.run import environment, inside

STOP_S = 3.0
LOG_BYTES = 1 << 20
"""A log longer than that begins anew."""
MOST_PROCESSES = 512
"""Of one confined program."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OFTEN, OFTEN_S = 3, 10.0
"""A program that was started so many times within so many seconds is not started again at once."""

# Becomes the program, with the same process id and start time; the record is there before it. Its standard input is
# the lock, given back once the record is there.
_LAUNCH = (
    'umask 077; t=$(cut -d" " -f22 /proc/$$/stat); '
    'printf \'{"pid": %d, "started": %s, "digest": "%s"}\\n\' $$ "$t" "$2" > "$1.new.$$" && mv "$1.new.$$" "$1" || exit 70; '
    'umask 022; shift 2; exec "$@" </dev/null'
)


def confined(user: int, command: Sequence[str]) -> tuple[str, ...]:
    """The command line that runs a command with no rights on the host, as a user who is nobody else, and not without end.

    Root in a network namespace is root everywhere else as well, and leaves the namespace when it wants to.
    """
    rights = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups")
    who = (f"--reuid={user}", f"--regid={user}")
    own = (f"PATH={_PATH}", "LC_ALL=C", "HOME=/")
    return ("prlimit", f"--nproc={MOST_PROCESSES}", "--core=0", "setpriv", *who, *rights, "env", "-i", *own, *command)


@dataclass(frozen=True, slots=True)
class Program:
    """What is to run. `name` is unique on the host; secrets are in files, never in `command` or `env`."""

    name: str
    command: tuple[str, ...]
    namespace: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> list[str]:
        """The command line that runs it in its namespace."""
        return inside(self.namespace, *self.command)

    @property
    def digest(self) -> str:
        """Names what is run, for comparison."""
        text = json.dumps([self.line, sorted(self.env.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Record:
    """A process that runs a program. `started` is its start time in clock ticks since boot (proc_pid_stat(5))."""

    pid: int
    started: int
    digest: str

    @property
    def lives(self) -> bool:
        """Whether the process is still that one, and no zombie."""
        found = _stat(self.pid)
        return found is not None and found.state not in "ZX" and found.started == self.started


class Programs:
    """The programs whose records are in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def record(self, name: str) -> Record | None:
        """The living process of that name."""
        self._reap()
        record = self._read(name)
        return record if record is not None and record.lives else None

    def _read(self, name: str) -> Record | None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(read_or_none(self._path(name)) or "")
            return Record(int(found["pid"]), int(found["started"]), str(found["digest"]))
        return None

    def names(self) -> list[str]:
        """Names of all records, of living processes or not."""
        return sorted(path.stem for path in self._directory.glob("*.json"))

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._directory / f"{name}.log"

    def last_words(self, name: str) -> str:
        """The last line a program has said."""
        try:
            with self.log(name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                said = file.read().decode(errors="replace")
        except FileNotFoundError:
            said = ""
        lines = ("".join(c if c.isprintable() else " " for c in line).strip() for line in reversed(said.splitlines()))
        return next((line[:200] for line in lines if line), "nothing")

    def bound_logs(self) -> None:
        """Empty the logs that have become too long. They are written by appending, so that whoever writes goes on."""
        for log in self._directory.glob("*.log"):
            with contextlib.suppress(FileNotFoundError):
                if log.stat().st_size > LOG_BYTES:
                    os.truncate(log, 0)

    def start(self, program: Program) -> None:
        """Start it, unless it runs or somebody is starting it. Raises `Failed` where the program is not there."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = self.log(program.name)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        lock = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.record(program.name) is not None:
                return
            self._end_remains(program.name)
            if os.fstat(descriptor).st_size > LOG_BYTES:
                os.ftruncate(descriptor, 0)
            child = subprocess.Popen(
                ["sh", "-c", _LAUNCH, "sh", str(self._path(program.name)), program.digest, *program.line],
                stdin=lock,
                stdout=descriptor,
                stderr=descriptor,
                env={**environment(), **program.env},
                cwd="/",
                start_new_session=True,
            )
        except BlockingIOError:
            return
        except OSError as exc:
            raise Failed(f"{program.name} cannot be started: {exc.strerror}") from exc
        finally:
            os.close(lock)
            os.close(descriptor)
        self._children[program.name] = child

    async def appear(self, name: str) -> None:
        """Wait until a program that was started has its record, or has ended already."""
        for _ in range(200):
            if self.record(name) is not None or (
                name in self._children and self._children[name].returncode is not None
            ):
                return
            await asyncio.sleep(0.005)

    async def stop(self, name: str) -> None:
        """End it by SIGTERM, after `STOP_S` by SIGKILL, then what it has left in its session, and forget it."""
        record = self.record(name)
        if record is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if await self._end(record, number):
                    break
            else:
                raise Failed(f"{name} (process {record.pid}) does not end; look why: cat /proc/{record.pid}/stack")
        self._end_remains(name)
        for path in (self._path(name), self.log(name)):
            path.unlink(missing_ok=True)

    def _end_remains(self, name: str) -> None:
        """End what a program that has ended leaves behind: processes of its session, whose number is its id.

        While there is one of them the number is not given to anybody else.
        """
        record = self._read(name)
        leader = _stat(record.pid) if record is not None else None
        if record is None or (leader is not None and (leader.started != record.started or record.lives)):
            return
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(pid)
                try:
                    found = _stat(pid)
                    if found is not None and found.session == record.pid and found.started >= record.started:
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                finally:
                    os.close(descriptor)

    async def _end(self, record: Record, number: signal.Signals) -> bool:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(record.pid)
            try:
                if record.lives:  # looked at through the descriptor's process: an id is not used twice meanwhile
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
        deadline = time.monotonic() + STOP_S
        while record.lives:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        self._reap()
        return True

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _reap(self) -> None:
        for child in self._children.values():
            child.poll()


@dataclass(frozen=True, slots=True)
class _Stat:
    """Of proc_pid_stat(5)."""

    state: str
    session: int
    started: int


def _stat(pid: int) -> _Stat | None:
    """How a process is. Its name may hold anything, bytes that are no text as well."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:  # gone, maybe between opening and reading
        return None
    return _Stat(fields[0].decode(), int(fields[3]), int(fields[19])) if len(fields) > 19 else None


@dataclass(frozen=True, slots=True)
class Kept:
    """A program for whoever decides itself when it has to run."""

    programs: Programs
    program: Program

    async def runs(self) -> bool:
        """Whether it runs, as wanted."""
        record = self.programs.record(self.program.name)
        return record is not None and record.digest == self.program.digest

    async def start(self) -> None:
        """Start it; what runs otherwise than wanted is ended."""
        if not await self.runs():
            await self.stop()
            self.programs.start(self.program)
            await self.programs.appear(self.program.name)

    async def stop(self) -> None:
        """End it; it has ended then."""
        await self.programs.stop(self.program.name)


class Process:
    """A program that has to run, and to run as wanted; started again when it has ended."""

    period = 0.5

    def __init__(self, programs: Programs, program: Program, needs: Sequence[str] = ()) -> None:
        self._programs, self._program = programs, program
        self.key = f"process/{program.name}"
        self.needs = tuple(needs)
        self.watches: tuple[str | None, ...] = ()
        self._starts: list[float] = []

    async def diff(self) -> list[Change]:
        record = self._programs.record(self._program.name)
        what = f"process {self._program.name}"
        if record is None:
            now = time.monotonic()
            self._starts = [at for at in self._starts if now - at < OFTEN_S]
            if len(self._starts) >= OFTEN:
                words = self._programs.last_words(self._program.name)
                raise Failed(
                    f"{what} ends again and again; it says: {words}. Its log: {self._programs.log(self._program.name)}"
                )
            return [Change(Sign.ADD, what, "not running", self._start)]
        if record.digest != self._program.digest:
            return [
                Change(Sign.REMOVE, what, f"process {record.pid} runs otherwise than wanted", self._stop),
                Change(Sign.ADD, what, "to run as wanted", self._start),
            ]
        return []

    async def _start(self) -> None:
        self._starts.append(time.monotonic())
        self._programs.start(self._program)
        await self._programs.appear(self._program.name)

    async def _stop(self) -> None:
        await self._programs.stop(self._program.name)
