"""Packets: what one says, in words, and the answer that refuses it.

What is shown to us was made by whoever broke a rule, so it is taken apart by hand, no further than the ports: os-ken's
packet library follows options and payloads wherever they lead, and never comes back from a TCP option of length 0. It
only builds the answers.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from os_ken.lib.packet import ethernet, icmp, ipv4, packet, tcp

from controller.model import Ipv4, Mac
from controller.problems import BulkheadError


class Unreadable(BulkheadError):
    """Bytes that are not a packet we understand."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A packet taken apart as far as it goes; `words` says it for people."""

    words: str
    source: str
    target: str


_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_TAGS = {0x8100, 0x88A8}
_ICMP, _TCP, _UDP, _ICMP6 = 1, 6, 17, 58
_ICMP_ERRORS = {3, 4, 5, 11, 12}
_ICMP_QUOTE = 8


@dataclass(frozen=True, slots=True)
class _Frame:
    """An Ethernet frame; `payload` is what follows its tags, `vlan` the outermost of them."""

    target: Mac
    source: Mac
    vlan: int | None
    kind: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Ip:
    """An IPv4 packet; `header` has its options, `payload` what came of the rest, `length` is what it says of itself."""

    source: Ipv4
    target: Ipv4
    proto: int
    offset: int
    length: int
    header: bytes
    payload: bytes


def _frame(data: bytes) -> _Frame:
    if len(data) < 14:
        raise Unreadable(f"{len(data)} bytes that are not an Ethernet frame")
    at, vlan = 12, None
    while (kind := int.from_bytes(data[at : at + 2], "big")) in _TAGS:
        if len(data) < at + 6:
            raise Unreadable(f"{len(data)} bytes that end within a VLAN tag")
        vlan = int.from_bytes(data[at + 2 : at + 4], "big") & 0xFFF if vlan is None else vlan
        at += 4
    mac = [Mac(int.from_bytes(data[i : i + 6], "big")) for i in (0, 6)]
    return _Frame(mac[0], mac[1], vlan, kind, data[at + 2 :])


def _ip(data: bytes) -> _Ip:
    size = (data[0] & 0xF) * 4 if data else 0
    if size < 20 or len(data) < size or data[0] >> 4 != 4:
        raise Unreadable(f"an IPv4 header that does not fit {len(data)} bytes")
    length, place, proto, source, target = struct.unpack("!2xH2xHxB2xII", data[:20])
    return _Ip(Ipv4(source), Ipv4(target), proto, place & 0x1FFF, length, data[:size], data[size:])


def read(data: bytes) -> Seen:
    """Take a packet apart. Raises `Unreadable`."""
    frame = _frame(data)
    prefix = f"vlan {frame.vlan} " if frame.vlan is not None else ""
    if frame.kind == _ARP:
        return _read_arp(prefix, frame.payload)
    if frame.kind == _IPV4:
        ip = _ip(frame.payload)
        name = f"ip proto {ip.proto} fragment" if ip.offset else ""
        return _read_ip(prefix, name, ip.proto, ip.payload, (str(ip.source), str(ip.target)), frame.source)
    if frame.kind == _IPV6:
        if len(frame.payload) < 40:
            raise Unreadable(f"an IPv6 header that does not fit {len(frame.payload)} bytes")
        ends = [str(ipaddress.IPv6Address(frame.payload[i : i + 16])) for i in (8, 24)]
        return _read_ip(prefix, "", frame.payload[6], frame.payload[40:], (ends[0], ends[1]), frame.source)
    source, target = str(frame.source), str(frame.target)
    return Seen(f"{prefix}ethertype {frame.kind:#06x} {source} > {target}", source, target)


def _read_arp(prefix: str, data: bytes) -> Seen:
    if data[:6] != b"\0\x01\x08\0\x06\x04" or len(data) < 28:
        raise Unreadable(f"{len(data)} bytes that are not ARP for IPv4")
    opcode, sha, spa, tpa = struct.unpack("!6xH6sI6xI", data[:28])
    verb = "who-has" if opcode == 1 else "reply"
    source, target, mac = str(Ipv4(spa)), str(Ipv4(tpa)), Mac(int.from_bytes(sha, "big"))
    return Seen(f"{prefix}arp {verb} {target} from {source} ({mac})", source, target)


def _read_ip(prefix: str, name: str, proto: int, payload: bytes, ends: tuple[str, str], mac: Mac) -> Seen:
    """`name` is given where the payload is not the beginning of a segment."""
    source, target = ends
    from_port = to_port = ""
    if not name and proto in (_TCP, _UDP) and len(payload) >= 4:
        from_port, to_port = (f":{port}" for port in struct.unpack("!HH", payload[:4]))
        name = "tcp" if proto == _TCP else "udp"
    elif not name and proto in (_ICMP, _ICMP6) and payload:
        name = f"{'icmp' if proto == _ICMP else 'icmp6'} type {payload[0]}"
    words = f"{prefix}{name or f'ip proto {proto}'} {source}{from_port} > {target}{to_port} ({mac})"
    return Seen(words, source, target)


def refusal(data: bytes, gateway: Ipv4) -> bytes | None:
    """The answer that makes a blocked connection fail at once.

    TCP gets a reset from the address it tried (RFC 9293, 3.10.7.1); everything else an ICMP "communication
    administratively prohibited" from the gateway (RFC 792, RFC 1812 5.2.7.1). None where no answer may be sent: to an
    ICMP error, a reset, a later fragment, a broadcast, to or from an address that is not one host's (RFC 1122, 3.2.2),
    or to anything but untagged IPv4. Raises `Unreadable`.
    """
    frame = _frame(data)
    if frame.kind != _IPV4 or frame.vlan is not None:
        return None
    ip = _ip(frame.payload)
    if ip.offset or frame.target >> 40 & 1 or not (_is_host(ip.source) and _is_host(ip.target)):
        return None
    answer = packet.Packet()
    answer.add_protocol(ethernet.ethernet(dst=str(frame.source), src=str(frame.target), ethertype=_IPV4))
    if ip.proto == _TCP:
        reset = _reset(ip)
        if reset is None:
            return None
        answer.add_protocol(ipv4.ipv4(src=str(ip.target), dst=str(ip.source), proto=_TCP, ttl=64))
        answer.add_protocol(reset)
    else:
        if ip.proto == _ICMP and (not ip.payload or ip.payload[0] in _ICMP_ERRORS):
            return None
        # Nobody believes a packet from his own address: where the gateway itself is refused, its target speaks.
        speaker = ip.target if ip.source == gateway else gateway
        answer.add_protocol(ipv4.ipv4(src=str(speaker), dst=str(ip.source), proto=_ICMP, ttl=64))
        quoted = ip.header + ip.payload[:_ICMP_QUOTE]
        answer.add_protocol(icmp.icmp(type_=3, code=13, data=icmp.dest_unreach(data=quoted)))
    answer.serialize()
    return bytes(answer.data)


def _is_host(address: Ipv4) -> bool:
    """Whether it can be one host's: not this network, loopback, multicast, reserved or broadcast."""
    return address >> 24 not in (0, 127) and address >> 24 < 224


def _reset(ip: _Ip) -> tcp.tcp | None:
    """The reset for a segment, None for one that is a reset itself."""
    if len(ip.payload) < 20:
        raise Unreadable(f"a TCP header that does not fit {len(ip.payload)} bytes")
    source, target, seq, ack, place, flags = struct.unpack("!HHIIBB", ip.payload[:14])
    if flags & tcp.TCP_RST:
        return None
    if flags & tcp.TCP_ACK:
        return tcp.tcp(src_port=target, dst_port=source, seq=ack, ack=0, bits=tcp.TCP_RST)
    length = max(0, ip.length - len(ip.header) - (place >> 4) * 4)
    length += bool(flags & tcp.TCP_SYN) + bool(flags & tcp.TCP_FIN)
    last = (seq + length) & 0xFFFFFFFF
    return tcp.tcp(src_port=target, dst_port=source, seq=0, ack=last, bits=tcp.TCP_RST | tcp.TCP_ACK)
