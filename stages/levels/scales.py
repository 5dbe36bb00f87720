"""Scales of groups that are themselves quantized: 4 to 8 bits for each group, and a float16 scale above several groups.

A group's scale is the float16 that is nearest to `above · (code + 1) / 2^bits`, so it is never zero, and whatever reads
a level (kernels, exports, the methods themselves) meets a float16 scale as of any other grid. Where scales may be
negative, the highest bit of a code is the sign, and the rest the code.

Source: K-quants of llama.cpp, and double quantization of QLoRA, arXiv:2305.14314, section 3; both have a code of zero
for groups of zeros, which a zero point says as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 2.0**-24
"""Least positive float16: a subnormal, which decodes as exactly as any other. Groups of zeros get it, and groups so
small that their scale would round to zero; both then decode to zeros."""

WHOLE = 16
"""Bits of a scale that is not quantized."""


@dataclass(frozen=True)
class Scales:
    """Quantized scales.

    Args:
        codes: (lines, groups), whole numbers of any dtype in 0 .. 2^bits - 1.
        above: (lines, supers), with values that float16 holds; supers = ceil(groups / size), 1 if size is -1.
        bits: of a code.
        size: groups under one scale above, -1 for all of a line.
        signed: the highest bit of a code is the sign of the scale.
    """

    codes: Tensor
    above: Tensor
    bits: int
    size: int
    signed: bool = False

    def values(self) -> Tensor:
        """The scale of every group: (lines, groups), in the dtype of `above`, with values that float16 holds."""
        above = spread(self.above, self.codes.shape[1], self.size)
        top = 2 ** (self.bits - self.signed)
        codes = self.codes.double()  # bytes cannot be compared with 256
        negative = codes >= top
        sizes = codes - top * negative
        scale = nearest_float16(above.double() * (sizes + 1) / top)
        return scale.where(~negative, -scale).to(self.above.dtype)


def spread(above: Tensor, groups: int, size: int) -> Tensor:
    """(lines, supers) to (lines, groups)."""
    return above.expand(-1, groups) if size == -1 else above.repeat_interleave(size, 1)[:, :groups]


def largest(scale: Tensor, size: int) -> Tensor:
    """What stands above scales (lines, groups): the largest of every `size` groups, (lines, supers)."""
    from torch.nn.functional import pad

    if size == -1:
        return scale.amax(1, keepdim=True)
    padded = pad(scale, (0, -scale.shape[1] % size))
    return padded.view(len(scale), -1, size).amax(2)


def quantized_scales(scale: Tensor, bits: int, size: int, *, signed: bool = False) -> Scales:
    """The nearest quantized scales, under the largest of each super-group.

    Args:
        scale: (lines, groups), with values that float16 holds.
        signed: some may be negative.
    """
    sizes, top = scale.abs(), 2 ** (bits - signed)
    above = largest(sizes, size)
    shares = (sizes / spread(above, scale.shape[1], size)).nan_to_num(0)
    codes = (shares * top).round().sub(1).clamp(0, top - 1)
    return Scales(codes + top * (scale < 0), above, bits, size, signed)


def nearest_float16(scale: Tensor) -> Tensor:
    """The nearest float16, at least SMALLEST_SCALE; in the dtype of `scale`.

    Torch converts float64 by way of float32, and rounding twice gives a neighbour of the nearest once in 16,000 times.
    """
    import torch

    exponent = torch.frexp(scale).exponent
    step = torch.ldexp(torch.ones_like(scale), (exponent - 11).clamp(min=-24))  # 11 bits of mantissa, or a subnormal
    return ((scale / step).round() * step).half().to(scale.dtype).clamp(min=SMALLEST_SCALE)
