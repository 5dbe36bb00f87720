"""Exact allocation under any number of budgets, as an integer program.

    minimise   sum_ul loss_ul x_ul
    such that  sum_l x_ul = 1 for every unit,   sum_ul cost_ul x_ul <= budget for every resource,   x binary.

The model is PuLP's; HiGHS (through highspy) or CBC (bundled with PuLP) solves it on one thread, because more threads
make the choice among equal optima depend on timing. These solvers work with absolute tolerances around 1e-6, so the
numbers are scaled first: losses are counted above each unit's least and scaled so that the answer is far above the
tolerance, budgets are scaled likewise, and whatever comes back is checked against the unscaled problem.

Left out: a warm start (PuLP hands one to CBC only), and a choice among equal optima by cost (that would be a second
program); `dp` prefers the cheaper one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget, LayerwiseError, UsageError
from layerwise.solvers.problem import Choice, Problem, Solution

Backend = Literal["HiGHS", "CBC"]

_SCALE = 1e6
"""What a budget and the expected answer become: tolerances of 1e-6 are then 1e-12 of either."""

_SMALL = 1e-3
"""An answer that came out below this share of what it was scaled for is solved again with a better scale."""

_PROVEN = 1e-9
"""Relative gap up to which an answer counts as the optimum."""


@dataclass(frozen=True)
class _Answer:
    choice: Choice
    bound: float | None  # on the objective; None where the backend gives none
    finished: bool


def ilp(problem: Problem, time_limit: float | None = None, backend: Backend = "HiGHS") -> Solution:
    """Solve the problem to proven optimality.

    Args:
        problem: any number of budgets; needs losses.
        time_limit: seconds, None for no limit. The best allocation found by then is returned with status "time_limit"
            and, from HiGHS, the bound proven so far. Which one that is depends on the machine.
        backend: "HiGHS" or "CBC".
    Raises:
        InfeasibleBudget: a budget is out of reach, alone or together with the others.
        UsageError: a problem without losses.
        LayerwiseError: the time limit passed before any allocation was found.
    """
    started = time.perf_counter()
    if backend not in ("HiGHS", "CBC"):
        raise UsageError(f"unknown backend {backend}", hint="choose HiGHS or CBC")
    if problem.losses is None:
        raise UsageError("ilp needs losses, and this problem has none", hint="give losses, or use uniform or Evolve")
    problem.check_budgets()
    tied = problem.tied()
    assert tied.losses is not None
    deadline = None if time_limit is None else started + time_limit
    least = tied.losses.min(axis=1)
    answer = _solve_to_precision(tied, tied.losses - least[:, None], deadline, backend)
    bound = None if answer.bound is None else math.fsum([*least, answer.bound])
    solution = problem.solution(problem.expand(answer.choice))
    assert solution.loss is not None
    proven = answer.finished and bound is not None and solution.loss - bound <= _PROVEN * abs(solution.loss)
    return replace(
        solution,
        lower_bound=None if bound is None else min(bound, solution.loss),
        status="optimal" if proven else "feasible" if answer.finished else "time_limit",
        seconds=time.perf_counter() - started,
    )


def any_feasible(problem: Problem) -> Choice:
    """Some allocation within all budgets, near the cheapest, in the problem's own units.

    With one budget it is the cheapest allocation. With several, where the cheapest one by shares breaks one of them,
    finding any is already a hard problem, and the integer program decides it.

    Raises:
        InfeasibleBudget: there is none.
    """
    problem.check_budgets()
    tied = problem.tied()
    cheapest: Choice = tied.shares.argmin(axis=1)
    if not tied.feasible(cheapest):
        cheapest = tied.fold(ilp(replace(tied, losses=tied.shares)).choice)
    return problem.expand(cheapest)


def _solve_to_precision(
    problem: Problem, losses: NDArray[np.float64], deadline: float | None, backend: Backend
) -> _Answer:
    """Minimise losses whose least is 0 in every unit, with a scale that suits the answer.

    The answer is not known beforehand. If it comes out far below what it was scaled for, one harmful level somewhere
    has set the scale; levels that alone exceed the answer are then barred, and the rest is solved again.
    """
    expected = math.fsum(np.where(np.isfinite(losses), losses, 0.0).max(axis=1))
    best: _Answer | None = None
    while True:
        unit = expected if expected > 0 else 1.0
        answer = _solve(problem, losses / unit * _SCALE, deadline, backend)
        if answer is None:
            break
        found = _sum_at(losses, answer.choice)
        bound = None if answer.bound is None else max(0.0, answer.bound / _SCALE * unit)
        if best is None or found <= _sum_at(losses, best.choice):
            best = replace(answer, bound=bound)
        if not answer.finished or found == 0 or found >= expected * _SMALL:  # else the tolerance is too near
            return replace(best, finished=answer.finished)
        losses = np.where(losses <= found, losses, np.inf)
        expected = found
    if best is None:
        raise LayerwiseError(f"{backend} found no allocation in time", hint="raise the time limit")
    return replace(best, finished=False)


def _sum_at(losses: NDArray[np.float64], choice: Choice) -> float:
    return math.fsum(losses[np.arange(len(choice)), choice])


def _solve(problem: Problem, losses: NDArray[np.float64], deadline: float | None, backend: Backend) -> _Answer | None:
    """Minimise scaled losses (`inf` = barred) over a problem without groups; None if the time was too short for any.

    The solver's tolerance may let a budget slip by a hair; such an answer is cut off and the rest solved again.
    """
    import pulp

    model, switches = _model(problem, losses)
    while True:
        model.solve(_backend(backend, None if deadline is None else max(0.0, deadline - time.perf_counter())))
        if model.status == pulp.LpStatusInfeasible:
            raise _joint_shortage(problem)
        if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        choice = np.array([max(row, key=lambda level: row[level].varValue) for row in switches], dtype=np.int64)
        if problem.feasible(choice):
            finished = model.sol_status == pulp.LpSolutionOptimal
            return _Answer(choice, _bound(model, backend, finished), finished)
        chosen = [(row[level], 1) for row, level in zip(switches, choice.tolist(), strict=True)]
        model += pulp.LpAffineExpression(chosen) <= len(chosen) - 1


def _model(problem: Problem, losses: NDArray[np.float64]) -> tuple[Any, list[dict[int, Any]]]:
    """The integer program, and for every unit its binary variables by level."""
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    switches: list[dict[int, Any]] = [
        {level: pulp.LpVariable(f"x_{unit}_{level}", cat=pulp.LpBinary) for level in np.flatnonzero(allowed).tolist()}
        for unit, allowed in enumerate(np.isfinite(losses))
    ]
    flat = [(x, unit, level) for unit, row in enumerate(switches) for level, x in row.items()]
    model += pulp.LpAffineExpression([(x, float(losses[unit, level])) for x, unit, level in flat])
    for row in switches:
        model += pulp.LpAffineExpression([(x, 1) for x in row.values()]) == 1
    for resource, limit in problem.limits.items():
        costs, ceiling = _scaled(problem.costs[resource], limit)
        model += pulp.LpAffineExpression([(x, float(costs[unit, level])) for x, unit, level in flat]) <= ceiling
    return model, switches


def _scaled(costs: NDArray[np.float64], limit: float) -> tuple[NDArray[np.float64], float]:
    """The same budget in other words: costs above each unit's least, with the room that is left scaled to `_SCALE`.

    Costs that do not fit in the room at all (`inf` among them) become twice the room, which says the same in numbers
    that a solver can bear.
    """
    least = costs.min(axis=1)
    room = max(0.0, math.fsum([limit, *(-least)]))
    above = costs - least[:, None]
    if room == 0:
        return np.where(above > 0, _SCALE, 0.0), _SCALE / 2
    return np.minimum(above, 2 * room) / room * _SCALE, _SCALE


def _backend(backend: Backend, time_limit: float | None) -> Any:
    import pulp

    common = {"msg": False, "threads": 1, "gapRel": 0.0, "timeLimit": time_limit}
    if backend == "HiGHS":
        return pulp.HiGHS(**common, gapAbs=0.0, random_seed=0)
    return pulp.PULP_CBC_CMD(**common)


def _bound(model: Any, backend: Backend, finished: bool) -> float | None:
    if backend == "HiGHS":
        bound = float(model.solverModel.getInfo().mip_dual_bound)
        return bound if math.isfinite(bound) else None
    return float(model.objective.value()) if finished else None  # CBC's file format carries no bound


def _joint_shortage(problem: Problem) -> InfeasibleBudget:
    """Why nothing fits although each budget alone is within reach: what the last resource needs under the others."""
    budgets: dict[str, float] = {resource: problem.budgets[resource] for resource in problem.limits}
    resource = list(budgets)[-1]
    others = {name: budget for name, budget in budgets.items() if name != resource}
    try:
        best = ilp(replace(problem, budgets=others, losses=problem.costs[resource]))
    except InfeasibleBudget as smaller:
        return smaller
    reachable, budget = best.cost[resource], budgets[resource]
    assert reachable > budget, "the solver called a problem infeasible that is not"
    return InfeasibleBudget(
        resource,
        budget,
        reachable,
        f"the budgets are only jointly infeasible: {_within(others)}, the least reachable "
        f"{resource} is {reachable:.6g}, above the budget {budget:.6g} (short by {reachable - budget:.6g})",
    )


def _within(budgets: dict[str, float]) -> str:
    return "within " + " and ".join(f"{budget:.6g} {resource}" for resource, budget in budgets.items())
