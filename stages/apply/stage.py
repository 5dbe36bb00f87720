"""`apply`: turns one allocation into a compressed model, and on request lays it out for kernels (`packed.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layerwise.stages.allocate.allocation import Allocation, check_database, load_allocations
from layerwise.stages.apply.pick import PICK, pick
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.stages.levels.database import UNCHANGED, DatabaseIndex

if TYPE_CHECKING:
    from layerwise.stages.levels.database import Database
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.compressed import CompressedUnit


class ApplyParams(Params):
    """Which allocation to take."""

    pick: str = Field("knee", description=PICK)
    packed: bool = Field(
        False, description="also write the weights as kernels take them: a model that runs on them can be loaded"
    )

    def material(self) -> dict[str, Any]:
        """Without `packed` where it changes nothing."""
        return self.model_dump(mode="json", exclude=set() if self.packed else {"packed"})


def apply(context: Context, params: ApplyParams) -> None:
    """Write a `model` artifact (`layerwise.stages.models.compressed`); with `packed` also its packed form.

    Raises:
        UsageError: nothing fits `pick`, or the database is not that of the allocations.
    """
    allocation = pick(load_allocations(context.input("allocations")), params.pick)
    check_database([allocation], DatabaseIndex(context.input("database")))
    write = partial(
        _write_model,
        workflow=context.model,
        database=context.input("database"),
        out=context.out,
        packed=params.packed,
    )
    context.executor.map(write, [allocation], note="models")


def _write_model(allocation: Allocation, *, workflow: ModelSource, database: Path, out: Path, packed: bool) -> None:
    from layerwise.stages.apply.packed import save_packed
    from layerwise.stages.levels.database import MODEL, Database
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.models.compressed import BASE, Document, adopt_base

    levels = Database(database, workflow)
    units = []
    for entry, level in _levels(levels, allocation, workflow):
        write_unit(out, entry.unit.name, [level])
        units.append(entry)
    if packed:
        save_packed(out, levels, allocation.levels)
    adopt_base(database / MODEL / BASE, out / BASE)
    Document(tuple(units), {"allocation": asdict(allocation)}).save(out)


def _levels(
    database: Database, allocation: Allocation, workflow: ModelSource
) -> Iterator[tuple[CompressedUnit, Level]]:
    """What the model holds encoded, one unit after another: its own levels, and those that it was made of before."""
    from layerwise.stages.models.compressed import CompressedModel, CompressedUnit

    source = database.model(workflow)
    before = None if source.compressed is None else CompressedModel(source.compressed)
    gone: set[str] = set()
    for entry in database.units:
        name = allocation.levels.get(entry.name)
        if name is None or (entry.is_parent and name == entry.levels[UNCHANGED].name):
            continue  # inside of what is dropped, or a parent that stays
        level = database.level(entry.name, name)
        if entry.is_parent:
            gone.add(entry.name)
        if level.recipe["encoding"] != "dense":
            yield CompressedUnit(entry.unit, entry.stored, name), level
    if before is None:
        return
    there = set(allocation.levels) - gone
    carried = {unit for unit, parent in database.index.carried.items() if parent is None or parent in there}
    for made in before.document.units:
        if made.unit.is_parent or made.unit.name in carried:
            yield made, before.level(made.unit.name)


STAGE = Stage(
    "apply",
    ApplyParams,
    apply,
    gives="model",
    takes={"allocations": Port("allocations"), "database": Port("database")},
)
