"""Makes and describes all levels of one unit: the work of one task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.stages.compress import MenuEntry, Task, find_compressor
from layerwise.stages.compress.params import CompressParams
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.network import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.compress.block_run import BlockRun
    from layerwise.stages.levels.database import LevelEntry
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.channels import Channels
    from layerwise.stages.models.stored import Stored


def compress_unit(
    item: dict[str, Any],
    *,
    source: ModelSource,
    statistics: Path | None,
    params: CompressParams,
    blocks: Path | None,
    halves: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """Write all levels of one unit; gives its entry in the index, as JSON.

    Args:
        blocks, halves: where methods of these scopes have left theirs.
    """
    from layerwise.stages.levels.database import UnitEntry
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.models.stored import Stored

    unit = Unit.from_json(item["unit"])
    stored = None if item["stored"] is None else Stored.from_json(item["stored"])
    maker = Maker(unit, stored, source, statistics, item["tokens"], params.least_tokens)
    taken = {name for entry in params.menu for name in entry.level_names()}
    entries = [maker.unchanged(taken, offered=unit.is_parent or params.offers_unchanged)]
    for number, entry in enumerate(params.menu):
        if entry.scope == "half":
            entries += maker.from_half(entry, halves, number)
        elif unit.role in entry.parents() if unit.is_parent else not entry.parents():
            entries += maker.from_block(entry, blocks, number) if entry.scope == "block" else maker.make(entry)
    write_unit(folder, unit.name, maker.levels)
    return UnitEntry(unit, stored, tuple(entries)).as_json()


class Maker:
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
        self._device = source.device
        self._task = task_of({unit.name: (unit, self._before)}, self._statistics, source.device)

    @property
    def _weight(self) -> Tensor | None:
        return self._task.weights.get(self.unit.name)

    @cached_property
    def _hessian(self) -> Tensor | None:
        """For output errors, wherever there is one."""
        if self._statistics is None or self._weight is None or "hessian" not in self._statistics.gathered:
            return None
        known = self.unit.name in self._statistics.selected and (self.tokens != 0)
        return self._task.statistic(self.unit.name, "hessian") if known else None

    def unchanged(self, taken: Collection[str], *, offered: bool) -> LevelEntry:
        """The entry of what the model has already.

        It is off by nothing, whatever the statistics are, and takes the bytes that it takes in the checkpoint, where a
        tied weight may stand twice. What was made before by the same method gets a name of its own.

        Args:
            taken: names of the levels that are made now.
            offered: whether a search may choose it.
        """
        from layerwise.stages.levels.database import describe_failure
        from layerwise.stages.models.checkpoint import Checkpoint

        while self._before.name in taken:
            self._before = replace(self._before, name=f"{self._before.name} (before)")
        try:
            (entry,) = self._described([self._before.to(self._device)], hessian=None)
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
        refused = entry.refuses(self.unit)
        if refused is not None:
            return self._fall_back(entry, refused)
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
        refused = entry.refuses(self.unit)
        if refused is not None:
            return self._fall_back(entry, refused)
        if too_few(self.tokens, self.least_tokens):
            return self._fall_back(entry, f"only {self.tokens} calibration tokens reached it")
        failure = blocks / str(number) / f"{self.unit.block}.failed"
        if failure.is_file():
            return self._failed(entry, NotFinite(failure.read_text(encoding="utf-8")))
        file, recipes = open_unit(blocks / str(number), self.unit.name)
        try:
            return self._keep([read_level(file, recipes, name).to(self._device) for name in entry.level_names()])
        except NotFinite as error:
            return self._failed(entry, error)

    def from_half(self, entry: MenuEntry, halves: Path | None, number: int) -> list[LevelEntry]:
        """The levels that a method of scope `half` has made before: of a half-block, or of a unit inside, which are no
        choices there."""
        from layerwise.stages.levels.files import open_unit, read_level, unit_file

        assert halves is not None
        half = self.unit.name if self.unit.is_parent else self.unit.parent
        folder = halves / str(number)
        failure = folder / f"{half}.failed"
        if failure.is_file():
            why = NotFinite(failure.read_text(encoding="utf-8"))
            return self._failed(entry, why) if self.unit.is_parent else []
        if not unit_file(folder, self.unit.name).is_file():
            return []
        file, recipes = open_unit(folder, self.unit.name)
        try:
            made = [read_level(file, recipes, name).to(self._device) for name in entry.level_names()]
            return [replace(level, offered=self.unit.is_parent) for level in self._keep(made)]
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
        self.levels += [level.to("cpu") for level in made]
        return described

    def _described(self, levels: Sequence[Level], *, hessian: Tensor | None) -> list[LevelEntry]:
        from layerwise.stages.levels.database import LevelEntry, describe_levels

        if self._weight is None:
            return [LevelEntry(level.name, dict(level.recipe), level.costs) for level in levels]
        share = 0.0 if self.unit.role == "embedding" else self.unit.share
        described = describe_levels(levels, self._weight, hessian, share=share)
        if self._unreached:  # on those tokens its output was off by nothing, for it gave none
            described = [replace(entry, output_error=0.0) for entry in described]
        return described

    @property
    def _unreached(self) -> bool:
        """Whether Hessians were gathered, but none of this unit, because no calibration token got to it."""
        if self._statistics is None or self.tokens != 0:
            return False
        return "hessian" in self._statistics.gathered and self.unit.name in self._statistics.selected

    @staticmethod
    def _failed(entry: MenuEntry, error: NotFinite) -> list[LevelEntry]:
        from layerwise.stages.levels.database import describe_failure

        return [describe_failure(name, error.message) for name in entry.level_names()]


def too_few(tokens: int | None, least_tokens: int) -> bool:
    """Whether too few calibration tokens reached a unit; None where that does not matter."""
    return tokens is not None and tokens < least_tokens


def task_of(
    units: Mapping[str, tuple[Unit, Level]],
    statistics: Statistics | None,
    device: str,
    block: BlockRun | None = None,
    channels: Channels | None = None,
) -> Task:
    """A task over some units with what the model has of them, on a device."""
    from layerwise.stages.levels.mask import kept
    from layerwise.stages.levels.sliced import kept_weights

    weights, keep = {}, {}
    for name, (unit, stored) in units.items():
        level = stored.to(device)
        if not unit.is_parent:
            weights[name] = level.tensors["weight"] if level.recipe["encoding"] == "dense" else level.decode()
        if "mask" in level.tensors:
            keep[name] = kept(level)
        elif level.recipe["encoding"] == "sliced":
            keep[name] = kept_weights(level)
        if "values" in level.tensors:  # pruned and nothing else: exactly what the checkpoint held
            weights[name] = weights[name].to(level.tensors["values"].dtype)

    def statistic(name: str, kind: str) -> Tensor:
        assert statistics is not None, "checked before the work starts"
        return statistics.tensor(units[name][0], kind).to(device)

    return Task(weights, statistic, {name: unit for name, (unit, _) in units.items()}, keep, block, channels)
