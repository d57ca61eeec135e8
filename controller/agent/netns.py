"""Does things in another network namespace: a thread of its own goes there, and never comes back.

Threads have network namespaces of their own, so nobody else in this process is moved. What is opened there (sockets,
files below /proc/sys/net) stays in that namespace. Imports resource and run.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from controller.agent.resource import Failed
from controller.agent.run import NETNS_DIR

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def namespace_path(namespace: str | Path | None) -> Path | None:
    """Where a network namespace is found: a name stands for /run/netns/NAME, a path for itself, None for our own."""
    return None if namespace is None else NETNS_DIR / namespace


def exists(namespace: str | Path | None) -> bool:
    """Whether that namespace is there."""
    path = namespace_path(namespace)
    return path is None or path.exists()


async def in_namespace(namespace: str | Path | None, function: Callable[[], T]) -> T:
    """What `function` answers, called in a network namespace: a name, a path such as /proc/1/ns/net, None for our own.

    It runs in a thread of its own, which ends with it, and must not rest on the event loop. Raises `Failed` if the
    namespace cannot be entered, `FileNotFoundError` if there is none, and what `function` raises.
    """
    path = namespace_path(namespace)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns") as threads:
        return await asyncio.get_running_loop().run_in_executor(threads, _there, path, function)


def run_in_namespace(namespace: str | Path | None, function: Callable[[], T]) -> T:
    """The same for callers without an event loop."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns") as threads:
        return threads.submit(_there, namespace_path(namespace), function).result()


def _there(path: Path | None, function: Callable[[], T]) -> T:
    if path is not None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _LIBC.setns(descriptor, _CLONE_NEWNET):
                number = ctypes.get_errno()
                hint = "; run the agent as root" if os.geteuid() else ""
                raise Failed(f"{path}: cannot enter this network namespace: {os.strerror(number)}{hint}")
        finally:
            os.close(descriptor)
    return function()
