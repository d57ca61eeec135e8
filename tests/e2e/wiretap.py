"""Watches interfaces and presses against walls. Runs inside a host of the lab, on any Python 3; standard library only.

    wiretap.py watch eth0|any        prints each kind of packet once, as JSON; when stdin ends, how many there were
    wiretap.py press PLACE...        sends all kinds of packets to the world, again and again, until stdin ends

A kind is [way, interface, protocol, source, source port, target, target port, kind of the quoted packet or None]; ports
that are chosen at random are 0, and the type stands for ports of ICMP. A place is NAMESPACE[@ADDRESS]: a name in
/run/netns, entered whenever it is there, or - for where this is; packets come from ADDRESS. With a / at the end of the
name only frames are sent, out of eth0: what a leg says by itself goes into its tunnel, and may. `press` answers every line on
stdin with how many packets of which kind were sent from each place so far.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ETH_P_ALL, ETH_P_IP, ETH_P_IPV6, ETH_P_ARP = 0x0003, 0x0800, 0x86DD, 0x0806
SOL_PACKET, PACKET_STATISTICS, PACKET_OUTGOING = 263, 6, 4
SO_RCVBUFFORCE = 33
TUNNELS = range(51820, 51823)
RANDOM_PORTS = 32768
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6", 2: "igmp"}
ICMP_ERRORS = {3, 4, 5, 11, 12}
ICMP6_ERRORS = {1, 2, 3, 4}

Kind = list[Any]

# -- watching ---------------------------------------------------------------------------------------------------------


def watch(interface: str) -> None:
    """Until stdin ends."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    if interface != "any":
        sock.bind((interface, ETH_P_ALL))
    seen: set[str] = set()
    count = 0
    print('"ready"', flush=True)
    while True:
        ready = select.select([sock, sys.stdin], [], [])[0]
        if sock in ready:
            packet, address = sock.recvfrom(2048)
            count += 1
            way = "out" if address[2] == PACKET_OUTGOING else "in"
            line = json.dumps([way, address[0], *kind_of(address[1], packet)])
            if line not in seen:
                seen.add(line)
                print(line, flush=True)
        elif sys.stdin in ready:
            _, lost = struct.unpack("II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
            print(json.dumps({"packets": count, "lost": lost}), flush=True)
            return


def kind_of(ethertype: int, packet: bytes) -> Kind:
    """[protocol, source, port, target, port, quoted]."""
    try:
        if ethertype == ETH_P_ARP:
            return ["arp", socket.inet_ntoa(packet[14:18]), 0, socket.inet_ntoa(packet[24:28]), 0, None]
        if ethertype == ETH_P_IP:
            source, target = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
            offset = struct.unpack("!H", packet[6:8])[0] & 0x1FFF
            return _inner(packet[9], source, target, b"" if offset else packet[(packet[0] & 0xF) * 4 :])
        if ethertype == ETH_P_IPV6:
            source, target = (socket.inet_ntop(socket.AF_INET6, packet[at : at + 16]) for at in (8, 24))
            number, body = packet[6], packet[40:]
            if number == 0:  # hop-by-hop options, which listeners of multicast send
                number, body = body[0], body[(body[1] + 1) * 8 :]
            return _inner(number, source, target, body)
    except (IndexError, OSError, struct.error):
        pass
    return [f"ethertype {ethertype:#06x}", packet[:20].hex(), 0, "", 0, None]


def _inner(number: int, source: str, target: str, body: bytes) -> Kind:
    protocol = PROTOCOLS.get(number, str(number))
    if protocol in ("tcp", "udp") and len(body) >= 4:
        ports = [port if port < RANDOM_PORTS or port in TUNNELS else 0 for port in struct.unpack("!HH", body[:4])]
        return [protocol, source, ports[0], target, ports[1], None]
    if protocol in ("icmp", "icmp6") and body:
        errors, ethertype = (ICMP_ERRORS, ETH_P_IP) if protocol == "icmp" else (ICMP6_ERRORS, ETH_P_IPV6)
        quoted = kind_of(ethertype, body[8:]) if body[0] in errors else None
        return [protocol, source, body[0], target, body[0], quoted]
    return [
        f"{protocol} fragment" if protocol in PROTOCOLS.values() and not body else protocol,
        source,
        0,
        target,
        0,
        None,
    ]


# -- pressing ---------------------------------------------------------------------------------------------------------

INET, INET6, ENDPOINT = "198.51.100.10", "2001:db8:7::2", "192.0.2.14"
ROUTER6 = "2001:db8:1::1"
RESOLVERS = ("10.0.0.53", "10.1.0.53")
PAUSE_S = 0.2
SYN_S = 1.0
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


class Presser(threading.Thread):
    """Sends from one place. Whatever fails there is not sent, and not counted."""

    def __init__(self, place: str) -> None:
        super().__init__(daemon=True)
        self.name, _, self.source = place.partition("@")
        self.place = self.name.rstrip("/")
        self._ways = ("tcp", "udp", "dns", "icmp", "raw", "ipv6")[4 if self.name.endswith("/") else 0 :]
        self.sent: Counter[str] = Counter()
        self._inside = 0
        self._syns: list[tuple[float, socket.socket]] = []

    def run(self) -> None:
        """For ever."""
        while True:
            if self._enter():
                for name in self._ways:
                    with contextlib.suppress(OSError):
                        getattr(self, name)()
                        self.sent[name] += 1
                time.sleep(PAUSE_S)
            else:
                time.sleep(0.002)
            now = time.monotonic()
            for began, sock in self._syns:
                if now - began > SYN_S:
                    sock.close()
            self._syns = [each for each in self._syns if now - each[0] <= SYN_S]

    def _enter(self) -> bool:
        """Whether it is in its namespace, which may be made anew at any time."""
        if self.place == "-":
            return True
        try:
            descriptor = os.open(f"/run/netns/{self.place}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            inode = os.fstat(descriptor).st_ino
            if inode != self._inside:
                if LIBC.setns(descriptor, CLONE_NEWNET):
                    return False
                self._inside = inode
            return True
        finally:
            os.close(descriptor)

    def _socket(self, kind: int, protocol: int = 0) -> socket.socket:
        sock = socket.socket(socket.AF_INET, kind, protocol)
        sock.setblocking(False)
        if self.source:
            sock.bind((self.source, 0))
        return sock

    def tcp(self) -> None:
        """SYNs to the world."""
        for port in (443, 53):
            sock = self._socket(socket.SOCK_STREAM)
            with contextlib.suppress(BlockingIOError):
                sock.connect((INET, port))
            self._syns.append((time.monotonic(), sock))

    def udp(self) -> None:
        """Datagrams to the world, and to the host that the tunnel leads to."""
        with self._socket(socket.SOCK_DGRAM) as sock:
            sock.sendto(b"leak", (INET, 5353))
            sock.sendto(b"leak", (ENDPOINT, 9))

    def dns(self) -> None:
        """A name that nobody has in a cache, from the world and from both resolvers."""
        name = f"x{time.monotonic_ns()}"
        query = struct.pack("!HHHHHH", 1, 0x0100, 1, 0, 0, 0) + bytes([len(name)]) + name.encode()
        query += b"\x07example\x04test\x00\x00\x01\x00\x01"
        with self._socket(socket.SOCK_DGRAM) as sock:
            for server in (INET, *RESOLVERS):
                with contextlib.suppress(OSError):
                    sock.sendto(query, (server, 53))

    def icmp(self) -> None:
        """An echo request."""
        with self._socket(socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            body = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
            sock.sendto(struct.pack("!BBHHH", 8, 0, checksum(body), os.getpid() & 0xFFFF, 1), (INET, 0))

    def raw(self) -> None:
        """Datagrams to the world in frames that say they are for somebody else than the gateway, and for a neighbour."""
        if self.place == "-":
            return
        source = own_address()
        with frames() as sock:
            own = sock.getsockname()[4]
            for mac in macs():
                for target in (INET, "192.0.2.1"):
                    sock.send(mac + own + struct.pack("!H", ETH_P_IP) + datagram(source, target))
            sock.send(b"\xff" * 6 + own + struct.pack("!H", ETH_P_ARP) + arp(own, source, "192.0.2.1"))

    def ipv6(self) -> None:
        """Who is the router's, and an echo request, whatever the namespace's own settings say."""
        if self.place == "-":  # meshes and the VPN are IPv4 alone
            return
        with frames() as sock:
            own = sock.getsockname()[4]
            for source in ("fe80::1234", "2001:db8:1::2"):
                solicit = (
                    struct.pack("!BBHI", 135, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, ROUTER6) + b"\x01\x01" + own
                )
                sock.send(b"\x33\x33\xff\x00\x00\x01" + own + b"\x86\xdd" + ipv6(source, "ff02::1:ff00:1", solicit))
                for mac in macs():
                    echo = struct.pack("!BBHHH", 128, 0, 0, 1, 1)
                    sock.send(mac + own + b"\x86\xdd" + ipv6(source, INET6, echo))


def frames() -> socket.socket:
    """A socket for whole frames out of eth0."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        sock.bind(("eth0", 0))
    except OSError:
        sock.close()
        raise
    return sock


def macs() -> list[bytes]:
    """Broadcast, and every interface's of the host that there is a way to hear of: what it answered for its gateway."""
    found = [b"\xff" * 6, b"\x02\x00\x00\x00\x00\x01"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/net/arp").read_text().splitlines()[1:]:
            found.append(bytes.fromhex(line.split()[3].replace(":", "")))
    return found


def own_address() -> str:
    """Of eth0, as packets that leave it have it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((INET, 9))
        return str(sock.getsockname()[0])


def datagram(source: str, target: str) -> bytes:
    """An IPv4 packet with a UDP datagram in it."""
    body = struct.pack("!HHHH", 4000, 4000, 12, 0) + b"leak"
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0)
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    return head[:10] + struct.pack("!H", checksum(head + ends)) + ends + body


def arp(mac: bytes, source: str, target: str) -> bytes:
    """Who has `target`?"""
    head = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, 1)
    return head + mac + socket.inet_aton(source) + bytes(6) + socket.inet_aton(target)


def ipv6(source: str, target: str, body: bytes) -> bytes:
    """An IPv6 packet with ICMPv6 in it."""
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    total = checksum(ends + struct.pack("!II", len(body), 58) + body)
    return struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + ends + body[:2] + struct.pack("!H", total) + body[4:]


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def press(places: list[str]) -> None:
    """Until stdin ends."""
    pressers = [Presser(place) for place in places]
    for presser in pressers:
        presser.start()
    print('"ready"', flush=True)
    for _ in sys.stdin:
        found = {f"{presser.name}@{presser.source}".rstrip("@"): dict(presser.sent) for presser in pressers}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(sys.argv[2])
    else:
        press(sys.argv[2:])
