"""`block_grid`: pruned in blocks and quantized: which blocks are kept, their codes, and the grids of their groups.

    mask    which are kept                          layerwise.stages.levels.index, of whole blocks
    codes   int32 (1, ceil(kept · bits / 32))       of the kept weights, row by row, packed as one row
    scale   float16 (groups,)                       of the groups of columns of which a row keeps anything, row by row
    zero    int32 (1, ceil(groups · bits / 32))     as of `grid`; absent if symmetric

Unlike `masked_grid` it stores nothing of a group that is gone. Blocks of one row and one group are GQSA's format
(arXiv:2412.17560, section 3), but for its pointers to rows, which the index makes up for. Blocks of 16 rows and more
and of whole words of the kernel's layout pack for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.kernels import labels
from layerwise.stages.levels.grid import as_stream
from layerwise.stages.levels.index import index_bits
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept, masked
from layerwise.stages.levels.scales import WHOLE

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed

KERNEL_COLUMNS = {2: 256, 3: 256, 4: 128, 8: 128}
"""By bits, what the columns of a block must be a multiple of for the kernel: whole words of `kernels/planar.py`."""
KERNEL_ROWS = 16
"""The fewest rows of a block that the kernel takes; it takes powers of two."""


def block_grid_level(
    name: str, recipe: Mapping[str, Any], codes: Tensor, *, keep: Tensor, scale: Tensor, zero: Tensor
) -> Level:
    """Encode codes, grids and blocks as a level.

    Args:
        name: the level's.
        recipe: with `method`, `sparsity`, `bits`, `group_size`, `sym` and `block`; what reading it takes is added.
        codes: (out, in), whole numbers of any dtype; those of pruned weights are not looked at.
        keep: (out, in) bool.
        scale, zero: (out, groups).
    Raises:
        NotFinite: a scale is too large for float16.
    """
    import torch

    from layerwise.kernels.packing import pack

    keep = keep.contiguous()
    tensors, index = masked(keep, recipe)
    tensors["codes"] = pack(codes.to(torch.uint8)[keep][None], recipe["bits"])
    some = _any_of_group(keep, recipe)
    tensors["scale"] = scale[some].half()
    if not tensors["scale"].isfinite().all():
        raise NotFinite(f"level {name}: a group's weights are too large for a float16 scale")
    if not recipe["sym"]:
        tensors["zero"] = as_stream(zero[some], recipe["bits"])
    rows, columns = codes.shape
    return Level(name, {"encoding": "block_grid", **recipe, **index}, (rows, columns), tensors)


def _size(recipe: Mapping[str, Any], columns: int) -> int:
    """Columns of a group."""
    size: int = recipe["group_size"]
    return columns if size == -1 else min(size, columns)


def _any_of_group(keep: Tensor, recipe: Mapping[str, Any]) -> Tensor:
    """(out, groups) bool: of which groups a row keeps anything."""
    from torch.nn.functional import pad

    size = _size(recipe, keep.shape[1])
    return pad(keep, (0, -keep.shape[1] % size)).view(len(keep), -1, size).any(2)


def _grids(level: Level, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group, (out, groups), float16 and uint8; of one that is gone, 1 and the middle."""
    import torch

    from layerwise.kernels.packing import unpack

    some, bits = _any_of_group(keep, level.recipe), level.recipe["bits"]
    scale = torch.ones(some.shape, dtype=torch.float16, device=keep.device)
    scale[some] = level.tensors["scale"]
    zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    if "zero" in level.tensors:
        zero[some] = unpack(level.tensors["zero"], bits, int(some.sum()))[0]
    return scale, zero


def whole_blocks(level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (out, in) uint8, scale and zero point of each (out, groups), and what is kept; a pruned weight has the code
    of zero."""
    from layerwise.kernels.packing import unpack

    keep = kept(level)
    scale, zero = _grids(level, keep)
    codes = zero.repeat_interleave(_size(level.recipe, keep.shape[1]), 1)[:, : keep.shape[1]].contiguous()
    codes[keep] = unpack(level.tensors["codes"], level.recipe["bits"], int(keep.sum()))[0]
    return codes, scale, zero, keep


def of_kept_groups(level: Level, part: Tensor) -> Tensor:
    """What is said of every group, (out, groups), as it is stored of those that are there."""
    return part[_any_of_group(kept(level), level.recipe)]


def _without_kernel(recipe: Mapping[str, Any]) -> str | None:
    """Why no kernel takes such blocks; None if one does."""
    (rows, columns), bits, size = recipe["block"], recipe["bits"], recipe["group_size"]
    if bits not in KERNEL_COLUMNS:
        return f"{bits} bits"
    if rows < KERNEL_ROWS or rows & (rows - 1) or columns % KERNEL_COLUMNS[bits]:
        return f"blocks of {rows}x{columns}"
    if size != -1 and columns % size:
        return f"groups of {size} in blocks of {columns} columns"
    return None


class BlockGrid:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        codes, scale, zero, _ = whole_blocks(level)
        size = _size(level.recipe, codes.shape[1])
        spread = [part.float().repeat_interleave(size, 1)[:, : codes.shape[1]] for part in (scale, zero)]
        return (codes.float() - spread[1]) * spread[0]

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return float(BlockGrid.parameters(level) * level.recipe["bits"])

    @staticmethod
    def stored_bits(level: Level) -> int:
        bits, groups = level.recipe["bits"], level.tensors["scale"].numel()
        grids = groups * (WHOLE + (0 if level.recipe["sym"] else bits))
        return int(index_bits(level) + BlockGrid.parameters(level) * bits + grids)

    @staticmethod
    def parameters(level: Level) -> int:
        return int(kept(level).sum())

    @staticmethod
    def pack(level: Level) -> Packed | None:
        from torch.nn.functional import pad

        from layerwise.kernels.block_sparse import BlockSparse

        if _without_kernel(level.recipe) is not None:
            return None
        codes, scale, zero, keep = whole_blocks(level)
        (rows, columns), (n, k) = level.recipe["block"], level.shape
        tiles = pad(keep, (0, -k % columns, 0, -n % rows)).view(-(-n // rows), rows, -(-k // columns), columns)
        one_group = level.recipe["group_size"] == -1
        return BlockSparse.pack(
            codes,
            scale,
            tiles.any(dim=3).any(dim=1),
            None if level.recipe["sym"] else zero,
            bits=level.recipe["bits"],
            group_size=-1 if one_group else level.recipe["group_size"],
            block=(rows, columns),
        )

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        why = _without_kernel(recipe)
        if why is not None:
            return f"no kernel: {why}"
        columns, size = recipe["block"][1], recipe["group_size"]
        blocks = labels.quantized(recipe["bits"], columns if size == -1 else size, recipe["sym"])
        return labels.block_sparse(blocks, round(100 * recipe["sparsity"]))
