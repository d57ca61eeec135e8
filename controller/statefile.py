"""State files: a file or a text in, a frozen `DesiredState` out, or every reason why not.

`load` and `loads` raise `problems.InvalidInput` and nothing else. The parts: `statetext` reads, `stateschema` checks
the shape, `statederive` gives it meaning (`hostderive` for the host), and has `ofrules` judge the literal flows. Imports those, `model`
and `problems`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from controller import statederive, stateschema, statetext
from controller.hostmodel import HostState
from controller.model import DesiredState
from controller.problems import InvalidInput, Problem, Severity, error
from controller.stateschema import json_schema

__all__ = ["Loaded", "digest", "json_schema", "load", "loads"]

# A NixOS configuration holds the state under this name; evaluating that prints it wrapped.
_WRAPPER: Final = "stateConfig"
_DIGEST_LENGTH: Final = 16


@dataclass(frozen=True)
class Loaded:
    """A state file that was accepted, what its host is made of, and the warnings about it, sorted by path."""

    state: DesiredState
    problems: tuple[Problem, ...]
    host: HostState = field(default_factory=HostState)


def load(path: Path | str) -> Loaded:
    """Read a state file. Raises `InvalidInput` with every problem if there is an error among them."""
    name = statetext.clean(str(path))
    return loads(statetext.read(Path(path)), name)


def loads(text: str, source: str) -> Loaded:
    """Read a state from text, YAML or JSON; `source` names it in problems."""
    tree, problems = statetext.parse(text, source)
    checked = stateschema.validate(_unwrapped(tree, source, problems))
    problems += checked.problems
    state, host = DesiredState(), HostState()
    if checked.spec is not None:
        state, host, found = statederive.derive(checked)
        problems += found
    ordered = tuple(sorted(problems, key=_place))
    if any(problem.severity is Severity.ERROR for problem in ordered):
        raise InvalidInput(source, ordered)
    return Loaded(replace(state, digest=digest(state)), ordered, host)


def digest(state: DesiredState) -> str:
    """A name for what a state says, the same for the same state whatever order its networks are written in."""
    networks = sorted(state.networks, key=lambda network: network.name)
    bridges = sorted(state.bridges, key=lambda bridge: bridge.name)
    return hashlib.sha256(repr((networks, bridges)).encode()).hexdigest()[:_DIGEST_LENGTH]


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
