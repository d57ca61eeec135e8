"""The proof: no packet leaves a bridge in a way that its policy does not allow.

`prove` follows everything that can enter by any port, merged; what that finds it follows again without merging, and
answers with a concrete packet. It fails closed: what cannot be decided is a finding too. Imports explore and policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from controller import fields
from controller.events import JSON
from controller.flow import Flow
from controller.frame import Port
from controller.model import Bridge, DesiredState
from controller.problems import BulkheadError
from controller.verify.cubes import Exhausted, witness
from controller.verify.explore import ANYWHERE, Explorer, Learned, Region, Sent, TooLarge
from controller.verify.policy import ANY_ARP, Policy, Senders, both
from controller.verify.rules import OTHER, Ports, Rule, Rules
from controller.verify.space import ALL, ENTERING, Cube, get, inside, meet

PATH_STEPS = 20_000
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


class Unsafe(BulkheadError):
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


def prove(state: DesiredState, bridge: Bridge, ports: Mapping[str, Port], flows: Iterable[Flow]) -> tuple[Finding, ...]:
    """What is wrong with `flows` on `bridge`: nothing, if they do no more than `state` allows. At most `MOST` findings."""
    return _Proof(state, bridge, ports, flows).findings()


class _Proof:
    def __init__(self, state: DesiredState, bridge: Bridge, there: Mapping[str, Port], flows: Iterable[Flow]) -> None:
        self.bridge = bridge.name
        self.ports = Ports()
        self.policy = Policy(state, bridge, there, self.ports)
        self.rules = Rules(flows, self.ports)
        self.explorer = Explorer(self.rules, self._owned, self._instances)

    def findings(self) -> tuple[Finding, ...]:
        out: list[Finding] = []
        try:
            suspects = self._suspects()
        except (TooLarge, Exhausted) as exc:
            return (Finding(self.bridge, f"isolation could not be proved: {exc}"),)
        seen: set[tuple[int, int]] = set()
        for port, sent, minus, from_port in suspects:
            if (from_port, port) in seen:
                continue
            seen.add((from_port, port))
            try:
                found = self._confirm(port, sent, minus, from_port)
            except (TooLarge, Exhausted) as exc:
                found = Finding(self.bridge, f"isolation could not be proved: {exc}")
            if found is not None:
                out.append(found)
                if len(out) >= MOST:
                    break
        return tuple(out)

    def _suspects(self) -> list[tuple[int, Sent, tuple[Cube, ...], int]]:
        """(port out, what was sent, what is allowed, port in) of everything the merged exploration cannot excuse."""
        start = Region(self.ports.all | OTHER, ENTERING)
        out = []
        for sent in self.explorer.reach(start):
            for port in self._receivers(sent):
                out += [(port, sent, allowed, number) for number, allowed in self._excess(port, sent)]
        return out

    def _receivers(self, sent: Sent) -> list[int]:
        if sent.port == ANYWHERE:
            return [number for number in self.ports.numbers(self.ports.all) if number >= 0]
        return [sent.port]

    def _excess(self, port: int, sent: Sent) -> Iterator[tuple[int, tuple[Cube, ...]]]:
        """The ports in from which packets may leave by `port` that must not, with what they may send."""
        region = sent.region
        if port == (fields.IN_PORT & 0xFFFFFFFF):
            if not inside(region.cube, ANY_ARP):
                for number in self.ports.numbers(region.ports):
                    yield number, (ANY_ARP,)
            return
        left = region.ports & ~self.ports.one(port)  # output to the port it came in by is skipped
        for receives in self.policy.receives.get(port, ()):
            group = left & receives.ports
            if not group or not region.owned:
                continue
            if any(self._meets(region, cube) for cube in receives.but):
                continue
            others = [r for r in self.policy.receives[port] if r.ports & group == group]
            among = [cube for r in others for cube in r.among if not any(self._meets(region, b) for b in r.but)]
            if witness(region.cube, [*region.minus, *among]) is None:
                left &= ~group
        for number in self.ports.numbers(left):
            yield number, ()

    @staticmethod
    def _meets(region: Region, cube: Cube) -> bool:
        common = meet(region.cube, cube)
        return common is not None and witness(common, region.minus) is not None

    def _forbidden(self, port: int, number: int) -> Iterator[tuple[Cube, tuple[Cube, ...]]]:
        """What must not go from `number` to `port`, as cubes with what is taken from each."""
        if port == fields.IN_PORT:
            yield ALL, (ANY_ARP,)
            return
        senders = self.policy.senders.get(number, Senders(()))
        yield ALL, senders.among
        for cube in senders.but:
            yield cube, ()
        bit = self.ports.one(number) if number >= 0 else OTHER
        mine = [r for r in self.policy.receives.get(port, ()) if r.ports & bit]
        yield ALL, tuple(cube for r in mine for cube in r.among)
        for receives in mine:
            for cube in receives.but:
                for among in receives.among:
                    common = meet(cube, among)
                    if common is not None:
                        beside = tuple(c for r in mine if r is not receives for c in r.among)
                        yield common, beside

    def _confirm(self, port: int, sent: Sent, minus: tuple[Cube, ...], number: int) -> Finding | None:
        bit = self.ports.one(number) if number >= 0 else OTHER
        for cube, beside in self._forbidden(port, number):
            start = Region(bit, both(cube, ENTERING), beside)
            if beside and witness(cube, beside) is None:
                continue
            for found, way in self.explorer.paths(start, PATH_STEPS):
                if found.port not in (port, ANYWHERE):
                    continue
                header = witness(found.region.cube, found.region.minus)
                if header is not None:
                    return self._finding(number, port, header, way)
        return None

    def _finding(self, number: int, port: int, header: int, way: tuple[Rule | None, ...]) -> Finding:
        source = self.policy.name(number) if number >= 0 else "an undeclared port"
        target = "the port it came in by" if port == fields.IN_PORT else self.policy.name(port)
        given = number if number >= 0 else self.ports.unused()
        packet = words(given, header)
        flows = tuple(rule.flow for rule in way if rule is not None)
        text = f"a packet from {source} can leave by {target}, and nothing in the state allows it"
        return Finding(self.bridge, text, Counterexample(source, target, packet, flows))

    # --------------------------------------------------------------------------------------------------- for explorer

    def _owned(self, region: Region) -> bool:
        if region.ports & (region.ports - 1) or region.ports == OTHER:
            return False
        number = self.ports.numbers(region.ports)[0]
        senders = self.policy.senders.get(number)
        if senders is None or not any(inside(region.cube, cube) for cube in senders.among):
            return False
        taken = set(region.minus)
        for cube in senders.but:
            common = meet(region.cube, cube)
            if common is None or cube in taken or any(inside(common, m) for m in taken):
                continue
            return False
        return True

    def _instances(self, learned: Learned) -> Iterator[Flow]:
        def own(number: int) -> list[Cube]:
            senders = self.policy.senders.get(number)
            return list(senders.among) if learned.region.owned and senders is not None else [ALL]

        return self.explorer.could_install(learned, own)


def words(in_port: int, header: int) -> str:
    """A packet in ovs-ofctl words, as `ofproto/trace` takes it."""
    eth_type, proto = get(header, fields.ETH_TYPE), get(header, fields.IP_PROTO)
    out = [f"in_port={'LOCAL' if in_port == 0xFFFE else in_port}"]
    out += [f"dl_{n}={f.show(get(header, f))}" for n, f in (("src", fields.ETH_SRC), ("dst", fields.ETH_DST))]
    if get(header, fields.VLAN_VID) & 0x1000:
        out.append(f"vlan_tci={get(header, fields.VLAN_VID):#x}")
    keyword = {6: "tcp", 17: "udp", 1: "icmp", 132: "sctp"}.get(proto) if eth_type == 0x0800 else None
    if keyword:
        out.insert(1, keyword)
    elif eth_type == 0x0806:
        out.insert(1, "arp")
        out.append(f"arp_op={get(header, fields.ARP_OP)}")
    else:
        out.append(f"dl_type={eth_type:#06x}")
        out += [f"nw_proto={proto}"] if eth_type in (0x0800, 0x86DD) else []
    if eth_type in (0x0800, 0x0806):
        for name, of in (("src", fields.IPV4_SRC), ("dst", fields.IPV4_DST)):
            prefix = "nw" if eth_type == 0x0800 else "arp"
            label = {"src": "spa", "dst": "tpa"}[name] if prefix == "arp" else name
            out.append(f"{prefix}_{label}={of.show(get(header, of))}")
    if fragment := get(header, fields.IP_FRAG) & 3:
        out.append(f"nw_frag={'later' if fragment == 3 else 'first'}")
    elif keyword:
        names = ("icmp_type", "icmp_code") if keyword == "icmp" else ("tp_src", "tp_dst")
        out += [f"{n}={get(header, f)}" for n, f in zip(names, (fields.TCP_SRC, fields.TCP_DST), strict=True)]
    return ",".join(out)
