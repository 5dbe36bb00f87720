"""Exact allocation under one budget, by dynamic programming over non-dominated partial allocations.

Units are added one at a time. A state is a partial allocation's (cost, loss); one that costs no less and loses no less
than another is dropped. Costs may be any real numbers. When they are whole multiples of something (bits of equal
layers, say) there are never more states than multiples that fit in the budget, so the textbook table over costs would
be no smaller. What is left at the end is the whole trade-off up to the budget, of which the last state is the answer.

Left out: several budgets (states would be dominated too rarely; use `ilp`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import UsageError
from layerwise.solvers.problem import ROUNDING, Choice, Problem, Solution


def dp(problem: Problem, max_states: int = 200_000) -> Solution:
    """Solve a problem with one budget (or none) to proven optimality.

    Of equal losses the cheaper allocation is taken, then the one with the lower levels in the last units.

    Args:
        problem: at most one finite budget; needs losses.
        max_states: the most partial allocations to keep. Where exactness would take more, costs are rounded up to a
            grid of this many steps over the room above the cheapest allocation. The answer then still keeps the budget,
            its status is "feasible", and it loses no more than the optimum of a budget smaller by one step per unit.
            Its lower bound comes from a second run with costs rounded down.
    Raises:
        InfeasibleBudget: the budget is below the least reachable cost.
        UsageError: several budgets, or no losses.
    """
    started = time.perf_counter()
    if problem.losses is None:
        raise UsageError("dp needs losses, and this problem has none", hint="give losses, or use uniform or Evolve")
    if len(problem.limits) > 1:
        raise UsageError(f"dp takes one budget, found {', '.join(problem.limits)}", hint="use ilp for several budgets")
    if max_states < 1:
        raise UsageError(f"max_states must be at least 1, found {max_states}")
    problem.check_budgets()
    tied = problem.tied()
    assert tied.losses is not None
    costs, room = _above_cheapest(tied)
    choice = _non_dominated(costs, tied.losses, room, max_states)
    if choice is not None:
        solution = problem.solution(problem.expand(choice))
        return problem.solution(
            solution.choice, status="optimal", lower_bound=solution.loss, seconds=time.perf_counter() - started
        )
    step = room / max_states
    kept = _on_grid(costs, tied.losses, step, max_states, np.ceil)
    relaxed = _on_grid(costs, tied.losses, step, max_states, np.floor)
    return problem.solution(problem.expand(kept), lower_bound=tied.loss(relaxed), seconds=time.perf_counter() - started)


def _above_cheapest(problem: Problem) -> tuple[NDArray[np.float64], float]:
    """Costs above each unit's least, and how much of the budget the cheapest allocation leaves.

    Counted like this, every partial allocation within the room can be completed.
    """
    if not problem.limits:
        return problem.shares - problem.shares.min(axis=1, keepdims=True), math.inf
    ((resource, limit),) = problem.limits.items()
    table = problem.costs[resource]
    least = table.min(axis=1)
    return table - least[:, None], max(0.0, math.fsum([limit, *(-least)])) + abs(limit) * ROUNDING


def _non_dominated(
    costs: NDArray[np.float64], losses: NDArray[np.float64], room: float, max_states: int
) -> Choice | None:
    """The best allocation within the room, or None if more than `max_states` states would have to be kept."""
    state_cost, state_loss = np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # per unit: the state before, the level taken
    for unit_costs, unit_losses in zip(costs, losses, strict=True):
        levels = np.flatnonzero(np.isfinite(unit_losses) & (unit_costs <= room))
        cost = (unit_costs[levels, None] + state_cost).ravel()
        loss = (unit_losses[levels, None] + state_loss).ravel()
        order = np.lexsort((loss, cost))  # stable: of equal states, the lower level
        order = order[cost[order] <= room]
        lowest_before = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
        order = order[loss[order] < lowest_before]
        if len(order) > max_states:
            return None
        history.append((order % len(state_cost), levels[order // len(state_cost)]))
        state_cost, state_loss = cost[order], loss[order]
    return _trace(history, len(state_cost) - 1)


def _trace(history: list[tuple[NDArray[np.int64], NDArray[np.int64]]], state: int) -> Choice:
    choice = np.empty(len(history), dtype=np.int64)
    for unit in range(len(history) - 1, -1, -1):
        before, level = history[unit]
        choice[unit], state = level[state], before[state]
    return choice


def _on_grid(
    costs: NDArray[np.float64],
    losses: NDArray[np.float64],
    step: float,
    steps: int,
    rounding: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> Choice:
    choice = _non_dominated(rounding(costs / step), losses, float(steps), steps + 1)
    assert choice is not None  # whole costs from 0 to `steps` make at most `steps + 1` states
    return choice
