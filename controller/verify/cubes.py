"""Is a cube empty once others are taken from it? A small DPLL over cubes, with a budget; then a SAT solver.

Every negative cube is one clause: some bit of it differs. Unit clauses are propagated, subsumed ones dropped, and the
clause with the fewest bits left is split. What exhausts the budget goes to `z3-solver`, and what that cannot decide
in its time is `Exhausted`: the caller must take it for "not proved". Imports space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from controller.problems import BulkheadError
from controller.verify.space import Cube, inside

STEPS = 200_000
"""Clauses that the first engine may look at for one question, some tenths of a second."""
STEPS_A_MS = 1000
"""About as many are looked at in a millisecond."""
SOLVER_MS = 5_000
"""Time for the second engine, in milliseconds."""


class Exhausted(BulkheadError):
    """Neither engine could decide within its budget."""


@dataclass(slots=True)
class Meter:
    """Counts the work of many questions that belong together, about a million steps a second. `left` bounds it."""

    left: float = math.inf
    spent: float = 0

    def spend(self, steps: float) -> None:
        """Raises `Exhausted` when more has been spent than there was."""
        self.spent += steps
        self.left -= steps
        if self.left < 0:
            raise Exhausted(
                "the flows overlap each other too much to be taken apart in time; "
                "take some away, or compare whole fields and prefixes in them"
            )


def witness(cube: Cube, negatives: Iterable[Cube], meter: Meter | None = None) -> int | None:
    """A header in `cube` and in none of `negatives`, or None where there is none. Free bits are 0 where they may be.

    Raises `Exhausted`.
    """
    clauses: list[Cube] = []
    for negative in negatives:
        if (negative[0] ^ cube[0]) & negative[1] & cube[1]:
            continue
        if inside(cube, negative):
            return None
        clauses.append(negative)
    if not clauses:
        return cube[0]
    meter = meter or Meter()
    budget = Meter(STEPS)
    try:
        return _search(cube, clauses, budget)
    except Exhausted:
        begun = time.monotonic()
        try:
            return solve(cube, clauses, min(SOLVER_MS, meter.left / STEPS_A_MS))
        finally:
            meter.spend((time.monotonic() - begun) * 1000 * STEPS_A_MS)
    finally:
        meter.spend(budget.spent)


def empty(cube: Cube, negatives: Iterable[Cube], meter: Meter | None = None) -> bool:
    """Whether `negatives` cover `cube`. Raises `Exhausted`."""
    value, mask = cube
    share = 0.0
    clauses = []
    for negative in negatives:
        if (negative[0] ^ value) & negative[1] & mask:
            continue
        free = negative[1] & ~mask
        if not free:
            return True
        share += 0.5 ** free.bit_count()
        clauses.append(negative)
    # Each takes that share of the headers away: together they must come to the whole to cover it.
    return share > 0.999 and witness(cube, clauses, meter) is None


def _search(cube: Cube, clauses: list[Cube], budget: Meter) -> int | None:
    value, mask = cube
    while True:
        budget.spend(1 + len(clauses))
        left: list[Cube] = []
        shortest, size = None, 1 << 30
        changed = False
        for clause in clauses:
            if (clause[0] ^ value) & clause[1] & mask:
                continue  # some fixed bit differs: no header here is in it
            free = clause[1] & ~mask
            if not free:
                return None
            if not free & (free - 1):  # one bit may still differ, so it must
                value |= free & ~clause[0]
                mask |= free
                changed = True
                continue
            left.append(clause)
            if not changed and (count := free.bit_count()) < size:
                shortest, size = clause, count
        clauses = left
        if not clauses:
            return value
        if changed:
            continue
        assert shortest is not None
        free = shortest[1] & ~mask
        bit = free & -free
        # First the side on which this clause holds, then the other, where one bit less is left of it.
        differs = ~shortest[0] & bit
        found = _search((value | differs, mask | bit), clauses, budget)
        if found is not None:
            return found
        value |= shortest[0] & bit
        mask |= bit


def solve(cube: Cube, negatives: Iterable[Cube], limit_ms: float = SOLVER_MS) -> int | None:
    """What `witness` answers, by the second engine. Raises `Exhausted` when it cannot decide in `limit_ms`."""
    import z3  # type: ignore[import-untyped]  # here: it takes a moment to load, and is seldom needed

    variables: dict[int, z3.BoolRef] = {}

    def literal(bit: int, one: bool) -> z3.BoolRef:
        variable = variables.setdefault(bit, z3.Bool(f"b{bit}"))
        return variable if one else z3.Not(variable)

    solver = z3.Solver()
    solver.set("timeout", max(1, int(limit_ms)))
    value, mask = cube
    for negative in negatives:
        if (negative[0] ^ value) & negative[1] & mask:
            continue
        free = negative[1] & ~mask
        solver.add(z3.Or([literal(bit, not negative[0] >> bit & 1) for bit in _ones(free)]))
    answer = solver.check()
    if answer == z3.unsat:
        return None
    if answer != z3.sat:
        raise Exhausted(f"no answer within {limit_ms / 1000:.1f} s by the second engine either")
    model = solver.model()
    for bit, variable in variables.items():
        if z3.is_true(model.eval(variable)):
            value |= 1 << bit
    return value


def _ones(number: int) -> Iterable[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
