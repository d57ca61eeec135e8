"""What a CA knows, as one value and one file: its keys' roles, whom it has signed what for, who is revoked.

The file is replaced as a whole, so it is what decides how far anything has come. Imports identity and problems.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

from controller.problems import BulkheadError
from controller.security.pki.identity import Identity, Usage

FORGET_S = 86400.0
"""Certificates that ended longer ago are not remembered."""


class Role(StrEnum):
    """What a CA is there for. `next` and `old` are trusted beside the `active` one, `retired` ones are not."""

    ACTIVE = "active"
    NEXT = "next"
    OLD = "old"
    RETIRED = "retired"


class Phase(StrEnum):
    """How far the CA's replacement has come."""

    STEADY = "steady"
    PREPARED = "prepared"
    SWITCHED = "switched"


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA by the name of its directory."""

    id: str
    role: Role


@dataclass(frozen=True, slots=True)
class Entry:
    """A certificate that was signed. Times are seconds since 1970; `key` is the SHA-256 of the public key."""

    serial: str
    name: str
    authority: str
    key: str
    not_before: float
    not_after: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """A directory that is kept up to date for the programs that use a name; `owner` is a user's number, None for ours."""

    directory: str
    name: str
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Everything a CA knows. `revoked` has names, and since when; `alarmed` is what events were written about."""

    name: str
    authorities: tuple[Authority, ...]
    identities: tuple[Identity, ...] = ()
    entries: tuple[Entry, ...] = ()
    revoked: Mapping[str, float] = field(default_factory=dict)
    alarmed: tuple[str, ...] = ()
    exports: tuple[Export, ...] = ()

    @property
    def active(self) -> str:
        """The CA that signs."""
        return next(one.id for one in self.authorities if one.role is Role.ACTIVE)

    @property
    def trusted(self) -> tuple[str, ...]:
        """The CAs that are trusted now, the one that signs first."""
        found = [one for one in self.authorities if one.role is not Role.RETIRED]
        return tuple(one.id for one in sorted(found, key=lambda one: one.role is not Role.ACTIVE))

    @property
    def phase(self) -> Phase:
        """How far the CA's replacement has come."""
        roles = {one.role for one in self.authorities}
        return Phase.PREPARED if Role.NEXT in roles else Phase.SWITCHED if Role.OLD in roles else Phase.STEADY

    def of_role(self, role: Role) -> str | None:
        """The CA of that role."""
        return next((one.id for one in self.authorities if one.role is role), None)

    def with_roles(self, roles: Mapping[Role, Role | None]) -> State:
        """The same with roles exchanged; None lets a CA go."""
        new = [replace(one, role=to) for one in self.authorities if (to := roles.get(one.role, one.role)) is not None]
        return replace(self, authorities=tuple(new))

    def identity(self, name: str) -> Identity | None:
        """Whom the name stands for."""
        return next((one for one in self.identities if one.name == name), None)

    def with_identity(self, identity: Identity) -> State:
        """The same, with this one known."""
        others = [one for one in self.identities if one.name != identity.name]
        return replace(self, identities=tuple(sorted([*others, identity], key=lambda one: one.name)))

    def newest(self, name: str) -> Entry | None:
        """The certificate that was signed last for a name."""
        return next((one for one in reversed(self.entries) if one.name == name), None)

    def with_entry(self, entry: Entry) -> State:
        """The same, with one more certificate signed; what ended long ago is forgotten."""
        kept = [
            one for one in self.entries if one.not_after + FORGET_S > entry.not_before or self.newest(one.name) is one
        ]
        return replace(self, entries=(*kept, entry))

    def serials_revoked(self, authority: str) -> dict[int, float]:
        """What a CA's list of revocations has to have."""
        return {
            int(one.serial, 16): one.revoked_at
            for one in self.entries
            if one.authority == authority and one.revoked_at is not None
        }

    def with_revoked(self, name: str, now: float) -> State:
        """The same, with every certificate of that name revoked, and the name for the time to come."""
        entries = [
            replace(one, revoked_at=now) if one.name == name and one.revoked_at is None else one for one in self.entries
        ]
        return replace(self, entries=tuple(entries), revoked={name: now, **self.revoked})

    def with_earlier_revoked(self, name: str, now: float) -> State:
        """The same, with every certificate of that name revoked but the last."""
        last = self.newest(name)
        entries = [
            replace(one, revoked_at=now) if one.name == name and one is not last and one.revoked_at is None else one
            for one in self.entries
        ]
        return replace(self, entries=tuple(entries))

    def to_json(self) -> bytes:
        """The file's text."""
        return (json.dumps({"version": 1, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, what: str) -> Self:
        """The state in a file's text. Raises `BulkheadError`."""
        try:
            found: dict[str, Any] = json.loads(text)
            if found.pop("version") != 1:
                raise BulkheadError(f"{what} is of another version of this program; install that one")
            identities = (Identity(**_identity(one)) for one in found.pop("identities"))
            return cls(
                authorities=tuple(Authority(one["id"], Role(one["role"])) for one in found.pop("authorities")),
                identities=tuple(identities),
                entries=tuple(Entry(**one) for one in found.pop("entries")),
                alarmed=tuple(found.pop("alarmed")),
                exports=tuple(Export(**one) for one in found.pop("exports")),
                **found,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BulkheadError(f"{what} is damaged; restore a back-up: bulkhead pki restore FILE --replace") from None


def _identity(one: dict[str, Any]) -> dict[str, Any]:
    return {**one, "usage": Usage(one["usage"]), "ips": tuple(one["ips"]), "dns": tuple(one["dns"])}
