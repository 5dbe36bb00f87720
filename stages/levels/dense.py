"""`dense`: the weight itself, in the dtype of the checkpoint.

    weight   (out, in)

Level 0 of every unit is encoded so. In a database it has no tensors of its own: it is read from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.kernels import labels
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed


def dense_level(weight: Tensor) -> Level:
    """A weight (out, in) as a level."""
    rows, columns = weight.shape
    recipe = {"encoding": "dense", "method": "dense", "dtype": str(weight.dtype).removeprefix("torch.")}
    return Level("dense", recipe, (rows, columns), {"weight": weight})


class Dense:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        return level.tensors["weight"].float()

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return level.n_weights * 8 * level.tensors["weight"].element_size()

    @staticmethod
    def stored_bits(level: Level) -> int:
        return level.n_weights * 8 * level.tensors["weight"].element_size()

    @staticmethod
    def parameters(level: Level) -> int:
        return level.n_weights

    @staticmethod
    def pack(level: Level) -> Packed:
        from layerwise.kernels.dense import Dense as Packed

        return Packed(level.shape, level.tensors["weight"])

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        return labels.DENSE
