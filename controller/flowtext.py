"""Any flow in ovs-ofctl's syntax, read into `Flow`: from files of flows, and from what Open vSwitch dumps.

Taken are files for `ovs-ofctl add-flows`, what `ovs-ofctl dump-flows` prints (any OpenFlow version, with names of ports
or numbers), and what `ovs-appctl bridge/dump-flows` prints, hidden flows with it. Why not `ovs.flow` of the PyPI package
`ovs`, which `ofparse` uses? It knows only what a dump prints, leaves names and prerequisites unresolved, waves through
what ovs-ofctl refuses, and has no word for several bits of a field; what is left to do after it is most of the work.
`ofparse` reads the few fields that a state file may match; here every field is read and nothing may get lost. Imports
flowmatch, flowactions, flownames, flowwrites, flow and problems.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from controller.flow import Action, Flow
from controller.flowactions import ActionReader
from controller.flowmatch import Head, Unmet, read_head
from controller.flownames import Refused
from controller.flowwrites import settled
from controller.problems import InvalidInput, Problem, Severity, error, warning

LONGEST: Final = 1 << 16
"""Characters of the longest line that is read. OpenFlow has no message longer than as many bytes."""

_REPLY: Final = re.compile(r"(?:NXST|OFPST)_FLOW reply\b[^,=]*(?:\(xid=0x[0-9a-f]+\))?[^,=]*:")
_OLD_REPLY: Final = re.compile(r"^\s*(NXST_FLOW reply)", re.M)
_ACTIONS: Final = re.compile(r"(?:^|[\s,])actions?\s*=")
_COMMAND: Final = re.compile(
    r"(?:flow\s+)?(add|modify|delete|modify_strict|delete_strict)(?=[\s,]|$)|(flow|group|meter)\s"
)
_SEPARATOR: Final = re.compile(r"[,\s]+")
# Without going back (`*+`): a quote inside must not be read otherwise because what follows does not fit.
_HEAD_WORD: Final = re.compile(r'(?:[^\s,"(]|"(?:[^"\\]|\\.)*+"?+|\([^()]*+\)?+)++', re.S)
_COMMENT: Final = re.compile(r'((?:[^"#]|"(?:[^"\\]|\\.)*+"?+)*+)#.*', re.S)


class Line(NamedTuple):
    """Where a flow stood: line number from 1, and the line."""

    number: int
    text: str


class ReadFlows(NamedTuple):
    """Flows that were read, warnings about them, and for each flow the line it stood in."""

    flows: tuple[Flow, ...]
    problems: tuple[Problem, ...]
    lines: tuple[Line, ...]


def read_flow(text: str, ports: Mapping[str, int]) -> Flow:
    """One flow. Raises `InvalidInput` with everything that is wrong with it."""
    reader = _Reader(ports, "flow")
    flow = reader.flow(1, text.strip())
    if flow is None:
        reader.refuse()
        raise InvalidInput("flow", [error("bad-flow", "flow:1", "no flow", "a flow", "Write one: actions=drop.")])
    return flow


def read_flows(text: str, ports: Mapping[str, int], source: str = "flows") -> ReadFlows:
    """All flows of a text, one a line. Lines that say what is being dumped, comments and empty lines are passed over.

    A dump of OpenFlow 1.0 is no proof of what the switch holds: there is a warning for it. `ports` gives numbers to names of ports. Raises `InvalidInput` with every bad line; the path is `source:line`.
    """
    reader = _Reader(ports, source)
    flows, lines = [], []
    if (old := _OLD_REPLY.search(text)) is not None:
        reader.problems.append(_old_dump(f"{source}:{text.count(chr(10), 0, old.start(1)) + 1}"))
    for number, line in _lines(text):
        flow = reader.flow(number, line)
        if flow is not None:
            flows.append(flow)
            lines.append(Line(number, line))
    reader.refuse()
    return ReadFlows(tuple(flows), tuple(reader.problems), tuple(lines))


def _old_dump(path: str) -> Problem:
    """Open vSwitch 3.1 shows `write_actions(output:1),goto_table:5` as `resubmit(,5)` there."""
    return warning(
        "old-dump",
        path,
        "a dump of OpenFlow 1.0, which leaves out what that version has no words for (write_actions, push_vlan)",
        "a dump that tells everything",
        "Dump with ovs-ofctl -O OpenFlow14 dump-flows, or with ovs-appctl bridge/dump-flows.",
    )


class _Invented(dict[str, int]):
    """A map that has every name."""

    def __missing__(self, name: str) -> int:
        self[name] = number = len(self) + 1
        return number


def names_in(text: str) -> tuple[str, ...]:
    """The names of ports that a text of flows uses, in the order of their first use: whoever has no map can make one.

    A word that is no action counts as a port, as it does to ovs-ofctl.
    """
    ports = _Invented()
    reader = _Reader(ports, "")
    for number, line in _lines(text):
        reader.flow(number, line)
    return tuple(ports)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if "#" in line and (found := _COMMENT.fullmatch(line)):
            line = found[1].rstrip()
        if line and not _REPLY.fullmatch(line):
            yield number, line


class _Reader:
    """Reads lines and collects what is wrong with them."""

    def __init__(self, ports: Mapping[str, int], source: str) -> None:
        self.ports = ports
        self.source = source
        self.problems: list[Problem] = []
        self._known: dict[tuple[object, ...], tuple[tuple[Action, ...], int | None]] = {}

    def refuse(self) -> None:
        """Raise if there was an error."""
        if any(problem.severity is Severity.ERROR for problem in self.problems):
            raise InvalidInput(self.source, self.problems)

    def flow(self, line: int, text: str) -> Flow | None:
        """The flow of a line; None, and the reasons among the problems, if it is none."""
        faults: list[Refused] = []
        unmet: list[Unmet] = []
        flow = None
        try:
            before, behind = _split(text)
            head = read_head(_head_words(before), self.ports, faults, unmet)
            flow = self._flow(head, behind)
        except Refused as refused:
            faults.append(refused)
        for fault in faults:
            path = f"{self.source}:{line}"
            self.problems.append(error(fault.code, path, _short(fault.found), fault.expected, fault.fix))
        if faults:
            return None
        for missing in unmet:
            self.problems.append(self._unmet(line, missing))
        return flow

    def _flow(self, head: Head, text: str) -> Flow:
        key = (text, head.protocol, head.table, head.match if "vlan" in text.lower() else None)
        done = self._known.get(key)
        if done is None:
            done = self._known[key] = ActionReader(head, self.ports).read(text)
        actions, goto = done
        actions = settled(actions, head.match)
        return Flow(
            head.table, head.priority, head.match, actions, goto, head.cookie, head.idle_s, head.hard_s, head.flags
        )

    def _unmet(self, line: int, missing: Unmet) -> Problem:
        return warning(
            "prerequisite",
            f"{self.source}:{line}",
            _short(missing.field),
            f"{missing.needed} beside it",
            "Open vSwitch leaves such a field out and the flow matches more; read so. Add what it needs.",
        )


def _head_words(text: str) -> list[str]:
    if "(" in text or '"' in text:
        return _HEAD_WORD.findall(text)
    return [word for word in _SEPARATOR.split(text) if word]


def _split(text: str) -> tuple[str, str]:
    """What stands before the actions, and the actions."""
    if len(text) > LONGEST:
        raise Refused(text, f"at most {LONGEST} characters a line", "No switch takes a flow of that size.")
    command = _COMMAND.match(text)
    if command is not None:
        fix = "Give the flows that are there, one a line: write them without a command, or dump them."
        raise Refused(text, f"a flow, not the command {(command[1] or command[2])!r}", fix, "unsupported")
    found = next((found for found in _ACTIONS.finditer(text) if _outside_quotes(text, found.start())), None)
    if found is None:
        fix = "Say what to do: actions=drop, or actions=output:PORT."
        raise Refused(text, "a flow with actions=", fix)
    return text[: found.start()], text[found.end() :].strip()


def _outside_quotes(text: str, at: int) -> bool:
    """Names of ports are somebody else's to choose: one may hold whatever a flow does."""
    return not (text.count('"', 0, at) - text.count('\\"', 0, at)) % 2


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
