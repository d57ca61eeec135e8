"""What this machine's Open vSwitch says when asked by its own tools: bridges and ports, flows, traces, packets of a capture.

Reads only. Each question is one short process with a time limit; what fails is a `BulkheadError` that says what to do.
Imports flowtext and what a bridge is to the proof.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from controller.flow import Flow
from controller.flowtext import read_flows
from controller.problems import BulkheadError, InvalidInput, Severity
from controller.verify.links import End
from controller.verify.node import LOCAL, Held

TIMEOUT_S = 10.0
_MISS = re.compile(r"^\s*(\d+)\. No match")
_MATCHED = re.compile(r"^\s*(\d+)\. .*?\bpriority (\d+)(?:, cookie (0x[0-9a-f]+))?\s*$")
_BRIDGE = re.compile(r'^bridge\("(.*)"\)$')
_DATAPATH = re.compile(r"^Datapath actions: (.*)$")
_VERSIONS = ",".join(f"OpenFlow1{minor}" for minor in range(6))
_STAMP = re.compile(r"^\S+Z\|\d+\|\w+\|\w+\|", re.M)
"""What Open vSwitch's tools put before a line of their log."""
_PCAP = frozenset(map(bytes.fromhex, ("a1b2c3d4", "d4c3b2a1", "a1b23c4d", "4d3cb2a1")))
_PCAPNG = bytes.fromhex("0a0d0d0a")
_PORT = re.compile(r"^\s+(\S+) (\d+)/(none|\d+):")


class OvsError(BulkheadError):
    """Open vSwitch did not answer, or not what was asked."""


class Looked(NamedTuple):
    """A table that a trace looked up, and the flow it found there; None is a miss."""

    bridge: str
    table: int
    flow: tuple[int, int] | None
    """Priority and cookie."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What `ofproto/trace` said: tables looked up, in order, and where the packet leaves as (bridge, port number)."""

    looked: tuple[Looked, ...]
    sent: frozenset[tuple[str, int]]
    text: str


class Ovs:
    """The Open vSwitch whose run directory is `run_dir`, by default the machine's or what OVS_RUNDIR says."""

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir or Path(os.environ.get("OVS_RUNDIR", "/var/run/openvswitch"))

    # ------------------------------------------------------------------------------------------------------- what is

    def bridges(self) -> tuple[str, ...]:
        """Names of all bridges."""
        return tuple(self._run("ovs-vsctl", *self._db(), "list-br").split())

    def numbers(self, bridge: str) -> dict[str, int]:
        """OpenFlow numbers of a bridge's ports, by name; a port that has none yet is left out."""
        listed = self._run("ovs-vsctl", *self._db(), "list-ifaces", bridge).split()
        numbers = {row["name"]: row["ofport"] for row in self._rows("Interface", "name", "ofport")}
        found = {name: numbers[name] for name in listed if isinstance(numbers.get(name), int) and numbers[name] > 0}
        return found | {"LOCAL": LOCAL}

    def patches(self) -> dict[End, End]:
        """Patch ports and where they lead, as (bridge, port) each."""
        peers = {
            row["name"]: dict(row["options"][1]).get("peer")
            for row in self._rows("Interface", "name", "type", "options")
            if row["type"] == "patch"
        }
        where = {port: bridge for bridge in self.bridges() for port in self._ports(bridge) if port in peers}
        return {
            (bridge, port): (where[peer], peer)
            for port, bridge in where.items()
            if (peer := peers[port]) in where and peers[peer] == port
        }

    def _ports(self, bridge: str) -> list[str]:
        return self._run("ovs-vsctl", *self._db(), "list-ifaces", bridge).split()

    def held(self, bridge: str) -> Held:
        """A bridge with every flow it holds: those that `ovs-ofctl dump-flows` hides, too."""
        numbers = self.numbers(bridge)
        text = self._run("ovs-appctl", "-t", self._daemon(), "bridge/dump-flows", bridge)
        cookies = self._cookies(bridge, numbers)
        flows = _read(text, numbers, bridge)
        return Held.of(bridge, numbers, [replace(flow, cookie=cookies.get(flow.key, flow.cookie)) for flow in flows])

    def _cookies(self, bridge: str, numbers: Mapping[str, int]) -> dict[bytes, int]:
        """Cookies of a bridge's flows, which `bridge/dump-flows` leaves out. Any version of OpenFlow has these."""
        asked = ("ovs-ofctl", "-O", _VERSIONS, "--no-names", "--no-stats", f"--timeout={TIMEOUT_S:.0f}")
        text = self._run(*asked, "dump-flows", f"unix:{self.run_dir}/{bridge}.mgmt")
        return {flow.key: flow.cookie for flow in _read(text, numbers, bridge)}

    # --------------------------------------------------------------------------------------------------------- traces

    def trace(self, bridge: str, packet: str, tracked: Iterable[str] = ()) -> Traced:
        """What the switch would do with a packet in ovs-ofctl's words. Changes nothing (`ovs-vswitchd(8)`)."""
        options = [word for state in tracked for word in ("--ct-next", state)]
        text = self._run("ovs-appctl", "-t", self._daemon(), "ofproto/trace", *options, bridge, packet)
        return parse_trace(text, datapath_ports(self._run("ovs-appctl", "-t", self._daemon(), "dpif/show")))

    # -------------------------------------------------------------------------------------------------------- asking

    def _db(self) -> tuple[str, ...]:
        return (f"--db=unix:{self.run_dir}/db.sock", f"--timeout={TIMEOUT_S:.0f}")

    def _daemon(self) -> str:
        pid = self.run_dir / "ovs-vswitchd.pid"
        try:
            return str(self.run_dir / f"ovs-vswitchd.{int(pid.read_text())}.ctl")
        except (OSError, ValueError) as exc:
            raise OvsError(
                f"{pid}: {getattr(exc, 'strerror', None) or 'not a process id'}; expected a running ovs-vswitchd. "
                "Start Open vSwitch, run this as root, or say where it runs with OVS_RUNDIR"
            ) from exc

    def _rows(self, table: str, *columns: str) -> list[dict[str, Any]]:
        asked = ("ovs-vsctl", *self._db(), "--format=json", f"--columns={','.join(columns)}", "list", table)
        found = json.loads(self._run(*asked))
        return [dict(zip(found["headings"], row, strict=True)) for row in found["data"]]

    def _run(self, *command: str) -> str:
        return run(*command)


MEND = "Start Open vSwitch, run this as root on the machine that has the bridges, or say where it runs with OVS_RUNDIR"


def _read(text: str, numbers: Mapping[str, int], bridge: str) -> tuple[Flow, ...]:
    try:
        return read_flows(text, numbers, f"flows of {bridge}").flows
    except InvalidInput as exc:
        first = next(problem for problem in exc.problems if problem.severity is Severity.ERROR)
        raise OvsError(f"{bridge} holds a flow that cannot be followed here: {first}") from exc


def run(*command: str, slow: str = "is ovs-vswitchd stuck?", mend: str = MEND) -> str:
    """What a tool of Open vSwitch prints. `slow` and `mend` say what to do. Raises `OvsError`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as exc:
        raise OvsError(f"{command[0]} is not installed; install Open vSwitch (Debian: openvswitch-switch)") from exc
    except OSError as exc:
        raise OvsError(f"{command[0]} cannot be run: {exc.strerror}; make it executable for this user") from exc
    except subprocess.TimeoutExpired as exc:
        raise OvsError(f"{command[0]} did not answer within {TIMEOUT_S:.0f} s; {slow}") from exc
    if done.returncode:
        said = " ".join(_STAMP.sub("", done.stderr.strip() or done.stdout.strip()).split())[:300]
        raise OvsError(f"{command[0]} failed: {said.rstrip('.')}. {mend}")
    return done.stdout


def captured(path: Path) -> tuple[str, ...]:
    """The packets of a capture in ovs-ofctl's words, read by Open vSwitch's own parser. Raises `OvsError`."""
    expected = "expected a capture that tcpdump -w has written"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise OvsError(f"{path}: {exc.strerror}; {expected}") from exc
    if magic == _PCAPNG:
        raise OvsError(f"{path}: a pcapng file; {expected}. Turn it into one: tcpdump -r {path} -w NEW.pcap")
    if magic not in _PCAP:
        raise OvsError(f"{path}: not a capture, it begins with {magic.hex(' ') or 'nothing'}; {expected}")
    slow, mend = "give it a capture of fewer packets", "Make another: tcpdump -i PORT -w FILE.pcap"
    lines = run("ovs-ofctl", "parse-pcap", str(path.absolute()), slow=slow, mend=mend).splitlines()
    return tuple(line.strip() for line in lines if "=" in line)


def datapath_ports(text: str) -> dict[int, tuple[str, int]]:
    """Datapath port numbers to (bridge, OpenFlow number), from `dpif/show`."""
    bridge, ports = "", {}
    for line in text.splitlines():
        if (port := _PORT.match(line)) is not None:
            if port[3] != "none":
                ports[int(port[3])] = (bridge, int(port[2]))
        elif line.startswith("  ") and line.rstrip().endswith(":"):
            bridge = line.strip().rstrip(":")
    return ports


def parse_trace(text: str, ports: Mapping[int, tuple[str, int]]) -> Traced:
    """Take the words of `ofproto/trace` apart. Raises `OvsError` where they say nothing."""
    looked: list[Looked] = []
    sent: set[tuple[str, int]] = set()
    bridge = ""
    ended = False
    for line in text.splitlines():
        if (found := _BRIDGE.match(line)) is not None:
            bridge = found[1]
        elif (found := _MISS.match(line)) is not None:
            looked.append(Looked(bridge, int(found[1]), None))
        elif (found := _MATCHED.match(line)) is not None:
            looked.append(Looked(bridge, int(found[1]), (int(found[2]), int(found[3] or "0", 16))))
        elif (found := _DATAPATH.match(line)) is not None:
            ended = True
            sent |= {ports.get(number, ("?", number)) for number in top_level_numbers(found[1])}
    if not ended:
        raise OvsError(f"ofproto/trace did not say what becomes of the packet: {' '.join(text.split())[:300]}")
    return Traced(tuple(looked), frozenset(sent), text)


def top_level_numbers(actions: str) -> list[int]:
    """Plain outputs among datapath actions: numbers that stand in no parentheses, and those in clone(…)."""
    actions = re.sub(r"\bclone\(", "(", actions)
    word, out = "", []
    inner = [True]
    for char in actions + ",":
        if char == "(":
            inner.append(not word and inner[-1])
            word = ""
        elif char in ",)":
            if inner[-1] and word.isdecimal():
                out.append(int(word))
            word = ""
            if char == ")":
                inner.pop()
                word = "x"
        else:
            word += char
    return out
