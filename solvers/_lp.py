"""The linear relaxation and an allocation near it.

The program of `_program.py` is solved with x anywhere from 0 to 1, by scipy's HiGHS. Its optimum is a lower bound, and
at a vertex only about as many units as there are limits are split between levels, so rounding costs little. What
rounding breaks is repaired and what it leaves over is spent, by single moves, with the program's multipliers as prices
of the resources.

The bound that is reported is not the solver's, which holds up to its tolerance only, but the Lagrangian at its
multipliers, summed up here: by weak duality that is a bound at whatever multipliers.

Left out: pivots between split units, cuts and branching; `ilp` and `branch` go on from here.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import LayerwiseError
from layerwise.solvers._ilp import any_feasible
from layerwise.solvers._program import Program, linear_program
from layerwise.solvers._settle import Prices, filled, settled, spendable
from layerwise.solvers.problem import Problem, Solution, certified, require_losses

_SCALE = 1e6
"""What the greatest loss above the least becomes: the solver's tolerance of 1e-7 is then far below it."""

_EPSILON = float(np.finfo(np.float64).eps)


class _Relaxed(NamedTuple):
    """Optimum of the relaxation.

    Args:
        values: (switches,) x.
        prices: by limited resource, its multiplier: objective per unit of cost, at least 0.
        pair_prices: (pairs,) multipliers of the interactions' rows, from 0 to the penalty.
    """

    values: NDArray[np.float64]
    prices: Prices
    pair_prices: NDArray[np.float64]


def lp(problem: Problem) -> Solution:
    """Solve the linear relaxation and round it to an allocation within all limits.

    The lower bound is below the optimum by weak duality and by more than its own rounding. Levels that break a limit
    on their own are left out beforehand, which can lift it above the textbook relaxation. The status is "optimal" where
    the allocation meets the bound to 1e-9, else "feasible".

    Args:
        problem: any number of budgets, nested units, interactions; needs losses. Not the reverse form with
            interactions.
    Raises:
        InfeasibleBudget: a budget is out of reach, alone or together with the others.
        UsageError: a problem without losses.
    """
    started = time.perf_counter()
    require_losses("lp", problem)
    problem.check_budgets()
    plain = problem.plain()
    program = linear_program(plain)
    relaxed = _relaxation(program)
    if relaxed is None:  # there is no allocation either, or so it seems within the solver's tolerance
        return certified(problem, filled(plain, any_feasible(plain)), -math.inf, started)
    choice = settled(plain, program.choice(relaxed.values), relaxed.prices)
    if choice is None:
        choice = filled(plain, any_feasible(plain))
    return certified(problem, choice, _safe_bound(program, relaxed), started)


def _relaxation(program: Program) -> _Relaxed | None:
    """None if there is no x within the limits."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, csr_array, eye_array, hstack, vstack

    n_switches, n_pairs, n_units = len(program.unit), len(program.penalties.weight), program.problem.shape[0]
    if program.impossible:
        return None
    units = np.concatenate([program.unit, program.nested[:, 0]])
    switches = np.concatenate([np.arange(n_switches), program.nested[:, 1]])
    equations = coo_array((np.ones(len(units)), (units, switches)), shape=(n_units, n_switches + n_pairs))
    pairs, penalties = np.arange(n_pairs), program.penalties
    both = coo_array(
        (
            np.concatenate([np.ones(n_pairs), penalties.sign]),
            (np.concatenate([pairs, pairs]), np.concatenate([penalties.first, penalties.second])),
        ),
        shape=(n_pairs, n_switches),
    )
    resources = csr_array(np.array([*program.costs.values()]).reshape(-1, n_switches))
    rows = vstack(
        [hstack([resources, csr_array((len(program.costs), n_pairs))]), hstack([both, -eye_array(n_pairs)])],
        format="csr",
    )
    objective = np.concatenate([program.losses, penalties.weight])
    scale = _SCALE / (objective.max() or 1.0)
    answer = linprog(
        objective * scale,
        A_ub=rows if rows.shape[0] else None,
        b_ub=np.concatenate([np.ones(len(program.costs)), (1 + penalties.sign) / 2]) if rows.shape[0] else None,
        A_eq=equations.tocsr(),
        b_eq=np.ones(n_units),
        bounds=(0, None),
        method="highs-ipm",  # 20,000 x 16: 9 s, where the dual simplex takes minutes
    )
    if answer.status == 2:
        return None
    if answer.x is None:
        raise LayerwiseError(f"HiGHS did not solve the linear program: {answer.message}")
    multipliers = np.maximum(0.0, -answer.ineqlin.marginals) / scale
    shares = zip(program.costs, multipliers[: len(program.costs)].tolist(), strict=True)
    return _Relaxed(
        answer.x[:n_switches],
        {resource: multiplier / (program.rooms[resource] or 1.0) for resource, multiplier in shares},
        np.minimum(multipliers[len(program.costs) :], penalties.weight),
    )


def _safe_bound(program: Program, relaxed: _Relaxed) -> float:
    """The Lagrangian at the relaxation's multipliers, lowered by what rounding may have added.

    With prices p >= 0 of the limits and 0 <= q <= penalty of the interactions' rows, no allocation within the limits
    has an objective below

        min_x  sum_ul (loss + p cost)_ul x_ul + sum_ab q_ab (x_a + x_b - 1 or x_a - x_b)  -  p limit.
    """
    problem, penalties, q = program.problem, program.penalties, relaxed.pair_prices
    assert problem.losses is not None
    places = (program.unit, program.level)
    losses = problem.losses[places]
    np.add.at(losses, penalties.first, np.where(penalties.sign < 0, -penalties.weight, 0.0))
    terms = [price * problem.costs[resource][places] for resource, price in relaxed.prices.items()]
    for switch, share in ((penalties.first, q), (penalties.second, penalties.sign * q)):
        terms.append(np.zeros(len(losses)))
        np.add.at(terms[-1], switch, share)
    total, size = np.full(problem.shape, np.inf), np.zeros(problem.shape)
    total[places], size[places] = sum(terms, losses), sum(map(abs, terms), abs(losses))
    limits = [price * spendable(problem.limits[resource]) for resource, price in relaxed.prices.items()]
    offsets = [*limits, *q[penalties.sign > 0].tolist()]
    summed = [*size[np.arange(len(size)), problem.lowest(total)].tolist(), *map(abs, offsets)]
    rounding = (7 + len(terms) + len(q) + problem.forest.most_terms) * _EPSILON * math.fsum(summed)
    return math.fsum([problem.least(total), *(-offset for offset in offsets), -rounding])
