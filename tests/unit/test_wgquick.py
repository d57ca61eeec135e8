"""Files in wg-quick's style: what is read from them, and what is never said of them."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.agent.wgquick import Quick, QuickPeer, parse
from controller.hostmodel import Endpoint
from controller.model import Ipv4, Prefix
from controller.problems import InvalidInput

PRIVATE = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
PUBLIC = "bmXOC+F1FxEMF9dyiK2H5/1SUtzH0JuVo51h2wPfgyo="
SHARED = "/UwcSPg38hW/D9Y3tcS1FOV0K1wuURMbS0sesJEP5ak="

WGCF = f"""[Interface]
PrivateKey = {PRIVATE}
Address = 172.16.0.2/32, 2606:4700:110:8a36:df92:102a:9602:fa18/128
DNS = 1.1.1.1, 1.0.0.1, 2606:4700:4700::1111, 2606:4700:4700::1001
MTU = 1280
[Peer]
PublicKey = {PUBLIC}
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = engage.cloudflareclient.com:2408
"""

ALL = Prefix(Ipv4(0), 0)


def test_a_profile_of_wgcf() -> None:
    read = parse(WGCF, "wgcf-profile.conf")
    assert read.private_key is not None and read.private_key.reveal() == PRIVATE
    assert read.addresses == ((Ipv4.parse("172.16.0.2"), 32),)
    assert (read.mtu, read.listen_port) == (1280, None)
    assert read.peers == (QuickPeer(PUBLIC, (ALL,), Endpoint("engage.cloudflareclient.com", 2408)),)
    assert [(p.code, p.path) for p in read.problems] == [
        ("ipv6", "wgcf-profile.conf:3"),
        ("ignored", "wgcf-profile.conf:4"),
        ("ipv6", "wgcf-profile.conf:8"),
    ]


def test_everything_wg_quick_knows() -> None:
    text = f"""
# made by hand
[interface]
privatekey={PRIVATE}   # a comment
ListenPort = 51820
Address = 10.9.0.1/24
Address = 10.9.1.1
Table = off
PostUp = iptables -A FORWARD -i %i -j ACCEPT; echo a=b
[PEER]
PublicKey = {PUBLIC}
PresharedKey = {SHARED}
AllowedIPs = 10.9.0.2/32
AllowedIPs = 10.20.30.40/16
PersistentKeepalive = off
"""
    read = parse(text.replace("\n", "\r\n"), "a")
    assert read.addresses == ((Ipv4.parse("10.9.0.1"), 24), (Ipv4.parse("10.9.1.1"), 32))
    assert read.listen_port == 51820
    assert read.peers[0].allowed == (Prefix.parse("10.9.0.2/32"), Prefix.parse("10.20.0.0/16"))
    assert read.peers[0].preshared_key is not None and read.peers[0].preshared_key.reveal() == SHARED
    assert [p.code for p in read.problems] == ["ignored", "command"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Endpoint = [2606:4700:d0::a29f:c001]:2408", "a name or an IPv4 address"),
        ("Endpoint = 1.2.3.4", "HOST:PORT"),
        ("Endpoint = a..b:1", "HOST:PORT"),
        ("Endpoint = 1.2.3.4:65536", "HOST:PORT"),
        ("Endpoint =", "Endpoint = nothing"),
        ("AllowedIPs = 10.0.0.300/24", "10.9.0.2/24"),
        ("PersistentKeepalive = 65536", "from 0 to 65535"),
        ("PersistentKeepalive = ²", "from 0 to 65535"),
        (f"PublicKey = {PUBLIC[:-1]}", "44 characters of base64"),
        (f"PresharedKey = {'A' * 43}=", "44 characters of base64"),
        ("Colour = red", "a key of [peer]"),
        ("nonsense", "KEY = VALUE"),
        (f"[Peer]\nPublicKey = {PUBLIC}", "a key of its own"),
        ("[Peer]", "no PublicKey"),
        (f"[Peer]\nPublicKey = {SHARED}\nAllowedIPs = 0.0.0.0/0", "0.0.0.0/0, which [Peer] number 1 has"),
    ],
)
def test_what_is_wrong_is_said(line: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(f"{WGCF}{line}\n", "a")
    assert said in str(caught.value)
    assert "[bad" in str(caught.value) or "a:" in str(caught.value)


def test_every_error_is_said_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse("PrivateKey = x\n[Interface]\nMTU = 1\n[Peer]\n", "a")
    assert [p.code for p in caught.value.problems] == ["bad-line", "bad-value", "missing-key", "missing-key"]


@pytest.mark.parametrize("name", ["PrivateKey", "PublicKey", "Address", "Endpoint", "AllowedIPs", "MTU", "DNS", "Jc"])
@pytest.mark.parametrize("section", ["[Interface]", "[Peer]", ""])
@pytest.mark.parametrize("damage", [lambda key: key[:-1], lambda key: key + "=", lambda key: f"fe80::1%{key}", str])
def test_no_message_repeats_a_key(section: str, name: str, damage: object) -> None:
    assert callable(damage)
    _parsed_without_a_word_of_keys(f"{section}\n{name} = {damage(PRIVATE)}\n", (PRIVATE,))


def test_a_key_alone_on_its_line_is_not_repeated() -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ="
    _parsed_without_a_word_of_keys(f"[Interface]\nPrivateKey =\n{letters}\n", (letters,))


def _parsed_without_a_word_of_keys(text: str, keys: Sequence[str]) -> Quick | None:
    read, problems, said = None, (), ""
    try:
        read = parse(text, "file")
        problems = read.problems
    except InvalidInput as exc:
        problems, said = exc.problems, str(exc)
    for shown in (said, repr(read), str(read), *map(str, problems), *map(repr, problems)):
        for key in keys:
            assert key[:16] not in shown and key[16:32] not in shown
    return read


_keys = st.binary(min_size=32, max_size=32).map(lambda raw: base64.b64encode(raw).decode())
_names = st.sampled_from(
    [
        "PrivateKey",
        "PublicKey",
        "PresharedKey",
        "Address",
        "AllowedIPs",
        "Endpoint",
        "MTU",
        "ListenPort",
        "DNS",
        "PersistentKeepalive",
        "PostUp",
    ]
)
_values = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.ip_addresses().map(str),
    st.sampled_from(("0.0.0.0/0, ::/0", "1.2.3.4:5", "[::1]:5", "off", "", "a.b:0", "10.0.0.1/33", ",", "٣", "=")),
)


@st.composite
def _files(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A file more or less of that style, with keys anywhere; and the keys."""
    lines, keys = [], []
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            lines.append(draw(st.sampled_from(("[Interface]", "[Peer]", "[peer] ", "[Other]"))))
        elif kind <= 2:
            key = draw(_keys)
            keys.append(key)
            cut = draw(st.integers(30, 44))
            lines.append(draw(st.sampled_from(("{} = ", "{}=1.2.3.4, ", "", "{} ="))).format(draw(_names)) + key[:cut])
        elif kind == 3:
            lines.append(draw(st.text(max_size=40)))
        else:
            lines.append(f"{draw(_names)} = {draw(_values)}")
    return draw(st.sampled_from(("\n", "\r\n"))).join(lines), keys


@given(_files())
def test_any_text_is_read_or_refused(given: tuple[str, list[str]]) -> None:
    text, keys = given
    public = set()
    with contextlib.suppress(InvalidInput):
        public = {peer.public_key for peer in parse(text, "file").peers}
    _parsed_without_a_word_of_keys(text, [key for key in keys if key not in public])


@given(st.text())
def test_arbitrary_text_is_read_or_refused(text: str) -> None:
    _parsed_without_a_word_of_keys(f"[Interface]\n{text}", ())
