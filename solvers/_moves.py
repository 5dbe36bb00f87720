"""Random moves between allocations that keep every budget: what an evolutionary search mutates with.

A level switch moves one unit one level down and another one level up. Where both steps cost the same (equal layers,
evenly spaced levels), that keeps a budget exactly, and this is EvoPress's mutation, which it confines to units of equal
size. A coin decides whether such a pair is looked for. Without one, or where there is none, costs can move between
unequal units: one step down rarely pays for exactly one step up, so the switch continues until the accounts are
settled. Another coin decides how it begins:

- down first: one unit goes down, then others go up while anything fits in what was freed;
- up first: one unit goes up, whether it fits or not, others go down until the budgets hold, then others go up as
  before.

Both are needed: where steps have unequal sizes, a big step up never fits in what one small step down frees, so down
first alone would never take it. EvoPress, for units of unequal size, goes up first only, and refuses offspring that
give up over a fifth of the bits they took; here they are spent instead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layerwise.solvers.problem import ROUNDING, Choice, Problem

_MOST_STEPS = 10
"""Level changes in one settling; EvoPress refuses offspring with more than 10."""


class Moves:
    """Steps up and down the levels of a problem without groups.

    Each unit's available levels stand in the order of their `Problem.shares`: by cost where there is one budget, of
    equal costs the lower index first; a block's levels with the least that the units inside then cost, of equal ones
    with the most. (Where all that is inside can be dropped, keeping a block costs as little as dropping it, and only
    the first leads anywhere.) A step leads to the neighbour in that order.

    Units that are absent keep their levels, and come back with them.
    """

    def __init__(self, problem: Problem) -> None:
        n_units, n_levels = problem.shape
        self._problem = problem
        self._rows = np.arange(n_units)
        self._all = np.ones(n_units, dtype=np.bool_)
        limits = np.array(list(problem.limits.values()), dtype=np.float64)
        self._limits = limits + np.abs(limits) * ROUNDING
        costs = [problem.costs[resource] for resource in problem.limits]
        self._costs: NDArray[np.float64] = np.stack(costs, axis=2) if costs else np.zeros((n_units, n_levels, 0))
        self._up = np.full((n_units, n_levels), -1)  # the next dearer level, -1 at the end
        self._down = np.full((n_units, n_levels), -1)
        least = problem.forest.subtotals(problem.shares)
        most = -problem.forest.subtotals(np.where(problem.available, -problem.shares, np.inf))
        order = np.lexsort((most, least))
        for unit in range(n_units):
            ladder = [level for level in order[unit] if problem.available[unit, level]]
            self._up[unit, ladder[:-1]] = ladder[1:]
            self._down[unit, ladder[1:]] = ladder[:-1]

    def can_rise(self, choice: Choice) -> bool:
        """True if any step up fits in the budgets."""
        return bool((self._affordable(choice) & self._present(choice)).any())

    def filled(self, choice: Choice, rng: np.random.Generator) -> Choice:
        """The allocation after random steps up, until none fits any more."""
        filled = choice.copy()
        while self._step(filled, self._up, self._affordable(filled), rng) is not None:
            pass
        return filled

    def mutated(self, choice: Choice, rng: np.random.Generator, max_switches: int) -> Choice | None:
        """The allocation after some switches in a row: the smaller of two uniform draws from 1..max_switches.

        None if a switch could not be settled. Otherwise every budget holds that held before.
        """
        mutant = choice.copy()
        for _ in range(min(rng.integers(1, max_switches + 1, size=2))):
            if not self._switch(mutant, rng):
                return None
        return mutant

    def _switch(self, choice: Choice, rng: np.random.Generator) -> bool:
        """Switch in place; False if it could not be settled."""
        if rng.random() < 0.5 and self._exchange(choice, rng):
            return True
        ladder = self._down if rng.random() < 0.5 else self._up
        first = self._step(choice, ladder, np.ones(len(choice), dtype=np.bool_), rng)
        if first is None:
            return False
        lowered = np.zeros(len(choice), dtype=np.bool_)
        lowered[first] = ladder is self._down
        for _ in range(_MOST_STEPS):
            if not (over := self._over(choice)).any():
                break
            relief = self._relieving(choice, over)
            relief[first] = False
            unit = self._step(choice, self._down, relief, rng)
            if unit is None:
                return False
            lowered[unit] = True
        for _ in range(_MOST_STEPS):
            if self._step(choice, self._up, self._affordable(choice) & ~lowered, rng) is None:
                break
        return not self._over(choice).any()

    def _exchange(self, choice: Choice, rng: np.random.Generator) -> bool:
        """One unit down and another up by what that freed; False, with nothing changed, if there is no such pair."""
        before, used = choice.copy(), self._used(choice)
        lowered = self._step(choice, self._down, np.ones(len(choice), dtype=np.bool_), rng)
        if lowered is None:
            return False
        beside = np.abs(self._added(choice, self._up) - (used - self._used(choice)))
        equal = self._affordable(choice)  # small differences add up, so the limits are looked at too
        equal &= (beside <= self._limits * ROUNDING).all(axis=1)
        equal[lowered] = False
        if self._step(choice, self._up, equal, rng) is None:
            choice[:] = before
            return False
        return True

    def _step(
        self, choice: Choice, ladder: NDArray[np.int64], allowed: NDArray[np.bool_], rng: np.random.Generator
    ) -> int | None:
        """Move one random unit of those allowed along the ladder, in place; None if none can."""
        units = np.flatnonzero(allowed & (ladder[self._rows, choice] >= 0) & self._present(choice))
        if len(units) == 0:
            return None
        unit = int(units[rng.integers(len(units))])
        choice[unit] = ladder[unit, choice[unit]]
        return unit

    def _present(self, choice: Choice) -> NDArray[np.bool_]:
        return self._problem.forest.present(choice) if self._problem.nested else self._all

    def _used(self, choice: Choice) -> NDArray[np.float64]:
        return np.asarray(self._costs[self._rows, choice][self._present(choice)].sum(axis=0))

    def _over(self, choice: Choice) -> NDArray[np.bool_]:
        """(budgets,): the budget is exceeded."""
        return self._used(choice) > self._limits

    def _added(self, choice: Choice, ladder: NDArray[np.int64]) -> NDArray[np.float64]:
        """(units, budgets): what a step of each unit along the ladder adds to the costs; garbage where it has none."""
        now, after = self._costs[self._rows, choice], ladder[self._rows, choice]
        added: NDArray[np.float64] = self._costs[self._rows, after] - now
        if self._problem.nested:
            inside = self._problem.forest.inside(choice, now)
            added += inside[self._rows, after] - inside[self._rows, choice]
        return added

    def _affordable(self, choice: Choice) -> NDArray[np.bool_]:
        """(units,): the unit can go one level up within the budgets."""
        after = self._used(choice) + self._added(choice, self._up)
        return np.asarray((after <= self._limits).all(axis=1) & (self._up[self._rows, choice] >= 0))

    def _relieving(self, choice: Choice, over: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(units,): one level down costs less of a budget that is exceeded."""
        return np.asarray((self._added(choice, self._down)[:, over] < 0).any(axis=1))
