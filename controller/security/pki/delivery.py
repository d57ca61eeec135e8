"""Directories of certificates for programs that run as other users, kept up to date by the CA's commands and by `accept`.
Imports disk and holder.

What runs as another user owns its directory and may have put links there, so it is that user who writes to it, not root.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from controller.problems import BulkheadError
from controller.security.pki import making
from controller.security.pki.disk import Disk, locked, read
from controller.security.pki.holder import Holder
from controller.security.pki.state import Export

_REFUSED, _BROKEN = 3, 4
_LONGEST_S = 20


def deliver(export: Export, holder: Holder) -> None:
    """Bring a directory up to date from a holder's, as its user. Raises `BulkheadError`.

    Where the certificate is there already only trust goes: it may be what has just been revoked.
    """
    directory = Path(export.directory)
    bundle = holder.bundle(export.name)
    with suppress(BulkheadError):
        if Holder(directory).current(export.name) == holder.current(export.name):
            bundle = holder.trust()
    if not export.owner or export.owner == os.geteuid():
        Holder(directory).accept(bundle, new_ca=True)
        return
    user = find_user(str(export.owner))
    if not directory.exists():
        if not directory.parent.is_dir():
            raise BulkheadError(f"{directory.parent} is no directory; make it, so that {user.pw_name} can pass through")
        Disk(owner=(user.pw_uid, user.pw_gid)).directory(directory)
    _as_user(user, lambda: Holder(directory).accept(bundle, new_ca=True))


def up_to_date(export: Export, holder: Holder) -> bool:
    """Whether a directory has what the CA's has."""
    there = Holder(Path(export.directory))
    try:
        return (
            [*map(making.pem_of, there.authorities())] == [*map(making.pem_of, holder.authorities())]
            and [*map(making.pem_of, there.revocations())] == [*map(making.pem_of, holder.revocations())]
            and there.current(export.name) == holder.current(export.name)
        )
    except BulkheadError:
        return False


class Deliveries:
    """The directories that a machine without the CA keeps up to date from its own, in `exports.json` there."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._file = holder.directory / "exports.json"

    def all(self) -> tuple[Export, ...]:
        """Those that are known. Raises `BulkheadError`."""
        try:
            return tuple(Export(**one) for one in json.loads(read(self._file) or b"[]"))
        except (ValueError, TypeError):
            raise BulkheadError(f"{self._file} is damaged; remove it, and export again: bulkhead pki export") from None

    def add(self, export: Export) -> None:
        """Have a directory, and keep it up to date from now on. Raises `BulkheadError`."""
        deliver(export, self._holder)
        self._change(lambda known: (*(one for one in known if one.directory != export.directory), export))

    def forget(self, directory: Path) -> None:
        """Keep a directory up to date no more; what is in it stays. Raises `BulkheadError`."""
        known = ", ".join(one.directory for one in self.all()) or "none"
        if str(directory) not in {one.directory for one in self.all()}:
            raise BulkheadError(f"{directory} is not kept up to date; these are: {known}")
        self._change(lambda known: tuple(one for one in known if one.directory != str(directory)))

    def refresh(self) -> list[str]:
        """Bring all that are behind up to date; for each that cannot be, why."""
        failed = []
        for export in self.behind():
            try:
                deliver(export, self._holder)
            except BulkheadError as exc:
                failed.append(f"{export.directory}: {exc}")
        return failed

    def behind(self) -> list[Export]:
        """Those that are not up to date."""
        return [export for export in self.all() if not up_to_date(export, self._holder)]

    def _change(self, change: Callable[[tuple[Export, ...]], tuple[Export, ...]]) -> None:
        with locked(self._holder.directory):
            text = json.dumps([asdict(one) for one in change(self.all())], indent=1)
            self._holder.disk.write(self._file, f"{text}\n".encode())


def find_user(name: str) -> pwd.struct_passwd:
    """A user by name or number. Raises `BulkheadError`."""
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        raise BulkheadError(f"there is no user {name}; make one: useradd --system --no-create-home {name}") from None


def _as_user(user: pwd.struct_passwd, what: Callable[[], object]) -> None:
    """Do something in a child that has only that user's rights. Its memory is not open to the user: the kernel sees to that
    for whoever changes its user."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        code = _BROKEN
        try:
            os.close(readable)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_LONGEST_S)
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            what()
            code = 0
        except BulkheadError as exc:
            os.write(writable, f"as {user.pw_name}: {exc}".encode()[:4000])
            code = _REFUSED
        except BaseException as exc:
            os.write(writable, traceback.format_exception_only(exc)[-1].encode()[:4000])
        finally:
            os._exit(code)
    os.close(writable)
    with os.fdopen(readable, "rb") as said:
        text = said.read().decode(errors="replace").strip()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise BulkheadError(text or f"what was to be done as {user.pw_name} was ended by a signal; try again")
