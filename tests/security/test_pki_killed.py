"""A CA whose process is killed at every step of every change: what is in use works at once, and the same again completes it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from controller.problems import BulkheadError
from controller.security.pki import Holder, Pki, archive
from controller.security.pki.disk import Disk
from controller.security.pki.identity import Identity, Usage
from controller.security.pki.trial import try_pair

NAMES = ("router1", "inf1", "caller")
STRIDE = 1 if os.environ.get("BULKHEAD_FULL") else 4
"""Of the longest changes, every so many steps are tried."""
Change = Callable[[Pki], object]


def made(directory: Path) -> Path:
    """A CA with a few certificates."""
    pki = Pki(directory)
    pki.init("home")
    pki.issue("router1", "server", ["10.0.0.1"])
    pki.issue("inf1", "peer", ["10.0.0.2"])
    pki.issue("caller", "client")
    return directory


def steps(*moves: str) -> Change:
    """Steps of the CA's replacement, without the wait between."""

    def change(pki: Pki) -> None:
        for move in moves:
            pki.rotate_ca(move, settle_s=0)

    return change


CHANGES: dict[str, tuple[Change, Change]] = {
    "issue": (steps(), lambda pki: pki.issue("router2", "server", ["10.0.0.3"])),
    "issue anew": (steps(), lambda pki: pki.issue("router1", "server", ["10.0.0.9"])),
    "renew": (steps(), lambda pki: pki.renew("router1")),
    "revoke": (steps(), lambda pki: pki.revoke("caller")),
    "prepare": (steps(), steps("prepare")),
    "prepare again": (steps("prepare", "switch", "finish"), steps("prepare")),
    "switch": (steps("prepare"), steps("switch")),
    "finish": (steps("prepare", "switch"), steps("finish")),
    "back from prepared": (steps("prepare"), steps("back")),
    "back from switched": (steps("prepare", "switch"), lambda pki: wanted(pki, "prepared")),
    "back from finished": (steps("prepare", "switch", "finish"), lambda pki: wanted(pki, "switched")),
}


def wanted(pki: Pki, phase: str) -> None:
    """Go back, or complete that, until the replacement is in a phase: to go back again would go further back."""
    if pki.state.phase != phase or (pki.behind(pki.state) and phase == "prepared"):
        pki.rotate_ca("back", settle_s=0)
    else:
        pki.mend()


def killed(directory: Path, change: Change, at: int) -> bool:
    """Make the change in a process that is killed at a step; False if it has fewer."""
    child = os.fork()
    if child == 0:
        left = at

        def step(_what: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            change(Pki(directory, disk=Disk(step)))
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def works(directory: Path, *names: str) -> None:
    """Everybody's certificate makes a handshake with what is on the disk right now."""
    holder = Holder(directory)
    for name in names:
        try_pair(holder.link(name), holder.ca, holder.crl)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: every step is flushed to the disk, and hundreds are taken."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture(params=CHANGES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A change and a CA it can be made in."""
    directory = made(tmp_path / "before")
    CHANGES[request.param][0](Pki(directory))
    return request.param, directory


def test_killed_at_every_step(case: tuple[str, Path], tmp_path: Path) -> None:
    """Never without a working certificate, and the same command again gets to the end."""
    name, before = case
    change = CHANGES[name][1]
    at = 0
    while True:
        directory = tmp_path / f"{at}"
        shutil.copytree(before, directory, symlinks=True)
        if not killed(directory, change, at):
            break
        works(directory, "router1", "inf1")
        if name != "revoke":
            works(directory, "caller")
        change(Pki(directory))
        works(directory, "router1", "inf1")
        pki = Pki(directory)
        assert not pki.behind(pki.state) or name.startswith("prepare")
        assert not list(directory.rglob(".*.new"))
        assert {path.name for path in (directory / "ca").iterdir()} == {one.id for one in pki.state.authorities}
        assert not [
            path
            for path in directory.rglob("*")
            if path.is_file() and path.stat().st_mode & 0o077 and "events" not in str(path)
        ]
        if name == "revoke":
            with pytest.raises(BulkheadError, match="revoked"):
                works(directory, "caller")
        at += STRIDE if "switch" in name else 1
        shutil.rmtree(directory)
    assert at >= 4


def test_killed_while_it_is_made(tmp_path: Path) -> None:
    """`init` can be run again after any end."""
    at = 0
    while killed(tmp_path / f"{at}", lambda pki: pki.init("home"), at):
        pki = Pki(tmp_path / f"{at}")
        pki.init("home")
        pki.issue("a", "server")
        works(pki.directory, "a")
        at += 1
    assert at > 10


def test_killed_while_it_is_restored(tmp_path: Path) -> None:
    """There is always a whole CA, and what was revoked stays so."""
    before = made(tmp_path / "before")
    archive.backup(before, tmp_path / "backup")
    Pki(before).revoke("caller")
    at = 0
    while True:
        directory = tmp_path / f"{at}" / "pki"
        shutil.copytree(before, directory, symlinks=True)
        again = partial(archive.restore, tmp_path / "backup", directory, over=True)
        if not killed(directory, lambda pki, again=again: again(disk=pki.holder.disk), at):
            break
        works(directory, "router1", "inf1")
        assert Pki(directory).revoked("caller")
        again()
        Pki(directory).mend()
        works(directory, "router1", "inf1")
        with pytest.raises(BulkheadError, match="revoked"):
            works(directory, "caller")
        assert not list(directory.parent.glob(".*"))
        at += 1
    assert at > 2


def test_killed_while_a_directory_is_delivered(tmp_path: Path) -> None:
    """What other programs use works too, and is behind for no longer than until the next command."""
    before, used = made(tmp_path / "before"), tmp_path / "used"
    Pki(before).export("inf1", used)
    at = 0
    while True:
        directory = tmp_path / f"{at}"
        shutil.copytree(before, directory, symlinks=True)
        if not killed(directory, lambda pki: pki.renew("inf1"), at):
            break
        works(directory, "inf1")
        works(used, "inf1")
        Pki(directory).mend()
        works(used, "inf1")
        assert Holder(used).current("inf1") == Holder(directory).current("inf1")
        at += 1
    assert at > 10


def test_killed_while_a_bundle_is_taken_up(tmp_path: Path) -> None:
    """A machine that has only its own key goes on with the old certificate or has the new one."""
    pki = Pki(tmp_path / "ca")
    pki.init("home")
    there = Holder(tmp_path / "there")
    who = Identity.checked("inf1", Usage.PEER, ["10.0.0.2"])
    there.accept(pki.sign(there.request(who), who))
    bundle = pki.sign(there.request(who))
    at = 0
    while True:
        directory = tmp_path / f"{at}"
        shutil.copytree(there.directory, directory, symlinks=True)
        if not killed(directory, lambda pki: Holder(pki.directory, pki.holder.disk).accept(bundle), at):
            break
        works(directory, "inf1")
        Holder(directory).accept(bundle)
        works(directory, "inf1")
        assert not list((directory / "requests" / "inf1").iterdir())
        at += 1
    assert at > 5
