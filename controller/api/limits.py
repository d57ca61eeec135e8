"""How much one caller may ask for: token buckets, of a bounded number. Standard library only."""

from __future__ import annotations

from collections import OrderedDict

MOST = 4096
"""So many callers are told apart; the one that was seen longest ago is forgotten."""


class Buckets:
    """A bucket per key, filled with `rate` a second up to `burst`. `now` is of a monotonic clock."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._state: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, now: float) -> float:
        """Take one; answers 0, or in how many seconds there is one again."""
        tokens, at = self._state.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + max(0.0, now - at) * self._rate)
        late = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._state[key] = (tokens if late else tokens - 1, now)
        if len(self._state) > MOST:
            self._state.popitem(last=False)
        return late
