"""A grid, grouped along inputs, taken apart into what repairs move: scales and zero points, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level


def grid_misfit(recipe: Mapping[str, Any]) -> str | None:
    """Why a level has no such parts; None if it has."""
    if recipe["encoding"] not in ("grid", "masked_grid", "block_grid"):
        return f"{recipe['encoding']} has no scales of rows"
    along = recipe.get("group_along") == "outputs"
    return "its groups lie along outputs, so that no row has scales of its own" if along else None


@dataclass(frozen=True)
class GridParts:
    """A weight is (codes - zero[:, group]) · factor · scale[:, scale_of].

    With quantized scales the stored ones are those above several groups, and that is exact but for the rounding of each
    group's product to float16.

    Args:
        codes: (out, in), float64; those of pruned weights are the zero point.
        zero: (out, groups), float64.
        group: (in,), int64, the group of each column.
        factor: (out, in), float64: zero where a weight was pruned, input scales, and shares of quantized scales.
        scale: (out, scales), float64.
        scale_of: (in,), int64, the scale of each column.
        key: the tensor of the level that `scale` is: `scale` or `scale_above`.
    """

    codes: Tensor
    zero: Tensor
    group: Tensor
    factor: Tensor
    scale: Tensor
    scale_of: Tensor
    key: str

    @classmethod
    def of(cls, level: Level) -> GridParts:
        """Those of a `grid`, `masked_grid` or `block_grid` level."""
        import torch

        from layerwise.kernels.packing import unpack
        from layerwise.stages.levels.block_grid import whole_blocks
        from layerwise.stages.levels.grid import group_grids
        from layerwise.stages.levels.mask import kept
        from layerwise.stages.levels.masked_grid import whole_grid

        tensors, recipe = level.tensors, level.recipe
        blocks = recipe["encoding"] == "block_grid"
        codes, scale, zero = whole_blocks(level)[:3] if blocks else whole_grid(level)
        group = group_grids(level)[2].long()
        middle = torch.full(scale.shape, 2.0 ** (recipe["bits"] - 1), dtype=torch.float64, device=scale.device)
        factor = torch.ones(codes.shape, dtype=torch.float64, device=codes.device)
        if "mask" in tensors:
            factor *= kept(level)
        if "input_scale" in tensors:
            factor *= tensors["input_scale"].double()
        scale_of, key = group, "scale"
        if "scale_codes" in tensors:
            top = 2 ** (recipe["scale_bits"] - recipe["scale_signed"])
            stored = unpack(tensors["scale_codes"], recipe["scale_bits"], scale.numel()).view(scale.shape).double()
            negative = stored >= top
            shares = (stored - top * negative + 1) / top
            factor *= shares.where(~negative, -shares).index_select(1, group)
            scale_of = group * 0 if recipe["scale_group"] == -1 else group // recipe["scale_group"]
            key = "scale_above"
        zeros = middle if zero is None else zero.double()
        stored_scale = tensors[key] if key == "scale_above" else scale
        return cls(codes.double(), zeros, group, factor, stored_scale.double(), scale_of, key)


def as_stored(level: Level, key: str, scale: Tensor, zero: Tensor | None = None) -> dict[str, Tensor]:
    """New scales, and zero points, as tensors of a level.

    Args:
        key, scale: as of `GridParts`.
        zero: (out, groups), whole numbers of any dtype; None to leave them.
    """
    from layerwise.stages.levels.block_grid import of_kept_groups
    from layerwise.stages.levels.grid import as_stream

    if level.recipe["encoding"] == "block_grid":
        scale, zero = of_kept_groups(level, scale), None if zero is None else of_kept_groups(level, zero)
    found = {key: scale.half()}
    return found if zero is None else found | {"zero": as_stream(zero, level.recipe["bits"])}
