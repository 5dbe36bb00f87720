"""The database artifact: every level of every unit, encoded, with what each costs and how far it is off.

    database.json                what there is: units, levels, costs, errors; readable without torch
    units/<unit>.safetensors     the tensors of a unit's levels, `<level>/<tensor>`; their recipes in the header
    model/                       the compressed or transformed model that the levels are of, if it is not the workflow's

One file per unit, because a unit's levels are made by one task, and memory-mapped, because a search reads few of them
and replicas on one machine then share the pages. Names are sorted and nothing tells the time: the same levels give the
same bytes. `DatabaseIndex` is all that the driver needs; `Database` reads levels. Level 0 of a unit is what the model
has already, its dense weight as a rule; it is not stored again. Left out: decoding caches, which belong to who decodes
in a loop.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import CorruptArtifact, NotFinite, UsageError
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.files import open_unit, read_level
from layerwise.stages.levels.level import Level
from layerwise.stages.models.network import Unit
from layerwise.stages.models.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor, device

INDEX = "database.json"
MODEL = "model"
"""Folder of the model artifact that the levels were made from."""

UNCHANGED = 0
"""The level that every unit has: what it is in the model."""


@dataclass(frozen=True)
class LevelEntry:
    """What the index says of a level.

    Args:
        name: unique within its unit.
        recipe: as of `Level`; None if it could not be made.
        costs: absolute amounts by resource, as of `Level.costs`; None if it could not be made.
        weight_nmse: ‖Q - W‖² / ‖W‖².
        output_error: the same of the unit's output on the calibration tokens; None without a Hessian.
        status: ok; fallback (made by another method, `error` says why); nan (could not be made).
        error: why it is not ok.
        offered: whether a search may choose it.
    """

    name: str
    recipe: Mapping[str, Any] | None
    costs: Mapping[str, float] | None
    weight_nmse: float | None = None
    output_error: float | None = None
    status: str = "ok"
    error: str | None = None
    offered: bool = True

    @property
    def usable(self) -> bool:
        """True if it was made, by whatever method."""
        return self.status != "nan"


@dataclass(frozen=True)
class UnitEntry:
    """What the index says of a unit.

    Args:
        unit: the unit.
        stored: where its weight stands in the checkpoint; None for a parent.
        levels: with distinct names; the first is what the model has already.
    """

    unit: Unit
    stored: Stored | None
    levels: tuple[LevelEntry, ...]

    @property
    def name(self) -> str:
        return self.unit.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.unit.shape

    @property
    def n_weights(self) -> int:
        return self.unit.n_weights

    @property
    def is_parent(self) -> bool:
        return self.unit.is_parent

    def level(self, name: str) -> LevelEntry:
        """The entry of that name."""
        return next(level for level in self.levels if level.name == name)

    def as_json(self) -> dict[str, Any]:
        """As it stands in an artifact."""
        stored = None if self.stored is None else self.stored.as_json()
        return {"unit": self.unit.as_json(), "stored": stored, "levels": [asdict(level) for level in self.levels]}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> UnitEntry:
        """What `as_json` gave."""
        stored = None if entry["stored"] is None else Stored.from_json(entry["stored"])
        return cls(Unit.from_json(entry["unit"]), stored, tuple(LevelEntry(**level) for level in entry["levels"]))


# --- writing ----------------------------------------------------------------------------------------------------------


def describe_levels(
    levels: Sequence[Level], weight: Tensor, hessian: Tensor | None = None, *, share: float = 1.0
) -> list[LevelEntry]:
    """The entries of a unit's levels in the index.

    Both errors are relative: `weight_nmse` is ‖Q - W‖² / ‖W‖², `output_error` is the same of the unit's output on the
    calibration tokens, tr((Q - W) H (Q - W)ᵀ) / tr(W H Wᵀ). A level that is off by nothing has error 0, also from zero.

    Args:
        levels: all of the unit at once, because the norm of its output costs as much as the error of a level.
        weight: (out, in), what they stand for.
        hessian: (in, in), `X Xᵀ`, or (groups, in, in); without it there is no output error.
        share: of the tokens that go through the unit, as of `Unit.share`.
    Raises:
        NotFinite: a level decodes to NaN or Inf, or an error is not finite.
    """
    W = weight.double()
    weight_norm, output_norm = _squared_norms(W, hessian)
    entries = []
    for level in levels:
        weight_error, output_error = _squared_norms(level.decode().double() - W, hessian)
        nmse = _ratio(weight_error, weight_norm)
        output = _ratio(output_error, output_norm) if hessian is not None else None
        for name, value in (("weight_nmse", nmse), ("output_error", output)):
            if value is not None and not math.isfinite(value):
                raise NotFinite(f"level {level.name}: {name} is {value}")
        costs = level.costs | {"flops": level.costs["flops"] * share}
        entries.append(LevelEntry(level.name, dict(level.recipe), costs, nmse, output))
    return entries


def describe_failure(name: str, error: str) -> LevelEntry:
    """The entry of a level that could not be made; it costs nothing known, and nobody may choose it."""
    return LevelEntry(name, None, None, status="nan", error=error)


def fallen_back(entry: LevelEntry, name: str, why: str) -> LevelEntry:
    """An entry of a level that another method made in the place of the one that was asked for."""
    return replace(entry, name=name, status="fallback", error=why)


def _squared_norms(D: Tensor, hessian: Tensor | None) -> tuple[float, float]:
    """‖D‖² and tr(D H Dᵀ), D in float64; the product in the Hessian's own precision, at half the price."""
    output = 0.0
    if hessian is not None:
        parts = D if hessian.dim() == 2 else D.unflatten(0, (len(hessian), -1))
        output = ((parts.to(hessian.dtype) @ hessian).double() * parts).sum().item()
    return D.square().sum().item(), output


def _ratio(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def write_index(
    folder: Path,
    units: Sequence[UnitEntry],
    rest: Mapping[str, float],
    *,
    halves: Mapping[str, Sequence[str]] | None = None,
    carried: Mapping[str, str | None] | None = None,
    menu: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `database.json`: the commit point of a database.

    Args:
        folder: the database.
        units: in the order of a genome.
        rest: by resource, what everything of the model uses that is no unit.
        halves: by block, the half-blocks that it is made of; without them it passes on its input.
        carried: units without levels here that were compressed before, each with the innermost parent of `units` that
            it is in.
        menu: what made the levels, as `compress` was told, for whoever makes one again.
    """
    document = {
        "menu": [dict(entry) for entry in menu],
        "rest": dict(rest),
        "halves": {block: list(parts) for block, parts in (halves or {}).items()},
        "carried": dict(carried or {}),
        "units": [unit.as_json() for unit in units],
    }
    target = folder / INDEX
    target.write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return target


# --- reading ----------------------------------------------------------------------------------------------------------


class DatabaseIndex:
    """What a database holds, without torch.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _text(self) -> bytes:
        return (self.folder / INDEX).read_bytes()

    @cached_property
    def _document(self) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(self._text)
        except ValueError as error:
            raise CorruptArtifact(f"{self.folder / INDEX}: {error}") from error
        return document

    @cached_property
    def digest(self) -> str:
        """The same for the same units, levels, costs and errors: 64 hex digits."""
        return hashlib.sha256(self._text).hexdigest()

    @cached_property
    def units(self) -> list[UnitEntry]:
        """The units in the order of a genome."""
        return [UnitEntry.from_json(entry) for entry in self._document["units"]]

    @property
    def rest(self) -> dict[str, float]:
        """By resource, what everything of the model uses that is no unit."""
        return dict(self._document["rest"])

    @property
    def halves(self) -> dict[str, list[str]]:
        """By block, the half-blocks that it is made of, where all of them have levels."""
        return dict(self._document["halves"])

    @property
    def carried(self) -> dict[str, str | None]:
        """Units without levels here that were compressed before, each with the innermost parent that it is in."""
        return dict(self._document["carried"])

    @property
    def menu(self) -> list[dict[str, Any]]:
        """What made the levels, as the `menu` of `compress`."""
        return list(self._document["menu"])

    @cached_property
    def by_name(self) -> dict[str, UnitEntry]:
        """The units by their name."""
        return {unit.name: unit for unit in self.units}

    def inside(self, parent: str, level: str) -> dict[str, str]:
        """The levels that a parent's level gives the units inside: those of its name, where it narrows; else none."""
        recipe = self.by_name[parent].level(level).recipe if self.by_name[parent].is_parent else None
        if recipe is None or recipe["encoding"] != "narrow":
            return {}
        return {unit.name: level for unit in self._within[parent] if any(one.name == level for one in unit.levels)}

    def with_inside(self, levels: Mapping[str, str]) -> dict[str, str]:
        """Levels by unit, as an allocation has them, with those that narrowed parents give the units inside."""
        return {**levels, **{u: name for unit, level in levels.items() for u, name in self.inside(unit, level).items()}}

    @cached_property
    def _within(self) -> dict[str, list[UnitEntry]]:
        found: dict[str, list[UnitEntry]] = {unit.name: [] for unit in self.units}
        for unit in self.units:
            if unit.unit.parent is not None:
                found[unit.unit.parent].append(unit)
        return found

    def model(self, workflow: ModelSource) -> ModelSource:
        """The model whose levels these are: the one beside them, else the workflow's."""
        from layerwise.stages.models.compressed import source_of

        return source_of(self.folder / MODEL, workflow)


class Database:
    """Reads the levels themselves, memory-mapped; only what is asked for is read.

    Pickles as its folder, so that a worker can be handed one.

    Args:
        folder: the artifact.
        workflow: the workflow's model, for the levels that the database does not hold: those that it has already.
    """

    def __init__(self, folder: Path, workflow: ModelSource) -> None:
        self.folder, self.workflow = folder, workflow
        self.index = DatabaseIndex(folder)
        self._open: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __reduce__(self) -> tuple[type[Database], tuple[Path, ModelSource]]:
        return Database, (self.folder, self.workflow)

    @property
    def units(self) -> list[UnitEntry]:
        """As in the index."""
        return self.index.units

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The units of a genome, in its order."""
        return tuple(self.index.by_name)

    def level(self, unit: str, name: str) -> Level:
        """One level of one unit; its tensors stay on disk until they are touched.

        Raises:
            UsageError: there is no such unit or level, or it could not be made.
            CorruptArtifact: the unit's file is missing or damaged.
        """
        if unit in self.index.by_name and name == self.index.by_name[unit].levels[UNCHANGED].name:
            return self._unchanged(self.index.by_name[unit])
        file, recipes = self._file(unit)
        if name not in recipes:
            raise UsageError(f"unit {unit} has no level '{name}'{self._why(unit, name)}")
        return read_level(file, recipes, name)

    def weight(self, unit: str, level: int, device: device | str = "cpu") -> Tensor | None:
        """The dense weight of a level, by its number: (out, in), float32, decoded on a device; None for what the model
        has already."""
        if level == UNCHANGED:
            return None
        return self.level(unit, self.index.by_name[unit].levels[level].name).to(device).decode()

    def model(self, workflow: ModelSource) -> ModelSource:
        """As of the index."""
        return self.index.model(workflow)

    def drops(self, unit: str, level: int) -> bool:
        """Whether a level leaves a parent out."""
        recipe = self.index.by_name[unit].levels[level].recipe
        return recipe is not None and recipe["encoding"] == "drop"

    def narrows(self, unit: str, level: int) -> dict[str, int]:
        """The levels, by number, that a parent's level gives the units inside."""
        given = self.index.inside(unit, self.index.by_name[unit].levels[level].name)
        return {name: [one.name for one in self.index.by_name[name].levels].index(of) for name, of in given.items()}

    def _unchanged(self, entry: UnitEntry) -> Level:
        from layerwise.stages.levels.parent import parent_level
        from layerwise.stages.models.compressed import Weights

        if entry.stored is None:
            return parent_level("keep")
        level = Weights(self.index.model(self.workflow)).level(entry.name, entry.stored)
        return replace(level, name=entry.levels[UNCHANGED].name)

    def _file(self, unit: str) -> tuple[Any, dict[str, Any]]:
        if unit not in self._open:
            if unit not in self.index.by_name:
                raise UsageError(f"the database has no unit '{unit}'")
            self._open[unit] = open_unit(self.folder, unit)
        return self._open[unit]

    def _why(self, unit: str, name: str) -> str:
        levels = self.index.by_name[unit].levels
        errors = [level.error for level in levels if level.name == name and level.error]
        known = ", ".join(level.name for level in levels if level.usable)
        return f": {errors[0]}" if errors else f" (known: {known})"
