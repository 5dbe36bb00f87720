"""The end of a kernel whose columns of W are shared among several programs (split-K), and room for it.

Each program puts its sums into its slot of a float32 workspace and counts itself in at the counter of its tile; whoever
comes last adds the slots up in their order. So the same input gives the same bits whatever the order of arrival,
nothing is cleared beforehand, and the counter is zero again for the next launch.

Launches on one stream share their counters. A CUDA graph keeps the counters of the stream that it was captured on, so
of all graphs captured on one stream only one may run at a time, and nothing else on that stream meanwhile; graphs that
are to run side by side are captured on streams of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_COUNTERS = 4096

_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
"""By device and stream."""

_OUTGROWN: list[Tensor] = []
"""Counters that were too few for a later launch; a graph may still use them."""


@triton.jit
def finish(
    acc: tl.tensor,
    at: tl.tensor,
    exists: tl.tensor,
    y_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    split: tl.tensor,
    size: tl.tensor,
    SPLITS: tl.constexpr,
) -> None:
    """Write a tile of y; if several programs share it, the last one writes the sum of all.

    Args:
        acc: float32, this program's share of the tile.
        at: of that shape, where in y; `exists`: which of it y has.
        partial_ptr: (SPLITS, size) float32, one slot of the size of y for each of the programs.
        counter_ptr: the tile's counter, int32: 0 before and after.
        split: which of the programs this is.
        size: elements of y.
    """
    if SPLITS == 1:
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=exists)
    elif arrive_last(acc, at, exists, partial_ptr, counter_ptr, split, size, SPLITS):
        total = add_slots(acc, at, exists, partial_ptr, size, SPLITS)
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=exists)
        tl.store(counter_ptr, 0)


@triton.jit
def arrive_last(
    acc: tl.tensor,
    at: tl.tensor,
    exists: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    split: tl.tensor,
    size: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Put this program's share into its slot; True if all the others' shares are there already."""
    tl.store(partial_ptr + split * size + at, acc, mask=exists)
    tl.debug_barrier()  # every thread has written before one of them says so
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1


@triton.jit
def add_slots(
    acc: tl.tensor, at: tl.tensor, exists: tl.tensor, partial_ptr: tl.tensor, size: tl.tensor, SPLITS: tl.constexpr
) -> tl.tensor:
    """The sum of all shares, of the shape of acc, in the order of the slots."""
    total = tl.zeros_like(acc)
    for slot in range(SPLITS):
        # Past the L1 cache, which other programs' stores do not reach.
        total += tl.load(partial_ptr + slot * size + at, mask=exists, other=0.0, cache_modifier=".cg")
    return total


def workspace(tiles: int, splits: int, size: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Where programs put their shares of y.

    Args:
        tiles: of y, each with a counter of its own.
        splits: programs that share a tile; with one, nothing is needed.
        size: elements of y.
    Returns:
        (splits · size,) float32, not cleared, and (tiles or more,) int32, zeros; or None and None.
    """
    if splits == 1:
        return None, None
    return torch.empty(splits * size, dtype=torch.float32, device=device), counters(tiles, device)


def counters(count: int, device: torch.device) -> Tensor:
    """Counters at zero. Kernels leave them so; hence all launches on a stream share them, and none clears them.

    What is made while a graph is captured is cleared only when that graph runs: it belongs to that graph alone, which
    clears it in every run. A launch on the same stream before the capture saves that.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    place = device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    found = _COUNTERS.get(place)
    if found is not None and len(found) >= count:
        return found
    made = torch.zeros(max(count, LEAST_COUNTERS), dtype=torch.int32, device=device)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return made
    if found is not None:
        _OUTGROWN.append(found)
    _COUNTERS[place] = made
    return made
