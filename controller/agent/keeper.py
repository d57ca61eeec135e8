"""Keeps the processes of `bulkhead up` running: each in its turn, started again when it ends, stopped in reverse.

Imports identity and nothing else of ours.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.agent.identity import Identity

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
STEADY_S = 10.0
"""What has run so long is started again after the first pause; what ends earlier after one that doubles."""
READY_S = 5.0
STOP_S = 10.0
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Kept:
    """A process. `user` is as whom it runs, if not as whom we do; `group` the group of what it makes. Those that come
    after it are started once `ready` is there, or after `READY_S`."""

    name: str
    command: tuple[str, ...]
    user: Identity | None = None
    group: int | None = None
    ready: Path | None = None
    reads_again: bool = True
    """On SIGHUP."""


class _Running:
    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.process: subprocess.Popen[bytes] | None = None
        self._due = self._started = 0.0
        self._pause_s = FIRST_PAUSE_S

    def keep(self, told: Callable[[str], None]) -> None:
        """Start it, unless it runs or has its pause."""
        now = time.monotonic()
        if self.process is not None:
            if self.process.poll() is None:
                return
            if now - self._started > STEADY_S:
                self._pause_s = FIRST_PAUSE_S
            code = self.process.returncode
            told(f"the {self.kept.name} has ended with exit code {code}; starting it again in {self._pause_s:g} s")
            self.process, self._due = None, now + self._pause_s
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        if now >= self._due:
            self.process, self._started = _start(self.kept), now

    @property
    def ready(self) -> bool:
        """Whether those that come after it may be started."""
        path = self.kept.ready
        return path is None or path.exists() or time.monotonic() > self._started + READY_S

    def stop(self) -> None:
        """End it; it has ended then."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _start(kept: Kept) -> subprocess.Popen[bytes]:
    user = kept.user

    def before() -> None:
        # After the change of user, which would undo it: nobody else would ever end it when we are killed.
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if user is not None:
            _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    return subprocess.Popen(
        kept.command,
        stdin=subprocess.DEVNULL,
        cwd="/" if user is not None else None,  # ours may be closed to it
        start_new_session=True,
        preexec_fn=before,
        user=user.uid if user is not None else None,
        group=user.gid if user is not None else kept.group,
        extra_groups=user.groups if user is not None else None,
    )


class Keeper:
    """Processes in the order in which they are started; `told` hears of every one that ends."""

    def __init__(self, kept: Sequence[Kept], told: Callable[[str], None]) -> None:
        self._running = [_Running(each) for each in kept]
        self._told = told
        self._stopping = False

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then they are ended, the last one first, which leaves all they have built.

        SIGHUP goes on to them.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._signalled)
        try:
            while not self._stopping:
                for each in self._running:
                    each.keep(self._told)
                    if self._stopping or not each.ready:
                        break
                time.sleep(0.05)
        finally:
            for each in reversed(self._running):
                each.stop()

    def _signalled(self, number: int, _frame: object) -> None:
        if number != signal.SIGHUP:
            self._stopping = True
            return
        for each in self._running:
            if each.process is not None and each.kept.reads_again:
                each.process.send_signal(number)
