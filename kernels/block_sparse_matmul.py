"""y = x · ŵᵀ for quantized weights of which whole blocks are zero: the quantized kernel with a list of blocks.

A program owns a tile of rows of W and walks over the kept blocks of that tile, or over its share of them; each names
the columns of x that it meets. Everything else is `quantized_matmul.py`: the same words, the same steps, the same sum
over splits in a fixed order. Bytes and instructions go with the kept blocks.

Left out: more than 64 rows of x, where tensor cores are busy with what is kept and a dense product is near; and
balancing between tiles: a tile with more blocks than others takes longer, and the device's scheduler evens that out
only over several tiles for each multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import planar
from layerwise.kernels.activations import on_its_device, ready, uses_asm
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.configs import config_for
from layerwise.kernels.dequantize import unit
from layerwise.kernels.quantized_matmul import add_block, capability
from layerwise.kernels.quantized_matmul import refuses as quantized_refuses
from layerwise.kernels.split_k import finish, workspace

MAX_M = 64
"""Rows of activations. A guess (see above)."""


@triton.jit
def block_sparse_kernel(
    x_ptr: tl.tensor,  # (m, k) float16 or bfloat16
    words_ptr: tl.tensor,  # (kept · COLUMNS / P, stride) int16, planar.py
    upper_ptr: tl.tensor,  # (kept · COLUMNS / 16, stride) int16 at 3 bits
    scale_ptr: tl.tensor,  # (kept · COLUMNS / GROUP, stride) float16
    zero_ptr: tl.tensor,  # (kept · COLUMNS / GROUP, stride) uint8 unless SYM
    index_ptr: tl.tensor,  # (kept + 1,) int32
    starts_ptr: tl.tensor,  # (tiles + 1,) int32
    y_ptr: tl.tensor,  # (m, n), of the dtype of x
    partial_ptr: tl.tensor,  # (SPLITS, m, n) float32 if SPLITS > 1
    counter_ptr: tl.tensor,  # (row tiles · column tiles,) int32, zeros
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYM: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LEFT: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
) -> None:
    """y = x · ŵᵀ: program (row tile, column tile, split) adds its share of the kept blocks of its tile of W."""
    FIELDS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    BLOCK: tl.constexpr = FIELDS * RUN
    BLOCK_WORDS: tl.constexpr = 2 * RUN if BITS == 3 else RUN
    PARTS: tl.constexpr = COLUMNS // BLOCK  # planar blocks in a block
    TILES: tl.constexpr = ROWS // BN  # tiles of this kernel in a tile of W
    tile = tl.program_id(1) // TILES
    split = tl.program_id(2)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inner = tl.program_id(1) % TILES * BN + tl.arange(0, BN)
    inside = row < m
    here = inner < stride
    x_at = x_ptr + row.to(tl.int64) * k
    acc = tl.zeros((BN, BM) if LEFT else (BM, BN), tl.float32)
    first = tl.load(starts_ptr + tile) * PARTS
    count = tl.load(starts_ptr + tile + 1) * PARTS - first
    wide = stride.to(tl.int64)  # all blocks together may be more than 32 bits reach
    begin = first + split * count // SPLITS
    # A block's place is read one step ahead: loads whose addresses are loaded in the same step are pipelined less deep.
    index = tl.load(index_ptr + begin // PARTS)
    for part in range(begin, first + (split + 1) * count // SPLITS):
        group = part * BLOCK // GROUP * wide
        acc = add_block(
            acc,
            x_at,
            inside,
            words_ptr + part * BLOCK_WORDS * wide + inner,
            upper_ptr + part * RUN * wide + inner if BITS == 3 else None,
            scale_ptr + group + inner,
            None if SYM else zero_ptr + group + inner,
            here,
            index * COLUMNS + part % PARTS * BLOCK,
            k,
            stride,
            BITS,
            GROUP,
            SYM,
            RUN,
            LEFT,
            EVEN_K,
            USE_ASM,
        )
        index = tl.load(index_ptr + (part + 1) // PARTS)
    acc *= 1.0 / unit(x_ptr.dtype.element_ty == tl.bfloat16)
    column = tile * ROWS + inner
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    exists = inside[:, None] & (column < n)[None, :]
    if LEFT:
        at = tl.trans(at)
        exists = tl.trans(exists)
    counter = counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) if SPLITS > 1 else None
    finish(acc, at, exists, y_ptr, partial_ptr, counter, split, m * n, SPLITS)


@on_its_device
def block_sparse_matmul(x: Tensor, packed: BlockSparse) -> Tensor:
    """Multiply by a block-sparse quantized weight.

    Args:
        x: (m, k), float16 or bfloat16, m at most 64. A copy is made if it is not contiguous.
        packed: (n, k).
    Returns:
        (m, n), dtype of x.
    Raises:
        UsageError: more rows, groups that the kernel cannot take, or a shape, dtype or device that does not fit.
    """
    x = ready(x, packed)
    reason = refuses(packed, len(x))
    if reason is not None:
        raise UsageError(f"{packed.label}: {reason}")
    (m, k), n = x.shape, packed.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    blocks, (rows, columns) = packed.blocks, packed.block
    config = config_for(capability(x.device), blocks.bits, blocks.group_size, m)
    BN = min(rows, config.columns)
    tiles_m, tiles_n = triton.cdiv(m, config.rows), (len(packed.starts) - 1) * (rows // BN)
    kept_in_tile = triton.cdiv(packed.n_kept, len(packed.starts) - 1)  # on average
    splits = max(1, min(kept_in_tile, triton.cdiv(config.programs, tiles_m * tiles_n)))
    parts, counters = workspace(tiles_m * tiles_n, splits, m * n, x.device)
    block_sparse_kernel[tiles_m, tiles_n, splits](
        x,
        blocks.words,
        blocks.high,
        blocks.scale,
        blocks.zero,
        packed.index,
        packed.starts,
        y,
        parts,
        counters,
        m,
        n,
        k,
        blocks.n_padded,
        BITS=blocks.bits,
        GROUP=blocks.group_size,
        SYM=blocks.sym,
        RUN=planar.field_columns(blocks.bits, blocks.group_size),
        ROWS=rows,
        COLUMNS=columns,
        BM=config.rows,
        BN=BN,
        LEFT=config.left,
        SPLITS=splits,
        EVEN_K=k % columns == 0,
        USE_ASM=uses_asm(x.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def refuses(packed: BlockSparse, m: int) -> str | None:
    """Why the kernel cannot take m rows of activations with this weight, None if it can."""
    if m > MAX_M:
        return f"the block-sparse kernel takes at most {MAX_M} rows of activations, not {m}"
    return quantized_refuses(packed.blocks)
