"""Random weights of every packed format: a kernel's time depends on shapes and format, not on values."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.dense import Dense
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.unstructured import Unstructured

Shape = tuple[int, int]


class Weights:
    """Makes weights of one shape.

    Args:
        shape: (out, in).
        device: where they are made and stay.
        seed: of everything random.
    """

    def __init__(self, shape: Shape, device: str = "cpu", seed: int = 0) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def dense(self) -> Dense:
        """Normal weights that give results of about 1."""
        return Dense(self.shape, self._normal(*self.shape) / self.shape[1] ** 0.5)

    def quantized(self, bits: int, group_size: int = 128) -> Quantized:
        """Codes on a symmetric grid."""
        codes, scale = self._codes(bits, group_size)
        return Quantized.pack(codes, scale, bits=bits, group_size=group_size)

    def block_sparse(self, bits: int, zeros: float, group_size: int = 128) -> BlockSparse:
        """Codes of which whole blocks are zero."""
        codes, scale = self._codes(bits, group_size)
        rows, columns = block = (64, 256)
        blocks = -(-self.shape[0] // rows), -(-self.shape[1] // columns)
        order = torch.rand(blocks, generator=self._generator, device=self.device).flatten().argsort().argsort()
        keep = (order >= round(zeros * order.numel())).view(
            blocks
        )  # so many and no other: the label says it in percent
        return BlockSparse.pack(codes, scale, keep, bits=bits, group_size=group_size, block=block)

    def unstructured(self, zeros: float) -> Unstructured:
        """Normal weights of 16 bits, of which single ones are zero."""
        kept = torch.rand(self.shape, generator=self._generator, device=self.device) >= zeros
        return Unstructured.pack(self.dense().weight * kept, torch.float16)

    def two_of_four(self) -> NMSparse:
        """Normal weights, the two greatest of every four."""
        groups = self.dense().weight.view(self.shape[0], -1, 4)
        least = groups.abs().topk(2, dim=2, largest=False).indices
        return NMSparse.pack(groups.scatter(2, least, 0.0).view(self.shape))

    def low_rank(self, rank: int, base: Packed | None = None) -> LowRank:
        """Two factors, alone or on a base."""
        n, k = self.shape
        A, B = self._normal(rank, k) / k**0.5, self._normal(n, rank) / rank**0.5
        return LowRank(self.shape, A.half(), B.half(), base)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def _codes(self, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
        n, k = self.shape
        groups = 1 if group_size == -1 else -(-k // group_size)
        codes = torch.randint(0, 2**bits, (n, k), generator=self._generator, device=self.device, dtype=torch.uint8)
        scale = 0.5 + torch.rand((n, groups), generator=self._generator, device=self.device)
        return codes, (scale * (12 / k) ** 0.5 / 2**bits).half()


def relative_error(y: Tensor, x: Tensor, packed: Packed) -> float:
    """Of a product, in the Frobenius norm, against float64; a result with NaN has error NaN."""
    expected = x.double() @ packed.dense().double().T
    return float((y.double() - expected).norm() / expected.norm())
