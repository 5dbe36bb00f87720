"""`recover`: a compressed model repaired, as a `model` artifact whose levels are still encoded.

Repairs are made one after another; each leaves a whole model in `Context.items`, so that an interrupted stage goes on
with the one that it was at. What does not fit a method stays as it is and is told in the store; a method that fits
nothing is refused before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.stages.contract import Context, ModelSource, Port, Row, Stage, always
from layerwise.stages.recover.params import RecoverParams, mistakes

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.models.compressed import CompressedUnit, Document
    from layerwise.stages.recover import RepairEntry


def recover(context: Context, params: RecoverParams) -> None:
    """Write a `model` artifact (`layerwise.stages.models.compressed`).

    Raises:
        UsageError: the model has nothing that a method fits, or the statistics are not of it.
    """
    from layerwise.stages.models.compressed import Document, adopt

    folder = context.input("model")
    _check_statistics(context, folder)
    recipes: Recipes
    (recipes,) = context.executor.map(recipes_of, [folder], keys=["recipes"])
    for entry in params.repairs:  # all of them before any work
        fitting_units(Document.load(folder), recipes, entry, params)
    for number in range(len(params.repairs)):
        folder, recipes = _repaired(context, params, folder, recipes, number)
    adopt(folder, context.out)


def _check_statistics(context: Context, folder: Path) -> None:
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.models.compressed import source_of

    given = context.optional("statistics")
    if given is None:
        return
    own = source_of(folder, context.model).path == context.model.path
    if own != (Statistics(given).model(context.model).path == context.model.path):
        raise UsageError(
            "the statistics are of another model than the one that was compressed",
            hint="calibrate the model that `compress` was given, or the compressed one",
        )


Recipes = Mapping[str, Mapping[str, Any]]
"""Of the levels of a model, by unit."""


def recipes_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The recipes of a model's levels, by unit."""
    from layerwise.stages.models.compressed import CompressedModel

    model = CompressedModel(folder)
    return {unit: dict(model.recipe(unit)) for unit in model.levels}


def fitting_units(
    document: Document, recipes: Recipes, entry: RepairEntry, params: RecoverParams
) -> tuple[list[CompressedUnit], dict[str, str]]:
    """The compressed units that a repair is made of, and those that are meant but do not fit it, with the reason.

    Args:
        document: of the model.
        recipes: of its levels.
    Raises:
        UsageError: none fits.
        UnsupportedModel: `targets` or `ignore` name nothing.
    """
    from layerwise.stages.models.network import select_units

    weights = [made for made in document.units if not made.unit.is_parent]
    if not weights:
        raise UsageError(
            "no unit of the model is compressed, so there is nothing to repair",
            hint="give the model of an `apply` stage, of an allocation that is not dense",
        )
    meant = {
        unit.name for unit in select_units([made.unit for made in weights], params.targets or ["re:"], params.ignore)
    }
    reasons = {name: entry.misfit(recipes[name]) for made in weights if (name := made.unit.name) in meant}
    misfits = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(misfits) == len(reasons):
        name, reason = next(iter(misfits.items()))
        raise UsageError(
            f"{entry.method} fits none of the {len(misfits)} levels: {name}: {reason}",
            hint="choose another method, or levels that it fits",
        )
    return [made for made in weights if made.unit.name in meant - set(misfits)], misfits


def _repaired(
    context: Context, params: RecoverParams, folder: Path, recipes: Recipes, number: int
) -> tuple[Path, Recipes]:
    """One repair made, as a whole model in a folder of its own."""
    from layerwise.stages.models.compressed import BASE, Document, adopt_base, source_of

    entry, out = params.repairs[number], context.items / f"repair-{number}"
    document = Document.load(folder)
    chosen, misfits = fitting_units(document, recipes, entry, params)
    work = partial(
        repair_unit,
        entry=entry,
        folder=folder,
        source=source_of(folder, context.model),
        statistics=context.optional("statistics"),
        out=out,
    )
    keys = [f"{number}-{made.unit.name}" for made in chosen]
    answers = context.executor.map(work, [made.as_json() for made in chosen], keys=keys, note="units")
    levels = {made.unit.name: answer for made, answer in zip(chosen, answers, strict=True)}
    out.mkdir(exist_ok=True)
    for made in document.units:
        if made.unit.name not in levels:
            _take_over(folder, out, made.unit.name)
    if not (out / BASE).exists():
        adopt_base(folder / BASE, out / BASE)
    units = tuple(
        replace(made, level=levels[made.unit.name]["level"]) if made.unit.name in levels else made
        for made in document.units
    )
    about = dict(document.about)
    Document(units, about | {"repairs": [*about.get("repairs", ()), entry.name]}).save(out)
    context.record("recovery", _rows(entry, levels, misfits))
    return out, {**recipes, **{unit: answer["recipe"] for unit, answer in levels.items()}}


def _take_over(folder: Path, out: Path, unit: str) -> None:
    from layerwise.stages.levels.files import unit_file
    from layerwise.stages.models.compressed import link_or_copy

    target = unit_file(out, unit)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        link_or_copy(unit_file(folder, unit), target)


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


def _rows(entry: RepairEntry, levels: Mapping[str, Mapping[str, Any]], misfits: Mapping[str, str]) -> list[Row]:
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
    left = [{"repair": entry.name, "unit": unit, "status": "left", "error": why} for unit, why in misfits.items()]
    return rows + left


def _row(entry: RepairEntry, unit: str | None, step: int, metric: str, value: float) -> Row:
    return {"repair": entry.name, "unit": unit, "step": step, "metric": metric, "value": value, "status": "ok"}


STAGE = Stage(
    "recover",
    RecoverParams,
    recover,
    gives="model",
    takes={"model": Port("model"), "statistics": Port("statistics", optional=True)},
    check=mistakes,
    on_gpu=always,
)
