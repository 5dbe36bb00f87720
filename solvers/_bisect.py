"""From the best allocation to the cheapest, one downgrade at a time, as far as the quality allows.

The path starts with every unit at its least loss. The downgrade that harms least per cost saved comes next, again and
again, down to the cheapest allocation; harm counts the interactions with the rest of the allocation as it then stands.
Where on the path to stop is decided by the problem's own losses or, since a path of n steps takes log2(n) measurements
only, by measuring.

Left out: any allocation off the path, hence a bound. `ilp` and `branch` are better where the losses can be trusted; the
point of a path is that measuring along it is cheap.

Source: the order follows mixed-precision methods that bisect a list sorted by sensitivity, with pairwise terms added.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers.problem import LOSS, ROUNDING, Choice, Place, Problem, Solution, require_losses


def bisect(problem: Problem, evaluate: Callable[[Choice], float] | None = None, limit: float | None = None) -> Solution:
    """Go down the path from the best allocation to the cheapest, and stop where the limits say.

    Without `evaluate`, by the problem's own losses: at the first allocation within the budgets or, in the reverse form,
    at the last one within budgets and `max_loss`. With `evaluate`, in either form: at the last allocation within the
    budgets whose measured loss is at most `limit`, found by bisection. That takes the loss to rise along the path;
    where it does not, the answer is still one that was measured within the limit, but maybe not the last such.

    Costs are saved in shares of the budgets (`Problem.shares`), in the reverse form of what is minimised as well.

    Args:
        problem: any; needs losses, which order the path.
        evaluate: the measured loss of an allocation (units,), NaN if it failed, which counts as beyond the limit. Never
            called twice for an allocation; what it raises is not caught.
        limit: upper limit on the measured loss; in the reverse form `max_loss` without.
    Raises:
        InfeasibleBudget: no allocation on the path is within the limits, even if one off the path would be.
        UsageError: no losses, or `evaluate` without a limit or the other way round.
    """
    started = time.perf_counter()
    require_losses("bisect", problem)
    if evaluate is None and limit is not None:
        raise UsageError("bisect has a limit but nothing to measure", hint="give evaluate, or minimize and max_loss")
    if evaluate is not None and limit is None:
        if problem.minimize == LOSS:
            raise UsageError("bisect measures against a limit, and none is given")
        limit = problem.max_loss
    measured = problem if evaluate is None else problem.variant(minimize=LOSS, max_loss=math.inf)  # no limit on losses
    measured.check_budgets()
    path = _Path(problem)
    window = path.within(measured)
    if not window:
        raise _off_the_path(measured, path)
    if evaluate is None:
        point = window[0] if problem.minimize == LOSS else window[-1]
        return problem.solution(problem.expand(path.at(point)), seconds=time.perf_counter() - started)
    assert limit is not None
    point, loss = _last_within(lambda at: evaluate(problem.expand(path.at(at))), window, limit)
    solution = problem.solution(problem.expand(path.at(point)))
    return replace(solution, loss=loss, seconds=time.perf_counter() - started)


def _last_within(measure: Callable[[int], float], points: Sequence[int], limit: float) -> tuple[int, float]:
    """The last point whose loss is within the limit, if the loss rises, and its loss; each is measured at most once."""
    loss = measure(points[0])
    if not loss <= limit:
        raise InfeasibleBudget(
            LOSS,
            limit,
            loss,
            f"the best allocation within the budgets has a measured loss of {loss:.6g}, above the limit {limit:.6g} "
            f"(short by {loss - limit:.6g})",
        )
    low, high = 0, len(points)  # within the limit; beyond it
    while high - low > 1:
        middle = (low + high) // 2
        there = measure(points[middle])
        if there <= limit:
            low, loss = middle, there
        else:
            high = middle
    return points[low], loss


def _off_the_path(problem: Problem, path: _Path) -> InfeasibleBudget:
    """The shortage at the point that comes nearest, in the resource where it is shortest."""
    wanted = {**problem.budgets, LOSS: problem.max_loss}
    over = {r: (path.sums(r) - limit) / (abs(limit) or 1.0) for r, limit in problem.limits.items()}
    point = int(np.max([*over.values()], axis=0).argmin())
    resource = max(over, key=lambda name: over[name][point])
    least, limit = float(path.sums(resource)[point]), wanted[resource]
    return InfeasibleBudget(
        resource,
        limit,
        least,
        f"no allocation on the path from the best to the cheapest is within all limits: the nearest needs {least:.6g} "
        f"{resource}, above the limit {limit:.6g} (short by {least - limit:.6g})",
    )


class _Downgrade(NamedTuple):
    """Ordered as they are taken: least harm per saved cost, then the greater saving, then the lower index."""

    rank: float
    saved: float  # minus the saved cost
    harm: float
    unit: int
    level: int


class _Path:
    """The downgrades in their order, in units without ties, and the summed costs and losses along them."""

    def __init__(self, problem: Problem) -> None:
        untied = problem.variant(minimize=LOSS, max_loss=math.inf).plain()
        assert untied.losses is not None
        self._tables = {**untied.costs, LOSS: untied.losses}
        self._prices = _prices(untied, problem.minimize)
        self._cheapest = untied.lowest(self._prices)
        self._forest = untied.forest
        self._inside = {unit: self._forest.descendants(unit) for unit in self._forest.children}
        self._partners: dict[Place, list[tuple[Place, float]]] = {}
        for (a, b), loss in untied.interactions.items():
            self._partners.setdefault(a, []).append((b, loss))
            self._partners.setdefault(b, []).append((a, loss))
        self._with_partners = {unit for unit, _ in self._partners}
        start = untied.lowest(untied.losses, then=self._prices)
        self._present = untied.present(start)
        self._choice = np.where(self._present, start, self._cheapest)
        self._start = self._choice.copy()
        self._steps: list[Place] = []
        self._sums = [{**untied.cost(start), LOSS: _known(untied.loss(start))}]
        self._descend()

    def at(self, point: int) -> Choice:
        """The allocation after so many downgrades."""
        choice = self._start.copy()
        for unit, level in self._steps[:point]:
            choice[unit] = level
            absent = self._absent(choice, unit)
            choice[absent] = self._cheapest[absent]
        return choice

    def within(self, problem: Problem) -> list[int]:
        """The points within the problem's limits. Running sums decide where rounding cannot."""
        inside, unsure = np.ones(len(self._sums), dtype=np.bool_), np.zeros(len(self._sums), dtype=np.bool_)
        for resource, limit in problem.limits.items():
            sums = self.sums(resource)
            rounding = ROUNDING * max(abs(limit), float(abs(sums).max()))
            inside &= sums <= limit + rounding
            unsure |= abs(sums - limit) <= rounding
        points = np.flatnonzero(inside).tolist()
        return [point for point in points if not unsure[point] or problem.feasible(problem.expand(self.at(point)))]

    def sums(self, resource: str) -> NDArray[np.float64]:
        """(points,): the summed costs of a resource, or the losses, up to rounding."""
        return np.array([sums[resource] for sums in self._sums])

    def _descend(self) -> None:
        """Lay the path. Of several downgrades of a unit, only the current one in `latest` counts."""
        latest: dict[int, _Downgrade] = {}
        heap: list[_Downgrade] = []

        def offer(units: Iterable[int]) -> None:
            for unit in units:
                best = self._best(unit) if self._present[unit] else None
                latest.pop(unit, None)
                if best is not None:
                    latest[unit] = best
                    heapq.heappush(heap, best)

        offer(range(len(self._choice)))
        while heap:
            downgrade = heapq.heappop(heap)
            if latest.get(downgrade.unit) is downgrade:
                offer(self._take(downgrade))

    def _best(self, unit: int) -> _Downgrade | None:
        """The cheaper level with the least harm per saved cost; None if there is none."""
        harm, saved = self._changes(unit) if unit in self._inside else self._changes_alone(unit)
        levels = np.flatnonzero((saved > 0) & np.isfinite(harm))
        downgrades = (
            _Downgrade(float(harm[level] / saved[level]), -float(saved[level]), float(harm[level]), unit, level)
            for level in levels.tolist()
        )
        return min(downgrades, default=None)

    def _changes_alone(self, unit: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Harm and saved cost at each level, (levels,), of a unit that has none inside."""
        now, losses, prices = self._choice[unit], self._tables[LOSS][unit], self._prices[unit]
        if unit in self._with_partners:
            losses = losses + [self._together((unit, level)) for level in range(len(losses))]
        return losses - losses[now], prices[now] - prices

    def _changes(self, unit: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The same for a unit that has others inside: by trying each level."""
        block = [unit, *self._inside[unit]]
        before, kept = (self._loss(block), self._sum(self._prices, block)), (self._choice[block], self._present[block])
        harm, saved = np.full(self._prices.shape[1], np.inf), np.zeros(self._prices.shape[1])
        for level in np.flatnonzero(np.isfinite(self._prices[unit])).tolist():
            self._set(unit, level)
            harm[level] = self._loss(block) - before[0]
            saved[level] = before[1] - self._sum(self._prices, block)
            self._choice[block], self._present[block] = kept
        return harm, saved

    def _take(self, downgrade: _Downgrade) -> set[int]:
        """Go one step down the path; returns the units whose downgrades are now others."""
        unit = downgrade.unit
        block = [unit, *self._inside.get(unit, ())]
        affected = self._concerned(block)
        before = {resource: self._sum(table, block) for resource, table in self._tables.items()}
        self._set(unit, downgrade.level)
        changes = {r: self._sum(table, block) - before[r] for r, table in self._tables.items()}
        changes[LOSS] = downgrade.harm
        self._sums.append({resource: total + changes[resource] for resource, total in self._sums[-1].items()})
        self._steps.append((unit, downgrade.level))
        return affected | self._concerned(block)

    def _concerned(self, block: list[int]) -> set[int]:
        """The units of a block, those that interact with them as they are, and the units that these are nested in."""
        places = [(unit, int(self._choice[unit])) for unit in block]
        partners = {partner for place in places for (partner, _), _ in self._partners.get(place, ())}
        concerned = {*block, *partners}
        return concerned.union(*(self._forest.ancestors(unit) for unit in concerned))

    def _set(self, unit: int, level: int) -> None:
        """Change one unit's level; who is absent then stands at its cheapest level."""
        self._choice[unit] = level
        inside, absent = self._inside.get(unit, []), self._absent(self._choice, unit)
        self._present[inside] = True
        self._present[absent] = False
        self._choice[absent] = self._cheapest[absent]

    def _absent(self, choice: Choice, unit: int) -> list[int]:
        """Which of the units inside a unit that is present are absent."""
        absent = list[int]()
        for child in self._inside.get(unit, ()):  # each after its parent
            parent = self._forest.parent[child]
            if parent in absent or not self._forest.kept[child, choice[parent]]:
                absent.append(child)
        return absent

    def _sum(self, table: NDArray[np.float64], block: list[int]) -> float:
        """Summed entries of the units of a block that are present."""
        return float(table[block, self._choice[block]][self._present[block]].sum())

    def _loss(self, block: list[int]) -> float:
        """The same of the losses, with every interaction that touches the block."""
        touching = [self._together((unit, int(self._choice[unit])), block) for unit in block if self._present[unit]]
        return self._sum(self._tables[LOSS], block) + sum(touching)

    def _together(self, place: Place, block: Sequence[int] = ()) -> float:
        """Interactions of a place with the units that are present, half of those inside the block."""
        return sum(
            (0.5 if unit in block else 1.0) * loss
            for (unit, level), loss in self._partners.get(place, ())
            if self._present[unit] and self._choice[unit] == level
        )


def _known(loss: float | None) -> float:
    assert loss is not None
    return loss


def _prices(untied: Problem, minimize: str) -> NDArray[np.float64]:
    """(units, levels): costs as shares of the budgets; what is minimised counts as if it were limited."""
    if minimize == LOSS or minimize in untied.limits:
        return untied.shares
    return untied.variant(budgets={**untied.budgets, minimize: untied.reachable(minimize)[1]}).shares
