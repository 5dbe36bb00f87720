"""`exchange`: local search; single changes of a level, and pairs of them, as long as any lowers the loss.

It takes every problem whose loss is known from tables, interactions included. Left out: a bound, and any way out of a
local optimum.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from layerwise.solvers import Choice, Problem, Solution, any_feasible
from layerwise.solvers.problem import require_losses


def exchange(problem: Problem) -> Solution:
    """Improve any allocation within the limits until no change of one or two levels does.

    Args:
        problem: any but the reverse form with interactions; needs losses.
    Raises:
        InfeasibleBudget: no allocation is within the limits.
        UsageError: no losses, or the reverse form with interactions.
    """
    started = time.perf_counter()
    require_losses("exchange", problem)
    problem.check_budgets()
    plain = problem.plain()
    choice = any_feasible(plain)
    while (better := _better(plain, choice)) is not None:
        choice = better
    found = problem.canonical(problem.expand(choice))
    return problem.solution(found, seconds=time.perf_counter() - started)


def _better(problem: Problem, choice: Choice) -> Choice | None:
    """The first neighbour within the limits that loses less, single changes first; None if there is none."""
    loss = problem.loss(choice)
    assert loss is not None
    for neighbour in itertools.chain(_changed(problem, choice, 1), _changed(problem, choice, 2)):
        if problem.feasible(neighbour):
            other = problem.loss(neighbour)
            if other is not None and other < loss - 1e-12 * abs(loss):
                return neighbour
    return None


def _changed(problem: Problem, choice: Choice, count: int) -> Iterator[Choice]:
    """Every allocation that differs in so many units, at levels that they have."""
    levels = [problem.available[unit].nonzero()[0].tolist() for unit in range(len(choice))]
    for units in itertools.combinations(range(len(choice)), count):
        for chosen in itertools.product(*(levels[unit] for unit in units)):
            if all(choice[unit] != level for unit, level in zip(units, chosen, strict=True)):
                neighbour = choice.copy()
                neighbour[list(units)] = chosen
                yield neighbour
