"""Whether anything of nftables has changed in a network namespace: one question to the kernel, and no program.

The kernel numbers the states of a namespace's ruleset; every transaction makes a new one. Imports netns and run.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from controller.agent.netns import in_namespace
from controller.agent.resource import Failed
from controller.agent.run import NETNS_DIR

_NETLINK_NETFILTER, _SO_NETNS_COOKIE, _REQUEST = 12, 71, 1
_NEWGEN, _GETGEN = 10 << 8 | 15, 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_*
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")
_GEN_ID = 1


class Generation(NamedTuple):
    """A state of a namespace's ruleset. `cookie` is the namespace's own: no later one has it."""

    cookie: int
    number: int


def generation(namespace: str | None) -> Generation | None:
    """The present state of a namespace, None where the kernel does not say or the namespace is not there."""
    try:
        return _ask() if namespace is None else in_namespace(NETNS_DIR / namespace, _ask)
    except (OSError, Failed, struct.error):
        return None


def _ask() -> Generation | None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as asked:
        asked.settimeout(1)
        cookie = int.from_bytes(asked.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
        asked.bind((0, 0))
        asked.send(_HEADER.pack(_HEADER.size + 4, _GETGEN, _REQUEST, 1, 0) + bytes(4))
        reply = asked.recv(4096)
    _, kind, *_ = _HEADER.unpack_from(reply)
    at = _HEADER.size + 4  # after the family, version and resource id
    while kind == _NEWGEN and at + _ATTRIBUTE.size <= len(reply):
        length, attribute = _ATTRIBUTE.unpack_from(reply, at)
        if attribute == _GEN_ID:
            return Generation(cookie, int.from_bytes(reply[at + 4 : at + 8], "big"))
        at += max(_ATTRIBUTE.size, length + 3 & ~3)
    return None
