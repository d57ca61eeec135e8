"""One packet in ovs-ofctl's words, both ways: `tcp,nw_src=10.0.0.2,tp_dst=80` (ovs-fields(7), ovs-ofctl(8)).

Imports space and fields.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator

from controller import fields
from controller.fields import Field
from controller.model import Ipv4, Mac
from controller.problems import BulkheadError
from controller.verify.space import PLACES, bits, get

IP, ARP, RARP, IPV6, VLAN = 0x0800, 0x0806, 0x8035, 0x86DD, 0x8100
ICMP, TCP, UDP, ICMP6, SCTP = 1, 6, 17, 58, 132
KEYWORDS: dict[str, tuple[int, int | None]] = {
    "ip": (IP, None),
    "icmp": (IP, ICMP),
    "tcp": (IP, TCP),
    "udp": (IP, UDP),
    "sctp": (IP, SCTP),
    "arp": (ARP, None),
    "ipv6": (IPV6, None),
    "icmp6": (IPV6, ICMP6),
    "tcp6": (IPV6, TCP),
    "udp6": (IPV6, UDP),
    "sctp6": (IPV6, SCTP),
}
"""Shorthands: ethertype and IP protocol."""
_KEYWORD = {value: key for key, value in KEYWORDS.items()}
_PORTED = frozenset((TCP, UDP, SCTP))
_NAMES: dict[str, Field] = {
    "dl_src": fields.ETH_SRC,
    "eth_src": fields.ETH_SRC,
    "dl_dst": fields.ETH_DST,
    "eth_dst": fields.ETH_DST,
    "dl_type": fields.ETH_TYPE,
    "eth_type": fields.ETH_TYPE,
    "vlan_tci": fields.VLAN_VID,
    "vlan_vid": fields.VLAN_VID,
    "dl_vlan": fields.VLAN_VID,
    "nw_src": fields.IPV4_SRC,
    "ip_src": fields.IPV4_SRC,
    "nw_dst": fields.IPV4_DST,
    "ip_dst": fields.IPV4_DST,
    "arp_spa": fields.ARP_SPA,
    "arp_tpa": fields.ARP_TPA,
    "arp_sha": fields.ARP_SHA,
    "arp_tha": fields.ARP_THA,
    "arp_op": fields.ARP_OP,
    "nw_proto": fields.IP_PROTO,
    "ip_proto": fields.IP_PROTO,
    "ipv6_src": fields.IPV6_SRC,
    "ipv6_dst": fields.IPV6_DST,
    "nw_ttl": fields.IP_TTL,
    "nw_tos": fields.IP_DSCP,
    "ip_dscp": fields.IP_DSCP,
    "nw_ecn": fields.IP_ECN,
    "nw_frag": fields.IP_FRAG,
    "tcp_flags": fields.TCP_FLAGS,
    "icmp_type": fields.ICMPV4_TYPE,
    "icmp_code": fields.ICMPV4_CODE,
    "icmpv6_type": fields.ICMPV6_TYPE,
    "icmpv6_code": fields.ICMPV6_CODE,
    **{f"{name}_src": fields.TCP_SRC for name in ("tp", "tcp", "udp", "sctp")},
    **{f"{name}_dst": fields.TCP_DST for name in ("tp", "tcp", "udp", "sctp")},
}
_TCP_FLAGS = {name: 1 << bit for bit, name in enumerate(("fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr", "ns"))}
_FRAGMENTS = {"no": 0, "yes": 1, "first": 1, "later": 3, "not_later": 0}
_NEEDS: dict[str, tuple[str, frozenset[int], frozenset[int] | None]] = {
    **{n: ("ip", frozenset((IP,)), None) for n in ("nw_src", "nw_dst", "ip_src", "ip_dst")},
    **{n: ("arp", frozenset((ARP, RARP)), None) for n in ("arp_spa", "arp_tpa", "arp_sha", "arp_tha", "arp_op")},
    **{n: ("ipv6", frozenset((IPV6,)), None) for n in ("ipv6_src", "ipv6_dst")},
    **{n: ("ip or ipv6", frozenset((IP, IPV6)), None) for n in ("nw_proto", "ip_proto", "nw_ttl", "nw_tos", "nw_frag")},
    **{n: ("tcp, udp or sctp", frozenset((IP, IPV6)), _PORTED) for n in ("tp_src", "tp_dst")},
    **{
        f"{name}_{end}": (name, frozenset((IP, IPV6)), frozenset((number,)))
        for name, number in (("tcp", TCP), ("udp", UDP), ("sctp", SCTP))
        for end in ("src", "dst")
    },
    "tcp_flags": ("tcp", frozenset((IP, IPV6)), frozenset((TCP,))),
    **{f"icmp_{n}": ("icmp", frozenset((IP,)), frozenset((ICMP,))) for n in ("type", "code")},
    **{f"icmpv6_{n}": ("icmp6", frozenset((IPV6,)), frozenset((ICMP6,))) for n in ("type", "code")},
}
"""What a field needs beside it: in words, the ethertypes, the protocols."""


class BadPacket(BulkheadError):
    """A packet's words do not say one packet."""


def parse(text: str, *, lenient: bool = False) -> tuple[str | None, dict[str, int], int]:
    """(in_port as written, or None, what was given by its names, header) of a packet in words.

    What is not said is 0. With `lenient` fields that the proof does not know are passed over, as those of a capture.
    Raises `BadPacket`.
    """
    in_port, keyword = None, None
    given: dict[str, tuple[Field, int]] = {}
    for item in filter(None, re.split(r"[\s,]+", text.strip())):
        name, equals, value = item.partition("=")
        if not equals and name in KEYWORDS:
            if keyword not in (None, "ip", name):
                raise BadPacket(f"{name}: the packet is {keyword} already; say one of them")
            keyword = name
        elif name == "in_port" and equals:
            in_port = value.strip('"')
        elif name in given:
            raise BadPacket(f"{name}: said twice; a packet has it once")
        elif name in _NAMES and equals:
            given[name] = _NAMES[name], _value(name, _NAMES[name], value)
        elif name in _NAMES:
            raise BadPacket(f"{name}: has no value; write {name}=VALUE")
        elif not lenient:
            close = difflib.get_close_matches(name, [*_NAMES, *KEYWORDS], n=1)
            hint = f"did you mean {close[0]}?" if close else "see ovs-fields(7) for what a packet has"
            raise BadPacket(f"{name[:40]}: not a field of a packet; {hint}")
    return in_port, {name: value for name, (_, value) in given.items()}, _header(keyword, given)


def _header(keyword: str | None, given: dict[str, tuple[Field, int]]) -> int:
    values = dict(given.values())
    if keyword is not None:
        ethertype, proto = KEYWORDS[keyword]
        for field, value in ((fields.ETH_TYPE, ethertype), (fields.IP_PROTO, proto)):
            if value is not None and values.setdefault(field, value) != value:
                raise BadPacket(
                    f"{keyword}: {field.ofctl}={values[field]:#x} says something else; leave one of them out"
                )
    ethertype, proto = values.get(fields.ETH_TYPE, 0), values.get(fields.IP_PROTO, 0)
    for name in given:
        need = _NEEDS.get(name)
        if need is not None and (ethertype not in need[1] or (need[2] is not None and proto not in need[2])):
            raise BadPacket(f"{name}: only {need[0]} has it; say {need[0].split()[0].rstrip(',')} too")
    header = 0
    for field, value in values.items():
        header |= bits(field, value)[0]
    return header


def complete(text: str, mac: Mac | None, address: Ipv4 | None) -> int:
    """A packet in words as whoever has these addresses would send it: what it does not say of them is filled in."""
    _, given, _ = parse(text)
    words_ = [word for word in re.split(r"[\s,]+", text.strip()) if word]
    kinds = {word for word in words_ if word in KEYWORDS}
    ethertype = next((given[name] for name in ("dl_type", "eth_type") if name in given), None)
    if kinds:
        ethertype = KEYWORDS[next(iter(kinds))][0]
    if mac is not None and not given.keys() & {"dl_src", "eth_src"}:
        words_.append(f"dl_src={mac}")
    if ethertype == IP and address is not None and not given.keys() & {"nw_src", "ip_src"}:
        words_.append(f"nw_src={address}")
    if ethertype in (IP, IPV6) and "nw_ttl" not in given:
        words_.append("nw_ttl=64")
    if ethertype == ARP:
        words_ += [] if "arp_op" in given else ["arp_op=1"]
        words_ += [f"arp_sha={mac}"] if mac is not None and "arp_sha" not in given else []
        words_ += [f"arp_spa={address}"] if address is not None and "arp_spa" not in given else []
    return parse(",".join(words_))[2]


CT_WORDS = {name: 1 << bit for bit, name in enumerate(("new", "est", "rel", "rpl", "inv", "trk", "snat", "dnat"))}


def state_bits(text: str) -> int:
    """ct_state of `trk,est` or `trk|est` (`ovs-vswitchd(8)`, --ct-next). Raises `BadPacket`."""
    out = 0
    for word in re.split(r"[,|]", text):
        if word not in CT_WORDS:
            raise BadPacket(f"{word[:40]!r}: not a connection state; expected {', '.join(CT_WORDS)}, joined by commas")
        out |= CT_WORDS[word]
    return out


def _value(name: str, field: Field, text: str) -> int:
    try:
        if name == "nw_frag":
            return _FRAGMENTS[text]
        if name == "tcp_flags" and (words_ := re.split(r"[|+]", text.strip("+"))) and words_[0] in _TCP_FLAGS:
            return sum(_TCP_FLAGS[word] for word in set(words_))
        if field.bits == 48:
            if not re.fullmatch(r"[0-9A-Fa-f]{1,2}(:[0-9A-Fa-f]{1,2}){5}", text):
                raise ValueError
            return int.from_bytes(bytes(int(part, 16) for part in text.split(":")), "big")
        if field.bits == 32 and field not in (fields.CT_STATE,):
            return int(ipaddress.IPv4Address(text))
        if field.bits == 128:
            return int(ipaddress.IPv6Address(text))
        number = int(text, 0)
        if name == "nw_tos":
            number >>= 2
        if name == "dl_vlan":
            number |= 0x1000
        if name == "vlan_tci":
            number &= 0x1FFF
        if not 0 <= number <= field.full:
            raise ValueError
        return number
    except (ValueError, KeyError):
        raise BadPacket(f"{name}={text[:60]}: expected {_expected(name, field)}") from None


def _expected(name: str, field: Field) -> str:
    if name == "nw_frag":
        return f"one of {', '.join(_FRAGMENTS)}"
    return {48: "a MAC address", 32: "an IPv4 address", 128: "an IPv6 address"}.get(
        field.bits, f"a number from 0 to {field.full}"
    )


def words(in_port: int | str, header: int) -> str:
    """A packet in ovs-ofctl's words, as `ofproto/trace` takes it. Registers and the like are left out."""
    port = {0xFFFE: "LOCAL", fields.LOCAL: "LOCAL"}.get(in_port, in_port) if isinstance(in_port, int) else in_port
    return ",".join((f"in_port={port}", *_words(header)))


def _words(header: int) -> Iterator[str]:
    ethertype, proto = get(header, fields.ETH_TYPE), get(header, fields.IP_PROTO)
    keyword = _KEYWORD.get((ethertype, proto)) or _KEYWORD.get((ethertype, None))
    if keyword is not None:
        yield keyword
    for name in ("dl_src", "dl_dst"):
        yield f"{name}={_NAMES[name].show(get(header, _NAMES[name]))}"
    if (tag := get(header, fields.VLAN_VID)) & 0x1000:
        yield f"vlan_tci={tag:#x}"
    if keyword is None:
        yield f"dl_type={ethertype:#06x}"
    if ethertype == ARP:
        yield f"arp_op={get(header, fields.ARP_OP)}"
        yield from (
            f"{n}={_NAMES[n].show(get(header, _NAMES[n]))}" for n in ("arp_spa", "arp_tpa", "arp_sha", "arp_tha")
        )
    if ethertype not in (IP, IPV6):
        return
    if keyword in ("ip", "ipv6"):
        yield f"nw_proto={proto}"
    for name in ("nw_src", "nw_dst") if ethertype == IP else ("ipv6_src", "ipv6_dst"):
        yield f"{name}={_NAMES[name].show(get(header, _NAMES[name]))}"
    for name in ("nw_ttl", "ip_dscp", "nw_ecn"):
        if value := get(header, _NAMES[name]):
            yield f"nw_tos={value << 2}" if name == "ip_dscp" else f"{name}={value}"
    fragment = get(header, fields.IP_FRAG) & 3
    if fragment:
        yield f"nw_frag={'later' if fragment == 3 else 'first'}"
    if keyword is None or fragment == 3:
        return
    names = {ICMP: ("icmp_type", "icmp_code"), ICMP6: ("icmpv6_type", "icmpv6_code")}.get(proto)
    if names is None:
        transport = keyword.removesuffix("6")
        names = (f"{transport}_src", f"{transport}_dst")
    if keyword not in ("ip", "ipv6") and not (
        fragment and not get(header, fields.TCP_SRC) | get(header, fields.TCP_DST)
    ):
        yield from (f"{name}={get(header, _NAMES[name])}" for name in names)


assert all(field.header in PLACES for field in _NAMES.values())
