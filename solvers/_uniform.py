"""The same level everywhere: the baseline that every allocation has to beat.

Left out on purpose: filling up a budget that lies between two levels. The answer stays at the lower level and leaves
the rest unspent, because that is what people mean by "uniform 3-bit"; `greedy` spends the rest.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget
from layerwise.solvers.problem import Choice, Problem, Solution


def uniform(problem: Problem) -> Solution:
    """Give every unit the dearest level that all of them can have within the budgets. Needs no losses.

    Levels are ordered by what they cost where they exist, relative to the dearest level of the same unit. A unit that
    lacks the common level takes the nearest cheaper one that it has or, if there is none, its own cheapest. Of levels
    that come to the same cost, the one with the lower loss is taken (where losses are known), then the lower index.

    Raises:
        InfeasibleBudget: no common level fits, even if a mixture would.
    """
    started = time.perf_counter()
    problem.check_budgets()
    tied = problem.tied()
    order = _cheap_to_dear(tied)
    best: tuple[float, float, int] | None = None
    for level in range(tied.shape[1]):
        choice = _common(tied, order, level)
        if choice is None or not tied.feasible(choice):
            continue
        dearness = float(tied.shares[np.arange(len(choice)), choice].sum())
        loss = tied.loss(choice)
        key = (-dearness, 0.0 if loss is None else loss, level)
        best = key if best is None else min(best, key)
    if best is None:
        raise _no_common_level(tied, order)
    winner = _common(tied, order, best[2])
    assert winner is not None
    return problem.solution(problem.expand(winner), seconds=time.perf_counter() - started)


def _cheap_to_dear(problem: Problem) -> NDArray[np.int64]:
    """(levels,): level indices from cheap to dear; levels that no unit has stand last."""
    shares = np.where(problem.available, problem.shares, 0.0)
    dearest = shares.max(axis=1, keepdims=True)
    relative = shares / np.where(dearest > 0, dearest, 1.0)
    count = problem.available.sum(axis=0)
    mean = np.where(count > 0, relative.sum(axis=0) / np.maximum(count, 1), np.inf)
    return np.argsort(mean, kind="stable")


def _common(problem: Problem, order: NDArray[np.int64], level: int) -> Choice | None:
    """`level` for every unit, or its nearest cheaper stand-in; None for a level that no unit has."""
    if not problem.available[:, level].any():
        return None
    rank = int(np.flatnonzero(order == level)[0])
    downwards = order[rank::-1]
    have = problem.available[:, downwards]
    stand_in = downwards[have.argmax(axis=1)]
    return np.asarray(np.where(have.any(axis=1), stand_in, problem.shares.argmin(axis=1)), dtype=np.int64)


def _no_common_level(problem: Problem, order: NDArray[np.int64]) -> InfeasibleBudget:
    """The shortage of the level that comes nearest, in the resource where it is shortest."""
    shortages = []
    for level in order.tolist():
        choice = _common(problem, order, level)
        if choice is not None:
            cost = problem.cost(choice)
            over = max(problem.limits, key=lambda r: cost[r] / problem.limits[r] if problem.limits[r] > 0 else np.inf)
            shortages.append((cost[over] - problem.budgets[over], over, cost[over], level))
    short, resource, least, level = min(shortages)
    assert problem.levels is not None
    return InfeasibleBudget(
        resource,
        problem.budgets[resource],
        least,
        f"no level fits for all units at once: {problem.levels[level]} comes nearest and needs {least:.6g} {resource}, "
        f"above the budget {problem.budgets[resource]:.6g} (short by {short:.6g})",
    )
