"""WireGuard interfaces: made where their socket belongs, moved to where their packets belong, configured and watched.

The kernel's WireGuard where there is one, else `wireguard-go`. Keys are read from files, handed over through a pipe,
and compared in memory; nothing prints them. Imports keys, links, netlink, process, resource, run and wgquick.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyroute2.netlink.exceptions import NetlinkError

from controller.agent import wgquick
from controller.agent.keys import KeyStore, read_key, read_secret_file
from controller.agent.links import remove_link
from controller.agent.netlink import GROUP, Link, Nets
from controller.agent.process import Program, Programs
from controller.agent.resource import Change, Failed, Sign, Step, Waiting
from controller.agent.run import NETNS_DIR, call, environment
from controller.hostmodel import MTU_DEFAULT, Endpoint, Tunnel
from controller.model import Ipv4, Prefix
from controller.problems import InvalidInput, Problem
from controller.wgkeys import Secret, clamped

LOG = logging.getLogger("bulkhead.agent")
RECENT_S = 180
"""A handshake younger than this proves an endpoint (the protocol rejects keys after that long)."""
APPEAR_S = 5.0
WG_S = 2.0
SILENT = 2
_NO_KEY = "A" * 43 + "="
_SOCKETS = Path("/var/run/wireguard")
_KINDS = ("wireguard", "tun")


@dataclass(frozen=True, slots=True)
class WgPeer:
    """A peer, with its secret."""

    public_key: str
    allowed: tuple[Prefix, ...]
    endpoint: Endpoint | None = None
    keepalive: int = 0
    preshared_key: Secret | None = None


@dataclass(frozen=True, slots=True)
class WgConfig:
    """What an interface has to be."""

    private_key: Secret
    addresses: tuple[tuple[Ipv4, int], ...] = ()
    listen_port: int | None = None
    mtu: int = MTU_DEFAULT
    peers: tuple[WgPeer, ...] = ()
    left_out: tuple[Problem, ...] = field(default=(), compare=False)
    """What of the wg-quick file is not used."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """How a peer is: bytes received and sent, and the age of the last handshake in seconds, None before the first."""

    public_key: str
    endpoint: str
    age_s: float | None
    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class Shown:
    """What `wg show DEVICE dump` tells."""

    private_key: str = field(repr=False)
    listen_port: int
    mark: str
    peers: dict[str, ShownPeer]


@dataclass(frozen=True, slots=True)
class ShownPeer:
    """A peer as `wg show` tells it."""

    preshared_key: str = field(repr=False)
    endpoint: str
    allowed: frozenset[str]
    handshake: int
    received: int
    sent: int
    keepalive: int

    @property
    def is_recent(self) -> bool:
        """Whether a handshake has proved its endpoint lately."""
        return time.time() - self.handshake <= RECENT_S


def resolve(tunnel: Tunnel, keys: KeyStore) -> WgConfig:
    """Everything about a tunnel: what the state file says, over its wg-quick file. Raises `Failed`."""
    quick = wgquick.Quick()
    if tunnel.config is not None:
        try:
            quick = wgquick.parse(read_secret_file(tunnel.config, "the configuration"), str(tunnel.config))
        except InvalidInput as exc:
            raise Failed(str(exc)) from exc
    key = (
        read_key(tunnel.private_key_file, "the private key")
        if tunnel.private_key_file is not None
        else quick.private_key
    )
    own = tuple(
        WgPeer(
            peer.public_key,
            peer.allowed,
            peer.endpoint,
            peer.keepalive,
            read_key(peer.preshared_key_file, "the pre-shared key") if peer.preshared_key_file is not None else None,
        )
        for peer in tunnel.peers
    )
    from_file = tuple(
        WgPeer(peer.public_key, peer.allowed, peer.endpoint, peer.keepalive, peer.preshared_key) for peer in quick.peers
    )
    return WgConfig(
        private_key=clamped(key or keys.private_key(tunnel.interface)),
        addresses=tunnel.addresses or quick.addresses,
        listen_port=tunnel.listen_port or quick.listen_port,
        mtu=tunnel.mtu or quick.mtu or MTU_DEFAULT,
        peers=own or from_file,
        left_out=quick.problems,
    )


class WireGuard:
    """One interface. It is in `namespace`, its UDP socket in `socket_namespace`.

    `fixed` is for a tunnel to the world: its packets go to the declared endpoint and to no other, while elsewhere an
    endpoint that a peer has moved to stays as long as handshakes succeed there.
    """

    period = 1.0

    def __init__(
        self,
        nets: Nets,
        programs: Programs,
        interface: str,
        config: Callable[[], WgConfig],
        namespace: str | None,
        *,
        socket_namespace: str | None = None,
        fixed: bool = False,
        needs: Sequence[str] = (),
        group: int = GROUP,
    ) -> None:
        self._nets, self._programs = nets, programs
        self._interface, self._config = interface, config
        self._namespace, self._socket_namespace = namespace, socket_namespace
        self._fixed = fixed
        self._group = group
        self.key = f"wireguard/{interface}"
        self.needs = tuple(needs)
        self.watches = (namespace,)
        self._names = Resolver()
        self._patient = True
        self._told: tuple[Problem, ...] = ()
        self._silent = 0

    @property
    def _what(self) -> str:
        place = f" in {self._namespace}" if self._namespace is not None else ""
        return f"WireGuard interface {self._interface}{place}"

    @property
    def _program(self) -> str:
        return f"wireguard-{self._interface}"

    async def diff(self) -> list[Change]:
        config = self._config()
        self._tell(config.left_out)
        if not self._nets.exists(self._namespace):
            return [Change(Sign.ADD, self._what, "missing", self._make)]
        link = await self._find(self._namespace)
        if link is not None and not _may_be_wireguard(link):
            raise Failed(f"{self._interface} in {self._namespace} is {link.kind or 'no WireGuard'}; remove it")
        if link is None:
            return [*await self._making(), self._configure("it is new")]
        shown = await self._shown() if link.kind == "wireguard" else await self._answer()
        if shown is None:
            # Its device lives on for a moment without it, its socket is gone, or it hangs; or it is somebody else's.
            return [
                Change(Sign.REMOVE, self._what, "nothing answers for it", self._remove),
                *await self._making(),
                self._configure("it is new"),
            ]
        out = []
        if link.mtu != config.mtu:
            why = f"it is {link.mtu}, not {config.mtu}"
            out.append(Change(Sign.CHANGE, f"MTU of {self._what}", why, self._set_mtu(config.mtu)))
        endpoints, trouble = self._endpoints(config, shown)
        if isinstance(trouble, Waiting) and self._patient:  # once: `plan` looks only once
            self._patient = False
            await self._names.wait()
            endpoints, trouble = self._endpoints(config, shown)
        if differs := self._differs(config, shown, endpoints):
            out.append(self._configure(differs))
        if trouble is not None and not out:  # all else is as wanted
            raise trouble
        return out

    def _tell(self, left_out: tuple[Problem, ...]) -> None:
        if left_out != self._told:
            self._told = left_out
            for problem in left_out:
                LOG.warning("%s", problem)

    # ----------------------------------------------------------------------------------------------------- making it

    async def _making(self) -> list[Change]:
        """It is made in one namespace and moved to another; a kill between the two leaves it in the first."""
        steps = []
        born = await self._find(self._socket_namespace)
        if born is not None and not self._is_ours(born):
            where = self._socket_namespace or "the host's network namespace"
            raise Failed(
                f"there is {self._interface} in {where} already, and it is not ours; remove it or rename the port"
            )
        if born is None:
            steps.append(Change(Sign.ADD, self._what, "missing", self._make))
        if self._socket_namespace != self._namespace:
            steps.append(Change(Sign.CHANGE, self._what, "not in its namespace yet", self._move))
        return steps

    def _is_ours(self, link: Link) -> bool:
        if link.kind == "wireguard":
            return link.group == self._group
        return _may_be_wireguard(link) and self._programs.record(self._program) is not None

    async def _find(self, namespace: str | None) -> Link | None:
        if not self._nets.exists(namespace):
            return None
        return await (await self._nets.get(namespace)).link(self._interface)

    async def _answer(self) -> Shown | None:
        """What our `wireguard-go` says; None if there is none. One that was silent twice in a row hangs."""
        if self._programs.record(self._program) is None or not self._answered():
            return None
        try:
            shown = await self._shown()
        except Failed as exc:
            self._silent += isinstance(exc.__cause__, TimeoutError)
            if self._silent < SILENT:
                raise
            shown = None
        self._silent = 0
        return shown

    def _answered(self) -> bool:
        """Whether some process listens on the socket of that name."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.setblocking(False)
                sock.connect(str(self._socket))
            except BlockingIOError:  # it listens, and has much to do
                return True
            except OSError:
                return False
        return True

    @property
    def _socket(self) -> Path:
        return _SOCKETS / f"{self._interface}.sock"

    async def _make(self) -> None:
        net = await self._nets.get(self._socket_namespace)
        if await self._find(self._socket_namespace) is not None:
            return
        if self._programs.record(self._program) is not None:  # without its device, or not so far yet
            await self._start_userspace()
            return
        try:
            await net.rtnl.link("add", ifname=self._interface, kind="wireguard", group=self._group)
            return
        except NetlinkError as exc:
            if exc.code not in (errno.EOPNOTSUPP, errno.ENOENT, errno.EPROTONOSUPPORT):
                raise Failed(f"{self._what} cannot be made: {exc}") from exc
        await self._start_userspace()

    async def _start_userspace(self) -> None:
        answered = self._answered()  # asked first: ours has its record before it listens
        if self._programs.record(self._program) is not None:
            await self._programs.stop(self._program)  # it runs, and its device is gone: it will not make another
        elif answered:
            raise Failed(
                f"another program answers on {self._socket} already; end it (fuser {self._socket}), or rename the port"
            )
        self._socket.unlink(missing_ok=True)
        command = ("wireguard-go", "-f", self._interface)
        self._programs.start(Program(self._program, command, self._socket_namespace))
        await self._programs.appear(self._program)
        deadline = time.monotonic() + APPEAR_S
        while await self._find(self._socket_namespace) is None or not self._answered():
            if time.monotonic() > deadline or self._programs.record(self._program) is None:
                words = self._programs.last_words(self._program)
                raise Failed(f"wireguard-go makes no {self._interface}; it says: {words}. Is /dev/net/tun there?")
            await asyncio.sleep(0.01)

    async def _move(self) -> None:
        assert self._namespace is not None
        link = await self._find(self._socket_namespace)
        if link is None:
            if await self._find(self._namespace) is not None:
                return
            raise Failed(f"{self._interface} has gone away")
        net = await self._nets.get(self._socket_namespace)
        try:
            await net.rtnl.link("set", index=link.index, net_ns_fd=str(NETNS_DIR / self._namespace))
        except NetlinkError as exc:
            raise Failed(f"{self._interface} cannot be moved into {self._namespace}: {exc}") from exc

    async def _remove(self) -> None:
        await remove_link(self._nets, self._namespace, self._interface)
        await self._programs.stop(self._program)

    async def remove(self) -> None:
        """Take it away, with its program."""
        await self._remove()

    def _set_mtu(self, mtu: int) -> Step:
        async def do() -> None:
            link = await self._find(self._namespace)
            if link is not None:
                await (await self._nets.get(self._namespace)).rtnl.link("set", index=link.index, mtu=mtu)

        return do

    # ------------------------------------------------------------------------------------------------- configuring it

    async def _shown(self) -> Shown:
        return await _dump(self._interface, self._namespace)

    def _endpoints(self, config: WgConfig, shown: Shown) -> tuple[dict[str, str], Failed | Waiting | None]:
        """Declared endpoints as addresses, by public key, and why there are not all of them."""
        out: dict[str, str] = {}
        trouble: Failed | Waiting | None = None
        for peer in config.peers:
            if peer.endpoint is None:
                continue
            found = shown.peers.get(peer.public_key)
            current = found.endpoint.rpartition(":")[0] if found is not None else ""
            works = found is not None and found.is_recent
            try:
                address = self._names.address(peer.endpoint.host, current, again=not works)
            except (Failed, Waiting) as exc:
                trouble = exc
                continue
            out[peer.public_key] = f"{address}:{peer.endpoint.port}"
        return out, trouble

    def _differs(self, config: WgConfig, shown: Shown, endpoints: dict[str, str]) -> str:
        found = []
        if shown.private_key != config.private_key.reveal():
            found.append("it has another private key")
        if config.listen_port is not None and shown.listen_port != config.listen_port:
            found.append(f"it listens on port {shown.listen_port}, not {config.listen_port}")
        if shown.mark != "off":
            found.append(f"its packets have the mark {shown.mark}")
        wanted = {peer.public_key: peer for peer in config.peers}
        for key in shown.peers.keys() - wanted.keys():
            found.append(f"peer {key} is not wanted")
        for key, peer in wanted.items():
            if key not in shown.peers:
                found.append(f"peer {key} is missing")
            elif what := self._peer_differs(peer, shown.peers[key], endpoints.get(key)):
                found.append(f"{what} of peer {key} is otherwise")
        return "; ".join(sorted(found)[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")

    def _peer_differs(self, peer: WgPeer, shown: ShownPeer, endpoint: str | None) -> str:
        if shown.allowed != {str(prefix) for prefix in peer.allowed}:
            return "allowed IPs"
        if shown.preshared_key != (peer.preshared_key.reveal() if peer.preshared_key is not None else ""):
            return "the pre-shared key"
        if shown.keepalive != peer.keepalive:
            return "the keepalive"
        moved = endpoint is not None and shown.endpoint != endpoint
        if moved and (self._fixed or not shown.is_recent):
            return f"the endpoint ({shown.endpoint or 'none'})"
        return ""

    def _configure(self, why: str) -> Change:
        async def do() -> None:
            config = self._config()
            shown = await self._shown()
            # What does not resolve yet is configured without: the others need not wait for it.
            endpoints, trouble = self._endpoints(config, shown)
            if isinstance(trouble, Waiting):
                await self._names.wait()
                endpoints, _ = self._endpoints(config, shown)
            if not self._fixed:  # a peer that has moved stays where it is
                for key, peer in shown.peers.items():
                    if peer.endpoint and peer.is_recent:
                        endpoints[key] = peer.endpoint
            text = write_config(config, endpoints, shown.listen_port)
            # With another key of ours no session goes on; forgotten altogether, none passes for one of the new key.
            how = "syncconf" if shown.private_key == config.private_key.reveal() else "setconf"
            command = ("wg", how, self._interface, "/dev/stdin")
            await call(*command, namespace=self._namespace, stdin=text, timeout_s=WG_S, secret=True)
            await self._set_mtu(config.mtu)()

        return Change(Sign.CHANGE, f"configuration of {self._what}", why, do)

    async def status(self) -> list[PeerStatus]:
        """How each peer is. Raises `Failed` where the interface is not there."""
        return await show(self._interface, self._namespace)

    async def handshake_age(self) -> float | None:
        """Seconds since the youngest handshake, None before the first."""
        ages = [peer.age_s for peer in await self.status() if peer.age_s is not None]
        return min(ages, default=None)


async def _dump(interface: str, namespace: str | None = None) -> Shown:
    return read_dump(await call("wg", "show", interface, "dump", namespace=namespace, timeout_s=WG_S, secret=True))


async def show(interface: str, namespace: str | None = None) -> list[PeerStatus]:
    """How each peer of an interface is. Raises `Failed` where it is not there."""
    now = time.time()
    return [
        PeerStatus(key, peer.endpoint, now - peer.handshake if peer.handshake else None, peer.received, peer.sent)
        for key, peer in (await _dump(interface, namespace)).peers.items()
    ]


def write_config(config: WgConfig, endpoints: dict[str, str], listen_port: int = 0) -> str:
    """What `wg syncconf` reads. `listen_port`, the one it has, stays where the configuration names none."""
    lines = ["[Interface]", f"PrivateKey = {config.private_key.reveal()}"]
    if port := config.listen_port or listen_port:
        lines.append(f"ListenPort = {port}")
    for peer in config.peers:
        lines += ["[Peer]", f"PublicKey = {peer.public_key}"]
        # All zeros mean none; left out, it would stay as it is.
        lines.append(f"PresharedKey = {peer.preshared_key.reveal() if peer.preshared_key is not None else _NO_KEY}")
        if peer.allowed:
            lines.append(f"AllowedIPs = {', '.join(map(str, peer.allowed))}")
        if peer.public_key in endpoints:
            lines.append(f"Endpoint = {endpoints[peer.public_key]}")
        lines.append(f"PersistentKeepalive = {peer.keepalive or 'off'}")
    return "\n".join(lines) + "\n"


def read_dump(text: str) -> Shown:
    """Read what `wg show DEVICE dump` prints. Raises `Failed`."""
    rows = [line.split("\t") for line in text.splitlines() if line]
    try:
        private, _public, port, mark = rows[0]
        peers = {
            key: ShownPeer(
                preshared_key="" if shared == "(none)" else shared,
                endpoint="" if endpoint == "(none)" else endpoint,
                allowed=frozenset(allowed.split(",")) if allowed != "(none)" else frozenset(),
                handshake=int(handshake),
                received=int(received),
                sent=int(sent),
                keepalive=0 if keepalive == "off" else int(keepalive),
            )
            for key, shared, endpoint, allowed, handshake, received, sent, keepalive in rows[1:]
        }
        return Shown("" if private == "(none)" else private, int(port), mark, peers)
    except (ValueError, IndexError):
        raise Failed("wg show prints what cannot be understood; which version is it? wg --version") from None


def _may_be_wireguard(link: Link) -> bool:
    """By its kind, not by its name. What carries Ethernet is none: an internal port of Open vSwitch's userspace
    datapath is of kind tun as well, but has a MAC address."""
    return link.kind in _KINDS and not link.mac


class Resolver:
    """IPv4 addresses of endpoints' names, asked on the host, outside every tunnel. Nobody waits for an answer.

    What has been found is kept as long as it works: a name whose answers take turns must not move a tunnel.
    """

    AGAIN_S, LIMIT_S, PATIENCE_S = 30.0, 5.0, 0.5

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._asked: dict[str, float] = {}
        self._asking: set[str] = set()

    def address(self, host: str, current: str = "", *, again: bool = False) -> str:
        """An address of `host`, `current` if that is one. With `again` it is asked anew, behind the caller's back.

        Raises `Waiting` while it is asked for, `Failed` if it does not resolve.
        """
        with contextlib.suppress(ValueError):
            return str(Ipv4.parse(host))
        known = self._known.get(host)
        asked = self._asked.get(host)
        now = time.monotonic()
        pause_s = self.AGAIN_S if known is not None else 0.0
        if (known is None or again) and (asked is None or now - asked >= pause_s) and host not in self._asking:
            self._ask(host, current)
        if known is not None:
            return known
        if asked is None:
            raise Waiting(f"the endpoint {host} is being resolved", 0.1)
        raise Failed(f"the endpoint {host} does not resolve; write its address, or mend the host's resolver")

    async def wait(self) -> None:
        """Wait for the answers that are due, not for long."""
        until = time.monotonic() + self.PATIENCE_S
        while self._asking and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _ask(self, host: str, current: str) -> None:
        loop = asyncio.get_running_loop()

        def ask() -> None:
            # A program can be ended, and a thread that nobody joins keeps the agent from ending no more than that.
            text = ""
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                command = ["getent", "ahosts", "--", host]
                text = subprocess.run(
                    command, capture_output=True, timeout=self.LIMIT_S, env=environment(), check=False
                ).stdout.decode(errors="replace")
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._answered, host, current, text)

        self._asking.add(host)
        threading.Thread(target=ask, daemon=True).start()

    def _answered(self, host: str, current: str, text: str) -> None:
        self._asking.discard(host)
        self._asked[host] = time.monotonic()
        known = self._known.get(host)
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError, IndexError):  # IPv6 addresses come as well
                found.append(str(Ipv4.parse(line.split()[0])))
        if found:  # whoever wants it sees that it is not known
            self._known[host] = next((one for one in (known, current) if one in found), found[0])
