"""`ternary`: of each group of a row the ternary weight that is nearest, channels weighed by the range of their inputs.

Minimised is Σ r_j² (w_j - q_j)² over q in {-s, 0, s}, r_j being the greatest magnitude of channel j. Given which
weights are not zero, the best s is Σ r_j² |w_j| / Σ r_j² over them, and given s, they are those with |w_j| > s / 2. So
they are the k greatest for some k, and the sum falls by (Σ r_j² |w_j|)² / Σ r_j²: all k are tried, and the answer is
exact but for the rounding of s to float16.

Source: the objective of Ternary Weight Networks, arXiv:1605.04711, equation 2, with weights, and without its
approximation of the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from layerwise.stages.compress import MenuEntry, Task

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level


class Params(MenuEntry):
    """Weights that share a scale."""

    method: Literal["ternary"] = "ternary"
    group_size: Annotated[
        tuple[Annotated[int, Field(ge=-1)], ...],
        BeforeValidator(
            lambda size: size if isinstance(size, list | tuple) else (size,), json_schema_input_type=int | list[int]
        ),
    ] = Field((-1,), min_length=1, description="input weights that share one scale, -1 for the whole row; or a list")

    needs: ClassVar[frozenset[str]] = frozenset({"input_range"})

    @field_validator("group_size")
    @classmethod
    def _distinct(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if 0 in sizes or len(set(sizes)) != len(sizes):
            raise ValueError("must be different numbers of at least 1, or -1")
        return sizes

    def level_names(self) -> list[str]:
        """`ternary-row`, `ternary-g64`, ..."""
        return [f"ternary-{'row' if size == -1 else f'g{size}'}" for size in self.group_size]

    def nominal_bits(self) -> list[float]:
        """The information of a ternary digit."""
        return [math.log2(3)] * len(self.group_size)


def ternary(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level for each group size.

    Raises:
        NotFinite: a weight or a range is NaN or Inf, or a weight too large for a float16 scale.
    """
    from layerwise.stages.compress.grid import check_finite
    from layerwise_example.ternary_encoding import ternary_level

    weight, ranges = task.weights[task.unit], task.statistic(task.unit, "input_range")
    check_finite("weight", weight)
    check_finite("input range", ranges)
    W = weight.detach().double()
    if task.unit in task.keep:
        W = W * task.keep[task.unit]
    importance = ranges.abs().amax(0).double().square().to(W.device)
    levels = []
    for name, size in zip(params.level_names(), params.group_size, strict=True):
        signs, scale = nearest_ternary(W, importance, W.shape[1] if size == -1 else size)
        levels.append(ternary_level(name, {"method": "ternary", "group_size": size}, signs, scale))
    return {task.unit: levels}


def nearest_ternary(W: Tensor, importance: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Signs and scales of the nearest ternary weight.

    Args:
        W: (out, in) float64.
        importance: (in,), at least 0; where it is 0 throughout a group, its weights count all the same.
        group_size: columns that share a scale.
    Returns:
        signs (out, in), and scales (out, groups) that float16 holds.
    """
    import torch
    from torch.nn.functional import pad

    rows, columns = W.shape
    missing = -columns % group_size
    size = pad(W.abs(), (0, missing)).view(rows, -1, group_size)
    share = pad(importance, (0, missing)).view(1, -1, group_size)
    share = torch.where(share.sum(2, keepdim=True) > 0, share, torch.ones_like(share)).expand_as(size)
    descending, order = size.sort(dim=2, descending=True, stable=True)
    weights = share.gather(2, order)
    above, amount = (weights * descending).cumsum(2), weights.cumsum(2)
    gain = torch.where(amount > 0, above.square() / amount, torch.zeros_like(above))
    best = gain.argmax(2, keepdim=True)
    scale = torch.where(gain > 0, above / amount, torch.zeros_like(above)).gather(2, best).half().double()
    kept = size > scale / 2
    signs = pad(W.sign(), (0, missing)).view_as(size) * kept
    return signs.view(rows, -1)[:, :columns], scale[..., 0]
