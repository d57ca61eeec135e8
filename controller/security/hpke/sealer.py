"""The client's side of sealed requests, without any network. Imports answers, keys, routerkeys, suites, wire."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from controller.problems import BulkheadError
from controller.security.hpke.answers import AnswerOpener
from controller.security.hpke.keys import ClientKey
from controller.security.hpke.routerkeys import key_id
from controller.security.hpke.suites import SUITES, prefixed
from controller.security.hpke.wire import (
    HEADER,
    MEDIA_TYPE,
    WINDOW_S,
    Malformed,
    b64,
    bound_text,
    header_text,
    info,
    pack,
    unb64,
)


def statement(time: int, nonce: str, suites: list[str], keys: list[tuple[bytes, int]]) -> bytes:
    """What the router signs when it tells its configuration. `keys` are public halves and their ends, 0 for none."""
    listed = [prefixed(public, until.to_bytes(8, "big")) for public, until in keys]
    head = (b"bulkhead-hpke/1 config", time.to_bytes(8, "big"), nonce.encode(), " ".join(suites).encode())
    return prefixed(*head, *listed)


@dataclass(frozen=True, slots=True)
class Config:
    """What a router told: its newest key, a nonce for the connection it was told on, its identity and its time."""

    key: bytes
    nonce: str
    identity: bytes
    suites: tuple[str, ...]
    time: int

    @classmethod
    def read(cls, told: Any, now: float, pin: bytes | None = None) -> Config:
        """Check what a router told. `pin` is the identity that it must have. Raises `BulkheadError`."""
        try:
            nonce, identity, time, suites = (
                str(told["nonce"]),
                unb64(told["identity"]),
                int(told["time"]),
                told["suites"],
            )
            keys = [(unb64(row["public"]), int(row["until"] or 0)) for row in told["keys"]]
            signed = statement(time, nonce, suites, keys)
            Ed25519PublicKey.from_public_bytes(identity).verify(unb64(told["signature"]), signed)
            usable = told["version"] == 1 and len(unb64(nonce)) == 32 and len(keys[0][0]) == 32
        except (
            Malformed,
            InvalidSignature,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            OverflowError,
            AttributeError,
        ):
            usable = False
        if not usable:
            raise BulkheadError(
                "what the router told of its keys is not a configuration signed by it; is the address a router's?"
            )
        if pin is not None and identity != pin:
            raise BulkheadError(
                f"the router's identity is {b64(identity)}, not the one you expect; somebody may be between you and it"
            )
        if abs(now - time) > WINDOW_S:
            raise BulkheadError(
                f"your clock and the router's differ by {abs(now - time):.0f} s; set them: {WINDOW_S} s are allowed"
            )
        return cls(keys[0][0], nonce, identity, tuple(map(str, suites)), time)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A request to send, and what opens its answer."""

    headers: Mapping[str, str]
    body: bytes
    answer: AnswerOpener


class Sealer:
    """Seals requests of a client to a router's key. Raises `BulkheadError` where the router does not know the suite."""

    def __init__(self, key: ClientKey, config: Config) -> None:
        if key.suite not in config.suites:
            raise BulkheadError(f"the router knows the suites {', '.join(config.suites)}, not the key's {key.suite}")
        self._key = key
        self._suite = SUITES[key.suite]
        self._client = key.public.id
        self._router = X25519PublicKey.from_public_bytes(config.key)
        self._router_id = key_id(config.key)

    def seal(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        content_type: str = "",
        *,
        nonce: str,
        now: float,
        certificate: bytes | None = None,
        clear: bool = False,
    ) -> Sealed:
        """Seal a request. `target` is path and query as on the request line, `certificate` the router's as it was seen
        (DER). With `clear`, and for a request without a body, the body is bound but not sealed. Raises `Malformed`."""
        sealed = not clear and bool(body)
        seen = hashlib.sha256(certificate).digest() if certificate is not None else b""
        bound = bound_text(self._key.suite, self._client, self._router_id, int(now), nonce, seen, sealed)
        binds = info(bound, method, target, content_type, None if sealed else body)
        text = pack(content_type, body) if sealed else b""
        parcel, export = self._suite.seal(self._router, self._key.private, binds, text)
        proof = b"" if sealed else parcel.ciphertext
        headers = {HEADER: header_text(bound, parcel.enc, proof, parcel.signature)}
        if sealed or content_type:
            headers["Content-Type"] = MEDIA_TYPE if sealed else content_type
        return Sealed(headers, parcel.ciphertext if sealed else body, AnswerOpener(export, parcel.enc))
