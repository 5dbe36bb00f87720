"""The nonzero weights of a sparse format, in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import UsageError

HALVES = (torch.float16, torch.bfloat16)
"""The dtypes in which sparse formats keep their weights."""


def dtype_name(dtype: torch.dtype) -> str:
    """`float16`."""
    return str(dtype).removeprefix("torch.")


def half_values(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in the dtype in which its nonzeros are stored.

    Args:
        weight: any float dtype.
        dtype: float16 or bfloat16; None keeps one of these as it is and rounds anything else to float16.
    Raises:
        UsageError: another dtype, or a weight that is not finite there.
    """
    stored = dtype or (weight.dtype if weight.dtype in HALVES else torch.float16)
    if stored not in HALVES:
        raise UsageError(f"sparse weights are stored in float16 or bfloat16, not {dtype_name(stored)}")
    values = weight.to(stored)
    if not values.isfinite().all():
        row = int((~values.isfinite()).any(dim=1).nonzero()[0])
        raise UsageError(
            f"row {row} of the weight is not finite in {dtype_name(stored)} "
            f"(largest magnitude {float(weight[row].abs().max()):.6g})",
            hint="store it in bfloat16, which has the range of float32, or make the level again if it is not finite",
        )
    return values
