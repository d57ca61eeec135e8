"""Configurations in wg-quick's style (wg-quick(8), wg(8)), as wgcf and others write them.

Commands in them are understood and never run; IPv6 is left out, since the networks are IPv4. Imports hostmodel, keys,
model and problems.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from controller.hostmodel import Endpoint
from controller.model import Ipv4, Prefix
from controller.problems import InvalidInput, Problem, error, warning
from controller.wgkeys import Secret, is_key

T = TypeVar("T")
_LINE = re.compile(r"([A-Za-z]+)\s*=\s*(.*)")
_ENDPOINT = re.compile(r"([A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.?):([0-9]{1,5})")
_LIKE_A_KEY = re.compile(r"[A-Za-z0-9+/]{16}")
"""A key that stands where none belongs, or a piece of one."""
_COMMANDS = ("preup", "postup", "predown", "postdown")
_IGNORED = ("dns", "table", "saveconfig", "fwmark", "reserved")


@dataclass(frozen=True, slots=True)
class QuickPeer:
    """A [Peer] section."""

    public_key: str = ""
    allowed: tuple[Prefix, ...] = ()
    endpoint: Endpoint | None = None
    keepalive: int = 0
    preshared_key: Secret | None = None


@dataclass(frozen=True, slots=True)
class Quick:
    """A whole file. `problems` are its warnings."""

    private_key: Secret | None = None
    addresses: tuple[tuple[Ipv4, int], ...] = ()
    listen_port: int | None = None
    mtu: int | None = None
    peers: tuple[QuickPeer, ...] = ()
    problems: tuple[Problem, ...] = field(default=(), compare=False)


def parse(text: str, source: str) -> Quick:
    """Read a file. Raises `InvalidInput` with every error; no message repeats a key."""
    reader = _Reader(source)
    for number, line in enumerate(text.splitlines(), 1):
        reader.line(f"{source}:{number}", line.split("#", 1)[0].strip())
    return reader.finish()


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source
        self._problems: list[Problem] = []
        self._quick = Quick()
        self._peers: list[QuickPeer] = []
        self._section = ""

    def line(self, path: str, line: str) -> None:
        if not line:
            return
        if line.lower() in ("[interface]", "[peer]"):
            self._section = line.lower()
            if self._section == "[peer]":
                self._peers.append(QuickPeer())
            return
        found = _LINE.fullmatch(line)
        if found is None or not self._section:
            what = "a section [Interface] or [Peer]" if not self._section else "KEY = VALUE"
            self._problems.append(error("bad-line", path, "something else", what, "Mend the line, or remove it."))
            return
        name, value = found[1].lower(), found[2].strip()
        try:
            known = (
                self._interface(path, name, value) if self._section == "[interface]" else self._peer(path, name, value)
            )
        except ValueError as exc:
            shown = "something else" if name.endswith("key") else _shown(value) or "nothing"
            self._problems.append(
                error("bad-value", path, f"{_shown(found[1])} = {shown}", str(exc), "Mend the value.")
            )
            return
        if not known:
            fix = "Remove it, or mend its name."
            self._problems.append(error("unknown-key", path, _shown(found[1]), f"a key of {self._section}", fix))

    def _interface(self, path: str, name: str, value: str) -> bool:
        quick = self._quick
        if name == "privatekey":
            self._quick = replace(quick, private_key=_key(value))
        elif name == "address":
            self._quick = replace(quick, addresses=(*quick.addresses, *self._addresses(path, value)))
        elif name == "listenport":
            self._quick = replace(quick, listen_port=_number(value, 1, 65535))
        elif name == "mtu":
            self._quick = replace(quick, mtu=_number(value, 576, 65535))
        elif name in _COMMANDS:
            fix = "Nothing to do: addresses, routes and bridges are made by the agent."
            self._problems.append(warning("command", path, "a command", "no command: it is not run", fix))
        elif name in _IGNORED:
            self._problems.append(warning("ignored", path, name, "nothing: it is not used", "It can stay."))
        else:
            return False
        return True

    def _peer(self, path: str, name: str, value: str) -> bool:
        peer = self._peers[-1]
        if name == "publickey":
            peer = replace(peer, public_key=_key(value).reveal())
        elif name == "presharedkey":
            peer = replace(peer, preshared_key=_key(value))
        elif name == "allowedips":
            prefixes = (Prefix(Ipv4(int(one.network_address)), one.prefixlen) for one in self._networks(path, value))
            peer = replace(peer, allowed=(*peer.allowed, *prefixes))
        elif name == "endpoint":
            found = _ENDPOINT.fullmatch(value)
            if found is None or not 0 < int(found[2]) < 65536:
                raise ValueError("HOST:PORT, where HOST is a name or an IPv4 address")
            peer = replace(peer, endpoint=Endpoint(found[1], int(found[2])))
        elif name == "persistentkeepalive":
            peer = replace(peer, keepalive=0 if value == "off" else _number(value, 0, 65535))
        elif name in _IGNORED:
            self._problems.append(warning("ignored", path, name, "nothing: it is not used", "It can stay."))
        else:
            return False
        self._peers[-1] = peer
        return True

    def _addresses(self, path: str, value: str) -> Iterator[tuple[Ipv4, int]]:
        for part in _parts(value):
            one = _read(ipaddress.ip_interface, part)
            if isinstance(one, ipaddress.IPv4Interface):
                yield Ipv4(int(one.ip)), one.network.prefixlen
            else:
                self._left_out(path, part)

    def _networks(self, path: str, value: str) -> Iterator[ipaddress.IPv4Network]:
        for part in _parts(value):
            one = _read(lambda text: ipaddress.ip_network(text, strict=False), part)
            if isinstance(one, ipaddress.IPv4Network):
                yield one
            else:
                self._left_out(path, part)

    def _left_out(self, path: str, part: str) -> None:
        self._problems.append(warning("ipv6", path, _shown(part), "IPv4: it is left out", "It can stay."))

    def finish(self) -> Quick:
        if self._quick.private_key is None:
            fix = "Add PrivateKey to [Interface]."
            self._problems.append(error("missing-key", self._source, "no PrivateKey", "the interface's key", fix))
        self._check_peers()
        if any(problem.severity == "error" for problem in self._problems):
            raise InvalidInput(self._source, self._problems)
        return replace(self._quick, peers=tuple(self._peers), problems=tuple(self._problems))

    def _check_peers(self) -> None:
        """A key and an address belong to one peer: WireGuard gives them silently to the last."""
        owners: dict[str | Prefix, int] = {}
        for number, peer in enumerate(self._peers, 1):
            where = f"{self._source}: [Peer] number {number}"
            if not peer.public_key:
                fix = "Add PublicKey to it."
                self._problems.append(error("missing-key", where, "no PublicKey", "the peer's key", fix))
            elif (other := owners.setdefault(peer.public_key, number)) != number:
                fix = "Make one peer of the two."
                what = f"the PublicKey of [Peer] number {other}"
                self._problems.append(error("duplicate-key", where, what, "a key of its own", fix))
            for prefix in peer.allowed:
                if (other := owners.setdefault(prefix, number)) != number:
                    what = f"{prefix}, which [Peer] number {other} has"
                    fix = "Leave it to one of them."
                    self._problems.append(error("duplicate-prefix", where, what, "a prefix of its own", fix))


def _read(how: Callable[[str], T], part: str) -> T:
    try:
        return how(part)
    except ValueError:
        raise ValueError("IPv4 addresses with prefix lengths, such as 10.9.0.2/24") from None


def _shown(text: str) -> str:
    return "something else" if _LIKE_A_KEY.search(text) else text[:80]


def _parts(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _key(value: str) -> Secret:
    if not is_key(value):
        raise ValueError("a WireGuard key: 44 characters of base64")
    return Secret(value)


def _number(value: str, low: int, high: int) -> int:
    if not value.isdecimal() or not value.isascii() or len(value) > 5 or not low <= int(value) <= high:
        raise ValueError(f"a number from {low} to {high}")
    return int(value)
