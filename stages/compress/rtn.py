"""`rtn`: round every weight to the nearest point of its group's grid.

The baseline that needs no data. It shares its grid with GPTQ, and with a diagonal Hessian both give the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from layerwise.stages.compress import Task
from layerwise.stages.compress.grid import GridParams, check_finite, fit, grid_or_masked, quantize

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level


class Params(GridParams):
    """Bits, group size, symmetry."""

    method: Literal["rtn"] = "rtn"


def rtn(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per bit-width.

    Returns:
        levels in the order of `params.bits`.
    Raises:
        NotFinite: a weight is NaN or Inf, or too large for a float16 scale.
    """
    from torch.nn.functional import pad

    weight = task.weights[task.unit]
    check_finite("weight", weight)
    rows, columns = weight.shape
    group_size = params.columns_per_group(columns)
    # Zeros fill up the last group. They change no grid, because the range of every grid contains zero.
    W = pad(weight.detach().double(), (0, -columns % group_size)).view(rows, -1, group_size)
    levels = []
    for name, bits in zip(params.level_names(), params.bits, strict=True):
        max_code = 2**bits - 1
        scale, zero = fit(W.amin(2), W.amax(2), max_code, params.sym)
        codes = quantize(W, scale[..., None], zero[..., None], max_code).view(rows, -1)[:, :columns]
        recipe = {"method": "rtn", "bits": bits, "group_size": params.group_size, "sym": params.sym}
        levels.append(grid_or_masked(name, recipe, codes, scale=scale, zero=zero, keep=task.keep.get(task.unit)))
    return {task.unit: levels}
