"""A host that keeps the networks of the example state file apart, in namespaces of its own, for tests that break it.

Its network, its /run and its process ids are its own, so `bulkhead verify` inside sees
this host and nothing of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

from controller.model import BridgeKind
from controller.statefile import load
from lab.ovs import Here, LabError, PrivateOvs, die_with_parent
from lab.world import PRIVATE_ETC

from .conftest import STATE_FILE

ROOT = Path(__file__).parents[2]
_RUN = "mount -t tmpfs own /run && mkdir /run/netns /run/wireguard || exit 1\n"
_READY = "echo ready && exec sleep infinity"
_SERVE = """
import json, sys
from click.testing import CliRunner
from controller.cli import main
for line in sys.stdin:
    done = CliRunner().invoke(main, json.loads(line))
    print(json.dumps([done.exit_code, done.stdout, done.stderr, repr(done.exception)]), flush=True)
"""


class Answer(NamedTuple):
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


class Machine(Here):
    """Namespaces for network, mounts and process ids, that live as long as their first process.

    /run is its own, and so is /etc where that is asked for.
    """

    def __init__(self, *, private_etc: bool = False) -> None:
        script = _RUN + (PRIVATE_ETC if private_etc else "") + _READY
        unshare = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._holder = subprocess.Popen(
            [*unshare, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise LabError("no namespaces; is this root?")
        pid = self._holder.pid
        self.pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def command(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", f"--wd={ROOT}", "--", *command]

    def sh(self, script: str) -> str:
        """Run a script of the shell; every command of it has to succeed."""
        return self.run("sh", "-ec", script)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


class GoodHost:
    """Start it and close it. Every port is a veth into a namespace of its own, but for those that join bridges."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine()
        self.ovs = PrivateOvs(directory, namespace=self.machine)
        self.state = load(STATE_FILE).state
        self._server: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        """Make all of it."""
        try:
            self.machine.sh("ip link set lo up; sysctl -qw net.ipv6.conf.default.disable_ipv6=1 net.ipv4.ip_forward=0")
            self.ovs.start()
            self._build()
            self._tunnels()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End every process of it; all else goes with its namespaces."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self.ovs.close()

    def _build(self) -> None:
        joined = []
        for bridge in self.state.bridges:
            self.ovs.add_bridge(bridge.name)
            self.machine.sh(f"ip link set {bridge.name} up")
        for network in self.state.networks:
            assert network.mesh is not None
            self.machine.sh(f"ip link add {network.mesh.port} type veth peer name {network.mesh.far_port}")
            joined += [(network.bridge, network.mesh.port), (network.mesh.bridge, network.mesh.far_port)]
            if network.host is not None:
                self.machine.sh(f"ip address add {network.host}/{network.subnet.length} dev {network.bridge}")
        for bridge, port in joined:
            self.plug(bridge, port)
        for bridge in self.state.bridges:
            network = self.state.network(bridge.network)
            assert network.mesh is not None
            if bridge.kind is BridgeKind.MESH:
                self.veth(bridge.name, network.mesh.leg_port)
                continue
            for port in [m.port for m in network.members] + ([network.egress.port] if network.egress else []):
                self.veth(bridge.name, port)

    def veth(self, bridge: str, port: str) -> None:
        """A port of a bridge whose far end is in a namespace named after it."""
        self.machine.sh(f"ip netns add at-{port}; ip link add {port} type veth peer name eth0 netns at-{port}")
        self.plug(bridge, port)

    def plug(self, bridge: str, port: str) -> None:
        """Make an interface a port, as the operator's guide says."""
        hook = f'{{ type filter hook ingress device "{port}" priority -500; policy drop; }}'
        self.machine.sh(f"ip link set {port} up; nft 'add table netdev good; add chain netdev good at-{port} {hook}'")
        self.ovs.vsctl("add-port", bridge, port)

    def replug(self, bridge: str, port: str) -> None:
        """Make a veth and its port again, whatever has become of them."""
        self.ovs.vsctl("--if-exists", "del-port", port)
        gone = f"ip link del {port} 2>/dev/null || true; ip netns del at-{port} 2>/dev/null || true"
        chain = f"nft delete chain netdev good at-{port} 2>/dev/null || true"
        self.machine.sh(f"{gone}; {chain}; nft delete chain netdev bulkhead-mend drop-{port} 2>/dev/null || true")
        self.veth(bridge, port)

    def _tunnels(self) -> None:
        for port, device, allowed in (
            ("warp0", "wgwarp", "0.0.0.0/0"),
            ("nm-privacy", "wgpriv", "10.0.0.0/25"),
            ("nm-mgmt", "wgmgmt", "10.1.0.0/25"),
        ):
            self.machine.sh(f"ip netns exec at-{port} wireguard-go {device} >/dev/null 2>&1")
            self.allow(device, allowed)

    def allow(self, device: str, allowed: str) -> None:
        """Have one peer with these addresses."""
        script = f"""
            key=$(wg genkey); wg set {device} private-key /dev/stdin <<X
$(wg genkey)
X
            for peer in $(wg show {device} peers); do wg set {device} peer "$peer" remove; done
            wg set {device} peer "$(echo "$key" | wg pubkey)" allowed-ips {allowed}"""
        self.machine.sh(script)

    def verify(self, *arguments: str, file: Path | None = STATE_FILE) -> Answer:
        """`bulkhead verify`, inside."""
        if self._server is None:
            self._server = subprocess.Popen(
                self.machine.command(sys.executable, "-c", _SERVE),
                env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        told = ["verify", *([str(file)] if file else []), "--ovsdb", self.ovs.db, *arguments]
        self._server.stdin.write(json.dumps(told) + "\n")
        self._server.stdin.flush()
        code, out, err, exception = json.loads(self._server.stdout.readline())
        assert exception == "None" or exception.startswith("SystemExit("), exception
        return Answer(code, out, err)

    def checks(self, *arguments: str, file: Path | None = STATE_FILE) -> tuple[int, list[dict[str, Any]]]:
        """The exit code and the findings."""
        answer = self.verify("--json", *arguments, file=file)
        told = json.loads(answer.out)
        assert told["exit_code"] == answer.code
        return answer.code, told["checks"]

    def settled(self, *arguments: str) -> list[dict[str, Any]]:
        """The findings once all is good, or as they are after a while: Open vSwitch acts a moment after it is told."""
        deadline = time.monotonic() + 5
        while True:
            code, found = self.checks(*arguments)
            if code == 0 or time.monotonic() > deadline:
                return [finding for finding in found if finding["status"] not in ("ok", "absent")]
            with contextlib.suppress(LabError):
                self.ovs.vsctl("--timeout=2", "list-br")
