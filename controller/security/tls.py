"""TLS contexts from a directory of certificates: TLS 1.3 only, revocations checked, changed files taken up by themselves.

The directory has `ca.pem` (every CA trusted now), `crl.pem` (a list of revocations of each) and
`current/NAME/{cert.pem,key.pem}`; `bulkhead pki` keeps it. Imports problems; cryptography for revocations only.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.problems import BulkheadError

LOOK_S = 0.25
"""Changed files are looked for at a handshake, but not more often than this."""

_Stamp = tuple[tuple[int, int, int] | str, ...]


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one context. `certificate` and `key` are of one pair even if the pair is replaced meanwhile."""

    ca: Path
    crl: Path
    certificate: Path | None = None
    key: Path | None = None


def files(directory: Path, name: str | None) -> Files:
    """Where things are in a directory of certificates; `name` is whose, or None for trust alone."""
    if name is None:
        return Files(directory / "ca.pem", directory / "crl.pem")
    # The link is followed once, so that certificate and key are never of two different pairs.
    pair = Path(os.path.realpath(directory / "current" / name))
    return Files(directory / "ca.pem", directory / "crl.pem", pair / "cert.pem", pair / "key.pem")


def server_context(directory: Path, name: str, require_client: bool, *, alpn: Sequence[str] = ()) -> ssl.SSLContext:
    """For a server called `name`. With `require_client` clients need a certificate of the CA that is not revoked.

    Raises `BulkheadError` if the files are missing or do not fit.
    """
    return context(files(directory, name), server=True, require_peer=require_client, alpn=alpn)


def client_context(
    directory: Path, name: str | None = None, *, alpn: Sequence[str] = (), check_hostname: bool = True
) -> ssl.SSLContext:
    """For a client that shows the certificate of `name` (None: none). The server's name or address is checked against its
    certificate, which must not be revoked. Raises `BulkheadError`.
    """
    made = context(files(directory, name), server=False, require_peer=True, alpn=alpn)
    made.check_hostname = check_hostname
    return made


def context(of: Files, *, server: bool, require_peer: bool, alpn: Sequence[str] = ()) -> ssl.SSLContext:
    """A context from files. Raises `BulkheadError`."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    if alpn:
        made.set_alpn_protocols(list(alpn))
    if of.certificate is not None and of.key is not None:
        _load(made, of.certificate, of.key)
    if not require_peer:
        return made
    _trust(made, of)
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    if server:
        made.num_tickets = 0  # a resumed session would not look at revocations again
    return made


def _load(made: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        made.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as exc:
        raise BulkheadError(
            f"the certificate {certificate} and its key cannot be used: {_why(exc, 'they are no pair of PEM files')}; "
            "run: bulkhead pki issue NAME, or give another name or directory"
        ) from None


def _trust(made: ssl.SSLContext, of: Files) -> None:
    for path, what in ((of.ca, "CA certificates"), (of.crl, "revocations")):
        try:
            made.load_verify_locations(cafile=path)
        except (OSError, ssl.SSLError) as exc:
            raise BulkheadError(
                f"the {what} in {path} cannot be used: {_why(exc, 'this is no PEM')}; run: bulkhead pki status"
            ) from None
    counts = made.cert_store_stats()
    if not counts["x509_ca"] or not counts["crl"]:
        raise BulkheadError(
            f"{of.ca} has {counts['x509_ca']} CA certificates and {of.crl} {counts['crl']} lists of revocations; each "
            "needs one at least; run: bulkhead pki status"
        )


def _why(exc: Exception, otherwise: str) -> str:
    return exc.strerror if isinstance(exc, OSError) and exc.errno and exc.strerror else otherwise


def _no_password() -> str:
    raise ValueError("an encrypted key")


def identity(peer: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """Whose certificate the other side has shown; None if it has shown none. Only for connections that verify it."""
    found = peer.getpeercert() or {}
    subject: Any = found.get("subject", ())
    return next((value for part in subject for key, value in part if key == "commonName"), None)


class Reloading:
    """A context that follows its files: new connections get what is there now, those that are open are left alone.

    If the new files cannot be used, the old ones stay in use and `why` says so. `server` is a context to listen with;
    `current` is one to connect with, to be asked for anew for each connection. Nothing has to be called: files are looked
    at as connections come, or by `look`.
    """

    def __init__(
        self,
        directory: Path,
        name: str | None,
        *,
        server: bool,
        require_client: bool = False,
        alpn: Sequence[str] = (),
        check_hostname: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `BulkheadError` if the files cannot be used now."""
        self._directory, self._name, self._alpn, self._clock = directory, name, tuple(alpn), clock
        self._is_server, self._require_client, self._check_hostname = server, require_client, check_hostname
        self.why = ""
        """What is wrong with the newest files; empty if they are in use."""
        self.reloads = 0
        """How often changed files were taken up."""
        self._stamp = self._look_at()
        self._current = self._made()
        self._looked = clock()

    @property
    def current(self) -> ssl.SSLContext:
        """The context for a new connection."""
        if self._clock() - self._looked >= LOOK_S:
            self.look()
        return self._current

    @property
    def server(self) -> ssl.SSLContext:
        """A context to listen with, once and for all; each handshake goes on with `current`."""
        front = self._made()
        front.sni_callback = self._swap
        return front

    def look(self) -> bool:
        """Take up changed files; whether there were any that can be used. Never raises for what the files are like."""
        self._looked = self._clock()
        stamp = self._look_at()
        if stamp == self._stamp:
            return False
        try:
            self._current = self._made()
        except BulkheadError as exc:
            self.why = str(exc)  # looked at again: the next file of a set may be on its way
            return False
        self._stamp, self.why = stamp, ""
        self.reloads += 1
        return True

    def _swap(self, connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
        connection.context = self.current

    def _made(self) -> ssl.SSLContext:
        if self._is_server:
            return server_context(self._directory, self._name or "", self._require_client, alpn=self._alpn)
        return client_context(self._directory, self._name, alpn=self._alpn, check_hostname=self._check_hostname)

    def _look_at(self) -> _Stamp:
        of = files(self._directory, self._name)
        return tuple(_stamp(path) for path in (of.ca, of.crl, of.certificate, of.key) if path is not None)


def _stamp(path: Path) -> tuple[int, int, int] | str:
    try:
        found = path.stat()
    except OSError as exc:
        return str(exc.errno)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


class Revocations:
    """Which certificates are revoked, for connections that are open already. Follows `crl.pem` as it changes."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "crl.pem"
        self._stamp: object = None
        self._serials: frozenset[int] = frozenset()

    def peer(self, connection: ssl.SSLObject | ssl.SSLSocket) -> bool:
        """Whether what the other side has shown is revoked by now."""
        found = connection.getpeercert() or {}
        return bool(found) and int(str(found["serialNumber"]), 16) in self.serials

    @property
    def serials(self) -> frozenset[int]:
        """Serial numbers; random and of 128 bits, so one of them says which CA's it is. An unreadable file changes nothing."""
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            with contextlib.suppress(OSError, ValueError):
                self._serials = frozenset(_revoked(self._path.read_bytes()))
                self._stamp = stamp
        return self._serials


END_OF_CRL = b"-----END X509 CRL-----\n"


def _revoked(pem: bytes) -> list[int]:
    from cryptography import x509

    parts = [part for part in pem.split(END_OF_CRL) if part.strip()]
    return [one.serial_number for part in parts for one in x509.load_pem_x509_crl(part + END_OF_CRL)]
