"""The lab of whole nodes: an internet, what is on it, and nodes that `bulkhead up` builds, in namespaces of their own.

Started by `lab.manager` as the first process of new network, mount and process-id namespaces, so that whatever ends it
ends everything in it. Each node has a network and a mount namespace with its own Open vSwitch, agent and controller;
the namespace this starts in is the internet's router. Imports `lab.first`, `lab.nodes` and `lab.ovs`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lab import first, nodes, places
from lab.nodes import Node, Uplink
from lab.ovs import Here, LabError, Namespace, PrivateOvs, die_with_parent

WATCH_S = 0.5
PRIVATE_ETC = """
mkdir -p /run/etc && mount --rbind /etc /run/etc && mount -o remount,bind,ro /run/etc || exit 1
mount -t tmpfs -o mode=755 own /etc || exit 1
find /run/etc -mindepth 1 -maxdepth 1 ! -name netns ! -type l -exec ln -s -t /etc {} + || exit 1
find /run/etc -mindepth 1 -maxdepth 1 -type l -exec cp -P -t /etc {} + || exit 1
"""
"""For a shell in a mount namespace of its own, with a /run of its own. The agent makes /etc/netns, which must not be the
host's: /etc becomes a directory of links to the host's files, which may be read. A copy would leave secrets behind."""
_NODE = f"""
mount --make-rprivate / || exit 1
if [ "$1" = private ]; then mount -t tmpfs -o mode=755 own /run || exit 1; fi
mkdir -p /run/cgroup && mount --rbind /sys/fs/cgroup /run/cgroup || exit 1
mount -t sysfs own /sys && mount --rbind /run/cgroup /sys/fs/cgroup && umount -l /run/cgroup && rmdir /run/cgroup || exit 1
for dir in /run/netns /run/wireguard /run/lxc; do mkdir -p $dir && mount -t tmpfs own $dir || exit 1; done
{PRIVATE_ETC}
echo ready && exec sleep infinity
"""


class Place(Namespace):
    """A node's namespaces for network and mounts. Outside of a lab, /run has to be made `private` too."""

    def __init__(self, *, private: bool = False) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", _NODE, "sh", "private" if private else "lab"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise LabError("a node's namespaces for network and mounts could not be made")
        self.pid = self._holder.pid
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--", *command]


class World:
    """Everything of the lab, in the order it starts."""

    def __init__(
        self, state_file: Path, run_dir: Path, outer_pid: int, say: Callable[[str], None], limit_s: float
    ) -> None:
        self._state_file, self._run_dir, self._outer_pid = state_file, run_dir, outer_pid
        self._say, self._limit_s = say, limit_s
        self._router = Here()
        self._places: dict[str, Here] = {}
        self._ovs: dict[str, PrivateOvs] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._alive: dict[str, bool] = {}
        self._nodes: tuple[Node, ...] = ()

    def start(self) -> None:
        """Build it, and wait until every node is as its state file says."""
        self._say("making keys and state files")
        planned = nodes.plan(self._state_file, self._run_dir / "keys")
        self._nodes = planned.nodes
        self._say("building the internet")
        self._internet()
        for name in nodes.OUTSIDERS:
            self._places[name] = Namespace()
            self._join(name, nodes.UPLINKS[name])
        for host, tunnels in planned.tunnels.items():
            for interface, config in tunnels.items():
                self._wireguard(host, interface, config)
        self._outside()
        for node in self._nodes:
            self._say(f"starting {node.name}")
            self._node(node)
        self._say("waiting for the nodes to be built")
        self._wait_ready()
        self._write_state()

    # ----------------------------------------------------------------------------------------------------- the world

    def _internet(self) -> None:
        for name, value in (("ipv4/ip_forward", 1), ("ipv6/conf/all/forwarding", 1), ("ipv4/conf/all/rp_filter", 0)):
            Path("/proc/sys/net", name).write_text(str(value))
        # Nobody out there routes private addresses: whatever leaks is seen to be dropped.
        private = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
        self._sh(self._router, "ip link set lo up", *(f"ip route add blackhole {prefix}" for prefix in private))

    def _join(self, name: str, uplink: Uplink) -> None:
        """A veth from a host to the router."""
        place = self._places[name]
        pid = place.pid if isinstance(place, Namespace) else 1
        port = f"to-{name}"[:15]
        self._sh(
            self._router,
            f"ip link add {port} type veth peer name eth0 netns {pid}",
            f"ip address add {uplink.router} dev {port}",
            f"ip -6 address add {uplink.router_ipv6} dev {port} nodad",
            f"ip link set {port} up",
        )
        self._sh(
            place,
            f"ip address add {uplink.address} dev eth0",
            f"ip -6 address add {uplink.ipv6} dev eth0 nodad",
            "ip link set eth0 up",
            f"ip route add default via {uplink.router.partition('/')[0]}",
            f"ip -6 route add default via {uplink.router_ipv6.partition('/')[0]}",
        )

    def _wireguard(self, host: str, interface: str, config: str) -> None:
        place = self._places[host]
        # Each host's tools look for sockets in one place: names of interfaces are told apart by the host's.
        name = interface if host == "droplet" else f"{host}-{interface}"
        self._spawn(f"wireguard {name}", place, ["wireguard-go", "-f", name])
        self._until(lambda: _listens(f"/var/run/wireguard/{name}.sock"), f"WireGuard of {host}")
        place.run("wg", "setconf", name, "/dev/stdin", stdin=config)

    def _outside(self) -> None:
        """The WARP endpoint, the droplet and the internet host."""
        warp = nodes.UPLINKS["warp"].address.partition("/")[0]
        self._sh(self._router, f"ip route add {nodes.EXIT}/32 via {warp}")
        self._sh(
            self._places["warp"],
            f"ip address add {nodes.EXIT}/32 dev lo",
            "ip link set warp-wg0 mtu 1280 up",
            "ip address add 172.16.0.1/32 dev warp-wg0",
            "ip route add 172.16.0.0/24 dev warp-wg0",
            "ip route add 10.0.0.0/24 dev warp-wg0",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            "nft add table ip exit",
            "nft add chain ip exit post '{ type nat hook postrouting priority srcnat; }'",
            f"nft add rule ip exit post oifname eth0 ip saddr 172.16.0.0/24 snat to {nodes.EXIT}",
            "nft add chain ip exit forwarded '{ type filter hook forward priority filter; }'",
            "nft add rule ip exit forwarded tcp flags syn tcp option maxseg size set rt mtu",
        )
        self._sh(
            self._places["droplet"],
            f"ip address add {nodes.DROPLET_PRIVACY}/32 dev nm-privacy",
            f"ip address add {nodes.DROPLET_MGMT}/32 dev nm-mgmt",
            "ip link set nm-privacy mtu 1420 up",
            "ip link set nm-mgmt mtu 1420 up",
            "ip route add 10.0.0.0/24 dev nm-privacy",
            "ip route add 10.1.0.0/24 dev nm-mgmt",
            # What the proxy sends has the mesh's address, and goes into the mesh.
            f"ip rule add from {nodes.DROPLET_PRIVACY} lookup 100",
            "ip route add default dev nm-privacy table 100",
        )
        proxy = ["microsocks", "-i", "0.0.0.0", "-p", "1080", "-b", nodes.DROPLET_PRIVACY]
        self._spawn("SOCKS5 proxy", self._places["droplet"], proxy)
        listen = "TCP4-LISTEN:9573,fork,reuseaddr"
        self._spawn(
            "management entry",
            self._places["droplet"],
            ["socat", listen, f"TCP4:10.1.0.201:9573,bind={nodes.DROPLET_MGMT},connect-timeout=3"],
        )
        names = [
            "dnsmasq",
            "-k",
            "-R",
            "-h",
            "-u",
            "root",
            "-x",
            "",
            "--address=/example.test/1.2.3.4",
            "-8",
            "-",
        ]
        self._spawn("internet's names", self._places["inet"], names)

    # ----------------------------------------------------------------------------------------------------- the nodes

    def node_dir(self, name: str) -> Path:
        """A node's directory."""
        return self._run_dir / "nodes" / name

    def inner_dir(self, name: str) -> Path:
        """The same by a path that is open to everybody inside: resolvers read their names there as nobody."""
        return Path("/run/nodes", name)

    def _node(self, node: Node) -> None:
        directory = self.node_dir(node.name)
        keys = self._run_dir / "keys" / node.name
        directory.mkdir(parents=True)
        keys.parent.mkdir(mode=0o700, exist_ok=True)
        keys.mkdir(mode=0o700)
        inner = self.inner_dir(node.name)
        inner.mkdir(parents=True)
        first.mount("--bind", str(directory), str(inner))
        for name, key in node.keys.items():
            descriptor = os.open(keys / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{key}\n")
        (directory / "node.yaml").write_text(yaml.safe_dump(node.state, sort_keys=False))
        place = self._places[node.name] = Place()
        self._join(node.name, node.uplink)
        ovs = self._ovs[node.name] = PrivateOvs(directory / "ovs", namespace=place)
        ovs.start()
        # By the path that is open to everybody: the API, which is not root, reads the file too.
        command = [
            sys.executable,
            "-c",
            "from controller.cli import main; main()",
            "up",
            str(inner / "node.yaml"),
            "-v",
        ]
        env = self.node_env(node.name) | {"PYTHONPATH": str(places.OVS_LIBRARY.parent.parent)}
        self._spawn(f"{node.name}: bulkhead up", place, command, env)

    def node_env(self, name: str) -> dict[str, str]:
        """What makes commands on a node find what is the node's."""
        directory = self.inner_dir(name)
        return {
            "BULKHEAD_NODE": name,
            "BULKHEAD_RUN_DIR": str(directory / "run"),
            "BULKHEAD_STATE_DIR": str(directory / "state"),
            "BULKHEAD_EVENTS": str(directory / "events"),
            "BULKHEAD_OVSDB": f"unix:{directory}/ovs/db.sock",
            "OVS_RUNDIR": str(directory / "ovs"),
        }

    def _ready(self, node: Node) -> bool:
        directory = self.node_dir(node.name)
        wanted = ["run/api.sock", *(["state/api/certificate.pem"] if node.has_api_container else [])]
        with contextlib.suppress(OSError, ValueError):
            settled = json.loads((directory / "run/agent/status.json").read_text())["settled"]
            return bool(settled) and all((directory / name).exists() for name in wanted)
        return False

    def _wait_ready(self) -> None:
        waiting = list(self._nodes)
        deadline = time.monotonic() + self._limit_s
        while waiting := [node for node in waiting if not self._ready(node)]:
            dead = [name for name, lives in self.alive().items() if not lives]
            if dead:
                raise LabError(f"{', '.join(dead)} ended by itself; see the logs in {self._run_dir}/logs")
            if time.monotonic() > deadline:
                names = [node.name for node in waiting]
                raise LabError(f"not built after {self._limit_s:g} s: {', '.join(names)}; {self._lacks(names)}")
            time.sleep(0.05)

    def _lacks(self, names: list[str]) -> str:
        out = []
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                rows = json.loads((self.node_dir(name) / "run/agent/status.json").read_text())["resources"]
                out += [f"{name} {row['key']}: {row['why']}" for row in rows if row["phase"] != "done"]
        return "; ".join(out[:3]) or f"the agent has not said why; see the logs in {self._run_dir}/logs"

    # -------------------------------------------------------------------------------------------------------- common

    def _sh(self, place: Here, *lines: str) -> None:
        place.run("sh", "-ec", "\n".join(lines))

    def _spawn(self, name: str, place: Here, command: list[str], env: dict[str, str] | None = None) -> None:
        logs = self._run_dir / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name.replace(' ', '-').replace(':', '')}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                place.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _until(self, good: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 10
        while not good():
            if time.monotonic() > deadline:
                raise LabError(f"no {what} after 10 s; see the logs in {self._run_dir}/logs")
            time.sleep(0.01)

    def alive(self) -> dict[str, bool]:
        """Which of our processes still run."""
        out = {name: process.poll() is None for name, process in self._processes.items()}
        for name, ovs in self._ovs.items():
            out[f"{name}: ovs-vswitchd"] = ovs.vswitchd is not None and ovs.vswitchd.poll() is None
        return out

    def _hosts(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for node in self._nodes:
            place = self._places[node.name]
            assert isinstance(place, Place)
            common = {"pid": place.pid, "node": node.name, "env": self.node_env(node.name)}
            out.append(_host(node.name, "node", "", "eth0", node.uplink.address, **common))
            for each in node.containers:
                aliases = (each["id"], each["port"], each["address"], *each["services"][:1])
                out.append(
                    _host(each["name"], "container", each["network"], each["port"], each["address"], *aliases, **common)
                    | {"netns": f"bulkhead-{each['id']}"}
                )
        for name in nodes.OUTSIDERS:
            place = self._places[name]
            assert isinstance(place, Namespace)
            out.append(_host(name, "outside", "", "eth0", nodes.UPLINKS[name].address, pid=place.pid, node="", env={}))
        return out

    def _write_state(self) -> None:
        """lab.json, whole or not at all. Process ids are those inside, but for `pid`."""
        self._alive = self.alive()
        main = self._nodes[0].name
        state = {
            "version": 2,
            "node": main,
            "state_file": str(self._state_file),
            "pid": self._outer_pid,
            "hosts": self._hosts(),
            "bridges": self._ovs[main].vsctl("list-br").split(),
            "ovs": {"run_dir": str(self.node_dir(main) / "ovs"), "db": self._ovs[main].db},
            "controller": {"run_dir": str(self.node_dir(main) / "run"), "events": str(self.node_dir(main) / "events")},
            "alive": self._alive,
        }
        new = self._run_dir / "lab.json.new"
        new.write_text(json.dumps(state, indent=1))
        new.replace(self._run_dir / "lab.json")

    def serve(self) -> None:
        """Until a signal comes. A process that ends is reported, not replaced: labs are for trying that out."""
        while True:
            time.sleep(WATCH_S)
            if self.alive() != self._alive:
                self._write_state()

    def stop(self) -> None:
        """Nothing to do: with the first process everything goes."""


def _listens(path: str) -> bool:
    """Whether anybody answers on a unix socket. It is there a moment before, and until then `wg` asks the kernel."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path) == 0


def _host(name: str, kind: str, network: str, port: str, address: str, *aliases: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "aliases": list(aliases), "kind": kind, "network": network, "port": port, "address": address, **more,
    }  # fmt: skip


def main() -> int:
    """Read the command line and be process 1 of the lab."""
    options = first.arguments(__doc__).parse_args()

    def work(outer_pid: int, told: first.Told) -> int:
        return first.run(World(options.state_file, options.run_dir, outer_pid, told.say, options.limit_s), told)

    return first.begin(options, work)


if __name__ == "__main__":
    sys.exit(main())
