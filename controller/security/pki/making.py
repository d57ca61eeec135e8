"""Keys, certificates and lists of revocations, as values. P-256 and SHA-256 throughout. Imports identity and problems."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from typing import Final, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.problems import BulkheadError
from controller.security.pki.identity import Identity, Usage
from controller.wgkeys import Secret

CA_LIFE: Final = dt.timedelta(days=730)
CRL_LIFE: Final = dt.timedelta(days=7)
SKEW: Final = dt.timedelta(minutes=5)
"""Clocks may be that much apart: what is made begins to be valid a little earlier."""
JITTER: Final = 0.05
"""The share of a certificate's life within which renewals of different names are spread."""

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key() -> Key:
    """A private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key, passphrase: Secret | None = None) -> bytes:
    """PKCS 8, encrypted if there is a passphrase."""
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        how = serialization.BestAvailableEncryption(passphrase.reveal().encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def load_key(pem: bytes, what: str, passphrase: Secret | None = None) -> Key:
    """The private key in a PEM file. Raises `BulkheadError`."""
    encrypted = b"ENCRYPTED" in pem
    if encrypted and passphrase is None:
        raise BulkheadError(f"{what} is encrypted; give its passphrase with --passphrase-file or --passphrase-fd")
    try:
        secret = passphrase.reveal().encode() if passphrase is not None and encrypted else None
        found = serialization.load_pem_private_key(pem, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        why = "the passphrase is wrong, or it is damaged" if encrypted else "it is damaged"
        raise BulkheadError(f"{what} cannot be read: {why}; restore it from a back-up") from None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise BulkheadError(f"{what} is no key for P-256; restore the right one from a back-up")
    return found


def same_key(certificate: x509.Certificate, key: Key) -> bool:
    """Whether a certificate is for a key."""
    return certificate.public_key() == key.public_key()


def key_hash(key: object) -> str:
    """SHA-256 of a public key."""
    raw = cast(PublicKey, key).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(raw).hexdigest()


def pem_of(value: x509.Certificate | x509.CertificateRevocationList | x509.CertificateSigningRequest) -> bytes:
    """Its PEM."""
    return value.public_bytes(serialization.Encoding.PEM)


def serial_text(number: int) -> str:
    """A serial number as 32 hexadecimal digits."""
    return f"{number:032x}"


def name_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The name in the subject; empty if there is none."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def new_ca(name: str, key: Key, now: dt.datetime) -> x509.Certificate:
    """A CA's certificate, signed by itself. No other CA may stand below it. Its subject is like no other CA's."""
    serial = _serial()
    text = f"{name[:40]} {now:%Y-%m-%d} {serial_text(serial)[:8]}"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(_whole(now - SKEW))
        .not_valid_after(_whole(now + CA_LIFE))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_uses(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def new_leaf(of: Identity, public: PublicKey, ca: x509.Certificate, ca_key: Key, now: dt.datetime) -> x509.Certificate:
    """A certificate for somebody's public key. It ends with the CA's at the latest. Raises `BulkheadError`."""
    ends = min(_whole(now + dt.timedelta(days=of.days)), ca.not_valid_after_utc)
    begins = max(_whole(now - min(SKEW, dt.timedelta(days=of.days))), ca.not_valid_before_utc)
    if ends <= now:
        raise BulkheadError(
            f"the CA ended at {ca.not_valid_after_utc:%Y-%m-%d}; make a new one: bulkhead pki rotate-ca prepare"
        )
    uses = [ExtendedKeyUsageOID.SERVER_AUTH] if of.usage.serves else []
    uses += [ExtendedKeyUsageOID.CLIENT_AUTH] if of.usage.connects else []
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, of.name)]))
        .issuer_name(ca.subject)
        .public_key(public)
        .serial_number(_serial())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_uses(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(_names(of), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(cast(PublicKey, ca.public_key())), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )


def new_crl(
    ca: x509.Certificate, ca_key: Key, revoked: Mapping[int, dt.datetime], now: dt.datetime
) -> x509.CertificateRevocationList:
    """A CA's list of what it has revoked: serial numbers, and since when. Its number grows with time."""
    made = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(_whole(now - SKEW))
        .next_update(_whole(now + CRL_LIFE))
        .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(cast(PublicKey, ca.public_key())), critical=False
        )
    )
    for serial, when in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_whole(when)).build()
        made = made.add_revoked_certificate(entry)
    return made.sign(ca_key, hashes.SHA256())


def new_request(of: Identity, key: Key) -> x509.CertificateSigningRequest:
    """Ask for a certificate; the key stays where it is."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, of.name)]))
        .add_extension(_names(of), critical=False)
        .sign(key, hashes.SHA256())
    )


def read_request(pem: bytes, what: str) -> tuple[x509.CertificateSigningRequest, PublicKey]:
    """A request that was signed with the key it names, and that key. Raises `BulkheadError`."""
    try:
        found = x509.load_pem_x509_csr(pem)
        key = found.public_key()
        good = found.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        good, key, found = False, None, None
    if not good or found is None:
        raise BulkheadError(f"{what} is no request for a certificate; make one there: bulkhead pki request NAME")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BulkheadError(f"{what} asks for a certificate of another kind of key; expected P-256")
    return found, key


def certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    """Every certificate in a PEM text. Raises `BulkheadError` if there is none, or something else in its place."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise BulkheadError(f"{what} holds no certificate that can be read; restore it, or issue a new one") from None


_CRL_BEGIN, _CRL_END = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"


def crls(pem: bytes, what: str) -> list[x509.CertificateRevocationList]:
    """Every list of revocations in a PEM text. Raises `BulkheadError`."""
    found = []
    for part in pem.split(_CRL_BEGIN)[1:]:
        body, end, _ = part.partition(_CRL_END)
        try:
            if not end:
                raise ValueError
            found.append(x509.load_pem_x509_crl(_CRL_BEGIN + body + _CRL_END + b"\n"))
        except ValueError:
            raise BulkheadError(
                f"{what} holds a list of revocations that cannot be read; any bulkhead pki command that "
                "changes something writes it anew"
            ) from None
    return found


def crl_number(crl: x509.CertificateRevocationList) -> int:
    """Which of two lists is newer."""
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def crl_serials(crl: x509.CertificateRevocationList) -> frozenset[int]:
    """What it revokes."""
    return frozenset(one.serial_number for one in crl)


def crl_due(crl: x509.CertificateRevocationList) -> dt.datetime:
    """When a list has to be replaced. One without an end is never trusted for longer than ours are good."""
    return crl.next_update_utc or crl.last_update_utc + CRL_LIFE


def signed_by(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    """Whether a list is of a CA."""
    return crl.issuer == ca.subject and crl.is_signature_valid(cast(PublicKey, ca.public_key()))


def issued_by(certificate: x509.Certificate, authorities: Iterable[x509.Certificate]) -> x509.Certificate | None:
    """The CA that has signed a certificate."""
    for ca in authorities:
        try:
            certificate.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return ca
    return None


def usage_of(certificate: x509.Certificate) -> Usage:
    """What a certificate of ours is for."""
    uses = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    serves, connects = ExtendedKeyUsageOID.SERVER_AUTH in uses, ExtendedKeyUsageOID.CLIENT_AUTH in uses
    return Usage.PEER if serves and connects else Usage.SERVER if serves else Usage.CLIENT


def names_in(of: x509.Certificate | x509.CertificateSigningRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Addresses and host names it stands for."""
    try:
        found = of.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return (), ()
    return tuple(map(str, found.get_values_for_type(x509.IPAddress))), tuple(found.get_values_for_type(x509.DNSName))


def renew_at(certificate: x509.Certificate) -> dt.datetime:
    """When to replace a certificate: a little before two thirds of its life, for each name another little."""
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_before_utc + life * renew_share(name_of(certificate))


def renew_share(name: str) -> float:
    """The share of its life after which a name's certificate is replaced."""
    return 2 / 3 - JITTER * int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def half_life(ca: x509.Certificate) -> dt.datetime:
    """When to replace a CA."""
    return ca.not_valid_before_utc + (ca.not_valid_after_utc - ca.not_valid_before_utc) / 2


def _serial() -> int:
    while True:
        number = int.from_bytes(os.urandom(16), "big")
        if number:
            return number


def _whole(time: dt.datetime) -> dt.datetime:
    return time.replace(microsecond=0)


def _names(of: Identity) -> x509.SubjectAlternativeName:
    addresses = [x509.IPAddress(ipaddress.ip_address(one)) for one in of.ips]
    return x509.SubjectAlternativeName([*map(x509.DNSName, of.hosts), *addresses])


def _uses(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
