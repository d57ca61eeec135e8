"""Two ways to seal a message to the router so that it knows who sent it, behind one interface.

`auth` is RFC 9180's mode_auth. Drafts of its successor drop that mode, so `base+ed25519` stands beside it: mode_base
and an Ed25519 signature. Both are DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey
from pyhpke.exceptions import PyHPKEError

Export = Callable[[bytes, int], bytes]
"""Derives a secret of that length for that purpose from what both sides of one message share."""

_HPKE: Final = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.CHACHA20_POLY1305)
TAG_BYTES: Final = 16


class NotAuthentic(Exception):
    """A message was not sealed by that client to that router with that info, or was altered."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A sealed message: ephemeral public key, ciphertext with its tag, signature where the suite has one."""

    enc: bytes
    ciphertext: bytes
    signature: bytes = b""


class Suite(Protocol):
    """A way to seal. Keys are 32 raw bytes."""

    name: str
    signature_bytes: int

    def generate(self) -> bytes:
        """A new private key of a client."""
        ...

    def public(self, private: bytes) -> bytes:
        """Its public half."""
        ...

    def usable(self, public: bytes) -> bool:
        """Whether it is a key that can be used at all."""
        ...

    def seal(self, router: X25519PublicKey, private: bytes, info: bytes, text: bytes) -> tuple[Parcel, Export]:
        """Seal a text to the router's key."""
        ...

    def open(self, router: X25519PrivateKey, public: bytes, info: bytes, parcel: Parcel) -> tuple[bytes, Export]:
        """The text, if it is that client's. Raises `NotAuthentic`, and nothing else."""
        ...


def prefixed(*parts: bytes) -> bytes:
    """Parts joined so that no two lists of them give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


class Auth:
    """RFC 9180, mode_auth: the client's key takes part in the key agreement."""

    name = "auth"
    signature_bytes = 0

    def generate(self) -> bytes:
        return X25519PrivateKey.generate().private_bytes_raw()

    def public(self, private: bytes) -> bytes:
        return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    def usable(self, public: bytes) -> bool:
        try:
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:  # a point of low order: the agreement would be the same for everybody
            return False
        return True

    def seal(self, router: X25519PublicKey, private: bytes, info: bytes, text: bytes) -> tuple[Parcel, Export]:
        own = KEMKey.from_pyca_cryptography_key(X25519PrivateKey.from_private_bytes(private))
        enc, context = _HPKE.create_sender_context(KEMKey.from_pyca_cryptography_key(router), info, sks=own)
        return Parcel(enc, context.seal(text)), context.export

    def open(self, router: X25519PrivateKey, public: bytes, info: bytes, parcel: Parcel) -> tuple[bytes, Export]:
        try:
            theirs = KEMKey.from_pyca_cryptography_key(X25519PublicKey.from_public_bytes(public))
            own = KEMKey.from_pyca_cryptography_key(router)
            context = _HPKE.create_recipient_context(parcel.enc, own, info, pks=theirs)
            return context.open(parcel.ciphertext), context.export
        except (ValueError, PyHPKEError) as exc:
            raise NotAuthentic from exc


class BaseSigned:
    """RFC 9180, mode_base, and the client's Ed25519 signature over ephemeral key, info and ciphertext."""

    name = "base+ed25519"
    signature_bytes = 64
    _LABEL = b"bulkhead-hpke/1 signature"

    def generate(self) -> bytes:
        return Ed25519PrivateKey.generate().private_bytes_raw()

    def public(self, private: bytes) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    def usable(self, public: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(public)
        except ValueError:
            return False
        return True

    def seal(self, router: X25519PublicKey, private: bytes, info: bytes, text: bytes) -> tuple[Parcel, Export]:
        enc, context = _HPKE.create_sender_context(KEMKey.from_pyca_cryptography_key(router), info)
        ciphertext = context.seal(text)
        signature = Ed25519PrivateKey.from_private_bytes(private).sign(prefixed(self._LABEL, enc, info, ciphertext))
        return Parcel(enc, ciphertext, signature), context.export

    def open(self, router: X25519PrivateKey, public: bytes, info: bytes, parcel: Parcel) -> tuple[bytes, Export]:
        try:
            # First, so that what nobody registered has sent never meets the router's key.
            Ed25519PublicKey.from_public_bytes(public).verify(
                parcel.signature, prefixed(self._LABEL, parcel.enc, info, parcel.ciphertext)
            )
            context = _HPKE.create_recipient_context(parcel.enc, KEMKey.from_pyca_cryptography_key(router), info)
            return context.open(parcel.ciphertext), context.export
        except (InvalidSignature, ValueError, PyHPKEError) as exc:
            raise NotAuthentic from exc


SUITES: Final[dict[str, Suite]] = {suite.name: suite for suite in (Auth(), BaseSigned())}
