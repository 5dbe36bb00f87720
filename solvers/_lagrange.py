"""Prices instead of limits: the Lagrangian relaxation of an allocation problem.

With a price p_k >= 0 on every limited resource, the units no longer compete, and each takes its best level by itself:

    L(p) = sum_u min_l (loss_ul + sum_k p_k cost_kul) - sum_k p_k limit_k.

L(p) is a lower bound on the loss of every allocation within the limits, for any prices. Its maximum equals the optimum
of the linear relaxation. With one resource the best price is read off the units' convex hulls; with several it is found
by cutting planes (Kelley, "The cutting-plane method for solving convex programs", 1960), a small linear program each.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from layerwise.solvers._greedy import greedy
from layerwise.solvers._hull import climb
from layerwise.solvers._nested import flattened
from layerwise.solvers._settle import settled, spendable
from layerwise.solvers.problem import Choice, Problem, Solution, certified, require_separable

_MOST_CUTS = 500
"""Cutting planes before the best prices so far are good enough. A guess; the bound holds at any prices."""

_PRECISE = 1e-9
"""Relative: cutting planes stop when no price can raise the bound by more than this."""

_BESIDE = 1e-9
"""Relative: how far a price is moved to see what is chosen just above and just below it."""

_HIGHEST_PRICE = 1e4
"""Limits the prices of resources that are used up to the last bit, for which no price would be too high.

A guess.
"""

_FINITE = 1e300
"""No price and no priced cost gets above this, so that sums of them stay finite."""

_LEAST_ROOM = 1e-3
"""Of what there is to spend, the share that a limit without any room counts as, to scale its price. A guess."""

_TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}  # the least HiGHS takes


class Lagrangian:
    """A plain problem with priced limits.

    Args:
        problem: plain, with losses, without interactions; units may be nested.

    Attributes:
        resources: the limited ones.
        costs: (resources, units, levels), what a level adds to the cheapest allocation, 0 where it is not available.
        limits: (resources,), what that leaves of the limits: with the room for rounding that `Problem.feasible` grants,
            but in whole multiples where the costs are.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.losses is not None
        self.problem = problem
        self.losses = problem.losses
        self.resources = list(problem.limits)
        self.costs: NDArray[np.float64] = np.zeros((len(self.resources), *problem.shape))
        self.limits: NDArray[np.float64] = np.zeros(len(self.resources))
        for index, (resource, limit) in enumerate(problem.limits.items()):
            costs = problem.costs[resource]
            above, least = problem.above_least(costs)
            self.costs[index] = np.where(problem.available, above, 0.0)
            self.limits[index] = math.fsum([_on_grid(limit, costs[problem.available]), *(-least).tolist()])
        scale = np.maximum(self.costs.max(axis=(1, 2)), np.abs(self.limits))
        self._highest = _FINITE / np.maximum(scale, 1.0)

    def penalties(self, prices: NDArray[np.float64]) -> NDArray[np.float64]:
        """(units, levels): loss plus priced cost."""
        return self.losses + np.tensordot(prices, self.costs, axes=1)

    def bound(self, prices: NDArray[np.float64]) -> float:
        """L(p), a lower bound on the loss of every allocation within the limits."""
        priced = -prices * self.limits
        return math.fsum([self.problem.least(self.penalties(prices)), *priced.tolist()])

    def minimiser(self, prices: NDArray[np.float64]) -> Choice:
        """An allocation with the least sum of loss and priced cost, whatever the limits."""
        return self.problem.lowest(self.penalties(prices))

    def spent(self, choice: Choice) -> NDArray[np.float64]:
        """(resources,): the summed costs of an allocation."""
        taken = self.costs[:, np.arange(len(choice)), choice] * self.problem.present(choice)
        return np.array([math.fsum(costs) for costs in taken.tolist()])

    def best_prices(self) -> NDArray[np.float64]:
        """(resources,): prices at which the bound is greatest, to the precision of floating point.

        The limits must be within reach, each and all together; otherwise the bound has no maximum.
        """
        if len(self.resources) == 0:
            return np.zeros(0)
        if len(self.resources) == 1:
            return self._alone(0)
        alone = [self._alone(index) for index in range(len(self.resources))]
        best = max(alone, key=self.bound)
        return best if self._is_optimal(best) else self._cutting_planes(alone)

    def _alone(self, index: int) -> NDArray[np.float64]:
        """The best prices if only one of the limits existed."""
        resource = self.resources[index]
        prices = np.zeros(len(self.resources))
        single = self.problem.variant(budgets={resource: self.problem.budgets[resource]})
        prices[index] = _price(single, resource, self.limits[index])
        return np.asarray(np.minimum(prices, self._highest))

    def _is_optimal(self, prices: NDArray[np.float64]) -> bool:
        """True if no limit without a price is broken by the allocations of these prices, on either side of their ties.

        What the linear relaxation mixes of the two then breaks none either.
        """
        free = prices == 0
        sides = [self.spent(self.minimiser(prices * side))[free] for side in (1 - _BESIDE, 1 + _BESIDE)]
        return bool((np.array(sides) <= self.limits[free]).all())

    def _cutting_planes(self, starts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Ask the linear model of the bound for its highest point, add the bound's tangent there, and so on.

        Prices are counted per room above the cheapest allocation and unit of loss, so that all numbers are around 1.
        """
        room = np.array([_room(self.problem, resource) for resource in self.resources])
        worth = _range(self.losses) or 1.0
        tangents: list[tuple[NDArray[np.float64], float]] = []  # the bound is at most height + slope @ prices
        best, best_bound = starts[0], -math.inf
        queue = [*starts, np.zeros(len(room))]
        for _ in range(_MOST_CUTS):
            if queue:
                prices, highest = queue.pop(0), math.inf
            else:
                top = _highest(tangents)
                if top is None:
                    break
                prices, highest = np.minimum(top[0] * worth / room, self._highest), top[1] * worth
            bound = self.bound(prices)
            if bound > best_bound:
                best, best_bound = prices, bound
            if highest - best_bound <= _PRECISE * abs(best_bound):
                break
            slope = (self.spent(self.minimiser(prices)) - self.limits) / room
            height = bound / worth - float(slope @ (prices * room / worth))
            if math.isfinite(height):  # not so where a limit alone has a price beyond all bounds
                tangents.append((slope, height))
        return best


def lagrange(problem: Problem) -> Solution:
    """Price the resources, let every unit take its best level, and settle what the limits still ask for.

    The units first take their levels at the best prices. While a limit is exceeded, the cheapest relief is taken (least
    loss and priced cost per overshoot); then whatever still fits, largest gain first.

    Args:
        problem: any number of budgets; needs losses; not with interactions.
    Returns:
        An allocation with the Lagrangian bound as `lower_bound`. With one budget the gap is at most the loss of one
        step up the hull of one unit.
    Raises:
        InfeasibleBudget: a limit is out of reach, alone or together with the others.
        UsageError: a problem without losses, or with interactions.
    """
    started = time.perf_counter()
    require_separable("lagrange", problem)
    problem.check_budgets()
    plain = problem.plain()
    relaxed = Lagrangian(plain)
    prices = relaxed.best_prices()
    return certified(problem, nearest(relaxed, prices), relaxed.bound(prices), started)


def nearest(relaxed: Lagrangian, prices: NDArray[np.float64]) -> Choice:
    """The allocation of these prices, settled within the limits.

    Raises:
        InfeasibleBudget: the limits are out of reach together.
    """
    by_name = dict(zip(relaxed.resources, prices.tolist(), strict=True))
    choice = settled(relaxed.problem, relaxed.minimiser(prices), by_name)
    return greedy(relaxed.problem).choice if choice is None else choice


def _on_grid(limit: float, costs: NDArray[np.float64]) -> float:
    """The greatest sum of these costs that the limit admits, as far as a common divisor tells."""
    widened = spendable(limit)
    if np.abs(costs).max() >= 2**53 or (costs != np.round(costs)).any():
        return widened
    step = int(np.gcd.reduce(costs.astype(np.int64).ravel()))
    return float(math.floor(widened / step) * step) if step else widened


def _price(problem: Problem, resource: str, room: float) -> float:
    """The best price of the only limited resource: what the step gains that cuts through what is left of the limit."""
    flat = flattened(problem).problem if problem.nested else problem
    assert flat.losses is not None
    steps = climb(flat.costs[resource], flat.losses)
    taken = int(np.searchsorted(np.cumsum(steps.cost), room, side="right"))
    return float(steps.price[taken]) if taken < len(steps.price) else 0.0


def _room(problem: Problem, resource: str) -> float:
    """What the cheapest allocation leaves of a limit, or a little of what there is to spend if it leaves nothing."""
    least, most = problem.reachable(resource)
    return max(problem.limits[resource] - least, (most - least) * _LEAST_ROOM) or 1.0


def _range(losses: NDArray[np.float64]) -> float:
    """The difference between the best and the worst allocation, whatever it costs."""
    finite = np.isfinite(losses)
    return float((np.where(finite, losses, -np.inf).max(axis=1) - losses.min(axis=1)).sum())


def _highest(tangents: list[tuple[NDArray[np.float64], float]]) -> tuple[NDArray[np.float64], float] | None:
    """The highest point below all tangents, and its height; None where the arithmetic fails."""
    from scipy.optimize import linprog

    slopes, heights = np.array([slope for slope, _ in tangents]), np.array([height for _, height in tangents])
    n_prices = slopes.shape[1]
    objective = np.append(np.zeros(n_prices), -1.0)
    bounds = [(0.0, _HIGHEST_PRICE)] * n_prices + [(None, None)]
    matrix = np.column_stack([-slopes, np.ones(len(heights))])
    answer = linprog(objective, matrix, heights, bounds=bounds, method="highs-ds", options=_TOLERANCES)
    return None if answer.x is None else (np.maximum(answer.x[:-1], 0.0), -float(answer.fun))
