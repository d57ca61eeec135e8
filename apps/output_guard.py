"""Output guard: the last word on who may send to which port."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import App
from controller import fields
from controller.flow import Flow, Output
from controller.frame import Frame, Placed
from controller.model import Role
from controller.pipeline import LOCAL_OUT, OUTPUT_GUARD, Band, Violation, act, any_role, violation

MAY_SEND_TO = {
    Role.CONTAINER: (Role.CONTAINER, Role.EGRESS, Role.MESH, Role.HOST),
    Role.EGRESS: (Role.CONTAINER, Role.MESH),
    Role.MESH: (Role.CONTAINER, Role.EGRESS),
    Role.HOST: (Role.CONTAINER,),
}
"""Role of the receiving port to the roles that may send to it. Read by tests and by the truth table too."""


class OutputGuard(App):
    """OUTPUT_GUARD.

    300 a role that may send to the chosen port is output, and nothing to the egress while it is closed; 100 anything
    else that got this far is a violation of the pipeline itself. Whatever a table above did wrong ends here. No packet
    leaves by the port it came in by.
    """

    id = 9
    name = "output_guard"
    tables = (OUTPUT_GUARD,)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        yield OUTPUT_GUARD.flow(Band.REST, self.own_network(frame), violation(Violation.GUARD))
        if frame.egress_port is not None and frame.egress_open:
            yield self._output(frame.egress_port, Role.EGRESS)
        elif frame.egress_port is not None:
            yield OUTPUT_GUARD.flow(Band.OWN, self.own("kill-switch"), reg1=frame.egress_port)
        if frame.mesh_port is not None:
            yield self._output(frame.mesh_port, Role.MESH)
        if frame.host_port is not None and frame.host_takes_part:
            yield self._output(frame.host_port, Role.HOST)

    def member(self, frame: Frame, placed: Placed) -> Iterator[Flow]:
        yield self._output(placed.port, Role.CONTAINER, f"member/{placed.member.id}")

    def _output(self, port: int, role: Role, name: str | None = None) -> Flow:
        out = LOCAL_OUT if port == fields.LOCAL else port
        return OUTPUT_GUARD.flow(
            Band.OWN,
            self.own(name or f"port/{role}"),
            act(Output(port)),
            reg1=out,
            reg0=any_role(*MAY_SEND_TO[role]),
        )
