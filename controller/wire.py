"""os-ken's OpenFlow 1.4 parser, mended where it is broken or too slow for us.

* A flow monitor reply: os-ken registers one class for four kinds of update and then asserts that it is the first.
* Flow statistics: os-ken builds an object tree per flow; a reconnect to a switch with 10,000 flows would stop the
  controller for a second.

Both become `Entry` values with the bytes of one entry, for `controller.codec` to decode.

* Lengths: os-ken steps through a message by the lengths that stand in it and stands still at 0, so that 16 bytes from
  anybody would stop the controller; it takes messages of other versions than ours; and it prints a traceback for what
  does not parse, and goes on. Messages are looked at here first. What does not fit ends its connection.

Importing this module puts all this in place; nothing else of os-ken changes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from os_ken.ofproto import ofproto_parser
from os_ken.ofproto import ofproto_v1_4 as ofproto
from os_ken.ofproto import ofproto_v1_4_parser as parser

from controller.problems import BulkheadError


class Malformed(BulkheadError):
    """A message that is not what it says it is."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a multipart reply, undecoded. `length` is what os-ken steps by."""

    data: bytes

    @property
    def length(self) -> int:
        """Bytes of the entry."""
        return len(self.data)

    @classmethod
    def parser(cls, buf: bytes, offset: int) -> Entry:
        """Called by os-ken. Raises `ValueError` for a length that does not fit, which would otherwise loop forever."""
        if offset + 8 > len(buf):
            raise ValueError("multipart entry cut short")
        (length,) = struct.unpack_from("!H", buf, offset)
        if length < 8 or offset + length > len(buf):
            raise ValueError(f"multipart entry of length {length} does not fit")
        return cls(bytes(buf[offset : offset + length]))


parser.OFPFlowStatsReply.cls_stats_body_cls = Entry
parser.OFPFlowMonitorReply.cls_stats_body_cls = Entry


_TAKEN = {
    ofproto.OFPT_HELLO,
    ofproto.OFPT_ERROR,
    ofproto.OFPT_ECHO_REQUEST,
    ofproto.OFPT_ECHO_REPLY,
    ofproto.OFPT_FEATURES_REPLY,
    ofproto.OFPT_PACKET_IN,
    ofproto.OFPT_FLOW_REMOVED,
    ofproto.OFPT_PORT_STATUS,
    ofproto.OFPT_MULTIPART_REPLY,
    ofproto.OFPT_BARRIER_REPLY,
    ofproto.OFPT_BUNDLE_CONTROL,
}
"""Messages that a switch has reason to send us; others are passed over unread."""

_HEADER, _MULTIPART, _PORT_STATUS = 8, 16, 16
_PORT, _METER, _BAND, _PROPERTY = 40, 8, 8, 4


def message(datapath: Any, version: int, kind: int, length: int, xid: int, data: bytes) -> Any:
    """In place of os-ken's function of the same arguments. Raises `Malformed`."""
    if int.from_bytes(data[2:4], "big") < _HEADER:
        raise Malformed("a message shorter than its header")
    if kind not in _TAKEN:
        return None
    if version != ofproto.OFP_VERSION and kind != ofproto.OFPT_HELLO:
        raise Malformed(f"a message of OpenFlow version {version:#x}")
    _check(kind, bytes(data))
    try:
        return parser.msg_parser(datapath, version, kind, length, xid, data)
    except Exception as exc:
        raise Malformed(f"a message of type {kind} that does not parse: {type(exc).__name__}: {exc}") from exc


def _check(kind: int, data: bytes) -> None:
    if kind == ofproto.OFPT_HELLO:
        for _ in _steps(data, _HEADER, len(data), _PROPERTY, 2):
            pass
    elif kind == ofproto.OFPT_PORT_STATUS:
        _check_ports(data, _PORT_STATUS)
    elif kind == ofproto.OFPT_MULTIPART_REPLY:
        if len(data) < _MULTIPART:
            raise Malformed("a multipart reply cut short")
        what = int.from_bytes(data[_HEADER : _HEADER + 2], "big")
        if what == ofproto.OFPMP_PORT_DESC:
            _check_ports(data, _MULTIPART)
        elif what == ofproto.OFPMP_METER_CONFIG:
            for start, length in _steps(data, _MULTIPART, len(data), _METER, 0):
                for _ in _steps(data, start + _METER, start + length, _BAND, 2):
                    pass
        elif what not in (ofproto.OFPMP_FLOW, ofproto.OFPMP_FLOW_MONITOR):
            raise Malformed(f"a multipart reply of type {what}, which nobody asked for")


def _check_ports(data: bytes, first: int) -> None:
    for start, length in _steps(data, first, len(data), _PORT, 4):
        for _ in _steps(data, start + _PORT, start + length, _PROPERTY, 2):
            pass


def _steps(data: bytes, start: int, end: int, least: int, at: int) -> Iterator[tuple[int, int]]:
    """(start, length) of entries that hold their length at byte `at` and are `least` bytes long at least."""
    while start < end:
        length = int.from_bytes(data[start + at : start + at + 2], "big") if start + least <= end else 0
        if length < least or start + length > end:
            raise Malformed(f"an entry of length {length} does not fit")
        yield start, length
        start += length


ofproto_parser.msg = message
