"""Who asks, and what they may do: by the kernel's word on this host, by a bearer token from elsewhere.

On a unix socket SO_PEERCRED says whose the other end is; on loopback the kernel's socket tables do. Root, the API's own
user and members of the group `bulkhead` may do everything; everybody else needs a token. Whoever shows a token is judged
by it alone: a bad one is not made good by who shows it.
"""

from __future__ import annotations

import grp
import hmac
import ipaddress
import os
import pwd
import secrets
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from controller.api.problem import ApiProblem
from controller.api.settings import GROUP
from controller.records import Scope, TokenRecord

EVERYTHING = frozenset(Scope)
TOKEN_PREFIX = "bh_"
ROOT = "uid:0"
_ID_BYTES = 5
_NOBODY = 65534
_ESTABLISHED = "01"
_PROC = Path("/proc/self/net")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who it is (`uid:0`, `user:NAME`, `token:NAME`), what they may do, and where they asked from."""

    name: str
    scopes: frozenset[Scope]
    origin: str

    def may(self, scope: Scope) -> bool:
        """Whether they have a scope. Each is given by itself: one that may operate need not be one that may look."""
        return scope in self.scopes


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection: where it is, and its user if the kernel says so. `local` is where tokens may be
    left out."""

    origin: str
    uid: int | None = None
    gid: int | None = None
    local: bool = False

    def principal(self) -> Principal | None:
        """Who this is without a token; None for nobody that is known."""
        if not self.local or self.uid is None:
            return None
        name = user_name(self.uid)
        if self.uid == 0 or self._is_us() or self._in_group():
            return Principal(name, EVERYTHING, self.origin)
        return None

    def _is_us(self) -> bool:
        # Whatever else runs as nobody is not us.
        return self.uid == os.geteuid() != _NOBODY

    def _in_group(self) -> bool:
        try:
            wanted = grp.getgrnam(GROUP).gr_gid
        except KeyError:
            return False
        if self.gid == wanted:
            return True
        try:
            user = pwd.getpwuid(self.uid or 0)
            return wanted in os.getgrouplist(user.pw_name, user.pw_gid)
        except (KeyError, OSError):
            return False


def user_name(uid: int) -> str:
    """`uid:0` for root, `user:NAME` for others, `uid:N` where there is no name."""
    if uid == 0:
        return ROOT
    try:
        return f"user:{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid:{uid}"


def peer_of_unix(sock: socket.socket) -> Peer:
    """Whose the other end of a unix socket was when it connected."""
    _, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return Peer("unix", uid, gid, local=True)


def peer_of_tcp(theirs: tuple[str, int], ours: tuple[str, int]) -> Peer:
    """The other end of a TCP connection; its user where it is on this machine's loopback."""
    try:
        loopback = all(ipaddress.ip_address(end[0]).is_loopback for end in (theirs, ours))
    except ValueError:
        return Peer("?")
    if not loopback:
        return Peer(theirs[0])
    return Peer(theirs[0], uid_of(theirs, ours), local=True)


def uid_of(theirs: tuple[str, int], ours: tuple[str, int], proc: Path = _PROC) -> int | None:
    """The user of the socket at `theirs` that is connected to `ours`, by the kernel's tables; None if it does not say.

    A socket that its owner has closed already has no inode and belongs to uid 0 in these tables: it is nobody's.
    """
    for table, version in (("tcp", 4), ("tcp6", 6)):
        wanted = [_hexadecimal(end, version) for end in (theirs, ours)]
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            parts = line.split()
            if parts[1:3] == wanted:
                alive = parts[3] == _ESTABLISHED and parts[9] != "0"
                return int(parts[7]) if alive else None
    return None


def _hexadecimal(end: tuple[str, int], version: int) -> str:
    """An address and port as /proc/net has them: words of four bytes in the machine's order."""
    address = ipaddress.ip_address(end[0])
    packed = address.packed
    if version == 6 and len(packed) == 4:
        packed = b"\0" * 10 + b"\xff\xff" + packed
    if len(packed) != (4 if version == 4 else 16):
        return ""
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{end[1]:04X}"


# -------------------------------------------------------------------------------------------------------------- tokens


def new_token() -> tuple[str, str]:
    """A token's id and the token itself, which begins with the id."""
    name = secrets.token_hex(_ID_BYTES)
    return name, f"{TOKEN_PREFIX}{name}_{secrets.token_urlsafe(32)}"


def digest(token: str) -> str:
    """What is kept of a token."""
    return sha256(token.encode()).hexdigest()


def bearer(header: str, tokens: Iterable[TokenRecord], now: float, origin: str) -> Principal:
    """Who shows that Authorization header. Raises `ApiProblem`."""
    scheme, _, token = header.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token.startswith(TOKEN_PREFIX) or not token.isascii() or len(token) > 200:
        raise unauthenticated("The Authorization header holds no token of ours; send: Authorization: Bearer bh_…")
    shown = digest(token)
    found = None
    for record in tokens:
        if hmac.compare_digest(record.digest, shown):
            found = record
    if found is None:
        raise unauthenticated("This token is unknown or was revoked; have another one made: bulkhead token create")
    if found.expires_at and now >= found.expires_at:
        raise unauthenticated("This token has expired; have another one made: bulkhead token create")
    return Principal(token_name(found), frozenset(found.scopes), origin)


def token_name(token: TokenRecord) -> str:
    """What a token's holder goes by."""
    return f"token:{token.name}"


def token_of(name: str, tokens: Iterable[TokenRecord]) -> TokenRecord | None:
    """The token of somebody who goes by that name."""
    return next((one for one in tokens if token_name(one) == name), None)


def makers(name: str, tokens: Iterable[TokenRecord]) -> list[str]:
    """Who made somebody's token, who made that one's, and so on; nobody for those without one.

    Root is left out, who makes everybody's first token and is not whoever it was made for.
    """
    there = {token_name(one): one.created_by for one in tokens if one.created_by != ROOT}
    found: list[str] = []
    while name in there and there[name] not in found:
        name = there[name]
        found.append(name)
    return found


def unauthenticated(detail: str) -> ApiProblem:
    """The answer to somebody who is not known."""
    return ApiProblem("unauthenticated", detail, headers={"WWW-Authenticate": 'Bearer realm="bulkhead"'})
