"""The security guide's machines: a router and an inference server that are set up as docs/security.md says, and a client.

Router and inference server are `Machine`s with a systemd of their own, joined by a network that stands for the internet.
The CA is at home, on no server. Everything is done by Bulkhead's commands. Needs root. Imports `machine` and `ovs`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lab.machine import LabError, Machine
from lab.ovs import Namespace

STATE_FILE = "/etc/bulkhead/state.yaml"
CA_FILE = "/var/lib/bulkhead/security/pki/ca.pem"
CLIENT = "198.51.100.9"
NEIGHBOUR = "198.51.100.8"
_SOURCE = Path(__file__).resolve().parent.parent
_BULKHEAD = (sys.executable, "-P", "-c", "from controller.cli import main; main()")
TIMERS = tuple(f"bulkhead-{name}.timer" for name in ("minute", "hourly", "weekly", "monthly"))


@dataclass(frozen=True, slots=True)
class Server:
    """A machine of the guide: its name in certificates, its address in the world, and its state file."""

    name: str
    role: str
    address: str
    state: str
    ips: tuple[str, ...]
    dns: tuple[str, ...] = ()

    @property
    def user(self) -> str:
        """Who its service runs as."""
        return self.role

    @property
    def names(self) -> list[str]:
        """What its certificate stands for, as options."""
        return [word for ip in self.ips for word in ("--ip", ip)] + [
            word for name in self.dns for word in ("--dns", name)
        ]


ROUTER = Server(
    "router1",
    "router",
    "198.51.100.1",
    """\
security:
  role: router
  name: router1
  names: [llm.example]
  peers: [{name: inf1, address: 10.0.0.2}]
""",
    ("10.0.0.1", "198.51.100.1"),
    ("llm.example",),
)
INFERENCE = Server(
    "inf1",
    "inference",
    "198.51.100.2",
    """\
security:
  role: inference
  name: inf1
  address: 10.0.0.2
  peers: [{name: router1, address: 10.0.0.1}]
""",
    ("10.0.0.2",),
)


class Guide:
    """All of it, in a directory. Use as a context manager; `start` builds it."""

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda _line: None) -> None:
        self.directory = directory.absolute()
        self._say = say
        self._stack = ExitStack()
        self.machines: dict[str, Machine] = {}
        self.key = self.directory / "laptop.key"
        self._world: Namespace | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Build it, as the guide says. Raises `LabError`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._say("building the internet")
        world = self._world = Namespace()
        self._stack.callback(world.close)
        world.run("sh", "-ec", "ip link add net0 type bridge; ip link set net0 up")
        self.client = self._outsider(CLIENT)
        self.neighbour = self._outsider(NEIGHBOUR)
        self.home("pki", "init", "home")
        self._say("starting router and inference server")
        servers = (ROUTER, INFERENCE)
        for server in servers:
            machine = self.machines[server.name] = Machine(server.name, self.directory / server.name)
            self._stack.callback(machine.close)
            self._on(server)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._firewalled, servers))
            self._say("exchanging WireGuard's public halves")
            self._introduce(servers)
            self._say("making certificates and starting the services")
            list(pool.map(self.certify, servers))
            list(pool.map(self._serve, servers))
        self._say("registering a client")
        self.home("client", "keygen", str(self.key))
        self.router.write("/root/laptop.pub", Path(f"{self.key}.pub").read_text())
        self.bulkhead(self.router, "client", "register", "laptop", "/root/laptop.pub")
        self.wait()

    @property
    def router(self) -> Machine:
        """The router's machine."""
        return self.machines[ROUTER.name]

    @property
    def inference(self) -> Machine:
        """The inference server's machine."""
        return self.machines[INFERENCE.name]

    # ------------------------------------------------------------------------------------------------ what people do

    def bulkhead(self, machine: Machine, *words: str) -> str:
        """A command on a server, as root; what it printed. Raises `LabError`."""
        return machine.run("bulkhead", *words)

    def home(self, *words: str) -> str:
        """A command where the CA is. Raises `LabError`."""
        return _ran(list(_BULKHEAD) + list(words), self._environment())

    def ask(self, *words: str, where: Namespace | None = None) -> subprocess.CompletedProcess[str]:
        """`bulkhead client call` of the router, by the registered client unless `--key` is among the words."""
        command = [*_BULKHEAD, "client", "call", f"https://{ROUTER.address}/v1/chat", "--ca", str(self._trust())]
        command += [] if "--key" in words else ["--key", str(self.key)]
        inside = (where or self.client).command(*command, *words)
        return subprocess.run(inside, capture_output=True, text=True, env=self._environment(), timeout=60)

    def verify(self, machine: Machine) -> dict[str, dict[str, str]]:
        """`bulkhead verify-network-config --json` of a server: its lines by their names."""
        command = machine.command("bulkhead", "verify-network-config", STATE_FILE, "--json")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        try:
            return {line["check"]: line for line in json.loads(done.stdout)["checks"]}
        except ValueError:
            raise LabError(f"verify-network-config of {machine.name} says nothing: {done.stderr.strip()}") from None

    def reboot(self, server: Server) -> None:
        """Pull the plug of a server, and switch it on again."""
        machine = self.machines[server.name]
        machine.off()
        self._on(server)

    def certify(self, server: Server) -> None:
        """A certificate for a server, whose key never leaves it; its service's user gets it too."""
        machine, sent, back = self.machines[server.name], f"/root/{server.name}.csr", f"/root/{server.name}.pem"
        self.bulkhead(machine, "pki", "request", server.name, *server.names, "-o", sent)
        request, signed = self.directory / f"{server.name}.csr", self.directory / f"{server.name}.pem"
        request.write_text(machine.run("cat", sent))
        words = ["pki", "sign", str(request), "--name", server.name, "--kind", "peer", *server.names]
        self.home(*words, "-o", str(signed))
        machine.write(back, signed.read_text())
        self.bulkhead(machine, "pki", "accept", back)

    # ----------------------------------------------------------------------------------------------------- its parts

    def _on(self, server: Server) -> None:
        machine = self.machines[server.name]
        machine.on()
        assert self._world is not None
        self._join(machine.pid, server.name)
        machine.run(
            "sh",
            "-ec",
            f"ip address add {server.address}/24 dev eth0; ip link set eth0 up; ip route add default via {CLIENT}",
        )

    def _join(self, pid: int, port: str) -> None:
        assert self._world is not None
        self._world.run(
            "sh", "-ec",
            f"ip link delete {port} 2>/dev/null || true; ip link add {port} type veth peer name eth0 netns {pid}; "
            f"ip link set {port} master net0 up",
        )  # fmt: skip

    def _outsider(self, address: str) -> Namespace:
        made = Namespace()
        self._stack.callback(made.close)
        self._join(made.pid, f"at-{address.rpartition('.')[2]}")
        made.run("sh", "-ec", f"ip address add {address}/24 dev eth0; ip link set eth0 up")
        return made

    def _firewalled(self, server: Server) -> None:
        """A machine with its units and its firewall, and a WireGuard key."""
        machine = self.machines[server.name]
        machine.write(STATE_FILE, server.state)
        machine.run("sh", "-ec", "bulkhead units install > /dev/null; systemd-sysusers; systemctl daemon-reload")
        machine.run("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/bulkhead.conf")
        machine.run("systemctl", "enable", "--now", "bulkhead-firewall.service")
        endpoint = f"{server.address}:51820"
        self.bulkhead(machine, "wg", "init", STATE_FILE, "--endpoint", endpoint, "--out", f"/root/{server.name}.pub")

    def _introduce(self, servers: tuple[Server, ...]) -> None:
        for one in servers:
            public = self.machines[one.name].run("cat", f"/root/{one.name}.pub")
            for other in servers:
                if other is not one:
                    machine = self.machines[other.name]
                    machine.write(f"/root/{one.name}.pub", public)
                    self.bulkhead(machine, "wg", "add", STATE_FILE, f"/root/{one.name}.pub")
        for each in servers:
            self.machines[each.name].run("systemctl", "enable", "--now", "bulkhead-wg.service")

    def _serve(self, server: Server) -> None:
        machine, home = self.machines[server.name], f"/var/lib/bulkhead/{server.user}"
        machine.run("install", "-d", "-m", "700", "-o", server.user, "-g", server.user, home)
        self.bulkhead(machine, "pki", "export", server.name, "--to", f"{home}/pki", "--owner", server.user)
        machine.run("systemctl", "enable", "--now", f"bulkhead-{server.role}.service", *TIMERS)

    def wait(self) -> None:
        """Until the inference server answers by way of the router. Raises `LabError`."""
        self._until(self._answers, "answer from the inference server by way of the router")

    def _answers(self) -> bool:
        return self.ask("--json", '{"prompt": "hello"}').returncode == 0

    def _until(self, good: Callable[[], bool], what: str, limit_s: float = 30) -> None:
        deadline = time.monotonic() + limit_s
        while not good():
            if time.monotonic() > deadline:
                raise LabError(f"no {what} after {limit_s:g} s")
            time.sleep(0.1)

    def _trust(self) -> Path:
        return self.directory / "home/pki/ca.pem"

    def _environment(self) -> dict[str, str]:
        return os.environ | {"BULKHEAD_SECURITY_DIR": str(self.directory / "home"), "PYTHONPATH": str(_SOURCE)}


def tokens(text: str) -> Iterator[tuple[str, float]]:
    """The words of a streamed answer, and when the inference server said each (seconds since 1970)."""
    for line in text.splitlines():
        if line.startswith("data: {"):
            found = json.loads(line[6:])
            yield str(found["token"]), float(found["at"])


def _ran(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    if done.returncode:
        raise LabError(f"{' '.join(command[4:])}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
