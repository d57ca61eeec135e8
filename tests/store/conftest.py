"""Fixtures of the store's tests, which are skipped where Open vSwitch's database server is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.store import Store
from tests.fakes.stores import Server, opened, served

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here."""
    if shutil.which("ovsdb-server") is None and not Path("/usr/sbin/ovsdb-server").exists():
        for item in items:
            if item.path.parent == HERE:
                item.add_marker(pytest.mark.skip(reason="needs ovsdb-server"))


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own."""
    with served() as running:
        yield running


@pytest.fixture
def store(server: Server) -> Iterator[Store]:
    """A store on it."""
    with opened(server.address) as running:
        yield running
