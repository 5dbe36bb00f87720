"""`compress`: the database of levels, one task per unit, all its levels of a method from one factorisation.

A unit whose weights, statistics or levels are not finite loses those levels and says so in the store; the run goes on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import Field, field_validator

from layerwise.errors import NotFinite
from layerwise.stages.compress import MenuEntry, compressor_names, find_compressor
from layerwise.stages.contract import Context, ModelSource, Params, Port, Row, Stage

ENTRY_TYPES = tuple(find_compressor(name).params for name in compressor_names())
AnyEntry: Any = Annotated[Union[ENTRY_TYPES], Field(discriminator="method")]  # noqa: UP007 (made at run time)


class CompressParams(Params):
    """The menu: which levels every unit gets."""

    menu: list[AnyEntry] = Field(min_length=1, description="one entry per method, with `method` and its parameters")

    @field_validator("menu")
    @classmethod
    def _distinct(cls, menu: list[MenuEntry]) -> list[MenuEntry]:
        names = [name for entry in menu for name in entry.level_names()]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"makes level {twice[0]} twice; remove one of the entries")
        return menu

    def material(self) -> dict[str, Any]:
        """With the implementation number of each method."""
        return {"menu": [entry.material() | {"impl": entry.impl} for entry in self.menu]}


def compress(context: Context, params: CompressParams) -> None:
    """Write every level of every unit, and the index."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.levels.database import write_index

    statistics = Statistics(context.input("statistics"))
    work = partial(
        _compress_unit,
        model=context.model,
        statistics=context.input("statistics"),
        menu=params.menu,
        folder=context.items,
    )
    units = statistics.units
    entries = context.executor.map(work, units, keys=[unit["name"] for unit in units], note="units")
    write_index(context.out, entries, rest_bytes=statistics.index["rest_bytes"])
    _take_over(context.items / "units", context.out / "units")
    context.record("levels", [_row(entry, level) for entry in entries for level in entry["levels"]])


def _take_over(finished: Path, target: Path) -> None:
    """Link the units' files into the artifact; an interrupted stage still finds them where they were."""
    target.mkdir()
    for file in sorted(finished.glob("*.safetensors")):
        (target / file.name).hardlink_to(file)


def _compress_unit(
    unit: dict[str, Any], *, model: ModelSource, statistics: Path, menu: list[MenuEntry], folder: Path
) -> dict[str, Any]:
    """Write all levels of one unit; gives its entry in the index."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.levels.database import describe_failure, describe_levels, write_unit
    from layerwise.stages.models.checkpoint import Checkpoint

    stored = Checkpoint(model.path).read(unit["tensor"])
    weight = stored.T if unit["transposed"] else stored
    hessian = Statistics(statistics).hessian(unit)
    levels, entries = [], []
    for entry in menu:
        try:
            made = find_compressor(entry.method).run(weight, hessian, entry)
            entries += describe_levels(made, weight, hessian)
            levels += made
        except NotFinite as error:
            entries += [describe_failure(name, error.message) for name in entry.level_names()]
    write_unit(folder, unit["name"], levels)
    facts = {name: unit[name] for name in ("kind", "block", "shape", "group", "tensor", "transposed")}
    return {"unit": unit["name"], **facts, "levels": entries}


def _row(unit: dict[str, Any], level: dict[str, Any]) -> Row:
    recipe = level["recipe"] or {}
    return {
        "unit": unit["unit"],
        **{name: level[name] for name in ("level", "bits", "effective_bits", "size_bytes", "status", "error")},
        **{name: level[name] for name in ("weight_nmse", "output_error")},
        **{name: recipe.get(name) for name in ("method", "group_size", "sym", "desc_act")},
        "damp_percent": recipe.get("damp_percent_used"),
    }


STAGE = Stage("compress", CompressParams, compress, gives="database", takes={"statistics": Port("statistics")})
