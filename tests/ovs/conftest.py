"""Fixtures of the tests on a real Open vSwitch. They need root and Open vSwitch, and are skipped where either lacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ovs.node import Node

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, and skip what cannot run here."""
    why = "needs root" if os.geteuid() else "" if shutil.which("ovs-vswitchd") else "needs Open vSwitch"
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.ovs)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A node with a running controller, every bridge as declared. One for all tests of a file."""
    with Node() as built:
        built.controller.start()
        yield built


@pytest.fixture
def fresh() -> Iterator[Node]:
    """A node of the test's own, the controller not started yet."""
    with Node() as built:
        yield built
