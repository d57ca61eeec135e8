"""Files that `ip netns exec` shows to what runs in a namespace (ip-netns(8)). Imports files, hostmodel and resource."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from controller.agent.files import read_or_none, write_atomically
from controller.agent.resource import Change, Sign
from controller.agent.run import PREFIX
from controller.hostmodel import Container, Zone

NETNS_ETC = Path("/etc/netns")


def resolvers(container: Container, zone: Zone | None) -> str:
    """A container's resolv.conf."""
    lines = [f"nameserver {address}" for address in container.dns]
    return "\n".join([*([f"search {zone.domain}"] if zone is not None else []), *lines, ""])


class TextFile:
    """A file that everybody may read."""

    period = 1.0

    def __init__(self, path: Path, text: str | Callable[[], str], needs: tuple[str, ...] = ()) -> None:
        self._path = path
        self._text = text if callable(text) else lambda: text
        self.key = f"file/{path}"
        self.needs = needs

    async def diff(self) -> list[Change]:
        found = read_or_none(self._path)
        if found == self._text():
            return []
        sign, why = (Sign.ADD, "missing") if found is None else (Sign.CHANGE, "it says something else")
        return [Change(sign, f"file {self._path}", why, self._write)]

    async def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, self._text(), 0o644)


def our_directories() -> list[str]:
    """Names below /etc/netns that are ours."""
    return sorted(path.name for path in NETNS_ETC.glob(f"{PREFIX}*"))


def remove_directory(name: str) -> None:
    """Take one of them away, and /etc/netns with the last."""
    shutil.rmtree(NETNS_ETC / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # others have files in it, or it is a mount
        NETNS_ETC.rmdir()
