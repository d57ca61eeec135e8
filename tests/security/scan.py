"""Knocks at every port: SYNs by a raw socket from inside a namespace, and what came back. A refusal comes from behind the
firewall, so it counts as reached, whether anybody listens or not."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterable

from controller.agent.netns import in_namespace
from lab.ovs import Namespace
from tests.e2e.nets import path_of

EVERY_PORT = range(1, 65536)
_SYN, _ACK = 0x02, 0x10
_RCVBUFFORCE, _IPV6_CHECKSUM = 33, 7
_BATCH = 256


def reached_tcp(space: Namespace, source: str, target: str, ports: Iterable[int], patience_s: float = 0.5) -> set[int]:
    """The TCP ports of `target` from which anything comes back to `source`."""
    six = ":" in target

    def knock() -> set[int]:
        family = socket.AF_INET6 if six else socket.AF_INET
        with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            raw.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 26)
            raw.bind((source, 0))
            if six:
                raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, 16)
            own = 20000 + os.getpid() % 20000
            found: set[int] = set()
            for number, port in enumerate(ports):
                raw.sendto(_syn(source, target, own, port, six), (target, 0))
                if number % _BATCH == 0:
                    _collect(raw, own, six, found, 0)
            until = time.monotonic() + patience_s
            while (left := until - time.monotonic()) > 0:
                _collect(raw, own, six, found, left)
        return found

    return in_namespace(path_of(space), knock)


def _collect(raw: socket.socket, own: int, six: bool, found: set[int], patience_s: float) -> None:
    while select.select([raw], [], [], patience_s)[0]:
        packet = raw.recv(256)
        at = 0 if six else (packet[0] & 15) * 4
        source, destination = struct.unpack_from("!HH", packet, at)
        # On loopback our own SYNs are seen as well; they have no ACK.
        if destination == own and packet[at + 13] & _ACK:
            found.add(source)


def _syn(source: str, target: str, own: int, port: int, six: bool) -> bytes:
    head = struct.pack("!HHIIBBHHH", own, port, port, 0, 5 << 4, _SYN, 1024, 0, 0)
    if six:
        return head
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!HH", 6, 20)
    total = sum(struct.unpack("!16H", pseudo + head))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:]


class Listeners:
    """Sockets that listen on many ports of a namespace, in both families."""

    def __init__(self, space: Namespace, tcp: Iterable[int], udp: Iterable[int]) -> None:
        def listen() -> tuple[list[socket.socket], dict[int, socket.socket]]:
            made: list[socket.socket] = []
            heard: dict[int, socket.socket] = {}
            for port in tcp:
                one = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
                one.bind(("::", port))
                one.listen(16)
                made.append(one)
            for port in udp:
                heard[port] = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
                heard[port].bind(("::", port))
                heard[port].setblocking(False)
            return made, heard

        self.tcp, self.udp = in_namespace(path_of(space), listen)

    def heard(self) -> set[int]:
        """The UDP ports at which something has come since the last question."""
        out = set()
        for port, one in self.udp.items():
            try:
                while one.recv(64):
                    out.add(port)
            except BlockingIOError:
                pass
        return out

    def close(self) -> None:
        """Close them."""
        for one in (*self.tcp, *self.udp.values()):
            one.close()


def send_udp(space: Namespace, target: str, ports: Iterable[int]) -> None:
    """A datagram to each port."""

    def send() -> None:
        with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as one:
            for port in ports:
                one.sendto(b"x", (target, port))

    in_namespace(path_of(space), send)
