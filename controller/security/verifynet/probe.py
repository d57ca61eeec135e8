"""Tries ports of this machine from a network namespace beside it, as a stranger would. Root. Imports seen.

The namespace belongs to a sleeping process that the kernel kills with us, and the pair of devices goes with the namespace:
nothing stays, whenever this is killed. The same file is the program that runs inside; there it uses the standard library only.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 0.7
LIFE_S = 20
TRIES = 2


@contextmanager
def neighbour() -> Iterator[tuple[int, str, str]]:
    """A namespace that is linked to this one: the process it belongs to, and our addresses on the link (IPv4, IPv6; the latter
    empty where devices get no IPv6).

    Raises `OSError` and `subprocess.SubprocessError` where it cannot be made.
    """
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", str(LIFE_S)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await_namespace(holder.pid)
        slot = holder.pid % 60 * 4
        device, ours, theirs = f"bhp{holder.pid}", f"169.254.77.{slot + 1}", f"169.254.77.{slot + 2}"
        ours6, theirs6 = f"fd8b:6b68:{holder.pid & 0xFFFF:x}::1", f"fd8b:6b68:{holder.pid & 0xFFFF:x}::2"
        inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        # The pair is made with one end inside at once: there is no moment when a kill would leave it here.
        _run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        _batch([], f"addr add {ours}/30 dev {device}\nlink set {device} up\n")
        setting = f"link set lo up\naddr add {theirs}/30 dev eth0\nlink set eth0 up\nroute add default via {ours}\n"
        if _has_ipv6(device):
            _batch([], f"addr add {ours6}/126 dev {device} nodad\n")
            setting += f"addr add {theirs6}/126 dev eth0 nodad\nroute add default via {ours6}\n"
        else:
            ours6 = ""
        _batch(inside, setting)
        yield holder.pid, ours, ours6
    finally:
        holder.kill()
        holder.wait()


def _has_ipv6(device: str) -> bool:
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6").read_text().strip() == "0"
    except FileNotFoundError:
        return not Path("/proc/sys/net").is_dir()  # a kernel without; where that is hidden, trying tells


def _await_namespace(pid: int) -> None:
    mine = os.readlink("/proc/self/ns/net")
    end = time.monotonic() + 3
    while time.monotonic() < end:
        if os.readlink(f"/proc/{pid}/ns/net") != mine:
            return
        time.sleep(0.005)
    raise OSError("no network namespace could be made")


def _run(*command: str, text: str | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=3, input=text)


def _batch(prefix: list[str], text: str) -> None:
    _run(*prefix, "ip", "-batch", "-", text=text)


def tried(pid: int, wanted: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int, str]]:
    """What became of each (protocol, address, port), tried from the namespace of a process."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    done = subprocess.run(
        command, input=json.dumps(list(wanted)), capture_output=True, text=True, timeout=10, check=True
    )
    return [(str(p), str(a), int(n), str(o)) for p, a, n, o in json.loads(done.stdout)]


def try_all(wanted: list[tuple[str, str, int]]) -> list[tuple[str, str, int, str]]:
    """Try them all at once. Silence is asked again: a busy machine loses packets."""
    out: dict[tuple[str, str, int], str] = {}
    for _ in range(TRIES):
        for key in _round([key for key in wanted if out.get(key, "closed") == "closed"], out):
            out[key] = "closed"
    return [(*key, out[key]) for key in wanted]


def _round(wanted: list[tuple[str, str, int]], out: dict[tuple[str, str, int], str]) -> list[tuple[str, str, int]]:
    poll, waiting = select.poll(), {}
    for protocol, address, port in wanted:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind | socket.SOCK_NONBLOCK)
        try:
            sock.connect((address, port))
        except BlockingIOError:
            pass
        except OSError as exc:
            out[protocol, address, port] = _word(exc.errno or 0)
            continue
        if protocol == "udp":
            try:
                sock.send(b"\0")
            except OSError as exc:
                out[protocol, address, port] = _word(exc.errno or 0)
                continue
        waiting[sock.fileno()] = (sock, (protocol, address, port))
        poll.register(sock, select.POLLIN | select.POLLERR | (select.POLLOUT if protocol == "tcp" else 0))
    end = time.monotonic() + WAIT_S
    while waiting and (left := end - time.monotonic()) > 0:
        for fd, _event in poll.poll(left * 1000):
            sock, key = waiting.pop(fd)
            poll.unregister(fd)
            failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            out[key] = "open" if not failed else _word(failed)
            sock.close()
    for sock, _key in waiting.values():
        sock.close()
    return [key for _sock, key in waiting.values()]


def _word(errno: int) -> str:
    import errno as numbers

    return "refused" if errno == numbers.ECONNREFUSED else "closed"


if __name__ == "__main__":
    json.dump(try_all([(p, a, n) for p, a, n in json.load(sys.stdin)]), sys.stdout)
