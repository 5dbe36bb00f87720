"""`compress`: the database of levels, one task per unit (or block), all its levels of a method from one factorisation.

A unit whose weights, statistics or levels are not finite loses those levels and says so in the store; the run goes on.
A unit that too few calibration tokens reached (an expert) gets them from the method's fallback, and says so too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, field_validator

from layerwise.errors import NotFinite, UnsupportedModel, UsageError
from layerwise.results.resources import RESOURCES
from layerwise.stages.compress import MenuEntry, Task, compressor_names, find_compressor
from layerwise.stages.contract import Context, ModelSource, Params, Port, Row, Stage
from layerwise.stages.models.network import Unit, select_units
from layerwise.stages.models.selection import Ignored, Targets, left_alone, unit_rows

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.levels.database import LevelEntry, UnitEntry
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.stored import Stored
    from layerwise.stages.models.survey import Survey

ENTRY_TYPES = tuple(find_compressor(name).params for name in compressor_names())
AnyEntry: Any = Annotated[Union[ENTRY_TYPES], Field(discriminator="method")]  # noqa: UP007 (made at run time)


class CompressParams(Params):
    """The menu: which levels every unit gets."""

    menu: list[AnyEntry] = Field(min_length=1, description="one entry per method, with `method` and its parameters")
    targets: Targets | None = Field(
        None,
        description="units to compress, as of `calibrate`; those that were calibrated if left out, without calibration "
        "all of the blocks",
    )
    ignore: Ignored = Field([], description="units to leave alone, in the same form")
    least_tokens: int = Field(
        32,
        ge=0,
        description="calibration tokens that must reach a unit (an expert); with fewer, a method that needs them gives "
        "way to its fallback",
    )

    @field_validator("menu")
    @classmethod
    def _distinct(cls, menu: list[MenuEntry]) -> list[MenuEntry]:
        names = [name for entry in menu for name in entry.level_names()]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"makes level {twice[0]} twice; remove one of the entries")
        return menu

    @property
    def needs_statistics(self) -> list[str]:
        """Statistics that the menu needs."""
        return sorted({name for entry in self.menu for name in entry.needs})

    @property
    def offers_unchanged(self) -> bool:
        """Whether a search may leave a unit as it is."""
        return any(entry.offers_unchanged for entry in self.menu)

    @property
    def parent_roles(self) -> set[str]:
        """Roles of parents that get levels."""
        return {role for entry in self.menu for role in entry.parents()}

    def material(self) -> dict[str, Any]:
        """With the implementation number of each method."""
        menu = [entry.material() | {"impl": entry.impl} for entry in self.menu]
        return self.model_dump(mode="json", exclude={"menu"}) | {"menu": menu}

    def sources(self) -> Iterable[str]:
        """The modules of its methods."""
        return dict.fromkeys(find_compressor(entry.method).run.__module__ for entry in self.menu)


Mistakes = Iterator[tuple[tuple[str | int, ...], str]]


def mistakes(params: CompressParams, feeding: Mapping[str, Sequence[Any]]) -> Mistakes:
    """What can be seen to be wrong before anything runs."""
    calibrated = feeding.get("statistics", ())
    for number, entry in enumerate(params.menu):
        missing = [name for name in sorted(entry.needs) if not calibrated]
        if missing:
            yield (
                ("menu", number, "method"),
                f"{entry.method} needs {', '.join(missing)}: add a `calibrate` stage to needs",
            )
        for stage in calibrated:
            given: list[str] | None = getattr(stage, "statistics", None)
            lacking = [name for name in sorted(entry.needs) if given is not None and name not in given]
            if lacking:
                yield (
                    ("menu", number, "method"),
                    f"{entry.method} needs {', '.join(lacking)}, but the calibrate stage gathers only "
                    f"{', '.join(given or ()) or 'nothing'}: add it to its `statistics`, or leave that key out",
                )
    if calibrated and feeding.get("model"):
        yield (), "the statistics say which model they are of: give `model` to the calibrate stage, not here, too"


@dataclass(frozen=True)
class _Chosen:
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


def compress(context: Context, params: CompressParams) -> None:
    """Write every level of every unit, and the index.

    Raises:
        UnsupportedModel: no unit is chosen, or the menu drops parents that the model does not have.
        UsageError: a method needs statistics that were not gathered, or not of these units.
    """
    from layerwise.stages.levels.database import MODEL, UnitEntry, write_index
    from layerwise.stages.models.compressed import adopt

    chosen = _choose(context, params)
    blocks = _compress_blocks(context, params, chosen)
    work = partial(
        _compress_unit,
        source=chosen.source,
        statistics=chosen.statistics,
        params=params,
        blocks=blocks,
        folder=context.items,
    )
    units = chosen.in_order
    items = [chosen.item(unit) for unit in units]
    answers = context.executor.map(work, items, keys=[unit.name for unit in units], note="units")
    beside = _beside(chosen)
    entries = [_with_own_costs(UnitEntry.from_json(answer), beside) for answer in answers]
    carried = {name: chosen.innermost(chosen.others[name]) for name in chosen.carried}
    write_index(context.out, entries, beside[None], halves=chosen.survey.halves(chosen.given), carried=carried)
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
        (target / file.name).hardlink_to(file)


# --- what is compressed -----------------------------------------------------------------------------------------------


def _choose(context: Context, params: CompressParams) -> _Chosen:
    from layerwise.stages.calibrate.statistics import MODEL, Statistics
    from layerwise.stages.models.survey import Survey, survey_model

    folder = context.optional("statistics")
    statistics = None if folder is None else Statistics(folder)
    if statistics is None:
        model, source = context.optional("model"), context.model_of("model")
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
        units = select_units([unit for unit in units if unit.name in selected], ["re:"], params.ignore)
    wanted = {unit.name for unit in units}
    if statistics is not None and params.needs_statistics:
        _check_calibrated(wanted - set(statistics.selected))
    chosen = [(unit, stored) for unit, stored in survey.units if unit.name in wanted]
    parents = _parents(params, survey)
    note = left_alone(survey, wanted)
    if note is not None:
        context.progress(0, len(chosen), note)
    return _Chosen(source, model, survey, chosen, parents, folder, counts)


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
            f"the menu drops {' and '.join(missing)}, but the blocks of this model have no such part{why}",
            hint="whole blocks can be dropped in any model: `units: [block]`",
        )
    return found


Amounts = dict[str, float]
"""By resource."""


def _beside(chosen: _Chosen) -> dict[str | None, Amounts]:
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
    return beside


def _with_own_costs(entry: UnitEntry, beside: Mapping[str | None, Amounts]) -> UnitEntry:
    """A parent pays for what is in it and has no level: its norms and biases, unless it is dropped."""
    if not entry.is_parent:
        return entry
    levels = tuple(
        replace(level, costs={**level.costs, **beside[entry.name]})
        if level.recipe is not None and level.costs is not None and level.recipe["encoding"] == "keep"
        else level
        for level in entry.levels
    )
    return replace(entry, levels=levels)


# --- units ------------------------------------------------------------------------------------------------------------


def _compress_unit(
    item: dict[str, Any],
    *,
    source: ModelSource,
    statistics: Path | None,
    params: CompressParams,
    blocks: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """Write all levels of one unit; gives its entry in the index, as JSON."""
    from layerwise.stages.levels.database import UnitEntry
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.models.stored import Stored

    unit = Unit.from_json(item["unit"])
    stored = None if item["stored"] is None else Stored.from_json(item["stored"])
    maker = _Maker(unit, stored, source, statistics, item["tokens"], params.least_tokens)
    taken = {name for entry in params.menu for name in entry.level_names()}
    entries = [maker.unchanged(taken, offered=unit.is_parent or params.offers_unchanged)]
    for number, entry in enumerate(params.menu):
        if unit.role in entry.parents() if unit.is_parent else not entry.parents():
            entries += maker.from_block(entry, blocks, number) if entry.scope == "block" else maker.make(entry)
    write_unit(folder, unit.name, maker.levels)
    return UnitEntry(unit, stored, tuple(entries)).as_json()


class _Maker:
    """Makes and describes the levels of one unit.

    Args:
        unit: the unit.
        stored: where its weight stands; None for a parent.
        source: the model.
        statistics: the artifact, if there is one.
        tokens: how many reached it in calibration; None where that does not matter.
        least_tokens: with fewer, a method that needs statistics gives way to its fallback.
    """

    def __init__(
        self,
        unit: Unit,
        stored: Stored | None,
        source: ModelSource,
        statistics: Path | None,
        tokens: int | None,
        least_tokens: int,
    ) -> None:
        from layerwise.stages.calibrate.statistics import Statistics
        from layerwise.stages.levels.parent import parent_level
        from layerwise.stages.models.compressed import Weights

        self.unit, self.tokens, self.least_tokens = unit, tokens, least_tokens
        self.levels: list[Level] = []
        self._stored, self._folder = stored, source.path
        self._statistics = None if statistics is None else Statistics(statistics)
        self._before = parent_level("keep") if stored is None else Weights(source).level(unit.name, stored)
        self._task = task_of({unit.name: (unit, self._before)}, self._statistics)

    @property
    def _weight(self) -> Tensor | None:
        return self._task.weights.get(self.unit.name)

    @cached_property
    def _hessian(self) -> Tensor | None:
        """For output errors, wherever there is one."""
        if self._statistics is None or self._weight is None or "hessian" not in self._statistics.gathered:
            return None
        known = self.unit.name in self._statistics.selected and (self.tokens != 0)
        return self._statistics.tensor(self.unit, "hessian") if known else None

    def unchanged(self, taken: Collection[str], *, offered: bool) -> LevelEntry:
        """The entry of what the model has already. It is off by nothing, whatever the statistics are, and takes the
        bytes that it takes in the checkpoint, where a tied weight may stand twice.

        Args:
            taken: names of the levels that are made now; what was made before by the same method gets another one.
            offered: whether a search may choose it.
        """
        from layerwise.stages.levels.database import describe_failure
        from layerwise.stages.models.checkpoint import Checkpoint

        while self._before.name in taken:
            self._before = replace(self._before, name=f"{self._before.name} (before)")
        try:
            (entry,) = self._described([self._before], hessian=None)
        except NotFinite as error:
            return replace(describe_failure(self._before.name, error.message), offered=offered)
        costs = dict(entry.costs or {})
        if self._stored is not None and self._before.recipe["encoding"] == "dense":
            costs["bytes"] = self._stored.size_bytes(Checkpoint(self._folder))
        exact = None if self._hessian is None else 0.0
        return replace(entry, costs=costs, output_error=exact, offered=offered)

    def make(self, entry: MenuEntry) -> list[LevelEntry]:
        """The levels of one menu entry."""
        if entry.needs and too_few(self.tokens, self.least_tokens):
            return self._fall_back(entry, f"only {self.tokens} calibration tokens reached it")
        try:
            return self._keep(find_compressor(entry.method).run(self._task, entry)[self.unit.name])
        except NotFinite as error:
            return self._failed(entry, error)

    def from_block(self, entry: MenuEntry, blocks: Path | None, number: int) -> list[LevelEntry]:
        """The levels that a method of scope `block` has made before."""
        from layerwise.stages.levels.files import open_unit, read_level

        assert blocks is not None
        if self.unit.block is None:
            return self._fall_back(entry, "it stands in no block")
        if too_few(self.tokens, self.least_tokens):
            return self._fall_back(entry, f"only {self.tokens} calibration tokens reached it")
        failure = blocks / str(number) / f"{self.unit.block}.failed"
        if failure.is_file():
            return self._failed(entry, NotFinite(failure.read_text(encoding="utf-8")))
        file, recipes = open_unit(blocks / str(number), self.unit.name)
        try:
            return self._keep([read_level(file, recipes, name) for name in entry.level_names()])
        except NotFinite as error:
            return self._failed(entry, error)

    def _fall_back(self, entry: MenuEntry, why: str) -> list[LevelEntry]:
        from layerwise.stages.levels.database import describe_failure, fallen_back

        other = entry.fallback()
        if other is None:
            return [describe_failure(name, why) for name in entry.level_names()]
        names = entry.level_names()
        try:
            made = find_compressor(other.method).run(self._task, other)[self.unit.name]
            described = self._keep([replace(level, name=name) for name, level in zip(names, made, strict=True)])
        except NotFinite as error:
            return self._failed(entry, error)
        return [fallen_back(level, level.name, f"{why}: made by {other.method}") for level in described]

    def _keep(self, made: Sequence[Level]) -> list[LevelEntry]:
        described = self._described(made, hessian=self._hessian)
        self.levels += made
        return described

    def _described(self, levels: Sequence[Level], *, hessian: Tensor | None) -> list[LevelEntry]:
        from layerwise.stages.levels.database import LevelEntry, describe_levels

        if self._weight is None:
            return [LevelEntry(level.name, dict(level.recipe), level.costs) for level in levels]
        share = 0.0 if self.unit.role == "embedding" else self.unit.share
        return describe_levels(levels, self._weight, hessian, share=share)

    @staticmethod
    def _failed(entry: MenuEntry, error: NotFinite) -> list[LevelEntry]:
        from layerwise.stages.levels.database import describe_failure

        return [describe_failure(name, error.message) for name in entry.level_names()]


def too_few(tokens: int | None, least_tokens: int) -> bool:
    """Whether too few calibration tokens reached a unit; None where that does not matter."""
    return tokens is not None and tokens < least_tokens


def task_of(units: Mapping[str, tuple[Unit, Level]], statistics: Statistics | None, block: Any = None) -> Task:
    """A task over some units with what the model has of them."""
    from layerwise.stages.levels.mask import kept

    weights, keep = {}, {}
    for name, (unit, level) in units.items():
        if not unit.is_parent:
            weights[name] = level.tensors["weight"] if level.recipe["encoding"] == "dense" else level.decode()
        if "mask" in level.tensors:
            keep[name] = kept(level)

    def statistic(name: str, kind: str) -> Tensor:
        assert statistics is not None, "checked before the work starts"
        return statistics.tensor(units[name][0], kind)

    return Task(weights, statistic, {name: unit for name, (unit, _) in units.items()}, keep, block)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _compress_blocks(context: Context, params: CompressParams, chosen: _Chosen) -> Path | None:
    """Let the methods of scope `block` make their levels; gives the folder where they stand."""
    entries = [(number, entry) for number, entry in enumerate(params.menu) if entry.scope == "block"]
    if not entries:
        return None
    assert chosen.statistics is not None, "checked before the work starts"
    folder = context.items / "blocks"
    by_block: dict[int, list[dict[str, Any]]] = {}
    for unit, _ in chosen.units:
        item = chosen.item(unit)
        if unit.block is not None and not too_few(item["tokens"], params.least_tokens):
            by_block.setdefault(unit.block, []).append(item)
    items = [
        {"block": block, "number": number, "units": units} for number, _ in entries for block, units in by_block.items()
    ]
    factory = partial(_block_worker, chosen.source, chosen.statistics, params, folder)
    with context.executor.replicas(factory) as pool:
        pool.map(items, keys=[f"block-{item['block']}-{item['number']}" for item in items], note="blocks")
    return folder


def _block_worker(
    source: ModelSource, statistics: Path, params: CompressParams, folder: Path
) -> Callable[[dict[str, Any]], None]:
    from layerwise.stages.models.causal_lm import CausalLM

    return partial(
        _compress_block,
        network=CausalLM.load(source),
        source=source,
        statistics=statistics,
        params=params,
        folder=folder,
    )


def _compress_block(
    item: dict[str, Any],
    *,
    network: CausalLM,
    source: ModelSource,
    statistics: Path,
    params: CompressParams,
    folder: Path,
) -> None:
    """Write the levels of one menu entry of all units of a block."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.compress.block_run import BlockRun
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.models.compressed import Weights
    from layerwise.stages.models.stored import Stored

    block, entry = item["block"], params.menu[item["number"]]
    known, weights = Statistics(statistics), Weights(source)
    located = [(Unit.from_json(unit["unit"]), Stored.from_json(unit["stored"])) for unit in item["units"]]
    units = {unit.name: (unit, weights.level(unit.name, stored)) for unit, stored in located}
    ids, inputs = known.hidden(block)
    run = BlockRun(network, block, [unit for unit, _ in located], ids, inputs, known.hidden(block + 1)[1])
    target = folder / str(item["number"])
    try:
        made = find_compressor(entry.method).run(task_of(units, known, run), entry)
    except NotFinite as error:
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{block}.failed").write_text(error.message, encoding="utf-8")
        return
    for name, levels in made.items():
        write_unit(target, name, levels)


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


STAGE = Stage(
    "compress",
    CompressParams,
    compress,
    gives="database",
    takes={"statistics": Port("statistics", optional=True), "model": Port("model", optional=True)},
    check=mistakes,
)
