"""The header fields that a flow may match or set: names, OXM numbers, widths and prerequisites.

A field is identified everywhere by its OXM header without the mask bit (class, field, length: OpenFlow 1.4.1, 7.2.3),
so that matches are tuples of integers. Source of the numbers: OpenFlow 1.4.1 table 12, and `ovs-fields(7)` for the
Nicira class. Imports only the address types of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from controller.model import Ipv4, Mac

OPENFLOW_BASIC = 0x8000
NXM_1 = 0x0001
NXM_0 = 0x0000


@dataclass(frozen=True, slots=True)
class Field:
    """One header field. `bits` is its width; `header` its OXM header with the mask bit clear."""

    name: str
    header: int
    bits: int
    maskable: bool
    show: Callable[[int], str]

    @property
    def full(self) -> int:
        """The mask that compares every bit."""
        return (1 << self.bits) - 1

    @property
    def size(self) -> int:
        """Bytes of one value on the wire."""
        return self.header & 0xFF

    def text(self, value: int, mask: int) -> str:
        """`name=value[/mask]` as ovs-ofctl writes it."""
        name = self.ofctl
        if self is IP_FRAG:
            return f"{name}={_FRAGMENTS.get((value, mask), f'{value:#x}/{mask:#x}')}"
        if mask == self.full:
            return f"{name}={self.show(value)}"
        if self.show is _ipv4 and (~mask & (~mask & 0xFFFFFFFF) + 1) & 0xFFFFFFFF == 0:
            return f"{name}={Ipv4(value)}/{mask.bit_count()}"
        return f"{name}={self.show(value)}/{self.show(mask)}"

    @property
    def ofctl(self) -> str:
        """The name ovs-ofctl knows the field by (`ovs-fields(7)`)."""
        return _OFCTL_NAMES.get(self.name, self.name)


_OFCTL_NAMES = {
    "ipv4_src": "ip_src",
    "ipv4_dst": "ip_dst",
    "icmpv4_type": "icmp_type",
    "icmpv4_code": "icmp_code",
    "ip_frag": "nw_frag",
    "tunnel_id": "tun_id",
}
_FRAGMENTS = {(0, 3): "no", (1, 1): "yes", (1, 3): "first", (3, 3): "later", (0, 2): "not_later"}


def _hex(value: int) -> str:
    return hex(value)


def _ipv4(value: int) -> str:
    return str(Ipv4(value))


def _mac(value: int) -> str:
    return str(Mac(value))


def _ipv6(value: int) -> str:
    import ipaddress

    return str(ipaddress.IPv6Address(value))


def _port(value: int) -> str:
    return {LOCAL: "LOCAL", CONTROLLER: "CONTROLLER", IN_PORT: "IN_PORT", NORMAL: "NORMAL"}.get(value, str(value))


IN_PORT = 0xFFFFFFF8
NORMAL = 0xFFFFFFFA
FLOOD = 0xFFFFFFFB
ALL = 0xFFFFFFFC
CONTROLLER = 0xFFFFFFFD
LOCAL = 0xFFFFFFFE
ANY = 0xFFFFFFFF
RESERVED = 0xFFFFFF00
"""From here on numbers are no ports of a bridge (OpenFlow 1.4.1, 7.2.1)."""

BY_NAME: dict[str, Field] = {}
BY_HEADER: dict[int, Field] = {}


def _field(name: str, oxm_class: int, number: int, bits: int, show: Callable[[int], str], maskable: bool) -> Field:
    field = Field(name, oxm_class << 16 | number << 9 | (bits + 7) // 8, bits, maskable, show)
    BY_NAME[name] = BY_HEADER[field.header] = field
    return field


def _basic(name: str, number: int, bits: int, show: Callable[[int], str] = str, maskable: bool = False) -> Field:
    return _field(name, OPENFLOW_BASIC, number, bits, show, maskable)


IN_PORT_FIELD = _basic("in_port", 0, 32, _port)
METADATA = _basic("metadata", 2, 64, _hex, True)
ETH_DST = _basic("eth_dst", 3, 48, _mac, True)
ETH_SRC = _basic("eth_src", 4, 48, _mac, True)
ETH_TYPE = _basic("eth_type", 5, 16, _hex)
VLAN_VID = _basic("vlan_vid", 6, 13, _hex, True)
VLAN_PCP = _basic("vlan_pcp", 7, 3)
IP_DSCP = _basic("ip_dscp", 8, 6)
IP_ECN = _basic("ip_ecn", 9, 2)
IP_PROTO = _basic("ip_proto", 10, 8)
IPV4_SRC = _basic("ipv4_src", 11, 32, _ipv4, True)
IPV4_DST = _basic("ipv4_dst", 12, 32, _ipv4, True)
TCP_SRC = _basic("tcp_src", 13, 16, str, True)
TCP_DST = _basic("tcp_dst", 14, 16, str, True)
UDP_SRC = _basic("udp_src", 15, 16, str, True)
UDP_DST = _basic("udp_dst", 16, 16, str, True)
SCTP_SRC = _basic("sctp_src", 17, 16, str, True)
SCTP_DST = _basic("sctp_dst", 18, 16, str, True)
ICMPV4_TYPE = _basic("icmpv4_type", 19, 8)
ICMPV4_CODE = _basic("icmpv4_code", 20, 8)
ARP_OP = _basic("arp_op", 21, 16)
ARP_SPA = _basic("arp_spa", 22, 32, _ipv4, True)
ARP_TPA = _basic("arp_tpa", 23, 32, _ipv4, True)
ARP_SHA = _basic("arp_sha", 24, 48, _mac, True)
ARP_THA = _basic("arp_tha", 25, 48, _mac, True)
IPV6_SRC = _basic("ipv6_src", 26, 128, _ipv6, True)
IPV6_DST = _basic("ipv6_dst", 27, 128, _ipv6, True)
ICMPV6_TYPE = _basic("icmpv6_type", 29, 8)
ICMPV6_CODE = _basic("icmpv6_code", 30, 8)
TUNNEL_ID = _basic("tunnel_id", 38, 64, _hex, True)
REGS = tuple(_field(f"reg{i}", NXM_1, i, 32, _hex, True) for i in range(16))
IP_FRAG = _field("ip_frag", NXM_1, 26, 8, _hex, True)
IP_TTL = _field("nw_ttl", NXM_1, 29, 8, str, False)
TCP_FLAGS = _field("tcp_flags", NXM_1, 34, 16, _hex, True)
CT_STATE = _field("ct_state", NXM_1, 105, 32, _hex, True)
CT_ZONE = _field("ct_zone", NXM_1, 106, 16, _hex, False)
CT_MARK = _field("ct_mark", NXM_1, 107, 32, _hex, True)
IN_PORT_16 = _field("NXM_OF_IN_PORT", NXM_0, 0, 16, _port, False)
"""The 16-bit ingress port, which `learn` can copy into a register (LOCAL is 0xfffe there)."""


OTHERS: dict[str, Field] = {}
"""Fields that flows of others may match or write, by ovs-ofctl's name: kept and shown, understood by nothing of ours."""


def _other(name: str, oxm_class: int, number: int, bits: int, show: Callable[[int], str] = _hex) -> Field:
    size = 4 if bits == 20 else (bits + 7) // 8  # labels stand in whole words
    field = Field(name, oxm_class << 16 | number << 9 | size, bits, True, show)
    OTHERS[name] = BY_HEADER[field.header] = field
    return field


IPV6_LABEL = _other("ipv6_label", OPENFLOW_BASIC, 28, 20)
ND_TARGET = _other("nd_target", OPENFLOW_BASIC, 31, 128, _ipv6)
ND_SLL = _other("nd_sll", OPENFLOW_BASIC, 32, 48, _mac)
ND_TLL = _other("nd_tll", OPENFLOW_BASIC, 33, 48, _mac)
MPLS_LABEL = _other("mpls_label", OPENFLOW_BASIC, 34, 20, str)
MPLS_TC = _other("mpls_tc", OPENFLOW_BASIC, 35, 3, str)
MPLS_BOS = _other("mpls_bos", OPENFLOW_BASIC, 36, 1, str)
MPLS_TTL = _other("mpls_ttl", NXM_1, 30, 8, str)
TUN_SRC = _other("tun_src", NXM_1, 31, 32, _ipv4)
TUN_DST = _other("tun_dst", NXM_1, 32, 32, _ipv4)
PKT_MARK = _other("pkt_mark", NXM_1, 33, 32)
CT_LABEL = _other("ct_label", NXM_1, 108, 128)
CONJ_ID = _other("conj_id", NXM_1, 37, 32, str)
_NUMBERED: tuple[tuple[str, int, int, Callable[[int], str]], ...] = (
    ("dp_hash", 35, 32, _hex),
    ("recirc_id", 36, 32, _hex),
    ("tun_gbp_id", 38, 16, _hex),
    ("tun_gbp_flags", 39, 8, _hex),
    *((f"tun_metadata{i}", 40 + i, 992, _hex) for i in range(64)),
    ("tun_flags", 104, 16, _hex),
    ("tun_ipv6_src", 109, 128, _ipv6),
    ("tun_ipv6_dst", 110, 128, _ipv6),
    ("ct_nw_proto", 119, 8, str),
    ("ct_nw_src", 120, 32, _ipv4),
    ("ct_nw_dst", 121, 32, _ipv4),
    ("ct_ipv6_src", 122, 128, _ipv6),
    ("ct_ipv6_dst", 123, 128, _ipv6),
    ("ct_tp_src", 124, 16, str),
    ("ct_tp_dst", 125, 16, str),
)
for _name, _number, _bits, _show in _NUMBERED:
    _other(_name, NXM_1, _number, _bits, _show)

UNASSIGNED = 0xFFFE
"""An OXM class that nobody has. Fields that an experimenter numbers stand in it here: they are never sent."""

PACKET_TYPE = _other("packet_type", OPENFLOW_BASIC, 44, 32, lambda value: f"({value >> 16},{value & 0xFFFF:#x})")
_EXPERIMENTERS: tuple[tuple[str, int, Callable[[int], str]], ...] = (
    ("skb_priority", 32, _hex),
    ("actset_output", 32, _port),
    ("nd_reserved", 32, str),
    ("nd_options_type", 8, str),
    ("tun_ttl", 8, str),
    ("tun_tos", 8, _hex),
    ("tun_erspan_idx", 20, _hex),
    ("tun_erspan_ver", 4, str),
    ("tun_erspan_dir", 1, str),
    ("tun_erspan_hwid", 6, _hex),
    ("tun_gtpu_flags", 8, _hex),
    ("tun_gtpu_msgtype", 8, str),
    ("nsh_flags", 8, str),
    ("nsh_mdtype", 8, str),
    ("nsh_np", 8, str),
    ("nsh_spi", 24, _hex),
    ("nsh_si", 8, str),
    ("nsh_c1", 32, _hex),
    ("nsh_c2", 32, _hex),
    ("nsh_c3", 32, _hex),
    ("nsh_c4", 32, _hex),
    ("nsh_ttl", 8, str),
)
for _number, (_name, _bits, _show) in enumerate(_EXPERIMENTERS, start=1):
    _other(_name, UNASSIGNED, _number, _bits, _show)

# Names of Open vSwitch's for bits that we know by another: taken apart by `parts`, and in no flow of ours.
XREGS = tuple(_other(f"xreg{i}", 0x8001, i, 64) for i in range(8))
XXREGS = tuple(_other(f"xxreg{i}", NXM_1, 111 + i, 128) for i in range(4))
VLAN_TCI = _other("vlan_tci", NXM_0, 4, 16)
IP_TOS = _other("nw_tos", NXM_0, 5, 8, str)

_MADE_OF: dict[int, tuple[Field, ...]] = {
    **{xreg.header: (REGS[2 * i + 1], REGS[2 * i]) for i, xreg in enumerate(XREGS)},
    **{xxreg.header: tuple(REGS[4 * i + 3 - j] for j in range(4)) for i, xxreg in enumerate(XXREGS)},
    VLAN_TCI.header: (VLAN_VID, VLAN_PCP),
}


def parts(header: int, start: int, width: int) -> list[tuple[int, int, int]]:
    """The same bits as (header, start, width) of fields that we know them by, the lowest first.

    An extended register is made of registers, the VLAN tag's control information of its id (with the bit that says
    there is a tag) and its priority. `IP_TOS` cannot be told so: it is six bits, and two that are always clear.
    """
    header = CANONICAL.get(header, header)
    out, at = [], 0
    for field in _MADE_OF.get(header, ()):
        low, high = max(start, at), min(start + width, at + field.bits)
        if low < high:
            out.append((field.header, low - at, high - low))
        at += field.bits
    return out or [(header, start, width)]


def by_header(header: int) -> Field:
    """The field of an OXM header (mask bit ignored); one we do not know gets a name made of its numbers."""
    has_mask = header & 0x100
    size = (header & 0xFF) // 2 if has_mask else header & 0xFF
    header = header & ~0x1FF | size
    known = BY_HEADER.get(header)
    if known is not None:
        return known
    return Field(f"oxm_{header >> 16:#06x}_{header >> 9 & 0x7F}", header, 8 * size, True, _hex)


_NXM_ALIASES = {
    (NXM_0, 1): ETH_DST,
    (NXM_0, 2): ETH_SRC,
    (NXM_0, 3): ETH_TYPE,
    (NXM_0, 6): IP_PROTO,
    (NXM_0, 7): IPV4_SRC,
    (NXM_0, 8): IPV4_DST,
    (NXM_0, 9): TCP_SRC,
    (NXM_0, 10): TCP_DST,
    (NXM_0, 11): UDP_SRC,
    (NXM_0, 12): UDP_DST,
    (NXM_0, 13): ICMPV4_TYPE,
    (NXM_0, 14): ICMPV4_CODE,
    (NXM_0, 15): ARP_OP,
    (NXM_0, 16): ARP_SPA,
    (NXM_0, 17): ARP_TPA,
    (NXM_1, 17): ARP_SHA,
    (NXM_1, 18): ARP_THA,
    (NXM_1, 16): TUNNEL_ID,
    (NXM_1, 19): IPV6_SRC,
    (NXM_1, 20): IPV6_DST,
    (NXM_1, 21): ICMPV6_TYPE,
    (NXM_1, 22): ICMPV6_CODE,
    (NXM_1, 23): ND_TARGET,
    (NXM_1, 24): ND_SLL,
    (NXM_1, 25): ND_TLL,
    (NXM_1, 27): IPV6_LABEL,
    (NXM_1, 28): IP_ECN,
}
CANONICAL: dict[int, int] = {
    oxm_class << 16 | number << 9 | field.size: field.header for (oxm_class, number), field in _NXM_ALIASES.items()
}
"""Nicira's header for a field to the OpenFlow one. Open vSwitch answers with the former inside actions."""
