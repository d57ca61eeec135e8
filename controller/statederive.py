"""What a state file means: networks, members, meshes, egress and VPN, with whatever was left out derived.

`derive` never stops at the first problem: each check says what it found and the rest goes on, so that a file can be
mended in one go. Imports `model`, `problems`, `ofrules`, `stateschema` and `statetext`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from controller import ofrules
from controller.hostderive import derive_host, with_resolver
from controller.hostmodel import HostState
from controller.model import (
    Bridge,
    BridgeKind,
    DesiredState,
    Egress,
    Ipv4,
    Mac,
    Member,
    Mesh,
    Network,
    Prefix,
    Service,
    Vpn,
)
from controller.notes import Notes
from controller.problems import Problem
from controller.stateschema import (
    MAX_NETWORKS,
    Checked,
    ContainerSpec,
    MeshSpec,
    NetmakerNetwork,
    NetworkSpec,
    StateSpec,
    VethPair,
    VethPeer,
)
from controller.statetext import join

# Id ranges that two well-known networks have by convention; any other has the hundreds its containers are in.
CONVENTIONAL_IDS: Final = {"privacy": (100, 199), "management": (200, 299)}
# Networks smaller or larger than this leave no room for hosts, or none for other networks.
SUBNET_LENGTHS: Final = (8, 30)
LAST_OCTET: Final = 254


class Placed(NamedTuple):
    """A container, the path it stands at, and the network it is on."""

    path: str
    spec: ContainerSpec
    network: str


def derive(
    checked: Checked, stored: Sequence[tuple[str, ContainerSpec]] = ()
) -> tuple[DesiredState, HostState, list[Problem]]:
    """The state a well-shaped input means, what the host needs for it, and every problem. With errors among them neither
    is of any use.

    `stored` are containers that the file does not have, each with a name for the path of its problems; they come after
    those of the file, so that what clashes is said of them.
    """
    spec, notes = checked.spec, Notes()
    assert spec is not None
    paths = [f"lxc.containers[{position}]" for position in checked.positions]
    containers = [*zip(paths, spec.lxc.containers, strict=True), *stored]
    _unique_containers(notes, containers)
    _unique_services(notes, containers)
    _unique_datapath_ids(notes, spec)
    # Networks follow from everything but containers and flows; with a part of that missing, they would be wrong.
    if checked.damaged - {"lxc", "openflow", "api", "security"}:
        return DesiredState(), HostState(), notes.problems
    networks = _Derivation(spec, notes, containers, whole=not checked.damaged).networks()
    _unique_ports(notes, networks, containers)
    _unique_macs(notes, networks, containers)
    _disjoint_prefixes(notes, networks)
    _disjoint_ids(notes, networks)
    notes.problems += _tunnels(spec)
    bridges = _bridges(notes, spec, networks)
    # A port that is missing here for another reason would make good flows look bad.
    if not checked.damaged and not any(found.code in _SPOIL_FLOWS for found in notes.problems):
        flows = {name: of.flows for name, of in spec.openflow.bridges.items()}
        judged = ofrules.judge(networks, flows)
        notes.problems += judged.problems
        networks = [replace(network, rules=judged.rules.get(network.name, ())) for network in networks]
    host = derive_host(notes, spec, networks, containers, whole=not checked.damaged)
    return DesiredState(tuple(networks), tuple(bridges)), host, notes.problems


# Problems that leave a network or a port out of the state.
_SPOIL_FLOWS: Final = frozenset(
    ("underivable", "no-network", "unknown-network", "bridge-shared", "wrong-bridge", "mesh-unconnected", "two-meshes")
    + ("duplicate-port", "vpn-container", "too-many", "duplicate-id")
)


# What must be there once on the whole node, whatever network it is on.


def _once(
    notes: Notes, code: str, what: str, items: Sequence[tuple[str, Hashable]], show: Callable[[Hashable], str] = str
) -> None:
    """Report every value that stands at more than one path."""
    first: dict[Hashable, str] = {}
    for path, value in items:
        before = first.setdefault(value, path)
        if before != path:
            notes.error(code, path, f"{what} {show(value)}", f"a {what} of its own", f"{before} has it; change one.")


def _unique_containers(notes: Notes, containers: Sequence[tuple[str, ContainerSpec]]) -> None:
    _once(notes, "duplicate-id", "id", [(f"{path}.id", spec.id) for path, spec in containers])
    # DNS does not tell case apart.
    names = [(f"{path}.properties.name", spec.properties.name.lower()) for path, spec in containers]
    _once(notes, "duplicate-name", "name", names)
    addresses = [(f"{path}.properties.ipv4_address", spec.properties.ipv4_address[0]) for path, spec in containers]
    _once(notes, "duplicate-address", "address", addresses)


def _unique_services(notes: Notes, containers: Sequence[tuple[str, ContainerSpec]]) -> None:
    for path, spec in containers:
        where = [f"{path}.properties.services[{index}]" for index in range(len(spec.properties.services))]
        services = list(zip(where, spec.properties.services, strict=True))
        names = [(f"{at}.name", service.name.lower()) for at, service in services]
        _once(notes, "duplicate-service", "service name", names)
        ports = [(f"{at}.port", f"{service.protocol} {service.port}") for at, service in services]
        _once(notes, "service-clash", "port", ports)


def _unique_datapath_ids(notes: Notes, spec: StateSpec) -> None:
    items = [
        (f"{join(('bridges', name))}.datapath_id", f"{bridge.datapath_id:016x}")
        for name, bridge in spec.bridges.items()
        if bridge.datapath_id is not None
    ]
    _once(notes, "duplicate-datapath-id", "datapath id", items)


def _unique_ports(notes: Notes, networks: Sequence[Network], containers: Sequence[tuple[str, ContainerSpec]]) -> None:
    """Ports and bridges are interfaces of one host: no two may share a name."""
    bridges: dict[str, str] = {}
    ports: list[tuple[str, str]] = []
    for network in networks:
        at = f"networks.{network.name}"
        # A bridge of two networks has a problem of its own.
        bridges.setdefault(network.bridge, f"{at}.bridge")
        if network.egress is not None:
            ports.append((f"{at}.egress.port", network.egress.port))
        if network.mesh is not None:
            mesh = network.mesh
            bridges.setdefault(mesh.bridge, f"{at}.mesh.bridge")
            ports += ((f"{at}.mesh.port", mesh.port), (f"{at}.mesh.far_port", mesh.far_port))
            ports.append((f"{at}.mesh.leg_port", mesh.leg_port))
        ports += ((f"{at}.dns", one.port) for one in network.members if one.id == f"dns-{network.name}")
    ports += [(f"{path}.veth", container.port) for path, container in containers]
    _once(notes, "duplicate-port", "port name", [*((path, name) for name, path in bridges.items()), *ports])


def _unique_macs(notes: Notes, networks: Sequence[Network], containers: Sequence[tuple[str, ContainerSpec]]) -> None:
    """Every MAC is one station's. The egress may share the gateway's: it stands behind it."""
    items: list[tuple[str, Mac]] = []
    for network in networks:
        at = f"networks.{network.name}"
        items.append((f"{at}.gateway_mac", network.gateway_mac))
        if network.egress is not None and network.egress.mac != network.gateway_mac:
            items.append((f"{at}.egress.mac", network.egress.mac))
        if network.mesh is not None:
            items.append((f"{at}.mesh.mac", network.mesh.mac))
    # Derived ones come first and once each, so that a clash is told where somebody wrote the address.
    written = {spec.id for _, spec in containers if spec.properties.mac is not None}
    derived = {one.id: one.mac for network in networks for one in network.members if one.id not in written}
    items += ((f"the derived MAC of container {name}", mac) for name, mac in derived.items())
    for path, spec in containers:
        if spec.properties.mac is not None:
            items.append((f"{path}.properties.mac", spec.properties.mac))
    _once(notes, "duplicate-mac", "MAC address", items)


class _Claim(NamedTuple):
    """A prefix somebody claims."""

    prefix: Prefix
    network: str
    path: str


def _disjoint_prefixes(notes: Notes, networks: Sequence[Network]) -> None:
    """No address may belong to two networks; a VPN pool not to its own network's subnet either.

    Prefixes contain each other or are disjoint, so in order of address the ones around the current one are a stack.
    """
    claims = sorted(_claims(networks), key=lambda claim: (claim.prefix.address, claim.prefix.length))
    around: list[_Claim] = []
    for claim in claims:
        while around and claim.prefix.address not in around[-1].prefix:
            around.pop()
        for outer in around:
            pool = claim.path.endswith("ip_pool") or outer.path.endswith("ip_pool")
            if outer.network != claim.network or pool:
                notes.error(
                    "overlapping-prefixes",
                    claim.path,
                    f"{claim.prefix} of {claim.network}",
                    "prefixes that no two networks share",
                    f"{outer.path} has {outer.prefix} of {outer.network}; renumber one of them.",
                )
                break
        around.append(claim)


def _claims(networks: Sequence[Network]) -> Iterator[_Claim]:
    for network in networks:
        yield _Claim(network.subnet, network.name, f"networks.{network.name}.subnet")
        for index, prefix in enumerate(network.mesh.prefixes if network.mesh is not None else ()):
            if prefix != network.subnet:
                yield _Claim(prefix, network.name, f"networks.{network.name}.mesh.prefixes[{index}]")
        if network.vpn is not None:
            yield _Claim(network.vpn.pool, network.name, "wireguard.vpn_server.ip_pool")


def _disjoint_ids(notes: Notes, networks: Sequence[Network]) -> None:
    before: Network | None = None
    for network in sorted(networks, key=lambda network: network.ids):
        low, high = network.ids
        path = f"networks.{network.name}.ids"
        if before is not None and low <= before.ids[1]:
            fix = f"{before.name} has {before.ids[0]}-{before.ids[1]}; declare ranges that do not meet."
            notes.error("overlapping-ids", path, f"ids {low}-{high}", "a range of its own", fix)
        if before is None or high > before.ids[1]:
            before = network
        if high > LAST_OCTET:
            notes.warn(
                "ids-past-octet",
                path,
                f"ids up to {high}",
                f"ids that are not taken for the last byte of an address, which ends at {LAST_OCTET}",
                "Nothing to do: addresses are allocated separately, the first free one of the subnet.",
            )


def _tunnels(spec: StateSpec) -> Iterator[Problem]:
    """WireGuard interfaces that the file makes ports of a bridge."""
    commands: list[tuple[str, str, str]] = []
    for name, tunnel in (("warp_tunnel", spec.wireguard.warp_tunnel), ("vpn_server", spec.wireguard.vpn_server)):
        if tunnel is not None and tunnel.post_up is not None:
            commands.append((f"wireguard.{name}.post_up", tunnel.post_up, tunnel.interface))
    attached = [
        (f"netmaker.networks[{index}].bridge", network.interface, network.bridge)
        for index, network in enumerate(spec.netmaker.networks)
    ]
    return ofrules.tunnel_problems(commands, attached)


def _bridges(notes: Notes, spec: StateSpec, networks: Sequence[Network]) -> list[Bridge]:
    """The bridges that the networks need, with what the file pins about them."""
    found = [Bridge(network.bridge, BridgeKind.SOCKET, network.name) for network in networks]
    found += [Bridge(net.mesh.bridge, BridgeKind.MESH, net.name) for net in networks if net.mesh is not None]
    kinds = {bridge.name: bridge.kind for bridge in found}
    for name, pinned in spec.bridges.items():
        path = join(("bridges", name))
        if name not in kinds:
            fix = close_match(name, list(kinds), "Declare its network, or remove it.")
            notes.error("unknown-bridge", path, f"bridge '{name}'", "a bridge of a declared network", fix)
        elif pinned.kind not in (None, kinds[name].value):
            fix = f"It is the {kinds[name].value} bridge of a network; leave kind out."
            notes.error("wrong-kind", f"{path}.kind", str(pinned.kind), kinds[name].value, fix)
    ids = {name: pinned.datapath_id for name, pinned in spec.bridges.items()}
    return [replace(bridge, datapath_id=ids.get(bridge.name)) for bridge in found]


def close_match(word: str, known: Sequence[str], otherwise: str) -> str:
    """A fix for a misspelt name."""
    close = difflib.get_close_matches(word, known[:500], n=1)
    return f"Did you mean {close[0]}?" if close else otherwise


class _Derivation:
    """Builds the networks of one input."""

    def __init__(
        self, spec: StateSpec, notes: Notes, containers: Sequence[tuple[str, ContainerSpec]], *, whole: bool
    ) -> None:
        self.spec = spec
        self.notes = notes
        self.containers = containers
        # Whether no container was left out: only then does a missing one mean anything.
        self.whole = whole
        self.declared = dict(spec.networks)
        self.placed: dict[str, list[Placed]] = {}
        self.bridges: dict[str, str] = {}

    def networks(self) -> list[Network]:
        """Every network that can be made."""
        if not self.declared:
            self._declare_tagged()
        self._place()
        for name, spec in self.declared.items():
            self._bridge(name, spec)
        self._check_bridges()
        meshes = self._meshes()
        found = []
        for name, spec in self.declared.items():
            network = self._network(name, spec, meshes.get(name))
            if network is not None:
                found.append(with_resolver(self.notes, self._with_members(network), self.spec))
        self._links(found)
        self._check_post_up()
        return self._with_vpn(found)

    # Which networks there are, and who is on them.

    def _declare_tagged(self) -> None:
        """Without `networks`, the containers' tags say which there are."""
        tags = dict.fromkeys(spec.properties.network for _, spec in self.containers)
        names = [name for name in tags if name is not None]
        if len(names) > MAX_NETWORKS:
            fix = "Tag containers with the network they are on, not with names of their own."
            self.notes.error("too-many", "lxc.containers", f"{len(names)} networks", f"at most {MAX_NETWORKS}", fix)
        self.declared = {name: NetworkSpec() for name in names[:MAX_NETWORKS]}

    def _place(self) -> None:
        on_bridge = {spec.bridge: name for name, spec in self.declared.items() if spec.bridge is not None}
        for _, container in self.containers:
            tag = container.properties.network
            if tag in self.declared and container.bridge is not None and self.declared[tag].bridge is None:
                on_bridge.setdefault(container.bridge, tag)
        names = list(self.declared)
        for path, container in self.containers:
            tag = container.properties.network
            name = tag if tag is not None else on_bridge.get(container.bridge or "")
            if name is None:
                found = f"no tag, and bridge {container.bridge!r}" if container.bridge else "no tag and no bridge"
                fix = "Tag it with network, or declare a network on its bridge."
                self.notes.error("no-network", path, found, f"a container on one of {_few(names)}", fix)
            elif name not in self.declared:
                fix = close_match(name, names, "Declare it under networks, or mend the tag.")
                where = f"{path}.properties.network"
                self.notes.error("unknown-network", where, f"network '{name}'", f"one of {_few(names)}", fix)
            else:
                self.placed.setdefault(name, []).append(Placed(path, container, name))

    def _bridge(self, name: str, spec: NetworkSpec) -> None:
        members = self.placed.get(name, [])
        bridge = spec.bridge or next((at.spec.bridge for at in members if at.spec.bridge is not None), None)
        if bridge is None:
            self._underivable(name, "bridge", "no container says which bridge it is on")
            return
        self.bridges[name] = bridge
        for at in members:
            if at.spec.bridge not in (None, bridge):
                fix = f"{name} is on {bridge}; put the container there, or tag it with another network."
                self.notes.error("wrong-bridge", f"{at.path}.bridge", f"bridge '{at.spec.bridge}'", bridge, fix)

    def _check_bridges(self) -> None:
        owner: dict[str, str] = {}
        for name, bridge in self.bridges.items():
            other = owner.setdefault(bridge, name)
            if other != name:
                self._shared(f"networks.{name}.bridge", bridge, f"{other}'s socket bridge")

    def _shared(self, path: str, bridge: str, whose: str) -> None:
        fix = f"It is {whose}; give each network bridges of its own."
        self.notes.error("bridge-shared", path, f"bridge '{bridge}'", "a bridge of one network", fix)

    def _underivable(self, name: str, key: str, why: str) -> None:
        found = f"nothing, and {why}"
        self.notes.error("underivable", f"networks.{name}.{key}", found, f"the network's {key}", "Write it.")

    # Meshes: the veth pair from the mesh bridge that a Netmaker network is on to a socket bridge says whose mesh it is.

    def _meshes(self) -> dict[str, MeshSpec | None]:
        found: dict[str, MeshSpec | None] = {}
        owner = {bridge: name for name, bridge in self.bridges.items()}
        for name, spec in self.declared.items():
            if "mesh" in spec.model_fields_set:
                found[name] = spec.mesh
        legs = {mesh.leg_port: mesh for mesh in found.values() if mesh is not None}
        for index, joined in enumerate(self.spec.netmaker.networks):
            path = f"netmaker.networks[{index}]"
            if joined.interface in legs:
                if legs[joined.interface].bridge != joined.bridge:
                    expected = f"{legs[joined.interface].bridge}, as in networks"
                    fix = "Name the same mesh bridge in both places."
                    self.notes.error("mesh-unconnected", f"{path}.bridge", joined.bridge, expected, fix)
                continue
            self._mesh(path, joined, owner, found)
        self._check_mesh_bridges(found, owner)
        return found

    def _mesh(
        self, path: str, joined: NetmakerNetwork, owner: dict[str, str], found: dict[str, MeshSpec | None]
    ) -> None:
        ends = [
            (near, far)
            for pair in self.spec.networking.veth_pairs.values()
            for far, near in ((pair.peer1, pair.peer2), (pair.peer2, pair.peer1))
            if far.bridge == joined.bridge and near.bridge != joined.bridge
        ]
        name = owner.get(ends[0][0].bridge) if len(ends) == 1 else None
        if name is None:
            fix = "Declare one pair under networking.veth_pairs from there to the network's socket bridge."
            what = f"{len(ends)} veth pairs" if len(ends) != 1 else f"a veth pair to '{ends[0][0].bridge}'"
            expected = f"one veth pair from mesh bridge {joined.bridge} to a network's bridge"
            self.notes.error("mesh-unconnected", f"{path}.bridge", what, expected, fix)
        elif found.get(name) is not None or "mesh" in self.declared[name].model_fields_set:
            fix = f"{name} has another mesh, or is declared to have none; a network has at most one."
            self.notes.error("two-meshes", path, f"mesh '{joined.name}' of {name}", "one mesh for a network", fix)
        else:
            near, far = ends[0]
            found[name] = MeshSpec(bridge=joined.bridge, port=near.name, far_port=far.name, leg_port=joined.interface)

    def _check_mesh_bridges(self, meshes: dict[str, MeshSpec | None], owner: dict[str, str]) -> None:
        taken = {bridge: f"{name}'s socket bridge" for bridge, name in owner.items()}
        for name, mesh in meshes.items():
            if mesh is None:
                continue
            whose = taken.setdefault(mesh.bridge, f"{name}'s mesh bridge")
            if whose != f"{name}'s mesh bridge":
                self._shared(f"networks.{name}.mesh.bridge", mesh.bridge, whose)

    def _links(self, networks: Sequence[Network]) -> None:
        """Every veth pair must be a mesh's: between two bridges of different networks it would join them."""
        ends = {
            frozenset(((net.mesh.bridge, net.mesh.far_port), (net.bridge, net.mesh.port)))
            for net in networks
            if net.mesh is not None
        }
        bridges = {net.bridge: net.name for net in networks}
        bridges |= {net.mesh.bridge: net.name for net in networks if net.mesh is not None}
        if len(networks) < len(self.declared):
            return
        for key, pair in self.spec.networking.veth_pairs.items():
            if frozenset(((pair.peer1.bridge, pair.peer1.name), (pair.peer2.bridge, pair.peer2.name))) in ends:
                continue
            self._stray(join(("networking", "veth_pairs", key)), pair, bridges)

    def _stray(self, path: str, pair: VethPair, bridges: dict[str, str]) -> None:
        def end(peer: VethPeer) -> str:
            return f"{peer.name} on {peer.bridge}"

        found = f"a veth pair of {end(pair.peer1)} and {end(pair.peer2)}"
        sides = {bridges.get(pair.peer1.bridge), bridges.get(pair.peer2.bridge)}
        if len(sides - {None}) == 2:
            fix = "It would carry packets past every check between the two networks; remove it, and ask for a grant."
            self.notes.error("cross-connect", path, found, "veth pairs within one network", fix)
        elif sides == {None}:
            fix = "Neither bridge is a network's, so it is not built; remove it."
            self.notes.warn("unused-veth-pair", path, found, "a pair from a mesh bridge to its socket bridge", fix)
        else:
            fix = "A pair joins a network's mesh bridge and its socket bridge, under the names in networks; mend it."
            self.notes.error("stray-veth-pair", path, found, "a pair that some network's mesh declares", fix)

    # One network.

    def _network(self, name: str, spec: NetworkSpec, mesh: MeshSpec | None) -> Network | None:
        members = self.placed.get(name, [])
        bridge = self.bridges.get(name)
        subnet = spec.subnet or next((at.spec.properties.ipv4_address[1] for at in members), None)
        if subnet is None and bridge is not None:
            self._underivable(name, "subnet", "it has no container to take it from")
        ids = spec.ids or self._ids(name, members)
        if ids is None and subnet is not None and bridge is not None:
            self._underivable(name, "ids", "it has no container to take it from")
        if bridge is None or subnet is None or ids is None:
            return None
        if not self._check_subnet(name, subnet):
            return None
        gateway = spec.gateway or next(
            (at.spec.properties.gateway for at in members if at.spec.properties.gateway is not None),
            Ipv4(subnet.address + 1),
        )
        gateway_mac = spec.gateway_mac or Mac.derive(name, "gateway")
        network = Network(
            name=name,
            bridge=bridge,
            subnet=subnet,
            gateway=gateway,
            gateway_mac=gateway_mac,
            ids=ids,
            egress=self._egress(name, spec, bridge, gateway_mac),
            mesh=_mesh_of(name, mesh, subnet),
            host=spec.host,
            refuse=spec.refuse,
        )
        self._check_host(network, "gateway", network.gateway)
        if network.host is not None:
            self._check_host(network, "host", network.host)
        return network

    @staticmethod
    def _ids(name: str, members: Sequence[Placed]) -> tuple[int, int] | None:
        if name in CONVENTIONAL_IDS:
            return CONVENTIONAL_IDS[name]
        ids = [int(at.spec.id) for at in members]
        return (max(min(ids) // 100 * 100, 1), max(ids) // 100 * 100 + 99) if ids else None

    def _check_subnet(self, name: str, subnet: Prefix) -> bool:
        low, high = SUBNET_LENGTHS
        if low <= subnet.length <= high:
            return True
        fix = "Choose another prefix length."
        self.notes.error("bad-prefix", f"networks.{name}.subnet", str(subnet), f"a subnet from /{low} to /{high}", fix)
        return False

    def _check_host(self, network: Network, key: str, address: Ipv4) -> None:
        path = f"networks.{network.name}.{key}"
        if address not in network.subnet:
            fix = "Choose an address of the subnet."
            self.notes.error(f"{key}-outside", path, str(address), f"an address in {network.subnet}", fix)
        elif address in _ends(network.subnet):
            fix = "The first and the last address of a subnet are nobody's; choose another."
            self.notes.error("reserved-address", path, str(address), f"a host address in {network.subnet}", fix)

    def _egress(self, name: str, spec: NetworkSpec, bridge: str, gateway_mac: Mac) -> Egress | None:
        """The egress as declared, or the port that the tunnel's own command adds to this network's bridge."""
        warp = self.spec.wireguard.warp_tunnel
        added = ofrules.added_ports(warp.post_up or "", warp.interface) if warp is not None else []
        ports = [port for on, port in added if on == bridge]
        if "egress" in spec.model_fields_set:
            declared = spec.egress.port if spec.egress is not None else None
            if warp is not None and warp.enabled and any(port != declared for port in ports):
                fix = f"networks.{name}.egress says {declared or 'there is none'}; say the same in both places."
                where = "wireguard.warp_tunnel.post_up"
                self.notes.error("egress-mismatch", where, f"{ports[0]} added to {bridge}", str(declared), fix)
            return Egress(spec.egress.port, spec.egress.mac or gateway_mac) if spec.egress is not None else None
        if warp is None or not warp.enabled:
            return None
        if not added and name == "privacy":
            ports = [warp.interface]
        return Egress(ports[0], gateway_mac) if ports else None

    def _check_post_up(self) -> None:
        """What the tunnel's command adds must be added to a bridge we know, or the tunnel ends nowhere."""
        warp = self.spec.wireguard.warp_tunnel
        if warp is None or not warp.enabled:
            return
        bridges = list(self.bridges.values())
        for bridge, _ in ofrules.added_ports(warp.post_up or "", warp.interface):
            if bridge not in bridges:
                fix = close_match(bridge, bridges, "Name the bridge of a network.")
                path = "wireguard.warp_tunnel.post_up"
                self.notes.error("unknown-bridge", path, f"bridge '{bridge}'", f"one of {_few(bridges)}", fix)

    # Members.

    def _with_members(self, network: Network) -> Network:
        members = []
        for at in sorted(self.placed.get(network.name, []), key=lambda at: int(at.spec.id)):
            self._check_member(network, at)
            properties = at.spec.properties
            members.append(
                Member(
                    id=at.spec.id,
                    name=properties.name,
                    port=at.spec.port,
                    mac=properties.mac or Mac.derive(network.name, "container", at.spec.id),
                    address=properties.ipv4_address[0],
                    services=tuple(Service(s.name, s.protocol, s.port, s.exposed) for s in properties.services),
                )
            )
        return replace(network, members=tuple(members))

    def _check_member(self, network: Network, at: Placed) -> None:
        path, properties = f"{at.path}.properties", at.spec.properties
        address, prefix = properties.ipv4_address
        low, high = network.ids
        if not low <= int(at.spec.id) <= high:
            fix = f"Choose a free id of that range, or widen networks.{network.name}.ids."
            self.notes.error("id-outside", f"{at.path}.id", f"id {at.spec.id}", f"{low}-{high} of {network.name}", fix)
        where, found = f"{path}.ipv4_address", f"{address}/{prefix.length}"
        if address not in network.subnet:
            fix = "Give it an address of its network's subnet."
            self.notes.error("address-outside", where, found, f"an address in {network.subnet}", fix)
        elif prefix.length != network.subnet.length:
            fix = "The container would look for its neighbours in the wrong place; use the subnet's length."
            self.notes.error("wrong-prefix", where, found, f"prefix length {network.subnet.length}", fix)
        elif address in _ends(network.subnet):
            fix = "The first and the last address of a subnet are nobody's; choose another."
            self.notes.error("reserved-address", where, found, f"a host address in {network.subnet}", fix)
        elif address in (network.gateway, network.host):
            whose = "gateway" if address == network.gateway else "host"
            fix = f"It is the {whose}'s of {network.name}; choose another."
            self.notes.error("reserved-address", where, found, "an address of its own", fix)
        if properties.gateway not in (None, network.gateway):
            fix = f"The gateway of {network.name} is {network.gateway}; leave it out or write that."
            expected = str(network.gateway)
            self.notes.error("wrong-gateway", f"{path}.gateway", str(properties.gateway), expected, fix)

    # The VPN server's container.

    def _with_vpn(self, networks: list[Network]) -> list[Network]:
        server = self.spec.wireguard.vpn_server
        if server is None:
            return networks
        found = self._vpn_member(networks)
        if found is None:
            if self.whole and len(networks) == len(self.declared):
                wanted = f"container '{server.container}'" if server.container else "no container named"
                fix = "Name the id of the container it runs in under wireguard.vpn_server.container."
                self.notes.error("vpn-container", "wireguard.vpn_server", wanted, "a declared container", fix)
            return networks
        network, member = found
        for at in self.placed[network.name]:
            for index, service in enumerate(at.spec.properties.services):
                if at.spec.id == member.id and (service.protocol, service.port) == ("udp", server.listen_port):
                    path = f"{at.path}.properties.services[{index}].port"
                    fix = "Remove the service; the VPN server is one by itself."
                    self.notes.error("service-clash", path, f"udp {service.port}", "a port the VPN has not", fix)
        members = tuple(
            replace(one, routed=(server.ip_pool,)) if one.id == member.id else one for one in network.members
        )
        vpn = Vpn(member.id, server.listen_port, server.ip_pool)
        return [replace(one, members=members, vpn=vpn) if one is network else one for one in networks]

    def _vpn_member(self, networks: Sequence[Network]) -> tuple[Network, Member] | None:
        """By its id, else where a literal flow delivers the VPN's port, else by the name `gateway`."""
        server = self.spec.wireguard.vpn_server
        assert server is not None
        everyone = [(network, member) for network in networks for member in network.members]
        if server.container is not None:
            return next((pair for pair in everyone if pair[1].id == server.container), None)
        receivers = {
            network.name: ofrules.receiver(self.spec.openflow.bridges[network.bridge].flows, "udp", server.listen_port)
            for network in networks
            if network.bridge in self.spec.openflow.bridges
        }
        for network, member in everyone:
            if receivers.get(network.name) == member.port:
                return network, member
        return next((pair for pair in everyone if pair[1].name == "gateway"), None)


def _mesh_of(name: str, spec: MeshSpec | None, subnet: Prefix) -> Mesh | None:
    if spec is None:
        return None
    return Mesh(
        bridge=spec.bridge,
        port=spec.port,
        far_port=spec.far_port,
        leg_port=spec.leg_port,
        mac=spec.mac or Mac.derive(name, "mesh"),
        prefixes=tuple(dict.fromkeys(spec.prefixes)) if spec.prefixes is not None else (subnet,),
    )


def _ends(subnet: Prefix) -> tuple[int, int]:
    """The network's and the broadcast address."""
    return subnet.address, subnet.address | (~subnet.mask & 0xFFFFFFFF)


def _few(names: Sequence[str]) -> str:
    return (", ".join(names[:10]) + (" and others" if len(names) > 10 else "")) or "(none)"
