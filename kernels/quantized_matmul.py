"""y = x · ŵᵀ for quantized weights, in Triton: few rows of x (decoding) and many, by one kernel.

    y[m, n] = Σ_g scale[g, n] · Σ_{k in g} (code[n, k] - zero[g, n]) · x[m, k]

The differences are exact in half precision (`dequantize.py`), products and sums are those of the tensor cores, in
float32, and scales multiply the finished sum of a group: no rounding comes in but that of float32 sums and of y. A
tile of words is loaded in the layout of a tile of weights, so its fields are operands of a dot product where they
stand.

Decoding reads every weight for a handful of rows, so the loop over the columns is also split among programs
(`split_k.py`). With many rows the weights are the left operand (`LEFT`), which Hopper's tensor cores take from
registers, so they never go back to shared memory.

Left out: bias and activation functions; the choice of tiles (`configs.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import planar
from layerwise.kernels.activations import on_its_device, ready, uses_asm
from layerwise.kernels.configs import Config, config_for
from layerwise.kernels.dequantize import difference, offset, unit
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.split_k import finish, workspace


@triton.jit
def add_block(
    acc: tl.tensor,
    x_at: tl.tensor,
    inside: tl.tensor,
    words_at: tl.tensor,
    upper_at: tl.tensor,
    scale_at: tl.tensor,
    zero_at: tl.tensor,
    here: tl.tensor,
    start: tl.tensor,
    k: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYM: tl.constexpr,
    RUN: tl.constexpr,
    LEFT: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
) -> tl.tensor:
    """The sums so far and those of one block of columns, in UNITs; with GROUP = -1 still without their scale.

    Args:
        acc: (BM, BN) float32; (BN, BM) if LEFT.
        x_at: (BM,), where the rows of x begin; `inside`, (BM,), which of them exist.
        words_at: (BN,), the first row of words of the block; `upper_at` that of the upper plane, at 3 bits.
        scale_at: (BN,), the scales of the first group; `zero_at` its zero points, unless SYM.
        here: (BN,), which columns of y exist.
        start: the first column of x that the block meets, of k.
        stride: between rows of words, of scales and of zero points.
        GROUP: columns that share a scale; RUN: columns of a field; EVEN_K: k is a multiple of the block.
        LEFT: the tile of weights is loaded as (BN, RUN), so that no tile is transposed in registers.
    """
    DTYPE: tl.constexpr = x_at.dtype.element_ty
    FIELDS: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    BLOCK: tl.constexpr = 2 * FIELDS * RUN if BITS == 3 else FIELDS * RUN
    W: tl.constexpr = 1 if LEFT else 0  # the axis of a tile of weights that runs along the columns
    run = tl.arange(0, RUN)
    run_w = tl.expand_dims(run, 1 - W)
    run_x = tl.expand_dims(run, W)
    x_at = tl.expand_dims(x_at, 1 - W)
    inside = tl.expand_dims(inside, 1 - W)
    words_at = tl.expand_dims(words_at, W)
    here_w = tl.expand_dims(here, W)
    zero = None
    upper = None
    if BITS == 3:
        upper = tl.load(tl.expand_dims(upper_at, W) + run_w * stride, mask=here_w, other=0)
    part = acc
    for first in tl.static_range(0, BLOCK, RUN):
        if first % (FIELDS * RUN) == 0:
            words = tl.load(words_at + (first // FIELDS + run_w) * stride, mask=here_w, other=0)
        if GROUP != -1 and first % GROUP == 0:
            part = tl.zeros_like(acc)
            scale = tl.load(scale_at + first // GROUP * stride, mask=here, other=0.0)
        if not SYM and (first == 0 or (GROUP != -1 and first % GROUP == 0)):
            zero = tl.load(zero_at + (0 if GROUP == -1 else first // GROUP * stride), mask=here, other=0)
            zero = tl.expand_dims(offset(zero, DTYPE, USE_ASM), W)
        weight = difference(words, upper, zero, first // RUN, BITS, SYM, DTYPE, USE_ASM)
        column = start + first + run_x
        x = tl.load(x_at + column, mask=inside if EVEN_K else inside & (column < k), other=0.0)
        part = tl.dot(weight, x, part) if LEFT else tl.dot(x, weight, part)
        if GROUP != -1 and ((first + RUN) % GROUP == 0 or first + RUN == BLOCK):
            acc += part * tl.expand_dims(scale, W).to(tl.float32)
    if GROUP == -1:
        acc = part
    return acc


@triton.jit
def accumulate(
    x_at: tl.tensor,
    inside: tl.tensor,
    words_ptr: tl.tensor,
    upper_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    k: tl.tensor,
    n_padded: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYM: tl.constexpr,
    RUN: tl.constexpr,
    LEFT: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
) -> tl.tensor:
    """The share of a tile of y that some blocks of columns of the weight give, scaled.

    Args:
        x_at: (BM,), where the rows of x begin; `inside`, (BM,), which of them exist.
        words_ptr: the whole weight, as are the next three.
        column: (BN,), which columns of y.
        first: the first block; `last` the one after the last.
    Returns:
        (BM, BN) float32; (BN, BM) if LEFT.
    """
    FIELDS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    BLOCK: tl.constexpr = FIELDS * RUN
    BLOCK_WORDS: tl.constexpr = 2 * RUN if BITS == 3 else RUN
    BM: tl.constexpr = inside.shape[0]
    BN: tl.constexpr = column.shape[0]
    here = column < n_padded
    acc = tl.zeros((BN, BM) if LEFT else (BM, BN), tl.float32)
    for block in range(first, last):
        group = 0 if GROUP == -1 else block * BLOCK // GROUP * n_padded
        acc = add_block(
            acc,
            x_at,
            inside,
            words_ptr + block * BLOCK_WORDS * n_padded + column,
            upper_ptr + block * RUN * n_padded + column if BITS == 3 else None,
            scale_ptr + group + column,
            None if SYM else zero_ptr + group + column,
            here,
            block * BLOCK,
            k,
            n_padded,
            BITS,
            GROUP,
            SYM,
            RUN,
            LEFT,
            EVEN_K,
            USE_ASM,
        )
    if GROUP == -1:
        scale = tl.load(scale_ptr + column, mask=here, other=0.0).to(tl.float32)
        acc *= scale[:, None] if LEFT else scale[None, :]
    return acc * (1.0 / unit(x_at.dtype.element_ty == tl.bfloat16))


@triton.jit
def quantized_kernel(
    x_ptr: tl.tensor,  # (m, k) float16 or bfloat16
    words_ptr: tl.tensor,  # (k_padded / P, n_padded) int16, planar.py
    upper_ptr: tl.tensor,  # (k_padded / 16, n_padded) int16 at 3 bits
    scale_ptr: tl.tensor,  # (groups, n_padded) float16
    zero_ptr: tl.tensor,  # (groups, n_padded) uint8 unless SYM
    y_ptr: tl.tensor,  # (m, n), of the dtype of x
    partial_ptr: tl.tensor,  # (SPLITS, m, n) float32 if SPLITS > 1
    counter_ptr: tl.tensor,  # (row tiles · column tiles,) int32, zeros
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    n_padded: tl.tensor,
    blocks: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYM: tl.constexpr,
    RUN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LEFT: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
) -> None:
    """y = x · ŵᵀ: program (row tile, column tile, split) adds its share of the blocks of columns of the weight."""
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    split = tl.program_id(2)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = row < m
    acc = accumulate(
        x_ptr + row.to(tl.int64) * k,
        inside,
        words_ptr,
        upper_ptr,
        scale_ptr,
        zero_ptr,
        column,
        split * blocks // SPLITS,
        (split + 1) * blocks // SPLITS,
        k,
        n_padded,
        BITS,
        GROUP,
        SYM,
        RUN,
        LEFT,
        EVEN_K,
        USE_ASM,
    )
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    exists = inside[:, None] & (column < n)[None, :]
    if LEFT:
        at = tl.trans(at)
        exists = tl.trans(exists)
    finish(acc, at, exists, y_ptr, partial_ptr, counter_ptr + tile if SPLITS > 1 else None, split, m * n, SPLITS)


Launch = Callable[[Tensor], Tensor]


def quantized_matmul(x: Tensor, packed: Quantized, *, config: Config | None = None) -> Tensor:
    """Multiply by a quantized weight.

    Args:
        x: (m, k), float16 or bfloat16. A copy is made if it is not contiguous or not aligned to 16 bytes.
        packed: (n, k).
        config: the tiles; by default those of the table (`configs.py`).
    Returns:
        (m, n), dtype of x. The same x gives the same bits.
    Raises:
        UsageError: groups that the kernel cannot take, or a shape, dtype or device that does not fit.
    """
    x = ready(x, packed)
    reason = refuses(packed)
    if reason is not None:
        raise UsageError(f"{packed.label}: {reason}")
    return launch(packed, len(x), config)(x)


def refuses(packed: Quantized) -> str | None:
    """Why the kernel cannot take this weight, None if it can."""
    if packed.group_size == -1:
        return None
    run = planar.field_columns(packed.bits, packed.group_size)
    block = planar.block_columns(packed.bits, packed.group_size)
    if packed.group_size % run or (packed.group_size % block and block % packed.group_size):
        return (
            f"groups of {packed.group_size} columns do not fit into blocks of {block} "
            f"(multiples of {block}, or {run} times a power of two below it)"
        )
    return None


def launch(packed: Quantized, m: int, config: Config | None = None) -> Launch:
    """The kernel with all that does not change from call to call, for x of exactly m rows as `ready` gives them.

    Decoding calls it for every token, so what depends on shapes alone is worked out once.
    """
    (n, k), device = packed.shape, packed.words.device
    config = config or config_for(capability(device), packed.bits, packed.group_size, m)
    blocks = packed.k_padded // planar.block_columns(packed.bits, packed.group_size)
    along_m, along_n = config.tiles(m, n)
    splits = config.splits(m, n, blocks)
    kernel = quantized_kernel[along_m, along_n, splits]
    weight = (packed.words, packed.high, packed.scale, packed.zero)
    sizes = (m, n, k, packed.n_padded, blocks)
    constants = {
        "BITS": packed.bits,
        "GROUP": packed.group_size,
        "SYM": packed.zero is None,
        "RUN": planar.field_columns(packed.bits, packed.group_size),
        "BM": config.rows,
        "BN": config.columns,
        "LEFT": config.left,
        "SPLITS": splits,
        "EVEN_K": k == packed.k_padded,
        "USE_ASM": uses_asm(device),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

    @on_its_device
    def run(x: Tensor) -> Tensor:
        y = torch.empty((m, n), dtype=x.dtype, device=device)
        if m:
            if packed.order is not None:
                x = x.index_select(1, packed.order)
            parts, counters = workspace(along_m * along_n, splits, m * n, device)
            kernel(x, *weight, y, parts, counters, *sizes, **constants)
        return y

    return run


@cache
def capability(device: torch.device) -> int:
    """90 for 9.0. The interpreter has none and takes the newest entries; AMD counts anew and takes the oldest."""
    if device.type != "cuda":
        return 90
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
