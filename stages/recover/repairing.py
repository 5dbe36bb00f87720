"""A compressed model, repaired by one method after another, each of which leaves a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.stages.contract import Context
from layerwise.stages.recover.by_parameters import fit_parameters
from layerwise.stages.recover.by_unit import repair_units
from layerwise.stages.recover.texts import Text
from layerwise.stages.recover.trained import HISTORY, train

if TYPE_CHECKING:
    from layerwise.stages.models.compressed import CompressedUnit, Document
    from layerwise.stages.recover import RepairEntry
    from layerwise.stages.recover.params import RecoverParams


def repaired(context: Context, params: RecoverParams, folder: Path, text: Text | None, mark: str = "") -> Path:
    """Make all repairs of a model; gives the folder of what comes of it, a `model` artifact below `Context.items`.

    Args:
        context: of the stage; `statistics` is read from its inputs.
        folder: the model.
        text: that of `params.data`.
        mark: tells several models of one stage apart, in keys and in the names of folders.
    Raises:
        UsageError: the model has nothing that a method fits.
    """
    from layerwise.stages.models.compressed import Document

    recipes: Recipes
    (recipes,) = context.executor.map(recipes_of, [folder], keys=[f"{mark}recipes"])
    for entry in params.repairs:  # all of them before any work
        fitting_units(Document.load(folder), recipes, entry, params)
    for number in range(len(params.repairs)):
        folder, recipes = _repaired(context, params, folder, recipes, text, number, mark)
    return folder


def check_statistics(context: Context, folder: Path) -> None:
    """Refuse statistics of a model that is neither the one that was compressed nor what came of it.

    Raises:
        UsageError: they are of another.
    """
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

    if not entry.of_units:
        return [], {}
    weights = [made for made in document.units if not made.unit.is_parent]
    if not weights:
        raise UsageError(
            "no unit of the model is compressed, so there is nothing to repair",
            hint="give the model of an `apply` stage, of an allocation that is not dense",
        )
    meant = {
        unit.name for unit in select_units([made.unit for made in weights], params.targets or ["re:"], params.ignore)
    }
    reasons = {name: entry.misfit_of(made.unit, recipes[name]) for made in weights if (name := made.unit.name) in meant}
    misfits = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(misfits) == len(reasons):
        name, reason = next(iter(misfits.items()))
        raise UsageError(
            f"{entry.method} fits none of the {len(misfits)} levels: {name}: {reason}",
            hint="choose another method, or levels that it fits",
        )
    return [made for made in weights if made.unit.name in meant - set(misfits)], misfits


def _repaired(
    context: Context,
    params: RecoverParams,
    folder: Path,
    recipes: Recipes,
    text: Text | None,
    number: int,
    mark: str,
) -> tuple[Path, Recipes]:
    """One repair made, as a whole model in a folder of its own."""
    from layerwise.stages.levels.files import unit_file
    from layerwise.stages.models.compressed import BASE, Document

    entry, key = params.repairs[number], f"{mark}{number}"
    out = context.items / f"repair-{key}"
    document = Document.load(folder)
    chosen, misfits = fitting_units(document, recipes, entry, params)
    if entry.scope == "unit":
        levels = repair_units(context, entry, folder, chosen, key, out)
    elif entry.scope == "parameters":
        assert text is not None, "parameters name a text where a repair reads one"
        levels = fit_parameters(context, entry, folder, text, key, out)
    else:
        assert text is not None, "parameters name a text where a repair reads one"
        levels = train(context, entry, folder, [made.unit for made in chosen], text, key, out)
    out.mkdir(exist_ok=True)
    for made in document.units:
        if made.unit.name not in levels:
            _take_over(unit_file(folder, made.unit.name), unit_file(out, made.unit.name))
    _take_over(folder / HISTORY, out / HISTORY)
    if entry.of_units:  # else it has written a base of its own
        for file in sorted((folder / BASE).rglob("*")):
            _take_over(file, out / BASE / file.relative_to(folder / BASE))
    units = tuple(
        replace(made, level=levels[made.unit.name]["level"]) if made.unit.name in levels else made
        for made in document.units
    )
    about = dict(document.about)
    Document(units, about | {"repairs": [*about.get("repairs", ()), entry.name]}).save(out)
    left = [{"repair": entry.name, "unit": unit, "status": "left", "error": why} for unit, why in misfits.items()]
    context.record("recovery", left)
    return out, {**recipes, **{unit: answer["recipe"] for unit, answer in levels.items()}}


def _take_over(file: Path, target: Path) -> None:
    """What a repair has not made anew."""
    from layerwise.stages.models.compressed import link_or_copy

    if file.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, target)
