"""What the API finds when it starts without root's rights: directories of its own, and the way to what it reads.

Nothing is opened wider than for its own group. Imports identity and resource.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.agent.identity import Identity
from controller.agent.resource import Failed


@dataclass(frozen=True, slots=True)
class Ground:
    """The directories that matter to the API. `events` are the logs it reads."""

    run_dir: Path
    state_dir: Path
    events: tuple[Path, ...]

    @property
    def own(self) -> Path:
        """The API's own state directory."""
        return self.state_dir / "api"

    def prepare(self, who: Identity) -> None:
        """Make it so for `who`, in whatever state it is. Raises `Failed`.

        RUN_DIR            1775, our group: it makes its socket there, and cannot remove what others have made
        STATE_DIR          0710, our group: it passes through, and cannot see what is there
        STATE_DIR/api      0700, its own
        event logs         2750, our group: it reads them
        """
        with _explained():
            _directory(self.run_dir, 0, who.gid, 0o1775)
            _directory(self.state_dir, 0, who.gid, 0o710, keep=0o001)  # containers with users of their own pass through
            if _directory(self.own, who.uid, who.gid, 0o700):  # it has run as somebody else before
                for path in self.own.rglob("*"):
                    os.chown(path, who.uid, who.gid, follow_symlinks=False)
            for log in self.events:
                _directory(log, 0, who.gid, 0o2750)
                for path in log.iterdir():
                    os.chown(path, -1, who.gid, follow_symlinks=False)

    def missing(self, who: Identity, files: Sequence[Path]) -> Path | None:
        """The first of the files, or of what its process needs, that `who` cannot read; None if it can read all."""
        program = (Path(sys.executable), Path(__file__))
        logs = (self.run_dir, self.own, *self.events)
        wanted = (*program, *logs, *files)
        index = _as(
            who, lambda: next((n for n, path in enumerate(wanted) if not os.access(path, os.R_OK)), len(wanted))
        )
        return wanted[index] if index < len(wanted) else None


def _directory(path: Path, uid: int, gid: int, mode: int, keep: int = 0) -> bool:
    """Whether it was somebody else's. `keep` are bits of its mode that may be set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    # By descriptor: in a directory where others may write, a name may be a link a moment later.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if (found.st_uid, found.st_gid) != (uid, gid):
            os.fchown(descriptor, uid, gid)
        if stat.S_IMODE(found.st_mode) & ~keep != mode:
            os.fchmod(descriptor, mode | found.st_mode & keep)
        return (found.st_uid, found.st_gid) != (uid, gid)
    finally:
        os.close(descriptor)


def _as(who: Identity, function: Callable[[], int]) -> int:
    """What a function answers, below 255, in a process that runs as somebody else."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups(who.groups)
            os.setresgid(who.gid, who.gid, who.gid)
            os.setresuid(who.uid, who.uid, who.uid)
            os._exit(function())
        os._exit(255)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 255:
        raise Failed(f"user {who.name} cannot be tried; does this host let root change users?")
    return code


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise Failed(
            f"{exc.filename} cannot be prepared for the API: {exc.strerror}; mend it, or run without: --no-api"
        ) from exc


def explain(path: Path, who: Identity) -> str:
    """What to do about a file that the API cannot read."""
    closed = next((str(each) for each in reversed(path.parents) if not _passable(each, who)), None)
    way = f"chmod o+x {closed}" if closed is not None else f"chgrp {who.gid} {path}; chmod g+r {path}"
    return f"the API runs as {who.name}, who cannot read {path}; run: {way}; or run without the API: --no-api"


def _passable(directory: Path, who: Identity) -> bool:
    try:
        found = directory.stat()
    except OSError:
        return True
    groups = (who.gid, *who.groups)
    shift = 6 if found.st_uid == who.uid else 3 if found.st_gid in groups else 0
    return bool(found.st_mode >> shift & 1)
