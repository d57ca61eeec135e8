"""Traffic in a running lab: servers in its hosts, and tries from one host to another. Imports `manager` and `places`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from lab import places
from lab.manager import LabError, LabHost, Status, spawn

Outcome = Literal["reply", "refused", "silence", "no name", "error"]
SERVERS_LIMIT_S = 10.0
TRY_LIMIT_S = 60.0
NOTHING: Mapping[str, Sequence[str]] = {}


@dataclass(frozen=True, slots=True)
class Try:
    """One connection, datagram or echo request. `source` is the address it comes from, `spoof` one it only claims;
    `socks` is the proxy (address:port) that it goes through, `http` a request to make, as `probe.py` reads it."""

    proto: Literal["tcp", "udp", "icmp"]
    to: str
    port: int = 0
    source: str | None = None
    spoof: str | None = None
    socks: str | None = None
    say: str = "hello"
    timeout_s: float = 1.5
    http: Mapping[str, Any] | None = field(default=None, repr=False)  # there may be a token in it

    def as_json(self) -> dict[str, Any]:
        """The try as `probe.py` reads it."""
        asked: dict[str, Any] = {"proto": self.proto, "to": self.to, "port": self.port, "say": self.say}
        asked["timeout_s"] = self.timeout_s
        if self.source is not None:
            asked["from"] = self.source
        if self.spoof is not None:
            asked["spoof"] = self.spoof
        if self.socks is not None:
            asked["socks"] = self.socks
        if self.http is not None:
            asked["http"] = dict(self.http)
        return asked


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a try: `data` is what the other side said, or the error."""

    outcome: Outcome
    data: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    """Packets that have left by an interface. `others` are neither WireGuard nor about neighbours; `kinds` says what
    they are. `lost` ones were too many to look at."""

    wireguard: int
    neighbours: int
    others: int
    lost: int
    kinds: tuple[str, ...]


class Traffic:
    """Servers in hosts of a lab, for as long as the context lasts."""

    def __init__(self, lab: Status) -> None:
        self.lab = lab
        self._files = tempfile.TemporaryDirectory(prefix="bulkhead-traffic-")
        self._servers: dict[str, subprocess.Popen[str]] = {}
        self._uplinks: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        started = [*self._servers.values(), *self._uplinks.values()]
        for server in started:
            assert server.stdin is not None
            server.stdin.close()
        for server in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(5)
        self._files.cleanup()

    def serve(self, endpoints: Mapping[str, Sequence[str]], watch: Mapping[str, Sequence[str]] = NOTHING) -> None:
        """Start a server in each host for its endpoints (`tcp:443`), each answering with its host's name.

        `watch` names interfaces, by host, whose incoming packets are noted, answered or not.
        """
        for host, wanted in endpoints.items():
            watched = [f"--watch={interface}" for interface in watch.get(host, ())]
            command = _probe("serve", "--name", host, *watched, *wanted)
            with self._heard(host).open("wb") as out:
                self._servers[host] = spawn(
                    self.lab, host, command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
                )
        deadline = time.monotonic() + SERVERS_LIMIT_S
        waiting = set(endpoints)
        while waiting:
            waiting -= {host for host in waiting if self._heard(host).read_text().startswith("ready")}
            dead = [host for host in waiting if self._servers[host].poll() is not None]
            if dead or time.monotonic() > deadline:
                said = "; ".join(self._heard(host).read_text().strip() for host in dead or waiting)
                raise LabError(f"no server in {', '.join(dead or waiting)}: {said}")
            time.sleep(0.01)

    def know(self, host: LabHost) -> None:
        """Count a host that has come later among those of the lab."""
        self.lab = replace(self.lab, hosts=(*self.lab.hosts, host))

    def watch_uplink(self, host: str, interface: str) -> None:
        """Look at all that leaves a host by an interface, until `uplinks` is called."""
        process = spawn(self.lab, host, _probe("left", interface), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise LabError(f"nobody looks at what leaves {host} by {interface}")
        self._uplinks[host] = process

    def uplinks(self) -> dict[str, Left]:
        """What has left since, by host."""
        out = {}
        while self._uplinks:
            host, process = self._uplinks.popitem()
            found = json.loads(process.communicate(timeout=TRY_LIMIT_S)[0])
            out[host] = Left(**{**found, "kinds": tuple(found["kinds"])})
        return dict(reversed(out.items()))

    def heard(self, host: str) -> list[str]:
        """What the server of a host was asked so far: `udp 4000 10.0.0.102 hello`."""
        return [line for line in self._lines(host) if not line.startswith("saw ")]

    def came_from(self, host: str) -> str:
        """The address that the last request to a host came from, as the host sees it."""
        senders = self.arrived(host)
        return senders[-1] if senders else ""

    def arrived(self, host: str) -> list[str]:
        """Who has sent the requests and, where it is watched, the kinds of packets that got as far as a host."""
        parts = [line.split(" ") for line in self._lines(host)]
        return [words[1] if words[0] == "saw" else words[2] for words in parts]

    def saw(self, host: str) -> list[str]:
        """Kinds of packets that came in by a host's watched interfaces: `10.0.0.102 udp 40000 53`."""
        return [line.removeprefix("saw ") for line in self._lines(host) if line.startswith("saw ")]

    def _lines(self, host: str) -> list[str]:
        return self._heard(host).read_text().splitlines()[1:]

    def _heard(self, host: str) -> Path:
        return Path(self._files.name, f"{host}.heard")

    def attempt(self, host: str, wanted: Try) -> Result:
        """Run one try from a host."""
        return self.attempt_all({host: [wanted]})[host][0]

    def attempt_all(self, wanted: Mapping[str, Iterable[Try]]) -> dict[str, list[Result]]:
        """Run all tries of all hosts at once."""
        started = {
            host: spawn(self.lab, host, _probe("try"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) for host in wanted
        }
        for host, process in started.items():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already, and is told of below
                json.dump([each.as_json() for each in wanted[host]], process.stdin)
                process.stdin.close()
            process.stdin = None
        return {host: _results(host, process) for host, process in started.items()}


def _results(host: str, process: subprocess.Popen[str]) -> list[Result]:
    out, _ = process.communicate(timeout=TRY_LIMIT_S)
    if process.returncode:
        raise LabError(f"the probe in {host} ended with exit code {process.returncode}")
    return [Result(found["outcome"], found["data"], found["s"]) for found in json.loads(out)]


def _probe(*arguments: str) -> list[str]:
    return [sys.executable, "-I", str(places.PROBE), *arguments]
