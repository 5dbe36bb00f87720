"""The dense weight itself: what every format falls back to, and what every kernel is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.kernels import labels
from layerwise.kernels.packed import Packed


@dataclass(frozen=True, eq=False)
class Dense(Packed):
    """A weight as it is.

    Args:
        weight: (n, k), any float dtype.
    """

    format: ClassVar[str] = "dense"

    weight: Tensor

    @property
    def label(self) -> str:
        """Always `dense`."""
        return labels.DENSE

    def dense(self) -> Tensor:
        """The weight in float32."""
        return self.weight.float()
