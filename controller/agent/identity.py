"""As whom the programs run that need no rights of root's. Standard library and resource only."""

from __future__ import annotations

import grp
import pwd
from dataclasses import dataclass

from controller.agent.resource import Failed

USER = "bulkhead"
"""The user for it, and a group whose members may use the API."""
NUMBER = 61573
"""Stands in where there is no such user: a number from the range that systemd gives to services for a while, and that is
nobody's. `nobody` is not nobody: resolvers and other people's services run so."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A user, the group that is theirs, and others they are in."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def identity(name: str | None = None) -> Identity:
    """Who that is, by name or number; without one `USER`, or a number that no user has. Raises `Failed`."""
    if name is not None and name.isdecimal() and int(name) > 0:
        return _numbered(int(name))
    try:
        found = pwd.getpwnam(name or USER)
    except KeyError:
        if name is not None:
            raise Failed(f"there is no user {name}; make one: useradd --system --no-create-home {name}") from None
        taken = {each.pw_uid for each in pwd.getpwall()} | {each.gr_gid for each in grp.getgrall()}
        return _numbered(next(number for number in range(NUMBER, 65520) if number not in taken))
    if found.pw_uid == 0:
        raise Failed("the API needs no rights of root's and is not run as root; name another user with --api-user")
    return Identity(found.pw_name, found.pw_uid, found.pw_gid, _groups(found.pw_name, found.pw_gid))


def _numbered(number: int) -> Identity:
    try:
        found = pwd.getpwuid(number)
    except KeyError:
        return Identity(str(number), number, number, _groups(None, number))
    return Identity(found.pw_name, found.pw_uid, found.pw_gid, _groups(found.pw_name, found.pw_gid))


def _groups(name: str | None, gid: int) -> tuple[int, ...]:
    """The user's groups, and the one whose members may use the API: its socket is given to them."""
    there = {each.gr_gid for each in grp.getgrall() if name in each.gr_mem or each.gr_name == USER}
    return tuple(sorted(there - {gid}))
