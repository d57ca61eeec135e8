"""The first process of a lab: shuts the host's files away, lets a child do the work, reaps orphans, passes signals on.

Standard library only: a lab that runs on the system's Python loads this file by its path.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN = ("/var/log/openvswitch", "/var/lib/openvswitch", "/etc/openvswitch")
"""Besides /run: where a program that is told nothing would find the host's Open vSwitch."""


class Failure(Exception):
    """Why the lab could not be brought up, in one line."""


class Told:
    """The way to whoever started the lab: one line per step, then `ready` or `failed: why`. Nobody has to listen."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def say(self, line: str) -> None:
        """Tell one line."""
        with contextlib.suppress(OSError):
            os.write(self._fd, f"{' '.join(line.split())}\n".encode())

    def close(self) -> None:
        """Nothing more comes."""
        with contextlib.suppress(OSError):
            os.close(self._fd)


class Stopped(BaseException):
    """Somebody asked us to end."""


def stop(_signum: int, _frame: object) -> None:
    """Signal handler. Once is enough: a second signal must not interrupt the taking down."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    raise Stopped


def mount(*args: str) -> None:
    """mount(8), in our own mount namespace."""
    done = subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"mount {' '.join(args)}: {done.stderr.strip()}")


def hide_the_host(run_dir: Path) -> None:
    """Mount what must not be the host's: /proc and /sys of our namespaces, an empty /run, no trace of its OVS."""
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "sysfs", "sysfs", "/sys")
    ours = os.open(run_dir, os.O_PATH | os.O_DIRECTORY)
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    if not run_dir.is_dir():
        run_dir.mkdir(parents=True)
        # By descriptor, and taken literally: the path itself leads into the new, empty /run.
        mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{ours}", str(run_dir))
    os.close(ours)
    for path in HIDDEN:
        if os.path.isdir(path):
            mount("-t", "tmpfs", "tmpfs", path)


def init(run_dir: Path, work: Callable[[int], int]) -> int:
    """Be process 1 until `work` ends; it is told the process id that this has outside. Answers its exit code."""
    outer_pid = int(os.readlink("/proc/self"))  # /proc is still that of the namespace we were started from
    hide_the_host(run_dir)
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            code = work(outer_pid)
        except BaseException:  # nothing may get past the fork into what follows it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def forward(signum: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, forward)
    while True:
        pid, status = os.wait()
        if pid == worker:
            return os.waitstatus_to_exitcode(status) & 0xFF


def run(lab: Any, told: Told) -> int:
    """Bring a lab up (`start`), serve until told to stop (`serve`), take it down (`stop`). Answers an exit code."""
    try:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, stop)
        lab.start()
        told.say("ready")
        told.close()
        lab.serve()
    except Stopped:
        return 0
    except (Exception, SystemExit) as exc:  # Mininet exits when it misses something
        traceback.print_exc()
        told.say(f"failed: {exc}")
        return 1
    finally:
        lab.stop()
    return 0


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every lab is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--state-file", type=Path, required=True, help="what the node is to be")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--lock-fd", type=int, required=True, help="held for as long as the lab lives")
    parser.add_argument("--progress-fd", type=int, required=True)
    parser.add_argument("--limit-s", type=float, default=30.0, help="how long it may take")
    return parser


def begin(options: argparse.Namespace, work: Callable[[int, Told], int]) -> int:
    """Be process 1 of a lab."""
    for fd in (options.lock_fd, options.progress_fd):
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    if os.getpid() != 1:
        sys.exit("start this with: unshare --net --mount --pid --fork --kill-child")
    told = Told(options.progress_fd)
    try:
        return init(options.run_dir, lambda outer_pid: work(outer_pid, told))
    except Failure as exc:
        told.say(f"failed: {exc}")
        return 1
