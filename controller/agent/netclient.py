"""Netmaker's client in the namespace of a leg, with a configuration and a /run of its own.

It keeps what it knows in /etc/netclient, changes /etc/hosts and /etc/resolv.conf, and talks to whatever runs on its host;
so it sees its own of each. It takes its token only as an argument: for the moment of joining, who can list the host's
processes can read it. Imports files, hostmodel, resource, run, runner.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
from pathlib import Path

from controller.agent.files import write_atomically
from controller.agent.resource import Change, Failed, Sign
from controller.agent.run import PREFIX, call, environment
from controller.agent.runner import Runner
from controller.hostmodel import Leg

PROGRAM = "netclient"
HOME = Path("/etc/netclient")
JOIN_S = 60.0
_STAGE = """
mkdir -p /etc/netclient
mount --bind "$1" /etc/netclient
for file in hosts resolv.conf; do
    [ -e "$2/$file" ] || cp "/etc/$file" "$2/$file" 2>/dev/null || : > "$2/$file"
    [ ! -e "/etc/$file" ] || mount --bind "$2/$file" "/etc/$file"
done
mount --bind "$2" /run
shift 2
exec "$@"
"""
_JOIN = 'IFS= read -r token; exec netclient join -t "$token"'
"""The token comes by standard input, so that it is in no command line of ours."""


class Netclient:
    """Netmaker's client of a leg: joined to its server, and running.

    `directory` keeps what it knows and outlives a reboot; `run_dir` does not.
    """

    period = 1.0

    def __init__(
        self, leg: Leg, directory: Path, run_dir: Path, runner: Runner, *, needs: tuple[str, ...] = ()
    ) -> None:
        if leg.netclient is None:
            raise ValueError(f"{leg.port} does not use Netmaker's client")
        self._client, self._port, self._runner = leg.netclient, leg.port, runner
        self._home, self._run = home_of(directory, leg), run_of(run_dir, leg)
        self._namespace = f"{PREFIX}{leg.port}"
        self.key = f"netclient/{leg.port}"
        self.needs = needs

    async def diff(self) -> list[Change]:
        if shutil.which(PROGRAM, path=environment()["PATH"]) is None:
            raise Failed(
                f"{PROGRAM} is not installed, and {self._port} is to be joined to {self._client.server} by it; install it as "
                "docs.netmaker.io says, or declare the tunnel's peers instead"
            )
        joined, runs = self._joined(), await self._runner.runs()
        out = []
        if not joined:
            read_token(self._client.token_file, self._client.server)
            out.append(Change(Sign.ADD, f"{self._port} in the mesh of {self._client.server}", "not joined", self._join))
            if runs:
                out.append(Change(Sign.CHANGE, f"netclient of {self._port}", "it has joined anew", self._runner.stop))
        if not runs or not joined:
            why = "it does not run" if not runs else "it has joined anew"
            out.append(Change(Sign.ADD, f"netclient of {self._port}", why, self._start))
        return out

    def _joined(self) -> bool:
        """Whether it knows its server; it succeeds also where joining failed, so this is what tells."""
        host = self._client.server.partition(":")[0]
        return any(host in path.read_text(errors="replace") for path in self._home.glob("servers.*"))

    async def _join(self) -> None:
        token = read_token(self._client.token_file, self._client.server)
        self._make_directories()
        command = (*_stage(self._home, self._run), "sh", "-c", _JOIN)
        try:
            await call(*command, namespace=self._namespace, stdin=f"{token}\n", timeout_s=JOIN_S, secret=True)
        except Failed as exc:
            raise Failed(f"{self._port} cannot join {self._client.server}: netclient failed or gave no answer") from exc
        if not self._joined():
            raise Failed(
                f"{self._port} has not joined {self._client.server}; is the server reachable from {self._namespace}, and "
                f"the key in {self._client.token_file} still good?"
            )
        write_atomically(self._home / "joined", f"{self._client.server}\n", 0o600)

    async def _start(self) -> None:
        self._make_directories()
        await self._runner.start()

    def _make_directories(self) -> None:
        for path in (self._home, self._run):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)


def home_of(directory: Path, leg: Leg) -> Path:
    """What a leg's client has as /etc/netclient."""
    return directory / "netclient" / leg.port


def run_of(run_dir: Path, leg: Leg) -> Path:
    """What a leg's client has as /run."""
    return run_dir / "netclient" / leg.port


def daemon_command(leg: Leg, directory: Path, run_dir: Path) -> tuple[str, ...]:
    """The command line that keeps a leg joined; it stays in the foreground. To be run in the leg's namespace."""
    return (*_stage(home_of(directory, leg), run_of(run_dir, leg)), PROGRAM, "daemon")


def _stage(home: Path, run: Path) -> tuple[str, ...]:
    return ("unshare", "--mount", "--propagation=slave", "sh", "-ec", _STAGE, "sh", str(home), str(run))


def read_token(path: Path, server: str) -> str:
    """The enrolment key in a file. Raises `Failed`, without anything of what is in there, where it cannot be used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise Failed(f"token file {path} cannot be read: {exc.strerror}; put the enrolment key there") from exc
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Failed(f"token file {path} is not a regular file")
        if found.st_mode & 0o077 or found.st_uid != os.geteuid():
            raise Failed(f"token file {path} can be read by others; run: chown root {path} && chmod 600 {path}")
        data = os.read(descriptor, 16384).strip()
    finally:
        os.close(descriptor)
    try:
        named = str(json.loads(base64.b64decode(data, validate=True))["server"])
        token = data.decode("ascii")
    except (ValueError, KeyError, TypeError):
        named = token = ""
    if not named:
        raise Failed(f"token file {path} holds no enrolment key; copy it from Netmaker's page of enrolment keys")
    if named.partition(":")[0] != server.partition(":")[0]:
        raise Failed(f"the key in {path} is for {named}, not for {server}; correct the server, or use another key")
    return token
