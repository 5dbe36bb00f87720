"""`block_qat`: codes, scales and zero points of grids, trained block by block: each block, on what the repaired blocks
before it leave, answers as it does in the dense model.

That needs the gradients of one block at a time, and moves much in few steps, so it comes before what is trained end to
end (`step_size`, `qat`). Groups and masks stay, and the size is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from layerwise.stages.quantities import Count
from layerwise.stages.recover import qat

if TYPE_CHECKING:
    from layerwise.stages.models.network import Unit
    from layerwise.stages.recover.parts import ModelRepair, Part


class Params(qat.Params):
    """As of `qat`, for one block after the other."""

    method: Literal["block_qat"] = "block_qat"  # type: ignore[assignment]
    steps: Count = Field(50, description="of the optimizer, for each block")
    warmup: int = Field(0, ge=0, description="first steps of a block, in which the learning rate rises from zero")

    by_block: ClassVar[bool] = True

    def misfit_of(self, unit: Unit, recipe: Mapping[str, Any]) -> str | None:
        """It fits what stands in a block."""
        return "it stands in no block" if unit.block is None else self.misfit(recipe)

    def for_units(self, units: Sequence[Unit]) -> Self:
        """One stretch for each block."""
        blocks = {unit.block for unit in units}
        return self.model_copy(update={"steps": self.steps * len(blocks), "check_every": self.steps})


def block_qat(task: ModelRepair, params: Params) -> list[Part]:
    """The grids of each unit, codes included.

    Source: EfficientQAT, arXiv:2407.11062, section 3.2 (Block-AP).
    """
    return qat.qat(task, params)
