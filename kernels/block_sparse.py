"""Quantized weights of which whole blocks are zero and not stored.

W is cut into tiles of `rows` rows, tiles into blocks of `columns` columns. The kept blocks of all tiles, one after the
other, stand side by side as one `Quantized` of `rows` rows: the layout, fields and scales of a kept block are those of
a dense quantized weight, and a kernel walks over the blocks of a tile as it walks over the columns of a row. `starts`
and `index` say which blocks a tile has.

Blocks are as large as a tile of a tensor core kernel wants (64 or 128 rows, whole planar blocks of columns), so a kept
weight costs what a dense one costs. With one scale for each row (group size -1) each block keeps its own copy of it.

Left out: finer patterns (groups of one row), and act-order: blocks are runs of the weight's own columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from layerwise.errors import UsageError
from layerwise.kernels import labels, planar
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized


@dataclass(frozen=True, eq=False)
class BlockSparse(Packed):
    """The kept blocks of a quantized weight.

    Args:
        blocks: (rows, kept · columns), the kept blocks side by side, by tile and column; at least one block, so that
            there is something to point at (of zeros and belonging to no tile if nothing is kept).
        index: (kept + 1,) int32, which block of its row of blocks each is: its first column / columns; and a 0, because
            kernels read one ahead.
        starts: (tiles + 1,) int32, the first kept block of each tile; the last entry is kept.
        block: rows and columns of a block.
    """

    format: ClassVar[str] = "block_sparse"

    blocks: Quantized
    index: Tensor
    starts: Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))  # JSON has lists only

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        keep: Tensor,
        zero: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        block: tuple[int, int] = (64, 256),
    ) -> Self:
        """Lay the kept blocks of a weight out.

        Args:
            codes: (n, k) uint8.
            scale: (n, ceil(k / group_size)) float16.
            keep: (ceil(n / rows), ceil(k / columns)) bool, which blocks are not zero.
            zero: like scale, uint8; None if symmetric.
            bits: 2, 3, 4 or 8.
            group_size: columns that share a scale, -1 for the whole row.
            block: rows (a power of two from 16) and columns (whole planar blocks and whole groups) of a block.
        Raises:
            UsageError: blocks that do not fit the layout, or tensors that do not fit together.
        """
        (n, k), (rows, columns) = codes.shape, block
        _check_block(rows, columns, bits, group_size)
        tiles, blocks_in_row = -(-n // rows), -(-k // columns)
        if keep.shape != (tiles, blocks_in_row):
            raise UsageError(
                f"a {n} x {k} weight in blocks of {rows} x {columns} has {tiles} x {blocks_in_row} blocks; "
                f"keep is {' x '.join(map(str, keep.shape))}"
            )
        groups = 1 if group_size == -1 else columns // group_size  # of a block
        to_whole = (0, blocks_in_row * columns - k, 0, tiles * rows - n)
        kept = keep.bool()

        def side_by_side(part: Tensor, width: int) -> Tensor:
            """(tiles · rows, blocks · width) to (rows, kept · width)."""
            picked = part.reshape(tiles, rows, blocks_in_row, width).transpose(1, 2)[kept]
            picked = picked if len(picked) else part.new_zeros((1, rows, width))
            return picked.transpose(0, 1).reshape(rows, -1)

        def by_group(part: Tensor) -> Tensor:
            whole = part.expand(n, blocks_in_row) if group_size == -1 else part
            missing = blocks_in_row * groups - whole.shape[1]
            return side_by_side(pad(whole, (0, missing, 0, tiles * rows - n)), groups)

        counts = kept.sum(dim=1)
        return cls(
            shape=(n, k),
            blocks=Quantized.pack(
                side_by_side(pad(codes, to_whole), columns),
                by_group(scale.to(torch.float16)),
                None if zero is None else by_group(zero),
                bits=bits,
                group_size=columns if group_size == -1 else group_size,
            ),
            index=pad(kept.nonzero()[:, 1].to(torch.int32), (0, 1)),
            starts=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
            block=(rows, columns),
        )

    @property
    def label(self) -> str:
        """`int4-g128-sym-blocks50%`: of so many the blocks are zero."""
        total = (len(self.starts) - 1) * -(-self.shape[1] // self.block[1])
        return labels.block_sparse(self.blocks.label, labels.percent(total - self.n_kept, total))

    @property
    def n_kept(self) -> int:
        """Blocks that are stored."""
        return len(self.index) - 1

    def dense(self) -> Tensor:
        """The weight with its zeros: (n, k), float32, exact."""
        (n, k), (rows, columns) = self.shape, self.block
        tiles, blocks_in_row = len(self.starts) - 1, -(-k // columns)
        weight = self.index.new_zeros((tiles, blocks_in_row, rows, columns), dtype=torch.float32)
        tile = torch.repeat_interleave(torch.arange(tiles, device=weight.device), self.starts.diff().long())
        stored = self.blocks.dense().reshape(rows, -1, columns).transpose(0, 1)
        weight[tile, self.index[:-1].long()] = stored[: self.n_kept]
        return weight.transpose(1, 2).reshape(tiles * rows, -1)[:n, :k].contiguous()


def _check_block(rows: int, columns: int, bits: int, group_size: int) -> None:
    if bits not in planar.BITS:
        raise UsageError(f"{bits}-bit codes have no planar layout (known: {', '.join(map(str, planar.BITS))})")
    if rows < planar.ROW_MULTIPLE or rows & (rows - 1):
        raise UsageError(
            f"blocks of {rows} rows do not fit a tile: a power of two from {planar.ROW_MULTIPLE} is needed"
        )
    least = planar.block_columns(bits, columns if group_size == -1 else group_size)
    if columns <= 0 or columns % least:
        raise UsageError(
            f"blocks of {columns} columns do not fit {bits}-bit words, which hold {least} columns together"
        )
    if group_size != -1 and (group_size <= 0 or columns % group_size):
        raise UsageError(f"blocks of {columns} columns cut through groups of {group_size}")
