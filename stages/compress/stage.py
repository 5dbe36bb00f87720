"""`compress`: the database of levels, one task per unit (or block), all its levels of a method from one factorisation.

A unit whose weights, statistics or levels are not finite loses those levels and says so in the store; the run goes on.
A unit that too few calibration tokens reached (an expert) gets them from the method's fallback, and says so too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.results.resources import RESOURCES
from layerwise.stages.compress.block_levels import compress_blocks
from layerwise.stages.compress.chosen import beside_levels, choose, with_own_costs
from layerwise.stages.compress.half_levels import compress_halves, noted_halves
from layerwise.stages.compress.params import CompressParams, mistakes
from layerwise.stages.compress.params import notes as noted_units
from layerwise.stages.compress.unit_levels import compress_unit
from layerwise.stages.contract import Context, ModelSource, Port, Row, Stage, always
from layerwise.stages.models.compressed import link_or_copy
from layerwise.stages.models.selection import unit_rows

if TYPE_CHECKING:
    from layerwise.stages.levels.database import LevelEntry, UnitEntry


def compress(context: Context, params: CompressParams) -> None:
    """Write every level of every unit, and the index.

    Raises:
        UnsupportedModel: no unit is chosen, or the menu drops or narrows parents that the model does not have, or none
            that can be narrowed.
        UsageError: a method needs statistics that were not gathered, or not of these units; a width that cannot be.
    """
    from layerwise.stages.levels.database import MODEL, UnitEntry, write_index
    from layerwise.stages.models.compressed import adopt

    chosen = choose(context, params)
    blocks = compress_blocks(context, params, chosen)
    halves = compress_halves(context, params, chosen)
    work = partial(
        compress_unit,
        source=chosen.source,
        statistics=chosen.statistics,
        params=params,
        blocks=blocks,
        halves=halves,
        folder=context.items,
    )
    units = chosen.in_order
    items = [chosen.item(unit) for unit in units]
    answers = context.executor.map(work, items, keys=[unit.name for unit in units], note="units")
    beside = beside_levels(chosen)
    entries = with_own_costs([UnitEntry.from_json(answer) for answer in answers], beside)
    carried = {name: chosen.innermost(chosen.others[name]) for name in chosen.carried}
    of_blocks, menu = chosen.survey.halves(chosen.given), [entry.model_dump(mode="json") for entry in params.menu]
    write_index(context.out, entries, beside[None], halves=of_blocks, carried=carried, menu=menu)
    _take_over(context.items / "units", context.out / "units")
    if chosen.folder is not None:
        adopt(chosen.folder, context.out / MODEL)
    context.record("levels", [_row(entry, level) for entry in entries for level in entry.levels])
    if chosen.statistics is None:
        context.record("units", unit_rows(chosen.survey, {unit.name for unit, _ in chosen.units}))


def _take_over(finished: Path, target: Path) -> None:
    """Link the units' files into the artifact; an interrupted stage still finds them where they were."""
    target.mkdir()
    for file in sorted(finished.glob("*.safetensors")):
        link_or_copy(file, target / file.name)


def _row(unit: UnitEntry, level: LevelEntry) -> Row:
    return {
        "unit": unit.name,
        "level": level.name,
        "method": None if level.recipe is None else level.recipe["method"],
        "recipe": None if level.recipe is None else json.dumps(dict(level.recipe), sort_keys=True),
        "offered": level.offered,
        "weight_nmse": level.weight_nmse,
        "output_error": level.output_error,
        "status": level.status,
        "error": level.error,
        **_costs(unit, level),
    }


def _costs(unit: UnitEntry, level: LevelEntry) -> dict[str, float]:
    """A level's share of every resource, as people read it."""
    if level.costs is None:
        return {}
    return {
        resource.level_column: level.costs[name] / max(1, unit.n_weights)
        if resource.per == "weight"
        else level.costs[name]
        for name, resource in RESOURCES.items()
        if resource.level_column is not None
    }


def notes(params: CompressParams, model: ModelSource) -> Iterator[str]:
    """What stays as it is, and what as wide as it is."""
    yield from noted_units(params, model)
    yield from noted_halves(params, model)


STAGE = Stage(
    "compress",
    CompressParams,
    compress,
    gives="database",
    takes={"statistics": Port("statistics", optional=True), "model": Port("model", optional=True)},
    check=mistakes,
    notes=notes,
    any_network=always,
    on_gpu=always,
)
