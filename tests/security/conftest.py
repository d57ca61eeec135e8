"""The guide's machines, for all files that use them. What takes long in here is tried with BULKHEAD_FULL=1 only, so that the
default run stays below ten minutes on two cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab.guide import Guide

LONG = ("test_wg.py", "test_role_firewall.py", "test_router.py", "test_router_limits.py", "test_router_reload.py")
collect_ignore = [] if os.environ.get("BULKHEAD_FULL") else list(LONG)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    """The guide's machines, up; they are gone with the file that uses them."""
    with Guide(tmp_path_factory.mktemp("guide")) as made:
        made.start()
        yield made
