"""Sealed requests: what passes, what is refused, and that nothing else happens."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.problems import BulkheadError
from controller.security.hpke import (
    HEADER,
    MEDIA_TYPE,
    AnswerOpener,
    AnswerSealer,
    BadAnswer,
    ClientKey,
    Config,
    Opened,
    Opener,
    PublicKey,
    Refused,
    Registry,
    RouterKeys,
    Sealed,
    Sealer,
    new_binding,
)
from controller.security.hpke.suites import SUITES

BODY = b'{"prompt": "CANARY"}'
TYPE = "application/json"
CERTIFICATE = b"a certificate in DER"


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Setup:
    """A router with one client, and a connection between them."""

    directory: Path
    suite: str
    clock: Clock = field(default_factory=Clock)
    told: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry = Registry(self.directory)
        self.keys = RouterKeys(self.directory)
        self.keys.ensure(self.clock.now)
        self.key = ClientKey.new(self.suite)
        self.client = self.registry.register("laptop", self.key.public, self.clock.now)
        self.opener = self.started()
        self.binding = new_binding()

    def started(self, **more: object) -> Opener:
        """A router as it is after a start."""
        return Opener(
            self.registry,
            self.keys,
            clock=self.clock,
            monotonic=self.clock,
            told=lambda code, count: self.told.append((code, count)),
            **more,  # type: ignore[arg-type]
        )

    def config(self) -> Config:
        told = json.loads(json.dumps(self.opener.config(self.binding)))
        return Config.read(told, self.clock.now, self.keys.identity())

    def seal(self, body: bytes = BODY, key: ClientKey | None = None, **more: object) -> Sealed:
        config = self.config()
        more = {"nonce": config.nonce, "now": self.clock.now, **more}
        sealer = Sealer(key or self.key, config)
        return sealer.seal("POST", "/v1/chat?x=1", body, TYPE, **more)  # type: ignore[arg-type]

    def open(self, sealed: Sealed, **more: object) -> Opened:
        request = {
            "method": "POST",
            "target": "/v1/chat?x=1",
            "headers": list(sealed.headers.items()),
            "body": sealed.body,
            "binding": self.binding,
            **more,
        }
        return self.opener.open(**request)  # type: ignore[arg-type]

    def refusal(self, sealed: Sealed, **more: object) -> tuple[int, str]:
        with pytest.raises(Refused) as caught:
            self.open(sealed, **more)
        assert str(caught.value) == "The request was refused."
        assert caught.value.__cause__ is None
        assert self.opener.refused[caught.value.code] > 0
        return caught.value.status, caught.value.code


@pytest.fixture(params=SUITES)
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Setup:
    return Setup(tmp_path / "hpke", request.param)


# --- what passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [BODY, b"x", bytes(1024 * 1024)], ids=["json", "byte", "megabyte"])
def test_a_request_and_its_answer(setup: Setup, body: bytes) -> None:
    sealed = setup.seal(body)
    assert sealed.headers["Content-Type"] == MEDIA_TYPE
    assert b"CANARY" not in sealed.body
    opened = setup.open(sealed)
    assert (opened.client.name, opened.body, opened.content_type) == ("laptop", body, TYPE)
    assert "CANARY" not in repr(opened)

    answer = opened.answer()
    received = sealed.answer.feed(answer.begin(200, "text/event-stream"))
    assert (received, sealed.answer.status, sealed.answer.content_type) == (b"", 200, "text/event-stream")
    for token in (b"data: a\n\n", b"data: b\n\n", bytes(200_000)):
        assert sealed.answer.feed(answer.chunk(token)) == token
    assert sealed.answer.feed(answer.end()) == b""
    sealed.answer.finish()


def test_a_request_without_a_body_is_bound_all_the_same(setup: Setup) -> None:
    sealed = setup.seal(b"")
    assert setup.open(sealed).body == b""
    assert setup.refusal(setup.seal(b""), target="/v1/other") == (401, "not-authentic")


def test_a_clear_body_is_bound_by_its_digest_and_needs_leave(setup: Setup) -> None:
    assert setup.refusal(setup.seal(clear=True)) == (401, "clear-body")
    setup.opener = setup.started(clear_bodies=True)
    assert setup.open(setup.seal(clear=True)).body == BODY
    assert setup.refusal(setup.seal(clear=True), body=BODY + b" ") == (401, "not-authentic")
    sealed = setup.seal(clear=True)
    headers = [(HEADER, sealed.headers[HEADER]), ("Content-Type", "text/plain")]
    assert setup.refusal(sealed, headers=headers) == (401, "not-authentic")


def test_nonces_of_answers_serve_the_next_request(setup: Setup) -> None:
    for _ in range(3):
        setup.open(setup.seal(nonce=setup.opener.nonce(setup.binding)))


# --- what does not ---------------------------------------------------------------------------------------------------


def test_altered_requests_are_refused(setup: Setup) -> None:
    assert setup.refusal(setup.seal(), method="PUT") == (401, "not-authentic")
    assert setup.refusal(setup.seal(), target="/v1/chat?x=2") == (401, "not-authentic")
    sealed = setup.seal()
    assert setup.refusal(sealed, body=sealed.body[:-1]) == (401, "not-authentic")
    assert setup.refusal(sealed, body=sealed.body + b"\0") == (401, "not-authentic")
    assert setup.refusal(sealed, body=b"") == (401, "not-authentic")
    # A failed attempt of somebody else does not use up the client's nonce.
    assert setup.open(sealed).body == BODY


def test_a_changed_time_is_refused(setup: Setup) -> None:
    sealed = setup.seal()
    header = sealed.headers[HEADER].replace("time=1800000000", "time=1800000001")
    assert setup.refusal(sealed, headers=[(HEADER, header), ("content-type", MEDIA_TYPE)]) == (401, "not-authentic")


@pytest.mark.parametrize("skew, fits", [(-61, False), (-60, True), (60, True), (61, False)])
def test_the_time_window(setup: Setup, skew: int, fits: bool) -> None:
    sealed = setup.seal(now=setup.clock.now + skew)
    if fits:
        setup.open(sealed)
    else:
        assert setup.refusal(sealed) == (401, "time")


def test_a_replay_is_refused_also_after_a_restart_and_on_another_connection(setup: Setup) -> None:
    sealed = setup.seal()
    setup.open(sealed)
    assert setup.refusal(sealed) == (401, "replay")
    fresh = setup.seal()
    assert setup.refusal(fresh, binding=new_binding()) == (401, "nonce")
    setup.opener = setup.started()
    assert setup.refusal(sealed) == (401, "nonce")
    assert setup.refusal(fresh) == (401, "nonce")


def test_an_old_nonce_is_refused_and_used_ones_are_forgotten(setup: Setup) -> None:
    nonce = setup.config().nonce
    used = setup.seal()
    setup.open(used)
    setup.clock.now += 60.5
    assert setup.refusal(setup.seal(nonce=nonce)) == (401, "nonce-old")
    assert setup.refusal(used) == (401, "time")
    setup.open(setup.seal())
    assert len(setup.opener._nonces._used) == 1


def test_a_full_memory_refuses_rather_than_forgets(setup: Setup) -> None:
    setup.opener = setup.started(capacity=2)
    setup.open(setup.seal())
    setup.open(setup.seal())
    assert setup.refusal(setup.seal()) == (401, "full")
    setup.clock.now += 61
    setup.open(setup.seal())


def test_another_key_is_refused(setup: Setup) -> None:
    stranger = ClientKey.new(setup.suite)
    assert setup.refusal(setup.seal(key=stranger)) == (401, "unknown-client")
    # A registered client cannot speak for another one, either.
    other = ClientKey.new(setup.suite)
    setup.registry.register("other", other.public)
    sealed = setup.seal(key=other)
    header = sealed.headers[HEADER].replace(other.public.id, setup.key.public.id)
    assert setup.refusal(sealed, headers=[(HEADER, header), ("Content-Type", MEDIA_TYPE)]) == (401, "not-authentic")


def test_another_routers_key_is_refused(setup: Setup, tmp_path: Path) -> None:
    other = RouterKeys(tmp_path / "other")
    other.ensure(setup.clock.now)
    config = setup.config()
    public = other.usable(setup.clock.now)[0].public
    wrong = Config(public, config.nonce, config.identity, config.suites, config.time)
    sealed = Sealer(setup.key, wrong).seal("POST", "/v1/chat?x=1", BODY, nonce=config.nonce, now=setup.clock.now)
    assert setup.refusal(sealed) == (401, "router-key")


def test_the_suite_cannot_be_exchanged(setup: Setup) -> None:
    sealed = setup.seal()
    other = next(name for name in SUITES if name != setup.suite)
    signature = "A" * 86 if other == "base+ed25519" else ""
    header = sealed.headers[HEADER].replace(f"suite={setup.suite}", f"suite={other}")
    header = header[: header.index(";sig=")] + f";sig={signature}"
    assert setup.refusal(sealed, headers=[(HEADER, header), ("Content-Type", MEDIA_TYPE)]) == (401, "suite")


def test_a_certificate_that_is_not_the_routers_gives_the_middleman_away(setup: Setup) -> None:
    from hashlib import sha256

    setup.opener = setup.started(certificates=lambda: {sha256(CERTIFICATE).digest()})
    setup.open(setup.seal(certificate=CERTIFICATE))
    assert setup.refusal(setup.seal(certificate=b"another")) == (401, "certificate")
    setup.open(setup.seal())


def test_a_revoked_client_is_refused_by_the_running_router(setup: Setup) -> None:
    setup.open(setup.seal())
    assert setup.opener.active(setup.client)
    Registry(setup.directory).revoke("laptop")
    assert setup.refusal(setup.seal()) == (401, "revoked")
    assert not setup.opener.active(setup.client)


def test_headers_that_are_not_exactly_one_of_ours(setup: Setup) -> None:
    sealed = setup.seal()
    ours, typed = (HEADER, sealed.headers[HEADER]), ("Content-Type", MEDIA_TYPE)
    assert setup.refusal(sealed, headers=[]) == (400, "malformed-missing")
    assert setup.refusal(sealed, headers=[ours, ours, typed]) == (400, "malformed-twice")
    assert setup.refusal(sealed, headers=[ours, typed, typed]) == (400, "malformed-twice")
    assert setup.refusal(sealed, headers=[ours]) == (400, "malformed-content-type")
    assert setup.refusal(sealed, headers=[ours, ("content-type", TYPE)]) == (400, "malformed-content-type")
    assert setup.refusal(sealed, target="/\udfff\ud800") == (400, "malformed-target")
    assert setup.refusal(sealed, body=bytes(2 * 1024 * 1024)) == (400, "malformed-large")
    assert setup.refusal(sealed, headers=[(ours[0], ours[1] + " "), typed]) == (400, "malformed-header")


def test_a_megabyte_of_nonsense_is_refused_at_once(setup: Setup) -> None:
    sealed = setup.seal()
    started = time.process_time()
    assert setup.refusal(sealed, body=os.urandom(1024 * 1024))[0] == 401
    for nonsense in ("\0" * 1_000_000, "v=1;" * 250_000, ";nonce=" + "A" * 1_000_000):
        assert setup.refusal(sealed, headers=[(HEADER, nonsense)]) == (400, "malformed-header")
    assert time.process_time() - started < 1


def test_truncation_at_every_byte(setup: Setup) -> None:
    sealed = setup.seal()
    header = sealed.headers[HEADER]
    for end in range(len(header)):
        cut = [(HEADER, header[:end]), ("Content-Type", MEDIA_TYPE)]
        assert setup.refusal(sealed, headers=cut)[0] in (400, 401)
    for end in range(len(sealed.body)):
        assert setup.refusal(sealed, body=sealed.body[:end]) == (401, "not-authentic")
    assert setup.open(sealed).body == BODY


def test_every_single_bit_of_the_header_counts(setup: Setup) -> None:
    sealed = setup.seal()
    raw = sealed.headers[HEADER].encode()
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        headers = [(HEADER, flipped.decode("latin-1")), ("Content-Type", MEDIA_TYPE)]
        assert setup.refusal(sealed, headers=headers)[0] in (400, 401)
    assert setup.open(sealed).body == BODY


def test_low_order_ephemeral_keys_are_refused(setup: Setup) -> None:
    sealed = setup.seal()
    header = sealed.headers[HEADER]
    at = header.index(";enc=") + 5
    for enc in ("A" * 43, "AQ" + "A" * 41):
        headers = [(HEADER, header[:at] + enc + header[at + 43 :]), ("Content-Type", MEDIA_TYPE)]
        assert setup.refusal(sealed, headers=headers) == (401, "not-authentic")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Setup, Sealed]]:
    setup = Setup(tmp_path_factory.mktemp("hpke"), "auth")
    yield setup, setup.seal()


@settings(max_examples=150, deadline=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.text(max_size=8),
    target=st.text(max_size=40),
    header=st.one_of(st.none(), st.text(max_size=700), st.binary(max_size=700).map(lambda raw: raw.decode("latin-1"))),
    content_type=st.one_of(st.just(MEDIA_TYPE), st.text(max_size=20)),
    body=st.binary(max_size=300),
    flips=st.lists(st.integers(0, 8 * (len(BODY) + 40)), max_size=4),
    binding=st.one_of(st.none(), st.binary(max_size=40)),
)
def test_nothing_but_a_refusal(
    attacked: tuple[Setup, Sealed],
    method: str,
    target: str,
    header: str | None,
    content_type: str,
    body: bytes,
    flips: list[int],
    binding: bytes | None,
) -> None:
    setup, sealed = attacked
    headers = [(HEADER, sealed.headers[HEADER] if header is None else header), ("Content-Type", content_type)]
    setup.refusal(sealed, method=method, target=target, headers=headers, body=body, binding=binding or b"")
    flipped = bytearray(sealed.body)
    for bit in set(flips):
        flipped[bit // 8 % len(flipped)] ^= 1 << bit % 8
    if bytes(flipped) != sealed.body:
        assert setup.refusal(sealed, body=bytes(flipped)) == (401, "not-authentic")


def test_refusals_are_told_seldom_but_counted(setup: Setup) -> None:
    sealed = setup.seal()
    for _ in range(50):
        setup.refusal(sealed, headers=[])
    assert setup.told == [("malformed-missing", 1)]
    setup.clock.now += 11
    setup.refusal(sealed, headers=[])
    assert setup.told[-1] == ("malformed-missing", 50)
    assert setup.opener.refused["malformed-missing"] == 51


# --- answers ---------------------------------------------------------------------------------------------------------


def answered(setup: Setup) -> tuple[AnswerSealer, AnswerOpener]:
    sealed = setup.seal()
    return setup.open(sealed).answer(), sealed.answer


def test_an_answer_that_is_cut_is_noticed_at_every_byte(setup: Setup) -> None:
    sealer, _ = answered(setup)
    whole = sealer.whole(200, TYPE, b"hello")
    sealed = setup.seal()
    opened = setup.open(sealed)
    whole = opened.answer().whole(200, TYPE, b"hello")
    for end in range(len(whole)):
        reader = AnswerOpener(sealed.answer._export, sealed.answer._enc)
        reader.feed(whole[:end])
        with pytest.raises(BadAnswer, match="cut off"):
            reader.finish()
    assert sealed.answer.feed(whole) == b"hello"
    sealed.answer.finish()


def test_an_answer_byte_by_byte(setup: Setup) -> None:
    sealer, reader = answered(setup)
    whole = sealer.begin(418, "text/plain") + sealer.chunk(b"one") + sealer.chunk(b"two") + sealer.end()
    assert b"".join(reader.feed(whole[at : at + 1]) for at in range(len(whole))) == b"onetwo"
    reader.finish()
    assert reader.status == 418


def test_an_altered_answer_is_refused(setup: Setup) -> None:
    sealer, reader = answered(setup)
    begin, one, two, end = sealer.begin(200, TYPE), sealer.chunk(b"one"), sealer.chunk(b"two"), sealer.end()
    altered = {
        "swapped": begin + two + one + end,
        "left out": begin + two + end,
        "twice": begin + one + one + two + end,
        "after the end": begin + one + two + end + end,
        "flipped": begin + one[:-1] + bytes([one[-1] ^ 1]) + two + end,
        "made the last": begin + bytes([one[0] | 0x80]) + one[1:],
        "huge": begin + b"\x7f\xff\xff\xff",
    }
    for name, wire in altered.items():
        again = AnswerOpener(reader._export, reader._enc)
        with pytest.raises(BadAnswer):
            again.feed(wire)
            again.finish()
            pytest.fail(name)


def test_an_answer_to_another_request_is_refused(setup: Setup) -> None:
    sealer, _ = answered(setup)
    _, reader = answered(setup)
    with pytest.raises(BadAnswer):
        reader.feed(sealer.whole(200, TYPE, b"hello"))


# --- the router's keys -----------------------------------------------------------------------------------------------


def test_rotation_overlaps_and_ends(setup: Setup) -> None:
    old = setup.seal()
    first = setup.keys.usable(setup.clock.now)[0]
    second = RouterKeys(setup.directory).rotate(30, setup.clock.now)  # another process
    assert [key.id for key in setup.keys.usable(setup.clock.now)] == [second.id, first.id]
    assert setup.config().key == second.public
    setup.open(old)
    late = Sealer(setup.key, Config(first.public, "", b"", tuple(SUITES), 0))
    setup.clock.now += 31
    sealed = late.seal("POST", "/v1/chat?x=1", BODY, nonce=setup.config().nonce, now=setup.clock.now)
    assert setup.refusal(sealed) == (401, "router-key")
    assert setup.keys.prune(setup.clock.now) == 1
    assert len(json.loads((setup.directory / "router-keys.json").read_text())["keys"]) == 1
    setup.open(setup.seal())


def test_rotation_keeps_the_identity_and_never_lengthens_a_keys_life(tmp_path: Path) -> None:
    keys = RouterKeys(tmp_path)
    keys.rotate(0, 1000)
    identity = keys.identity()
    keys.rotate(60, 1000)
    keys.rotate(600, 1000)
    assert [key.until for key in keys.usable(1000)] == [None, 1600, 1060]
    assert keys.identity() == identity
    keys.ensure(2000)
    assert len(keys.usable(1000)) == 3


def test_the_keys_file_is_private_and_its_damage_is_told_without_it(tmp_path: Path) -> None:
    keys = RouterKeys(tmp_path / "hpke")
    with pytest.raises(BulkheadError, match="router-keys rotate"):
        keys.usable(0)
    keys.ensure()
    path = tmp_path / "hpke" / "router-keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    text = path.read_text()
    assert json.loads(text)["identity"] not in repr(keys.usable(0))
    path.write_text(text[:-20])
    with pytest.raises(BulkheadError, match="damaged") as caught:
        keys.usable(0)
    assert caught.value.__cause__ is None
    path.write_text(text)
    path.chmod(0o640)
    with pytest.raises(BulkheadError, match="chmod 600"):
        RouterKeys(tmp_path / "hpke").usable(0)


def test_a_writer_that_is_killed_leaves_whole_files(tmp_path: Path) -> None:
    keys, registry = RouterKeys(tmp_path), Registry(tmp_path)
    keys.ensure()
    identity = keys.identity()
    for count in range(25):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    RouterKeys(tmp_path).rotate(1)
                    key = ClientKey.new("auth").public
                    Registry(tmp_path).register(f"c{key.id}", key)
                    Registry(tmp_path).revoke(key.id)
            finally:
                os._exit(1)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert keys.usable(time.time())
        assert keys.identity() == identity
        registry.clients()
        assert len(list(tmp_path.glob(".*.new"))) <= 1, count
    keys.rotate(0)
    assert list(tmp_path.glob(".*.new")) == []


@pytest.mark.parametrize("change", [{"time": 1}, {"nonce": "A" * 43}, {"keys": []}, {"suites": ["x"]}, {"version": 2}])
def test_an_altered_configuration_is_refused(setup: Setup, change: dict[str, object]) -> None:
    with pytest.raises(BulkheadError, match="not a configuration"):
        Config.read({**setup.opener.config(setup.binding), **change}, setup.clock.now)


@pytest.mark.parametrize("told", [None, [], {}, "x", {"keys": [[]]}, {"nonce": 1, "identity": 2}])
def test_any_json_as_configuration(told: object) -> None:
    with pytest.raises(BulkheadError, match="not a configuration"):
        Config.read(told, 0)


def test_identity_and_clock_are_checked(setup: Setup) -> None:
    told = setup.opener.config(setup.binding)
    with pytest.raises(BulkheadError, match="identity"):
        Config.read(told, setup.clock.now, bytes(32))
    with pytest.raises(BulkheadError, match="clock"):
        Config.read(told, setup.clock.now + 90)


# --- clients and their keys ------------------------------------------------------------------------------------------


def test_who_is_registered(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "hpke")
    assert registry.clients() == []
    key = ClientKey.new("auth")
    assert registry.changes() == []
    client = registry.register("laptop", key.public, 5)
    assert [c.name for c in registry.changes()] == ["laptop"]
    assert Registry(tmp_path / "hpke").clients() == [client]
    with pytest.raises(BulkheadError, match="belongs to laptop"):
        registry.register("again", key.public)
    with pytest.raises(BulkheadError, match="a client laptop already"):
        registry.register("laptop", ClientKey.new("auth").public)
    with pytest.raises(BulkheadError, match="no name"):
        registry.register("../x", ClientKey.new("auth").public)
    assert not registry.revoke("laptop", 6).active
    assert registry.revoke(client.id, 7).revoked_at == 6
    assert [c.active for c in registry.changes()] == [False]
    with pytest.raises(BulkheadError, match="does not come back"):
        registry.register("laptop", key.public)
    registry.register("laptop", ClientKey.new("base+ed25519").public, 8)
    assert [c.active for c in registry.clients()] == [False, True]
    with pytest.raises(BulkheadError, match="no client nobody"):
        registry.revoke("nobody")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"name": 1}', "\0"])
def test_a_damaged_client_file_lets_nobody_in(setup: Setup, text: str) -> None:
    (setup.directory / "clients" / f"{setup.client.id}.json").write_text(text)
    assert setup.refusal(setup.seal()) == (401, "unknown-client")
    with pytest.raises(BulkheadError, match="not a client's file"):
        setup.registry.clients()


def test_a_file_under_another_clients_id_lets_nobody_in(setup: Setup) -> None:
    stranger = ClientKey.new(setup.suite)
    path = setup.directory / "clients" / f"{setup.client.id}.json"
    path.rename(path.with_name(f"{stranger.public.id}.json"))
    assert setup.registry.get(stranger.public.id) is None


def test_keys_as_text(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(setup.key.reveal())
    assert ClientKey.load(path) == setup.key
    assert PublicKey.parse(str(setup.key.public)) == setup.key.public
    assert setup.key.reveal().split()[-1] not in repr(setup.key)
    path.chmod(0o644)
    with pytest.raises(BulkheadError, match="chmod 600"):
        ClientKey.load(path)
    for text in ("", "x", setup.key.reveal(), str(setup.key.public)[:-1], "bulkhead-hpke-public other " + "A" * 43):
        with pytest.raises(BulkheadError, match="not a key") as caught:
            PublicKey.parse(text)
        assert setup.key.reveal().split()[-1] not in str(caught.value)
    with pytest.raises(BulkheadError, match="no point"):
        PublicKey.parse("bulkhead-hpke-public auth " + "A" * 43)
