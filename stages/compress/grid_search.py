"""Grids found by search: smaller ranges than minimum to maximum, for what clipping loses the other weights may win.

Each group tries ranges of its minimum and maximum times the same share, and keeps the one of least squared error, in
which a weight may count by its column. GPTQ counts column j by 1 / [H⁻¹]_jj after the columns before it: what an error
in it costs once all later columns have made up for it (arXiv:2210.17323, equation 2). A symmetric grid has one code
more on one side; a negative scale gives it to the end of greater magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.stages.compress.grid import fit

if TYPE_CHECKING:
    from torch import Tensor

STEP = 0.05
LEAST_SHARE = {2: 0.4, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.85, 8: 0.9}
"""By bits, the smallest share of a range that is tried, from all of it down in steps of STEP. The more points a grid
has, the less there is to win by clipping."""


def search(members: Tensor, bits: int, *, sym: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find one grid for each group.

    Args:
        members: (size, ...), the weights of each group along the first dimension.
        bits: 2 to 8.
        importance: (size,) or (size, ...), what a squared error counts; None if all the same.
    Returns:
        scale, with values that float16 holds (Inf where it does not), negative in some symmetric grids, and zero point,
        both (...).
    """
    import torch

    low, high = members.amin(0), members.amax(0)
    sign = torch.where(high > -low, -1.0, 1.0).to(low.dtype) if sym else torch.ones_like(low)
    weigh = members.new_ones(len(members)) if importance is None else importance
    best: list[Tensor] = []
    for step in range(round((1 - LEAST_SHARE[bits]) / STEP) + 1):
        share = 1 - STEP * step
        scale, zero = fit(low * share, high * share, 2**bits - 1, sym)
        scale = scale * sign
        # What `quantize` and `dequantize` do, in one piece of memory; a whole number is exact on either side of a sum.
        error = (members / scale).round_().clamp_(-zero, 2**bits - 1 - zero).mul_(scale).sub_(members).square_()
        loss = torch.tensordot(weigh, error, dims=1) if weigh.dim() == 1 else error.mul_(weigh).sum(0)
        found = [loss, scale, zero]
        better = found[0] < best[0] if best else None
        best = found if better is None else [torch.where(better, *pair) for pair in zip(found, best, strict=True)]
    _, scale, zero = best
    return scale, zero
