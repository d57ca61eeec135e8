"""Flows to and from the wire: OpenFlow 1.4 messages as bytes.

Only what a reconciler needs: flow mods, bundles, meters, flow statistics, flow updates, flow-removed, packet-in. Our
own because os-ken builds one object tree per field and needs 80 microseconds a flow; a cold start sends thousands.
Sources: OpenFlow Switch Specification 1.4.1 (structures), `nicira-ext.h` of Open vSwitch (Nicira actions). Every
decoder raises `CodecError` for anything truncated or inconsistent. Imports flow and fields.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from controller import fields
from controller.flow import (
    SEND_FLOW_REM,
    Action,
    Bits,
    Flow,
    Learn,
    LearnLoad,
    LearnMatch,
    Load,
    Match,
    Move,
    Output,
    Raw,
    Resubmit,
    SetField,
)
from controller.problems import BulkheadError

VERSION = 0x05
NO_BUFFER = 0xFFFFFFFF
NICIRA = 0x00002320

HELLO, ERROR, PACKET_IN, FLOW_REMOVED, PACKET_OUT, FLOW_MOD = 0, 1, 10, 11, 13, 14
MULTIPART_REQUEST, MULTIPART_REPLY, BARRIER_REQUEST, METER_MOD = 18, 19, 20, 29
BUNDLE_CONTROL, BUNDLE_ADD = 33, 34
ADD, DELETE_STRICT = 0, 4
OPEN, COMMIT, DISCARD = 0, 4, 6
ATOMIC_ORDERED = 3
MP_FLOW, MP_METER_CONFIG, MP_FLOW_MONITOR = 1, 10, 16
CONTROLLER_METER = 0xFFFFFFFE
_ALL_TABLES = 0xFF

_HEADER = struct.Struct("!BBHI")
_FLOW_MOD = struct.Struct("!QQBBHHHIIIHH")
_FLOW_STATS = struct.Struct("!HBxIIHHHHHxxQQQ")
_FLOW_UPDATE = struct.Struct("!HHBBHHH4xQ")
_FLOW_REMOVED = struct.Struct("!QHBBIIHHQQ")
_PACKET_IN = struct.Struct("!IHBBQ")
_BUNDLE = struct.Struct("!IHH")
_BUNDLE_ADD = struct.Struct("!BBHIIHH")
_LEARN = struct.Struct("!HHIHHHHQHBxHHIHH")


class CodecError(BulkheadError):
    """A message or part of one that is not what OpenFlow says it should be."""


# ---------------------------------------------------------------------------------------------------------- to bytes


def _message(kind: int, body: bytes, xid: int) -> bytes:
    return _HEADER.pack(VERSION, kind, 8 + len(body), xid) + body


_BASIC = fields.OPENFLOW_BASIC << 16


@lru_cache(maxsize=1 << 16)
def _oxm(header: int, value: int, mask: int) -> bytes:
    field = fields.by_header(header)
    size = field.size
    if mask == field.full:
        return header.to_bytes(4, "big") + value.to_bytes(size, "big")
    masked = (header & ~0xFF | 0x100 | 2 * size).to_bytes(4, "big")
    return masked + value.to_bytes(size, "big") + mask.to_bytes(size, "big")


def _oxms(match: Match) -> bytes:
    """The fields of a match, OpenFlow's own first: what they are needed for (ip_frag needs eth_type) comes behind them."""
    items = [_oxm(*item) for item in match]
    extensions = sum([header < _BASIC for header, _, _ in match])
    return b"".join(items[extensions:] + items[:extensions])


def encode_match(match: Match) -> bytes:
    """The match structure with its padding."""
    body = _oxms(match)
    size = 4 + len(body)
    return struct.pack("!HH", 1, size) + body + bytes(-size % 8)


def _nicira(subtype: int, body: bytes) -> bytes:
    size = 10 + len(body)
    padded = size + -size % 8
    return struct.pack("!HHIH", 0xFFFF, padded, NICIRA, subtype) + body + bytes(padded - size)


def _learn_spec(spec: LearnMatch | LearnLoad) -> bytes:
    target, source = spec.target, spec.source
    head = target.width | (1 << 11 if isinstance(spec, LearnLoad) else 0)
    if isinstance(source, int):
        size = (target.width + 15) // 16 * 2
        front = struct.pack("!H", head | 1 << 13) + source.to_bytes(size, "big")
    else:
        front = struct.pack("!HIH", head, source.header, source.start)
    return front + struct.pack("!IH", target.header, target.start)


def _encode_learn(learn: Learn) -> bytes:
    specs = b"".join(map(_learn_spec, learn.specs))
    size = _LEARN.size + len(specs)
    padded = size + -size % 8
    head = _LEARN.pack(
        0xFFFF,
        padded,
        NICIRA,
        45,
        learn.idle_s,
        learn.hard_s,
        learn.priority,
        learn.cookie,
        SEND_FLOW_REM,
        learn.table,
        0,
        0,
        learn.limit,
        0,
        0,
    )
    return head + specs + bytes(padded - size)


def encode_action(action: Action) -> bytes:
    """One action. Raises `CodecError` for an action of somebody else's that we only carry."""
    match action:
        case Output(port, max_len):
            return struct.pack("!HHIH6x", 0, 16, port, max_len)
        case SetField(header, value):
            oxm = _oxm(header, value, fields.by_header(header).full)
            size = 4 + len(oxm)
            padded = size + -size % 8
            return struct.pack("!HH", 25, padded) + oxm + bytes(padded - size)
        case Move(source, target):
            return _nicira(
                6, struct.pack("!HHHII", source.width, source.start, target.start, source.header, target.header)
            )
        case Load(value, target):
            return _nicira(7, struct.pack("!HIQ", target.start << 6 | target.width - 1, target.header, value))
        case Resubmit(table):
            return _nicira(14, struct.pack("!HB3x", 0xFFF8, table))
        case Learn():
            return _encode_learn(action)
        case Raw():
            raise CodecError("an action that is not ours cannot be sent")


@lru_cache(maxsize=1 << 16)
def _instructions(actions: tuple[Action, ...], goto: int | None) -> bytes:
    out = b""
    if actions:
        body = b"".join(map(encode_action, actions))
        out = struct.pack("!HH4x", 4, 8 + len(body)) + body
    if goto is not None:
        out += struct.pack("!HHB3x", 1, 8, goto)
    return out


def flow_mod_body(flow: Flow, command: int) -> bytes:
    """A flow mod without its header. A delete is strict and bound to the flow's own cookie."""
    delete = command == DELETE_STRICT
    head = _FLOW_MOD.pack(
        flow.cookie,
        0xFFFFFFFFFFFFFFFF if delete else 0,
        flow.table,
        command,
        flow.idle_s,
        flow.hard_s,
        flow.priority,
        NO_BUFFER,
        fields.ANY,
        fields.ANY,
        flow.flags,
        0,
    )
    body = _oxms(flow.match)
    size = 4 + len(body)
    matched = head + b"\x00\x01" + size.to_bytes(2, "big") + body + _ZEROS[-size % 8]
    return matched if delete else matched + _instructions(flow.actions, flow.goto)


_ZEROS = tuple(bytes(n) for n in range(8))


def flow_mod(flow: Flow, command: int, xid: int) -> bytes:
    """A flow mod of its own, outside a bundle."""
    return _message(FLOW_MOD, flow_mod_body(flow, command), xid)


def bundle(bundle_id: int, deletes: Iterable[Flow], adds: Iterable[Flow], xid: int) -> bytes:
    """Open an atomic, ordered bundle and put everything into it; every message has `xid`.

    Committing is a message of its own, to be sent when a barrier after this has come back without an error: a bundle
    with one bad flow would otherwise commit the good ones.
    """
    out = [bundle_control(bundle_id, OPEN, xid)]
    for command, flows in ((DELETE_STRICT, deletes), (ADD, adds)):
        for flow in flows:
            body = flow_mod_body(flow, command)
            size = 8 + len(body)
            out.append(_BUNDLE_ADD.pack(VERSION, BUNDLE_ADD, 16 + size, xid, bundle_id, 0, ATOMIC_ORDERED))
            out.append(_HEADER.pack(VERSION, FLOW_MOD, size, xid))
            out.append(body)
    return b"".join(out)


def bundle_control(bundle_id: int, kind: int, xid: int) -> bytes:
    """OPEN, COMMIT or DISCARD a bundle."""
    return _message(BUNDLE_CONTROL, _BUNDLE.pack(bundle_id, kind, ATOMIC_ORDERED), xid)


def barrier(xid: int) -> bytes:
    """Ask the switch to finish everything before, then answer."""
    return _message(BARRIER_REQUEST, b"", xid)


def flow_stats_request(xid: int, table: int = _ALL_TABLES) -> bytes:
    """Ask for every flow (of one table) with its counters."""
    body = struct.pack("!HH4xB3xII4xQQ", MP_FLOW, 0, table, fields.ANY, fields.ANY, 0, 0) + encode_match(Match())
    return _message(MULTIPART_REQUEST, body, xid)


def flow_monitor_request(xid: int, monitor_id: int) -> bytes:
    """Ask to be told of every flow added, removed or modified from now on, by whomever, with its actions.

    Flags: ADD 2 | REMOVED 4 | MODIFY 8 | INSTRUCTIONS 16; our own changes come abbreviated.
    """
    body = struct.pack("!HH4xIIIHBB", MP_FLOW_MONITOR, 0, monitor_id, fields.ANY, fields.ANY, 0x1E, _ALL_TABLES, 0)
    return _message(MULTIPART_REQUEST, body + encode_match(Match()), xid)


def controller_meter(rate: int, burst: int, xid: int, *, modify: bool = False) -> bytes:
    """Make (or change) the switch's controller meter: `rate` packet-ins a second, `burst` at once; the rest drop."""
    packets_burst_stats = 0x02 | 0x04 | 0x08
    head = struct.pack("!HHI", int(modify), packets_burst_stats, CONTROLLER_METER)
    band = struct.pack("!HHII4x", 1, 16, rate, burst)
    return _message(METER_MOD, head + band, xid)


def meter_config_request(xid: int) -> bytes:
    """Ask for the controller meter's configuration."""
    return _message(MULTIPART_REQUEST, struct.pack("!HH4xI4x", MP_METER_CONFIG, 0, CONTROLLER_METER), xid)


def packet_out(port: int, data: bytes, xid: int) -> bytes:
    """Send `data` out of `port`, as if it came from the controller."""
    action = encode_action(Output(port))
    head = struct.pack("!IIH6x", NO_BUFFER, fields.CONTROLLER, len(action))
    return _message(PACKET_OUT, head + action + data, xid)


# -------------------------------------------------------------------------------------------------------- from bytes


def decode_match(data: bytes | memoryview, offset: int) -> tuple[Match, int]:
    """The match at `offset` and the offset behind its padding."""
    if len(data) < offset + 4:
        raise CodecError("match cut short")
    kind, size = struct.unpack_from("!HH", data, offset)
    end = offset + size
    if kind != 1 or size < 4 or end > len(data):
        raise CodecError(f"match of type {kind} and length {size} does not fit")
    return _match_items(bytes(data[offset + 4 : end])), end + -size % 8


@lru_cache(maxsize=1 << 16)
def _match_items(data: bytes) -> Match:
    items = []
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            raise CodecError("match field cut short")
        header = int.from_bytes(data[at : at + 4], "big")
        size = header & 0xFF
        payload = data[at + 4 : at + 4 + size]
        at += 4 + size
        if len(payload) != size:
            raise CodecError("match field cut short")
        if header >> 16 == 0xFFFF:  # an experimenter's: its own number is part of the value
            items.append((header, int.from_bytes(payload, "big"), (1 << 8 * size) - 1))
            continue
        field = fields.by_header(header)
        if header & 0x100:
            half = size // 2
            mask = int.from_bytes(payload[half:], "big") & field.full
            items.append((field.header, int.from_bytes(payload[:half], "big") & mask, mask))
        else:
            items.append((field.header, int.from_bytes(payload, "big"), field.full))
    return Match.of(items)


def _canonical(header: int) -> int:
    return fields.CANONICAL.get(header, header)


def _bits(header: int, start: int, width: int) -> Bits:
    return Bits(_canonical(header), start, width)


def _bits_at(data: bytes, at: int, width: int) -> Bits:
    header, start = struct.unpack_from("!IH", data, at)
    return _bits(header, start, width)


def _decode_learn(data: bytes) -> Learn:
    parts = _LEARN.unpack_from(data)
    idle, hard, priority, cookie, flags, table, fin_idle, fin_hard, limit = parts[4:13]
    if flags != SEND_FLOW_REM or fin_idle or fin_hard:
        raise CodecError("a learn action that is not of our making")
    specs: list[LearnMatch | LearnLoad] = []
    at = _LEARN.size
    while at + 2 <= len(data):
        (head,) = struct.unpack_from("!H", data, at)
        if head == 0:
            break
        at += 2
        width = head & 0x3FF
        source: Bits | int
        if head & 1 << 13:
            size = (width + 15) // 16 * 2
            source = int.from_bytes(data[at : at + size], "big")
            at += size
        else:
            source = _bits_at(data, at, width)
            at += 6
        target = _bits_at(data, at, width)
        at += 6
        kind = head >> 11 & 3
        if kind not in (0, 1):
            raise CodecError("a learn action that outputs")
        specs.append(LearnLoad(source, target) if kind else LearnMatch(target, source))
    return Learn(table, priority, cookie, idle, hard, limit, tuple(specs))


@lru_cache(maxsize=1 << 14)
def _decode_action(data: bytes) -> Action:
    try:
        (kind,) = struct.unpack_from("!H", data)
        if kind == 0:
            port, max_len = struct.unpack_from("!IH", data, 4)
            return Output(port, max_len if port == fields.CONTROLLER else 0)
        if kind == 25:
            header = int.from_bytes(data[4:8], "big")
            if not header & 0x100:
                return SetField(_canonical(header), int.from_bytes(data[8 : 8 + (header & 0xFF)], "big"))
        if kind == 0xFFFF:
            vendor, subtype = struct.unpack_from("!IH", data, 4)
            if vendor == NICIRA:
                return _decode_nicira(subtype, data)
    except (struct.error, CodecError):
        pass
    return Raw(data)


def _decode_nicira(subtype: int, data: bytes) -> Action:
    if subtype == 6:
        width, source_start, target_start, source, target = struct.unpack_from("!HHHII", data, 10)
        return Move(_bits(source, source_start, width), _bits(target, target_start, width))
    if subtype == 7:
        place, target, value = struct.unpack_from("!HIQ", data, 10)
        bits = _bits(target, place >> 6, (place & 0x3F) + 1)
        field = fields.by_header(bits.header)
        if bits.start == 0 and bits.width == field.bits:
            return SetField(bits.header, value)
        return Load(value, bits)
    if subtype == 14:
        in_port, table = struct.unpack_from("!HB", data, 10)
        if in_port == 0xFFF8:
            return Resubmit(table)
    if subtype == 45:
        return _decode_learn(data)
    return Raw(data)


@lru_cache(maxsize=1 << 16)
def _decode_instructions(data: bytes) -> tuple[tuple[Action, ...], int | None]:
    actions: list[Action] = []
    goto = None
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise CodecError("instruction cut short")
        kind, size = struct.unpack_from("!HH", data, at)
        if size < 8 or at + size > len(data):
            raise CodecError(f"instruction of type {kind} and length {size} does not fit")
        if kind == 4:
            actions += _split_actions(data[at + 8 : at + size])
        elif kind == 1:
            goto = data[at + 4]
        else:
            actions.append(Raw(data[at : at + size]))
        at += size
    return tuple(actions), goto


def _split_actions(data: bytes) -> Iterator[Action]:
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise CodecError("action cut short")
        (size,) = struct.unpack_from("!H", data, at + 2)
        if size < 8 or at + size > len(data):
            raise CodecError(f"action of length {size} does not fit")
        yield _decode_action(data[at : at + size])
        at += size


@dataclass(frozen=True, slots=True)
class FlowStats:
    """An installed flow with its counters; `age_s` is how long it has been there."""

    flow: Flow
    packets: int
    octets: int
    age_s: float


_KEPT_FLAGS = SEND_FLOW_REM


def decode_flow_stats(data: bytes | memoryview) -> FlowStats:
    """One entry of a flow statistics reply."""
    if len(data) < _FLOW_STATS.size:
        raise CodecError("flow statistics entry cut short")
    size, table, age, age_ns, priority, idle, hard, flags, _, cookie, packets, octets = _FLOW_STATS.unpack_from(data)
    if size != len(data):
        raise CodecError("flow statistics entry of the wrong length")
    match, at = decode_match(data, _FLOW_STATS.size)
    actions, goto = _decode_instructions(bytes(data[at:]))
    flow = Flow(table, priority, match, actions, goto, cookie, idle, hard, flags & _KEPT_FLAGS)
    return FlowStats(flow, packets, octets, age + age_ns / 1e9)


class Update(IntEnum):
    """What a flow update says."""

    INITIAL = 0
    ADDED = 1
    REMOVED = 2
    MODIFIED = 3
    ABBREVIATED = 4
    PAUSED = 5
    RESUMED = 6


class Reason(IntEnum):
    """Why a flow is gone (`ofp_flow_removed_reason`)."""

    IDLE = 0
    HARD = 1
    DELETE = 2
    GROUP_DELETE = 3
    METER_DELETE = 4
    EVICTION = 5


@dataclass(frozen=True, slots=True)
class FlowUpdate:
    """A change of the switch's flows, told by its flow monitor. `flow` is None for abbreviated ones and pauses."""

    event: Update
    flow: Flow | None = None
    reason: int = 0


def decode_flow_update(data: bytes | memoryview) -> FlowUpdate:
    """One entry of a flow monitor reply."""
    if len(data) < 8:
        raise CodecError("flow update cut short")
    size, event = struct.unpack_from("!HH", data)
    if size != len(data) or event > max(Update):
        raise CodecError(f"flow update of event {event} and length {size} does not fit")
    if event >= Update.ABBREVIATED:
        return FlowUpdate(Update(event))
    if len(data) < _FLOW_UPDATE.size:
        raise CodecError("flow update cut short")
    _, _, table, reason, idle, hard, priority, cookie = _FLOW_UPDATE.unpack_from(data)
    match, at = decode_match(data, _FLOW_UPDATE.size)
    actions, goto = _decode_instructions(bytes(data[at:]))
    return FlowUpdate(Update(event), Flow(table, priority, match, actions, goto, cookie, idle, hard), reason)


@dataclass(frozen=True, slots=True)
class FlowRemoved:
    """A flow that had asked for it is gone; its counters are final."""

    flow: Flow
    reason: int
    packets: int
    octets: int


def decode_flow_removed(message: bytes | memoryview) -> FlowRemoved:
    """A whole flow-removed message. The flow has no actions: the switch does not say."""
    if len(message) < 8 + _FLOW_REMOVED.size:
        raise CodecError("flow-removed message cut short")
    cookie, priority, reason, table, _, _, idle, hard, packets, octets = _FLOW_REMOVED.unpack_from(message, 8)
    match, _ = decode_match(message, 8 + _FLOW_REMOVED.size)
    return FlowRemoved(Flow(table, priority, match, (), None, cookie, idle, hard), reason, packets, octets)


@dataclass(frozen=True, slots=True)
class PacketIn:
    """A packet that the switch shows us: `match` is its port and registers, `size` its length on the wire."""

    cookie: int
    table: int
    match: Match
    data: bytes
    size: int


def decode_packet_in(message: bytes | memoryview) -> PacketIn:
    """A whole packet-in message."""
    if len(message) < 8 + _PACKET_IN.size:
        raise CodecError("packet-in message cut short")
    _, total, _, table, cookie = _PACKET_IN.unpack_from(message, 8)
    match, at = decode_match(message, 8 + _PACKET_IN.size)
    return PacketIn(cookie, table, match, bytes(message[at + 2 :]), total)
