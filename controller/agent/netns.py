"""Work inside a network namespace, without leaving this process. Imports resource."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from controller.agent.resource import Failed

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def in_namespace(path: Path, function: Callable[[], T]) -> T:
    """Call `function` in the network namespace at `path` (setns(2)) and answer what it answers.

    It runs in a thread of its own, since a namespace is a thread's; sockets made there stay there. Raises what it
    raises, and `Failed` where there is no such namespace.
    """
    out: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _LIBC.setns(descriptor, _CLONE_NEWNET):
                    code = ctypes.get_errno()
                    raise Failed(f"{path} cannot be entered: {os.strerror(code)}")
            finally:
                os.close(descriptor)
            out.append(function())
        except FileNotFoundError as exc:
            failure.append(Failed(f"there is no network namespace {path}") if exc.filename == str(path) else exc)
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return out[0]
