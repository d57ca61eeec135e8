"""One literal flow of a state file, parsed: from ovs-ofctl's syntax to a value with our field names.

The grammar is `ovs.flow`'s (of the PyPI package `ovs`), which reads what `ovs-ofctl dump-flows` prints. People write
what `ovs-ofctl add-flow` accepts, so the text is brought into the former's order first, and what that parser waves
through (unknown flags, negative numbers, a field twice, host masks) is checked here. A field without the protocol it
needs is a fault: ovs-ofctl drops such a field silently, and the flow then matches everything. Imports nothing of ours.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Final

from ovs.flow.kv import ParseError  # type: ignore[import-untyped]
from ovs.flow.ofp import OFPFlow  # type: ignore[import-untyped]
from ovs.flow.ofp_fields import field_decoders  # type: ignore[import-untyped]

DEFAULT_PRIORITY: Final = 32768
# Where `learn` puts flows unless it says otherwise.
_LEARN_TABLE: Final = 1

ETH_TYPE_IP: Final = 0x0800
ICMP, TCP, UDP, SCTP = 1, 6, 17, 132

# Width in bits of each field that a flow of the state file may match.
WIDTHS: Final = {
    "eth_type": 16,
    "ip_proto": 8,
    "ipv4_src": 32,
    "ipv4_dst": 32,
    "tcp_src": 16,
    "tcp_dst": 16,
    "udp_src": 16,
    "udp_dst": 16,
    "sctp_src": 16,
    "sctp_dst": 16,
    "icmpv4_type": 8,
    "icmpv4_code": 8,
    "ip_dscp": 6,
}
_SHORTHANDS: Final = {"ip": None, "icmp": ICMP, "tcp": TCP, "udp": UDP, "sctp": SCTP}
_OTHER_SHORTHANDS: Final = frozenset(("eth", "ipv6", "icmp6", "tcp6", "udp6", "sctp6", "arp", "rarp", "mpls", "mplsm"))
# Our name for ovs-ofctl's. The transport ports named for any protocol are resolved once the protocol is known.
_NAMES: Final = {
    "dl_type": "eth_type",
    "eth_type": "eth_type",
    "nw_proto": "ip_proto",
    "ip_proto": "ip_proto",
    "nw_src": "ipv4_src",
    "ip_src": "ipv4_src",
    "nw_dst": "ipv4_dst",
    "ip_dst": "ipv4_dst",
    "icmp_type": "icmpv4_type",
    "icmp_code": "icmpv4_code",
    "ip_dscp": "ip_dscp",
    **{name: name for name in ("tcp_src", "tcp_dst", "udp_src", "udp_dst", "sctp_src", "sctp_dst")},
}
_TRANSPORT: Final = {
    "tp_src": {TCP: "tcp_src", UDP: "udp_src", SCTP: "sctp_src", ICMP: "icmpv4_type"},
    "tp_dst": {TCP: "tcp_dst", UDP: "udp_dst", SCTP: "sctp_dst", ICMP: "icmpv4_code"},
}
_NEEDS_PROTOCOL: Final = {
    name: protocol
    for prefix, protocol in (("tcp_", TCP), ("udp_", UDP), ("sctp_", SCTP), ("icmpv4_", ICMP))
    for name in WIDTHS
    if name.startswith(prefix)
}
# Keys that stand among the match in ovs-ofctl's syntax, and are no match.
_SETTINGS: Final = frozenset(
    ("table", "cookie", "idle_timeout", "hard_timeout", "importance", "send_flow_rem", "check_overlap", "out_port")
    + ("out_group", "reset_counts", "no_packet_counts", "no_byte_counts", "duration", "n_packets", "n_bytes")
    + ("idle_age", "hard_age")
)
_ALL_KEYS: Final = frozenset((*field_decoders, *_SHORTHANDS, *_OTHER_SHORTHANDS, "priority"))
_FIXES: Final = {
    "cookie": "Cookies say who owns a flow, and Bulkhead owns these; remove it.",
    "table": "The stages are tables of their own; write the flow for table 0, as if there were no other.",
    "idle_timeout": "The state file says what always holds; remove it.",
    "hard_timeout": "The state file says what always holds; remove it.",
    "arp": "ARP for members and the gateway is answered by the NEIGHBOUR stage; remove the flow.",
    "ipv6": "IPv6 is dropped unless a network declares it; remove the flow.",
    "tcp_flags": "Match the ports; the stages follow connections where it matters.",
}

_ACTIONS: Final = re.compile(r"(?:^|[\s,])actions?\s*=")
_SEPARATOR: Final = re.compile(r"[\s,]+")
_DOTTED: Final = re.compile(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})")
_NUMBER: Final = re.compile(r"\d+|0[xX][0-9a-fA-F]+")
_CONSULTS: Final = re.compile(r"resubmit\([^,()]*,\s*(\d+)|goto_table:(\d+)|\bct\([^()]*\btable=(\d+)")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a flow cannot be taken; the caller knows where it stood."""

    code: str
    expected: str
    fix: str


@dataclass(frozen=True, slots=True)
class Action:
    """One action. `port` is set for an output, `table` for a learn; `text` is the action in a comparable notation."""

    kind: str
    text: str
    port: str | None = None
    table: int | None = None


@dataclass(frozen=True, slots=True)
class LiteralFlow:
    """A flow as it was written. `match` has our field names, values and masks, in the order of `WIDTHS`."""

    text: str
    priority: int
    in_port: str | None
    match: tuple[tuple[str, int, int], ...]
    actions: tuple[Action, ...]
    consults: frozenset[int]

    @property
    def drops(self) -> bool:
        """Whether it does nothing but drop."""
        return all(action.kind == "drop" for action in self.actions)

    @property
    def catches_all(self) -> bool:
        """Whether it matches every packet."""
        return self.in_port is None and not self.match

    def exact(self, name: str) -> int | None:
        """The value of a field that is matched in full, else None."""
        for field, value, mask in self.match:
            if field == name and mask == full_mask(name):
                return value
        return None

    def cube(self, name: str) -> tuple[int, int]:
        """The value and mask of a field; (0, 0) matches anything."""
        return next(((value, mask) for field, value, mask in self.match if field == name), (0, 0))


def full_mask(name: str) -> int:
    """The mask of a field matched exactly."""
    return (1 << WIDTHS[name]) - 1


def is_number(port: str) -> bool:
    """Whether a port is named by a number."""
    return _NUMBER.fullmatch(port) is not None


class _Refused(Exception):
    """Carries one fault out of a nested reader."""

    def __init__(self, code: str, expected: str, fix: str) -> None:
        super().__init__(code)
        self.fault = Fault(code, expected, fix)


def parse(text: str) -> LiteralFlow | tuple[Fault, ...]:
    """Read one flow, or say everything that is wrong with it."""
    reader = _MatchReader()
    try:
        keys, actions_text = _split(text)
    except _Refused as exc:
        return (exc.fault,)
    # What is no match is read here: the parser knows some of it, but only as a dump prints it.
    matches = [key for key in keys if reader.admit(key)]
    try:
        # A dump has a match between settings and actions; a priority is one to the parser.
        parsed = OFPFlow(f" {','.join(matches) or f'priority={DEFAULT_PRIORITY}'} actions={actions_text}")
    except (ParseError, ValueError) as exc:
        reason = f"The parser says: {_line(exc.__cause__ or exc)}."
        return (*reader.faults, Fault("bad-flow", "a flow in ovs-ofctl's syntax", reason))
    for item in parsed.match_kv:
        reader.read(item.key, item.meta.vstring)
    reader.finish()
    actions = tuple(_action(item) for item in parsed.actions_kv)
    if len(actions) > 1 and any(action.kind == "drop" for action in actions):
        reader.faults.append(Fault("bad-flow", "drop on its own", "Remove drop, or the other actions."))
    if reader.faults:
        return tuple(reader.faults)
    match = tuple((name, *reader.match[name]) for name in WIDTHS if name in reader.match)
    consults = frozenset(int(number) for found in _CONSULTS.findall(text) for number in found if number)
    return LiteralFlow(text, reader.priority, reader.in_port, match, actions, consults)


def _split(text: str) -> tuple[list[str], str]:
    """The keys before the actions, and the actions."""
    head, *rest = _ACTIONS.split(text, maxsplit=1)
    if not rest:
        raise _Refused("bad-flow", "a flow with actions=", "Say what to do: actions=drop, or actions=output:<port>.")
    return [key for key in _SEPARATOR.split(head) if key], rest[0].strip()


def _line(reason: BaseException) -> str:
    return " ".join(str(reason).split())[:160].rstrip(".") or type(reason).__name__


class _MatchReader:
    """Collects the match of one flow and every fault in it."""

    def __init__(self) -> None:
        self.priority = DEFAULT_PRIORITY
        self.in_port: str | None = None
        self.match: dict[str, tuple[int, int]] = {}
        self.faults: list[Fault] = []
        self._transport: list[tuple[str, int, int]] = []
        self._seen: set[str] = set()

    def admit(self, item: str) -> bool:
        """Whether the parser should see this item; settings and unknown keys are judged at once."""
        key, _, value = item.partition("=")
        if key in _SETTINGS or key not in _ALL_KEYS:
            self.read(key, value)
            return False
        return True

    def read(self, key: str, value: str) -> None:
        """Take one key of the flow."""
        try:
            if key in self._seen:
                raise _Refused("bad-flow", f"{key} once", "ovs-ofctl would take the last; remove the others.")
            self._seen.add(key)
            self._take(key, value)
        except _Refused as exc:
            self.faults.append(exc.fault)

    def _take(self, key: str, value: str) -> None:
        if key == "priority":
            self.priority = _integer(key, value, 65535)
        elif key == "in_port":
            self.in_port = value.strip('"')
        elif key == "table" and _integer(key, value, 254) == 0:
            pass
        elif key in _SHORTHANDS:
            self._shorthand(key, value)
        elif key in _TRANSPORT:
            self._transport.append((key, *_masked(key, value, 16)))
        elif key == "nw_tos":
            self._put("ip_dscp", _integer(key, value, 255) >> 2, 0x3F)
        elif key in _NAMES:
            self._field(key, _NAMES[key], value)
        else:
            raise _unsupported_key(key)

    def _shorthand(self, key: str, value: str) -> None:
        if value:
            raise _Refused("bad-flow", f"{key} without a value", f"Write just {key}.")
        self._put("eth_type", ETH_TYPE_IP, 0xFFFF)
        protocol = _SHORTHANDS[key]
        if protocol is not None:
            self._put("ip_proto", protocol, 0xFF)

    def _field(self, key: str, name: str, value: str) -> None:
        if name in ("ipv4_src", "ipv4_dst"):
            self._put(name, *_address(key, value))
        elif name.endswith(("_src", "_dst")):
            self._put(name, *_masked(key, value, 16))
        else:
            number = _integer(key, value, full_mask(name))
            if name == "eth_type" and number != ETH_TYPE_IP:
                raise _Refused("unsupported", "IPv4 (ip, dl_type=0x800)", _FIXES["arp"])
            self._put(name, number, full_mask(name))

    def _put(self, name: str, value: int, mask: int) -> None:
        if mask == 0:
            return
        if self.match.setdefault(name, (value & mask, mask)) != (value & mask, mask):
            raise _Refused("bad-flow", f"one value for {name}", "ovs-ofctl would take the last; remove the others.")

    def finish(self) -> None:
        """Resolve what depends on the protocol, and see that each field has the one it needs."""
        protocol, _ = self.match.get("ip_proto", (None, 0))
        for key, value, mask in self._transport:
            name = _TRANSPORT[key].get(protocol) if protocol is not None else None
            if name is None:
                self._prerequisite(key, "tcp, udp, sctp or icmp")
            elif value > full_mask(name):
                self.faults.append(Fault("bad-flow", f"{key} up to {full_mask(name)}", "Write a smaller number."))
            else:
                try:
                    self._put(name, value, mask & full_mask(name))
                except _Refused as exc:
                    self.faults.append(exc.fault)
        for name in self.match:
            if name != "eth_type" and "eth_type" not in self.match:
                self._prerequisite(name, "ip (or tcp, udp, sctp, icmp)")
            elif name in _NEEDS_PROTOCOL and protocol != _NEEDS_PROTOCOL[name]:
                self._prerequisite(name, name.partition("_")[0].removesuffix("v4"))

    def _prerequisite(self, name: str, needed: str) -> None:
        expected = f"{needed} beside {name}"
        self.faults.append(
            Fault("prerequisite", expected, f"Without it the switch ignores {name} and matches everything; add it.")
        )


def _unsupported_key(key: str) -> _Refused:
    if key in _SETTINGS or key in field_decoders or key in _OTHER_SHORTHANDS:
        fix = _FIXES.get(key) or ("Match IPv4, its addresses and ports, DSCP or ICMP." if key not in _SETTINGS else "")
        return _Refused(
            "unsupported", f"a flow without {key}", fix or f"The stages leave no room for {key}; remove it."
        )
    known = [*_SHORTHANDS, *_NAMES, *_TRANSPORT, "in_port", "priority", "nw_tos"]
    close = difflib.get_close_matches(key[:40], known, n=2)
    fix = f"Did you mean {' or '.join(close)}?" if close else "Remove it."
    return _Refused("bad-flow", f"a field OpenFlow has, not {key[:40]!r}", fix)


def _integer(key: str, value: str, highest: int) -> int:
    try:
        number = int(value, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= highest:
        raise _Refused("bad-flow", f"{key} from 0 to {highest}", "Write a number in that range.")
    return number


def _masked(key: str, value: str, width: int) -> tuple[int, int]:
    number, slash, mask = value.partition("/")
    highest = (1 << width) - 1
    return _integer(key, number, highest), _integer(key, mask, highest) if slash else highest


def _address(key: str, value: str) -> tuple[int, int]:
    # Not the parser's own reading: it takes the mask 0.0.0.255 for a host mask, OVS matches the last byte.
    address, slash, mask = value.partition("/")
    quad = _quad(address)
    bits = 0xFFFFFFFF
    if slash and _NUMBER.fullmatch(mask):
        length = _integer(key, mask, 32)
        bits = (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF
    elif slash:
        bits = _quad(mask)
    return quad & bits, bits


def _quad(text: str) -> int:
    found = _DOTTED.fullmatch(text)
    if found is None or any(int(byte) > 255 for byte in found.groups()):
        fix = "Write 10.0.0.1, 10.0.0.0/24 or 10.0.0.0/255.255.255.0."
        raise _Refused("bad-flow", "an IPv4 address", fix)
    return int.from_bytes(bytes(map(int, found.groups())), "big")


def _action(item: Any) -> Action:
    """One action of the parser's list. Ports keep the name they were given."""
    kind = str(item.key).lower()
    argument = str(item.meta.vstring)
    if kind == "output" and isinstance(item.value, dict) and set(item.value) == {"port"}:
        # A bare name has no value string: `actions=normal`.
        port = (argument if item.meta.delim in (":", "=", "(") else str(item.value["port"])).strip().strip('"')
        return Action("output", f"output:{port.removeprefix('port=')}", port=port.removeprefix("port="))
    if kind == "learn":
        settings = item.value if isinstance(item.value, list) else []
        table = next((setting["table"] for setting in settings if "table" in setting), _LEARN_TABLE)
        return Action("learn", f"learn({argument})", table=table)
    return Action(kind, f"{kind}({argument})" if argument else kind)
