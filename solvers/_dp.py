"""Exact allocation under one budget, by dynamic programming over non-dominated partial allocations.

Units are added one at a time. A state is a partial allocation's (cost, loss); one that costs no less and loses no less
than another is dropped. Costs may be any real numbers. When they are whole multiples of something (bits of equal
layers, say) there are never more states than multiples that fit in the budget, so the textbook table over costs would
be no smaller. What is left at the end is the whole trade-off up to the budget, of which the last state is the answer.

A block with units inside is decided level by level: the states go on with the block's units where these are present and
without them where not, and meet again behind the block; so does a block inside a block.

Left out: several budgets (states would be dominated too rarely; use `branch`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import UsageError
from layerwise.solvers.problem import ROUNDING, Choice, Problem, Solution, require_separable

_AT_A_TIME = 1024
"""How many allocations are traced back together."""


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
        UsageError: several budgets, no losses, or units that interact.
    """
    started = time.perf_counter()
    require_separable("dp", problem)
    if len(problem.limits) > 1:
        raise UsageError(f"dp takes one budget, found {', '.join(problem.limits)}", hint="use branch for several")
    if max_states < 1:
        raise UsageError(f"max_states must be at least 1, found {max_states}")
    problem.check_budgets()
    plain = problem.plain()
    choice = relaxed = _freely(plain)
    status = "optimal"
    if not plain.feasible(choice):
        costs, room = _room(plain)
        ends = non_dominated_ends(plain, costs, room, max_states)
        if ends is not None:
            choice = relaxed = ends.choice(-1)
        else:
            step, status = room / max_states, "feasible"
            choice = on_grid(plain, costs, room, step, np.ceil).choice(-1)
            relaxed = on_grid(plain, costs, room, step, np.floor).choice(-1)
    bound = problem.solution(problem.expand(relaxed)).objective
    return problem.solution(
        problem.expand(choice), status=status, lower_bound=bound, seconds=time.perf_counter() - started
    )


def _freely(problem: Problem) -> Choice:
    """The allocation of the least loss, whatever it costs; of equal losses the cheapest."""
    assert problem.losses is not None
    return problem.lowest(problem.losses, then=problem.shares)


def _room(problem: Problem) -> tuple[NDArray[np.float64], float]:
    """Costs above the cheapest, and how much of the only budget the cheapest allocation leaves."""
    ((resource, limit),) = problem.limits.items()
    above, least = problem.above_least(problem.costs[resource])
    return above, max(0.0, math.fsum([limit, *(-least).tolist()])) + abs(limit) * ROUNDING


class Ends(NamedTuple):
    """The non-dominated allocations of a plain problem, by rising cost and falling loss.

    Args:
        cost, loss: (states,); the cost above the cheapest allocation.
        node: (states,), the last decision of each.
        decisions: all decisions that led to one of them.
        resting: (units,), the level of units that are absent.
    """

    cost: NDArray[np.float64]
    loss: NDArray[np.float64]
    node: NDArray[np.int64]
    decisions: _Decisions
    resting: Choice

    def choice(self, index: int) -> Choice:
        """The allocation of a state."""
        choice: Choice = self.decisions.traced(self.node[[index]], self.resting)[0]
        return choice

    def choices(self) -> Iterator[Choice]:
        """The allocations of all states in turn."""
        for start in range(0, len(self.node), _AT_A_TIME):
            yield from self.decisions.traced(self.node[start : start + _AT_A_TIME], self.resting)


class _Decisions:
    """Which state came from which by giving a unit which level; states are numbered through."""

    def __init__(self) -> None:
        self._units: list[int] = []
        self._levels: list[NDArray[np.int64]] = []
        self._before: list[NDArray[np.int64]] = []
        self._starts = [0]

    def add(self, unit: int, levels: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the new states."""
        self._units.append(unit)
        self._levels.append(levels)
        self._before.append(before)
        start = self._starts[-1]
        self._starts.append(start + len(levels))
        return np.arange(start, start + len(levels))

    def traced(self, nodes: NDArray[np.int64], resting: Choice) -> NDArray[np.int64]:
        """(states, units): the decisions that led to some states, and the resting level where there was none."""
        choices, nodes = np.tile(resting, (len(nodes), 1)), nodes.copy()
        for block in reversed(range(len(self._units))):
            here = np.flatnonzero(nodes >= self._starts[block])
            place = nodes[here] - self._starts[block]
            choices[here, self._units[block]] = self._levels[block][place]
            nodes[here] = self._before[block][place]
        return choices


def falling(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,): lower than all that stand before it."""
    return np.asarray(losses < np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]]))


class _States(NamedTuple):
    cost: NDArray[np.float64]
    loss: NDArray[np.float64]
    node: NDArray[np.int64]

    def undominated(self, room: float) -> _States:
        order = np.lexsort((self.loss, self.cost))  # stable: of equal states, the first
        order = order[self.cost[order] <= room]
        kept = order[falling(self.loss[order])]
        return _States(self.cost[kept], self.loss[kept], self.node[kept])


def non_dominated_ends(problem: Problem, costs: NDArray[np.float64], room: float, max_states: int) -> Ends | None:
    """Every non-dominated allocation within the room, or None if more than `max_states` states would have to be kept.

    Args:
        problem: plain and without interactions.
        costs: as `Problem.above_least` counts them, so that every partial allocation within the room can be completed.
        room: the most that these may add up to.
        max_states: at any time.
    """
    growth = _Growth(problem, costs, room, max_states)
    states = _States(np.zeros(1), np.zeros(1), np.array([-1]))
    try:
        for unit in problem.outer.tolist():
            states = growth.by_tree(states, unit)
    except _TooManyStates:
        return None
    return Ends(states.cost, states.loss, states.node, growth.decisions, problem.resting)


class _TooManyStates(Exception):
    pass


class _Growth:
    """States that grow by one unit after the other; the arguments are those of `non_dominated_ends`."""

    def __init__(self, problem: Problem, costs: NDArray[np.float64], room: float, max_states: int) -> None:
        assert problem.losses is not None
        self._problem, self._costs, self._losses = problem, costs, problem.losses
        self._room, self._max_states = room, max_states
        self.decisions = _Decisions()

    def by_tree(self, states: _States, unit: int) -> _States:
        """The states with a unit and all that is nested in it decided."""
        ways = []
        for levels, inside in self._ways(unit):
            way = self._by_unit(states, unit, levels)
            for child in inside:
                way = self.by_tree(way, child)
            ways.append(way)
        if len(ways) == 1:
            return ways[0]
        return self._within(_States(*map(np.concatenate, zip(*ways, strict=True))).undominated(self._room))

    def _ways(self, unit: int) -> list[tuple[list[int], tuple[int, ...]]]:
        """The levels of a unit, those together that leave the same nested units present, with these units."""
        forest, ways = self._problem.forest, dict[tuple[int, ...], list[int]]()
        children = forest.children.get(unit, [])
        for level in np.flatnonzero(self._problem.available[unit]).tolist():
            ways.setdefault(tuple(child for child in children if forest.kept[child, level]), []).append(level)
        return [(levels, inside) for inside, levels in ways.items()]

    def _by_unit(self, states: _States, unit: int, levels: Sequence[int]) -> _States:
        allowed = [level for level in levels if self._costs[unit, level] <= self._room]
        cost = (self._costs[unit, allowed][:, None] + states.cost).ravel()
        loss = (self._losses[unit, allowed][:, None] + states.loss).ravel()
        grown = _States(cost, loss, np.arange(len(cost))).undominated(self._room)
        before, level = grown.node % len(states.node), np.array(allowed, dtype=np.int64)[grown.node // len(states.node)]
        return self._within(_States(grown.cost, grown.loss, self.decisions.add(unit, level, states.node[before])))

    def _within(self, states: _States) -> _States:
        if len(states.node) > self._max_states:
            raise _TooManyStates
        return states


def on_grid(
    problem: Problem,
    costs: NDArray[np.float64],
    room: float,
    step: float,
    rounding: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> Ends:
    """The same with costs rounded to whole steps, of which there are then never more states than fit in the room."""
    steps = math.ceil(room / step)
    ends = non_dominated_ends(problem, rounding(costs / step), float(steps), steps + 1)
    assert ends is not None
    return ends
