"""`trellis_nearest`: every sequence of weights to the nearest one that the trellis knows.

What `rtn` is to `gptq`, this is to `trellis`: it needs no data, and it is what experts get that too few tokens reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from layerwise.stages.compress import Task
from layerwise.stages.compress.grid import check_finite
from layerwise.stages.compress.precision import working_dtype
from layerwise.stages.compress.trellis import TrellisParams, coded

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level


class Params(TrellisParams):
    """Bits, states, tiles, scales."""

    method: Literal["trellis_nearest"] = "trellis_nearest"


def trellis_nearest(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per number of bits.

    Returns:
        levels in the order of `params.bits`.
    Raises:
        NotFinite: a weight is NaN or Inf, or too large for a float16 scale.
    Source: QTIP, arXiv:2406.11235, without its feedback.
    """
    weight = task.weights[task.unit]
    check_finite("weight", weight)
    return {
        task.unit: coded(weight.detach().to(working_dtype(weight.device)), None, params, keep=task.keep.get(task.unit))
    }
