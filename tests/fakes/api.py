"""An API that answers what a test tells it to, on a real unix socket or TCP port, and remembers what it was asked."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer, ThreadingUnixStreamServer
from typing import Any, Self

Answer = tuple[int, Any]
Answerer = Callable[["Asked"], Answer | None]
"""What to answer; None breaks the connection."""


@dataclass(frozen=True, slots=True)
class Asked:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeApi:
    """A context manager. `answer` may be changed at any time."""

    directory: Path
    answer: Answerer
    tls: ssl.SSLContext | None = None
    asked: list[Asked] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        handler = self._handler()
        self._server: Any
        if self.tls is not None:
            self._server = ThreadingTCPServer(("127.0.0.1", 0), handler)
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        else:
            self._server = ThreadingUnixStreamServer(str(self.directory / "api.sock"), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # whoever does not trust us hangs up
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._server.server_address[1]}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def address_string(self) -> str:
                return "fake"

            def log_message(self, *_: object) -> None:
                pass

            def _serve(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                path, _, query = self.path.partition("?")
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, path, query, headers, body)
                fake.asked.append(asked)
                found = fake.answer(asked)
                if found is None:
                    self.close_connection = True
                    return
                status, value = found
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                kind = "application/problem+json" if status >= 400 else "application/json"
                if isinstance(value, bytes):
                    kind = "text/html"
                for name, text in {"content-type": kind, "content-length": str(len(raw)), **fake.headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_DELETE = _serve

        return Handler


def problem(status: int, code: str, detail: str, *errors: dict[str, str]) -> Answer:
    """A problem document."""
    return status, {
        "type": f"urn:bulkhead:problem:{code}",
        "title": code,
        "status": status,
        "detail": detail,
        "errors": list(errors),
    }
