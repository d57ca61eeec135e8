"""Debian machines of one's own: systemd is their first process, and their files are a copy of this machine's.

So units run there as they are on a real machine: users, capabilities, private directories and all. What a machine writes
goes to memory and is kept while it is switched off. It has no network but what it is given. Nothing of this machine is
changed, but for a control group that is there as long as the machine runs. Needs root, and /usr on the same file system
as /. Imports `ovs`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

from lab.ovs import Here, LabError, die_with_parent

BOOT_S = 30
_CGROUPS = Path("/sys/fs/cgroup")
_PREFIX = "bulkhead-machine"
_NUMBERS = count(1)

_EMPTY = ("tmp", "root", "home", "var/tmp", "var/log", "var/lib/bulkhead", "etc/bulkhead", "etc/systemd/system")
"""What of this machine is not to be seen there."""

# Keeps the machine's disk: memory, seen by nobody else, gone with this process.
_DISK = r"""
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$1"
mkdir "$1/changes" "$1/work" "$1/root"
"$4" -c "$5" "$1/changes" $2
mount -t overlay -o "lowerdir=/,upperdir=$1/changes,workdir=$1/work" overlay "$1/root"
cd "$1/root"
chmod 1777 tmp var/tmp
chmod 700 root
echo "$3" > etc/hostname
rm -f etc/machine-id; tr -d - < /proc/sys/kernel/random/uuid > etc/machine-id
: > etc/fstab
rm -f etc/resolv.conf; : > etc/resolv.conf
printf '127.0.0.1 localhost %s\n::1 localhost\n' "$3" > etc/hosts
ln -s /lib/systemd/system/multi-user.target etc/systemd/system/default.target
for each in getty.target systemd-logind.service systemd-ask-password-wall.path systemd-user-sessions.service; do
    ln -s /dev/null "etc/systemd/system/$each"
done
mkdir -p opt/bulkhead/source opt/bulkhead/python
printf '%s\n' '#!/bin/sh' 'export PYTHONPATH=/opt/bulkhead/source PYTHONDONTWRITEBYTECODE=1' \
    "exec /opt/bulkhead/python/bin/python -P -c 'from controller.cli import main; main()' \"\$@\"" > usr/local/bin/bulkhead
chmod 755 usr/local/bin/bulkhead
echo ready
exec sleep infinity
"""

# Directories that hide what lies below them, as the kernel's overlayfs marks them.
_HIDE = """
import os, sys
for name in sys.argv[2:]:
    os.makedirs(os.path.join(sys.argv[1], name))
    os.setxattr(os.path.join(sys.argv[1], name), "trusted.overlay.opaque", b"y")
"""

# Process 1 of the machine, until it becomes systemd.
_BOOT = r"""
mount --make-rprivate /
root="$1/root"
cd "$root"
mount --bind "$root" "$root"; cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/net
for each in null zero full random urandom tty net/tun; do
    touch "dev/$each"; mount --bind "/dev/$each" "dev/$each"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
: > dev/console
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount --bind "$2" opt/bulkhead/source; mount -o remount,bind,ro opt/bulkhead/source
mount --bind "$3" opt/bulkhead/python; mount -o remount,bind,ro opt/bulkhead/python
if [ -d /sys/fs/cgroup/unified ]; then
    mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
else
    mount -t cgroup2 cgroup2 sys/fs/cgroup
fi
mkdir -p run/old
pivot_root . run/old
umount -l run/old
ip link set lo up
hostname -F /etc/hostname
exec env -i container=bulkhead PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --log-target=journal --show-status=no < /dev/null > /dev/null 2>&1
"""

_ENTER = 'for each in $1; do echo $$ > "$each/cgroup.procs"; done; shift; exec "$@"'
_ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8")


class Machine(Here):
    """One of them. `directory` is a place for its disk, empty and of this machine alone."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory.absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._systemd: subprocess.Popen[bytes] | None = None
        self._groups: list[Path] = []
        self.pid = 0
        """systemd's process id here; 0 while the machine is switched off."""
        _sweep()
        words = ["unshare", "--mount", "sh", "-ec", _DISK, "disk", str(self._directory), " ".join(_EMPTY), name]
        words += [sys.executable, _HIDE]
        self._disk = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        assert self._disk.stdout is not None and self._disk.stderr is not None
        if self._disk.stdout.readline() != b"ready\n":
            said = self._disk.stderr.read().decode(errors="replace").strip()
            raise LabError(f"{name} has no disk: {said or 'is this root?'}")

    def on(self) -> None:
        """Switch it on: processes and network are new, files as they were. Raises `LabError`.

        It lives as long as the thread that switched it on: that is what PR_SET_PDEATHSIG of prctl(2) means by a parent.
        """
        self._groups = _groups()
        source, python = Path(__file__).resolve().parent.parent, Path(sys.prefix)
        groups = " ".join(map(str, self._groups))
        words = ["sh", "-ec", _ENTER, "enter", groups, "nsenter", f"--mount=/proc/{self._disk.pid}/ns/mnt"]
        words += [
            "unshare",
            "--mount",
            "--pid",
            "--net",
            "--uts",
            "--ipc",
            "--cgroup",
            "--fork",
            "--kill-child",
            "sh",
            "-ec",
            _BOOT,
            "boot",
        ]
        words += [str(self._directory), str(source), str(python)]
        self._systemd = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        deadline = time.monotonic() + BOOT_S
        while not self._is_up():
            if self._systemd.poll() is not None:
                assert self._systemd.stderr is not None
                said = self._systemd.stderr.read().decode(errors="replace").strip()
                raise LabError(f"{self.name} does not start: {said or f'exit {self._systemd.returncode}'}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} has not started after {BOOT_S} s")
            time.sleep(0.02)

    def _is_up(self) -> bool:
        assert self._systemd is not None
        child = Path(f"/proc/{self._systemd.pid}/task/{self._systemd.pid}/children")
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(child.read_text().split()[0])
            if Path(f"/proc/{pid}/comm").read_text() != "systemd\n":
                return False
            self.pid = pid
            done = subprocess.run(self.command("systemctl", "is-system-running"), capture_output=True, text=True)
            return done.stdout.strip() in ("running", "degraded")
        return False

    def off(self) -> None:
        """Switch it off, as pulling the plug does: its disk is all that is left."""
        if self._systemd is not None:
            # While its parent has not been waited for the number is still systemd's.
            if self._systemd.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if self.pid:
                        os.kill(self.pid, signal.SIGKILL)
                self._systemd.kill()
            self._systemd.wait()
            if self._systemd.stderr is not None:
                self._systemd.stderr.close()
        self._systemd, self.pid = None, 0
        _remove(self._groups)
        self._groups = []

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` there, as root, with nothing of our environment."""
        spaces = ("--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup")
        return ["nsenter", f"--target={self.pid}", *spaces, "--", "env", "-i", *_ENVIRONMENT, *command]

    def write(self, path: str, text: str) -> None:
        """A file there."""
        self.run("sh", "-ec", 'mkdir -p "${1%/*}"; cat > "$1"', "write", path, stdin=text)

    def close(self) -> None:
        """Switch it off and throw its disk away."""
        self.off()
        self._disk.kill()
        self._disk.wait()
        for stream in (self._disk.stdout, self._disk.stderr):
            if stream is not None:
                stream.close()


def _groups() -> list[Path]:
    """New control groups in the hierarchies that systemd uses. Raises `LabError`."""
    unified = [each for each in (_CGROUPS, _CGROUPS / "unified") if (each / "cgroup.controllers").exists()]
    named = [_CGROUPS / "systemd"] if (_CGROUPS / "systemd/cgroup.procs").exists() else []
    if not unified or (unified != [_CGROUPS] and not named):
        raise LabError(f"{_CGROUPS} has no hierarchy that systemd can use; mount cgroup2 there")
    made = [each / f"{_PREFIX}-{os.getpid()}-{next(_NUMBERS)}" for each in (*unified, *named)]
    for each in made:
        each.mkdir()
    return made


def _remove(groups: list[Path]) -> None:
    """Remove control groups that nobody is in any more; the kernel takes a moment to see that."""
    deadline = time.monotonic() + 5
    for group in groups:
        for path in (*sorted(group.rglob("*/"), reverse=True), group):
            while path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
                    break
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)


def _sweep() -> None:
    """Remove the control groups of machines whose owner was killed."""
    for group in (*_CGROUPS.glob(f"{_PREFIX}-*"), *_CGROUPS.glob(f"*/{_PREFIX}-*")):
        owner = group.name.split("-")[2]
        if not Path("/proc", owner).exists():
            _remove([group])


__all__ = ["LabError", "Machine"]
