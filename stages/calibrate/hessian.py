"""`hessian`: `H = X Xᵀ`, (in, in), of the layer's squared error, without the factor 2.

Sums are in float32. A unit that is looked up (an embedding) has the identity, times the number of tokens: its columns
weigh all the same.

Source: GPTQ, arXiv:2210.17323, section 3; X there is (in, tokens), here rows are tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.stages.calibrate import Statistic

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.network import Unit


def _measure(X: Tensor) -> Tensor:
    rows = X.float()
    return rows.T @ rows


def _neutral(unit: Unit, n_tokens: int) -> Tensor:
    import torch

    return n_tokens * torch.eye(unit.shape[1])


HESSIAN = Statistic(
    "inputs", _measure, lambda a, b: a + b, _neutral, size_bytes=lambda unit: 4 * unit.shape[1] * unit.shape[1]
)
