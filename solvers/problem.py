"""The allocation problem and its answer: what every solver takes and gives.

A problem is a table of costs and losses by unit and level, upper limits on the summed costs, and what binds units to
one another: ties, nesting and pairwise interactions. It is checked when it is built, so a solver can trust it: every
mistake names the unit and the level where it stands. Sums are exactly rounded (`math.fsum`), so an answer does not
depend on the order of the units.

With x the chosen levels, over the units that are present,

    minimise   loss(x) = sum_u loss[u, x_u] + sum of the interactions of x
    such that  sum_u cost[u, x_u] <= budget   for every resource with a budget,

or, in the reverse form, the summed cost of one resource such that the loss stays below a limit.

A unit may be nested in some levels of another one, and that in a third: it is absent while the other is absent or at
one of these levels. Two allocations that differ only in the levels of absent units are the same; `Problem.canonical`
gives the one form in which solvers and searches return them.

A search (`Evolve`) needs no losses, because it measures whole allocations.

Left out: a unit that is nested in several units, and one that is absent for a combination of levels only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import InfeasibleBudget, InvalidProblem, UsageError
from layerwise.solvers import _checks as check
from layerwise.solvers._forest import Forest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Choice = NDArray[np.int64]
"""One allocation: the level index of every unit, (units,)."""

Place = tuple[int, int]
"""A unit and a level, as indices."""

LOSS = "loss"
"""What is minimised unless a resource is named, and the name of the limit on it in the reverse form."""

BUDGET_TOLERANCE = 1e-9
"""Relative: a budget that was printed and typed in again must still admit the allocation that it came from."""

_NOTHING = 1e-200
"""Amounts below this are no scale for others: a quotient could leave the range of floating point."""

PROVEN = 1e-9
"""Relative gap up to which an answer counts as the optimum."""

ROUNDING = 1e-12
"""Relative: what a solver's running sum may differ from the exactly rounded one."""


@dataclass(frozen=True, eq=False)
class Solution:
    """An allocation and what is known about it.

    Args:
        choice: (units,) level indices, in the form of `Problem.canonical`; that of an absent unit means nothing.
        loss: its loss; None where it is not known.
        cost: its summed cost of every resource, budgeted or not.
        lower_bound: no allocation within the limits has a lower objective than this; None without a certificate.
        status: "optimal" (proven), "time_limit" (the best found in time) or "feasible" (no claim).
        seconds: wall time of the solver. The only field that differs between two runs.
        minimized: what the objective is: "loss", or a resource in the reverse form.
    """

    choice: Choice
    loss: float | None
    cost: dict[str, float]
    lower_bound: float | None = None
    status: str = "feasible"
    seconds: float = 0.0
    minimized: str = LOSS

    @property
    def objective(self) -> float | None:
        """The loss, or in the reverse form the cost that was minimised."""
        return self.loss if self.minimized == LOSS else self.cost[self.minimized]

    @property
    def gap(self) -> float | None:
        """How far the objective may be above the optimum, relative to itself; None without a lower bound."""
        if self.objective is None or self.lower_bound is None:
            return None
        above = max(0.0, self.objective - self.lower_bound)
        return above / abs(self.objective) if above and self.objective else above


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one level for every unit: least summed loss within the budgets, or least cost within a loss.

    Units and levels may be named wherever they are referred to, by index or by name.

    Args:
        costs: by resource, (units, levels), each at least 0, in absolute amounts (bits, not bits per weight). `inf`
            marks a level that the unit does not have; `inf` in one table is enough.
        budgets: upper limits on the summed cost, for any of the resources. `inf` is no limit.
        losses: (units, levels), any finite number, or `inf`; None when only measured allocations count.
        groups: units that must share one level; disjoint.
        units: names of the units; `unit 0`, ... without.
        levels: names of the levels; `level 0`, ... without.
        fixed: unit to the one level that it must have.
        nested: by (unit, level), the units that are absent while `unit` is at `level`, and with it while it is absent
            itself: they cost and lose nothing. A block at `drop` takes its layers with it. The units form a forest of
            any depth: each may stand at several levels of one other unit, but of one only. Tied units must be absent
            together, so they stand at the same levels of one unit, or of tied ones.
        interactions: by a pair of (unit, level), the loss that is added while both are chosen.
        minimize: "loss", or the resource whose summed cost is to be least (the reverse form).
        max_loss: upper limit on the loss, in the reverse form.
    Raises:
        InvalidProblem: the tables do not fit together; names the unit and the level.
    """

    costs: Mapping[str, NDArray[np.float64]]
    budgets: Mapping[str, float] = field(default_factory=dict)
    losses: NDArray[np.float64] | None = None
    groups: Sequence[Sequence[int]] = ()
    units: Sequence[str] | None = None
    levels: Sequence[str] | None = None
    fixed: Mapping[int, int] = field(default_factory=dict)
    nested: Mapping[Place, Sequence[int]] = field(default_factory=dict)
    interactions: Mapping[tuple[Place, Place], float] = field(default_factory=dict)
    minimize: str = LOSS
    max_loss: float = math.inf

    def __post_init__(self) -> None:
        tables = check.cost_tables(self.costs)
        losses = None if self.losses is None else check.table("loss", self.losses)
        n_units, n_levels = check.common_shape(tables if losses is None else {**tables, "losses": losses})
        names = check.Names(check.names("unit", self.units, n_units), check.names("level", self.levels, n_levels))
        check.numbers(tables, losses, names)
        fixed = {names.unit(unit, "fixed"): names.level(level, "fixed") for unit, level in self.fixed.items()}
        available = np.all([np.isfinite(t) for t in [*tables.values(), *([] if losses is None else [losses])]], axis=0)
        for unit, level in fixed.items():
            if not available[unit, level]:
                raise InvalidProblem(f"{names.units[unit]} is fixed at {names.levels[level]}, which it does not have")
            available[unit, np.arange(n_levels) != level] = False
        for row in np.flatnonzero(~available.any(axis=1)):
            raise InvalidProblem(f"{names.units[row]} has no available level")
        groups = check.disjoint(self.groups, names)
        for group in groups:
            if not available[list(group)].all(axis=0).any():
                raise InvalidProblem(f"the tied units {names.listed(group)} have no level in common")
        max_loss = check.objective(self.minimize, self.max_loss, tables, losses)
        self._fill(
            costs={resource: _sealed(table, available) for resource, table in tables.items()},
            budgets=check.budgets(self.budgets, tables),
            losses=None if losses is None else _sealed(losses, available),
            groups=groups,
            units=names.units,
            levels=names.levels,
            fixed=fixed,
            nested=check.nesting(self.nested, groups, names),
            interactions=check.pairs(self.interactions, names),
            minimize=self.minimize,
            max_loss=max_loss,
        )

    def _fill(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame | pa.Table,
        budgets: Mapping[str, float] | None = None,
        *,
        unit: str = "unit",
        level: str = "level",
        loss: str | None = LOSS,
        costs: Sequence[str] | None = None,
        **more: Any,
    ) -> Problem:
        """A problem from a long table with one row for each unit and level, in pandas or Arrow.

        Units and levels keep the order in which they first appear. A level without a row is one that the unit does not
        have.

        Args:
            frame: the table.
            budgets: as of `Problem`.
            unit: column of the unit's name.
            level: column of the level's name.
            loss: column of the loss, None for a problem without.
            costs: columns of the costs; every other column of numbers without.
            more: further arguments of `Problem`.
        Raises:
            InvalidProblem: a column is missing, a row stands twice, or an entry is null.
        """
        from layerwise.solvers._frames import read_frame

        return cls(budgets=budgets or {}, **read_frame(frame, unit, level, loss, costs), **more)

    def to_frame(self) -> pd.DataFrame:
        """The available levels as a long table: unit, level, a column for each resource, loss."""
        from layerwise.solvers._frames import write_frame

        return write_frame(self)

    def to_arrow(self) -> pa.Table:
        """The same as an Arrow table."""
        import pyarrow as pa

        return pa.Table.from_pandas(self.to_frame(), preserve_index=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(units, levels)."""
        return self.available.shape[0], self.available.shape[1]

    @property
    def separable(self) -> bool:
        """True if loss and costs are sums of table entries: nothing is nested and nothing interacts."""
        return not self.nested and not self.interactions

    @cached_property
    def available(self) -> NDArray[np.bool_]:
        """(units, levels): the level exists for the unit, whatever its ties say."""
        return np.isfinite(next(iter(self.costs.values())))

    @cached_property
    def limits(self) -> dict[str, float]:
        """The finite limits, each widened by `BUDGET_TOLERANCE`: what a solver may spend.

        In the reverse form `max_loss` is among them, under the name "loss".
        """
        limits = {**self.budgets} if self.minimize == LOSS else {**self.budgets, LOSS: self.max_loss}
        finite = {resource: limit for resource, limit in limits.items() if math.isfinite(limit)}
        return {resource: limit + abs(limit) * BUDGET_TOLERANCE for resource, limit in finite.items()}

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """(units, levels): each level's cost in units of the limits, summed over the limited resources.

        The one number by which levels are ordered from cheap to dear; with one budget it is the cost itself, scaled.
        Without a budget every resource counts, in units of its largest sum.
        """
        total = np.zeros(self.shape)
        for resource in self.limits or self.costs:
            amount = self.limits.get(resource, 0.0) or self.reachable(resource)[1]
            total += self.amounts(resource) / scale_of(amount)
        return total

    def amounts(self, resource: str) -> NDArray[np.float64]:
        """(units, levels): what a limit of that name adds up: a resource's costs, or the losses."""
        table = self.losses if resource == LOSS and resource not in self.costs else self.costs[resource]
        assert table is not None  # a limit on the loss is refused without losses
        return table

    def present(self, choice: ArrayLike | Solution) -> NDArray[np.bool_]:
        """(units,): neither the unit nor what it is nested in is removed by a level that was chosen."""
        return self.forest.present(self._checked(choice))

    def canonical(self, choice: ArrayLike | Solution) -> Choice:
        """The one form of all allocations that differ only in the levels of absent units, (units,).

        An absent unit stands at its lowest available level index; of tied ones, at the lowest that all of them have.
        """
        checked = self._checked(choice)
        return np.where(self.forest.present(checked), checked, self.resting) if self.nested else checked

    def with_cheapest_absent(self, choice: Choice) -> Choice:
        """The same allocation of a problem without groups, whose absent units come back at their cheapest, if they do.

        That is how what changes an allocation step by step writes them, so that a unit is cheap to bring back.
        """
        return np.where(self.forest.present(choice), choice, self.lowest(self.shares)) if self.nested else choice

    def loss(self, choice: ArrayLike | Solution) -> float | None:
        """Loss of an allocation; `inf` if a level is not available, None in a problem without losses."""
        if self.losses is None:
            return None
        checked = self._checked(choice)
        present = self.forest.present(checked)
        together = [
            loss
            for ((first, at), (second, there)), loss in self.interactions.items()
            if checked[first] == at and checked[second] == there and present[first] and present[second]
        ]
        return math.fsum([*self.losses[np.arange(len(checked)), checked][present].tolist(), *together])

    def cost(self, choice: ArrayLike | Solution) -> dict[str, float]:
        """Summed cost of an allocation for every resource, budgeted or not."""
        checked = self._checked(choice)
        present = self.forest.present(checked)
        rows = np.arange(len(checked))
        return {resource: math.fsum(table[rows, checked][present].tolist()) for resource, table in self.costs.items()}

    def feasible(self, choice: ArrayLike | Solution) -> bool:
        """True if every present unit has its level, tied units agree, and no limit is exceeded."""
        checked = self._checked(choice)
        if not self.available[np.arange(len(checked)), checked][self.forest.present(checked)].all():
            return False
        if any(len(set(checked[list(group)])) > 1 for group in self.groups):
            return False
        spent = self.cost(checked)
        if self.minimize != LOSS:
            spent[LOSS] = self.loss(checked) or 0.0
        return all(spent[resource] <= limit + abs(limit) * ROUNDING for resource, limit in self.limits.items())

    def named(self, choice: ArrayLike | Solution) -> dict[str, str]:
        """An allocation in words: the level of every present unit."""
        assert self.units is not None and self.levels is not None  # filled in at construction
        checked = self._checked(choice)
        present = self.forest.present(checked)
        return {
            unit: self.levels[level] for unit, level, here in zip(self.units, checked, present, strict=True) if here
        }

    def solution(
        self, choice: ArrayLike, *, status: str = "feasible", lower_bound: float | None = None, seconds: float = 0.0
    ) -> Solution:
        """The answer of a solver: `choice` in canonical form, with its loss and costs looked up."""
        checked = self.canonical(choice)
        loss, cost = self.loss(checked), self.cost(checked)
        return Solution(checked, loss, cost, lower_bound, status, seconds, self.minimize)

    def reachable(self, resource: str) -> tuple[float, float]:
        """The least and the greatest summed cost of one resource that any allocation has, whatever the budgets.

        "loss" gives the range of the summed losses, without interactions.
        """
        folded = self._folded
        table = folded.amounts(resource)
        return folded.least(table), -folded.least(np.where(folded.available, -table, np.inf))

    def least(self, table: NDArray[np.float64]) -> float:
        """The least sum of one entry per present unit of a (units, levels) table, in a problem without groups."""
        return math.fsum(self.forest.subtotals(table)[self.outer].min(axis=1).tolist())

    def lowest(self, table: NDArray[np.float64], then: NDArray[np.float64] | None = None) -> Choice:
        """The allocation with the least sum, see `least`; absent units have the least of what they could add.

        Args:
            table: (units, levels).
            then: a second table, by whose least sum equal ones are told apart; by level index without.
        """
        total = self.forest.subtotals(table)
        if then is not None:
            total = self.forest.subtotals(np.where(total == total.min(axis=1, keepdims=True), then, np.inf))
        choice: Choice = total.argmin(axis=1)
        return choice

    def above_least(self, table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What each entry adds to the least sum, (units, levels), and the terms of that, (units that are not nested,).

        A level counts with the units nested in it at their least, so every allocation adds up right.
        """
        total = self.forest.subtotals(table)
        least: NDArray[np.float64] = total.min(axis=1)
        return total - least[:, None], least[self.outer]

    @property
    def outer(self) -> NDArray[np.int64]:
        """Indices of the units that are not nested."""
        return self.forest.roots

    @cached_property
    def forest(self) -> Forest:
        """The units by what they are nested in."""
        return Forest(self.nested, self.shape)

    @cached_property
    def resting(self) -> Choice:
        """(units,): the level of an absent unit in canonical form."""
        return self.expand(self._folded.available.argmax(axis=1))

    def check_budgets(self) -> None:
        """Raise if a limit is out of reach on its own.

        Raises:
            InfeasibleBudget: names the resource, the least reachable cost and the shortfall, for all short budgets.
        """
        least = {resource: self.reachable(resource)[0] for resource in self.limits}
        wanted = {LOSS: self.max_loss, **self.budgets}  # of a plain problem, a budget may have that name
        errors = [
            InfeasibleBudget(resource, wanted[resource], least[resource])
            for resource, limit in self.limits.items()
            if least[resource] > limit + abs(limit) * ROUNDING and not (resource == LOSS and self.interactions)
        ]
        if errors:
            first, message = errors[0], "; ".join(error.message for error in errors)
            raise InfeasibleBudget(first.resource, first.budget, first.reachable, message)

    def plain(self) -> Problem:
        """The same question without ties, fixed units and the reverse form: what a solver works on.

        Tied units become one unit with their costs, losses and interactions added up. `losses` is always what is
        minimised: in the reverse form it is the cost of that resource, and the losses become the cost of a resource
        named "loss". Only nesting and interactions remain. `expand` and `fold` translate allocations.

        Raises:
            UsageError: the reverse form of a problem with interactions, whose loss is not a sum of table entries.
        """
        return self._plain

    def expand(self, plain_choice: ArrayLike) -> Choice:
        """An allocation of the plain problem as one of this problem: (plain units,) to (units,)."""
        return np.asarray(plain_choice, dtype=np.int64)[self._row_of]

    def fold(self, choice: ArrayLike | Solution) -> Choice:
        """An allocation as one of the plain problem: (units,) to (plain units,). Tied units must agree."""
        checked = self._checked(choice)
        for members in self._sets:
            if len(set(checked[list(members)])) > 1:
                raise UsageError(f"tied units differ in level: {', '.join(self._unit_names(members))}")
        return checked[[members[0] for members in self._sets]]

    def variant(self, **changes: Any) -> Problem:
        """A copy with other tables, which the caller knows to fit together: nothing is checked."""
        copy = object.__new__(Problem)
        copy._fill(**{entry.name: getattr(self, entry.name) for entry in fields(self)} | changes)
        return copy

    @cached_property
    def _sets(self) -> list[tuple[int, ...]]:
        """Every unit once, tied ones together, in the order of their first members."""
        grouped = {unit for group in self.groups for unit in group}
        alone = [(unit,) for unit in range(self.shape[0]) if unit not in grouped]
        return sorted([*alone, *(tuple(sorted(group)) for group in self.groups)])

    @cached_property
    def _row_of(self) -> NDArray[np.int64]:
        """(units,): the plain unit that each unit belongs to."""
        rows = np.empty(self.shape[0], dtype=np.int64)
        for row, members in enumerate(self._sets):
            rows[list(members)] = row
        return rows

    @cached_property
    def _folded(self) -> Problem:
        """Without ties; otherwise as it is."""
        if not self.groups:
            return self
        row_of = self._row_of.tolist()
        nested: dict[Place, list[int]] = {}
        for (unit, level), inside in self.nested.items():
            place = nested.setdefault((row_of[unit], level), [])
            place += [row for row in dict.fromkeys(row_of[u] for u in inside) if row not in place]
        losses, together = self._folded_losses()
        return self.variant(
            costs={resource: self._fold_table(table) for resource, table in self.costs.items()},
            losses=losses,
            groups=(),
            units=tuple("+".join(self._unit_names(members)) for members in self._sets),
            fixed={row_of[unit]: level for unit, level in self.fixed.items()},
            nested={place: tuple(inside) for place, inside in nested.items()},
            interactions=together,
        )

    def _fold_table(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        folded = np.zeros((len(self._sets), table.shape[1]))
        np.add.at(folded, self._row_of, table)
        return folded

    def _folded_losses(self) -> tuple[NDArray[np.float64] | None, dict[tuple[Place, Place], float]]:
        """Losses and interactions by plain units; what tied units do to each other becomes a loss of their set."""
        losses = None if self.losses is None else self._fold_table(self.losses)
        together: dict[tuple[Place, Place], float] = {}
        for ((first, at), (second, there)), loss in self.interactions.items():
            one, other = (int(self._row_of[first]), at), (int(self._row_of[second]), there)
            if one[0] != other[0]:
                pair = (one, other) if one < other else (other, one)
                together[pair] = together.get(pair, 0.0) + loss
            elif at == there and losses is not None:
                losses[one] += loss
        return losses, together

    @cached_property
    def _plain(self) -> Problem:
        folded = self._folded
        if self.minimize == LOSS:
            return folded
        if self.interactions:
            raise UsageError(
                "the least cost within a loss is not separable when units interact",
                hint="use brute on small problems, or bisect",
            )
        assert folded.losses is not None
        return folded.variant(
            costs={**folded.costs, LOSS: folded.losses},
            budgets={**self.budgets, LOSS: self.max_loss},
            losses=folded.costs[self.minimize],
            minimize=LOSS,
            max_loss=math.inf,
        )

    def _unit_names(self, members: Iterable[int]) -> list[str]:
        assert self.units is not None  # filled in at construction
        return [self.units[unit] for unit in members]

    def _checked(self, choice: ArrayLike | Solution) -> Choice:
        array = np.asarray(choice.choice if isinstance(choice, Solution) else choice)
        n_units, n_levels = self.shape
        if array.shape != (n_units,) or not np.issubdtype(array.dtype, np.integer):
            raise UsageError(f"an allocation is {n_units} level indices, found {array.dtype} of shape {array.shape}")
        if ((array < 0) | (array >= n_levels)).any():
            raise UsageError(f"an allocation has level indices from 0 to {n_levels - 1}, found {array.tolist()}")
        return array.astype(np.int64)


def scale_of(amount: ArrayLike) -> NDArray[np.float64]:
    """What to divide amounts of that order by: its absolute value, or 1 where that is next to nothing."""
    size = np.abs(np.asarray(amount, dtype=np.float64))
    return np.where(size > _NOTHING, size, 1.0)


def certified(
    problem: Problem, plain_choice: Choice, bound: float, started: float, status: str = "feasible"
) -> Solution:
    """The answer of a solver that has a lower bound (-inf for none); it is optimal if the two meet.

    Args:
        problem: as it was given.
        plain_choice: an allocation of the plain problem, within the limits.
        bound: on the objective.
        started: `time.perf_counter()` when the solver began.
        status: where the two do not meet.
    """
    solution = problem.solution(problem.expand(plain_choice), status=status)
    if not math.isfinite(bound):
        return replace(solution, seconds=time.perf_counter() - started)
    assert solution.objective is not None
    bounded = replace(solution, lower_bound=min(bound, solution.objective))
    proven = bounded.gap is not None and bounded.gap <= PROVEN
    return replace(bounded, status="optimal" if proven else status, seconds=time.perf_counter() - started)


def require_losses(solver: str, problem: Problem) -> None:
    """Refuse a problem that only measuring can solve."""
    if problem.losses is None:
        raise UsageError(
            f"{solver} needs losses, and this problem has none", hint="give losses, or use uniform or Evolve"
        )


def require_separable(solver: str, problem: Problem) -> None:
    """Refuse what a solver of summed losses cannot take."""
    require_losses(solver, problem)
    if problem.interactions:
        raise UsageError(f"{solver} adds up losses, and here units interact", hint="use branch, or Evolve")


def _sealed(table: NDArray[np.float64], available: NDArray[np.bool_]) -> NDArray[np.float64]:
    table[~available] = np.inf
    table.setflags(write=False)
    return table
