"""The WireGuard network between servers, kept up: its interface, its routes, and the way from one key to the next.

A key is replaced without losing a packet, because an allowed address belongs to one peer *of an interface*: a second
interface (`WG_SPARE`, the next port) has the next keys, both ends take packets from either, and each end sends by the
spare one as soon as a handshake there has shown that the other end has it. Once nothing comes by the first any more its
keys are replaced, all go back the same way, and the spare one goes.

Both ends send first, so that each one's firewall takes the spare port's packets for answers: no port is opened for it.
What is to be done follows from the key files and from what the kernel has; whoever is killed goes on where he was.
Imports files, links, netlink, process, resource, run, sysctls, wireguard, hostmodel and the security guide's keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from controller.agent.links import Interface
from controller.agent.netlink import Nets, explained
from controller.agent.process import Programs
from controller.agent.resource import Failed, Resource, Waiting
from controller.agent.run import call
from controller.agent.sysctls import Sysctls
from controller.agent.wireguard import Shown, WgConfig, WgPeer, WireGuard, read_dump
from controller.events import Kind
from controller.hostmodel import MTU_DEFAULT, WG_INTERFACE, WG_INTERFACES, WG_PORT, WG_SPARE, Endpoint, Profile
from controller.model import Prefix
from controller.problems import BulkheadError
from controller.security.wg import KEEPALIVE_S, Own, Public, Wg
from controller.wgkeys import clamped

LOG = logging.getLogger("bulkhead.wg")
GROUP = 0xB07D
"""The group of the interfaces, so that the agent of the same host does not take them for its own."""
TICK_S, BUSY_S = 1.0, 0.2
FRESH_S = 180.0
"""With a handshake as young as that there are keys to send with; keepalives see to it that there always is one."""
QUIET_S = 3.0
"""A way by which nothing has come for so long is not used any more."""
_EMPTY = (0, 32)
"""Bytes of no packet, and of a keepalive; the smallest packet with something in it has 64."""


@dataclass(slots=True)
class _Way:
    """What has come from a peer by an interface, and since when nothing has."""

    received: int
    since: float


@dataclass(frozen=True, slots=True)
class Links:
    """What is wanted of the two interfaces. `seen` are the endpoints that peers send from, by name."""

    own: Own
    peers: tuple[Public, ...]
    seen: Mapping[str, Endpoint]

    @property
    def rotating(self) -> bool:
        """Whether a key is being replaced."""
        return self.own.next_key is not None or any(peer.next_key for peer in self.peers)

    def config(self, interface: str) -> WgConfig:
        """What one of the interfaces has to be."""
        spare = interface == WG_SPARE
        key = self.own.next_key if spare and self.own.next_key is not None else self.own.key
        return WgConfig(
            private_key=clamped(key),
            addresses=((self.own.address, 32),),
            listen_port=WG_PORT + spare,
            mtu=MTU_DEFAULT,
            peers=tuple(
                WgPeer(
                    peer.newest_key if spare else peer.public_key,
                    (Prefix(peer.address, 32),),
                    self._endpoint(peer, spare),
                    KEEPALIVE_S,
                )
                for peer in self.peers
            ),
        )

    def _endpoint(self, peer: Public, spare: bool) -> Endpoint | None:
        # A peer that only dials is found where it was last, also by an interface that is new. Beside its port is the
        # spare one's, unless ports are translated on the way.
        endpoint = peer.endpoint or self.seen.get(peer.name)
        return replace(endpoint, port=endpoint.port + spare) if endpoint is not None else None

    def key(self, peer: Public, interface: str) -> str:
        """A peer's public key at an interface."""
        return peer.newest_key if interface == WG_SPARE else peer.public_key

    def moves(self, peer: Public) -> bool:
        """Whether what is between this machine and a peer has to move to the spare interface."""
        return self.own.next_key is not None or peer.next_key is not None


class ServerLinks:
    """Use `run`. `told` hears of keys that were replaced and of trouble. Peers whose address is `sealed`, by one of
    these networks, are left out: they are cut off."""

    def __init__(
        self,
        profile: Profile,
        wg: Wg,
        run_dir: Path,
        told: Callable[[Kind, str], None] = lambda _kind, _text: None,
        sealed: Callable[[], Collection[IPv4Network]] = tuple,
    ) -> None:
        self._profile, self._wg, self._run_dir = profile, wg, run_dir
        self._told, self._sealed = told, sealed
        self._nets = Nets()
        self._programs = Programs(run_dir / "programs")
        self._links: Links | None = None
        self._tunnels = {name: self._tunnel(name) for name in WG_INTERFACES}
        self._ways: dict[tuple[str, str], _Way] = {}
        self._by: dict[str, str] = {}
        self._seen: dict[str, Endpoint] = {}
        self._trouble = ""
        self._clear = False
        self._spare_up = True  # until it was looked at
        self.stop = asyncio.Event()

    def _tunnel(self, name: str) -> WireGuard:
        def config() -> WgConfig:
            assert self._links is not None
            return self._links.config(name)

        return WireGuard(self._nets, self._programs, name, config, None, group=GROUP)

    async def run(self) -> None:
        """Until `stop` is set. What it has built stays. Raises `Failed` if another one runs."""
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failed("another `bulkhead wg run` is at work on this machine; end it first") from None
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop.set)
            while not self.stop.is_set():
                busy = await self._guarded()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stop.wait(), BUSY_S if busy else TICK_S)
        finally:
            self._nets.close()
            os.close(lock)

    async def _guarded(self) -> bool:
        try:
            busy = await self.once()
            if self._trouble:
                self._say("the WireGuard network is as wanted again")
            self._trouble = ""
            return busy
        except (BulkheadError, OSError) as exc:
            if str(exc) != self._trouble:
                self._trouble = str(exc)
                self._say(self._trouble, Kind.HOST_ERROR)
            return False

    def _say(self, text: str, kind: Kind | None = None) -> None:
        LOG.info("%s", text)
        if kind is not None:
            self._told(kind, text)

    async def once(self) -> bool:
        """One look, and what has to be done; whether a key is being replaced. Raises `BulkheadError`."""
        cut = self._sealed()
        peers = tuple(
            peer
            for peer in self._wg.peers(self._profile)
            if not any(IPv4Address(str(peer.address)) in network for network in cut)
        )
        links = self._links = Links(self._wg.own(), peers, self._seen)
        if links.own.address != self._profile.address:
            raise Failed(
                f"the key was made for {links.own.address}, and the state file has {self._profile.address}; run: "
                "bulkhead wg init FILE"
            )
        if not self._clear:
            await refuse_overlap(self._profile)
            self._clear = True
        trouble = await self._make(WG_INTERFACE)
        shown = {WG_INTERFACE: await self._shown(WG_INTERFACE)}
        self._notice(links, shown[WG_INTERFACE])
        spare = links.rotating or self._spare_up
        if spare and (links.rotating or await self._there(WG_SPARE)):
            trouble = await self._make(WG_SPARE) or trouble
            self._spare_up = True
        else:
            self._spare_up = False
        if self._spare_up:
            shown[WG_SPARE] = await self._shown(WG_SPARE)
        self._look(links, shown)
        for peer in links.peers:
            await self._send(peer, self._choose(links, peer, shown))
        await self._forget_others(links)
        if self._spare_up:
            await self._go_on(links, shown)
        if trouble is not None:
            raise trouble
        return self._spare_up

    def _notice(self, links: Links, shown: Shown) -> None:
        for peer in links.peers:
            found = shown.peers.get(peer.public_key)
            host, _, port = found.endpoint.rpartition(":") if found is not None and found.is_recent else ("", "", "")
            if host[:1].isdigit() and port.isdecimal() and int(port) < 65535:  # IPv4
                self._seen[peer.name] = Endpoint(host, int(port))

    # -------------------------------------------------------------------------------------------------- interfaces

    async def _make(self, name: str) -> BulkheadError | None:
        """Bring an interface to what is wanted; a peer's name that does not resolve keeps the others from nothing."""
        assert self._links is not None
        trouble: BulkheadError | None = None
        address = f"{self._links.own.address}/32"
        # A packet may come by the one and be answered by the other; IPv6 is nobody's here.
        settings = {f"net/ipv4/conf/{name}/rp_filter": "2", f"net/ipv6/conf/{name}/disable_ipv6": "1"}
        resources: tuple[Resource, ...] = (
            self._tunnels[name],
            Sysctls(settings, name=name),
            Interface(self._nets, None, name, addresses=(address,)),
        )
        for resource in resources:
            try:
                for _ in range(3):
                    changes = await resource.diff()
                    for change in changes:
                        await change.do()
                    if not changes:
                        break
            except (Failed, Waiting) as exc:
                if resource is not self._tunnels[name] or not await self._there(name):
                    raise
                trouble = exc if isinstance(exc, Failed) else trouble
        return trouble

    async def _there(self, name: str) -> bool:
        return await (await self._nets.get(None)).link(name) is not None

    async def _shown(self, name: str) -> Shown:
        return read_dump(await call("wg", "show", name, "dump", timeout_s=2, secret=True))

    # ------------------------------------------------------------------------------------------------------ routes

    def _look(self, links: Links, shown: dict[str, Shown]) -> None:
        """Notice what has come, and by which interface."""
        now = time.monotonic()
        ways: dict[tuple[str, str], _Way] = {}
        for name, found in shown.items():
            for peer in links.peers:
                key = links.key(peer, name)
                received = found.peers[key].received if key in found.peers else 0
                way = self._ways.get((name, key))
                if way is None or received - way.received not in _EMPTY:
                    way = _Way(received, now)
                else:
                    way.received = received
                ways[name, key] = way
        self._ways = ways

    def _quiet(self, links: Links, peer: Public, name: str) -> bool:
        return time.monotonic() - self._ways[name, links.key(peer, name)].since >= QUIET_S

    @staticmethod
    def _fresh(links: Links, peer: Public, name: str, shown: dict[str, Shown]) -> bool:
        found = shown[name].peers.get(links.key(peer, name)) if name in shown else None
        return found is not None and found.handshake > 0 and time.time() - found.handshake < FRESH_S

    def _choose(self, links: Links, peer: Public, shown: dict[str, Shown]) -> str:
        """By which interface a peer is sent to: where there was a handshake the other end has keys for it."""
        first, spare = (self._fresh(links, peer, name, shown) for name in WG_INTERFACES)
        return WG_SPARE if spare and (links.moves(peer) or not first) else WG_INTERFACE

    async def _send(self, peer: Public, name: str) -> None:
        net = await self._nets.get(None)
        link = await net.link(name)
        if link is None:
            raise Failed(f"there is no interface {name}")
        prefix = f"{peer.address}/32"
        if not any(route.prefix == prefix for route in await net.routes(link.index)):
            assert self._links is not None
            with explained(f"the route to {peer.name} cannot be set"):
                # In the place of another's, in one step: there is no moment without a way.
                await net.rtnl.route(
                    "replace",
                    family=socket.AF_INET,
                    dst=prefix,
                    oif=link.index,
                    scope=253,
                    prefsrc=str(self._links.own.address),
                )
        before = self._by.get(peer.name)
        if before != name:
            self._by[peer.name] = name
            way = self._ways[name, self._links.key(peer, name)] if self._links is not None else None
            if way is not None:
                way.since = time.monotonic()
            if before is not None:
                self._say(f"{peer.name} is sent to by {name}")

    async def _forget_others(self, links: Links) -> None:
        """Take away the routes to whoever is no peer any more."""
        net = await self._nets.get(None)
        wanted = {f"{peer.address}/32" for peer in links.peers}
        for name in WG_INTERFACES:
            link = await net.link(name)
            for route in await net.routes(link.index) if link is not None else ():
                if route.prefix not in wanted and link is not None:
                    with explained(f"the route {route} of {name} cannot be removed"):
                        await net.rtnl.route("del", family=socket.AF_INET, dst=route.prefix, oif=link.index, scope=253)

    # -------------------------------------------------------------------------------------------- from key to key

    async def _go_on(self, links: Links, shown: dict[str, Shown]) -> None:
        """Replace the keys of the first interface by which nothing comes, and end with the spare one."""
        moved = {
            peer.name: self._by.get(peer.name) == WG_SPARE and self._quiet(links, peer, WG_INTERFACE)
            for peer in links.peers
        }
        for peer in links.peers:
            if peer.next_key is not None and moved[peer.name]:
                self._wg.promote_peer(peer.name, peer.next_key)
                self._say(f"{peer.name} has its new key", Kind.KEY_ROTATED)
        if links.own.next_key is not None:
            if all(moved.values()) and self._wg.promote():
                self._say("this machine has its new key", Kind.KEY_ROTATED)
        elif not links.rotating and all(
            self._by.get(peer.name) == WG_INTERFACE and self._quiet(links, peer, WG_SPARE) for peer in links.peers
        ):
            await self._tunnels[WG_SPARE].remove()
            self._spare_up = False
            self._say("the old keys are gone, and the spare interface with them")


async def tear_down(run_dir: Path) -> None:
    """Take both interfaces away."""
    nets, programs = Nets(), Programs(run_dir / "programs")
    try:
        for name in WG_INTERFACES:

            def config() -> WgConfig:
                raise AssertionError("an interface that goes needs no configuration")

            await WireGuard(nets, programs, name, config, None, group=GROUP).remove()
    finally:
        nets.close()


async def refuse_overlap(profile: Profile) -> None:
    """Raises `Failed` where an address or a route of this host is of the WireGuard network: packets would go astray."""
    own = IPv4Network(str(profile.network))
    for what, text, device in await _networks():
        other = IPv4Interface(text).network
        if device not in WG_INTERFACES and other.prefixlen > 0 and other.overlaps(own):
            raise Failed(
                f"security.network is {own}, and {device} has the {what} {text}; write another network there, the same "
                "on all servers, such as 10.77.0.0/24"
            )


async def _networks() -> list[tuple[str, str, str]]:
    out = []
    for found in json.loads(await call("ip", "-json", "-4", "address", "show") or "[]"):
        for one in found.get("addr_info", ()):
            out.append(("address", f"{one['local']}/{one['prefixlen']}", str(found.get("ifname"))))
    for route in json.loads(await call("ip", "-json", "-4", "route", "show") or "[]"):
        if route.get("dst") not in (None, "default"):
            out.append(("route", str(route["dst"]), str(route.get("dev", "a route"))))
    return out
