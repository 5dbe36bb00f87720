"""`grid`: integer codes on a uniform grid, one scale (and zero point) for each group of a row.

    codes   int32 (out, ceil(in · bits / 32))      packed, layerwise.kernels.packing
    scale   float16 (out, groups)
    zero    int32 (out, ceil(groups · bits / 32))  packed like the codes; absent if symmetric, then 2^(bits-1)
    g_idx   int32 (in,)                            group of each column; absent if columns are grouped in their order

A weight is (code - zero) · scale, exactly: in float32 a code less a zero point has 9 bits, a float16 scale 11.
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

KERNEL_BITS = (2, 3, 4, 8)
"""Widths of a grid that kernels take; the others do not divide a word into equal fields and planes."""


def grid_level(
    name: str, recipe: dict[str, Any], codes: Tensor, *, scale: Tensor, zero: Tensor, group: Tensor | None = None
) -> Level:
    """Encode codes and grids as a level.

    Args:
        name: the level's.
        recipe: with `method`, `bits`, `group_size` and `sym`; `encoding` is added.
        codes: (out, in), whole numbers of any dtype.
        scale, zero: (out, groups).
        group: (in,), the group of each column if columns are not grouped in their order.
    Raises:
        NotFinite: a scale is too large for float16.
    """
    import torch

    from layerwise.kernels.packing import pack

    tensors = {"codes": pack(codes.to(torch.uint8), recipe["bits"])}
    tensors |= grid_tensors(name, recipe, scale=scale, zero=zero, group=group)
    rows, columns = codes.shape
    return Level(name, {"encoding": "grid", **recipe}, (rows, columns), tensors)


def grid_tensors(
    name: str, recipe: Mapping[str, Any], *, scale: Tensor, zero: Tensor, group: Tensor | None
) -> dict[str, Tensor]:
    """What is stored of the grids themselves; arguments and errors as of `grid_level`."""
    import torch

    from layerwise.kernels.packing import pack

    if not scale.isfinite().all():
        raise NotFinite(f"level {name}: a group's weights are too large for a float16 scale")
    tensors = {"scale": scale.half().contiguous()}
    if not recipe["sym"]:
        tensors["zero"] = pack(zero.to(torch.uint8), recipe["bits"])
    if group is not None:
        tensors["g_idx"] = group.to(torch.int32)
    return tensors


def grid_columns(level: Level) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The unpacked parts of a `grid` level, for kernels and exports that lay them out anew.

    Returns:
        codes (out, in) uint8, scale (out, groups) float16, zero (out, groups) uint8 or None if symmetric, and the
        group of each column (in,) int32.
    """
    from layerwise.kernels.packing import unpack

    scale, zero, group = group_grids(level)
    return unpack(level.tensors["codes"], level.recipe["bits"], level.shape[1]), scale, zero, group


def group_grids(level: Level) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scale, zero point and the group of each column, as `grid_columns` gives them."""
    import torch

    from layerwise.kernels.packing import unpack

    tensors, columns = level.tensors, level.shape[1]
    scale = tensors["scale"]
    zero = unpack(tensors["zero"], level.recipe["bits"], scale.shape[1]) if "zero" in tensors else None
    if "g_idx" in tensors:
        group = tensors["g_idx"]
    else:
        size = columns if level.recipe["group_size"] == -1 else level.recipe["group_size"]
        group = torch.arange(columns, dtype=torch.int32, device=scale.device) // size
    return scale, zero, group


def grid_overhead_bits(level: Level) -> int:
    """Bits of scales, zero points and group index."""
    groups = level.tensors["scale"].numel()
    zeros = groups * level.recipe["bits"] if "zero" in level.tensors else 0
    index = 32 * level.shape[1] if "g_idx" in level.tensors else 0
    return int(16 * groups + zeros + index)


def grid_label(recipe: Mapping[str, Any]) -> str:
    """`int4-g128-sym`, ...: bits, group size, symmetry and order."""
    ordered = recipe.get("desc_act") is True and recipe["group_size"] != -1
    return labels.quantized(recipe["bits"], recipe["group_size"], recipe["sym"], ordered)


class Grid:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        codes, scale, zero, group = grid_columns(level)
        W = codes.float()
        W -= 2 ** (level.recipe["bits"] - 1) if zero is None else zero.float().index_select(1, group)
        W *= scale.float().index_select(1, group)
        return W

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return float(level.n_weights * level.recipe["bits"])

    @staticmethod
    def stored_bits(level: Level) -> int:
        return int(level.n_weights * level.recipe["bits"]) + grid_overhead_bits(level)

    @staticmethod
    def parameters(level: Level) -> int:
        return level.n_weights

    @staticmethod
    def pack(level: Level) -> Packed | None:
        import torch

        from layerwise.kernels.quantized import Quantized

        bits, size, columns = level.recipe["bits"], level.recipe["group_size"], level.shape[1]
        if bits not in KERNEL_BITS:
            return None
        codes, scale, zero, group = grid_columns(level)
        order = None
        if "g_idx" in level.tensors:
            order = group.argsort(stable=True).to(torch.int32)
            in_order = torch.arange(columns, dtype=group.dtype, device=group.device) // size
            if not torch.equal(group[order], in_order):
                return None  # groups of unequal sizes: a kernel finds a column's group by division
        one_group = size == -1 or size >= columns
        return Quantized.pack(codes, scale, zero, bits=bits, group_size=-1 if one_group else size, order=order)

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        if recipe["bits"] not in KERNEL_BITS:
            return f"no kernel: {recipe['bits']} bits"
        return grid_label(recipe)
