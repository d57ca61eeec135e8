"""What stands before `actions=` in a flow's text: its match, priority, table and the rest.

Open vSwitch keeps some fields in one place (`struct flow`): an ARP sender and an IPv4 source, a TCP port and an ICMP
type. Whichever name is used, the protocol says which field it is, wherever in the text that stands. A field without its
protocol Open vSwitch drops when the flow is added (`ofputil_normalize_match`), which makes the flow match more; so do
we, and say so. Imports flownames, fields and flow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from controller import fields
from controller.fields import Field
from controller.flow import SEND_FLOW_REM, Match, MatchItem
from controller.flownames import Refused, close, number, port, value_and_mask

DEFAULT_PRIORITY: Final = 32768
_HIGHEST_HIDDEN: Final = 0x7FFFFFFF

IP, ARP, RARP, IPV6 = 0x0800, 0x0806, 0x8035, 0x86DD
MPLS: Final = (0x8847, 0x8848)
ICMP, TCP, UDP, ICMPV6, SCTP = 1, 6, 17, 58, 132
_NEIGHBOUR_TYPES: Final = {"arp_sha": 135, "arp_tha": 136}

_PROTOCOLS: Final[dict[str, tuple[int, int | None]]] = {
    "ip": (IP, None), "arp": (ARP, None), "rarp": (RARP, None), "ipv6": (IPV6, None), "mpls": (MPLS[0], None),
    "mplsm": (MPLS[1], None), "icmp": (IP, ICMP), "tcp": (IP, TCP), "udp": (IP, UDP), "sctp": (IP, SCTP),
    "icmp6": (IPV6, ICMPV6), "tcp6": (IPV6, TCP), "udp6": (IPV6, UDP), "sctp6": (IPV6, SCTP), "eth": (0, None),
}  # fmt: skip

Slot = tuple[str, int, int]
"""(place in Open vSwitch's flow, value, mask)."""

_WIDE: Final = Field("", 0, 16, True, str)
# ovs-ofctl's name: (place, the field whose notation and width it has, whether it may be masked).
_KEYS: Final[dict[str, tuple[str, Field, bool]]] = {
    **dict.fromkeys(("nw_src", "ip_src", "arp_spa"), ("nw_src", fields.IPV4_SRC, True)),
    **dict.fromkeys(("nw_dst", "ip_dst", "arp_tpa"), ("nw_dst", fields.IPV4_DST, True)),
    **dict.fromkeys(("nw_proto", "ip_proto", "arp_op"), ("nw_proto", fields.IP_PROTO, False)),
    **dict.fromkeys(("tp_src", "tcp_src", "udp_src", "sctp_src"), ("tp_src", _WIDE, True)),
    **dict.fromkeys(("tp_dst", "tcp_dst", "udp_dst", "sctp_dst"), ("tp_dst", _WIDE, True)),
    **dict.fromkeys(("icmp_type", "icmpv4_type", "icmpv6_type"), ("tp_src", fields.ICMPV4_TYPE, False)),
    **dict.fromkeys(("icmp_code", "icmpv4_code", "icmpv6_code"), ("tp_dst", fields.ICMPV4_CODE, False)),
    **dict.fromkeys(("dl_src", "eth_src"), ("eth_src", fields.ETH_SRC, True)),
    **dict.fromkeys(("dl_dst", "eth_dst"), ("eth_dst", fields.ETH_DST, True)),
    **dict.fromkeys(("dl_type", "eth_type"), ("eth_type", fields.ETH_TYPE, False)),
    **dict.fromkeys(("arp_sha", "nd_sll"), ("arp_sha", fields.ARP_SHA, True)),
    **dict.fromkeys(("arp_tha", "nd_tll"), ("arp_tha", fields.ARP_THA, True)),
    **dict.fromkeys(("nw_frag", "ip_frag"), ("ip_frag", fields.IP_FRAG, True)),
    **dict.fromkeys(("nw_ecn", "ip_ecn"), ("ip_ecn", fields.IP_ECN, False)),
    **dict.fromkeys(("tun_id", "tunnel_id"), ("tunnel_id", fields.TUNNEL_ID, True)),
    **{f"reg{i}": (f"reg{i}", field, True) for i, field in enumerate(fields.REGS)},
    **{name: (name, field, True) for name, field in fields.OTHERS.items()},
    **{
        also: (name, fields.OTHERS[name], True)
        for also, name in {"nsp": "nsh_spi", "nsi": "nsh_si", **{f"nshc{i}": f"nsh_c{i}" for i in range(1, 5)}}.items()
    },
    "nd_sll": ("arp_sha", fields.ARP_SHA, True),
    "nd_tll": ("arp_tha", fields.ARP_THA, True),
    "ip_dscp": ("ip_dscp", fields.IP_DSCP, False),
    "nw_ttl": ("nw_ttl", fields.IP_TTL, False),
    "tcp_flags": ("tcp_flags", fields.TCP_FLAGS, True),
    "ipv6_src": ("ipv6_src", fields.IPV6_SRC, True),
    "ipv6_dst": ("ipv6_dst", fields.IPV6_DST, True),
    "metadata": ("metadata", fields.METADATA, True),
    "ct_state": ("ct_state", fields.CT_STATE, True),
    "ct_zone": ("ct_zone", fields.CT_ZONE, False),
    "ct_mark": ("ct_mark", fields.CT_MARK, True),
    "vlan_vid": ("vlan_vid", fields.VLAN_VID, True),
}
_PLAIN: Final = fields.BY_NAME | fields.OTHERS
_VLANS: Final = frozenset(("vlan_tci", "vlan_vid", "dl_vlan", "dl_vlan_pcp", "vlan_pcp"))
_FLAGS: Final = frozenset(("send_flow_rem", "check_overlap", "reset_counts", "no_packet_counts", "no_byte_counts"))
_COUNTERS: Final = frozenset(
    ("duration", "n_packets", "n_bytes", "n_offload_packets", "n_offload_bytes", "idle_age", "hard_age")
)
_SETTINGS: Final = {
    "table": 254, "table_id": 254, "priority": _HIGHEST_HIDDEN, "cookie": (1 << 64) - 1, "idle_timeout": 0xFFFF,
    "hard_timeout": 0xFFFF, "importance": 0xFFFF,
}  # fmt: skip
_ALL_KEYS: Final = (*_KEYS, *_PROTOCOLS, *_SETTINGS, *_FLAGS, *_VLANS, "in_port", "nw_tos")


class Head(NamedTuple):
    """Everything of a flow but what it does. `protocol` is (Ethernet type, IP protocol) where the match has them."""

    table: int
    priority: int
    cookie: int
    idle_s: int
    hard_s: int
    flags: int
    match: Match
    protocol: tuple[int | None, int | None]


class Unmet(NamedTuple):
    """A field that Open vSwitch leaves out of the match, and what it would need beside it."""

    field: str
    needed: str


@lru_cache(maxsize=1 << 16)
def _item(item: str) -> tuple[str, int, tuple[Slot, ...]]:
    """One word before the actions: (name, value, ()) of a setting, or ("", 0, slots) of a match."""
    key, equals, text = item.partition("=")
    if key in _COUNTERS:
        return "counter", 0, ()
    if key in _SETTINGS:
        if key == "cookie" and "/" in text:
            raise Refused(item, "a cookie without a mask", "A mask selects flows; say which cookie this one has.")
        if key.startswith("table") and text and not text[0].isdigit():
            raise Refused(item, "a table number", "Dump the flows without --names, or write the table's number.")
        if (key, text) == ("table", "255"):
            raise Refused(item, "a table from 0 to 254", "255 stands for all tables; write the flow for one.")
        return key.removesuffix("_id"), number(key, text, _SETTINGS[key]), ()
    if not equals:
        if key in _FLAGS:
            return "flags", SEND_FLOW_REM if key == "send_flow_rem" else 0, ()
        if key in _PROTOCOLS:
            eth_type, protocol = _PROTOCOLS[key]
            slots = [("eth_type", eth_type, 0xFFFF)] if eth_type else [("packet_type", 0, 0xFFFFFFFF)]
            return "", 0, (*slots, *(() if protocol is None else (("nw_proto", protocol, 0xFF),)))
    elif not text or key in _FLAGS or key in _PROTOCOLS:
        word = f"{key} without a value" if text else f"a value for {key}"
        raise Refused(item, word, f"Write just {key}." if text else "Give it a value, or remove it.")
    elif key in _VLANS:
        return "", 0, _vlan(key, text)
    elif key == "nw_tos":
        return "", 0, (("ip_dscp", number(key, text, 255) >> 2, 0x3F),)
    elif key in _KEYS:
        return "", 0, _slots(key, text)
    raise Refused(item, "a field that Open vSwitch has, with its value", f"{close(key, _ALL_KEYS)}See ovs-fields(7).")


def _slots(key: str, text: str) -> tuple[Slot, ...]:
    place, of, maskable = _KEYS[key]
    value, mask = value_and_mask(of, key, text)
    if mask != of.full and not maskable:
        raise Refused(f"{key}={text}", f"{key} without a mask", "Write one value.")
    if of.name in ("icmpv4_type", "icmpv4_code"):
        mask = 0xFFFF
    split = fields.parts(of.header, 0, of.bits)
    if len(split) == 1:
        return ((place, value, mask),)
    out, at = [], 0
    for header, _, width in split:
        ones = (1 << width) - 1
        out.append((fields.by_header(header).name, value >> at & ones, mask >> at & ones))
        at += width
    return tuple(slot for slot in out if slot[2])


def _vlan(key: str, text: str) -> tuple[Slot, ...]:
    """All of these are bits of one place: priority (3), whether there is a tag, VLAN id (12)."""
    if key == "vlan_tci":
        value, mask = value_and_mask(fields.VLAN_TCI, key, text)
    elif key == "vlan_vid":
        value, mask = value_and_mask(fields.VLAN_VID, key, text)
    elif key == "dl_vlan":
        vid = number(key, text, 0xFFFF)
        if vid > 0xFFF and vid != 0xFFFF:
            raise Refused(f"{key}={text}", "a VLAN id from 0 to 4095, or 0xffff for no tag", "Write one of these.")
        value, mask = (0, 0xFFFF) if vid == 0xFFFF else (0x1000 | vid, 0x1FFF)
    else:
        value, mask = number(key, text, 7) << 13 | 0x1000, 0xF000
    return (("vlan_tci", value, mask),)


_TAGGED: Final = 0x1000


def read_head(words: list[str], ports: Mapping[str, int], faults: list[Refused], unmet: list[Unmet]) -> Head:
    """Read what stands before the actions. What cannot be taken is put to `faults`, what has no effect to `unmet`."""
    settings = {"table": 0, "priority": DEFAULT_PRIORITY, "cookie": 0, "idle_timeout": 0, "hard_timeout": 0, "flags": 0}
    slots: dict[str, tuple[int, int]] = {}
    names: dict[str, str] = {}
    dumped = False
    for word in words:
        try:
            if word.startswith("in_port"):
                key, _, text = word.partition("=")
                if key not in ("in_port", "in_port_oxm") or not text:
                    raise Refused(word, "in_port=PORT", "Name the port.")
                found: tuple[Slot, ...] = (("in_port", port(text, ports), 0xFFFFFFFF),)
            else:
                name, value, found = _item(word)
                if name == "counter":
                    dumped = True
                elif name == "flags":
                    settings[name] |= value
                elif name:
                    settings[name] = value
            for place, value, mask in found:
                _put(slots, place, value, mask, word)
                names[place] = word
        except Refused as fault:
            faults.append(fault)
    if settings["priority"] > 0xFFFF and not dumped:
        found_word = f"priority={settings['priority']}"
        faults.append(
            Refused(found_word, "priority from 0 to 65535", "Only a dump shows what a switch hides above it.")
        )
    if not dumped and "vlan_tci" in slots:
        faults += _ambiguous(names["vlan_tci"], *slots["vlan_tci"])
    match = _match(slots, names, faults, unmet)
    eth_type, proto = slots.get("eth_type"), slots.get("nw_proto")
    return Head(
        settings["table"],
        settings["priority"],
        settings["cookie"],
        settings["idle_timeout"],
        settings["hard_timeout"],
        settings["flags"],
        match,
        (eth_type[0] if eth_type else None, proto[0] if proto else None),
    )


def _ambiguous(word: str, value: int, mask: int) -> Iterator[Refused]:
    """What one version of OpenFlow carries and another does not: a dump shows what became of it, a file cannot."""
    tagged = value & mask & _TAGGED
    if mask == 0xFFFF and value and not tagged:
        yield Refused(word, "a VLAN tag with the bit 0x1000", "Write dl_vlan, or add 0x1000; vlan_tci=0 is no tag.")
    elif mask >> 13 and (mask >> 13 != 7 or not tagged) and not (mask == 0xFFFF and not value):
        fix = "Write dl_vlan_pcp; how Open vSwitch takes other masks depends on the version of OpenFlow."
        yield Refused(word, "a whole VLAN priority, beside a tag", fix)


def _put(slots: dict[str, tuple[int, int]], place: str, value: int, mask: int, word: str) -> None:
    old = slots.get(place)
    if old is None:
        slots[place] = value, mask
    elif place == "vlan_tci" and old[0] & value & _TAGGED and not (old[0] ^ value) & old[1] & mask:
        slots[place] = old[0] | value, old[1] | mask  # an id beside a priority
    elif old != (value, mask):
        raise Refused(word, "one value for a field", "ovs-ofctl would take the last one; remove the others.")


def _match(
    slots: dict[str, tuple[int, int]], names: Mapping[str, str], faults: list[Refused], unmet: list[Unmet]
) -> Match:
    items: list[MatchItem] = []
    which = _Prerequisites(slots)
    for place, (value, mask) in slots.items():
        if place == "vlan_tci":
            items += _vlan_items(value, mask)
        elif place == "packet_type" and (value, mask) == (0, 0xFFFFFFFF):
            pass  # Ethernet, as all else
        else:
            of, needed = which.field(place)
            if of is None:
                if mask:
                    unmet.append(Unmet(names[place], needed))
                continue
            if place == "nw_proto" or (place in ("tp_src", "tp_dst") and of.bits == 8):
                if value > 0xFF or mask not in (0xFF, 0xFFFF):
                    faults.append(
                        Refused(names[place], "a number from 0 to 255, without a mask", "Write such a number.")
                    )
                mask = of.full
            items.append((of.header, value, mask))
    return Match.of(items)


def _vlan_items(value: int, mask: int) -> list[MatchItem]:
    if mask & 0x1000 and not value & 0x1000 and not value & mask:
        mask &= 0x1FFF  # without a tag there is no priority either
    return [
        (fields.VLAN_VID.header, value & 0x1FFF, mask & 0x1FFF),
        (fields.VLAN_PCP.header, value >> 13, mask >> 13),
    ]


_TRANSPORT: Final = {
    (IP, TCP): (fields.TCP_SRC, fields.TCP_DST), (IPV6, TCP): (fields.TCP_SRC, fields.TCP_DST),
    (IP, UDP): (fields.UDP_SRC, fields.UDP_DST), (IPV6, UDP): (fields.UDP_SRC, fields.UDP_DST),
    (IP, SCTP): (fields.SCTP_SRC, fields.SCTP_DST), (IPV6, SCTP): (fields.SCTP_SRC, fields.SCTP_DST),
    (IP, ICMP): (fields.ICMPV4_TYPE, fields.ICMPV4_CODE),
    (IPV6, ICMPV6): (fields.ICMPV6_TYPE, fields.ICMPV6_CODE),
}  # fmt: skip


def transport(protocol: tuple[int | None, int | None]) -> tuple[Field, Field] | None:
    """The source and destination port's fields (ICMP's type and code) of that Ethernet type and IP protocol."""
    return _TRANSPORT.get(protocol)  # type: ignore[arg-type]


class _Prerequisites:
    """Which field each place is, once the protocol is known."""

    def __init__(self, slots: Mapping[str, tuple[int, int]]) -> None:
        self.slots = slots
        self.eth_type: int | None = slots.get("eth_type", (None, 0))[0]
        packet_type, packet_mask = slots.get("packet_type", (0, 0))
        self.ethernet = packet_type == 0 or packet_mask != 0xFFFFFFFF
        if not self.ethernet:
            self.eth_type = packet_type & 0xFFFF if packet_type >> 16 == 1 else None
        self.proto: int | None = slots.get("nw_proto", (None, 0))[0]
        self.transport = _TRANSPORT.get((self.eth_type, self.proto))  # type: ignore[arg-type]

    def field(self, place: str) -> tuple[Field | None, str]:
        """The field, or None and what would have to stand beside it."""
        eth_type = self.eth_type
        if place in ("nw_src", "nw_dst"):
            source = place == "nw_src"
            if eth_type == IP:
                return (fields.IPV4_SRC if source else fields.IPV4_DST), ""
            if eth_type in (ARP, RARP):
                return (fields.ARP_SPA if source else fields.ARP_TPA), ""
            return None, "ip or arp"
        if place == "nw_proto":
            if eth_type in (IP, IPV6):
                return fields.IP_PROTO, ""
            return (fields.ARP_OP, "") if eth_type in (ARP, RARP) else (None, "ip, ipv6 or arp")
        if place in ("ip_dscp", "ip_ecn", "nw_ttl", "ip_frag"):
            return (_PLAIN[place], "") if eth_type in (IP, IPV6) else (None, "ip or ipv6")
        if place in ("tp_src", "tp_dst"):
            if self.transport is None:
                return None, "tcp, udp, sctp or icmp"
            return self.transport[place == "tp_dst"], ""
        if place == "tcp_flags":
            return (fields.TCP_FLAGS, "") if eth_type in (IP, IPV6) and self.proto == TCP else (None, "tcp")
        return self._rest(place)

    def _rest(self, place: str) -> tuple[Field | None, str]:
        eth_type = self.eth_type
        if place in ("arp_sha", "arp_tha"):
            if eth_type in (ARP, RARP):
                return _PLAIN[place], ""
            if self._neighbour() == _NEIGHBOUR_TYPES[place]:
                return (fields.ND_SLL if place == "arp_sha" else fields.ND_TLL), ""
            return None, "arp, or icmp6 with its type"
        if place == "nd_target":
            return (fields.ND_TARGET, "") if self._neighbour() in (135, 136) else (None, "icmp6,icmp_type=135")
        if place in ("ipv6_src", "ipv6_dst", "ipv6_label"):
            return (_PLAIN[place], "") if eth_type == IPV6 else (None, "ipv6")
        if place.startswith("mpls_"):
            return (_PLAIN[place], "") if eth_type in MPLS else (None, "mpls")
        if place in ("eth_src", "eth_dst", "eth_type") and not self.ethernet:
            return None, "a packet type that is Ethernet"
        return _PLAIN[place], ""

    def _neighbour(self) -> int | None:
        if (self.eth_type, self.proto) != (IPV6, ICMPV6):
            return None
        value, mask = self.slots.get("tp_src", (0, 0))
        return value if mask == 0xFFFF else None
