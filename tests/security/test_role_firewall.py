"""Every port of every role from a neighbour, a peer of the WireGuard network and loopback: exactly the guide's table.

The peer's interface is a veth of WireGuard's name: the rules know interfaces by their names, and so no knock is lost in a
tunnel. The tunnel itself is in test_wg.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.agent.hosttable import wanted_host_table
from controller.agent.nft import NftTable, rule_differences
from controller.statefile import loads
from tests.e2e.nets import Net
from tests.security.scan import EVERY_PORT, Listeners, reached_tcp, send_udp

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[2]
LISTENING = (21, 22, 80, 443, 3306, 8001, 8006, 8080, 8443, 9573, 51820, 65535)
UDP = (53, 67, 69, 111, 123, 137, 161, 443, 500, 514, 546, 1194, 1900, 4500, 5353, 8001, 51820, 51821)

# role: TCP from the neighbour, TCP from a peer, UDP from either
TABLE: dict[str, tuple[set[int], set[int], set[int]]] = {
    "dev": ({22, 443}, {22, 443}, set()),
    "router": ({22, 443}, {22, 443}, {51820}),
    "inference": ({22}, {22, 8001}, {51820}),
}
OTHERS = "table inet others { chain input { type filter hook input priority 10; tcp dport 4711 counter drop; }; }"


def section(role: str) -> str:
    return f"security: {{role: {role}, name: me, address: 10.0.0.1}}\n"


@dataclass
class Machine:
    """A machine with its role's firewall, beside other software's, and programs that listen everywhere."""

    role: str
    net: Net
    listeners: Listeners

    def reached(self, who: str, source: str, target: str, ports: object = EVERY_PORT) -> set[int]:
        return reached_tcp(self.net.spaces[who], source, target, ports)  # type: ignore[arg-type]

    def dropped(self) -> int:
        """How many packets the input has dropped by its rules."""
        found = json.loads(self.net.run("me", "nft", "-j", "list", "chain", "inet", "bulkhead", "input"))
        rules = [one["rule"]["expr"] for one in found["nftables"] if "rule" in one]
        return sum(int(part["counter"]["packets"]) for rule in rules for part in rule if "counter" in part)


@pytest.fixture(scope="module", params=sorted(TABLE))
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    role = request.param
    loaded = loads(section(role), "role.yaml")
    with Net("me", "neighbour", "peer") as net:
        net.wire(
            ("me", "eth0", ["192.0.2.1/24", "2001:db8::1/64"]),
            ("neighbour", "eth0", ["192.0.2.9/24", "2001:db8::9/64"]),
        )
        net.wire(("me", "bulkhead-wg0", ["10.0.0.1/24", "fd00::1/64"]), ("peer", "wg0", ["10.0.0.2/24", "fd00::2/64"]))
        net.ip("neighbour", "route add 10.0.0.0/24 via 192.0.2.1")
        net.run("me", "nft", "-f", "-", stdin=OTHERS)
        text = wanted_host_table(loaded.state, loaded.host)
        asyncio.run(NftTable("inet", text, tmp_path_factory.mktemp("run"), net.path("me")).load())
        listeners = Listeners(net.spaces["me"], LISTENING, UDP)
        try:
            yield Machine(role, net, listeners)
        finally:
            listeners.close()


@pytest.mark.parametrize("source, target", [("192.0.2.9", "192.0.2.1"), ("2001:db8::9", "2001:db8::1")])
def test_a_neighbour_reaches_the_roles_ports_of_all_65535(machine: Machine, source: str, target: str) -> None:
    before = machine.dropped()
    open_ports = TABLE[machine.role][0]
    assert machine.reached("neighbour", source, target) == open_ports
    # None was lost on the way: all the others were dropped by the rules.
    assert machine.dropped() - before >= len(EVERY_PORT) - len(open_ports)


def test_a_peer_reaches_the_inference_port_as_well(machine: Machine) -> None:
    assert machine.reached("peer", "10.0.0.2", "10.0.0.1") == TABLE[machine.role][1]


def test_the_inference_port_is_not_reached_past_the_tunnel(machine: Machine) -> None:
    net = machine.net
    at = sorted({22, 443, 8001, *LISTENING})
    # A development machine has no tunnel: what is called so is an interface like any other.
    inner = TABLE["dev"][0] if machine.role == "dev" else set()
    assert machine.reached("neighbour", "192.0.2.9", "10.0.0.1", at) == inner  # the tunnel's address by the wire
    assert machine.reached("peer", "fd00::2", "fd00::1", at) == inner  # IPv6 by the tunnel
    net.ip("peer", "route replace 192.0.2.1/32 via 10.0.0.1")
    assert machine.reached("peer", "10.0.0.2", "192.0.2.1", at) == inner  # another address by the tunnel
    net.ip("neighbour", "address replace 10.0.0.2/32 dev lo")  # a peer's address by the wire
    before = net.run("me", "nft", "list", "chain", "inet", "bulkhead", "input")
    assert 8001 not in machine.reached("neighbour", "10.0.0.2", "192.0.2.1", at)
    if machine.role != "dev":
        assert "tunnel-in" in net.run("me", "nft", "list", "table", "inet", "bulkhead")
        # It has not even come to the input.
        assert net.run("me", "nft", "list", "chain", "inet", "bulkhead", "input") == before


def test_udp(machine: Machine) -> None:
    for who, target in (("neighbour", "192.0.2.1"), ("neighbour", "2001:db8::1"), ("peer", "10.0.0.1")):
        machine.listeners.heard()
        send_udp(machine.net.spaces[who], target, UDP)
        assert machine.listeners.heard() == TABLE[machine.role][2], (who, target)


def test_loopback_reaches_everything(machine: Machine) -> None:
    some = {*LISTENING, *range(1, 65536, 97)}
    assert machine.reached("me", "127.0.0.1", "127.0.0.1", sorted(some)) == some
    machine.listeners.heard()
    send_udp(machine.net.spaces["me"], "127.0.0.1", UDP)
    assert machine.listeners.heard() == set(UDP)


def test_what_paths_and_neighbours_need_passes_and_others_rules_stay(machine: Machine) -> None:
    for mine, theirs in (("192.0.2.1", "192.0.2.9"), ("2001:db8::1", "2001:db8::9")):
        machine.net.run("neighbour", "ping", "-c", "1", "-W", "2", mine)
        machine.net.run("me", "ping", "-c", "1", "-W", "2", theirs)
    assert "tcp dport 4711" in machine.net.run("me", "nft", "list", "table", "inet", "others")


# ------------------------------------------------------------------------------------------------------------ verify


def bulkhead(net: Net, directory: Path, *arguments: str) -> tuple[int, str]:
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT), "BULKHEAD_RUN_DIR": str(directory / "run")}
    line = net.spaces["me"].command(sys.executable, "-m", "controller", "firewall", *arguments)
    done = subprocess.run(line, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_verify_names_each_rule_that_differs(tmp_path: Path) -> None:
    file = str(tmp_path / "inf.yaml")
    Path(file).write_text(section("inference"))
    with Net("me") as net:
        assert bulkhead(net, tmp_path, "verify", file)[0] == 1
        assert bulkhead(net, tmp_path, "apply", file, "--confirm", "60")[0] == 0
        code, text = bulkhead(net, tmp_path, "verify", file)
        assert code == 0, text
        net.run("me", "nft", "insert", "rule", "inet", "bulkhead", "input", "tcp", "dport", "8001", "accept")
        net.run("me", "nft", "flush", "chain", "inet", "bulkhead", "tunnel-forward")
        code, text = bulkhead(net, tmp_path, "verify", file)
        assert code == 1
        assert "chain input, line 2: not wanted: tcp dport 8001 accept" in text
        assert text.count("chain tunnel-forward") == 2 and text.count("chain ") == 3
        assert bulkhead(net, tmp_path, "rollback")[0] == 0
        # A network of the host's own that the tunnel's would shadow.
        net.ip("me", "link add other type veth peer name far", "address add 10.0.0.77/8 dev other", "link set other up")
        code, text = bulkhead(net, tmp_path, "apply", file)
        assert code == 2 and "other has the address 10.0.0.77/8" in text and "Traceback" not in text


def test_differences_are_of_rules_not_of_texts() -> None:
    one = "table inet bulkhead {\n\tchain a {\n\t\tx\n\t\ty\n\t}\n}\n"
    assert rule_differences(one, one.replace("\t", "    ")) == ()
    assert rule_differences(one.replace("y", "z"), one) == (
        "chain a, line 2: missing: y",
        "chain a, line 2: not wanted: z",
    )
    assert rule_differences(None, one) == ("there is no table inet bulkhead: no rule is loaded",)
    assert len(rule_differences(one.replace("chain a", "chain b"), one)) == 2
