"""`channels`: what is known of each input channel: (4, in), float32.

    row 0   sum of squares       Wanda's norm is its root, arXiv:2306.11695, section 3
    row 1   sum of magnitudes    AWQ's activation scale, less the division by the tokens, arXiv:2306.00978, section 3.2
    row 2   greatest magnitude   SmoothQuant's, arXiv:2211.10438, section 4
    row 3   sum                  the mean, for corrections of biases

A unit that is looked up (an embedding) has ones, times the number of tokens where they are sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.stages.calibrate import Statistic

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.network import Unit

SQUARES, MAGNITUDES, GREATEST, SUMS = range(4)


def _measure(X: Tensor) -> Tensor:
    import torch

    rows = X.float()
    magnitudes = rows.abs()
    greatest = magnitudes.amax(0) if len(rows) else rows.new_zeros(rows.shape[1])
    return torch.stack([rows.square().sum(0), magnitudes.sum(0), greatest, rows.sum(0)])


def _merge(a: Tensor, b: Tensor) -> Tensor:
    merged = a + b
    merged[GREATEST] = a[GREATEST].maximum(b[GREATEST])
    return merged


def _neutral(unit: Unit, n_tokens: int) -> Tensor:
    import torch

    rows = torch.full((4, unit.shape[1]), float(n_tokens))
    rows[GREATEST] = 1
    return rows


CHANNELS = Statistic("inputs", _measure, _merge, _neutral, size_bytes=lambda unit: 16 * unit.shape[1])
