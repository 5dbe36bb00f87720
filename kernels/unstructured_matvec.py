"""y = x · Wᵀ for an unstructured sparse W and up to four rows of x.

A program takes a few rows of W, one for each warp, and walks along their nonzeros. Values and offsets are read once, in
vectors; activations are gathered from the L1 cache, where a row of them fits. Sums are in float32, and every element of
y is summed by one program in one order, so the same input gives the same bits.

Left out: more than four rows of x (`unstructured.py` says why), and balancing rows of very different length: a program
is as slow as its longest row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.activations import on_its_device, ready
from layerwise.kernels.unstructured import RUN, Unstructured

MAX_M = 4
"""Rows of activations. A guess by compiled code: each row gathers and multiplies anew, 3.7 instructions a nonzero after
the first 10.4. At four that is 21.5 of the 32 that an H100 issues (29.7e12 a second) while it reads
3.25 bytes (3 TB/s)."""

ROWS = 4
"""Rows of W that a program takes; one for each of its warps, so that their sums stay inside a warp. Four is a guess."""

LENGTH = 512
"""Nonzeros of a row that a program takes at a time: sixteen for each thread, two loads of 16 bytes in flight.
A guess."""

ALONG = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 0
"""The axis of a tile along which the nonzeros of a row lie. A gather says nothing of its order, and Triton then lets
threads run along the last axis, before 3.7 along the first. Along the other one, values and offsets, which are loaded
in vectors, would go through shared memory to meet what is gathered: 27 instructions for a nonzero instead of 10.4."""


@triton.jit
def unstructured_kernel(
    x: tl.tensor,  # (M, k)
    values: tl.tensor,  # (runs * 8,) float16, bfloat16 or float32
    offsets: tl.tensor,  # (runs * 8,) uint8
    firsts: tl.tensor,  # (runs,) int16, read as unsigned
    starts: tl.tensor,  # (n + 1,) int32
    y: tl.tensor,  # (M, n)
    n: tl.tensor,
    k: tl.tensor,
    M: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALONG: tl.constexpr,
) -> None:
    """y[m, row] = sum over the row's nonzeros j of values[j] * x[m, firsts[j // 8] + offsets[j]]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n
    start = tl.load(starts + row, mask=live, other=0) * RUN
    end = tl.load(starts + row + 1, mask=live, other=0) * RUN
    lane = tl.expand_dims(tl.arange(0, LENGTH), 1 - ALONG)
    first_of_row = tl.expand_dims(start, ALONG)
    end_of_row = tl.expand_dims(end, ALONG)
    sum0 = tl.zeros((ROWS, LENGTH) if ALONG == 1 else (LENGTH, ROWS), tl.float32)
    sum1 = tl.zeros((ROWS, LENGTH) if ALONG == 1 else (LENGTH, ROWS), tl.float32)
    sum2 = tl.zeros((ROWS, LENGTH) if ALONG == 1 else (LENGTH, ROWS), tl.float32)
    sum3 = tl.zeros((ROWS, LENGTH) if ALONG == 1 else (LENGTH, ROWS), tl.float32)
    for step in range(0, tl.max(end - start, axis=0), LENGTH):
        at = first_of_row + step + lane
        inside = at < end_of_row
        value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(firsts + at // RUN, mask=inside, other=0).to(tl.int32) & 0xFFFF
        # Beyond the row's end this is column 0, times 0.
        column = first + tl.load(offsets + at, mask=inside, other=0).to(tl.int32)
        sum0 += value * tl.load(x + column).to(tl.float32)
        if M > 1:
            sum1 += value * tl.load(x + k + column).to(tl.float32)
        if M > 2:
            sum2 += value * tl.load(x + 2 * k + column).to(tl.float32)
        if M > 3:
            sum3 += value * tl.load(x + 3 * k + column).to(tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(y + row, tl.sum(sum0, axis=ALONG).to(dtype), mask=live)
    if M > 1:
        tl.store(y + n + row, tl.sum(sum1, axis=ALONG).to(dtype), mask=live)
    if M > 2:
        tl.store(y + 2 * n + row, tl.sum(sum2, axis=ALONG).to(dtype), mask=live)
    if M > 3:
        tl.store(y + 3 * n + row, tl.sum(sum3, axis=ALONG).to(dtype), mask=live)


@on_its_device
def unstructured_matvec(x: Tensor, packed: Unstructured) -> Tensor:
    """Multiply by an unstructured sparse weight.

    Args:
        x: (m, k), float16 or bfloat16, m at most 4. A copy is made if it is not contiguous.
        packed: (n, k); its weights may have another dtype, float32 among them.
    Returns:
        (m, n), dtype of x.
    Raises:
        UsageError: more rows, or a shape, dtype or device that does not fit.
    """
    x = ready(x, packed)
    reason = refuses(packed, len(x))
    if reason is not None:
        raise UsageError(f"{packed.label}: {reason}")
    n, k = packed.shape
    y = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    if len(x):
        parts = (packed.values, packed.offsets, packed.firsts, packed.starts)
        grid = (triton.cdiv(n, ROWS),)
        constants = {"M": len(x), "RUN": RUN, "ROWS": ROWS, "LENGTH": LENGTH, "ALONG": ALONG}
        unstructured_kernel[grid](x, *parts, y, n, k, **constants, num_warps=ROWS)
    return y


def refuses(packed: Unstructured, m: int) -> str | None:
    """Why the kernel cannot take m rows of activations with this weight, None if it can."""
    if m > MAX_M:
        return f"the sparse kernel takes at most {MAX_M} rows of activations, not {m}"
    if packed.values.numel() >= 2**31:
        return f"{packed.values.numel()} stored nonzeros are more than 32-bit places reach"
    return None
