"""Reading what is shown and building refusals, judged by scapy."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNS
from scapy.layers.inet import ICMP, IP, TCP, UDP, ICMPerror, IPerror, TCPerror, UDPerror
from scapy.layers.inet6 import ICMPv6ND_RA, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Padding

from controller.model import Ipv4
from controller.packets import Unreadable, read, refusal

SENDER, ROUTER = "02:00:00:00:00:11", "02:00:00:00:00:01"
GATEWAY = Ipv4.parse("10.0.0.1")
HOST, TARGET = "10.0.0.102", "10.1.0.200"
ETH = Ether(src=SENDER, dst=ROUTER)


def ip(**more: Any) -> Any:
    return IP(**{"src": HOST, "dst": TARGET, "ttl": 63, **more})


def checked(answer: bytes | None) -> Any:
    """The answer as scapy reads it, after its checksums were computed anew and found to be the same."""
    assert answer is not None
    found = Ether(answer)
    anew = Ether(answer)
    for layer in (IP, TCP, ICMP):
        if anew.haslayer(layer):
            del anew[layer].chksum
    anew = Ether(bytes(anew))
    for layer in (IP, TCP, ICMP):
        if found.haslayer(layer):
            assert found[layer].chksum == anew[layer].chksum, layer
    padding = len(found[Padding].load) if found.haslayer(Padding) else 0
    assert found[IP].len == len(bytes(found[IP])) - padding and (found.src, found.dst) == (ROUTER, SENDER)
    assert found[IP].ttl == 64
    return found


# --------------------------------------------------------------------------------------------------------------- resets


@pytest.mark.parametrize(
    "flags, payload, acknowledged",
    [("S", 0, 1), ("S", 5, 6), ("F", 0, 1), ("SF", 3, 5), ("", 7, 7), ("P", 100, 100), ("SEC", 0, 1)],
)
def test_a_segment_without_ack_is_reset_with_the_sequence_it_would_have_had(
    flags: str, payload: int, acknowledged: int
) -> None:
    """RFC 9293, 3.10.7.1: sequence 0, acknowledging everything that the segment holds."""
    for seq in (0, 1000, 0xFFFFFFFF):
        sent = ETH / ip() / TCP(sport=4000, dport=443, seq=seq, flags=flags) / bytes(payload)
        found = checked(refusal(bytes(sent), GATEWAY))
        assert found[TCP].flags == "RA" and found[TCP].seq == 0
        assert found[TCP].ack == (seq + acknowledged) % (1 << 32)
        assert (found[IP].src, found[IP].dst, found[TCP].sport, found[TCP].dport) == (TARGET, HOST, 443, 4000)


@pytest.mark.parametrize("flags", ["A", "SA", "PA", "FA", "FPA"])
def test_a_segment_with_ack_is_reset_by_the_sequence_it_acknowledges(flags: str) -> None:
    sent = ETH / ip() / TCP(sport=4000, dport=443, seq=77, ack=0xDEADBEEF, flags=flags) / b"data"
    found = checked(refusal(bytes(sent), GATEWAY))
    assert found[TCP].flags == "R" and found[TCP].seq == 0xDEADBEEF and found[TCP].ack == 0


def test_tcp_options_and_ip_options_do_not_count_as_data() -> None:
    options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
    sent = ETH / ip(options=b"\x94\x04\x00\x00") / TCP(seq=5, flags="S", options=options)
    assert checked(refusal(bytes(sent), GATEWAY))[TCP].ack == 6


def test_padding_of_a_short_frame_does_not_count_as_data() -> None:
    sent = bytes(ETH / ip() / TCP(seq=5, flags="S")) + bytes(20)
    assert checked(refusal(sent, GATEWAY))[TCP].ack == 6


def test_a_sample_cut_short_counts_what_the_whole_packet_had() -> None:
    sent = bytes(ETH / ip() / TCP(seq=5, flags="P") / bytes(1000))[:256]
    assert checked(refusal(sent, GATEWAY))[TCP].ack == 1005


# ----------------------------------------------------------------------------------------------------------------- ICMP


@pytest.mark.parametrize(
    "layer", [UDP(sport=5, dport=53) / b"question", ICMP(type=8, id=3, seq=4) / b"ping", b"\0" * 20]
)
def test_everything_else_is_told_that_it_is_prohibited(layer: Any) -> None:
    sent = bytes(ETH / (ip() if not isinstance(layer, bytes) else ip(proto=47)) / layer)
    found = checked(refusal(sent, GATEWAY))
    assert (found[ICMP].type, found[ICMP].code) == (3, 13)
    assert (found[IP].src, found[IP].dst) == (str(GATEWAY), HOST)
    # The header and eight bytes of what it answers (RFC 792), bit for bit.
    assert bytes(found[ICMP].payload)[:28] == sent[14:42]
    assert found[IPerror].dst == TARGET


def test_an_icmp_error_lets_the_sender_find_its_socket() -> None:
    found = checked(refusal(bytes(ETH / ip() / UDP(sport=5555, dport=53) / DNS()), GATEWAY))
    assert (found[UDPerror].sport, found[UDPerror].dport) == (5555, 53)
    assert not found.haslayer(TCPerror) and not found.haslayer(ICMPerror)


def test_an_ip_header_with_options_is_quoted_whole() -> None:
    sent = bytes(ETH / ip(options=b"\x94\x04\x00\x00") / UDP(sport=5, dport=53) / b"abc")
    found = checked(refusal(sent, GATEWAY))
    assert bytes(found[ICMP].payload)[:32] == sent[14:46]


def test_the_gateway_is_not_answered_in_its_own_name() -> None:
    found = checked(refusal(bytes(ETH / ip(src=str(GATEWAY)) / UDP(sport=5, dport=53)), GATEWAY))
    assert (found[IP].src, found[IP].dst) == (TARGET, str(GATEWAY))


# -------------------------------------------------------------------------------------------------------- no answer may


SILENT = {
    "a reset": ETH / ip() / TCP(flags="R"),
    "a reset with ack": ETH / ip() / TCP(flags="RA"),
    "a later fragment of TCP": ETH / ip(frag=100, proto=6) / bytes(40),
    "a later fragment of UDP": ETH / ip(frag=1, proto=17, flags="MF") / bytes(40),
    "an Ethernet broadcast": Ether(src=SENDER, dst="ff:ff:ff:ff:ff:ff") / ip() / UDP(),
    "an Ethernet multicast": Ether(src=SENDER, dst="01:00:5e:00:00:01") / ip() / UDP(),
    "an IP broadcast": ETH / ip(dst="255.255.255.255") / UDP(),
    "an IP multicast": ETH / ip(dst="224.0.0.5") / TCP(flags="S"),
    "a reserved address": ETH / ip(dst="250.1.2.3") / UDP(),
    "loopback": ETH / ip(dst="127.0.0.1") / UDP(),
    "this network": ETH / ip(dst="0.0.0.0") / UDP(),
    "from no address": ETH / ip(src="0.0.0.0") / UDP(),
    "from a multicast address": ETH / ip(src="224.0.0.5") / UDP(),
    "from a broadcast address": ETH / ip(src="255.255.255.255") / TCP(flags="S"),
    "from loopback": ETH / ip(src="127.0.0.1") / UDP(),
    "a tagged frame": ETH / Dot1Q(vlan=5) / ip() / TCP(flags="S"),
    "ARP": ETH / ARP(op=1, pdst="10.1.0.1"),
    "IPv6": ETH / IPv6() / TCP(flags="S"),
}


@pytest.mark.parametrize("what", SILENT)
def test_no_answer_to(what: str) -> None:
    assert refusal(bytes(SILENT[what]), GATEWAY) is None


@pytest.mark.parametrize("kind", [3, 4, 5, 11, 12])
def test_no_answer_to_an_icmp_error(kind: int) -> None:
    inner = IP(src=TARGET, dst=HOST) / UDP()
    assert refusal(bytes(ETH / ip() / ICMP(type=kind) / inner), GATEWAY) is None


def test_no_answer_to_icmp_that_cannot_be_read() -> None:
    with contextlib.suppress(Unreadable):
        assert refusal(bytes(ETH / ip(proto=1)), GATEWAY) is None


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "frame, words, source, target",
    [
        (ETH / ip() / TCP(sport=1, dport=2), f"tcp {HOST}:1 > {TARGET}:2 ({SENDER})", HOST, TARGET),
        (ETH / ip() / UDP(sport=1, dport=2), f"udp {HOST}:1 > {TARGET}:2 ({SENDER})", HOST, TARGET),
        (ETH / ip() / ICMP(type=8), f"icmp type 8 {HOST} > {TARGET} ({SENDER})", HOST, TARGET),
        (ETH / ip(proto=47) / b"", f"ip proto 47 {HOST} > {TARGET} ({SENDER})", HOST, TARGET),
        (ETH / ip(frag=9, proto=6) / bytes(40), f"ip proto 6 fragment {HOST} > {TARGET} ({SENDER})", HOST, TARGET),
        (
            ETH / ARP(op=1, hwsrc=SENDER, psrc=HOST, pdst="10.0.0.1"),
            f"arp who-has 10.0.0.1 from {HOST} ({SENDER})",
            HOST,
            "10.0.0.1",
        ),
        (
            ETH / ARP(op=2, hwsrc=SENDER, psrc=HOST, pdst="10.0.0.1"),
            f"arp reply 10.0.0.1 from {HOST} ({SENDER})",
            HOST,
            "10.0.0.1",
        ),
        (
            ETH / Dot1Q(vlan=7) / ip() / UDP(sport=1, dport=2),
            f"vlan 7 udp {HOST}:1 > {TARGET}:2 ({SENDER})",
            HOST,
            TARGET,
        ),
        (
            ETH / IPv6(src="fe80::1", dst="ff02::1") / ICMPv6ND_RA(),
            f"icmp6 type 134 fe80::1 > ff02::1 ({SENDER})",
            "fe80::1",
            "ff02::1",
        ),
        (
            Ether(src=SENDER, dst=ROUTER, type=0x88CC) / bytes(20),
            f"ethertype 0x88cc {SENDER} > {ROUTER}",
            SENDER,
            ROUTER,
        ),
    ],
)
def test_a_packet_in_words(frame: Any, words: str, source: str, target: str) -> None:
    seen = read(bytes(frame))
    assert (seen.words, seen.source, seen.target) == (words, source, target)


# ------------------------------------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize("options", [b"\x01\0\0\0", b"\x05\0\0\0", b"\xfe\0\x01\x01", b"\x08\0" + bytes(10)])
def test_options_that_lead_nowhere_are_not_followed(options: bytes) -> None:
    """An option of length 0: whoever steps by it stays where he is for ever."""
    header = bytearray(bytes(TCP(sport=4000, dport=443, flags="S")) + options)
    header[12] = len(header) // 4 << 4
    sent = bytes(ETH / ip(proto=6) / bytes(header))
    assert read(sent).words.startswith("tcp ")
    assert checked(refusal(sent, GATEWAY))[TCP].ack == 1


def test_other_protocols_inside_are_not_looked_into() -> None:
    for port in (67, 68, 4789, 6081, 3784, 53):
        sent = bytes(ETH / ip() / UDP(sport=port, dport=port) / (b"\x01" + bytes(60)))
        assert read(sent).words.startswith(f"udp {HOST}:{port}")
        assert checked(refusal(sent, GATEWAY))[ICMP].code == 13


GOOD = [
    bytes(ETH / ip() / TCP(flags="S", options=[("MSS", 1460), ("Timestamp", (1, 2))])),
    bytes(ETH / ip(options=b"\x94\x04\x00\x00") / UDP(sport=1, dport=53) / DNS()),
    bytes(ETH / ip() / ICMP(type=8) / b"ping"),
    bytes(ETH / ip() / ICMP(type=3) / IP() / UDP()),
    bytes(ETH / ARP()),
    bytes(ETH / Dot1Q(vlan=5) / ip() / UDP()),
    bytes(ETH / IPv6() / ICMPv6ND_RA()),
]


def tried(data: bytes) -> None:
    """Both readers, on anything: an answer, no answer, or `Unreadable`."""
    try:
        assert read(data).words.isprintable()
    except Unreadable as exc:
        assert "bytes" in str(exc)
    try:
        answer = refusal(data, GATEWAY)
        assert answer is None or len(answer) >= 42
    except Unreadable as exc:
        assert "bytes" in str(exc)


@pytest.mark.parametrize("data", GOOD, ids=range(len(GOOD)))
def test_what_is_cut_short_raises_unreadable_or_nothing(data: bytes) -> None:
    for size in range(len(data) + 1):
        tried(data[:size])


@given(st.binary(max_size=300))
def test_random_bytes_raise_unreadable_or_nothing(data: bytes) -> None:
    tried(data)


@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_packets_raise_unreadable_or_nothing(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    tried(bytes(damaged))


@given(st.sampled_from((0x0800, 0x0806, 0x86DD, 0x8100, 0x88CC, 0x05FF)), st.binary(max_size=120))
def test_random_contents_of_known_types_raise_unreadable_or_nothing(eth_type: int, data: bytes) -> None:
    tried(bytes.fromhex("020000000001020000000011") + eth_type.to_bytes(2, "big") + data)
