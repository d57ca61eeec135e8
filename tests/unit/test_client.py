"""The API's client: what it says where there is no answer or a no, what it repeats, and whom it tells a token."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.client import Api, ApiProblem, NoApi, Where, read_token
from controller.problems import BulkheadError
from tests.fakes.api import Answer, Asked, FakeApi, problem

TOKEN = "bh_0123456789_secretsecretsecret"


def ok(_: Asked) -> Answer:
    return 200, {"containers": []}


def where(directory: Path) -> Where:
    return Where(directory / "api.sock")


def refusal(directory: Path, answer: Answer) -> Exception:
    """What a question ends with that is answered so."""
    with (
        FakeApi(directory, lambda _: answer),
        Api(where(directory)) as api,
        pytest.raises((ApiProblem, NoApi)) as caught,
    ):
        api.get("/api/containers")
    return caught.value


def test_it_sends_parameters_that_are_given_and_reads_json(tmp_path: Path) -> None:
    with FakeApi(tmp_path, ok) as fake, Api(where(tmp_path)) as api:
        assert api.get("/api/containers", network="privacy", node=None) == {"containers": []}
        assert (fake.asked[0].path, fake.asked[0].query) == ("/api/containers", "network=privacy")
        assert "authorization" not in fake.asked[0].headers
        assert "idempotency-key" not in fake.asked[0].headers


def test_no_socket_says_what_to_start(tmp_path: Path) -> None:
    with Api(where(tmp_path)) as api, pytest.raises(NoApi, match=r"api\.sock.*bulkhead up FILE") as caught:
        api.get("/api/containers")
    assert "Errno" not in str(caught.value)


def test_a_dead_socket_says_what_to_start(tmp_path: Path) -> None:
    with FakeApi(tmp_path, ok):
        pass
    with Api(where(tmp_path)) as api, pytest.raises(NoApi, match="Connection refused"):
        api.get("/api/containers")


def test_a_problem_keeps_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    fault = {"field": "name", "found": "'a_b'", "expected": "letters, digits and -", "fix": "Write a-b"}
    found = refusal(tmp_path, problem(422, "invalid", "The name is none.", fault))
    assert str(found) == "The name is none.\n  name: found 'a_b'; expected letters, digits and -. Write a-b"
    assert isinstance(found, ApiProblem) and found.code == "invalid" and found.is_answer


@pytest.mark.parametrize("status, answers", [(404, True), (409, True), (401, False), (403, False), (500, False)])
def test_which_statuses_answer_the_question(tmp_path: Path, status: int, answers: bool) -> None:
    found = refusal(tmp_path, problem(status, "x", "No."))
    assert isinstance(found, ApiProblem) and found.is_answer is answers


def test_what_is_not_the_api_is_said_to_be_something_else(tmp_path: Path) -> None:
    assert "not the API of Bulkhead" in str(refusal(tmp_path, (200, b"<html>")))


def test_text_of_the_api_cannot_move_the_cursor(tmp_path: Path) -> None:
    assert str(refusal(tmp_path, problem(409, "x", "bad\x1b[2Jname"))) == "bad\\x1b[2Jname"


def test_a_change_whose_connection_broke_is_sent_again_with_the_same_key(tmp_path: Path) -> None:
    answers = iter([None, None, (201, {"id": "103"})])
    with FakeApi(tmp_path, lambda _: next(answers)) as fake, Api(where(tmp_path)) as api:
        assert api.post("/api/containers/create", {"name": "web"}) == {"id": "103"}
    keys = {asked.headers["idempotency-key"] for asked in fake.asked}
    assert len(fake.asked) == 3 and len(keys) == 1


def test_the_key_of_the_caller_is_used(tmp_path: Path) -> None:
    with FakeApi(tmp_path, ok) as fake, Api(where(tmp_path)) as api:
        api.post("/api/containers/create", {}, key="mine")
        api.delete("/api/containers/103", key="mine too")
    assert [asked.headers["idempotency-key"] for asked in fake.asked] == ["mine", "mine too"]


def test_it_waits_while_the_same_request_is_carried_out(tmp_path: Path) -> None:
    answers = iter([problem(409, "in-progress", "Wait."), (201, {"id": "103"})])
    with FakeApi(tmp_path, lambda _: next(answers)), Api(where(tmp_path)) as api:
        assert api.post("/api/containers/create", {}) == {"id": "103"}


def test_it_waits_as_long_as_the_api_says_where_it_asked_too_often(tmp_path: Path) -> None:
    answers = iter([problem(429, "too-many-requests", "Slowly."), (200, {})])
    with FakeApi(tmp_path, lambda _: next(answers), headers={"retry-after": "1"}), Api(where(tmp_path)) as api:
        began = time.monotonic()
        api.get("/api/containers")
        assert time.monotonic() - began >= 1


def test_no_answer_in_time_tells_how_to_repeat_it_safely(tmp_path: Path) -> None:
    def slow(_: Asked) -> Answer:
        time.sleep(0.5)
        return 200, {}

    with FakeApi(tmp_path, slow), Api(where(tmp_path)) as api, pytest.raises(NoApi, match="--idempotency-key k1"):
        api.post("/api/containers/create", {}, key="k1", answer_s=0.1)


# -------------------------------------------------------------------------------------------------- elsewhere, by TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("tls")
    key, pem = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", key, "-out", pem, "-subj", "/CN=bulkhead", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return key, pem


@pytest.fixture
def remote(tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[FakeApi]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    with FakeApi(tmp_path, ok, tls=context) as fake:
        yield fake


def fingerprint(pem: Path) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.read_text())).hexdigest()


def test_a_certificate_is_checked_and_a_token_told_only_then(remote: FakeApi, certificate: tuple[Path, Path]) -> None:
    strange = Where(Path("/"), remote.url, token=TOKEN)
    with Api(strange) as api, pytest.raises(NoApi, match=r"not trusted.*--ca FILE.*--fingerprint"):
        api.get("/api/containers")
    assert remote.asked == []
    with Api(Where(Path("/"), remote.url, ca=certificate[1], token=TOKEN)) as api:
        api.get("/api/containers")
    assert remote.asked[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_a_pinned_certificate_is_enough_and_another_is_refused(remote: FakeApi, certificate: tuple[Path, Path]) -> None:
    right = ":".join(fingerprint(certificate[1])[at : at + 2] for at in range(0, 64, 2)).upper()
    with Api(Where(Path("/"), remote.url, fingerprint=right, token=TOKEN)) as api:
        assert api.get("/api/containers") == {"containers": []}
    remote.asked.clear()
    with pytest.raises(BulkheadError, match="Nothing was sent"):
        Api(Where(Path("/"), remote.url, fingerprint="0" * 64, token=TOKEN))
    assert remote.asked == []


@pytest.mark.parametrize(
    "url, said",
    [
        ("http://192.0.2.1:9573", "https://"),
        ("https://user:password@192.0.2.1", "expected https://HOST:PORT"),
        ("192.0.2.1:9573", "expected https://HOST:PORT"),
    ],
)
def test_addresses_that_would_tell_the_token_are_refused(url: str, said: str) -> None:
    with pytest.raises(BulkheadError, match=said):
        Where(Path("/"), url, token=TOKEN)


def test_a_token_is_in_no_repr_and_a_strange_one_is_refused_unsaid() -> None:
    assert TOKEN not in repr(Where(Path("/"), token=TOKEN))
    with pytest.raises(BulkheadError) as caught:
        Where(Path("/"), token="secret\nX-Header: 1")
    assert "secret" not in str(caught.value)


def test_a_token_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o644)
    with pytest.raises(BulkheadError, match="chmod 600") as caught:
        read_token(file)
    assert TOKEN not in str(caught.value)
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    with pytest.raises(BulkheadError, match="No such file"):
        read_token(tmp_path / "none")


def test_the_token_of_the_environment_is_used_where_no_file_is_named() -> None:
    assert read_token(None, {"BULKHEAD_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) == ""
