"""State files: what loads, what is derived, and every reason to refuse one, with the path it is told at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller import statefile
from controller.hostmodel import Api, HostState
from controller.model import Bridge, BridgeKind, DesiredState, Egress, Ipv4, Mac, Mesh, Prefix, Service, Vpn
from controller.problems import InvalidInput, Problem, Severity

ROOT = Path(__file__).parents[2]
YAML_FILE = ROOT / "examples" / "oo1424oo.yaml"
NIX_FILE = ROOT / "examples" / "oo1424oo.nix.json"

Tree = dict[str, Any]
Change = Callable[[Tree], object]


def example() -> Tree:
    tree: Tree = yaml.safe_load(YAML_FILE.read_text())
    return tree


def refused(text: str, source: str = "test.yaml") -> tuple[Problem, ...]:
    with pytest.raises(InvalidInput) as caught:
        statefile.loads(text, source)
    return caught.value.problems


def errors_of(change: Change, tree: Tree | None = None) -> dict[str, list[str]]:
    """The error codes by path after a change to the example."""
    tree = example() if tree is None else tree
    change(tree)
    try:
        statefile.loads(json.dumps(tree), "test.json")
    except InvalidInput as exc:
        found: dict[str, list[str]] = {}
        for problem in exc.problems:
            if problem.severity is Severity.ERROR:
                found.setdefault(problem.path, []).append(problem.code)
        return found
    return {}


def put(path: str, value: object) -> Change:
    """A change: set what is at a dotted path (`lxc.containers.0.veth`)."""

    def change(tree: Any) -> None:
        *parents, last = path.split(".")
        for part in parents:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        tree[int(last) if isinstance(tree, list) else last] = value

    return change


def cut(path: str) -> Change:
    """A change: remove what is at a dotted path."""

    def change(tree: Any) -> None:
        *parents, last = path.split(".")
        for part in parents:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        del tree[int(last) if isinstance(tree, list) else last]

    return change


def both(*changes: Change) -> Change:
    def change(tree: Tree) -> None:
        for one in changes:
            one(tree)

    return change


class TestExamples:
    def test_yaml_has_warnings_only(self) -> None:
        loaded = statefile.load(YAML_FILE)
        assert loaded.problems
        assert {problem.severity for problem in loaded.problems} == {Severity.WARNING}

    def test_nix_json_has_warnings_only(self) -> None:
        assert {p.severity for p in statefile.load(str(NIX_FILE)).problems} == {Severity.WARNING}

    def test_state(self) -> None:
        state = statefile.load(YAML_FILE).state
        privacy, management = state.networks
        pool = Prefix.parse("10.8.0.0/24")
        assert (privacy.name, privacy.bridge, str(privacy.subnet)) == ("privacy", "vmbr0", "10.0.0.0/24")
        assert (privacy.ids, privacy.host, privacy.refuse) == ((100, 199), None, True)
        assert privacy.egress == Egress("warp0", privacy.gateway_mac)
        assert privacy.mesh == Mesh(
            "mesh-privacy",
            "from-privacy",
            "to-privacy",
            "nm-privacy",
            Mac.derive("privacy", "mesh"),
            (Prefix.parse("10.0.0.0/24"),),
        )
        assert privacy.vpn == Vpn("100", 51820, pool)
        assert [(m.id, m.name, m.port, str(m.address), m.routed) for m in privacy.members] == [
            ("100", "gateway", "veth100", "10.0.0.100", (pool,)),
            ("102", "xray", "veth102", "10.0.0.102", ()),
        ]
        assert privacy.member("100").mac == Mac.derive("privacy", "container", "100")
        assert (management.egress, management.host, management.vpn) == (None, Ipv4.parse("10.1.0.1"), None)
        assert [m.id for m in management.members] == ["200", "201", "202"]
        assert management.member("201").services == (
            Service("api", "tcp", 9573, True),
            Service("api-alt", "tcp", 9574, True),
        )
        assert state.bridges == (
            Bridge("vmbr0", BridgeKind.SOCKET, "privacy"),
            Bridge("vmbr1", BridgeKind.SOCKET, "management"),
            Bridge("mesh-privacy", BridgeKind.MESH, "privacy"),
            Bridge("mesh-mgmt", BridgeKind.MESH, "management"),
        )

    def test_what_networks_says_is_what_is_derived_without_it(self) -> None:
        tree = example()
        written = statefile.loads(json.dumps(tree), "a").state
        del tree["networks"], tree["wireguard"]["vpn_server"]["container"]
        derived = statefile.loads(json.dumps(tree), "b").state
        for ours, theirs in zip(written.networks, derived.networks, strict=True):
            assert (theirs.host, theirs.refuse) == (None, False)
            for key in (
                "name",
                "bridge",
                "subnet",
                "gateway",
                "gateway_mac",
                "ids",
                "egress",
                "mesh",
                "members",
                "vpn",
            ):
                assert getattr(ours, key) == getattr(theirs, key), key
        assert written.bridges == derived.bridges

    def test_nix_json_is_the_yaml_without_the_additions(self) -> None:
        tree = example()
        del tree["networks"], tree["wireguard"]["vpn_server"]["container"], tree["lxc"]["containers"][4]
        assert json.loads(NIX_FILE.read_text()) == tree

    def test_wrapped(self) -> None:
        wrapped = statefile.loads(json.dumps({"stateConfig": example()}), "w")
        assert wrapped.state == statefile.load(YAML_FILE).state

    def test_wrapped_with_company(self) -> None:
        found = refused(json.dumps({"stateConfig": example(), "enable": True}))
        assert [(p.code, p.path) for p in found if p.severity is Severity.ERROR] == [("unknown-key", "enable")]

    def test_problems_are_sorted_by_path_as_a_person_would(self) -> None:
        tree = example()
        tree["openflow"]["bridges"]["vmbr1"]["flows"] = ["actions=bogus"] * 12
        paths = [p.path for p in refused(json.dumps(tree)) if p.code == "unknown-port"]
        assert paths == [f"openflow.bridges.vmbr1.flows[{index}]" for index in range(12)]


class TestDigest:
    def test_same_state_same_digest(self) -> None:
        tree = example()
        before = statefile.loads(json.dumps(tree), "a").state.digest
        tree["networks"] = dict(reversed(tree["networks"].items()))
        tree["lxc"]["containers"].reverse()
        assert statefile.loads(json.dumps(tree), "b").state.digest == before
        assert len(before) == 16 and int(before, 16) >= 0

    def test_other_state_other_digest(self) -> None:
        tree = example()
        put("lxc.containers.4.properties.services", [{"name": "web", "port": 80}])(tree)
        assert statefile.loads(json.dumps(tree), "a").state.digest != statefile.load(YAML_FILE).state.digest

    def test_it_is_the_same_in_another_process(self) -> None:
        code = f"from controller.statefile import load; print(load({str(YAML_FILE)!r}).state.digest)"
        env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
        other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert other.stdout.strip() == statefile.load(YAML_FILE).state.digest


class TestDerivation:
    """From the bare stateConfig."""

    def load(self, change: Change) -> DesiredState:
        tree: Tree = json.loads(NIX_FILE.read_text())
        change(tree)
        return statefile.loads(json.dumps(tree), "t").state

    def test_untagged_container_is_on_its_bridges_network(self) -> None:
        state = self.load(cut("lxc.containers.1.properties.network"))
        assert [m.id for m in state.network("privacy").members] == ["100", "102"]

    def test_egress_is_the_interface_where_no_command_adds_it(self) -> None:
        state = self.load(cut("wireguard.warp_tunnel.post_up"))
        assert state.network("privacy").egress == Egress("warp0", Mac.derive("privacy", "gateway"))
        assert state.network("management").egress is None

    def test_egress_goes_where_the_command_puts_it(self) -> None:
        state = self.load(
            both(
                put("wireguard.warp_tunnel.post_up", "sleep 1; ovs-vsctl --may-exist add-port vmbr1 %i && true"),
                put("openflow.bridges", {}),
            )
        )
        assert state.network("privacy").egress is None
        egress = state.network("management").egress
        assert egress is not None and egress.port == "warp0"

    def test_a_disabled_tunnel_is_no_egress(self) -> None:
        state = self.load(both(put("wireguard.warp_tunnel.enabled", False), put("openflow.bridges", {})))
        assert state.network("privacy").egress is None

    def test_null_says_there_is_none(self) -> None:
        tree = example()
        both(
            put("networks.privacy.egress", None),
            cut("wireguard.warp_tunnel"),
            put("networks.management.mesh", None),
            cut("netmaker.networks.1"),
            cut("networking.veth_pairs.mgmt_mesh_to_socket"),
            put("openflow.bridges", {}),
        )(tree)
        state = statefile.loads(json.dumps(tree), "t").state
        assert state.network("privacy").egress is None
        assert state.network("management").mesh is None

    def test_vpn_by_literal_flow_before_name(self) -> None:
        state = self.load(
            both(
                put("openflow.bridges.vmbr0.flows.0", "priority=200,udp,tp_dst=51820,actions=output:veth102"),
                put("lxc.containers.1.properties.name", "wg"),
            )
        )
        assert state.network("privacy").vpn == Vpn("102", 51820, Prefix.parse("10.8.0.0/24"))

    def test_vpn_by_name(self) -> None:
        state = self.load(put("openflow.bridges", {}))
        assert state.network("privacy").vpn == Vpn("100", 51820, Prefix.parse("10.8.0.0/24"))

    def test_vpn_port_default(self) -> None:
        state = self.load(cut("wireguard.vpn_server.listen_port"))
        vpn = state.network("privacy").vpn
        assert vpn is not None and vpn.port == 51820

    def test_ids_of_an_unconventional_network_are_its_hundreds(self) -> None:
        container = {
            "id": "310",
            "bridge": "vmbr2",
            "properties": {"name": "redis", "ipv4_address": "10.2.0.10/24", "network": "data"},
        }
        state = self.load(lambda tree: tree["lxc"]["containers"].append(container))
        data = state.network("data")
        assert (data.ids, str(data.gateway), data.mesh) == ((300, 399), "10.2.0.1", None)
        assert data.member("310").port == "veth310"

    def test_datapath_id(self) -> None:
        tree = example()
        tree["bridges"] = {"vmbr0": {"datapath_id": "00000000000000a1", "kind": "socket"}}
        bridge = statefile.loads(json.dumps(tree), "t").state.bridge("vmbr0")
        assert bridge is not None and bridge.datapath_id == 0xA1

    def test_stopped_containers_are_members(self) -> None:
        assert self.load(put("lxc.containers.0.running", False)) == self.load(lambda tree: None)

    def test_ids_may_be_numbers_and_a_range_a_list(self) -> None:
        tree = example()
        both(put("lxc.containers.0.id", 100), put("networks.privacy.ids", [100, 199]))(tree)
        assert statefile.loads(json.dumps(tree), "t").state == statefile.load(YAML_FILE).state

    def test_written_macs_are_taken(self) -> None:
        tree = example()
        put("lxc.containers.0.properties.mac", "02:AA:00:00:00:01")(tree)
        put("networks.privacy.egress.mac", "02:aa:00:00:00:02")(tree)
        privacy = statefile.loads(json.dumps(tree), "t").state.network("privacy")
        assert str(privacy.member("100").mac) == "02:aa:00:00:00:01"
        assert privacy.egress is not None and str(privacy.egress.mac) == "02:aa:00:00:00:02"

    def test_nothing_declared_is_an_empty_state(self) -> None:
        assert statefile.loads("lxc: {}\n", "t").state == DesiredState()


CONTAINER = "lxc.containers[1]"
PROPERTIES = f"{CONTAINER}.properties"
REFUSED: list[tuple[str, Change, str, str]] = [
    ("unknown key", put("lxc.containers.1.vethh", "x"), f"{CONTAINER}.vethh", "unknown-key"),
    ("unknown section", put("openflo", {}), "openflo", "unknown-key"),
    ("missing key", cut("lxc.containers.1.properties"), f"{PROPERTIES}", "missing-key"),
    ("text for a number", put("lxc.containers.2.properties.services.0.port", "9573"), "", "wrong-type"),
    ("number for text", put("lxc.containers.1.properties.name", 5), f"{PROPERTIES}.name", "wrong-type"),
    ("text for a flag", put("lxc.containers.1.running", "yes"), f"{CONTAINER}.running", "wrong-type"),
    ("mapping for a list", put("lxc.containers", {}), "lxc.containers", "wrong-type"),
    ("list for a mapping", put("networks", []), "networks", "wrong-type"),
    ("nothing for a mapping", put("lxc", None), "lxc", "wrong-type"),
    ("protocol", put("lxc.containers.2.properties.services.0.protocol", "icmp"), "", "bad-value"),
    ("port 0", put("lxc.containers.2.properties.services.0.port", 0), "", "out-of-range"),
    ("port 65536", put("wireguard.vpn_server.listen_port", 65536), "wireguard.vpn_server.listen_port", "out-of-range"),
    ("id twice", put("lxc.containers.1.id", "100"), f"{CONTAINER}.id", "duplicate-id"),
    ("name twice", put("lxc.containers.1.properties.name", "Gateway"), f"{PROPERTIES}.name", "duplicate-name"),
    ("veth twice", put("lxc.containers.1.veth", "veth100"), f"{CONTAINER}.veth", "duplicate-port"),
    ("veth is the egress", put("lxc.containers.1.veth", "warp0"), f"{CONTAINER}.veth", "duplicate-port"),
    ("veth is a mesh port", put("lxc.containers.1.veth", "from-mgmt"), f"{CONTAINER}.veth", "duplicate-port"),
    ("veth is a bridge", put("lxc.containers.1.veth", "vmbr1"), f"{CONTAINER}.veth", "duplicate-port"),
    (
        "address twice",
        put("lxc.containers.1.properties.ipv4_address", "10.0.0.100/24"),
        f"{PROPERTIES}.ipv4_address",
        "duplicate-address",
    ),
    (
        "MAC twice",
        both(
            put("lxc.containers.0.properties.mac", "02:00:00:00:00:01"),
            put("lxc.containers.1.properties.mac", "02:00:00:00:00:01"),
        ),
        f"{PROPERTIES}.mac",
        "duplicate-mac",
    ),
    (
        "MAC of the gateway",
        both(
            put("networks.privacy.gateway_mac", "02:00:00:00:00:01"),
            put("lxc.containers.1.properties.mac", "02:00:00:00:00:01"),
        ),
        f"{PROPERTIES}.mac",
        "duplicate-mac",
    ),
    (
        "MAC that another was given by derivation",
        put("lxc.containers.1.properties.mac", str(Mac.derive("privacy", "container", "100"))),
        f"{PROPERTIES}.mac",
        "duplicate-mac",
    ),
    (
        "service name twice",
        put("lxc.containers.3.properties.services.1.name", "api"),
        "lxc.containers[3].properties.services[1].name",
        "duplicate-service",
    ),
    (
        "service port twice",
        put("lxc.containers.3.properties.services.1.port", 9573),
        "lxc.containers[3].properties.services[1].port",
        "service-clash",
    ),
    (
        "service on the VPN's port",
        put("lxc.containers.0.properties.services", [{"name": "wg", "protocol": "udp", "port": 51820}]),
        "lxc.containers[0].properties.services[0].port",
        "service-clash",
    ),
    ("interface too long", put("lxc.containers.1.veth", "v" * 16), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface empty", put("lxc.containers.1.veth", ""), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface with slash", put("lxc.containers.1.veth", "a/b"), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface with space", put("lxc.containers.1.veth", "a b"), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface with newline", put("lxc.containers.1.veth", "ab\n"), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface dot", put("lxc.containers.1.veth", "."), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface dots", put("lxc.containers.1.veth", ".."), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface a number", put("lxc.containers.1.veth", "17"), f"{CONTAINER}.veth", "bad-interface-name"),
    ("interface reserved", put("lxc.containers.1.veth", "Local"), f"{CONTAINER}.veth", "bad-interface-name"),
    ("bridge too long", put("networks.privacy.bridge", "b" * 16), "networks.privacy.bridge", "bad-interface-name"),
    ("flows of an ill-named bridge", put("openflow.bridges.a/b", {}), "openflow.bridges['a/b']", "bad-interface-name"),
    ("container name", put("lxc.containers.1.properties.name", "x_y"), f"{PROPERTIES}.name", "bad-name"),
    ("id with leading zero", put("lxc.containers.1.id", "0102"), f"{CONTAINER}.id", "bad-id"),
    ("id true", put("lxc.containers.1.id", True), f"{CONTAINER}.id", "wrong-type"),
    ("id outside the range", put("lxc.containers.1.id", "202999"), f"{CONTAINER}.id", "id-outside"),
    ("range upside down", put("networks.privacy.ids", "199-100"), "networks.privacy.ids", "bad-range"),
    ("ranges meet", put("networks.management.ids", "199-299"), "networks.management.ids", "overlapping-ids"),
    ("subnets overlap", put("networks.management.subnet", "10.0.0.0/16"), "", "overlapping-prefixes"),
    (
        "VPN pool in the other subnet",
        put("wireguard.vpn_server.ip_pool", "10.1.0.0/28"),
        "wireguard.vpn_server.ip_pool",
        "overlapping-prefixes",
    ),
    (
        "VPN pool in its own subnet",
        put("wireguard.vpn_server.ip_pool", "10.0.0.0/28"),
        "wireguard.vpn_server.ip_pool",
        "overlapping-prefixes",
    ),
    (
        "mesh prefix around the other subnet",
        put("networks.privacy.mesh.prefixes", ["10.0.0.0/24", "10.1.0.0/16"]),
        "networks.management.subnet",
        "overlapping-prefixes",
    ),
    (
        "address outside",
        put("lxc.containers.1.properties.ipv4_address", "10.9.0.102/24"),
        f"{PROPERTIES}.ipv4_address",
        "address-outside",
    ),
    (
        "other prefix length",
        put("lxc.containers.1.properties.ipv4_address", "10.0.0.102/16"),
        f"{PROPERTIES}.ipv4_address",
        "wrong-prefix",
    ),
    *(
        (
            f"address is the {what}",
            put("lxc.containers.2.properties.ipv4_address", f"{address}/24"),
            "lxc.containers[2].properties.ipv4_address",
            "reserved-address",
        )
        for what, address in (("network", "10.1.0.0"), ("broadcast", "10.1.0.255"), ("gateway", "10.1.0.1"))
    ),
    (
        "address is the host's",
        both(
            put("networks.management.host", "10.1.0.2"),
            put("lxc.containers.2.properties.ipv4_address", "10.1.0.2/24"),
        ),
        "lxc.containers[2].properties.ipv4_address",
        "reserved-address",
    ),
    ("no prefix length", put("lxc.containers.1.properties.ipv4_address", "10.0.0.102"), "", "bad-prefix"),
    ("host bits in the subnet", put("networks.privacy.subnet", "10.0.0.1/24"), "", "bad-prefix"),
    ("subnet without room", put("networks.privacy.subnet", "10.0.0.100/31"), "networks.privacy.subnet", "bad-prefix"),
    ("multicast subnet", put("networks.privacy.subnet", "239.0.0.0/24"), "networks.privacy.subnet", "bad-prefix"),
    ("half an address", put("networks.privacy.gateway", "10.0.1"), "networks.privacy.gateway", "bad-address"),
    ("gateway outside", put("networks.privacy.gateway", "10.0.1.1"), "networks.privacy.gateway", "gateway-outside"),
    ("gateway is broadcast", put("networks.privacy.gateway", "10.0.0.255"), "", "reserved-address"),
    ("host outside", put("networks.management.host", "10.0.0.1"), "networks.management.host", "host-outside"),
    (
        "another gateway",
        put("lxc.containers.1.properties.gateway", "10.0.0.2"),
        f"{PROPERTIES}.gateway",
        "wrong-gateway",
    ),
    (
        "undeclared network",
        put("lxc.containers.1.properties.network", "privcy"),
        f"{PROPERTIES}.network",
        "unknown-network",
    ),
    ("bridge of another network", put("lxc.containers.1.bridge", "vmbr1"), f"{CONTAINER}.bridge", "wrong-bridge"),
    (
        "no tag and no network's bridge",
        both(cut("lxc.containers.1.properties.network"), put("lxc.containers.1.bridge", "vmbr9")),
        CONTAINER,
        "no-network",
    ),
    (
        "one bridge for two",
        both(
            put("networks.management.bridge", "vmbr0"),
            *(put(f"lxc.containers.{index}.bridge", "vmbr0") for index in (2, 3, 4)),
        ),
        "networks.management.bridge",
        "bridge-shared",
    ),
    (
        "one mesh bridge for two",
        put("networks.management.mesh.bridge", "mesh-privacy"),
        "networks.management.mesh.bridge",
        "bridge-shared",
    ),
    (
        "a mesh bridge that is a socket bridge",
        put("networks.management.mesh.bridge", "vmbr0"),
        "networks.management.mesh.bridge",
        "bridge-shared",
    ),
    ("multicast MAC", put("lxc.containers.1.properties.mac", "03:00:00:00:00:01"), "", "multicast-mac"),
    ("zero MAC", put("lxc.containers.1.properties.mac", "00:00:00:00:00:00"), f"{PROPERTIES}.mac", "bad-mac"),
    ("short MAC", put("lxc.containers.1.properties.mac", "02:00:00:00:01"), f"{PROPERTIES}.mac", "bad-mac"),
    ("datapath id short", put("bridges", {"vmbr0": {"datapath_id": "1"}}), "", "bad-datapath-id"),
    ("datapath id a number", put("bridges", {"vmbr0": {"datapath_id": 1}}), "", "bad-datapath-id"),
    (
        "datapath id twice",
        put("bridges", {name: {"datapath_id": "00000000000000a1"} for name in ("vmbr0", "vmbr1")}),
        "bridges.vmbr1.datapath_id",
        "duplicate-datapath-id",
    ),
    ("a bridge of nobody", put("bridges", {"vmbr7": {}}), "bridges.vmbr7", "unknown-bridge"),
    ("wrong kind", put("bridges", {"vmbr0": {"kind": "mesh"}}), "bridges.vmbr0.kind", "wrong-kind"),
    ("VPN container missing", put("wireguard.vpn_server.container", "150"), "wireguard.vpn_server", "vpn-container"),
    (
        "tunnel to a bridge of nobody",
        put("wireguard.warp_tunnel.post_up", "ovs-vsctl add-port vmbr5 warp0"),
        "wireguard.warp_tunnel.post_up",
        "unknown-bridge",
    ),
    (
        "tunnel against networks",
        put("wireguard.warp_tunnel.post_up", "ovs-vsctl add-port vmbr0 warp1"),
        "wireguard.warp_tunnel.post_up",
        "egress-mismatch",
    ),
    (
        "veth pair across networks",
        put(
            "networking.veth_pairs.x",
            {"peer1": {"name": "a", "bridge": "vmbr0"}, "peer2": {"name": "b", "bridge": "vmbr1"}},
        ),
        "networking.veth_pairs.x",
        "cross-connect",
    ),
    (
        "veth pair into nowhere",
        put(
            "networking.veth_pairs.x",
            {"peer1": {"name": "a", "bridge": "vmbr0"}, "peer2": {"name": "b", "bridge": "q"}},
        ),
        "networking.veth_pairs.x",
        "stray-veth-pair",
    ),
    (
        "mesh bridge against networks",
        put("netmaker.networks.0.bridge", "mesh-mgmt"),
        "netmaker.networks[0].bridge",
        "mesh-unconnected",
    ),
    ("a network of nothing", put("networks.data", {}), "networks.data.bridge", "underivable"),
    ("a flow of two lines", put("openflow.bridges.vmbr0.flows.0", "actions=drop\nactions=drop"), "", "bad-flow"),
    (
        "a command of two lines",
        put("wireguard.warp_tunnel.post_up", "a\nb"),
        "wireguard.warp_tunnel.post_up",
        "bad-text",
    ),
]


@pytest.mark.parametrize(("change", "path", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(change: Change, path: str, code: str) -> None:
    found = errors_of(change)
    if path:
        assert code in found.get(path, []), found
    else:
        assert code in [one for codes in found.values() for one in codes], found


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (put("networking.veth_pairs", {}), "mesh-unconnected"),
        (put("networking.veth_pairs.mgmt_mesh_to_socket.peer2.bridge", "vmbr0"), "two-meshes"),
        (put("networking.veth_pairs.mgmt_mesh_to_socket.peer2.bridge", "vmbr9"), "mesh-unconnected"),
        (put("netmaker.networks.1.bridge", "vmbr1"), "mesh-unconnected"),
        # A misspelt tag is a network of its own, on a bridge that is taken.
        (put("lxc.containers.3.properties.network", "managment"), "bridge-shared"),
        (put("lxc.containers.3.properties.network", "privacy"), "wrong-bridge"),
        (both(*(cut(f"lxc.containers.{n}.properties.network") for n in range(4))), "no-network"),
        (lambda tree: tree["lxc"]["containers"].clear(), "mesh-unconnected"),
    ],
)
def test_refused_when_derived(change: Change, code: str) -> None:
    found = errors_of(change, json.loads(NIX_FILE.read_text()))
    assert code in [one for codes in found.values() for one in codes], found


class TestReport:
    def test_everything_at_once(self) -> None:
        found = errors_of(
            both(
                put("lxc.containers.0.runing", True),  # shape: unknown key
                put("lxc.containers.1.properties.mac", "x"),  # shape: notation
                put("lxc.containers.3.id", "200"),  # across containers
                put("lxc.containers.4.properties.ipv4_address", "10.9.0.1/24"),  # against its network
            )
        )
        assert found["lxc.containers[0].runing"] == ["unknown-key"]
        assert found["lxc.containers[1].properties.mac"] == ["bad-mac"]
        assert found["lxc.containers[3].id"] == ["duplicate-id"]
        assert found["lxc.containers[4].properties.ipv4_address"] == ["address-outside"]

    def test_a_misshapen_container_does_not_make_others_look_bad(self) -> None:
        # Flows name veth100, and the VPN server is in it: neither may be reported when only its MAC is wrong.
        found = errors_of(put("lxc.containers.0.properties.mac", "x"))
        assert found == {"lxc.containers[0].properties.mac": ["bad-mac"]}

    @pytest.mark.parametrize(
        ("change", "path", "code"),
        [
            (put("networks.privacy.subnet", "10.0.0.0"), "networks.privacy.subnet", "bad-prefix"),
            (put("networks.privacy.egress", {"prt": "warp0"}), "networks.privacy.egress.port", "missing-key"),
            (put("wireguard.warp_tunnel.enabled", "no"), "wireguard.warp_tunnel.enabled", "wrong-type"),
        ],
    )
    def test_a_misshapen_network_does_not_make_its_members_look_bad(self, change: Change, path: str, code: str) -> None:
        found = errors_of(change)
        assert found.pop(path) == [code]
        assert set(found) <= {"networks.privacy.egress.prt"}

    def test_a_container_that_is_on_no_network_does_not_make_flows_look_bad(self) -> None:
        found = errors_of(put("lxc.containers.1.properties.network", "privcy"))
        assert found == {"lxc.containers[1].properties.network": ["unknown-network"]}

    def test_did_you_mean(self) -> None:
        tree = example()
        put("lxc.containers.1.vethh", "veth102")(tree)
        (problem,) = [p for p in refused(json.dumps(tree)) if p.code == "unknown-key"]
        assert problem.fix == "Did you mean veth?"
        put("lxc.containers.1.properties.network", "privcy")(tree)
        (problem,) = [p for p in refused(json.dumps(tree)) if p.code == "unknown-network"]
        assert problem.fix == "Did you mean privacy?"

    def test_warnings_come_with_errors(self) -> None:
        tree = example()
        put("lxc.containers.1.properties.gateway", "10.0.0.9")(tree)
        assert "default-normal" in {p.code for p in refused(json.dumps(tree))}

    def test_flow_errors_come_with_state_errors(self) -> None:
        found = errors_of(
            both(
                put("lxc.containers.1.properties.gateway", "10.0.0.9"),
                put("openflow.bridges.vmbr0.flows.1", "in_port=veth109,actions=drop"),
            )
        )
        assert found == {
            "lxc.containers[1].properties.gateway": ["wrong-gateway"],
            "openflow.bridges.vmbr0.flows[1]": ["unknown-port"],
        }

    def test_unused_veth_pair_is_a_warning(self) -> None:
        tree = example()
        pair = {"peer1": {"name": "a", "bridge": "p"}, "peer2": {"name": "b", "bridge": "q"}}
        tree["networking"]["veth_pairs"]["x"] = pair
        found = statefile.loads(json.dumps(tree), "t").problems
        assert [p.path for p in found if p.code == "unused-veth-pair"] == ["networking.veth_pairs.x"]

    def test_ids_past_octet(self) -> None:
        # 200-299 taken for the last byte of an address would end at 254: addresses are allocated separately.
        found = statefile.load(YAML_FILE).problems
        assert [p.path for p in found if p.code == "ids-past-octet"] == ["networks.management.ids"]

    def test_two_sites_with_one_subnet(self) -> None:
        # Another site's management network on 10.0.0.0/24 cannot live beside this privacy network.
        tree = example()
        put("networks.management", {"bridge": "vmbr1", "subnet": "10.0.0.0/24", "ids": "200-299", "mesh": None})(tree)
        assert "overlapping-prefixes" in {p.code for p in refused(json.dumps(tree))}

    def test_too_many_containers(self) -> None:
        found = refused(json.dumps({"lxc": {"containers": [{}] * 60_001}}))
        assert [p.code for p in found if p.path == "lxc.containers"] == ["too-many"]

    def test_a_thousand_problems_are_enough(self) -> None:
        found = refused(json.dumps({f"key{number}": 1 for number in range(5000)}))
        assert len(found) == 1001
        assert "too-many-problems" in {p.code for p in found}

    def test_a_problem_prints_on_one_line(self) -> None:
        tree = example()
        put("lxc.containers.1.veth", "\ud83d\ude00\x1b[31m\n" * 99)(tree)
        (problem,) = [p for p in refused(json.dumps(tree)) if p.code == "bad-interface-name"]
        assert str(problem).isprintable() and str(problem).isascii()
        assert len(str(problem)) < 400

    def test_half_a_surrogate(self) -> None:
        found = refused('{"netmaker": {"networks": [{"name": "\\ud800"}]}, "\\udc00": 1}')
        assert [p.code for p in found] == ["file-encoding"]

    def test_a_whole_surrogate_pair(self) -> None:
        tree = example()
        put("netmaker.networks.0.server", "https://\U0001f600")(tree)
        assert "\\ud83d\\ude00" in json.dumps(tree)
        assert statefile.loads(json.dumps(tree), "t").state == statefile.load(YAML_FILE).state


class TestText:
    def codes(self, text: str, source: str = "test.yaml") -> list[str]:
        return [p.code for p in refused(text, source)]

    @pytest.mark.parametrize("text", ["", "  \n\t\n"])
    def test_empty(self, text: str) -> None:
        assert self.codes(text) == ["file-empty"]

    @pytest.mark.parametrize("text", ["- a\n", "just words", "17", "[]", "null", "# only a comment\n"])
    def test_not_a_mapping(self, text: str) -> None:
        assert self.codes(text) == ["not-a-mapping"]

    def test_wrapper_not_a_mapping(self) -> None:
        assert self.codes("stateConfig: 5\n") == ["not-a-mapping"]

    def test_syntax_names_the_line(self) -> None:
        (problem,) = refused("lxc:\n  containers: [\n")
        assert problem.code == "syntax" and "line 3" in problem.found

    def test_json_syntax_names_the_line(self) -> None:
        (problem,) = refused('{"lxc": {\n"containers": [}}', "x.json")
        assert problem.code == "syntax" and "line 2" in problem.found and problem.expected == "JSON"

    def test_duplicate_key_names_the_line(self) -> None:
        found = refused("lxc:\n  containers: []\nnetworks: {}\nlxc:\n  containers: []\n")
        assert [(p.code, p.path) for p in found] == [("duplicate-key", "lxc")]
        assert "line 4" in found[0].found

    def test_duplicate_key_names_the_path(self) -> None:
        text = YAML_FILE.read_text().replace("      veth: veth102\n", "      veth: veth102\n      veth: veth103\n")
        (problem,) = [p for p in refused(text) if p.code == "duplicate-key"]
        assert problem.path == "lxc.containers[1].veth"

    def test_duplicate_key_in_json(self) -> None:
        found = refused('{"lxc": {},\n "lxc": {}}', "x.json")
        assert [(p.code, p.path) for p in found] == [("duplicate-key", "lxc")]
        assert "line 2" in found[0].found

    def test_duplicates_come_with_everything_else(self) -> None:
        found = {p.code for p in refused("lxc: {}\nlxc: {}\nnonsense: 1\n")}
        assert found == {"duplicate-key", "unknown-key"}

    def test_alias(self) -> None:
        text = YAML_FILE.read_text()
        text = text.replace(
            "ipv4_address: 10.0.0.100/24\n        gateway: 10.0.0.1",
            "ipv4_address: 10.0.0.100/24\n        gateway: &gw 10.0.0.1",
        )
        text = text.replace(
            "ipv4_address: 10.0.0.102/24\n        gateway: 10.0.0.1",
            "ipv4_address: 10.0.0.102/24\n        gateway: *gw",
        )
        assert "*gw" in text and "&gw" in text
        assert statefile.loads(text, "t").state == statefile.load(YAML_FILE).state

    def test_alias_bomb(self) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
        started = time.monotonic()
        assert self.codes("\n".join(lines)) == ["too-large"]
        assert time.monotonic() - started < 1

    def test_alias_to_itself(self) -> None:
        assert self.codes("a: &a [*a]\n") == ["syntax"]

    def test_too_large(self) -> None:
        assert self.codes("a: " + "x" * (4 * 1024 * 1024)) == ["too-large"]

    @pytest.mark.parametrize("text", ["[" * 200_000, "{a: " * 200_000, "- " * 200_000, '{"a":' * 200_000])
    def test_nesting(self, text: str) -> None:
        started = time.monotonic()
        assert self.codes(text)[0] in ("too-deep", "syntax")
        assert time.monotonic() - started < 5

    @pytest.mark.parametrize("text", ["!!python/object:os.system {a: 1}", "a: !!set {b}", "a: !!binary eA=="])
    def test_tags(self, text: str) -> None:
        assert self.codes(text) == ["yaml-tag"]

    def test_two_documents(self) -> None:
        assert self.codes("lxc: {}\n---\nlxc: {}\n") == ["yaml-documents"]

    @pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "? {a: b}\n: 1\n", "a: &x {b: 1}\n*x : 2\n"])
    def test_keys_that_are_no_text(self, text: str) -> None:
        assert self.codes(text) == ["bad-key"]

    def test_yaml_notation(self) -> None:
        # What older readers of YAML turn into a number (octal, base 60) or a flag is text here.
        text = "bridges: {vmbr0: {datapath_id: 0000000000000012}}\n"
        tree = yaml.safe_dump(example()) + text
        bridge = statefile.loads(tree, "t").state.bridge("vmbr0")
        assert bridge is not None and bridge.datapath_id == 0x12
        found = refused(YAML_FILE.read_text().replace("running: true", "running: yes", 1))
        assert [p.code for p in found if p.severity is Severity.ERROR] == ["wrong-type"]

    def test_json_numbers_that_json_has_not(self) -> None:
        assert "unknown-key" in self.codes('{"a": NaN}', "x.json")

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        file = tmp_path / "state.yaml"
        file.write_bytes(b"\xef\xbb\xbf" + YAML_FILE.read_bytes())
        assert statefile.load(file).state == statefile.load(YAML_FILE).state

    @pytest.mark.parametrize("text", ["a: \x00", "\x01", "a: \ud800", "\ufffe: 1"])
    def test_characters_no_text_file_holds(self, text: str) -> None:
        assert self.codes(text)[0] in ("syntax", "file-encoding")


class TestFile:
    def only(self, path: Path | str) -> Problem:
        with pytest.raises(InvalidInput) as caught:
            statefile.load(path)
        (problem,) = caught.value.problems
        return problem

    def test_missing(self, tmp_path: Path) -> None:
        assert self.only(tmp_path / "none.yaml").code == "file-missing"

    def test_missing_directory(self) -> None:
        assert self.only(YAML_FILE / "x.yaml").code == "file-missing"

    def test_directory(self, tmp_path: Path) -> None:
        assert self.only(tmp_path).code == "file-kind"

    def test_fifo_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        assert self.only(tmp_path / "fifo").code == "file-kind"

    def test_nul_in_the_name(self) -> None:
        assert self.only("a\0b").code == "file-unreadable"

    def test_links_in_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "a")
        assert self.only(tmp_path / "a").code == "file-unreadable"

    def test_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "state.yaml"
        file.write_bytes(b"lxc: {}\n# gr\xfc\xdfe\n")
        problem = self.only(file)
        assert problem.code == "file-encoding" and "line 2" in problem.found

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "state.yaml").touch()
        assert self.only(tmp_path / "state.yaml").code == "file-empty"

    def test_too_large(self, tmp_path: Path) -> None:
        file = tmp_path / "state.yaml"
        with file.open("wb") as out:
            out.truncate(5 * 1024 * 1024 * 1024)  # sparse: it must not be read to be refused
        assert self.only(file).code == "too-large"

    def test_permission_denied(self, tmp_path: Path) -> None:
        file = tmp_path / "state.yaml"
        file.write_text("lxc: {}\n")
        file.chmod(0)
        if os.geteuid() != 0:
            assert self.only(file).code == "file-permission"
            return
        # Root may read anything, so a child gives that up.
        child = os.fork()
        if child == 0:
            for directory in (tmp_path, *tmp_path.parents[:2]):
                directory.chmod(0o755)
            os.setgid(65534)
            os.setuid(65534)
            try:
                statefile.load(file)
            except InvalidInput as exc:
                os._exit(0 if exc.problems[0].code == "file-permission" else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_file_that_is_never_as_long_as_it_was(self) -> None:
        # The kernel says 0 bytes of these and then has some: what a growing file looks like, every time.
        assert self.only("/proc/self/status").code == "file-changing"

    def test_file_that_stops_changing_is_read(self, tmp_path: Path) -> None:
        file = tmp_path / "state.yaml"
        file.write_text(YAML_FILE.read_text() + "#" * 3_000_000)
        code = "import sys, time\nfile = open(sys.argv[1], 'ab', 0)\n"
        code += "for _ in range(300): file.write(b'#'), time.sleep(1e-4)\n"
        with subprocess.Popen([sys.executable, "-c", code, str(file)]):
            assert statefile.load(file).state == statefile.load(YAML_FILE).state

    def test_file_that_was_replaced_in_one_move_is_one_or_the_other(self, tmp_path: Path) -> None:
        file, new = tmp_path / "state.yaml", tmp_path / "new"
        tree = example()
        texts = {json.dumps(tree)}
        put("lxc.containers.4.properties.name", "watch")(tree)
        texts.add(json.dumps(tree))
        digests = {statefile.loads(text, "t").state.digest for text in texts}
        file.write_text(next(iter(texts)))
        for _ in range(20):
            for text in texts:
                new.write_text(text)
                new.rename(file)
                assert statefile.load(file).state.digest in digests


class TestSize:
    def test_two_thousand_containers_load_in_a_second(self) -> None:
        tree = example()
        put("networks.privacy.subnet", "10.16.0.0/16")(tree)
        put("networks.privacy.gateway", "10.16.0.1")(tree)
        put("networks.privacy.ids", "1000-3099")(tree)
        put("wireguard.vpn_server.container", "1000")(tree)
        put("openflow.bridges", {"vmbr0": {"flows": ["priority=10,actions=normal"]}})(tree)
        tree["lxc"]["containers"] = [
            {
                "id": str(1000 + number),
                "veth": f"veth{1000 + number}",
                "bridge": "vmbr0",
                "running": True,
                "properties": {
                    "name": f"c{number}",
                    "ipv4_address": f"10.16.{1 + number // 200}.{1 + number % 200}/16",
                    "gateway": "10.16.0.1",
                    "network": "privacy",
                    "services": [{"name": "web", "protocol": "tcp", "port": 80}],
                },
            }
            for number in range(2000)
        ]
        text = yaml.safe_dump(tree)
        started = time.process_time()
        state = statefile.loads(text, "t").state
        assert len(state.network("privacy").members) == 2000
        assert time.process_time() - started < 2.0


class TestSchema:
    def test_published_schema_is_current(self) -> None:
        published = json.loads((ROOT / "docs" / "statefile.schema.json").read_text())
        assert published == statefile.json_schema()

    def test_it_names_every_section(self) -> None:
        schema = statefile.json_schema()
        assert set(schema["properties"]) >= {
            "networks",
            "bridges",
            "netmaker",
            "networking",
            "wireguard",
            "openflow",
            "lxc",
        }
        assert schema["additionalProperties"] is False


class TestApi:
    def host(self, *changes: Change) -> HostState:
        tree = example()
        both(*changes)(tree)
        return statefile.loads(json.dumps(tree), "test.json").host

    def test_the_one_container_that_offers_it_is_its(self) -> None:
        api = self.host().api
        assert (api.container_id, str(api.address), api.port, api.self_approval) == ("201", "10.1.0.201", 9573, False)

    def test_two_that_offer_it_are_nobody(self) -> None:
        assert self.host(put("lxc.containers.2.properties.services.0.name", "API")).api.container_id is None

    def test_null_is_none_and_another_may_be_named(self) -> None:
        assert self.host(put("api", {"container": None})).api == Api()
        api = self.host(put("api", {"container": 202, "port": 8443, "self_approval": True})).api
        assert api == Api("202", Ipv4.parse("10.1.0.202"), 8443, self_approval=True)

    def test_never_in_a_network_with_an_egress(self) -> None:
        assert errors_of(put("api", {"container": "102"})) == {"api.container": ["api-exposed"]}
        tree = example()
        del tree["lxc"]["containers"][3]["properties"]["services"]
        tree["lxc"]["containers"][1]["properties"]["services"] = [{"name": "api", "port": 9573}]
        assert statefile.loads(json.dumps(tree), "test.json").host.api.container_id is None

    def test_nobody_of_that_id(self) -> None:
        assert errors_of(put("api", {"container": "209"})) == {"api.container": ["api-container"]}
        # One that is misshapen may well be the one that is meant.
        broken = both(put("api", {"container": "201"}), put("lxc.containers.3.veth", 7))
        assert errors_of(broken) == {"lxc.containers[3].veth": ["wrong-type"]}

    def test_half_a_certificate(self) -> None:
        assert errors_of(put("api", {"certificate": "/etc/api.pem"})) == {"api.private_key": ["missing-key"]}
        api = self.host(put("api", {"certificate": "/etc/api.pem", "private_key": "/etc/api.key"})).api
        assert (str(api.certificate), str(api.private_key)) == ("/etc/api.pem", "/etc/api.key")

    def test_its_port_is_not_opened_to_the_world(self) -> None:
        firewall = self.host(
            put("api", {"port": 8443}), put("networking.firewall", {"allowedTCPPorts": [8443]})
        ).firewall
        assert firewall is not None and (firewall.tcp, firewall.local_tcp) == ((), (8443,))

    def test_checks(self) -> None:
        services = "lxc.containers.3.properties.services"
        host = self.host(put(f"{services}.0.check", "http:/healthz"), put(f"{services}.1.check", "tcp"))
        assert [(one.key, str(one.address), one.port, one.check) for one in host.checks] == [
            ("201/api", "10.1.0.201", 9573, "http:/healthz"),
            ("201/api-alt", "10.1.0.201", 9574, "tcp"),
        ]
        assert self.host(put(f"{services}.0.check", "tcp"), put("lxc.containers.3.running", False)).checks == ()
        path = "lxc.containers[3].properties.services[0].check"
        for check in ("udp", "http:", "http:/a b", "https:/x", 7, "http:/" + "a" * 300):
            assert errors_of(put(f"{services}.0.check", check))[path][0] in ("bad-check", "wrong-type")
        assert errors_of(both(put(f"{services}.0.check", "tcp"), put(f"{services}.0.protocol", "udp")))[path] == [
            "check-mismatch"
        ]
