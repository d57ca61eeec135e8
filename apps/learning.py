"""What the switch learns by itself: return paths, made of `learn` actions (`ovs-actions(7)`).

The learned flows are kept apart by cookie, so that one kind cannot use up the limit of another.
"""

from __future__ import annotations

from apps.base import IPV4, SCTP, TCP, UDP
from controller import fields
from controller.fields import Field
from controller.flow import Bits, Flow, Learn, LearnLoad, LearnMatch, Load, SetField, whole
from controller.frame import cookie
from controller.model import Role
from controller.pipeline import OUT_BITS, RETURN, RETURNED, ROLE, role_value

APP_ID = 6
IDLE_S = 300
"""A return path ends so long after its last packet in."""
HARD_S = 600
"""And so long after the last packet out, however much comes in: every packet out starts this time anew."""
LIMIT = 4096
"""Learned paths of one kind on one bridge. Beyond it the switch learns no more and what comes back drops."""
PRIORITY = 100

CONTAINERS = cookie(APP_ID, "returns/containers", learned=True)
MESH = cookie(APP_ID, "returns/mesh", learned=True)
REPLIES = cookie(APP_ID, "returns/replies", learned=True)
MESH_REPLIES = cookie(APP_ID, "returns/mesh-replies", learned=True)

_PORTS: dict[int, tuple[Field, Field]] = {
    TCP: (fields.TCP_SRC, fields.TCP_DST),
    UDP: (fields.UDP_SRC, fields.UDP_DST),
    SCTP: (fields.SCTP_SRC, fields.SCTP_DST),
}

_CHOOSE = (
    LearnLoad(1, whole(RETURNED)),
    LearnLoad(Bits(fields.IN_PORT_16.header, 0, 16), OUT_BITS),
    LearnLoad(whole(fields.ETH_SRC), whole(fields.ETH_DST)),
)


_KINDS = {CONTAINERS: PRIORITY, MESH: PRIORITY, REPLIES: PRIORITY, MESH_REPLIES: PRIORITY - 1}
_REPLIES = {REPLIES, MESH_REPLIES}
_CHOICE = {RETURNED.header, OUT_BITS.header, fields.ETH_DST.header}


def is_path(flow: Flow) -> bool:
    """Whether a flow is one of those: cookies can be forged, so it has to look like one too, and to end like one.

    It may choose a port for answers to one address and do nothing else; the output guard has the last word on the port.
    """
    if (flow.table, flow.priority, flow.goto) != (RETURN.id, _KINDS.get(flow.cookie), None):
        return False
    if (flow.idle_s, flow.hard_s) != (IDLE_S, HARD_S):
        return False
    whose = flow.match.get(fields.IN_PORT_FIELD if flow.cookie in _REPLIES else ROLE)
    target = flow.match.get(fields.IPV4_DST)
    if whose is None or target is None or target[1] != fields.IPV4_DST.full:
        return False
    if flow.cookie not in _REPLIES and whose != (role_value(Role.EGRESS), ROLE.full):
        return False
    return all(
        (isinstance(action, SetField) and action.header in _CHOICE)
        or (isinstance(action, Load) and action.target.header in _CHOICE)
        for action in flow.actions
    )


def stale(flow: Flow, there: frozenset[int]) -> bool:
    """Whether a learned path leads to, or starts from, a port that is not there (any more).

    `there` are port numbers in 16 bits, as learned flows hold them.
    """
    used = [action.value for action in flow.actions if isinstance(action, Load) and action.target == OUT_BITS]
    in_port = flow.match.get(fields.IN_PORT_FIELD)
    if in_port is not None:
        used.append(in_port[0] & 0xFFFF)
    return not there.issuperset(used)


def learn_return(role: Role) -> Learn:
    """Learned from a packet that leaves by the egress: answers to its sender may come in, to its port and MAC."""
    return Learn(
        RETURN.id,
        PRIORITY,
        MESH if role is Role.MESH else CONTAINERS,
        IDLE_S,
        HARD_S,
        LIMIT,
        (
            LearnMatch(whole(ROLE), role_value(Role.EGRESS)),
            LearnMatch(whole(fields.ETH_TYPE), IPV4),
            LearnMatch(whole(fields.IPV4_DST), whole(fields.IPV4_SRC)),
            *_CHOOSE,
        ),
    )


def learn_reply(server_port: int, protocol: int, role: Role = Role.HOST) -> Learn:
    """Learned from a client's packet to a service: the server's answers to that client, and only those, go back
    through the port the client came in by. `server_port` is the OpenFlow port of the server, `role` the client's.

    Across the mesh a client may have any address: such paths have a limit of their own, and give way to the host's, so
    that no peer can use up the room for the host's clients or draw their answers to itself.
    """
    source, target = _PORTS[protocol]
    return Learn(
        RETURN.id,
        PRIORITY - 1 if role is Role.MESH else PRIORITY,
        MESH_REPLIES if role is Role.MESH else REPLIES,
        IDLE_S,
        HARD_S,
        LIMIT,
        (
            LearnMatch(Bits(fields.IN_PORT_16.header, 0, 16), server_port & 0xFFFF),
            LearnMatch(whole(fields.ETH_TYPE), IPV4),
            LearnMatch(whole(fields.IP_PROTO), protocol),
            LearnMatch(whole(fields.IPV4_SRC), whole(fields.IPV4_DST)),
            LearnMatch(whole(fields.IPV4_DST), whole(fields.IPV4_SRC)),
            LearnMatch(whole(source), whole(target)),
            LearnMatch(whole(target), whole(source)),
            *_CHOOSE,
        ),
    )
