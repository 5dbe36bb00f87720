"""The allocation problem and its answer: what every solver takes and gives.

A problem is a table of costs and losses by unit and level, upper limits on the summed costs, and ties between units. It
is checked when it is built, so a solver can trust it: every mistake names the unit and the level where it stands. Sums
are exactly rounded (`math.fsum`), so an answer does not depend on the order of the units.

Left out: units that nest inside one another, and losses that are not a sum over the units. A search (`Evolve`) needs no
losses at all, because it measures whole allocations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import InfeasibleBudget, InvalidProblem, UsageError

Choice = NDArray[np.int64]
"""One allocation: the level index of every unit, (units,)."""

BUDGET_TOLERANCE = 1e-9
"""Relative: a budget that was printed and typed in again must still admit the allocation that it came from."""

ROUNDING = 1e-12
"""Relative: what a solver's running sum may differ from the exactly rounded one."""


@dataclass(frozen=True, eq=False)
class Solution:
    """An allocation and what is known about it.

    Args:
        choice: (units,) level indices.
        loss: its loss; None where it is not known.
        cost: its summed cost of every resource, budgeted or not.
        lower_bound: no feasible allocation has a lower loss than this; None without a certificate.
        status: "optimal" (proven), "time_limit" (the best found in time) or "feasible" (no claim).
        seconds: wall time of the solver. The only field that differs between two runs.
    """

    choice: Choice
    loss: float | None
    cost: dict[str, float]
    lower_bound: float | None = None
    status: str = "feasible"
    seconds: float = 0.0

    @property
    def gap(self) -> float | None:
        """How far the loss may be above the optimum, relative to the loss; None without a lower bound."""
        if self.loss is None or self.lower_bound is None:
            return None
        above = max(0.0, self.loss - self.lower_bound)
        return above / abs(self.loss) if above and self.loss else above


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one level for every unit: least summed loss within the budgets.

    Args:
        costs: by resource, (units, levels), each at least 0, in absolute amounts (bits, not bits per weight). `inf`
            marks a level that the unit does not have; `inf` in one table is enough.
        budgets: upper limits on the summed cost, for any of the resources. `inf` is no limit.
        losses: (units, levels), any finite number, or `inf`; None when only measured allocations count.
        groups: units (by index) that must share one level; disjoint.
        units: names for messages; `unit 0`, ... without.
        levels: names for messages; `level 0`, ... without.
    Raises:
        InvalidProblem: the tables do not fit together; names the unit and the level.
    """

    costs: Mapping[str, NDArray[np.float64]]
    budgets: Mapping[str, float] = field(default_factory=dict)
    losses: NDArray[np.float64] | None = None
    groups: Sequence[Sequence[int]] = ()
    units: Sequence[str] | None = None
    levels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.costs:
            raise InvalidProblem("a problem needs the cost of at least one resource")
        tables = {resource: _table(f"{resource} cost", table) for resource, table in self.costs.items()}
        losses = None if self.losses is None else _table("loss", self.losses)
        shape = _common_shape(tables if losses is None else {**tables, "losses": losses})
        units = _names("unit", self.units, shape[0])
        levels = _names("level", self.levels, shape[1])
        for resource, table in tables.items():
            _refuse(np.isnan(table), f"{resource} cost is NaN", units, levels)
            _refuse(table < 0, f"{resource} cost is negative", units, levels)
        if losses is not None:
            _refuse(np.isnan(losses), "loss is NaN", units, levels)
            _refuse(np.isneginf(losses), "loss is -inf", units, levels)
        available = np.all([np.isfinite(t) for t in [*tables.values(), *([] if losses is None else [losses])]], axis=0)
        for unit in np.flatnonzero(~available.any(axis=1)):
            raise InvalidProblem(f"{units[unit]} has no available level")
        groups = _disjoint(self.groups, units)
        for group in groups:
            if not available[list(group)].all(axis=0).any():
                raise InvalidProblem(f"the tied units {', '.join(units[u] for u in group)} have no level in common")
        set_field = object.__setattr__  # the dataclass is frozen for everyone else
        set_field(self, "costs", {resource: _sealed(table, available) for resource, table in tables.items()})
        set_field(self, "losses", None if losses is None else _sealed(losses, available))
        set_field(self, "budgets", _checked_budgets(self.budgets, tables))
        set_field(self, "groups", groups)
        set_field(self, "units", units)
        set_field(self, "levels", levels)

    @property
    def shape(self) -> tuple[int, int]:
        """(units, levels)."""
        return self.available.shape[0], self.available.shape[1]

    @cached_property
    def available(self) -> NDArray[np.bool_]:
        """(units, levels): the level exists for the unit, whatever its ties say."""
        return np.isfinite(next(iter(self.costs.values())))

    @cached_property
    def limits(self) -> dict[str, float]:
        """The finite budgets, each widened by `BUDGET_TOLERANCE`: what a solver may spend."""
        finite = {resource: budget for resource, budget in self.budgets.items() if math.isfinite(budget)}
        return {resource: budget + abs(budget) * BUDGET_TOLERANCE for resource, budget in finite.items()}

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """(units, levels): each level's cost in units of the budgets, summed over the budgeted resources.

        The one number by which levels are ordered from cheap to dear; with one budget it is the cost itself, scaled.
        Without a budget every resource counts, in units of its largest sum.
        """
        total = np.zeros(self.shape)
        for resource in self.limits or self.costs:
            scale = self.limits.get(resource, 0.0)
            total += self.costs[resource] / (scale if scale > 0 else self.reachable(resource)[1] or 1.0)
        return total

    def reachable(self, resource: str) -> tuple[float, float]:
        """The least and the greatest summed cost of one resource that any allocation has, whatever the budgets."""
        tied = self.tied()
        table = tied.costs[resource]
        return math.fsum(table.min(axis=1)), math.fsum(np.where(tied.available, table, -np.inf).max(axis=1))

    def check_budgets(self) -> None:
        """Raise if a budget is out of reach on its own.

        Raises:
            InfeasibleBudget: names the resource, the least reachable cost and the shortfall, for all short budgets.
        """
        least = {resource: self.reachable(resource)[0] for resource in self.limits}
        short = [resource for resource, limit in self.limits.items() if least[resource] > limit * (1 + ROUNDING)]
        errors = [InfeasibleBudget(resource, self.budgets[resource], least[resource]) for resource in short]
        if errors:
            message = "; ".join(error.message for error in errors)
            raise InfeasibleBudget(short[0], self.budgets[short[0]], least[short[0]], message)

    def loss(self, choice: ArrayLike) -> float | None:
        """Summed loss of an allocation; `inf` if a level is not available, None in a problem without losses."""
        return None if self.losses is None else _sum_at(self.losses, self._checked(choice))

    def cost(self, choice: ArrayLike) -> dict[str, float]:
        """Summed cost of an allocation for every resource, budgeted or not."""
        checked = self._checked(choice)
        return {resource: _sum_at(table, checked) for resource, table in self.costs.items()}

    def feasible(self, choice: ArrayLike) -> bool:
        """True if every level is available, tied units agree, and no budget is exceeded."""
        checked = self._checked(choice)
        if not self.available[np.arange(len(checked)), checked].all():
            return False
        if any(len(set(checked[list(group)])) > 1 for group in self.groups):
            return False
        cost = self.cost(checked)
        return all(cost[resource] <= limit + abs(limit) * ROUNDING for resource, limit in self.limits.items())

    def solution(
        self, choice: ArrayLike, *, status: str = "feasible", lower_bound: float | None = None, seconds: float = 0.0
    ) -> Solution:
        """The answer of a solver: `choice` with its loss and costs looked up."""
        checked = self._checked(choice)
        return Solution(checked, self.loss(checked), self.cost(checked), lower_bound, status, seconds)

    def tied(self) -> Problem:
        """The same problem with one unit for each set of tied units, costs and losses added up, and no groups left.

        `expand` and `fold` translate allocations. A problem without groups is its own tied problem.
        """
        return self._tied

    def expand(self, tied_choice: ArrayLike) -> Choice:
        """An allocation of the tied problem as one of this problem: (tied units,) to (units,)."""
        rows = np.empty(self.shape[0], dtype=np.int64)
        for row, members in enumerate(self._sets):
            rows[list(members)] = row
        return np.asarray(tied_choice, dtype=np.int64)[rows]

    def fold(self, choice: ArrayLike) -> Choice:
        """An allocation as one of the tied problem: (units,) to (tied units,). Tied units must agree."""
        checked = self._checked(choice)
        for members in self._sets:
            if len(set(checked[list(members)])) > 1:
                raise UsageError(f"tied units differ in level: {', '.join(self._unit_names(members))}")
        return checked[[members[0] for members in self._sets]]

    @cached_property
    def _sets(self) -> list[tuple[int, ...]]:
        """Every unit once, tied ones together, in the order of their first members."""
        grouped = {unit for group in self.groups for unit in group}
        alone = [(unit,) for unit in range(self.shape[0]) if unit not in grouped]
        return sorted([*alone, *(tuple(sorted(group)) for group in self.groups)])

    @cached_property
    def _tied(self) -> Problem:
        if not self.groups:
            return self

        def fold_table(table: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.stack([table[list(members)].sum(axis=0) for members in self._sets])

        return Problem(
            costs={resource: fold_table(table) for resource, table in self.costs.items()},
            budgets=self.budgets,
            losses=None if self.losses is None else fold_table(self.losses),
            units=["+".join(self._unit_names(members)) for members in self._sets],
            levels=self.levels,
        )

    def _unit_names(self, members: Sequence[int]) -> list[str]:
        assert self.units is not None  # filled in at construction
        return [self.units[unit] for unit in members]

    def _checked(self, choice: ArrayLike) -> Choice:
        array = np.asarray(choice)
        n_units, n_levels = self.shape
        if array.shape != (n_units,) or not np.issubdtype(array.dtype, np.integer):
            raise UsageError(f"an allocation is {n_units} level indices, found {array.dtype} of shape {array.shape}")
        if ((array < 0) | (array >= n_levels)).any():
            raise UsageError(f"an allocation has level indices from 0 to {n_levels - 1}, found {array.tolist()}")
        return array.astype(np.int64)


def _sum_at(table: NDArray[np.float64], choice: Choice) -> float:
    return math.fsum(table[np.arange(len(choice)), choice])


def _table(what: str, table: ArrayLike) -> NDArray[np.float64]:
    try:
        array = np.array(table, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidProblem(f"the {what} table is not a table of numbers: {error}") from error
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidProblem(f"the {what} table must be (units, levels), at least one of each; found {array.shape}")
    return array


def _common_shape(tables: Mapping[str, NDArray[np.float64]]) -> tuple[int, ...]:
    shapes = {name: table.shape for name, table in tables.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InvalidProblem(f"all tables must have the same units and levels; found {found}")
    return next(iter(shapes.values()))


def _names(what: str, names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"{what} {index}" for index in range(count))
    if len(names) != count:
        raise InvalidProblem(f"{len(names)} {what} names for {count} {what}s")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidProblem(f"two {what}s are named {name}")
    return tuple(names)


def _refuse(wrong: NDArray[np.bool_], what: str, units: Sequence[str], levels: Sequence[str]) -> None:
    where = np.argwhere(wrong)
    if len(where):
        unit, level = where[0]
        more = f" (and at {len(where) - 1} more places)" if len(where) > 1 else ""
        raise InvalidProblem(f"{what} for {units[unit]} at {levels[level]}{more}")


def _disjoint(groups: Sequence[Sequence[int]], units: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    seen: set[int] = set()
    for group in groups:
        for unit in group:
            if not 0 <= unit < len(units):
                raise InvalidProblem(f"a group names unit {unit}, but units go from 0 to {len(units) - 1}")
            if unit in seen:
                raise InvalidProblem(f"{units[unit]} stands in more than one group")
            seen.add(unit)
    return tuple(tuple(int(unit) for unit in group) for group in groups if group)


def _checked_budgets(budgets: Mapping[str, float], costs: Mapping[str, object]) -> dict[str, float]:
    for resource, budget in budgets.items():
        if resource not in costs:
            raise InvalidProblem(f"budget for {resource}, but costs are known for {', '.join(costs)} only")
        if math.isnan(budget):
            raise InvalidProblem(f"the {resource} budget is NaN")
    return {resource: float(budget) for resource, budget in budgets.items()}


def _sealed(table: NDArray[np.float64], available: NDArray[np.bool_]) -> NDArray[np.float64]:
    table[~available] = np.inf
    table.setflags(write=False)
    return table
