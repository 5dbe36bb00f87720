"""Bring an allocation within its limits and spend what they leave, one move of one unit at a time.

What a relaxation rounds to is nearly right: it breaks a limit by little, or leaves a little of it. Both are settled
with the relaxation's prices of the resources as a guide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layerwise.solvers.problem import ROUNDING, Choice, Problem, scale_of

Prices = dict[str, float]
"""By limited resource, what a unit of its cost is worth in loss."""


def spendable(limit: float) -> float:
    """What `Problem.feasible` lets pass."""
    return limit + abs(limit) * ROUNDING


def settled(problem: Problem, choice: Choice, prices: Prices) -> Choice | None:
    """The allocation, changed until every limit holds and nothing more fits; None where no single move helps.

    Args:
        problem: plain, with losses.
        choice: available levels.
        prices: of the limited resources.
    """
    relieved = _relieved(problem, choice, prices)
    return filled(problem, relieved) if problem.feasible(relieved) else None


class _Moves:
    """All moves of one unit from an allocation: what they add to loss and costs, (units, levels), `inf` if not allowed.

    Where units interact inside a block that appears or disappears as a whole, the losses are estimates.
    """

    def __init__(self, problem: Problem, choice: Choice) -> None:
        assert problem.losses is not None
        self._problem, self._choice, self._present = problem, choice, problem.present(choice)
        self.losses = self._added(problem.losses + self._together())
        costs = [self._added(problem.costs[resource]) for resource in problem.limits]
        self.costs = np.array(costs).reshape(-1, *problem.shape)
        spent, limits = problem.cost(choice), problem.limits
        self.over = np.array([spent[resource] - spendable(limit) for resource, limit in limits.items()])[:, None, None]

    def penalties(self, prices: Prices) -> NDArray[np.float64]:
        """(units, levels): added loss, and added costs at their prices."""
        priced = [price * costs for price, costs in zip(prices.values(), self.costs, strict=True) if price]
        return sum(priced, self.losses)

    def excess(self) -> tuple[float, NDArray[np.float64]]:
        """By how much the limits are exceeded in all, as shares of them: now, and (units, levels) after each move."""
        scale = scale_of([*self._problem.limits.values()])[:, None, None]
        now, after = np.maximum(self.over, 0.0) / scale, np.maximum(self.over + self.costs, 0.0) / scale
        return float(now.sum()), after.sum(axis=0)

    def _added(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        current = table[np.arange(len(self._choice)), self._choice]
        added = table - current[:, None]
        if self._problem.nested:
            inside = self._problem.forest.inside(self._choice, current)
            added += inside - inside[np.arange(len(self._choice)), self._choice][:, None]
        added[~self._present] = np.inf
        return added

    def _together(self) -> NDArray[np.float64]:
        """(units, levels): interactions of each place with the rest of the allocation."""
        table = np.zeros(self._problem.shape)
        chosen = {(unit, level) for unit, level in enumerate(self._choice.tolist()) if self._present[unit]}
        for (a, b), loss in self._problem.interactions.items():
            table[a] += loss if b in chosen else 0.0
            table[b] += loss if a in chosen else 0.0
        return table


def _relieved(problem: Problem, choice: Choice, prices: Prices) -> Choice:
    """Moves until no limit is exceeded, or until no single move brings that nearer.

    A move that ends all excess is taken, of these the one with the least loss; else the one with the least penalty for
    what it takes off the excess.
    """
    choice = choice.copy()
    while True:
        moves = _Moves(problem, choice)
        now, after = moves.excess()
        allowed = np.isfinite(moves.losses) & (after < now)
        if now == 0 or not allowed.any():
            return choice
        ending = allowed & (after == 0)
        if ending.any():
            unit, level = _least(moves.losses, ending)
        else:
            removed = np.where(allowed, now - after, 1.0)
            unit, level = _least(np.maximum(moves.penalties(prices), 0.0) / removed, allowed)
        choice[unit] = level


def filled(problem: Problem, choice: Choice) -> Choice:
    """An allocation within the limits after the largest decreases of the loss in a row, until none fits."""
    choice, loss = choice.copy(), _loss(problem, choice)
    while True:
        moves = _Moves(problem, choice)
        allowed = (moves.losses < 0) & (moves.over + moves.costs <= 0).all(axis=0)
        while True:
            if not allowed.any():
                return choice
            unit, level = _least(moves.losses, allowed)
            moved = choice.copy()
            moved[unit] = level
            if problem.feasible(moved) and _loss(problem, moved) < loss:
                break
            allowed[unit, level] = False  # rounding, or an estimate of interactions that does not hold
        choice, loss = moved, _loss(problem, moved)


def _loss(problem: Problem, choice: Choice) -> float:
    loss = problem.loss(choice)
    assert loss is not None
    return loss


def _least(table: NDArray[np.float64], allowed: NDArray[np.bool_]) -> tuple[int, int]:
    unit, level = np.unravel_index(np.where(allowed, table, np.inf).argmin(), table.shape)
    return int(unit), int(level)
