"""What the workers of a router share: how fast each client asks, and how many requests there are. Imports nothing of ours.

A table in memory that every worker maps. There are no locks: each value is one aligned word. Two workers that write a
client's word at once may let one request more in, and nothing else.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from typing import Final

_SLOTS: Final = 1 << 15
_PROBES: Final = 8
_REMEMBERED: Final = 4096
WORKERS: Final = 64
_ENTRY: Final = struct.Struct("=Qd")
_COUNT: Final = struct.Struct("=q")
_COUNTS: Final = struct.Struct(f"={WORKERS}q")
_HEAD: Final = 16 + WORKERS * _COUNT.size
SIZE: Final = _HEAD + _SLOTS * _ENTRY.size


def new() -> int:
    """A file descriptor of a new table. The key in it keeps strangers from choosing whose slot they share."""
    fd = os.memfd_create("bulkhead-router", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, os.urandom(16), 0)
    return fd


class Shared:
    """The table as worker `number` sees it. `per_s` requests of a client are let in, `burst` at once."""

    def __init__(self, fd: int, number: int, per_s: float, burst: float | None = None) -> None:
        self._map = mmap.mmap(fd, SIZE)
        self._key = bytes(self._map[:16])
        self._own = 16 + number * _COUNT.size
        self._places: dict[bytes, tuple[int, int]] = {}
        self._step = 1.0 / per_s
        self._slack = max(0.0, (per_s if burst is None else burst) - 1.0) / per_s
        self.running(0)

    def admit(self, client: bytes, now: float) -> float:
        """0 if that client may ask now, which is counted; otherwise after how many seconds it may. `now` is monotonic.

        A client has one number: when it would have been due, had it asked evenly (the generic cell rate algorithm).
        """
        tag, start = self._place(client)
        at, due = self._find(tag, start, now)
        wait = due - self._slack - now
        if wait > 0:
            return wait
        _ENTRY.pack_into(self._map, at, tag, max(due, now) + self._step)
        return 0.0

    def _place(self, client: bytes) -> tuple[int, int]:
        found = self._places.get(client)
        if found is None:
            digest = hashlib.blake2b(client, key=self._key, digest_size=16).digest()
            found = int.from_bytes(digest[:8], "big") or 1, int.from_bytes(digest[8:], "big")
            if len(self._places) >= _REMEMBERED:
                self._places.clear()
            self._places[client] = found
        return found

    def _find(self, tag: int, start: int, now: float) -> tuple[int, float]:
        """Where the client's entry is or goes, and when it is due."""
        oldest, oldest_due = 0, float("inf")
        for probe in range(_PROBES):
            at = _HEAD + (start + probe) % _SLOTS * _ENTRY.size
            there, due = _ENTRY.unpack_from(self._map, at)
            if there == tag:
                return at, due
            if due < oldest_due:
                oldest, oldest_due = at, due
        # All are busy: the one that asks least shares with this one, so a flood of names gains nobody anything.
        return oldest, oldest_due if oldest_due > now else 0.0

    def running(self, count: int) -> None:
        """Say how many requests this worker has."""
        _COUNT.pack_into(self._map, self._own, count)

    def total(self) -> int:
        """How many requests all workers have."""
        return sum(_COUNTS.unpack_from(self._map, 16))
