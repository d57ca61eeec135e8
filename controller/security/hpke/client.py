"""A client that seals its requests, over HTTP. Imports the rest of this package.

    with RouterClient("https://llm.example", ClientKey.load(path), tls=context) as router:
        answer = router.request("POST", "/v1/chat", body, "application/json")

It keeps one connection, because nonces are good on the connection they were given on only.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import httpx

from controller.problems import BulkheadError
from controller.security.hpke.answers import AnswerOpener
from controller.security.hpke.keys import ClientKey
from controller.security.hpke.sealer import Config, Sealed, Sealer
from controller.security.hpke.wire import MEDIA_TYPE, NEXT_NONCE, WINDOW_S, Malformed

CONFIG_PATH = "/hpke/config"
_CONNECT_S = 10.0


class Unanswered(BulkheadError):
    """The router itself said no; what it says is not sealed. `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, whole and authentic."""

    status: int
    content_type: str
    body: bytes


class Stream:
    """An answer as it comes: iterate over its content. Raises `BadAnswer` where it is altered or cut."""

    def __init__(self, response: httpx.Response, opener: AnswerOpener) -> None:
        self._opener = opener
        self._chunks = response.iter_raw()
        self._first = b""
        while not opener.status:
            chunk = next(self._chunks, None)
            if chunk is None:
                opener.finish()
                break
            self._first += opener.feed(chunk)

    @property
    def status(self) -> int:
        """The HTTP status that the answer has inside."""
        return self._opener.status

    @property
    def content_type(self) -> str:
        """Its content type."""
        return self._opener.content_type

    def __iter__(self) -> Iterator[bytes]:
        if self._first:
            yield self._first
        for chunk in self._chunks:
            if data := self._opener.feed(chunk):
                yield data
        self._opener.finish()


class RouterClient:
    """A connection to a router. Use it in `with`, from one thread, for one request at a time.

    `tls` verifies the router's certificate; `pin` is the identity that the router must have (32 bytes), so that not
    even a certificate's issuer can put himself between. Raises `BulkheadError`.
    """

    def __init__(
        self,
        url: str,
        key: ClientKey,
        *,
        tls: ssl.SSLContext | None = None,
        pin: bytes | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._url = _checked(url, pin)
        self._key = key
        self._pin = pin
        self._sealer: Sealer | None = None
        self._nonce: tuple[str, float] | None = None
        self._certificate: bytes | None = None
        self._http = httpx.Client(
            verify=tls or ssl.create_default_context(),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=WINDOW_S),
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            headers={"Accept-Encoding": "identity"},
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def request(self, method: str, target: str, body: bytes = b"", content_type: str = "") -> Answer:
        """Ask, and wait for all of the answer. Raises `BulkheadError`, `Unanswered` where the router refuses."""
        with self.stream(method, target, body, content_type) as stream:
            whole = b"".join(stream)
            return Answer(stream.status, stream.content_type, whole)

    @contextmanager
    def stream(self, method: str, target: str, body: bytes = b"", content_type: str = "") -> Iterator[Stream]:
        """Ask, and read the answer as it comes. Raises as `request` does."""
        try:
            response, sealed = self._ask(method, target, body, content_type)
            try:
                yield Stream(response, sealed.answer)
            finally:
                response.close()
        except httpx.HTTPError as exc:
            raise BulkheadError(f"{self._url}: {exc or type(exc).__name__}; see that the router runs") from exc

    def _ask(self, method: str, target: str, body: bytes, content_type: str) -> tuple[httpx.Response, Sealed]:
        used = self._nonce is not None
        response, sealed = self._send(method, target, body, content_type)
        if response.status_code == 401 and used and not _is_sealed(response):
            # The connection was closed meanwhile, or the router began anew: it has not passed the request on.
            response.close()
            self._nonce = None
            response, sealed = self._send(method, target, body, content_type)
        if not _is_sealed(response):
            response.close()
            raise Unanswered(response.status_code, self._why(response.status_code))
        return response, sealed

    def _send(self, method: str, target: str, body: bytes, content_type: str) -> tuple[httpx.Response, Sealed]:
        nonce, self._nonce = self._nonce, None
        if nonce is None or self._sealer is None or time.monotonic() - nonce[1] > WINDOW_S - 10:
            nonce = self._fetch(), time.monotonic()
        assert self._sealer is not None
        url = self._url.join(target)
        on_wire = url.raw_path.decode("ascii")
        if url.host != self._url.host or url.port != self._url.port:
            raise BulkheadError(f"{target} is not a path; it begins with one slash")
        try:
            sealed = self._sealer.seal(
                *(method, on_wire, body, content_type),
                nonce=nonce[0],
                now=time.time(),
                certificate=self._certificate,
            )
        except Malformed as exc:
            raise BulkheadError(f"method, path or content type have characters that HTTP does not: {exc}") from exc
        asked = time.monotonic()
        request = self._http.build_request(method, url, headers=sealed.headers, content=sealed.body)
        response = self._http.send(request, stream=True)
        if following := response.headers.get(NEXT_NONCE):
            self._nonce = following, asked
        return response, sealed

    def _fetch(self) -> str:
        """Ask for keys and a nonce, and remember the certificate of that connection."""
        response = self._http.get(self._url.join(CONFIG_PATH))
        if response.status_code != 200:
            raise Unanswered(
                response.status_code, f"{self._url}: asked for its keys, it answered {response.status_code}"
            )
        stream = response.extensions.get("network_stream")
        tls = stream.get_extra_info("ssl_object") if stream is not None else None
        self._certificate = tls.getpeercert(True) if tls is not None else None
        try:
            told = response.json()
        except ValueError:
            told = None
        config = Config.read(told, time.time(), self._pin)
        self._sealer = Sealer(self._key, config)
        return config.nonce

    def _why(self, status: int) -> str:
        if status == 401:
            return f"the router refused the request; is the client {self._key.public.id} registered there, and not revoked?"
        return f"the router answered {status} before the request reached a server; ask its operator, or try again later"


def _is_sealed(response: httpx.Response) -> bool:
    return bool(response.headers.get("Content-Type") == MEDIA_TYPE)


def _checked(url: str, pin: bytes | None) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise BulkheadError(f"{url} is not an address: {exc}; expected https://HOST[:PORT]") from exc
    if parsed.scheme == "https" and parsed.host:
        return parsed
    if parsed.scheme == "http" and parsed.host and (pin is not None or _loopback(parsed.host)):
        return parsed
    raise BulkheadError(
        f"{url}: expected https://HOST[:PORT]; http:// only to this host, or with the router's identity"
    )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
