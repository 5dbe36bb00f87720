"""Low-rank weights against the sum written out."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.kernels.dense import Dense
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.packed import rebuild
from layerwise.kernels.quantized import Quantized


def factors(n: int, k: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, k, generator=generator).half(), torch.randn(n, rank, generator=generator).half()


def test_it_is_the_base_plus_the_product_and_survives_storage() -> None:
    A, B = factors(6, 130, 4)
    codes = torch.randint(0, 16, (6, 130), dtype=torch.uint8)
    base = Quantized.pack(codes, torch.full((6, 2), 0.5).half(), bits=4, group_size=128)
    packed = LowRank((6, 130), A, B, base)
    exact = (codes.double() - 8) * 0.5 + B.double() @ A.double()
    assert torch.allclose(packed.dense().double(), exact, rtol=0, atol=1e-4)  # float32 sums of four products
    again = rebuild(packed.settings, packed.tensors)
    assert torch.equal(again.dense(), packed.dense())
    assert packed.size_bytes == base.size_bytes + 2 * 4 * (6 + 130)
    assert packed.label == "int4-g128-sym+r4"


def test_the_factors_alone_are_a_weight_too() -> None:
    A, B = factors(5, 9, 2)
    packed = LowRank((5, 9), A, B, None)
    assert packed.label == "r2"
    assert torch.equal(packed.dense(), B.float() @ A.float())
    assert rebuild(packed.settings, packed.tensors).tensors.keys() == {"A", "B"}


def test_parts_that_do_not_fit_are_refused() -> None:
    A, B = factors(5, 9, 2)
    with pytest.raises(UsageError, match=r"must be \(r, 9\) and \(5, r\), not \(2, 9\) and \(9, 5\)"):
        LowRank((5, 9), A, torch.zeros(9, 5), None)
    with pytest.raises(UsageError, match="the base of a 5 x 9 weight is 4 x 9"):
        LowRank((5, 9), A, B, Dense((4, 9), torch.zeros(4, 9)))
