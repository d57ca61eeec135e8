"""WireGuard keys as values that never show themselves: made, checked, and their public halves.

Files with keys are the business of whoever has them. Imports nothing of ours.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field

_KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
_NO_KEY = "A" * 43 + "="
"""All zeros: what WireGuard calls having no key."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A key. `reveal` is the only way to it; it prints as nothing."""

    _text: str = field(repr=False)

    def reveal(self) -> str:
        """The key itself."""
        return self._text

    def __str__(self) -> str:
        return "(secret)"


def is_key(text: str) -> bool:
    """Whether it is a WireGuard key: 32 bytes in base64."""
    return _KEY.fullmatch(text) is not None and text != _NO_KEY


def new_private_key() -> Secret:
    """A Curve25519 private key."""
    return clamped(Secret(base64.b64encode(os.urandom(32)).decode()))


def clamped(key: Secret) -> Secret:
    """A private key as WireGuard stores and shows it, whatever was given (RFC 7748, section 5)."""
    raw = bytearray(base64.b64decode(key.reveal()))
    raw[0] &= 248
    raw[31] = (raw[31] & 127) | 64
    return Secret(base64.b64encode(raw).decode())


def new_shared_key() -> Secret:
    """A pre-shared key."""
    return Secret(base64.b64encode(os.urandom(32)).decode())


def public_key(private: Secret) -> str:
    """The public half of a private key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # slow to import

    raw = X25519PrivateKey.from_private_bytes(base64.b64decode(private.reveal())).public_key().public_bytes_raw()
    return base64.b64encode(raw).decode()
