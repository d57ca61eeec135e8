"""How a sealed request looks on the wire: one header in one spelling, and a body. Imports suites.

    Bulkhead-HPKE: v=1;suite=auth;client=…;key=…;time=…;nonce=…;cert=…;body=sealed;enc=…;proof=;sig=

What stands before `;enc=` is bound as it is written, together with method, path and, where the body goes in clear, its
content type and digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from controller.security.hpke.suites import SUITES, TAG_BYTES, prefixed

HEADER: Final = "Bulkhead-HPKE"
NEXT_NONCE: Final = "Next-Nonce"
MEDIA_TYPE: Final = "application/bulkhead-hpke"
WINDOW_S: Final = 60
"""How old a nonce may be, and how far the clocks may be apart."""
ANSWER: Final = b"bulkhead-hpke/1 answer"

_B32, _B16, _B64 = (rf"[A-Za-z0-9_-]{{{length}}}" for length in (43, 22, 86))
_SYNTAX: Final = re.compile(
    rf"(?P<bound>v=1;suite=(?P<suite>{'|'.join(map(re.escape, SUITES))});client=(?P<client>[0-9a-f]{{32}})"
    rf";key=(?P<key>[0-9a-f]{{16}});time=(?P<time>0|[1-9][0-9]{{0,11}});nonce=(?P<nonce>{_B32})"
    rf";cert=(?P<cert>{_B32}|);body=(?P<body>sealed|clear))"
    rf";enc=(?P<enc>{_B32});proof=(?P<proof>{_B16}|);sig=(?P<sig>{_B64}|)"
)
_LONGEST: Final = 600
_TYPE: Final = re.compile(r"[\x20-\x7e]{0,255}")


class Malformed(Exception):
    """What came is not a sealed request as this page writes it."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The header, taken apart. `cert` is the SHA-256 of the certificate that the client saw, or empty.

    `proof` is the ciphertext of nothing, where the body goes in clear.
    """

    bound: str
    suite: str
    client: str
    key: str
    time: int
    nonce: bytes
    cert: bytes
    sealed: bool
    enc: bytes
    proof: bytes
    signature: bytes


def b64(raw: bytes) -> str:
    """Base64 for URLs, without padding."""
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def unb64(text: str) -> bytes:
    """The other way. Raises `Malformed` for any spelling but the one of `b64`."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as exc:
        raise Malformed("base64") from exc
    if b64(raw) != text:
        raise Malformed("base64")
    return raw


def parse(header: str) -> Envelope:
    """Take a header apart. Raises `Malformed`."""
    found = _SYNTAX.fullmatch(header) if len(header) <= _LONGEST else None
    if found is None:
        raise Malformed("header")
    envelope = Envelope(
        found["bound"],
        found["suite"],
        found["client"],
        found["key"],
        int(found["time"]),
        unb64(found["nonce"]),
        unb64(found["cert"]),
        found["body"] == "sealed",
        unb64(found["enc"]),
        unb64(found["proof"]),
        unb64(found["sig"]),
    )
    if len(envelope.signature) != SUITES[envelope.suite].signature_bytes or envelope.sealed == bool(envelope.proof):
        raise Malformed("header")
    return envelope


def bound_text(suite: str, client: str, key: str, time: int, nonce: str, cert: bytes, sealed: bool) -> str:
    """The part of the header that both sides bind."""
    body = "sealed" if sealed else "clear"
    return f"v=1;suite={suite};client={client};key={key};time={time};nonce={nonce};cert={b64(cert)};body={body}"


def header_text(bound: str, enc: bytes, proof: bytes, signature: bytes) -> str:
    """The whole header."""
    return f"{bound};enc={b64(enc)};proof={b64(proof)};sig={b64(signature)}"


def info(bound: str, method: str, target: str, content_type: str, clear_body: bytes | None) -> bytes:
    """HPKE's info: what the sealed text belongs to. Raises `Malformed` for a target that cannot be on the wire."""
    try:
        parts = [bound.encode("ascii"), method.encode("ascii"), target.encode("utf-8", "surrogateescape")]
        if clear_body is not None:
            parts += [content_type.encode("utf-8", "surrogateescape"), hashlib.sha256(clear_body).digest()]
    except UnicodeEncodeError as exc:
        raise Malformed("target") from exc
    return prefixed(b"bulkhead-hpke/1 request", *parts)


def pack(content_type: str, body: bytes) -> bytes:
    """Content type and body as one text to be sealed. Raises `Malformed`."""
    if not _TYPE.fullmatch(content_type):
        raise Malformed("content type")
    return bytes([len(content_type)]) + content_type.encode("ascii") + body


def unpack(text: bytes) -> tuple[str, bytes]:
    """The other way. Raises `Malformed`."""
    end = 1 + text[0] if text else 1
    if len(text) < end:
        raise Malformed("text")
    content_type = text[1:end].decode("latin-1")
    if not _TYPE.fullmatch(content_type):
        raise Malformed("content type")
    return content_type, text[end:]


def overhead() -> int:
    """How many bytes a sealed body has more than its content, at most."""
    return 256 + TAG_BYTES
