"""The state file's literal flows: what each becomes in our pipeline, and what is wrong with it.

A literal flow is never installed as it stands. What the stages already do needs no rule, what they can honour becomes
a `model.Rule` narrowed so that it takes nothing from anyone else, and everything else is a `Problem` that says why. A
warning is a flow whose effect differs from its letter; an error is one that nothing can be made of.
Imports `model`, `problems` and `ofparse`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

from controller.model import Ipv4, Member, Network, Prefix, Protocol, Role, Rule
from controller.ofparse import ETH_TYPE_IP, SCTP, TCP, UDP, WIDTHS, Fault, LiteralFlow, full_mask, is_number, parse
from controller.problems import Problem, error, warning

FLOODS: Final = frozenset(("normal", "flood", "all"))
LOCAL: Final = "LOCAL"
PROTOCOL_NUMBERS: Final[dict[Protocol, int]] = {"tcp": TCP, "udp": UDP, "sctp": SCTP}

_ADD_PORT: Final = re.compile(r"\bovs-vsctl\b[^;&|]*?\badd-port\s+([^\s;&|]+)\s+([^\s;&|]+)")
_SHOWN: Final = 5
_TEXT_LIMIT: Final = 240
_PORT_NAMES_THAT_ARE_ACTIONS: Final = frozenset(("controller", "in_port", "table", "any", "none", "unset"))

MatchItems = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """The rules of each network, by its name, and every problem of every flow."""

    rules: Mapping[str, tuple[Rule, ...]]
    problems: tuple[Problem, ...]


def judge(networks: Sequence[Network], flows: Mapping[str, Sequence[str]], path: str = "openflow.bridges") -> Judged:
    """Judge the literal flows of all bridges; `flows` is by bridge name, `path` is where it stands in the file."""
    site = _Site.of(networks)
    rules: dict[str, tuple[Rule, ...]] = {}
    problems: list[Problem] = []
    for bridge, texts in flows.items():
        where = f"{path}.{bridge}"
        network = site.sockets.get(bridge)
        if network is not None:
            found = _Socket(site, network, where).judge(texts)
            rules[network.name] = found.rules[network.name]
            problems += found.problems
        elif bridge in site.meshes:
            problems += _judge_mesh(site, bridge, where, texts)
        else:
            known = sorted((*site.sockets, *site.meshes))
            fix = _did_you_mean(bridge, known, "Flows are taken for the bridges of declared networks only; remove it.")
            problems.append(error("unknown-bridge", where, f"bridge {bridge!r}", f"one of {_some(known)}", fix))
    return Judged(rules, tuple(problems))


def receiver(flows: Iterable[str], protocol: Protocol, port: int) -> str | None:
    """The port to which a literal flow delivers a protocol's port (`udp,tp_dst=51820,actions=output:veth100`)."""
    for text in flows:
        flow = parse(text)
        if isinstance(flow, tuple) or flow.exact(f"{protocol}_dst") != port or len(flow.actions) != 1:
            continue
        if flow.actions[0].port is not None and flow.actions[0].port.lower() not in FLOODS:
            return flow.actions[0].port
    return None


def added_ports(command: str, interface: str) -> list[tuple[str, str]]:
    """The (bridge, port) pairs that a wg-quick command adds to Open vSwitch; `%i` is the interface there."""
    return [(bridge, port.replace("%i", interface)) for bridge, port in _ADD_PORT.findall(command)]


def tunnel_problems(
    commands: Iterable[tuple[str, str, str]], attached: Iterable[tuple[str, str, str]]
) -> Iterator[Problem]:
    """WireGuard interfaces that are to be ports of a bridge: which is what a leg is for.

    `commands` are (path, command, interface), `attached` are (path, interface, bridge).
    """
    ports = [(path, bridge, port) for path, text, name in commands for bridge, port in added_ports(text, name)]
    ports += [(path, bridge, port) for path, port, bridge in attached]
    for path, bridge, port in ports:
        yield warning(
            "wireguard-port",
            path,
            f"WireGuard interface {port} as a port of {bridge}",
            "an Ethernet port",
            f"WireGuard is layer 3 and carries no frames; {port} becomes a leg, a veth whose far end routes into the"
            " tunnel. The command is not run.",
        )


class _Place(NamedTuple):
    """Where a port is: its bridge, the network, its role, and the container behind it."""

    bridge: str
    network: Network
    role: Role
    member: Member | None = None


@dataclass(frozen=True, slots=True)
class _Site:
    """Every bridge and port of the state, by name."""

    networks: Sequence[Network]
    sockets: Mapping[str, Network]
    meshes: Mapping[str, Network]
    ports: Mapping[str, _Place]
    names: Mapping[str, Sequence[str]]
    members: Mapping[int, Member]

    @classmethod
    def of(cls, networks: Sequence[Network]) -> _Site:
        """Look the networks over once; flows are many."""
        ports: dict[str, _Place] = {}
        for network in networks:
            for member in network.members:
                ports[member.port] = _Place(network.bridge, network, Role.CONTAINER, member)
            if network.egress is not None:
                ports[network.egress.port] = _Place(network.bridge, network, Role.EGRESS)
            if network.mesh is not None:
                ports[network.mesh.port] = _Place(network.bridge, network, Role.MESH)
                ports[network.mesh.far_port] = _Place(network.mesh.bridge, network, Role.MESH)
                ports[network.mesh.leg_port] = _Place(network.mesh.bridge, network, Role.MESH)
        sockets = {network.bridge: network for network in networks}
        meshes = {network.mesh.bridge: network for network in networks if network.mesh is not None}
        names: dict[str, list[str]] = {bridge: [] for bridge in (*sockets, *meshes)}
        for name in sorted(ports):
            names[ports[name].bridge].append(name)
        members = {int(member.address): member for network in networks for member in network.members}
        return cls(networks, sockets, meshes, ports, names, members)


class _Candidate(NamedTuple):
    """A flow that parsed, and where it stood."""

    path: str
    flow: LiteralFlow


@dataclass(slots=True)
class _Notes:
    """Problems of one bridge's flows, as they are found."""

    problems: list[Problem] = field(default_factory=list)

    def error(self, at: _Candidate, code: str, expected: str, fix: str) -> None:
        """The flow cannot be taken."""
        self.problems.append(error(code, at.path, _quote(at.flow.text), expected, fix))

    def warn(self, at: _Candidate, code: str, expected: str, fix: str) -> None:
        """The flow is taken, and this is what was made of it."""
        self.problems.append(warning(code, at.path, _quote(at.flow.text), expected, fix))

    def parse_all(self, where: str, texts: Sequence[str]) -> list[_Candidate]:
        """The flows that can be read."""
        found = []
        for index, text in enumerate(texts):
            path = f"{where}.flows[{index}]"
            flow = parse(text)
            if isinstance(flow, LiteralFlow):
                found.append(_Candidate(path, flow))
            else:
                self.problems += (_fault(path, text, fault) for fault in flow)
        return found


def _fault(path: str, text: str, fault: Fault) -> Problem:
    return error(fault.code, path, _quote(text), fault.expected, fault.fix)


def _quote(text: str) -> str:
    short = text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + "..."
    return f"'{short}'"


def _some(names: Sequence[str]) -> str:
    """A few of the names."""
    if not names:
        return "(none)"
    return ", ".join(names[:_SHOWN]) + (" and others" if len(names) > _SHOWN else "")


def _did_you_mean(word: str, known: Sequence[str], otherwise: str) -> str:
    # A comparison with thousands of names for each of thousands of flows would take minutes.
    close = difflib.get_close_matches(word, known, n=2) if len(known) <= 500 and len(word) <= 32 else []
    return f"Did you mean {' or '.join(close)}?" if close else otherwise


def _check_port(notes: _Notes, site: _Site, at: _Candidate, bridge: str, port: str, what: str) -> bool:
    """Whether a flow may name the port on this bridge; says so if not."""
    place = site.ports.get(port)
    if port.upper() == LOCAL or (place is not None and place.bridge == bridge):
        return True
    names = site.names[bridge]
    if is_number(port):
        fix = "The switch chooses numbers and reuses them; write the port's name."
        notes.error(at, "numeric-port", f"a port of {bridge} by name in {what}", fix)
    elif place is not None:
        fix = f"{port} is a port of {place.bridge}; packets on {bridge} cannot reach it. Use {_some(names)}."
        notes.error(at, "foreign-port", f"a port of {bridge} in {what}", fix)
    else:
        fix = _did_you_mean(port, [*names, "drop", "normal"], "Declare the container, or mend the name.")
        notes.error(at, "unknown-port", f"a port of {bridge} in {what} ({_some(names)})", fix)
    return False


def _judge_mesh(site: _Site, bridge: str, where: str, texts: Sequence[str]) -> list[Problem]:
    """On a mesh bridge only the crossover and the final drop are left to say, and both are what is done anyway."""
    notes = _Notes()
    mesh = site.meshes[bridge].mesh
    assert mesh is not None
    crossed = {mesh.leg_port: mesh.far_port, mesh.far_port: mesh.leg_port}
    candidates = notes.parse_all(where, texts)
    _overlaps(notes, candidates, frozenset())
    for at in candidates:
        flow = at.flow
        outputs = [action.port for action in flow.actions if action.port is not None]
        named = [(flow.in_port, "in_port")] if flow.in_port is not None else []
        named += [(port, "output") for port in outputs if not _is_reserved(port)]
        if [port for port, what in named if not _check_port(notes, site, at, bridge, port, what)]:
            continue
        if flow.drops and flow.catches_all:
            continue
        crosses = flow.in_port is not None and not flow.match and len(flow.actions) == 1
        if crosses and outputs == [crossed.get(flow.in_port or "")]:
            continue
        expected = f"{mesh.leg_port} and {mesh.far_port} crossed over, or nothing"
        notes.error(at, "mesh-flow", expected, "A mesh bridge joins these two ports and does nothing else; remove it.")
    return notes.problems


def _is_reserved(port: str) -> bool:
    """Whether it is no port but a way of forwarding, or a register that holds one."""
    return port.lower() in FLOODS | _PORT_NAMES_THAT_ARE_ACTIONS or "[" in port


class _Offer(NamedTuple):
    """A declared service, or a VPN server's port, as others see it."""

    member: Member
    name: str
    protocol: Protocol
    port: int

    def __str__(self) -> str:
        return f"{self.name} ({self.protocol} {self.port}) of {self.member.name} at {self.member.address}"


class _Socket:
    """Judges the flows of one socket bridge."""

    def __init__(self, site: _Site, network: Network, where: str) -> None:
        self.site = site
        self.network = network
        self.where = where
        self.notes = _Notes()
        self.rules: dict[str, Rule] = {}
        self.foreign = [(other, prefix) for other in site.networks if other is not network for prefix in other.prefixes]
        self.offers: dict[tuple[Protocol, int], list[_Offer]] = {}
        for offer in _offers(network):
            self.offers.setdefault((offer.protocol, offer.port), []).append(offer)
        self.consulted: frozenset[int] = frozenset((0,))
        self.server = network.member(network.vpn.member_id) if network.vpn is not None else None

    def judge(self, texts: Sequence[str]) -> Judged:
        """Rules and problems of all flows."""
        candidates = self.notes.parse_all(self.where, texts)
        flows = [at.flow for at in candidates]
        self.consulted = self.consulted.union(*(flow.consults for flow in flows))
        ranks = {priority: rank for rank, priority in enumerate(sorted({flow.priority for flow in flows}), 1)}
        lowest = min(ranks, default=0)
        for at in candidates:
            self._flow(at, ranks[at.flow.priority], lowest)
        rules, clashing = _settle(self.notes, {at.path: at for at in candidates}, self.rules)
        _overlaps(self.notes, candidates, clashing)
        return Judged({self.network.name: rules}, tuple(self.notes.problems))

    # One flow: every check that can fail says so; only a flow that passes all of them is made into something.

    def _flow(self, at: _Candidate, rank: int, lowest: int) -> None:
        flow = at.flow
        outputs = [action.port for action in flow.actions if action.port is not None]
        named = [port for port in outputs if not _is_reserved(port)]
        fit = self._ports(at, named)
        fit = self._crossing(at, named) and fit
        fit = self._actions(at, outputs, named) and fit
        if not fit:
            return
        learns = any(action.kind == "learn" for action in flow.actions)
        if self._role(flow.in_port) is Role.EGRESS and not flow.drops:
            self._from_egress(at, learns)
            if not learns:
                return
            named = []
        if any(port.lower() in FLOODS for port in outputs):
            self._floods(at)
        elif flow.drops:
            self._drop(at, rank, lowest)
        elif named:
            self._deliver(at, rank, named[0])

    def _role(self, port: str | None) -> Role | None:
        if port is None:
            return None
        if port.upper() == LOCAL:
            return Role.HOST
        place = self.site.ports.get(port)
        return place.role if place is not None else None

    def _ports(self, at: _Candidate, outputs: Sequence[str]) -> bool:
        bridge = self.network.bridge
        named = [(port, "output") for port in outputs]
        if at.flow.in_port is not None:
            named.insert(0, (at.flow.in_port, "in_port"))
        bad = [port for port, what in named if not _check_port(self.notes, self.site, at, bridge, port, what)]
        if self.network.host is None and any(port.upper() == LOCAL for port, _ in named):
            fix = f"Give networks.{self.network.name} a host address, or remove the flow."
            self.notes.error(at, "no-host", f"a host that takes part in {self.network.name}", fix)
            return False
        if at.flow.in_port is not None and at.flow.in_port in outputs:
            fix = "The switch never sends a packet back to where it came from; remove the flow."
            self.notes.error(at, "hairpin", "an output that is not the in_port", fix)
            return False
        return not bad

    def _crossing(self, at: _Candidate, outputs: Sequence[str]) -> bool:
        """Whether the flow stays in its network. A drop may name another: nothing crosses."""
        flow = at.flow
        if flow.drops:
            return True
        toward = {other.name: str(prefix) for other, prefix in self.foreign if self._names_prefix(flow, prefix)}
        ports = [*outputs, *([flow.in_port] if flow.in_port is not None else [])]
        places = [(port, self.site.ports[port]) for port in ports if port in self.site.ports]
        toward |= {place.network.name: port for port, place in places if place.network is not self.network}
        leaves = any(place.bridge != self.network.bridge for _, place in places)
        if toward:
            which = ", ".join(f"{what} of {name}" for name, what in sorted(toward.items()))
            mesh = self.network.mesh
            to_mesh = f" {mesh.port} leads to the mesh, not there." if mesh is not None and mesh.port in outputs else ""
            fix = (
                f"{which} is another network: next hop and ARP are open, and replies would need a hole of their own."
                f"{to_mesh} Ask for a grant, which opens one direction and lets only its replies back."
            )
            self.notes.error(at, "needs-grant", f"a flow within {self.network.name}", fix)
        if toward or leaves:
            self._stateless(at, toward)
        return not toward and not leaves

    @staticmethod
    def _names_prefix(flow: LiteralFlow, prefix: Prefix) -> bool:
        """Whether the flow is about addresses of that prefix only."""
        cubes = (flow.cube("ipv4_src"), flow.cube("ipv4_dst"))
        return any(mask & prefix.mask == prefix.mask and value in prefix for value, mask in cubes)

    def _stateless(self, at: _Candidate, toward: Mapping[str, str]) -> None:
        """A return path told by its source port is open to whoever chooses that source port."""
        flow = at.flow
        for protocol in PROTOCOL_NUMBERS:
            port = flow.exact(f"{protocol}_src")
            if port is None or flow.cube(f"{protocol}_dst")[1]:
                continue
            sender = self.site.members.get(flow.exact("ipv4_src") or 0)
            who = sender.name if sender is not None else "any sender"
            others = sorted(toward) or [net.name for net in self.site.networks if net is not self.network]
            fix = (
                f"It lets {who} reach all of {_some(others) if others else 'the other side'}, any port, from source"
                f" port {port}. Remove it: a grant follows connections and lets only replies back."
            )
            self.notes.error(at, "stateless-return", "replies told by their connection", fix)

    def _actions(self, at: _Candidate, outputs: Sequence[str], named: Sequence[str]) -> bool:
        fit = True
        bad = [act.text for act in at.flow.actions if act.kind not in ("drop", "learn") and act.port is None]
        bad += [f"output:{port}" for port in outputs if _is_reserved(port) and port.lower() not in FLOODS]
        for text in dict.fromkeys(bad):
            fix = (
                "A flow may output to one port of its bridge, or drop; addresses, tables and tracking are the stages'."
            )
            self.notes.error(at, "unsupported", f"a flow without {text[:60]}", fix)
            fit = False
        floods = {port.lower() for port in outputs if port.lower() in FLOODS}
        if len(named) > 1 or (named and floods) or len(floods) > 1:
            fix = "Write one flow for each receiver; copies of a packet are not made."
            self.notes.error(at, "unsupported", "one output", fix)
            fit = False
        for action in at.flow.actions:
            if action.table is not None:
                fit = self._learn(at, action.table) and fit
        return fit

    def _learn(self, at: _Candidate, table: int) -> bool:
        if table in self.consulted:
            fix = "Return paths are learned by the RETURN stage, on the way out; remove learn and the table."
            self.notes.error(at, "unsupported", "a flow without learn", fix)
            return False
        fix = (
            f"No flow sends packets to table {table}, so what is learned there is never used, and it is learned on the"
            " way in. The RETURN stage does it: learned on the way out, and consulted. No rule is made."
        )
        self.notes.warn(at, "dead-learn", f"a flow that consults table {table}", fix)
        return True

    def _from_egress(self, at: _Candidate, learns: bool) -> None:
        """What comes in from the egress is let in by a learned return path and nothing else."""
        expected = "replies, told by a learned return path"
        if learns:
            fix = "It also delivers what nobody asked for. Only learned replies come in; no rule is made."
            self.notes.warn(at, "unsolicited", expected, fix)
        else:
            fix = "It delivers what nobody asked for; replies come in by themselves. Remove it."
            self.notes.error(at, "unsolicited", expected, fix)

    def _floods(self, at: _Candidate) -> None:
        if at.flow.catches_all:
            others = [net.name for net in self.site.networks if net is not self.network]
            fix = (
                "With normal switching as default every container reaches the host's port, and through the host's"
                f" routing {_some(others) if others else 'every other network'}; a packet for another subnet goes to"
                " the gateway and out of the egress. The default is drop, and members reach each other by address;"
                " no rule is made."
            )
            self.notes.warn(at, "default-normal", "drop as the default", fix)
            return
        mesh = " the mesh's too," if self.network.mesh is not None else ""
        fix = (
            "Output teaches normal switching no MAC, so packets that come back are flooded to every port,"
            f"{mesh} and every container sees them. Members are known by address, and nothing floods; no rule is made."
        )
        self.notes.warn(at, "normal-floods", "an output to a port", fix)

    def _drop(self, at: _Candidate, rank: int, lowest: int) -> None:
        flow = at.flow
        if flow.catches_all and flow.priority == lowest:
            return  # what every table does with what it does not know
        if any(self._names_prefix(flow, prefix) for _, prefix in self.foreign):
            return  # the ISOLATE stage does
        if flow.catches_all:
            fix = "Every flow of a lower priority is without effect, and the network too; lower its priority."
            self.notes.warn(at, "drop-all", "the lowest priority for a drop of everything", fix)
        self._rule(at, rank, flow.match, None)

    def _deliver(self, at: _Candidate, rank: int, output: str) -> None:
        if self._role(at.flow.in_port) is Role.HOST:
            fix = "The host reaches exposed services and nothing else; set exposed: true on the service instead."
            self.notes.error(at, "unsupported", "a flow from a container or the mesh", fix)
            return
        place = self.site.ports.get(output)
        if place is None:  # LOCAL, and the host takes part
            assert self.network.host is not None
            self._deliver_to(at, rank, output, self.network.host, (), None)
        elif place.role is Role.EGRESS:
            self._to_egress(at)
        elif place.member is not None:
            member = place.member
            self._deliver_to(at, rank, output, member.address, member.routed, member)
        else:
            self._to_mesh(at, rank, output)

    def _to_egress(self, at: _Candidate) -> None:
        """The EGRESS stage sends to the world already, for everyone, so there is no rule; some flows mean otherwise."""
        flow = at.flow
        own = (prefix for prefix in self.network.prefixes if self._names_destination(flow, prefix))
        if (inside := next(own, None)) is not None:
            fix = "That would send the network's own traffic to the world; remove it."
            self.notes.error(at, "redirect", f"addresses outside {inside}", fix)
            return
        vpn, server = self.network.vpn, self.server
        if vpn is not None and server is not None:
            replies: MatchItems = (("eth_type", ETH_TYPE_IP, 0xFFFF), ("ip_proto", UDP, 0xFF))
            replies += (("udp_src", vpn.port, 0xFFFF),)
            if flow.in_port in (None, server.port) and _meet(flow.match, replies):
                fix = (
                    f"{server.name} is the VPN server: its own encrypted replies to clients (from UDP {vpn.port}) would"
                    " enter WARP, and no client could connect. They return by the port the client came in by."
                )
                self.notes.warn(at, "vpn-replies-into-warp", "everything but the VPN server's own replies", fix)
        if flow.match:
            fix = "The EGRESS stage sends everything that members have for the world, not this alone. No rule is made."
            self.notes.warn(at, "egress-wider", "all traffic of that port", fix)

    @staticmethod
    def _names_destination(flow: LiteralFlow, prefix: Prefix) -> bool:
        value, mask = flow.cube("ipv4_dst")
        return mask & prefix.mask == prefix.mask and value in prefix

    def _to_mesh(self, at: _Candidate, rank: int, output: str) -> None:
        local = self.site.members.get(at.flow.exact("ipv4_dst") or 0)
        if local is not None:
            fix = f"{local.name} is behind {local.port}, not across the mesh; remove it or mend the address."
            self.notes.error(at, "redirect", "an address of another node", fix)
            return
        mesh = self.network.mesh
        assert mesh is not None
        value, mask = at.flow.cube("ipv4_dst")
        across = _some([str(prefix) for prefix in mesh.prefixes])
        if all((value ^ prefix.address) & mask & prefix.mask for prefix in mesh.prefixes):
            fix = f"{output} leads to {across} and nowhere else; the world is reached by the egress alone. Remove it."
            self.notes.error(at, "redirect", f"an address in {across}", fix)
            return
        stolen = self._stolen(at.flow, None)
        if stolen:
            fix = f"It takes what is meant for {_some(stolen)}; add nw_dst."
            self.notes.warn(at, "hijack", "addresses of other nodes", fix)
        elif not any(self._names_destination(at.flow, prefix) for prefix in mesh.prefixes):
            fix = f"As written it takes such packets to any address. Only what is meant for {across} is delivered."
            self.notes.warn(at, "narrowed", f"nw_dst={across}", fix)
        self._rule(at, rank, at.flow.match, output)

    def _deliver_to(
        self,
        at: _Candidate,
        rank: int,
        output: str,
        address: Ipv4,
        routed: Sequence[Prefix],
        member: Member | None,
    ) -> None:
        """A rule for what is meant for that port's own address; a flow for any address is narrowed to it."""
        flow = at.flow
        value, mask = flow.cube("ipv4_dst")
        match = flow.match
        if not any(self._names_destination(flow, prefix) for prefix in routed):
            if address & mask != value:
                fix = f"{output} has {address}; another's traffic does not go there. Remove nw_dst, or mend it."
                self.notes.error(at, "redirect", f"nw_dst={address}", fix)
                return
            match = _with(match, ("ipv4_dst", address, full_mask("ipv4_dst")))
        done = member is not None and flow.in_port is None and self._is_offer(match, member)
        if mask != full_mask("ipv4_dst") and match != flow.match:
            self._narrowed(at, address, member, done)
        if not done:
            self._rule(at, rank, match, output)

    def _narrowed(self, at: _Candidate, address: Ipv4, member: Member | None, done: bool) -> None:
        stolen = self._stolen(at.flow, member)
        outcome = (
            f"Delivered to {address} already, as a declared service or the VPN; no rule is made."
            if done
            else f"Only what is meant for {address} is delivered."
        )
        if stolen:
            fix = f"As written it also takes {_some(stolen)}. {outcome}"
            self.notes.warn(at, "hijack", f"nw_dst={address}", fix)
        else:
            fix = f"As written it takes such packets to any address. {outcome}"
            self.notes.warn(at, "narrowed", f"nw_dst={address}", fix)

    def _is_offer(self, match: MatchItems, member: Member) -> bool:
        """Whether the match is exactly what the pipeline does for something the member declares."""
        return any(
            offer.member is member and match == _offer_match(offer)
            for protocol, port in self._keys_of(match)
            for offer in self.offers.get((protocol, port), ())
        )

    def _keys_of(self, match: MatchItems) -> list[tuple[Protocol, int]]:
        """The offers' keys that a match can meet: one if it names a port, else all of them."""
        exact: list[tuple[Protocol, int]] = [
            (protocol, value)
            for name, value, mask in match
            for protocol in PROTOCOL_NUMBERS
            if name == f"{protocol}_dst" and mask == 0xFFFF
        ]
        return exact or list(self.offers)

    def _stolen(self, flow: LiteralFlow, taker: Member | None) -> list[str]:
        """What others offer that packets of this match are meant for, as text; a few more than are shown."""
        found: list[str] = []
        for key in self._keys_of(flow.match):
            for offer in self.offers.get(key, ()):
                other = offer.member is not taker and offer.member.port != flow.in_port
                if other and _meet(flow.match, _offer_match(offer)):
                    found.append(str(offer))
                if len(found) > _SHOWN:
                    return found
        return found

    def _rule(self, at: _Candidate, rank: int, match: MatchItems, output: str | None) -> None:
        """Only IPv4 gets as far as rules, so a flow for every packet is one for every IPv4 packet."""
        in_port = at.flow.in_port
        self.rules[at.path] = Rule(
            path=at.path,
            text=at.flow.text,
            rank=rank,
            match=_with(match, ("eth_type", ETH_TYPE_IP, 0xFFFF)),
            in_port=LOCAL if self._role(in_port) is Role.HOST else in_port,
            output=LOCAL if self._role(output) is Role.HOST else output,
        )


def _offers(network: Network) -> Iterator[_Offer]:
    for member in network.members:
        for service in member.services:
            yield _Offer(member, service.name, service.protocol, service.port)
    if network.vpn is not None:
        yield _Offer(network.member(network.vpn.member_id), "vpn", "udp", network.vpn.port)


def _offer_match(offer: _Offer) -> MatchItems:
    items = {
        "eth_type": ETH_TYPE_IP,
        "ip_proto": PROTOCOL_NUMBERS[offer.protocol],
        "ipv4_dst": int(offer.member.address),
        f"{offer.protocol}_dst": offer.port,
    }
    return tuple((name, items[name], full_mask(name)) for name in WIDTHS if name in items)


def _with(match: MatchItems, item: tuple[str, int, int]) -> MatchItems:
    """The match with one field set, in the order of `WIDTHS`."""
    items = {name: (name, value, mask) for name, value, mask in match}
    items[item[0]] = item
    return tuple(items[name] for name in WIDTHS if name in items)


def _meet(one: MatchItems, other: MatchItems) -> bool:
    """Whether a packet can match both."""
    values = {name: (value, mask) for name, value, mask in other}
    for name, value, mask in one:
        theirs, their_mask = values.get(name, (0, 0))
        if (value ^ theirs) & mask & their_mask:
            return False
    return True


# Overlaps. A match is a cube: a value and a mask over all header bits as one integer each. For every bit the index
# holds which cubes need a 0 there and which a 1, as integers with a bit for each cube; whatever needs the opposite of a
# new cube cannot meet it. That is about 200 integer operations for each flow instead of a comparison with every other.

_PORT_BITS: Final = 16
_OFFSETS: Final = {name: _PORT_BITS + sum(list(WIDTHS.values())[:i]) for i, name in enumerate(WIDTHS)}


class _Index:
    """Finds the cubes among those added that a new one meets."""

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}
        self._needs: dict[tuple[int, int], int] = {}
        self._count = 0

    def add(self, in_port: str | None, match: MatchItems) -> int:
        """Add a cube; the earlier ones that it meets as a set of bits, one for each in order of adding."""
        wants: list[tuple[int, int]] = []
        if in_port is not None:
            number = self._ports.setdefault(in_port, len(self._ports))
            wants += ((bit, number >> bit & 1) for bit in range(_PORT_BITS))
        for name, value, mask in match:
            offset = _OFFSETS[name]
            wants += ((offset + bit, value >> bit & 1) for bit in range(WIDTHS[name]) if mask >> bit & 1)
        met = (1 << self._count) - 1
        mark = 1 << self._count
        for bit, wanted in wants:
            met &= ~self._needs.get((bit, 1 - wanted), 0)
            self._needs[bit, wanted] = self._needs.get((bit, wanted), 0) | mark
        self._count += 1
        return met


def _bits(number: int) -> Iterator[int]:
    """The positions of the bits that are set."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _overlaps(notes: _Notes, candidates: Sequence[_Candidate], skip: frozenset[tuple[str, str]]) -> None:
    """Warn of flows of one priority that a packet can match both of, and that differ in what they do."""
    groups: dict[int, tuple[_Index, list[_Candidate], dict[tuple[str, ...], int]]] = {}
    for at in candidates:
        index, earlier, alike = groups.setdefault(at.flow.priority, (_Index(), [], {}))
        does = tuple(action.text for action in at.flow.actions if action.kind != "drop")
        differing = index.add(at.flow.in_port, at.flow.match) & ~alike.get(does, 0)
        alike[does] = alike.get(does, 0) | 1 << len(earlier)
        others = (earlier[number] for number in _bits(differing))
        met = list(islice((other for other in others if (other.path, at.path) not in skip), _SHOWN + 1))
        earlier.append(at)
        if met:
            which = _some([f"{other.path} ({_quote(other.flow.text)})" for other in met])
            fix = f"Priority {at.flow.priority} is also that of {which}, and a packet can match both: which wins is"
            fix += " undefined. Give them different priorities."
            notes.warn(at, "overlap", "one flow of that priority for a packet", fix)


def _settle(
    notes: _Notes, candidates: Mapping[str, _Candidate], rules: Mapping[str, Rule]
) -> tuple[tuple[Rule, ...], frozenset[tuple[str, str]]]:
    """Rules of one rank must not overlap: drop those that say nothing new, refuse those that contradict.

    Returns the rules that stay, and the pairs of paths that were refused.
    """
    dropped: set[str] = set()
    refused: set[tuple[str, str]] = set()
    groups: dict[int, tuple[_Index, list[Rule]]] = {}
    for rule in rules.values():
        index, earlier = groups.setdefault(rule.rank, (_Index(), []))
        for number in _bits(index.add(rule.in_port, rule.match)):
            other = earlier[number]
            if other.path in dropped:
                continue
            if other.output == rule.output and _within(rule, other):
                dropped.add(rule.path)
                break
            if other.output == rule.output and _within(other, rule):
                dropped.add(other.path)
            else:
                refused.add((other.path, rule.path))
                fix = f"{other.path} has the same priority and meets it; give them different priorities."
                notes.error(candidates[rule.path], "overlap", "rules of one priority that do not meet", fix)
                break  # one reason is enough
        earlier.append(rule)
    kept = tuple(rule for path, rule in rules.items() if path not in dropped)
    return kept, frozenset(refused)


def _within(inner: Rule, outer: Rule) -> bool:
    """Whether every packet that matches `inner` matches `outer`."""
    if outer.in_port not in (None, inner.in_port):
        return False
    values = {name: (value, mask) for name, value, mask in inner.match}
    for name, value, mask in outer.match:
        theirs, their_mask = values.get(name, (0, 0))
        if mask & ~their_mask or (value ^ theirs) & mask:
            return False
    return True
