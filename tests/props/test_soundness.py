"""Attacks on the proof: what may leave by the flows and is not allowed is found, also when it comes change by change."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from controller import fields
from controller.compile import BridgeCompiler, planned_ports
from controller.flow import (
    Action,
    Bits,
    Clone,
    Ct,
    DecTtl,
    Flow,
    FlowKey,
    Learn,
    LearnLoad,
    LearnMatch,
    LearnOutput,
    Match,
    Output,
    PopVlan,
    Resubmit,
    SetField,
    whole,
)
from controller.frame import Port
from controller.model import Bridge, BridgeKind, DesiredState, Rule, Service
from controller.verify.explore import ANYWHERE, CT_STATES
from controller.verify.policy import Policy
from controller.verify.prove import Prover, prove
from controller.verify.rules import Ports
from controller.verify.space import bits, get
from controller.verify.walk import Walker
from tests.fakes.states import management, member, privacy, state_of, two_networks, with_network
from tests.ovs.headers import Headers
from tests.ovs.passages import random_flows
from tests.ovs.test_mutants import DAMAGES

IP, TCP = 0x0800, 6
LEG, FAR = 1, 2
REG = fields.REGS

Flows = dict[FlowKey, Flow]


def keyed(flows: Iterable[Flow]) -> Flows:
    return {flow.key: flow for flow in flows}


def mesh_bridge(leg: int = LEG, far: int = FAR) -> tuple[DesiredState, Bridge, dict[str, Port]]:
    """A bridge whose policy is short: IPv4 and ARP from one end to the other, as they are."""
    state = two_networks()
    bridge = next(b for b in state.bridges if b.name == "mesh-privacy")
    mesh = state.network(bridge.network).mesh
    assert mesh is not None
    planned = planned_ports(state, bridge)
    ports = {
        mesh.leg_port: replace(planned[mesh.leg_port], number=leg),
        mesh.far_port: replace(planned[mesh.far_port], number=far),
    }
    return state, bridge, ports


def across(*actions: Action, table: int = 0, goto: int | None = None, **match: object) -> Flow:
    """A flow for TCP, unless told, from the leg."""
    return Flow(
        table,
        100,
        Match.named(**{"eth_type": IP, "ip_proto": TCP, "in_port": LEG, "vlan_vid": (0, 0x1000)} | match),
        actions,
        goto,
    )


def is_found(where: tuple[DesiredState, Bridge, Mapping[str, Port]], *flows: Flow) -> bool:
    whole_proof = prove(*where, flows)
    assert bool(Prover().prove(*where, keyed(flows))) == bool(whole_proof)
    return bool(whole_proof)


# ------------------------------------------------------------------------------------------------------------- actions


def test_what_goes_across_a_mesh_as_it_is_may() -> None:
    assert not is_found(mesh_bridge(), across(Output(FAR)))


def test_a_packet_with_no_hop_left_comes_back_as_it_was_before_its_hop_was_taken() -> None:
    one, none = SetField(REG[1].header, 1), SetField(REG[1].header, 0)
    flows = (
        across(Resubmit(1), goto=2),
        across(one, DecTtl(), none, table=1),
        Flow(2, 100, Match.named(reg1=1), (Output(fields.LOCAL),)),
    )
    assert is_found(mesh_bridge(), *flows)
    harmless = (flows[0], across(one, none, table=1), flows[2])
    assert not is_found(mesh_bridge(), *harmless)


def test_a_hop_is_taken_from_ip_alone() -> None:
    """Open vSwitch leaves other packets as they are, and goes on."""
    cube = Match.of([(fields.IN_PORT_FIELD.header, LEG, fields.IN_PORT_FIELD.full), (fields.IP_TTL.header, 0, 0xFF)])
    assert is_found(mesh_bridge(), Flow(0, 100, cube, (DecTtl(), Output(fields.LOCAL))))


def test_an_address_that_connection_tracking_translates_is_rewritten() -> None:
    """With a table or without one: what stands behind in the list gets the packet as translated."""
    for table in (None, 5):
        ct = Ct(1, table, commit=True, nat="nat(src=10.0.0.9)")
        assert is_found(mesh_bridge(), across(ct, Output(FAR)))
        assert not is_found(mesh_bridge(), across(replace(ct, nat=""), Output(FAR)))


def test_an_extended_register_is_the_registers_it_is_made_of() -> None:
    flows = [
        across(SetField(REG[0].header, 1), SetField(fields.XREGS[0].header, 2), goto=1),
        Flow(1, 100, Match.named(reg1=2), (Output(fields.LOCAL),)),
    ]
    assert is_found(mesh_bridge(), *flows[::-1]), "reg1 holds the low half"


# ------------------------------------------------------------------------------------------------------------- learning


def _learn(*specs: LearnMatch | LearnOutput) -> Learn:
    return Learn(0, 200, 0, 10, 10, 0, specs)


def test_a_learned_flow_for_a_port_that_nobody_named_before() -> None:
    port, out = Bits(REG[0].header, 0, 16), Bits(REG[2].header, 0, 16)
    learn = _learn(LearnMatch(whole(fields.IN_PORT_16), port), LearnOutput(out))
    for number, found in ((9, True), (LEG, False)):
        writes = SetField(REG[0].header, number), SetField(REG[2].header, FAR)
        flow = Flow(0, 100, Match.named(in_port=LEG, eth_type=IP, vlan_vid=(0, 0x1000)), (*writes, learn, Output(FAR)))
        kind = LearnMatch(whole(fields.ETH_TYPE), IP)
        untagged = LearnMatch(Bits(fields.VLAN_VID.header, 12, 1), 0)
        flow = replace(flow, actions=(*writes, replace(learn, specs=(kind, untagged, *learn.specs)), Output(FAR)))
        assert is_found(mesh_bridge(), flow) == found


def test_a_part_of_the_ingress_port_is_learned_as_that_part() -> None:
    leg = 0x0201
    where = mesh_bridge(leg=leg, far=3)
    learn = _learn(
        LearnMatch(whole(fields.IN_PORT_16), whole(fields.IN_PORT_16)),
        LearnOutput(Bits(fields.IN_PORT_16.header, 8, 8)),
    )
    assert is_found(where, Flow(0, 100, Match.named(in_port=leg), (learn,))), "by port 2, any packet"


# ------------------------------------------------------------------------------------------------------------ anywhere


def test_what_may_leave_anywhere_may_leave_by_a_port_that_is_still_to_come() -> None:
    for action in (Output(fields.NORMAL), Output(fields.FLOOD), SetField(fields.IN_PORT_16.header, 7)):
        assert is_found(mesh_bridge(), across(action)), str(action)


# ------------------------------------------------------------------------------------------------------------- changes


def test_the_second_of_the_ports_that_are_alike_is_told_from_the_first() -> None:
    """What may come back to the port it came from alone is harmless until another one sends it there too."""
    first, second = member("management", 200, "10.1.0.200"), member("management", 201, "10.1.0.201")
    alone, both = state_of(management(first)), state_of(management(first, second))
    bridge = alone.bridges[0]
    ports = planned_ports(both, bridge)
    x, y = ports[first.port].number, ports[second.port].number
    prover = Prover()
    send = [Flow(0, 9, Match.named(in_port=x), (), 50), Flow(50, 9, Match(), (Output(x),))]
    without = {name: port for name, port in ports.items() if name != second.port}
    assert not prover.prove(alone, bridge, without, keyed(send))
    flows = [*send, Flow(0, 9, Match.named(in_port=y), (), 50)]
    assert prove(both, bridge, ports, flows)
    assert prover.prove(both, bridge, ports, keyed(flows))


def test_packets_once_taken_for_their_ports_own_are_followed_to_the_end() -> None:
    """A new member's address may not come from the mesh any more, though all that the mesh sends passed there before."""
    first, middle, second = (member("management", 200 + n, f"10.1.0.{110 + n}") for n in (0, 1, 4))
    before, after = state_of(management(first, middle)), state_of(management(first, middle, second))
    bridge = before.bridges[0]
    old, new = planned_ports(before, bridge), planned_ports(after, bridge)
    flows = compiled(before, bridge, old)
    prover = Prover()
    assert not prover.prove(before, bridge, old, flows)
    assert prove(after, bridge, new, flows.values())
    assert prover.prove(after, bridge, new, flows)


def test_what_one_rule_excepts_another_that_meets_it_does_not_allow() -> None:
    """Two rules of the operator that overlap: neither lets anything to the other network's addresses."""
    base = two_networks()
    network = base.network("privacy")
    assert network.mesh is not None
    port = network.members[0].port
    tcp = (("eth_type", IP, 0xFFFF), ("ip_proto", TCP, 0xFF))
    https = (*tcp, ("tcp_dst", 443, 0xFFFF))
    to = network.mesh.port
    rules = tuple(Rule(f"rules[{rank}]", "", rank, match, port, to) for rank, match in enumerate((tcp, https)))
    state = with_network(base, "privacy", rules=rules)
    bridge = state.bridges[0]
    ports = planned_ports(state, bridge)
    foreign = state.network("management").members[0].address
    mine = network.members[0]
    match = Match.named(
        in_port=ports[port].number, eth_type=IP, ip_proto=TCP, tcp_dst=443, ipv4_dst=foreign,
        ipv4_src=mine.address, eth_src=mine.mac, vlan_vid=(0, 0x1000),
    )  # fmt: skip
    bad = Flow(0, 60000, match, (Output(ports[network.mesh.port].number),))
    assert prove(state, bridge, ports, [bad])
    assert compiled(state, bridge, ports)


def compiled(state: DesiredState, bridge: Bridge, ports: Mapping[str, Port]) -> Flows:
    return dict(BridgeCompiler().compile(state, bridge, ports).flows)


# ------------------------------------------------------------------------------------------------------------ at random

SEEDS = int(os.environ.get("BULKHEAD_SOUNDNESS", "60"))
"""So many histories of one bridge, of some changes each. Thousands for the long run."""
TOLD_APART = (
    *(fields.ETH_TYPE, fields.VLAN_VID, fields.IPV4_SRC, fields.IPV4_DST, fields.IP_PROTO),
    *(fields.TCP_SRC, fields.TCP_DST),
)
TABLES = (0, 10, 30, 50, 60, 70, 80, 90, 100)


class History:
    """One bridge as it changes: members come, go and offer other things, ports get other numbers, flows are damaged."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.mesh = self.rng.random() < 0.2
        self.name = self.rng.choice(("privacy", "management"))
        self.numbers = list(range(1, 30))
        self.rng.shuffle(self.numbers)
        self.chosen = {0, 1}
        self.offers: dict[int, tuple[Service, ...]] = {}
        self.missing: set[str] = set()
        self.extra: Flows = {}
        self.lost: set[FlowKey] = set()
        self.taken: list[Flow] = []
        self.prover = Prover()
        self.settle()
        self.compiled = compiled(self.state, self.bridge, self.ports)

    def settle(self) -> None:
        """The state and the ports as chosen."""
        net = 0 if self.name == "privacy" else 1
        members = tuple(
            member(self.name, 100 + 100 * net + n, f"10.{net}.0.{110 + n}", *self.offers.get(n, ()))
            for n in sorted(self.chosen)
        )
        other = management() if self.name == "privacy" else privacy()
        mine = privacy(*members) if self.name == "privacy" else management(*members)
        self.state = state_of(mine, other)
        self.bridge = next(
            b for b in self.state.bridges if b.network == self.name and (b.kind is BridgeKind.MESH) == self.mesh
        )
        planned = planned_ports(self.state, self.bridge)
        self.ports = {
            name: port if port.number == fields.LOCAL else replace(port, number=self.numbers[self._slot(name)])
            for name, port in planned.items()
            if name not in self.missing
        }

    def _slot(self, name: str) -> int:
        return int(name[4:]) % 100 if name.startswith("veth") else 20 + len(name) % 5 + 5 * name.startswith("to")

    @property
    def flows(self) -> Flows:
        return {key: flow for key, flow in (self.compiled | self.extra).items() if key not in self.lost}

    def change(self) -> None:
        """One thing, or some."""
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self.rng.choice(
                (self._members, self._number, self._services, self._missing, self._add, self._add, self._add)
                + (self._remove, self._again, self._damage, self._lose)
            )()
        self.settle()
        if self.rng.random() < 0.85:  # else the flows lag behind
            self.compiled = compiled(self.state, self.bridge, self.ports)

    def _members(self) -> None:
        self.chosen ^= {self.rng.randrange(5)}
        self.chosen = self.chosen or {0}

    def _number(self) -> None:
        a, b = self.rng.sample(range(len(self.numbers)), 2)
        self.numbers[a], self.numbers[b] = self.numbers[b], self.numbers[a]

    def _services(self) -> None:
        offered = Service("s", "tcp", self.rng.choice((53, 443)), exposed=self.rng.random() < 0.7)
        self.offers[self.rng.randrange(5)] = self.rng.choice(((), (offered,)))

    def _missing(self) -> None:
        self.missing = {self.rng.choice(sorted(planned_ports(self.state, self.bridge)))} if not self.missing else set()

    def _add(self) -> None:
        numbers = [n for n in self._used() if n != fields.LOCAL] + [29]
        for flow in random_flows(self.rng, numbers, self.rng.choice((1, 1, 2))):
            self._put(self._foreign(flow, numbers))

    def _put(self, flow: Flow) -> None:
        self.extra[flow.key] = flow
        self.lost.discard(flow.key)

    def _used(self) -> list[int]:
        return [port.number for port in self.ports.values()] or [1]

    def _foreign(self, flow: Flow, numbers: list[int]) -> Flow:
        """A random flow among our tables; half of them send nothing themselves, so that more of them are harmless."""
        tables = sorted(self.rng.sample(TABLES, 4))
        actions = tuple(_moved(a, tables) for a in flow.actions)
        if self.rng.random() < 0.7:
            actions = tuple(a for a in actions if not isinstance(a, Output | Clone))
        if self.rng.random() < 0.4:
            actions = (*actions, self._learning(tables))
        if self.rng.random() < 0.3:
            actions = (*actions, self.rng.choice((DecTtl(), PopVlan(), Ct(1, None, commit=True, nat="nat"))))
        match = flow.match
        if self.rng.random() < 0.5:
            match = Match.named(in_port=self.rng.choice(numbers))
        goto = tables[flow.goto] if flow.goto is not None else None
        priority = self.rng.choice((1, 120, 330, 20000, flow.priority))
        return Flow(tables[flow.table], priority, match, actions, goto)

    def _learning(self, tables: list[int]) -> Learn:
        rng = self.rng
        reg = Bits(rng.choice(REG[:3]).header, 0, 16)
        specs: list[LearnMatch | LearnLoad | LearnOutput] = [
            LearnMatch(whole(fields.IN_PORT_16), rng.choice((whole(fields.IN_PORT_16), reg, 29))),
            LearnMatch(whole(fields.ETH_TYPE), IP),
            LearnMatch(whole(fields.IPV4_DST), whole(fields.IPV4_SRC)),
            LearnLoad(rng.choice((reg, whole(fields.IN_PORT_16), 3)), Bits(rng.choice(REG[:3]).header, 0, 16)),
            LearnOutput(rng.choice((whole(fields.IN_PORT_16), reg))),
        ]
        kept = [spec for spec in specs if rng.random() < 0.6]
        return Learn(rng.choice(tables), rng.choice((5, 150, 25000)), 0, 10, 10, 0, tuple(kept))

    def _remove(self) -> None:
        if self.extra:
            flow = self.extra.pop(self.rng.choice(sorted(self.extra)))
            self.taken.append(flow)

    def _again(self) -> None:
        self.lost.clear()
        if self.taken:
            self._put(self.taken.pop())

    def _lose(self) -> None:
        if self.compiled:
            self.lost.add(self.rng.choice(sorted(self.compiled)))

    def _damage(self) -> None:
        now = self.flows
        if any(flow.match.get(fields.IN_PORT_FIELD) for flow in now.values()):
            worse, _ = self.rng.choice(DAMAGES)(self.rng, now)
            self.lost |= now.keys() - worse.keys()
            for key, flow in worse.items():
                if now.get(key) != flow:
                    self._put(flow)

    # ----------------------------------------------------------------------------------------------------------- asked

    def is_safe(self) -> bool:
        """What the two proofs say, which must be one thing."""
        flows = self.flows
        bit_by_bit = self.prover.prove(self.state, self.bridge, self.ports, flows)
        anew = prove(self.state, self.bridge, self.ports, flows.values())
        assert bool(bit_by_bit) == bool(anew), f"{list(map(str, bit_by_bit))} is not {list(map(str, anew))}"
        return not anew

    def leaks(self, packets: int) -> Iterator[str]:
        """Packets that go where they must not, by flows that others have taught the switch, too."""
        flows = self.flows
        if not flows:
            return
        policy = Policy(self.state, self.bridge, self.ports, Ports())
        headers = Headers(self.rng, self.state, self.bridge, self.ports, flows.values())
        walker = Walker(flows.values())
        near, taught = list(self.extra.values()), set()
        for _ in range(packets):
            in_port, header = headers.some(near)
            header |= bits(fields.IP_TTL, self.rng.choice((0, 1, 2, 64)))[0]
            way = walker.follow(in_port, header, iter([self.rng.choice(CT_STATES) for _ in range(3)]))
            for port, after in way.sent:
                rewritten = port != fields.IN_PORT and any(get(after, f) != get(header, f) for f in TOLD_APART)
                if port == ANYWHERE or rewritten or not policy.allows(in_port, port, header):
                    yield f"from {in_port} by {port}: {header:#x} {[str(step.flow) for step in way.steps]}"
            for learned in way.learned:
                for flow in walker.explorer.could_install(learned, in_port):
                    if (flow.key, flow.actions) not in taught:
                        taught.add((flow.key, flow.actions))
                        walker.explorer.rules.add(flow)
                        near.append(flow)


def _moved(action: Action, tables: list[int]) -> Action:
    if isinstance(action, Resubmit):
        return Resubmit(tables[action.table])
    if isinstance(action, Ct) and action.table is not None:
        return replace(action, table=tables[action.table])
    return action


def test_no_packet_walks_where_the_proof_says_that_none_can() -> None:
    verdicts = [0, 0]
    for seed in range(SEEDS):
        history = History(seed)
        for _ in range(6):
            kept = dict(history.extra), set(history.lost), dict(history.compiled)
            history.change()
            safe = history.is_safe()
            verdicts[safe] += 1
            if safe:
                found = next(history.leaks(40), None)
                assert found is None, f"history {seed}: {found}"
            else:
                history.extra, history.lost, history.compiled = kept  # what is kept of a proof needs a sound one
                history.is_safe()
    assert min(verdicts) > SEEDS / 4, verdicts
