"""The whole trade-off between loss and one resource, not one point of it.

*Hull*: climbing the convex hulls of all units at once (`_hull.py`) passes through every allocation on the lower convex
hull of the trade-off, cheapest first, in one pass. Each is the optimum of a budget equal to its cost; between two of
them, the straight line is a lower bound.

*Exact*: dynamic programming (`_dp.py`) also finds the optima that lie above the hull.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers._dp import Ends, falling, non_dominated_ends, on_grid
from layerwise.solvers._hull import Climb, climb
from layerwise.solvers._nested import Flat, flattened
from layerwise.solvers.problem import BUDGET_TOLERANCE, LOSS, Choice, Problem, Solution, require_separable

if TYPE_CHECKING:
    import pandas as pd


class Frontier:
    """Optimal trade-offs between loss and one resource, by rising cost and falling loss.

        curve = frontier(problem, over="bytes")
        curve.costs, curve.losses          # the points
        curve.at(4e9).choice               # the best of them within a budget

    Attributes:
        over: the resource.
        costs: (points,), its summed cost.
        losses: (points,), the summed loss.
        exact: no allocation at all is better than these in both. False for a hull, whose points are optimal although
            others between them may be missing, and where costs had to be rounded.
    """

    def __init__(self, problem: Problem, over: str, points: _HullPoints | _EndPoints, exact: bool) -> None:
        self.over, self.exact = over, exact
        self.costs, self.losses = points.costs, points.losses
        self._problem, self._points = problem, points

    def __len__(self) -> int:
        return len(self.costs)

    def choice(self, index: int) -> Choice:
        """The allocation of a point, (units,) level indices in the form of `Problem.canonical`.

        Takes time in proportion to the units, not the points.
        """
        if not -len(self) <= index < len(self):
            raise UsageError(f"the frontier has {len(self)} points, found index {index}")
        return self._problem.canonical(self._problem.expand(self._points.choice(index % len(self))))

    def solution(self, index: int) -> Solution:
        """A point with all its costs. Its lower bound is its loss, where the point is known to be optimal."""
        solution = self._problem.solution(self.choice(index))
        if not self._points.optimal:
            return solution
        return self._problem.solution(solution.choice, status="optimal", lower_bound=solution.loss)

    def at(self, budget: float) -> Solution:
        """The point with the least loss within a budget.

        The lower bound is on every allocation within that budget: the straight line to the next point of a hull, or the
        loss itself on an exact frontier.

        Raises:
            InfeasibleBudget: the budget is below the first point.
        """
        limit = budget + abs(budget) * BUDGET_TOLERANCE
        index = int(np.searchsorted(self.costs, limit, side="right")) - 1
        if index < 0:
            raise InfeasibleBudget(self.over, budget, float(self.costs[0]))
        point = self.solution(index)
        if self.exact or not self._points.optimal or index == len(self) - 1:
            return point
        share = (limit - self.costs[index]) / (self.costs[index + 1] - self.costs[index])
        below = float(self.losses[index] + share * (self.losses[index + 1] - self.losses[index]))
        assert point.loss is not None
        bound = min(below, point.loss)
        return self._problem.solution(
            point.choice, lower_bound=bound, status="optimal" if bound == point.loss else "feasible"
        )

    def to_frame(self) -> pd.DataFrame:
        """The points as a table: the cost under the resource's name, and the loss."""
        import pandas as pd

        return pd.DataFrame({self.over: self.costs, LOSS: self.losses})


class _HullPoints:
    """The allocations on the way up the hulls, one for each step."""

    optimal = True

    def __init__(self, problem: Problem, over: str) -> None:
        one = problem.variant(costs={over: problem.costs[over]})  # the hulls of blocks look at all resources there are
        self._flat: Flat | None = flattened(one) if problem.nested else None
        flat = problem if self._flat is None else self._flat.problem
        assert flat.losses is not None
        self._climb: Climb = climb(flat.costs[over], flat.losses)
        start, end = self._climb.choice(0), self._climb.choice(len(self._climb.unit))
        gained = np.cumsum(self._climb.gain[::-1])[
            ::-1
        ]  # from the least loss on, so that small losses keep their digits
        self.costs: NDArray[np.float64] = flat.cost(start)[over] + np.append(0.0, np.cumsum(self._climb.cost))
        self.losses: NDArray[np.float64] = (flat.loss(end) or 0.0) + np.append(gained, 0.0)

    def choice(self, index: int) -> Choice:
        choice = self._climb.choice(index)
        return choice if self._flat is None else self._flat.expand(choice)


class _EndPoints:
    """Non-dominated allocations, found with exact costs or with costs rounded up to a grid.

    Running sums order them, exactly rounded ones decide: allocations that differ by rounding only are one point.
    """

    def __init__(self, problem: Problem, over: str, ends: Ends, optimal: bool) -> None:
        self._ends, self.optimal = ends, optimal
        one = problem.variant(costs={over: problem.costs[over]})
        costs, losses = np.array([(one.cost(choice)[over], one.loss(choice)) for choice in ends.choices()]).T
        order = np.lexsort((losses, costs))
        self._kept = order[falling(losses[order])]
        self.costs: NDArray[np.float64] = costs[self._kept]
        self.losses: NDArray[np.float64] = losses[self._kept]

    def choice(self, index: int) -> Choice:
        return self._ends.choice(int(self._kept[index]))


def frontier(problem: Problem, over: str, *, exact: bool = False, max_states: int = 20_000) -> Frontier:
    """Every trade-off on the lower convex hull of loss over one resource, or every one there is.

    Args:
        problem: needs losses; a budget for `over` is left aside. Nested units are allowed.
        over: the resource.
        exact: also the trade-offs above the hull, by dynamic programming.
        max_states: with `exact`, the most partial allocations to keep. Where more would be needed, costs are rounded up
            to a grid of this many steps over the whole range: every point is then a real allocation with its true
            cost, and at most one step per unit dearer than the optimum of its loss; `Frontier.exact` is False.
    Raises:
        UsageError: no such resource, no losses, units that interact, or a budget for another resource.
    """
    require_separable("frontier", problem)
    if over not in problem.costs:
        raise UsageError(f"no resource {over}; the problem has {', '.join(problem.costs)}")
    others = [resource for resource in problem.limits if resource not in (over, LOSS)]
    if others:
        raise UsageError(
            f"a frontier over {over} leaves no room for a budget of {', '.join(others)}",
            hint="solve for several budgets with branch",
        )
    free = problem.variant(budgets={}, minimize=LOSS, max_loss=math.inf)
    plain = free.plain()
    if not exact:
        return Frontier(free, over, _HullPoints(plain, over), exact=False)
    costs, _ = plain.above_least(plain.costs[over])
    ends = non_dominated_ends(plain, costs, math.inf, max_states)
    rounded = ends is None
    if ends is None:
        room = math.fsum(np.where(plain.available, costs, 0.0).max(axis=1).tolist())  # above 0, or one state would do
        step = room / max_states
        ends = on_grid(plain, costs, room + plain.shape[0] * step, step, np.ceil)  # rounding up adds a step per unit
    return Frontier(free, over, _EndPoints(plain, over, ends, optimal=not rounded), exact=not rounded)
