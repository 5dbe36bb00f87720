"""`apply`: turns one allocation into a compressed model; on request its levels are made again for the inputs that they
will get (`remade.py`), and laid out for kernels (`packed.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from layerwise.stages.allocate.allocation import Allocation, check_database, load_allocations
from layerwise.stages.apply.pick import PICK, misfit, pick
from layerwise.stages.apply.remade import RESIDUAL, remake
from layerwise.stages.compress import compressor_names, find_compressor
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.stages.levels.database import UNCHANGED, DatabaseIndex
from layerwise.stages.quantities import Count

if TYPE_CHECKING:
    from layerwise.stages.levels.database import Database
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.compressed import CompressedUnit


TEXT = "calibration"
"""The text that levels are made again with, if none is named."""


def picks(params: ApplyParams, feeding: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """As `contract.Check`: a `pick` that can fit none of the allocations to come."""
    wrong = misfit(params.pick, feeding.get("allocations", ()))
    if wrong is not None:
        yield ("pick",), wrong


class ApplyParams(Params):
    """Which allocation to take, and whether to make its levels again."""

    pick: str = Field("knee", description=PICK)
    packed: bool = Field(
        False, description="also write the weights as kernels take them: a model that runs on them can be loaded"
    )
    remake: bool = Field(
        False,
        strict=True,
        description="make the levels again, block by block, for the inputs that the compressed blocks before leave; of "
        "the two models the one with less KL is written",
    )
    data: str | None = Field(
        None,
        description="the text that levels are made again with, by its name in the workflow's data section; "
        "calibration, if left out. Every eighth sequence is set aside for the choice of blocks",
    )
    judge: str | None = Field(
        None,
        description="the text on which both models are compared; the sequences of `data` that were set aside, if left "
        "out",
    )
    tokens: Count = Field(256 << 10, description="of `data`, to make levels again with, at most")
    residual: float = Field(
        RESIDUAL,
        ge=0,
        le=1,
        description="share of the error of its inputs that a layer makes up for, beside keeping its own small",
    )

    steps: int = Field(
        0,
        ge=0,
        description="of gradient descent before each step of a block, by which its weights that are still to be "
        "compressed make up for those that are; 50 go further than `residual`, and take about as long as learned "
        "rounding of 200",
    )

    @model_validator(mode="before")
    @classmethod
    def _on_calibration_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("remake") is True and given.get("data") is None:
            return {**given, "data": TEXT}
        return given

    @model_validator(mode="after")
    def _only_with_remake(self) -> Self:
        fields = type(self).model_fields
        in_vain = [name for name in _OF_REMAKE if getattr(self, name) != fields[name].default and not self.remake]
        if in_vain:
            raise ValueError(f"{in_vain[0]} says how levels are made again: add remake: true")
        if self.judge is not None and self.judge == self.data:
            raise ValueError(
                "judge is the text that levels are made again with; leave it out, and what is set aside judges"
            )
        return self

    def material(self) -> dict[str, Any]:
        """Without what changes nothing."""
        idle = {"packed"} if not self.packed else set()
        return self.model_dump(mode="json", exclude=idle if self.remake else {*idle, "remake", *_OF_REMAKE})

    def sources(self) -> Iterable[str]:
        """The modules of all methods, for any may have made the levels."""
        return [find_compressor(name).run.__module__ for name in compressor_names()] if self.remake else ()


_OF_REMAKE = ("data", "judge", "tokens", "residual", "steps")
"""Parameters that say nothing without `remake`."""


def apply(context: Context, params: ApplyParams) -> None:
    """Write a `model` artifact (`layerwise.stages.models.compressed`); with `packed` also its packed form.

    Raises:
        UsageError: nothing fits `pick`, or the database is not that of the allocations.
        DataError: with `remake`, not enough text.
    """
    allocation = pick(load_allocations(context.input("allocations")), params.pick)
    check_database([allocation], DatabaseIndex(context.input("database")))
    write = partial(_write_model, workflow=context.model, database=context.input("database"), packed=params.packed)
    if params.remake:
        remake(context, params, allocation, write)
    else:
        context.executor.map(partial(write, out=context.out), [allocation], note="models")


def _write_model(
    allocation: Allocation,
    *,
    workflow: ModelSource,
    database: Path,
    out: Path,
    packed: bool,
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


STAGE = Stage(
    "apply",
    ApplyParams,
    apply,
    gives="model",
    takes={"allocations": Port("allocations"), "database": Port("database")},
    data=("data", "judge"),
    any_network=lambda params: not params.packed and not params.remake,
    on_gpu=lambda params: params.remake,
    check=picks,
)
