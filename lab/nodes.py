"""The lab of whole nodes, described: state files of two nodes, keys, and the world around them. Builds nothing.

The first node is the given state file's, with what a lab has to add: peers, keys, resolvers, a tunnel to the lab's WARP.
The second node is small, and in the same two meshes. Around them are a WARP endpoint with an exit address of its own, an
internet host, a droplet with a SOCKS5 proxy, an administrator and a laptop. Addresses are of the ranges that RFC 5737
and RFC 3849 set aside for documentation. Imports the agent's keys, and readers of state files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from controller.model import DesiredState
from controller.statefile import load, loads
from controller.wgkeys import new_private_key, public_key

WARP_PORT, PRIVACY_PORT, MGMT_PORT, VPN_PORT = 2408, 51821, 51822, 51820
INET, EXIT = "198.51.100.10", "203.0.113.100"
DROPLET_PRIVACY, DROPLET_MGMT = "10.0.0.50", "10.1.0.50"
OUTSIDERS = ("warp", "droplet", "laptop", "admin", "inet")
_SECOND = ("oo1425oo", "oo1426oo")


@dataclass(frozen=True, slots=True)
class Uplink:
    """A host's way to the internet: its address and the router's, each of a /30, and the same in IPv6."""

    address: str
    router: str
    ipv6: str
    router_ipv6: str


def _uplink(prefix: str, last: int, number: int) -> Uplink:
    net = f"2001:db8:{number}"
    return Uplink(f"{prefix}.{last + 1}/30", f"{prefix}.{last}/30", f"{net}::2/64", f"{net}::1/64")


UPLINKS = {
    "warp": _uplink("192.0.2", 13, 4),
    "droplet": _uplink("192.0.2", 9, 3),
    "laptop": _uplink("203.0.113", 1, 5),
    "admin": _uplink("203.0.113", 5, 6),
    "inet": Uplink(f"{INET}/24", "198.51.100.1/24", "2001:db8:7::2/64", "2001:db8:7::1/64"),
}
NODE_UPLINKS = (_uplink("192.0.2", 1, 1), _uplink("192.0.2", 5, 2))


@dataclass(frozen=True, slots=True)
class Node:
    """A whole node. `state` is its state file, `keys` are its private keys by the name of their file; `has_api_container`
    says whether its API listens in a container as well."""

    name: str
    uplink: Uplink
    state: dict[str, Any]
    keys: dict[str, str] = field(repr=False)
    containers: tuple[dict[str, Any], ...] = ()
    has_api_container: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """Everything the lab builds. `tunnels` are WireGuard interfaces of hosts that are no nodes: configurations for
    `wg setconf`, by host and interface."""

    nodes: tuple[Node, ...]
    tunnels: dict[str, dict[str, str]] = field(repr=False)

    def as_plain(self) -> dict[str, Any]:
        """The world as JSON values; with private keys in it."""
        return asdict(self)


def node_name(state_file: Path) -> str:
    """What the node of a state file is called in the lab: as the file, in letters that go anywhere."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", state_file.name.split(".")[0]).strip("-")[:32]
    return f"node-{name}".rstrip("-") if name in ("", "host", "router", *OUTSIDERS) else name


def plan(state_file: Path, keys_dir: Path) -> World:
    """What to build for a state file. `keys_dir` is where nodes' keys will be, by node. Raises `InvalidInput`."""
    loaded = load(state_file)
    name = node_name(state_file)
    tree: dict[str, Any] = yaml.safe_load(state_file.read_text())
    tree = tree.get("stateConfig", tree)
    nodes = [_Draft(name, tree, loaded.state, keys_dir, 0), _second(keys_dir, name)]
    droplet = {mesh: new_private_key() for mesh in ("privacy", "mgmt")}
    warp = new_private_key()
    for node in nodes:
        node.overlay(public_key(warp))
        for mesh, address in (("privacy", DROPLET_PRIVACY), ("mgmt", DROPLET_MGMT)):
            node.peer(mesh, public_key(droplet[mesh]), [f"{address}/32"], None)
    first, second = nodes
    for one, other in ((first, second), (second, first)):
        for mesh in ("privacy", "mgmt"):
            one.peer(mesh, other.public(mesh), other.own_addresses(mesh), f"{other.address}:{other.port(mesh)}")
    return World(tuple(node.finish() for node in nodes), _tunnels(nodes, droplet, warp.reveal()))


def _tunnels(nodes: list[_Draft], droplet: dict[str, Any], warp: str) -> dict[str, dict[str, str]]:
    # The endpoint is somebody else's, and may send whatever it likes into a tunnel: here it can, into the first one.
    clients = [
        (node.public("warp0"), f"172.16.0.{2 + index}/32" + ("" if index else ", 10.0.0.0/24"), None)
        for index, node in enumerate(nodes)
    ]
    out = {"warp": {"wg0": _config(warp, WARP_PORT, clients)}, "droplet": {}}
    for mesh, port in (("privacy", PRIVACY_PORT), ("mgmt", MGMT_PORT)):
        peers = []
        for node in nodes:
            # What the SOCKS5 proxy sends to the world goes to the first node, which has the tunnel for it.
            allowed = ["0.0.0.0/0"] if mesh == "privacy" and node is nodes[0] else node.own_addresses(mesh)
            peers.append((node.public(mesh), ", ".join(allowed), f"{node.address}:{node.port(mesh)}"))
        out["droplet"][f"nm-{mesh}"] = _config(droplet[mesh].reveal(), port, peers)
    return out


def _config(private_key: str, port: int, peers: Sequence[tuple[str, str, str | None]]) -> str:
    lines = ["[Interface]", f"PrivateKey = {private_key}", f"ListenPort = {port}"]
    for key, allowed, endpoint in peers:
        lines += ["[Peer]", f"PublicKey = {key}", "PersistentKeepalive = 25"]
        lines += [f"AllowedIPs = {allowed}"] if allowed else []
        lines += [f"Endpoint = {endpoint}"] if endpoint is not None else []
    return "\n".join(lines) + "\n"


class _Draft:
    """A node's state file while it is being written."""

    def __init__(self, name: str, tree: dict[str, Any], state: DesiredState, keys_dir: Path, index: int) -> None:
        self.name, self.tree, self.state = name, tree, state
        self._keys_dir = keys_dir / name
        self._index = index
        self._secret = {key: new_private_key() for key in ("warp0", "privacy", "mgmt", "vpn")}
        self._peers: dict[str, list[dict[str, Any]]] = {"privacy": [], "mgmt": []}

    @property
    def address(self) -> str:
        return NODE_UPLINKS[self._index].address.partition("/")[0]

    def port(self, mesh: str) -> int:
        return PRIVACY_PORT if mesh == "privacy" else MGMT_PORT

    def public(self, key: str) -> str:
        return public_key(self._secret[key])

    def own_addresses(self, mesh: str) -> list[str]:
        """Addresses of this node's members of a mesh's network; what other nodes send to it."""
        names = [net.name for net in self.state.networks if net.mesh is not None and net.mesh.leg_port == f"nm-{mesh}"]
        networks = [net for net in self.state.networks if net.name in names]
        return [f"{member.address}/32" for net in networks for member in net.members]

    def peer(self, mesh: str, key: str, allowed: list[str], endpoint: str | None) -> None:
        peer: dict[str, Any] = {"public_key": key, "allowed_ips": allowed, "persistent_keepalive": 25}
        self._peers[mesh].append(peer | ({"endpoint": endpoint} if endpoint is not None else {}))

    def overlay(self, warp_key: str) -> None:
        wireguard = self.tree.setdefault("wireguard", {})
        warp = wireguard.get("warp_tunnel")
        ways_out = [network.egress.port for network in self.state.networks if network.egress is not None]
        if warp is None and ways_out:
            warp = wireguard["warp_tunnel"] = {"interface": ways_out[0]}
        if warp is not None:
            warp.pop("config", None)  # of a node that is not in a lab
            endpoint = f"{UPLINKS['warp'].address.partition('/')[0]}:{WARP_PORT}"
            peer = {
                "public_key": warp_key,
                "endpoint": endpoint,
                "allowed_ips": ["0.0.0.0/0"],
                "persistent_keepalive": 25,
            }
            warp |= {
                "private_key_file": str(self._keys_dir / "warp0"),
                "addresses": [f"172.16.0.{2 + self._index}/32"],
                "peers": [peer],
                "probe": {"address": INET},
            }
        if (server := wireguard.get("vpn_server")) is not None:
            server |= {"private_key_file": str(self._keys_dir / "vpn"), "endpoint": f"{self.address}:{VPN_PORT}"}
        for joined in self.tree.get("netmaker", {}).get("networks", ()):
            mesh = joined["interface"].removeprefix("nm-")
            if mesh in self._peers:
                for elsewhere in ("config", "server", "token_file"):
                    joined.pop(elsewhere, None)
                joined |= {
                    "private_key_file": str(self._keys_dir / mesh),
                    "listen_port": self.port(mesh),
                    "peers": self._peers[mesh],
                }
        for network in self.state.networks:
            spec = self.tree.setdefault("networks", {}).setdefault(network.name, {})
            spec.setdefault("dns", {"upstream": [INET]} if network.egress is not None else {})
        self.tree["host"] = {"datapath": "netdev", "uplinks": ["eth0"]}
        firewall = {
            "allowedUDPPorts": [VPN_PORT, PRIVACY_PORT, MGMT_PORT],
            "allowedTCPPorts": [22, 8006, 9573, 9574],
            "trustedInterfaces": [net.bridge for net in self.state.networks if net.host is not None],
        }
        self.tree.setdefault("networking", {}).setdefault("firewall", firewall)

    def finish(self) -> Node:
        loaded = loads(yaml.safe_dump(self.tree, sort_keys=False), self.name)
        containers = tuple(
            {
                "id": member.id,
                "name": member.name,
                "network": network.name,
                "port": member.port,
                "address": str(member.address),
                "services": [service.name for service in member.services],
            }
            for network in loaded.state.networks
            for member in network.members
        )
        has_api = loaded.host.api.container_id is not None
        keys = {name: secret.reveal() for name, secret in self._secret.items()}
        return Node(self.name, NODE_UPLINKS[self._index], self.tree, keys, containers, has_api)


def _second(keys_dir: Path, first: str) -> _Draft:
    """A node with one container in each network, and a tunnel of its own."""
    name = next(name for name in _SECOND if name != first)
    tree: dict[str, Any] = {
        "networks": {
            "privacy": {
                "bridge": "vmbr0", "subnet": "10.0.0.0/24", "gateway": "10.0.0.1", "ids": "100-199", "refuse": True,
                "egress": {"port": "warp0"}, "dns": {"address": "10.0.0.54", "upstream": [INET]},
                "mesh": {"bridge": "mesh-privacy", "port": "from-privacy", "far_port": "to-privacy", "leg_port": "nm-privacy"},
            },
            "management": {
                "bridge": "vmbr1", "subnet": "10.1.0.0/24", "gateway": "10.1.0.1", "ids": "200-299", "refuse": True,
                "dns": {"address": "10.1.0.54"},
                "mesh": {"bridge": "mesh-mgmt", "port": "from-mgmt", "far_port": "to-mgmt", "leg_port": "nm-mgmt"},
            },
        },
        "netmaker": {
            "networks": [
                {"name": "privacy-mesh", "interface": "nm-privacy", "bridge": "mesh-privacy"},
                {"name": "management-mesh", "interface": "nm-mgmt", "bridge": "mesh-mgmt"},
            ]
        },
        "wireguard": {"warp_tunnel": {"interface": "warp0"}},
        "lxc": {
            "containers": [
                {"id": "110", "properties": {"name": "relay", "ipv4_address": "10.0.0.110/24", "network": "privacy"}},
                {"id": "210", "properties": {"name": "exporter", "ipv4_address": "10.1.0.210/24", "network": "management"}},
            ]
        },
    }  # fmt: skip
    return _Draft(name, tree, loads(yaml.safe_dump(tree, sort_keys=False), name).state, keys_dir, 1)
