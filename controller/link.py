"""One OpenFlow connection: effects become messages, replies become signals.

Sends only through a queue of its own, so that a switch that does not read holds up nobody else. Installing is: open a
bundle, add everything, barrier; then commit if no error came, or discard. Imports signals and codec; os-ken's
`Datapath` is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from controller import codec, hub
from controller.codec import CodecError, FlowStats
from controller.pipeline import VIOLATION
from controller.signals import (
    AddFlow,
    Committed,
    Count,
    Counted,
    Dump,
    Dumped,
    Effect,
    Install,
    Refused,
    SendPacket,
    Signal,
    SwitchError,
)
from controller.wire import Entry

INSTALL_TIMEOUT_S = 15.0
METER_RATE = 50
"""Packet-ins a second that a switch may send us; what is more is counted in its flows and dropped."""
METER_BURST = 50
MONITOR_ID = 0xB01C
MOST_FLOWS = 250_000
"""More flows than this in one answer, and it is not looked at: a switch must not fill our memory."""
MOST_WAITING = 1000
"""So many messages may wait for a switch that does not read before what is of use only now is left out."""
MOST_REQUESTS = 32
"""Requests for flows that may be without an answer; the oldest is given up for another."""
_METER_EXISTS = (12, 1)
_METER_MOD_FAILED = 12


class Transport(Protocol):
    """What we need of os-ken's Datapath."""

    id: int

    def send(self, buf: bytes, close_socket: bool = False) -> bool:
        """Queue bytes; blocks while the queue is full."""

    def close(self) -> None:
        """End the connection."""


@dataclass(slots=True)
class _Collecting:
    done: Callable[[tuple[FlowStats, ...]], None]
    entries: list[FlowStats] = field(default_factory=list)


@dataclass(slots=True)
class _Installing:
    token: int
    xid: int
    """Of every message of the bundle; its bundle id too."""
    committing: bool = False


class Link:
    """The wire side of one connected switch. `feed` takes every signal that it makes."""

    def __init__(self, datapath: Transport, feed: Callable[[Signal], None]) -> None:
        self.datapath = datapath
        self.dpid = datapath.id
        self.closed = False
        self.sent_flow_mods = 0
        self._feed = feed
        self._xid = 0x10000
        self._queue = hub.Queue()
        self._collecting: dict[int, _Collecting] = {}
        self._installing: _Installing | None = None
        self._meter_xid = 0
        self._watching = False
        hub.spawn(self._send_loop)

    def _send_loop(self) -> None:
        while not self.closed:
            data = self._queue.get()
            if data is not None:
                self.datapath.send(data)

    def close(self) -> None:
        """End the connection and everything that waits for an answer."""
        if not self.closed:
            self.closed = True
            self._queue.put(None)
            self.datapath.close()

    def _next(self) -> int:
        self._xid = self._xid + 1 & 0x7FFFFFFF
        return self._xid

    def _send(self, data: bytes) -> None:
        if not self.closed:
            self._queue.put(data)

    # ------------------------------------------------------------------------------------------------------- effects

    def do(self, effect: Effect) -> None:
        """Carry out one effect meant for this switch."""
        match effect:
            case Dump():
                self._see_to_meter()
                if not self._watching:  # the switch refuses a second monitor of the same number
                    self._watching = True
                    self._send(codec.flow_monitor_request(self._next(), MONITOR_ID))
                self.request_flows(lambda flows: self._feed(Dumped(self.dpid, flows)))
            case Count():
                self.request_flows(lambda flows: self._feed(Counted(self.dpid, flows)), VIOLATION.id)
            case Install():
                self._install(effect)
            case AddFlow(_, flow):
                self._send(codec.flow_mod(flow, codec.ADD, self._next()))
            case SendPacket(_, port, data) if self._queue.qsize() < MOST_WAITING:
                self._send(codec.packet_out(port, data, self._next()))

    def request_flows(self, done: Callable[[tuple[FlowStats, ...]], None], table: int | None = None) -> None:
        """Ask for the flows (of one table) with their counters; `done` gets them when all have come."""
        xid = self._next()
        while len(self._collecting) >= MOST_REQUESTS:
            del self._collecting[next(iter(self._collecting))]
        self._collecting[xid] = _Collecting(done)
        self._send(codec.flow_stats_request(xid) if table is None else codec.flow_stats_request(xid, table))

    def _see_to_meter(self) -> None:
        self._meter_xid = self._next()
        self._send(codec.meter_config_request(self._meter_xid))

    def _install(self, install: Install) -> None:
        xid = self._next()
        self._installing = _Installing(install.token, xid)
        todo = install.plan
        self.sent_flow_mods += len(todo.delete) + len(todo.change) + len(todo.add)
        data = codec.bundle(xid, todo.delete, (*todo.change, *todo.add), xid)
        self._send(data + codec.barrier(xid))
        hub.spawn_after(INSTALL_TIMEOUT_S, self._give_up, xid)

    def _give_up(self, xid: int) -> None:
        if self._installing is not None and self._installing.xid == xid:
            self._end_install(f"no answer within {INSTALL_TIMEOUT_S:.0f} s")

    def _end_install(self, why: str | None) -> None:
        underway, self._installing = self._installing, None
        if underway is None or self.closed:
            return
        if why is None:
            self._feed(Committed(self.dpid, underway.token))
            return
        self._send(codec.bundle_control(underway.xid, codec.DISCARD, self._next()))
        self._feed(Refused(self.dpid, underway.token, why))

    # ------------------------------------------------------------------------------------------------------- replies

    def barrier(self, xid: int) -> None:
        """A barrier's answer: everything of the bundle was taken without an error, so commit it."""
        underway = self._installing
        if underway is not None and underway.xid == xid and not underway.committing:
            underway.committing = True
            self._send(codec.bundle_control(underway.xid, codec.COMMIT, xid))

    def bundle(self, bundle_id: int, kind: int) -> None:
        """The answer to a bundle control message."""
        underway = self._installing
        if underway is not None and underway.xid == bundle_id and kind == codec.COMMIT + 1:
            self._end_install(None)

    def error(self, xid: int, kind: int, code: int, data: bytes) -> None:
        """An error message. `kind` and `code` as in OpenFlow 1.4.1, 7.5.4."""
        underway = self._installing
        if xid == self._meter_xid:
            if kind == _METER_MOD_FAILED and code == 3:  # unknown meter: it is not there yet
                self._meter_xid = self._next()
                self._send(codec.controller_meter(METER_RATE, METER_BURST, self._meter_xid))
                return
            self._feed(
                SwitchError(
                    self.dpid,
                    f"the switch has no controller meter ({error_words(kind, code)}): samples of violations are not "
                    "limited in the switch. Open vSwitch 2.12 or newer has it",
                )
            )
            return
        if underway is not None and underway.xid == xid:
            self._end_install(f"{error_words(kind, code)} for {refused_words(data)}")
            return
        collecting = self._collecting.pop(xid, None)
        what = "a request for flows" if collecting else refused_words(data)
        self._feed(SwitchError(self.dpid, f"the switch answers {error_words(kind, code)} to {what}"))

    def meter(self, configs: Iterable[tuple[int, int]]) -> None:
        """(rate, burst) of the controller meter, if there is one."""
        found = list(configs)
        if (METER_RATE, METER_BURST) in found:
            return
        self._meter_xid = self._next()
        self._send(codec.controller_meter(METER_RATE, METER_BURST, self._meter_xid, modify=bool(found)))

    def flows(self, xid: int, entries: Iterable[Entry], more: bool) -> None:
        """Part of an answer to `request_flows`."""
        collecting = self._collecting.get(xid)
        if collecting is None:
            return
        try:
            collecting.entries += (codec.decode_flow_stats(entry.data) for entry in entries)
        except CodecError as exc:
            del self._collecting[xid]
            self._feed(SwitchError(self.dpid, f"flow statistics that do not parse: {exc}"))
            return
        if len(collecting.entries) > MOST_FLOWS:
            del self._collecting[xid]
            self._feed(SwitchError(self.dpid, f"more than {MOST_FLOWS} flows in one answer; it is not looked at"))
        elif not more:
            del self._collecting[xid]
            collecting.done(tuple(collecting.entries))


_ERROR_TYPES = {
    1: "bad request",
    2: "bad action",
    3: "bad instruction",
    4: "bad match",
    5: "flow mod failed",
    6: "group mod failed",
    9: "switch config failed",
    12: "meter mod failed",
    16: "flow monitor failed",
    17: "bundle failed",
}


def error_words(kind: int, code: int) -> str:
    """An OpenFlow error in words, as far as there are any."""
    return f"'{_ERROR_TYPES.get(kind, f'error type {kind}')}' (type {kind}, code {code})"


def refused_words(data: bytes) -> str:
    """Which message an error speaks of: it quotes the beginning."""
    if len(data) >= 32 and data[1] == codec.BUNDLE_ADD:
        data = data[16:]
    if len(data) >= 34 and data[1] == codec.FLOW_MOD:
        table, priority = data[24], int.from_bytes(data[30:32], "big")
        return f"a flow of table {table}, priority {priority}"
    return f"a message of type {data[1]}" if len(data) > 1 else "a message"
