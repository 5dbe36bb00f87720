"""`low_rank`: a weight that is the product of two thin matrices and nothing else: W = B · A.

    A.<tensor>   a level of shape (r, in), of any encoding of weights
    B.<tensor>   one of shape (out, r)

The recipes of the factors stand in the recipe as `A` and `B`, so that they may be stored as they are or on a grid.
Every number counts everything of both. What stands beside another level is `adapted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.kernels import labels
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed


def low_rank_level(name: str, recipe: Mapping[str, Any], A: Level, B: Level) -> Level:
    """Join two factors into a level.

    Args:
        name: the level's.
        recipe: with `method`; what reading it takes is added.
        A: (r, in).
        B: (out, r).
    Raises:
        NotFinite: a value is not finite, or too large for its dtype.
    """
    tensors = A.stored_as("A") | B.stored_as("B")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NotFinite(f"level {name}: {key} has NaN or Inf, or values too large for {tensor.dtype}")
    factors = {"A": dict(A.recipe), "B": dict(B.recipe)}
    shape = (B.shape[0], A.shape[1])
    return Level(name, {"encoding": "low_rank", **recipe, "rank": A.shape[0], **factors}, shape, tensors)


def factors_of(level: Level) -> tuple[Level, Level]:
    """A (r, in) and B (out, r) as levels."""
    (rows, columns), rank = level.shape, level.recipe["rank"]
    return level.inside("A", f"{level.name}.A", (rank, columns)), level.inside("B", f"{level.name}.B", (rows, rank))


class LowRank:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        A, B = factors_of(level)
        return B.decode() @ A.decode()

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return sum(factor.encoding.nominal_bits(factor) for factor in factors_of(level))

    @staticmethod
    def stored_bits(level: Level) -> int:
        return sum(factor.stored_bits for factor in factors_of(level))

    @staticmethod
    def parameters(level: Level) -> int:
        return sum(factor.parameters for factor in factors_of(level))

    @staticmethod
    def pack(level: Level) -> Packed | None:
        from layerwise.kernels.low_rank import LowRank as Packed

        A, B = factors_of(level)
        if not _whole(level.recipe):
            return None
        return Packed(level.shape, A.tensors["weight"], B.tensors["weight"], None)

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        if not _whole(recipe):
            return "no kernel: low_rank with factors on grids"
        return labels.low_rank(recipe["rank"], None)


def _whole(recipe: Mapping[str, Any]) -> bool:
    """Whether both factors are stored as they are."""
    return all(recipe[key]["encoding"] == "dense" for key in ("A", "B"))
