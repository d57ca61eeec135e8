"""An Open vSwitch of one's own, in a network namespace of one's own.

Nothing outside the namespace and the given directory is touched: own run directory, own database, own processes, ended
by process id. Needs root. Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
OFCTL = ("ovs-ofctl", "-O", "OpenFlow14")


class LabError(Exception):
    """Something of the lab did not come up; the text has the command and what it printed."""


def run(*command: str, env: dict[str, str] | None = None, stdin: str | None = None, timeout_s: float = 60) -> str:
    """Run a command, answer what it printed. Raises `LabError` with its standard error."""
    done = subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """For `preexec_fn`: the child gets SIGKILL when this process ends, however it ends (prctl(2))."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _listens(path: Path) -> bool:
    """Whether somebody answers at a Unix socket: it is there a moment before that."""
    directory = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
            sock.connect(f"/proc/self/fd/{directory}/{path.name}")  # the path itself may be too long for an address
            return True
        return False
    finally:
        os.close(directory)


class Here:
    """The network namespace this process is in already; the lab's, where the whole lab was started inside one."""

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` inside."""
        return list(command)

    def run(self, *command: str, stdin: str | None = None, timeout_s: float = 60) -> str:
        """Run a command inside and answer what it printed."""
        return run(*self.command(*command), stdin=stdin, timeout_s=timeout_s)

    def close(self) -> None:
        """Nothing to end: it was not made here."""


class Namespace(Here):
    """A network namespace that lives as long as a sleeping process in it, so that it needs no name and no mount."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.pid = self._sleeper()
        self.run("ip", "link", "set", "lo", "up")

    def _sleeper(self) -> int:
        # `unshare` without --fork becomes the command itself; wait until it has left our namespace.
        mine = os.readlink("/proc/self/ns/net")
        pid = self._holder.pid
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/net") != mine:
                    return pid
            time.sleep(0.005)
        raise LabError("no network namespace; is this root?")

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` inside."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *command]

    def close(self) -> None:
        """End it. Interfaces in it go with it."""
        if self._holder.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait()


class PrivateOvs:
    """ovsdb-server and ovs-vswitchd of one's own. Use as a context manager.

    `datapath` is the type of every bridge made: `netdev` carries real packets, `dummy` only traced ones.
    """

    def __init__(self, directory: Path | None = None, *, datapath: str = "netdev", namespace: Here | None = None):
        self.directory = directory or Path(tempfile.mkdtemp(prefix="bulkhead-ovs-"))
        self._own_directory = directory is None
        self.datapath = datapath
        self.namespace = namespace or Namespace()
        self.env = dict(
            os.environ,
            OVS_RUNDIR=str(self.directory),
            OVS_LOGDIR=str(self.directory),
            OVS_DBDIR=str(self.directory),
        )
        self.vswitchd: subprocess.Popen[bytes] | None = None
        self._ovsdb: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def db(self) -> str:
        """The database's address, as `ovs-vsctl --db` and Bulkhead's `--ovsdb` take it."""
        return f"unix:{self.directory}/db.sock"

    @property
    def ctl(self) -> Path:
        """The control socket of ovs-vswitchd."""
        return self.directory / "vswitchd.ctl"

    def start(self) -> None:
        """Make the database and start both processes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        db = self.directory / "conf.db"
        if not db.exists():
            run("ovsdb-tool", "create", str(db), str(SCHEMA))
        self._ovsdb = self._spawn(
            "ovsdb-server", str(db), f"--remote=p{self.db}", f"--unixctl={self.directory}/ovsdb.ctl"
        )
        self._wait_for(self.directory / "db.sock")
        for attempt in range(50):  # the socket is there a moment before anybody listens
            try:
                self.vsctl("--no-wait", "init")
                break
            except LabError:
                if attempt == 49:
                    raise
                time.sleep(0.1)
        self.start_vswitchd()

    def start_vswitchd(self) -> None:
        """Start ovs-vswitchd (again)."""
        with contextlib.suppress(FileNotFoundError):
            self.ctl.unlink()
        options = ["--enable-dummy=override"] if self.datapath == "dummy" else []
        self.vswitchd = self._spawn("ovs-vswitchd", self.db, "--disable-system", f"--unixctl={self.ctl}", *options)
        self._wait_for(self.ctl)

    def kill_vswitchd(self) -> None:
        """End ovs-vswitchd with SIGKILL, as a crash would: its flows are lost."""
        if self.vswitchd is not None:
            self.vswitchd.kill()
            self.vswitchd.wait()
            self.vswitchd = None

    def _spawn(self, program: str, *args: str) -> subprocess.Popen[bytes]:
        log = self.directory / f"{program}.log"
        return subprocess.Popen(
            self.namespace.command(program, *args, f"--log-file={log}", "-vconsole:off"),
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / f"{program}.err").open("ab"),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _wait_for(self, path: Path, timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while not _listens(path):
            if time.monotonic() > deadline:
                errors = "\n".join(p.read_text() for p in self.directory.glob("*.err"))
                raise LabError(f"{path} did not appear: {errors}")
            time.sleep(0.005)

    def vsctl(self, *args: str) -> str:
        """ovs-vsctl on this database."""
        return run("ovs-vsctl", f"--db={self.db}", "--timeout=20", *args, env=self.env)

    def appctl(self, *args: str) -> str:
        """ovs-appctl to this ovs-vswitchd."""
        return run("ovs-appctl", "-t", str(self.ctl), *args, env=self.env)

    def ofctl(self, *args: str, stdin: str | None = None) -> str:
        """ovs-ofctl, speaking OpenFlow 1.4."""
        return run(*OFCTL, *args, env=self.env, stdin=stdin)

    def add_bridge(self, name: str, *settings: str) -> None:
        """A bridge that is shut from its first moment: secure, OpenFlow 1.4, no in-band control."""
        self.vsctl(
            "add-br", name, "--", "set", "bridge", name, f"datapath_type={self.datapath}", "fail_mode=secure",
            "protocols=OpenFlow14", "other-config:disable-in-band=true", *settings,
        )  # fmt: skip

    def add_dummy_ports(self, bridge: str, names: Sequence[str]) -> None:
        """Ports that lead nowhere, for traced packets."""
        for start in range(0, len(names), 200):
            args: list[str] = []
            for name in names[start : start + 200]:
                args += ["--", "add-port", bridge, name, "--", "set", "interface", name, "type=dummy"]
            self.vsctl(*args[1:])

    def port_numbers(self, bridge: str) -> dict[str, int]:
        """Port names to OpenFlow numbers."""
        listed = self.vsctl("--format=csv", "--no-headings", "--columns=name,ofport", "list", "interface")
        mine = set(self.vsctl("list-ports", bridge).split())
        pairs = (line.split(",") for line in listed.splitlines() if line)
        return {name: int(number) for name, number in pairs if name in mine and number.lstrip("-").isdigit()}

    def trace(self, bridge: str, flow: str) -> str:
        """`ofproto/trace` of one packet."""
        return self.appctl("ofproto/trace", bridge, flow)

    def close(self) -> None:
        """End both processes and the namespace, and remove the directory if it was ours."""
        self.kill_vswitchd()
        if self._ovsdb is not None:
            self._ovsdb.terminate()
            self._ovsdb.wait()
            self._ovsdb = None
        self.namespace.close()
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
