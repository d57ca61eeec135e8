"""`bulkhead client`, and the client's library, against a small router over real TLS."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controller.clientcli import client
from controller.eventlog import EventLog
from controller.problems import BulkheadError
from controller.security.hpke import BadAnswer, ClientKey, Opener, Registry, RouterKeys
from controller.security.hpke.client import RouterClient, Unanswered
from controller.security.hpke.wire import b64
from tests.fakes.sealedserver import SealedServer, make_certificate, serving

CANARY = b"CANARY one two"


@pytest.fixture
def security(tmp_path: Path) -> Path:
    """A security directory with a router's keys."""
    RouterKeys(tmp_path / "security" / "hpke").ensure()
    return tmp_path / "security"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path)[0]


@pytest.fixture
def server(security: Path, certificate: Path) -> Iterator[SealedServer]:
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text().partition("-----BEGIN PRIVATE")[0])
    hpke = security / "hpke"
    opener = Opener(Registry(hpke), RouterKeys(hpke), certificates=lambda: {sha256(der).digest()})
    with serving(opener, certificate) as server:
        yield server


@pytest.fixture
def key(security: Path) -> ClientKey:
    key = ClientKey.new("auth")
    Registry(security / "hpke").register("laptop", key.public)
    return key


@pytest.fixture
def router(server: SealedServer, certificate: Path, key: ClientKey, security: Path) -> Iterator[RouterClient]:
    tls = ssl.create_default_context(cafile=certificate)
    with RouterClient(server.url, key, tls=tls, pin=RouterKeys(security / "hpke").identity(), timeout_s=10) as router:
        yield router


def test_requests_over_one_connection(router: RouterClient, server: SealedServer) -> None:
    for _ in range(5):
        answer = router.request("POST", "/v1/chat?q=%20x", CANARY, "text/plain")
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        assert answer.body == b"data: CANARY\n\ndata: one\n\ndata: two\n\n"
    assert router.request("GET", "/v1/models").body == b""
    assert server.seen[-2:] == [("POST", "/v1/chat?q=%20x", CANARY), ("GET", "/v1/models", b"")]
    assert not any(b"CANARY" in body for body in server.wire)
    assert server.connections == 1


def test_tokens_pass_one_by_one(router: RouterClient, server: SealedServer) -> None:
    server.gate = threading.Event()
    with router.stream("POST", "/v1/chat", b"a b c", "text/plain") as stream:
        tokens = iter(stream)
        for word in (b"a", b"b", b"c"):
            assert next(tokens) == b"data: " + word + b"\n\n"  # the next one is not sent before this one is here
            server.gate.set()
        assert list(tokens) == []


def test_a_lost_connection_is_made_anew(router: RouterClient, server: SealedServer) -> None:
    server.close_after_answer = True
    for _ in range(3):
        assert router.request("POST", "/", CANARY, "text/plain").status == 200
    assert len(server.seen) == 3


def test_a_router_that_restarted_is_asked_again(router: RouterClient, server: SealedServer, security: Path) -> None:
    router.request("POST", "/", CANARY, "text/plain")
    server.opener = Opener(Registry(security / "hpke"), RouterKeys(security / "hpke"))
    assert router.request("POST", "/", CANARY, "text/plain").status == 200
    assert server.opener.refused == {"nonce": 1}


def test_a_rotation_disturbs_nobody(router: RouterClient, server: SealedServer, security: Path) -> None:
    keys = RouterKeys(security / "hpke")
    for _ in range(3):
        assert router.request("POST", "/", CANARY, "text/plain").status == 200
        keys.rotate(60)
    assert not server.opener.refused


def test_an_end_without_overlap_is_overcome(router: RouterClient, server: SealedServer, security: Path) -> None:
    router.request("POST", "/", CANARY, "text/plain")
    RouterKeys(security / "hpke").rotate(0)
    assert router.request("POST", "/", CANARY, "text/plain").status == 200
    assert server.opener.refused == {"router-key": 1}


def test_a_cut_answer_is_an_error(router: RouterClient, server: SealedServer) -> None:
    server.cut = True
    with pytest.raises(BadAnswer, match="cut off"):
        router.request("POST", "/", CANARY, "text/plain")


def test_a_revoked_client_is_refused_within_a_second(
    router: RouterClient, key: ClientKey, security: Path, server: SealedServer
) -> None:
    router.request("POST", "/", CANARY, "text/plain")
    Registry(security / "hpke").revoke("laptop")
    started = time.monotonic()
    with pytest.raises(Unanswered, match=key.public.id):
        router.request("POST", "/", CANARY, "text/plain")
    assert time.monotonic() - started < 1
    assert len(server.seen) == 1


def test_a_middleman_with_a_certificate_that_the_client_believes(
    router: RouterClient, server: SealedServer, tmp_path: Path, key: ClientKey, security: Path
) -> None:
    (tmp_path / "other").mkdir()
    other, _ = make_certificate(tmp_path / "other")
    with serving(server.opener, other) as middle:
        tls = ssl.create_default_context(cafile=other)
        with RouterClient(middle.url, key, tls=tls) as asking, pytest.raises(Unanswered):
            asking.request("POST", "/", CANARY, "text/plain")
        assert server.opener.refused == {"certificate": 1}
        assert middle.seen == []


def test_another_router_than_the_pinned_one(server: SealedServer, certificate: Path, key: ClientKey) -> None:
    tls = ssl.create_default_context(cafile=certificate)
    with RouterClient(server.url, key, tls=tls, pin=bytes(32)) as router, pytest.raises(BulkheadError, match="between"):
        router.request("GET", "/")
    assert server.wire == []


@pytest.mark.parametrize("url", ["", "x", "http://192.0.2.1", "ftp://x", "https://", "http://x@y"])
def test_addresses_that_are_none(url: str, key: ClientKey) -> None:
    with pytest.raises(BulkheadError, match=r"expected https|not an address"):
        RouterClient(url, key)


@pytest.mark.parametrize("target", ["https://192.0.2.1/x", "//192.0.2.1/x"])
def test_a_target_cannot_lead_elsewhere(router: RouterClient, server: SealedServer, target: str) -> None:
    with pytest.raises(BulkheadError, match="not a path"):
        router.request("GET", target)
    assert server.seen == []


# --- commands --------------------------------------------------------------------------------------------------------


def bulkhead(*words: object, stdin: bytes = b"", code: int = 0) -> Result:
    done = CliRunner().invoke(client, [str(word) for word in words], input=stdin)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert done.exit_code == code, done.output
    return done


def test_the_life_of_a_client(server: SealedServer, security: Path, certificate: Path, tmp_path: Path) -> None:
    EventLog(security / "events").close()
    key, at = tmp_path / "key", ("--security-dir", security)
    bulkhead("keygen", key, "--suite", "base+ed25519")
    assert key.stat().st_mode & 0o777 == 0o600
    assert b"exists already" in bulkhead("keygen", key, code=2).stderr_bytes
    made = json.loads(bulkhead("register", "laptop", f"{key}.pub", *at, "--json").stdout_bytes)
    assert (made["name"], made["suite"], made["revoked_at"]) == ("laptop", "base+ed25519", None)
    assert made["id"].encode() in bulkhead("list", *at).stdout_bytes

    to = (f"{server.url}/v1/chat?x=1", "--key", key, "--ca", certificate)
    told = json.loads(bulkhead("router-keys", "rotate", "--overlap", 1, *at, "--json").stdout_bytes)
    assert len(told["keys"]) == 2
    assert told["identity"] == b64(RouterKeys(security / "hpke").identity())
    assert told["keys"][0]["id"].encode() in bulkhead("router-keys", "list", *at).stdout_bytes
    done = bulkhead("call", *to, "--router", told["identity"], "--json", "-", "--stream", stdin=b'{"a": 1}')
    assert done.stdout_bytes == b'data: {"a":\n\ndata: 1}\n\n'
    assert server.seen == [("POST", "/v1/chat?x=1", b'{"a": 1}')]
    assert b"404" in bulkhead("call", f"{server.url}/missing", *to[1:], code=1).stderr_bytes

    bulkhead("revoke", "laptop", *at)
    assert made["id"].encode() in bulkhead("call", *to, code=1).stderr_bytes
    assert bulkhead("router-keys", "prune", *at).stdout_bytes == b"0 key(s) removed\n"
    events = b"".join(path.read_bytes() for path in (security / "events").glob("*.jsonl"))
    assert b"client_registered" in events
    assert b"client_revoked" in events
    private = key.read_text().split()[-1].encode()
    assert private not in done.output_bytes + events


def test_mistakes_are_one_line(tmp_path: Path, security: Path) -> None:
    at = ("--security-dir", security)
    wrong = tmp_path / "wrong"
    wrong.write_text("SECRET\n")
    wrong.chmod(0o600)
    assert b"not a key" in bulkhead("register", "x", wrong, *at, code=2).stderr_bytes
    assert b"SECRET" not in bulkhead("call", "https://127.0.0.1:1/", "--key", wrong, code=2).stderr_bytes
    bulkhead("register", "x", tmp_path / "none", *at, code=2)
    bulkhead("revoke", "x", *at, code=2)
    bulkhead("router-keys", "list", "--security-dir", tmp_path / "none", code=2)
    bulkhead("keygen", tmp_path / "key")
    call = ("call", "https://127.0.0.1:1/", "--key", tmp_path / "key")
    assert b"not JSON" in bulkhead(*call, "--json", "{", code=2).stderr_bytes
    assert b"127.0.0.1:1" in bulkhead("call", "https://127.0.0.1:1/", "--key", tmp_path / "key", code=2).stderr_bytes
    assert (
        b"--router"
        in bulkhead("call", "https://127.0.0.1:1/", "--key", tmp_path / "key", "--router", "x", code=2).stderr_bytes
    )
