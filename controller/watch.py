"""What a switch really holds, proved: flows of others, learned ones, and ours where they are not as they should be.

Flows that are as declared are proved before they are sent, and with them everything they could ever learn; only what is
there besides is looked at here. Pure; time is an argument. Imports switch and the proof.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from controller.flow import Flow, FlowKey
from controller.model import DesiredState
from controller.reconcile import Phase
from controller.switch import Switch
from controller.verify.prove import Finding, Prover

EVERY_S = 0.5
"""A switch whose flows keep changing is looked at so often,"""
REST_S = 1 / 100_000
"""and after a proof of many steps not for so long for each: about two thirds of the time are left to everything else."""


@dataclass(slots=True)
class Watch:
    """Looks at one switch again and again. `open` is what is wrong with it as far as is known."""

    open: tuple[Finding, ...] = ()
    _prover: Prover = field(default_factory=Prover)
    _expected: dict[FlowKey, Flow] = field(default_factory=dict)
    _seen: tuple[object, ...] = ()
    _not_before: float = 0.0

    def look(self, state: DesiredState, switch: Switch, now: float) -> bool:
        """Prove what the switch holds, if that has changed. Whether `open` is another now."""
        if switch.bridge is None or now < self._not_before:
            return False
        if switch.flows.phase is not Phase.STEADY:  # what it holds is about to change, or not known
            return False
        seen = (switch.flows.changes, state.digest, tuple((p.name, p.number) for p in switch.ports.values()))
        if seen == self._seen:
            return False
        self._seen, self._prover.spent = seen, 0.0
        before, self.open = self.open, self._prove(state, switch)
        self._not_before = now + EVERY_S + REST_S * self._prover.spent
        return self.open != before

    def _prove(self, state: DesiredState, switch: Switch) -> tuple[Finding, ...]:
        assert switch.bridge is not None
        desired = switch.flows.desired.flows
        held = dict(switch.flows.installed)
        for key, flow in switch.flows.learned.items():
            if (flow.actions or flow.goto is not None) and not self._is_expected(switch, key, flow):
                held[key] = flow
        # Without counters and time-outs there is nothing in a flow of ours that the switch might tell otherwise.
        if all(held.get(key) == flow for key, flow in desired.items()) and len(held) == len(desired):
            self._prover = Prover()  # what the last one remembers is large, and seldom needed
            return ()
        return self._prover.prove(state, switch.bridge, switch.ports, held)

    def _is_expected(self, switch: Switch, key: FlowKey, flow: Flow) -> bool:
        if self._expected.get(key) is flow:
            return True
        if not switch.prover.could_learn(flow):
            return False
        if len(self._expected) > 2 * len(switch.flows.learned) + 100:
            self._expected.clear()
        self._expected[key] = flow
        return True
