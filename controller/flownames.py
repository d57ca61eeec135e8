"""What ovs-ofctl calls fields, and how it writes values and bits of them (`ovs-fields(7)`).

What is read here is read for flows of others, so each word is checked: a number of no width, a name that is none and a
value too large are refused with a `Refused`, which says what was expected. Numbers are decimal or hexadecimal; with a
leading zero they are octal to Open vSwitch and a slip of the pen to people, so they are refused. Imports fields and flow.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from controller import fields
from controller.fields import Field
from controller.flow import Bits


class Refused(Exception):
    """One piece of a flow's text that cannot be taken."""

    def __init__(self, found: str, expected: str, fix: str, code: str = "bad-flow") -> None:
        super().__init__(found)
        self.code, self.found, self.expected, self.fix = code, found, expected, fix


_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,400}|0[xX][0-9a-fA-F]{1,400}")
_MAC: Final = re.compile(r"[0-9a-fA-F]{1,2}(?::[0-9a-fA-F]{1,2}){5}")
_QUAD: Final = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})")
_BITS: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\[(?:([0-9]{1,4})(?:\.\.([0-9]{1,4}))?)?\])?")


def number(name: str, text: str, highest: int, lowest: int = 0) -> int:
    """A number from `lowest` to `highest`."""
    value = int(text, 0) if _NUMBER.fullmatch(text) else -1
    if not lowest <= value <= highest:
        limit = str(highest) if highest < 1 << 20 else f"{highest:#x}"
        raise Refused(f"{name}={text}", f"{name} from {lowest} to {limit}", "Write a number in that range.")
    return value


def is_number(text: str) -> bool:
    """Whether a word is a number, whatever its size."""
    return _NUMBER.fullmatch(text) is not None


def close(word: str, known: Iterable[str]) -> str:
    """A hint at what `word` may have been meant to be, empty where nothing is near."""
    word = word[:40]
    # Comparing is slow, and a text may have ten thousand bad lines.
    alike = {name for name in known if abs(len(name) - len(word)) < 3 and name[:1] == word[:1]}
    near = difflib.get_close_matches(word, sorted(alike), n=2)
    return f"Did you mean {' or '.join(near)}? " if near else ""


# ------------------------------------------------------------------------------------------------------------- ports

_RESERVED: Final = {
    "in_port": fields.IN_PORT,
    "table": 0xFFFFFFF9,
    "normal": fields.NORMAL,
    "flood": fields.FLOOD,
    "all": fields.ALL,
    "controller": fields.CONTROLLER,
    "local": fields.LOCAL,
    "any": fields.ANY,
    "none": fields.ANY,
}
PORT_WORDS: Final = frozenset(_RESERVED)
_FIRST_RESERVED: Final = 0xFF00


def unquoted(word: str) -> str:
    """A name without the quotes that ovs-ofctl puts around unusual ones."""
    if not word.startswith('"'):
        return word
    try:
        name = json.loads(word, strict=False)
    except ValueError:
        name = None
    if not isinstance(name, str):
        raise Refused(word, "a name in double quotes", "Close the quotes.")
    return name


def port(word: str, ports: Mapping[str, int]) -> int:
    """The number of a port given by number, reserved word or name. Numbers of OpenFlow 1.0 are read as such."""
    if is_number(word):
        value = int(word, 0)
        if value < _FIRST_RESERVED or 0xFFFFFF00 <= value <= 0xFFFFFFFF:
            return value
        if value <= 0xFFFF:
            return value | 0xFFFF0000
        raise Refused(word, "a port number below 0xff00, or a reserved one", "Write the port's number or name.")
    reserved = _RESERVED.get(word.lower())
    if reserved is not None:
        return reserved
    name = unquoted(word)
    try:
        return ports[name]
    except KeyError:
        raise unknown_port(name, ports) from None


def unknown_port(name: str, ports: Mapping[str, int]) -> Refused:
    """The refusal of a port that no map has."""
    known = ", ".join(sorted(ports)[:20]) + (", ..." if len(ports) > 20 else "")
    return Refused(
        name,
        f"a port of the bridge ({known})" if ports else "a port number: no names of ports are known here",
        f"{close(name, ports)}Dump the flows without --names, or say which number the port has.",
        "unknown-port",
    )


# ------------------------------------------------------------------------------------------------------------ values

TCP_FLAGS: Final = {n: 1 << i for i, n in enumerate(["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr", "ns"])} | {
    f"[{1 << i:x}]": 1 << i for i in range(9, 12)
}
CT_STATES: Final = {n: 1 << i for i, n in enumerate(["new", "est", "rel", "rpl", "inv", "trk", "snat", "dnat"])}
_ALL_CT_STATES: Final = 0xFF
_FLAGS: Final[dict[str, dict[str, int]]] = {"tcp_flags": TCP_FLAGS, "ct_state": CT_STATES, "tun_flags": {"oam": 1}}
FRAGMENTS: Final = {"no": (0, 3), "yes": (1, 1), "first": (1, 3), "later": (3, 3), "not_later": (0, 2)}
_SIGNED: Final = re.compile(r"[+-][^+-]+")
_PACKET_TYPE: Final = re.compile(r"\(\s*([0-9a-fA-Fx]+)\s*,\s*([0-9a-fA-Fx]+)\s*\)")


def mac(name: str, text: str) -> int:
    """An Ethernet address."""
    if not _MAC.fullmatch(text):
        raise Refused(f"{name}={text}", "an Ethernet address", "Write it like 02:00:00:00:00:01.")
    return int.from_bytes(bytes(int(byte, 16) for byte in text.split(":")), "big")


def ipv4(name: str, text: str) -> int:
    """An IPv4 address."""
    found = _QUAD.fullmatch(text)
    if found is None or any(int(byte) > 255 for byte in found.groups()):
        fix = "Write 10.0.0.1, 10.0.0.0/24 or 10.0.0.0/255.255.255.0."
        raise Refused(f"{name}={text}", "an IPv4 address", fix)
    return int.from_bytes(bytes(map(int, found.groups())), "big")


def ipv6(name: str, text: str) -> int:
    """An IPv6 address."""
    try:
        return int(ipaddress.IPv6Address(text if "%" not in text else ""))
    except ValueError:
        raise Refused(f"{name}={text}", "an IPv6 address", "Write 2001:db8::1 or 2001:db8::/64.") from None


def _one(of: Field, name: str, text: str) -> int:
    """One value or mask of a field, as wide as the field."""
    if of.show is fields.ETH_SRC.show:
        return mac(name, text)
    if of.show is fields.IPV4_SRC.show and "." in text:
        return ipv4(name, text)
    if of.show is fields.IPV6_SRC.show and ":" in text:
        return ipv6(name, text)
    return number(name, text, of.full)


def _prefix(of: Field, name: str, text: str) -> int:
    if of.show in (fields.IPV4_SRC.show, fields.IPV6_SRC.show) and is_number(text) and "x" not in text.lower():
        return of.full >> number(name, text, of.bits) ^ of.full
    return _one(of, name, text)


def _flags(of: Field, name: str, text: str) -> tuple[int, int]:
    known = _FLAGS[of.name]
    signed = text[:1] in "+-"
    words = _SIGNED.findall(text) if signed else text.split("|")
    value = mask = 0
    for word in words:
        bit = known.get(word.lstrip("+-").lower())
        if bit is None or (signed and "".join(words) != text):
            expected = f"{name} of {', '.join(known)}"
            raise Refused(f"{name}={text}", expected, "Write +flag-flag, or flag|flag for these and no other.")
        mask |= bit
        value |= 0 if word.startswith("-") else bit
    return value, mask if signed else _ALL_CT_STATES if of is fields.CT_STATE else of.full


def value_and_mask(of: Field, name: str, text: str) -> tuple[int, int]:
    """What `name=text` compares of a field: (value, mask); the value has no bits outside the mask."""
    if of is fields.IP_FRAG and text in FRAGMENTS:
        return FRAGMENTS[text]
    if of is fields.PACKET_TYPE and (pair := _PACKET_TYPE.fullmatch(text)):
        return number(name, pair[1], 0xFFFF) << 16 | number(name, pair[2], 0xFFFF), of.full
    if of.name in _FLAGS and text[:1] and not text[0].isdigit():
        return _flags(of, name, text)
    value, slash, mask = text.partition("/")
    bits = _prefix(of, name, mask) if slash else of.full
    return _one(of, name, value) & bits, bits


# ------------------------------------------------------------------------------------------------------------- names

_OXM_NAMES: Final = {
    "in_port": "IN_PORT", "metadata": "METADATA", "eth_dst": "ETH_DST", "eth_src": "ETH_SRC", "eth_type": "ETH_TYPE",
    "vlan_vid": "VLAN_VID", "vlan_pcp": "VLAN_PCP", "ip_dscp": "IP_DSCP", "ip_ecn": "IP_ECN", "ip_proto": "IP_PROTO",
    "ipv4_src": "IPV4_SRC", "ipv4_dst": "IPV4_DST", "tcp_src": "TCP_SRC", "tcp_dst": "TCP_DST", "udp_src": "UDP_SRC",
    "udp_dst": "UDP_DST", "sctp_src": "SCTP_SRC", "sctp_dst": "SCTP_DST", "icmpv4_type": "ICMPV4_TYPE",
    "icmpv4_code": "ICMPV4_CODE", "arp_op": "ARP_OP", "arp_spa": "ARP_SPA", "arp_tpa": "ARP_TPA", "arp_sha": "ARP_SHA",
    "arp_tha": "ARP_THA", "ipv6_src": "IPV6_SRC", "ipv6_dst": "IPV6_DST", "icmpv6_type": "ICMPV6_TYPE",
    "icmpv6_code": "ICMPV6_CODE", "tunnel_id": "TUNNEL_ID", "ipv6_label": "IPV6_FLABEL", "tcp_flags": "TCP_FLAGS",
    "nd_target": "IPV6_ND_TARGET", "nd_sll": "IPV6_ND_SLL", "nd_tll": "IPV6_ND_TLL", "mpls_label": "MPLS_LABEL",
    "mpls_tc": "MPLS_TC", "mpls_bos": "MPLS_BOS", "packet_type": "PACKET_TYPE", "actset_output": "ACTSET_OUTPUT",
}  # fmt: skip
_NXM_NAMES: Final = {
    "OF_ETH_DST": "eth_dst", "OF_ETH_SRC": "eth_src", "OF_ETH_TYPE": "eth_type", "OF_VLAN_TCI": "vlan_tci",
    "OF_IP_TOS": "nw_tos", "OF_IP_PROTO": "ip_proto", "OF_IP_SRC": "ipv4_src", "OF_IP_DST": "ipv4_dst",
    "OF_TCP_SRC": "tcp_src", "OF_TCP_DST": "tcp_dst", "OF_UDP_SRC": "udp_src", "OF_UDP_DST": "udp_dst",
    "OF_ICMP_TYPE": "icmpv4_type", "OF_ICMP_CODE": "icmpv4_code", "OF_ARP_OP": "arp_op", "OF_ARP_SPA": "arp_spa",
    "OF_ARP_TPA": "arp_tpa", "NX_ARP_SHA": "arp_sha", "NX_ARP_THA": "arp_tha", "NX_TUN_ID": "tunnel_id",
    "NX_IP_ECN": "ip_ecn", "NX_IP_TTL": "nw_ttl", "NX_TUN_IPV4_SRC": "tun_src", "NX_TUN_IPV4_DST": "tun_dst",
}  # fmt: skip
_ALSO: Final = {
    "dl_dst": "eth_dst", "dl_src": "eth_src", "dl_type": "eth_type", "nw_src": "ipv4_src", "nw_dst": "ipv4_dst",
    "ip_src": "ipv4_src", "ip_dst": "ipv4_dst", "nw_proto": "ip_proto", "nw_ecn": "ip_ecn", "tun_id": "tunnel_id",
    "icmp_type": "icmpv4_type", "icmp_code": "icmpv4_code", "nw_frag": "ip_frag", "tp_src": "tcp_src",
    "tp_dst": "tcp_dst", "nsp": "nsh_spi", "nsi": "nsh_si", "nshc1": "nsh_c1", "nshc2": "nsh_c2", "nshc3": "nsh_c3",
    "nshc4": "nsh_c4", "dl_vlan_pcp": "vlan_pcp",
}  # fmt: skip


def _names() -> dict[str, Field]:
    ours = fields.BY_NAME | fields.OTHERS
    out = dict(ours)
    out |= {also: ours[name] for also, name in _ALSO.items()}
    out |= {f"OXM_OF_{oxm}": ours[name] for name, oxm in _OXM_NAMES.items()}
    out |= {f"NXM_{nxm}": ours[name] for nxm, name in _NXM_NAMES.items()}
    for name, field in ours.items():
        if field.header >> 16 == fields.NXM_1 or name in ("ipv6_src", "ipv6_dst", "icmpv6_type", "icmpv6_code"):
            out[f"NXM_NX_{name.upper()}"] = field
        if name.startswith(("nd_", "ipv6_label", "mpls_ttl")):
            out[f"NXM_NX_{name.upper()}"] = field
        if name.startswith("nsh_"):
            out[f"NXOXM_{name.upper()}"] = field
    out |= {f"OXM_OF_PKT_REG{i}": field for i, field in enumerate(fields.XREGS)}
    out |= {"in_port": fields.IN_PORT_16, "in_port_oxm": fields.IN_PORT_FIELD, "ONFOXM_ET_TCP_FLAGS": fields.TCP_FLAGS}
    return out


NAMES: Final = _names()
"""Every name by which actions call a field. `in_port` is the one of 16 bits, as Open vSwitch has it."""


def field(name: str) -> Field:
    """A field by a name that actions know it by."""
    found = NAMES.get(name)
    if found is None:
        raise Refused(name, "a field that Open vSwitch has", f"{close(name, NAMES)}See ovs-fields(7).")
    return found


@lru_cache(maxsize=1 << 12)
def bits(text: str) -> Bits:
    """Bits of a field: `reg1[0..15]`, `NXM_NX_REG1[3]`, `reg1[]` or `reg1`."""
    found = _BITS.fullmatch(text)
    if found is None:
        raise Refused(text, "bits of a field, as reg1[0..15]", "Name a field and the bits of it.")
    of = field(found[1])
    if found[2] is None:
        return Bits(of.header, 0, of.bits)
    first, last = int(found[2]), int(found[3] or found[2])
    if not first <= last < of.bits:
        raise Refused(text, f"bits of {found[1]} from 0 to {of.bits - 1}, the lowest first", "Give bits that it has.")
    return Bits(of.header, first, last - first + 1)
