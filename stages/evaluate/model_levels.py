"""Compressed models of one dense model, seen as levels: what puts whole models through the evaluator of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.errors import UsageError
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.compressed import CompressedModel, source_of

if TYPE_CHECKING:
    from torch import Tensor, device


class ModelLevels:
    """Level i + 1 of a unit is what it is in model i; level 0, and that of a unit it does not change, the dense one.

    Args:
        folders: their artifacts; all of one dense model. With none there is only the workflow's own.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.models = [CompressedModel(folder) for folder in folders]
        units = {entry.unit.name: entry.unit for model in self.models for entry in model.document.units}
        order = sorted(units.values(), key=lambda unit: (unit.positions[0], not unit.is_parent))
        self.unit_names = tuple(unit.name for unit in order)
        self._parents = {unit.name for unit in order if unit.is_parent}

    def model(self, workflow: ModelSource) -> ModelSource:
        """The dense model below them; the workflow's where there are none.

        Raises:
            UsageError: they are not all of one.
        """
        paths = {source_of(model.folder, workflow).path for model in self.models} or {workflow.path}
        if len(paths) > 1:
            raise UsageError("models of different dense models cannot be compared in one go")
        return replace(workflow, path=paths.pop(), compressed=None)

    def weight(self, unit: str, level: int, device: device | str = "cpu") -> Tensor | None:
        """A unit's weight in one of the models, (out, in), decoded on a device; None where it stayed dense."""
        if level == 0 or unit not in self.models[level - 1].levels:
            return None
        return self.models[level - 1].level(unit).to(device).decode()

    def drops(self, unit: str, level: int) -> bool:
        """Whether a model has left a parent out."""
        return level > 0 and unit in self._parents and unit in self.models[level - 1].levels

    def narrows(self, unit: str, level: int) -> dict[str, int]:
        """Nothing: in a model every unit has its level itself."""
        return {}
