"""The proof: no packet leaves a bridge in a way that its policy does not allow.

`prove` follows everything that can enter by any port, merged; what that finds it follows again without merging, and
answers with a concrete packet. It fails closed: what cannot be decided is a finding too. Imports explore and policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from controller import fields
from controller.events import JSON
from controller.flow import Flow, FlowKey
from controller.frame import Port
from controller.model import Bridge, DesiredState
from controller.problems import NotAllowed
from controller.verify.cubes import Exhausted, Meter, empty, witness
from controller.verify.explore import ANY_ZONE, ANYWHERE, Explorer, Learned, Region, Sent, TooLarge, is_kept, kept_in
from controller.verify.packetwords import words
from controller.verify.policy import ANY_ARP, NONE, Policy, Receives, Senders, both
from controller.verify.reached import Outdated, Reached
from controller.verify.rules import ALIKE, OTHER, Ports, Rule, Rules
from controller.verify.space import ALL, ENTERING, Cube, CubeSet, bits, inside, meet

PATH_STEPS = 20_000
"""So many steps are taken to find one counterexample,"""
CONFIRM_STEPS = 400_000
"""and so many for all of them."""
ENOUGH = 64
"""So many suspects are looked at before the rest is looked for."""
LEAST_WORK, WORK_A_FLOW = 2_000_000, 400
"""Steps that a proof may take, about a million a second: our own flows take 100 each, others' overlap more."""
NO_SENDERS = Senders(NONE)
MOST = 5
"""So many findings are told; there is no end to them where everything is open."""


@dataclass(frozen=True, slots=True)
class Counterexample:
    """A packet that goes where it must not: `packet` in ovs-ofctl words, the flows on its way, the ports by name."""

    in_port: str
    out_port: str
    packet: str
    way: tuple[Flow, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that isolation does not hold for. Without a counterexample it could not be decided: `text` says why."""

    bridge: str
    text: str
    counterexample: Counterexample | None = None

    @property
    def ports(self) -> tuple[str, str]:
        """Where from and where to, both empty if it could not be decided."""
        example = self.counterexample
        return (example.in_port, example.out_port) if example is not None else ("", "")

    def as_data(self) -> JSON:
        """The finding as plain JSON values."""
        found: dict[str, JSON] = {"bridge": self.bridge, "text": self.text}
        if self.counterexample is not None:
            example = self.counterexample
            found |= {"packet": example.packet, "in_port": example.in_port, "out_port": example.out_port}
            found["way"] = [str(flow) for flow in example.way]
        return found

    def __str__(self) -> str:
        if self.counterexample is None:
            return f"{self.bridge}: {self.text}"
        way = "\n".join(f"    {flow}" for flow in self.counterexample.way)
        return f"{self.bridge}: {self.text}\n  packet {self.counterexample.packet}\n{way}"


class Unsafe(NotAllowed):
    """The flows of a state would let something through that nothing allows."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        self.findings = findings
        super().__init__(
            "the flows of this state would open a path that the state does not allow:\n"
            + "\n".join(f"  {finding}" for finding in findings)
        )

    def as_data(self) -> list[JSON]:
        """The findings as plain JSON values."""
        return [finding.as_data() for finding in self.findings]


def _most_work(flows: int) -> float:
    return max(LEAST_WORK, WORK_A_FLOW * flows)


def prove(
    state: DesiredState, bridge: Bridge, ports: Mapping[str, Port], flows: Iterable[Flow], *, most: int = MOST
) -> tuple[Finding, ...]:
    """What is wrong with `flows` on `bridge`: nothing, if they do no more than `state` allows. At most `most` findings."""
    proof = _Proof(state, bridge, ports, {flow.key: flow for flow in flows}, most)
    found = proof.findings()
    proof.release()
    return found


def learnable(
    state: DesiredState, bridge: Bridge, ports: Mapping[str, Port], flows: Iterable[Flow]
) -> tuple[Flow, ...]:
    """Every flow that any packets could make `flows` learn; perhaps a few more. Raises `TooLarge` or `Exhausted`."""
    proof = _Proof(state, bridge, ports, {flow.key: flow for flow in flows})
    proof.follow()
    found = proof.reached.learnable()
    proof.release()
    return found


class Prover:
    """Proves one bridge's flows again and again; what has not changed since the last proof is not looked at again."""

    def __init__(self) -> None:
        self._proof: _Proof | None = None
        self.spent = 0.0
        """Steps that the last proof took, about a million a second, or a third of that for flows of many shapes."""

    def prove(
        self, state: DesiredState, bridge: Bridge, ports: Mapping[str, Port], flows: Mapping[FlowKey, Flow]
    ) -> tuple[Finding, ...]:
        """As `prove` on all of it: what the last proof leaves in doubt is decided by a whole one."""
        proof, self._proof = self._proof, None
        if proof is not None and proof.bridge == bridge.name and not proof.is_worn():
            try:
                self.spent = 0.0
                proof.change(state, bridge, ports, flows)
                self.spent = proof.explorer.meter.spent
                if not proof.suspects:
                    self._proof = proof
                    return ()
            except (Outdated, TooLarge, Exhausted):
                pass
        if proof is not None:
            proof.release()
        proof = _Proof(state, bridge, ports, flows)
        found = proof.findings()
        self.spent = proof.explorer.meter.spent
        if found:
            proof.release()
        else:
            self._proof = proof
        return found

    def __del__(self) -> None:
        if self._proof is not None:
            self._proof.release()

    def could_learn(self, flow: Flow) -> bool:
        """Whether the flows that were proved last could make the switch learn this one: it is proved with them."""
        return self._proof is not None and self._proof.reached.could_learn(flow)


_TOLD_APART = both(
    *(bits(of, 0) for of in (fields.ETH_TYPE, fields.VLAN_VID, fields.IPV4_SRC, fields.IPV4_DST, fields.IP_PROTO)),
    *(bits(of, 0) for of in (fields.TCP_SRC, fields.TCP_DST)),
)[1]
"""What a policy compares. It judges a packet as it came in, so no flow may write over this before the packet leaves."""


def _rewrites(sent: Sent) -> bool:
    overlay = sent.overlay
    return bool((overlay.mask | overlay.unknown | overlay.copied) & _TOLD_APART)


def _allowed(receives: Sequence[Receives], sent: Sent) -> list[Receives]:
    """Those that what connection tracking has said of the packets satisfies."""
    said = sent.overlay.value, sent.overlay.mask
    return [may for may in receives if inside(said, may.tracked)]


def _refused(receives: Sequence[Receives]) -> Iterator[tuple[Cube, tuple[Cube, ...]]]:
    """What none of `receives` lets out, as cubes with what is taken from each.

    Each refuses what is in none of its `among`, and what is in one of its `but`: so a packet that two of them except is
    refused though it is among what both allow.
    """
    stack: list[tuple[int, Cube, tuple[Cube, ...]]] = [(0, ALL, ())]
    while stack:
        at, cube, beside = stack.pop()
        if at == len(receives):
            yield cube, beside
            continue
        may = receives[at]
        among = tuple(c for c in may.among if meet(c, cube) is not None)
        if not among or any(inside(cube, but) for but in may.but):
            stack.append((at + 1, cube, beside))
            continue
        excepted = [common for but in may.but if (common := meet(cube, but)) is not None]
        stack += [(at + 1, common, beside) for common in reversed(excepted)]
        stack.append((at + 1, cube, (*beside, *among)))


class _Forbidden(NamedTuple):
    """Packets of `cube` that are in none of `beside`, but for those that one of `tracked` allows for their connection."""

    cube: Cube
    beside: tuple[Cube, ...]
    tracked: tuple[Receives, ...] = ()


class _Suspect(NamedTuple):
    """Packets that the kept regions cannot excuse: from port `number`, out of `port`."""

    port: int
    number: int


class _Enough(Exception):
    """So much is in doubt already that it should be looked at before going on."""


class _Proof:
    def __init__(
        self,
        state: DesiredState,
        bridge: Bridge,
        there: Mapping[str, Port],
        flows: Mapping[FlowKey, Flow],
        most: int = MOST,
    ) -> None:
        self.bridge = bridge.name
        self.most = most
        self.ports = Ports()
        self.policy = Policy(state, bridge, there, self.ports)
        self.flows = flows
        self.rules = Rules((), self.ports)
        self.by_key = {key: self.rules.add(flow) for key, flow in flows.items()}
        self.explorer = Explorer(self.rules, self._owned, meter=Meter(_most_work(len(flows))))
        self.reached = Reached(self.explorer, self._judge, self._could_learn)
        self.suspects: dict[_Suspect, None] = {}
        self._enough: int | None = None
        self._entering = self.ports.all

    def release(self) -> None:
        """Forget everything. Its parts hold each other: this gives their memory back at once, and there is much of it."""
        self.reached.release()
        vars(self).clear()

    def is_worn(self) -> bool:
        """Whether so many port numbers have come and gone that it is better to begin anew."""
        return len(self.ports) > 2 * len(self.policy.names) + 1000

    def findings(self) -> tuple[Finding, ...]:
        """Prove everything."""
        try:
            try:
                self.follow(ENOUGH)
            except _Enough:
                # Flows that leave everything open are not followed to the end where a few examples will do.
                if found := self._confirmed():
                    return found
                self.follow()
        except (TooLarge, Exhausted) as exc:
            return self._confirmed() or (Finding(self.bridge, f"isolation could not be proved: {exc}"),)
        return self._confirmed()

    def _confirmed(self) -> tuple[Finding, ...]:
        out: list[Finding] = []
        budget = [CONFIRM_STEPS]
        for suspect in sorted(self.suspects, key=lambda suspect: suspect.port == ANYWHERE):
            if suspect.port == ANYWHERE and out:
                break  # a port by name tells more
            try:
                found = self._confirm(suspect.port, suspect.number, budget)
            except (TooLarge, Exhausted) as exc:
                found = Finding(self.bridge, f"isolation could not be proved: {exc}")
            if found is not None:
                out.append(found)
                if len(out) >= self.most or budget[0] <= 0:
                    break
        return tuple(out)

    def follow(self, enough: int | None = None) -> None:
        """Follow everything that can enter, and note what is suspect."""
        self._enough = enough
        while True:
            self.explorer.layout = None
            self.suspects.clear()
            self.reached = Reached(self.explorer, self._judge, self._could_learn)
            try:
                self.reached.start(Region(self.ports.all | OTHER, ENTERING))
                return
            except Outdated:  # by what could be learned: that is known now, so this ends
                continue

    def change(
        self, state: DesiredState, bridge: Bridge, there: Mapping[str, Port], flows: Mapping[FlowKey, Flow]
    ) -> None:
        """Prove what is different now. Raises `Outdated` where that cannot be told apart, `TooLarge`, `Exhausted`."""
        old, alike = self.policy, self.ports.alike
        self.explorer.meter = Meter(_most_work(len(flows)))
        self.policy = Policy(state, bridge, there, self.ports, old)
        before, self.flows = self.flows, flows
        gone, new = [], []
        for key, flow in flows.items():
            known = before.get(key)
            if known is not flow and known != flow:
                new.append((key, flow))
        if len(before) + len(new) > len(flows) or any(key in before for key, _ in new):
            changed = dict(new)
            gone = [self.by_key.pop(key) for key in before if key not in flows or key in changed]
        others = alike ^ self.ports.alike
        if others and alike.bit_count() < 2:
            # What went from those alike to the only one of them was the port it came in by, which is skipped, and for
            # none of them nothing was judged at all. Another one would be taken for judged with them.
            raise Outdated
        lost: list[Region] = []
        more: list[int] = []
        for number in self.policy.senders.keys() | old.senders.keys():
            was, now = old.senders.get(number), self.policy.senders.get(number)
            if was is None or now is None or not was.among.within(now.among):
                others |= self.ports.one(number) if was != now else 0
                continue
            # What may not come from there any more is followed by itself, as nobody's own. Kept regions that hold such
            # packets as their port's own do no harm: wherever these really get to they are in this one's too.
            lost += [Region(self.ports.one(number), both(c, ENTERING)) for c in now.but.beyond(was.but)]
            more += [number] if was.among != now.among else []
        self.reached.forget(others)
        added = self.reached.change(gone, [flow for _, flow in new])
        self.by_key |= {rule.flow.key: rule for rule in added}
        entering = self.ports.all & ~self._entering | others
        if entering:
            self._entering |= entering
            self.reached.enter(Region(entering, ENTERING))
        self.reached.again(lost)
        for number in more:
            self.reached.learn_again(number)
        self.reached.judge_again(ANYWHERE)  # to ports that are new too
        self.reached.judge_again(ANY_ZONE)
        for number in self.policy.receives.keys() | old.receives.keys():
            before_, may = old.receives.get(number, ()), self.policy.receives.get(number, ())
            # To keep connections is nobody's affair until a grant rests on them.
            less = is_kept(number) or not all(any(a.within(b) for b in may) for a in before_)
            if before_ is not may and before_ != may and less:
                self.reached.judge_again(number)

    def _judge(self, sent: Sent) -> None:
        for port in self._receivers(sent):
            for number in self._excess(port, sent):
                self.suspects[_Suspect(port, number)] = None
                if self._enough is not None and len(self.suspects) >= self._enough:
                    raise _Enough

    def _receivers(self, sent: Sent) -> list[int]:
        if sent.port == ANYWHERE:
            return [*(number for number in self.ports.numbers(self.ports.all) if number >= 0), ANYWHERE]
        if is_kept(sent.port):  # in zones that no grant rests on anything may be kept
            zones = [number for number in self.policy.receives if is_kept(number)]
            return [sent.port] if zones and sent.port in (ANY_ZONE, *zones) else []
        return [sent.port]

    def _excess(self, port: int, sent: Sent) -> Iterator[int]:
        """The ports in from which packets may leave by `port` that must not."""
        region = sent.region
        if port == ANYWHERE:
            # Nobody receives this: a bridge may get a port that we are not told of, an action that we do not know may
            # do more than send, and a flow that writes the ingress port may send back to the real one.
            yield from self.ports.numbers(region.ports)
            return
        if port == (fields.IN_PORT & 0xFFFFFFFF):
            if not inside(region.cube, ANY_ARP):
                yield from self.ports.numbers(region.ports)
            return
        # Output to the port it came in by is skipped.
        left = self.ports.fold(region.ports if is_kept(port) else region.ports & ~self.ports.one(port))
        allowed = _allowed(self.policy.receives.get(port, ()), sent) if region.owned and not _rewrites(sent) else ()
        for receives in allowed:
            group = left & receives.ports
            if not group or any(self._meets(region, cube) for cube in receives.but):
                continue
            if receives.among.holds(region.cube):
                left &= ~group
                continue
            others = [r for r in allowed if r.ports & group == group]
            among = [cube for r in others for cube in r.among if not any(self._meets(region, b) for b in r.but)]
            if empty(region.cube, [*region.minus, *among], self.explorer.meter):
                left &= ~group
        if left:
            numbers = self.ports.numbers(region.ports)
            yield from (n for n in numbers if n != port and self.ports.fold(self._bit(n)) & left)

    def _bit(self, number: int) -> int:
        return self.ports.one(number) if number >= 0 else OTHER

    def _meets(self, region: Region, cube: Cube) -> bool:
        common = meet(region.cube, cube)
        return common is not None and not empty(common, region.minus, self.explorer.meter)

    def _forbidden(self, port: int, number: int) -> Iterator[_Forbidden]:
        """What must not go from `number` to `port`."""
        if port == fields.IN_PORT:
            yield _Forbidden(ALL, (ANY_ARP,))
            return
        senders = self.policy.senders.get(number, NO_SENDERS)
        yield _Forbidden(ALL, tuple(senders.among))
        for cube in senders.but:
            yield _Forbidden(cube, ())
        bit = self.ports.fold(self._bit(number))
        mine = [r for r in self.policy.receives.get(port, ()) if r.ports & bit]
        tracked = tuple(r for r in mine if r.tracked != ALL)
        for cube, beside in _refused([r for r in mine if r.tracked == ALL]):
            yield _Forbidden(cube, beside, tracked)

    def _confirm(self, port: int, number: int, budget: list[int]) -> Finding | None:
        bit = self._bit(number)
        for cube, beside, tracked in self._forbidden(port, number):
            start = Region(bit, both(cube, ENTERING), beside)
            if beside and empty(cube, beside, self.explorer.meter):
                continue
            for found, way in self.explorer.paths(start, PATH_STEPS, budget):
                if found.port not in (port, ANYWHERE):
                    continue
                excused = (c for may in _allowed(tracked, found) for c in may.among)
                header = witness(found.region.cube, (*found.region.minus, *excused), self.explorer.meter)
                if header is not None:
                    return self._finding(number, port, header, way)
        return self._confirm_rewritten(port, number, budget)

    def _confirm_rewritten(self, port: int, number: int, budget: list[int]) -> Finding | None:
        """A packet that leaves as another than came in, though this one may."""
        if port == fields.IN_PORT:
            return None  # an answer to ARP is the question rewritten
        for found, way in self.explorer.paths(Region(self._bit(number), ENTERING), PATH_STEPS, budget):
            if found.port in (port, ANYWHERE) and _rewrites(found):
                header = witness(found.region.cube, found.region.minus, self.explorer.meter)
                if header is not None:
                    finding = self._finding(number, port, header, way)
                    return replace(finding, text=f"{finding.text}: flows have written other addresses into it")
        return None

    def _finding(self, number: int, port: int, header: int, way: tuple[Rule | None, ...]) -> Finding:
        source = self.policy.name(number) if number >= 0 else "an undeclared port"
        special = {fields.IN_PORT: "the port it came in by", ANYWHERE: "any port there may be"}
        target = special.get(port) or self.policy.name(port)
        leaves = "leave by"
        if is_kept(port):
            zone = "of any zone" if port == ANY_ZONE else f"of zone {kept_in(port)}"
            target, leaves = f"the connections {zone}", "be kept among"
        given = number if number >= 0 else self.ports.unused()
        packet = words(given, header)
        flows = tuple(rule.flow for rule in way if rule is not None)
        text = f"a packet from {source} can {leaves} {target}, and nothing in the state allows it"
        return Finding(self.bridge, text, Counterexample(source, target, packet, flows))

    # --------------------------------------------------------------------------------------------------- for explorer

    def _owned(self, region: Region) -> bool:
        if region.ports & (region.ports - 1) or region.ports in (OTHER, ALIKE):
            return False
        senders = self.policy.senders.get(self.ports.numbers(region.ports)[0])
        if senders is None or not senders.among.holds(region.cube):
            return False
        taken = CubeSet(region.minus)
        common = (meet(region.cube, cube) for cube in senders.but)
        return all(cube is None or taken.holds(cube) for cube in common)

    def _could_learn(self, learned: Learned, number: int) -> Iterator[Flow]:
        senders = self.policy.senders.get(number) if learned.region.owned else None
        return self.explorer.could_install(learned, number, senders.among if senders is not None else (ALL,))
