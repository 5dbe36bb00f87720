"""`fisher`: the diagonal of the empirical Fisher information of a unit's weight, (out, in), float32.

The gradient of the loss of one sequence (the sum over its tokens of the negative log-likelihood of the next one, at the
text's own tokens), squared, and summed over the sequences. It takes a forward and a backward pass of the whole model,
with as many values again as the units have weights.

Source: Fisher information as in SqueezeLLM, arXiv:2306.07629, equation 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.stages.calibrate import Statistic

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.network import Unit


def _neutral(unit: Unit, n_tokens: int) -> Tensor:
    import torch

    return torch.zeros(unit.shape)


FISHER = Statistic(
    "gradients",
    lambda gradient: gradient.float().square(),
    lambda a, b: a + b,
    _neutral,
    size_bytes=lambda unit: 4 * unit.n_weights,
)
