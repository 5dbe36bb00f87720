"""Between a database and the solvers: costs in absolute amounts, budgets as people write them, allocations by name.

People say "3 bits per weight", "900000 bytes of the whole model" or "12 milliseconds of its forward pass"; solvers add
up bits, bytes and milliseconds of units. This module is the only place where one becomes the other. It knows nothing of
torch.
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
from layerwise.stages.evaluate.scoring import Genome
from layerwise.stages.levels.database import DatabaseIndex

RESOURCES = {
    "bits": "average bits per weight of the units, without overhead (comparable with papers)",
    "effective_bits": "average bits per weight of the units, everything stored counted (scales, zero points, indices)",
    "bytes": "bytes of the whole model: the units as encoded, the rest as in the checkpoint",
    "ms": "milliseconds of the whole model's forward pass, as the latency stage measured its parts",
}


Amount = float | str
"""Of a budget: a number as in RESOURCES, or `40%`, a share of the way from the least that is reachable to the greatest.
The milliseconds of a workflow that is to run on any machine can only be given as a share."""


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
        ms: as in RESOURCES, the measured times of its levels added up; None where none were measured.
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
    ms: float | None = None


def save_allocations(folder: Path, allocations: Sequence[Allocation]) -> None:
    """Write an `allocations` artifact."""
    document = [asdict(allocation) for allocation in allocations]
    (folder / "allocations.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load_allocations(folder: Path) -> list[Allocation]:
    """Read an `allocations` artifact."""
    document = json.loads((folder / "allocations.json").read_text(encoding="utf-8"))
    return [Allocation(**entry | {"genome": tuple(entry["genome"])}) for entry in document]


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
    """

    def __init__(self, index: DatabaseIndex, times: Times | None = None) -> None:
        self.index = index
        self.units = index.units
        self.n_weights = sum(unit["n_weights"] for unit in self.units)
        self.shape = (len(self.units), max(len(unit["levels"]) for unit in self.units))
        self.costs = {
            "bits": self._table(lambda unit, level: level["bits"] * unit["n_weights"]),
            "effective_bits": self._table(lambda unit, level: level["effective_bits"] * unit["n_weights"]),
            "bytes": self._table(lambda unit, level: level["size_bytes"]),
        }
        self.rest: dict[str, float] = {"bytes": index.rest_bytes}  # what is no unit costs too, whatever is chosen
        if times is not None:
            self.costs["ms"] = self._measured(times)
            self.rest["ms"] = times.rest_ms

    def _measured(self, times: Times) -> NDArray[np.float64]:
        table = np.full(self.shape, np.inf)
        for row, values in enumerate(times.ms):
            table[row, : len(values)] = [np.inf if value is None else value for value in values]
        return table

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
            UsageError: above the greatest reachable, where it would no longer decide anything; or of a resource that
                nothing is known of.
        """
        self._check_known(budget)
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
            f"no allocation is within {budget_text(budget)}: the least {error.resource} found is {least:.6g}",
        )

    def _check_known(self, budget: Mapping[str, object]) -> None:
        if "ms" in budget and "ms" not in self.costs:
            raise UsageError(
                "a budget of ms needs measured times", hint="add a `latency` stage to what `allocate` needs"
            )

    def _absolute(self, resource: str, amount: float) -> float:
        return amount - self.rest[resource] if resource in self.rest else amount * self.n_weights

    def _readable(self, resource: str, total: float) -> float:
        return total + self.rest[resource] if resource in self.rest else total / self.n_weights

    def _groups(self) -> list[list[int]]:
        """Units that serving engines fuse, by index."""
        members: dict[str, list[int]] = {}
        for row, unit in enumerate(self.units):
            if unit["group"] is not None:
                members.setdefault(unit["group"], []).append(row)
        return [rows for rows in members.values() if len(rows) > 1]

    def describe(self, genome: Sequence[int]) -> dict[str, float]:
        """The sizes of an allocation, as in RESOURCES, and its milliseconds if they are known."""
        rows = np.arange(len(genome))
        totals = {resource: float(table[rows, list(genome)].sum()) for resource, table in self.costs.items()}
        sizes = {resource: self._readable(resource, total) for resource, total in totals.items()}
        return sizes | {"bytes": int(sizes["bytes"])}

    def allocation(self, genome: Sequence[int], *, solver: str, budget: Mapping[str, Amount]) -> Allocation:
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
            ms=sizes.get("ms"),
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


def budget_text(budget: Mapping[str, Amount]) -> str:
    """`bits=3,bytes=900000`, `ms=40%`."""
    return ",".join(
        f"{resource}={amount if isinstance(amount, str) else f'{amount:.12g}'}" for resource, amount in budget.items()
    )
