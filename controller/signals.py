"""What goes into the core (signals) and what comes out of it (effects), as values.

Switches are named by their datapath id. Imports codec, diff, events and below; nothing that does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from controller.codec import FlowRemoved, FlowStats, FlowUpdate, PacketIn
from controller.diff import Plan
from controller.events import Event
from controller.flow import Flow
from controller.frame import Port
from controller.model import DesiredState
from controller.problems import Problem

# ------------------------------------------------------------------------------------------------------------ signals


@dataclass(frozen=True, slots=True)
class SwitchUp:
    """A switch has connected and told its ports. `local_name` is the name of its LOCAL port: the bridge's own."""

    dpid: int
    local_name: str
    ports: tuple[Port, ...]
    peer: str = ""


@dataclass(frozen=True, slots=True)
class SwitchDown:
    """The connection to a switch is gone."""

    dpid: int


@dataclass(frozen=True, slots=True)
class Dumped:
    """Every flow of a switch, as asked for by `Dump`."""

    dpid: int
    flows: tuple[FlowStats, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """The bundle of `Install` number `token` is in force."""

    dpid: int
    token: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The bundle of `Install` number `token` was discarded, or nobody knows what became of it; `why` says more."""

    dpid: int
    token: int
    why: str


@dataclass(frozen=True, slots=True)
class PortChanged:
    """A port came, changed, or (`gone`) went."""

    dpid: int
    port: Port
    gone: bool = False


@dataclass(frozen=True, slots=True)
class FlowsChanged:
    """The switch's flow monitor tells of changes that others made, or the switch itself."""

    dpid: int
    updates: tuple[FlowUpdate, ...]


@dataclass(frozen=True, slots=True)
class FlowGone:
    """A flow that had asked for it is gone, with its final counters."""

    dpid: int
    removed: FlowRemoved


@dataclass(frozen=True, slots=True)
class PacketSeen:
    """The switch shows us a packet."""

    dpid: int
    packet: PacketIn


@dataclass(frozen=True, slots=True)
class Counted:
    """The flows of table VIOLATION with their counters, as asked for by `Count`."""

    dpid: int
    flows: tuple[FlowStats, ...]


@dataclass(frozen=True, slots=True)
class StateLoaded:
    """Something else is desired, and valid: `whole` where the state file was read, else only records have changed, and
    bridges that stay as they are need no word."""

    state: DesiredState
    source: str = ""
    whole: bool = True


@dataclass(frozen=True, slots=True)
class StateRejected:
    """The state file was read and is not valid; the old state stays."""

    source: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class BridgeFacts:
    """What OVSDB says of one bridge."""

    name: str
    dpid: int
    fail_mode: str
    in_band: bool


@dataclass(frozen=True, slots=True)
class FactsSeen:
    """Every bridge in OVSDB, whenever one of them changes."""

    bridges: tuple[BridgeFacts, ...]


@dataclass(frozen=True, slots=True)
class EgressHealth:
    """Whether the tunnel behind a network's egress works, for whoever probes it."""

    network: str
    healthy: bool


@dataclass(frozen=True, slots=True)
class SwitchError:
    """An OpenFlow error that no bundle of ours explains, or a message that could not be read."""

    dpid: int
    text: str


@dataclass(frozen=True, slots=True)
class Seal:
    """An operator cuts a network off: nothing may come in by this port of a bridge of it until it is unsealed."""

    bridge: str
    port: str


@dataclass(frozen=True, slots=True)
class Unseal:
    """An operator says that a sealed port of a bridge may be used again."""

    bridge: str
    port: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Signal = (
    SwitchUp
    | SwitchDown
    | Dumped
    | Committed
    | Refused
    | PortChanged
    | FlowsChanged
    | FlowGone
    | PacketSeen
    | Counted
    | StateLoaded
    | StateRejected
    | FactsSeen
    | EgressHealth
    | SwitchError
    | Seal
    | Unseal
    | Tick
)

# ------------------------------------------------------------------------------------------------------------ effects


@dataclass(frozen=True, slots=True)
class Dump:
    """Watch the switch's flows from now on, see to its controller meter, and ask for all its flows."""

    dpid: int


@dataclass(frozen=True, slots=True)
class Install:
    """Put a plan into force: one atomic bundle, a barrier, then commit, or discard on any error."""

    dpid: int
    token: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class AddFlow:
    """Add one flow that ends by itself."""

    dpid: int
    flow: Flow


@dataclass(frozen=True, slots=True)
class SendPacket:
    """Send a packet out of one port."""

    dpid: int
    port: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Count:
    """Ask for the counters of table VIOLATION."""

    dpid: int


@dataclass(frozen=True, slots=True)
class Log:
    """Write an event to the log."""

    event: Event


Effect = Dump | Install | AddFlow | SendPacket | Count | Log
