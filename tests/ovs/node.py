"""A whole node for tests: the four bridges of the example with real ports, a host behind each port, and a controller.

Everything is in network namespaces without names: one for Open vSwitch and the host's own ports, one for each
endpoint. Sockets are opened inside them by this process, so that a test sees and sends whatever it likes from
anywhere. Frames are made by hand here, and addresses come from the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ovs.unixctl.client import UnixctlClient

from controller import statefile
from controller.asking import ask
from controller.eventread import read
from controller.events import Record
from controller.grants import passages
from controller.model import DesiredState, Grant, Ipv4, Mac, Network
from lab.ovs import Here, Namespace, PrivateOvs
from tests.fakes.granting import with_grants, write_grants

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "oo1424oo.yaml"
BULKHEAD = (sys.executable, "-c", "from controller.cli import main; main()")
BRIDGES = ("mesh-privacy", "mesh-mgmt", "vmbr0", "vmbr1")
PATCHES = {"to-privacy": ("mesh-privacy", "from-privacy", "vmbr0"), "to-mgmt": ("mesh-mgmt", "from-mgmt", "vmbr1")}
LISTEN = 6653

WORLD = "198.51.100.10"
"""Somebody out there, reached through the egress."""
HOST_WORLD = "203.0.113.7"
"""The host's own address in the world: what VPN clients seem to come from, once the host has passed them on."""
CLIENT_WORLD = "192.0.2.33"
"""A VPN client on the other side of the mesh."""

Socket = socket.socket
ETH_P_ALL = 3
PACKET_OUTGOING = 4
SO_RCVBUFFORCE = 33
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def inside(namespace: Here) -> Iterator[None]:
    """Open sockets (and /proc/sys/net) in another network namespace. This thread only."""
    if not isinstance(namespace, Namespace):
        yield
        return
    with open("/proc/thread-self/ns/net") as home, open(f"/proc/{namespace.pid}/ns/net") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@dataclass(slots=True, eq=False)
class Endpoint:
    """Somebody who sends and receives: a container, a mesh peer, the world, or the host on one of its bridges."""

    name: str
    namespace: Namespace
    interface: str
    bridge: str
    port: str
    mac: Mac
    address: str
    others: tuple[str, ...] = ()
    """Further addresses it has."""

    def socket(self, kind: int = socket.SOCK_STREAM, proto: int = 0, source: str | None = None) -> Socket:
        """An IPv4 socket that sends by this interface only."""
        with inside(self.namespace):
            sock = socket.socket(socket.AF_INET, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.interface.encode())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source is not None:
            sock.bind((source, 0))
        sock.setblocking(False)
        return sock

    def raw(self) -> Socket:
        """A socket for whole frames."""
        with inside(self.namespace):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        sock.bind((self.interface, ETH_P_ALL))
        sock.setblocking(False)
        return sock

    def send(self, *frames: bytes) -> None:
        """Put frames on the wire as they are."""
        with inside(self.namespace):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with sock:
            sock.bind((self.interface, 0))
            for frame in frames:
                sock.send(frame.ljust(60, b"\0"))

    def run(self, *command: str, timeout_s: float = 30) -> str:
        """Run a program there."""
        return self.namespace.run(*command, timeout_s=timeout_s)


class Watch:
    """What arrives at endpoints, from the moment it is made. Frames an endpoint sends itself are left out."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._sockets = {endpoint.name: endpoint.raw() for endpoint in endpoints}
        self._frames: dict[str, list[bytes]] = {endpoint.name: [] for endpoint in endpoints}

    def frames(self, name: str | None = None) -> dict[str, list[bytes]]:
        """All frames so far, by endpoint."""
        for endpoint, sock in self._sockets.items():
            if name in (None, endpoint):
                self._drain(endpoint, sock)
        return self._frames

    def _drain(self, endpoint: str, sock: socket.socket) -> None:
        while True:
            try:
                frame, address = sock.recvfrom(65535)
            except BlockingIOError:
                return
            if address[2] != PACKET_OUTGOING:
                self._frames[endpoint].append(frame)

    def holding(self, marker: bytes) -> dict[str, int]:
        """How many frames with `marker` arrived, by endpoint; not counting ICMP errors, which quote what came."""

        def counts(frame: bytes) -> bool:
            return marker in frame and not (frame[12:14] == b"\x08\0" and frame[23] == 1 and frame[34] in (3, 11))

        found = {name: sum(map(counts, frames)) for name, frames in self.frames().items()}
        return {name: count for name, count in found.items() if count}

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets.values():
            sock.close()


class Controller:
    """The controller's process, in Open vSwitch's namespace."""

    def __init__(self, node: Node, file: Path, *, listen: str = f"tcp:127.0.0.1:{LISTEN}", options: Sequence[str] = ()):
        self.node = node
        self.file = file
        self.listen = listen
        self.options = tuple(options)
        self.run_dir = node.directory / "run"
        self.events_dir = node.directory / "events"
        self.log_file = node.directory / "controller.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Its command line."""
        where = ("--run-dir", str(self.run_dir), "--events", str(self.events_dir), "--ovsdb", self.node.ovs.db)
        listen = ("controller", str(self.file), "--listen", self.listen)
        return self.node.namespace.command(*self.node.settings.program, *listen, *where, *self.options)

    def start(self, *, wait: bool = True) -> None:
        """Start it; with `wait`, until every bridge is as declared."""
        self.process = subprocess.Popen(
            self.command(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self.log_file.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if wait:
            self.wait_steady()

    @property
    def pid(self) -> int:
        """Its process id (nsenter becomes the program it starts)."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """End it in order."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        """What it printed so far."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def status(self) -> dict[str, Any]:
        """What `bulkhead status --json` prints."""
        return ask(self.run_dir, {"ask": "status"})

    def steady(self, bridges: Sequence[str] = BRIDGES) -> bool:
        """Whether these bridges are as declared."""
        try:
            status = self.status()
        except Exception:
            return False
        phases = {bridge["name"]: bridge["phase"] for bridge in status["bridges"]}
        return all(phases.get(name) == "steady" for name in bridges)

    def wait_steady(self, bridges: Sequence[str] = BRIDGES, timeout_s: float = 15) -> None:
        """Wait until `steady`."""
        wait_for(lambda: self.steady(bridges) or not self.alive(), timeout_s, self.last_words)
        assert self.alive(), self.log()

    def last_words(self) -> str:
        """The newest events, and the end of the log."""
        return "\n".join([*(record.text for record in self.events()[-12:]), *self.log().splitlines()[-8:]])

    def flows(self, bridge: str) -> list[dict[str, Any]]:
        """What `bulkhead flows BRIDGE --json` prints."""
        rows: list[dict[str, Any]] = ask(self.run_dir, {"ask": "flows", "bridge": bridge})["flows"]
        return rows

    def events(self, *kinds: str, after: int = 0) -> list[Record]:
        """Events after number `after`, of these kinds (none given: all)."""
        if not self.events_dir.exists():
            return []
        return [r for r in read(self.events_dir) if r.seq > after and (not kinds or r.kind in kinds)]

    def last_event(self) -> int:
        """The number of the newest event."""
        return max((record.seq for record in self.events()), default=0)

    def wait_event(self, kind: str, after: int, timeout_s: float = 5, holding: str = "") -> Record:
        """Wait for an event of that kind whose text has `holding` in it."""
        found: list[Record] = []

        def seen() -> bool:
            found[:] = [record for record in self.events(kind, after=after) if holding in record.text]
            return bool(found)

        wait_for(seen, timeout_s, lambda: f"no {kind} {holding!r} in {[str(e.text) for e in self.events(after=after)]}")
        return found[0]

    def cpu_s(self) -> float:
        """Processor time it has used, of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class NodeSettings:
    """How to build a node."""

    file: Path = EXAMPLE
    controllers: bool = True
    """Whether the bridges are told where the controller listens."""
    target: str = f"tcp:127.0.0.1:{LISTEN}"
    program: tuple[str, ...] = BULKHEAD
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `networks` in the state file to replace: {"privacy": {"refuse": False}}."""


class Node:
    """Open vSwitch with the example's four bridges, real ports, hosts, and a controller that is not started yet."""

    def __init__(self, settings: NodeSettings | None = None) -> None:
        self.settings = settings or NodeSettings()
        self.directory = Path(tempfile.mkdtemp(prefix="bulkhead-node-"))
        self.file = self.directory / "state.yaml"
        self.write_state(self.settings.changes)
        self.state: DesiredState = statefile.load(self.file).state
        self.ovs = PrivateOvs(self.directory / "ovs")
        assert isinstance(self.ovs.namespace, Namespace)
        self.namespace: Namespace = self.ovs.namespace
        self.endpoints: dict[str, Endpoint] = {}
        self.controller = Controller(self, self.file)
        self._numbers: dict[str, dict[int, str]] = {}
        self._patches: set[tuple[str, str]] = set()

    # ------------------------------------------------------------------------------------------------------- building

    def __enter__(self) -> Node:
        try:
            self._quiet(self.namespace)
            self.ovs.start()
            self._add_bridges()
            for network in self.state.networks:
                self._add_network(network)
            self._add_host()
            if self.settings.controllers:
                self.set_controllers()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        self.controller.kill()
        self.ovs.close()
        for endpoint in self.endpoints.values():
            if endpoint.namespace is not self.namespace:
                endpoint.namespace.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def write_state(self, changes: Mapping[str, Any], *, base: Path | None = None) -> None:
        """Replace the state file, atomically, by the example with `changes` to its networks."""
        tree = yaml.safe_load((base or self.settings.file).read_text())
        for name, keys in changes.items():
            tree["networks"][name].update(keys)
        self.replace_state(yaml.safe_dump(tree))

    def replace_state(self, text: str) -> None:
        """Replace the state file atomically."""
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    def grant(self, *grants: Grant) -> None:
        """Have these grants and no others, patch ports included. The program has to be `granting.PROGRAM`."""
        before = self.controller.status()["state"]
        state = with_grants(self.state, grants)
        write_grants(self.file, grants)
        wanted = {end: far for p in passages(state) for end, far in (((p[0], p[1]), p[3]), ((p[2], p[3]), p[1]))}
        for (bridge, port), peer in wanted.items():
            options = ("--", "set", "interface", port, "type=patch", f"options:peer={peer}")
            self.ovs.vsctl("--may-exist", "add-port", bridge, port, *options)
        for bridge, port in self._patches - wanted.keys():
            self.ovs.vsctl("--if-exists", "del-port", bridge, port)
        self._patches = set(wanted)
        self._numbers.clear()
        wait_for(lambda: state.digest == before or self.controller.status()["state"] == state.digest, 5)
        self.controller.wait_steady()

    @staticmethod
    def _quiet(namespace: Namespace) -> None:
        """No packets of the kernel's own making, and none that it thinks it had better route or refuse."""
        with inside(namespace):
            for name, value in (
                ("ipv4/ip_forward", "0"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                ("ipv4/conf/all/arp_announce", "2"),
                ("ipv4/conf/all/arp_ignore", "1"),
                ("ipv4/icmp_ratelimit", "0"),
                ("ipv4/tcp_syn_retries", "2"),
                ("ipv6/conf/all/disable_ipv6", "1"),
                ("ipv6/conf/default/disable_ipv6", "1"),
            ):
                Path("/proc/sys/net", name).write_text(value)

    def _add_bridges(self) -> None:
        for number, name in enumerate(BRIDGES, start=1):
            mac = Mac.derive("host", name)
            self.ovs.add_bridge(name, f"other-config:hwaddr={mac}", f"other-config:datapath-id={number:016x}")
        lines = []
        for far, (_, near, _) in PATCHES.items():
            lines.append(f"link add {far} type veth peer name {near}")
            lines += [f"link set {name} up" for name in (far, near)]
        self._ip(self.namespace, lines)
        for far, (mesh_bridge, near, bridge) in PATCHES.items():
            self.attach(mesh_bridge, far)
            self.attach(bridge, near)

    def _add_network(self, network: Network) -> None:
        length = network.subnet.length
        for member in network.members:
            others = [f"{Ipv4(prefix.address + 5)}/32" for prefix in member.routed]
            self._add_endpoint(
                {"mcp-server": "mcp", "op-dbus-api": "api"}.get(member.name, member.name),
                (network.bridge, member.port),
                member.mac,
                [f"{member.address}/{length}", *others],
                str(network.gateway),
            )
        assert network.mesh is not None
        peer = str(Ipv4(network.subnet.address + 50))
        self._add_endpoint(
            {"privacy": "peer_priv", "management": "peer_mgmt"}[network.name],
            (network.mesh.bridge, network.mesh.leg_port),
            network.mesh.mac,
            [f"{peer}/{length}", *([f"{CLIENT_WORLD}/32"] if network.vpn else [])],
            str(network.gateway),
        )
        if network.egress is not None:
            self._add_endpoint(
                "inet",
                (network.bridge, network.egress.port),
                network.egress.mac,
                [f"{WORLD}/32", f"{network.gateway}/{length}"],
                None,
            )
            # As the leg does: what lives behind a member is reached by way of it.
            behind = [(prefix, member.address) for member in network.members for prefix in member.routed]
            self._ip(self["inet"].namespace, [f"route add {prefix} via {address}" for prefix, address in behind])

    def _add_endpoint(
        self, name: str, at: tuple[str, str], mac: Mac, addresses: list[str], gateway: str | None
    ) -> None:
        namespace = Namespace()
        bridge, port = at
        plain = [address.partition("/")[0] for address in addresses]
        self.endpoints[name] = Endpoint(name, namespace, "eth0", bridge, port, mac, plain[0], tuple(plain[1:]))
        self._quiet(namespace)
        self._ip(
            self.namespace,
            [f"link add {port} type veth peer name eth0 address {mac} netns {namespace.pid}", f"link set {port} up"],
        )
        namespace.run("ethtool", "-K", "eth0", "tx", "off")
        lines = [f"address add {address} dev eth0" for address in addresses]
        lines.append("link set eth0 up")
        if gateway is not None:
            lines.append(f"route add default via {gateway} src {plain[0]}")
        self._ip(namespace, lines)
        self.attach(bridge, port)

    def _add_host(self) -> None:
        privacy, management = self.state.network("privacy"), self.state.network("management")
        lines = [f"link set {name} up" for name in BRIDGES]
        lines.append(f"address add {HOST_WORLD}/32 dev lo")
        assert privacy.vpn is not None and management.host is not None
        vpn_server = privacy.member(privacy.vpn.member_id).address
        lines.append(f"route add {vpn_server} dev vmbr0 src {HOST_WORLD}")
        lines.append(f"address add {management.host}/{management.subnet.length} dev vmbr1")
        self._ip(self.namespace, lines)
        for name, bridge, address in (("host0", "vmbr0", HOST_WORLD), ("host1", "vmbr1", str(management.host))):
            mac = Mac.derive("host", bridge)
            self.endpoints[name] = Endpoint(name, self.namespace, bridge, bridge, "LOCAL", mac, address)

    @staticmethod
    def _ip(namespace: Namespace, lines: Sequence[str]) -> None:
        namespace.run("ip", "-batch", "-", stdin="\n".join(lines))

    def attach(self, bridge: str, port: str, number: int | None = None) -> None:
        """Add an interface to a bridge.

        With the userspace datapath the kernel would still see what arrives there and answer for the host's addresses,
        past every flow; it is told not to.
        """
        self.namespace.run("ethtool", "-K", port, "tx", "off")
        hook = f'type filter hook ingress device "{port}" priority -500;'
        self.namespace.run("nft", "-f", "-", stdin=f"table netdev ports {{\nchain {port} {{ {hook} drop; }}\n}}\n")
        self._numbers.pop(bridge, None)
        self.ovs.vsctl("add-port", bridge, port)
        if number is not None:
            self.ovs.vsctl("set", "interface", port, f"ofport_request={number}")

    def set_controllers(self, target: str | None = None, bridges: Sequence[str] = BRIDGES) -> None:
        """Tell bridges where the controller is."""
        for bridge in bridges:
            self.ovs.vsctl(
                "set-controller", bridge, target or self.settings.target, "--",
                "set", "controller", bridge, "connection-mode=out-of-band", "max_backoff=1000",
            )  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- looking

    def __getitem__(self, name: str) -> Endpoint:
        return self.endpoints[name]

    def watch(self, *but: str) -> Watch:
        """Watch every endpoint, except those named."""
        return Watch([endpoint for endpoint in self.endpoints.values() if endpoint.name not in but])

    def port_number(self, port: str) -> int:
        """The OpenFlow number of a port, by name."""
        return int(self.ovs.vsctl("get", "interface", port, "ofport"))

    def settle(self) -> None:
        """Wait until the counters of flows hold all packets that came so far."""
        self.ovs.appctl("revalidator/wait")
        self.ovs.appctl("revalidator/wait")

    def dump(self, bridge: str) -> set[str]:
        """The bridge's flows without counters and ages, one normalized line each."""
        lines = self.ovs.ofctl("--no-stats", "--no-names", "dump-flows", bridge).splitlines()
        return {line.strip() for line in lines if "actions=" in line}

    def own_dump(self, bridge: str) -> set[str]:
        """The same without learned flows."""
        return {line for line in self.dump(bridge) if not learned(line)}

    def counters(self, bridge: str) -> Counter[str]:
        """Packets by 'TABLE app object', as the controller names them."""
        self.settle()
        found: Counter[str] = Counter()
        for row in self.controller.flows(bridge):
            found[f"{row['table_name']} {row['app']} {row['object']}"] += row["packets"]
        return found

    def trace(self, bridge: str, flow: str) -> list[str]:
        """Where `ofproto/trace` says a packet goes: the ports it leaves by, and `CONTROLLER`."""
        error, result = self._unixctl("ofproto/trace", bridge, flow)
        assert not error, error
        if bridge not in self._numbers:
            self._numbers[bridge] = {number: name for name, number in self.ovs.port_numbers(bridge).items()}
        numbers = self._numbers[bridge]
        out: list[str] = []
        for line in str(result).splitlines():
            if "skipping output to input port" in line:
                out.pop()
            elif match := re.match(r"\s+output:(\d+)$", line):
                out.append(numbers[int(match[1])])
            elif re.match(r"\s+LOCAL$", line):
                out.append("LOCAL")
            elif re.match(r"\s+IN_PORT$", line):
                out.append("IN_PORT")
            elif line.strip().startswith("CONTROLLER:"):
                out.append("CONTROLLER")
        return out

    def _unixctl(self, command: str, *args: str) -> tuple[Any, Any]:
        error, client = UnixctlClient.create(str(self.ovs.ctl))
        assert not error, error
        try:
            error, failed, result = client.transact(command, list(args))
        finally:
            client.close()
        return error or failed, result


def learned(line: str) -> bool:
    """Whether a dumped flow was learned or made for a while: its cookie says so."""
    match = re.search(r"cookie=0x([0-9a-f]+)", line)
    return match is not None and int(match[1], 16) >> 47 == 0xB01C << 1 | 1


def wait_for(condition: Callable[[], object], timeout_s: float, why: Callable[[], str] | str = "") -> None:
    """Wait until `condition`; fail saying why after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {why() if callable(why) else why}")
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------- frames


def ethernet(target: int | str, source: int | str, ethertype: int, payload: bytes) -> bytes:
    """An Ethernet frame."""
    return _mac(target) + _mac(source) + ethertype.to_bytes(2, "big") + payload


def _mac(address: int | str) -> bytes:
    number = address if isinstance(address, int) else Mac.parse(address)
    return int(number).to_bytes(6, "big")


def tagged(frame: bytes, vlan: int, tpid: int = 0x8100) -> bytes:
    """The frame with a VLAN tag."""
    return frame[:12] + tpid.to_bytes(2, "big") + vlan.to_bytes(2, "big") + frame[12:]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(
    source: str, target: str, proto: int, payload: bytes, *, offset: int = 0, more: bool = False, ident: int = 7
) -> bytes:
    """An IPv4 packet. `offset` is in bytes."""
    fragment = (0x2000 if more else 0) | offset // 8
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = b"\x45\0" + (20 + len(payload)).to_bytes(2, "big") + ident.to_bytes(2, "big")
    head += fragment.to_bytes(2, "big") + bytes((64, proto, 0, 0)) + addresses
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + payload


def _sum4(source: str, target: str, proto: int, segment: bytes) -> bytes:
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + bytes((0, proto)) + len(segment).to_bytes(2, "big")
    return checksum(pseudo + segment).to_bytes(2, "big")


def udp(source: str, target: str, sport: int, dport: int, data: bytes) -> bytes:
    """A UDP datagram, without IP."""
    segment = b"".join(n.to_bytes(2, "big") for n in (sport, dport, 8 + len(data), 0)) + data
    return segment[:6] + _sum4(source, target, 17, segment) + segment[8:]


def tcp(source: str, target: str, sport: int, dport: int, *, flags: int = 2, data: bytes = b"", seq: int = 1) -> bytes:
    """A TCP segment (SYN unless told otherwise), without IP."""
    segment = sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + seq.to_bytes(4, "big") + bytes(4)
    segment += bytes((0x50, flags)) + (1024).to_bytes(2, "big") + bytes(4) + data
    return segment[:16] + _sum4(source, target, 6, segment) + segment[18:]


def icmp(kind: int, data: bytes, code: int = 0) -> bytes:
    """An ICMP message; an echo request is kind 8."""
    message = bytes((kind, code, 0, 0)) + b"\0\x07\0\x01" + data
    return message[:2] + checksum(message).to_bytes(2, "big") + message[4:]


def arp(op: int, sender: tuple[int, str], target: tuple[int, str]) -> bytes:
    """An ARP packet, (MAC, IPv4 address) each."""
    out = b"\0\1\x08\0\6\4" + op.to_bytes(2, "big")
    for mac, address in (sender, target):
        out += _mac(mac) + socket.inet_aton(address)
    return out


def ipv6(source: str, target: str, proto: int, payload: bytes) -> bytes:
    """An IPv6 packet."""
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return b"\x60\0\0\0" + len(payload).to_bytes(2, "big") + bytes((proto, 255)) + addresses + payload


def icmp6(source: str, target: str, kind: int, body: bytes) -> bytes:
    """An ICMPv6 message, without IP."""
    message = bytes((kind, 0, 0, 0)) + body
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    pseudo = addresses + len(message).to_bytes(4, "big") + b"\0\0\0\x3a"
    return message[:2] + checksum(pseudo + message).to_bytes(2, "big") + message[4:]
