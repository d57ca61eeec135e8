"""Small networks of namespaces and veth pairs, and packets sent and caught in them. Sockets are made by this process in
the namespaces, so a question is a few system calls."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from controller.agent.netns import in_namespace
from lab.ovs import Namespace

WAIT_S = 0.25
"""So long a packet that should not come is waited for; one that should, longer."""
_LONG_S = 5.0
_FREEBIND, _TRANSPARENT = 15, 19


def path_of(namespace: Namespace) -> Path:
    """Where the namespace is found; as a string it also stands for a named one."""
    return Path(f"/proc/{namespace.pid}/ns/net")


class Net:
    """Namespaces by name. Use as a context manager."""

    def __init__(self, *names: str) -> None:
        self.spaces = {name: Namespace() for name in names}

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces.values():
            space.close()

    def path(self, name: str) -> str:
        """The namespace as resources take it."""
        return str(path_of(self.spaces[name]))

    def run(self, name: str, *command: str, stdin: str | None = None) -> str:
        """Run a command inside."""
        return self.spaces[name].run(*command, stdin=stdin)

    def ip(self, name: str, *lines: str) -> None:
        """Lines of `ip -batch`."""
        self.run(name, "ip", "-batch", "-", stdin="\n".join(lines))

    def sysctl(self, name: str, **values: object) -> None:
        """Settings below net/, with __ for a slash."""
        for key, value in values.items():
            where = Path("/proc/sys/net") / key.replace("__", "/")
            in_namespace(path_of(self.spaces[name]), lambda where=where, value=value: where.write_text(str(value)))  # type: ignore[misc]

    def wire(self, one: tuple[str, str, Sequence[str]], other: tuple[str, str, Sequence[str]]) -> None:
        """A veth pair: (namespace, interface, addresses) twice."""
        (space, name, addresses), (far_space, far_name, far_addresses) = one, other
        pid = self.spaces[far_space].pid
        self.ip(space, f"link add {name} type veth peer name {far_name} netns {pid}")
        for where, what, several in ((space, name, addresses), (far_space, far_name, far_addresses)):
            nodad = (f"address add {a} dev {what}" + (" nodad" if ":" in a else "") for a in several)
            self.ip(where, f"link set {what} up", *nodad)

    # ------------------------------------------------------------------------------------------------------- packets

    def socket(self, name: str, kind: int, source: tuple[str, int]) -> socket.socket:
        """A bound socket in a namespace. The address need not be there."""

        def make() -> socket.socket:
            family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
            made = socket.socket(family, kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET:
                made.setsockopt(socket.SOL_IP, _TRANSPARENT, 1)
            made.bind(source)
            return made

        return in_namespace(path_of(self.spaces[name]), make)

    def udp(
        self, sender: str, source: str, receiver: str, target: str, port: int, *, at: str = "", sport: int = 0
    ) -> str:
        """Send a datagram and answer it: "" if it does not arrive, "one way" if the answer does not come back, else who
        the receiver and the sender saw, as "source>answerer". `at` is where the receiver listens, if not at `target`."""
        with contextlib.ExitStack() as stack:
            here = stack.enter_context(self.socket(sender, socket.SOCK_DGRAM, (source, sport)))
            there = stack.enter_context(self.socket(receiver, socket.SOCK_DGRAM, (at or target, port)))
            try:
                here.sendto(b"question", (target, port))
            except OSError:
                return ""
            if not _comes(there):
                return ""
            seen = there.recvfrom(64)[1]
            with contextlib.suppress(OSError):
                there.sendto(b"answer", seen)
            if not _comes(here):
                return "one way"
            return f"{seen[0]}>{here.recvfrom(64)[1][0]}"

    @contextlib.contextmanager
    def tcp(self, sender: str, source: str, receiver: str, target: str, port: int) -> Iterator[list[socket.socket]]:
        """A connection, as its two ends; none if it does not come about."""
        with contextlib.ExitStack() as stack:
            there = stack.enter_context(self.socket(receiver, socket.SOCK_STREAM, (target, port)))
            there.listen()
            here = stack.enter_context(self.socket(sender, socket.SOCK_STREAM, (source, 0)))
            here.setblocking(False)
            with contextlib.suppress(OSError):
                here.connect((target, port))
            ends = []
            if _comes(there):
                ends = [here, stack.enter_context(there.accept()[0])]
            yield ends

    def connects(self, sender: str, source: str, receiver: str, target: str, port: int) -> bool:
        """Whether a TCP connection comes about."""
        with self.tcp(sender, source, receiver, target, port) as ends:
            return bool(ends)

    def pings(self, sender: str, target: str) -> bool:
        """Whether an echo is answered."""
        try:
            self.run(sender, "ping", "-n", "-c1", "-W0.3", target)
        except Exception:
            return False
        return True


def _comes(end: socket.socket) -> bool:
    return bool(select.select([end], [], [], WAIT_S)[0])


def maximum_segment(end: socket.socket) -> int:
    """What a TCP connection sends at most in one segment."""
    raw = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 4)
    return int(struct.unpack("i", raw)[0])


def eventually(question: object, timeout_s: float = _LONG_S) -> bool:
    """Whether a question is answered with yes in time."""
    assert callable(question)
    deadline = time.monotonic() + timeout_s
    while not question():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
