"""As whom the programs run that need no rights of root's. Standard library and resource only."""

from __future__ import annotations

import pwd
from dataclasses import dataclass

from controller.agent.resource import Failed

USER, NOBODY = "bulkhead", "nobody"
"""The user for it, and who stands in where there is none."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A user with the group that is theirs."""

    name: str
    uid: int
    gid: int


def identity(name: str | None = None) -> Identity:
    """Who that is; without a name `USER`, or `NOBODY`. Raises `Failed` where there is no such user."""
    for wanted in (USER, NOBODY) if name is None else (name,):
        try:
            found = pwd.getpwnam(wanted)
        except KeyError:
            continue
        return Identity(found.pw_name, found.pw_uid, found.pw_gid)
    raise Failed(f"there is no user {name or NOBODY}; make one: useradd --system --no-create-home {name or USER}")
