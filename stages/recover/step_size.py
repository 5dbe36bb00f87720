"""`step_size`: the scales and zero points of grids, trained end to end. Codes and masks stay bit for bit, and so does
the size.

Scales move by shares of what they were, zero points in steps of the grid; both are trained as they are stored, float16
and whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from layerwise.stages.recover.grid_parts import GridParts, as_stored, grid_misfit
from layerwise.stages.recover.training_params import TrainingParams

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.recover.parts import ModelRepair, Part


class StepParams(TrainingParams):
    """How the scales and zero points of grids are trained."""

    learning_rate: float = Field(3e-3, gt=0, description="of scales, as shares of what they were")
    zeros: float = Field(
        10.0, ge=0, description="zero points: how many times as far they move, in steps of the grid; 0 to keep them"
    )

    def misfit(self, recipe: Mapping[str, Any]) -> str | None:
        """It fits grids of rows, pruned or not, with an adapter beside them or without."""
        return grid_misfit(recipe["base"] if recipe["encoding"] == "adapted" else recipe)


class Params(StepParams):
    """As of every repair that trains grids."""

    method: Literal["step_size"] = "step_size"


def step_size(task: ModelRepair, params: Params) -> list[Part]:
    """The grids of each unit.

    Source: EfficientQAT, arXiv:2407.11062, section 3.3 (its second phase, with zero points beside the step sizes).
    """
    return [Steps(name, level, params) for name, (_, level) in task.levels.items()]


class Steps:
    """The grid of one unit."""

    def __init__(self, unit: str, level: Level, params: StepParams) -> None:
        import torch

        from layerwise.stages.levels.adapted import below

        self.unit, self.level, self.method, self.zeros = unit, level, params.method, params.zeros
        base = below(level)
        self.base, self.parts = base, GridParts.of(base)
        self.codes, self.factor = self.parts.codes.float(), self.parts.factor.float()
        self.scale, self.zero = self.parts.scale.float(), self.parts.zero.float()
        self.beside = None if base is level else level.decode() - base.decode()
        self.share = torch.zeros_like(self.scale)
        self.moves = params.zeros > 0 and "zero" in base.tensors
        self.shift = torch.zeros_like(self.zero)

    @property
    def free(self) -> Mapping[str, Tensor]:
        return {f"{self.unit}/scale": self.share} | ({f"{self.unit}/zero": self.shift} if self.moves else {})

    @property
    def rates(self) -> Mapping[str, float]:
        return {f"{self.unit}/zero": self.zeros}

    def stored_scale(self) -> Tensor:
        """(out, scales), as stored. A scale keeps its sign."""
        import torch

        from layerwise.stages.recover.parts import stored_as

        return stored_as(self.scale * (1 + self.share).clamp(min=2.0**-10), torch.float16)

    def stored_zero(self) -> Tensor:
        """(out, groups), as stored."""
        from layerwise.stages.compress.tuning import round_through

        if not self.moves:
            return self.zero
        return round_through(self.zero + self.shift).clamp(0, 2 ** self.base.recipe["bits"] - 1)

    def stored_codes(self) -> Tensor:
        """(out, in), as stored."""
        return self.codes

    def tensors(self) -> Mapping[str, Tensor]:
        steps = self.stored_codes() - self.stored_zero().index_select(1, self.parts.group)
        W = steps * self.factor * self.stored_scale().index_select(1, self.parts.scale_of)
        return {self.unit: W if self.beside is None else W + self.beside}

    def levels(self) -> Mapping[str, Level]:
        from layerwise.stages.levels.adapted import over

        zero = self.stored_zero().detach() if self.moves else None
        grids = as_stored(self.base, self.parts.key, self.stored_scale().detach(), zero)
        tensors = {**self.base.tensors, **grids, **self.new_codes()}
        recipe = dict(self.base.recipe) | {"repairs": [*self.base.recipe.get("repairs", ()), self.method]}
        made = replace(self.base, name=f"{self.base.name}+{self.method}", recipe=recipe, tensors=tensors)
        return {self.unit: over(self.level, made)}

    def new_codes(self) -> Mapping[str, Tensor]:
        """What else is stored anew."""
        return {}

    def parameters(self) -> Mapping[str, Tensor]:
        return {}
