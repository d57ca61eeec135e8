"""Who breaks the rules: samples from packet-ins, exact counts from the switch, and quiet for the noisy.

One `Offenders` per switch. A packet-in says who and what; the flows of table VIOLATION say how often, whether a sample
was sent or not. An event is written when the counters that follow a sample have come, then every `REPORT_S` while it
goes on, each with the packets since the event before: the counts of all events of a port add up to what the switch
counted. Imports codec, flow and the packet-in app; no I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from apps.packet_in import quiet
from controller import fields
from controller.codec import FlowRemoved, FlowStats, PacketIn
from controller.flow import Flow, FlowKey
from controller.pipeline import KIND, VIOLATION, Violation

REPORT_S = 10.0
POLL_ACTIVE_S = 2.0
POLL_IDLE_S = 10.0
NOISY = 20
"""So many samples of one port and kind within `NOISY_S` make it an offender that is dropped unseen for a while."""
NOISY_S = 2.0
MOST_PORTS = 1 << 16
"""Ports and flows that are counted for one switch: it must not fill our memory with numbers that it makes up."""


@dataclass(frozen=True, slots=True)
class Report:
    """`count` packets of port `port` since the report before; `samples` are the kinds seen with one packet each."""

    port: int
    count: int
    total: int
    samples: tuple[tuple[Violation, bytes], ...]


@dataclass(slots=True)
class _Port:
    unreported: int = 0
    total: int = 0
    samples: dict[Violation, bytes] = field(default_factory=dict)
    fresh: bool = False
    reported_at: float = float("-inf")


@dataclass(slots=True)
class Offenders:
    """The violations of one switch."""

    unreadable: int = 0
    _adopted: bool = False
    _ports: dict[int, _Port] = field(default_factory=dict)
    _counts: dict[FlowKey, int] = field(default_factory=dict)
    _recent: dict[tuple[int, Violation], deque[float]] = field(default_factory=dict)
    _poll_at: float = 0.0

    def adopt(self, flows: tuple[FlowStats, ...]) -> None:
        """Take the counters of a switch as they stand: what came before is not ours to report.

        Only the first time; when its flows are read again, the news since the last counting are counted.
        """
        for stats in flows:
            if stats.flow.table == VIOLATION.id:
                if self._adopted:
                    self._add(stats.flow, stats.packets)
                elif len(self._counts) < MOST_PORTS:
                    self._counts[stats.flow.key] = stats.packets
        self._adopted = True

    def seen(self, packet: PacketIn, now: float) -> tuple[int, Violation, Flow | None] | None:
        """(port, kind, flow that quiets the offender if it has become noisy); None if it is no violation of ours."""
        in_port, kind_value = packet.match.get(fields.IN_PORT_FIELD), packet.match.get(KIND)
        if packet.table != VIOLATION.id or in_port is None or kind_value is None:
            self.unreadable += 1
            return None
        try:
            kind = Violation(kind_value[0])
        except ValueError:
            self.unreadable += 1
            return None
        if in_port[0] not in self._ports and len(self._ports) >= MOST_PORTS:
            self.unreadable += 1
            return None
        port = self._ports.setdefault(in_port[0], _Port())
        port.samples.setdefault(kind, packet.data)
        if now - port.reported_at >= REPORT_S:
            port.fresh = True
            self._poll_at = min(self._poll_at, now)
        return in_port[0], kind, self._quieted(in_port[0], kind, now)

    def _quieted(self, port: int, kind: Violation, now: float) -> Flow | None:
        recent = self._recent.setdefault((port, kind), deque(maxlen=NOISY))
        recent.append(now)
        if len(recent) < NOISY or now - recent[0] > NOISY_S:
            return None
        recent.clear()
        return quiet(port, kind, f"quiet/{port}")

    def due(self, now: float) -> bool:
        """Whether the counters should be asked for now; asking again is put off accordingly."""
        if now < self._poll_at:
            return False
        active = any(port.samples or port.unreported for port in self._ports.values())
        self._poll_at = now + (POLL_ACTIVE_S if active else POLL_IDLE_S)
        return True

    def counted(self, flows: tuple[FlowStats, ...], now: float) -> list[Report]:
        """The switch's counters have come."""
        for stats in flows:
            if stats.flow.table == VIOLATION.id:
                self._add(stats.flow, stats.packets)
        return self._reports(now)

    def gone(self, removed: FlowRemoved) -> None:
        """A flow that quieted somebody has ended; its last packets count too."""
        if removed.flow.table == VIOLATION.id:
            self._add(removed.flow, removed.packets)
            self._counts.pop(removed.flow.key, None)

    def _add(self, flow: Flow, packets: int) -> None:
        if flow.key not in self._counts and len(self._counts) >= MOST_PORTS:
            self.unreadable += 1
            return
        before = self._counts.get(flow.key, 0)
        self._counts[flow.key] = packets
        in_port = flow.match.get(fields.IN_PORT_FIELD)
        new = packets - before if packets >= before else packets  # fewer: the flow was made anew
        if new and in_port is not None:
            port = self._ports.setdefault(in_port[0], _Port())
            port.unreported += new
            port.total += new

    def _reports(self, now: float) -> list[Report]:
        out = []
        for number, port in self._ports.items():
            if not (port.unreported or port.samples):
                continue
            if not port.fresh and now - port.reported_at < REPORT_S:
                continue
            if not port.unreported:
                continue  # the sample's counter lags behind; the next poll has it
            samples = tuple(sorted(port.samples.items()))
            out.append(Report(number, port.unreported, port.total, samples))
            port.unreported = 0
            port.samples = {}
            port.fresh = False
            port.reported_at = now
        return out
