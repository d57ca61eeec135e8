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
    inode: int = 0
    loop: asyncio.AbstractEventLoop | None = field(default=None, repr=False)

    async def links(self) -> dict[str, Link]:
        """Every interface by name."""
        found = [_link(message) for message in await self.rtnl.get_links()]
        return {link.name: link for link in found}

    async def addresses(self, index: int) -> set[str]:
        """IPv4 addresses of an interface, with prefix length."""
        return {
            f"{message.get('address')}/{message['prefixlen']}"
            for message in await self.rtnl.get_addr(family=socket.AF_INET)
            if message["index"] == index
        }

    async def routes(self, index: int) -> set[Route]:
        """IPv4 routes of the main table out of an interface, but those that the kernel made for addresses."""
        kernel = 2  # RTPROT_KERNEL
        return {
            _route(message)
            for message in await self.rtnl.get_routes(family=socket.AF_INET, table=MAIN_TABLE)
            if message.get("oif") == index and message["proto"] != kernel
        }

    async def neighbours(self, index: int) -> dict[str, str]:
        """Permanent IPv4 neighbours of an interface: address to MAC."""
        return {
            message.get("dst"): message.get("lladdr")
            for message in await self.rtnl.get_neighbours(family=socket.AF_INET)
            if message["ifindex"] == index and message["state"] & PERMANENT
        }

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
        loop.add_reader(watching, self._drain, watching, name)
        return Net(name, OneAtATime(rtnl), watching, control, number, loop)

    def _drain(self, watching: socket.socket, name: str | None) -> None:
        with contextlib.suppress(OSError):  # empty, or it overflowed: either way something has changed
            while watching.recv(65536):
                pass
        self._changed(name)

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
