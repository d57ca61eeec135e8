"""From a state file to a description of the network the lab has to build: switches, hosts, links and addresses.

The description is plain JSON, because Mininet runs on the system's Python, which has nothing of ours. The lab adds what
a state file only implies: a peer behind every mesh, the world behind every egress, and the host's own addresses.
`python -m lab.describe FILE` prints it. Imports `controller.model` and `controller.statefile`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from controller.model import Bridge, DesiredState, Ipv4, Mac, Member, Mesh, Network, Prefix
from controller.problems import InvalidInput
from controller.statefile import load

VERSION = 1

WORLD = ("198.51.100.10", "192.0.2.10", "203.0.113.10", "198.18.0.10")
"""Addresses the world may have in the lab: set aside for documentation and tests, and public as far as flows can tell."""
VPN_CLIENT = ("203.0.113.7", "198.51.100.7", "192.0.2.7", "198.18.0.7")
"""Where a VPN client comes from that reaches the host directly."""
MESH_CLIENT = ("203.0.113.50", "198.51.100.50", "192.0.2.50", "198.18.0.50")
"""Where a VPN client comes from that another node passes on through the mesh."""
PEER = 50
"""The peer behind a mesh gets this address of its prefix, or the next free one."""


@dataclass(frozen=True, slots=True)
class Local:
    """What the host itself has on a bridge's LOCAL port; `routes` are arguments of `ip route replace`."""

    addresses: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Switch:
    """A bridge, with a datapath-id that is always the same."""

    name: str
    dpid: str
    network: str
    local: Local


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace behind a port: a container, a peer across the mesh, or the world behind the egress.

    `address` is on its Ethernet interface, `loopback` are addresses on its loopback; `routes` are arguments of
    `ip route replace`. `aliases` are other names it answers to.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    network: str
    switch: str
    port: str
    mac: str
    address: str
    loopback: tuple[str, ...]
    routes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Patch:
    """A veth pair between two bridges."""

    switch1: str
    port1: str
    switch2: str
    port2: str


@dataclass(frozen=True, slots=True)
class Description:
    """Everything the lab builds. `loopback` are the host's own addresses that are on no bridge."""

    node: str
    switches: tuple[Switch, ...]
    hosts: tuple[Host, ...]
    patches: tuple[Patch, ...]
    loopback: tuple[str, ...]
    version: int = VERSION

    def as_json(self) -> str:
        """The description as the lab reads it."""
        return json.dumps(asdict(self), indent=1)


def describe(state: DesiredState, node: str) -> Description:
    """What the lab builds for `state`; `node` is what it is called."""
    outside = _Outside(state)
    names = _Names({bridge.name for bridge in state.bridges} | {node, "host"})
    hosts: list[Host] = []
    for network in state.networks:
        hosts += (_container(network, member, names) for member in network.members)
    for network in state.networks:
        if network.mesh is not None:
            hosts.append(_peer(network, network.mesh, names, outside))
    egresses = [network for network in state.networks if network.egress is not None]
    for network in egresses:
        hosts.append(_world(network, names.pick("inet" if len(egresses) == 1 else f"inet-{network.name}"), outside))
    return Description(
        node=node,
        switches=tuple(_switch(state, bridge, outside) for bridge in state.bridges),
        hosts=tuple(hosts),
        patches=tuple(_patches(state.networks)),
        loopback=(f"{outside.vpn_client}/32",) if any(network.vpn for network in state.networks) else (),
    )


class _Outside:
    """Addresses that belong to none of the declared networks, the same for the same state."""

    def __init__(self, state: DesiredState) -> None:
        self._inside = [prefix for network in state.networks for prefix in network.prefixes]
        self.world = tuple(filter(self._free, WORLD))[:2]
        self.vpn_client = next(filter(self._free, VPN_CLIENT), VPN_CLIENT[0])
        self.mesh_client = next(filter(self._free, MESH_CLIENT), MESH_CLIENT[0])

    def _free(self, text: str) -> bool:
        address = Ipv4.parse(text)
        return not any(address in prefix for prefix in self._inside)


class _Names:
    """Host names; a name that is taken already gets a suffix."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken

    def pick(self, name: str, suffix: str = "x") -> str:
        while name in self._taken:
            name = f"{name}-{suffix}"
        self._taken.add(name)
        return name


def _switch(state: DesiredState, bridge: Bridge, outside: _Outside) -> Switch:
    network = state.network(bridge.network)
    addresses: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    if network.bridge == bridge.name:
        if network.host is not None:
            addresses = (f"{network.host}/{network.subnet.length}",)
        elif network.vpn is not None:
            routes = (f"{network.subnet} src {outside.vpn_client}",)
    dpid = bridge.datapath_id if bridge.datapath_id is not None else Mac.derive("bridge", bridge.name)
    return Switch(bridge.name, f"{dpid:016x}", network.name, Local(addresses, routes))


def _container(network: Network, member: Member, names: _Names) -> Host:
    services = (service.name for service in member.services[:1])
    aliases = dict.fromkeys((member.name, member.id, member.port, str(member.address), *services))
    return Host(
        name=names.pick(member.name, member.id),
        aliases=tuple(aliases),
        kind="container",
        network=network.name,
        switch=network.bridge,
        port=member.port,
        mac=str(member.mac),
        address=f"{member.address}/{network.subnet.length}",
        loopback=tuple(f"{Ipv4(prefix.address + 1)}/{prefix.length}" for prefix in member.routed),
        routes=(_default(network),),
    )


def _peer(network: Network, mesh: Mesh, names: _Names, outside: _Outside) -> Host:
    prefix = mesh.prefixes[0] if mesh.prefixes else network.subnet
    address = _peer_address(network, prefix)
    return Host(
        name=names.pick(f"peer-{network.name}"),
        aliases=(f"peer-{mesh.leg_port.removeprefix('nm-')}", mesh.leg_port, str(address)),
        kind="peer",
        network=network.name,
        switch=mesh.bridge,
        port=mesh.leg_port,
        mac=str(mesh.mac),
        address=f"{address}/{network.subnet.length if address in network.subnet else prefix.length}",
        loopback=(f"{outside.mesh_client}/32",) if network.vpn is not None else (),
        routes=(_default(network),),
    )


def _peer_address(network: Network, prefix: Prefix) -> Ipv4:
    taken = {network.gateway, network.host, *(member.address for member in network.members)}
    size = 1 << (32 - prefix.length)
    if size < 4:
        return prefix.address
    for offset in (*range(PEER, size - 1), *range(1, min(PEER, size - 1))):
        address = Ipv4(prefix.address + offset)
        if address not in taken and not any(address in routed for m in network.members for routed in m.routed):
            return address
    return prefix.address


def _world(network: Network, name: str, outside: _Outside) -> Host:
    assert network.egress is not None
    source = f"dev eth0 src {outside.world[0]}" if outside.world else "dev eth0"
    routes = [f"{prefix} {source}" for prefix in network.prefixes if not _routed(network, prefix)]
    for member in network.members:
        routes += (f"{prefix} via {member.address}" for prefix in member.routed)
    return Host(
        name=name,
        aliases=tuple(dict.fromkeys((network.egress.port, *outside.world))),
        kind="world",
        network=network.name,
        switch=network.bridge,
        port=network.egress.port,
        mac=str(network.egress.mac),
        address=f"{network.gateway}/{network.subnet.length}",
        loopback=tuple(f"{address}/32" for address in outside.world),
        routes=tuple(routes),
    )


def _routed(network: Network, prefix: Prefix) -> bool:
    return any(prefix in member.routed for member in network.members)


def _default(network: Network) -> str:
    return f"default via {network.gateway} dev eth0 onlink"


def _patches(networks: Iterable[Network]) -> Iterator[Patch]:
    for network in networks:
        if network.mesh is not None:
            yield Patch(network.mesh.bridge, network.mesh.far_port, network.bridge, network.mesh.port)


def main() -> int:
    """Print the description of the state file named on the command line."""
    if len(sys.argv) != 2:
        print("usage: python -m lab.describe FILE", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    try:
        print(describe(load(path).state, path.name.split(".")[0]).as_json())
    except InvalidInput as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
