"""One switch brought to what it should be: adopt what is there, send only the difference, and keep it that way.

A `Reconciler` is a small state machine without I/O and clock. It dumps before it changes anything, has at most one
bundle under way, moves its picture of the switch only when the switch has confirmed, and repairs what others change.
Imports signals and below.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from apps.learning import is_path, stale
from apps.packet_in import is_quiet
from controller.codec import FlowStats, FlowUpdate, Update
from controller.compile import CANARY_FLOW, Compiled
from controller.diff import Plan, foreign, plan
from controller.flow import Flow, FlowKey, is_learned, is_ours
from controller.signals import Dump, Effect, Install

REPAIR_EVERY_S = 0.5
"""Somebody who keeps changing our flows is answered so often, not at the speed of a loop."""
DUMP_TIMEOUT_S = 30.0
"""A switch that has not told its flows by then is asked again."""
RETRY_FIRST_S = 1.0
RETRY_MOST_S = 30.0


NOTHING = Plan()


def ends_by_itself(flow: Flow) -> bool:
    """Whether a flow is one that the switch learned or that quiets an offender: it is left alone."""
    return is_path(flow) or is_quiet(flow)


class Phase(Enum):
    """Where a switch stands."""

    DUMPING = auto()
    INSTALLING = auto()
    STEADY = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class Applied:
    """A plan came into force, or (an empty one) nothing had to change. `adopted` flows were there already."""

    plan: Plan
    adopted: int
    first: bool
    repair: bool
    took_s: float
    """From handing the plan to the wire until the switch had committed it."""
    lost_all: bool
    """The switch had been ours and came back without the canary: its daemon was restarted."""


@dataclass(frozen=True, slots=True)
class Changed:
    """Others changed flows: of theirs (`foreign`), ours that they touched (`tampered`), learned ones (`learned`)."""

    foreign: tuple[FlowUpdate, ...] = ()
    tampered: tuple[FlowUpdate, ...] = ()
    learned: tuple[FlowUpdate, ...] = ()


@dataclass(slots=True)
class Reconciler:
    """The flows of one connected switch. `was_ours` tells that this switch held our flows earlier in this run."""

    dpid: int
    desired: Compiled
    was_ours: bool = False
    phase: Phase = Phase.DUMPING
    installed: dict[FlowKey, Flow] = field(default_factory=dict)
    learned: dict[FlowKey, Flow] = field(default_factory=dict)
    held: bool = False
    changes: int = 0
    """Grows whenever what the switch holds has changed."""
    _token: int = 0
    _underway: Plan = NOTHING
    _repair: bool = False
    _first: bool = True
    _lost_all: bool = False
    _adopted: int = 0
    _began: float = 0.0
    _not_before: float = 0.0
    _retry_s: float = RETRY_FIRST_S

    def start(self, now: float) -> list[Effect]:
        """Ask what is there."""
        self.held = False
        self.phase = Phase.DUMPING
        self._not_before = now + DUMP_TIMEOUT_S
        return [Dump(self.dpid)]

    def hold(self, until: float) -> None:
        """Touch nothing before then, unless told to start."""
        self.held = True
        self._not_before = until

    def want(self, desired: Compiled, now: float) -> tuple[list[Effect], Applied | None]:
        """The switch should have other flows from now on."""
        self.desired = desired
        return self._advance(now) if self.phase is Phase.STEADY else ([], None)

    def unchanged(self) -> Applied:
        """What to say of a switch that a new state changes nothing on."""
        return self._applied(NOTHING, 0.0)

    def dumped(self, flows: tuple[FlowStats, ...], now: float) -> tuple[list[Effect], Applied | None]:
        """What is there. Nothing is flushed: what is already right stays as it is. A late answer is not looked at."""
        if self.phase is not Phase.DUMPING:
            return [], None
        self._not_before = now
        self.installed, self.learned = {}, {}
        self.changes += 1
        for stats in flows:
            self._note(stats.flow)
        self._lost_all = self.was_ours and CANARY_FLOW.key not in self.installed
        self._adopted = sum(1 for flow in self.installed.values() if is_ours(flow.cookie))
        return self._advance(now, report_nothing=True)

    def committed(self, token: int, now: float) -> tuple[list[Effect], Applied | None]:
        """The bundle under way is in force."""
        if token != self._token or self.phase is not Phase.INSTALLING:
            return [], None
        for flow in self._underway.delete:
            self._note(flow, gone=True)
        for flow in (*self._underway.add, *self._underway.change):
            self.installed[flow.key] = flow
        self.changes += 1
        done = self._applied(self._underway, now - self._began)
        self._retry_s = RETRY_FIRST_S
        effects, _ = self._advance(now)
        return effects, done

    def refused(self, token: int, now: float) -> list[Effect]:
        """The bundle was discarded, or its fate is unknown: look again, after a while that grows."""
        if token == self._token and self.phase is Phase.INSTALLING:
            self.phase = Phase.FAILED
            self._not_before = now + self._retry_s
            self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)
        return []

    def updated(self, updates: tuple[FlowUpdate, ...], now: float) -> tuple[list[Effect], Changed]:
        """The flow monitor's news. Our own changes come abbreviated and are not among them."""
        theirs, ours, learned = [], [], []
        for update in updates:
            flow = update.flow
            if flow is None or self.phase is Phase.DUMPING:
                continue
            in_our_place = flow.key in self.desired.flows
            gone = update.event is Update.REMOVED
            if is_learned(flow.cookie) and not in_our_place and self._is_learned(flow, gone=gone):
                if (flow.key in self.learned) == gone:
                    learned.append(update)
            elif is_ours(flow.cookie) or in_our_place:
                if self.desired.flows.get(flow.key) == flow and not gone:
                    continue  # as it should be
                ours.append(update)
            else:
                theirs.append(update)
            self._note(flow, gone=gone)
        effects: list[Effect] = []
        if ours:
            self._repair = True
            effects, _ = self.tick(now)
        return effects, Changed(tuple(theirs), tuple(ours), tuple(learned))

    def tick(self, now: float) -> tuple[list[Effect], Applied | None]:
        """Time has passed: retry or repair, if it is due."""
        if now < self._not_before:
            return [], None
        if self.phase in (Phase.FAILED, Phase.DUMPING):
            return self.start(now), None
        if self.phase is Phase.STEADY and self._repair:
            self._not_before = now + REPAIR_EVERY_S
            return self._advance(now)
        return [], None

    @property
    def foreign(self) -> tuple[Flow, ...]:
        """Flows in the switch that are not ours."""
        return foreign(self.installed, self.desired.flows)

    def _is_learned(self, flow: Flow, *, gone: bool) -> bool:
        # A flow of ours that ended is what it was taken for while it was there.
        return flow.key not in self.installed if gone else ends_by_itself(flow)

    def _note(self, flow: Flow, *, gone: bool = False) -> None:
        self.changes += 1
        self.learned.pop(flow.key, None)
        if gone:
            self.installed.pop(flow.key, None)
        elif ends_by_itself(flow) and flow.key not in self.desired.flows:
            self.installed.pop(flow.key, None)
            self.learned[flow.key] = flow
        else:
            self.installed[flow.key] = flow

    def _advance(self, now: float, *, report_nothing: bool = False) -> tuple[list[Effect], Applied | None]:
        todo = plan(self.desired.flows, self.installed, ends_by_itself)
        todo = replace(todo, delete=(*todo.delete, *self._stale_paths()))
        if not todo:
            self.phase = Phase.STEADY
            self._repair = False
            return [], self._applied(todo, 0.0) if report_nothing else None
        self.phase = Phase.INSTALLING
        self._token += 1
        self._underway = todo
        self._began = now
        return [Install(self.dpid, self._token, todo)], None

    def _stale_paths(self) -> list[Flow]:
        # A port's number can come back as another's: no learned path may wait for that.
        if self.desired.ports is None:
            return []
        there = frozenset(number & 0xFFFF for number in self.desired.ports)
        return [flow for flow in self.learned.values() if is_path(flow) and stale(flow, there)]

    def _applied(self, done: Plan, took_s: float) -> Applied:
        repair = self._repair and not self._first
        result = Applied(done, self._adopted, self._first, repair, took_s, self._lost_all)
        self._first = self._lost_all = False
        self.was_ours = True
        return result
