"""The lab, and what the controller makes of traffic in it, on real namespaces and a real Open vSwitch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controller.cli import COMMANDS
from controller.statefile import load
from lab import cli as lab_cli
from lab import demo, manager, places
from lab.describe import describe
from lab.manager import LabError, Status
from lab.traffic import Traffic, Try

from .conftest import STATE_FILE

ROOT = Path(__file__).parents[2]
GONE_LIMIT_S = 5.0
NOISY_LIMIT_S = 20.0


def run_cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`bulkhead lab` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "lab", *arguments],
        cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def invoke(*arguments: str) -> Result:
    """`bulkhead lab` in this process, where parts of the world can be replaced."""
    return CliRunner().invoke(lab_cli.lab, arguments)


def assert_one_line(text: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    assert "Traceback" not in text


# -- the truth table --------------------------------------------------------------------------------------------------

ADDRESSES = {
    "gateway": "10.0.0.100",
    "xray": "10.0.0.102",
    "peer-privacy": "10.0.0.50",
    "inet": "198.51.100.10",
    "mcp-server": "10.1.0.200",
    "op-dbus-api": "10.1.0.201",
    "monitoring": "10.1.0.202",
    "peer-management": "10.1.0.50",
    "host": "10.1.0.1",
}

# What the two networks promise, written by hand from the architecture: rows send, columns are asked.
#   all  everything; -  nothing; api  the exposed services only; vpn  the VPN server's port only
POLICY = """
                 gateway  xray  peer-privacy  inet  mcp-server  op-dbus-api  monitoring  peer-management  host
gateway          .        all   all           all   -           -            -           -                -
xray             all      .     all           all   -           -            -           -                -
peer-privacy     all      all   .             all   -           -            -           -                -
inet             -        -     -             .     -           -            -           -                -
mcp-server       -        -     -             -     .           all          all         all              -
op-dbus-api      -        -     -             -     all         .            all         all              -
monitoring       -        -     -             -     all         all          .           all              -
peer-management  -        -     -             -     all         all          all         .                -
host             vpn      -     -             -     api         api          -           -                .
"""

# A port nobody declares, a declared and exposed service, and the VPN server's.
PROBES = (("icmp", 0), ("tcp", 7000), ("udp", 7000), ("tcp", 9573), ("udp", 9573), ("udp", 51820), ("tcp", 51820))
PROMISES = {
    "all": set(PROBES),
    "-": set(),
    "api": {("tcp", 9573)},
    # A mesh peer may pass on VPN clients too, but it is a member and may do everything anyway.
    "vpn": {("udp", 51820)},
}


def policy() -> dict[tuple[str, str], set[tuple[str, int]]]:
    """(from, to): what must pass."""
    heading, *rows = POLICY.strip("\n").splitlines()
    found = {}
    for row in rows:
        source, *cells = row.split()
        for target, cell in zip(heading.split(), cells, strict=True):
            if source != target:
                found[source, target] = PROMISES[cell]
    assert len(found) == 9 * 8
    return found


def tries_from(source: str) -> list[tuple[str, str, int, Try]]:
    """Every probe of every other host. The world speaks with a public address of its own."""
    own = ADDRESSES[source] if source == "inet" else None
    return [
        (target, proto, port, Try(proto, address, port, source=own, say=f"{source}>{target}"))
        for target, address in ADDRESSES.items()
        if target != source
        for proto, port in PROBES
    ]


SENDERS = {address: host for host, address in ADDRESSES.items()} | {"203.0.113.7": "host"}


def allowed(line: str, target: str, promised: dict[tuple[str, str], set[tuple[str, int]]]) -> bool:
    """Whether a packet may be seen at `target`: it was promised to pass, or answers one that was."""
    address, proto, source_port, port = line.split()
    sender = SENDERS.get(address)
    if sender is None or sender == target:
        return False
    if proto == "icmp":  # ports are the type: 8 asks, 0 answers
        asks = {"8": (sender, target), "0": (target, sender)}
        return port in asks and ("icmp", 0) in promised[asks[port]]
    return (proto, int(port)) in promised[sender, target] or (proto, int(source_port)) in promised[target, sender]


def test_truth_table(fresh_lab: Status) -> None:
    """Every pair of hosts, every protocol: what passes is what is promised, and no other packet arrives anywhere."""
    promised = policy()
    wrong = []
    with Traffic(fresh_lab) as traffic:
        endpoints = tuple(f"{proto}:{port}" for proto, port in PROBES if proto != "icmp")
        interfaces = {host: ["vmbr0", "vmbr1"] if host == "host" else ["eth0"] for host in ADDRESSES}
        traffic.serve(dict.fromkeys(ADDRESSES, endpoints), interfaces)
        # The world first and alone: what others send out opens the way back in.
        for sources in (["inet"], [host for host in ADDRESSES if host != "inet"]):
            tried = {source: tries_from(source) for source in sources}
            results = traffic.attempt_all({source: [each[3] for each in tries] for source, tries in tried.items()})
            for source, tries in tried.items():
                for (target, proto, port, _), result in zip(tries, results[source], strict=True):
                    passed = result.outcome == "reply"
                    if passed != ((proto, port) in promised[source, target]):
                        wrong.append(f"{source} to {target} {proto}:{port}: {result}")
                    elif passed and proto != "icmp" and result.data != target:
                        wrong.append(f"{source} to {target} {proto}:{port}: answered by {result.data}")
        saw = {host: traffic.saw(host) for host in ADDRESSES}
    assert sum(map(len, saw.values())) > 100
    wrong += [
        f"{host} saw: {line}" for host, lines in saw.items() for line in lines if not allowed(line, host, promised)
    ]
    assert not wrong, "\n".join(wrong)


def test_crossing_is_refused_at_once(fresh_lab: Status) -> None:
    """Both ways, TCP and UDP: an answer and not a time-out."""
    for source, target in (("xray", "10.1.0.201"), ("mcp-server", "10.0.0.102")):
        with Traffic(fresh_lab) as traffic:
            for proto in ("tcp", "udp"):
                # Who was noisy, in a test before this one, is not answered for some seconds.
                deadline = time.monotonic() + NOISY_LIMIT_S
                result = None
                while result != "refused at once" and time.monotonic() < deadline:
                    time.sleep(1 if result else 0)
                    found = traffic.attempt(source, Try(proto, target, 9573))
                    result = f"{found.outcome} {'at once' if found.seconds < 1 else 'late'}"
                assert result == "refused at once", (source, proto)


@pytest.mark.parametrize(
    "spoof",
    ["10.0.0.50", "10.0.0.1", "10.0.0.200", "10.1.0.200", "198.51.100.10", "10.8.0.2"],
    ids=["a peer", "the gateway", "nobody", "the other network", "the world", "a VPN client"],
)
def test_forged_source_arrives_nowhere(fresh_lab: Status, spoof: str) -> None:
    with Traffic(fresh_lab) as traffic:
        traffic.serve({"gateway": ["udp:4000"]})
        traffic.attempt("xray", Try("udp", "10.0.0.100", 4000, say="honest"))
        traffic.attempt("xray", Try("udp", "10.0.0.100", 4000, spoof=spoof, say="forged"))
        assert {line.split()[-1] for line in traffic.heard("gateway")} == {"honest"}


LISTEN = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("0.0.0.0", 7777))
sock.settimeout(3)
print("ready", flush=True)
try:
    while True:
        print(sock.recv(100).decode(), flush=True)
except TimeoutError:
    pass
"""
SEND = """
import sys
from scapy.all import Ether, IP, UDP, get_if_hwaddr, sendp
for to, target in zip(sys.argv[1::2], sys.argv[2::2]):
    frame = Ether(src=get_if_hwaddr("eth0"), dst=to) / IP(src="10.0.0.102", dst=target) / UDP(sport=9, dport=7777)
    sendp(frame / f"{target} by {to}", iface="eth0", verbose=False, count=5)
"""


def test_a_ports_own_mac_is_no_way_into_the_host(lab: Status) -> None:
    """The kernel has the ports too; what is addressed to one of them must not reach the host's addresses beside OVS."""
    show = ["cat", "/sys/class/net/veth102/address"]
    port_mac = subprocess.run(manager.command_in(lab, None, show), capture_output=True, text=True, check=True).stdout
    listen = manager.command_in(lab, None, [sys.executable, "-c", LISTEN])
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
        proof = [sys.executable, "-c", "import socket; s=socket.socket(2, 2); s.sendto(b'heard', ('127.0.0.1', 7777))"]
        subprocess.run(manager.command_in(lab, None, proof), check=True)
        pairs = [word for target in ("10.1.0.1", "127.0.0.1", "10.0.0.102") for word in (port_mac.strip(), target)]
        assert manager.exec(lab.run_dir, None, "xray", [sys.executable, "-c", SEND, *pairs]) == 0
        heard = listener.stdout.read().splitlines()
    assert heard == ["heard"]


def test_bulk_tcp_passes(lab: Status) -> None:
    """Checksums are right at every size; without the offload settings TCP hangs here."""
    with subprocess.Popen(manager.command_in(lab, manager.find_host(lab, "inet"), ["iperf3", "-s", "-1"])) as server:
        time.sleep(0.3)
        code = manager.exec(lab.run_dir, None, "xray", ["iperf3", "-c", "198.51.100.10", "-n", "5M"])
        assert server.wait(10) == code == 0


# -- the demo ---------------------------------------------------------------------------------------------------------


def test_demo_shows_what_is_expected_and_cleans_up(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    done = run_cli("demo", "--mininet", "--no-follow", "--json", "--run-dir", str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(demo.EXAMPLES) >= 10
    assert all(row["as_expected"] for row in rows)
    assert not run_dir.exists()


def test_demo_follows_events_until_interrupted(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "lab", "demo", "--mininet", "--run-dir", str(run_dir)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if "violation" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    total = len(demo.EXAMPLES)
    assert process.returncode == 0
    assert f"{total} of {total} as expected" in lines
    table = lines[lines.index(next(line for line in lines if line.startswith("EXAMPLE"))) :][: total + 1]
    assert len({line.index(word) for line, word in ((table[0], "FROM"), (table[1], "inet "))}) == 1, "not aligned"
    assert not run_dir.exists()


def test_demo_finds_a_lab_that_passes_nothing(dead_lab: Status) -> None:
    passing = tuple(example for example in demo.EXAMPLES if example.expected is demo.Expected.PASSES)[:2]
    assert [shown.as_expected for shown in demo.play(dead_lab, passing)] == [False, False]


# -- status and exec --------------------------------------------------------------------------------------------------


def test_status(lab: Status) -> None:
    found = manager.status(lab.run_dir)
    assert found == lab
    assert found.alive == {"controller": True, "ovs-vswitchd": True}
    assert set(found.bridges) == {"vmbr0", "vmbr1", "mesh-privacy", "mesh-mgmt"}
    done = run_cli("status", "--json", "--run-dir", str(lab.run_dir))
    assert done.returncode == 0
    assert {host["name"] for host in json.loads(done.stdout)["hosts"]} | {"host"} == set(ADDRESSES)
    by_environment = run_cli("status", env={"BULKHEAD_LAB_DIR": str(lab.run_dir)})
    assert by_environment.returncode == 0 and "mcp-server" in by_environment.stdout


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("xray", "10.0.0.102"), ("102", "10.0.0.102"), ("veth102", "10.0.0.102"), ("oo1424oo/xray", "10.0.0.102"),
        ("mcp", "10.1.0.200"), ("api", "10.1.0.201"), ("peer_priv", "10.0.0.50"), ("peer_mgmt", "10.1.0.50"),
        ("host", "10.1.0.1"), ("oo1424oo", "10.1.0.1"), ("inet", "198.51.100.10"),
    ],
)  # fmt: skip
def test_exec_finds_hosts_by_any_name(lab: Status, name: str, address: str) -> None:
    done = run_cli("exec", "--run-dir", str(lab.run_dir), name, "--", "ip", "-o", "-4", "address")
    assert done.returncode == 0, done.stderr
    assert f" {address}/" in done.stdout


def test_exec_passes_streams_and_exit_code_on(lab: Status) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab", "exec", "--run-dir", str(lab.run_dir), "xray", "sh", "-c", "cat; echo no >&2; exit 7"],
        cwd=ROOT, input="to and fro", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, "to and fro", "no\n")


def test_exec_sees_only_the_lab(lab: Status) -> None:
    """Not the host's interfaces, processes, /run or Open vSwitch."""
    seen = subprocess.run(
        manager.command_in(lab, manager.find_host(lab, "xray"), ["sh", "-c", "ls /sys/class/net; ls /run; ps ax | wc -l"]),
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert set(seen[:2]) == {"eth0", "lo"}
    assert "systemd" not in seen and "netns" not in seen
    assert int(seen[-1]) < 60


def test_interface_and_address_facts(lab: Status) -> None:
    """Ports are what the state file says, on the userspace datapath, shut without flows, and listening to nobody."""
    env = dict(os.environ, OVS_RUNDIR=str(lab.run_dir / "ovs"))

    def vsctl(*arguments: str) -> str:
        command = ["ovs-vsctl", f"--db={lab.ovsdb}", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert set(vsctl("list-ports", "vmbr0").split()) == {"veth100", "veth102", "warp0", "from-privacy"}
    assert set(vsctl("list-ports", "vmbr1").split()) == {"veth200", "veth201", "veth202", "from-mgmt"}
    assert set(vsctl("list-ports", "mesh-privacy").split()) == {"nm-privacy", "to-privacy"}
    for bridge in lab.bridges:
        assert vsctl("get", "bridge", bridge, "fail_mode", "datapath_type").split() == ["secure", "netdev"]
        assert "OpenFlow14" in vsctl("get", "bridge", bridge, "protocols")
        assert 'disable-in-band="true"' in vsctl("get", "bridge", bridge, "other_config")
    assert "ptcp" not in vsctl("list", "controller")


# -- starting, stopping, dying ----------------------------------------------------------------------------------------


@pytest.fixture
def dead_lab(tmp_path: Path) -> Status:
    """A lab without a controller, of one's own; taken down at the end if it is still there."""
    status = manager.up(STATE_FILE, tmp_path / "lab", controller=False)
    yield status
    manager.down(status.run_dir)


def inhabitants(namespace: str) -> list[str]:
    """Processes in a process-id namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


def host_facts() -> tuple[object, ...]:
    """What a lab must leave alone."""
    netns = Path("/run/netns")
    return (
        sorted(os.listdir("/sys/class/net")),
        sorted(os.listdir(netns)) if netns.exists() else None,
        Path("/proc/self/mountinfo").read_text(),
        Path("/proc/sys/net/ipv4/ip_forward").read_text(),
        Path("/proc/sys/kernel/pty/max").read_text(),
        Path("/proc/sys/fs/file-max").read_text(),
    )


@pytest.mark.parametrize("victim", ["first process", "worker"])
def test_killed_lab_leaves_nothing_behind(tmp_path: Path, victim: str) -> None:
    before = host_facts()
    run_dir = tmp_path / "lab"
    status = manager.up(STATE_FILE, run_dir)
    namespace = os.readlink(f"/proc/{status.pid}/ns/pid")
    assert len(inhabitants(namespace)) > 10
    worker = int(Path(f"/proc/{status.pid}/task/{status.pid}/children").read_text().split()[0])
    os.kill(status.pid if victim == "first process" else worker, signal.SIGKILL)
    deadline = time.monotonic() + GONE_LIMIT_S
    while inhabitants(namespace) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert inhabitants(namespace) == []
    assert host_facts() == before
    with pytest.raises(manager.NotUp):
        manager.status(run_dir)
    assert manager.down(run_dir) is False
    assert not run_dir.exists()


def test_killed_while_starting_leaves_nothing_behind(tmp_path: Path) -> None:
    """Interrupting `up` takes down what it had begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lab", "up", "--run-dir", str(tmp_path / "lab")],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("building"):
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Traceback" not in rest
    assert not manager.is_up(tmp_path / "lab")


def test_no_controller_no_traffic(dead_lab: Status) -> None:
    """Bridges are shut from their first moment."""
    with Traffic(dead_lab) as traffic:
        tries = [Try("icmp", "10.0.0.100"), Try("icmp", "198.51.100.10")]
        results = traffic.attempt_all({"xray": tries, "peer-privacy": tries, "mcp-server": [Try("icmp", "10.1.0.201")]})
    assert {result.outcome for found in results.values() for result in found} <= {"silence", "refused"}
    assert run_cli("status", "--run-dir", str(dead_lab.run_dir)).returncode == 1


def test_two_at_once_one_wins(tmp_path: Path) -> None:
    run_dir = tmp_path / "lab"
    command = [sys.executable, "-m", "lab", "up", "--run-dir", str(run_dir)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=-3, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    loser = said[0] if both[0].returncode else said[1]
    assert "a lab is already up" in loser
    assert_one_line(loser)
    assert run_cli("down", "--run-dir", str(run_dir)).stdout == "the lab is down\n"
    assert not run_dir.exists()


def test_down_without_a_lab(tmp_path: Path) -> None:
    done = run_cli("down", "--run-dir", str(tmp_path / "none"))
    assert done.returncode == 0 and "no lab was up" in done.stdout


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    done = run_cli("up", "--run-dir", str(tmp_path))
    assert done.returncode == 2 and "not a lab's" in done.stderr
    assert_one_line(done.stderr)
    assert (tmp_path / "precious").read_text() == "mine"


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_not_up(tmp_path: Path) -> None:
    for arguments in (["status"], ["exec", "xray", "true"]):
        done = run_cli(*arguments, env={"BULKHEAD_LAB_DIR": str(tmp_path / "none")})
        assert done.returncode == 2 and "no lab is up" in done.stderr
        assert_one_line(done.stderr)


@pytest.mark.parametrize("name", ["nobody", "peer", "other/xray", ""])
def test_unknown_host(lab: Status, name: str) -> None:
    done = run_cli("exec", "--run-dir", str(lab.run_dir), name, "--", "true")
    assert done.returncode == 1
    assert "the lab has: " in done.stderr
    assert_one_line(done.stderr)


def test_not_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in ("up", "demo", "down"):
        done = invoke(command, "--run-dir", str(tmp_path / "lab"))
        assert done.exit_code == 2 and "only root may; run it with sudo" in done.output
        assert_one_line(done.output)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def which(program: str, path: str | None = None) -> str | None:
        return None if program in ("ovs-vswitchd", "wg") else program

    monkeypatch.setattr(shutil, "which", which)
    done = invoke("up", "--run-dir", str(tmp_path / "lab"))
    assert done.exit_code == 2
    assert "apt-get install openvswitch-switch wireguard-tools" in done.output
    assert_one_line(done.output)


def test_bad_state_files(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "lab")
    missing = run_cli("up", str(tmp_path / "none.yaml"), "--run-dir", run_dir)
    assert missing.returncode == 2 and "there is no state file" in missing.stderr
    assert_one_line(missing.stderr)
    bad = tmp_path / "bad.yaml"
    bad.write_text("networks: {privacy: {subnet: 10.0.0.0/99}}\n")
    refused = run_cli("up", str(bad), "--run-dir", run_dir)
    assert refused.returncode == 1 and "networks.privacy.subnet" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not Path(run_dir).exists()


def test_failure_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that ends is named, with what it said; nothing is left."""
    monkeypatch.setattr(manager, "_controller_command", lambda *_: ["sh", "-c", "echo out of luck; exit 3"])
    with pytest.raises(LabError, match=r"exit code 3.*\n(.*\n)*.*out of luck"):
        manager.up(STATE_FILE, tmp_path / "lab")
    assert not manager.is_up(tmp_path / "lab")


def test_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_controller_command", lambda *_: ["sleep", "60"])
    started = time.monotonic()
    with pytest.raises(LabError, match=r"listening controller|in time"):
        manager.up(STATE_FILE, tmp_path / "lab", limit_s=3)
    assert time.monotonic() - started < 10
    assert not manager.is_up(tmp_path / "lab")


# -- descriptions and the Mininet topology ----------------------------------------------------------------------------

OTHER = """
networks:
  lan-a: {bridge: br-a, subnet: 172.20.0.0/16, gateway: 172.20.0.1, ids: "300-399", egress: {port: out-a}}
  lan-b: {bridge: br-b, subnet: 192.168.7.0/24, gateway: 192.168.7.1, ids: "400-499", egress: {port: out-b}}
lxc:
  containers:
    - {id: "300", properties: {name: one, network: lan-a, ipv4_address: 172.20.3.4/16}}
    - {id: "400", properties: {name: two, network: lan-b, ipv4_address: 192.168.7.9/24}}
    - {id: "401", veth: odd-port, properties: {name: with-a-rather-long-name, network: lan-b,
                                               ipv4_address: 192.168.7.50/24}}
"""


def test_another_state_file(tmp_path: Path) -> None:
    """Other names, other addresses, two egresses, no mesh."""
    file = tmp_path / "other.yaml"
    file.write_text(OTHER)
    status = manager.up(file, tmp_path / "lab")
    try:
        assert [host.name for host in status.hosts] == [
            "one", "two", "with-a-rather-long-name", "inet-lan-a", "inet-lan-b"
        ]  # fmt: skip
        with Traffic(status) as traffic:
            world = Try("icmp", "198.51.100.10")
            results = traffic.attempt_all(
                {
                    "one": [world, Try("icmp", "192.168.7.9")],
                    "two": [world, Try("icmp", "192.168.7.50"), Try("icmp", "172.20.3.4")],
                }
            )
        assert [result.outcome == "reply" for result in results["one"]] == [True, False]
        assert [result.outcome == "reply" for result in results["two"]] == [True, True, False]
    finally:
        manager.down(status.run_dir)


def built_in() -> dict[str, object]:
    """The topology's own description, read with the Python that has Mininet."""
    program = "import json, runpy, sys; json.dump(runpy.run_path(sys.argv[1])['BUILT_IN'], sys.stdout)"
    path = ROOT / "mininet/oo1424oo.py"
    out = subprocess.run([manager.SYSTEM_PYTHON, "-c", program, str(path)], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(out.stdout)
    return found


def test_built_in_topology_is_that_of_the_example() -> None:
    """Host names are shorter; ports, MAC addresses, addresses and links are the same."""
    theirs = built_in()
    ours = json.loads(describe(load(STATE_FILE).state, "oo1424oo").as_json())
    keys = ("switch", "port", "mac", "address", "loopback", "routes")
    assert [[h[k] for k in keys] for h in theirs["hosts"]] == [[h[k] for k in keys] for h in ours["hosts"]]  # type: ignore[attr-defined]
    assert [(s["name"], s["dpid"]) for s in theirs["switches"]] == [(s["name"], s["dpid"]) for s in ours["switches"]]  # type: ignore[attr-defined]
    assert theirs["patches"] == ours["patches"]


# `mn`, without what it does to a whole machine: kernel-wide limits when it starts, and when it fails, ending processes
# and removing files in /tmp by pattern. Only then is its own file run.
RUN_MN = """
import runpy, sys
import mininet.clean, mininet.net
mininet.clean.cleanup = mininet.net.fixLimits = lambda: None
sys.argv = ["mn", *sys.argv[1:]]
runpy.run_path("/usr/bin/mn", run_name="__main__")
"""

INSIDE = """
import subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from lab.ovs import Here, PrivateOvs, run

run("mount", "-t", "tmpfs", "tmpfs", "/run")
run("ip", "link", "set", "lo", "up")
with PrivateOvs(Path({directory!r}), namespace=Here()) as ovs:
    env = dict(ovs.env, PYTHONPATH={root!r})
    controller = subprocess.Popen([
        {python!r}, "-c", "from controller.cli import main; main()", "controller", {state!r},
        "--run-dir", {directory!r} + "/run", "--events", {directory!r} + "/events", "--ovsdb", ovs.db], env=env)
    mn = ["/usr/bin/python3", "-c", {run_mn!r}, "--custom", "mininet/oo1424oo.py", "--topo", {topo!r},
          "--switch", "ovs", "--controller", "remote,ip=127.0.0.1,port=6653", "--wait"]
    done = subprocess.run(mn, cwd={root!r}, env=ovs.env, input={commands!r}, text=True)
    controller.terminate()
    controller.wait()
sys.exit(done.returncode)
"""


@pytest.mark.parametrize("source", ["built in", "description"])
def test_topology_for_mn(tmp_path: Path, source: str) -> None:
    """`mn --custom` builds it, a remote controller runs it, and it forwards and isolates."""
    topo, xray = "oo1424oo", "xray"
    if source == "description":
        (tmp_path / "d.json").write_text(describe(load(STATE_FILE).state, "oo1424oo").as_json())
        topo += f",{tmp_path}/d.json"
    commands = textwrap.dedent(
        f"""\
        nodes
        links
        sh sleep 2
        sh ovs-vsctl get bridge vmbr1 fail_mode datapath_type datapath_id
        {xray} ping -c 1 -W 2 198.51.100.10
        {xray} ping -c 1 -W 2 10.1.0.201
        exit
        """
    )
    program = INSIDE.format(
        run_mn=RUN_MN,
        root=str(ROOT), directory=str(tmp_path / "ovs"), python=sys.executable, state=str(STATE_FILE), topo=topo,
        commands=commands,
    )  # fmt: skip
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    names = ("mcp", "api", "peer_priv", "peer_mgmt") if source == "built in" else ("mcp-server", "peer-privacy")
    for name in (*names, "gateway", "xray", "monitoring", "inet", "vmbr0", "mesh-mgmt"):
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", said), name
    assert "veth102" in said and "from-privacy" in said
    assert re.search(r"secure\s+netdev\s+\"000002d54f26bf29\"", said)
    received = re.findall(r"(\d) received", said)
    assert received == ["1", "0"], said


def test_lab_is_a_part_of_the_command() -> None:
    assert COMMANDS["lab"] == "lab.cli:lab" and lab_cli.lab.name == "lab"


def test_places() -> None:
    assert places.lab_program().name == "lab.py"
    with pytest.raises(FileNotFoundError, match="install Bulkhead again"):
        places.data_file("no/such/file")
