"""A lab of whole nodes under watch: packets on its wires by kind, pressure from inside, and ways to break the node."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from controller.eventread import read
from lab import demo, manager
from lab.manager import LabError, Status
from lab.traffic import Traffic, Try

from .conftest import STATE_FILE

ROOT = Path(__file__).parents[2]
WIRETAP = Path(__file__).with_name("wiretap.py")
NODE = "192.0.2.2"
ENDPOINT, INET, EXIT = "192.0.2.14", "198.51.100.10", "203.0.113.100"
MESH_PEERS, LAPTOP = ("192.0.2.6", "192.0.2.10"), "203.0.113.2"
MARK = 4242
"""The port of packets that are sent beside the tunnels on purpose, to see that they would be seen."""
UPLINK4 = ipaddress.ip_network("192.0.2.0/30")
UPLINK6 = [ipaddress.ip_network(text) for text in ("fe80::/64", "2001:db8:1::/64", "ff02::/16")]
PRIVATE = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
UNSPECIFIED = ipaddress.ip_address("::")
PLACES = (
    "bulkhead-100",
    "bulkhead-102",
    "bulkhead-200",
    "bulkhead-dns-privacy",
    "bulkhead-warp0/",
    "bulkhead-nm-privacy/",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A kind of packet, as `wiretap.py` tells it."""

    way: str
    interface: str
    protocol: str
    source: str
    source_port: int
    target: str
    target_port: int
    quoted: tuple[Any, ...] | None

    @property
    def marked(self) -> bool:
        """Whether it was sent on purpose."""
        return MARK in (self.source_port, self.target_port) or (self.quoted is not None and MARK in self.quoted)

    @property
    def ends(self) -> list[str]:
        """Every address that whoever reads it learns."""
        quoted = self.quoted or ()
        return [self.source, self.target, *(str(quoted[at]) for at in (1, 3) if quoted)]

    @property
    def private(self) -> bool:
        """Whether an address in it is a private one."""
        with contextlib.suppress(ValueError):
            found = [ipaddress.ip_address(text) for text in self.ends]
            return any(address in prefix for address in found for prefix in PRIVATE if address.version == 4)
        return False


def outside(seen: Seen) -> bool:
    """Whether a packet on the node's uplink is nobody's tunnel and not the uplink's own."""
    if seen.protocol == "udp":
        return not _tunnel(seen.source, seen.source_port, seen.target, seen.target_port)
    if seen.protocol == "arp":
        return not all(ipaddress.ip_address(text) in UPLINK4 for text in (seen.source, seen.target))
    if seen.protocol == "icmp6" and seen.quoted is None:
        # Neighbours and the uplink's own multicast groups.
        known = all(any(_ip(text) in net for net in UPLINK6) or _ip(text) == UNSPECIFIED for text in seen.ends)
        return not (known and 130 <= seen.source_port <= 143)
    if seen.protocol == "icmp" and seen.quoted is not None:
        # "Port unreachable" about a tunnel's packet, while nobody listens there.
        protocol, source, source_port, target, target_port, _ = seen.quoted
        return protocol != "udp" or not _tunnel(source, source_port, target, target_port)
    return True


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def _tunnel(source: str, source_port: int, target: str, target_port: int) -> bool:
    ends = {source: source_port, target: target_port}
    if NODE not in ends:
        return False
    own = ends.pop(NODE)
    ((other, port),) = ends.items() if ends else (("", 0),)
    if other == ENDPOINT:
        return port == 2408
    if other in MESH_PEERS:
        return own in (51821, 51822) and port in (51821, 51822)
    return other == LAPTOP and own == 51820


class Program:
    """A program of `wiretap.py` in a host; None is the lab's router."""

    def __init__(self, lab: Status, host: str | None, *arguments: str, out: Path) -> None:
        self.out = out
        command = [sys.executable, "-I", str(WIRETAP), *arguments]
        line = manager.command_in(lab, manager.find_host(lab, host) if host else None, command)
        with out.open("wb") as file:
            self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT)
        until(lambda: self.lines()[:1] == ["ready"], 15, f"wiretap in {host}: {out.read_text()}")

    def lines(self) -> list[Any]:
        """Everything it has said, line by line."""
        return [json.loads(line) for line in self.out.read_text().split("\n")[:-1]]

    def ask(self) -> Any:
        """Its answer to an empty line."""
        before = len(self.lines())
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        until(lambda: len(self.lines()) > before, 10, "an answer")
        return self.lines()[-1]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def until(good: Callable[[], bool], limit_s: float, what: str) -> float:
    """Wait until something is so; answers how long it took."""
    began = time.monotonic()
    while not good():
        assert time.monotonic() - began < limit_s, f"after {limit_s:g} s not: {what}"
        time.sleep(0.03)
    return time.monotonic() - began


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that others can pass through, as the resolver has to."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


class Watched:
    """A lab with its wires watched. `press` has everybody send all they can."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lab = manager.up(STATE_FILE, directory / "lab", nodes=True)
        self.node_dir = self.lab.run_dir / "nodes" / self.lab.node
        self.state_file = Path("/run/nodes", self.lab.node, "node.yaml")  # as it is called on the node
        self._stack = contextlib.ExitStack()
        self.taps: dict[str, Program] = {}
        self.pressers: dict[str, Program] = {}

    def __enter__(self) -> Self:
        self._stack.callback(manager.down, self.lab.run_dir)
        try:
            self.traffic = self._stack.enter_context(Traffic(self.lab))
            self.traffic.serve({"inet": ["tcp:443", "udp:5354"]})
            for host, interface in (("uplink", "eth0"), ("router", "any"), ("inet", "eth0")):
                where = {"uplink": self.lab.node, "router": None}.get(host, host)
                self.taps[host] = self._program(where, "watch", interface, out=f"{host}.seen")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _program(self, host: str | None, *arguments: str, out: str) -> Program:
        program = Program(self.lab, host, *arguments, out=self.directory / out)
        self._stack.callback(program.close)
        return program

    def press(self) -> None:
        """From containers and legs, from a peer of the mesh, and through the VPN, whatever state the node is in."""
        demo.connect_vpn(self.lab)
        self.pressers = {
            "node": self._program(self.lab.node, "press", *PLACES, out="node.pressed"),
            "droplet": self._program("droplet", "press", "-@10.0.0.50", out="droplet.pressed"),
            "laptop": self._program("laptop", "press", "-", out="laptop.pressed"),
        }

    def pressed(self) -> dict[str, int]:
        """How many rounds of packets were sent so far, by place and kind."""
        return {
            f"{host} {place} {kind}": count
            for host, presser in self.pressers.items()
            for place, kinds in presser.ask().items()
            for kind, count in kinds.items()
        }

    def seen(self, tap: str) -> list[Seen]:
        """Kinds of packets that came by."""
        return [
            Seen(*line[:7], quoted=tuple(line[7]) if line[7] is not None else None)
            for line in self.taps[tap].lines()
            if isinstance(line, list)
        ]

    def leaks(self, *, marked: bool = False) -> list[str]:
        """What came by and should not have. `marked` is for what was sent on purpose."""
        found = [("uplink", each) for each in self.seen("uplink") if outside(each)]
        found += [("router", each) for each in self.seen("router") if each.private]
        found += [("inet", each) for each in self.seen("inet") if each.way == "in" and self._strange(each)]
        return [f"{tap}: {each}" for tap, each in found if each.marked == marked]

    def _strange(self, seen: Seen) -> bool:
        if seen.protocol == "arp" or (seen.protocol == "icmp6" and 130 <= seen.source_port <= 143):
            return False
        return seen.source != EXIT

    # --------------------------------------------------------------------------------------------------- its processes

    def run(self, host: str | None, *command: str) -> str:
        """Run a command in a host to its end; None is the router. Raises `LabError`."""
        line = manager.command_in(self.lab, manager.find_host(self.lab, host) if host else None, command)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=env, check=False)
        if done.returncode:
            raise LabError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def node(self, *command: str) -> str:
        """Run a command on the node."""
        return self.run(self.lab.node, *command)

    def bulkhead(self, *arguments: str) -> str:
        """Run a command of ours on the node."""
        return self.node(sys.executable, "-c", "from controller.cli import main; main()", *arguments)

    def pids(self, *words: str) -> list[int]:
        """The node's processes whose command line has all of these words in it, as its own ids."""
        program = (
            "import os, sys\n"
            "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
            "    try: line = open(f'/proc/{pid}/cmdline').read().split('\\0')\n"
            "    except OSError: continue\n"
            "    if set(sys.argv[1:]) <= set(line) and line[0] != 'nsenter' and int(pid) != os.getpid(): print(pid)\n"
        )
        return [int(word) for word in self.node(sys.executable, "-I", "-c", program, *words).split()]

    def kill(self, *words: str) -> None:
        """End the one process with these words by SIGKILL."""
        found = self.pids(*words)
        assert len(found) == 1, (words, found)
        self.node("kill", "-9", str(found[0]))

    def program(self, name: str) -> int:
        """Process id of a program of the agent's; 0 while it is being started."""
        try:
            return int(json.loads((self.node_dir / f"run/agent/programs/{name}.json").read_text())["pid"])
        except FileNotFoundError:
            return 0

    def start(self, *command: str) -> None:
        """Start something on the node that stays."""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (self.directory / "started.log").open("ab") as log:
            manager.spawn(
                self.lab, self.lab.node, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                start_new_session=True,
            )  # fmt: skip

    def start_node(self) -> None:
        """`bulkhead up`."""
        self.start(sys.executable, "-c", "from controller.cli import main; main()", "up", str(self.state_file))

    def status(self) -> dict[str, Any]:
        """What the agent has written down about itself."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.node_dir / "run/agent/status.json").read_text())
            return found
        return {"settled": False, "pid": 0, "resources": []}

    def settled(self) -> bool:
        """Whether the agent says that all is as wanted."""
        return bool(self.status()["settled"])

    def reaches(self, host: str = "xray", source: str | None = None) -> bool:
        """Whether a new connection to the world is answered."""
        wanted = Try("tcp", INET, 443, source=source, timeout_s=1.0)
        with contextlib.suppress(LabError):  # a container may not be there yet
            return self.traffic.attempt(host, wanted).outcome == "reply"
        return False

    def events(self) -> Counter[str]:
        """How many events of each kind there were, of the agent and of the controller."""
        logs = (self.node_dir / "events", self.node_dir / "state/events")
        return Counter(str(record.kind) for log in logs for record in read(log))

    @contextlib.contextmanager
    def endpoint_cut(self) -> Iterator[None]:
        """The tunnel's endpoint is not reachable for a while."""
        with demo.tunnel_down(self.lab):
            yield


def one_line(lines: Sequence[object]) -> str:
    """For assertions."""
    return "\n".join(map(str, lines))
