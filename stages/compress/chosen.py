"""What is compressed: the units and parents of a model that get levels, and what everything beside them uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel, UsageError
from layerwise.stages.compress.params import CompressParams
from layerwise.stages.contract import Context, ModelSource
from layerwise.stages.models.network import Unit, select_units
from layerwise.stages.models.selection import is_large, left_alone

if TYPE_CHECKING:
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.levels.database import LevelEntry, UnitEntry
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.stored import Stored
    from layerwise.stages.models.survey import Survey


@dataclass(frozen=True)
class Chosen:
    """What is compressed.

    Args:
        source: the model.
        folder: its artifact, if it is not the workflow's model.
        survey: of it.
        units: those that get levels, with their place in the checkpoint.
        parents: the same; they have no weight.
        statistics: the artifact, if there is one.
        counts: calibration tokens that reached each unit.
    """

    source: ModelSource
    folder: Path | None
    survey: Survey
    units: list[tuple[Unit, Stored]]
    parents: list[Unit]
    statistics: Path | None
    counts: Mapping[str, int]

    @cached_property
    def places(self) -> dict[str, Stored]:
        """Where the units' weights stand."""
        return {unit.name: stored for unit, stored in self.units}

    @property
    def in_order(self) -> list[Unit]:
        """All that get levels, in the order of a genome: by first use, a parent before what is in it.

        A unit's parent is the innermost of those that get levels themselves.
        """
        found = [*self.parents, *(unit for unit, _ in self.units)]
        found.sort(key=lambda unit: (unit.positions[0], not unit.is_parent))
        return [replace(unit, parent=self.innermost(unit)) for unit in found]

    @property
    def given(self) -> set[str]:
        """Names of the parents."""
        return {parent.name for parent in self.parents}

    def innermost(self, unit: Unit) -> str | None:
        """The innermost parent with levels that a unit is in."""
        return self.survey.innermost(unit.parent, self.given)

    @cached_property
    def others(self) -> dict[str, Unit]:
        """Units that get no levels."""
        wanted = {unit.name for unit, _ in self.units}
        return {unit.name: unit for unit, _ in self.survey.units if unit.name not in wanted}

    @cached_property
    def carried(self) -> dict[str, Level]:
        """Of those, the ones that were compressed before: what the model has of them."""
        from layerwise.stages.models.compressed import CompressedModel

        if self.source.compressed is None:
            return {}
        model = CompressedModel(self.source.compressed)
        return {name: model.level(name) for name in model.levels if name in self.others}

    def item(self, unit: Unit) -> dict[str, Any]:
        """What a worker needs to know of a unit."""
        stored = self.places.get(unit.name)
        count = (
            self.counts.get(unit.name, 0)
            if stored is not None and unit.multiplied and self.statistics is not None
            else None
        )
        return {
            "unit": unit.as_json(),
            "stored": None if stored is None else stored.as_json(),
            "tokens": count,
        }


def choose(context: Context, params: CompressParams) -> Chosen:
    from layerwise.stages.calibrate.statistics import MODEL, Statistics
    from layerwise.stages.models.compressed import model_of
    from layerwise.stages.models.survey import Survey, survey_model

    folder = context.optional("statistics")
    statistics = None if folder is None else Statistics(folder)
    if statistics is None:
        model, source = context.optional("model"), model_of(context, "model")
        (document,) = context.executor.map(survey_model, [source], keys=["survey"])
        survey, selected = Survey.from_json(document), None
        counts: Mapping[str, int] = {}
    else:
        source, survey = statistics.model(context.model), statistics.survey
        model = None if source == context.model else statistics.folder / MODEL
        selected, counts = statistics.selected, statistics.counts
        _check_gathered(params, statistics)
    units = [unit for unit, _ in survey.units]
    if params.targets is not None or selected is None:
        units = select_units(units, params.targets or (), params.ignore, survey.uncovered)
    else:
        kept = select_units(
            units, ["re:"], params.ignore, survey.uncovered
        )  # it may name what was not calibrated either
        units = [unit for unit in kept if unit.name in selected]
        if not units:
            raise UsageError(f"no unit is left: of those with statistics all are ignored by {params.ignore}")
    wanted = {unit.name for unit in units}
    if statistics is not None and params.needs_statistics:
        _check_calibrated(wanted - set(statistics.selected))
    chosen = [(unit, stored) for unit, stored in survey.units if unit.name in wanted]
    parents = _parents(params, survey)
    note = left_alone(survey, wanted)
    if note is not None and is_large(source):  # of others it was told before the run
        context.progress(0, len(chosen), f"units; {note}")
    return Chosen(source, model, survey, chosen, parents, folder, counts)


def _check_gathered(params: CompressParams, statistics: Statistics) -> None:
    missing = [name for name in params.needs_statistics if name not in statistics.gathered]
    if missing:
        raise UsageError(
            f"the menu needs {', '.join(missing)}, but the statistics have only "
            f"{', '.join(statistics.gathered) or 'nothing'}",
            hint="add it to `statistics` of the calibrate stage, or leave that key out",
        )


def _check_calibrated(missing: set[str]) -> None:
    if missing:
        raise UsageError(
            f"the menu needs statistics, but {len(missing)} of its units were not calibrated, the first is "
            f"{min(missing)}",
            hint="give the calibrate stage the same `targets`, or leave them out here",
        )


def _parents(params: CompressParams, survey: Survey) -> list[Unit]:
    """The parents that the menu makes levels for.

    Raises:
        UnsupportedModel: no block has such a parent; says why.
    """
    roles = params.parent_roles
    found = [parent for parent in survey.parents if parent.role in roles]
    missing = sorted(roles - {parent.role for parent in found})
    if missing:
        why = f": {next(iter(survey.one_piece.values()))}" if survey.one_piece else ""
        raise UnsupportedModel(
            f"the menu drops or narrows {' and '.join(missing)}, but the blocks of this model have no such part{why}",
            hint="whole blocks can be dropped in any model: `units: [block]`",
        )
    return found


Amounts = dict[str, float]
"""By resource."""


def beside_levels(chosen: Chosen) -> dict[str | None, Amounts]:
    """What everything uses that gets no level: by the innermost parent with levels that it is in, None for the rest."""
    known = [*(unit for unit, _ in chosen.units), *(chosen.others[name] for name in chosen.carried)]
    beside: dict[str | None, Amounts] = {
        parent: {"bytes": size_bytes, "parameters": parameters, "flops": 0.0}
        for parent, (size_bytes, parameters) in chosen.survey.left(known, chosen.parents).items()
    }
    for name, unit in chosen.others.items():
        own, level = beside[chosen.innermost(unit)], chosen.carried.get(name)
        if level is not None:
            own["bytes"] += level.size_bytes
            own["parameters"] += level.parameters
        if unit.role != "embedding":
            own["flops"] += 2 * unit.share * (unit.n_weights if level is None else level.parameters)
    # A block that can be dropped is one of the blocks that are run; where its halves can be, too, each is half of it.
    halves = Counter(parent.parent for parent in chosen.parents if parent.role != "block")
    for parent in chosen.parents:
        beside[parent.name]["depth"] = 1 - halves[parent.name] / 2 if parent.role == "block" else 0.5
    n_blocks = sum(parent.role == "block" for parent in chosen.survey.parents)
    beside[None]["depth"] = n_blocks - sum(beside[parent.name]["depth"] for parent in chosen.parents)
    return beside


def with_own_costs(entries: Sequence[UnitEntry], beside: Mapping[str | None, Amounts]) -> list[UnitEntry]:
    """A parent pays for what is in it and has no level: its norms and biases, unless it is dropped.

    One that is narrowed also pays for what it leaves of its units. Its biases it keeps whole, for the formats that pack
    levels store them so; a smaller dense model has fewer.
    """
    known = {entry.name: entry for entry in entries}
    inside: dict[str, list[str]] = {}
    for entry in entries:
        if entry.unit.parent is not None:
            inside.setdefault(entry.unit.parent, []).append(entry.name)

    def own(entry: UnitEntry, level: LevelEntry) -> LevelEntry:
        encoding = None if level.recipe is None or level.costs is None else level.recipe["encoding"]
        if encoding not in ("keep", "narrow"):
            return level
        assert level.costs is not None
        costs = {**level.costs, **beside[entry.name]}
        if encoding == "narrow":
            for child in inside[entry.name]:
                for one in known[child].levels:
                    if one.name == level.name and one.costs is not None:
                        costs = {name: amount + one.costs[name] for name, amount in costs.items()}
        return replace(level, costs=costs)

    return [
        replace(entry, levels=tuple(own(entry, level) for level in entry.levels)) if entry.is_parent else entry
        for entry in entries
    ]
