"""A small router for tests: HTTP/1.1 over TLS 1.3, where every request must be sealed. It answers with what it got."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from controller.security.hpke import MEDIA_TYPE, NEXT_NONCE, Opener, Refused, new_binding


def make_certificate(directory: Path) -> tuple[Path, bytes]:
    """A self-signed certificate for 127.0.0.1 with its key in one file; the file, and the certificate in DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "router")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, SHA256())
    )
    path = directory / "router.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
    return path, certificate.public_bytes(Encoding.DER)


class SealedServer(ThreadingHTTPServer):
    """`seen` is what got through, `wire` every body as it came. `gates` hold an answer between its tokens."""

    daemon_threads = True

    def __init__(self, opener: Opener, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.opener = opener
        self.lock = threading.Lock()
        self.seen: list[tuple[str, str, bytes]] = []
        self.wire: list[bytes] = []
        self.connections = 0
        self.close_after_answer = False
        self.cut = False
        self.gate: threading.Event | None = None
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_3
        self._tls.load_cert_chain(certificate)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        return self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server: SealedServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.binding = new_binding()
        self.server.connections += 1

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.path == "/hpke/config":
            with self.server.lock:
                told = json.dumps(self.server.opener.config(self.binding)).encode()
            self._reply(200, "application/json", told)
        else:
            self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.wire.append(body)
        try:
            with self.server.lock:
                opened = self.server.opener.open(self.command, self.path, self.headers.items(), body, self.binding)
        except Refused as exc:
            self._reply(exc.status, "application/problem+json", json.dumps({"title": str(exc)}).encode())
            return
        self.server.seen.append((self.command, self.path, opened.body))
        answer = opened.answer()
        if self.path == "/missing":
            self._reply(200, MEDIA_TYPE, answer.whole(404, "text/plain", b"no such thing"))
            return
        self._head(200, MEDIA_TYPE)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(answer.begin(200, "text/event-stream"))
        for word in opened.body.split():
            self._chunk(answer.chunk(b"data: " + word + b"\n\n"))
            if self.server.gate is not None:
                self.server.gate.wait(10)
                self.server.gate.clear()
        if not self.server.cut:
            self._chunk(answer.end())
        self._chunk(b"")
        self.close_connection = self.server.close_after_answer

    def _head(self, status: int, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header(NEXT_NONCE, self.server.opener.nonce(self.binding))

    def _reply(self, status: int, content_type: str, body: bytes) -> None:
        self._head(status, content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


@contextmanager
def serving(opener: Opener, certificate: Path) -> Iterator[SealedServer]:
    """Run one for as long as the block lasts."""
    server = SealedServer(opener, certificate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
