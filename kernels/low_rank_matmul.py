"""y = x · (ŵ + B · A)ᵀ: a low-rank addition to a quantized weight, in the launch that multiplies by the weight.

The bytes of A and B are few, but two launches more cost as much as a small layer. So the first programs of the grid
compute t = A · x, a few rows of A and a stretch of columns each, in float32; the others are those of the quantized
kernel. Whoever comes last at a tile of y waits until all of t is there, adds B · t to the finished sum, and stores it.

Blocks are usually started in the order of their numbers, but nobody promises it. A program that has waited for long
therefore computes all of t itself: the same sums in the same order into the same places, so it does not matter who
writes last. The last program of all, of either kind, sets the counters back to zero.

Three forms (`form` says which runs):
    fused      a quantized base, up to 16 rows of x, and few enough rows of A that all are at work at once
    separate   any other base, or more rows: the base's own kernel, then two library products; t is rounded to the
               dtype of x in between
    factors    no base: two library products
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import block_sparse_matmul, n_m_matmul, planar, quantized_matmul, unstructured_matvec
from layerwise.kernels.activations import on_its_device, ready, uses_asm
from layerwise.kernels.configs import config_for
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.quantized_matmul import accumulate, capability
from layerwise.kernels.split_k import add_slots, arrive_last, counters

# No number below was timed: these kernels have not run on a GPU yet. Each says what it follows from, or that it is a
# guess.

MAX_FUSED_M = 16
"""Rows of x up to which A · x is computed in the same launch: one tile of a tensor core. That two launches win from the
second tile on is a guess."""

MAX_PROJECTIONS = 128
"""Programs that compute t: fewer than an H100 has multiprocessors (132), so that all of them start at once. On an
A100 (108) they do too, because several fit on each."""

RANK_TILE = 16
"""Rows of A that one of them takes, and columns of B that are added at a time: the least that a tensor core takes."""

STRETCH = 512
"""Columns of A that one of them takes at least, if their number allows. A guess: 16 KB of A, eight steps."""

MAX_STRETCHES = 4
"""Sums for each element of t at most. A guess: every tile of y adds them up anew, from the L2 cache."""

PATIENCE = 1 << 16
"""How often a program looks whether t is there before it computes t itself. A guess: it only has to be far longer than
t takes. At some hundred nanoseconds for a look (a guess too, an atomic in the L2 cache) it is some ten milliseconds."""

SIGNALS = 4
"""Counters before those of the tiles: two are used, four keep the rest aligned."""

Form = Literal["fused", "separate", "factors"]


@dataclass(frozen=True)
class Base:
    """The kernel of one format, as a low-rank addition needs it.

    Args:
        refuses: why it cannot take m rows of activations of a dtype with a weight of that format, None if it can.
        multiply: the product of activations (m, k) by such a weight.
    """

    refuses: Callable[[Any, int, torch.dtype], str | None]
    multiply: Callable[[Tensor, Any], Tensor]


BASES = {
    "quantized": Base(lambda base, m, dtype: quantized_matmul.refuses(base), quantized_matmul.quantized_matmul),
    "block_sparse": Base(
        lambda base, m, dtype: block_sparse_matmul.refuses(base, m), block_sparse_matmul.block_sparse_matmul
    ),
    "n_m_sparse": Base(n_m_matmul.refuses, n_m_matmul.n_m_matmul),
    "unstructured": Base(
        lambda base, m, dtype: unstructured_matvec.refuses(base, m), unstructured_matvec.unstructured_matvec
    ),
}
"""By format, what a low-rank addition can follow."""


@triton.jit
def project(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    t_ptr: tl.tensor,
    number: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    rank: tl.tensor,
    STRETCHES: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Part `number` of t = x · Aᵀ: some rows of A and one of the stretches of columns, into t (STRETCHES, m, rank)."""
    row = tl.arange(0, BM)
    place = number // STRETCHES * BR + tl.arange(0, BR)
    stretch = number % STRETCHES
    steps = tl.cdiv(k, BK)
    acc = tl.zeros((BM, BR), tl.float32)
    for step in range(stretch * steps // STRETCHES, (stretch + 1) * steps // STRETCHES):
        column = step * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=(row < m)[:, None] & (column < k), other=0.0)
        a_at = a_ptr + place[None, :] * k + column[:, None]
        a = tl.load(a_at, mask=(place < rank)[None, :] & (column < k)[:, None], other=0.0)
        acc = tl.dot(x, a, acc)
    at = (stretch * m + row[:, None]) * rank + place[None, :]
    tl.store(t_ptr + at, acc, mask=(row < m)[:, None] & (place < rank)[None, :])


@triton.jit
def is_there(signal_ptr: tl.tensor, PROJECTIONS: tl.constexpr, PATIENCE: tl.constexpr) -> tl.tensor:
    """Wait for all of t, but not for ever; True if it is there and can be read."""
    there = tl.atomic_add(signal_ptr, 0, sem="relaxed")
    looks = 0
    while (there < PROJECTIONS) & (looks < PATIENCE):
        there = tl.atomic_add(signal_ptr, 0, sem="relaxed")
        looks += 1
    # Each acquiring look would empty the L1 cache of the multiprocessor, where others still work; one is enough.
    return tl.atomic_add(signal_ptr, 0, sem="acquire") >= PROJECTIONS


@triton.jit
def add_product(
    acc: tl.tensor,
    t_ptr: tl.tensor,
    b_ptr: tl.tensor,
    column: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    rank: tl.tensor,
    STRETCHES: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
) -> tl.tensor:
    """acc (BM, BN) + t · Bᵀ for some columns of y (BN,), in float32."""
    row = tl.arange(0, BM)
    inside = (row < m)[:, None]
    for first in range(0, rank, BR):
        place = first + tl.arange(0, BR)
        known = place < rank
        b_at = b_ptr + column[None, :] * rank + place[:, None]
        b = tl.load(b_at, mask=(column < n)[None, :] & known[:, None], other=0.0).to(tl.float32)
        t = tl.zeros((BM, BR), tl.float32)
        for stretch in tl.static_range(STRETCHES):
            t_at = (stretch * m + row[:, None]) * rank + place[None, :]
            # These are pipelined, as copies through the L1 cache (`cp.async.ca`: few bytes have no other way); it holds
            # nothing stale, because acquiring the signal has emptied it.
            t += tl.load(t_ptr + t_at, mask=inside & known, other=0.0)
        # Two TensorFloat products: b has no more digits than that, and t is cut in two.
        upper_t = (t.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(upper_t, b, acc, input_precision="tf32")
        acc = tl.dot(t - upper_t, b, acc, input_precision="tf32")
    return acc


@triton.jit
def leave(signal_ptr: tl.tensor, users: tl.tensor) -> None:
    """Count a program as done with t; the last of its users sets both counters back to zero."""
    tl.debug_barrier()  # every thread has read what it needs
    if tl.atomic_add(signal_ptr + 1, 1, sem="acq_rel") == users - 1:
        tl.store(signal_ptr, 0)
        tl.store(signal_ptr + 1, 0)


@triton.jit
def low_rank_kernel(
    x_ptr: tl.tensor,  # (m, k) float16 or bfloat16, in the order of the columns of A
    packed_x_ptr: tl.tensor,  # (m, k), in the order of the packed columns
    words_ptr: tl.tensor,  # (k_padded / P, n_padded) int16, planar.py
    upper_ptr: tl.tensor,  # (k_padded / 16, n_padded) int16 at 3 bits
    scale_ptr: tl.tensor,  # (groups, n_padded) float16
    zero_ptr: tl.tensor,  # (groups, n_padded) uint8 unless SYM
    a_ptr: tl.tensor,  # (rank, k), dtype of x
    b_ptr: tl.tensor,  # (n, rank), dtype of x
    y_ptr: tl.tensor,  # (m, n), dtype of x
    t_ptr: tl.tensor,  # (STRETCHES, m, rank) float32
    partial_ptr: tl.tensor,  # (SPLITS, m, n) float32 if SPLITS > 1
    counter_ptr: tl.tensor,  # (column tiles,) int32, zeros
    signal_ptr: tl.tensor,  # (2,) int32, zeros: parts of t that are there, programs that are done with it
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    rank: tl.tensor,
    n_padded: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYM: tl.constexpr,
    RUN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    STRETCHES: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    PATIENCE: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
) -> None:
    """y = x · (ŵ + B · A)ᵀ: programs 0 .. PROJECTIONS - 1 compute t, the others (column tile, split) the rest."""
    number = tl.program_id(0)
    if number < PROJECTIONS:
        project(x_ptr, a_ptr, t_ptr, number, m, k, rank, STRETCHES, BM, BR, BK)
        tl.debug_barrier()  # every thread has written before one of them says so
        tl.atomic_add(signal_ptr, 1, sem="acq_rel")
        leave(signal_ptr, PROJECTIONS + tiles)
    else:
        tile = (number - PROJECTIONS) % tiles
        split = (number - PROJECTIONS) // tiles
        row = tl.arange(0, BM)
        column = tile * BN + tl.arange(0, BN)
        inside = row < m
        acc = accumulate(
            packed_x_ptr + row * k,
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
            False,
            EVEN_K,
            USE_ASM,
        )
        at = row[:, None] * n + column[None, :]
        exists = inside[:, None] & (column < n)[None, :]
        last = True
        if SPLITS > 1:
            last = arrive_last(acc, at, exists, partial_ptr, counter_ptr + tile, split, m * n, SPLITS)
        if last:
            if SPLITS > 1:
                acc = add_slots(acc, at, exists, partial_ptr, m * n, SPLITS)
                tl.store(counter_ptr + tile, 0)
            if not is_there(signal_ptr, PROJECTIONS, PATIENCE):
                for part in range(PROJECTIONS):
                    project(x_ptr, a_ptr, t_ptr, part, m, k, rank, STRETCHES, BM, BR, BK)
                tl.debug_barrier()
            acc = add_product(acc, t_ptr, b_ptr, column, m, n, rank, STRETCHES, BM, BR)
            tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=exists)
            leave(signal_ptr, PROJECTIONS + tiles)


@on_its_device
def low_rank_matmul(x: Tensor, packed: LowRank) -> Tensor:
    """Multiply by a weight with a low-rank addition.

    Args:
        x: (m, k), float16 or bfloat16. A copy is made if it is not contiguous.
        packed: (n, k); factors of another dtype are rounded to that of x in every call, and take two launches more.
    Returns:
        (m, n), dtype of x.
    Raises:
        UsageError: what the kernel of the base raises, or a shape, dtype or device that does not fit.
    """
    x = ready(x, packed)
    reason = refuses(packed, len(x), x.dtype)
    if reason is not None:
        raise UsageError(f"{packed.label}: {reason}")
    which = form(packed, len(x), x.dtype)
    if which == "fused":
        return _fused(x, packed)
    t = x @ packed.A.to(x.dtype).T
    B = packed.B.to(x.dtype)
    return t @ B.T if packed.base is None else torch.addmm(BASES[packed.base.format].multiply(x, packed.base), t, B.T)


def form(packed: LowRank, m: int, dtype: torch.dtype) -> Form:
    """Which form `low_rank_matmul` takes for m rows of x of that dtype."""
    if packed.base is None:
        return "factors"
    fits = isinstance(packed.base, Quantized) and m <= MAX_FUSED_M and packed.A.dtype == packed.B.dtype == dtype
    return "fused" if fits and 0 < triton.cdiv(packed.rank, RANK_TILE) <= MAX_PROJECTIONS else "separate"


def refuses(packed: LowRank, m: int, dtype: torch.dtype) -> str | None:
    """Why no form takes m rows of activations with this weight, None if one does."""
    base = packed.base
    if base is None:
        return None
    if base.format not in BASES:
        return f"{base.format} weights have no Triton kernel that a low-rank addition could follow"
    return BASES[base.format].refuses(base, m, dtype)


def _fused(x: Tensor, packed: LowRank) -> Tensor:
    base = packed.base
    assert isinstance(base, Quantized)
    (m, k), n, rank = x.shape, packed.shape[0], packed.rank
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    config = config_for(capability(x.device), base.bits, base.group_size, m)
    blocks = base.k_padded // planar.block_columns(base.bits, base.group_size)
    tiles, splits = triton.cdiv(n, config.columns), config.splits(m, n, blocks)
    rank_tiles = triton.cdiv(rank, RANK_TILE)
    stretches = max(1, min(MAX_STRETCHES, triton.cdiv(k, STRETCH), MAX_PROJECTIONS // rank_tiles))
    counted = counters(tiles + SIGNALS, x.device)
    low_rank_kernel[(rank_tiles * stretches + tiles * splits,)](
        x,
        x if base.order is None else x.index_select(1, base.order),
        base.words,
        base.high,
        base.scale,
        base.zero,
        packed.A,
        packed.B,
        y,
        torch.empty((stretches, m, rank), dtype=torch.float32, device=x.device),
        torch.empty((splits, m, n), dtype=torch.float32, device=x.device) if splits > 1 else None,
        counted[SIGNALS:],
        counted,
        m,
        n,
        k,
        rank,
        base.n_padded,
        blocks,
        tiles,
        BITS=base.bits,
        GROUP=base.group_size,
        SYM=base.sym,
        RUN=planar.field_columns(base.bits, base.group_size),
        BM=config.rows,
        BN=config.columns,
        BR=RANK_TILE,
        BK=64,
        STRETCHES=stretches,
        PROJECTIONS=rank_tiles * stretches,
        SPLITS=splits,
        PATIENCE=PATIENCE,
        EVEN_K=k == base.k_padded,
        USE_ASM=uses_asm(x.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
