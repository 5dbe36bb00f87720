"""y = x · Wᵀ for a 2:4 sparse W and few rows of x: the zeros are not loaded, but they are multiplied.

Triton cannot reach the sparse tensor cores, so this saves bandwidth only (1.125 bytes a weight instead of 2), which is
what counts while x has few rows. Groups are expanded in registers. For the planes of first and second kept weights and
the four bits b0..b3 of a group, the columns are

    w0 = b0 ? first : 0                       w2 = b2 ? (b3 ? first : second) : 0
    w1 = b1 ? (b0 ? second : first) : 0       w3 = b3 ? second : 0

which 32-bit logic does for two groups at a time, each bit spread over a half by a multiplication. Each of the four is
one operand of a tensor core product, with every fourth activation as the other: activations are read four at a time as
64-bit numbers and taken apart, so nothing is shuffled.

Left out: other patterns than 2:4, and m beyond 64, where cuSPARSELt or a dense product is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from layerwise.errors import UsageError
from layerwise.kernels.activations import on_its_device, ready, uses_asm
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.split_k import finish, workspace

MAX_M = 64
"""Rows of activations. A guess: at 64 a dense product of 16-bit weights is still bound by memory on an H100."""

BN = {16: 128, 32: 64}
"""Rows of W in a tile, by rows of x in it: 3.4 and 4.8 instructions for each place of W. At 16 rows, tiles of 64 spill
registers for sm_90 (Triton 3.9); 64 rows of x in a tile make every warp of sm_80 expand the whole of it. Counted in
compiled code, not timed."""

PROGRAMS = 264
"""At least so many programs share the work if they can: two for each multiprocessor of an H100. A guess."""

COLUMNS = 256
"""Columns of W that share a tile of words."""

OPTIONS = {"num_warps": 4, "num_stages": 3}

EXPAND = tl.constexpr(
    """{
    .reg .b32 a, b, c, d, t;
    and.b32 a, $7, 0x00010001;
    shr.u32 b, $7, 1;
    and.b32 b, b, 0x00010001;
    shr.u32 c, $7, 2;
    and.b32 c, c, 0x00010001;
    shr.u32 d, $7, 3;
    and.b32 d, d, 0x00010001;
    mul.lo.u32 a, a, 0xFFFF;
    mul.lo.u32 b, b, 0xFFFF;
    mul.lo.u32 c, c, 0xFFFF;
    mul.lo.u32 d, d, 0xFFFF;
    and.b32 $0, $5, a;
    lop3.b32 t, $5, $6, a, 0xD8;
    and.b32 $1, t, b;
    lop3.b32 t, $5, $6, d, 0xE4;
    and.b32 $2, t, c;
    and.b32 $3, $6, d;
    shr.u32 $4, $7, 4;
    }"""
)
"""$0..$3 are w0..w3 of two groups, $4 the words with the next field in front; $5, $6 the kept weights, $7 the words."""


@triton.jit
def expand(
    first: tl.tensor, second: tl.tensor, words: tl.tensor, USE_ASM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One field of every word to the four columns of its group, and the words with the next field in front.

    All are int16: the kept weights are moved, not computed with.
    """
    if USE_ASM:
        w0, w1, w2, w3, rest = tl.inline_asm_elementwise(
            EXPAND,
            "=r,=r,=r,=r,=r,r,r,r",
            [first, second, words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
    else:
        b0, b1, b2, b3 = (words & 1) != 0, (words & 2) != 0, (words & 4) != 0, (words & 8) != 0
        none = tl.zeros_like(first)
        w0 = tl.where(b0, first, none)
        w1 = tl.where(b1, tl.where(b0, second, first), none)
        w2 = tl.where(b2, tl.where(b3, first, second), none)
        w3 = tl.where(b3, second, none)
        rest = words >> 4
    return w0, w1, w2, w3, rest


@triton.jit
def quarter(x4: tl.tensor, PLACE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """One of the four halves of 64-bit numbers."""
    return (x4 >> (16 * PLACE)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def n_m_kernel(
    x4: tl.tensor,  # (m, k_padded / 4) int64, four activations each
    values: tl.tensor,  # (2, k_padded / 4, n_padded) int16, the bits of the kept weights
    masks: tl.tensor,  # (k_padded / 16, n_padded) int16
    y: tl.tensor,  # (m, n)
    parts: tl.tensor,  # (tiles, SPLITS, BM, BN) float32, or None
    counters: tl.tensor,  # (tiles,) int32, or None
    m: tl.tensor,
    n: tl.tensor,
    n_padded: tl.tensor,
    k_padded: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    USE_ASM: tl.constexpr,
) -> None:
    """y = x · Wᵀ. The grid is (tiles of rows of W, SPLITS, tiles of rows of x)."""
    first_m = tl.program_id(2) * BM
    first_n = tl.program_id(0) * BN
    run = tl.arange(0, 16)
    # Beyond the last row a tile reads row 0 again; what comes of it is not stored.
    rows = first_m + tl.arange(0, BM)
    rows = tl.where(rows < m, rows, 0)
    columns = first_n + tl.arange(0, BN)
    columns = tl.max_contiguous(tl.multiple_of(tl.where(columns < n_padded, columns, 0), 16), 16)
    groups = k_padded // 4
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(tl.program_id(1), k_padded // 256, SPLITS):
        words = tl.load(masks + (block * 16 + run)[:, None] * n_padded + columns[None, :])
        for field in tl.static_range(4):
            group = block * 64 + field * 16 + run
            first = tl.load(values + group[:, None] * n_padded + columns[None, :])
            second = tl.load(values + (groups + group)[:, None] * n_padded + columns[None, :])
            four = tl.load(x4 + rows[:, None] * groups + group[None, :])
            w0, w1, w2, w3, words = expand(first, second, words, USE_ASM)
            acc = tl.dot(quarter(four, 0, DTYPE), w0.to(DTYPE, bitcast=True), acc)
            acc = tl.dot(quarter(four, 1, DTYPE), w1.to(DTYPE, bitcast=True), acc)
            acc = tl.dot(quarter(four, 2, DTYPE), w2.to(DTYPE, bitcast=True), acc)
            acc = tl.dot(quarter(four, 3, DTYPE), w3.to(DTYPE, bitcast=True), acc)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    exists = (first_m + tl.arange(0, BM) < m)[:, None] & (first_n + tl.arange(0, BN) < n)[None, :]
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    finish(acc, at, exists, y, parts, counters + tile if SPLITS > 1 else None, tl.program_id(1), m * n, SPLITS)


@on_its_device
def n_m_matmul(x: Tensor, packed: NMSparse) -> Tensor:
    """Multiply by a 2:4 sparse weight.

    Args:
        x: (m, k), of the dtype of the stored weights, m at most 64. A copy is made if it is not contiguous, or if k is
            not a multiple of 256.
        packed: (n, k).
    Returns:
        (m, n), dtype of x.
    Raises:
        UsageError: another pattern, more rows, or a shape, dtype or device that does not fit.
    """
    x = ready(x, packed)
    reason = refuses(packed, len(x), x.dtype)
    if reason is not None:
        raise UsageError(f"{packed.label}: {reason}")
    (m, k), n = x.shape, packed.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    k_padded, n_padded = packed.k_padded, packed.masks.shape[1]
    padded = pad(x, (0, k_padded - k)) if k_padded > k else x
    # Flat first: a single row may be contiguous and still have a stride that is no multiple of four.
    x4 = padded.reshape(-1).view(torch.int64).view(m, -1)
    BM = 16 if m <= 16 else 32
    tiles_n, tiles_m = triton.cdiv(n, BN[BM]), triton.cdiv(m, BM)
    splits = max(1, min(k_padded // COLUMNS, triton.cdiv(PROGRAMS, tiles_n * tiles_m)))
    parts, counters = workspace(tiles_n * tiles_m, splits, m * n, x.device)
    n_m_kernel[tiles_n, splits, tiles_m](
        x4,
        packed.values.view(torch.int16),
        packed.masks,
        y,
        parts,
        counters,
        m,
        n,
        n_padded,
        k_padded,
        BM=BM,
        BN=BN[BM],
        SPLITS=splits,
        DTYPE=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        USE_ASM=uses_asm(x.device),
        **OPTIONS,
    )
    return y


def refuses(packed: NMSparse, m: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take m rows of activations with this weight, None if it can."""
    if (packed.n_kept, packed.m_group) != (2, 4):
        return f"only 2:4 has a kernel, not {packed.n_kept}:{packed.m_group}"
    if m > MAX_M:
        return f"the 2:4 kernel takes at most {MAX_M} rows of activations, not {m}"
    if packed.values.dtype != dtype:
        stored, asked = (str(name).removeprefix("torch.") for name in (packed.values.dtype, dtype))
        return f"its weights are {stored} and the activations {asked}; pack it in {asked}"
    return None
