"""`input_range`: the least and the greatest input of each channel, zero included: (2, in), float32.

    row 0   minimum, at most 0
    row 1   maximum, at least 0

Zero is in every range, because it is in that of every grid; so a batch without tokens has the range of nothing.
A unit that is looked up (an embedding) has -1 and 1: its columns weigh all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.stages.calibrate import Statistic

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.network import Unit


def _measure(X: Tensor) -> Tensor:
    import torch

    rows = torch.cat([X.float(), X.new_zeros((1, X.shape[1]), dtype=torch.float32)])
    return torch.stack([rows.amin(0), rows.amax(0)])


def _merge(a: Tensor, b: Tensor) -> Tensor:
    import torch

    return torch.stack([a[0].minimum(b[0]), a[1].maximum(b[1])])


def _neutral(unit: Unit, n_tokens: int) -> Tensor:
    import torch

    return torch.tensor([[-1.0], [1.0]]).expand(2, unit.shape[1]).contiguous()


INPUT_RANGE = Statistic("inputs", _measure, _merge, _neutral, size_bytes=lambda unit: 8 * unit.shape[1])
