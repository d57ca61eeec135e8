"""The switch is kept as it should be: through restarts of either side, changed files, moved ports and tampering."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.ovs.node import (
    BRIDGES,
    BULKHEAD,
    EXAMPLE,
    LISTEN,
    ROOT,
    WORLD,
    Controller,
    Endpoint,
    Node,
    NodeSettings,
    Watch,
    ethernet,
    inside,
    ipv4,
    tcp,
    udp,
    wait_for,
)


def compiled(node: Node, bridge: str) -> str:
    """What `bulkhead compile` prints for the ports that the bridge has."""
    numbers = node.ovs.port_numbers(bridge)
    numbers.pop(bridge, None)
    ports = ",".join(f"{name}={number}" for name, number in numbers.items())
    command = (*BULKHEAD, "compile", str(node.file), "--bridge", bridge, "--ports", ports)
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Without a switch nobody knows the MAC of the host's own port; the gateway's stands in for it.
    for network in node.state.networks:
        if network.bridge == bridge and network.host is not None:
            text = text.replace(str(network.gateway_mac), str(node["host1"].mac))
    return text


def loaded(node: Node, text: str) -> set[str]:
    """The flows, as Open vSwitch itself shows them when they are loaded into an empty bridge."""
    node.ovs.add_bridge("scratch")
    try:
        node.ovs.ofctl("add-flows", "scratch", "-", stdin=text)
        return node.dump("scratch")
    finally:
        node.ovs.vsctl("del-br", "scratch")


@pytest.fixture(scope="module")
def declared(node: Node) -> dict[str, set[str]]:
    """What every bridge of the module's node should hold."""
    return {bridge: loaded(node, compiled(node, bridge)) for bridge in BRIDGES}


@pytest.fixture(autouse=True)
def as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give the module's node back with its first state file and a running controller."""
    yield
    if "node" in request.fixturenames:
        node: Node = request.getfixturevalue("node")
        if not node.file.exists() or yaml.safe_load(node.file.read_text()) != yaml.safe_load(EXAMPLE.read_text()):
            node.write_state({})
            wait_for(lambda: node.controller.status()["state"] == node.state.digest, 5)
        if not node.controller.alive():
            node.controller.start()
        node.controller.wait_steady()


class Ping:
    """ICMP echo requests, a hundred a second, all numbered: how many came back."""

    def __init__(self, source: Endpoint, target: str, interval_s: float = 0.01) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe would fill, and hold it up; closed by `stop`)
        self.process = subprocess.Popen(
            source.namespace.command("ping", "-n", "-i", str(interval_s), target),
            stdout=self._said,
            start_new_session=True,
        )

    def stop(self) -> tuple[int, int]:
        """(sent, lost). The very last one may be under way when it is told to stop, and is not looked for."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)
        with self._said as said:
            said.seek(0)
            out = said.read()
        found = re.search(r"(\d+) packets transmitted, (\d+) received", out)
        assert found is not None, out
        sent = int(found[1])
        return sent, len(set(range(1, sent)) - {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", out)})


@contextlib.contextmanager
def pings(*pairs: tuple[Endpoint, str]) -> Iterator[list[tuple[int, int]]]:
    """Ping along all pairs meanwhile; the list holds (sent, lost) of each afterwards."""
    running = [Ping(source, target) for source, target in pairs]
    results: list[tuple[int, int]] = []
    try:
        yield results
    finally:
        time.sleep(0.1)
        results += [ping.stop() for ping in running]


def connects(source: Endpoint, server_at: Endpoint, port: int) -> bool:
    """Whether a new TCP connection comes about."""
    with server_at.socket() as server, source.socket() as client:
        server.bind((server_at.address, port))
        server.listen()
        client.connect_ex((server_at.address, port))
        return (
            bool(select.select([], [client], [], 2)[1]) and client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        )


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("bridge", BRIDGES)
def test_what_compile_prints_loads_and_is_what_the_controller_installs(
    node: Node, declared: dict[str, set[str]], bridge: str
) -> None:
    text = compiled(node, bridge)
    flows = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(declared[bridge]) == len(flows)
    assert node.own_dump(bridge) == declared[bridge]


# ------------------------------------------------------------------------------------------------------------ restarts


def test_a_restarted_controller_adopts_and_sends_nothing(node: Node, declared: dict[str, set[str]]) -> None:
    xray = node["xray"]
    assert connects(xray, node["inet"], 80)
    wait_for(lambda: any("nw_dst=10.0.0.102" in f and "table=60" in f for f in node.dump("vmbr0")), 2)
    before = {bridge: node.dump(bridge) for bridge in BRIDGES}
    node.controller.stop()
    seen = node.controller.last_event()
    node.controller.start()
    assert node.controller.status()["flow_mods_sent"] == 0
    assert {bridge: node.dump(bridge) for bridge in BRIDGES} == before
    assert connects(xray, node["inet"], 81), "over the path learned before"
    applied = node.controller.events("state_applied", after=seen)
    assert {event.bridge: event.data["adopted"] for event in applied if "nothing changed" in event.text} == {
        bridge: len(declared[bridge]) for bridge in BRIDGES
    }


def test_nothing_is_lost_while_the_controller_is_dead(node: Node) -> None:
    pairs = (
        (node["xray"], node["gateway"].address),
        (node["mcp"], node["peer_mgmt"].address),
        (node["xray"], WORLD),
        (node["peer_priv"], WORLD),
    )
    for source, target in pairs:  # the first one learns and asks for addresses
        source.run("ping", "-c", "1", "-W", "2", target)
    with pings(*pairs) as results:
        time.sleep(0.5)
        node.controller.kill()
        time.sleep(1.0)
        assert connects(node["gateway"], node["inet"], 82), "new connections need no controller"
        assert connects(node["api"], node["mcp"], 9573)
        node.controller.start()
        time.sleep(0.5)
    assert all(sent > 150 for sent, _ in results)
    assert [lost for _, lost in results] == [0, 0, 0, 0]
    assert node.controller.status()["flow_mods_sent"] == 0


def test_a_tcp_stream_goes_on_while_the_controller_dies_and_comes_back(node: Node) -> None:
    client, server = node["xray"], node["gateway"]
    with subprocess.Popen(server.namespace.command("iperf3", "-s", "-1"), stdout=subprocess.DEVNULL):
        wait_for(lambda: ":5201" in server.run("ss", "-ltnH"), 5)
        command = ("iperf3", "-c", server.address, "-t", "4", "-i", "0.5", "-b", "20M", "-J")
        with subprocess.Popen(client.namespace.command(*command), stdout=subprocess.PIPE) as stream:
            time.sleep(1.2)
            node.controller.kill()
            time.sleep(1.2)
            node.controller.start()
            assert stream.stdout is not None
            report = json.load(stream.stdout)
    assert [piece["sum"]["bytes"] > 0 for piece in report["intervals"]] == [True] * 8
    assert "error" not in report


class Attack:
    """Forbidden packets from everywhere, again and again, in a thread; nobody may ever receive one."""

    MARKER = b"must not cross"

    def __init__(self, node: Node) -> None:
        self._senders = []
        for source, targets in {
            "xray": ("mcp", "host1", "peer_mgmt"),
            "mcp": ("xray", "gateway", "inet", "peer_priv"),
            "inet": ("mcp", "xray", "peer_priv"),
            "peer_priv": ("api", "host1"),
            "peer_mgmt": ("xray", "inet"),
            "host1": ("xray", "monitoring"),
        }.items():
            sender = node[source]
            frames = []
            for target in targets:
                receiver = node[target]
                for mac in (receiver.mac, 0xFFFFFFFFFFFF):
                    datagram = udp(sender.address, receiver.address, 7, 7, self.MARKER)
                    frames.append(
                        ethernet(mac, sender.mac, 0x0800, ipv4(sender.address, receiver.address, 17, datagram))
                    )
            sock = sender.raw()
            self._senders.append((sock, frames))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.sent = 0

    def _run(self) -> None:
        while not self._stop.wait(0.004):
            for sock, frames in self._senders:
                for frame in frames:
                    with contextlib.suppress(OSError):  # the bridge's own port is away for a moment
                        sock.send(frame)
                        self.sent += 1

    def __enter__(self) -> Attack:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for sock, _frames in self._senders:
            sock.close()


def test_a_crashed_switch_gets_its_flows_back_and_opens_nothing_meanwhile(
    fresh: Node,
) -> None:
    node = fresh
    node.controller.start()
    before = {bridge: node.own_dump(bridge) for bridge in BRIDGES}
    outsiders = [e for e in node.endpoints.values() if not e.name.startswith("host")]  # their ports go and come
    with Watch(outsiders) as watch, Attack(node) as attack:
        time.sleep(0.5)
        seen = node.controller.last_event()
        node.ovs.kill_vswitchd()
        time.sleep(0.5)
        node.ovs.start_vswitchd()
        for _ in BRIDGES:
            node.controller.wait_event("switch_up", seen, 10)
        began = time.monotonic()
        wait_for(lambda: {bridge: node.own_dump(bridge) for bridge in BRIDGES} == before, 3)
        print(f"flows back {time.monotonic() - began:.2f} s after the first bridge was back")
        time.sleep(0.5)
        assert attack.sent > 1000
        assert watch.holding(Attack.MARKER) == {}
    node.controller.wait_event("state_applied", seen, holding="vmbr0 came back without its flows")
    ping = node["xray"].run("ping", "-c", "1", "-W", "2", WORLD)
    assert " 0% packet loss" in ping


# ----------------------------------------------------------------------------------------------------------- state file


def with_mcp_service(port: int) -> str:
    """The example with another service of the MCP server."""
    tree = yaml.safe_load(EXAMPLE.read_text())
    mcp = next(c for c in tree["lxc"]["containers"] if c["id"] == "200")
    mcp["properties"]["services"][0]["port"] = port
    return yaml.safe_dump(tree)


def has_service(node: Node, port: int) -> bool:
    return any("nw_dst=10.1.0.200" in line and f"tp_dst={port} " in line for line in node.dump("vmbr1"))


def test_two_quick_changes_of_the_file(node: Node) -> None:
    node.replace_state(with_mcp_service(9001))
    wait_for(lambda: has_service(node, 9001), 3)
    node.replace_state(with_mcp_service(9002))
    time.sleep(0.02)
    node.replace_state(with_mcp_service(9003))
    wait_for(lambda: has_service(node, 9003) and node.controller.steady(), 3)
    assert not has_service(node, 9002) and not has_service(node, 9001)
    assert node.own_dump("vmbr1") == loaded(node, compiled(node, "vmbr1"))


@pytest.mark.parametrize("how", ["nonsense", "overlap", "empty", "truncated", "gone"])
def test_a_bad_file_changes_nothing(node: Node, declared: dict[str, set[str]], how: str) -> None:
    seen = node.controller.last_event()
    before = node.controller.status()["state"]
    good = EXAMPLE.read_text()
    if how == "gone":
        node.file.unlink()
    else:
        text = {
            "nonsense": "{]",
            "overlap": good.replace("10.1.0.", "10.0.0."),
            "empty": "",
            "truncated": good[: len(good) // 2],
        }[how]
        node.file.write_text(text)
    node.controller.wait_event("state_rejected", seen)
    assert node.controller.status()["state"] == before
    assert {bridge: node.own_dump(bridge) for bridge in BRIDGES} == declared
    node.replace_state(good)
    time.sleep(1.2)
    assert len(node.controller.events("state_rejected", after=seen)) == 1
    assert node.controller.status()["state"] == before


def test_a_file_written_in_place_piece_by_piece(node: Node) -> None:
    """Its first lines are a valid state of their own, without most containers; it must not come into force."""
    text = with_mcp_service(9004)
    seen = node.controller.last_event()
    piece = len(text) // 8 + 1
    with node.file.open("w") as file:
        for start in range(0, len(text), piece):
            file.write(text[start : start + piece])
            file.flush()
            time.sleep(0.15)
    wait_for(lambda: has_service(node, 9004) and node.controller.steady(), 3)
    assert node.own_dump("vmbr1") == loaded(node, compiled(node, "vmbr1"))
    applied = {event.data["state"] for event in node.controller.events("state_applied", after=seen)}
    assert applied == {node.controller.status()["state"]}
    assert node.controller.events("state_rejected", after=seen) == []


def test_sighup_reads_the_file_again(node: Node) -> None:
    """Even where its time and size look the same."""
    node.replace_state(with_mcp_service(9005))
    wait_for(lambda: has_service(node, 9005), 3)
    time.sleep(0.6)
    stat = node.file.stat()
    with node.file.open("r+") as file:
        text = file.read().replace("9005", "9006")
        file.seek(0)
        file.write(text)
    os.utime(node.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    time.sleep(1.2)
    assert not has_service(node, 9006), "nothing tells that it changed"
    os.kill(node.controller.pid, signal.SIGHUP)
    wait_for(lambda: has_service(node, 9006), 2)


# ---------------------------------------------------------------------------------------------------------------- ports


def test_a_port_that_comes_back_with_another_number(node: Node) -> None:
    old = node.port_number("veth102")
    node["xray"].run("ping", "-c", "1", "-W", "2", WORLD)
    learned = node.dump("vmbr0") - node.own_dump("vmbr0")
    assert any("nw_dst=10.0.0.102" in line for line in learned)
    seen = node.controller.last_event()
    node.ovs.vsctl("del-port", "vmbr0", "veth102")
    try:
        wait_for(lambda: not any("table=60" in line and "nw_dst=10.0.0.102" in line for line in node.dump("vmbr0")), 2)
        node.controller.wait_event("port_down", seen, holding="veth102")
        wait_for(lambda: not any(re.search(rf"in_port={old}\b", line) for line in node.own_dump("vmbr0")), 2)
        assert not any(re.search(rf"output:{old}\b", line) for line in node.own_dump("vmbr0"))
    finally:
        node.ovs.vsctl("add-port", "vmbr0", "veth102", "--", "set", "interface", "veth102", "ofport_request=77")
    wait_for(lambda: node.port_number("veth102") == 77, 2)
    try:
        wait_for(lambda: any("in_port=77" in line and "10.0.0.102" in line for line in node.dump("vmbr0")), 2)
        node.controller.wait_steady()
        assert node.own_dump("vmbr0") == loaded(node, compiled(node, "vmbr0"))
        node["xray"].run("ping", "-c", "1", "-W", "2", node["gateway"].address)
    finally:
        node.ovs.vsctl("set", "interface", "veth102", f"ofport_request={old}")
        wait_for(lambda: node.port_number("veth102") == old, 2)
        wait_for(lambda: not any("in_port=77" in line for line in node.own_dump("vmbr0")), 2)


def test_two_ports_that_swap_their_numbers(node: Node) -> None:
    """Each stays with its own addresses, whatever numbers they get."""
    old = {name: node.port_number(name) for name in ("veth100", "veth102")}
    node.ovs.vsctl("del-port", "vmbr0", "veth100", "--", "del-port", "vmbr0", "veth102")
    for name, other in (("veth100", "veth102"), ("veth102", "veth100")):
        node.ovs.vsctl("add-port", "vmbr0", name, "--", "set", "interface", name, f"ofport_request={old[other]}")
    try:
        wait_for(lambda: node.port_number("veth100") == old["veth102"], 2)
        wait_for(
            lambda: node.controller.steady() and node.own_dump("vmbr0") == loaded(node, compiled(node, "vmbr0")), 3
        )
        node["xray"].run("ping", "-c", "1", "-W", "2", node["gateway"].address)
    finally:
        node.ovs.vsctl("del-port", "vmbr0", "veth100", "--", "del-port", "vmbr0", "veth102")
        for name, number in old.items():
            node.ovs.vsctl("add-port", "vmbr0", name, "--", "set", "interface", name, f"ofport_request={number}")
        wait_for(lambda: node.port_number("veth102") == old["veth102"], 2)
        wait_for(
            lambda: node.controller.steady() and node.own_dump("vmbr0") == loaded(node, compiled(node, "vmbr0")), 3
        )


# ----------------------------------------------------------------------------------------------------------- tampering

FOREIGN = "table=0,priority=7,cookie=0x1234,ip,nw_dst=192.0.2.1,actions=drop"


def test_a_foreign_flow_is_reported_and_left_alone(node: Node) -> None:
    seen = node.controller.last_event()
    node.ovs.ofctl("add-flow", "vmbr0", FOREIGN)
    try:
        added = node.controller.wait_event("foreign_flow", seen, 2)
        assert "cookie=0x1234" in added.text and added.flow is not None and "192.0.2.1" in added.flow
        node.controller.stop()
        between = node.controller.last_event()
        node.controller.start()
        again = node.controller.wait_event("foreign_flow", between, 2)
        assert "was there already" in again.text
        assert node.controller.status()["flow_mods_sent"] == 0
        assert any("cookie=0x1234" in line for line in node.dump("vmbr0"))
        foreign = {b["name"]: b["foreign"] for b in node.controller.status()["bridges"]}
        assert foreign == {"vmbr0": 1, "vmbr1": 0, "mesh-privacy": 0, "mesh-mgmt": 0}
        # The event names the command that ends it.
        last = node.controller.last_event()
        command = re.search(r"ovs-ofctl -O OpenFlow14 (del-flows) (\S+) '([^']+)'", added.text)
        assert command is not None
        node.ovs.ofctl(*command.groups())
        node.controller.wait_event("foreign_flow", last, 2, holding="was removed")
    finally:
        node.ovs.ofctl("del-flows", "vmbr0", "cookie=0x1234/-1")
    assert not any("cookie=0x1234" in line for line in node.dump("vmbr0"))


def flow_of(node: Node, bridge: str, *words: str) -> tuple[str, str]:
    """(match with table and priority, actions) of one of our flows, as ovs-ofctl takes them."""
    lines = [line for line in node.own_dump(bridge) if all(word in line for word in words)]
    assert len(lines) == 1, lines
    left, actions = lines[0].split(" actions=")
    _, rest = left.split(", ", 1)
    return rest.replace(" ", ""), actions


OURS_COOKIE = "cookie=0xb01c04deadbeef00"
ISOLATE_FLOW = ("table=40", "nw_dst=10.1.0.0/24")
GUARD_MISS = ("table=90", "priority=100")

TAMPERINGS: dict[str, Callable[[Node], tuple[str, ...]]] = {
    "delete all": lambda node: ("del-flows", "vmbr0"),
    "delete one": lambda node: ("del-flows", "--strict", "vmbr0", flow_of(node, "vmbr0", *ISOLATE_FLOW)[0]),
    "delete a table": lambda node: ("del-flows", "vmbr0", "table=10"),
    "change actions": lambda node: ("mod-flows", "vmbr0", "table=40,ip,nw_dst=10.1.0.0/24,actions=goto_table:50"),
    "open a bridge": lambda node: ("mod-flows", "vmbr0", "table=0,actions=NORMAL"),
    "replace with cookie 0": lambda node: (
        "add-flow", "vmbr0", f"cookie=0,{flow_of(node, 'vmbr0', *ISOLATE_FLOW)[0]},actions=goto_table:50",
    ),
    "replace with our cookie": lambda node: (
        "add-flow", "vmbr0", f"{OURS_COOKIE},{flow_of(node, 'vmbr0', *GUARD_MISS)[0]},actions=output:2",
    ),
    "add with our cookie": lambda node: (
        "add-flow", "vmbr0", f"{OURS_COOKIE},table=40,priority=500,ip,nw_dst=10.1.0.7,actions=goto_table:50",
    ),
    "delete the canary": lambda node: ("del-flows", "vmbr0", "table=250"),
    "cross a mesh bridge": lambda node: ("mod-flows", "mesh-privacy", "table=0,actions=ALL"),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERINGS)
def test_tampering_is_undone_within_a_second(node: Node, declared: dict[str, set[str]], how: str) -> None:
    time.sleep(0.6)  # repairs of the test before hold up the next for half a second
    seen = node.controller.last_event()
    command = TAMPERINGS[how](node)
    bridge = next(part for part in command if part in BRIDGES)
    before = node.own_dump(bridge)
    node.ovs.ofctl(*command)
    began = time.monotonic()
    wait_for(
        lambda: node.own_dump(bridge) == declared[bridge],
        1.0,
        lambda: f"{node.own_dump(bridge) ^ declared[bridge]}",
    )
    print(f"{how}: {time.monotonic() - began:.3f} s")
    assert before == declared[bridge]
    node.controller.wait_event("tampering", seen, 2)
    node.controller.wait_event("drift_repaired", seen, 2, holding=bridge)
    wait_for(node.controller.steady, 2)
    assert {b["name"]: b["foreign"] for b in node.controller.status()["bridges"]}[bridge] == 0


def test_a_bridge_nobody_declared_drops_everything(node: Node) -> None:
    seen = node.controller.last_event()
    node.ovs.add_bridge("stray")
    try:
        node.set_controllers(bridges=("stray",))
        event = node.controller.wait_event("unknown_bridge", seen)
        assert "ovs-vsctl del-controller stray" in event.text
        wait_for(lambda: len(node.dump("stray")) == 2, 2)
        flows = [re.sub(r"cookie=\w+, ", "", line) for line in node.dump("stray")]
        assert sorted(flows) == ["priority=0 actions=drop", "table=250, priority=0 actions=drop"]
        assert node.controller.status()["undeclared"] == ["stray"]
    finally:
        node.ovs.vsctl("del-br", "stray")
    node.controller.wait_event("switch_down", seen, holding="stray")


# ------------------------------------------------------------------------------------------------------------- warnings


def mending(text: str) -> list[str]:
    """The ovs-vsctl command an event recommends."""
    found = re.search(r"Mend it: ovs-vsctl (.+)$", text)
    assert found is not None, text
    return found[1].split()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (("del-fail-mode", "vmbr0"), "fail-mode"),
        (("set-fail-mode", "vmbr0", "standalone"), "fail-mode"),
        (("remove", "bridge", "vmbr0", "other-config", "disable-in-band", "--", "clear", "controller", "vmbr0",
          "connection_mode"), "in-band"),
    ],
)  # fmt: skip
def test_a_bridge_that_could_open_is_warned_of_until_it_is_mended(
    node: Node, spoil: tuple[str, ...], problem: str
) -> None:
    seen = node.controller.last_event()
    node.ovs.vsctl(*spoil)
    try:
        warning = node.controller.wait_event("switch_warning", seen, 3, holding="vmbr0")
        assert warning.data["problem"] == problem
        assert warnings_of(node) == [warning.text]
        node.ovs.vsctl(*mending(warning.text))
        wait_for(lambda: warnings_of(node) == [], 3)
        assert len(node.controller.events("switch_warning", after=seen)) == 1
    finally:
        node.ovs.vsctl("set-fail-mode", "vmbr0", "secure")
        node.ovs.vsctl("set", "bridge", "vmbr0", "other-config:disable-in-band=true")
        node.ovs.vsctl("set", "controller", "vmbr0", "connection-mode=out-of-band")
        wait_for(lambda: node.controller.steady() and warnings_of(node) == [], 3)


def warnings_of(node: Node) -> list[str]:
    bridge = next(b for b in node.controller.status()["bridges"] if b["name"] == "vmbr0")
    warnings: list[str] = bridge["warnings"]
    return warnings


# ------------------------------------------------------------------------------------------------------- cut connections


class Proxy:
    """Passes a switch on to the controller, and cuts one connection after so many bytes towards the switch."""

    def __init__(self, node: Node) -> None:
        self.cut_after: int | None = None
        self.cuts = 0
        self.passed = 0
        """Bytes that went to the switch on the newest connection."""
        self._node = node
        with inside(node.namespace):
            self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                switch, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(switch,), daemon=True).start()

    def _pass(self, switch: socket.socket) -> None:
        with inside(self._node.namespace):
            controller = socket.socket()
        limit, self.cut_after, self.passed = self.cut_after, None, 0
        with switch, controller, contextlib.suppress(OSError):
            controller.connect(("127.0.0.1", LISTEN))
            while True:
                for sock in select.select([switch, controller], [], [])[0]:
                    data = sock.recv(1400)
                    if not data:
                        return
                    if sock is switch:
                        controller.sendall(data)
                        continue
                    if limit is not None and self.passed + len(data) >= limit:
                        switch.sendall(data[: limit - self.passed])
                        self.cuts += 1
                        return
                    switch.sendall(data)
                    self.passed += len(data)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


def test_a_bundle_cut_at_any_place_opens_nothing_and_converges() -> None:
    """The connection breaks again and again, each time elsewhere, while forbidden packets keep coming."""
    with Node(NodeSettings(controllers=False)) as node:
        node.controller.start(wait=False)
        wait_for(lambda: node.controller.events("controller_started"), 5)
        proxy = Proxy(node)
        through = f"tcp:127.0.0.1:{proxy.port}"
        try:
            with node.watch() as watch, Attack(node):
                node.set_controllers(through, ("vmbr0",))
                node.set_controllers(bridges=("vmbr1", "mesh-privacy", "mesh-mgmt"))
                node.controller.wait_steady()
                whole, size = proxy.passed, len(node.own_dump("vmbr0"))
                seen = set()
                for cut in (
                    60,
                    200,
                    *(whole * part // 10 for part in range(2, 10)),
                    whole - 120,
                    whole - 60,
                    whole - 20,
                ):
                    node.ovs.vsctl("del-controller", "vmbr0")
                    node.ovs.ofctl("del-flows", "vmbr0")
                    proxy.cut_after, before = cut, proxy.cuts
                    node.set_controllers(through, ("vmbr0",))
                    wait_for(lambda before=before: proxy.cuts > before, 10)  # type: ignore[misc]
                    seen.add(len(node.own_dump("vmbr0")))
                node.controller.wait_steady()
                time.sleep(0.3)
                assert watch.holding(Attack.MARKER) == {}
        finally:
            proxy.close()
        assert seen <= {0, size}, "a bundle is in force as a whole or not at all"
        assert node.own_dump("vmbr0") == loaded(node, compiled(node, "vmbr0"))
        assert node.controller.status()["internal_errors"] == 0


def test_a_controller_taken_away_and_given_back(node: Node, declared: dict[str, set[str]]) -> None:
    """Taking the last controller away clears a bridge's flows: it must be shut until it has all of them again."""
    with node.watch() as watch, Attack(node):
        for pause_s in (0.0, 0.02, 0.1, 0.3):
            seen = node.controller.last_event()
            node.ovs.vsctl("del-controller", "vmbr0")
            node.set_controllers(bridges=("vmbr0",))
            node.controller.wait_event("switch_up", seen, 10, holding="vmbr0")
            time.sleep(pause_s)
        node.controller.wait_steady()
        wait_for(lambda: node.own_dump("vmbr0") == declared["vmbr0"], 3)
        assert watch.holding(Attack.MARKER) == {}


# ----------------------------------------------------------------------------------------------------------------- TLS


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


def authority(directory: Path, name: str) -> None:
    """A certificate authority of that name."""
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={name}",
        "-keyout", str(directory / f"{name}.key"), "-out", str(directory / f"{name}.pem"),
    )  # fmt: skip


def certificate(directory: Path, name: str, by: str) -> None:
    """A key and a certificate for `name`, signed by the authority `by`."""
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
        "-keyout", str(directory / f"{name}.key"), "-out", str(directory / f"{name}.csr"),
    )  # fmt: skip
    openssl(
        "x509", "-req", "-days", "2", "-in", str(directory / f"{name}.csr"), "-CAcreateserial",
        "-CA", str(directory / f"{by}.pem"), "-CAkey", str(directory / f"{by}.key"),
        "-out", str(directory / f"{name}.pem"),
    )  # fmt: skip


def test_switches_connect_by_tls_and_only_with_a_certificate(tmp_path: Path) -> None:
    for name in ("ca", "stranger"):
        authority(tmp_path, name)
    certificate(tmp_path, "controller", "ca")
    certificate(tmp_path, "switch", "ca")
    certificate(tmp_path, "impostor", "stranger")

    def file(name: str) -> str:
        return str(tmp_path / name)

    with Node(NodeSettings(target=f"ssl:127.0.0.1:{LISTEN}")) as node:
        options = (
            "--private-key", file("controller.key"), "--certificate", file("controller.pem"),
            "--ca-cert", file("ca.pem"),
        )  # fmt: skip
        node.controller = Controller(node, node.file, listen=f"ssl:127.0.0.1:{LISTEN}", options=options)
        node.ovs.vsctl("set-ssl", file("impostor.key"), file("impostor.pem"), file("ca.pem"))
        node.controller.start(wait=False)
        wait_for(lambda: node.controller.events("controller_started"), 5)
        wait_for(lambda: "connection from" in node.controller.log(), 5, "no impostor was turned away")
        assert node.controller.events("switch_up") == []
        with inside(node.namespace):
            plain = socket.create_connection(("127.0.0.1", LISTEN), 2)
        with plain:
            plain.sendall(b"\5\0\0\x08\0\0\0\1")
            plain.settimeout(3)
            with contextlib.suppress(ConnectionError):
                assert b"\5\0\0\x08" not in plain.recv(100), "OpenFlow without TLS"
        node.ovs.vsctl("set-ssl", file("switch.key"), file("switch.pem"), file("ca.pem"))
        node.controller.wait_steady(timeout_s=20)
        node["xray"].run("ping", "-c", "1", "-W", "2", WORLD)
        assert "Traceback" not in node.controller.log()


def test_the_attack_would_be_seen(node: Node) -> None:
    """The tests above look for packets that must not arrive; opened up, they do."""
    node.controller.kill()
    node.ovs.ofctl("add-flow", "vmbr1", "table=0,priority=60000,cookie=0x77,actions=FLOOD")
    try:
        with node.watch() as watch, Attack(node):
            wait_for(lambda: watch.holding(Attack.MARKER), 3)
    finally:
        node.ovs.ofctl("del-flows", "vmbr1", "cookie=0x77/-1")
    assert tcp("10.0.0.1", "10.0.0.2", 1, 2)[12] == 0x50
