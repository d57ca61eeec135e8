"""State files: a file or a text in, a frozen `DesiredState` out, or every reason why not.

`load`, `loads` and `read` raise `problems.InvalidInput` and nothing else. A `Source` is a file that was read once, for
whoever lays records of the store on top of it again and again. The parts: `statetext` reads, `stateschema` checks the
shape, `statederive` gives it meaning (`hostderive` for the host), and has `ofrules` judge the literal flows. Imports
those, `model`, `records` and `problems`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from controller import records as stored
from controller import statederive, stateschema, statetext
from controller.hostmodel import Container, HostState
from controller.model import DesiredState, Grant
from controller.problems import InvalidInput, Problem, Severity, error
from controller.records import ContainerRecord, GrantRecord, Records
from controller.stateschema import Checked, ContainerSpec, json_schema

__all__ = ["Loaded", "Source", "digest", "json_schema", "load", "loads", "read"]

# A NixOS configuration holds the state under this name; evaluating that prints it wrapped.
_WRAPPER: Final = "stateConfig"
_DIGEST_LENGTH: Final = 16


@dataclass(frozen=True)
class Loaded:
    """A state file that was accepted, what its host is made of, and the warnings about it, sorted by path.

    `refused` are records of the store that were left out, by key, because what is declared contradicts them; `stored` are
    the keys of those that are in it. `until` is when the first of its grants ends (seconds since the epoch).
    """

    state: DesiredState
    problems: tuple[Problem, ...]
    host: HostState = field(default_factory=HostState)
    refused: tuple[tuple[str, Problem], ...] = ()
    stored: frozenset[str] = frozenset()
    until: float | None = None


@dataclass(frozen=True)
class Source:
    """A state file that was read and is good by itself."""

    name: str
    checked: Checked
    problems: tuple[Problem, ...]
    state: DesiredState

    def with_records(self, records: Records, node: str, now: float = 0.0) -> Loaded:
        """The state with what the store holds for a node on top of it, at `now` (seconds since the epoch).

        What is declared wins. Never raises.
        """
        found, refused = _overlay(records, node, self.state)
        while True:
            state, host, problems = statederive.derive(self.checked, found)
            errors = [problem for problem in problems if problem.severity is Severity.ERROR]
            if not errors:
                break
            guilty = {name: problem for problem in reversed(errors) if (name := _whose(problem, found)) is not None}
            if not guilty:  # nobody's in particular: none of them then, rather than a state that nobody has checked
                guilty = dict.fromkeys((name for name, _ in found), errors[0])
            refused += guilty.items()
            found = [(name, spec) for name, spec in found if name not in guilty]
        ordered = tuple(sorted((*self.problems, *problems), key=_place))
        granted, strays = _grants(records, node, state, now)
        state = replace(state, grants=tuple(Grant(g.id, g.source, g.target, g.protocol, g.port) for g in granted))
        there = frozenset((*(name for name, _ in found), *map(stored.key, granted)))
        until = min((grant.expires_at for grant in granted), default=None)
        whole = replace(state, digest=digest(state))
        host = replace(host, containers=tuple(_confined(one, there) for one in host.containers))
        return Loaded(whole, ordered, host, (*refused, *strays), there, until)


def load(path: Path | str) -> Loaded:
    """Read a state file. Raises `InvalidInput` with every problem if there is an error among them."""
    return read(path).with_records(Records(), "")


def loads(text: str, source: str) -> Loaded:
    """Read a state from text, YAML or JSON; `source` names it in problems."""
    return _source(text, source).with_records(Records(), "")


def read(path: Path | str) -> Source:
    """Read a state file, to lay records on top of it. Raises as `load`."""
    name = statetext.clean(str(path))
    return _source(statetext.read(Path(path)), name)


def _source(text: str, source: str) -> Source:
    tree, problems = statetext.parse(text, source)
    checked = stateschema.validate(_unwrapped(tree, source, problems))
    problems += checked.problems
    state, _, found = statederive.derive(checked) if checked.spec is not None else (DesiredState(), None, [])
    everything = tuple(sorted((*problems, *found), key=_place))
    if any(problem.severity is Severity.ERROR for problem in everything):
        raise InvalidInput(source, everything)
    return Source(source, checked, tuple(problems), state)


def _confined(container: Container, there: frozenset[str]) -> Container:
    """Who may make containers by the API is not root for that; whoever writes the file is."""
    return replace(container, confined=f"container/{container.id}" in there)


def _overlay(
    records: Records, node: str, state: DesiredState
) -> tuple[list[tuple[str, ContainerSpec]], list[tuple[str, Problem]]]:
    """The stored containers of a node as a file would declare them, in the order of their ids.

    They go by the networks of the file: none of them makes a network, nor widens one.
    """
    networks = {network.name: network for network in state.networks}
    found, refused = [], []
    for record in sorted(
        (one for one in records.containers if one.node == node), key=lambda one: (len(one.id), one.id)
    ):
        network = networks.get(record.network)
        if network is None:
            there = ", ".join(networks) or "none"
            fix = f"Delete the container, or declare the network; there are: {there}."
            path, what = f"{stored.key(record)}.network", f"network '{record.network}'"
            refused.append((stored.key(record), error("unknown-network", path, what, "a declared network", fix)))
            continue
        spec = _spec(record, network.subnet.length)
        low, high = network.ids
        if isinstance(spec, Problem):
            refused.append((stored.key(record), spec))
        elif not low <= int(record.id) <= high:
            fix = "Delete the container, or widen the range."
            expected = f"{low}-{high} of {network.name}"
            refused.append(
                (stored.key(record), error("id-outside", f"{stored.key(record)}.id", f"id {record.id}", expected, fix))
            )
        else:
            found.append((stored.key(record), spec))
    return found, refused


def _grants(
    records: Records, node: str, state: DesiredState, now: float
) -> tuple[list[GrantRecord], list[tuple[str, Problem]]]:
    """The grants of a node that are open now, and those that cannot be."""
    network_of = {member.id: network.name for network in state.networks for member in network.members}
    good: list[GrantRecord] = []
    refused = []
    for grant in records.grants:
        missing = next((end for end in (grant.source, grant.target) if end not in network_of), None)
        if not grant.open_at(now) or grant.node != node:
            continue
        name = stored.key(grant)
        if missing is not None:
            fix = "A grant joins two containers of one node; revoke it, or move the container."
            refused.append((name, error("stray-grant", name, f"container {missing}", "a container of this node", fix)))
        elif network_of[grant.source] == network_of[grant.target]:
            fix = "Within a network nothing has to be granted; revoke it."
            where = f"both in {network_of[grant.source]}"
            refused.append((name, error("needless-grant", name, where, "containers of two networks", fix)))
        else:
            good.append(grant)
    return good, refused


@lru_cache(maxsize=4096)
def _spec(record: ContainerRecord, length: int) -> ContainerSpec | Problem:
    tree = {
        "id": record.id,
        "running": record.running,
        "driver": record.driver,
        "command": list(record.command),
        "order": record.order,
        "properties": {
            "name": record.name,
            "network": record.network,
            "ipv4_address": f"{record.address}/{length}",
            "services": [
                {"name": one.name, "protocol": one.protocol, "port": one.port, "exposed": one.exposed}
                | ({"check": one.check} if one.check else {})
                for one in record.services
            ],
        },
        **({"template": record.template} if record.template else {}),
    }
    try:
        return ContainerSpec.model_validate(tree)
    except ValidationError as exc:
        return stateschema.first_problem(exc, stored.key(record))


def _whose(problem: Problem, found: Sequence[tuple[str, ContainerSpec]]) -> str | None:
    """Which of the stored containers a problem is about: it stands at their path, or names them."""
    at = (name for name, _ in found if problem.path.startswith(f"{name}."))
    text = f"{problem.path} {problem.found} {problem.fix}"
    named = (name for name, spec in found if re.search(rf"\bcontainer[ /]{spec.id}\b", text))
    return next(at, None) or next(named, None)


def digest(state: DesiredState) -> str:
    """A name for what a state says, the same for the same state whatever order its networks are written in."""
    networks = sorted(state.networks, key=lambda network: network.name)
    bridges = sorted(state.bridges, key=lambda bridge: bridge.name)
    grants = sorted(state.grants, key=lambda grant: grant.id)
    said = (networks, bridges, grants) if grants else (networks, bridges)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:_DIGEST_LENGTH]


def _unwrapped(tree: dict[str, Any], source: str, problems: list[Problem]) -> dict[str, Any]:
    if _WRAPPER not in tree:
        return tree
    for key in tree:
        if key != _WRAPPER:
            fix = f"Put it into {_WRAPPER}, or remove it."
            found = f"unknown key {statetext.show(key)} beside {_WRAPPER}"
            problems.append(error("unknown-key", statetext.join((key,)), found, f"{_WRAPPER} alone", fix))
    inner = tree[_WRAPPER]
    if isinstance(inner, dict):
        return inner
    problem = error("not-a-mapping", _WRAPPER, statetext.show(inner), "a mapping of keys", "Put the state there.")
    raise InvalidInput(source, [*problems, problem])


def _place(problem: Problem) -> tuple[list[tuple[bool, int, str]], str, str]:
    """Sorts paths as a person would: `containers[2]` before `containers[10]`."""
    parts = problem.path.replace("[", ".").replace("]", "").split(".")
    numbers = [(part.isdecimal() and len(part) < 10, part) for part in parts]
    return [(number, int(part) if number else 0, part) for number, part in numbers], problem.code, problem.found
