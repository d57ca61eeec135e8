"""The router and TLS: versions, and certificates that are refused on both sides."""

from __future__ import annotations

import json
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from controller.security.router import Target
from tests.security.routerstand import (
    INFERENCE,
    MANY,
    Behind,
    Stand,
    ask,
    process,
    run,
    server_tls,
    until,
)

CANARY = "xylophone-7431"


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


# - TLS


def test_tls_as_curl_and_openssl_see_it(stand: Stand) -> None:
    Behind(stand.socket)
    ca = str(stand.directory / "pki/ca.pem")
    url, place = f"https://localhost:{stand.port}/", f"127.0.0.1:{stand.port}"
    stand.pki.issue("other", "server", [], ["other.example"])
    with stand.router(limits=MANY):
        good = run("curl", "-sS", "--tlsv1.3", "--cacert", ca, url)
        assert (good.returncode, good.stdout) == (0, "hello"), good.stderr
        for version in ("1.0", "1.1", "1.2"):
            old = run("curl", "-sS", f"--tlsv{version}", "--tls-max", version, "--cacert", ca, url)
            assert old.returncode == 35, (version, old.stderr)
        assert run("curl", "-sS", url).returncode == 60  # an unknown CA
        wrong = run(
            "curl",
            "-sS",
            "--cacert",
            ca,
            "--resolve",
            f"llm.wrong:{stand.port}:127.0.0.1",
            url.replace("localhost", "llm.wrong"),
        )
        assert wrong.returncode == 60 and "llm.wrong" in wrong.stderr
        new = run(
            "openssl", "s_client", "-connect", place, "-CAfile", ca, "-verify_return_error", "-servername", "localhost"
        )
        assert new.returncode == 0 and "TLSv1.3" in new.stdout, new.stdout
        for flag in ("-tls1_2", "-tls1_1", "-tls1"):
            old = run("openssl", "s_client", "-connect", place, "-CAfile", ca, flag, "-cipher", "ALL:@SECLEVEL=0")
            assert old.returncode != 0, flag


def test_clients_with_bad_certificates_are_refused(stand: Stand, tmp_path: Path) -> None:
    behind = Behind(stand.socket)
    elsewhere = Stand(tmp_path / "elsewhere") if (tmp_path / "elsewhere").mkdir() is None else stand
    stand.pki.issue("good", "client")
    stand.pki.issue("gone", "client")
    stand.pki.revoke("gone")
    stand.pki.issue("server-only", "server")
    stand.pki.issue("short", "client", days=1.2 / 86400)
    elsewhere.pki.issue("good", "client")
    ca = str(stand.directory / "pki/ca.pem")

    def curl(directory: Path | None, name: str = "") -> int:
        pair = directory / "pki/current" / name if directory is not None else None
        shown = ["--cert", str(pair / "cert.pem"), "--key", str(pair / "key.pem")] if pair is not None else []
        return run("curl", "-sS", "--cacert", ca, *shown, f"https://localhost:{stand.port}/").returncode

    with stand.router(limits=MANY, client_certificates=True):
        time.sleep(1.3)
        assert curl(stand.directory, "good") == 0
        before = len(behind.got)
        assert curl(None) != 0
        assert curl(tmp_path / "elsewhere", "good") != 0
        assert curl(stand.directory, "short") != 0
        assert curl(stand.directory, "gone") != 0
        assert curl(stand.directory, "server-only") != 0
        assert len(behind.got) == before


def test_a_revoked_client_is_cut_off_within_five_seconds(stand: Stand) -> None:
    Behind(stand.socket)
    stand.pki.issue("mallory", "client")
    with stand.router(limits=MANY, client_certificates=True):
        made = stand.client(name="mallory")
        assert ask(made)[0] == 200
        stand.pki.revoke("mallory")
        until(lambda: made.sock is None or made.sock.recv(1) == b"", 5)


def test_servers_with_bad_certificates_are_refused(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Stand(tmp_path / "elsewhere")
    elsewhere.pki.issue("inf-foreign", "peer")
    for name in ("inf-good", "inf-gone", "inf-other"):
        stand.pki.issue(name, "peer")
    stand.pki.issue("inf-short", "peer", days=1.2 / 86400)
    stand.pki.issue("inf-client", "client")
    shown = {
        "inf-good": server_tls(stand.directory, "inf-good"),
        "inf-foreign": server_tls(tmp_path / "elsewhere", "inf-foreign"),
        "inf-gone": server_tls(stand.directory, "inf-gone"),
        "inf-misnamed": server_tls(stand.directory, "inf-other"),
        "inf-short": server_tls(stand.directory, "inf-short"),
        "inf-client": server_tls(stand.directory, "inf-client"),
    }
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.load_cert_chain(*(stand.directory / "pki/current/inf-good" / each for each in ("cert.pem", "key.pem")))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    stand.pki.revoke("inf-gone")
    behind = {name: Behind(tls=tls) for name, tls in shown.items()}
    targets = [Target(name, address="127.0.0.1", port=each.port) for name, each in behind.items()]
    behind["inf-good "] = Behind(tls=old)
    targets.append(Target("inf-good", address="127.0.0.1", port=behind["inf-good "].port))
    time.sleep(1.3)
    for target, (name, each) in zip(targets, behind.items(), strict=True):
        with stand.router(limits=MANY, targets=(target,)):
            status, _ = ask(stand.client())
            assert status == (200 if name == "inf-good" else 503), name
            assert bool(each.got) == (name == "inf-good"), name


def test_an_inference_server_answers_its_router_alone(stand: Stand) -> None:
    stand.pki.issue("inf1", "peer", ["127.0.0.1"])
    stand.pki.issue("inf2", "peer")
    given = {
        "name": "inf1",
        "address": "127.0.0.1",
        "port": stand.port,
        "pki": str(stand.directory / "pki"),
        "routers": ["router1"],
    }
    with process(INFERENCE, json.dumps(given), log=stand.log):
        ca = ("--cacert", str(stand.directory / "pki/ca.pem"))

        def curl(name: str) -> subprocess.CompletedProcess[str]:
            pair = stand.directory / "pki/current" / name
            shown = ("--cert", str(pair / "cert.pem"), "--key", str(pair / "key.pem"))
            return run("curl", "-sS", *ca, *shown, f"https://127.0.0.1:{stand.port}/health")

        assert json.loads(curl("router1").stdout)["status"] == "up"
        assert json.loads(curl("inf2").stdout)["status"] == 403
        stand.pki.revoke("router1")
        until(lambda: curl("router1").returncode != 0, 5)
