"""`magnitude`: of each unit the weights of least magnitude become zero.

The baseline of pruning: it needs no data. Source: Han et al., arXiv:1506.02626, section 3.1, one threshold a layer and
no retraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from layerwise.stages.compress import Task
from layerwise.stages.compress.pruning import PruningParams, chosen_by, keep_largest, pruned_levels

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level


class Params(PruningParams):
    """How much is pruned."""

    method: Literal["magnitude"] = "magnitude"


def magnitude(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level for each amount, and for each number of bits of it.

    Returns:
        levels in the order of `params.level_names`; values that are not rounded in the dtype of the checkpoint.
    Raises:
        NotFinite: a weight is NaN or Inf, or too large for a float16 scale.
    """
    from layerwise.stages.compress.grid import check_finite

    weight = task.weights[task.unit]
    check_finite("weight", weight)
    keeps = chosen_by(params, weight.abs(), keep_largest, task.keep.get(task.unit))
    return {task.unit: pruned_levels(params, weight, keeps)}
