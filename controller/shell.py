"""The running controller: os-ken on one side, the core in the middle, files on the other.

The one OSKenApp. Everything runs in one cooperative thread, and the core never waits, so signals are handled one after
the other. Every handler is guarded: what it lets through is counted, logged as `internal_error`, and the loop goes on.
"""

from __future__ import annotations

import gc
import json
import os
import signal as unix_signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from controller import hub  # first: it chooses the thread hub

# isort: split
import logging

from os_ken import cfg
from os_ken.base import app_manager
from os_ken.controller import ofp_event, ofp_handler
from os_ken.controller.handler import DEAD_DISPATCHER, MAIN_DISPATCHER, set_ev_cls
from os_ken.ofproto import ofproto_v1_4

from controller import codec, fields
from controller import wire as _wire  # noqa: F401  (mends os-ken's parser)
from controller.codec import CodecError
from controller.compile import Conflict, Sealing
from controller.control import ControlSocket
from controller.core import Core
from controller.desired import Desired
from controller.eventlog import EventLog
from controller.events import Event, Kind
from controller.eventview import escape
from controller.frame import Port
from controller.link import Link
from controller.listen import Listen, Listener
from controller.model import Mac
from controller.ovsdb import Facts
from controller.problems import InvalidInput
from controller.records import Records
from controller.signals import (
    Effect,
    EgressHealth,
    FactsSeen,
    FlowGone,
    FlowsChanged,
    Log,
    PacketSeen,
    PortChanged,
    Seal,
    Signal,
    StateLoaded,
    StateRejected,
    SwitchDown,
    SwitchUp,
    Tick,
    Unseal,
)
from controller.statefile import read
from controller.store import Link as Store
from controller.store import Tls
from controller.upkeep import WATCH_S, Upkeep

TICK_S = 0.25
STORE_S = 0.02
STORE_PATIENCE_S = 3.0
FACTS_S = 0.5
FACTS_PATIENCE_S = 3.0
ECHO_S = 5.0
ECHO_MISSES = 3

LOG = logging.getLogger("bulkhead")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `bulkhead controller` was told.

    `ovsdb` is an address such as `unix:/run/openvswitch/db.sock`, or None; so are those of the store's servers, `store`.
    `group` may ask how everything is.
    """

    state_file: Path
    listen: tuple[Listen, ...]
    run_dir: Path
    events_dir: Path
    ovsdb: str | None = None
    seal: bool = False
    store: tuple[str, ...] = ()
    store_tls: Tls | None = None
    node: str = ""
    group: int | None = None


@dataclass(slots=True)
class Counters:
    """What went wrong inside without stopping anything."""

    internal_errors: int = 0
    unreadable_messages: int = 0
    last_error: str = ""


def guarded(handler: Callable[..., None]) -> Callable[..., None]:
    """Let nothing out of a handler: count it, log it, go on."""

    @wraps(handler)
    def guard(self: Bulkhead, *args: Any) -> None:
        try:
            handler(self, *args)
        except CodecError as exc:
            self.counters.unreadable_messages += 1
            LOG.warning("unreadable message: %s", exc)
        except Exception as exc:
            self.note_internal_error(exc)

    return guard


class Bulkhead(app_manager.OSKenApp):  # type: ignore[misc]
    """Feeds the core with what os-ken hears and carries out what it answers."""

    OFP_VERSIONS = [ofproto_v1_4.OFP_VERSION]  # noqa: RUF012  (os-ken reads it as a list)

    def __init__(self, *, settings: Settings, core: Core, log: EventLog, upkeep: Upkeep) -> None:
        super().__init__()
        self.name = "bulkhead"
        self.settings = settings
        self.core = core
        self.log = log
        self.upkeep = upkeep
        self._rejected = ""
        self.counters = Counters()
        self.links: dict[int, Link] = {}
        self.started_at = time.time()
        self._hup = False
        self._stopping = False

    # ------------------------------------------------------------------------------------------------------- feeding

    def feed(self, signal: Signal) -> None:
        """Give the core one signal and do what it says."""
        try:
            effects = self.core.handle(signal, time.monotonic())
        except Exception as exc:
            self.note_internal_error(exc)
            return
        for effect in effects:
            self._do(effect)

    @guarded
    def _do(self, effect: Effect) -> None:
        if isinstance(effect, Log):
            self.log.append(effect.event)
            if effect.event.kind is Kind.STATE_REJECTED:
                self._rejected = effect.event.text
            LOG.info("%s: %s", effect.event.kind, effect.event.text)
            return
        link = self.links.get(effect.dpid)
        if link is not None:
            link.do(effect)

    def note_internal_error(self, exc: Exception) -> None:
        """Something is wrong with this program. Its flows stay as they are."""
        self.counters.internal_errors += 1
        self.counters.last_error = f"{type(exc).__name__}: {exc}"
        LOG.error("internal error", exc_info=exc)
        text = f"a defect of the controller was caught: {self.counters.last_error}; flows stay as they are"
        self.log.append(Event(Kind.INTERNAL_ERROR, text))

    # ------------------------------------------------------------------------------------------------ os-ken's events

    @set_ev_cls(ofp_event.EventOFPStateChange, [MAIN_DISPATCHER, DEAD_DISPATCHER])
    @guarded
    def _state_change(self, ev: Any) -> None:
        datapath = ev.datapath
        if datapath.id is None:
            return
        link = self.links.get(datapath.id)
        if ev.state == DEAD_DISPATCHER:
            if link is not None and link.datapath is datapath:
                self._drop(link)
            return
        if link is not None:
            self._drop(link)  # the same switch anew: the old connection is dead and does not know it yet
        ports = tuple(_port(port) for port in datapath.ports.values())
        local = next((port.name for port in ports if port.number == fields.LOCAL), f"{datapath.id:016x}")
        self.links[datapath.id] = Link(datapath, self.feed)
        self.feed(SwitchUp(datapath.id, local, ports, str(datapath.address)))

    def _drop(self, link: Link) -> None:
        self.links.pop(link.dpid, None)
        link.close()
        self.feed(SwitchDown(link.dpid))

    def _link(self, msg: Any) -> Link | None:
        link = self.links.get(msg.datapath.id)
        return link if link is not None and link.datapath is msg.datapath else None

    @set_ev_cls(ofp_event.EventOFPFlowStatsReply, MAIN_DISPATCHER)
    @guarded
    def _flow_stats(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            link.flows(ev.msg.xid, ev.msg.body, bool(ev.msg.flags & ofproto_v1_4.OFPMPF_REPLY_MORE))

    @set_ev_cls(ofp_event.EventOFPFlowMonitorReply, MAIN_DISPATCHER)
    @guarded
    def _flow_monitor(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            updates = tuple(codec.decode_flow_update(entry.data) for entry in ev.msg.body)
            self.feed(FlowsChanged(link.dpid, updates))

    @set_ev_cls(ofp_event.EventOFPBarrierReply, MAIN_DISPATCHER)
    @guarded
    def _barrier(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            link.barrier(ev.msg.xid)

    @set_ev_cls(ofp_event.EventOFPBundleCtrlMsg, MAIN_DISPATCHER)
    @guarded
    def _bundle(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            link.bundle(ev.msg.bundle_id, ev.msg.type)

    @set_ev_cls(ofp_event.EventOFPErrorMsg, MAIN_DISPATCHER)
    @guarded
    def _error(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            link.error(ev.msg.xid, ev.msg.type or 0, ev.msg.code or 0, bytes(ev.msg.data or b""))

    @set_ev_cls(ofp_event.EventOFPMeterConfigStatsReply, MAIN_DISPATCHER)
    @guarded
    def _meter(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            link.meter((band.rate, band.burst_size) for config in ev.msg.body for band in config.bands[:1])

    @set_ev_cls(ofp_event.EventOFPPortStatus, MAIN_DISPATCHER)
    @guarded
    def _port_status(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            gone = ev.msg.reason == ofproto_v1_4.OFPPR_DELETE
            self.feed(PortChanged(link.dpid, _port(ev.msg.desc), gone))

    @set_ev_cls(ofp_event.EventOFPPacketIn, MAIN_DISPATCHER)
    @guarded
    def _packet_in(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            self.feed(PacketSeen(link.dpid, codec.decode_packet_in(ev.msg.buf)))

    @set_ev_cls(ofp_event.EventOFPFlowRemoved, MAIN_DISPATCHER)
    @guarded
    def _flow_removed(self, ev: Any) -> None:
        if (link := self._link(ev.msg)) is not None:
            self.feed(FlowGone(link.dpid, codec.decode_flow_removed(ev.msg.buf)))

    # --------------------------------------------------------------------------------------------------------- loops

    def run(self, listener: Listener, control: ControlSocket) -> None:
        """Serve until SIGTERM or SIGINT."""
        unix_signal.signal(unix_signal.SIGHUP, lambda *_: setattr(self, "_hup", True))
        for number in (unix_signal.SIGTERM, unix_signal.SIGINT):
            unix_signal.signal(number, lambda *_: setattr(self, "_stopping", True))
        self.log.append(Event(Kind.CONTROLLER_STARTED, self._started_words(), data={"pid": os.getpid()}))
        self.start()
        hub.spawn(listener.serve)
        hub.spawn(control.serve)
        hub.spawn(self._watch_loop)
        if self.settings.ovsdb:
            hub.spawn(self._facts_loop, self.settings.ovsdb)
        while not self._stopping:
            self.feed(Tick())
            self.log.tick()
            hub.sleep(TICK_S)
        self.log.append(Event(Kind.CONTROLLER_STOPPED, "the controller stops; flows stay in force in the switches"))
        control.close()
        listener.close()
        for link in list(self.links.values()):
            link.close()
        hub.sleep(0)
        self.log.close()

    def _started_words(self) -> str:
        where = ", ".join(map(str, self.settings.listen))
        return f"the controller listens on {where} with state {self.core.state.digest}"

    def _watch_loop(self) -> None:
        while not self._stopping:
            hub.sleep(STORE_S if self.settings.store else WATCH_S)
            self._follow()

    @guarded
    def _follow(self) -> None:
        again, self._hup = self._hup, False
        signal = self.upkeep.look(time.monotonic(), time.time(), again=again)
        if isinstance(signal, StateRejected):
            self.feed(signal)
        elif isinstance(signal, StateLoaded):
            if signal.state != self.core.state:
                self._rejected = ""
                self.feed(signal)
            self.upkeep.taken(self.core, self._rejected)
        self.upkeep.publish(self.core)

    def _facts_loop(self, remote: str) -> None:
        facts = Facts(remote)
        began, told = time.monotonic(), False
        while not self._stopping:
            self._poll_facts(facts)
            if not told and not facts.answered and time.monotonic() - began > FACTS_PATIENCE_S:
                told = True
                text = (
                    f"OVSDB at {remote} does not answer: fail mode and in-band control of the bridges are not checked, "
                    "and a bridge is known by the name it gives itself. Give its address with --ovsdb"
                )
                self.log.append(Event(Kind.SWITCH_WARNING, text, data={"problem": "ovsdb"}))
                LOG.warning("%s", text)
            hub.sleep(FACTS_S)
        facts.close()

    @guarded
    def _poll_facts(self, facts: Facts) -> None:
        bridges = facts.poll()
        if bridges is not None:
            self.feed(FactsSeen(bridges))

    # ------------------------------------------------------------------------------------------------------- answers

    def answer(self, question: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
        """Answer one question of the control socket: `status`, or `flows` of a bridge."""
        ask = question.get("ask")
        if ask == "status":
            reply(self._status())
        elif ask == "flows":
            self._flows(str(question.get("bridge", "")), reply)
        elif ask == "plan":
            self._plan(Path(str(question.get("file", ""))), reply)
        elif ask == "unseal":
            self._unseal(str(question.get("bridge", "")), str(question.get("port", "")), reply)
        elif ask == "seal-network":
            self._seal_network(str(question.get("network", "")), question.get("sealed"), reply)
        elif ask == "health":
            self._health(str(question.get("network", "")), question.get("healthy"), reply)
        else:
            reply(
                {
                    "error": f"unknown question {json.dumps(ask)[:80]}; expected status, flows, plan, unseal, seal-network or health"
                }
            )

    def _health(self, network: str, healthy: object, reply: Callable[[dict[str, Any]], None]) -> None:
        known = [one.name for one in self.core.state.networks if one.egress is not None]
        if network not in known or not isinstance(healthy, bool):
            there = ", ".join(known) or "none"
            reply({"error": f"no network {network!r} with an egress, or no true or false; there are: {there}"})
            return
        self.feed(EgressHealth(network, healthy))
        reply({"network": network, "healthy": healthy})

    def _unseal(self, bridge: str, port: str, reply: Callable[[dict[str, Any]], None]) -> None:
        sealed = self.core.sealed()
        if port not in sealed.get(bridge, ()):
            there = ", ".join(f"{name} {p}" for name, ports in sealed.items() for p in ports) or "none"
            reply({"error": f"port {port!r} of bridge {bridge!r} is not sealed; sealed: {there}"})
            return
        self.feed(Unseal(bridge, port))
        reply({"bridge": bridge, "port": port, "sealed": False})

    def _seal_network(self, network: str, sealed: object, reply: Callable[[dict[str, Any]], None]) -> None:
        """Close every port of every bridge of a network, or open those that this has closed: not those that leaked."""
        bridges = [one.name for one in self.core.state.bridges if one.network == network]
        if not bridges or not isinstance(sealed, bool):
            there = ", ".join(one.name for one in self.core.state.networks) or "none"
            reply({"error": f"no network {network!r} with a bridge, or no true or false; there are: {there}"})
            return
        changed, leaked = [], []
        for bridge in bridges:
            switch, had = self.core.by_name(bridge), self.core.sealed().get(bridge, {})
            if sealed:
                todo = [port for port in (switch.ports if switch is not None else ()) if port not in had]
            else:
                todo = [port for port, why in had.items() if why is Sealing.NETWORK]
                leaked += [f"{bridge} {port}" for port in had if port not in todo]
            for port in todo:
                self.feed(Seal(bridge, port) if sealed else Unseal(bridge, port))
                changed.append(f"{bridge} {port}")
        gone = [bridge for bridge in bridges if self.core.by_name(bridge) is None]
        reply({"network": network, "sealed": sealed, "ports": changed, "leaked": leaked, "not_connected": gone})

    def _plan(self, path: Path, reply: Callable[[dict[str, Any]], None]) -> None:
        try:
            loaded = read(path).with_records(self.upkeep.desired.records, self.settings.node, time.time())
            reply({"bridges": self.core.plan(loaded.state)})
        except (InvalidInput, Conflict) as exc:
            reply({"error": str(exc)})

    def _status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self.started_at, 1),
            "state_file": str(self.settings.state_file),
            "node": self.settings.node,
            "store": list(self.settings.store),
            "listen": [str(listen) for listen in self.settings.listen],
            "flow_mods_sent": sum(link.sent_flow_mods for link in self.links.values()),
            "internal_errors": self.counters.internal_errors,
            "unreadable_messages": self.counters.unreadable_messages,
            **self.core.status(),
        }

    def _flows(self, bridge: str, reply: Callable[[dict[str, Any]], None]) -> None:
        switch = self.core.by_name(bridge)
        link = self.links.get(switch.dpid) if switch is not None else None
        if switch is None or link is None:
            there = ", ".join(sorted(s.name for s in self.core.switches.values())) or "none"
            reply({"error": f"no bridge {bridge!r} is connected; connected: {there}"})
            return

        def done(flows: tuple[codec.FlowStats, ...]) -> None:
            rows = sorted(flows, key=lambda s: (s.flow.table, -s.flow.priority, s.flow.key))
            reply({"bridge": bridge, "flows": self.core.flow_rows(switch, rows)})

        link.request_flows(done)


def _port(desc: Any) -> Port:
    # Whoever connects chooses the names; they end in terminals and logs.
    name = escape(desc.name.rstrip(b"\0").decode("utf-8", "replace"))
    down = desc.config & ofproto_v1_4.OFPPC_PORT_DOWN or desc.state & ofproto_v1_4.OFPPS_LINK_DOWN
    return Port(desc.port_no, name, Mac.parse(desc.hw_addr), not down)


def _first_records(store: Store) -> Records:
    """What the store holds, as soon as it answers: without it, what was created would be taken for given up."""
    began, told = time.monotonic(), False
    while (records := store.poll()) is None:
        if not told and time.monotonic() - began > STORE_PATIENCE_S:
            told = True
            LOG.warning("the store does not answer; flows stay as they are until it does: bulkhead store status")
        hub.sleep(STORE_S)
    return records


def serve(settings: Settings) -> None:
    """Run the controller until it is told to stop. Raises `InvalidInput` and `BulkheadError` before it has begun."""
    store = Store(settings.store, settings.store_tls) if settings.store else None
    desired = Desired(settings.state_file, settings.node)
    if store is not None and desired.look(_first_records(store), time.time()):
        LOG.info("the store holds %d containers", len(desired.records.containers))
    upkeep = Upkeep(desired, store)
    upkeep.first()
    loaded = desired.loaded
    if loaded.problems:
        LOG.warning("%d warning(s); to read them: bulkhead check %s", len(loaded.problems), settings.state_file)
    log = EventLog(settings.events_dir, max_per_second=100)
    cfg.CONF(args=[], project="bulkhead")
    cfg.CONF.set_override("echo_request_interval", ECHO_S)
    cfg.CONF.set_override("maximum_unreplied_echo_requests", ECHO_MISSES)
    manager = app_manager.AppManager.get_instance()
    manager.instantiate(ofp_handler.OFPHandler)
    listener = Listener(settings.listen)
    app = manager.instantiate(
        Bulkhead, settings=settings, core=Core(loaded.state, seal=settings.seal), log=log, upkeep=upkeep
    )
    upkeep.taken(app.core, "")
    control = ControlSocket(settings.run_dir / "controller.sock", app.answer, settings.group)
    # Flows are many small values that live long. With the default thresholds, every change of a big state sets off a
    # collection of all of them, which costs more than the change.
    gc.set_threshold(100_000, 50, 100)
    app.run(listener, control)
