"""Repairs of scope `unit`, as the stage makes them: unit by unit, on all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.stages.contract import Context, ModelSource, Row

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.models.compressed import CompressedUnit
    from layerwise.stages.recover import RepairEntry


def repair_units(
    context: Context, entry: RepairEntry, folder: Path, chosen: Sequence[CompressedUnit], key: str, out: Path
) -> dict[str, dict[str, Any]]:
    """Repair some units and write their files.

    Args:
        context: the stage's.
        folder: the model to be repaired.
        chosen: the units.
        key: of the repair, at the start of those of its items.
        out: gets the files.
    Returns:
        by unit, `level` and `recipe` of what it has now.
    """
    from layerwise.stages.models.compressed import source_of

    source = source_of(folder, context.model)
    statistics = context.optional("statistics")
    work = partial(repair_unit, entry=entry, folder=folder, source=source, statistics=statistics, out=out)
    keys = [f"{key}-{made.unit.name}" for made in chosen]
    answers = context.executor.map(work, [made.as_json() for made in chosen], keys=keys, note="units")
    levels = {made.unit.name: answer for made, answer in zip(chosen, answers, strict=True)}
    context.record("recovery", _rows(entry, levels))
    return levels


def repair_unit(
    item: Mapping[str, Any],
    *,
    entry: RepairEntry,
    folder: Path,
    source: ModelSource,
    statistics: Path | None,
    out: Path,
) -> dict[str, Any]:
    """Repair one unit and write its level; gives the level's name and recipe, and what is known of both, as JSON."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.levels.database import describe_levels
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.models.checkpoint import Checkpoint
    from layerwise.stages.models.compressed import CompressedModel, CompressedUnit
    from layerwise.stages.recover import UnitRepair, find_repair

    made = CompressedUnit.from_json(item)
    unit, stored = made.unit, made.stored
    assert stored is not None, "a parent has no weight"
    known = None if statistics is None else Statistics(statistics)

    def statistic(name: str) -> Tensor:
        assert known is not None, "checked before the work starts"
        return known.tensor(unit, name).to(source.device)

    weight = stored.read(Checkpoint(source.path, source.trust)).to(source.device)
    before = CompressedModel(folder).level(unit.name).to(source.device)
    after = find_repair(entry.method).run(UnitRepair(unit, before, weight, statistic), entry)
    write_unit(out, unit.name, [after])
    hessian = statistic("hessian") if known is not None and _calibrated(known, unit.name) else None
    described = describe_levels([replace(before, name="before"), replace(after, name="after")], weight, hessian)
    figures = [
        {"weight_nmse": one.weight_nmse, "output_error": one.output_error, **(one.costs or {})} for one in described
    ]
    return {"level": after.name, "recipe": dict(after.recipe), "n_weights": unit.n_weights, "figures": figures}


def _calibrated(statistics: Statistics, unit: str) -> bool:
    return "hessian" in statistics.gathered and unit in statistics.selected and statistics.counts.get(unit) != 0


FIGURES = ("weight_nmse", "output_error", "bytes", "effective_bits")
"""What is told of every unit before and after."""


def _rows(entry: RepairEntry, levels: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows of the `recovery` table: of every unit, then of all together (`unit` is NULL), before (step 0) and after."""
    rows: list[Row] = []
    for unit, answer in levels.items():
        for step, figures in enumerate(answer["figures"]):
            for metric in FIGURES:
                value = figures[metric]
                if value is not None:
                    value = value / answer["n_weights"] if metric == "effective_bits" else value
                    rows.append(_row(entry, unit, step, metric, value))
    weights = sum(answer["n_weights"] for answer in levels.values())
    for step in (0, 1):
        total = {metric: sum(answer["figures"][step][metric] for answer in levels.values()) for metric in FIGURES[2:]}
        rows.append(_row(entry, None, step, "bytes", total["bytes"]))
        rows.append(_row(entry, None, step, "effective_bits", total["effective_bits"] / max(1, weights)))
    return rows


def _row(entry: RepairEntry, unit: str | None, step: int, metric: str, value: float) -> Row:
    return {"repair": entry.name, "unit": unit, "step": step, "metric": metric, "value": value, "status": "ok"}
