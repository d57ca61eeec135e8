"""The controller without I/O: signals in, effects out, time as an argument.

`Core.handle(signal, now)` is the whole interface; it never raises for anything a switch or a file can contain. It
knows the desired state, one `Reconciler` and one `Offenders` per connected switch, and puts what happens into events.
Imports everything below the shell, and neither os-ken's controller nor any clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from apps.learning import is_path
from apps.packet_in import QUIET_S
from controller import packets, status
from controller.codec import FlowStats, PacketIn
from controller.compile import BridgeCompiler, Compiled, Conflict, Names, Sealing, sealed_port, undeclared
from controller.events import JSON, Kind
from controller.frame import Port, object_id
from controller.grants import Opening, openings, passage_ports, why_not, zones
from controller.model import Bridge, BridgeKind, DesiredState
from controller.pipeline import REFUSED
from controller.reconcile import Applied, Phase, Reconciler
from controller.signals import (
    AddFlow,
    BridgeFacts,
    Committed,
    Count,
    Counted,
    Dumped,
    Effect,
    EgressHealth,
    FactsSeen,
    FlowGone,
    FlowsChanged,
    PacketSeen,
    PortChanged,
    Refused,
    Seal,
    SendPacket,
    Signal,
    StateLoaded,
    StateRejected,
    SwitchDown,
    SwitchError,
    SwitchUp,
    Tick,
    Unseal,
)
from controller.switch import Switch, dpid_words, is_real, name_of
from controller.verify.gate import try_proof
from controller.verify.prove import Finding, Unsafe
from controller.watch import Watch
from controller.wording import Wording

CONTESTED_S = 3.0
"""A switch whose name is declared but seems to be another's is left as it is so long: OVSDB may lag behind it, as when
a bridge's datapath-id changes with its ports, and its flows are not to be lost to that."""

Effects = list[Effect]


class Core:
    """All that the controller decides."""

    def __init__(self, state: DesiredState, *, seal: bool = False) -> None:
        self.state = state
        self.seal = seal
        self._watches: dict[int, Watch] = {}
        self._sealed: dict[str, dict[str, Sealing]] = {}
        self.wording = Wording(state, Names([state]))
        self.switches: dict[int, Switch] = {}
        self.facts: dict[str, BridgeFacts] = {}
        self._warned: dict[tuple[str, str], str] = {}
        self._unhealthy: set[str] = set()
        self._known: set[int] = set()
        self._handlers: dict[type, Callable[..., Effects]] = {
            SwitchUp: self._switch_up,
            SwitchDown: self._switch_down,
            Dumped: self._dumped,
            Committed: self._committed,
            Refused: self._refused,
            PortChanged: self._port_changed,
            FlowsChanged: self._flows_changed,
            FlowGone: self._flow_gone,
            PacketSeen: self._packet_seen,
            Counted: self._counted,
            StateLoaded: self._state_loaded,
            StateRejected: self._state_rejected,
            FactsSeen: self._facts_seen,
            EgressHealth: self._egress_health,
            SwitchError: self._switch_error,
            Seal: self._seal,
            Unseal: self._unseal,
            Tick: self._tick,
        }

    def handle(self, signal: Signal, now: float) -> Effects:
        """What to do about `signal` at `now` (seconds of a monotonic clock)."""
        return self._handlers[type(signal)](signal, now)

    # ------------------------------------------------------------------------------------------------------ switches

    def _switch_up(self, up: SwitchUp, now: float) -> Effects:
        fact = next((fact for fact in self.facts.values() if fact.dpid == up.dpid), None)
        name = fact.name if fact else up.local_name
        bridge, trouble = self._recognise(up.dpid, name)
        # A number is one port's: two of one number would contradict each other in the flows.
        told = {port.number: port for port in up.ports if is_real(port)}
        ports = {name_of(port): replace(port, name=name_of(port)) for port in told.values()}
        compiler = BridgeCompiler()
        switch = Switch(up.dpid, name, bridge, ports, Reconciler(up.dpid, undeclared(name)), compiler)
        switch.flows.was_ours = up.dpid in self._known
        self.switches[up.dpid] = switch
        self._watches[up.dpid] = Watch()
        out: Effects = [
            self.wording.log(
                Kind.SWITCH_UP,
                f"{name} connected with {len(up.ports)} ports",
                switch,
                data={"dpid": dpid_words(up.dpid)},
            )
        ]
        if trouble:
            out.append(self.wording.log(Kind.UNKNOWN_BRIDGE, trouble, switch, data={"dpid": dpid_words(up.dpid)}))
        out += self._warnings()
        out += self._note_egress(switch)
        switch.flows.desired = self._compile_or_keep(switch, out)
        claimed = self.state.bridge(name)
        if bridge is None and claimed is not None and claimed.datapath_id is None:
            switch.flows.hold(now + CONTESTED_S)
            return out
        return out + switch.flows.start(now)

    def _recognise(self, dpid: int, name: str) -> tuple[Bridge | None, str]:
        for bridge in self.state.bridges:
            if bridge.datapath_id == dpid:
                return bridge, ""
        found = self.state.bridge(name)
        if found is None:
            return None, (
                f"{name} is not declared in the state file: what no flow of somebody else's forwards there is dropped. "
                f"Declare it under `bridges`, or take it off this controller: ovs-vsctl del-controller {name}"
            )
        if found.datapath_id is not None:
            return None, (
                f"{name} has datapath-id {dpid_words(dpid)}, but {dpid_words(found.datapath_id)} is declared; it is treated as "
                f"unknown. Mend it: ovs-vsctl set bridge {name} other-config:datapath-id={dpid_words(found.datapath_id)}"
            )
        fact = self.facts.get(name)
        if fact is not None and fact.dpid not in (dpid, 0):  # 0: the bridge is too new to have told OVSDB
            return None, (
                f"a switch with datapath-id {dpid_words(dpid)} claims to be {name}, which OVSDB says is {dpid_words(fact.dpid)}; "
                "it is treated as unknown. Find out what connects here: ss -tnp"
            )
        if any(s.bridge == found and s.dpid != dpid for s in self.switches.values()):
            return None, f"a second switch claims to be {name}; it is treated as unknown"
        return found, ""

    def _switch_down(self, down: SwitchDown, now: float) -> Effects:
        switch = self.switches.pop(down.dpid, None)
        self._watches.pop(down.dpid, None)
        if switch is None:
            return []
        text = f"{switch.name} disconnected; its flows stay in force as long as ovs-vswitchd runs"
        return [self.wording.log(Kind.SWITCH_DOWN, text, switch), *self._recognise_again(now)]

    def _facts_seen(self, seen: FactsSeen, now: float) -> Effects:
        self.facts = {fact.name: fact for fact in seen.bridges}
        return self._warnings() + self._recognise_again(now)

    def _recognise_again(self, now: float) -> Effects:
        """Something has changed that tells which switch is which bridge."""
        out: Effects = []
        before = {switch.dpid: switch.bridge for switch in self.switches.values()}
        known = {fact.dpid: fact.name for fact in self.facts.values()}
        for switch in self.switches.values():
            switch.name = known.get(switch.dpid, switch.name)
            switch.bridge = None
        for switch in self.switches.values():
            switch.bridge, trouble = self._recognise(switch.dpid, switch.name)
            if switch.bridge != before[switch.dpid]:
                if trouble:
                    out.append(
                        self.wording.log(Kind.UNKNOWN_BRIDGE, trouble, switch, data={"dpid": dpid_words(switch.dpid)})
                    )
                out += self._note_egress(switch) + self._want(switch, now)
                if switch.flows.held and switch.bridge is not None:
                    out += switch.flows.start(now)
        return out

    def _warnings(self) -> Effects:
        out: Effects = []
        for name in sorted({switch.name for switch in self.switches.values()} & set(self.facts)):
            fact = self.facts[name]
            problems = {
                "fail-mode": fact.fail_mode != "secure"
                and f"{name} has fail mode {fact.fail_mode or 'standalone (the default)'}: without a controller it would "
                f"become a plain switch. Mend it: ovs-vsctl set-fail-mode {name} secure",
                "in-band": fact.in_band
                and f"{name} lets in-band control add hidden flows above every policy. Mend it: "
                f"ovs-vsctl set bridge {name} other-config:disable-in-band=true",
            }
            for what, text in problems.items():
                if not text:
                    self._warned.pop((name, what), None)
                elif (name, what) not in self._warned:
                    self._warned[name, what] = text
                    out.append(self.wording.log(Kind.SWITCH_WARNING, text, self.by_name(name), data={"problem": what}))
        return out

    def by_name(self, name: str) -> Switch | None:
        """The switch that is that bridge, rather than one that only claims the name."""
        named = [switch for switch in self.switches.values() if switch.name == name]
        return next((switch for switch in named if switch.bridge is not None), named[0] if named else None)

    def waiting(self) -> dict[str, str]:
        """Networks whose bridges do not all hold the flows they should, each with the reason."""
        out = {}
        for bridge in self.state.bridges:
            if why := self._unready(bridge.name):
                out[bridge.network] = why
        return out

    def waiting_grants(self, ended: Iterable[str] = ()) -> dict[str, str]:
        """Grants that are not open on both of their bridges yet, and those of `ended` that are not shut on all, by id,
        each with the reason."""
        out = {grant.id: f"refused: {why}" for grant in self.state.grants if (why := why_not(self.state, grant))}
        unready = {n: why for n in zones(self.state) if (why := self._unready(n))}
        cells = {o.cell: self._not_open(o, unready) for o in openings(self.state)}
        for grant in self.state.grants:
            if grant.id not in out and (why := cells[grant.source, grant.target, grant.protocol, grant.port]):
                out[grant.id] = why
        held = {number for switch in self.switches.values() for number in switch.granted}
        for grant_id in ended:
            if why := next(iter(unready.values()), ""):
                out[grant_id] = why
            elif object_id(f"grant/{grant_id}") in held and not self._is_open(grant_id):
                out[grant_id] = "its flows are not gone yet"
        return out

    def _not_open(self, opening: Opening, unready: Mapping[str, str]) -> str:
        wanted = object_id(f"grant/{opening.grant}")
        for name in (opening.source_bridge, opening.target_bridge):
            switch = self.by_name(name)
            if name in unready:
                return unready[name]
            assert switch is not None
            if missing := set(passage_ports(self.state, name).values()) & set(switch.missing):
                return f"the passage {missing.pop()} is not a port of {name} yet; does the agent run?"
            if wanted not in switch.granted:
                return f"{name} lacks the port of a container of it, or has not confirmed its flows yet"
        return ""

    def _is_open(self, grant_id: str) -> bool:
        return any(opening.grant == grant_id for opening in openings(self.state))

    def _unready(self, name: str) -> str:
        switch = self.by_name(name)
        if switch is None or switch.bridge is None:
            return f"bridge {name} is not connected"
        return "" if switch.flows.phase is Phase.STEADY else f"bridge {name} has not confirmed its flows yet"

    def _switch_error(self, error: SwitchError, now: float) -> Effects:
        return [self.wording.log(Kind.OPENFLOW_ERROR, error.text, self.switches.get(error.dpid))]

    # --------------------------------------------------------------------------------------------------------- state

    def _compile(self, switch: Switch) -> Compiled:
        if switch.bridge is None:
            return undeclared(switch.name)
        compiled = switch.compiler.compile(self.state, switch.bridge, switch.ports, switch.egress_up is not False)
        sealed = sorted(self._sealed.get(switch.name, {}).items())
        compiled = compiled.sealed({switch.ports[name].number: why for name, why in sealed if name in switch.ports})
        proved = (self.state, {name: port.number for name, port in switch.ports.items()}, compiled.flows)
        if switch.proved is None or switch.proved[0] is not self.state or switch.proved[1:] != proved[1:]:
            found = switch.prover.prove(self.state, switch.bridge, switch.ports, compiled.flows)
            if found:
                raise Unsafe(found)
            switch.proved = proved
        switch.missing = compiled.missing
        return compiled

    def _compile_or_keep(self, switch: Switch, out: Effects) -> Compiled:
        """What the switch should have; what it has so far, and an alarm, where that is not proved to be safe."""
        try:
            return self._compile(switch)
        except Unsafe as exc:
            text = f"{switch.name} keeps the flows it has: {exc}"
            out.append(self.wording.log(Kind.UNPROVED, text, switch, data={"findings": exc.as_data()}))
            return switch.flows.desired

    def _state_loaded(self, loaded: StateLoaded, now: float) -> Effects:
        """All or nothing: every bridge compiles with the new state, or the old one stays for all of them."""
        if self.state.networks and not loaded.state.networks:
            text = (
                f"{loaded.source} was refused, the old state stays in force: it declares no network, and every bridge "
                "would be shut. Mend the file; to give the bridges up, stop the controller"
            )
            return [self.wording.log(Kind.STATE_REJECTED, text, None)]
        old, before = self.state, {s.dpid: (s.bridge, s.egress_up) for s in self.switches.values()}
        self.state = loaded.state
        out: Effects = []
        try:
            desired = self._compile_all(out)
        except Exception as exc:
            self.state = old
            for dpid, (bridge, egress_up) in before.items():
                self.switches[dpid].bridge, self.switches[dpid].egress_up = bridge, egress_up
            if not isinstance(exc, Conflict | Unsafe):
                raise  # a defect of ours: it is told as one, and the old state stays too
            data: dict[str, JSON] | None = {"findings": exc.as_data()} if isinstance(exc, Unsafe) else None
            text = f"{loaded.source}: {exc}. The old state stays in force"
            return [self.wording.log(Kind.STATE_REJECTED, text, None, data=data)]
        self.wording = Wording(loaded.state, Names([old, loaded.state]))  # what is still installed is named too
        for dpid, compiled in desired.items():
            switch = self.switches[dpid]
            effects, applied = switch.flows.want(compiled, now)
            if loaded.whole and not effects and applied is None and switch.flows.phase is Phase.STEADY:
                applied = switch.flows.unchanged()
            out += [*effects, *self._say_applied(switch, applied)]
        return out

    def _compile_all(self, out: Effects) -> dict[int, Compiled]:
        """Recognise and compile every connected switch anew, and every other bridge for a trial.

        Raises `Conflict`, or `Unsafe` where the flows would do more than the state allows.
        """
        for switch in self.switches.values():
            switch.bridge = None
        for switch in self.switches.values():
            switch.bridge, _ = self._recognise(switch.dpid, switch.name)
            out += self._note_egress(switch)
        desired = {switch.dpid: self._compile(switch) for switch in self.switches.values()}
        try_proof(self.state, without={s.bridge for s in self.switches.values() if s.bridge is not None})
        return desired

    def _state_rejected(self, rejected: StateRejected, now: float) -> Effects:
        first = "; ".join(str(p) for p in rejected.problems[:3])
        more = f" (and {len(rejected.problems) - 3} more)" if len(rejected.problems) > 3 else ""
        text = f"{rejected.source} was refused, the old state stays in force: {first}{more}"
        problems = [p.as_dict() for p in rejected.problems[:20]]
        return [self.wording.log(Kind.STATE_REJECTED, text, None, data={"problems": problems})]

    def _want(self, switch: Switch, now: float) -> Effects:
        out: Effects = []
        effects, applied = switch.flows.want(self._compile_or_keep(switch, out), now)
        return [*out, *effects, *self._say_applied(switch, applied)]

    # --------------------------------------------------------------------------------------------------------- flows

    def _dumped(self, dumped: Dumped, now: float) -> Effects:
        switch = self.switches.get(dumped.dpid)
        if switch is None:
            return []
        switch.offenders.adopt(dumped.flows)
        out = self._adopt_seals(switch, dumped.flows)
        told = set(switch.flows.foreign)
        effects, applied = switch.flows.dumped(dumped.flows, now)
        out += self._say_applied(switch, applied)
        news = [flow for flow in switch.flows.foreign if flow not in told]
        out += [self.wording.foreign(switch, flow, "was there already") for flow in news]
        return out + effects

    def _committed(self, committed: Committed, now: float) -> Effects:
        switch = self.switches.get(committed.dpid)
        if switch is None:
            return []
        effects, applied = switch.flows.committed(committed.token, now)
        return self._say_applied(switch, applied) + effects

    def _refused(self, refused: Refused, now: float) -> Effects:
        switch = self.switches.get(refused.dpid)
        if switch is None:
            return []
        text = (
            f"{switch.name} refused the change: {refused.why}. Its flows are read again, and the change is tried again"
        )
        return [self.wording.log(Kind.OPENFLOW_ERROR, text, switch), *switch.flows.refused(refused.token, now)]

    def _say_applied(self, switch: Switch, applied: Applied | None) -> Effects:
        if applied is None:
            return []
        self._known.add(switch.dpid)
        paths = [flow for flow in applied.plan.delete if is_path(flow)]
        return [*(self.wording.path_cut(switch, flow) for flow in paths), self.wording.applied(switch, applied)]

    def _flows_changed(self, changed: FlowsChanged, now: float) -> Effects:
        switch = self.switches.get(changed.dpid)
        if switch is None:
            return []
        effects, news = switch.flows.updated(changed.updates, now)
        return [*self.wording.changed(switch, news), *effects]

    # --------------------------------------------------------------------------------------------------------- ports

    def _port_changed(self, changed: PortChanged, now: float) -> Effects:
        switch = self.switches.get(changed.dpid)
        if switch is None:
            return []
        port = changed.port
        name = name_of(port)
        if not is_real(port):
            return []
        before = switch.ports.get(name)
        out: Effects = []
        if changed.gone:
            # A new port of that name may have come under another number before the old one's end was told.
            if before is not None and before.number == port.number:
                del switch.ports[name]
            elif before is not None:
                return []
        else:
            # A number is one port's: whoever had it before is gone, though his end may be told later or never.
            for other in [n for n, p in switch.ports.items() if p.number == port.number and n != name]:
                del switch.ports[other]
                out.append(
                    self.wording.log(Kind.PORT_DOWN, f"port {other} of {switch.name} is gone", switch, port=other)
                )
            switch.ports[name] = Port(port.number, name, port.mac, port.up)
        was_up, is_up = bool(before and before.up), not changed.gone and port.up
        if was_up != is_up or (before is None and not changed.gone):
            kind = Kind.PORT_UP if is_up else Kind.PORT_DOWN
            what = "gone" if changed.gone else "up" if is_up else "down"
            out.append(self.wording.log(kind, f"port {name} of {switch.name} is {what}", switch, port=name))
        return out + self._note_egress(switch) + self._want(switch, now)

    def _egress_health(self, health: EgressHealth, now: float) -> Effects:
        if health.healthy == (health.network not in self._unhealthy):
            return []
        (self._unhealthy.discard if health.healthy else self._unhealthy.add)(health.network)
        out: Effects = []
        for switch in self.switches.values():
            if switch.bridge is not None and switch.bridge.network == health.network:
                out += self._note_egress(switch) + self._want(switch, now)
        return out

    def _note_egress(self, switch: Switch) -> Effects:
        if switch.bridge is None or switch.bridge.kind is not BridgeKind.SOCKET:
            return []
        network = self.state.network(switch.bridge.network)  # of a state that may not be in force yet
        if network.egress is None:
            return []
        port = switch.ports.get(network.egress.port)
        up = port is not None and port.up and network.name not in self._unhealthy
        if up == switch.egress_up:
            return []
        switch.egress_up = up
        name = network.egress.port
        if up:
            return [self.wording.log(Kind.EGRESS_UP, f"{network.name} leaves through {name}", switch, port=name)]
        why = "is not there" if port is None else "is down" if not port.up else "does not carry traffic"
        text = f"{network.name} cannot leave: {name} {why}. Its traffic to the world drops until that is mended"
        return [self.wording.log(Kind.EGRESS_DOWN, text, switch, port=name)]

    # ---------------------------------------------------------------------------------------------------- violations

    def _packet_seen(self, seen: PacketSeen, now: float) -> Effects:
        switch = self.switches.get(seen.dpid)
        if switch is None:
            return []
        found = switch.offenders.seen(seen.packet, now)
        if found is None:
            return []
        port, kind, quieter = found
        out: Effects = []
        if kind in REFUSED:
            out += self._refuse(switch, port, seen.packet)
        if quieter is not None:
            out.append(AddFlow(seen.dpid, quieter))
            text = f"{switch.port_name(port)} {kind.words} so often that it is dropped unseen for {QUIET_S} s; it is counted"
            out.append(
                self.wording.log(
                    Kind.VIOLATION_QUIETED, text, switch, port=switch.port_name(port), data={"kind": kind.name.lower()}
                )
            )
        if switch.offenders.due(now):
            out.append(Count(seen.dpid))
        return out

    def _refuse(self, switch: Switch, port: int, packet: PacketIn) -> Effects:
        network = self.wording.network(switch)
        if network is None or not network.refuse:
            return []
        if network.egress is not None and switch.port_name(port) == network.egress.port:
            return []  # out there anybody may claim to be anybody: the answer would hit a stranger
        try:
            answer = packets.refusal(packet.data, network.gateway)
        except packets.Unreadable:
            switch.offenders.unreadable += 1
            return []
        return [SendPacket(switch.dpid, port, answer)] if answer else []

    def _counted(self, counted: Counted, now: float) -> Effects:
        switch = self.switches.get(counted.dpid)
        if switch is None:
            return []
        return [self.wording.violation(switch, report) for report in switch.offenders.counted(counted.flows, now)]

    def _flow_gone(self, gone: FlowGone, now: float) -> Effects:
        switch = self.switches.get(gone.dpid)
        if switch is not None:
            switch.offenders.gone(gone.removed)
        return []

    def _tick(self, tick: Tick, now: float) -> Effects:
        out: Effects = []
        for switch in self.switches.values():
            effects, applied = switch.flows.tick(now)
            out += effects + self._say_applied(switch, applied)
            if switch.flows.phase is not Phase.DUMPING and switch.offenders.due(now):
                out.append(Count(switch.dpid))
            out += self._watch(switch, now)
        return out

    # --------------------------------------------------------------------------------------------------------- watch

    def _watch(self, switch: Switch, now: float) -> Effects:
        """Prove what the switch holds, if it holds something else than it was given."""
        watch = self._watches[switch.dpid]
        before = watch.open
        if not watch.look(self.state, switch, now):
            return []
        told = {finding.ports for finding in before}
        news = [finding for finding in watch.open if finding.ports not in told]
        out: Effects = [self.wording.leak(switch, finding) for finding in news]
        if before and not watch.open:
            out.append(self.wording.log(Kind.LEAK_CLOSED, f"{switch.name} holds no flow any more that leaks", switch))
        return out + (self._close(switch, news, now) if self.seal else [])

    def _close(self, switch: Switch, findings: list[Finding], now: float) -> Effects:
        sealed = self._sealed.setdefault(switch.name, {})
        found = {f.counterexample.in_port for f in findings if f.counterexample is not None}
        fresh = sorted(name for name in found & switch.ports.keys() if sealed.get(name) is not Sealing.LEAK)
        sealed |= dict.fromkeys(fresh, Sealing.LEAK)
        out: Effects = [self.wording.sealed(switch, name, Sealing.LEAK) for name in fresh]
        return out + (self._want(switch, now) if fresh else [])

    def _adopt_seals(self, switch: Switch, flows: Iterable[FlowStats]) -> Effects:
        """What was sealed before this controller began stays so."""
        numbers = dict(seal for stats in flows if (seal := sealed_port(stats.flow)) is not None)
        sealed = self._sealed.setdefault(switch.name, {})
        found = {
            name: numbers[port.number]
            for name, port in sorted(switch.ports.items())
            if port.number in numbers and name not in sealed
        }
        out: Effects = [self.wording.sealed(switch, name, why) for name, why in found.items()]
        if out:
            sealed |= found
            switch.flows.desired = self._compile_or_keep(switch, out)
        return out

    def _seal(self, seal: Seal, now: float) -> Effects:
        switch = self.by_name(seal.bridge)
        if switch is None or seal.port not in switch.ports or seal.port in self._sealed.get(seal.bridge, ()):
            return []
        self._sealed.setdefault(seal.bridge, {})[seal.port] = Sealing.NETWORK
        return [self.wording.sealed(switch, seal.port, Sealing.NETWORK), *self._want(switch, now)]

    def _unseal(self, unseal: Unseal, now: float) -> Effects:
        switch = self.by_name(unseal.bridge)
        if switch is None or unseal.port not in self._sealed.get(unseal.bridge, ()):
            return []
        del self._sealed[unseal.bridge][unseal.port]
        text = f"port {unseal.port} of {switch.name} is not sealed any more: an operator has cleared it"
        told: Effects = [self.wording.log(Kind.UNSEALED, text, switch, port=unseal.port)]
        return [*told, *self._want(switch, now)]

    # ------------------------------------------------------------------------------------------------------- questions

    def status(self) -> dict[str, JSON]:
        """Everything `bulkhead status` shows of the bridges."""
        leaks = {self.switches[dpid].name: watch.open for dpid, watch in self._watches.items()}
        return status.status(self.wording, self.switches.values(), self._warned, leaks, self.sealed())

    def sealed(self) -> dict[str, dict[str, Sealing]]:
        """The sealed ports of every bridge that has any, and why they are."""
        return {bridge: dict(sorted(ports.items())) for bridge, ports in self._sealed.items() if ports}

    def plan(self, state: DesiredState) -> list[dict[str, JSON]]:
        """What another state would change. Changes nothing. Raises `Conflict`."""
        return status.plan(self.state, state, self.switches.values())

    def flow_rows(self, switch: Switch, flows: Iterable[FlowStats]) -> list[dict[str, JSON]]:
        """Installed flows as `bulkhead flows` shows them."""
        return status.flow_rows(self.wording, switch, flows)
