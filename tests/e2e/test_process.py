"""Programs that outlive whoever starts them: real processes, in process ids of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from controller.agent import process
from controller.agent.process import Kept, Process, Program, Programs
from controller.agent.reconciler import Phase, Reconciler

from .apart import apart

SLEEP = ("sleep", "600")


def running(*command: str) -> list[int]:
    """Ids of the processes with that command line."""
    wanted = "\0".join(command).encode() + b"\0"
    out = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == wanted:
                out.append(int(path.parent.name))
        except OSError:
            continue
    return out


async def until(good: Callable[[], object], limit_s: float = 5) -> float:
    began = time.monotonic()
    while not good():
        assert time.monotonic() - began < limit_s, "it takes too long"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def started(programs: Programs, *command: str, name: str = "one") -> int:
    programs.start(Program(name, command))
    await programs.appear(name)
    record = programs.record(name)
    assert record is not None
    await begun(record.pid, name)
    return record.pid


async def begun(pid: int, name: str = "one") -> None:
    """Wait until the process that has a record has become the program."""
    await until(lambda: f"{name}.json".encode() not in Path(f"/proc/{pid}/cmdline").read_bytes())


def starter(directory: Path, *command: str, env: dict[str, str] | None = None, then: str = "") -> None:
    """An agent that starts a program and is killed that very moment."""
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from controller.agent.process import Program, Programs
        Programs(Path(sys.argv[1])).start(Program("one", tuple(sys.argv[2:])))
        {then}
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(directory), *command],
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


@apart
async def test_the_next_one_finds_what_was_started(directory: Path) -> None:
    pid = await started(Programs(directory), *SLEEP)
    later = Programs(directory)
    record = later.record("one")
    assert record is not None and record.pid == pid
    assert running(*SLEEP) == [pid]
    later.start(Program("one", SLEEP))
    assert await Process(later, Program("one", SLEEP)).diff() == []
    assert running(*SLEEP) == [pid]
    await later.stop("one")
    assert running(*SLEEP) == [] and later.record("one") is None and later.names() == []
    assert list(directory.iterdir()) == []
    await later.stop("one")


@apart
async def test_none_is_lost_or_started_twice_when_its_starter_is_killed(directory: Path) -> None:
    for _ in range(10):
        starter(directory, *SLEEP)
        later = Programs(directory)
        later.start(Program("one", SLEEP))
        await later.appear("one")
        await asyncio.sleep(0.05)
        record = later.record("one")
        assert record is not None
        await begun(record.pid)
        assert running(*SLEEP) == [record.pid]
        await later.stop("one")
        assert running(*SLEEP) == []


@apart
async def test_killed_between_fork_and_record(directory: Path) -> None:
    slow = directory / "slow"
    slow.mkdir()
    (slow / "cut").write_text('#!/bin/sh\nsleep 0.5\nexec /usr/bin/cut "$@"\n')
    (slow / "cut").chmod(0o755)
    programs = directory / "programs"
    starter(programs, *SLEEP, env={"PATH": f"{slow}:{os.environ['PATH']}"})
    later = Programs(programs)
    assert later.record("one") is None
    later.start(Program("one", SLEEP))  # somebody is at it already
    await until(lambda: later.record("one"))
    record = later.record("one")
    assert record is not None
    await begun(record.pid)
    assert running(*SLEEP) == [record.pid]
    await asyncio.sleep(0.6)
    assert running(*SLEEP) == [record.pid] and later.record("one") == record
    # Killed itself before it has a record: the lock goes with it.
    await later.stop("one")
    starter(programs, *SLEEP, env={"PATH": f"{slow}:{os.environ['PATH']}"})
    for launching in _launching(programs):
        os.kill(launching, signal.SIGKILL)
    await asyncio.sleep(0.6)
    pid = await started(later, *SLEEP)
    assert running(*SLEEP) == [pid]


def _launching(directory: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if str(directory / "one.json").encode() in path.read_bytes():
            found.append(int(path.parent.name))
    return found


@apart
async def test_a_reused_process_id_is_not_ours(directory: Path) -> None:
    programs = Programs(directory)
    pid = await started(programs, *SLEEP)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: programs.record("one") is None and not Path(f"/proc/{pid}").exists())
    await asyncio.sleep(0.02)  # start times are told in hundredths of a second
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    stranger = subprocess.Popen(["sleep", "700"], start_new_session=True)
    assert stranger.pid == pid
    assert programs.record("one") is None
    await programs.stop("one")
    assert stranger.poll() is None
    assert await started(programs, *SLEEP) != pid
    assert stranger.poll() is None
    stranger.kill()


@apart
async def test_records_that_cannot_be_read(directory: Path) -> None:
    programs = Programs(directory)
    for text in ("", "{", "[]", "7", "null", '{"pid": "x"}', '{"pid": -1, "started": 1, "digest": ""}', "\0\udcff"):
        (directory / "one.json").write_bytes(text.encode(errors="surrogateescape"))
        assert programs.record("one") is None
        await programs.stop("one")
    (directory / "one.json").write_text(json.dumps({"pid": 1, "started": 0, "digest": ""}))
    assert programs.record("one") is None
    await programs.stop("one")


@apart
async def test_a_process_with_any_name_is_found(directory: Path) -> None:
    rename = "import ctypes, time; ctypes.CDLL(None).prctl(15, b') Z 1 \\xff\\xc3', 0, 0, 0); print(flush=True); time.sleep(600)"
    programs = Programs(directory)
    pid = await started(programs, sys.executable, "-c", rename)
    await until(lambda: programs.log("one").stat().st_size)
    record = programs.record("one")
    assert record is not None and record.pid == pid
    await programs.stop("one")
    assert not Path(f"/proc/{pid}").exists()


@apart
async def test_stopped_kindly_then_by_force(directory: Path) -> None:
    process.STOP_S = 0.3
    programs = Programs(directory)
    told = directory / "told"
    await started(programs, "sh", "-c", f'trap "echo ended > {told}; exit" TERM; while :; do sleep 0.02; done')
    await asyncio.sleep(0.2)
    await programs.stop("one")
    assert told.read_text() == "ended\n"
    pid = await started(programs, "sh", "-c", 'trap "" TERM; while :; do sleep 0.02; done')
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await programs.stop("one")
    assert 0.3 <= time.monotonic() - began < 1
    assert not Path(f"/proc/{pid}").exists()
    pid = await started(programs, *SLEEP)
    os.kill(pid, signal.SIGSTOP)
    await programs.stop("one")
    assert running(*SLEEP) == []


@apart
async def test_children_end_with_their_program(directory: Path) -> None:
    programs = Programs(directory)
    shell = ("sh", "-c", "sleep 611 & sleep 612 & wait")
    pid = await started(programs, *shell)
    await until(lambda: running("sleep", "611") and running("sleep", "612"))
    await programs.stop("one")
    await until(lambda: not running("sleep", "611") and not running("sleep", "612"), 1)
    # A program that was killed leaves nothing that the next one could meet.
    pid = await started(programs, *shell)
    await until(lambda: running("sleep", "611") and running("sleep", "612"))
    before = running("sleep", "611")
    os.kill(pid, signal.SIGKILL)
    await until(lambda: programs.record("one") is None)
    await started(programs, *shell)
    await until(lambda: len(running("sleep", "611")) == 1 and running("sleep", "611") != before)
    await programs.stop("one")


@apart
async def test_what_is_run_otherwise_is_started_anew(directory: Path) -> None:
    programs = Programs(directory)
    old = await started(programs, *SLEEP)
    reconciler = Reconciler()
    reconciler.want([Process(programs, Program("one", ("sleep", "601")))])
    await reconciler.once()
    assert reconciler.settled
    record = programs.record("one")
    assert record is not None and record.pid != old
    await begun(record.pid)
    assert not running(*SLEEP) and running("sleep", "601") == [record.pid]
    kept = Kept(programs, Program("one", ("sleep", "602"), env={"A": "b"}))
    assert not await kept.runs()
    await kept.start()
    assert await kept.runs() and not running("sleep", "601")
    await kept.stop()
    assert not running("sleep", "602")


@apart
async def test_started_again_but_not_all_the_time(directory: Path) -> None:
    programs, steps, troubles = Programs(directory), [], []
    reconciler = Reconciler(lambda done: steps.append(done.change), lambda _key, why: troubles.append(why))
    command = f"echo x >> {directory}/count; echo the reason; exit 3"
    program = Program("one", ("sh", "-c", command))
    reconciler.want([Process(programs, program)])
    stop = asyncio.Event()
    task = asyncio.ensure_future(reconciler.run(stop))
    await asyncio.sleep(3)
    assert (directory / "count").read_text().count("x") == process.OFTEN
    assert "ends again and again; it says: the reason" in troubles[-1] and str(programs.log("one")) in troubles[-1]
    assert len(troubles) <= 3
    status = reconciler.status["process/one"]
    assert status.phase is Phase.ERROR
    stop.set()
    await task


@apart
async def test_one_kill_is_healed_at_once(directory: Path) -> None:
    programs = Programs(directory)
    reconciler, stop = Reconciler(), asyncio.Event()
    reconciler.want([Process(programs, Program("one", SLEEP))])
    task = asyncio.ensure_future(reconciler.run(stop))
    await until(lambda: reconciler.settled)
    os.kill(running(*SLEEP)[0], signal.SIGKILL)
    await until(lambda: not running(*SLEEP))
    took = await until(lambda: running(*SLEEP) and reconciler.settled, 2)
    print(f"started again after {took:.2f} s")
    stop.set()
    await task


@apart
async def test_logs_are_private_and_bounded(directory: Path) -> None:
    before = os.umask(0)
    programs = Programs(directory / "programs")
    await started(programs, "sh", "-c", "umask; while :; do printf '%01000d\\n' 7; sleep 0.001; done")
    os.umask(before)
    log = programs.log("one")
    await until(lambda: log.stat().st_size > 20_000)
    assert log.read_text().startswith("0022\n")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (directory / "programs").iterdir()}
    assert modes == {"one.json": 0o600, "one.log": 0o600}
    assert (directory / "programs").stat().st_mode & 0o777 == 0o700
    process.LOG_BYTES = 10_000
    programs.bound_logs()
    assert log.stat().st_size < 10_000
    await until(lambda: log.stat().st_size > 3_000)  # it goes on where the log begins anew
    assert "\0" not in log.read_text()
    await programs.stop("one")
    # Whoever starts bounds as well.
    log.write_bytes(b"x" * 20_000)
    await started(programs, "sh", "-c", "echo said; exec sleep 600")
    await until(lambda: log.read_text() == "said\n")
    await programs.stop("one")


@apart
async def test_last_words(directory: Path) -> None:
    programs = Programs(directory)
    assert programs.last_words("one") == "nothing"
    log = programs.log("one")
    for text, said in (
        (b"", "nothing"),
        (b"a\nb\n \n\n", "b"),
        (b"\xff\xfebroken\n", "\ufffd\ufffdbroken"),
        (b"\x1b[31mred\x1b[0m\x07", "[31mred [0m"),
        (b"y" * 5_000_000, "y" * 200),
    ):
        log.write_bytes(text)
        assert programs.last_words("one") == said


@apart
async def test_what_is_not_there_is_said(directory: Path) -> None:
    programs = Programs(directory)
    reconciler, stop = Reconciler(), asyncio.Event()
    reconciler.want([Process(programs, Program("one", ("no-such-program",)))])
    task = asyncio.ensure_future(reconciler.run(stop))
    await until(lambda: "no-such-program" in reconciler.status["process/one"].why)
    assert "ends again and again" in reconciler.status["process/one"].why
    stop.set()
    await task


@apart
async def test_it_keeps_nothing_of_its_starter(directory: Path) -> None:
    """No open file, no terminal, no directory: it would keep a file system busy, or a lock held."""
    programs = Programs(directory)
    kept = os.open(directory, os.O_RDONLY)
    pid = await started(programs, *SLEEP)
    await until(lambda: running(*SLEEP))
    files = {path.name: os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert files == {"0": "/dev/null", "1": str(programs.log("one")), "2": str(programs.log("one"))}
    assert os.readlink(f"/proc/{pid}/cwd") == "/" and os.getsid(pid) == pid
    os.close(kept)
