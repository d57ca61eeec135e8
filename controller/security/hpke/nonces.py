"""Nonces that the router gives out and takes back once. Imports nothing of ours.

Giving one out stores nothing, so strangers cannot fill a table: a nonce carries its age and a keyed checksum over
itself and the connection it was given to. Only nonces that an authentic request has used are remembered, until they are
too old.

The key of the checksum is made when the process starts and is never written down. So what was sealed before a restart
is refused after it, with nothing on disk: a replay cache in a file would protect nothing more, because the connections
that its nonces are bound to ended with the old process.
"""

from __future__ import annotations

import hmac
import os
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from typing import Final

_AGE, _RANDOM, _MAC = 6, 10, 16
NONCE_BYTES: Final = _AGE + _RANDOM + _MAC


class Nonces:
    """`window_s`: how old a nonce may be. `capacity`: how many used ones are remembered; when full, all are refused.

    `monotonic` is a clock in seconds that never goes back.
    """

    def __init__(self, window_s: float, capacity: int, monotonic: Callable[[], float]) -> None:
        self._window_ms = int(window_s * 1000)
        self._capacity = capacity
        self._monotonic = monotonic
        self._key = os.urandom(32)
        self._offset_ms = int.from_bytes(os.urandom(5), "big")  # a nonce does not tell how long this machine is up
        self._used: OrderedDict[bytes, int] = OrderedDict()

    def issue(self, binding: bytes) -> bytes:
        """A nonce for that connection."""
        head = self._now_ms().to_bytes(_AGE, "big") + os.urandom(_RANDOM)
        return head + self._mac(head, binding)

    def doubt(self, nonce: bytes, binding: bytes) -> str | None:
        """Why it cannot be used on that connection now: a code, or None."""
        head, mac = nonce[:-_MAC], nonce[-_MAC:]
        if len(nonce) != NONCE_BYTES or not hmac.compare_digest(mac, self._mac(head, binding)):
            return "nonce"
        if self._now_ms() - int.from_bytes(head[:_AGE], "big") > self._window_ms:
            return "nonce-old"
        if nonce in self._used:
            return "replay"
        self._forget()
        return "full" if len(self._used) >= self._capacity else None

    def spend(self, nonce: bytes) -> None:
        """Remember that it was used."""
        self._used[nonce] = self._now_ms() + self._window_ms

    def _forget(self) -> None:
        now = self._now_ms()
        while self._used and next(iter(self._used.values())) < now:
            self._used.popitem(last=False)

    def _mac(self, head: bytes, binding: bytes) -> bytes:
        return hmac.digest(self._key, head + binding, sha256)[:_MAC]

    def _now_ms(self) -> int:
        return int(self._monotonic() * 1000) + self._offset_ms & (1 << 8 * _AGE) - 1
