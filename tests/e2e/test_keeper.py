"""Processes of `bulkhead up`: in order, each as whom it should, again when they end; and the ground for the API."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.agent import keeper
from controller.agent.ground import Ground, explain
from controller.agent.identity import NUMBER, Identity, identity
from controller.agent.keeper import Keeper, Kept
from controller.agent.resource import Failed

API = Identity("61573", NUMBER, NUMBER)
OTHER = Identity("61600", 61600, 61600)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def script(log: Path, name: str, then: str = "while :; do sleep 0.05; done") -> tuple[str, ...]:
    told = f"trap 'echo {name} stops >> {log}; exit 0' TERM; trap 'echo {name} reads >> {log}' HUP\n"
    return ("sh", "-c", f"{told}echo {name} starts >> {log}\n{then}")


def keeping(kept: list[Kept], during: str = "", told: list[str] | None = None) -> None:
    """Run them, do something meanwhile, and stop."""
    pid = os.getpid()

    def meanwhile() -> None:
        subprocess.run(["sh", "-ec", during.format(pid=pid)], check=False)
        os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=meanwhile)
    thread.start()
    Keeper(kept, (told if told is not None else []).append).run()
    thread.join()


def test_they_start_in_order_and_stop_in_reverse(tmp_path: Path) -> None:
    log, ready = tmp_path / "log", tmp_path / "ready"
    first = Kept(
        "one",
        script(log, "one", f"sleep 0.3; touch {ready}; while :; do sleep 0.05; done"),
        ready=ready,
        reads_again=False,
    )
    kept = [first, Kept("two", script(log, "two")), Kept("three", script(log, "three"))]
    keeping(kept, "sleep 1.2; kill -HUP {pid}; sleep 0.5")
    lines = log.read_text().splitlines()
    assert lines[0] == "one starts" and {*lines[1:3]} == {"two starts", "three starts"}
    assert {*lines[3:5]} == {"two reads", "three reads"}
    assert lines[5:] == ["three stops", "two stops", "one stops"]


def test_what_ends_is_started_again_after_pauses_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "FIRST_PAUSE_S", 0.1)
    log, told = tmp_path / "log", list[str]()
    keeping([Kept("bad", script(log, "bad", "exit 3")), Kept("good", script(log, "good"))], "sleep 2", told)
    starts = log.read_text().splitlines().count("bad starts")
    assert 4 <= starts <= 5  # at 0, 0.1, 0.3, 0.7 and 1.5 s
    assert told[0].startswith("the bad has ended with exit code 3; starting it again in 0.1 s")
    assert log.read_text().splitlines().count("good starts") == 1


def test_one_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "STOP_S", 0.3)
    began = time.monotonic()
    keeping([Kept("deaf", ("sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"))], "sleep 0.3")
    assert time.monotonic() - began < 2


def test_it_runs_as_whom_it_should_without_any_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    out = tmp_path / "status"
    script = f"grep -e Uid -e Gid -e Groups -e CapPrm -e CapEff -e NoNewPrivs /proc/self/status > {out}; exec sleep 60"
    keeping([Kept("api", ("sh", "-c", script), user=Identity("61573", NUMBER, NUMBER, (4242,)))], "sleep 0.5")
    found = dict(line.split(":") for line in out.read_text().splitlines())
    assert found["Uid"].split() == found["Gid"].split() == [str(NUMBER)] * 4
    assert found["Groups"].split() == ["4242"] and found["NoNewPrivs"].strip() == "1"
    assert int(found["CapPrm"], 16) == int(found["CapEff"], 16) == 0


def test_it_ends_with_whoever_keeps_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tmp_path.chmod(0o777)
    code = (
        "from pathlib import Path\nfrom controller.agent.keeper import *\nfrom controller.agent.identity import *\n"
        f"command = ('sh', '-c', 'echo $$ >> {log}; exec sleep 60')\n"
        f"Keeper([Kept('a', command, user=Identity('x', {NUMBER}, {NUMBER})), Kept('b', command)], print).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while not log.exists() or len(log.read_text().split()) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.3)
    for pid in map(int, log.read_text().split()):
        path = Path(f"/proc/{pid}/stat")
        assert not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


def mode(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


def test_the_ground_is_no_wider_than_needed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    run, state, events = tmp_path / "run", tmp_path / "state", tmp_path / "events"
    ground = Ground(run, state, (state / "events", events))
    state.mkdir(mode=0o700)
    (state / "events").mkdir()
    (state / "events" / "events-1.jsonl").write_text("x")
    (state / "events" / "events-1.jsonl").chmod(0o640)
    (state / "keys").mkdir(mode=0o700)
    (state / "keys" / "a.key").write_text("secret")
    for _ in range(2):
        ground.prepare(API)
        assert mode(run) == (0o1775, 0, NUMBER) and mode(state) == (0o710, 0, NUMBER)
        assert mode(state / "api") == (0o700, NUMBER, NUMBER)
        assert mode(events) == mode(state / "events") == (0o2750, 0, NUMBER)
    file = tmp_path / "node.yaml"
    file.write_text("x")
    assert ground.missing(API, (file, state / "events" / "events-1.jsonl")) is None
    (events / "later").write_text("x")
    assert mode(events / "later")[2] == NUMBER  # what the controller writes from now on
    for secret in (state / "keys" / "a.key", state / "keys"):
        assert ground.missing(API, (secret,)) == secret
    (state / "api" / "mine").write_text("x")
    ground.prepare(OTHER)
    assert mode(state / "api" / "mine")[1] == OTHER.uid
    file.chmod(0o600)
    assert ground.missing(OTHER, (file,)) == file
    assert f"chgrp 61600 {file}; chmod g+r {file}" in explain(file, OTHER)
    tmp_path.chmod(0o700)
    assert f"run: chmod o+x {tmp_path};" in explain(file, OTHER)


def test_who_it_is() -> None:
    assert identity("61573").uid == NUMBER
    assert identity().uid not in (0, 65534)
    with pytest.raises(Failed, match="useradd"):
        identity("no-such-user")
    for name in ("root", "0"):
        with pytest.raises(Failed):
            identity(name)
