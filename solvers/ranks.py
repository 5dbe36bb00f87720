"""Ranks and widths: from spectra and real-valued targets to whole numbers that hardware likes.

`water_filling` spreads a budget of parameters over low-rank factors, `energy_rank` is the usual rule for one matrix,
and `round_to_multiples` turns targets of any kind (ranks, widths, kept channels) into multiples of 8, 16, 64. Where a
spectrum bends, `pareto.knee(range(len(values)), values)` tells.

Left out: a matrix that is better stored whole, because its factors would be larger than itself. That is no question of
ranks alone; give the ranks and `dense` as levels of a `Problem`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import InfeasibleBudget, InvalidProblem, LayerwiseError, NotFinite, UsageError
from layerwise.solvers import _checks as check
from layerwise.solvers.problem import BUDGET_TOLERANCE, ROUNDING


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks by water-filling.

    Args:
        ranks: (matrices,) how many singular values each matrix keeps.
        error: the weighted sum of the squares of those that are dropped.
        cost: what the ranks cost.
        threshold: the water level. Squares above it, per cost, are kept, and those below are dropped, except for some
            that the room under the budget still holds. 0 if every square above 0 is kept.
        lower_bound: no ranks within the budget have a smaller error.
    """

    ranks: NDArray[np.int64]
    error: float
    cost: float
    threshold: float
    lower_bound: float


def water_filling(
    singular_values: Sequence[ArrayLike],
    budget: float,
    costs: ArrayLike = 1.0,
    weights: ArrayLike = 1.0,
    units: Sequence[str] | None = None,
) -> Ranks:
    """Ranks of several matrices with little summed squared error, within a budget of parameters.

    Keeping singular value s of a matrix wins weight * s^2 and costs the same for each of its values, so the wins per
    cost fall along a spectrum, and one threshold over all matrices is the optimum of the linear relaxation. It is found
    by taking the values of all matrices in that order while they fit, and after the first that does not, those of the
    cheaper matrices that still do. With equal costs that is optimal. With unequal ones the error is above the optimum
    by less than the win of the first value that did not fit; `lower_bound` says by how much at most.

    Args:
        singular_values: one (rank,) of each matrix, at least 0, in any order. Those of W S, where S S^T is the Hessian,
            make the error the layer's output error (SVD-LLM, arXiv:2403.07378).
        budget: upper limit on the summed cost.
        costs: of one rank, one number or (matrices,); m + n parameters for the two factors of an (m, n) matrix.
        weights: of each matrix's squared error, one number or (matrices,).
        units: names of the matrices for messages; `unit 0`, ... without.
    Returns:
        Values of 0 are never kept, whatever the budget.
    Raises:
        InfeasibleBudget: the budget is below 0.
        NotFinite: a number is NaN or infinite; names the matrix.
        UsageError: a negative number, a cost of 0, or the wrong shape.
    Source: reverse water-filling, Cover and Thomas, "Elements of Information Theory" (2nd edition), section 10.3.3,
        with costs.
    """
    names = check.names("unit", units, len(singular_values))
    spectra = [_spectrum(values, name) for values, name in zip(singular_values, names, strict=True)]
    costs, weights = _positive("costs", costs, names), _at_least_zero("weights", weights, names)
    limit = _limit(budget)
    if limit < 0:
        raise InfeasibleBudget("cost", budget, 0.0)
    matrix = np.repeat(np.arange(len(spectra)), [len(values) for values in spectra])
    gain = np.concatenate([np.empty(0), *(weight * s**2 for weight, s in zip(weights, spectra, strict=True))])
    cost = costs[matrix]
    order = np.argsort(-gain / cost, kind="stable")  # of equal wins, the first matrix
    order = order[gain[order] > 0]
    kept = np.zeros(len(gain), dtype=np.bool_)
    kept[order[_that_fit(cost[order], limit)]] = True
    error = math.fsum(gain[~kept])
    threshold, lower_bound = _relaxed(gain[order], cost[order], limit)
    return Ranks(
        ranks=np.bincount(matrix[kept], minlength=len(spectra)),
        error=error,
        cost=math.fsum(cost[kept]),
        threshold=threshold,
        lower_bound=min(lower_bound, error),  # above it by no more than rounding
    )


def energy_rank(singular_values: ArrayLike, share: float) -> int:
    """The smallest rank that keeps a share of the summed squares.

    Args:
        singular_values: (rank,), at least 0, in any order.
        share: from 0 to 1. 1 keeps every value above 0, however small.
    Raises:
        NotFinite: a singular value is NaN or infinite.
        UsageError: a negative singular value, the wrong shape, or a share that is none.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"a share is between 0 and 1, found {share}")
    energy = _spectrum(singular_values, "the matrix") ** 2
    dropped = np.append(np.cumsum(energy[::-1])[::-1], 0.0)  # by rank; small ones first, so that none is swallowed
    allowed = dropped[0] - share * dropped[0]  # 0 for a share of 1, so then the widening is none
    return int(np.argmax(dropped <= allowed * (1 + ROUNDING)))


def round_to_multiples(
    values: ArrayLike,
    multiple: ArrayLike,
    *,
    budget: float | None = None,
    costs: ArrayLike = 1.0,
    minimum: ArrayLike = 0.0,
    maximum: ArrayLike = math.inf,
    units: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """Round real-valued targets to multiples within a budget, by largest remainders.

    Targets are first brought within the bounds and, if they then cost more than the budget, shrunk by one common
    factor. Each is rounded down, and steps up are made in the order of their remainders (how much of the step the
    target fills), as long as they fit: those of one half and more in the budget, smaller ones, which lead away from
    the target, only while the whole costs no more than the targets did.

    Every value ends at one of the two multiples around its target. Of all roundings with the same summed cost, the one
    found has the least summed deviation, each unit's counted in cost, if every step costs the same (Hamilton's method)
    or none was skipped; else it is above the least by less than twice the dearest step.

    Args:
        values: (units,) targets, at least 0.
        multiple: one whole number or (units,).
        budget: upper limit on the summed cost; without, what the targets cost within their bounds. With `inf`, every
            half and more goes up.
        costs: of one (not of one multiple), one number or (units,), above 0.
        minimum: one number or (units,); the least multiple that is not below.
        maximum: one number or (units,); the greatest multiple that is not above.
        units: names for messages; `unit 0`, ... without.
    Returns:
        (units,) multiples within bounds and budget.
    Raises:
        InfeasibleBudget: the least multiples cost more than the budget; names the dearest units.
        InvalidProblem: no multiple of a unit is within its bounds; names the unit.
        NotFinite: a number is NaN, or infinite where it may not be; names the unit.
        UsageError: a negative number, a cost of 0, a multiple that is not whole, or the wrong shape.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise UsageError(f"values are an array (units,), found shape {values.shape}")
    names = check.names("unit", units, len(values))
    values, costs = _at_least_zero("values", values, names), _positive("costs", costs, names)
    multiples = _positive("multiples", multiple, names)
    _refuse(multiples % 1 != 0, "multiples must be whole", multiples, names)
    least, greatest = _bounds(minimum, maximum, multiples, names)
    targets = np.clip(values, least, greatest)
    asked = _limit(math.fsum(costs * targets))
    limit = asked if budget is None else _limit(budget)
    _check_reachable(budget, limit, costs * least, names)
    targets = _shrunk(targets, least, costs, limit)
    rounded = np.floor(targets / multiples) * multiples
    remainder, step = (targets - rounded) / multiples, costs * multiples
    spent = math.fsum(costs * rounded)
    for unit in np.argsort(-remainder, kind="stable").tolist():
        room = limit if remainder[unit] >= 0.5 else min(limit, asked)
        if remainder[unit] > 0 and spent + step[unit] <= room:
            rounded[unit] += multiples[unit]
            spent += step[unit]
    return rounded.astype(np.int64)


def _relaxed(gains: NDArray[np.float64], costs: NDArray[np.float64], limit: float) -> tuple[float, float]:
    """The linear relaxation of a queue: the gain per cost at which the limit is reached, and what is not gained."""
    spent = np.cumsum(costs)
    first = int(np.searchsorted(spent, limit, side="right"))  # the first that does not fit
    if first == len(gains):
        return 0.0, 0.0
    threshold = float(gains[first] / costs[first])
    room = limit - (float(spent[first - 1]) if first else 0.0)
    return threshold, max(0.0, math.fsum(gains[first:]) - threshold * room)


def _that_fit(costs: NDArray[np.float64], limit: float) -> NDArray[np.intp]:
    """What is taken of a queue when everything that still fits is, one after the other."""
    taken: list[NDArray[np.intp]] = []
    queue = np.arange(len(costs))
    while len(queue):
        spent = np.cumsum(costs[queue])
        count = int(np.searchsorted(spent, limit, side="right"))
        taken.append(queue[:count])
        limit -= float(spent[count - 1]) if count else 0.0
        queue = queue[count:][costs[queue[count:]] <= limit]
    return np.concatenate([np.empty(0, dtype=np.intp), *taken])


def _shrunk(
    targets: NDArray[np.float64], least: NDArray[np.float64], costs: NDArray[np.float64], limit: float
) -> NDArray[np.float64]:
    """The targets times the greatest factor up to 1 that meets the limit; none goes below its least."""

    def scaled(factor: float) -> NDArray[np.float64]:
        return np.maximum(least, factor * targets)

    if math.fsum(costs * targets) <= limit:
        return targets
    low, high = 0.0, 1.0
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(costs * scaled(middle)) <= limit else (low, middle)
    return scaled(low)


def _bounds(
    minimum: ArrayLike, maximum: ArrayLike, multiples: NDArray[np.float64], names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the greatest multiple of each unit."""
    lowest, highest = _at_least_zero("minimum", minimum, names), _per_unit("maximum", maximum, names)
    least, greatest = np.ceil(lowest / multiples) * multiples, np.floor(highest / multiples) * multiples
    for unit in np.flatnonzero(least > greatest).tolist():
        bounds = f"between {lowest[unit]:g} and {highest[unit]:g}"
        raise InvalidProblem(f"{names[unit]} has no multiple of {multiples[unit]:g} {bounds}")
    return least, greatest


def _check_reachable(budget: float | None, limit: float, least: NDArray[np.float64], names: Sequence[str]) -> None:
    """Raise if the least multiples cost more than the limit; without a budget they never do."""
    reachable = math.fsum(least)
    if budget is not None and reachable > limit:
        error = InfeasibleBudget("cost", budget, reachable)
        dearest = ", ".join(f"{names[unit]} {least[unit]:.6g}" for unit in np.argsort(-least)[:3].tolist())
        raise InfeasibleBudget("cost", budget, reachable, f"{error.message}; the dearest minima: {dearest}")


def _limit(budget: float) -> float:
    """What may be spent: the budget, widened as those of a `Problem` are."""
    if math.isnan(budget):
        raise UsageError("the budget is NaN")
    return budget + abs(budget) * BUDGET_TOLERANCE


def _spectrum(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Singular values of one matrix, largest first."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UsageError(f"the singular values of {name} are an array (rank,), found shape {array.shape}")
    return np.sort(_at_least_zero(f"the singular values of {name}", array, range(len(array))))[::-1]


def _per_unit(what: str, given: ArrayLike, names: Sequence[object]) -> NDArray[np.float64]:
    array = np.asarray(given, dtype=np.float64)
    if array.shape not in ((), (len(names),)):
        raise UsageError(f"{what} must be one number or one for each of {len(names)}, found shape {array.shape}")
    array = np.broadcast_to(array, len(names))
    _refuse(np.isnan(array), f"{what} must be numbers", array, names, NotFinite)
    return array


def _at_least_zero(what: str, given: ArrayLike, names: Sequence[object]) -> NDArray[np.float64]:
    array = _per_unit(what, given, names)
    _refuse(np.isinf(array), f"{what} must be finite", array, names, NotFinite)
    _refuse(array < 0, f"{what} must be at least 0", array, names)
    return array


def _positive(what: str, given: ArrayLike, names: Sequence[object]) -> NDArray[np.float64]:
    array = _at_least_zero(what, given, names)
    _refuse(array == 0, f"{what} must be above 0", array, names)
    return array


def _refuse(
    wrong: NDArray[np.bool_],
    what: str,
    found: NDArray[np.float64],
    names: Sequence[object],
    error: type[LayerwiseError] = UsageError,
) -> None:
    if wrong.any():
        index = int(np.argmax(wrong))
        raise error(f"{what}, found {found[index]:g} at {names[index]}")
