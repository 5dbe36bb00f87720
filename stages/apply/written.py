"""An allocation written as a `model` artifact, its levels encoded as the database has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.stages.allocate.allocation import Allocation
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import UNCHANGED

if TYPE_CHECKING:
    from layerwise.stages.levels.database import Database
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.compressed import CompressedUnit


def write_model(
    allocation: Allocation,
    *,
    workflow: ModelSource,
    database: Path,
    out: Path,
    packed: bool = False,
    instead: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a model.

    Args:
        instead: a folder with levels in the place of the database's, of some units.
        about: what the document says beside the allocation.
    """
    from layerwise.stages.apply.packed import save_packed
    from layerwise.stages.levels.database import MODEL, Database
    from layerwise.stages.levels.files import open_unit, read_level, unit_file, write_unit
    from layerwise.stages.models.compressed import BASE, Document, adopt_base

    def other(unit: str) -> Level | None:
        if instead is None or not unit_file(instead, unit).is_file():
            return None
        return read_level(*open_unit(instead, unit), allocation.levels[unit])

    levels = Database(database, workflow)
    units = []
    for entry, level in _levels(levels, allocation, workflow):
        write_unit(out, entry.unit.name, [other(entry.unit.name) or level])
        units.append(entry)
    if packed:
        save_packed(out, levels, levels.index.with_inside(allocation.levels), other)
    adopt_base(database / MODEL / BASE, out / BASE)
    Document(tuple(units), {"allocation": asdict(allocation), **(about or {})}).save(out)


def _levels(
    database: Database, allocation: Allocation, workflow: ModelSource
) -> Iterator[tuple[CompressedUnit, Level]]:
    """What the model holds encoded, one unit after another: its own levels, and those that it was made of before."""
    from layerwise.stages.models.compressed import CompressedModel, CompressedUnit

    source = database.model(workflow)
    before = None if source.compressed is None else CompressedModel(source.compressed)
    gone: set[str] = set()
    chosen = database.index.with_inside(allocation.levels)
    for entry in database.units:
        name = chosen.get(entry.name)
        if name is None or (entry.is_parent and name == entry.levels[UNCHANGED].name):
            continue  # inside of what is dropped, or a parent that stays
        if entry.is_parent and database.index.inside(entry.name, name):
            continue  # it says what the units inside have
        level = database.level(entry.name, name)
        if entry.is_parent:
            gone.add(entry.name)
        if level.recipe["encoding"] != "dense":
            yield CompressedUnit(entry.unit, entry.stored, name), level
    if before is None:
        return
    there = set(chosen) - gone
    carried = {unit for unit, parent in database.index.carried.items() if parent is None or parent in there}
    for made in before.document.units:
        if made.unit.is_parent or made.unit.name in carried:
            yield made, before.level(made.unit.name)
