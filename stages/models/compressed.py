"""The `model` artifact: a model with some of its weights compressed, kept encoded, repaired or not, or one that was
transformed.

    model.json                   which unit has which level, what is dropped, where it came from
    units/<unit>.safetensors     the level of a unit, as in a database
    base/                        a Hugging Face folder, where the dense model below is not the workflow's own

Levels stay encoded, so whoever goes on with the model (recovery, another compression, an export) finds its masks and
grids as they were made, and no dtype of a checkpoint rounds them. Everything is written and read unit by unit. Level
and base together are a `ModelSource`, which `load_network` takes; `Weights` reads single units of one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import CorruptArtifact, UsageError
from layerwise.stages.contract import Context, ModelSource
from layerwise.stages.levels.files import open_unit, read_level
from layerwise.stages.levels.level import Level
from layerwise.stages.models.network import Unit
from layerwise.stages.models.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.in_blocks import InBlocks

DOCUMENT = "model.json"
BASE = "base"
"""Folder of the dense model below, inside the artifact."""


@dataclass(frozen=True)
class CompressedUnit:
    """A unit that is not as it was in the dense model.

    Args:
        unit: the unit.
        stored: where its weight stands in the checkpoint; None for a parent that is dropped.
        level: name of its level.
    """

    unit: Unit
    stored: Stored | None
    level: str

    def as_json(self) -> dict[str, Any]:
        """As it stands in the artifact."""
        stored = None if self.stored is None else self.stored.as_json()
        return {"unit": self.unit.as_json(), "stored": stored, "level": self.level}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> CompressedUnit:
        """What `as_json` gave."""
        stored = None if entry["stored"] is None else Stored.from_json(entry["stored"])
        return cls(Unit.from_json(entry["unit"]), stored, entry["level"])


@dataclass(frozen=True)
class Document:
    """What `model.json` says.

    Args:
        units: those that are not as they were.
        about: what it came from: `allocation` or `transform`, as JSON, and the names of the `repairs` made since.
    """

    units: tuple[CompressedUnit, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it: the commit point of a model artifact."""
        units = [entry.as_json() for entry in self.units]
        text = json.dumps({"units": units, "about": dict(self.about)}, indent=1, allow_nan=False)
        (folder / DOCUMENT).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Document:
        """Read it.

        Raises:
            CorruptArtifact: it is no model artifact.
        """
        try:
            document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
            return cls(tuple(map(CompressedUnit.from_json, document["units"])), document["about"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtifact(f"{folder / DOCUMENT}: {error}", hint="run the stage that made it again") from error


def source_of(folder: Path, workflow: ModelSource) -> ModelSource:
    """A model artifact as what networks are loaded from.

    Args:
        folder: the artifact; where there is none, the workflow's model is meant.
        workflow: the workflow's model.
    """
    if not (folder / DOCUMENT).is_file():
        return workflow
    base = folder / BASE
    compressed = folder if Document.load(folder).units else None
    return replace(workflow, path=base if base.is_dir() else workflow.path, compressed=compressed)


def model_of(context: Context, port: str) -> ModelSource:
    """The model of a stage's optional port: that of its `model` artifact, or the workflow's."""
    folder = context.optional(port)
    return context.model if folder is None else source_of(folder, context.model)


def adopt(folder: Path, target: Path) -> None:
    """Make a model artifact a part of another artifact: its files are linked, not copied, where the disk allows it.

    Args:
        folder: the artifact; nothing happens if there is none.
        target: the folder to be made.
    """
    if (folder / DOCUMENT).is_file():
        _link_tree(folder, target)


def adopt_base(folder: Path, target: Path) -> None:
    """The same of the dense model below one, if it has its own."""
    if folder.is_dir():
        _link_tree(folder, target)


def _link_tree(folder: Path, target: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "manifest.json":
            place = target / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, place)


def link_or_copy(file: Path, target: Path) -> None:
    """A second name for a file that nobody changes; a copy where a link cannot be."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


class CompressedModel:
    """Reads the artifact's levels, memory-mapped.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def document(self) -> Document:
        """Which unit has which level."""
        return Document.load(self.folder)

    @cached_property
    def levels(self) -> dict[str, str]:
        """Unit to the name of its level."""
        return {entry.unit.name: entry.level for entry in self.document.units}

    def recipe(self, unit: str) -> Mapping[str, Any]:
        """The recipe of the level of a unit that has one; no tensor is read."""
        _, recipes = open_unit(self.folder, unit)
        recipe: Mapping[str, Any] = recipes[self.levels[unit]]["recipe"]
        return recipe

    def level(self, unit: str) -> Level:
        """The level of a unit that has one."""
        file, recipes = open_unit(self.folder, unit)
        return read_level(file, recipes, self.levels[unit])

    def install(self, network: InBlocks) -> None:
        """Make a dense network this model, for good: decode every level into it, and leave out what is dropped.

        Raises:
            UsageError: the network is not the one that it was made of.
        """
        known = {unit.name: unit.shape for unit in (*network.units, *network.parents)}
        for unit in (entry.unit for entry in self.document.units):
            if known.get(unit.name) != unit.shape:
                raise UsageError(
                    f"{self.folder} was made of another model: this one has no {unit.name} of shape {unit.shape}",
                    hint="give the dense model that stands in the workflow",
                )
        for entry in self.document.units:
            if not entry.unit.is_parent:
                network.overwrite(entry.unit, self.level(entry.unit.name).to(network.device).decode())
        network.leave_out([entry.unit.name for entry in self.document.units if entry.unit.is_parent])


class Weights:
    """Reads the weights of single units of a model, without building it.

    Args:
        source: a dense model, or a compressed one.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self._compressed = None if source.compressed is None else CompressedModel(source.compressed)

    def level(self, unit: str, stored: Stored) -> Level:
        """What the model has of a unit: its level, or its dense weight as one."""
        from layerwise.stages.levels.dense import dense_level
        from layerwise.stages.models.checkpoint import Checkpoint

        if self._compressed is not None and unit in self._compressed.levels:
            return self._compressed.level(unit)
        return dense_level(stored.read(Checkpoint(self.source.path)))

    def weight(self, unit: str, stored: Stored) -> Tensor:
        """The weight, (out, in); in the dtype of the checkpoint, that of a level decoded to float32."""
        level = self.level(unit, stored)
        return level.tensors["weight"] if level.recipe["encoding"] == "dense" else level.decode()
