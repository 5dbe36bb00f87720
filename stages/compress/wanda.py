"""`wanda`: a weight counts as its magnitude times the norm of its input, and is compared with those of its row.

An output is a sum over a row, so what a row loses is comparable, and rows all lose the same share. No weight is changed
but for those that go. Where rounding follows (`then`), it is to nearest, on grids that weigh a column by the square of
its norm. Convolutions in groups have norms for each group. Blocks are compared over the whole weight.

Source: Wanda, arXiv:2306.11695, section 3, equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from layerwise.stages.compress import Task, magnitude
from layerwise.stages.compress.pruning import PruningParams, chosen_by, keep_largest_of_rows, pruned_levels

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.network import Unit


class Params(PruningParams):
    """How much is pruned."""

    method: Literal["wanda"] = "wanda"

    needs: ClassVar[frozenset[str]] = frozenset({"channels"})

    def refuses(self, unit: Unit) -> str | None:
        """Nothing: rows do not depend on each other."""
        return None

    def fallback(self) -> magnitude.Params:
        """The same amounts by magnitude."""
        return magnitude.Params.model_validate(self.model_dump(exclude={"method"}))


def wanda(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level for each amount, and for each number of bits of it.

    Returns:
        levels in the order of `params.level_names`; values that are not rounded in the dtype of the checkpoint.
    Raises:
        NotFinite: a weight or a norm is NaN or Inf, or a weight too large for a float16 scale.
    """
    from layerwise.stages.calibrate.channels import SQUARES
    from layerwise.stages.compress.grid import check_finite

    weight = task.weights[task.unit]
    channels = task.statistic(task.unit, "channels").double()
    check_finite("weight", weight)
    check_finite("channels", channels)
    squares = channels[..., SQUARES, :].reshape(-1, weight.shape[1])  # (groups, in)
    squares = squares.repeat_interleave(len(weight) // len(squares), dim=0)
    saliency = weight.abs().double() * squares.sqrt()
    keeps = chosen_by(params, saliency, keep_largest_of_rows, task.keep.get(task.unit))
    return {task.unit: pruned_levels(params, weight, keeps, importance=squares)}
