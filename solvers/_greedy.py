"""Allocation by the best trade, again and again.

Every unit starts at its cheapest level, and the upgrade that wins most loss per cost is taken until nothing fits. An
upgrade may jump over levels: a level that is hardly better than the one before it (a bump in the loss curve, above the
lower convex hull) would otherwise hide the good one behind it. With one budget the trades climb each unit's hull, so
the answer is the optimum of the linear program up to the last trades, where whole levels no longer fit.

Blocks with units inside climb the hull of the block as a whole (`_nested.py`).

Left out: trading back. A level once taken is only ever exchanged for one with less loss, so `ilp` and `dp` can be
lower.
"""

from __future__ import annotations

import heapq
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget
from layerwise.solvers._ilp import any_feasible
from layerwise.solvers._nested import flattened
from layerwise.solvers.problem import ROUNDING, Choice, Problem, Solution, require_separable


class _Upgrade(NamedTuple):
    """Ordered as they are taken: most loss per cost first, then the cheaper, then the lower index."""

    rank: float  # minus the loss decrease per cost; -inf if it costs nothing
    cost: float  # as a share of the room that the start leaves in each budget
    gain: float  # minus the loss decrease
    unit: int
    level: int


def greedy(problem: Problem) -> Solution:
    """Upgrade from the cheapest allocation, best loss decrease per cost first, while anything fits.

    With several budgets, the cost of an upgrade is the sum over resources of its cost increase divided by what the
    start leaves of that budget: the scarcer the resource, the dearer.

    Args:
        problem: any number of budgets; needs losses.
    Raises:
        InfeasibleBudget: a budget is out of reach, alone or together with the others.
        UsageError: a problem without losses, or with interactions.
    """
    started = time.perf_counter()
    require_separable("greedy", problem)
    problem.check_budgets()
    plain = problem.plain()
    if plain.nested:
        return problem.solution(problem.expand(_through_blocks(plain)), seconds=time.perf_counter() - started)
    climb = _Climb(plain, any_feasible(plain))
    heap = [upgrade for unit in range(plain.shape[0]) if (upgrade := climb.best(unit)) is not None]
    heapq.heapify(heap)  # one upgrade per unit at any time
    while heap:
        upgrade = heapq.heappop(heap)
        if climb.fits(upgrade.unit)[upgrade.level]:
            climb.take(upgrade)
        following = climb.best(upgrade.unit)  # the next one up, or a smaller one if this did not fit any more
        if following is not None:
            heapq.heappush(heap, following)
    return problem.solution(problem.expand(climb.choice), seconds=time.perf_counter() - started)


def _through_blocks(problem: Problem) -> Choice:
    """Climb the hulls of the blocks; where none of their points is within all limits, take any allocation that is."""
    flat = flattened(problem)
    try:
        return flat.expand(greedy(flat.problem).choice)
    except InfeasibleBudget:  # of several limits at a time; other allocations of the blocks may be within
        return any_feasible(problem)


class _Climb:
    """The state of one run: the allocation so far and what it leaves of the budgets."""

    def __init__(self, problem: Problem, start: Choice) -> None:
        assert problem.losses is not None
        n_units = len(start)
        self.losses = problem.losses
        self.choice = start.copy()
        # (units, levels, budgets); without a budget nothing is scarce and every upgrade is free
        self.costs: NDArray[np.float64] = np.stack(
            [problem.costs[resource] for resource in problem.limits] or [np.zeros(problem.shape)], axis=2
        )
        limits = np.array(list(problem.limits.values()) or [0.0])
        self.used = self.costs[np.arange(n_units), start].sum(axis=0)
        self.limits = limits + np.abs(limits) * ROUNDING
        room = self.limits - self.used
        self.scale = np.where(room > 0, room, 1.0)

    def fits(self, unit: int) -> NDArray[np.bool_]:
        """(levels,): the unit can move there now."""
        after = self.used + self.costs[unit] - self.costs[unit, self.choice[unit]]
        return np.asarray((after <= self.limits).all(axis=1))

    def take(self, upgrade: _Upgrade) -> None:
        unit, level = upgrade.unit, upgrade.level
        self.used = self.used + self.costs[unit, level] - self.costs[unit, self.choice[unit]]
        self.choice[unit] = level

    def best(self, unit: int) -> _Upgrade | None:
        """The unit's best upgrade that fits now; None if there is none."""
        now = int(self.choice[unit])
        decrease = self.losses[unit, now] - self.losses[unit]
        upgrades = []
        for level in np.flatnonzero((decrease > 0) & self.fits(unit)).tolist():
            cost = float(((self.costs[unit, level] - self.costs[unit, now]) / self.scale).sum())
            gain = float(decrease[level])
            rank = -gain / cost if cost > 0 else -np.inf
            upgrades.append(_Upgrade(rank, cost, -gain, unit, level))
        return min(upgrades, default=None)
