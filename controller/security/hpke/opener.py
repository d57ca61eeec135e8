"""The router's side of sealed requests: who sent it, what it says, or why it is refused.

Imports answers, nonces, registry, routerkeys, sealer, suites, wire. No network, and no clock but those it is given.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from controller.security.hpke.answers import AnswerSealer
from controller.security.hpke.nonces import Nonces
from controller.security.hpke.registry import Client, Registry
from controller.security.hpke.routerkeys import RouterKeys
from controller.security.hpke.sealer import statement
from controller.security.hpke.suites import SUITES, Export, NotAuthentic, Parcel
from controller.security.hpke.wire import (
    HEADER,
    MEDIA_TYPE,
    WINDOW_S,
    Envelope,
    Malformed,
    b64,
    info,
    overhead,
    parse,
    unpack,
)

_log: Final = logging.getLogger(__name__)
_TELL_EVERY_S: Final = 10.0
REFUSAL: Final = "The request was refused."
"""All that a client is told, whatever the reason."""


class Refused(Exception):
    """A request is not passed on. `status` is 400 (it cannot be read) or 401 (all else).

    `code` is for counters and the log, never for the client: it is told `REFUSAL`.
    """

    def __init__(self, status: int, code: str) -> None:
        super().__init__(REFUSAL)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Opened:
    """A request that its client has sealed for this router, this connection and now."""

    client: Client
    body: bytes = field(repr=False)
    content_type: str
    _export: Export = field(repr=False)
    _enc: bytes = field(repr=False)

    def answer(self) -> AnswerSealer:
        """What seals the one answer to it."""
        return AnswerSealer(self._export, self._enc)


def new_binding() -> bytes:
    """A name for a connection. Make one when a TLS connection is accepted, and keep it as long as that lives."""
    return os.urandom(32)


class Opener:
    """Opens requests.

    `certificates` gives the SHA-256 of each certificate that clients may have seen (None: what they saw is bound, not
    checked). `clear_bodies` lets bodies come that are bound but not sealed. `max_body` is in bytes of content. `told`
    is called with a code and how often it came, at most once in ten seconds for each code; by default it is logged.
    One thread only. Each worker process has its own.
    """

    def __init__(
        self,
        registry: Registry,
        keys: RouterKeys,
        *,
        certificates: Callable[[], Collection[bytes]] | None = None,
        clear_bodies: bool = False,
        max_body: int = 1024 * 1024,
        told: Callable[[str, int], None] | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        capacity: int = 500_000,
    ) -> None:
        self._registry = registry
        self._keys = keys
        self._certificates = certificates
        self._clear_bodies = clear_bodies
        self._max_body = max_body
        self._told = told or _tell_log
        self._clock = clock
        self._monotonic = monotonic
        self._nonces = Nonces(WINDOW_S, capacity, monotonic)
        self._untold: Counter[str] = Counter()
        self._told_at: dict[str, float] = {}
        self.refused: Counter[str] = Counter()
        """How many requests were refused, by code."""

    def nonce(self, binding: bytes) -> str:
        """A nonce for that connection: the header `Next-Nonce` of every answer."""
        return b64(self._nonces.issue(binding))

    def config(self, binding: bytes) -> dict[str, Any]:
        """The answer to `GET /hpke/config`, signed. Raises `BulkheadError` where the router has no keys."""
        now = int(self._clock())
        keys = [(key, key.until or 0) for key in self._keys.usable(now)]
        nonce = self.nonce(binding)
        suites = list(SUITES)
        signed = statement(now, nonce, suites, [(key.public, until) for key, until in keys])
        return {
            "version": 1,
            "time": now,
            "window_s": WINDOW_S,
            "suites": suites,
            "keys": [{"id": key.id, "public": b64(key.public), "until": key.until} for key, _ in keys],
            "nonce": nonce,
            "identity": b64(self._keys.identity()),
            "signature": b64(self._keys.sign(signed)),
        }

    def active(self, client: Client) -> bool:
        """Whether a client may still be answered: ask during long answers."""
        return self._registry.active(client.id)

    def open(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes, binding: bytes) -> Opened:
        """Open a request. `target` is path and query as on the request line, `headers` all there are, `binding` the
        connection's. Raises `Refused`, and `BulkheadError` where the router has no keys."""
        try:
            envelope, content_type = _envelope(headers)
            if len(body) > self._max_body + (overhead() if envelope.sealed else 0):
                raise Malformed("large")
            return self._open(envelope, method, target, content_type, body, binding)
        except Malformed as exc:
            self._refuse(400, f"malformed-{str(exc).replace(' ', '-')}")

    def _open(
        self, envelope: Envelope, method: str, target: str, content_type: str, body: bytes, binding: bytes
    ) -> Opened:
        # What costs least comes first. None of this tells a stranger more than that it was refused.
        now = self._clock()
        if abs(now - envelope.time) > WINDOW_S:
            self._refuse(401, "time")
        if (doubt := self._nonces.doubt(envelope.nonce, binding)) is not None:
            self._refuse(401, doubt)
        if self._certificates is not None and envelope.cert and envelope.cert not in self._certificates():
            self._refuse(401, "certificate")
        if not envelope.sealed and body and not self._clear_bodies:
            self._refuse(401, "clear-body")
        client = self._registry.get(envelope.client)
        if client is None or client.suite != envelope.suite:
            self._refuse(401, "unknown-client" if client is None else "suite")
        if not client.active:
            self._refuse(401, "revoked")
        if (key := self._keys.get(envelope.key, now)) is None:
            self._refuse(401, "router-key")

        binds = info(envelope.bound, method, target, content_type, None if envelope.sealed else body)
        parcel = Parcel(envelope.enc, body if envelope.sealed else envelope.proof, envelope.signature)
        try:
            text, export = SUITES[envelope.suite].open(key.private, client.key.raw, binds, parcel)
        except NotAuthentic:
            self._refuse(401, "not-authentic")
        self._nonces.spend(envelope.nonce)  # only now: nobody else can use up a client's nonce
        if envelope.sealed:
            content_type, body = unpack(text)
        elif text:
            raise Malformed("proof")
        return Opened(client, body, content_type, export, envelope.enc)

    def _refuse(self, status: int, code: str) -> NoReturn:
        self.refused[code] += 1
        self._untold[code] += 1
        now = self._monotonic()
        if now - self._told_at.get(code, float("-inf")) >= _TELL_EVERY_S:
            self._told_at[code] = now
            self._told(code, self._untold.pop(code))
        raise Refused(status, code) from None


def _tell_log(code: str, count: int) -> None:
    _log.warning("refused %d sealed request(s): %s", count, code)


def _envelope(headers: Iterable[tuple[str, str]]) -> tuple[Envelope, str]:
    """The header, taken apart, and the content type. Raises `Malformed`."""
    ours, types = [], []
    for name, value in headers:
        lower = name.lower()
        if lower == HEADER.lower():
            ours.append(value)
        elif lower == "content-type":
            types.append(value)
    if len(ours) != 1:
        raise Malformed("missing" if not ours else "twice")
    if len(types) > 1:
        raise Malformed("twice")
    envelope = parse(ours[0])
    content_type = types[0] if types else ""
    if envelope.sealed != (content_type == MEDIA_TYPE):
        raise Malformed("content type")
    return envelope, content_type
