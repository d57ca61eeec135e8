"""How often one part of the host may speak: one that is damaged again and again, or fails in ever new words, must not push
everything else out of the event log. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

BURST = 30
"""So many events of one part at once."""
EVERY_S = 10.0
"""Afterwards one in so long."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float
    withheld: int = 0

    def fill(self, now: float) -> None:
        self.tokens = min(float(BURST), self.tokens + max(0.0, now - self.at) / EVERY_S)
        self.at = now


class Limiter:
    """A token bucket for each part, by its key. `now` is of a monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, key: str, now: float) -> bool:
        """Whether it may be told; what may not is counted."""
        bucket = self._buckets.setdefault(key, _Bucket(float(BURST), now))
        bucket.fill(now)
        if bucket.tokens < 1:
            bucket.withheld += 1
            return False
        bucket.tokens -= 1
        return True

    def withheld(self, now: float) -> dict[str, int]:
        """How many events of which part have not been told, for those that may speak again; each is answered once."""
        out = {}
        for key, bucket in list(self._buckets.items()):
            bucket.fill(now)
            if bucket.withheld and bucket.tokens >= 1:
                bucket.tokens -= 1
                out[key], bucket.withheld = bucket.withheld, 0
            elif bucket.tokens >= BURST:
                del self._buckets[key]
        return out
