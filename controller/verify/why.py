"""Why somebody can reach somebody, or cannot: the answer by proof, the reason by one packet's way.

Imports reach and tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from controller.events import JSON
from controller.model import DesiredState, Role
from controller.problems import BulkheadError
from controller.verify.endpoints import Endpoint, packet, services, vpn_port
from controller.verify.node import Arrival, Node
from controller.verify.policy import PROTOCOLS
from controller.verify.reach import Kind, inside, kind_of, kinds_of
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
    if protocol in PROTOCOLS and port.isdecimal() and int(port) < 0x10000:
        return protocol, int(port)
    names = f", or one of {', '.join(offered.values())}" if offered else ""
    raise BulkheadError(f"{text[:60]!r} is not a port; expected tcp/9573, udp/53, sctp/5060, 9573 or icmp{names}")


def why(state: DesiredState, source: Endpoint, target: Endpoint, service: Service | None = None) -> Why:
    """Whether `source` can reach `target`, by `service` or at all. Raises `TooLarge`, `Exhausted` or `Conflict`."""
    node, teller = Node.declared(state), Teller(state)
    offered = services(target, vpn_port(state, target))
    arrivals = [a for a in node.arrivals(source.end, taught=True) if a.end == target.end]
    kinds = (kind_of(*service),) if service is not None else kinds_of(arrivals, offered)
    found = {learned: _example(arrivals, kinds, learned=learned) for learned in (False, True)}
    verdict = Verdict.YES if found[False] is not None else Verdict.ANSWERS if found[True] is not None else Verdict.NO
    asked = service or next(iter(offered), ("tcp", 80))
    header = packet(source, target, *asked)
    told = _tell(node, teller, source, header)
    example = found[False]
    if example is not None and not _arrives(node, source, target, header):
        told = _tell(node, teller, source, example)
    answer = _answer(verdict, source, target, service)
    needed = "" if verdict is Verdict.YES else _needed(state, source, target, asked, told[-1])
    return Why(verdict, answer, told, needed)


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


def _answer(verdict: Verdict, source: Endpoint, target: Endpoint, service: Service | None) -> str:
    one, other, by = who(source), who(target), _by(service)
    if verdict is Verdict.YES:
        return f"Yes: {one} can reach {other}{by}."
    if verdict is Verdict.ANSWERS:
        return f"Only with answers: what {one} sends gets to {other}{by} once {other} has sent something to it, not before."
    return f"No: no packet that {one} can send gets to {other}{by}."


def _needed(state: DesiredState, source: Endpoint, target: Endpoint, service: Service, last: Told) -> str:
    """What would have to be said for it to pass."""
    by = _by(service).removeprefix(" by ")
    roles = source.role, target.role
    if source.role is Role.EGRESS:
        return "Nothing comes in from the world but answers. A service for the world is not what this is made for"
    if source.network != target.network:
        if target.role is Role.EGRESS:
            return f"{source.network} has no way out of its own: declare networks.{source.network}.egress"
        return (
            f"A grant from {source.name} ({source.network}) to {target.name} ({target.network}) for {by}: an approved one "
            "would open this direction and let only replies back. Nothing else opens a way between two networks"
        )
    if roles == (Role.HOST, Role.CONTAINER):
        network = state.network(target.network)
        host = "" if network.host is not None else f"networks.{network.name}.host, and "
        return f"Declare {host}{by} among the services of {target.name} with exposed: true"
    if target.role is Role.HOST:
        return "The host offers its networks nothing: put the service into a container"
    if last.decider is not None and last.decider.app == "services":
        return f"The state file's own flow stops it: change {last.decider.object}"
    return "Nothing in the state file does this"
