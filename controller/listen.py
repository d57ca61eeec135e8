"""Where switches connect: a unix socket, plain TCP or TLS, with limits on connections that say nothing.

Accepts, wraps, and hands the socket to os-ken's `Datapath`. At most `MAX_CONNECTIONS` at once; a newcomer beyond that
ends the oldest connection that has not finished its handshake, so that idle ones cannot lock a real switch out.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from os_ken.controller.controller import Datapath
from os_ken.controller.handler import MAIN_DISPATCHER

from controller import hub, unixsocket
from controller.problems import BulkheadError

MAX_CONNECTIONS = 256
HANDSHAKE_S = 10.0

LOG = logging.getLogger("bulkhead.listen")


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for `ssl:`. Switches must have a certificate of `ca` as well, and one that is not revoked in `crl` if given."""

    private_key: Path
    certificate: Path
    ca: Path
    crl: Path | None = None


@dataclass(frozen=True, slots=True)
class Listen:
    """One address to listen on: `path` is a unix socket; else host and port, and `tls` None is plain TCP."""

    host: str
    port: int
    tls: Tls | None = None
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'ssl' if self.tls else 'tcp'}:{host}:{self.port}"


def parse(text: str, tls: Tls | None) -> Listen:
    """Read `tcp:127.0.0.1:6653`, `ssl:[::1]:6653` or `unix:/run/…`. Raises `BulkheadError` saying what was expected."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        if not rest.startswith("/"):
            raise BulkheadError(f"--listen {text}: expected unix: and an absolute path")
        return Listen("", 0, None, Path(rest))
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    wanted = "expected tcp:ADDRESS:PORT, ssl:ADDRESS:PORT or unix:PATH, for example tcp:127.0.0.1:6653"
    if scheme not in ("tcp", "ssl"):
        raise BulkheadError(f"--listen {text}: {wanted}")
    try:
        ipaddress.ip_address(host)
    except ValueError as exc:
        raise BulkheadError(f"--listen {text}: {host!r} is not an IP address; {wanted}") from exc
    if not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise BulkheadError(f"--listen {text}: {port!r} is not a port; {wanted}")
    if scheme == "ssl" and tls is None:
        raise BulkheadError(f"--listen {text} needs --private-key, --certificate and --ca-cert")
    return Listen(host, int(port), tls if scheme == "ssl" else None)


@dataclass(slots=True, eq=False)
class _Connection:
    sock: Any
    datapath: Any = None

    @property
    def finished(self) -> bool:
        return self.datapath is not None and self.datapath.state == MAIN_DISPATCHER

    def end(self) -> None:
        for call in (lambda: self.sock.shutdown(socket.SHUT_RDWR), self.sock.close):
            try:
                call()
            except OSError:
                continue  # it is gone already


class Listener:
    """Binds at once, so that a taken port is an error before anything runs; `serve` accepts."""

    def __init__(self, addresses: tuple[Listen, ...]) -> None:
        self.rejected = 0
        self._open: dict[_Connection, None] = {}
        self._servers = [
            (self._bind(address), _Following(address, address.tls) if address.tls else None) for address in addresses
        ]

    @staticmethod
    def _bind(address: Listen) -> socket.socket:
        if address.path is not None:
            return unixsocket.bind(address.path, 128)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address.host, address.port))
            server.listen(128)
        except OSError as exc:
            server.close()
            raise BulkheadError(
                f"cannot listen on {address}: {exc.strerror}. Is another controller running? See: ss -ltnp"
            ) from exc
        return server

    @property
    def ports(self) -> list[int]:
        """The ports bound, in order (of interest where 0 was asked for)."""
        return [server.getsockname()[1] for server, _ in self._servers]

    def serve(self) -> None:
        """Accept on every address."""
        for server, contexts in self._servers:
            hub.spawn(self._accept, server, contexts)

    def close(self) -> None:
        """Accept no more."""
        for server, _ in self._servers:
            path = server.getsockname() if server.family == socket.AF_UNIX else None
            server.close()
            if path:
                Path(path).unlink(missing_ok=True)

    def _accept(self, server: socket.socket, contexts: _Following | None) -> None:
        while True:
            try:
                sock, address = server.accept()
            except OSError as exc:
                if server.fileno() < 0:
                    return
                LOG.warning("accept: %s", exc)  # out of descriptors, most likely: wait for some to come back
                hub.sleep(0.2)
                continue
            connection = _Connection(sock)
            self._open[connection] = None
            if len(self._open) > MAX_CONNECTIONS:
                self._make_room()
            hub.spawn(self._serve_one, connection, address, contexts)

    def _make_room(self) -> None:
        oldest = next((c for c in self._open if not c.finished), None)
        if oldest is not None:
            self.rejected += 1
            del self._open[oldest]
            oldest.end()

    def _serve_one(self, connection: _Connection, address: Any, contexts: _Following | None) -> None:
        hub.spawn_after(HANDSHAKE_S, self._check, connection)
        try:
            if contexts is not None:
                connection.sock = contexts.now().wrap_socket(connection.sock, server_side=True)
            if connection.sock.family == socket.AF_UNIX:
                connection.sock = _NotTcp(connection.sock)
            connection.datapath = Datapath(connection.sock, address)
            connection.datapath.serve()
        except Exception as exc:
            # os-ken raises whatever a hostile peer makes its parser raise; the connection is all it costs.
            self.rejected += 1
            LOG.warning("connection from %s ended: %s: %s", address, type(exc).__name__, str(exc)[:200])
        finally:
            if connection.datapath is not None:
                connection.datapath.close()
            self._open.pop(connection, None)
            connection.end()

    def _check(self, connection: _Connection) -> None:
        if connection in self._open and not connection.finished:
            self.rejected += 1
            connection.end()


class _NotTcp:
    """A unix socket for os-ken, which sets TCP_NODELAY on whatever it is given."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def setsockopt(self, level: int, *args: Any) -> None:
        """As the socket's own, less what is TCP's."""
        if level != socket.IPPROTO_TCP:
            self._sock.setsockopt(level, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _Following:
    """The TLS context of an address, made anew when its files have changed. New ones that do not fit change nothing."""

    def __init__(self, address: Listen, tls: Tls) -> None:
        self._address, self._tls = address, tls
        self._seen = self._look()
        self._context = _context(address, tls)

    def now(self) -> ssl.SSLContext:
        """For a new connection."""
        seen = self._look()
        if seen != self._seen:
            try:
                self._context, self._seen = _context(self._address, self._tls), seen
            except BulkheadError as exc:
                LOG.warning("what was read before stays in use: %s", exc)
        return self._context

    def _look(self) -> list[tuple[int, int, int] | None]:
        tls = self._tls
        return [_stamp(path) for path in (tls.private_key, tls.certificate, tls.ca, tls.crl) if path is not None]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _context(address: Listen, tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    files = {"private key": tls.private_key, "certificate": tls.certificate, "CA certificate": tls.ca}
    if tls.crl is not None:
        files["list of revocations"] = tls.crl
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.num_tickets = 0  # a resumed session would not look at revocations again
        context.options |= ssl.OP_NO_TICKET
    for what, path in files.items():
        if not path.is_file():
            raise BulkheadError(f"{what} {path} is not a file")
    try:
        context.load_cert_chain(tls.certificate, tls.private_key)
        context.load_verify_locations(tls.ca)
        if tls.crl is not None:
            context.load_verify_locations(tls.crl)
    except (ssl.SSLError, OSError) as exc:
        raise BulkheadError(
            f"{address}: {', '.join(f'{what} {path}' for what, path in files.items())}: one cannot be used: {exc}"
        ) from exc
    return context
