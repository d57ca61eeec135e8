"""How much a run of the tests tries of what could be tried without end."""

from __future__ import annotations

import os

FULL = bool(os.environ.get("BULKHEAD_FULL"))


def examples(number: int) -> int:
    """So many random examples with BULKHEAD_FULL=1, half of them otherwise. They are others in every run."""
    return number if FULL else number // 2
