"""Incidents: seals hold, survive kills, and open only with their id; the way back stops and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from controller.problems import BulkheadError
from controller.security.incident import Collection, Recovery, Seal, Seals, Step, Target, seals
from controller.security.pki.disk import Disk, locked
from lab.ovs import Namespace

ROOT = Path(__file__).parents[2]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")


@root_only
@pytest.mark.parametrize("case", ["killed_at_every_step", "evidence", "packets"])
def test_seals(case: str, tmp_path: Path) -> None:
    # wireguard-go's sockets are found by name wherever they are: these are in a directory that nobody else sees.
    inside = f"mkdir -p /var/run/wireguard && mount -t tmpfs none /var/run/wireguard && exec {sys.executable} -m tests.security.sealstand {case}"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", inside],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_start_of_the_host_s_firewall_does_not_undo_a_seal_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "20261125T170828-9b291e82"
    made.mkdir()
    new = Seal(made.name, "begun", "test", "now", (Target("server", "inf1", ("10.0.0.2/32",)),))
    loaded: list[str] = []

    def call(*_words: str, text: str) -> str:
        loaded.append(text)
        return ""

    monkeypatch.setattr(seals, "_call", call)
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path):
            other = pool.submit(Seals(tmp_path).enforce)
            time.sleep(0.2)
            (made / "seal.json").write_text(json.dumps(asdict(new)))
        other.result(5)
    assert "10.0.0.2" in loaded[-1]


@root_only
def test_a_seal_that_cannot_be_read_keeps_no_other_from_being_enforced(tmp_path: Path) -> None:
    good, bad = tmp_path / "seals/20261125T170828-9b291e82", tmp_path / "seals/20261125T170829-9b291e82"
    for each in (good, bad):
        each.mkdir(parents=True)
    new = Seal(good.name, "sealed", "test", "now", (Target("server", "inf1", ("10.0.0.2/32",)),))
    (good / "seal.json").write_text(json.dumps(asdict(new)))
    (bad / "seal.json").write_text("{")
    with closing(Namespace()) as space:
        enforce = space.command(sys.executable, "-c", "from controller.cli import main; main()", "incident", "enforce")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "BULKHEAD_SECURITY_DIR": str(tmp_path)}
        for broken in ((bad,), (good, bad)):  # at the start of the host; later on a cut that is there stays
            for each in broken:
                (each / "seal.json").write_text("{")
            done = subprocess.run(enforce, env=environment, capture_output=True, text=True)
            assert done.returncode == 2 and "is damaged" in done.stderr and "Traceback" not in done.stderr
            assert "10.0.0.2" in space.run("nft", "list", "table", "inet", "bulkhead_seal")


def test_a_seal_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    for what in (Seals(tmp_path / "none").unseal, lambda name: Seals(tmp_path / "none").resume(name, Collection(()))):
        with pytest.raises(BulkheadError, match="there is no seal x"):
            what("x")
    assert not (tmp_path / "none").exists()


def _steps(log: Path, healed: Path) -> tuple[Step, ...]:
    def note(name: str) -> None:
        with log.open("a") as file:
            file.write(f"{name}\n")

    return (
        Step("first", "", lambda: "", lambda: note("first")),
        Step("people", "rebuild it", lambda: ""),
        Step("checked", "", lambda: "" if healed.exists() else "not healed", lambda: note("checked")),
        Step("last", "", lambda: "", lambda: note("last")),
    )


def test_recovery_stops_for_people_and_for_checks_and_goes_on_where_it_was(tmp_path: Path) -> None:
    log, healed = tmp_path / "log", tmp_path / "healed"
    walk = Recovery(tmp_path, _steps(log, healed))
    assert [(s.name, bool(why)) for s, why in walk.walk()] == [("first", False), ("people", True)]
    assert [s.name for s, _ in walk.walk()] == ["people"]
    told = [(s.name, why) for s, why in walk.walk(frozenset({"people"}))]
    assert told == [("people", ""), ("checked", "not healed")]
    healed.touch()
    assert [s.name for s, _ in walk.walk(stop_after="checked")] == ["checked"]
    assert [s.name for s, _ in walk.walk()] == ["last"]
    assert [s.name for s, _ in walk.walk()] == []
    assert log.read_text().split() == ["first", "checked", "checked", "last"]
    with pytest.raises(BulkheadError, match="no step"):
        list(walk.walk(frozenset({"peple"})))


def test_recovery_killed_at_every_step_goes_on_in_order(tmp_path: Path) -> None:
    at = 0
    while True:
        at += 1
        place = tmp_path / str(at)
        place.mkdir()
        log, healed = place / "log", place / "healed"
        healed.touch()
        child = os.fork()
        if child == 0:
            count = 0

            def step(_what: str, at: int = at) -> None:
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            list(Recovery(place, _steps(log, healed), Disk(step)).walk(frozenset({"people"})))
            os._exit(0)
        _, code = os.waitpid(child, 0)
        list(Recovery(place, _steps(log, healed)).walk(frozenset({"people"})))
        done = Recovery(place, _steps(log, healed)).done()
        assert list(done) == ["first", "people", "checked", "last"], at
        assert list(dict.fromkeys(log.read_text().split())) == ["first", "checked", "last"], at
        if not os.WIFSIGNALED(code):
            break
    assert at > 4
