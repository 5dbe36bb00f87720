"""The same level everywhere: the baseline that every allocation has to beat.

Left out on purpose: filling up a budget that lies between two levels. The answer stays at the lower level and leaves
the rest unspent, because that is what people mean by "uniform 3-bit"; `greedy` spends the rest.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget
from layerwise.solvers.problem import LOSS, Choice, Problem, Solution


def uniform(problem: Problem) -> Solution:
    """Give every unit the dearest level that all of them can have within the budgets. Needs no losses.

    Levels are ordered by what they cost where they exist, relative to the dearest level of the same unit. A unit that
    lacks the common level takes the nearest cheaper one that it has or, if there is none, its own cheapest; never one
    at which others are absent, if it has another: a block without the common level stays where it is. Of levels that
    come to the same cost, the one with the lower loss is taken (where losses are known), then the lower index.

    In the reverse form, the common level of least cost within the limits; of equal ones the lower loss and index.

    Raises:
        InfeasibleBudget: no common level fits, even if a mixture would.
    """
    started = time.perf_counter()
    problem.check_budgets()
    untied = problem.variant(minimize=LOSS, max_loss=math.inf).plain()
    order = _cheap_to_dear(untied)
    commons = [
        (level, choice) for level in range(untied.shape[1]) if (choice := _common(untied, order, level)) is not None
    ]
    best: tuple[float, float, int] | None = None
    for level, choice in commons:
        solution = problem.solution(problem.expand(choice))
        if not problem.feasible(solution.choice):
            continue
        dearness = float(untied.shares[np.arange(len(choice)), choice][untied.present(choice)].sum())
        wanted = -dearness if problem.minimize == LOSS else solution.cost[problem.minimize]
        key = (wanted, 0.0 if solution.loss is None else solution.loss, level)
        best = key if best is None else min(best, key)
    if best is None:
        raise _no_common_level(problem, commons)
    return problem.solution(problem.expand(dict(commons)[best[2]]), seconds=time.perf_counter() - started)


def _cheap_to_dear(problem: Problem) -> NDArray[np.int64]:
    """(levels,): level indices from cheap to dear; levels that no unit has stand last."""
    shares = np.where(problem.available, problem.shares, 0.0)
    dearest = shares.max(axis=1, keepdims=True)
    relative = shares / np.where(dearest > 0, dearest, 1.0)
    count = problem.available.sum(axis=0)
    mean = np.where(count > 0, relative.sum(axis=0) / np.maximum(count, 1), np.inf)
    return np.argsort(mean, kind="stable")


def _common(problem: Problem, order: NDArray[np.int64], level: int) -> Choice | None:
    """`level` for every unit, or its stand-in; None for a level that no unit has."""
    if not problem.available[:, level].any():
        return None
    stand_ins = problem.available.copy()
    for place in problem.nested:
        stand_ins[place] = stand_ins[place[0]].sum() == 1
    cheapest = np.where(stand_ins, problem.shares, np.inf).argmin(axis=1)
    stand_ins[:, level] = problem.available[:, level]
    rank = int(np.flatnonzero(order == level)[0])
    downwards = order[rank::-1]
    have = stand_ins[:, downwards]
    return np.asarray(np.where(have.any(axis=1), downwards[have.argmax(axis=1)], cheapest), dtype=np.int64)


def _no_common_level(problem: Problem, commons: list[tuple[int, Choice]]) -> InfeasibleBudget:
    """The shortage of the level that comes nearest, in the resource where it is shortest."""
    wanted = {LOSS: problem.max_loss, **problem.budgets}
    shortages = []
    for level, choice in commons:
        solution = problem.solution(problem.expand(choice))
        spent = {LOSS: solution.loss or 0.0, **solution.cost}
        excess = {r: (spent[r] - limit) / (abs(limit) or 1.0) for r, limit in problem.limits.items()}
        over = max(excess, key=lambda resource: excess[resource])
        shortages.append((spent[over] - wanted[over], over, spent[over], level))
    short, resource, least, level = min(shortages)
    assert problem.levels is not None
    return InfeasibleBudget(
        resource,
        wanted[resource],
        least,
        f"no level fits for all units at once: {problem.levels[level]} comes nearest and needs {least:.6g} {resource}, "
        f"above the budget {wanted[resource]:.6g} (short by {short:.6g})",
    )
