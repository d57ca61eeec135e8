"""The kernel's links, addresses, routes and neighbours, in every network namespace of ours, by rtnetlink.

A namespace's sockets are made once, inside it, and kept: asking costs a fraction of a millisecond, and a second socket
tells when anything has changed there. Runs on pyroute2. Imports netns, resource and run.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from controller.agent.netns import in_namespace
from controller.agent.resource import Failed
from controller.agent.run import NETNS_DIR

GROUP = 0xB07C
"""The group of every link that we make in the host's namespace (`ip link show group 45180`): the mark that it is ours,
set in the very message that makes it."""
MAIN_TABLE = 254
PERMANENT = 0x80
_IFF_UP = 1
_DONE = frozenset((errno.EEXIST, errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL))
"""What the kernel answers when something is as it should be already: made twice, or gone."""
_SIOCETHTOOL = 0x8946
_GTXCSUM, _STXCSUM = 0x16, 0x17
# rtnetlink(7): link, neighbour, IPv4 and IPv6 addresses and routes, rules.
_LINKS, _ADDRESSES, _NEIGHBOURS = (16, 17), (20, 21), (28, 29)  # RTM_NEW…, RTM_DEL…
KEEP_S = 5.0
"""What was told is asked for again after so long, whatever has been heard."""
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface as the kernel has it. `peer` is the index of a veth's other end."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    up: bool
    group: int
    peer: int


@dataclass(frozen=True, slots=True)
class Route:
    """An IPv4 route of the main table. `prefix` is "default" or CIDR; without `via` it is on the link."""

    prefix: str
    via: str | None = None
    dev: str = ""
    mtu: int | None = None

    def __str__(self) -> str:
        words = [self.prefix, *(("via", self.via) if self.via else ()), *(("dev", self.dev) if self.dev else ())]
        return " ".join((*words, *(("mtu", str(self.mtu)) if self.mtu else ())))


class Known:
    """What a namespace's kernel has told when it was asked, as long as nothing of it has changed.

    An answer that is being read while something changes is forgotten with the next `Net.listen`; `changes` tells whether
    another task has listened meanwhile. Then it is not kept at all.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.links: dict[str, Link | None] = {}
        self.addresses: dict[int, set[str]] | None = None
        self.routes: dict[int | None, set[Route]] | None = None
        self.neighbours: dict[int, dict[str, str]] | None = None
        self.every: dict[str, Link] | None = None
        self.since = time.monotonic()

    def forget(self) -> None:
        """Know nothing any more."""
        self.changes += 1
        self.links, self.addresses, self.routes, self.neighbours, self.every = {}, None, None, None, None
        self.since = time.monotonic()

    def hear(self, told: bytes) -> None:
        """Forget what notifications speak of (struct nlmsghdr, then ifinfomsg or another)."""
        self.changes += 1
        at = 0
        while at + 16 <= len(told):
            length, kind = struct.unpack_from("=IH", told, at)
            if kind in _LINKS and at + 24 <= len(told):
                (index,) = struct.unpack_from("=i", told, at + 20)
                self.links = {name: link for name, link in self.links.items() if link and link.index != index}
                self.every = None
            elif kind in _ADDRESSES:
                self.addresses = None
            elif kind in _NEIGHBOURS:
                self.neighbours = None
            if kind not in _NEIGHBOURS:
                self.routes = None  # some go with their interface or address, and nobody says so
            at += max(16, (length + 3) & ~3)


class OneAtATime:
    """An `AsyncIPRoute` that is asked one thing at a time: the kernel refuses a second dump on a socket (EBUSY) while the
    first is being read. Answers are whole lists. A dump that fails is `Failed`; all else raises what it raises."""

    def __init__(self, rtnl: AsyncIPRoute) -> None:
        self._rtnl = rtnl
        self._lock = asyncio.Lock()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def asked(*arguments: Any, **more: Any) -> Any:
            async with self._lock:
                try:
                    found = await getattr(self._rtnl, name)(*arguments, **more)
                    return [message async for message in found] if hasattr(found, "__aiter__") else found
                except NetlinkError as exc:
                    if name.startswith("get_"):
                        raise Failed(
                            f"the kernel does not tell what is there ({name}): {os.strerror(exc.code)}"
                        ) from exc
                    raise

        return asked

    def close(self) -> None:
        """Give its socket back."""
        self._rtnl.close()


@dataclass(slots=True)
class Net:
    """One network namespace."""

    name: str | None
    rtnl: OneAtATime
    watching: socket.socket
    control: socket.socket
    changed: Callable[[str | None], None]
    inode: int = 0
    known: Known = field(default_factory=Known)
    loop: asyncio.AbstractEventLoop | None = field(default=None, repr=False)

    async def links(self) -> dict[str, Link]:
        """Every interface by name."""
        self.listen()
        if self.known.every is not None:
            return self.known.every
        before = self.known.changes
        links = [_link(message) for message in await self.rtnl.get_links()]
        found = {link.name: link for link in links}
        if self.known.changes == before:
            self.known.every = found
        return found

    async def link(self, name: str) -> Link | None:
        """The interface of that name."""
        self.listen()
        if name in self.known.links:
            return self.known.links[name]
        before = self.known.changes
        try:
            answer = await self.rtnl.link("get", ifname=name)
        except NetlinkError as exc:
            if exc.code != errno.ENODEV:
                raise Failed(f"the kernel does not tell about {name}: {os.strerror(exc.code)}") from exc
            answer = ()
        found = next((_link(message) for message in answer), None)
        if self.known.changes == before:
            self.known.links[name] = found
        return found

    async def addresses(self, index: int) -> set[str]:
        """IPv4 addresses of an interface, with prefix length."""
        self.listen()
        if self.known.addresses is not None:
            return self.known.addresses.get(index, set())
        before, found = self.known.changes, dict[int, set[str]]()
        for message in await self.rtnl.get_addr(family=socket.AF_INET):
            text = f"{message.get('address')}/{message['prefixlen']}"
            found.setdefault(message["index"], set()).add(text)
        if self.known.changes == before:
            self.known.addresses = found
        return found.get(index, set())

    async def routes(self, index: int) -> set[Route]:
        """IPv4 routes of the main table out of an interface, but those that the kernel made for addresses."""
        kernel = 2  # RTPROT_KERNEL
        self.listen()
        if self.known.routes is not None:
            return self.known.routes.get(index, set())
        before, found = self.known.changes, dict[int | None, set[Route]]()
        for message in await self.rtnl.get_routes(family=socket.AF_INET, table=MAIN_TABLE):
            if message["proto"] != kernel:
                found.setdefault(message.get("oif"), set()).add(_route(message))
        if self.known.changes == before:
            self.known.routes = found
        return found.get(index, set())

    async def neighbours(self, index: int) -> dict[str, str]:
        """Permanent IPv4 neighbours of an interface: address to MAC."""
        self.listen()
        if self.known.neighbours is not None:
            return self.known.neighbours.get(index, {})
        before, found = self.known.changes, dict[int, dict[str, str]]()
        for message in await self.rtnl.get_neighbours(family=socket.AF_INET):
            if message["state"] & PERMANENT:
                found.setdefault(message["ifindex"], {})[message.get("dst")] = message.get("lladdr")
        if self.known.changes == before:
            self.known.neighbours = found
        return found.get(index, {})

    def listen(self) -> None:
        """Forget what has changed. The kernel tells of a change before the call that made it has returned."""
        heard = False
        if time.monotonic() - self.known.since > KEEP_S:
            self.known.forget()
        while True:
            try:
                told = self.watching.recv(1 << 18)
            except BlockingIOError:
                break
            except OSError:  # too much at once: something was lost
                self.known.forget()
            else:
                self.known.hear(told)
            heard = True
        if heard:
            self.changed(self.name)

    def sums_itself(self, name: str) -> bool:
        """Whether an interface computes checksums in software (transmit offload is off)."""
        return self._ethtool(name, _GTXCSUM, 0) == 0

    def sum_yourself(self, name: str) -> None:
        """Turn transmit checksum offload off: the userspace datapath takes frames as they are."""
        self._ethtool(name, _STXCSUM, 0)

    def _ethtool(self, name: str, command: int, value: int) -> int:
        # struct ethtool_value behind struct ifreq (ethtool ioctl of linux/ethtool.h).
        data = array.array("B", struct.pack("II", command, value))
        address, _ = data.buffer_info()
        try:
            fcntl.ioctl(self.control, _SIOCETHTOOL, struct.pack("16sP", name.encode(), address))
        except OSError as exc:
            raise Failed(f"the offloads of {name} cannot be read or set: {exc.strerror}") from exc
        return int(struct.unpack("II", data.tobytes())[1])

    def close(self) -> None:
        """Give its sockets back."""
        if self.loop is not None:
            self.loop.remove_reader(self.watching)
        with contextlib.suppress(Exception):
            self.rtnl.close()
        self.watching.close()
        self.control.close()


class Nets:
    """The namespaces that were asked for, by name; None is the host's. `changed` is told in which one something did."""

    def __init__(self, changed: Callable[[str | None], None] = lambda _name: None) -> None:
        self._changed = changed
        self._open: dict[str | None, Net] = {}

    @staticmethod
    def exists(name: str | None) -> bool:
        """Whether the namespace is there; a name whose namespace was never mounted on it is not."""
        return name is None or inode(name) != 0

    async def get(self, name: str | None) -> Net:
        """The namespace. Raises `Failed` if it is not there."""
        now = inode(name) if name is not None else 0
        if name is not None and now == 0:
            self.forget(name)
            raise Failed(f"there is no network namespace {name}")
        net = self._open.get(name)
        if net is not None and net.inode == now:
            return net
        self.forget(name)
        net = await self._make(name, now)
        self._open[name] = net
        return net

    def now(self, name: str | None) -> Net | None:
        """The namespace, if it has been asked for already."""
        return self._open.get(name)

    async def _make(self, name: str | None, number: int) -> Net:
        def make() -> tuple[socket.socket, socket.socket, socket.socket]:
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
            asking = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
            watching = socket.socket(socket.AF_NETLINK, kind | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
            asking.bind((0, 0))
            watching.bind((0, _GROUPS))
            return asking, watching, socket.socket(socket.AF_INET, kind)

        asking, watching, control = make() if name is None else in_namespace(NETNS_DIR / name, make)
        rtnl = AsyncIPRoute(use_socket=asking)
        await rtnl.setup_endpoint()
        loop = asyncio.get_running_loop()
        net = Net(name, OneAtATime(rtnl), watching, control, self._changed, number, loop=loop)
        loop.add_reader(watching, net.listen)
        return net

    def forget(self, name: str | None) -> None:
        """Close what is open of a namespace."""
        net = self._open.pop(name, None)
        if net is not None:
            net.close()

    def close(self) -> None:
        """Close everything."""
        for name in list(self._open):
            self.forget(name)


def inode(name: str) -> int:
    """The number of a named namespace, 0 where there is none: the file may be left over without one mounted on it."""
    try:
        found = os.stat(NETNS_DIR / name)
        return found.st_ino if found.st_dev == os.stat("/proc/self/ns/net").st_dev else 0
    except OSError:
        return 0


def _link(message: Any) -> Link:
    info = message.get("linkinfo")
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=str(info.get("kind")) if info is not None else "",
        mac=message.get("address") or "",
        mtu=message.get("mtu") or 0,
        up=bool(message["flags"] & _IFF_UP),
        group=message.get("group") or 0,
        peer=message.get("link") or 0,
    )


def _route(message: Any) -> Route:
    target = message.get("dst")
    metrics = message.get("metrics")
    return Route(
        prefix=f"{target}/{message['dst_len']}" if target is not None else "default",
        via=message.get("gateway"),
        mtu=metrics.get("mtu") if metrics is not None else None,
    )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """The kernel's refusals as `Failed`; what is done or gone already is neither."""
    try:
        yield
    except NetlinkError as exc:
        if exc.code not in _DONE:
            raise Failed(f"{what}: {os.strerror(exc.code)}") from exc
