"""Weights on a uniform grid: integer codes, and one scale and zero point for each group of a row.

ŵ[n, k] = (code[n, k] - zero[g, n]) · scale[g, n] with g = k // group_size. Codes stand in planar words (`planar.py`),
scales and zero points with the rows of the weight along the second axis, as the words do: all that a kernel needs of
one block of columns is then contiguous. Zero points are whole bytes: at 4 bits and groups of 128 packing them would
save 0.03 bits a weight and cost the inner loop a shift and a mask.

Columns whose groups are not runs of neighbours (GPTQ with activation order) are sorted by group when they are packed;
`order` says how, and x is gathered by it. Columns beyond k, up to whole blocks, have no effect: kernels read no x
there, and groups that lie wholly beyond k have scale 0.

Left out: widths with no planar layout (5, 6, 7 bits).
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


@dataclass(frozen=True, eq=False)
class Quantized(Packed):
    """A weight of 2, 3, 4 or 8 bits, laid out for the kernels of `quantized_matmul.py`.

    n_padded is n rounded up to 16, k_padded is k rounded up to whole blocks, groups is ceil(k_padded / group_size).

    Args:
        words: (k_padded / P, n_padded) int16, planar; at 3 bits the plane of the lower two bits (P = 8).
        high: (k_padded / 16, n_padded) int16, the plane of the upper bit at 3 bits; else None.
        scale: (groups, n_padded) float16.
        zero: (groups, n_padded) uint8, None if symmetric: then 2**(bits - 1) everywhere.
        order: (k,) int32, None if columns stand in their own order: packed column i is column order[i] of the weight.
        bits: 2, 3, 4 or 8.
        group_size: packed columns that share a scale, -1 for the whole row.
        sym: no zero points are stored.
    """

    format: ClassVar[str] = "quantized"

    words: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    bits: int
    group_size: int
    sym: bool

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        order: Tensor | None = None,
    ) -> Self:
        """Lay a weight out for the kernels.

        Args:
            codes: (n, k) uint8, in the order of the weight's columns.
            scale: (n, groups) float16, groups = ceil(k / group_size) (the last one may be shorter).
            zero: (n, groups) uint8, None if symmetric.
            bits: 2, 3, 4 or 8.
            group_size: columns that share a scale, -1 for the whole row.
            order: (k,) any integer dtype, the columns sorted by group: column order[i] belongs to group
                i // group_size. None if columns stand so already.
        Raises:
            UsageError: a width with no planar layout, or tensors that do not fit together.
        """
        n, k = codes.shape
        groups = 1 if group_size == -1 else -(-k // group_size)
        for name, part in (("scale", scale), ("zero", zero)):
            if part is not None and part.shape != (n, groups):
                raise UsageError(
                    f"{name} of a {n} x {k} weight with groups of {group_size} columns must be {n} x {groups}, "
                    f"not {' x '.join(map(str, part.shape))}"
                )
        if order is not None and not torch.equal(order.sort().values.cpu(), torch.arange(k, dtype=order.dtype)):
            raise UsageError(f"order must hold each of the {k} columns once")
        sorted_codes = codes if order is None else codes.index_select(1, order.long())
        words, high = planar.pack(sorted_codes, bits, group_size)
        k_padded = planar.padded(k, planar.block_columns(bits, group_size))
        missing = 0 if group_size == -1 else -(-k_padded // group_size) - groups

        def by_group(part: Tensor) -> Tensor:
            return pad(part.T, (0, words.shape[1] - n, 0, missing)).contiguous()

        return cls(
            shape=(n, k),
            words=words,
            high=high,
            scale=by_group(scale.to(torch.float16)),
            zero=None if zero is None else by_group(zero.to(torch.uint8)),
            order=None if order is None else order.to(torch.int32),
            bits=bits,
            group_size=group_size,
            sym=zero is None,
        )

    @property
    def label(self) -> str:
        """`int4-g128-sym`, `int3-g64-asym`, `int8-channel-sym`, `int4-g128-sym-ordered`."""
        return labels.quantized(self.bits, self.group_size, self.sym, self.order is not None)

    @property
    def k_padded(self) -> int:
        """Columns with padding: whole blocks."""
        return self.words.shape[0] * planar.fields(self.bits)

    @property
    def n_padded(self) -> int:
        """Rows with padding."""
        return self.words.shape[1]

    def codes(self) -> Tensor:
        """The codes in the order of the weight's columns: (n, k), uint8."""
        return self._columns(planar.unpack(self.words, self.high, self.bits, self.group_size, self.shape))

    def scales(self) -> Tensor:
        """Each weight's scale: (n, k), float16."""
        return self._columns(self._each(self.scale))

    def zeros(self) -> Tensor:
        """Each weight's zero point: (n, k), uint8."""
        if self.zero is None:
            return torch.full(self.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=self.words.device)
        return self._columns(self._each(self.zero))

    def dense(self) -> Tensor:
        """(code - zero) · scale: (n, k), float32, exact: a difference has 9 bits, a scale 11."""
        weight = self.codes().float()
        weight -= self.zeros()
        weight *= self.scales()
        return weight

    def _each(self, part: Tensor) -> Tensor:
        """(groups, n_padded) of a group to (n, k) of its packed columns."""
        n, k = self.shape
        size = k if self.group_size == -1 else self.group_size
        group = torch.arange(k, device=part.device) // size
        return part[:, :n].index_select(0, group).T

    def _columns(self, part: Tensor) -> Tensor:
        """(n, k) in packed order to the order of the weight's columns."""
        if self.order is None:
            return part
        sorted_back = torch.empty_like(self.order, dtype=torch.int64)
        sorted_back[self.order.long()] = torch.arange(len(self.order), device=self.order.device)
        return part.index_select(1, sorted_back)
