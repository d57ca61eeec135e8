"""A directory of certificates in use: trust, revocations, a pair for each name, and the requests for others.

It needs no CA's key: the CA's own directory is one, and so is that of every machine that is given certificates. Imports
disk, identity, making and trial.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography import x509

from controller.problems import BulkheadError
from controller.security.pki import making, trial
from controller.security.pki.disk import Disk, locked, read, staged
from controller.security.pki.identity import Identity, check_name

KEPT = 2
"""So many pairs of a name stay beside the one in use, to go back to, and for who is reading one just now."""


class Holder:
    """The directory:

    `ca.pem`, `crl.pem`            every CA trusted now; a list of revocations of each
    `current/NAME`                 a link to the pair in use, `cert.pem` and `key.pem`
    `issued/NAME/SERIAL/`          pairs
    `requests/NAME/`               keys that wait for their certificates
    """

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self.directory = directory
        self.disk = disk or Disk()

    @property
    def ca(self) -> Path:
        """Every CA trusted now."""
        return self.directory / "ca.pem"

    @property
    def crl(self) -> Path:
        """The lists of revocations."""
        return self.directory / "crl.pem"

    def names(self) -> list[str]:
        """Who has a pair in use."""
        found = self.directory / "current"
        return sorted(path.name for path in found.iterdir() if path.is_symlink()) if found.is_dir() else []

    def link(self, name: str) -> Path:
        """Where servers and clients of that name find their pair."""
        check_name(name)
        return self.directory / "current" / name

    def current(self, name: str) -> x509.Certificate | None:
        """The certificate in use."""
        pem = read(self.link(name) / "cert.pem")
        return making.certificates(pem, str(self.link(name)))[0] if pem else None

    def authorities(self) -> list[x509.Certificate]:
        """The CAs trusted now; none if nothing was set up."""
        pem = read(self.ca)
        return making.certificates(pem, str(self.ca)) if pem else []

    def bundle(self, name: str) -> bytes:
        """What the programs that use a name need, PEM: certificate, trust, revocations, key. Raises `BulkheadError`."""
        pair = self.link(name)
        parts = [read(path) for path in (pair / "cert.pem", self.ca, self.crl, pair / "key.pem")]
        if None in parts:
            raise BulkheadError(f"{name} has no certificate here; make a request, and accept what is sent back")
        return b"".join(part for part in parts if part is not None)

    def trust(self) -> bytes:
        """CAs and revocations, PEM."""
        return (read(self.ca) or b"") + (read(self.crl) or b"")

    def revocations(self) -> list[x509.CertificateRevocationList]:
        """The lists of revocations."""
        return making.crls(read(self.crl) or b"", str(self.crl))

    def publish(self, ca: bytes, crl: bytes) -> None:
        """Replace trust and revocations where they differ. Revocations first: without its CA's list a certificate is refused."""
        for path, data in ((self.crl, crl), (self.ca, ca)):
            if read(path) != data:
                self.disk.write(path, data)

    def stage(self, certificate: x509.Certificate, key: making.Key | None) -> Path:
        """Put a pair beside those of its name, not in use yet."""
        name = making.name_of(certificate)
        place = self.directory / "issued" / name / making.serial_text(certificate.serial_number)
        if place.is_dir():
            return place
        self.disk.directory(place.parent)
        new = staged(place)
        self.disk.directory(new)
        if key is not None:
            self.disk.write(new / "key.pem", making.key_pem(key))
        self.disk.write(new / "cert.pem", making.pem_of(certificate))
        self.disk.rename(new, place)
        return place

    def use(self, pair: Path) -> None:
        """Try a pair, then use it for its name from now. Raises `BulkheadError` if it does not work; nothing changes then."""
        trial.try_pair(pair, self.ca, self.crl)
        link = self.link(pair.parent.name)
        if os.path.realpath(link) != os.path.realpath(pair):
            self.disk.directory(link.parent)
            self.disk.link(link, f"../issued/{pair.parent.name}/{pair.name}")

    def pairs(self, name: str) -> list[Path]:
        """The pairs of a name that are not in use, the newest first."""
        place = self.directory / "issued" / name
        if not place.is_dir():
            return []
        used = os.path.realpath(self.link(name))
        found = [path for path in place.iterdir() if not path.name.startswith(".") and os.path.realpath(path) != used]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def prune(self, name: str) -> None:
        """Remove pairs that nobody will go back to."""
        for path in self.pairs(name)[KEPT:]:
            self.disk.remove(path)

    def back(self, name: str) -> x509.Certificate:
        """Use the pair again that was in use before. Raises `BulkheadError` if there is none that works."""
        failed = ""
        for pair in self.pairs(name):
            try:
                self.use(pair)
            except BulkheadError as exc:
                failed = f": {exc}"
                continue
            found = self.current(name)
            assert found is not None
            return found
        raise BulkheadError(f"{name} has no earlier certificate that works; issue a new one{failed}")

    # - keys that never leave their machine

    def request(self, identity: Identity) -> bytes:
        """Make a key here and ask for a certificate; the request, PEM."""
        self.disk.directory(self.directory)
        with locked(self.directory):
            self.disk.sweep(self.directory)
            key = making.new_key()
            place = self.directory / "requests" / identity.name
            self.disk.directory(place)
            self.disk.write(place / f"{making.key_hash(key.public_key())[:32]}.pem", making.key_pem(key))
            return making.pem_of(making.new_request(identity, key))

    def accept(self, bundle: bytes, *, new_ca: bool = False) -> x509.Certificate | None:
        """Take up what a CA has sent: certificate, trust, revocations, maybe a key. The certificate is tried first.

        The bundle has to be of a CA that is trusted here, unless there is none yet or `new_ca`. Its lists of revocations may
        not be older than those that are here. Answers the certificate; None if the bundle had none. Raises `BulkheadError`.
        """
        leaf, authorities, lists, key = _opened(bundle)
        self.disk.directory(self.directory)
        with locked(self.directory):
            self.disk.sweep(self.directory)
            if (self.directory / "state.json").exists():
                raise BulkheadError(f"{self.directory} is the CA's own directory; name another one with --security-dir")
            self._check_trust(authorities, lists, new_ca)
            ca = b"".join(map(making.pem_of, authorities))
            crl = b"".join(map(making.pem_of, lists))
            if leaf is None:
                self.publish(ca, crl)
                return None
            name = making.name_of(leaf)
            check_name(name)
            found = key or self._waiting(leaf) or self._had(leaf)
            if found is None or not making.same_key(leaf, found):
                raise BulkheadError(
                    f"the certificate of {name} is for a key that is not here; make a request here and have it signed: "
                    f"bulkhead pki request {name}"
                )
            pair = self.stage(leaf, found)
            try:
                self._try_with(pair, ca, crl)
            except BulkheadError:
                if os.path.realpath(self.link(name)) != os.path.realpath(pair):
                    self.disk.remove(pair)
                if set(self.authorities()) <= set(authorities):
                    self.publish(ca, crl)  # it may be revoked itself, and still has to refuse others that are
                raise
            with contextlib.suppress(BulkheadError):
                self.use(pair)  # before its predecessor's CA may go; a CA that is new here has to come first
            self.publish(ca, crl)
            self.use(pair)
            self.prune(name)
            self._forget_request(leaf)
            return leaf

    def _try_with(self, pair: Path, ca: bytes, crl: bytes) -> None:
        trust = staged(self.ca), staged(self.crl)
        try:
            for path, data in zip(trust, (ca, crl), strict=True):
                path.write_bytes(data)
            trial.try_pair(pair, *trust)
        finally:
            for path in trust:
                path.unlink(missing_ok=True)

    def _check_trust(
        self, authorities: list[x509.Certificate], lists: list[x509.CertificateRevocationList], new_ca: bool
    ) -> None:
        here = self.authorities()
        if here and not new_ca and not set(here) & set(authorities):
            raise BulkheadError(
                "this is of another CA than the one trusted here; if that is meant, say so with --new-ca, else find out who "
                "has sent it"
            )
        for ca in authorities:
            if not any(making.signed_by(one, ca) for one in lists):
                raise BulkheadError(f"there is no list of revocations of {making.name_of(ca)} in it; export it anew")
        newest = {one.issuer: making.crl_number(one) for one in self.revocations()}
        for one in lists:
            if making.crl_number(one) < newest.get(one.issuer, 0):
                raise BulkheadError("its list of revocations is older than the one here; export it anew")

    def _request_file(self, leaf: x509.Certificate) -> Path:
        name = making.key_hash(leaf.public_key())[:32]
        return self.directory / "requests" / making.name_of(leaf) / f"{name}.pem"

    def _waiting(self, leaf: x509.Certificate) -> making.Key | None:
        path = self._request_file(leaf)
        pem = read(path)
        return making.load_key(pem, str(path)) if pem else None

    def _had(self, leaf: x509.Certificate) -> making.Key | None:
        path = self.link(making.name_of(leaf)) / "key.pem"
        pem = read(path)
        return making.load_key(pem, str(path)) if pem else None

    def _forget_request(self, leaf: x509.Certificate) -> None:
        path = self._request_file(leaf)
        if path.exists():
            self.disk.remove(path)


def _opened(
    bundle: bytes,
) -> tuple[x509.Certificate | None, list[x509.Certificate], list[x509.CertificateRevocationList], making.Key | None]:
    """Certificate, CAs, lists of revocations and key in a PEM text. Raises `BulkheadError`."""
    what = "what was sent"
    found = making.certificates(bundle, what)
    authorities = [one for one in found if _is_ca(one)]
    leaves = [one for one in found if one not in authorities]
    if len(leaves) > 1 or not authorities:
        raise BulkheadError(
            f"{what} has {len(leaves)} certificates and {len(authorities)} CAs; expected one, and one or two"
        )
    begin, end = b"-----BEGIN PRIVATE KEY-----", b"-----END PRIVATE KEY-----"
    key = None
    if begin in bundle:
        text = begin + bundle.partition(begin)[2].partition(end)[0] + end + b"\n"
        key = making.load_key(text, f"the key in {what}")
    return (leaves[0] if leaves else None), authorities, making.crls(bundle, what), key


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False
