"""One lab for all tests of a file that only use it; whoever breaks one starts their own. None stays longer: it works all the time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import demo, manager, places
from lab.manager import Status

STATE_FILE = places.example()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here makes network namespaces."""
    skip = pytest.mark.skip(reason="needs root, for network namespaces: sudo make test")
    for item in items:
        if Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(skip)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a short name, for sockets: pytest's own gets longer with every process that runs tests."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)  # what runs there without root's rights has to pass through
        yield Path(name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Status]:
    """The lab of the example state file, up."""
    run_dir = tmp_path_factory.mktemp("lab")
    status = manager.up(STATE_FILE, run_dir)
    yield status
    assert manager.down(run_dir)


@pytest.fixture
def fresh_lab(lab: Status) -> Status:
    """The same, with every learned return path forgotten."""
    for bridge in ("vmbr0", "vmbr1"):
        command = ["ovs-ofctl", "-O", "OpenFlow14", "del-flows", bridge, "table=60"]
        assert manager.exec(lab.run_dir, None, "host", command) == 0
    return lab


@pytest.fixture(scope="module")
def nodes_lab() -> Iterator[Status]:
    """The lab of whole nodes, up, with the laptop in the VPN. For tests that only use it."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-") as directory:
        Path(directory).chmod(0o711)  # resolvers have no rights there and have to pass through
        status = manager.up(STATE_FILE, Path(directory, "lab"), nodes=True)
        try:
            demo.connect_vpn(status)
            yield status
        finally:
            manager.down(status.run_dir)
