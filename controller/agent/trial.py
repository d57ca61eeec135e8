"""A host firewall on trial: rolled back unless somebody confirms it in time.

The roll-back is done by a process of its own, `python -m controller.agent.trial RUN_DIR MARK`, which outlives the
command that began the trial, its terminal and its session. Should it be killed as well, the agent does it. A table that
was rolled back is remembered, so that the agent does not shut out again whom it has shut out. Imports files, nft,
resource, run.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

from controller.agent.files import read_or_none, write_atomically
from controller.agent.nft import Kept, NftTable, kept_path, listing, read_kept, text_digest, transaction, write_kept
from controller.agent.resource import Failed
from controller.agent.run import call, environment

FAMILY = "inet"
TRIAL, REJECTED, LOCK = "firewall-trial.json", "firewall-rejected", "firewall.lock"
LATE_S = 3.0
"""So long after a trial's end the process that should have rolled it back counts as gone."""
_START_S, _POLL_S, _AGAIN_S = 10.0, 0.2, 1.0


@dataclass(frozen=True, slots=True)
class Trial:
    """A table on trial until `deadline_s` (CLOCK_BOOTTIME, so that it ends during a suspend as well).

    `digest` is of the text on trial; `before` is what to load at its end, None for no table, and `before_kept` what was
    remembered of that.
    """

    mark: str
    deadline_s: float
    digest: str
    before: str | None
    before_kept: Kept | None

    @property
    def left_s(self) -> float:
        """Seconds until the end; negative afterwards."""
        return self.deadline_s - _now()

    @property
    def overdue(self) -> bool:
        """Whether it should have been rolled back, and nobody has done it."""
        return self.left_s < -LATE_S


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_trial(run_dir: Path) -> Trial | None:
    """The trial that is under way or overdue, None if there is none."""
    text = read_or_none(run_dir / TRIAL)
    if text is None:
        return None
    try:
        found = json.loads(text)
        kept, before = found["before_kept"], found["before"]
        return Trial(
            str(found["mark"]),
            float(found["deadline_s"]),
            str(found["digest"]),
            None if before is None else str(before),
            None if kept is None else Kept(**kept),
        )
    except (ValueError, KeyError, TypeError):
        return None


def pending(run_dir: Path) -> bool:
    """Whether a table is on trial, so that nobody else may touch it."""
    return read_trial(run_dir) is not None


def rejected(run_dir: Path) -> str | None:
    """The digest of the table that was tried last and rolled back."""
    return read_or_none(run_dir / REJECTED)


async def load_table(run_dir: Path, text: str) -> None:
    """Load a host table for good. Raises `Failed`, also while another is on trial."""
    async with locked(run_dir):
        await _no_trial(run_dir)
        await NftTable(FAMILY, text, run_dir).load()
        (run_dir / REJECTED).unlink(missing_ok=True)


async def try_table(run_dir: Path, text: str, wait_s: float) -> None:
    """Load a host table that is rolled back after `wait_s` unless `confirm` is called before. Raises `Failed`.

    Whoever rolls it back is watching before anything is loaded.
    """
    async with locked(run_dir):
        await _no_trial(run_dir)
        found, kept = await listing(FAMILY), read_kept(kept_path(run_dir, FAMILY))
        # nft cannot read everything it prints; what it has loaded it can.
        before = kept.text if kept is not None and kept.listing == found else found
        trial = Trial(secrets.token_hex(8), _now() + wait_s, text_digest(text), before, kept)
        write_atomically(run_dir / TRIAL, json.dumps(asdict(trial)))
        try:
            await asyncio.to_thread(_start_guard, run_dir, trial.mark)
            await NftTable(FAMILY, text, run_dir).load()
        except BaseException:
            await _restore(run_dir, trial)
            raise
        (run_dir / REJECTED).unlink(missing_ok=True)


async def confirm(run_dir: Path) -> None:
    """Keep the table that is on trial. Raises `Failed` if none is, or no longer."""
    async with locked(run_dir):
        trial = read_trial(run_dir)
        if trial is None:
            gone = ": the last one was rolled back, apply it again" if rejected(run_dir) else ""
            raise Failed(f"no firewall is on trial{gone}")
        if trial.left_s <= 0:
            raise Failed("too late: the firewall on trial is being rolled back; apply it again")
        (run_dir / TRIAL).unlink(missing_ok=True)


async def roll_back(run_dir: Path, mark: str | None = None) -> bool:
    """End the trial (the one of that mark) by loading what was there before; False if there is none. Raises `Failed`."""
    async with locked(run_dir):
        trial = read_trial(run_dir)
        if trial is None or mark not in (None, trial.mark):
            return False
        write_atomically(run_dir / REJECTED, trial.digest)
        await _restore(run_dir, trial)
        return True


def end_trial(run_dir: Path) -> None:
    """Forget the trial, with the lock held, by whoever takes its table away."""
    (run_dir / TRIAL).unlink(missing_ok=True)
    (run_dir / REJECTED).unlink(missing_ok=True)


async def _restore(run_dir: Path, trial: Trial) -> None:
    try:
        await call("nft", "-f", "-", stdin=transaction(FAMILY, trial.before or ""))
    except Failed as exc:
        raise Failed(f"the firewall cannot be rolled back: {exc}") from exc
    path = kept_path(run_dir, FAMILY)
    if trial.before_kept is None:
        path.unlink(missing_ok=True)
    else:
        write_kept(path, trial.before_kept)
    # Last, so that it is done again if this process is killed on the way.
    (run_dir / TRIAL).unlink(missing_ok=True)


async def _no_trial(run_dir: Path) -> None:
    trial = read_trial(run_dir)
    if trial is None:
        return
    if trial.overdue:
        await _restore(run_dir, trial)
        return
    commands = "bulkhead firewall confirm, or bulkhead firewall rollback"
    raise Failed(f"a firewall is on trial for another {max(0, trial.left_s):.0f} s; run: {commands}")


@contextlib.asynccontextmanager
async def locked(run_dir: Path) -> AsyncIterator[None]:
    """Nobody else loads the host's table meanwhile."""
    run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------ the guard


def _start_guard(run_dir: Path, mark: str) -> None:
    """Start the process that rolls back, and wait until it watches. Raises `Failed`."""
    command = [sys.executable, "-m", "controller.agent.trial", str(run_dir.absolute()), mark]
    if Path("/run/systemd/system").is_dir() and shutil.which("systemd-run"):
        # logind may end all processes of a session that is lost; one in a scope of its own is not of the session.
        if _started(["systemd-run", "--scope", "--quiet", "--collect", *command]):
            return
    if not _started(command):
        raise Failed("the process that would roll the firewall back does not start; nothing was loaded")


def _started(command: list[str]) -> bool:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={**environment(), "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        readable, _, _ = select.select([process.stdout], [], [], _START_S)
        if readable and os.read(process.stdout.fileno(), 16):
            return True
    process.kill()
    process.wait()
    return False


def guard(run_dir: Path, mark: str) -> None:
    """Wait for the end of the trial of that mark, then roll it back, again and again until it is done."""
    # Whoever reads this goes away at the first byte: print would write twice where output is unbuffered.
    with contextlib.suppress(OSError):
        os.write(1, b"watching\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while (trial := read_trial(run_dir)) is not None and trial.mark == mark:
        if (left_s := trial.left_s) > 0:
            time.sleep(min(_POLL_S, left_s))
            continue
        try:
            asyncio.run(roll_back(run_dir, mark))
        except Exception:  # there is nobody to tell, and nobody else to do it
            time.sleep(_AGAIN_S)


if __name__ == "__main__":
    guard(Path(sys.argv[1]), sys.argv[2])
