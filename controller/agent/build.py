"""From a state file to the resources of this host, in the order in which they are made. Imports every resource."""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from controller import model
from controller.agent import sysctls
from controller.agent.etc import NETNS_ETC, TextFile, resolvers
from controller.agent.firewall import gateway_table, ingress_table, leg_table
from controller.agent.gate import Controller, Gate
from controller.agent.health import Watched
from controller.agent.hosttable import HostTable, default_uplinks
from controller.agent.keys import KeyStore
from controller.agent.links import End, Interface, Namespace, Veth, our_links
from controller.agent.lxc import Lxc, LxcContainer, first_id
from controller.agent.names import Names, dnsmasq_command
from controller.agent.netclient import Netclient, daemon_command
from controller.agent.netlink import Nets, Route
from controller.agent.nft import TABLE, NftTable
from controller.agent.ovs import Bridge, Ovsdb, Ports
from controller.agent.passages import Connections, Passages, Tracker
from controller.agent.process import Kept, Process, Program, Programs, confined
from controller.agent.resource import Change, Resource
from controller.agent.run import PREFIX
from controller.agent.settings import Settings
from controller.agent.sysctls import Sysctls
from controller.agent.vpn import Clients
from controller.agent.wireguard import WgConfig, WireGuard, resolve, show
from controller.grants import Opening, openings, passages, zones
from controller.hostmodel import WARP_MTU, Container, Datapath, Driver, HostState, Leg, VpnServer
from controller.model import DesiredState, Mac, Member, Network, Role
from controller.problems import BulkheadError
from controller.records import ClientRecord
from controller.vpnpool import PUBLIC_KEY
from controller.wgkeys import public_key

NEXT_HOP = "169.254.0.1"
"""What a leg sends everything to that is for its bridge: an address nobody has, with one permanent neighbour. The flows
know by address where a packet goes, whatever MAC it has."""


class Made:
    """Resources that were made before, by what they were made of: what is wanted as before is the same object again,
    and need not be looked at anew. Nothing is kept that was not asked for in the last round."""

    def __init__(self) -> None:
        self._old: dict[Hashable, tuple[Resource, ...]] = {}
        self._new: dict[Hashable, tuple[Resource, ...]] = {}
        self.granted = False
        """Whether anything was ever granted."""

    def once(self, of: Hashable, make: Callable[[], Sequence[Resource]]) -> tuple[Resource, ...]:
        """The resources that are made of that."""
        self._new[of] = self._old[of] if of in self._old else tuple(make())
        return self._new[of]

    def turn(self) -> None:
        """A round begins."""
        self._old, self._new = self._new, {}

    def forget(self) -> None:
        """Something has changed that resources are made of and do not show: files with keys."""
        self._old, self._new = {}, {}


@dataclass(frozen=True, slots=True)
class Built:
    """What is wanted of a host. `owned` says which resources, by their keys, a container is made of: `container/103`."""

    resources: list[Resource]
    owned: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What resources work with."""

    settings: Settings
    nets: Nets
    ovsdb: Ovsdb
    controller: Controller
    programs: Programs
    lxc: Lxc
    datapath: str
    made: Made = field(default_factory=lambda: Made(), compare=False)
    client_records: Callable[[], Sequence[ClientRecord]] = tuple

    @property
    def keys(self) -> KeyStore:
        """Keys that the agent makes."""
        return KeyStore(self.settings.state_dir / "keys")

    @property
    def clients(self) -> Clients:
        """The VPN server's clients."""
        return Clients(self.settings.state_dir / "vpn", self.client_records)


class Broken:
    """Something that cannot be made as the state file says; it says why, again and again, until that is mended.

    `keeps` are the keys of what stays as it is meanwhile, and `host_ends` the interfaces.
    """

    period = 1.0

    def __init__(
        self, key: str, check: Callable[[], object], keeps: tuple[str, ...] = (), host_ends: tuple[str, ...] = ()
    ) -> None:
        self.key = key
        self.needs: tuple[str, ...] = ()
        self.keeps, self.host_ends = keeps, host_ends
        self._check = check

    async def diff(self) -> list[Change]:
        self._check()
        return []


def build(state: DesiredState, host: HostState, parts: Parts) -> Built:
    """Every resource that the state asks for."""
    own_dir = parts.settings.own_dir
    once = parts.made.once
    parts.made.turn()
    out: list[Resource] = [HostTable(state, host, own_dir)]
    ports: dict[str, list[str]] = {bridge.name: [] for bridge in state.bridges}
    for bridge in state.bridges:
        out += once(("bridge", bridge), lambda bridge=bridge: [_bridge(bridge, parts)])  # type: ignore[misc]
    for one, other in host.veths:
        out.append(Veth(parts.nets, End(one.name), End(other.name), software_sums=_sums(parts)))
        ports[one.bridge].append(one.name)
        ports[other.bridge].append(other.name)
    mtus = {network.name: mtu_of(network, host, parts) for network in state.networks}
    for leg in host.legs:
        if leg.enabled:
            network, mtu = state.network(leg.network), mtus[leg.network]
            out += once(("leg", leg, _bare(network, state), mtu), partial(_leg, network, leg, mtu, parts))
            ports[leg.bridge].append(leg.port)
    wanted = [(network, member) for network in state.networks for member in network.members]
    containers = sorted(
        ((network, member, host.container(member.id)) for network, member in wanted),
        key=lambda each: (each[2].order, len(each[1].id), each[1].id),
    )
    opened = openings(state)
    to_peers = _peer_routes(state, opened, mtus)
    running = [
        _Run(state, host, *each, mtus[each[0].name], to_peers.get(each[1].id, ()))
        for each in containers
        if each[2].running
    ]
    owned: dict[str, tuple[str, ...]] = {f"container/{member.id}": () for _, member, _ in containers}
    rest: list[Resource] = []
    for run in running:
        links = once(("links", run), partial(_container_links, run.network, run.member, run.mtu, parts))
        inner = once(("container", run), partial(_container, run, parts))
        out += links
        rest += [*inner, *_resolver(state, host, run, parts)]
        owned[f"container/{run.member.id}"] = (*(one.key for one in (*links, *inner)), *run.common)
        ports[run.network.bridge].append(run.member.port)
    names = [name for of_bridge in ports.values() for name in of_bridge]
    if parts.datapath == Datapath.NETDEV:
        out.append(NftTable("netdev", lambda: ingress_table(name for name in names if _exists(name)), own_dir))
    # Asked for each time: the uplinks are those that a default route leads to, and it may come later, and move.
    out.append(Sysctls(lambda: _host_settings(state, host, names), state_dir=parts.settings.state_dir))
    out += (
        Ports(parts.ovsdb, name, tuple(of_bridge), partial(our_links, parts.nets)) for name, of_bridge in ports.items()
    )
    out += _grants(state, opened, parts)
    for network in state.networks:
        out += _host_side(network, parts)
    out += rest
    for network in state.networks:
        if host.vpn is not None and host.vpn.container_id in {
            run.member.id for run in running if run.network is network
        }:
            out += _vpn(network, host.vpn, parts)
    return Built(out, owned)


def _grants(state: DesiredState, opened: tuple[Opening, ...], parts: Parts) -> list[Resource]:
    """What grants need of this host as a whole, or have left behind."""
    kept_in, needed = zones(state), passages(state)
    before, parts.made.granted = parts.made.granted, parts.made.granted or bool(opened)

    def connections() -> list[Resource]:
        tracker = Tracker(parts.settings.ovsdb, parts.datapath)
        return [Connections(tracker, parts.controller, opened, kept_in, parts.ovsdb, before=before)]

    once = parts.made.once
    return [
        # What no grant needs is taken away first: it is shut then, though the controller hang that has to take the flows away.
        *once(("passages", needed, tuple(kept_in)), lambda: [Passages(parts.ovsdb, needed, tuple(kept_in))]),
        *once(("connections", opened, tuple(kept_in.items()), parts.datapath), connections),
    ]


def _peer_routes(
    state: DesiredState, opened: tuple[Opening, ...], mtus: Mapping[str, int]
) -> dict[str, tuple[Route, ...]]:
    """Routes to the other ends of grants that take less in one piece than a container's own interface, by its id.

    On the way nobody could say so: there is no router between the two, and what is too long is dropped in silence.
    """
    out: dict[str, dict[Route, None]] = {}
    for o in opened:
        near, far = state.network(o.source_network), state.network(o.target_network)
        fits = {m.id: 1500 if _forwards(n, m) else mtus[n.name] for n, m in ((near, o.source), (far, o.target))}
        for network, member, other in ((near, o.source, o.target), (far, o.target, o.source)):
            if fits[other.id] < fits[member.id]:
                route = Route(f"{other.address}/32", str(network.gateway), mtu=fits[other.id])
                out.setdefault(member.id, {})[route] = None
    return {key: tuple(routes) for key, routes in out.items()}


class _Run:
    """A container that is to run, with all of the state that matters to it. Two are the same where that is the same."""

    def __init__(
        self,
        state: DesiredState,
        host: HostState,
        network: Network,
        member: Member,
        container: Container,
        mtu: int,
        to_peers: tuple[Route, ...],
    ) -> None:
        self.network, self.member, self.container, self.mtu = network, member, container, mtu
        self.to_peers = to_peers
        self.zone = next((zone for zone in host.zones if zone.network == network.name), None)
        self._what = (_bare(network, state), member, container, mtu, self.zone, to_peers)

    @property
    def common(self) -> tuple[str, ...]:
        """Keys of what it shares with others and cannot do without: its name, and the guard of its port."""
        names = (f"names/{self.network.name}",) if self.zone is not None else ()
        return (*names, f"nft/netdev/{TABLE}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Run) and self._what == other._what

    def __hash__(self) -> int:
        return hash(self._what)


def _bare(network: Network, state: DesiredState) -> Hashable:
    """What of a network its legs and containers are made of: all but its other containers and its flows."""
    server = network.member(network.vpn.member_id) if network.vpn is not None else None
    return replace(network, members=(), rules=()), server, network.prefixes


def _bridge(bridge: model.Bridge, parts: Parts) -> Bridge:
    pinned = bridge.datapath_id if bridge.datapath_id is not None else int(Mac.derive("bridge", bridge.name))
    return Bridge(parts.ovsdb, parts.nets, bridge.name, parts.datapath, pinned, parts.settings.controller)


def _exists(name: str) -> bool:
    """Asked by a system call: /sys may be that of another network namespace."""
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def _host_settings(state: DesiredState, host: HostState, ports: list[str]) -> dict[str, str]:
    wanted = sysctls.ports(ports) | sysctls.bridges(bridge.name for bridge in state.bridges)
    for network in state.networks:
        if network.vpn is not None:
            wanted |= sysctls.host_vpn(host.uplinks or default_uplinks(), network.bridge)
    return wanted


def _host_side(network: Network, parts: Parts) -> list[Resource]:
    """The host's own address on a bridge, and its way to the VPN server for clients that come in by an uplink."""
    addresses = (f"{network.host}/{network.subnet.length}",) if network.host is not None else ()
    routes: tuple[Route, ...] = ()
    if network.vpn is not None and network.host is None:
        routes = (Route(f"{network.member(network.vpn.member_id).address}/32"),)
    if not addresses and not routes:
        return []
    needs = (f"bridge/{network.bridge}",)
    return [Interface(parts.nets, None, network.bridge, addresses=addresses, routes=routes, needs=needs)]


def _sums(parts: Parts) -> bool:
    return parts.datapath == "netdev"


def namespace_of(name: str) -> str:
    """The namespace of a container's id, or of a leg's port."""
    return f"{PREFIX}{name}"


def _leg(network: Network, leg: Leg, mtu: int, parts: Parts) -> list[Resource]:
    try:
        config = resolve(leg.tunnel, parts.keys)
    except BulkheadError:
        # Without its rules and addresses nothing of it is made; what there is of it stays, and the rest of the host is made.
        keeps = (f"namespace/{namespace_of(leg.port)}", f"veth/{leg.port}", f"wireguard/{leg.tunnel.interface}")
        return [Broken(f"leg/{leg.port}", lambda: resolve(leg.tunnel, parts.keys), keeps, (leg.port,))]
    return [*_leg_links(network, leg, config, mtu, parts), *_leg_tunnel(network, leg, config, parts)]


def _leg_tunnel(network: Network, leg: Leg, config: WgConfig, parts: Parts) -> list[Resource]:
    namespace, interface = namespace_of(leg.port), leg.tunnel.interface
    if leg.role is Role.EGRESS:
        routes: tuple[Route, ...] = (Route("default"),)
    else:
        # A prefix that holds our own is reached by the bridge: more precise ones lead to peers.
        own = {str(prefix) for prefix in network.prefixes} | {"0.0.0.0/0"}
        prefixes = (str(prefix) for peer in config.peers for prefix in peer.allowed)
        routes = tuple(Route(prefix) for prefix in dict.fromkeys(prefixes) if prefix not in own)
    rules = f"nft/{namespace}/inet/{TABLE}"
    if leg.netclient is not None:
        home, run = parts.settings.state_dir / "netclient", parts.settings.own_dir / "netclient"
        command = daemon_command(leg, home, run)
        runner = Kept(parts.programs, Program(f"netclient-{leg.port}", tuple(command), namespace))
        return [Netclient(leg, home, run, runner, needs=(f"namespace/{namespace}", rules))]
    tunnel = WireGuard(
        parts.nets,
        parts.programs,
        interface,
        lambda: resolve(leg.tunnel, parts.keys),
        namespace,
        fixed=leg.role is Role.EGRESS,
        needs=(f"namespace/{namespace}", rules),
    )
    addresses = tuple(f"{address}/{length}" for address, length in config.addresses)
    up = Interface(
        parts.nets,
        namespace,
        interface,
        addresses=addresses,
        routes=routes,
        needs=(tunnel.key,),
        exact=True,
    )
    return [tunnel, up]


def _leg_links(network: Network, leg: Leg, config: WgConfig, mtu: int, parts: Parts) -> list[Resource]:
    namespace = namespace_of(leg.port)
    addresses = tuple(address for address, _ in config.addresses)
    # Routes into the network have the MTU that containers have: what is longer is cut up here, or its sender is told.
    # They would drop it in silence.
    if leg.role is Role.EGRESS:
        assert network.egress is not None
        mac = network.egress.mac
        routes = tuple(Route(str(prefix), NEXT_HOP, mtu=mtu) for prefix in network.prefixes)
    else:
        assert network.mesh is not None
        mac = network.mesh.mac
        routes = (Route("default", NEXT_HOP, mtu=mtu),)
        if network.vpn is not None:
            routes += (Route(f"{network.member(network.vpn.member_id).address}/32", NEXT_HOP),)
    near, far = End(leg.port), End("eth0", namespace, str(mac))
    own = (f"namespace/{namespace}",)
    # Rules come before anything that could carry a packet.
    return [
        Namespace(parts.nets, namespace),
        NftTable("inet", leg_table(leg, network, tunnel_addresses=addresses), parts.settings.own_dir, namespace, own),
        Sysctls(sysctls.leg(leg.tunnel.interface), namespace, needs=own),
        Veth(parts.nets, near, far, software_sums=_sums(parts)),
        Interface(
            parts.nets,
            namespace,
            "eth0",
            addresses=(f"{network.gateway}/32",) if leg.role is Role.EGRESS else (),
            routes=routes,
            neighbours=((NEXT_HOP, str(network.gateway_mac if leg.role is Role.MESH else _other(network))),),
            needs=(f"veth/{leg.port}",),
            exact=True,
        ),
    ]


def _other(network: Network) -> Mac:
    """A MAC address for the leg of the egress to send to, which must not be its own."""
    return Mac.derive(network.name, "bridge")


def mtu_of(network: Network, host: HostState, parts: Parts) -> int:
    """What fits through every tunnel of the network: a container that sends no more has nothing to find out."""
    found = [1500]
    for leg in host.legs:
        if leg.network == network.name:
            try:
                found.append(resolve(leg.tunnel, parts.keys).mtu)
            except BulkheadError:  # it is told where the leg is made
                found.append(leg.tunnel.mtu or WARP_MTU)
    return min(found)


def _forwards(network: Network, member: Member) -> bool:
    """Whether a container is the VPN's server."""
    return network.vpn is not None and network.vpn.member_id == member.id


def _container_links(network: Network, member: Member, mtu: int, parts: Parts) -> list[Resource]:
    namespace = namespace_of(member.id)
    forwards = _forwards(network, member)
    # What the VPN's clients send comes in wrapped up, and longer by that.
    near, far = End(member.port), End("eth0", namespace, str(member.mac), 1500 if forwards else mtu)
    return [
        Namespace(parts.nets, namespace),
        Sysctls(sysctls.container(forwards=forwards), namespace, needs=(f"namespace/{namespace}",)),
        Veth(parts.nets, near, far, software_sums=_sums(parts)),
    ]


def _container(run: _Run, parts: Parts) -> list[Resource]:
    network, member, container = run.network, run.member, run.container
    namespace = namespace_of(member.id)
    gate = Gate(parts.nets, parts.controller, network.bridge, member.port, namespace, (f"veth/{member.port}",))
    interface = Interface(
        parts.nets,
        namespace,
        "eth0",
        addresses=(f"{member.address}/{network.subnet.length}",),
        # The VPN's server takes more than its neighbours do.
        routes=(
            Route("default", str(network.gateway)),
            *((Route(str(network.subnet), mtu=run.mtu),) if _forwards(network, member) else ()),
            *run.to_peers,
        ),
        needs=(gate.key,),
        to_hosts_by=str(network.gateway),
    )
    out: list[Resource] = [gate, interface]
    if container.dns:
        out.append(TextFile(NETNS_ETC / namespace / "resolv.conf", resolvers(container, run.zone), (gate.key,)))
    if container.driver is Driver.LXC:
        search = run.zone.domain if run.zone is not None else None
        out.append(LxcContainer(parts.lxc, member, container, search=search, needs=(interface.key,)))
    elif container.command:
        # `ip netns exec` gives it /etc/netns/NAMESPACE/resolv.conf and its own /sys.
        program = confined(first_id(container.id), container.command) if container.confined else container.command
        command = ("ip", "netns", "exec", namespace, *program)
        out.append(Process(parts.programs, Program(f"container-{member.id}", command), (interface.key,)))
    return out


def _resolver(state: DesiredState, host: HostState, run: _Run, parts: Parts) -> list[Resource]:
    """The names of a network, in the container that is its resolver."""
    zone, namespace = run.zone, namespace_of(run.member.id)
    if zone is None or zone.member_id != run.member.id:
        return []
    directory = parts.settings.own_dir / "names"
    runner = Kept(parts.programs, Program(f"names-{zone.network}", dnsmasq_command(directory, zone), namespace))
    needs = (f"interface/{namespace}/eth0",)
    return [Names(state, host, zone, directory, runner, needs=needs)]


def _vpn(network: Network, vpn: VpnServer, parts: Parts) -> list[Resource]:
    """The VPN server, inside its container: its socket is there as well."""
    namespace, interface = namespace_of(vpn.container_id), vpn.tunnel.interface
    rules = NftTable("inet", gateway_table(vpn), parts.settings.own_dir, namespace, (f"namespace/{namespace}",))

    def config() -> WgConfig:
        return replace(resolve(vpn.tunnel, parts.keys), peers=parts.clients.peers())

    inside = f"interface/{namespace}/eth0"
    tunnel = WireGuard(
        parts.nets, parts.programs, interface, config, namespace, socket_namespace=namespace, needs=(rules.key, inside)
    )
    addresses = tuple(f"{address}/{length}" for address, length in vpn.tunnel.addresses)
    up = Interface(parts.nets, namespace, interface, addresses=addresses, needs=(tunnel.key,), exact=True)
    # Whoever makes a client without root's rights needs it.
    public = TextFile(
        parts.settings.run_dir / PUBLIC_KEY, lambda: public_key(resolve(vpn.tunnel, parts.keys).private_key) + "\n"
    )
    # Says which client is damaged; the others connect.
    return [rules, tunnel, up, public, Broken("vpn-clients", parts.clients.all)]


def health(state: DesiredState, host: HostState, parts: Parts) -> list[Watched]:
    """The tunnels whose state opens and closes an egress."""
    out = []
    for leg in host.legs:
        if leg.role is Role.EGRESS and leg.enabled and leg.probe is not None:
            namespace, interface = namespace_of(leg.port), leg.tunnel.interface
            out.append(Watched(leg.network, namespace, interface, leg.probe, partial(_age, interface, namespace)))
    return out


async def _age(interface: str, namespace: str) -> float | None:
    return min((peer.age_s for peer in await show(interface, namespace) if peer.age_s is not None), default=None)
