"""The gate: a state's flows are proved before they are used. There is no way around it. Imports prove and compile."""

from __future__ import annotations

from collections.abc import Container

from controller.compile import BridgeCompiler, planned_ports
from controller.model import Bridge, DesiredState
from controller.verify.prove import Finding, Unsafe, prove


def try_proof(state: DesiredState, without: Container[Bridge] = ()) -> None:
    """Compile and prove every bridge, but those given, without a switch. Raises `Conflict` or `Unsafe`."""
    found: list[Finding] = []
    for bridge in state.bridges:
        if bridge not in without:
            ports = planned_ports(state, bridge)
            found += prove(state, bridge, ports, BridgeCompiler().compile(state, bridge, ports).flows.values())
    if found:
        raise Unsafe(tuple(found))
