"""Units that may be removed are removed at even distances: the depth baseline that looks at nothing but the order.

Of n units that others are absent with (blocks, half-blocks), as few as the budgets ask for go: k of them, each the
middle of one of k equal stretches, so that no two neighbours go together where that can be, and the first and the last
stay. All else is as `uniform` has it.

Source: Unified Layer Skipping, arXiv:2404.06954, which skips the layers in the middle at even distances, as many as the
wanted speedup asks for, whatever the input. Left out: units that are removed inside of others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget
from layerwise.solvers._uniform import uniform
from layerwise.solvers.problem import Problem, Solution


def even(problem: Problem) -> Solution:
    """Remove as few units as the budgets ask for, evenly spaced. Needs no losses.

    Raises:
        InfeasibleBudget: nothing fits, however many go; tells of the shortage when none does.
    """
    started = time.perf_counter()
    removals = _removals(problem)
    first: InfeasibleBudget | None = None
    for count in range(len(removals) + 1):
        gone = [removals[place] for place in spaced(len(removals), count)]
        fixed = {**problem.fixed, **{unit: level for members, level in gone for unit in members}}
        try:
            found = uniform(replace(problem, costs=_staying(problem, fixed), fixed=fixed))
        except InfeasibleBudget as error:
            first = first or error
            continue
        return problem.solution(found.choice, seconds=time.perf_counter() - started)
    assert first is not None
    raise first


def _staying(problem: Problem, fixed: Mapping[int, int]) -> dict[str, NDArray[np.float64]]:
    """The costs without levels that remove something, of units that are not to have them and have others."""
    costs = {resource: table.copy() for resource, table in problem.costs.items()}
    removing = np.zeros(problem.shape, dtype=bool)
    for place in problem.nested:
        removing[place] = fixed.get(place[0]) != place[1]
    removing[~(problem.available & ~removing).any(axis=1)] = False
    for table in costs.values():
        table[removing] = np.inf
    return costs


def spaced(total: int, count: int) -> list[int]:
    """The middles of so many equal stretches of a range, rounded down."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _removals(problem: Problem) -> list[tuple[tuple[int, ...], int]]:
    """Units that may be removed, tied ones together, in order: each with the level at which it costs least."""
    inside = {unit for units in problem.nested.values() for unit in units}
    found: dict[tuple[int, ...], int] = {}
    ties = {unit: tuple(sorted(group)) for group in problem.groups for unit in group}
    for unit in sorted({unit for unit, _ in problem.nested} - inside - set(problem.fixed)):
        members = ties.get(unit, (unit,))
        shares = problem.shares[list(members)].sum(0)
        levels = [
            level
            for level in range(problem.shape[1])
            if (unit, level) in problem.nested and problem.available[list(members), level].all()
        ]
        if levels and not (set(members) & (inside | set(problem.fixed))):
            found.setdefault(members, min(levels, key=lambda level: shares[level]))
    return sorted(found.items())
