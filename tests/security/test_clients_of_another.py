"""Root's commands in the directory of a router that is another user, and may have been taken over."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.security.hpke import ClientKey, Registry

ROUTER_UID = 61_007


@pytest.fixture
def tmp() -> Iterator[Path]:
    """A directory that everybody can pass through."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-clients-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@pytest.fixture
def home(tmp: Path) -> Path:
    """The router's directory."""
    made = tmp / "router"
    made.mkdir(mode=0o700)
    os.chown(made, ROUTER_UID, ROUTER_UID)
    return made


def client(home: Path, *words: str, data: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from controller.cli import main; main()",
        "client",
        *words,
        "--security-dir",
        str(home),
    ]
    return subprocess.run(command, capture_output=True, text=True, input=data, timeout=20)


def linked(at: Path, to: Path) -> None:
    at.symlink_to(to)
    os.chown(at, ROUTER_UID, ROUTER_UID, follow_symlinks=False)


def test_what_root_registers_is_the_routers(home: Path) -> None:
    key = ClientKey.new("auth").public
    done = client(home, "register", "laptop", "-", data=f"{key}\n")
    assert done.returncode == 0, done.stderr
    made = [home / "hpke", home / "hpke/clients", home / f"hpke/clients/{key.id}.json"]
    assert {path.stat().st_uid for path in made} == {ROUTER_UID}
    assert client(home, "router-keys", "rotate").returncode == 0
    assert (home / "hpke/router-keys.json").stat().st_uid == ROUTER_UID
    assert "laptop" in client(home, "list").stdout
    assert client(home, "revoke", "laptop").returncode == 0


def test_root_does_not_write_where_a_link_of_the_routers_leads(home: Path, tmp: Path) -> None:
    precious = tmp / "etc"
    precious.mkdir(mode=0o755)
    linked(home / "hpke", precious)
    done = client(home, "register", "laptop", "-", data=f"{ClientKey.new('auth').public}\n")
    assert done.returncode == 2 and "Permission denied" in done.stderr
    assert client(home, "router-keys", "rotate").returncode == 2
    assert list(precious.iterdir()) == [] and precious.stat().st_uid == 0


def test_a_file_that_is_exchanged_while_root_writes_is_not_given_away(
    home: Path, tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious, sync = tmp / "shadow", os.fsync
    precious.write_text("root's")

    def exchanged(descriptor: int) -> None:
        sync(descriptor)
        for each in (home / "hpke/clients").glob(".*.new"):
            each.unlink()
            linked(each, precious)

    monkeypatch.setattr(os, "fsync", exchanged)
    Registry(home / "hpke").register("laptop", ClientKey.new("auth").public)
    assert precious.stat().st_uid == 0


def test_nobody_waits_for_a_pipe_or_reads_a_device_without_end(home: Path) -> None:
    there = home / "hpke/clients"
    there.mkdir(parents=True)
    os.mkfifo(there / f"{'a' * 32}.json")
    (there / f"{'b' * 32}.json").symlink_to("/dev/zero")
    assert Registry(home / "hpke").get("a" * 32) is None
    assert Registry(home / "hpke").get("b" * 32) is None
