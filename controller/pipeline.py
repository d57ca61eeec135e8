"""The tables of the pipeline, declared once as data: ids, what they may match, do, and where they may go.

A flow is only ever made by its table (`ISOLATE.flow(...)`), which refuses what it does not allow; so a mistake in an
app is an error at compile time and not a hole. The miss of every table is drop; NORMAL appears nowhere.

Registers: ROLE says what the packet came in by, OUT where it is to go (16-bit port number), KIND which violation it
is, RETURNED that a learned return path has chosen OUT, GRANTED which grant lets it cross. Imports model, fields and flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from controller import fields
from controller.fields import BY_NAME, Field
from controller.flow import (
    Action,
    Bits,
    Ct,
    DecTtl,
    Flow,
    Learn,
    Match,
    Move,
    Output,
    Resubmit,
    SetField,
    match_item,
    whole,
)
from controller.model import Role
from controller.problems import PipelineError

MatchValue = int | tuple[int, int]

ROLE, OUT, KIND, RETURNED = fields.REGS[:4]
GRANTED = fields.REGS[5]

LOCAL_OUT = 0xFFFE
"""The host's port as OUT holds it: port numbers are kept in 16 bits, as `learn` can copy them."""

OUT_BITS = Bits(OUT.header, 0, 16)

_VALID = 1 << 31
ROLE_BITS = {role: 1 << bit for bit, role in enumerate(Role)}


def role_value(role: Role) -> int:
    """What ROLE holds for packets of a port of that role: one bit of its own, and a bit that is never 0."""
    return _VALID | ROLE_BITS[role]


def any_role(*roles: Role) -> tuple[int, int]:
    """(value, mask) of ROLE that is true for these roles and no other, nor for a ROLE that nobody set."""
    forbidden = sum(bit for role, bit in ROLE_BITS.items() if role not in roles)
    return _VALID, _VALID | forbidden


class Violation(IntEnum):
    """Kinds of violation, as KIND holds them."""

    CROSSING = 1
    SPOOF = 2
    ROGUE_DHCP = 3
    ROGUE_RA = 4
    UNSOLICITED = 5
    GUARD = 6
    NO_EGRESS = 7

    @property
    def words(self) -> str:
        """What it is called in the event log."""
        return _VIOLATION_WORDS[self]


_VIOLATION_WORDS = {
    Violation.CROSSING: "tried to reach another network",
    Violation.SPOOF: "sent from an address that is not its own",
    Violation.ROGUE_DHCP: "acted as a DHCP server",
    Violation.ROGUE_RA: "sent an IPv6 router advertisement",
    Violation.UNSOLICITED: "sent traffic in that nobody inside had asked for",
    Violation.GUARD: "had a packet stopped by the output guard; this is a defect of the rules above it",
    Violation.NO_EGRESS: "tried to leave a network that has no egress",
}


REFUSED = frozenset((Violation.CROSSING, Violation.NO_EGRESS))
"""Violations that are answered where the network says so: the sender is known to be who it claims."""


class Band(IntEnum):
    """Named priorities. A table uses the bands it needs; the higher wins."""

    MISS = 0
    REST = 100
    KNOWN = 200
    OWN = 300
    CLAIMED = 350
    DENY = 400
    HARD_DENY = 500
    FRAME_DENY = 600
    RULE = 1000
    """Rules of the state file stand at RULE + rank."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One table: what it does, the fields its flows may match, the tables they may go to, the actions they may have."""

    id: int
    name: str
    does: str
    fields: frozenset[Field]
    actions: tuple[type, ...] = ()
    next: tuple[Table, ...] = ()
    max_priority: int = Band.FRAME_DENY + 50

    def flow(self, priority: int, cookie: int, then: Then | None = None, /, **match: MatchValue) -> Flow:
        """A flow of this table; `match` by field name, a value or (value, mask). Without `then` it drops.

        Raises `PipelineError` for a field, action, priority or next table that is not declared.
        """
        items = []
        for name, value in match.items():
            field = BY_NAME.get(name)
            if field is None or field not in self.fields:
                raise PipelineError(f"{self.name} may not match {name}")
            try:
                items.append(match_item(field, value))
            except ValueError as exc:
                raise PipelineError(f"{self.name}: {exc}") from exc
        actions, goto = then or DROP
        for action in actions:
            self._check(action)
        if goto is not None and (goto not in self.next or goto.id <= self.id):
            raise PipelineError(f"{self.name} may not go to {goto.name}")
        if not 0 <= priority <= self.max_priority:
            raise PipelineError(f"{self.name} has no priority {priority}")
        next_id = goto.id if goto is not None else None
        return Flow(self.id, int(priority), Match.of(items), actions, next_id, cookie)

    def _check(self, action: Action) -> None:
        if not isinstance(action, self.actions):
            raise PipelineError(f"{self.name} may not {type(action).__name__.lower()}")
        if isinstance(action, Output) and action.port in (fields.NORMAL, fields.FLOOD, fields.ALL):
            raise PipelineError(f"{self.name}: {action} decides for itself where packets go; name a port")
        if isinstance(action, Resubmit) and action.table != RETURN.id:
            raise PipelineError(f"{self.name} may consult {RETURN.name} only, not table {action.table}")
        if isinstance(action, Ct) and action.table not in (None, *(table.id for table in self.next)):
            raise PipelineError(f"{self.name} may not go to table {action.table}")
        if isinstance(action, Learn) and action.table != RETURN.id:
            raise PipelineError(f"{self.name} may learn into {RETURN.name} only, not table {action.table}")


class Then(NamedTuple):
    """What becomes of a packet: actions, then a next table. Neither: it drops."""

    actions: tuple[Action, ...] = ()
    goto: Table | None = None

    def after(self, *actions: Action) -> Then:
        """The same, with these actions first."""
        return Then((*actions, *self.actions), self.goto)


DROP = Then()


def go(table: Table) -> Then:
    """On to `table`, unchanged."""
    return Then((), table)


def act(*actions: Action) -> Then:
    """These actions and no further table."""
    return Then(actions)


def _fields(*names: str) -> frozenset[Field]:
    return frozenset(BY_NAME[name] for name in names)


_L4 = ("tcp_src", "tcp_dst", "udp_src", "udp_dst", "sctp_src", "sctp_dst", "icmpv4_type", "icmpv4_code")
_CROSSING = ("eth_type", "ip_proto", "ip_frag", "ipv4_src", "ipv4_dst", *_L4[:6])
_IPV4 = ("eth_type", "ip_proto", "ipv4_src", "ipv4_dst", "ip_dscp")

VIOLATION = Table(
    100,
    "VIOLATION",
    "shows the controller a metered sample and counts the rest, per port",
    _fields("in_port", "reg2"),
    (Output,),
)
OUTPUT_GUARD = Table(
    90,
    "OUTPUT_GUARD",
    "may this role send to that port? Output, or drop and shout",
    _fields("reg0", "reg1"),
    (Output, SetField),
    (VIOLATION,),
)
FORWARD = Table(
    80,
    "FORWARD",
    "known member by address to port",
    _fields("reg0", "eth_type", "ipv4_dst"),
    (SetField,),
    (OUTPUT_GUARD,),
)
EGRESS = Table(
    70,
    "EGRESS",
    "traffic to the world: learn the return path, out of the egress leg; drop when the tunnel is down",
    _fields("reg0", "reg3", "in_port", "eth_type", "ip_proto", "ip_frag", "ipv4_src", "ipv4_dst", "udp_src"),
    (SetField, Learn),
    (FORWARD, OUTPUT_GUARD, VIOLATION),
)
RETURN = Table(60, "RETURN", "learned return paths; consulted, never gone to", frozenset())
SERVICE = Table(
    50,
    "SERVICE",
    "declared services on their own addresses, and the state file's own rules",
    _fields("reg0", "in_port", *_IPV4, *_L4),
    (SetField, Learn, Resubmit),
    (EGRESS, OUTPUT_GUARD),
    max_priority=0xFFFF,
)
ISOLATE = Table(
    40,
    "ISOLATE",
    "anything to a foreign network's addresses is a violation",
    _fields("eth_type", "ipv4_dst"),
    (SetField,),
    (SERVICE, VIOLATION),
)
CROSS = Table(
    35,
    "CROSS",
    "approved crossings whose connection is known: only the granted side opens one, only replies come back",
    _fields("in_port", "ct_state", *_CROSSING),
    (SetField, Ct, DecTtl),
    (OUTPUT_GUARD, VIOLATION),
)
GRANT = Table(
    30,
    "GRANT",
    "looks up the connections of approved crossings",
    _fields("in_port", *_CROSSING),
    (Ct,),
    (CROSS, ISOLATE),
)
NEIGHBOUR = Table(
    20,
    "NEIGHBOUR",
    "answers ARP for the gateway and every known member; nothing is flooded",
    _fields("in_port", "eth_type", "arp_op", "arp_tpa"),
    (SetField, Move, Output),
    (VIOLATION,),
)
SPOOF_GUARD = Table(
    10,
    "SPOOF_GUARD",
    "Ethernet, IPv4 and ARP sender must be the port's own; no DHCP server",
    _fields("in_port", "eth_src", *_IPV4, "udp_src", "udp_dst", "icmpv4_type", "arp_op", "arp_sha", "arp_spa"),
    (SetField,),
    (NEIGHBOUR, GRANT, VIOLATION),
)
ADMIT = Table(
    0,
    "ADMIT",
    "gives a known port its role; unknown ports, tags, reserved multicast and other ethertypes drop",
    _fields("in_port", "eth_dst", "eth_type", "vlan_vid", "ip_proto", "icmpv6_type", "udp_src"),
    (SetField,),
    (SPOOF_GUARD, VIOLATION),
)
CROSSOVER = Table(
    0,
    "CROSSOVER",
    "mesh bridges: one pair of ports crossed over, untagged IPv4 and ARP only",
    _fields("in_port", "eth_dst", "eth_type", "vlan_vid"),
    (Output,),
)
CANARY = Table(250, "CANARY", "holds one flow that says this switch still has ours", frozenset())

SOCKET_TABLES = (
    ADMIT,
    SPOOF_GUARD,
    NEIGHBOUR,
    GRANT,
    CROSS,
    ISOLATE,
    SERVICE,
    RETURN,
    EGRESS,
    FORWARD,
    OUTPUT_GUARD,
    VIOLATION,
    CANARY,
)
MESH_TABLES = (CROSSOVER, CANARY)


def table_name(number: int, *, mesh: bool = False) -> str:
    """The name of a table, or its number where it is not one of ours."""
    for table in MESH_TABLES if mesh else SOCKET_TABLES:
        if table.id == number:
            return table.name
    return str(number)


def set_field(field: Field, value: int) -> SetField:
    """Write `value` over a whole field."""
    return SetField(field.header, int(value))


def violation(kind: Violation) -> Then:
    """To VIOLATION, as this kind."""
    return Then((set_field(KIND, kind),), VIOLATION)


def deliver(port: int, mac: int | None = None) -> Then:
    """Ask OUTPUT_GUARD to send the packet out of `port`, to `mac` if given."""
    out = set_field(OUT, port & 0xFFFF)
    return Then((out,) if mac is None else (out, set_field(fields.ETH_DST, mac)), OUTPUT_GUARD)


def arp_reply(mac: int) -> Then:
    """Turn an ARP request into the answer that its target is at `mac`, and send it back where it came from (RFC 826)."""
    return act(
        Move(whole(fields.ETH_SRC), whole(fields.ETH_DST)),
        set_field(fields.ETH_SRC, mac),
        set_field(fields.ARP_OP, 2),
        Move(whole(fields.ARP_SHA), whole(fields.ARP_THA)),
        Move(whole(fields.ARP_TPA), Bits(fields.REGS[4].header, 0, 32)),
        Move(whole(fields.ARP_SPA), whole(fields.ARP_TPA)),
        Move(Bits(fields.REGS[4].header, 0, 32), whole(fields.ARP_SPA)),
        set_field(fields.ARP_SHA, mac),
        Output(fields.IN_PORT),
    )
