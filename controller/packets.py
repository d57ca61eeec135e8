"""Packets: what one says, in words, and the answer that refuses it.

Parsing and building is os-ken's packet library; whatever it raises on hostile bytes becomes `Unreadable` here.
"""

from __future__ import annotations

from dataclasses import dataclass

from os_ken.lib.packet import arp, ethernet, icmp, icmpv6, ipv4, ipv6, packet, tcp, udp, vlan

from controller.model import Ipv4
from controller.problems import BulkheadError


class Unreadable(BulkheadError):
    """Bytes that are not a packet we understand."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A packet taken apart as far as it goes; `words` says it for people."""

    words: str
    source: str
    target: str


_ICMP_ERRORS = {3, 4, 5, 11, 12}
_ICMP_HEADER = 8


def read(data: bytes) -> Seen:
    """Take a packet apart. Raises `Unreadable`."""
    try:
        layers = packet.Packet(data)
        eth = layers.get_protocol(ethernet.ethernet)
        if eth is None:
            raise Unreadable(f"{len(data)} bytes that are not an Ethernet frame")
        return _words(layers, eth)
    except Unreadable:
        raise
    except Exception as exc:  # the library raises whatever struct, its asserts and its look-ups raise
        raise Unreadable(f"{len(data)} bytes that do not parse: {type(exc).__name__}") from exc


def _words(layers: packet.Packet, eth: ethernet.ethernet) -> Seen:
    tag = layers.get_protocol(vlan.vlan)
    prefix = f"vlan {tag.vid} " if tag else ""
    if (a := layers.get_protocol(arp.arp)) is not None:
        verb = "who-has" if a.opcode == arp.ARP_REQUEST else "reply"
        return Seen(f"{prefix}arp {verb} {a.dst_ip} from {a.src_ip} ({a.src_mac})", a.src_ip, a.dst_ip)
    if (ip4 := layers.get_protocol(ipv4.ipv4)) is not None:
        return _ip(layers, prefix, ip4.src, ip4.dst, ip4.proto, bool(ip4.offset), eth.src)
    if (ip6 := layers.get_protocol(ipv6.ipv6)) is not None:
        return _ip(layers, prefix, ip6.src, ip6.dst, ip6.nxt, False, eth.src)
    return Seen(f"{prefix}ethertype {eth.ethertype:#06x} {eth.src} > {eth.dst}", eth.src, eth.dst)


def _ip(layers: packet.Packet, prefix: str, source: str, target: str, proto: int, fragment: bool, mac: str) -> Seen:
    name, from_port, to_port = f"ip proto {proto}", "", ""
    if (t := layers.get_protocol(tcp.tcp)) is not None and not fragment:
        name, from_port, to_port = "tcp", f":{t.src_port}", f":{t.dst_port}"
    elif (u := layers.get_protocol(udp.udp)) is not None and not fragment:
        name, from_port, to_port = "udp", f":{u.src_port}", f":{u.dst_port}"
    elif (i := layers.get_protocol(icmp.icmp)) is not None and not fragment:
        name = f"icmp type {i.type}"
    elif (i6 := layers.get_protocol(icmpv6.icmpv6)) is not None:
        name = f"icmp6 type {i6.type_}"
    piece = " fragment" if fragment else ""
    return Seen(f"{prefix}{name}{piece} {source}{from_port} > {target}{to_port} ({mac})", source, target)


def refusal(data: bytes, gateway: Ipv4) -> bytes | None:
    """The answer that makes a blocked connection fail at once.

    TCP gets a reset from the address it tried (RFC 9293, 3.10.7.1); everything else an ICMP "communication
    administratively prohibited" from the gateway (RFC 792, RFC 1812 5.2.7.1). None where no answer may be sent: to an
    ICMP error, a reset, a later fragment, a broadcast (RFC 1122, 3.2.2), or to anything but untagged IPv4. Raises
    `Unreadable`.
    """
    try:
        return _refusal(data, gateway)
    except Exception as exc:
        raise Unreadable(f"{len(data)} bytes that do not parse: {type(exc).__name__}") from exc


def _refusal(data: bytes, gateway: Ipv4) -> bytes | None:
    layers = packet.Packet(data)
    eth, ip = layers.get_protocol(ethernet.ethernet), layers.get_protocol(ipv4.ipv4)
    if eth is None or ip is None or layers.get_protocol(vlan.vlan) is not None:
        return None
    if ip.offset or int(eth.dst[:2], 16) & 1 or ip.dst.startswith(("0.", "127.")) or int(ip.dst.split(".")[0]) >= 224:
        return None
    answer = packet.Packet()
    answer.add_protocol(ethernet.ethernet(dst=eth.src, src=eth.dst, ethertype=0x0800))
    segment = layers.get_protocol(tcp.tcp)
    if segment is not None:
        if segment.has_flags(tcp.TCP_RST):
            return None
        answer.add_protocol(ipv4.ipv4(src=ip.dst, dst=ip.src, proto=6, ttl=64))
        answer.add_protocol(_reset(segment, ip))
    else:
        message = layers.get_protocol(icmp.icmp)
        if ip.proto == 1 and (message is None or message.type in _ICMP_ERRORS):
            return None
        start = 14
        quoted = data[start : start + ip.header_length * 4 + _ICMP_HEADER]
        # Nobody believes a packet from his own address: where the gateway itself is refused, its target speaks.
        speaker = ip.dst if ip.src == str(gateway) else str(gateway)
        answer.add_protocol(ipv4.ipv4(src=speaker, dst=ip.src, proto=1, ttl=64))
        answer.add_protocol(icmp.icmp(type_=3, code=13, data=icmp.dest_unreach(data=quoted)))
    answer.serialize()
    return bytes(answer.data)


def _reset(segment: tcp.tcp, ip: ipv4.ipv4) -> tcp.tcp:
    if segment.has_flags(tcp.TCP_ACK):
        return tcp.tcp(src_port=segment.dst_port, dst_port=segment.src_port, seq=segment.ack, ack=0, bits=tcp.TCP_RST)
    length = max(0, ip.total_length - ip.header_length * 4 - segment.offset * 4)
    length += bool(segment.has_flags(tcp.TCP_SYN)) + bool(segment.has_flags(tcp.TCP_FIN))
    return tcp.tcp(
        src_port=segment.dst_port,
        dst_port=segment.src_port,
        seq=0,
        ack=(segment.seq + length) & 0xFFFFFFFF,
        bits=tcp.TCP_RST | tcp.TCP_ACK,
    )
