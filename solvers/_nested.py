"""Units inside units, made flat: a block and its layers become one unit whose levels are allocations of them all.

All allocations of a block would be too many. What is kept are those on the lower convex hull of loss over cost: the
hull of a sum is the sum of the hulls, so it is found by climbing the hulls of the units inside. That is exact for
whatever looks at hulls only (the Lagrangian, the frontier's hull) and a good choice for a heuristic. The exact solvers
treat nesting themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.solvers._hull import climb
from layerwise.solvers.problem import Choice, Problem


class Flat(NamedTuple):
    """A problem without nesting, and what its levels stand for.

    Args:
        problem: one unit for each unit that is not nested.
        meaning: by unit of `problem` that has others inside, an array (levels, units concerned) of levels.
        members: by the same units, the units concerned in the nested problem, the outer one first.
        outer: (units of `problem`,), their indices in the nested problem.
        cheapest: (units of the nested problem,), what an absent unit is written as.
    """

    problem: Problem
    meaning: dict[int, NDArray[np.int64]]
    members: dict[int, NDArray[np.int64]]
    outer: NDArray[np.int64]
    cheapest: Choice

    def expand(self, choice: Choice) -> Choice:
        """An allocation of the flat problem as one of the nested problem."""
        expanded = self.cheapest.copy()
        expanded[self.outer] = choice
        for unit, members in self.members.items():
            expanded[members] = self.meaning[unit][choice[unit]]
        return expanded


def flattened(problem: Problem) -> Flat:
    """A plain problem without its nesting, as seen along the hulls of loss over `Problem.shares`.

    The cheapest allocation of every block is always among its levels, and with one resource so is every allocation on
    the block's lower convex hull.

    Args:
        problem: plain, with losses and without interactions.
    """
    cheapest: Choice = problem.shares.argmin(axis=1)
    outer = problem.outer
    meaning: dict[int, NDArray[np.int64]] = {}
    members: dict[int, NDArray[np.int64]] = {}
    for row, unit in enumerate(outer.tolist()):
        places = {level: inside for (parent, level), inside in problem.nested.items() if parent == unit}
        if places:
            inside = [child for children in places.values() for child in children]
            members[row] = np.array([unit, *inside])
            meaning[row] = np.concatenate(
                [
                    _allocations(problem, unit, level, inside, absent=places.get(level, ()), cheapest=cheapest)
                    for level in np.flatnonzero(problem.available[unit]).tolist()
                ]
            )
    n_levels = max([problem.shape[1], *map(len, meaning.values())])

    def table(amounts: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = np.full((len(outer), n_levels), np.inf)
        flat[:, : problem.shape[1]] = amounts[outer]
        for row, allocations in meaning.items():
            flat[row] = np.inf
            flat[row, : len(allocations)] = _sums(problem, amounts, members[row], allocations)
        return flat

    assert problem.losses is not None and problem.units is not None and problem.levels is not None
    flat = problem.variant(
        costs={resource: table(amounts) for resource, amounts in problem.costs.items()},
        losses=table(problem.losses),
        nested={},
        fixed={},
        units=tuple(problem.units[unit] for unit in outer),
        levels=tuple(problem.levels) + tuple(f"allocation {index}" for index in range(problem.shape[1], n_levels)),
    )
    return Flat(flat, meaning, members, outer, cheapest)


def _allocations(
    problem: Problem, unit: int, level: int, inside: list[int], absent: Sequence[int], cheapest: Choice
) -> NDArray[np.int64]:
    """(allocations, 1 + units inside): the hull of one block at one level of its own."""
    assert problem.losses is not None
    there = np.array([child for child in inside if child not in absent], dtype=np.int64)
    steps = climb(problem.shares[there], problem.losses[there])
    rows = np.empty((len(steps.unit) + 1, 1 + len(inside)), dtype=np.int64)
    rows[:, 0] = level
    rows[:, 1:] = cheapest[inside]
    column = np.array([1 + inside.index(child) for child in there.tolist()], dtype=np.int64)
    rows[:, column] = steps.start
    for index, (moved, after) in enumerate(zip(steps.unit.tolist(), steps.after.tolist(), strict=True)):
        rows[index + 1 :, column[moved]] = after
    return rows


def _sums(
    problem: Problem, amounts: NDArray[np.float64], members: NDArray[np.int64], allocations: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(allocations,): summed amounts of the units that are present."""
    entries = amounts[members, allocations]
    for (parent, level), inside in problem.nested.items():
        if parent == members[0]:
            entries[np.ix_(allocations[:, 0] == level, np.isin(members, inside))] = 0.0
    return np.asarray(entries.sum(axis=1))
