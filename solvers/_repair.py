"""Bring an allocation back within the budgets, by taking levels from another one."""

from __future__ import annotations

import numpy as np

from layerwise.solvers.problem import Choice, Problem


def repaired(problem: Problem, choice: Choice, anchor: Choice, rng: np.random.Generator) -> Choice:
    """`choice`, with the units of a random order set to the levels of `anchor` until the budgets hold.

    How many units it takes is found by bisection. Unlike steps down, which would leave a child of two good parents with
    a few ruined units, this gives nothing that is in neither.

    Args:
        problem: without groups.
        choice: available levels, outside the budgets or within them.
        anchor: within the budgets.
        rng: for the order.
    """
    if problem.feasible(choice):
        return choice
    order = rng.permutation(np.flatnonzero(choice != anchor))
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if problem.feasible(_taken(choice, anchor, order[:middle])):
            enough = middle
        else:
            too_few = middle
    return _taken(choice, anchor, order[:enough])


def _taken(choice: Choice, anchor: Choice, units: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Choice:
    mixed = choice.copy()
    mixed[units] = anchor[units]
    return mixed
