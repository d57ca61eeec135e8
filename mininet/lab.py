"""The lab: a described network in namespaces of its own, with its own Open vSwitch and a controller.

Started by `lab.manager` as the first process of new network, mount and process-id namespaces, so that whatever ends it
ends everything in it:

    unshare --net --mount --pid --fork --kill-child python3 mininet/lab.py ...

Runs on the system's Python, which has Mininet. Imports Mininet, the topology beside it, and `lab/ovs.py` by its path.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from mininet.log import setLogLevel
from mininet.net import Mininet
from mininet.node import OVSSwitch, RemoteController
from oo1424oo import OneFourTwoFour, run_in

CANARY_TABLE = 250
TCP_LISTEN = "0A"
WATCH_S = 0.5
STOP_S = 5.0


class Controller(RemoteController):  # type: ignore[misc]
    """The controller is a process of ours; Mininet only has to tell the switches where it listens."""

    def checkListening(self) -> None:  # Mininet's name; its own version runs telnet
        pass


# -- the lab itself ---------------------------------------------------------------------------------------------------


class Lab:
    """Open vSwitch, the controller and the network, in the order they start."""

    def __init__(self, options: argparse.Namespace, outer_pid: int, told: Any) -> None:
        self.options = options
        self.run_dir: Path = options.run_dir
        self.description: dict[str, Any] = json.loads(options.description.read_text())
        self.outer_pid = outer_pid
        self.told = told
        self.ovs_library = load_module("bulkhead_lab_ovs", options.ovs_library)
        self.ovs: Any = None
        self.net: Any = None
        self.controller: subprocess.Popen[bytes] | None = None
        self._alive: dict[str, bool] = {}

    def start(self) -> None:
        """Everything, until the network forwards what it should."""
        self.told.say("starting Open vSwitch")
        settle_kernel()
        self.ovs = self.ovs_library.PrivateOvs(self.run_dir / "ovs", namespace=self.ovs_library.Here())
        self.ovs.start()
        os.environ.update({key: self.ovs.env[key] for key in ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR")})
        if self.options.controller:
            self.told.say("starting the controller")
            self.start_controller()
        described = self.description
        self.told.say(f"building {len(described['switches'])} bridges and {len(described['hosts'])} hosts")
        self.build()
        self.configure_host()
        self.told.say("waiting for the ports")
        self.wait(self.missing_ports, "ports")
        if self.options.controller:
            self.told.say("waiting for the flows")
            self.wait(self.missing_flows, "flows")
        self.write_state()

    def start_controller(self) -> None:
        log = (self.run_dir / "controller.log").open("ab")
        command = self.options.controller
        self.controller = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def build(self) -> None:
        """The Mininet network, started."""
        # What Mininet does once per process (`fixLimits`) sets kernel-wide limits, which are the host's.
        Mininet.inited = True
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
        setLogLevel("warning")
        self.net = Mininet(
            topo=OneFourTwoFour(description=self.description),
            switch=OVSSwitch,
            controller=None,
            listenPort=None,
            build=False,
        )
        if self.options.controller:
            self.net.addController(Controller("c0", ip="127.0.0.1", port=self.options.port))
        self.net.build()
        self.shut_kernel_out()
        if self.options.controller:
            # A switch that is refused once tries again only after a second.
            self.wait(self.missing_listener, "listening controller")
        self.net.start()

    def shut_kernel_out(self) -> None:
        """What arrives at a port is for Open vSwitch alone.

        The userspace datapath reads a port beside the kernel and does not take the packet from it: one that is addressed
        to the port's own MAC would reach any of the host's addresses, past every flow. A port's ingress hook is behind
        Open vSwitch's ear and before the kernel's.
        """
        ports = [host["port"] for host in self.description["hosts"]]
        ports += [patch[end] for patch in self.description["patches"] for end in ("port1", "port2")]
        hook = 'type filter hook ingress device "{}" priority -500; policy drop;'
        chains = (f"chain port{number} {{ {hook.format(port)} }}\n" for number, port in enumerate(ports))
        rules = f"table netdev bulkhead {{\n{''.join(chains)}}}\n"
        done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failure(f"the kernel cannot be kept from the ports: nft: {done.stderr.strip()}")

    def configure_host(self) -> None:
        """The host's own addresses: on loopback, and on the bridges' LOCAL ports."""
        lines = ["set -e", *(f"ip address add {address} dev lo" for address in self.description["loopback"])]
        for switch in self.description["switches"]:
            name, local = switch["name"], switch["local"]
            if not local["addresses"] and not local["routes"]:
                continue
            lines.append(f"ip link set {name} up")
            lines += (f"ip address add {address} dev {name}" for address in local["addresses"])
            lines += (f"ip route replace {route.replace(' src ', f' dev {name} src ')}" for route in local["routes"])
        if self.net.switches:
            run_in(self.net.switches[0], ["sh", "-c", "\n".join(lines)])

    def wait(self, missing: Any, what: str) -> None:
        """Until `missing` names nothing more."""
        deadline = time.monotonic() + self.options.limit_s
        while left := missing():
            self.check_alive()
            if time.monotonic() > deadline:
                raise Failure(f"no {what} after {self.options.limit_s:g} s: {', '.join(left)}")
            time.sleep(0.02)

    def missing_ports(self) -> list[str]:
        """Ports that are not there, not up, or that OVS has an error with."""
        listed = self.ovs.vsctl("--format=json", "--columns=name,ofport,link_state,error", "list", "interface")
        up = {name for name, ofport, link, error in json.loads(listed)["data"] if is_up(ofport, link) and error == [
            "set", []]}  # fmt: skip
        wanted = [host["port"] for host in self.description["hosts"]]
        for patch in self.description["patches"]:
            wanted += (patch["port1"], patch["port2"])
        return [name for name in wanted if name not in up]

    def missing_listener(self) -> list[str]:
        """The controller's port, while nobody listens on it. Looked up: trying it would be a switch in its eyes."""
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ports = {int(fields[1].split(":")[1], 16) for fields in sockets if fields[3] == TCP_LISTEN}
        return [] if self.options.port in ports else [f"port {self.options.port}"]

    def missing_flows(self) -> list[str]:
        """Bridges that do not have what the controller sends last."""
        return [name for name in self.bridges() if not self.has_flows(name)]

    def bridges(self) -> list[str]:
        return [switch["name"] for switch in self.description["switches"]]

    def has_flows(self, bridge: str) -> bool:
        return "actions=" in self.ovs.ofctl("--no-stats", "dump-flows", bridge, f"table={CANARY_TABLE}")

    def check_alive(self) -> None:
        if self.controller is not None and self.controller.poll() is not None:
            raise Failure(f"the controller ended by itself (exit code {self.controller.returncode})")
        if self.ovs.vswitchd is None or self.ovs.vswitchd.poll() is not None:
            raise Failure("ovs-vswitchd ended by itself")

    def alive(self) -> dict[str, bool]:
        """Which of our processes still run."""
        return {
            "controller": self.controller is not None and self.controller.poll() is None,
            "ovs-vswitchd": self.ovs.vswitchd is not None and self.ovs.vswitchd.poll() is None,
        }

    def write_state(self) -> None:
        """lab.json, whole or not at all. Process ids are those inside, but for `pid`."""
        self._alive = self.alive()
        state = {
            "version": 1,
            "node": self.description["node"],
            "state_file": str(self.options.state_file),
            "pid": self.outer_pid,
            "hosts": [
                {**{key: host[key] for key in ("name", "aliases", "kind", "network", "port", "address")},
                 "pid": self.net[host["name"]].pid}
                for host in self.description["hosts"]
            ],
            "bridges": self.bridges(),
            "ovs": {"run_dir": str(self.ovs.directory), "db": self.ovs.db, "pid": self.ovs.vswitchd.pid},
            "controller": {
                "pid": self.controller.pid if self.controller else None,
                "run_dir": str(self.run_dir / "controller"),
                "events": str(self.run_dir / "events"),
                "log": str(self.run_dir / "controller.log"),
            },
            "alive": self._alive,
        }  # fmt: skip
        new = self.run_dir / "lab.json.new"
        new.write_text(json.dumps(state, indent=1))
        new.replace(self.run_dir / "lab.json")

    def serve(self) -> None:
        """Until a signal comes. A process of ours that ends is reported, not replaced: labs are for trying that out."""
        while True:
            time.sleep(WATCH_S)
            if self.alive() != self._alive:
                self.write_state()

    def stop(self) -> None:
        """End what wants to end in order. The namespaces and all else in them go when process 1 does."""
        if self.controller is not None and self.controller.poll() is None:
            self.controller.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.controller.wait(STOP_S)
        if self.ovs is not None:
            self.ovs.close()


def settle_kernel() -> None:
    """Our end of the network: no forwarding between the bridges, no IPv6 chatter of the kernel's on their ports."""
    for name, value in (
        ("ipv4/ip_forward", "0"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/conf/all/arp_ignore", "1"),  # an address is on one bridge; the other does not answer for it
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
    ):
        path = Path("/proc/sys/net", name)
        if path.exists():
            path.write_text(value)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def is_up(ofport: object, link: object) -> bool:
    return isinstance(ofport, int) and ofport > 0 and link == "up"


def load_module(name: str, path: Path) -> ModuleType:
    """A module of ours by its path: the package it is in belongs to another Python and is not on ours."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


first = load_module("bulkhead_lab_first", Path(__file__).resolve().parent.parent / "lab" / "first.py")
Failure = first.Failure


def main() -> int:
    """Read the command line and be process 1 of the lab."""
    parser = first.arguments(__doc__)
    parser.add_argument("--description", type=Path, required=True, help="what to build, as JSON")
    parser.add_argument("--ovs-library", type=Path, required=True, help="lab/ovs.py")
    parser.add_argument("--port", type=int, default=6653, help="where the controller listens, inside")
    parser.add_argument("controller", nargs=argparse.REMAINDER, help="-- and the controller's command")
    options = parser.parse_args()
    if options.controller[:1] == ["--"]:
        del options.controller[0]

    def work(outer_pid: int, told: Any) -> int:
        code: int = first.run(Lab(options, outer_pid, told), told)
        return code

    return int(first.begin(options, work))


if __name__ == "__main__":
    sys.exit(main())
