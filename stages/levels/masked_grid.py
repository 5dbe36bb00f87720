"""`masked_grid`: pruned and quantized: which weights are kept, and codes for those.

    mask    which are kept                          layerwise.stages.levels.index
    codes   int32 (1, ceil(kept · bits / 32))       of the kept weights, row by row, packed as one row
    scale, zero, g_idx, ...                         as of `grid`

There is no kernel for it yet: it runs as the dense weight that it decodes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.stages.levels.grid import (
    along_outputs,
    grid_columns,
    grid_label,
    grid_overhead_bits,
    grid_tensors,
    group_grids,
    reading,
)
from layerwise.stages.levels.index import index_bits
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept, masked
from layerwise.stages.levels.scales import Scales

if TYPE_CHECKING:
    from torch import Tensor


def masked_grid_level(
    name: str,
    recipe: dict[str, Any],
    codes: Tensor,
    *,
    keep: Tensor,
    scale: Tensor | Scales,
    zero: Tensor,
    group: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Level:
    """Encode codes, grids and a mask as a level.

    Args:
        name, recipe, codes, scale, zero, group, input_scale: as of `grid.grid_level`; codes of pruned
            weights are not looked at.
        keep: (out, in) bool.
    Raises:
        NotFinite: a scale is too large for float16.
    """
    import torch

    from layerwise.kernels.packing import pack

    tensors, index = masked(keep, recipe)
    tensors["codes"] = pack(codes.to(torch.uint8)[keep][None], recipe["bits"])
    tensors |= grid_tensors(name, recipe, scale=scale, zero=zero, group=group, input_scale=input_scale)
    rows, columns = codes.shape
    reads = reading(scale, input_scale)
    return Level(name, {"encoding": "masked_grid", **recipe, **index, **reads}, (rows, columns), tensors)


def whole_grid(level: Level) -> tuple[Tensor, Tensor, Tensor | None]:
    """The grid of a `grid` or `masked_grid` level with a code for every weight; a pruned one has that of zero.

    Returns:
        codes (lines, length) uint8, scale (lines, groups) float16, zero (lines, groups) uint8 or None if symmetric.
    """
    import torch

    from layerwise.kernels.packing import unpack

    if level.recipe["encoding"] == "grid":
        codes, scale, zero, _ = grid_columns(level)
        return codes, scale.half(), zero
    bits = level.recipe["bits"]
    scale, zero, group = group_grids(level)
    middle = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8) if zero is None else zero
    codes = middle.index_select(1, group).contiguous()
    row, column = kept(level).nonzero(as_tuple=True)
    places = (column, row) if along_outputs(level.recipe) else (row, column)
    codes[places] = unpack(level.tensors["codes"], bits, len(row))[0]
    return codes, scale.half(), zero


class MaskedGrid:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        import torch

        from layerwise.kernels.packing import unpack

        bits, keep = level.recipe["bits"], kept(level)
        scale, zero, group = group_grids(level)
        row, column = keep.nonzero(as_tuple=True)
        line, place = (column, row) if along_outputs(level.recipe) else (row, column)
        grid = (line, group[place].long())
        codes = unpack(level.tensors["codes"], bits, len(row))[0].float()
        codes -= 2 ** (bits - 1) if zero is None else zero[grid].float()
        W = torch.zeros(level.shape, device=keep.device)
        W[row, column] = codes * scale[grid].float()
        if "input_scale" in level.tensors:
            W *= level.tensors["input_scale"].float()
        return W

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return float(MaskedGrid.parameters(level) * level.recipe["bits"])

    @staticmethod
    def stored_bits(level: Level) -> int:
        codes = MaskedGrid.parameters(level) * level.recipe["bits"]
        return int(index_bits(level) + codes + grid_overhead_bits(level))

    @staticmethod
    def parameters(level: Level) -> int:
        return int(kept(level).sum())

    @staticmethod
    def pack(level: Level) -> None:
        return None

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        along = " along outputs" if along_outputs(recipe) else ""
        return f"no kernel: masked {grid_label(recipe)}{along}"
