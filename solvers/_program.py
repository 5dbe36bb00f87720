"""The allocation problem as a linear program in zeros and ones: what `ilp` solves and `lp` relaxes.

With x_ul = 1 where unit u is present at level l, and a, b the places (unit, level) of an interaction,

    minimise   sum_ul loss_ul x_ul + sum_ab penalty_ab z_ab
    such that  sum_l x_ul = 1                        for every unit u that is not nested,
               sum_l x_ul + sum_vm x_vm = 1          for every unit u that is nested, over all levels m of units v that
                                                     remove it or something that it is nested in (of these x_vm, one
                                                     at most is 1, for a unit that is absent has no x of 1 itself),
               sum_ul cost_ul x_ul <= limit          for every limited resource,
               x_a + x_b - 1 <= z_ab or x_a - x_b <= z_ab,   z >= 0.

An interaction above 0 is a penalty where both places are chosen. One below 0 is a loss of its first place, which a
penalty of the same size takes back where the second is not chosen; so nothing but the table can be negative.

Linear solvers work with absolute tolerances, so both sides are told above the least that they can be: thanks to the
equations, a unit's least entry may be taken off all its entries (a nested unit's is then part of the levels that leave
it present). What remains is never negative, of losses and costs alike, and a level that alone exceeds the room above
the least cost can be left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerwise.solvers.problem import ROUNDING, Choice, Problem

_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Penalties:
    """Interactions: `weight` is paid where `first` is chosen and `second` is (`sign` 1) or is not (`sign` -1).

    All (pairs,); `first` and `second` are indices of switches.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    sign: NDArray[np.float64]
    weight: NDArray[np.float64]

    def paid(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(pairs,) from the chosen switches, (switches,)."""
        return np.asarray(chosen[self.first] & (chosen[self.second] == (self.sign > 0)))


@dataclass(frozen=True)
class Program:
    """The linear program of a plain problem. A switch is one x_ul.

    Args:
        problem: the plain problem.
        unit: (switches,) unit of each switch.
        level: (switches,) its level.
        losses: (switches,) what it adds to the objective, above the least; never negative.
        least: the objective where nothing is added.
        costs: by limited resource, (switches,), above the least and as shares of the room, so that the limit is 1.
        rooms: by limited resource, what the limit leaves above the least.
        nested: (pairs, 2), a nested unit and a switch that makes it absent, for all of these; units that nothing can
            make absent are not among them.
        penalties: the interactions.
    """

    problem: Problem
    unit: NDArray[np.int64]
    level: NDArray[np.int64]
    losses: NDArray[np.float64]
    least: float
    costs: dict[str, NDArray[np.float64]]
    rooms: dict[str, float]
    nested: NDArray[np.int64]
    penalties: Penalties

    @property
    def impossible(self) -> bool:
        """True if some unit has no level that fits within the limits and cannot be absent either."""
        ways = np.bincount(self.unit, minlength=self.problem.shape[0])
        ways[self.nested[:, 0]] += 1
        return not ways.all()

    def choice(self, values: NDArray[np.float64]) -> Choice:
        """The allocation in which every unit has its greatest x, (switches,); absent ones are at their cheapest."""
        table = np.full(self.problem.shape, -np.inf)
        table[self.unit, self.level] = values
        choice: Choice = table.argmax(axis=1)
        return self.problem.with_cheapest_absent(choice)

    def chosen(self, choice: Choice) -> NDArray[np.bool_]:
        """(switches,): x of an allocation."""
        return np.asarray(self.problem.present(choice)[self.unit] & (choice[self.unit] == self.level))

    def above(self, choice: Choice) -> float:
        """The objective of an allocation, above the least."""
        chosen = self.chosen(choice)
        paid = self.penalties.weight[self.penalties.paid(chosen)]
        return math.fsum([*self.losses[chosen].tolist(), *paid.tolist()])


def linear_program(problem: Problem) -> Program:
    """The linear program of a plain problem with losses."""
    assert problem.losses is not None
    usable = problem.available
    costs, rooms = {}, {}
    for resource, limit in problem.limits.items():
        costs[resource], rooms[resource] = _above_within(problem, problem.costs[resource], limit)
        usable = usable & (costs[resource] <= rooms[resource])
    unit, level = np.nonzero(usable)
    switch = np.full(problem.shape, -1)
    switch[usable] = np.arange(len(unit))
    losses, penalties = _with_penalties(problem, switch)
    above, least = problem.above_least(losses)
    return Program(
        problem,
        unit,
        level,
        above[usable],
        math.fsum(least.tolist()),
        {resource: table[usable] / (rooms[resource] or 1.0) for resource, table in costs.items()},
        rooms,
        _removing(problem, switch),
        penalties,
    )


def _removing(problem: Problem, switch: NDArray[np.int64]) -> NDArray[np.int64]:
    """(pairs, 2): each nested unit with each switch by which it is absent. `switch`: (units, levels), -1 for none."""
    forest, pairs = problem.forest, list[tuple[int, int]]()
    for unit in np.flatnonzero(forest.parent >= 0).tolist():
        below = unit
        for above in forest.ancestors(unit):
            removing = switch[above, ~forest.kept[below]]
            pairs += [(unit, x) for x in removing[removing >= 0].tolist()]
            below = above
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _above_within(problem: Problem, costs: NDArray[np.float64], limit: float) -> tuple[NDArray[np.float64], float]:
    """Costs above their least sum, and the room that a limit leaves for them, with what rounding may have hidden."""
    above, least = problem.above_least(costs)
    rounding = abs(limit) * ROUNDING + math.fsum(abs(least)) * _EPSILON
    return above, max(0.0, math.fsum([limit, rounding, *(-least).tolist()]))


def _with_penalties(problem: Problem, switch: NDArray[np.int64]) -> tuple[NDArray[np.float64], Penalties]:
    """The losses with all interactions below 0, and the penalties. `switch`: (units, levels), -1 for none."""
    assert problem.losses is not None
    losses = problem.losses.copy()
    kept = [(a, b, w) for (a, b), w in problem.interactions.items() if w and switch[a] >= 0 and switch[b] >= 0]
    for a, _, w in kept:
        losses[a] += min(w, 0.0)
    weights = np.array([w for *_, w in kept], dtype=np.float64)
    first = np.array([switch[a] for a, *_ in kept], dtype=np.int64)
    second = np.array([switch[b] for _, b, _ in kept], dtype=np.int64)
    return losses, Penalties(first, second, np.sign(weights), abs(weights))
