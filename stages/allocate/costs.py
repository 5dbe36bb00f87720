"""Between a database and the solvers: costs in absolute amounts, and budgets as people write them.

People say "3 bits per weight", "900000 bytes of the whole model" or "12 milliseconds of its forward pass"; solvers add
up bits, bytes and milliseconds of units. This module is the only place where one becomes the other. It also says which
allocations are one and the same model: units inside a parent that is dropped are not there, whatever their level, and a
block whose halves are all dropped is a dropped block. It knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget, NotFinite, UsageError, readable
from layerwise.results.resources import OF_LEVELS, RESOURCES
from layerwise.results.told import warn_once
from layerwise.solvers import Problem
from layerwise.stages.levels.database import UNCHANGED, DatabaseIndex
from layerwise.stages.models.network import named_by
from layerwise.stages.registry import nearest

if TYPE_CHECKING:
    from layerwise.stages.export.charges import Charges

Amount = float | str
"""Of a budget: a number as in RESOURCES, or `40%`, a share of the way from the least that is reachable to the greatest.
The milliseconds of a workflow that is to run on any machine can only be given as a share."""


@dataclass(frozen=True)
class Times:
    """What the levels of a database take on a machine, as the `latency` stage leaves it.

    Args:
        ms: (units, levels), milliseconds of one forward pass; None where a level could not be made.
        rest_ms: of everything of the model that is no unit.
    """

    ms: Sequence[Sequence[float | None]]
    rest_ms: float


def load_times(folder: Path, index: DatabaseIndex) -> Times:
    """Read a `latency` artifact.

    Raises:
        UsageError: it is that of another database.
    """
    document = json.loads((folder / "latency.json").read_text(encoding="utf-8"))
    if document["database"] != index.digest:
        raise UsageError(
            "the latencies are those of another database", hint="time the `compress` stage that is used here"
        )
    return Times(document["ms"], document["rest_ms"])


class CostTable:
    """The costs of a database's levels.

    Args:
        index: the database.
        times: what its levels take on a machine, if that was measured; with them `ms` is one more resource.
        fixed: level that units must have, by what names them in `targets`; it need not be offered.
        charges: what a format stores, if bytes are counted in its files: levels that it cannot hold are not offered.
        equal_width: half-blocks that can be narrower share one level, those of attention and those of the MLPs.
    Raises:
        UnsupportedModel: nothing is named so.
        UsageError: there is no such level, a unit is to have two, or one inside a parent that is to be dropped.
    """

    def __init__(
        self,
        index: DatabaseIndex,
        times: Times | None = None,
        *,
        fixed: Mapping[str, str] | None = None,
        charges: Charges | None = None,
        equal_width: bool = False,
    ) -> None:
        self.index = index
        self.equal_width = equal_width
        self.units = index.units
        self.n_weights = sum(unit.n_weights for unit in self.units)
        self.shape = (len(self.units), max(len(unit.levels) for unit in self.units))
        # Also of levels that are not offered: an allocation may hold them where a unit is not there.
        self.costs = {name: self._table(name) for name in OF_LEVELS if self._is_counted(name)}
        self.rest = {name: index.rest.get(name, 0.0) for name in self.costs if RESOURCES[name].per == "model"}
        self.refused = {} if charges is None else self._refused(charges)
        if charges is not None:
            self._charge(charges)
        if times is not None:
            self.costs["ms"] = np.full(self.shape, np.inf)
            for row, values in enumerate(times.ms):
                self.costs["ms"][row, : len(values)] = [np.inf if value is None else value for value in values]
            self.rest["ms"] = times.rest_ms
        self.fixed = self._fixed(fixed or {})

    def _is_counted(self, resource: str) -> bool:
        """Whether every level says what it uses of a resource; a database of an earlier version may not."""
        costs = [level.costs for unit in self.units for level in unit.levels if level.costs is not None]
        return all(resource in known for known in costs)

    def _table(self, resource: str) -> NDArray[np.float64]:
        """(units, levels), inf where a unit has no such level."""
        table = np.full(self.shape, np.inf)
        for row, unit in enumerate(self.units):
            for column, level in enumerate(unit.levels):
                if level.costs is not None:
                    table[row, column] = level.costs[resource]
        return table

    def _refused(self, charges: Charges) -> dict[tuple[int, int], str]:
        """Levels that a format cannot hold, by row and column, and why."""
        return {
            (row, column): why
            for row, unit in enumerate(self.units)
            for column, level in enumerate(unit.levels)
            if level.usable and (why := charges.why_not(unit, level)) is not None
        }

    def _charge(self, charges: Charges) -> None:
        """Count what a format stores."""
        self.rest["bytes"] = charges.rest
        for row, unit in enumerate(self.units):
            for column, level in enumerate(unit.levels):
                if level.usable and (row, column) not in self.refused:
                    charge = charges.charge(unit, level)
                    self.costs["bytes"][row, column] = charge.size_bytes
                    self.costs["effective_bits"][row, column] = 8 * charge.values_bytes

    @cached_property
    def offered(self) -> NDArray[np.bool_]:
        """(units, levels): whether a search may choose a level."""
        offered = np.zeros(self.shape, dtype=bool)
        for row, unit in enumerate(self.units):
            offered[row, : len(unit.levels)] = [
                level.usable and level.offered and (row, column) not in self.refused
                for column, level in enumerate(unit.levels)
            ]
        for row, column in self.fixed.items():
            offered[row] = False
            offered[row, column] = True
        return offered

    def _column(self, row: int, name: str) -> int | None:
        names = [level.name if level.usable else None for level in self.units[row].levels]
        return names.index(name) if name in names else None

    def _fixed(self, levels: Mapping[str, str]) -> dict[int, int]:
        """By row, the level that it must have."""
        found: dict[int, int] = {}
        for pattern, name in levels.items():
            units = named_by(pattern, [entry.unit for entry in self.units], "fixed")
            rows = [self._rows[unit.name] for unit in units]
            having = {row: column for row in rows if (column := self._column(row, name)) is not None}
            if not having:  # a pattern may name half-blocks beside the weights in them
                known = dict.fromkeys(level.name for row in rows for level in self.units[row].levels if level.usable)
                raise UsageError(f"fixed: {units[0].name} has no level '{name}' ({nearest(name, list(known))})")
            for row, column in having.items():
                if (row, column) in self.refused:
                    raise UsageError(
                        f"fixed: the format cannot hold {name} of {self.units[row].name}: {self.refused[row, column]}",
                        hint="fix another level, or leave `format` out",
                    )
                if found.setdefault(row, column) != column:
                    raise UsageError(f"fixed: {self.units[row].name} is to have two levels, '{name}' is one of them")
        present = self.present([found.get(row, UNCHANGED) for row in range(len(self.units))])
        for row in found:
            if not present[row]:
                parent = self.units[row].unit.parent
                raise UsageError(
                    f"fixed: {self.units[row].name} is to have a level, but {parent}, which it is in, is to be "
                    "dropped or narrowed",
                    hint="fix one of the two",
                )
        return found

    # --- what is inside what ---

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {unit.name: row for row, unit in enumerate(self.units)}

    @cached_property
    def _drops(self) -> dict[int, int]:
        """Of each parent that may be dropped, the level that does it."""
        return {
            row: column
            for row, unit in enumerate(self.units)
            for column, level in enumerate(unit.levels)
            if level.recipe is not None and level.recipe["encoding"] == "drop"
        }

    @cached_property
    def _removing(self) -> dict[int, list[int]]:
        """Of each parent, the levels at which what is inside is no choice: those that drop or narrow it."""
        found: dict[int, list[int]] = {}
        for row, unit in enumerate(self.units):
            for column, level in enumerate(unit.levels):
                if level.recipe is not None and level.recipe["encoding"] in ("drop", "narrow"):
                    found.setdefault(row, []).append(column)
        return found

    @cached_property
    def nested(self) -> dict[tuple[int, int], list[int]]:
        """By parent and level that drops or narrows it, what is no choice then; what is inside of that is listed with
        it."""
        found: dict[tuple[int, int], list[int]] = {}
        for row, unit in enumerate(self.units):
            parent = unit.unit.parent
            while parent is not None and self._rows[parent] not in self._removing:
                parent = self.units[self._rows[parent]].unit.parent
            if parent is not None:
                for column in self._removing[self._rows[parent]]:
                    found.setdefault((self._rows[parent], column), []).append(row)
        return found

    @cached_property
    def _blocks(self) -> list[tuple[int, list[int]]]:
        """Blocks that may be dropped, each with the halves that it is made of, if these may be dropped, too."""
        found = [
            (self._rows[block], [self._rows[half] for half in halves]) for block, halves in self.index.halves.items()
        ]
        return [(block, halves) for block, halves in found if {block, *halves} <= set(self._drops)]

    def present(self, genome: Sequence[int]) -> NDArray[np.bool_]:
        """(units,): what is a choice, not inside a parent that is dropped or narrowed."""
        present = np.ones(len(self.units), dtype=bool)
        for (row, column), inside in self.nested.items():  # a block before its halves
            if genome[row] == column or not present[row]:
                present[inside] = False
        return present

    def canonical(self, genome: Sequence[int]) -> list[int]:
        """The same model by its one genome: 0 for what is not there, and a block for all of its halves."""
        canonical = [int(level) for level in genome]
        for block, halves in self._blocks:
            if all(canonical[half] == self._drops[half] for half in halves):
                canonical[block] = self._drops[block]
        for row in np.flatnonzero(~self.present(canonical)).tolist():
            canonical[row] = UNCHANGED
        return canonical

    # --- problems ---

    def problem(
        self, budget: Mapping[str, float], *, tie: bool, losses: Sequence[Sequence[float | None]] | None
    ) -> Problem:
        """The allocation problem of one budget.

        Args:
            budget: by resource, in the amounts of RESOURCES.
            tie: fused units share one level.
            losses: (units, levels), None where not finite; None for a search that measures.
        Raises:
            InfeasibleBudget: below the least reachable.
            NotFinite: none of the levels of a unit could be made.
            UsageError: nothing is known of a resource, or none of the levels of a unit has a loss.
        """
        self._check_known(budget)
        table = None
        if losses is not None:
            table = np.full(self.shape, np.inf)
            for row, values in enumerate(losses):
                table[row, : len(values)] = [np.inf if value is None else value for value in values]
        limits = {resource: self._absolute(resource, amount) for resource, amount in budget.items()}
        for unit, offered in zip(self.units, self.offered, strict=True):
            if not offered.any():
                refused = [why for (row, _), why in self.refused.items() if row == self._rows[unit.name]]
                if refused:
                    raise UsageError(
                        f"the format holds none of the levels of {unit.name}: {refused[-1]}",
                        hint="offer one that it holds, or the unit as it is (`{method: dense}`), or leave `format` out",
                    )
                errors = [level.error for level in unit.levels if level.error]
                raise NotFinite(
                    f"unit {unit.name} has no level to choose: {errors[0] if errors else 'none is offered'}",
                    hint="mend the model, leave the unit out (`ignore`), or offer it as it is (`{method: dense}`)",
                )
            if table is not None and not np.isfinite(table[self._rows[unit.name]][offered]).any():
                raise UsageError(
                    f"the profile has no loss for any level of {unit.name}",
                    hint="profile kl, which every level has, or calibrate the unit, too (`targets`)",
                )
        problem = Problem(
            {resource: np.where(self.offered, amounts, np.inf) for resource, amounts in self.costs.items()},
            limits,
            table,
            groups=[*(self._groups() if tie else ()), *(self._alike() if self.equal_width else ())],
            units=[unit.name for unit in self.units],
            nested=self.nested,
        )
        for resource, amount in budget.items():
            least, most = (self._readable(resource, total) for total in problem.reachable(resource))
            if amount < least * (1 - 1e-9):
                raise InfeasibleBudget(resource, amount, least)
            if amount > most * (1 + 1e-9):
                warn_once(
                    f"budget {readable(amount)} {resource} limits nothing: this menu reaches {readable(least)} to "
                    f"{readable(most)} {resource}"
                )
        return problem

    def amounts(
        self, budget: Mapping[str, Amount], *, tie: bool, losses: Sequence[Sequence[float | None]] | None
    ) -> dict[str, float]:
        """A budget in numbers: shares of what each resource alone can reach are looked up.

        Args:
            budget: by resource; see `Amount`.
            tie, losses: as of `problem`.
        """
        shares = {name: float(amount[:-1]) / 100 for name, amount in budget.items() if isinstance(amount, str)}
        numbers = {name: amount for name, amount in budget.items() if not isinstance(amount, str)}
        if not shares:
            return numbers
        self._check_known(shares)
        free = self.problem({}, tie=tie, losses=losses)
        for resource, share in shares.items():
            least, most = (self._readable(resource, total) for total in free.reachable(resource))
            numbers[resource] = least + share * (most - least)
        return {name: numbers[name] for name in budget}

    def in_words(self, error: InfeasibleBudget, budget: Mapping[str, float]) -> InfeasibleBudget:
        """What a solver says in absolute amounts, in those of RESOURCES."""
        least = self._readable(error.resource, error.reachable)
        return InfeasibleBudget(
            error.resource,
            budget[error.resource],
            least,
            f"no allocation is within {budget_text(budget)}: the least {error.resource} found is {readable(least)}",
        )

    def _check_known(self, budget: Mapping[str, object]) -> None:
        if "ms" in budget and "ms" not in self.costs:
            raise UsageError(
                "a budget of ms needs measured times", hint="add a `latency` stage to what `allocate` needs"
            )
        for resource in budget:
            if resource not in self.costs:
                raise UsageError(
                    f"the levels do not say what they use of {resource}", hint="make them again: run `compress` anew"
                )

    def _absolute(self, resource: str, amount: float) -> float:
        return amount - self.rest[resource] if resource in self.rest else amount * self.n_weights

    def _readable(self, resource: str, total: float) -> float:
        return total + self.rest[resource] if resource in self.rest else total / self.n_weights

    def _alike(self) -> list[list[int]]:
        """Half-blocks of a role that can be narrower, by index.

        Raises:
            UsageError: one of them cannot, and so none would be.
        """
        found: dict[str, list[int]] = {}
        for row, unit in enumerate(self.units):
            if unit.unit.role in ("attention", "mlp"):
                found.setdefault(unit.unit.role, []).append(row)
                if not any(level.recipe is not None and level.recipe["encoding"] == "narrow" for level in unit.levels):
                    errors = [f": {level.error}" for level in unit.levels if level.error]
                    raise UsageError(
                        f"equal_width: {unit.name} cannot be narrower{errors[0] if errors else ''}",
                        hint="leave equal_width out; a dense export then needs `pad: true`",
                    )
        return [rows for rows in found.values() if len(rows) > 1]

    def _groups(self) -> list[list[int]]:
        """Units that serving engines fuse, by index."""
        members: dict[str, list[int]] = {}
        for row, unit in enumerate(self.units):
            if unit.unit.group is not None:
                members.setdefault(unit.unit.group, []).append(row)
        return [rows for rows in members.values() if len(rows) > 1]

    def describe(self, genome: Sequence[int]) -> dict[str, float]:
        """The sizes of an allocation by resource, as people read them; its milliseconds if they are known."""
        rows, present = np.arange(len(genome)), self.present(genome)
        sizes = {}
        for resource, table in self.costs.items():
            total = float(table[rows, list(genome)][present].sum())
            readable = self._readable(resource, total)
            sizes[resource] = int(readable) if RESOURCES[resource].type == "int64" else readable
        return sizes

    def candidate(self, genome: Sequence[int]) -> str:
        """The id of a model made of this database: the same for every genome that means it."""
        return hashlib.sha256(f"{self.index.digest} {self.canonical(genome)}".encode()).hexdigest()[:12]


def budget_text(budget: Mapping[str, Amount]) -> str:
    """`bits=3,bytes=900000`, `ms=40%`."""
    return ",".join(
        f"{resource}={amount if isinstance(amount, str) else f'{amount:.12g}'}" for resource, amount in budget.items()
    )
