"""A client of the HTTP API, for commands and the MCP server: where it is, who asks, and what its answers mean.

By default it is the unix socket in the run directory, where the kernel says who asks. Elsewhere it is an https address
and a bearer token. Imports problems only, and httpx when it is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import ssl
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

from controller.problems import BulkheadError

SOCKET = "api.sock"
CONNECT_S = 5.0
ANSWER_S = 30.0
LATER_S = 15.0
"""How much longer than the API itself we wait for its answer: it then takes back what it could not do."""
AGAIN_S = 10.0
"""How long a request is repeated whose connection broke, as while the API is started anew."""
FOLLOW_S = 60.0
"""The same of following events: whoever follows has time."""
_TOKEN = re.compile(r"[A-Za-z0-9_.~+/=-]{8,512}", re.ASCII)
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_STARTS = "Start one with: bulkhead up FILE, or bulkhead api FILE; or say where it is with --run-dir or --api"

# What says that something is not so or not allowed as it was asked. All else is: it could not be found out.
_ANSWERS = {400, 404, 405, 409, 410, 412, 413, 415, 422}


class NoApi(BulkheadError):
    """The API does not answer, or not in time. A retry may help."""


class ApiProblem(BulkheadError):
    """The API said no, with a problem document (RFC 9457)."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        self.status = status
        self.document = dict(document)
        super().__init__("\n".join(_told(status, self.document)))

    @property
    def code(self) -> str:
        """The problem's kind, for programs: `ids-exhausted`."""
        return str(self.document.get("type", "")).rpartition(":")[2]

    @property
    def is_answer(self) -> bool:
        """Whether it answers what was asked, by a no; otherwise it could not be found out."""
        return self.status in _ANSWERS or self.code == "self-approval"


@dataclass(frozen=True, slots=True)
class Where:
    """Where the API is and who asks. Without `url` it is the unix socket.

    `ca` is a file of certificates that https is checked with (default: the system's); `fingerprint` instead is the
    SHA-256 of the one certificate that is accepted, in hexadecimal. The token is in no repr.
    """

    socket: Path
    url: str = ""
    ca: Path | None = None
    fingerprint: str = ""
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.token and not _TOKEN.fullmatch(self.token):
            raise BulkheadError("the token is not one: expected letters, digits and -_.~+/= on one line; copy it again")
        if not self.url:
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise BulkheadError(f"--api {plain(self.url)!r}: expected https://HOST:PORT")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise BulkheadError(f"--api {plain(self.url)}: http shows the token to anybody on the way; write https://")
        if self.fingerprint and self.ca:
            raise BulkheadError("--ca and --fingerprint both say which certificate is good; give one of them")

    def __str__(self) -> str:
        return self.url or str(self.socket)

    @property
    def base(self) -> str:
        """What paths are appended to. The name of the host is only a name where it is a unix socket."""
        return self.url.rstrip("/") or "http://localhost"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def uds(self) -> str | None:
        """The unix socket, as httpx wants it."""
        return None if self.url else str(self.socket)

    def trust(self) -> ssl.SSLContext:
        """Which certificates are good. Raises `NoApi` or `BulkheadError`."""
        if self.fingerprint:
            return _only(self)
        try:
            return ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        except (OSError, ssl.SSLError) as exc:
            raise BulkheadError(f"--ca {self.ca} is not a file of certificates (PEM): {_reason(exc)}") from exc


def _only(where: Where) -> ssl.SSLContext:
    """Trust in the one certificate that has the fingerprint.

    It is fetched first, with nothing said, and then is all that the real connection accepts.
    """
    wanted = where.fingerprint.replace(":", "").lower().removeprefix("sha256")
    parts = urlsplit(where.url)
    try:
        pem = ssl.get_server_certificate((parts.hostname or "", parts.port or 443), timeout=CONNECT_S)
    except OSError as exc:
        raise NoApi(f"no API answers on {where.url} ({_reason(exc)}). {_STARTS}") from exc
    found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    if found != wanted:
        raise BulkheadError(
            f"the certificate of {where.url} has the fingerprint {found}, not the one of --fingerprint. Nothing was sent. "
            "If the API has made a new one, take its fingerprint from its log"
        )
    context = ssl.create_default_context(cadata=pem)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be its own issuer
    return context


def read_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The token in `file`, or in BULKHEAD_TOKEN, or none. A file that others may read is refused."""
    if file is None:
        return environment.get("BULKHEAD_TOKEN", "").strip()
    try:
        with file.open("rb") as source:
            state = os.fstat(source.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise BulkheadError(f"{file} is no file; expected one with a token in it")
            if state.st_mode & 0o077 or state.st_uid not in (0, os.geteuid()):
                raise BulkheadError(f"others may read or change {file}, which holds a token; do: chmod 600 {file}")
            return source.read(4096).decode("ascii", "replace").strip()
    except OSError as exc:
        raise BulkheadError(f"the token cannot be read from {file}: {exc.strerror}") from exc


class Api:
    """A connection to the API. A context manager, for one thread.

    Requests whose connection broke are repeated for a while where that is safe. Raises `ApiProblem` where the API says
    no and `NoApi` where it does not answer.
    """

    def __init__(self, where: Where, answer_s: float = ANSWER_S, connect_s: float = CONNECT_S) -> None:
        import httpx

        self.where = where
        self._answer_s, self._connect_s = answer_s, connect_s
        verify: Any = where.trust() if where.url.startswith("https:") else False
        self._http = httpx.Client(
            base_url=where.base,
            headers=where.headers,
            transport=httpx.HTTPTransport(uds=where.uds, verify=verify),
            trust_env=False,  # no proxy is told the token
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def get(self, path: str, **params: object) -> Any:
        """The JSON value at a path; parameters that are None are left out."""
        return self.request("GET", path, params=params)

    def post(
        self,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        key: str = "",
        answer_s: float | None = None,
        **params: object,
    ) -> Any:
        """Ask for a change. `key` is the idempotency key; one is made where none is given."""
        return self.request("POST", path, body or {}, params=params, key=key, answer_s=answer_s)

    def delete(self, path: str, *, key: str = "", answer_s: float | None = None, **params: object) -> Any:
        """Ask for something to go."""
        return self.request("DELETE", path, params=params, key=key, answer_s=answer_s)

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        params: Mapping[str, object] | None = None,
        key: str = "",
        answer_s: float | None = None,
    ) -> Any:
        """One request and what was answered. The API does a change once, however often its key is sent."""
        import httpx

        key = key or ("" if method == "GET" else new_key())
        wait_s = self._answer_s if answer_s is None else answer_s
        timeout = httpx.Timeout(wait_s, connect=self._connect_s)
        headers = {"Idempotency-Key": key} if key else {}
        again_until = 0.0  # set once a connection broke
        while True:
            try:
                response = self._http.request(
                    method, path, json=body, params=given(params or {}), headers=headers, timeout=timeout
                )
                return answer(response.status_code, response.headers.get("content-type", ""), response.content)
            except ApiProblem as exc:
                pause_s = _pause(exc, response.headers.get("retry-after", ""))
                again_until = again_until or time.monotonic() + wait_s
                if pause_s is None or time.monotonic() + pause_s > again_until:
                    raise
                time.sleep(pause_s)
            except httpx.TransportError as exc:
                broke = isinstance(exc, httpx.ReadError | httpx.WriteError | httpx.RemoteProtocolError)
                again_until = again_until or (time.monotonic() + AGAIN_S if broke else 0.0)
                if isinstance(exc, httpx.TimeoutException) or time.monotonic() > again_until:
                    raise no_api(self.where, exc, key) from exc
                time.sleep(0.2)

    def events(self, after: str = "", **params: object) -> Iterator[tuple[str, str, str]]:
        """The event stream: (cursor, kind of message, data), for ever; it goes on by itself where it broke."""
        import httpx

        failed_at = 0.0
        while True:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
            timeout = httpx.Timeout(ANSWER_S * 2, connect=self._connect_s)
            try:
                with self._http.stream(
                    "GET", "/api/events/stream", params=given(params), headers=headers, timeout=timeout
                ) as response:
                    if response.status_code in (429, 503):  # it may have just been started, or be about to stop
                        raise httpx.ReadError(f"status {response.status_code}")
                    if response.status_code != 200:
                        content = response.read()
                        answer(response.status_code, response.headers.get("content-type", ""), content)
                    failed_at = 0.0
                    for cursor, kind, data in messages(response.iter_lines()):
                        after = cursor or after
                        yield cursor, kind, data
            except httpx.TransportError as exc:
                failed_at = failed_at or time.monotonic()
                first = isinstance(exc, httpx.ConnectError) and not after
                if first or time.monotonic() - failed_at > FOLLOW_S:
                    raise no_api(self.where, exc, "") from exc
            time.sleep(0.5)


def new_key() -> str:
    """An idempotency key that nobody else has."""
    return uuid4().hex


def given(params: Mapping[str, object]) -> dict[str, str | list[str]]:
    """Parameters as they stand in an address, without those that are None or empty."""
    out: dict[str, str | list[str]] = {}
    for name, value in params.items():
        if value is None or value == ():
            continue
        if isinstance(value, list | tuple):
            out[name] = [str(one) for one in value]
        else:
            out[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return out


def answer(status: int, content_type: str, content: bytes) -> Any:
    """The JSON value of an answer. Raises `ApiProblem` for a problem, whatever form it has."""
    import json

    kind = content_type.partition(";")[0].strip()
    value: Any = None
    if content and kind in ("application/json", "application/problem+json"):
        try:
            value = json.loads(content)
        except ValueError as exc:
            raise NoApi("what answers is not the API of Bulkhead: its JSON is broken; check --api") from exc
    if status >= 400:
        raise ApiProblem(status, value if isinstance(value, dict) else {"title": f"HTTP status {status}"})
    if content and value is None:
        raise NoApi(f"what answers is not the API of Bulkhead: it sends {plain(kind)!r}; check --api")
    return value


def messages(lines: Iterator[str]) -> Iterator[tuple[str, str, str]]:
    """The messages of an event stream (text/event-stream): id, kind, data."""
    cursor, kind, data = "", "message", list[str]()
    for line in lines:
        if line == "":
            if data:
                yield cursor, kind, "\n".join(data)
            cursor, kind, data = "", "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "id":
                cursor = value
            case "event":
                kind = value
            case "data":
                data.append(value)


def _pause(problem: ApiProblem, retry_after: str) -> float | None:
    """How long to wait before asking again, None if that would not help."""
    busy = problem.status == 429 or (problem.status == 409 and "progress" in problem.code)
    if not busy:
        return None
    return min(5.0, max(0.2, float(retry_after))) if retry_after.isdecimal() else 0.5


def no_api(where: Where, exc: Exception, key: str) -> NoApi:
    """Why there is no answer, and what to do."""
    import httpx

    cause = _os_error(exc)
    if isinstance(cause, ssl.SSLError):
        why = getattr(cause, "verify_message", "") or cause.reason or str(cause)
        return NoApi(
            f"the certificate of {where} is not trusted ({why}). Give --ca FILE, or --fingerprint as the API's log says it"
        )
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        if cause is not None and cause.errno in (errno.EACCES, errno.EPERM):
            return NoApi(f"you may not ask the API on {where}; join its group (bulkhead), or use sudo")
        return NoApi(f"no API answers on {where} ({_reason(cause or exc)}). {_STARTS}")
    again = f", or repeat it safely with --idempotency-key {key}" if key else ""
    what = "did not answer in time" if isinstance(exc, httpx.TimeoutException) else "ended while answering"
    return NoApi(f"the API on {where} {what}; see what became of it with: bulkhead container list{again}")


def _os_error(exc: BaseException | None) -> OSError | None:
    """What the system said, at the bottom of it."""
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        if isinstance(exc, OSError):
            return exc
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__
    return None


def _reason(exc: BaseException) -> str:
    return getattr(exc, "strerror", "") or str(exc) or type(exc).__name__


def _told(status: int, document: Mapping[str, Any]) -> Iterator[str]:
    """A problem document as lines for people."""
    title, detail = (plain(document.get(name) or "") for name in ("title", "detail"))
    yield detail or title or f"the API answered with status {status}"
    errors = document.get("errors")
    for one in errors if isinstance(errors, list) else ():
        if isinstance(one, Mapping):
            name, found, expected, fix = (plain(one.get(k) or "") for k in ("field", "found", "expected", "fix"))
            text = f"found {found or 'nothing'}; expected {expected}" if expected else found
            # What is said already is not said again.
            more = "" if fix.rstrip(".") in f"{detail} {expected}" else fix
            yield f"  {name}: {text.rstrip('.')}{'. ' if text and more else ''}{more}"


def segment(name: str) -> str:
    """A name as part of a path."""
    if not name or name in (".", ".."):
        raise BulkheadError(f"{plain(name)!r} is no name")
    return quote(name, safe="")


def plain(text: object) -> str:
    """Text that cannot move the cursor of whoever reads it."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))
