"""The listening socket in the API container's namespace: asked of the agent, served with TLS, for tokens alone.

Asked for again every second, since the container may come later or be made anew. Never on a network with a way out.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from controller.api.settings import Settings
from controller.api.view import View
from controller.api_socket import Listening, listening_socket
from controller.problems import BulkheadError

if TYPE_CHECKING:
    from cryptography.x509 import GeneralName

LOG = logging.getLogger("bulkhead.api")
DAYS = 3650
_RENEW = datetime.timedelta(days=30)


def context(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """TLS for a server. Raises `BulkheadError`."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    try:
        made.load_cert_chain(certificate, private_key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else "they are no pair of PEM files"
        raise BulkheadError(
            f"the API's certificate {certificate} and key {private_key} cannot be used: {why}; give a certificate and its "
            "private key, unencrypted, that the API's user may read"
        ) from None
    return made


def _resolved(certificate: Path, private_key: Path) -> tuple[Path, Path]:
    """The files themselves: a link to both may point elsewhere in a moment."""
    return Path(os.path.realpath(certificate)), Path(os.path.realpath(private_key))


def _no_password() -> str:
    raise ValueError("an encrypted key")


def own_certificate(directory: Path, names: list[str]) -> tuple[Path, Path]:
    """A self-signed certificate for these names and addresses, and its key; made where there is none that fits."""
    certificate, key = directory / "certificate.pem", directory / "private_key.pem"
    if not _fits(certificate, key, names):
        _make(certificate, key, names)
    return certificate, key


def _fits(certificate: Path, key: Path, names: list[str]) -> bool:
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        there = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    known = {*there.get_values_for_type(x509.DNSName), *map(str, there.get_values_for_type(x509.IPAddress))}
    late = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC) < _RENEW
    return key.exists() and set(names) <= known and not late


def _make(certificate: Path, key: Path, names: list[str]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Bulkhead API")])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    text = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(key, text, 0o600)
    _write(certificate, made.public_bytes(serialization.Encoding.PEM), 0o644)


def _general(name: str) -> GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, data: bytes, mode: int) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
    os.replace(new, path)


def fingerprint(certificate: Path) -> str:
    """SHA-256 of a certificate, to pin."""
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
    return sha256(der).hexdigest()


class Listener:
    """Keeps the socket. `opened` serves a new one and answers how to stop that."""

    def __init__(
        self,
        settings: Settings,
        view: View,
        opened: Callable[[Listening, ssl.SSLContext, frozenset[str]], Awaitable[Callable[[], None]]],
    ) -> None:
        self._settings, self._view, self._opened = settings, view, opened
        self._have: Listening | None = None
        self._pair: tuple[Path, Path] | None = None
        self._context: ssl.SSLContext | None = None
        self._read: tuple[Path, Path] | None = None
        self._stop: Callable[[], None] = lambda: None
        self.why = ""

    @property
    def listening(self) -> Listening | None:
        """Where it listens now."""
        return self._have

    async def look(self) -> None:
        """Ask the agent. Never raises; why there is none is in `why`."""
        try:
            await self._look()
            self.why = ""
        except BulkheadError as exc:
            if str(exc) != self.why:
                LOG.warning("the API does not listen in its container: %s", exc)
            self.why = str(exc)

    async def _look(self) -> None:
        wanted = self._view.declared.host.api
        if wanted.container_id is None or wanted.address is None:
            self.close()
            return
        network = next((one for one in self._view.declared.state.networks if wanted.address in one.subnet), None)
        if network is None or network.egress is not None:
            self.close()
            raise BulkheadError(
                f"{wanted.address} is on a network with a way out; the API listens on no such network. Name a container of "
                "another one under api.container"
            )
        have = self._have.namespace if self._have is not None else ""
        if self._have is not None and (self._have.address, self._have.port) != (str(wanted.address), wanted.port):
            have = ""
        found = await asyncio.to_thread(listening_socket, self._settings.run_dir, have)
        if found is None:
            await asyncio.to_thread(self._renew)
            return
        if found.address != str(wanted.address):
            found.sock.close()
            raise BulkheadError(f"the agent offers {found.address}, not {wanted.address}; it reads another state file")
        names = self._names(str(wanted.container_id))
        stop = await self._opened(found, await asyncio.to_thread(self._tls, names), frozenset(names))
        self.close()
        self._have, self._stop = found, stop

    def _names(self, container: str) -> list[str]:
        """What the API is called there: its address, its container's name, with and without the network's domain."""
        state, host = self._view.declared.state, self._view.declared.host
        for network in state.networks:
            for member in network.members:
                if member.id == container:
                    domains = [zone.domain for zone in host.zones if zone.network == network.name]
                    name = member.name.lower()
                    return [str(member.address), name, *(f"{name}.{domain}" for domain in domains)]
        return []

    def _tls(self, names: list[str]) -> ssl.SSLContext:
        api = self._view.declared.host.api
        certificate = self._settings.certificate or api.certificate
        private_key = self._settings.private_key or api.private_key
        if certificate is None or private_key is None:
            certificate, private_key = own_certificate(self._settings.state_dir, names)
        self._pair = certificate, private_key
        self._read = _resolved(certificate, private_key)
        self._context = context(*self._read)
        LOG.warning("the API's certificate %s has fingerprint sha256:%s", certificate, fingerprint(self._read[0]))
        return self._context

    def _renew(self) -> None:
        """Take up a pair that a link points at now, for new connections. Raises `BulkheadError` while it is not whole."""
        if self._pair is None or self._context is None or (now := _resolved(*self._pair)) == self._read:
            return
        context(*now)  # in the one that is in use, a pair that does not fit would leave nothing
        self._context.load_cert_chain(*now, password=_no_password)
        self._read = now
        LOG.warning("the API's certificate %s was renewed, fingerprint sha256:%s", self._pair[0], fingerprint(now[0]))

    def close(self) -> None:
        """Listen no more."""
        self._stop()
        self._stop = lambda: None
        self._have = None
