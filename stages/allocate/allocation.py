"""Allocations: one level for every unit, by name, as they go from `allocate` to the stages behind it. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from layerwise.errors import UsageError
from layerwise.stages.allocate.costs import Amount, CostTable, budget_text
from layerwise.stages.evaluate.scoring import Genome
from layerwise.stages.levels.database import DatabaseIndex


@dataclass(frozen=True)
class Allocation:
    """One level for every unit, and what is known about it.

    Args:
        candidate: 12 hex digits, the same for the same model made of the same database.
        solver: what chose it.
        budget: `bits=3`, several joined by commas.
        levels: unit to level name. Units inside a parent that is dropped or narrowed are not in it.
        genome: level indices, in the order of the database; that of a unit that is not there is 0.
        sizes: by resource, as people read it (`layerwise.results.resources`); those that were not measured are left
            out.
        kl, perplexity: on the search data; None when not finite.
        recovered_kl: the same after the repair of `recover`; None without one.
        format: of export, in whose files bytes are counted; None for the bytes of the levels themselves.
    """

    candidate: str
    solver: str
    budget: str
    levels: dict[str, str]
    genome: Genome
    sizes: dict[str, float]
    kl: float | None = None
    perplexity: float | None = None
    recovered_kl: float | None = None
    format: str | None = None


def make_allocation(
    table: CostTable, genome: Sequence[int], *, solver: str, budget: Mapping[str, Amount]
) -> Allocation:
    """An allocation with its names and sizes, not yet measured."""
    genome = table.canonical(genome)
    present = table.present(genome)
    return Allocation(
        candidate=table.candidate(genome),
        solver=solver,
        budget=budget_text(budget),
        levels={
            unit.name: unit.levels[level].name
            for unit, level, there in zip(table.units, genome, present, strict=True)
            if there
        },
        genome=tuple(genome),
        sizes=table.describe(genome),
    )


def save_allocations(folder: Path, allocations: Sequence[Allocation]) -> None:
    """Write an `allocations` artifact."""
    document = [asdict(allocation) for allocation in allocations]
    (folder / "allocations.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load_allocations(folder: Path) -> list[Allocation]:
    """Read an `allocations` artifact."""
    document = json.loads((folder / "allocations.json").read_text(encoding="utf-8"))
    return [Allocation(**entry | {"genome": tuple(entry["genome"])}) for entry in document]


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
