"""Exact allocation under any number of budgets, as an integer program.

The program is that of `_program.py` with binary x; the z of interactions need not be binary, because they follow from
x. The model is PuLP's; HiGHS (through highspy) or CBC (bundled with PuLP) solves it on one thread, because more threads
make the choice among equal optima depend on timing. These solvers work with absolute tolerances around 1e-6, so the
numbers are scaled first: losses are scaled so that the answer is far above the tolerance, budgets likewise, and
whatever comes back is checked against the unscaled problem.

Left out: a warm start (PuLP hands one to CBC only), and a choice among equal optima by cost (that would be a second
program); `dp` prefers the cheaper one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget, LayerwiseError, UsageError
from layerwise.solvers._program import Program, linear_program
from layerwise.solvers.problem import LOSS, PROVEN, Choice, Problem, Solution, require_losses

Backend = Literal["HiGHS", "CBC"]

_SCALE = 1e6
"""What a budget and the expected answer become: tolerances of 1e-6 are then 1e-12 of either."""

_SMALL = 1e-3
"""An answer that came out below this share of what it was scaled for is solved again with a better scale.

A guess.
"""


@dataclass(frozen=True)
class _Answer:
    choice: Choice  # of the plain problem
    above: float  # its objective, above the least
    bound: float | None  # on that; None where the backend gives none
    finished: bool


def ilp(problem: Problem, time_limit: float | None = None, backend: Backend = "HiGHS") -> Solution:
    """Solve the problem to proven optimality.

    Args:
        problem: any number of budgets, nested units, interactions; needs losses. Not the reverse form with
            interactions.
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
    require_losses("ilp", problem)
    problem.check_budgets()
    program = linear_program(problem.plain())
    deadline = None if time_limit is None else started + time_limit
    answer = _solve_to_precision(problem, program, deadline, backend)
    bound = None if answer.bound is None else program.least + answer.bound
    solution = problem.solution(problem.expand(answer.choice))
    assert solution.objective is not None
    precision = PROVEN * max(abs(solution.objective), answer.above)
    proven = answer.finished and bound is not None and solution.objective - bound <= precision
    return replace(
        solution,
        lower_bound=None if bound is None else min(bound, solution.objective),
        status="optimal" if proven else "feasible" if answer.finished else "time_limit",
        seconds=time.perf_counter() - started,
    )


def any_feasible(problem: Problem) -> Choice:
    """Some allocation within all budgets, near the cheapest, in the problem's own units.

    With one budget it is the cheapest allocation. With several, where the cheapest one by shares breaks one of them,
    finding any is already a hard problem, and the integer program decides it. Absent units get their cheapest level.

    Raises:
        InfeasibleBudget: there is none.
        UsageError: the reverse form of a problem with interactions.
    """
    problem.check_budgets()
    plain = problem.plain()
    choice = plain.lowest(plain.shares)
    if not plain.feasible(choice):
        choice = plain.with_cheapest_absent(ilp(plain.variant(losses=plain.shares, interactions={})).choice)
    return problem.expand(choice)


def joint_shortage(problem: Problem, solve: Callable[[Problem], Solution]) -> InfeasibleBudget:
    """Why nothing fits although each limit alone is within reach: what the last one needs under the others.

    Args:
        problem: has no allocation within its limits.
        solve: an exact solver.
    """
    *names, last = problem.limits
    others = {resource: problem.budgets[resource] for resource in names}
    if last == LOSS and problem.minimize != LOSS:
        wanted, rest = problem.max_loss, problem.variant(minimize=LOSS, max_loss=math.inf)
    else:
        wanted = problem.budgets[last]
        rest = problem.variant(
            budgets=others, losses=problem.costs[last], interactions={}, minimize=LOSS, max_loss=math.inf
        )
    try:
        best = solve(rest)
    except InfeasibleBudget as smaller:
        return smaller
    reachable = best.loss
    assert reachable is not None and reachable > wanted, "the solver called a problem infeasible that is not"
    within = " and ".join(f"{budget:.6g} {resource}" for resource, budget in others.items())
    return InfeasibleBudget(
        last,
        wanted,
        reachable,
        f"the budgets are only jointly infeasible: within {within}, the least reachable "
        f"{last} is {reachable:.6g}, above the budget {wanted:.6g} (short by {reachable - wanted:.6g})",
    )


def _solve_to_precision(problem: Problem, program: Program, deadline: float | None, backend: Backend) -> _Answer:
    """Solve with a scale that suits the answer.

    The answer is not known beforehand. If it comes out far below what it was scaled for, one harmful level somewhere
    has set the scale; whatever alone exceeds the answer is then cut down to twice the answer, which still rules it out,
    and the rest is solved again.
    """
    losses, penalties = program.losses, program.penalties.weight
    most = np.zeros(program.problem.shape[0])
    np.maximum.at(most, program.unit, losses)
    expected = math.fsum([*most.tolist(), *penalties.tolist()])
    best: _Answer | None = None
    while True:
        unit = expected or 1.0  # divided by it first: where it is next to nothing, _SCALE / unit is inf
        scaled = losses / unit * _SCALE, penalties / unit * _SCALE
        answer = _solve(problem, program, *scaled, deadline, backend)
        if answer is None:
            break
        if best is None or answer.above <= best.above:
            best = replace(answer, bound=None if answer.bound is None else max(0.0, answer.bound / _SCALE * unit))
        found = answer.above
        if not answer.finished or found == 0 or found >= expected * _SMALL:  # else the tolerance is too near
            return replace(best, finished=answer.finished)
        losses, penalties = np.minimum(losses, 2 * found), np.minimum(penalties, 2 * found)
        expected = found
    if best is None:
        raise LayerwiseError(f"{backend} found no allocation in time", hint="raise the time limit")
    return replace(best, finished=False)


def _solve(
    problem: Problem,
    program: Program,
    losses: NDArray[np.float64],
    penalties: NDArray[np.float64],
    deadline: float | None,
    backend: Backend,
) -> _Answer | None:
    """Minimise scaled losses, (switches,), and penalties, (pairs,); None if the time was too short for any answer.

    The solver's tolerance may let a budget slip by a hair; such an answer is cut off and the rest solved again.
    """
    import pulp

    if program.impossible:
        raise joint_shortage(problem, ilp)
    model, switches = _model(program, losses, penalties)
    while True:
        model.solve(_backend(backend, None if deadline is None else max(0.0, deadline - time.perf_counter())))
        if model.status == pulp.LpStatusInfeasible:
            raise joint_shortage(problem, ilp)
        if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        choice = program.choice(np.array([x.varValue for x in switches]))
        if program.problem.feasible(choice):
            finished = model.sol_status == pulp.LpSolutionOptimal
            return _Answer(choice, program.above(choice), _bound(model, backend, finished), finished)
        chosen = [(switches[index], 1) for index in np.flatnonzero(program.chosen(choice)).tolist()]
        model += pulp.LpAffineExpression(chosen) <= len(chosen) - 1


def _model(program: Program, losses: NDArray[np.float64], penalties: NDArray[np.float64]) -> tuple[Any, list[Any]]:
    """The integer program, and its binary variables, (switches,)."""
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    places = list(zip(program.unit.tolist(), program.level.tolist(), strict=True))
    switches = [pulp.LpVariable(f"x_{unit}_{level}", cat=pulp.LpBinary) for unit, level in places]
    both = [pulp.LpVariable(f"z_{pair}", lowBound=0) for pair in range(len(penalties))]
    model += pulp.LpAffineExpression(
        list(zip([*switches, *both], [*losses.tolist(), *penalties.tolist()], strict=True))
    )
    rows: list[list[Any]] = [[] for _ in range(program.problem.shape[0])]
    for x, (unit, _) in zip(switches, places, strict=True):
        rows[unit].append((x, 1))
    for unit, switch in program.nested.tolist():
        rows[unit].append((switches[switch], 1))
    for row in rows:
        model += pulp.LpAffineExpression(row) == 1
    for shares in program.costs.values():
        model += pulp.LpAffineExpression(list(zip(switches, (shares * _SCALE).tolist(), strict=True))) <= _SCALE
    pairs = program.penalties
    for z, a, b, sign in zip(both, pairs.first.tolist(), pairs.second.tolist(), pairs.sign.tolist(), strict=True):
        terms = [(switches[a], 1), (switches[b], sign), (z, -1)]
        model += pulp.LpAffineExpression(terms) <= (1 + sign) / 2
    return model, switches


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
