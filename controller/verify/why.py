"""Why somebody can reach somebody, or cannot: the answer by proof, the reason by one packet's way.

Imports reach and tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from controller import fields
from controller.events import JSON
from controller.grants import openings
from controller.model import DesiredState, Ipv4, Role
from controller.problems import BulkheadError
from controller.verify.endpoints import SOMEBODY, Endpoint, packet, services, vpn_port
from controller.verify.node import Arrival, Node
from controller.verify.policy import PROTOCOLS
from controller.verify.reach import FRAMES, Kind, Replies, inside, kind_of, kinds_of
from controller.verify.space import bits, meet
from controller.verify.tell import Teller, Told, who

Service = tuple[str, int]
"""A protocol, with 0 for the port where it has none."""


class Verdict(StrEnum):
    """`answers`: only as an answer to what the other has sent."""

    YES = "yes"
    NO = "no"
    ANSWERS = "answers"


@dataclass(frozen=True, slots=True)
class Why:
    """The answer in words, the packet that shows it, bridge by bridge, and what would have to be said to change it."""

    verdict: Verdict
    answer: str
    told: tuple[Told, ...]
    needed: str = ""

    @property
    def decided_by(self) -> str:
        """The rule that decides, in words."""
        last = self.told[-1]
        if last.decider is None:
            return ""
        line = last.decider
        if line.flow is None:
            return f"{last.bridge}, {line.name}: {line.says}"
        return f"{last.bridge}, {line.name}, priority {line.flow.priority}, {line.app} ({line.object}): {line.says}"

    def as_data(self) -> dict[str, JSON]:
        """As JSON values."""
        found: dict[str, JSON] = {"verdict": self.verdict, "answer": self.answer, "decided_by": self.decided_by}
        return found | {"needed": self.needed, "way": [told.as_data() for told in self.told]}


def read_service(text: str, offered: Mapping[Service, str]) -> Service:
    """`tcp/9573`, `9573` (TCP), `icmp`, or the name of something offered. Raises `BulkheadError`."""
    for key, name in offered.items():
        if text == name:
            return key
    protocol, slash, port = text.rpartition("/")
    protocol = (protocol if slash else "tcp").lower()
    if text.lower() == "icmp":
        return "icmp", 0
    if protocol in PROTOCOLS and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 0x10000:
        return protocol, int(port)
    names = f", or a service there: {', '.join(offered.values())}" if offered else ""
    expected = f"tcp/9573, udp/53, sctp/5060, 9573 or icmp, ports from 1 to 65535{names}"
    raise BulkheadError(f"{text[:60]!r} is not a port; expected {expected}")


def why(
    state: DesiredState, source: Endpoint, target: Endpoint, service: Service | None = None, *, to: Ipv4 | None = None
) -> Why:
    """Whether `source` can reach `target`, by `service` or at all, and with `to` at that address of the many behind it.

    Raises `TooLarge`, `Exhausted` or `Conflict`.
    """
    node, teller = Node.declared(state), Teller(state)
    offered = services(target, vpn_port(state, target))
    arrivals = [a for a in node.arrivals(source.end, taught=True) if a.end == target.end]
    arrivals = Replies(state).without(source, target, arrivals)
    grants = _grants(state, source, target)
    kinds = (kind_of(*service),) if service is not None else kinds_of(arrivals, offered)
    if to is not None:
        kinds = tuple(_at(kind, to) for kind in kinds)
    found = {learned: _example(arrivals, kinds, learned=learned) for learned in (False, True)}
    verdict = Verdict.YES if found[False] is not None else Verdict.ANSWERS if found[True] is not None else Verdict.NO
    asked = service or next(iter(grants), next(iter(offered), ("tcp", 80)))
    header = packet(source, target, *asked)
    example = found[False]
    if example is not None:
        # The host has another address in the world, and that may be the one that gets there.
        usual = (header, packet(replace(source, address=SOMEBODY), target, *asked))
        header = next((each for each in usual if _arrives(node, source, target, each)), example)
    told = _tell(node, teller, source, header)
    answer = _answer(verdict, source, target, service, to)
    if verdict is Verdict.YES and grants:
        answer += f" {_by_grants(grants, service)}"
    if verdict is Verdict.NO and (back := _grants(state, target, source)):
        answer = f"No: {who(source)} can open nothing to {who(target)}, and only replies to {_listed(back)}."
    needed = "" if verdict is Verdict.YES else _needed(state, source, target, service, told[-1])
    return Why(verdict, answer, told, needed)


def _grants(state: DesiredState, source: Endpoint, target: Endpoint) -> dict[Service, str]:
    """What grants open from one to the other, with the grant."""
    if source.member is None or target.member is None:
        return {}
    ends = source.member.id, target.member.id
    return {(o.protocol, o.port): o.grant for o in openings(state) if (o.source.id, o.target.id) == ends}


def _listed(grants: Mapping[Service, str]) -> str:
    return " and ".join(f"{protocol} port {port} (grant {grant})" for (protocol, port), grant in grants.items())


def _by_grants(grants: Mapping[Service, str], service: Service | None) -> str:
    opened = grants if service is None else {service: grants[service]}
    return f"Open is {_listed(opened)}, with replies."


def _at(kind: Kind, address: Ipv4) -> Kind:
    """Those of a kind that are for one address; frames that have none stay."""
    cube = meet(kind.cube, bits(fields.IPV4_DST, address))
    return kind if cube is None or kind.label == FRAMES else kind._replace(cube=cube)


def _example(arrivals: list[Arrival], kinds: tuple[Kind, ...], *, learned: bool) -> int | None:
    headers = (inside(a.region, kind) for kind in kinds for a in arrivals if a.learned == learned)
    return next((header for header in headers if header is not None), None)


def _tell(node: Node, teller: Teller, source: Endpoint, header: int) -> tuple[Told, ...]:
    return tuple(teller.tell(leg, node.bridges[leg.bridge]) for leg in node.follow(source.end, header))


def _arrives(node: Node, source: Endpoint, target: Endpoint, header: int) -> bool:
    return any((leg.bridge, port) == target.end for leg in node.follow(source.end, header) for port, _ in leg.sent)


def _by(service: Service | None) -> str:
    if service is None:
        return ""
    protocol, port = service
    return f" by {protocol}" + (f" port {port}" if port else "")


def _answer(verdict: Verdict, source: Endpoint, target: Endpoint, service: Service | None, to: Ipv4 | None) -> str:
    one, by = who(source), _by(service)
    other = who(target) if to is None else f"{to} by {who(target)}"
    if verdict is Verdict.YES:
        return f"Yes: {one} can reach {other}{by}."
    if verdict is Verdict.ANSWERS:
        return f"Only with answers: what {one} sends gets to {other}{by} once {other} has sent something to it, not before."
    return f"No: no packet that {one} can send gets to {other}{by}."


def _needed(state: DesiredState, source: Endpoint, target: Endpoint, service: Service | None, last: Told) -> str:
    """What would have to be said for it to pass, or that nothing does that."""
    if source.role is Role.EGRESS:
        return "Nothing does: what comes in from the world are answers only, to whoever sent something out before"
    if target.role is Role.EGRESS and source.network != target.network:
        return _way_out(state, source, target)
    if target.role is Role.HOST:
        return "Nothing does: the host offers its networks nothing. Put the service into a container"
    if source.network != target.network:
        return _needs_grant(state, source, target, service)
    stopper = last.decider
    if stopper is not None and stopper.app == "services" and stopper.object.startswith("openflow."):
        return f"The state file's own flow stops it: change or remove {stopper.object}"
    if source.role is Role.HOST and target.member is not None:
        return _exposed(state, target, service)
    return "Nothing in the state file does this: the line above says which rule decides"


def _needs_grant(state: DesiredState, source: Endpoint, target: Endpoint, service: Service | None) -> str:
    names = f"from {source.name} ({source.network}) to {target.name} ({target.network})"
    if source.member is None or target.member is None:
        return (
            f"Nothing does: only an approved grant joins two networks, from a container to a container, so not {names}. "
            "Nothing in a state file does"
        )
    if service is not None and service[0] == "icmp":
        return f"Nothing does: a grant {names} is for tcp, udp or sctp and one port, and icmp has none"
    opened = _grants(state, source, target)
    told = f" Open is {_listed(opened)} alone." if opened else ""
    by = _by(service) or " by one protocol and port"
    wanted = "/".join(map(str, service)) if service is not None else "PORT"
    return (
        f"An approved grant {names}{by}, with replies and nothing else coming back; nothing in a state file joins two "
        f"networks.{told} Ask for one: bulkhead grant request {source.name} "
        f"{target.name} {wanted}"
    )


def _way_out(state: DesiredState, source: Endpoint, target: Endpoint) -> str:
    if state.network(source.network).egress is not None:
        return (
            f"Nothing does: {source.network} leaves by {source.network}/egress, and nobody leaves by another network's tunnel. "
            f"Ask about {source.network}/egress"
        )
    return (
        f"{source.network} has no way out of its own, and nobody leaves by another network's tunnel: declare a tunnel's port "
        f"as networks.{source.network}.egress"
    )


def _exposed(state: DesiredState, target: Endpoint, service: Service | None) -> str:
    """What lets the host reach a container."""
    assert target.member is not None
    network = state.network(target.network)
    host = "" if network.host is not None else f"networks.{network.name}.host, and "
    declared = next((s for s in target.member.services if (s.protocol, s.port) == service), None)
    if declared is not None and not declared.exposed:
        return f"Declare {host}exposed: true at the service {declared.name} of {target.name}"
    if service is not None and service[0] == "icmp":
        return "Nothing does: the host reaches services of containers, by protocol and port, and icmp has no port"
    by = _by(service).removeprefix(" by ") or "what it shall reach"
    return f"Declare {host}{by} among the services of {target.name} with exposed: true"
