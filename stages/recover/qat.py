"""`qat`: codes, scales and zero points of grids, trained end to end. Groups and masks stay, and the size is the same.

Every code has a real number behind it, in steps of the grid, which is rounded on the way; the gradient passes straight
through where the rounded one is inside of the grid. It starts within the cell of the code that was stored, as near to
the dense weight as that cell goes: the model begins as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from layerwise.stages.recover.step_size import StepParams, Steps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.recover.parts import ModelRepair, Part

WITHIN = 0.49
"""How far from a code, in steps, what is behind it may start."""


class Params(StepParams):
    """As of every repair that trains grids, and how far codes move."""

    method: Literal["qat"] = "qat"
    codes: float = Field(
        3.0, gt=0, description="how many times as far as scales what is behind the codes moves, in steps of the grid"
    )


def qat(task: ModelRepair, params: Params) -> list[Part]:
    """The grids of each unit, codes included.

    Source: LSQ, arXiv:1902.08153, and EfficientQAT, arXiv:2407.11062, section 3.2, whose first phase trains the same
        block by block.
    """
    return [Codes(name, level, task.dense(name), params) for name, (_, level) in task.levels.items()]


class Codes(Steps):
    """The grid and the codes of one unit."""

    def __init__(self, unit: str, level: Level, weight: Tensor, params: Params) -> None:
        super().__init__(unit, level, params)
        self.rate = params.codes
        step = self.factor * self.scale.index_select(1, self.parts.scale_of)
        wanted = weight.float() if self.beside is None else weight.float() - self.beside
        exact = (wanted / step).where(step != 0, step) + self.zero.index_select(1, self.parts.group)
        self.latent = self.codes + (exact - self.codes).nan_to_num(0).clamp(-WITHIN, WITHIN)

    @property
    def free(self) -> Mapping[str, Tensor]:
        return {**super().free, f"{self.unit}/codes": self.latent}

    @property
    def rates(self) -> Mapping[str, float]:
        return {**super().rates, f"{self.unit}/codes": self.rate}

    def stored_codes(self) -> Tensor:
        from layerwise.stages.compress.tuning import round_through

        return round_through(self.latent).clamp(0, 2 ** self.base.recipe["bits"] - 1)

    def new_codes(self) -> Mapping[str, Tensor]:
        import torch

        from layerwise.kernels.packing import pack
        from layerwise.stages.levels.mask import kept

        codes = self.stored_codes().detach().to(torch.uint8)
        if "mask" in self.base.tensors:
            codes = codes[kept(self.base)][None]
        return {"codes": pack(codes, self.base.recipe["bits"])}
