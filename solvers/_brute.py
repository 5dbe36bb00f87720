"""Every allocation, one after the other: for tests and for tiny problems, whatever binds their units.

Allocations are counted in mixed radix and looked at in chunks. A unit that is not nested and those nested in it, at any
depth, count as one digit, with a value for each combination of levels in canonical form, so no allocation comes twice.
Sums are compensated (each addition's rounding error is added up as well), which makes them equal to the exactly rounded
sums of `Problem.loss` and `Problem.cost`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import UsageError
from layerwise.solvers._ilp import joint_shortage
from layerwise.solvers.problem import LOSS, ROUNDING, Problem, Solution, require_losses

_CHUNK = 1 << 15
"""Allocations looked at together: some megabytes for some tens of units."""


class _Best(NamedTuple):
    """Ordered as answers are preferred: lower objective, then cheaper, then the lower levels in the first units."""

    objective: float
    share: float
    choice: tuple[int, ...]


def brute(problem: Problem, max_allocations: int = 2_000_000) -> Solution:
    """The optimum by enumeration. Of equal ones the cheaper, then the one with the lower levels in the first units.

    Args:
        problem: any; needs losses.
        max_allocations: the most allocations to look at. Tied units count once, absent ones not at all.
    Raises:
        InfeasibleBudget: no allocation is within the limits.
        UsageError: there are more allocations, or no losses.
    """
    started = time.perf_counter()
    require_losses("brute", problem)
    problem.check_budgets()
    untied = problem.variant(minimize=LOSS, max_loss=math.inf).plain()
    count = math.prod(_combinations(untied, unit) for unit in untied.outer.tolist())
    if count > max_allocations:
        raise UsageError(
            f"brute would look at {count} allocations, more than {max_allocations}",
            hint="raise max_allocations, or use branch",
        )
    best: _Best | None = None
    for choices in _allocations(untied, count):
        found = _best_of(problem, untied, choices)
        if found is not None:
            best = found if best is None else min(best, found)
    if best is None:
        raise joint_shortage(problem, lambda rest: brute(rest, max_allocations))
    solution = problem.solution(problem.expand(best.choice))
    return problem.solution(
        solution.choice, status="optimal", lower_bound=solution.objective, seconds=time.perf_counter() - started
    )


def _combinations(problem: Problem, unit: int) -> int:
    """How many allocations there are of a unit and those nested in it, given that it is present."""
    forest = problem.forest
    ways = {child: _combinations(problem, child) for child in forest.children.get(unit, ())}
    levels = np.flatnonzero(problem.available[unit]).tolist()
    return sum(math.prod(n for child, n in ways.items() if forest.kept[child, level]) for level in levels)


def _digit(problem: Problem, unit: int) -> tuple[list[int], NDArray[np.int64]]:
    """A unit and those nested in it, and all their allocations, (allocations, these units)."""
    units, rows = [unit], list[list[int]]()
    parts = []
    for child in problem.forest.children.get(unit, ()):
        members, menu = _digit(problem, child)
        units += members
        parts.append((child, menu.tolist(), [problem.resting[members].tolist()]))
    for level in np.flatnonzero(problem.available[unit]).tolist():
        menus = [menu if problem.forest.kept[child, level] else absent for child, menu, absent in parts]
        rows += [[level, *itertools.chain(*part)] for part in itertools.product(*menus)]
    return units, np.array(rows, dtype=np.int64)


def _allocations(problem: Problem, count: int) -> Iterator[NDArray[np.int64]]:
    """All allocations of a problem without ties, in chunks of (allocations, units)."""
    digits = [_digit(problem, unit) for unit in problem.outer.tolist()]
    radices = [len(rows) for _, rows in digits]
    for start in range(0, count, _CHUNK):
        numbers = np.unravel_index(np.arange(start, min(start + _CHUNK, count)), radices)
        choices = np.empty((len(numbers[0]), problem.shape[0]), dtype=np.int64)
        for (units, rows), number in zip(digits, numbers, strict=True):
            choices[:, units] = rows[number]
        yield choices


def _best_of(problem: Problem, untied: Problem, choices: NDArray[np.int64]) -> _Best | None:
    """The best of some allocations of the problem without ties, under the limits and for the objective of `problem`."""
    present = untied.forest.present(choices)
    sums = {resource: _sum(_terms(table, choices, present)) for resource, table in untied.costs.items()}
    assert untied.losses is not None
    sums[LOSS] = _sum(itertools.chain(_terms(untied.losses, choices, present), _pairs(untied, choices, present)))
    fits = np.ones(len(choices), dtype=np.bool_)
    for resource, limit in problem.limits.items():
        fits &= sums[resource] <= limit + abs(limit) * ROUNDING
    if not fits.any():
        return None
    objective = np.where(fits, sums[problem.minimize], np.inf)
    first = np.flatnonzero(objective == objective.min())
    shares = _sum(_terms(untied.shares, choices[first], present[first]))
    least = shares.min()
    return _Best(float(objective.min()), float(least), min(map(tuple, choices[first[shares == least]].tolist())))


def _terms(
    table: NDArray[np.float64], choices: NDArray[np.int64], present: NDArray[np.bool_]
) -> Iterator[NDArray[np.float64]]:
    """For each unit, (allocations,): its entry, 0 where it is absent."""
    return (np.where(present[:, unit], table[unit, choices[:, unit]], 0.0) for unit in range(len(table)))


def _pairs(problem: Problem, choices: NDArray[np.int64], present: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    for places, loss in problem.interactions.items():
        both = [present[:, unit] & (choices[:, unit] == level) for unit, level in places]
        yield np.where(both[0] & both[1], loss, 0.0)


def _sum(terms: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Compensated sum.

    Source: Ogita, Rump, Oishi, Accurate sum and dot product, SIAM J. Sci. Comput. 26 (2005), algorithm 4.4 (Sum2).
    """
    total = error = np.zeros(1)
    for term in terms:
        before, total = total, total + term
        step = total - before
        error = error + ((before - (total - step)) + (term - step))
    return total + error
