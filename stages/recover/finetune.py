"""`finetune`: the kept values of pruned weights, trained end to end. Masks stay bit for bit, the size is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from layerwise.stages.recover.training_params import TrainingParams

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.recover.parts import ModelRepair, Part


class Params(TrainingParams):
    """How kept values are trained."""

    method: Literal["finetune"] = "finetune"
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW, at its greatest")

    def misfit(self, recipe: Mapping[str, Any]) -> str | None:
        """It fits pruned weights, with an adapter beside them or without."""
        encoding = (recipe["base"] if recipe["encoding"] == "adapted" else recipe)["encoding"]
        return None if encoding == "mask" else f"{encoding} has no values of its own"


def finetune(task: ModelRepair, params: Params) -> list[Part]:
    """The kept values of each unit."""
    return [Values(name, level) for name, (_, level) in task.levels.items()]


class Values:
    """The kept values of one unit."""

    def __init__(self, unit: str, level: Level) -> None:
        from layerwise.stages.levels.adapted import below
        from layerwise.stages.levels.mask import kept

        self.unit, self.level, self.base = unit, level, below(level)
        self.keep = kept(self.base)
        self.values = self.base.tensors["values"].float().clone()
        self.beside = None if self.base is level else level.decode() - self.base.decode()

    @property
    def free(self) -> Mapping[str, Tensor]:
        return {f"{self.unit}/values": self.values}

    @property
    def rates(self) -> Mapping[str, float]:
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        from layerwise.stages.recover.parts import stored_as

        stored = stored_as(self.values, self.base.tensors["values"].dtype)
        W = stored.new_zeros(self.keep.shape).masked_scatter(self.keep, stored)
        return {self.unit: W if self.beside is None else W + self.beside}

    def levels(self) -> Mapping[str, Level]:
        from layerwise.stages.levels.adapted import over

        values = self.values.detach().to(self.base.tensors["values"].dtype)
        recipe = dict(self.base.recipe) | {"repairs": [*self.base.recipe.get("repairs", ()), "finetune"]}
        tensors = {**self.base.tensors, "values": values}
        made = replace(self.base, name=f"{self.base.name}+finetune", recipe=recipe, tensors=tensors)
        return {self.unit: over(self.level, made)}

    def parameters(self) -> Mapping[str, Tensor]:
        return {}
