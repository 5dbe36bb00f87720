"""`rtn`: round every weight to the nearest point of its group's grid.

The baseline that needs no data. It shares its grids with GPTQ; with those by minimum and maximum, a diagonal Hessian
gives both the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from layerwise.stages.compress import Task
from layerwise.stages.compress.grid import StoredGridParams, check_finite, fit, grid_or_masked, quantize

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level


class Params(StoredGridParams):
    """Bits, group size, symmetry, how grids are found and stored."""

    method: Literal["rtn"] = "rtn"
    grid: Literal["minmax", "mse"] = Field(
        "minmax", description="minmax: from the least to the greatest weight; mse: the range of least squared error"
    )

    def _name_suffixes(self) -> list[str]:
        return [*super()._name_suffixes(), *([] if self.grid == "minmax" else [self.grid])]


def rtn(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per bit-width.

    Returns:
        levels in the order of `params.bits`.
    Raises:
        NotFinite: a weight is NaN or Inf, or too large for a float16 scale.
    """
    from torch.nn.functional import pad

    from layerwise.stages.compress.grid_search import search

    weight = task.weights[task.unit]
    check_finite("weight", weight)
    lines = weight.detach().double()
    lines = lines.T if params.along_outputs else lines
    count, length = lines.shape
    group_size = params.columns_per_group(length)
    # Zeros fill up the last group. They change no grid, because the range of every grid contains zero.
    W = pad(lines, (0, -length % group_size)).reshape(count, -1, group_size)
    levels = []
    for name, bits in zip(params.level_names(), params.bits, strict=True):
        max_code = 2**bits - 1
        if params.grid == "minmax":
            scale, zero = fit(W.amin(2), W.amax(2), max_code, params.sym)
        else:
            scale, zero = search(W.movedim(2, 0), bits, sym=params.sym)
        scales, scale, zero = params.stored(scale, zero, bits)
        codes = quantize(W, scale[..., None], zero[..., None], max_code).view(count, -1)[:, :length]
        codes = codes.T if params.along_outputs else codes
        keep = task.keep.get(task.unit)
        recipe = params.grid_recipe(bits) | {"grid": params.grid}
        levels.append(grid_or_masked(name, recipe, codes, scale=scales, zero=zero, keep=keep))
    return {task.unit: levels}
