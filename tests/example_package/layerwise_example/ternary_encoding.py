"""`ternary`: weights that are -s, 0 or s, one s for each group of a row.

    codes   uint8 (out, ceil(in / 5))     five weights a byte: the sum of (sign + 1) · 3^i, i = 0 .. 4
    scale   float16 (out, groups)         s

Five digits of base 3 make 243 of the 256 values of a byte: 1.6 bits a weight, of which 1.585 = log2(3) are information.
On a kernel it is a grid of 2 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed

DIGITS = 5


def ternary_level(name: str, recipe: Mapping[str, Any], signs: Tensor, scale: Tensor) -> Level:
    """Encode a ternary weight.

    Args:
        name: the level's.
        recipe: with `method` and `group_size`, -1 for the whole row.
        signs: (out, in), -1, 0 or 1 in any dtype.
        scale: (out, groups).
    Raises:
        NotFinite: a scale is too large for float16.
    """
    import torch
    from torch.nn.functional import pad

    if not scale.half().isfinite().all():
        raise NotFinite(f"level {name}: a group's weights are too large for a float16 scale")
    rows, columns = signs.shape
    digits = pad(signs.to(torch.int64) + 1, (0, -columns % DIGITS)).view(rows, -1, DIGITS)
    codes = (digits * _places(signs)).sum(2).to(torch.uint8)
    return Level(name, {"encoding": "ternary", **recipe}, (rows, columns), {"codes": codes, "scale": scale.half()})


def signs_of(level: Level) -> Tensor:
    """(out, in) int64: -1, 0 or 1."""
    codes = level.tensors["codes"].long()
    return (codes[..., None] // _places(codes) % 3).flatten(1)[:, : level.shape[1]] - 1


def _places(like: Tensor) -> Tensor:
    import torch

    return 3 ** torch.arange(DIGITS, device=like.device)


class Ternary:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        columns, size = level.shape[1], level.recipe["group_size"]
        scale = level.tensors["scale"].float().repeat_interleave(columns if size == -1 else size, 1)[:, :columns]
        return signs_of(level) * scale

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return level.n_weights * math.log2(3)

    @staticmethod
    def stored_bits(level: Level) -> int:
        return -(-level.n_weights * 8 // DIGITS) + 16 * level.tensors["scale"].numel()

    @staticmethod
    def parameters(level: Level) -> int:
        return level.n_weights

    @staticmethod
    def pack(level: Level) -> Packed:
        import torch

        from layerwise.kernels.quantized import Quantized

        size = level.recipe["group_size"]
        codes = (signs_of(level) + 2).to(torch.uint8)  # a symmetric grid of 2 bits has its zero at 2
        group_size = -1 if size == -1 or size >= level.shape[1] else size
        return Quantized.pack(codes, level.tensors["scale"], bits=2, group_size=group_size)

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        return f"ternary {recipe['group_size']}"
