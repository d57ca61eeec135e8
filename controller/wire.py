"""os-ken's OpenFlow 1.4 parser, mended where it is broken or too slow for us.

* A flow monitor reply: os-ken registers one class for four kinds of update and then asserts that it is the first.
* Flow statistics: os-ken builds an object tree per flow; a reconnect to a switch with 10,000 flows would stop the
  controller for a second.

Both become `Entry` values with the bytes of one entry, for `controller.codec` to decode. Importing this module puts
them in place; nothing else of os-ken changes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from os_ken.ofproto import ofproto_v1_4_parser as parser


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
