"""Runs a test in a process with namespaces of its own for network, mounts and process ids, so that /run/netns is empty
and everything that was started ends with the test."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path

from lab.ovs import die_with_parent

_NEWNS, _NEWPID, _NEWNET = 0x00020000, 0x20000000, 0x40000000
_SCRIPT = """
mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs run /run && mkdir /run/netns /run/wireguard &&
ip link set lo up
"""


def apart(
    test: Callable[[Path], Coroutine[None, None, None]],
) -> Callable[[], None]:
    """Have `test` run so; it is given a directory of its own that others can pass through, gone afterwards."""

    @functools.wraps(test)
    def run() -> None:
        with tempfile.TemporaryFile() as told, tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
            Path(directory).chmod(0o711)
            child = os.fork()
            if child == 0:
                os._exit(_outer(test, Path(directory), told.fileno()))
            _, status = os.waitpid(child, 0)
            told.seek(0)
            text = told.read().decode(errors="replace")
        if os.waitstatus_to_exitcode(status):
            raise AssertionError(f"in its own namespaces:\n{text}")
        sys.stdout.write(text)

    del run.__wrapped__  # type: ignore[attr-defined]  # or pytest would see the parameter
    return run


def _outer(test: Callable[[Path], Coroutine[None, None, None]], directory: Path, told: int) -> int:
    die_with_parent()
    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if ctypes.CDLL(None, use_errno=True).unshare(_NEWNS | _NEWPID | _NEWNET):
        print("no namespaces:", os.strerror(ctypes.get_errno()))
        return 1
    child = os.fork()  # the first process in there: when it ends, all that it has started ends
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    die_with_parent()
    try:
        subprocess.run(["sh", "-ec", _SCRIPT], check=True)
        asyncio.run(asyncio.wait_for(test(directory), 60))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
