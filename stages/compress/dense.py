"""`dense`: the weight itself as a level, so that a search may leave a unit alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from layerwise.stages.compress import MenuEntry
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor


class Params(MenuEntry):
    """There is nothing to choose."""

    method: Literal["dense"] = "dense"

    def level_names(self) -> list[str]:
        """`dense`."""
        return ["dense"]


def dense(weight: Tensor, hessian: Tensor | None, params: Params) -> list[Level]:
    """Keep the weight, in the dtype that it comes in.

    Args:
        weight: (out, in).
        hessian: not read.
    Returns:
        one level.
    Raises:
        NotFinite: a weight is NaN or Inf.
    """
    from layerwise.stages.compress.grid import check_finite

    check_finite("weight", weight)
    rows, columns = weight.shape
    recipe = {"encoding": "dense", "method": "dense", "dtype": str(weight.dtype).removeprefix("torch.")}
    return [Level("dense", recipe, (rows, columns), {"weight": weight.detach().clone()})]
