"""Programs that outlive the agent: started once, found again by the next agent, stopped by exact process id.

A program writes its own record before it becomes what was asked for, so that none is ever lost to an agent that was
killed. A record counts as long as the process it names is the one that wrote it. Imports files, resource and run.
"""

from __future__ import annotations

import asyncio
import contextlib
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
"""A log longer than that begins anew with the next start."""
OFTEN, OFTEN_S = 3, 10.0
"""A program that was started so many times, each within so many seconds of the one before, is not started again at once:"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""The pause doubles from start to start."""

# Becomes the program, with the same process id and start time; the record is there before it.
_LAUNCH = (
    'umask 077; t=$(cut -d" " -f22 /proc/$$/stat); '
    'printf \'{"pid": %d, "started": %s, "digest": "%s"}\\n\' $$ "$t" "$2" > "$1.new.$$" && mv "$1.new.$$" "$1" || exit 70; '
    'umask 022; shift 2; exec "$@"'
)


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
        return found is not None and found[0] not in "ZX" and found[1] == self.started

    @property
    def has_left(self) -> bool:
        """Whether the process has ended and others of its group have not. The kernel gives no process the id of a group
        that is there still."""
        found = _stat(self.pid)
        if found is not None and (found[0] not in "ZX" or found[1] != self.started):
            return False
        return any(_of_group(path, self.pid) for path in Path("/proc").glob("[0-9]*/stat"))


class Programs:
    """The programs whose records are in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children: list[subprocess.Popen[bytes]] = []

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
        lines = (read_or_none(self.log(name)) or "").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "nothing")

    def start(self, program: Program) -> None:
        """Start it, unless it runs. Raises `Failed` where the program is not there."""
        if self.record(program.name) is not None:
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = self.log(program.name)
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > LOG_BYTES:
                log.unlink()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            child = subprocess.Popen(
                ["sh", "-c", _LAUNCH, "sh", str(self._path(program.name)), program.digest, *program.line],
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env={**environment(), **program.env},
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            raise Failed(f"{program.name} cannot be started: {exc.strerror}") from exc
        finally:
            os.close(descriptor)
        self._children.append(child)

    async def appear(self, name: str) -> None:
        """Wait until a program that was started has its record; what has none by then has ended at once."""
        for _ in range(200):
            if self.record(name) is not None:
                return
            await asyncio.sleep(0.005)

    async def stop(self, name: str) -> None:
        """End it and what it has started by SIGTERM, after `STOP_S` by SIGKILL, and forget it. Raises `Failed`."""
        await self.end(name)
        for path in (self._path(name), self.log(name)):
            path.unlink(missing_ok=True)

    async def end(self, name: str) -> None:
        """The same, and remember what it said."""
        record = self._read(name)
        if record is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if await self._end(record, number):
                    break
            else:
                raise Failed(f"{name} (process {record.pid}) does not end; look why: cat /proc/{record.pid}/stack")

    async def _end(self, record: Record, number: signal.Signals) -> bool:
        _signal(record, number)
        deadline = time.monotonic() + STOP_S
        while record.lives or record.has_left:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
            self._reap()
        return True

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time of a process."""
    text = read_or_none(Path(f"/proc/{pid}/stat"))
    if not text:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _of_group(path: Path, group: int) -> bool:
    """Whether the process of a stat file is of a group, and no zombie."""
    with contextlib.suppress(OSError):
        state, _parent, found = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
        return int(found) == group and state not in "ZX"
    return False


def _signal(record: Record, number: signal.Signals) -> None:
    """Tell a process and all those of its group, which outlive it otherwise."""
    with contextlib.suppress(ProcessLookupError):
        if record.has_left:
            os.killpg(record.pid, number)
            return
        descriptor = os.pidfd_open(record.pid)
        try:
            if record.lives:  # while the descriptor is open and this is so, the id is of no other
                os.killpg(record.pid, number)
        finally:
            os.close(descriptor)


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
        self._starts, self._started_at = 0, 0.0
        self._not_before, self._pause_s = 0.0, FIRST_PAUSE_S

    async def diff(self) -> list[Change]:
        record = self._programs.record(self._program.name)
        what = f"process {self._program.name}"
        if record is None:
            if time.monotonic() < self._not_before:
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
        now = time.monotonic()
        if now - self._started_at > OFTEN_S + self._pause_s:
            self._starts, self._pause_s = 0, FIRST_PAUSE_S
        self._starts, self._started_at = self._starts + 1, now
        if self._starts >= OFTEN:
            self._not_before, self._pause_s = now + self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        if self._programs.record(self._program.name) is None:
            await self._programs.end(self._program.name)  # what it had started may run still
        self._programs.start(self._program)
        await self._programs.appear(self._program.name)

    async def _stop(self) -> None:
        await self._programs.stop(self._program.name)
