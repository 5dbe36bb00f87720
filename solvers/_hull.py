"""The lower convex hulls of the units' levels, and the order in which a budget climbs them.

The Lagrangian bound and the linear relaxation of a problem with one resource see of every unit only the levels on its
lower convex hull of loss over cost. Climbing all hulls at once, steepest step first, passes through every allocation
that is optimal for some price of the resource (Sinha & Zoltners, "The multiple-choice knapsack problem", 1979).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.solvers.problem import Choice


class Climb(NamedTuple):
    """All steps up the hulls, in the order of falling gain per cost; those of one unit in their own order.

    Args:
        start: (units,), the cheapest level of every unit, of equal costs the one with the least loss.
        unit, after: (steps,), the unit that moves and the level it moves to.
        cost, gain: (steps,), what the step adds to the cost and takes off the loss; both above 0.
        price: (steps,), gain per cost.
    """

    start: Choice
    unit: NDArray[np.int64]
    after: NDArray[np.int64]
    cost: NDArray[np.float64]
    gain: NDArray[np.float64]
    price: NDArray[np.float64]

    def choice(self, n_steps: int) -> Choice:
        """The allocation after the first steps."""
        choice = self.start.copy()
        choice[self.unit[:n_steps]] = self.after[:n_steps]  # of several steps of a unit, the last one stays
        return choice


def climb(costs: NDArray[np.float64], losses: NDArray[np.float64]) -> Climb:
    """The steps up the lower convex hulls, for all units at a time.

    Args:
        costs: (units, levels), `inf` where a level is not available.
        losses: the same for the loss.
    """
    n_units, n_levels = costs.shape
    start = np.where(costs == costs.min(axis=1, keepdims=True), losses, np.inf).argmin(axis=1)
    now, price = start.copy(), np.full(n_units, np.inf)
    moving = np.arange(n_units)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for _ in range(n_levels):
        here = np.arange(len(moving)), now[moving]
        cost = costs[moving] - costs[moving][here][:, None]
        gain = losses[moving][here][:, None] - losses[moving]
        useful = (cost > 0) & (gain > 0)
        with np.errstate(over="ignore"):
            slope = np.minimum(np.where(useful, gain, 0.0) / np.where(useful, cost, 1.0), np.finfo(np.float64).max)
        steepest = slope.max(axis=1)
        after = np.where(slope == steepest[:, None], cost, -np.inf).argmax(axis=1)  # of equal slopes, the longest step
        goes = steepest > 0
        moving, after = moving[goes], after[goes]
        if not len(moving):
            break
        price[moving] = np.minimum(price[moving], steepest[goes])  # rounding must not turn a unit's steps round
        steps.append((moving, after, price[moving]))
        now[moving] = after
    return _ordered(start, costs, losses, steps)


def _ordered(
    start: Choice,
    costs: NDArray[np.float64],
    losses: NDArray[np.float64],
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]],
) -> Climb:
    before = start.copy()
    cost, gain = [], []
    for unit, after, _ in steps:
        cost.append(costs[unit, after] - costs[unit, before[unit]])
        gain.append(losses[unit, before[unit]] - losses[unit, after])
        before[unit] = after
    nothing = np.zeros(0)
    units = np.concatenate([nothing.astype(np.int64), *(unit for unit, _, _ in steps)])
    levels = np.concatenate([nothing.astype(np.int64), *(after for _, after, _ in steps)])
    prices = np.concatenate([nothing, *(price for _, _, price in steps)])
    order = np.argsort(-prices, kind="stable")
    return Climb(
        start,
        units[order],
        levels[order],
        np.concatenate([nothing, *cost])[order],
        np.concatenate([nothing, *gain])[order],
        prices[order],
    )
