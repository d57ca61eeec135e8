"""One connected switch as the core knows it. Imports what belongs to a switch: ports, flows, offenders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from apps.grants import Grants
from controller import fields
from controller.compile import BridgeCompiler
from controller.flow import Cookie, Flow, FlowKey
from controller.frame import LOCAL_NAME, Port
from controller.model import Bridge, BridgeKind, DesiredState
from controller.offenders import Offenders
from controller.pipeline import CROSS, OUTPUT_GUARD, table_name
from controller.reconcile import Reconciler
from controller.verify.prove import Prover

RESERVED_PORTS = 0xFF00


@dataclass(slots=True)
class Switch:
    """One connected switch: which bridge it is (None: nobody declared it), its ports, and the state of its flows."""

    dpid: int
    name: str
    bridge: Bridge | None
    ports: dict[str, Port]
    flows: Reconciler
    compiler: BridgeCompiler
    offenders: Offenders = field(default_factory=Offenders)
    egress_up: bool | None = None
    missing: tuple[str, ...] = ()
    prover: Prover = field(default_factory=Prover)
    _granted: tuple[int, frozenset[int]] = (-1, frozenset())
    proved: tuple[DesiredState, dict[str, int], Mapping[FlowKey, Flow]] | None = None
    """What was last proved: a state, port numbers and flows. The same again need not be."""

    def port_name(self, number: int) -> str:
        """The name of a port, or its number where there is none of that number (any more)."""
        for port in self.ports.values():
            if port.number == number:
                return port.name
        return f"port {number}"

    @property
    def granted(self) -> frozenset[int]:
        """The objects of cookies of grants' flows that the switch holds."""
        seen, found = self._granted
        if seen != self.flows.changes:
            found = frozenset(_granted(self.flows.installed.values()))
            self._granted = self.flows.changes, found
        return found

    @property
    def is_mesh(self) -> bool:
        """Whether it is a mesh bridge, whose tables are others."""
        return self.bridge is not None and self.bridge.kind is BridgeKind.MESH


def _granted(flows: Iterable[Flow]) -> Iterator[int]:
    for flow in flows:
        parts = Cookie.of(flow.cookie) if flow.table == CROSS.id and flow.goto == OUTPUT_GUARD.id else None
        if parts is not None and parts.app == Grants.id:
            yield parts.object


def flow_words(flow: Flow, switch: Switch | None) -> str:
    """A flow with the name of its table, in ovs-ofctl syntax otherwise."""
    return f"{table_name(flow.table, mesh=bool(switch and switch.is_mesh))}: {flow}"


def name_of(port: Port) -> str:
    """What a port is called here: the host's is LOCAL, whatever the bridge's name."""
    return LOCAL_NAME if port.number == fields.LOCAL else port.name


def is_real(port: Port) -> bool:
    """Not an interface that somebody called LOCAL, nor a number that stands for no port and would be taken for one."""
    return port.number == fields.LOCAL or (port.name != LOCAL_NAME and port.number < RESERVED_PORTS)


def dpid_words(dpid: int) -> str:
    """A datapath id as ovs-vsctl writes it."""
    return f"{dpid:016x}"
