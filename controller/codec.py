"""Flows to and from the wire: OpenFlow 1.4 messages as bytes.

Only what a reconciler needs: flow mods, bundles, meters, flow statistics, flow updates, flow-removed, packet-in. Our
own because os-ken builds one object tree per field and needs 80 microseconds a flow; a cold start sends thousands.
Sources: OpenFlow Switch Specification 1.4.1 (structures), `nicira-ext.h` of Open vSwitch (Nicira actions). Every
decoder raises `CodecError` for anything truncated or inconsistent. Of other people's actions those are read that flow
values can say; the rest is kept as bytes. Imports flow, flowwrites and fields.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from controller import fields
from controller.fields import Field
from controller.flow import (
    DELETE_LEARNED,
    SEND_FLOW_REM,
    Action,
    Aside,
    Bits,
    Clone,
    Ct,
    CtClear,
    DecTtl,
    Flow,
    Learn,
    LearnLoad,
    LearnMatch,
    LearnOutput,
    LearnSpec,
    Load,
    Match,
    MatchItem,
    Move,
    Output,
    PopVlan,
    Raw,
    Resubmit,
    SetField,
)
from controller.flowwrites import FOLLOWED, masked, moved, note, paired, settled, written
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
_OLD_LEARN = struct.Struct("!HHIHHHHQHBxHH")


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


def _learn_spec(spec: LearnSpec) -> bytes:
    if isinstance(spec, LearnOutput):
        return struct.pack("!HIH", spec.source.width | _OUTPUTS << 11, spec.source.header, spec.source.start)
    target, source = spec.target, spec.source
    head = target.width | (1 << 11 if isinstance(spec, LearnLoad) else 0)
    if isinstance(source, int):
        size = (target.width + 15) // 16 * 2
        front = struct.pack("!H", head | 1 << 13) + source.to_bytes(size, "big")
    else:
        front = struct.pack("!HIH", head, source.header, source.start)
    return front + struct.pack("!IH", target.header, target.start)


_OUTPUTS = 2
_NO_TABLE = 0xFF
_COMMIT, _FORCE = 1, 2


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
        learn.flags,
        learn.table,
        learn.fin_idle_s,
        learn.fin_hard_s,
        learn.limit,
        0,
        0,
    )
    return head + specs + bytes(padded - size)


def _encode_ct(ct: Ct) -> bytes:
    if ct.nat:
        raise CodecError("address translation is not ours and cannot be sent")
    flags = (_COMMIT if ct.commit else 0) | (_FORCE if ct.force else 0)
    zone = (ct.zone.header, _place(ct.zone)) if isinstance(ct.zone, Bits) else (0, ct.zone)
    table = _NO_TABLE if ct.table is None else ct.table
    return _nicira(35, struct.pack("!HIHB3xH", flags, *zone, table, 0) + b"".join(map(encode_action, ct.actions)))


def _place(bits: Bits) -> int:
    return bits.start << 6 | bits.width - 1


def encode_action(action: Action) -> bytes:
    """One action. Raises `CodecError` for an action of somebody else's that we only carry."""
    match action:
        case Output(port, max_len) if max_len and port != fields.CONTROLLER:
            return _nicira(39, struct.pack("!HI", port & 0xFFFF, max_len))
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
            return _nicira(7, struct.pack("!HIQ", _place(target), target.header, value))
        case Resubmit(table):
            return _nicira(14, struct.pack("!HB3x", 0xFFF8, table))
        case Learn():
            return _encode_learn(action)
        case _:
            return _encode_foreign(action)


def _encode_foreign(action: Action) -> bytes:
    """Actions that no flow of ours has."""
    match action:
        case Ct():
            return _encode_ct(action)
        case Clone(actions):
            return _nicira(42, bytes(6) + b"".join(map(encode_action, actions)))
        case CtClear():
            return _nicira(43, b"")
        case PopVlan():
            return struct.pack("!HH4x", 18, 8)
        case DecTtl():
            return struct.pack("!HH4x", 24, 8)
        case Aside("pop_queue"):
            return _nicira(5, b"")
        case Aside(text) if text.startswith("set_queue:"):
            return struct.pack("!HHI", 21, 8, int(text.removeprefix("set_queue:")))
        case Aside(text) if text.startswith("note:"):
            return _nicira(8, bytes.fromhex(text.removeprefix("note:").replace(".", "")))
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
        if header >> 16 == _EXPERIMENTER:  # an experimenter's: its own number is part of the value
            items.append(_experimenters(header, payload))
            continue
        field = fields.by_header(header)
        if header & 0x100:
            half = size // 2
            mask = int.from_bytes(payload[half:], "big") & field.full
            items.append((field.header, int.from_bytes(payload[:half], "big") & mask, mask))
        else:
            items.append((field.header, int.from_bytes(payload, "big"), field.full))
    return Match.of(item for item in items if item != _ETHERNET)


_ETHERNET = (fields.PACKET_TYPE.header, 0, fields.PACKET_TYPE.full)
"""What Open vSwitch says for "any" (OpenFlow 1.5's packet type): all packets here are of that kind."""

_EXPERIMENTER = 0xFFFF
_ONF = 0x4F4E4600


def _experimenters(header: int, payload: bytes) -> MatchItem:
    """TCP flags have no number of OpenFlow's own before 1.5."""
    if header >> 9 & 0x7F == 42 and int.from_bytes(payload[:4], "big") == _ONF and len(payload) in (6, 8):
        value, mask = int.from_bytes(payload[4:6], "big"), int.from_bytes(payload[6:8] or b"\xff\xff", "big")
        return fields.TCP_FLAGS.header, value & mask, mask
    return header, int.from_bytes(payload, "big"), (1 << 8 * len(payload)) - 1


def _parts(header: int, start: int, width: int) -> list[tuple[int, int, int]]:
    if header >> 16 == _EXPERIMENTER or header & 0x100 or header == fields.IP_TOS.header:
        raise CodecError("bits of a field that we have no name for")
    if not width or start + width > fields.by_header(header).bits:
        raise CodecError("bits that a field does not have")
    return fields.parts(header, start, width)


def _parts_at(data: bytes, at: int, width: int) -> list[tuple[int, int, int]]:
    header, start = struct.unpack_from("!IH", data, at)
    return _parts(header, start, width)


def _decode_learn(data: bytes) -> Learn:
    """Both forms; the older one has no limit. Some that a switch may hold are more than `Learn` can say."""
    head = _LEARN if data[9] == 45 else _OLD_LEARN
    parts = (*head.unpack_from(data)[4:], 0, 0, 0)
    idle, hard, priority, cookie, flags, table, fin_idle, fin_hard, limit = parts[:9]
    if flags & ~(SEND_FLOW_REM | DELETE_LEARNED) or any(parts[9:11]):
        raise CodecError("a learn action that writes its result")
    specs: list[LearnSpec] = []
    at = head.size
    while at + 2 <= len(data):
        (spec,) = struct.unpack_from("!H", data, at)
        if spec == 0:
            break
        at = _decode_spec(data, at + 2, spec, specs)
    return Learn(table, priority, cookie, idle, hard, limit, tuple(specs), flags, fin_idle, fin_hard)


def _decode_spec(data: bytes, at: int, head: int, specs: list[LearnSpec]) -> int:
    """Read one of the things that a learned flow compares or does, answer where the next begins."""
    width, kind, constant = head & 0x3FF, head >> 11 & 3, head & 1 << 13
    if head & ~0x3BFF or kind > _OUTPUTS or (constant and kind == _OUTPUTS):
        raise CodecError("a learn action that we do not know")
    value, source = 0, []
    if constant:
        size = (width + 15) // 16 * 2
        if at + size > len(data):
            raise CodecError("a learn action cut short")
        value = int.from_bytes(data[at : at + size], "big")
        if value >> width:
            raise CodecError("a learn action with a value that does not fit")
        at += size
    else:
        source = _parts_at(data, at, width)
        at += 6
    if kind == _OUTPUTS:
        if len(source) > 1:
            raise CodecError("a learn action that outputs to bits of two fields")
        specs.append(LearnOutput(Bits(*source[0])))
        return at
    target = _parts_at(data, at, width)
    if constant:
        for part in map(Bits._make, target):
            piece = value & (1 << part.width) - 1
            specs.append(LearnLoad(piece, part) if kind else LearnMatch(part, piece))
            value >>= part.width
    else:
        specs += [LearnLoad(one, other) if kind else LearnMatch(other, one) for one, other in paired(source, target)]
    return at + 6


_DEEPEST = 32
"""So many actions inside each other are read; a switch may send more than anybody can."""


@lru_cache(maxsize=1 << 14)
def _decode_action(data: bytes, depth: int) -> tuple[Action, ...]:
    """One action on the wire. Several of ours where it writes several fields, or bits that are no run."""
    try:
        (kind,) = struct.unpack_from("!H", data)
        found: list[Action] | Action | None = None
        if kind == 0:
            port, max_len = struct.unpack_from("!IH", data, 4)
            if port < fields.RESERVED or port in FOLLOWED:
                found = Output(port, max_len if port == fields.CONTROLLER else 0)
        elif kind == 25:
            found = _decode_set_field(data)
        elif kind == 0xFFFF:
            vendor, subtype = struct.unpack_from("!IH", data, 4)
            if vendor == NICIRA:
                found = _decode_nicira(subtype, data, depth)
        elif kind in (18, 24):
            found = PopVlan() if kind == 18 else DecTtl()
        elif kind == 21:
            found = Aside(f"set_queue:{int.from_bytes(data[4:8], 'big')}")
        elif kind == 23:
            found = SetField(fields.IP_TTL.header, data[4])
        if found:
            return tuple(found) if isinstance(found, list) else (found,)
    except (struct.error, CodecError):
        pass
    return (Raw(data),)


def _decode_set_field(data: bytes) -> list[Action] | None:
    header = int.from_bytes(data[4:8], "big")
    size = header & 0xFF
    if header >> 16 == _EXPERIMENTER or 8 + size > len(data):
        return None
    of = fields.by_header(header)
    of = fields.by_header(fields.CANONICAL.get(of.header, of.header))
    if header & 0x100:
        value, mask = (int.from_bytes(data[at : at + size // 2], "big") for at in (8, 8 + size // 2))
        return masked(of, value & mask, mask & of.full)
    return written(Bits(of.header, 0, of.bits), int.from_bytes(data[8 : 8 + size], "big"))


def _decode_nicira(subtype: int, data: bytes, depth: int) -> list[Action] | Action | None:
    if subtype == 6:
        width, source_start, target_start, source, target = struct.unpack_from("!HHHII", data, 10)
        return moved(_run(source, source_start, width), _run(target, target_start, width))
    if subtype == 7:
        place, target, value = struct.unpack_from("!HIQ", data, 10)
        return written(_run(target, place >> 6, (place & 0x3F) + 1), value)
    if subtype == 14:
        in_port, table = struct.unpack_from("!HB", data, 10)
        if in_port == 0xFFF8 and table != _NO_TABLE:
            return Resubmit(table)
    if subtype in (16, 45):
        return _decode_learn(data)
    return _decode_foreign(subtype, data, depth)


def _run(header: int, start: int, width: int) -> Bits:
    if header >> 16 == _EXPERIMENTER or header & 0x100 or start + width > fields.by_header(header).bits:
        raise CodecError("bits of a field that we have no name for")
    return Bits(header, start, width)


def _decode_foreign(subtype: int, data: bytes, depth: int) -> Action | None:
    """Actions that no flow of ours has."""
    if subtype in (35, 42) and depth >= _DEEPEST:
        return None
    if subtype == 35:
        return _decode_ct(data, depth)
    if subtype == 42:
        return Clone(tuple(_split_actions(data[16:], depth + 1)))
    if subtype == 39:
        port, max_len = struct.unpack_from("!HI", data, 10)
        return Output(port | 0xFFFF0000 if port >= 0xFF00 else port, max_len)
    if subtype == 8:
        return note(data[10:])
    known: dict[int, Action] = {5: Aside("pop_queue"), 18: DecTtl(), 43: CtClear()}
    return known.get(subtype)


def _decode_ct(data: bytes, depth: int) -> Ct | None:
    flags, source, place, table, helper = struct.unpack_from("!HIHB3xH", data, 10)
    if helper or flags & ~(_COMMIT | _FORCE):
        return None  # a helper lets connections in that are related to this one
    zone: int | Bits = place
    if source:
        pieces = _parts(source, place >> 6, (place & 0x3F) + 1)
        if len(pieces) != 1:
            return None
        zone = Bits(*pieces[0])
    nat = ""
    actions: list[Action] = []
    for one in _cut_actions(data[24:]):
        if one[:2] == b"\xff\xff" and one[4:10] == struct.pack("!IH", NICIRA, 36):
            if nat:
                return None
            nat = _decode_nat(one)
        else:
            actions += _decode_action(one, depth + 1)
    known = None if table == _NO_TABLE else table
    return Ct(zone, known, bool(flags & _COMMIT), bool(flags & _FORCE), nat, tuple(actions))


def _decode_nat(data: bytes) -> str:
    """Address translation as ovs-ofctl writes it (`nx_action_nat`)."""
    flags, present = struct.unpack_from("!HH", data, 12)
    if flags & ~0x1F or present & ~0x3F or flags & 3 == 3:
        raise CodecError("address translation that we do not know")
    at, found = 16, []
    for bit, size in enumerate((4, 4, 16, 16, 2, 2)):
        found.append(int.from_bytes(data[at : at + size], "big") if present & 1 << bit else None)
        at += size if present & 1 << bit else 0
    if at > len(data):
        raise CodecError("address translation cut short")
    if not flags & 3:
        return "nat"
    text = _addresses(fields.IPV4_SRC, found[0], found[1]) or _addresses(fields.IPV6_SRC, found[2], found[3])
    if found[4]:
        text = f"[{text}]" if found[2] is not None else text
        text += f":{found[4]}" + (f"-{found[5]}" if found[5] else "")
    words = [("src" if flags & 1 else "dst") + (f"={text}" if text else "")]
    words += [word for bit, word in ((4, "persistent"), (8, "hash"), (16, "random")) if flags & bit]
    return f"nat({','.join(words)})"


def _addresses(of: Field, first: int | None, last: int | None) -> str:
    if not first:
        return ""
    return of.show(first) + (f"-{of.show(last)}" if last else "")


# Instructions are done in this order, however they stand (OpenFlow 1.4.1, 5.9). The meter comes first, then actions.
_ORDER = {6: 0, 4: 1, 5: 2, 3: 3, 2: 4, 1: 5}


@lru_cache(maxsize=1 << 16)
def _decode_instructions(data: bytes) -> tuple[tuple[Action, ...], int | None]:
    actions: list[Action] = []
    goto = None
    for kind, one in sorted(_cut_instructions(data), key=lambda found: _ORDER.get(found[0], 6)):
        if kind == 4:
            actions += _split_actions(one[8:])
        elif kind == 1:
            goto = one[4]
        elif kind == 2 and len(one) >= 24:
            value, mask = (int.from_bytes(one[start : start + 8], "big") for start in (8, 16))
            actions += masked(fields.METADATA, value & mask, mask) or [Aside("write_metadata:0/0")]
        elif kind == 5:
            actions.append(Aside("clear_actions"))
        elif kind == 6:
            actions.append(Aside(f"meter:{int.from_bytes(one[4:8], 'big')}"))
        else:
            actions.append(Raw(one))
    return tuple(actions), goto


def _cut_instructions(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise CodecError("instruction cut short")
        kind, size = struct.unpack_from("!HH", data, at)
        if size < 8 or at + size > len(data):
            raise CodecError(f"instruction of type {kind} and length {size} does not fit")
        yield kind, data[at : at + size]
        at += size


def _split_actions(data: bytes, depth: int = 0) -> Iterator[Action]:
    for one in _cut_actions(data):
        yield from _decode_action(one, depth)


def _cut_actions(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise CodecError("action cut short")
        (size,) = struct.unpack_from("!H", data, at + 2)
        if size < 8 or at + size > len(data):
            raise CodecError(f"action of length {size} does not fit")
        yield data[at : at + size]
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
    actions = settled(actions, match)
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
    actions = settled(actions, match)
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
