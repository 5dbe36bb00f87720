"""A weight, usually quantized, plus a product of two thin matrices: W = base + B · A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import labels
from layerwise.kernels.packed import Packed


@dataclass(frozen=True, eq=False)
class LowRank(Packed):
    """Two factors, and what they repair.

    Args:
        A: (r, k), any float dtype; kernels take float16 and bfloat16.
        B: (n, r), of the same dtype.
        base: (n, k), None if the factors are all there is.
    """

    format: ClassVar[str] = "low_rank"

    A: Tensor
    B: Tensor
    base: Packed | None

    def __post_init__(self) -> None:
        (n, k), rank = self.shape, self.A.shape[0]
        if self.A.shape != (rank, k) or self.B.shape != (n, rank):
            raise UsageError(
                f"factors of a {n} x {k} weight must be (r, {k}) and ({n}, r), "
                f"not {tuple(self.A.shape)} and {tuple(self.B.shape)}"
            )
        if self.base is not None and self.base.shape != (n, k):
            raise UsageError(f"the base of a {n} x {k} weight is {' x '.join(map(str, self.base.shape))}")

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    @property
    def label(self) -> str:
        """`int4-g128-sym+r64`, or `r64`."""
        return labels.low_rank(self.rank, None if self.base is None else self.base.label)

    def dense(self) -> Tensor:
        """base + B · A, in float32."""
        product = self.B.float() @ self.A.float()
        return product if self.base is None else product.add_(self.base.dense())
