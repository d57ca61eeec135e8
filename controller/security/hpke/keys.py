"""Clients' keys as text: private ones in files of mode 600, public ones as a line to hand over.

Imports files, suites, wire.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from controller.problems import BulkheadError
from controller.security.hpke.files import read_secret
from controller.security.hpke.suites import SUITES, prefixed
from controller.security.hpke.wire import Malformed, b64, unb64

_PUBLIC: Final = "bulkhead-hpke-public"
_PRIVATE: Final = "bulkhead-hpke-private"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A client's public key and the suite it is for. `id` is derived from both: no server gives it."""

    suite: str
    raw: bytes

    @property
    def id(self) -> str:
        """32 hexadecimal digits."""
        return hashlib.sha256(prefixed(b"bulkhead-hpke/1 client", self.suite.encode(), self.raw)).hexdigest()[:32]

    def __str__(self) -> str:
        return f"{_PUBLIC} {self.suite} {b64(self.raw)}"

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read the line of a public key. Raises `BulkheadError`."""
        suite, raw = _parse(text, _PUBLIC, "the line that `bulkhead client keygen` wrote to FILE.pub")
        if not SUITES[suite].usable(raw):
            raise BulkheadError(
                "this public key is no point that a key can be; make a new one with `bulkhead client keygen`"
            )
        return cls(suite, raw)


@dataclass(frozen=True, slots=True)
class ClientKey:
    """A client's private key. It prints without its secret."""

    suite: str
    private: bytes = field(repr=False)

    @classmethod
    def new(cls, suite: str = "auth") -> ClientKey:
        """Make a key for a suite."""
        return cls(suite, SUITES[suite].generate())

    @property
    def public(self) -> PublicKey:
        """Its public half."""
        return PublicKey(self.suite, SUITES[self.suite].public(self.private))

    def reveal(self) -> str:
        """The line for its file."""
        return f"{_PRIVATE} {self.suite} {b64(self.private)}"

    @classmethod
    def load(cls, path: Path) -> ClientKey:
        """Read a key file. Raises `BulkheadError`, without what the file holds."""
        suite, raw = _parse(read_secret(path), _PRIVATE, f"a file of `bulkhead client keygen`, not what is in {path}")
        return cls(suite, raw)


def _parse(text: str, kind: str, expected: str) -> tuple[str, bytes]:
    words = text.split()
    try:
        if len(words) == 3 and words[0] == kind and words[1] in SUITES and len(raw := unb64(words[2])) == 32:
            return words[1], raw
    except Malformed:
        pass
    raise BulkheadError(f"this is not a key: expected {expected}")
