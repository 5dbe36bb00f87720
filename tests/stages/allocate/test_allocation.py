"""Allocations as they go from stage to stage: named, saved, and bound to the database that they choose from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import check_database, load_allocations, make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.levels.database import DatabaseIndex, LevelEntry, UnitEntry, write_index
from layerwise.stages.models.network import Role, Unit

FREE = dict.fromkeys(("bits", "effective_bits", "bytes", "parameters", "flops"), 0.0)


def entry(name: str, role: Role, levels: dict[str, float], parent: str | None = None) -> UnitEntry:
    """A unit with the bits of each of its levels."""
    shape = (0, 0) if role in ("block", "attention") else (10, 10)
    made = [
        LevelEntry(level, {"encoding": level}, {**FREE, "bits": bits, "bytes": bits / 8})
        for level, bits in levels.items()
    ]
    return UnitEntry(Unit(name, name, role, 0, shape, (0,), parent=parent), None, tuple(made))


UNITS = [
    entry("attn", "attention", {"keep": 8.0, "drop": 0.0}),
    entry("q", "linear", {"dense": 3200.0, "grid": 400.0}, "attn"),
    entry("up", "linear", {"dense": 3200.0, "grid": 400.0}),
]


@pytest.fixture
def table(tmp_path: Path) -> CostTable:
    write_index(tmp_path, UNITS, {"bytes": 100})
    return CostTable(DatabaseIndex(tmp_path))


def test_an_allocation_names_the_levels_of_what_is_there_and_says_its_sizes(table: CostTable) -> None:
    whole = make_allocation(table, [0, 1, 0], solver="ilp", budget={"bits": 18.0, "bytes": 2000})
    assert whole.levels == {"attn": "keep", "q": "grid", "up": "dense"}
    assert whole.budget == "bits=18,bytes=2000"
    assert whole.genome == (0, 1, 0)
    assert whole.sizes == {
        "bits": 3608 / 200,
        "effective_bits": 0,
        "bytes": 551,
        "parameters": 0,
        "flops": 0,
    }
    dropped = make_allocation(table, [1, 1, 1], solver="ilp", budget={"bits": 3})
    assert dropped.levels == {"attn": "drop", "up": "grid"}
    assert dropped.genome == (1, 0, 1), "what is not there has one level, so one model has one id"
    assert dropped.candidate == table.candidate([1, 0, 1]) != whole.candidate


def test_allocations_come_back_as_they_were_saved(table: CostTable, tmp_path: Path) -> None:
    plain = make_allocation(table, [0, 1, 1], solver="ilp", budget={"bits": 3})
    saved = [replace(plain, kl=0.1 + 0.2, perplexity=None), plain]
    save_allocations(tmp_path, saved)
    assert load_allocations(tmp_path) == saved


def test_allocations_of_another_database_are_refused(table: CostTable, tmp_path: Path) -> None:
    allocation = make_allocation(table, [1, 0, 1], solver="ilp", budget={"bits": 3})
    check_database([allocation], table.index)
    (tmp_path / "other").mkdir()
    write_index(tmp_path / "other", UNITS, {"bytes": 101})
    with pytest.raises(UsageError, match=f"{allocation.candidate} was made with another database"):
        check_database([allocation], DatabaseIndex(tmp_path / "other"))
