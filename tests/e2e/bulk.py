"""Sends much, and long. Runs inside a host of the lab, on any Python 3; standard library only.

    bulk.py serve PORT                          answers `tcp` and `udp` until stdin ends
    bulk.py run < asked.json                    does what is asked, one after the other; prints one outcome for each

Asked is {"way": "push|pull|udp", "to": ADDRESS, "port": N, "bytes": N, "from": ADDRESS, "df": BOOL}. Outcomes of push and
pull are {"ok": BOOL, "s": SECONDS, "why": TEXT}; of udp "reply", "too long" (the kernel knows, by itself or as it was
told) or "silence".
"""

from __future__ import annotations

import errno
import hashlib
import json
import select
import socket
import sys
import threading
import time
from typing import Any

IP_MTU_DISCOVER, DO, DONT = 10, 2, 0
LIMIT_S = 15.0
UDP_LIMIT_S, AGAIN_S = 2.4, 0.4
BLOCK = bytes(range(256)) * 256


def serve(port: int) -> None:
    """Until stdin ends."""
    tcp = socket.create_server(("0.0.0.0", port))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, DONT)
    udp.bind(("0.0.0.0", port))
    print("ready", flush=True)
    while True:
        ready = select.select([tcp, udp, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            return
        if udp in ready:
            data, sender = udp.recvfrom(65535)
            udp.sendto(data, sender)
        if tcp in ready:
            connection, _ = tcp.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    """One transfer: what is pushed is answered by its digest, what is pulled is sent."""
    with connection:
        connection.settimeout(LIMIT_S)
        way, _, count = connection.makefile("rb").readline().decode().partition(" ")
        if way == "pull":
            connection.sendall(data_of(int(count)))
        else:
            connection.sendall(b"go")
            connection.sendall(hashlib.sha256(read(connection, int(count))).digest())


def data_of(count: int) -> bytes:
    """So many bytes."""
    return (BLOCK * (count // len(BLOCK) + 1))[:count]


def read(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if no more come."""
    parts, left = [], count
    while left and (part := sock.recv(min(left, 1 << 16))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def transfer(asked: dict[str, Any]) -> dict[str, Any]:
    """Push or pull, and compare."""
    began = time.monotonic()
    source = (asked["from"], 0) if asked.get("from") else None
    count, why = int(asked["bytes"]), ""
    try:
        with socket.create_connection((asked["to"], asked["port"]), LIMIT_S, source) as sock:
            sock.sendall(f"{asked['way']} {count}\n".encode())
            if asked["way"] == "pull":
                good = read(sock, count) == data_of(count)
            else:
                read(sock, 2)
                sock.sendall(data_of(count))
                good = read(sock, 32) == hashlib.sha256(data_of(count)).digest()
    except OSError as exc:
        good, why = False, repr(exc)
    return {"ok": good, "s": round(time.monotonic() - began, 3), "why": why}


def datagram(asked: dict[str, Any]) -> str:
    """One that has to come back whole."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, DO if asked["df"] else DONT)
        if asked.get("from"):
            sock.bind((asked["from"], 0))
        sock.connect((asked["to"], asked["port"]))
        data = data_of(int(asked["bytes"]))
        deadline = time.monotonic() + UDP_LIMIT_S
        while time.monotonic() < deadline:
            try:
                sock.send(data)
                if select.select([sock], [], [], AGAIN_S)[0] and sock.recv(65535) == data:
                    return "reply"
            except OSError as exc:
                if exc.errno == errno.EMSGSIZE:
                    return "too long"
                return repr(exc)
    return "silence"


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        json.dump([datagram(one) if one["way"] == "udp" else transfer(one) for one in json.load(sys.stdin)], sys.stdout)
