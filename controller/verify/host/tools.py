"""How a host is asked: its own tools, each with a time limit. Reads only; changes nothing. Imports facts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from controller.verify.host.facts import Gap

TIMEOUT_S = 10
MOST_NAMESPACES = 512
"""More network namespaces than this are not looked into."""


class Tools(Protocol):
    """How facts are asked for; a test has its own."""

    def run(self, *command: str) -> str | Gap:
        """What a command printed, or why it did not."""

    def read(self, pattern: str) -> Mapping[str, str]:
        """Files below /proc/sys/net that match a pattern, by their path there."""

    def exists(self, path: Path) -> bool:
        """Whether there is such a file."""

    def sockets(self, directory: Path) -> Sequence[Path]:
        """The control sockets (`*.ctl`) in a directory."""

    def namespaces(self) -> Sequence[tuple[str, str]] | Gap:
        """Names and paths of the other network namespaces of this machine."""


class Host:
    """The tools of the machine and the network namespace that this process is in."""

    def run(self, *command: str) -> str | Gap:
        """What a command printed, or why it did not."""
        # Not everybody has the administrator's programs on the path.
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                env={**os.environ, "PATH": path, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except FileNotFoundError:
            return Gap(
                f"{command[0]} is not installed", f"install {_PACKAGES.get(command[0], command[0])}", absent=True
            )
        except subprocess.TimeoutExpired:
            return Gap(f"{command[0]} did not answer within {TIMEOUT_S} s", f"find out why: {' '.join(command)}")
        except OSError as exc:
            return Gap(f"{command[0]} cannot be run: {exc.strerror}", f"find out why: {' '.join(command)}")
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split()) or f"exit {done.returncode}"
            return Gap(f"{command[0]} failed: {said[:200]}", _how(said, command))
        return done.stdout

    def read(self, pattern: str) -> Mapping[str, str]:
        """Files below /proc/sys/net that match a pattern, by their path there."""
        base = Path("/proc/sys/net")
        out = {}
        for path in base.glob(pattern):
            try:
                out[str(path.relative_to(base))] = path.read_text().strip()
            except OSError:  # an interface that has just gone
                continue
        return out

    def exists(self, path: Path) -> bool:
        """Whether there is such a file; one that may not be looked at is there."""
        try:
            return path.exists()
        except OSError:
            return True

    def sockets(self, directory: Path) -> Sequence[Path]:
        """The control sockets (`*.ctl`) in a directory, the newest first: a daemon that crashed leaves its own."""
        try:
            return sorted(directory.glob("*.ctl"), key=lambda path: path.stat().st_mtime, reverse=True)
        except OSError:
            return ()

    def namespaces(self) -> Sequence[tuple[str, str]] | Gap:
        """Names and paths of the other network namespaces: named ones, and those that only processes hold."""
        if os.geteuid():
            return Gap("only root can look into other network namespaces", "run this as root")
        mine = os.stat("/proc/self/ns/net")
        found: dict[int, tuple[str, str]] = {}
        for path in [*sorted(Path("/run/netns").glob("*")), *Path("/proc").glob("[0-9]*/ns/net")]:
            try:
                held = path.stat()
            except OSError:  # a process that has just ended
                continue
            if held.st_dev == mine.st_dev:  # else it is a name whose namespace is gone
                name = path.name if path.parent.name == "netns" else f"process {path.parts[2]}"
                found.setdefault(held.st_ino, (name, str(path)))
        found.pop(mine.st_ino, None)
        if len(found) > MOST_NAMESPACES:
            return Gap(f"{len(found)} network namespaces are too many to look into", "look into the legs' by hand")
        return tuple(found.values())


_PACKAGES = {
    "ovs-vsctl": "openvswitch-switch",
    "ovs-appctl": "openvswitch-common",
    "ip": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "wg": "wireguard-tools",
    "nsenter": "util-linux",
    "iptables-legacy-save": "iptables",
    "ip6tables-legacy-save": "iptables",
}


def _how(said: str, command: Sequence[str]) -> str:
    if re.search(r"permitted|permission|must be root", said, re.IGNORECASE):
        return "run this as root"
    return f"find out why: {' '.join(command)}"
