"""Packet-in: violations are shown to the controller as a sample, and counted in the switch per port."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from apps.base import App
from controller import fields
from controller.flow import SEND_FLOW_REM, Cookie, Flow, Output
from controller.frame import Frame, Placed, cookie
from controller.pipeline import KIND, VIOLATION, Band, act

SAMPLE_BYTES = 256
QUIET_S = 5
"""How long a noisy offender is dropped without a sample. Its packets are still counted."""


class PacketIn(App):
    """VIOLATION.

    400 an offender that was noisy is dropped and counted for a few seconds (made by the controller while it runs); 200
    a known port's violations go to the controller, as many as the switch's controller meter lets through; miss drops.
    """

    id = 10
    name = "packet_in"
    tables = (VIOLATION,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        yield VIOLATION.flow(Band.MISS, self.own("port/unknown"))
        for name, port in (("egress", frame.egress_port), ("mesh", frame.mesh_port), ("host", frame.host_port)):
            if port is not None:
                yield self._sample(port, f"port/{name}")

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        yield self._sample(placed.port, f"member/{placed.member.id}")

    def _sample(self, port: int, name: str) -> Flow:
        return VIOLATION.flow(Band.KNOWN, self.own(name), act(Output(fields.CONTROLLER, SAMPLE_BYTES)), in_port=port)


def quiet(port: int, kind: int, name: str) -> Flow:
    """The negative flow for a noisy offender: made while running, not part of the desired state, ends by itself.

    Its cookie is marked as learned, so that the reconciler leaves it alone.
    """
    own = cookie(PacketIn.id, name, learned=True)
    flow = VIOLATION.flow(Band.DENY, own, in_port=port, reg2=kind)
    return replace(flow, hard_s=QUIET_S, flags=SEND_FLOW_REM)


def is_quiet(flow: Flow) -> bool:
    """Whether a flow is one of those, by its looks too: cookies can be forged."""
    parts = Cookie.of(flow.cookie)
    return (
        parts is not None
        and (parts.app, parts.learned) == (PacketIn.id, True)
        and (flow.table, flow.priority, flow.actions, flow.goto) == (VIOLATION.id, Band.DENY, (), None)
        and 0 < flow.hard_s <= QUIET_S
        and {header for header, _, _ in flow.match} == {fields.IN_PORT_FIELD.header, KIND.header}
    )
