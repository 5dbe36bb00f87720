"""Exact allocation by prices, reduction and a search of what is left: the solver to use first.

1. *Bound.* The best prices of the limited resources (`_lagrange.py`) give a lower bound L and an allocation that is
   nearly optimal. Written with extra penalties r >= 0, what a level costs at these prices above the unit's best level,
   the loss of any allocation x is

       loss(x) = L + sum_u r[u, x_u] + sum_k p_k slack_k(x).

2. *Reduction.* No better allocation contains a level whose penalty alone reaches the gap of the best one known. Of
   20,000 units with 16 levels some thousands keep a choice, and some hundreds get their turn.
3. *Search.* The remaining units are decided one by one, breadth first, in the order of the least penalty for which
   they move cost. A state is what its decisions add to the costs and to the penalty. It is dropped when another state
   costs no more and loses no more, or when a bound on every way to complete it reaches the best known gap: what it
   lacks or leaves of a limit must be made up at the best rate of penalty per cost among the units to come, or be paid
   at its price. Every state within the limits is an allocation, so the gap shrinks on the way. Later units move cost at
   ever higher rates, so fewer and fewer states are worth going on with.

That is the core idea of Pisinger ("A minimal algorithm for the multiple-choice knapsack problem", 1995), with several
resources, and with blocks of nested units, whose allocations within the gap are decided as one unit. The gap of such
problems shrinks about as log²(n)/n² relative to the loss, so larger problems are not harder.

Left out: interactions between units, for which no such bound exists; they go to `ilp`.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import UsageError
from layerwise.solvers._dp import falling
from layerwise.solvers._ilp import ilp
from layerwise.solvers._lagrange import Lagrangian, nearest
from layerwise.solvers.problem import Choice, Problem, Solution, certified, require_losses, scale_of

_COARSE = 1e3
"""A level that loses this many times the whole answer blunts the arithmetic: it is barred, and the rest resolved.

A guess.
"""

_PATIENCE = 50
"""How many units in a row may bring nothing better once states were left out for want of room. A guess."""

_EQUAL = 4 * np.finfo(np.float64).eps

_NEAR = 16
"""How many neighbours a state is compared with when there are several resources. A guess."""


def branch(problem: Problem, time_limit: float | None = None, gap: float = 1e-10, max_states: int = 50_000) -> Solution:
    """Solve the problem to proven optimality, or as near to it as time and memory allow.

    Args:
        problem: any number of budgets, nested units, the reverse form; needs losses. With interactions, `ilp` is used.
        time_limit: seconds, None for no limit. The best allocation found by then has the status "time_limit".
        gap: relative; nothing is looked for that would be better by less. 0 asks for the very last digit.
        max_states: the most partial allocations to keep at a time; the default is a guess. Where more would be needed,
            those with the lowest bounds are kept, and the search ends once that has brought nothing for a while; the
            status is then "feasible" and the lower bound takes account of the others.
    Returns:
        The allocation with a lower bound; status "optimal" if the gap is at most 1e-9.
    Raises:
        InfeasibleBudget: a limit is out of reach, alone or together with the others.
        UsageError: a problem without losses.
    """
    started = time.perf_counter()
    require_losses("branch", problem)
    if max_states < 1 or not gap >= 0:
        raise UsageError(f"max_states must be at least 1 and gap at least 0, found {max_states} and {gap}")
    if problem.interactions:
        return ilp(problem, time_limit)
    problem.check_budgets()
    deadline = math.inf if time_limit is None else started + time_limit
    plain = problem.plain()
    assert plain.losses is not None
    losses, least = plain.above_least(plain.losses)
    found = _solved(plain.variant(losses=losses), math.fsum(least.tolist()), gap, deadline, max_states)
    bound = math.fsum([*least.tolist(), found.bound])
    return certified(problem, found.choice, bound, started, "time_limit" if found.late else "feasible")


def _without_levels_above(problem: Problem, loss: float) -> Problem | None:
    """The problem without levels that alone lose more than a known answer; None if they do no harm.

    All losses count from each unit's least. Sums with a level that loses 1e9 know nothing of losses around 1e-9.
    """
    assert problem.losses is not None
    worst = problem.losses[np.isfinite(problem.losses)].max()
    if worst <= _COARSE * loss:
        return None
    kept = problem.losses <= loss
    return problem.variant(
        losses=np.where(kept, problem.losses, np.inf),
        costs={resource: np.where(kept, table, np.inf) for resource, table in problem.costs.items()},
    )


class _Found(NamedTuple):
    choice: Choice
    loss: float
    bound: float
    late: bool


def _solved(problem: Problem, offset: float, gap: float, deadline: float, max_states: int) -> _Found:
    """The best allocation; `offset` is what the losses were counted above, for `gap` is relative to the whole."""
    choice, loss = None, math.inf
    while True:
        relaxed = Lagrangian(problem)
        prices = relaxed.best_prices()
        bound = relaxed.bound(prices)
        choice, loss = _better(problem, choice, loss, nearest(relaxed, prices))
        without = _without_levels_above(problem, loss)
        if without is None:
            tolerance = gap * abs(offset + loss)
            search = _Search(relaxed, prices, choice, loss - bound, tolerance, max_states)
            choice, loss = _better(problem, choice, loss, search.run(deadline))
            without = _without_levels_above(problem, loss)
        if without is None:
            return _Found(choice, loss, min(loss, bound + min(search.gap, search.floor)), search.late)
        problem = without


def _better(problem: Problem, known: Choice | None, loss: float, other: Choice | None) -> tuple[Choice, float]:
    """The better one of an allocation and another, which may be None or break a limit by rounding; with its loss."""
    if other is not None and problem.feasible(other):
        other_loss = problem.loss(other)
        assert other_loss is not None
        if known is None or other_loss < loss:
            return other, other_loss
    assert known is not None
    return known, loss


class _Options(NamedTuple):
    """Other ways than the base to decide one unit.

    Args:
        added: (options, resources), what they add to the costs.
        penalty: (options,).
        members: (units concerned,); the unit itself, or a block with all units inside it.
        levels: (options, units concerned).
    """

    added: NDArray[np.float64]
    penalty: NDArray[np.float64]
    members: NDArray[np.int64]
    levels: NDArray[np.int64]


class _Step(NamedTuple):
    """How the states after one unit came about."""

    options: _Options
    before: NDArray[np.int64]  # (states,), the state it came from
    option: NDArray[np.int64]  # (states,), -1 for the base


class _Rates(NamedTuple):
    """Of the units from one place of the order to the end, the least that anything costs.

    Args:
        penalty: of any option.
        relief: (resources,), penalty per cost saved.
        fill: penalty per priced cost added.
    """

    penalty: float
    relief: NDArray[np.float64]
    fill: float


class _Search:
    """The search of the units that keep a choice.

    Attributes:
        gap: of the best allocation known, above the bound at these prices.
        tolerance: an allocation that is better by less is not looked for.
        floor: no allocation that was left out is nearer to the bound than this; `inf` if none was.
        late: the deadline passed.
    """

    def __init__(
        self,
        relaxed: Lagrangian,
        prices: NDArray[np.float64],
        known: Choice,
        gap: float,
        tolerance: float,
        max_states: int,
    ) -> None:
        self.relaxed, self.prices, self.max_states = relaxed, prices, max_states
        self.gap, self.tolerance, self.floor = gap, tolerance, math.inf
        self.late = self._thinned = False
        self.penalties = relaxed.penalties(prices)
        self.subtotals = relaxed.problem.forest.subtotals(self.penalties)
        self.forest = relaxed.problem.forest
        self.base = self._base(known)
        self.room = relaxed.limits - relaxed.spent(self.base)
        self.weights = 1.0 / scale_of(relaxed.limits)
        rows = np.arange(len(self.base))
        self.extra = self.penalties - self.penalties[rows, self.base][:, None]
        self.extra[rows, self.base] = np.inf  # no other way than the base
        self.added = relaxed.costs - relaxed.costs[:, rows, self.base][:, :, None]
        self.carried = self.forest.carried(self.base, relaxed.costs[:, rows, self.base].T)  # (units, resources)
        self.blocks: dict[int, _Options] = {}

    def _base(self, known: Choice) -> Choice:
        """Every unit's best level at these prices; of equally good ones that of the known allocation."""
        best = self.relaxed.minimiser(self.prices)
        if self.relaxed.problem.nested:
            return best
        rows = np.arange(len(best))
        extra = self.penalties[rows, known] - self.penalties[rows, best]
        return np.where(extra <= _EQUAL * np.abs(self.penalties[rows, best]), known, best)

    def run(self, deadline: float) -> Choice | None:
        """An allocation that is better than the one known, None if there is none."""
        if self.gap <= self.tolerance:
            self.floor = 0.0
            return None
        for unit in self.forest.bottom_up():
            self.blocks[unit] = self._block(unit)
        units, rates = self._order()
        cost, penalty = np.zeros((1, len(self.prices))), np.zeros(1)
        steps: list[_Step] = []
        answer, improved = None, 0
        for place, (unit, now, later) in enumerate(zip(units, rates[:-1], rates[1:], strict=True)):
            if not len(penalty):
                break
            if now.penalty >= self.gap - self.tolerance or (self._thinned and place - improved > _PATIENCE):
                self._leave_out(penalty + self._completion(self.room - cost, now))
                break
            options, n_before = self._options(unit), len(penalty)
            cost = np.concatenate([cost, *(cost + added for added in options.added)])
            penalty = np.concatenate([penalty, *(penalty + extra for extra in options.penalty)])
            left = self.room - cost
            gaps = np.where((left >= 0).all(axis=1), penalty + left @ self.prices, np.inf)
            nearest = int(gaps.argmin())
            if gaps[nearest] < self.gap:
                self.gap, improved = float(gaps[nearest]), place
                answer = self._traced(steps, nearest % n_before, options, nearest // n_before - 1)
            bounds = penalty + self._completion(left, later)
            self.late = time.perf_counter() > deadline
            kept = self._kept(cost, penalty, bounds, np.abs(left) @ self.weights)
            steps.append(_Step(options, kept % n_before, kept // n_before - 1))
            cost, penalty = cost[kept], penalty[kept]
        return answer

    def _completion(self, left: NDArray[np.float64], later: _Rates) -> NDArray[np.float64]:
        """(states,): the least penalty of a completion that changes a unit to come, and pays for what it leaves.

        A resource that is short must be relieved; what is left of one has its price, unless units to come use it.
        """
        lacking = np.maximum(-left, 0.0)
        relief = np.multiply(lacking, later.relief, out=np.zeros_like(left), where=lacking > 0).max(axis=1, initial=0.0)
        unused = np.maximum(left, 0.0) @ self.prices * min(1.0, later.fill)
        return np.asarray(np.maximum(np.maximum(relief, unused), later.penalty))

    def _kept(
        self,
        cost: NDArray[np.float64],
        penalty: NDArray[np.float64],
        bounds: NDArray[np.float64],
        distance: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """Indices of the states to go on with; where they are too many, of equal bounds those nearest to the limits."""
        if self.late:
            self._leave_out(bounds)
            return np.zeros(0, dtype=np.int64)
        worth_it = bounds < self.gap - self.tolerance
        promising = np.flatnonzero(worth_it)
        self._leave_out(bounds[~worth_it])
        kept = promising[_undominated(cost[promising], penalty[promising], self.prices)]
        if len(kept) > self.max_states:
            order = np.lexsort((distance[kept], bounds[kept]))
            self._thinned = True
            self._leave_out(bounds[kept[order[self.max_states :]]])
            kept = kept[np.sort(order[: self.max_states])]
        return kept

    def _leave_out(self, bounds: NDArray[np.float64]) -> None:
        self.floor = min(self.floor, float(bounds.min(initial=math.inf)))

    def _order(self) -> tuple[list[int], list[_Rates]]:
        """The units that keep a choice, by the least penalty for which they move cost, and the rates from each on."""
        useful = self.extra < self.gap
        useful[self.forest.parent >= 0] = False  # decided with their blocks
        extra = np.where(useful, self.extra, np.inf)
        penalty = extra.min(axis=1)
        relief = _rate(extra, -self.added).min(axis=2).T
        fill = _rate(extra, np.tensordot(self.prices, np.maximum(self.added, 0.0), axes=1)).min(axis=1)
        either = _rate(extra, np.tensordot(self.prices, np.abs(self.added), axes=1)).min(axis=1)
        for unit, options in ((unit, self.blocks[unit]) for unit in self.forest.roots.tolist() if unit in self.blocks):
            penalty[unit] = options.penalty.min(initial=np.inf)
            relief[unit] = _rate(options.penalty[:, None], -options.added).min(axis=0, initial=np.inf)
            fill[unit] = _rate(options.penalty, np.maximum(options.added, 0.0) @ self.prices).min(initial=np.inf)
            either[unit] = _rate(options.penalty, np.abs(options.added) @ self.prices).min(initial=np.inf)
        choosing = np.flatnonzero(penalty < self.gap)
        order = choosing[np.lexsort((penalty[choosing], either[choosing]))]
        least = [_from_here_on(rate[order]) for rate in (penalty, relief, fill)]
        return order.tolist(), [_Rates(*rates) for rates in zip(*least, strict=True)]

    def _options(self, unit: int) -> _Options:
        if unit in self.blocks:
            return self.blocks[unit]
        levels = np.flatnonzero(self.extra[unit] < self.gap)
        return _Options(
            self.added[:, unit, levels].T, self.extra[unit, levels], np.array([unit]), levels[:, None].astype(np.int64)
        )

    def _block(self, unit: int) -> _Options:
        """Every allocation of a block within the gap but the base: its own level, and the levels of those inside."""
        members = np.array([unit, *self.forest.descendants(unit)])
        excess = self.subtotals[unit] - self.subtotals[unit].min()
        levels = np.flatnonzero(excess < self.gap)
        parts = [self._block_at(members, level, float(excess[level])) for level in levels.tolist()]
        cost, penalty, choices = (np.concatenate(column) for column in zip(*parts, strict=True))
        other = (choices != self.base[members]).any(axis=1) & (penalty < self.gap)
        return _Options(cost[other] - self.carried[unit], penalty[other], members, choices[other])

    def _block_at(
        self, members: NDArray[np.int64], level: int, excess: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Costs, penalties and levels of a block's allocations at one level of its own."""
        unit = members[0]
        there = [child for child in self.forest.children[unit] if self.forest.kept[child, level]]
        levels = self.base[members][None, :].copy()
        levels[0, 0] = level
        cost = (self.relaxed.costs[:, unit, level] + self.carried[there].sum(axis=0))[None, :]
        penalty = np.array([excess])
        column = {member: index for index, member in enumerate(members.tolist())}
        for child in there:
            options = self._options(child)
            first = column[int(options.members[0])]  # a child and those below it stand side by side
            columns = slice(first, first + len(options.members))
            cost = np.concatenate([cost, *(cost + added for added in options.added)])
            penalty = np.concatenate([penalty, *(penalty + extra for extra in options.penalty)])
            moved = [levels.copy() for _ in options.penalty]
            for rows, levels_of_child in zip(moved, options.levels, strict=True):
                rows[:, columns] = levels_of_child
            levels = np.concatenate([levels, *moved])
            kept = self._kept(cost, penalty, penalty, penalty)
            cost, penalty, levels = cost[kept], penalty[kept], levels[kept]
        return cost, penalty, levels

    def _traced(self, steps: list[_Step], state: int, options: _Options, option: int) -> Choice:
        """The allocation of a state: what it came from, and what it did last."""
        choice = self.base.copy()
        for step in [*reversed(steps)]:
            if option >= 0:
                choice[options.members] = options.levels[option]
            options, option, state = step.options, int(step.option[state]), int(step.before[state])
        if option >= 0:
            choice[options.members] = options.levels[option]
        return choice


def _undominated(
    cost: NDArray[np.float64], penalty: NDArray[np.float64], prices: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Indices of states that no other one replaces, because it costs no more of anything and loses no more.

    With several resources only states that are near in the cost of the first one are compared.
    """
    loss = penalty - cost @ prices
    order = np.lexsort((loss, *cost.T[::-1]))
    loss, cost = loss[order], cost[order]
    if cost.shape[1] <= 1:
        return np.asarray(order[falling(loss)])
    kept = np.ones(len(order), dtype=np.bool_)
    for distance in range(1, min(_NEAR, len(order) - 1) + 1):
        replaced = (loss[:-distance] <= loss[distance:]) & (cost[:-distance] <= cost[distance:]).all(axis=1)
        kept[distance:] &= ~replaced
    return np.asarray(order[kept])


def _rate(penalty: NDArray[np.float64], amount: NDArray[np.float64]) -> NDArray[np.float64]:
    """Penalty per amount, `inf` where the amount is not above 0."""
    full = np.broadcast_to(penalty, np.broadcast_shapes(penalty.shape, amount.shape))
    return np.asarray(np.divide(full, amount, out=np.full(full.shape, np.inf), where=amount > 0))


def _from_here_on(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least of each entry and all that follow, with `inf` at the end for nothing."""
    padded = np.concatenate([rates, np.full((1, *rates.shape[1:]), np.inf)])
    return np.asarray(np.minimum.accumulate(padded[::-1], axis=0)[::-1])
