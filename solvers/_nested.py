"""Units inside units, made flat: a tree of them becomes one unit whose levels are allocations of them all.

All allocations of a block would be too many. What is kept are those on the lower convex hull of loss over cost: the
hull of a sum is the sum of the hulls, so it is found by climbing the hulls of the units inside, and that of a block
inside a block from the inside out. That is exact for whatever looks at hulls only (the Lagrangian, the frontier's hull)
and a good choice for a heuristic. The exact solvers treat nesting themselves.
"""

from __future__ import annotations

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
        members: by the same units, the units concerned in the nested problem, each after what it is nested in.
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


class _Tree(NamedTuple):
    """Allocations of a unit and of all that is nested in it, given that the unit is present.

    Args:
        members: (members,), the unit first, each after what it is nested in.
        levels: (allocations, members).
        present: (allocations, members).
        shares, losses: (allocations,), summed over those present; `inf` where not available.
    """

    members: NDArray[np.int64]
    levels: NDArray[np.int64]
    present: NDArray[np.bool_]
    shares: NDArray[np.float64]
    losses: NDArray[np.float64]

    def sums(self, amounts: NDArray[np.float64]) -> NDArray[np.float64]:
        """(allocations,): the same of another table (units, levels)."""
        return np.asarray(np.where(self.present, amounts[self.members, self.levels], 0.0).sum(axis=1))


def flattened(problem: Problem) -> Flat:
    """A plain problem without its nesting, as seen along the hulls of loss over `Problem.shares`.

    The cheapest allocation of every block is always among its levels, and with one resource so is every allocation on
    the block's lower convex hull.

    Args:
        problem: plain, with losses and without interactions.
    """
    trees: dict[int, _Tree] = {}
    for unit in problem.forest.bottom_up():
        inside = problem.forest.children[unit]
        trees[unit] = _merged(problem, unit, [trees.get(child) or _alone(problem, child) for child in inside])
    outer = problem.outer
    flat_trees = {row: trees[unit] for row, unit in enumerate(outer.tolist()) if unit in trees}
    n_levels = max([problem.shape[1], *(len(tree.levels) for tree in flat_trees.values())])

    def table(amounts: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = np.full((len(outer), n_levels), np.inf)
        flat[:, : problem.shape[1]] = amounts[outer]
        for row, tree in flat_trees.items():
            flat[row] = np.inf
            flat[row, : len(tree.levels)] = tree.sums(amounts)
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
    return Flat(
        flat,
        {row: tree.levels for row, tree in flat_trees.items()},
        {row: tree.members for row, tree in flat_trees.items()},
        outer,
        problem.lowest(problem.shares),
    )


def _alone(problem: Problem, unit: int) -> _Tree:
    """A unit with nothing nested in it, at each of its levels."""
    assert problem.losses is not None
    levels = np.arange(problem.shape[1])[:, None]
    present = np.ones(levels.shape, dtype=np.bool_)
    return _Tree(np.array([unit]), levels, present, problem.shares[unit], problem.losses[unit])


def _merged(problem: Problem, unit: int, inside: list[_Tree]) -> _Tree:
    """A unit and the trees nested in it: at each of its levels, the hull of those that it leaves present."""
    assert problem.losses is not None
    width = max(len(tree.shares) for tree in inside)
    shares, losses = np.full((2, len(inside), width), np.inf)
    for row, tree in enumerate(inside):
        shares[row, : len(tree.shares)], losses[row, : len(tree.losses)] = tree.shares, tree.losses
    kept = problem.forest.kept[[tree.members[0] for tree in inside]]  # (trees, levels)
    steps = climb(shares, losses)  # of all trees; what one of them does in between does not change another one's steps
    parts = []
    for level in np.flatnonzero(problem.available[unit]).tolist():
        here = kept[:, level]
        taken = np.flatnonzero(here[steps.unit])
        picks = np.tile(np.where(here, steps.start, shares.argmin(axis=1)), (len(taken) + 1, 1))  # (allocations, trees)
        for index, step in enumerate(taken.tolist()):
            picks[index + 1 :, steps.unit[step]] = steps.after[step]
        parts.append(_joined(unit, level, inside, picks, here))
    members, (levels, present) = parts[0][0], (np.concatenate(column) for column in list(zip(*parts, strict=True))[1:])
    tree = _Tree(members, levels, present, np.zeros(0), np.zeros(0))
    return tree._replace(shares=tree.sums(problem.shares), losses=tree.sums(problem.losses))


def _joined(
    unit: int, level: int, inside: list[_Tree], picks: NDArray[np.int64], kept: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Members, levels and presence of a unit at one level, with what was picked of each tree, (allocations, trees)."""
    own = np.full((len(picks), 1), level), np.ones((len(picks), 1), dtype=np.bool_)
    return (
        np.concatenate([[unit], *(tree.members for tree in inside)]),
        np.concatenate([own[0], *(tree.levels[rows] for tree, rows in zip(inside, picks.T, strict=True))], axis=1),
        np.concatenate(
            [own[1], *(tree.present[rows] & here for tree, rows, here in zip(inside, picks.T, kept, strict=True))],
            axis=1,
        ),
    )
