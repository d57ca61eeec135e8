"""What happened, put into events: who, where, and in words a person can act on. Pure; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from controller import fields, packets
from controller.codec import FlowUpdate, Reason, Update
from controller.compile import Names, Sealing
from controller.events import JSON, Event, Kind
from controller.flow import Flow
from controller.model import DesiredState, Ipv4, Network
from controller.offenders import Report
from controller.pipeline import RETURN, Violation
from controller.reconcile import Applied, Changed
from controller.signals import Log
from controller.switch import Switch, flow_words
from controller.verify.prove import Finding


@dataclass(frozen=True, slots=True)
class Wording:
    """Events about switches of `state`; `names` knows cookies of the state before it too."""

    state: DesiredState
    names: Names

    def network(self, switch: Switch) -> Network | None:
        """The network of a switch, None where the switch or the network is not declared."""
        if switch.bridge is None:
            return None
        try:
            return self.state.network(switch.bridge.network)
        except KeyError:
            return None

    def container(self, switch: Switch, port: str) -> str | None:
        """The name of the container behind a port of a switch."""
        network = self.network(switch)
        return next((m.name for m in network.members if m.port == port), None) if network else None

    def log(
        self,
        kind: Kind,
        text: str,
        switch: Switch | None,
        *,
        flow: Flow | None = None,
        port: str | None = None,
        packet: str | None = None,
        data: dict[str, JSON] | None = None,
    ) -> Log:
        """An event of `kind`; whose it is follows from the switch, the flow's cookie and the port."""
        owner = self.names.owner(flow.cookie) if flow is not None else None
        network = self.network(switch) if switch else None
        return Log(
            Event(
                kind,
                text,
                bridge=switch.name if switch else None,
                network=network.name if network else None,
                app=owner[0] if owner else None,
                object=owner[1] if owner else port,
                container=self.container(switch, port) if switch and port else None,
                flow=flow_words(flow, switch) if flow is not None else None,
                packet=packet,
                data=data or {},
            )
        )

    def applied(self, switch: Switch, applied: Applied) -> Log:
        """A plan came into force, or nothing had to change."""
        counts = applied.plan.counts
        words = ", ".join(f"{number} {what}" for what, number in counts.items()) if applied.plan else "nothing changed"
        data: dict[str, JSON] = {**counts, "adopted": applied.adopted, "state": self.state.digest}
        data["took_ms"] = round(1000 * applied.took_s, 3)
        if applied.repair:
            return self.log(Kind.DRIFT_REPAIRED, f"{switch.name} is as declared again: {words}", switch, data=data)
        if applied.lost_all:
            text = (
                f"{switch.name} came back without its flows (ovs-vswitchd was restarted, or they were deleted): {words}"
            )
            data["restarted"] = True
        elif applied.first:
            text = f"{switch.name} adopted with {applied.adopted} flows of ours: {words}"
        else:
            text = f"{switch.name} is as declared: {words}"
        return self.log(Kind.STATE_APPLIED, text, switch, data=data)

    def changed(self, switch: Switch, news: Changed) -> list[Log]:
        """What others, or the switch itself, did to its flows."""
        out: list[Log] = []
        for update in news.learned:
            if update.flow is not None and update.flow.table == RETURN.id:  # a quieted offender is no path
                out.append(self._path(switch, update.flow, update))
        for update in news.foreign:
            if update.flow is not None:
                what = {Update.REMOVED: "was removed", Update.MODIFIED: "was changed"}.get(update.event, "was added")
                out.append(self.foreign(switch, update.flow, what))
        for update in news.tampered:
            if update.flow is not None:
                did = {Update.REMOVED: "removed", Update.MODIFIED: "changed"}.get(update.event, "added")
                text = f"somebody else {did} a flow of ours on {switch.name}; it is put right"
                out.append(self.log(Kind.TAMPERING, text, switch, flow=update.flow))
        return out

    def foreign(self, switch: Switch, flow: Flow, what: str) -> Log:
        """A flow that is not ours; `what` became of it."""
        text = (
            f"a flow that is not ours {what} on {switch.name}; it is left alone. If it should not be there: "
            f"ovs-ofctl -O OpenFlow14 del-flows {switch.name} 'cookie={flow.cookie:#x}/-1,table={flow.table}'"
        )
        return self.log(Kind.FOREIGN_FLOW, text, switch, flow=flow)

    def leak(self, switch: Switch, finding: Finding) -> Log:
        """What a switch really holds lets something through, or cannot be proved not to."""
        data: dict[str, JSON] = {"findings": [finding.as_data()]}
        example = finding.counterexample
        if example is None:
            text = f"what {switch.name} really holds is not proved: {finding.text}"
            return self.log(Kind.UNPROVED, text, switch, data=data)
        desired = switch.flows.desired.flows
        theirs = [flow for flow in example.way if desired.get(flow.key) != flow]
        text = f"{switch.name} leaks: {finding.text}"
        if theirs:
            mend = f"'cookie={theirs[0].cookie:#x}/-1,table={theirs[0].table}'"
            text += f". The flow that does it is not ours; take it away: ovs-ofctl -O OpenFlow14 del-flows {switch.name} {mend}"
        else:
            text += ". Flows of ours are missing there, and are put back"
        port = example.in_port if example.in_port in switch.ports else None
        flow = theirs[0] if theirs else None
        return self.log(Kind.LEAK, text, switch, flow=flow, port=port, packet=example.packet, data=data)

    def sealed(self, switch: Switch, port: str, why: Sealing) -> Log:
        """Everything that comes in by a port drops from now on."""
        until = (
            f"until you have mended what leaked and say: bulkhead unseal {switch.name} {port}"
            if why is Sealing.LEAK
            else "until its network, which is cut off, is let in again: bulkhead incident status"
        )
        text = f"port {port} of {switch.name} is sealed: everything that comes in by it drops, {until}"
        return self.log(Kind.SEALED, text, switch, port=port)

    def path_cut(self, switch: Switch, flow: Flow) -> Log:
        """A return path that we removed ourselves."""
        who, port = self._whose_path(switch, flow)
        return self.log(
            Kind.PATH_EXPIRED, f"return path to {who} ended: its port is gone", switch, flow=flow, port=port
        )

    def _whose_path(self, switch: Switch, flow: Flow) -> tuple[str, str | None]:
        target = flow.match.get(fields.IPV4_DST)
        address = Ipv4(target[0]) if target else None
        network = self.network(switch)
        member = next((m for m in network.members if m.address == address), None) if network else None
        return (f"{member.name} ({address})", member.port) if member else (str(address), None)

    def _path(self, switch: Switch, flow: Flow, update: FlowUpdate) -> Log:
        who, port = self._whose_path(switch, flow)
        if update.event is Update.REMOVED:
            why = {int(Reason.IDLE): "idle", int(Reason.HARD): "its time was up"}.get(update.reason, "deleted")
            return self.log(Kind.PATH_EXPIRED, f"return path to {who} ended: {why}", switch, flow=flow, port=port)
        return self.log(Kind.PATH_LEARNED, f"return path to {who} learned", switch, flow=flow, port=port)

    def violation(self, switch: Switch, report: Report) -> Log:
        """Who broke a rule, how, and how often."""
        name = switch.port_name(report.port)
        kinds = [kind.name.lower() for kind, _ in report.samples]
        words = " and ".join(kind.words for kind, _ in report.samples) or "went on"
        sample = None
        for _, shown in report.samples[:1]:
            try:
                sample = packets.read(shown).words
            except packets.Unreadable as exc:
                switch.offenders.unreadable += 1
                sample = str(exc)
        who = self.container(switch, name)
        text = f"{who or name} {words}: {report.count} packet{'s' if report.count != 1 else ''}"
        if any(kind is Violation.SPOOF for kind, _ in report.samples):
            text += self._own_addresses(switch, name)
        data: dict[str, JSON] = {"count": report.count, "total": report.total, "kinds": kinds, "port": name}
        return self.log(Kind.VIOLATION, text, switch, port=name, packet=sample, data=data)

    def _own_addresses(self, switch: Switch, port: str) -> str:
        network = self.network(switch)
        member = next((m for m in network.members if m.port == port), None) if network else None
        if member is None:
            return ""
        routed = "".join(f", {prefix}" for prefix in member.routed)
        return f"; it must use {member.mac} and {member.address}{routed}, or the state file must say otherwise"
