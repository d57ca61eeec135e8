"""Traffic for the lab: answers it, and tries it. Runs inside a host of the lab, on any Python 3.

    probe.py serve tcp:9573 udp:51820     answers with the name given by --name; tells on stdout who came, and with
                                          --watch INTERFACE every kind of packet that was seen there. ipv6:eth0 hears
                                          UDP in IPv6 there, whether or not this host would speak it
    probe.py try < tries.json             runs all tries at once; prints one outcome for each
    probe.py left eth0                    until stdin ends, looks at all that leaves by an interface; prints how many
                                          packets of WireGuard, how many of neighbours, and what else

A try is {"proto": "tcp|udp|icmp", "to": ADDRESS, "port": N, "from": ADDRESS, "spoof": ADDRESS, "socks": ADDRESS:PORT,
"http": REQUEST, "timeout_s": S}; a request is {"method": M, "path": P, "body": JSON, "host": NAME, "token": TOKEN,
"fingerprint": SHA256}, by TLS with the certificate of that fingerprint if it is given. An outcome is {"outcome":
"reply|refused|silence|no name|error", "data": TEXT, "s": SECONDS}; of a request, the text is [STATUS, BODY] as JSON.
Standard library only.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

TIMEOUT_S = 1.5
AGAIN_S = 0.4
"""A lost datagram is sent again so soon: a flow just learned takes effect only when the datapath's cache is done."""
ECHO_REPLY, UNREACHABLE, ECHO = 0, 3, 8
ETH_P_ALL, ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0003, 0x0800, 0x0806, 0x86DD
PACKET_OUTGOING, TCP_RST = 4, 0x04
SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE = 263, 6, 33
NEIGHBOURS = frozenset({130, 131, 132, 133, 134, 135, 136, 137, 143})
"""ICMPv6 that is about who is on a link: multicast listeners, neighbours, routers."""
WIREGUARD = frozenset(bytes([kind, 0, 0, 0]) for kind in (1, 2, 3, 4))
MANY = 10
REFUSALS = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.ENOPROTOOPT})
"""What the kernel makes of a TCP reset and of ICMP destination unreachable."""
MAX_BYTES = 2048

Try = dict[str, Any]
Outcome = dict[str, Any]


# -- answering --------------------------------------------------------------------------------------------------------


def serve(name: str, endpoints: list[str], interfaces: list[str]) -> None:
    """Answer on every endpoint until stdin ends. One line on stdout per request: proto, port, sender, what it said."""
    sockets: dict[socket.socket, tuple[str, int]] = {}
    watched = [watch(interface) for interface in interfaces]
    seen: set[str] = set()
    for endpoint in endpoints:
        proto, _, port = endpoint.partition(":")
        if proto == "ipv6":
            sockets[watch(port, ETH_P_IPV6)] = (proto, 0)
            continue
        kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
        server = socket.socket(socket.AF_INET, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("0.0.0.0", int(port)))
        if proto == "tcp":
            server.listen(128)
        sockets[server] = (proto, int(port))
    print("ready", flush=True)
    while True:
        ready = select.select([*sockets, *watched, sys.stdin], [], [])[0]
        if sys.stdin in ready:  # nobody can signal us from outside: what they know the process id of is nsenter's
            return
        for server in sockets.keys() & set(ready):
            answer(name, server, *sockets[server])
        for sock in set(watched) & set(ready):
            note(sock, seen)


def answer(name: str, server: socket.socket, proto: str, port: int) -> None:
    """One request."""
    try:
        if proto == "tcp":
            connection, sender = server.accept()
            with connection:
                connection.sendall(name.encode())
            said = b""
        elif proto == "ipv6":
            packet, address = server.recvfrom(MAX_BYTES)
            if address[2] == PACKET_OUTGOING or packet[6] != socket.IPPROTO_UDP:
                return
            sender, said = (socket.inet_ntop(socket.AF_INET6, packet[8:24]),), packet[48:]
            port = struct.unpack("!H", packet[42:44])[0]
        else:
            said, sender = server.recvfrom(MAX_BYTES)
            reply(name, server, sender)
    except OSError:
        return  # the other side has gone already
    print(proto, port, sender[0], said.decode(errors="replace"), flush=True)


def reply(name: str, server: socket.socket, sender: tuple[str, int]) -> None:
    """Answer a datagram."""
    server.sendto(name.encode(), sender)


def watch(interface: str, ethertype: int = ETH_P_IP) -> socket.socket:
    """All packets of one kind of an interface (packet(7)), IPv4 unless told otherwise."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ethertype))
    sock.bind((interface, ethertype))
    return sock


def note(sock: socket.socket, seen: set[str]) -> None:
    """Print what kind of packet came in, once for each kind; what went out and refusals are not of interest."""
    packet, address = sock.recvfrom(MAX_BYTES)
    line = kind_of(packet) if address[2] != PACKET_OUTGOING else None
    if line is not None and line not in seen:
        seen.add(line)
        print("saw", line, flush=True)


def kind_of(packet: bytes) -> str | None:
    """`SENDER PROTO SOURCE_PORT PORT`, with an ICMP type for ports; None for a reset and for ICMP unreachable."""
    sender, inner = socket.inet_ntoa(packet[12:16]), packet[(packet[0] & 0xF) * 4 :]
    if packet[9] == socket.IPPROTO_ICMP:
        return None if inner[0] == UNREACHABLE else f"{sender} icmp {inner[0]} {inner[0]}"
    if packet[9] == socket.IPPROTO_TCP and inner[13] & TCP_RST:
        return None
    proto = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}.get(packet[9])
    ports = struct.unpack("!HH", inner[:4]) if proto else (0, 0)
    return f"{sender} {proto or packet[9]} {ports[0]} {ports[1]}"


# -- what leaves ------------------------------------------------------------------------------------------------------


def left(interface: str) -> None:
    """Look at every packet that leaves until stdin ends, then print one JSON object."""
    counted = {"wireguard": 0, "neighbours": 0, "others": 0}
    kinds: set[str] = set()
    sock = watch(interface, ETH_P_ALL)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    print("ready", flush=True)
    while sys.stdin not in select.select([sock, sys.stdin], [], [])[0] or select.select([sock], [], [], 0)[0]:
        packet, address = sock.recvfrom(MAX_BYTES)
        if address[2] == PACKET_OUTGOING:
            kind = leaving(address[1], packet)
            counted[kind if kind in counted else "others"] += 1
            if kind not in counted and len(kinds) < MANY:
                kinds.add(kind)
    lost = struct.unpack("II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]
    json.dump({**counted, "lost": lost, "kinds": sorted(kinds)}, sys.stdout)


def leaving(ethertype: int, packet: bytes) -> str:
    """`wireguard`, `neighbours`, or what else a packet is. WireGuard is known by its messages' first four bytes."""
    if ethertype == ETH_P_ARP:
        return "neighbours"
    if ethertype == ETH_P_IPV6 and packet[6] == 0:  # multicast listener reports come after a hop-by-hop header
        return "neighbours" if packet[40] == socket.IPPROTO_ICMPV6 and packet[48] in NEIGHBOURS else "ipv6"
    if ethertype == ETH_P_IPV6:
        family, proto, ends, inner = socket.AF_INET6, packet[6], packet[8:40], packet[40:]
    elif ethertype == ETH_P_IP:
        family, proto, ends, inner = socket.AF_INET, packet[9], packet[12:20], packet[(packet[0] & 0xF) * 4 :]
    else:
        return f"ethertype 0x{ethertype:04x}"
    if proto == socket.IPPROTO_ICMPV6 and family == socket.AF_INET6 and inner[0] in NEIGHBOURS:
        return "neighbours"
    if proto == socket.IPPROTO_UDP and inner[8:12] in WIREGUARD and len(inner) >= 40:
        return "wireguard"
    half = len(ends) // 2
    sender, target = socket.inet_ntop(family, ends[:half]), socket.inet_ntop(family, ends[half:])
    return f"{sender} to {target}, protocol {proto}"


# -- trying -----------------------------------------------------------------------------------------------------------


def attempt(what: Try) -> Outcome:
    """Run one try to its end."""
    started = time.monotonic()
    try:
        data = ATTEMPTS[next((way for way in ("spoof", "socks", "http") if way in what), what["proto"])](
            what, float(what.get("timeout_s", TIMEOUT_S))
        )
        outcome = {"outcome": "reply", "data": data}
    except TimeoutError:
        outcome = {"outcome": "silence", "data": ""}
    except socket.gaierror:
        outcome = {"outcome": "no name", "data": ""}
    except OSError as exc:
        refused = exc.errno in REFUSALS and time.monotonic() - started < float(what.get("timeout_s", TIMEOUT_S))
        outcome = {"outcome": "refused" if refused else "error", "data": os.strerror(exc.errno or 0)}
    return {**outcome, "s": round(time.monotonic() - started, 4)}


def opened(what: Try, kind: int, proto: int = 0) -> socket.socket:
    """A socket bound to where the try says it comes from."""
    sock = socket.socket(socket.AF_INET, kind, proto)
    if what.get("from"):
        sock.bind((what["from"], 0))
    return sock


def try_tcp(what: Try, timeout_s: float) -> str:
    """Connect, and read what the server says."""
    with opened(what, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect((what["to"], what["port"]))
        return sock.recv(MAX_BYTES).decode(errors="replace")


def try_socks(what: Try, timeout_s: float) -> str:
    """Connect through a SOCKS5 proxy (RFC 1928), and read what the server says."""
    proxy, _, port = what["socks"].partition(":")
    with opened(what, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect((proxy, int(port)))
        sock.sendall(b"\x05\x01\x00")
        if sock.recv(2) != b"\x05\x00":
            raise OSError(errno.EPROTO, "no SOCKS5 proxy")
        sock.sendall(b"\x05\x01\x00\x01" + socket.inet_aton(what["to"]) + struct.pack("!H", what["port"]))
        reply = sock.recv(10)
        if len(reply) < 2 or reply[1]:
            raise TimeoutError  # the proxy could not connect; what it says of why differs from proxy to proxy
        return sock.recv(MAX_BYTES).decode(errors="replace")


def try_http(what: Try, timeout_s: float) -> str:
    """Ask an HTTP server, and answer the status and what it said. Who it is, is looked at before anything is sent."""
    import hashlib
    import http.client
    import ssl

    asked = what["http"]
    headers = {"Host": asked["host"], "Content-Type": "application/json"}
    if asked.get("token"):
        headers["Authorization"] = f"Bearer {asked['token']}"
    with opened(what, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect((what["to"], what["port"]))
        connection = http.client.HTTPConnection(what["to"], what["port"])
        connection.sock = sock
        if asked.get("fingerprint"):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection.sock = tls = context.wrap_socket(sock)
            if hashlib.sha256(tls.getpeercert(True) or b"").hexdigest() != asked["fingerprint"]:
                raise OSError(errno.EPROTO, "somebody else's certificate")
        try:
            connection.request(asked["method"], asked["path"], json.dumps(asked.get("body")), headers)
            answer = connection.getresponse()
            return json.dumps([answer.status, json.loads(answer.read() or b"null")])
        except (http.client.HTTPException, ValueError) as exc:
            raise OSError(errno.EPROTO, "no answer of HTTP") from exc
        finally:
            connection.close()


def try_udp(what: Try, timeout_s: float) -> str:
    """Send a datagram, again and again, and wait for one back or for an ICMP error."""
    said = what.get("say", "hello").encode()
    with opened(what, socket.SOCK_DGRAM) as sock:
        sock.connect((what["to"], what["port"]))
        for left in every(AGAIN_S, timeout_s):
            sock.send(said)
            if select.select([sock], [], [], left)[0]:
                return sock.recv(MAX_BYTES).decode(errors="replace")
    raise TimeoutError


def try_icmp(what: Try, timeout_s: float) -> str:
    """Send an echo request, again and again, and wait for its reply or for an ICMP error about it."""
    ident = struct.pack("!H", threading.get_native_id() & 0xFFFF)
    with opened(what, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        for left in every(AGAIN_S, timeout_s):
            sock.sendto(echo_request(ident), (what["to"], 0))
            until = time.monotonic() + left
            while (rest := until - time.monotonic()) > 0 and select.select([sock], [], [], rest)[0]:
                packet, sender = sock.recvfrom(MAX_BYTES)
                if is_answer(packet, sender[0], what["to"], ident):
                    return "echo reply"
    raise TimeoutError


def every(step_s: float, total_s: float) -> Iterator[float]:
    """How long to wait each time, until all of it is used up. What is lost once is not lost for good."""
    end = time.monotonic() + total_s
    while (left := end - time.monotonic()) > 0:
        yield min(step_s, left)


def is_answer(packet: bytes, sender: str, target: str, ident: bytes) -> bool:
    """Whether an ICMP packet is the reply to our request. Raises `OSError` if it says that the request was not let
    through; every other one is somebody else's, as raw sockets get them all."""
    body = packet[(packet[0] & 0xF) * 4 :]
    if body[0] == ECHO_REPLY:
        return sender == target and body[4:6] == ident
    inner = body[8:]
    if body[0] == UNREACHABLE and len(inner) >= 28 and inner[9] == socket.IPPROTO_ICMP:
        request = inner[(inner[0] & 0xF) * 4 :]
        if inner[16:20] == socket.inet_aton(target) and request[4:6] == ident:
            raise OSError(errno.EHOSTUNREACH, "not let through")
    return False


def echo_request(ident: bytes) -> bytes:
    """An ICMP echo request (RFC 792)."""
    rest = ident + struct.pack("!H", 1) + b"bulkhead-lab"
    return struct.pack("!BBH", ECHO, 0, checksum(struct.pack("!BBH", ECHO, 0, 0) + rest)) + rest


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2]))
    total += (data[-1] << 8) if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def try_spoof(what: Try, timeout_s: float) -> str:
    """Send a UDP datagram with a forged source. An answer could not come here; ask the receiver what arrived."""
    said = what.get("say", "hello").encode()
    udp = struct.pack("!HHHH", 40000, what["port"], 8 + len(said), 0) + said
    if ":" in what["spoof"]:
        send_ipv6(what["spoof"], what["to"], udp)
        time.sleep(min(timeout_s, 0.3))
        raise TimeoutError
    source, target = socket.inet_aton(what["spoof"]), socket.inet_aton(what["to"])
    # Length, checksum and identification are filled in by the kernel (raw(7)).
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0, source, target)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(ip + udp, (what["to"], 0))
    time.sleep(min(timeout_s, 0.3))
    raise TimeoutError


def send_ipv6(source: str, target: str, udp: bytes, interface: str = "eth0") -> None:
    """Send a datagram in IPv6 to every station of a link, though this host may not speak IPv6."""
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    header = struct.pack("!IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, 64) + ends
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IPV6)) as sock:
        for station in (b"\x33\x33\x00\x00\x00\x01", b"\xff" * 6):
            sock.sendto(header + udp, (interface, ETH_P_IPV6, 0, 0, station))


ATTEMPTS = {"tcp": try_tcp, "udp": try_udp, "icmp": try_icmp, "spoof": try_spoof, "socks": try_socks, "http": try_http}


def run_tries(tries: list[Try]) -> list[Outcome]:
    """All at once, so that many that wait in vain take no longer than one."""
    outcomes: list[Outcome] = [{} for _ in tries]

    def run(index: int) -> None:
        outcomes[index] = attempt(tries[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(tries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve")
    server.add_argument("--name", default="server")
    server.add_argument("--watch", action="append", default=[], metavar="INTERFACE")
    server.add_argument("endpoints", nargs="+")
    commands.add_parser("try")
    commands.add_parser("left").add_argument("interface")
    options = parser.parse_args()
    if options.command == "serve":
        serve(options.name, options.endpoints, options.watch)
    elif options.command == "left":
        left(options.interface)
    else:
        json.dump(run_tries(json.load(sys.stdin)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
