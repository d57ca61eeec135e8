"""Starts the lab, finds it again, runs commands in it, takes it down.

A lab is one process tree in namespaces of its own; its first process holds a lock on a file in the run directory for as
long as any of it lives, so "is it up" and "is somebody else starting one" are the same question and a stale process id
is never trusted. Standard library only, but for `describe`, which is imported when a lab is started.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from lab import places

DEFAULT_DIR = Path("/run/bulkhead/lab")
START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
LOCK_LIMIT_S = 0.3
TAIL_LINES = 15
SYSTEM_PYTHON = "/usr/bin/python3"

_LOCK, _STATE, _DESCRIPTION, _LOG = "lock", "lab.json", "description.json", "lab.log"
_OURS = (
    *(_STATE, "lab.json.new", _DESCRIPTION, _LOG, "controller.log", "ovs", "controller", "events"),
    *("keys", "nodes", "logs"),
)
"""What is in a run directory; nothing else in it is ever removed."""

_PROGRAMS = {
    "ovs-vswitchd": "openvswitch-switch",
    "ovsdb-server": "openvswitch-common",
    "ovs-vsctl": "openvswitch-switch",
    "ovs-ofctl": "openvswitch-common",
    "ip": "iproute2",
    "ethtool": "ethtool",
    "nft": "nftables",
    "mount": "mount",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
_MININET_PROGRAMS = {"mnexec": "mininet", SYSTEM_PYTHON: "python3"}
_NODE_PROGRAMS = {
    "curl": "curl",
    "wireguard-go": "wireguard-go",
    "wg": "wireguard-tools",
    "dnsmasq": "dnsmasq-base",
    "microsocks": "microsocks",
    "socat": "socat",
}
"""What each lab runs, and the Debian package it is in; both run `_PROGRAMS`."""


class LabError(Exception):
    """The lab cannot do that; the text says why and what to do. `code` is the exit code it deserves."""

    code = 2


class NotUp(LabError):
    """There is no lab in that run directory."""


class AlreadyUp(LabError):
    """There is a lab in that run directory, or somebody is just starting one."""

    code = 1


class UnknownHost(LabError):
    """No host of the lab has that name."""

    code = 1


class InvalidState(LabError):
    """The state file was refused."""

    code = 1


@dataclass(frozen=True, slots=True)
class LabHost:
    """A namespace of the lab. `pid` is a process id inside the lab; on a whole node, `netns` is the name of the network
    namespace there, and `env` what commands need to find what is the node's."""

    name: str
    aliases: tuple[str, ...]
    kind: str
    network: str
    port: str
    address: str
    pid: int
    node: str = ""
    netns: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """What is known about a lab that is up. `alive` says which of its processes still run."""

    run_dir: Path
    node: str
    state_file: str
    pid: int
    hosts: tuple[LabHost, ...]
    bridges: tuple[str, ...]
    ovsdb: str
    controller_run_dir: Path
    events: Path
    alive: dict[str, bool] = field(default_factory=dict)

    @property
    def has_nodes(self) -> bool:
        """Whether it is a lab of whole nodes."""
        return any(host.kind == "node" for host in self.hosts)


def default_dir() -> Path:
    """The run directory where none is given."""
    return Path(os.environ.get("BULKHEAD_LAB_DIR") or DEFAULT_DIR)


# -- up ---------------------------------------------------------------------------------------------------------------


def up(
    state_file: Path,
    run_dir: Path,
    *,
    progress: Callable[[str], None] = lambda _line: None,
    limit_s: float = START_LIMIT_S,
    controller: bool = True,
    nodes: bool = False,
) -> Status:
    """Start a lab and wait until it forwards what it should. `progress` is told each step.

    With `nodes` it is whole nodes and the world around them, otherwise one node's bridges in Mininet; there, without
    `controller`, nobody gives the bridges flows, and nothing passes. Raises `LabError`.
    """
    require_root()
    require_programs(nodes)
    description = _describe(state_file)
    run_dir = run_dir.resolve()
    _check_paths(run_dir, _node_dir(state_file) if nodes else "")
    with _locked(run_dir) as lock:
        _sweep(run_dir)
        if nodes:
            # -P: the directory of the program is no place to import from.
            program, more = [sys.executable, "-P", str(places.WORLD)], []
        else:
            (run_dir / _DESCRIPTION).write_text(description)
            for name in ("controller", "events"):
                (run_dir / name).mkdir()
            command = _controller_command(state_file, run_dir) if controller else []
            program, more = [SYSTEM_PYTHON, str(places.lab_program())], _mininet(run_dir, command)
        reader = _launch(run_dir, state_file, lock, program, more, limit_s)
    # From here on the lab holds the lock itself, through the descriptor it was given.
    try:
        deadline = time.monotonic() + limit_s
        _await_ready(reader, run_dir, progress, deadline)
        if controller and not nodes:
            _await_steady(run_dir, deadline)
        return status(run_dir)
    except BaseException:
        _abort(run_dir)
        raise
    finally:
        reader.close()


def require_root() -> None:
    """Raises `LabError` for anybody else: namespaces and bridges are root's."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces, which only root may; run it with sudo")


def require_programs(nodes: bool = False) -> None:
    """Raises `LabError` naming the packages to install, if a program of that kind of lab is missing."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
    programs = _PROGRAMS | (_NODE_PROGRAMS if nodes else _MININET_PROGRAMS)
    missing = {package for program, package in programs.items() if shutil.which(program, path=path) is None}
    if not (missing or nodes) and not list(Path("/usr/lib/python3/dist-packages").glob("mininet/net.py")):
        missing = {"mininet"}
    if missing:
        packages = " ".join(sorted(missing))
        raise LabError(f"the lab needs packages that are not installed; run: apt-get install {packages}")


def _describe(state_file: Path) -> str:
    # Imported late: it takes with it all that reads state files, which `exec` and `status` can do without.
    from controller.problems import InvalidInput
    from controller.statefile import load
    from lab.describe import describe

    if not state_file.is_file():
        raise LabError(f"there is no state file {state_file}")
    try:
        return describe(load(state_file).state, state_file.name.split(".")[0]).as_json()
    except InvalidInput as exc:
        raise InvalidState(str(exc)) from exc


def _node_dir(state_file: Path) -> str:
    from lab.nodes import node_name

    return f"nodes/{node_name(state_file)}"


def _check_paths(run_dir: Path, node_dir: str) -> None:
    # The longest socket of the lab; a Unix socket's address has 107 characters.
    socket = run_dir / node_dir / "ovs" / "mesh-privacy-123.mgmt"
    if len(str(socket)) > 107:
        raise LabError(f"{run_dir} is too long a name for a directory with sockets in it; choose a shorter one")
    if run_dir.exists() and not run_dir.is_dir():
        raise LabError(f"{run_dir} is not a directory")
    if run_dir.is_dir() and not (run_dir / _LOCK).exists() and any(run_dir.iterdir()):
        raise LabError(f"{run_dir} has files in it that are not a lab's; choose an empty directory")


def _controller_command(state_file: Path, run_dir: Path) -> list[str]:
    return [
        "env",
        # The controller is a package beside this one; where that is, this process knows.
        f"PYTHONPATH={places.OVS_LIBRARY.parent.parent}",
        sys.executable,
        "-c",
        "from controller.cli import main; main()",
        "controller",
        str(state_file.resolve()),
        "--listen",
        "tcp:127.0.0.1:6653",
        "--run-dir",
        str(run_dir / "controller"),
        "--events",
        str(run_dir / "events"),
        "--ovsdb",
        f"unix:{run_dir}/ovs/db.sock",
    ]


def _mininet(run_dir: Path, controller: Sequence[str]) -> list[str]:
    """What the lab in Mininet is told besides; `controller` stands at the end."""
    return ["--description", str(run_dir / _DESCRIPTION), "--ovs-library", str(places.OVS_LIBRARY), "--", *controller]


def _launch(
    run_dir: Path, state_file: Path, lock: int, program: Sequence[str], more: Sequence[str], limit_s: float
) -> BinaryIO:
    """Start the lab in its namespaces, as nobody's child; answers the pipe it reports on."""
    read_end, write_end = os.pipe()
    # `setsid --fork` ends at once, so that the lab is not left for us, or for whoever imports us, to wait for.
    arguments = [
        "setsid", "--fork",
        "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child",
        *program,
        "--state-file", str(state_file.resolve()),
        "--run-dir", str(run_dir),
        "--lock-fd", str(lock),
        "--progress-fd", str(write_end),
        "--limit-s", str(0.9 * limit_s),  # it knows best what it waits for, and says so while we still listen
        *more,
    ]  # fmt: skip
    try:
        with (run_dir / _LOG).open("wb") as log:
            subprocess.run(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                pass_fds=(lock, write_end),
                check=True,
            )
    finally:
        os.close(write_end)
    return os.fdopen(read_end, "rb", buffering=0)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OVS_", "PYTHON"))}
    kept["PATH"] = f"{kept.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/usr/bin:/sbin:/bin"
    kept["PYTHONUNBUFFERED"] = "1"
    kept["PYTHONPATH"] = str(places.OVS_LIBRARY.parent.parent)
    return kept


def _await_ready(reader: BinaryIO, run_dir: Path, progress: Callable[[str], None], deadline: float) -> None:
    buffered = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            raise LabError(f"the lab did not come up in time\n{_tail(run_dir)}")
        chunk = reader.read(4096)
        if not chunk:
            raise LabError(f"the lab ended while it was starting\n{_tail(run_dir)}")
        *lines, buffered = (buffered + chunk).split(b"\n")
        for line in map(bytes.decode, lines):
            if line == "ready":
                return
            if line.startswith("failed: "):
                raise LabError(f"the lab did not come up: {line.removeprefix('failed: ')}\n{_tail(run_dir)}")
            progress(line)


def _await_steady(run_dir: Path, deadline: float) -> None:
    """Until the controller itself says that every bridge is as declared. It usually is by now."""
    from controller.asking import ask
    from controller.problems import BulkheadError

    late = "the controller does not answer"
    while time.monotonic() < deadline:
        with contextlib.suppress(BulkheadError):
            bridges = ask(run_dir / "controller", {"ask": "status"})["bridges"]
            late = ", ".join(b["name"] for b in bridges if b["phase"] != "steady" or b["missing_ports"])
            if not late:
                return
        time.sleep(0.02)
    raise LabError(f"the bridges are not as declared in time: {late}\n{_tail(run_dir)}")


def _tail(run_dir: Path) -> str:
    """The last lines of the logs."""
    found = []
    for name in (_LOG, "controller.log"):
        with contextlib.suppress(OSError):
            lines = (run_dir / name).read_text(errors="replace").splitlines()[-TAIL_LINES:]
            found += [f"  {name}: {line}" for line in lines if line.strip()]
    return "\n".join(found) or f"  nothing in the logs of {run_dir}"


def _abort(run_dir: Path) -> None:
    """End a lab that is not up yet, whatever it is doing."""
    deadline = time.monotonic() + STOP_LIMIT_S
    while is_up(run_dir) and time.monotonic() < deadline:
        _signal(run_dir, signal.SIGKILL)
        time.sleep(0.01)


# -- the lock ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[int]:
    """The lock's descriptor, ours. Raises `AlreadyUp` while somebody holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / _LOCK
    deadline = time.monotonic() + LOCK_LIMIT_S  # whoever only looks whether it is locked has it for a moment
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except (BlockingIOError, FileNotFoundError):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise AlreadyUp(f"a lab is already up, or just starting, in {run_dir}; {_hint(run_dir)}") from None
        os.close(descriptor)
        time.sleep(0.01)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _hint(run_dir: Path) -> str:
    return f"end it with: bulkhead lab down{'' if run_dir == default_dir() else f' --run-dir {run_dir}'}"


def is_up(run_dir: Path) -> bool:
    """Whether any process of a lab lives, be it just starting."""
    try:
        descriptor = os.open(run_dir / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _wait_unlocked(run_dir: Path, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while is_up(run_dir):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _signal(run_dir: Path, signum: signal.Signals) -> None:
    """Signal the lab's first process, found by the lock that it has open.

    SIGKILL is also for what has not become it yet; anything milder would make that kill the lab in turn.
    """
    with contextlib.suppress(FileNotFoundError):
        wanted = os.stat(run_dir / _LOCK)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or not _has_open(entry, wanted):
                continue
            if _inner_pid(entry) == 1 or (signum == signal.SIGKILL and _is_launcher(entry)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(entry.name), signum)


def _is_launcher(process: Path) -> bool:
    with contextlib.suppress(OSError):
        return (process / "comm").read_text().strip() in ("setsid", "unshare")
    return False


def _inner_pid(process: Path) -> int | None:
    with contextlib.suppress(OSError):
        for line in (process / "status").read_text().splitlines():
            if line.startswith("NSpid:") and len(line.split()) > 2:
                return int(line.split()[-1])
    return None


def _has_open(process: Path, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(descriptor.stat(), wanted):
                    return True
    return False


# -- status, exec, down -----------------------------------------------------------------------------------------------


def status(run_dir: Path) -> Status:
    """What is up in `run_dir`. Raises `NotUp`."""
    run_dir = run_dir.resolve()
    if not is_up(run_dir):
        raise NotUp(f"no lab is up in {run_dir}; start one with: bulkhead lab up")
    try:
        found: dict[str, Any] = json.loads((run_dir / _STATE).read_text())
    except FileNotFoundError:
        raise NotUp(f"the lab in {run_dir} is still starting; try again in a moment") from None
    return Status(
        run_dir=run_dir,
        node=found["node"],
        state_file=found["state_file"],
        pid=found["pid"],
        hosts=tuple(LabHost(**{**host, "aliases": tuple(host["aliases"])}) for host in found["hosts"]),
        bridges=tuple(found["bridges"]),
        ovsdb=found["ovs"]["db"],
        controller_run_dir=Path(found["controller"]["run_dir"]),
        events=Path(found["controller"]["events"]),
        alive=found["alive"],
    )


def find_host(lab: Status, name: str) -> LabHost | None:
    """The host of that name, alias or unmistakable beginning of a name; None is the node itself. Raises `UnknownHost`."""
    wanted = name.replace("_", "-")
    if wanted == "host":
        wanted = name = lab.node
    if wanted == lab.node and not lab.has_nodes:
        return None
    for host in lab.hosts:
        if host.name == name:
            return host
    found = [host for host in lab.hosts if name in host.aliases or wanted in host.aliases]
    if not found:
        found = [h for h in lab.hosts if any(n.startswith(wanted) for n in (h.name, *h.aliases) if not n[0].isdigit())]
    if len(found) == 1 and wanted:
        return found[0]
    names = ", ".join(["host", *(host.name for host in lab.hosts)])
    what = "could be several" if len(found) > 1 and wanted else "there is no such host"
    raise UnknownHost(f"{name}: {what}; the lab has: {names}")


def command_in(lab: Status, host: LabHost | None, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` in a host, or in the node's own namespace."""
    # By way of process 1: the ids of all others mean something only inside.
    line = ["nsenter", f"--target={lab.pid}", "--net", "--mount", "--pid", "--"]
    if host is not None:
        line += ["nsenter", f"--target={host.pid}", "--net", "--mount", "--"]
        if host.env:
            line += ["env", *(f"{name}={value}" for name, value in host.env.items())]
        if host.netns:
            line += ["ip", "netns", "exec", host.netns]
    return [*line, *command]


def exec(run_dir: Path, node: str | None, container: str | None, command: Sequence[str]) -> int:
    """Run a command in a container of the lab's node, or on the node itself; answers its exit code.

    Standard input, output and error are the caller's own. Raises `LabError`.
    """
    lab = status(run_dir)
    require_root()
    nodes = [each.name for each in lab.hosts if each.kind == "node"] or [lab.node]
    if node is not None and node not in nodes:
        raise UnknownHost(f"{node}: there is no such node; the lab has: {', '.join(nodes)}")
    host = find_host(_only(lab, node), container) if container is not None else None
    directory = os.getcwd()
    here = [] if directory.startswith(("/run", "/proc", "/sys")) else ["env", f"--chdir={directory}"]
    inside = dict(os.environ, OVS_RUNDIR=str(lab.run_dir / "ovs"))
    process = subprocess.Popen(command_in(lab, host, [*here, *command]), env=inside)
    # Ctrl-C is for the command; it reaches it from the terminal, and we only wait.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _only(lab: Status, node: str | None) -> Status:
    """The lab as one of its nodes sees it."""
    if node is None or not any(host.node for host in lab.hosts):
        return lab
    return replace(lab, node=node, hosts=tuple(host for host in lab.hosts if host.node == node))


def spawn(lab: Status, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in a host, with pipes or whatever `options` of `Popen` say. It ends with the lab at the latest."""
    return subprocess.Popen(command_in(lab, find_host(lab, name), command), text=True, **options)


def output(lab: Status, name: str, command: Sequence[str], stdin: str = "") -> str:
    """What a command in a host prints, told `stdin`. Raises `LabError` with what it said where it fails."""
    line = command_in(lab, find_host(lab, name), command)
    env = {**os.environ, "PYTHONPATH": str(places.OVS_LIBRARY.parent.parent)}
    done = subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=60, env=env, check=False)
    if done.returncode:
        raise LabError(f"{name}: {command[0]} ended with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def down(run_dir: Path, *, limit_s: float = STOP_LIMIT_S) -> bool:
    """End the lab and remove its files. Answers whether there was one. Raises `LabError` if it will not end."""
    require_root()
    run_dir = run_dir.resolve()
    if not (run_dir / _LOCK).exists():
        return False
    was_up = is_up(run_dir)
    if was_up:
        _end(run_dir, limit_s)
    with _locked(run_dir):
        _sweep(run_dir)
        # Ours, and nobody else can hold it now: whoever has it open finds out that it is gone, or makes a new one.
        with contextlib.suppress(OSError):
            (run_dir / _LOCK).unlink()
            run_dir.rmdir()
    return was_up


def _end(run_dir: Path, limit_s: float) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        _signal(run_dir, signum)
        if _wait_unlocked(run_dir, limit_s):
            return
    raise LabError(f"the lab in {run_dir} does not end; look for processes that have {run_dir / _LOCK} open")


def _sweep(run_dir: Path) -> None:
    """Remove what a lab that is gone has left."""
    for name in _OURS:
        path = run_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
