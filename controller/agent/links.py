"""Namespaces, veth pairs, and the addresses, routes and neighbours of an interface. Imports netlink, resource and run."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from controller.agent.netlink import GROUP, PERMANENT, Link, Net, Nets, Route, explained, inode
from controller.agent.resource import Change, Failed, Sign, Step
from controller.agent.run import NETNS_DIR, PREFIX, call


class Namespace:
    """A named network namespace, with its loopback up."""

    period = 1.0

    def __init__(self, nets: Nets, name: str) -> None:
        self._nets = nets
        self.name = name
        self.key = f"namespace/{name}"
        self.needs: tuple[str, ...] = ()
        self.watches: tuple[str | None, ...] = (name,)

    async def diff(self) -> list[Change]:
        if not inode(self.name):
            return [
                Change(Sign.ADD, f"network namespace {self.name}", "missing", self._make),
                Change(Sign.CHANGE, f"loopback of {self.name}", "down", self._loopback),
            ]
        loopback = await (await self._nets.get(self.name)).link("lo")
        if loopback is None or not loopback.up:
            return [Change(Sign.CHANGE, f"loopback of {self.name}", "down", self._loopback)]
        return []

    async def _make(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not inode(self.name):
                (NETNS_DIR / self.name).unlink()  # a name without a namespace: somebody was killed between the two
        if not inode(self.name):
            await call("ip", "netns", "add", self.name)

    async def _loopback(self) -> None:
        net = await self._nets.get(self.name)
        await net.rtnl.link("set", index=1, state="up")


async def remove_namespace(nets: Nets, name: str) -> None:
    """Take a namespace away. What runs in it goes on until it ends; its links go when the last one has ended."""
    nets.forget(name)
    if inode(name):
        await call("ip", "netns", "delete", name)
    else:
        (NETNS_DIR / name).unlink(missing_ok=True)


def our_namespaces() -> list[str]:
    """Every namespace that is ours, by its name."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in NETNS_DIR.iterdir() if path.name.startswith(PREFIX))
    return []


@dataclass(frozen=True, slots=True)
class End:
    """One end of a veth pair. Without `mac` the kernel chooses; without `mtu` it is 1500."""

    name: str
    namespace: str | None = None
    mac: str | None = None
    mtu: int = 1500

    def __str__(self) -> str:
        return self.name if self.namespace is None else f"{self.name} in {self.namespace}"


class Veth:
    """A veth pair. The first end is in the host's namespace, and goes up at once; so does the second if it is there too.

    An end in another namespace is brought up by its `Interface`, once its port is open.
    """

    period = 2.0

    def __init__(self, nets: Nets, near: End, far: End, *, software_sums: bool, needs: tuple[str, ...] = ()) -> None:
        self._nets = nets
        self.near, self.far = near, far
        self._software_sums = software_sums
        self.key = f"veth/{near.name}"
        self.needs = (*needs, *((f"namespace/{far.namespace}",) if far.namespace else ()))
        self.watches = (near.namespace, far.namespace)
        self.host_ends = tuple(end.name for end in (near, far) if end.namespace is None)

    async def diff(self) -> list[Change]:
        near = await self._find(self.near)
        far = await self._find(self.far)
        what = f"veth pair {self.near} and {self.far}"
        if near is not None and near.kind != "veth":
            raise Failed(
                f"{self.near} is there already and is {_a(near.kind)}, not a veth; rename it, or the port in the state file"
            )
        joined = near is not None and far is not None and near.peer == far.index and far.peer == near.index
        if near is not None and near.group != GROUP and not (joined and far is not None and far.group == GROUP):
            raise Failed(
                f"{self.near} is there already and is not ours; take it away (ip link delete {self.near.name}), or name "
                "the port otherwise in the state file"
            )
        if not joined:
            steps = []
            for end, link in ((self.near, near), (self.far, far)):
                if link is not None:
                    steps.append(Change(Sign.REMOVE, f"interface {end}", "it leads elsewhere", self._removing(end)))
            why = "missing" if near is None and far is None else "not joined"
            return [*steps, Change(Sign.ADD, what, why, self._make), *self._settings(None, None)]
        return self._settings(near, far)

    def _settings(self, near: Link | None, far: Link | None) -> list[Change]:
        out = []
        for end, link in ((self.near, near), (self.far, far)):
            if link is not None and link.group != GROUP:
                mark = self._setting(end, group=GROUP)
                out.append(Change(Sign.CHANGE, f"interface {end}", "not marked as ours", mark))
            if link is not None and link.mtu != end.mtu:
                why = f"it is {link.mtu}, not {end.mtu}"
                out.append(Change(Sign.CHANGE, f"MTU of {end}", why, self._setting(end, mtu=end.mtu)))
            if link is not None and end.mac is not None and link.mac != end.mac:
                why = f"it is {link.mac}, not {end.mac}"
                out.append(Change(Sign.CHANGE, f"MAC of {end}", why, self._setting(end, address=end.mac)))
            if self._software_sums and (link is None or not self._sums_itself(end)):
                out.append(Change(Sign.CHANGE, f"checksum offload of {end}", "on", self._sum(end)))
            if end.namespace is None and (link is None or not link.up):
                out.append(Change(Sign.CHANGE, f"interface {end}", "down", self._setting(end, state="up")))
        return out

    async def _find(self, end: End) -> Link | None:
        if not self._nets.exists(end.namespace):
            return None
        return await (await self._nets.get(end.namespace)).link(end.name)

    def _sums_itself(self, end: End) -> bool:
        net = self._nets.now(end.namespace)
        return net is None or net.sums_itself(end.name)

    async def _make(self) -> None:
        host = await self._nets.get(self.near.namespace)
        peer: dict[str, object] = {"ifname": self.far.name, "group": GROUP, "mtu": self.far.mtu}
        if self.far.mac is not None:
            peer["address"] = self.far.mac
        if self.far.namespace is not None:
            peer["net_ns_fd"] = str(NETNS_DIR / self.far.namespace)
        own: dict[str, object] = {} if self.near.mac is None else {"address": self.near.mac}
        with explained(f"{self.near} and {self.far} cannot be made"):
            await host.rtnl.link(
                "add", ifname=self.near.name, kind="veth", group=GROUP, mtu=self.near.mtu, peer=peer, **own
            )

    def _setting(self, end: End, **what: object) -> Step:
        async def do() -> None:
            net = await self._nets.get(end.namespace)
            link = await net.link(end.name)
            if link is None:
                raise Failed(f"{end} has gone away")
            with explained(f"{end} cannot be set"):
                await net.rtnl.link("set", index=link.index, **what)

        return do

    def _removing(self, end: End) -> Step:
        async def do() -> None:
            await remove_link(self._nets, end.namespace, end.name)

        return do

    def _sum(self, end: End) -> Step:
        async def do() -> None:
            (await self._nets.get(end.namespace)).sum_yourself(end.name)

        return do


async def remove_link(nets: Nets, namespace: str | None, name: str) -> None:
    """Delete an interface, if it is there."""
    if not nets.exists(namespace):
        return
    net = await nets.get(namespace)
    link = await net.link(name)
    if link is not None:
        with explained(f"{name} cannot be removed"):
            await net.rtnl.link("del", index=link.index)


async def our_links(nets: Nets) -> list[str]:
    """Links of the host's namespace that carry our mark."""
    return [link.name for link in (await (await nets.get(None)).links()).values() if link.group == GROUP]


class Interface:
    """What an interface in a namespace of ours is: up, with addresses, routes and permanent neighbours.

    With `exact` whatever else is on it is taken away; otherwise only what contradicts, and of a namespace's interface
    the other addresses, which nobody would let through. Of the routes to single hosts by way of `to_hosts_by` those with
    an MTU are ours.
    """

    period = 5.0

    def __init__(
        self,
        nets: Nets,
        namespace: str | None,
        name: str,
        *,
        addresses: tuple[str, ...] = (),
        routes: tuple[Route, ...] = (),
        neighbours: tuple[tuple[str, str], ...] = (),
        needs: tuple[str, ...] = (),
        exact: bool = False,
        key: str | None = None,
        to_hosts_by: str | None = None,
    ) -> None:
        self._nets = nets
        self._to_hosts_by = to_hosts_by
        self._namespace, self._name, self._exact = namespace, name, exact
        self._addresses = tuple(_cidr(text) for text in addresses)
        self._routes = routes
        self._neighbours = dict(neighbours)
        self.key = key or f"interface/{namespace or 'host'}/{name}"
        self.needs = needs
        self.watches = (namespace,)

    def __str__(self) -> str:
        return self._name if self._namespace is None else f"{self._name} in {self._namespace}"

    async def diff(self) -> list[Change]:
        link, net = await self._find()
        if link is None or net is None:
            have: set[str] = set()
            routes: set[Route] = set()
            neighbours: dict[str, str] = {}
        else:
            have = await net.addresses(link.index)
            routes = await net.routes(link.index)
            neighbours = await net.neighbours(link.index)
        out = []
        if link is None or not link.up:
            out.append(Change(Sign.CHANGE, f"interface {self}", "down", self._up))
            routes = set()
        out += list(self._address_changes(have))
        out += list(self._neighbour_changes(neighbours))
        out += list(self._route_changes(routes))
        return out

    def _address_changes(self, have: set[str]) -> Iterator[Change]:
        for text in sorted(have - set(self._addresses)):
            if self._exact or self._namespace is not None:
                yield Change(Sign.REMOVE, f"address {text} of {self}", "nobody wants it", self._address("del", text))
        for text in self._addresses:
            if text not in have:
                yield Change(Sign.ADD, f"address {text} of {self}", "missing", self._address("add", text))

    def _neighbour_changes(self, have: dict[str, str]) -> Iterator[Change]:
        for address, mac in self._neighbours.items():
            if have.get(address) != mac:
                found = have.get(address)
                sign, why = (Sign.CHANGE, f"it is at {found}") if found else (Sign.ADD, "missing")
                yield Change(sign, f"neighbour {address} at {mac} of {self}", why, self._neighbour(address, mac))
        for address in sorted(have.keys() - self._neighbours.keys()) if self._exact else ():
            yield Change(
                Sign.REMOVE, f"neighbour {address} of {self}", "nobody wants it", self._neighbour(address, None)
            )

    def _route_changes(self, have: set[Route]) -> Iterator[Change]:
        wanted = set(self._routes)
        targets = {route.prefix for route in wanted}
        for route in sorted(have - wanted, key=str):
            if self._exact or route.prefix in targets or self._is_to_host(route):
                yield Change(Sign.REMOVE, f"route {route} of {self}", "nobody wants it", self._route("del", route))
        for route in self._routes:
            if route not in have:
                yield Change(Sign.ADD, f"route {route} of {self}", "missing", self._route("add", route))

    def _is_to_host(self, route: Route) -> bool:
        by = self._to_hosts_by
        return by is not None and route.via == by and route.mtu is not None and route.prefix.endswith("/32")

    async def _find(self) -> tuple[Link | None, Net | None]:
        if not self._nets.exists(self._namespace):
            return None, None
        net = await self._nets.get(self._namespace)
        return await net.link(self._name), net

    async def _there(self) -> tuple[Link, Net]:
        link, net = await self._find()
        if link is None or net is None:
            raise Failed(f"there is no interface {self}")
        return link, net

    async def _up(self) -> None:
        link, net = await self._there()
        with explained(f"{self} cannot be brought up"):
            await net.rtnl.link("set", index=link.index, state="up")

    def _address(self, verb: str, text: str) -> Step:
        async def do() -> None:
            link, net = await self._there()
            address, _, length = text.partition("/")
            with explained(f"address {text} of {self} cannot be changed"):
                await net.rtnl.addr(verb, index=link.index, address=address, prefixlen=int(length))

        return do

    def _neighbour(self, address: str, mac: str | None) -> Step:
        async def do() -> None:
            link, net = await self._there()
            with explained(f"neighbour {address} of {self} cannot be changed"):
                if mac is None:
                    await net.rtnl.neigh("del", dst=address, ifindex=link.index)
                else:
                    await net.rtnl.neigh("replace", dst=address, lladdr=mac, ifindex=link.index, state=PERMANENT)

        return do

    def _route(self, verb: str, route: Route) -> Step:
        async def do() -> None:
            link, net = await self._there()
            what: dict[str, object] = {"family": socket.AF_INET, "dst": route.prefix, "oif": link.index}
            if route.via is not None:
                what |= {"gateway": route.via, "flags": 4}  # RTNH_F_ONLINK: the next hop needs no address of its own
            else:
                what["scope"] = 253  # on the link
            if route.mtu is not None:
                what["metrics"] = {"mtu": route.mtu}
            with explained(f"route {route} of {self} cannot be changed"):
                await net.rtnl.route("replace" if verb == "add" else "del", **what)

        return do


def _cidr(text: str) -> str:
    return str(ipaddress.IPv4Interface(text))


def _a(kind: str) -> str:
    return f"a {kind}" if kind else "a real interface"
