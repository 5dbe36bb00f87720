"""Buffers that show what a kernel wrote or read where it should not have.

Every buffer gets canaries before and after it, and what is allocated inside a `Guard` is filled with NaN, so a result
that was not written, or that was made of what was not written, is NaN. Reading past a float buffer gives NaN as well;
past an integer one it gives numbers that are far off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layerwise.kernels.packed import Packed

MARGIN_BYTES = 256
"""On each side; a multiple of every alignment that a kernel asks for."""

CANARY = 0x7F
"""In every byte: as int16 32639, as int32 2139062143. Floats get NaN instead."""


class Guard(TorchFunctionMode):
    """Puts tensors between canaries: those that are handed to it, and those allocated while it is entered.

    `with guard: y = matmul(guard.around(x), guard.around(packed))`, then `guard.check()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[Tensor, Tensor, int]] = []

    def around(self, value: Any) -> Any:
        """A copy of a tensor, or of every tensor of a `Packed`, that stands between canaries."""
        if isinstance(value, Packed):
            moved = {name: self.around(part) for name, part in value._fields() if isinstance(part, Tensor | Packed)}
            return replace(value, **moved)
        return self._place(value.shape, value.dtype, value.device).copy_(value)

    def check(self) -> None:
        """Assert that no canary of any buffer has changed."""
        for buffer, was, size in self._buffers:
            assert torch.equal(buffer[:MARGIN_BYTES], was), f"something wrote before a buffer of {size} bytes"
            assert torch.equal(buffer[MARGIN_BYTES + size :], was), f"something wrote after a buffer of {size} bytes"

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Give an allocation its canaries; leave every other call alone."""
        made = function(*args, **(kwargs or {}))
        if function in _ALLOCATE_EMPTY and made.numel():
            guarded = self._place(made.shape, made.dtype, made.device)
            return guarded.fill_(float("nan")) if made.dtype.is_floating_point else guarded
        if function in _ALLOCATE_FULL and made.numel():
            return self._place(made.shape, made.dtype, made.device).copy_(made)
        return made

    def _place(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = shape.numel() * dtype.itemsize
        margin = torch.full((MARGIN_BYTES // dtype.itemsize,), 1, dtype=dtype, device=device)
        margin = margin * float("nan") if dtype.is_floating_point else margin.view(torch.uint8).fill_(CANARY)
        was = margin.view(torch.uint8)
        buffer = torch.cat([was, torch.full((size,), CANARY, dtype=torch.uint8, device=device), was])
        self._buffers.append((buffer, was, size))
        return buffer[MARGIN_BYTES : MARGIN_BYTES + size].view(dtype).view(shape)


_ALLOCATE_EMPTY = {torch.empty, torch.empty_like, Tensor.new_empty}
_ALLOCATE_FULL = {torch.zeros, torch.zeros_like, Tensor.new_zeros}


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result (0 / 0 is 0); NaN wherever y is not finite."""
    difference = (y.double() - exact.double()).norm()
    norm = exact.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)
