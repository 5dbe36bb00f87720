"""N:M sparse weights: of every M neighbours in a row, at most N are not zero.

Kept weights stand in N planes: plane j holds the j-th kept weight of every group, in the order of their columns. Which
columns they came from is one bit for every weight, set for exactly N of each group (a group with fewer nonzeros keeps
zeros). One bit a weight is what 2-bit indices take at 2:4, less at 4:8, and it spreads into masks with fewer
instructions: a kernel that expands groups in registers needs no table and no gather.

Bits stand in planar 16-bit words, as codes do in `planar.py`: field i of word row 16 · b + r is the group
16 · P · b + 16 · i + r, where P groups share a word. Rows of the weight run along the last axis of every tensor, padded
to a multiple of 16; groups are padded to whole words, so at 2:4 columns are padded to a multiple of 256.

Left out: quantized values, and the layout of cuSPARSELt, which its backend makes from `dense`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from layerwise.errors import UsageError
from layerwise.kernels import labels
from layerwise.kernels.half_values import dtype_name, half_values
from layerwise.kernels.packed import Packed
from layerwise.kernels.planar import ROW_MULTIPLE, WORD

RUN = 16
"""Groups whose fields stand side by side in neighbouring words: what one step of a tensor core multiplies."""


@dataclass(frozen=True, eq=False)
class NMSparse(Packed):
    """A weight of which N of every M neighbours are kept.

    Args:
        values: (n_kept, groups, n_padded), float16 or bfloat16.
        masks: (groups / P, n_padded) int16, one bit for every weight, groups in fields of 2, 4, 8 or 16 bits.
        n_kept: N.
        m_group: M, 2 to 16.
    """

    format: ClassVar[str] = "n_m_sparse"

    values: Tensor
    masks: Tensor
    n_kept: int
    m_group: int

    @classmethod
    def pack(cls, weight: Tensor, n_kept: int = 2, m_group: int = 4, dtype: torch.dtype | None = None) -> Self:
        """Lay a sparse weight out.

        Args:
            weight: (n, k), any float dtype; of every m_group neighbours in a row at most n_kept are not zero. The last
                group may be shorter.
            n_kept: N.
            m_group: M.
            dtype: of the stored weights; None keeps float16 and bfloat16 and rounds anything else to float16.
        Raises:
            UsageError: N and M that do not fit, a group with more nonzeros, or weights that are not finite.
        """
        if not (1 <= n_kept <= m_group and 2 <= m_group <= WORD):
            raise UsageError(f"{n_kept}:{m_group} is no sparsity that can be packed: N is at most M, M is 2 to {WORD}")
        n, k = weight.shape
        values = half_values(weight, dtype)
        word_columns = RUN * m_group * (WORD // _field_bits(m_group))
        groups = pad(values, (0, -k % word_columns, 0, -n % ROW_MULTIPLE)).unflatten(1, (-1, m_group))
        counts = (groups != 0).sum(dim=2)
        if (counts > n_kept).any():
            row, group = (counts > n_kept).nonzero()[0].tolist()
            raise UsageError(
                f"the weight is not {n_kept}:{m_group} sparse: columns {group * m_group} to "
                f"{min(k, (group + 1) * m_group) - 1} of row {row} hold {int(counts[row, group])} nonzeros",
                hint="prune it to that pattern first, or pack it as unstructured",
            )
        kept = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[..., :n_kept].sort(dim=2).values
        return cls(
            shape=(n, k),
            values=groups.gather(2, kept).permute(2, 1, 0).contiguous(),
            masks=_pack_masks((1 << kept).sum(dim=2).T, m_group),
            n_kept=n_kept,
            m_group=m_group,
        )

    @property
    def label(self) -> str:
        """`2:4-fp16`."""
        return labels.n_m_sparse(self.n_kept, self.m_group, dtype_name(self.values.dtype))

    @property
    def k_padded(self) -> int:
        """Columns with padding."""
        return self.values.shape[1] * self.m_group

    def dense(self) -> Tensor:
        """The weight with its zeros, in float32."""
        masks = _unpack_masks(self.masks, self.m_group)
        bits = (masks.unsqueeze(2) >> torch.arange(self.m_group, device=masks.device)) & 1
        rank = bits.cumsum(dim=2) - 1  # of each kept weight among those of its group
        kept = self.values.permute(1, 2, 0).gather(2, rank.clamp(min=0))
        weight = torch.where(bits.bool(), kept.float(), 0.0)
        n, k = self.shape
        return weight.transpose(0, 1).reshape(weight.shape[1], -1)[:n, :k].contiguous()


def _field_bits(m_group: int) -> int:
    """Bits of a word that one group takes: M rounded up to a power of two, which divides a word."""
    return 1 << (m_group - 1).bit_length()


def _pack_masks(masks: Tensor, m_group: int) -> Tensor:
    """(groups, n_padded), M bits each, to (groups / P, n_padded) int16."""
    bits = _field_bits(m_group)
    tiles = masks.reshape(-1, WORD // bits, RUN, masks.shape[1])
    words = sum((tiles[:, i] << (i * bits) for i in range(WORD // bits)), start=torch.zeros_like(tiles[:, 0]))
    return words.to(torch.int16).reshape(-1, masks.shape[1]).contiguous()


def _unpack_masks(words: Tensor, m_group: int) -> Tensor:
    """Undo `_pack_masks`: (groups, n_padded), int64."""
    bits = _field_bits(m_group)
    tiles = words.reshape(-1, RUN, words.shape[1]).long()
    fields = torch.stack([(tiles >> (i * bits)) & ((1 << m_group) - 1) for i in range(WORD // bits)], dim=1)
    return fields.reshape(-1, words.shape[1])
