"""`adapted`: a level of any other encoding, and beside it a product of two thin matrices: W = base + B · A.

    base.<tensor>   whatever the level below stores, unchanged
    A               (r, in)    float16, bfloat16 or float32
    B               (out, r)   of the same dtype

The recipe of the level below stands in the recipe as `base`, so nothing of it is lost: its grid, its mask and its codes
are there bit for bit. An adapter laid over an adapted level is stacked onto the one that it has. Bits without overhead
are those of the level below; the adapter counts in all that is stored, in parameters and in FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.kernels import labels
from layerwise.stages.levels.level import Level, find_encoding

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed

BASE = "base"
"""Key of the recipe below, and prefix of the tensors below."""


def with_adapter(level: Level, A: Tensor, B: Tensor, *, method: str, name: str | None = None) -> Level:
    """Lay an adapter beside a level.

    Args:
        level: of a weight; itself adapted or not.
        A: (r, in).
        B: (out, r), of the same dtype, in which both are stored.
        method: what made the adapter.
        name: the new level's; that of the level below, with `+r<rank>`, if left out.
    Raises:
        NotFinite: a value is not finite, or too large for the dtype.
    """
    import torch

    if not (A.isfinite().all() and B.isfinite().all()):
        raise NotFinite(f"level {level.name}: the adapter has NaN or Inf, or values too large for {A.dtype}")
    base, tensors = level, {"A": A, "B": B}
    if level.recipe["encoding"] == "adapted":
        base = below(level)
        wide = torch.promote_types(level.tensors["A"].dtype, A.dtype)
        tensors = {
            "A": torch.cat([level.tensors["A"].to(wide), A.to(wide)]),
            "B": torch.cat([level.tensors["B"].to(wide), B.to(wide)], 1),
        }
    rank = len(tensors["A"])
    recipe = {"encoding": "adapted", "method": method, "rank": rank, "base_level": base.name, BASE: dict(base.recipe)}
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    tensors |= base.stored_as(BASE)
    return Level(name or f"{base.name}+r{rank}", recipe, level.shape, tensors)


def below(level: Level) -> Level:
    """The level below an adapter; of one that is not adapted, itself."""
    if level.recipe["encoding"] != "adapted":
        return level
    return level.inside(BASE, level.recipe["base_level"], level.shape)


def over(level: Level, base: Level) -> Level:
    """The adapter of a level, if it has one, over another level of the same weight."""
    if level.recipe["encoding"] != "adapted":
        return base
    return with_adapter(base, level.tensors["A"], level.tensors["B"], method=level.recipe["method"])


def adapter_bits(level: Level) -> int:
    """Bits of the two factors."""
    return sum(8 * level.tensors[key].element_size() * level.tensors[key].numel() for key in ("A", "B"))


class Adapted:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        product = level.tensors["B"].float() @ level.tensors["A"].float()
        return product.add_(below(level).decode())

    @staticmethod
    def nominal_bits(level: Level) -> float:
        base = below(level)
        return base.encoding.nominal_bits(base)

    @staticmethod
    def stored_bits(level: Level) -> int:
        return below(level).stored_bits + adapter_bits(level)

    @staticmethod
    def parameters(level: Level) -> int:
        return below(level).parameters + level.tensors["A"].numel() + level.tensors["B"].numel()

    @staticmethod
    def pack(level: Level) -> Packed | None:
        from layerwise.kernels.low_rank import LowRank

        base = below(level)
        packed = base.encoding.pack(base)
        return None if packed is None else LowRank(level.shape, level.tensors["A"], level.tensors["B"], packed)

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        base = find_encoding(recipe[BASE]["encoding"]).label(recipe[BASE])
        return base if base.startswith("no kernel") else labels.low_rank(recipe["rank"], base)
