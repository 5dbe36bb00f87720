"""Between a database and the solvers: costs in absolute amounts, budgets as people write them, allocations by name.

People say "3 bits per weight" or "900000 bytes of the whole model"; solvers add up bits and bytes of units. This module
is the only place where one becomes the other. It knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InfeasibleBudget, NotFinite, UsageError
from layerwise.solvers import Problem
from layerwise.stages.database import DatabaseIndex
from layerwise.stages.scoring import Genome

RESOURCES = {
    "bits": "average bits per weight of the units, without overhead (comparable with papers)",
    "effective_bits": "average bits per weight of the units, everything stored counted (scales, zero points, indices)",
    "bytes": "bytes of the whole model: the units as encoded, the rest as in the checkpoint",
}


@dataclass(frozen=True)
class Allocation:
    """One level for every unit, and what is known about it.

    Args:
        candidate: 12 hex digits, the same for the same levels of the same database.
        solver: what chose it.
        budget: `bits=3`, several joined by commas.
        levels: unit to level name.
        genome: the same as level indices, in the order of the database.
        bits, effective_bits, bytes: as in RESOURCES.
        kl, perplexity: on the search data; None when not finite.
    """

    candidate: str
    solver: str
    budget: str
    levels: dict[str, str]
    genome: Genome
    bits: float
    effective_bits: float
    bytes: int
    kl: float | None = None
    perplexity: float | None = None


def save_allocations(folder: Path, allocations: Sequence[Allocation]) -> None:
    """Write an `allocations` artifact."""
    document = [asdict(allocation) for allocation in allocations]
    (folder / "allocations.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load_allocations(folder: Path) -> list[Allocation]:
    """Read an `allocations` artifact."""
    document = json.loads((folder / "allocations.json").read_text(encoding="utf-8"))
    return [Allocation(**entry | {"genome": tuple(entry["genome"])}) for entry in document]


class CostTable:
    """The costs of a database's levels.

    Args:
        index: the database.
    """

    def __init__(self, index: DatabaseIndex) -> None:
        self.index = index
        self.units = index.units
        self.n_weights = sum(unit["n_weights"] for unit in self.units)
        self.shape = (len(self.units), max(len(unit["levels"]) for unit in self.units))
        self.costs = {
            "bits": self._table(lambda unit, level: level["bits"] * unit["n_weights"]),
            "effective_bits": self._table(lambda unit, level: level["effective_bits"] * unit["n_weights"]),
            "bytes": self._table(lambda unit, level: level["size_bytes"]),
        }

    def _table(self, cost: Any) -> NDArray[np.float64]:
        """(units, levels), inf where a unit has no such level."""
        table = np.full(self.shape, np.inf)
        for row, unit in enumerate(self.units):
            for column, level in enumerate(unit["levels"]):
                if level["status"] == "ok":
                    table[row, column] = cost(unit, level)
        return table

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
            UsageError: above the greatest reachable, where it would no longer decide anything.
        """
        table = None
        if losses is not None:
            table = np.full(self.shape, np.inf)
            for row, values in enumerate(losses):
                table[row, : len(values)] = [np.inf if value is None else value for value in values]
        limits = {resource: self._absolute(resource, amount) for resource, amount in budget.items()}
        names = [unit["unit"] for unit in self.units]
        for row, unit in enumerate(self.units):
            if not np.isfinite(self.costs["bits"][row]).any():
                raise NotFinite(
                    f"unit {unit['unit']} has no level to choose: {unit['levels'][0]['error']}",
                    hint="mend the model, or leave the unit out (`ignore` of the `calibrate` stage)",
                )
        problem = Problem(self.costs, limits, table, groups=self._groups() if tie else (), units=names)
        for resource, amount in budget.items():
            least, most = (self._readable(resource, total) for total in problem.reachable(resource))
            if amount < least * (1 - 1e-9):
                raise InfeasibleBudget(resource, amount, least)
            if amount > most * (1 + 1e-9):
                raise UsageError(
                    f"budget {amount:g} {resource} is above the greatest reachable {most:.6g}",
                    hint=f"this menu reaches {least:.6g} to {most:.6g} {resource}",
                )
        return problem

    def in_words(self, error: InfeasibleBudget, budget: Mapping[str, float]) -> InfeasibleBudget:
        """What a solver says in absolute amounts, in those of RESOURCES."""
        least = self._readable(error.resource, error.reachable)
        return InfeasibleBudget(
            error.resource,
            budget[error.resource],
            least,
            f"no allocation is within {budget_text(budget)}: the least {error.resource} found is {least:.6g}",
        )

    def _absolute(self, resource: str, amount: float) -> float:
        return amount - self.index.rest_bytes if resource == "bytes" else amount * self.n_weights

    def _readable(self, resource: str, total: float) -> float:
        return total + self.index.rest_bytes if resource == "bytes" else total / self.n_weights

    def _groups(self) -> list[list[int]]:
        """Units that serving engines fuse, by index."""
        members: dict[str, list[int]] = {}
        for row, unit in enumerate(self.units):
            if unit["group"] is not None:
                members.setdefault(unit["group"], []).append(row)
        return [rows for rows in members.values() if len(rows) > 1]

    def describe(self, genome: Sequence[int]) -> dict[str, float]:
        """The three sizes of an allocation, as in RESOURCES."""
        rows = np.arange(len(genome))
        totals = {resource: float(table[rows, list(genome)].sum()) for resource, table in self.costs.items()}
        sizes = {resource: self._readable(resource, total) for resource, total in totals.items()}
        return sizes | {"bytes": int(sizes["bytes"])}

    def allocation(self, genome: Sequence[int], *, solver: str, budget: Mapping[str, float]) -> Allocation:
        """An allocation with its names and sizes, not yet measured."""
        levels = {unit["unit"]: unit["levels"][level]["level"] for unit, level in zip(self.units, genome, strict=True)}
        sizes = self.describe(genome)
        return Allocation(
            candidate=self.candidate(genome),
            solver=solver,
            budget=budget_text(budget),
            levels=levels,
            genome=tuple(map(int, genome)),
            bits=sizes["bits"],
            effective_bits=sizes["effective_bits"],
            bytes=int(sizes["bytes"]),
        )

    def candidate(self, genome: Sequence[int]) -> str:
        """The id of an allocation of this database."""
        return hashlib.sha256(f"{self.index.digest} {list(map(int, genome))}".encode()).hexdigest()[:12]


def check_database(allocations: Sequence[Allocation], index: DatabaseIndex) -> None:
    """Refuse a database that the allocations were not made with: its levels would have other weights.

    Raises:
        UsageError: the candidate ids say so.
    """
    table = CostTable(index)
    for allocation in allocations:
        if table.candidate(allocation.genome) != allocation.candidate:
            raise UsageError(
                f"allocation {allocation.candidate} was made with another database",
                hint="give this stage the `compress` stage that `allocate` had",
            )


def budget_text(budget: Mapping[str, float]) -> str:
    """`bits=3,bytes=900000`."""
    return ",".join(f"{resource}={amount:.12g}" for resource, amount in budget.items())
