"""RFC 9180, appendix A: the official vectors of the suites that are used, and their siblings with AES-128-GCM."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey, KEMKeyPair

from controller.security.hpke.suites import _HPKE

INFO = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
TEXT = bytes.fromhex("4265617574792069732074727574682c20747275746820626561757479")
EXPORTS = (b"", b"\0", b"TestContext")


@dataclass(frozen=True)
class Vector:
    aead: AEADId
    ephemeral: str
    recipient: str
    sender: str
    enc: str
    ciphertexts: tuple[str, ...]
    exports: tuple[str, ...]


VECTORS = {
    "A.1.1 base": Vector(
        AEADId.AES128_GCM,
        "52c4a758a802cd8b936eceea314432798d5baf2d7e9235dc084ab1b9cfa2f736",
        "4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8",
        "",
        "37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431",
        (
            "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a",
            "af2d7e9ac9ae7e270f46ba1f975be53c09f8d875bdc8535458c2494e8a6eab251c03d0c22a56b8ca42c2063b84",
            "498dfcabd92e8acedc281e85af1cb4e3e31c7dc394a1ca20e173cb72516491588d96a19ad4a683518973dcc180",
        ),
        (
            "3853fe2b4035195a573ffc53856e77058e15d9ea064de3e59f4961d0095250ee",
            "2e8f0b54673c7029649d4eb9d5e33bf1872cf76d623ff164ac185da9e88c21a5",
            "e9e43065102c3836401bed8c3c3c75ae46be1639869391d62c61f1ec7af54931",
        ),
    ),
    "A.1.3 auth": Vector(
        AEADId.AES128_GCM,
        "ff4442ef24fbc3c1ff86375b0be1e77e88a0de1e79b30896d73411c5ff4c3518",
        "fdea67cf831f1ca98d8e27b1f6abeb5b7745e9d35348b80fa407ff6958f9137e",
        "dc4a146313cce60a278a5323d321f051c5707e9c45ba21a3479fecdf76fc69dd",
        "23fb952571a14a25e3d678140cd0e5eb47a0961bb18afcf85896e5453c312e76",
        (
            "5fd92cc9d46dbf8943e72a07e42f363ed5f721212cd90bcfd072bfd9f44e06b80fd17824947496e21b680c141b",
            "d3736bb256c19bfa93d79e8f80b7971262cb7c887e35c26370cfed62254369a1b52e3d505b79dd699f002bc8ed",
            "122175cfd5678e04894e4ff8789e85dd381df48dcaf970d52057df2c9acc3b121313a2bfeaa986050f82d93645",
        ),
        (
            "28c70088017d70c896a8420f04702c5a321d9cbf0279fba899b59e51bac72c85",
            "25dfc004b0892be1888c3914977aa9c9bbaf2c7471708a49e1195af48a6f29ce",
            "5a0131813abc9a522cad678eb6bafaabc43389934adb8097d23c5ff68059eb64",
        ),
    ),
    "A.2.1 base": Vector(
        AEADId.CHACHA20_POLY1305,
        "f4ec9b33b792c372c1d2c2063507b684ef925b8c75a42dbcbf57d63ccd381600",
        "8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb",
        "",
        "1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a",
        ("1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28",),
        ("4bbd6243b8bb54cec311fac9df81841b6fd61f56538a775e7c80a9f40160606e",),
    ),
    "A.2.3 auth": Vector(
        AEADId.CHACHA20_POLY1305,
        "c94619e1af28971c8fa7957192b7e62a71ca2dcdde0a7cc4a8a9e741d600ab13",
        "3ca22a6d1cda1bb9480949ec5329d3bf0b080ca4c45879c95eddb55c70b80b82",
        "2def0cb58ffcf83d1062dd085c8aceca7f4c0c3fd05912d847b61f3e54121f05",
        "f7674cc8cd7baa5872d1f33dbaffe3314239f6197ddf5ded1746760bfc847e0e",
        (
            "ab1a13c9d4f01a87ec3440dbd756e2677bd2ecf9df0ce7ed73869b98e00c09be111cb9fdf077347aeb88e61bdf",
            "3265c7807ffff7fdace21659a2c6ccffee52a26d270c76468ed74202a65478bfaedfff9c2b7634e24f10b71016",
            "3aadee86ad2a05081ea860033a9d09dbccb4acac2ded0891da40f51d4df19925f7a767b076a5cbc9355c8fd35e",
        ),
        (
            "070cffafd89b67b7f0eeb800235303a223e6ff9d1e774dce8eac585c8688c872",
            "2852e728568d40ddb0edde284d36a4359c56558bb2fb8837cd3d92e46a3a14a8",
            "1df39dc5dd60edcbf5f9ae804e15ada66e885b28ed7929116f768369a3f950ee",
        ),
    ),
}


def key(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_the_official_vectors(vector: Vector) -> None:
    wrap = KEMKey.from_pyca_cryptography_key
    suite = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, vector.aead)
    ephemeral, recipient = key(vector.ephemeral), key(vector.recipient)
    sender = key(vector.sender) if vector.sender else None
    pair = KEMKeyPair(wrap(ephemeral), wrap(ephemeral.public_key()))

    enc, sealing = suite.create_sender_context(
        wrap(recipient.public_key()), INFO, sks=wrap(sender) if sender else None, eks=pair
    )
    opening = suite.create_recipient_context(
        enc, wrap(recipient), INFO, pks=wrap(sender.public_key()) if sender else None
    )

    assert enc.hex() == vector.enc
    for count, expected in enumerate(vector.ciphertexts):
        assert sealing.seal(TEXT, b"Count-%d" % count).hex() == expected
        assert opening.open(bytes.fromhex(expected), b"Count-%d" % count) == TEXT
    for context, expected in zip(EXPORTS, vector.exports, strict=False):
        assert sealing.export(context, 32).hex() == opening.export(context, 32).hex() == expected


def test_the_suites_are_those_of_a_2() -> None:
    assert (_HPKE.kem.id.value, _HPKE.kdf.id.value, _HPKE.aead.id.value) == (0x0020, 0x0001, 0x0003)
