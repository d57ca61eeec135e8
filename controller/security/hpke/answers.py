"""Sealed answers in chunks, so that a stream passes token by token and a cut is noticed. Imports suites, wire.

The keys come from the HPKE context of the request (RFC 9180, section 5.3) and a random salt, in the way of RFC 9458.
The body is the salt, then chunks: four bytes (the highest bit: this is the last; the rest: length of the text), then
the sealed text. These four bytes are bound, and so is the chunk's number, by the nonce. The first chunk is status and
content type in JSON. An answer without its last chunk is not whole.
"""

from __future__ import annotations

import json
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from controller.problems import BulkheadError
from controller.security.hpke.suites import TAG_BYTES, Export
from controller.security.hpke.wire import ANSWER

_SALT: Final = 32
_LAST: Final = 1 << 31
CHUNK_BYTES: Final = 65536


class BadAnswer(BulkheadError):
    """An answer was altered, is not whole, or is not the answer to this request."""


class _Chunks:
    def __init__(self, export: Export, enc: bytes, salt: bytes) -> None:
        secret = export(ANSWER, 32)
        derived = HKDF(SHA256(), 44, salt=enc + salt, info=ANSWER).derive(secret)
        self._aead = ChaCha20Poly1305(derived[:32])
        self._base = int.from_bytes(derived[32:], "big")
        self._count = 0

    def seal(self, text: bytes, last: bool) -> bytes:
        head = (len(text) | last * _LAST).to_bytes(4, "big")
        return head + self._aead.encrypt(self._nonce(), text, head)

    def open(self, head: bytes, ciphertext: bytes) -> bytes:
        return self._aead.decrypt(self._nonce(), ciphertext, head)

    def _nonce(self) -> bytes:
        nonce = (self._base ^ self._count).to_bytes(12, "big")
        self._count += 1
        return nonce


class AnswerSealer:
    """The router's side: `begin` first, then `chunk` for what comes, `end` when all has come."""

    def __init__(self, export: Export, enc: bytes) -> None:
        self._salt = os.urandom(_SALT)
        self._chunks = _Chunks(export, enc, self._salt)

    def begin(self, status: int, content_type: str) -> bytes:
        """The bytes that an answer begins with."""
        head = json.dumps({"status": status, "type": content_type[:1024]}).encode()
        return self._salt + self._chunks.seal(head, last=False)

    def chunk(self, data: bytes) -> bytes:
        """The bytes that carry the data."""
        pieces = (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))
        return b"".join(self._chunks.seal(piece, last=False) for piece in pieces)

    def end(self) -> bytes:
        """The bytes that an answer ends with. Without them the client takes it for cut."""
        return self._chunks.seal(b"", last=True)

    def whole(self, status: int, content_type: str, body: bytes) -> bytes:
        """An answer in one piece."""
        return self.begin(status, content_type) + self.chunk(body) + self.end()


class AnswerOpener:
    """The client's side: `feed` what comes; `status` and `content_type` are there as soon as their chunk is."""

    def __init__(self, export: Export, enc: bytes) -> None:
        self._export = export
        self._enc = enc
        self._chunks: _Chunks | None = None
        self._pending = bytearray()
        self._over = False
        self.status = 0
        self.content_type = ""

    def feed(self, data: bytes) -> bytes:
        """The content that became readable. Raises `BadAnswer`."""
        self._pending += data
        if self._chunks is None:
            if len(self._pending) < _SALT:
                return b""
            self._chunks = _Chunks(self._export, self._enc, bytes(self._pending[:_SALT]))
            del self._pending[:_SALT]
        out = bytearray()
        at = 0
        while len(self._pending) - at >= 4:
            head = int.from_bytes(self._pending[at : at + 4], "big")
            length = head & ~_LAST
            if self._over or length > CHUNK_BYTES:
                raise BadAnswer("the answer was altered on its way; ask again over a connection you trust")
            end = at + 4 + length + TAG_BYTES
            if len(self._pending) < end:
                break
            out += self._read(bytes(self._pending[at : at + 4]), bytes(self._pending[at + 4 : end]))
            at = end
        del self._pending[:at]
        return bytes(out)

    def finish(self) -> None:
        """Nothing more will come. Raises `BadAnswer` where something is missing."""
        if not self._over or self._pending:
            raise BadAnswer("the answer was cut off; what came is authentic, but not all of it came: ask again")

    def _read(self, head: bytes, ciphertext: bytes) -> bytes:
        assert self._chunks is not None
        try:
            text = self._chunks.open(head, ciphertext)
            self._over = bool(head[0] & 0x80)
            if self.status:
                return text
            first = json.loads(text)
            self.status, self.content_type = int(first["status"]), str(first["type"])
        except (InvalidTag, ValueError, KeyError, TypeError) as exc:
            raise BadAnswer("the answer was altered on its way, or is not to this request; ask again") from exc
        return b""
