"""Try a certificate before it is used: a real TLS 1.3 handshake in memory, with the trust that everybody has now.
Imports making and `controller.security.tls`."""

from __future__ import annotations

import datetime as dt
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

from controller.problems import BulkheadError
from controller.security import tls
from controller.security.pki import making
from controller.security.pki.identity import Identity, Usage

_ROUNDS = 10


def try_pair(pair: Path, ca: Path, crl: Path) -> None:
    """Whether `cert.pem` and `key.pem` in a directory do what the certificate is for: as a server that clients know by each
    of its names, as a client that servers let in. Raises `BulkheadError` saying what went wrong."""
    of = tls.Files(ca, crl, pair / "cert.pem", pair / "key.pem")
    what = str(of.certificate)
    found = making.certificates((pair / "cert.pem").read_bytes(), what)[0]
    usage = making.usage_of(found)
    addresses, hosts = making.names_in(found)
    if usage.serves:
        server = tls.context(of, server=True, require_peer=usage.connects)
        client = tls.context(of if usage.connects else tls.Files(ca, crl), server=False, require_peer=True)
        for name in (*hosts, *addresses):
            _told(what, lambda n=name: shake(server, client, n.replace("*", "any")))  # type: ignore[misc]
    else:
        with tempfile.TemporaryDirectory() as directory:
            anybody = _anybody(Path(directory))
            server = tls.context(tls.Files(ca, crl, *anybody), server=True, require_peer=True)
            client = tls.context(of, server=False, require_peer=True)
            client.check_hostname, client.verify_mode = False, ssl.CERT_NONE  # it is the client that is tried
            _told(what, lambda: shake(server, client, None))


def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str | None) -> str:
    """A handshake in memory; the protocol's version. Raises `ssl.SSLError`."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    open_ends = list(ends)
    for _ in range(_ROUNDS):
        for end in list(open_ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            open_ends.remove(end)
        if not open_ends:
            return ends[0].version() or ""
    raise ssl.SSLError("the handshake does not end")


def _told(what: str, handshake: Callable[[], object]) -> None:
    try:
        handshake()
    except ssl.SSLError as exc:
        why = exc.verify_message if isinstance(exc, ssl.SSLCertVerificationError) else exc.reason or str(exc)
        raise BulkheadError(
            f"{what} was tried in a handshake and failed: {why}; what was in use stays in use. See: bulkhead pki status"
        ) from None


def _anybody(directory: Path) -> tuple[Path, Path]:
    """A server's certificate of no CA that matters, gone in a moment."""
    key = making.new_key()
    now = dt.datetime.now(dt.UTC)
    ca = making.new_ca("trial", key, now)
    leaf = making.new_leaf(Identity("trial", Usage.SERVER, days=1), key.public_key(), ca, key, now)
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(making.pem_of(leaf))
    paths[1].write_bytes(making.key_pem(key))
    return paths
