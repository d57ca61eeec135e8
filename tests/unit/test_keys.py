"""Secrets in files: who may read them, what is made of them, and that they never show."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import pickle
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.agent.keys import KeyStore, read_key
from controller.agent.resource import Failed
from controller.wgkeys import Secret, clamped, is_key, new_private_key, new_shared_key

KEY = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="


def test_a_secret_shows_nothing() -> None:
    secret = Secret(KEY)
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret!r:>90}", "%s" % secret, repr([secret])):  # noqa: UP031
        assert KEY[:8] not in shown
    with pytest.raises(TypeError):
        json.dumps(secret)
    assert secret.reveal() == KEY and secret == Secret(KEY) and secret != Secret(KEY[::-1])
    assert pickle.loads(pickle.dumps(secret)) == secret


@given(st.binary(min_size=32, max_size=32))
def test_32_bytes_in_base64_are_a_key(raw: bytes) -> None:
    assert is_key(base64.b64encode(raw).decode()) == (raw != bytes(32))


@given(st.text(alphabet="ABcd09+/= \n", max_size=48))
def test_nothing_else_is(text: str) -> None:
    try:
        good = base64.b64encode(base64.b64decode(text, validate=True)).decode() == text and len(text) == 44
        good = good and len(base64.b64decode(text)) == 32 and any(base64.b64decode(text))
    except ValueError:
        good = False
    assert is_key(text) == good


def test_keys_are_as_wireguard_wants_them() -> None:
    made = [new_private_key() for _ in range(50)]
    assert all(clamped(key) == key and is_key(key.reveal()) for key in made)
    assert len({key.reveal() for key in made} | {new_shared_key().reveal() for _ in range(50)}) == 100


@given(st.binary(min_size=32, max_size=32))
def test_clamping_keeps_the_public_half(raw: bytes) -> None:
    key = Secret(base64.b64encode(raw).decode())
    once = clamped(key)
    assert clamped(once) == once and is_key(once.reveal())


def test_a_clamped_key_is_the_same_key() -> None:
    key = Secret(base64.b64encode(b"\xff" * 32).decode())
    assert clamped(key) != key
    halves = {
        subprocess.run(["wg", "pubkey"], input=one.reveal(), capture_output=True, text=True, check=True).stdout
        for one in (key, clamped(key))
    }
    assert len(halves) == 1


def private(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def test_a_key_file(tmp_path: Path) -> None:
    assert read_key(private(tmp_path / "a", f"{KEY}\n"), "the key").reveal() == KEY
    assert read_key(private(tmp_path / "b", KEY, 0o400), "the key").reveal() == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o610, 0o777])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / "key", KEY, mode)
    with pytest.raises(Failed, match=f"chmod 600 {path}"):
        read_key(path, "the key")


@pytest.mark.parametrize("text", ["", KEY[:-1], f"{KEY}{KEY}", b"\xff\xfe", f"PrivateKey = {KEY}", "A" * 43 + "="])
def test_a_damaged_file_is_refused_without_its_text(tmp_path: Path, text: str | bytes) -> None:
    path = private(tmp_path / "key", text)
    with pytest.raises(Failed) as caught:
        read_key(path, "the key")
    assert str(path) in str(caught.value) and KEY[:16] not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("directory", "pipe", "missing", "missing/further"):
        with pytest.raises(Failed, match=name):
            read_key(tmp_path / name, "the key")
    with pytest.raises(Failed, match="is not a text file"):
        (tmp_path / "large").touch(mode=0o600)
        os.truncate(tmp_path / "large", 1 << 30)
        read_key(tmp_path / "large", "the key")


def test_a_kept_key_is_private_and_stays(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = KeyStore(tmp_path / "keys")
        key = store.private_key("wg0")
    finally:
        os.umask(before)
    assert store.private_key("wg0") == key == KeyStore(tmp_path / "keys").private_key("wg0")
    assert store.private_key("wg1") != key
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert {(p.name, p.stat().st_mode & 0o777) for p in (tmp_path / "keys").iterdir()} == {
        ("wg0.key", 0o600),
        ("wg1.key", 0o600),
    }


def test_a_damaged_kept_key_is_not_replaced(tmp_path: Path) -> None:
    KeyStore(tmp_path).private_key("wg0")
    (tmp_path / "wg0.key").write_text("")
    with pytest.raises(Failed, match=r"wg0\.key"):
        KeyStore(tmp_path).private_key("wg0")


def _ask(directory: Path) -> list[str]:
    return [KeyStore(directory).private_key(f"wg{n}").reveal() for n in range(100)]


def test_all_who_ask_at_once_get_the_same_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        answers = pool.map(_ask, [tmp_path] * 4)
    assert all(answer == answers[0] for answer in answers)
    assert len(list(tmp_path.iterdir())) == 100
