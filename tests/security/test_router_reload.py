"""The router is reloaded, stopped, killed, and given new certificates, under load."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from controller.security.router import Limits, Target
from tests.security.routerstand import (
    INFERENCE,
    MANY,
    Behind,
    Stand,
    ask,
    free_port,
    process,
    run,
    until,
)

CANARY = "xylophone-7431"


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


# - reload


def steady(stand: Stand, stop: threading.Event, found: list[object], per_s: float, name: str | None = None) -> None:
    """Ask all the time, on connections that are kept and made anew as the router wants it."""
    made = stand.client(name=name)
    asked = 0
    while not stop.is_set():
        began = time.monotonic()
        try:
            status, body = ask(made, "POST" if asked % 2 else "GET", body=b"x" if asked % 2 else None)
            found.append(status if body == b"hello" else "wrong body")
            if asked % 20 == 19:
                made.close()
        except Exception as exc:
            found.append(repr(exc))
            made = stand.client(name=name)
        asked += 1
        time.sleep(max(0.0, 1 / per_s - (time.monotonic() - began)))


def under_load(stand: Stand, what: Any, *, name: str | None = None, per_s: float = 200, count: int = 8) -> list[object]:
    """Do something while requests come steadily; how each of them went."""
    stop, found = threading.Event(), []  # type: ignore[var-annotated]
    threads = [threading.Thread(target=steady, args=(stand, stop, found, per_s / count, name)) for _ in range(count)]
    for each in threads:
        each.start()
    began = time.monotonic()
    try:
        what()
    finally:
        stop.set()
        for each in threads:
            each.join()
    print(f"{len(found)} requests, {len(found) / (time.monotonic() - began):.0f} a second")
    return found


def test_a_reload_drops_nothing(stand: Stand) -> None:
    Behind(stand.socket)
    with stand.router(limits=MANY, workers=2) as router:

        def reload() -> None:
            for number in range(3):
                time.sleep(0.4)
                stand.write(limits=Limits(per_client_per_s=1e6, concurrency=1000 + number))
                router.send_signal(signal.SIGHUP)
                until(lambda n=number: sum(e["kind"] == "state_applied" for e in stand.events()) == n + 1)
            time.sleep(0.4)

        found = under_load(stand, reload)
        assert len(found) > 150 and set(found) == {200}, {str(each) for each in found}
        (stand.directory / "router.json").write_text(stand.settings.to_json().replace("inference.sock", "other.sock"))


def test_settings_that_cannot_be_used_change_nothing(stand: Stand) -> None:
    Behind(stand.socket)
    with stand.router(limits=MANY) as router:
        stand.write(name="nobody")
        router.send_signal(signal.SIGHUP)
        until(lambda: stand.events()[-1]["kind"] == "state_rejected")
        assert ask(stand.client())[0] == 200


def test_a_worker_that_is_killed_is_started_again(stand: Stand) -> None:
    Behind(stand.socket)
    with stand.router(limits=MANY) as router:
        worker = int(run("pgrep", "-P", str(router.pid)).stdout.split()[0])
        os.kill(worker, signal.SIGKILL)
        assert ask(stand.client())[0] == 200  # it has waited in the socket's queue
        until(lambda: [event["kind"] for event in stand.events()][-2:] == ["service_down", "service_up"])
        worker = int(run("pgrep", "-P", str(router.pid)).stdout.split()[0])
        router.kill()
        until(
            lambda: not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes(), 5
        )


def test_a_stop_lets_answers_end(stand: Stand) -> None:
    behind = Behind(stand.socket)
    behind.parts = [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", b"there"]
    with stand.router(limits=MANY) as router, stand.connected() as made:
        made.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        behind.gate.release()
        assert made.recv(4096).endswith(b"hello")
        router.terminate()
        time.sleep(0.3)
        with pytest.raises(OSError):
            stand.connected()
        behind.gate.release()
        assert made.recv(4096) == b"there"
        assert router.wait(5) == 0


def test_renewal_and_a_new_ca_under_load(stand: Stand) -> None:
    """Both sides renew, the CA is replaced, and no request that should pass fails; a revoked client is refused."""
    stand.pki.issue("inf1", "peer", ["127.0.0.1"])
    for name in ("alice", "mallory"):
        stand.pki.issue(name, "client")
    given = {
        "name": "inf1",
        "address": "127.0.0.1",
        "port": (port := free_port()),
        "pki": str(stand.directory / "pki"),
        "routers": ["router1"],
    }
    target = Target("inf1", address="127.0.0.1", port=port)
    with (
        process(INFERENCE, json.dumps(given), log=stand.log),
        stand.router(limits=MANY, targets=(target,), client_certificates=True),
    ):

        def renew() -> None:
            time.sleep(0.5)
            for name in ("router1", "inf1", "alice"):
                stand.pki.renew(name)
                time.sleep(0.4)
            for phase in ("prepare", "switch", "finish"):
                stand.pki.rotate_ca(phase, settle_s=0.5)
                time.sleep(0.7)
            time.sleep(0.5)

        found = under_load_of_chat(stand, renew, "alice")
        assert set(found) == {200}, {str(each) for each in found}
        mallory = stand.client(name="mallory")
        assert ask(mallory, target="/health")[0] == 200
        stand.pki.revoke("mallory")
        began = time.monotonic()
        found = under_load_of_chat(stand, lambda: until(lambda: _refused(stand, mallory), 5), "alice")
        assert time.monotonic() - began < 5
        assert set(found) == {200}, {str(each) for each in found}


def _refused(stand: Stand, made: Any) -> bool:
    try:
        ask(made, target="/health")
    except OSError:
        try:
            ask(stand.client(name="mallory"), target="/health")
        except OSError:
            return True
    except Exception:
        return False
    return False


def under_load_of_chat(stand: Stand, what: Any, name: str) -> list[object]:
    """As `under_load`, of the real inference server's /health."""
    stop, found = threading.Event(), []  # type: ignore[var-annotated]

    def one() -> None:
        made = stand.client(name=name)
        count = 0
        while not stop.is_set():
            began = time.monotonic()
            try:
                status, _ = ask(made, target="/health")
                found.append(status)
                count += 1
                if count % 20 == 0:
                    made.close()
                    made = stand.client(name=name)  # its certificate as it is now
            except Exception as exc:
                found.append(repr(exc))
                made = stand.client(name=name)
            time.sleep(max(0.0, 0.04 - (time.monotonic() - began)))

    threads = [threading.Thread(target=one) for _ in range(8)]
    began = time.monotonic()
    for each in threads:
        each.start()
    try:
        what()
    finally:
        stop.set()
        for each in threads:
            each.join()
    print(f"{len(found)} requests, {len(found) / (time.monotonic() - began):.0f} a second")
    return found
