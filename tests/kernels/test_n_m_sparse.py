"""N:M packing against the dense weight that it was made from, and against counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import rebuild

patterns = st.sampled_from([(2, 4), (1, 4), (4, 8), (2, 8), (1, 16), (3, 5), (1, 2), (4, 4), (16, 16)])
shapes = st.tuples(st.integers(1, 40), st.integers(1, 600))
seeds = st.integers(0, 2**31 - 1)


def sparse(shape: tuple[int, int], n_kept: int, m_group: int, seed: int) -> Tensor:
    """A weight of which every group keeps up to n_kept elements, chosen by lot."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).half()
    for first in range(0, shape[1], m_group):
        group = weight[:, first : first + m_group]
        order = torch.rand(group.shape, generator=generator).argsort(dim=1).argsort(dim=1)
        group[order >= n_kept] = 0
    return weight


@settings(deadline=None, max_examples=50)
@given(shapes, patterns, seeds)
def test_the_weight_comes_back(shape: tuple[int, int], pattern: tuple[int, int], seed: int) -> None:
    weight = sparse(shape, *pattern, seed)
    packed = NMSparse.pack(weight, *pattern)
    assert torch.equal(packed.dense(), weight.float())
    assert torch.equal(rebuild(packed.settings, packed.tensors).dense(), weight.float())
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())


@settings(deadline=None, max_examples=50)
@given(shapes, patterns, seeds)
def test_its_size_is_two_bytes_a_kept_place_and_one_field_a_group(
    shape: tuple[int, int], pattern: tuple[int, int], seed: int
) -> None:
    (n, k), (n_kept, m_group) = shape, pattern
    field_bits = next(bits for bits in (2, 4, 8, 16) if bits >= m_group)
    word_groups = 16 * (16 // field_bits)
    groups = -(-k // (m_group * word_groups)) * word_groups
    rows = -(-n // 16) * 16
    packed = NMSparse.pack(sparse(shape, *pattern, seed), *pattern)
    assert packed.size_bytes == rows * (groups * n_kept * 2 + groups * field_bits // 8)


def test_two_of_four_takes_nine_bits_of_eight() -> None:
    packed = NMSparse.pack(sparse((64, 1024), 2, 4, seed=0))
    assert packed.size_bytes / (64 * 1024) == 1.125
    assert packed.label == "2:4-fp16"


def test_every_group_has_exactly_n_bits_set_even_if_it_is_zero() -> None:
    packed = NMSparse.pack(torch.zeros(16, 256))
    assert {word & 0xFFFF for word in packed.masks.flatten().tolist()} == {0x3333}


def test_a_bit_says_where_a_weight_stands() -> None:
    weight = torch.zeros(3, 256)
    weight[1, 4 * 37 + 2] = 5  # group 37 is field 2 of word row 5
    masks = NMSparse.pack(weight).masks
    changed = (masks != 0x3333).nonzero().tolist()
    assert changed == [[5, 1]]
    assert (int(masks[5, 1]) >> 8) & 15 == 0b0101


def test_bfloat16_stays_and_float32_is_rounded_to_float16() -> None:
    weight = sparse((5, 64), 2, 4, seed=1).float() * 1.001
    assert torch.equal(NMSparse.pack(weight).dense(), weight.half().float())
    packed = NMSparse.pack(weight.bfloat16())
    assert packed.label == "2:4-bf16"
    assert torch.equal(packed.dense(), weight.bfloat16().float())


def test_a_weight_with_a_fuller_group_is_refused_by_its_place() -> None:
    weight = sparse((9, 64), 2, 4, seed=2)
    weight[7, 20:23] = 1
    with pytest.raises(UsageError, match=r"not 2:4 sparse: columns 20 to 23 of row 7 hold [34] nonzeros"):
        NMSparse.pack(weight)


@pytest.mark.parametrize("pattern", [(3, 2), (0, 4), (8, 32)])
def test_patterns_that_are_none_are_refused(pattern: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="no sparsity that can be packed"):
        NMSparse.pack(torch.zeros(4, 64), *pattern)


def test_weights_beyond_float16_are_refused() -> None:
    weight = torch.zeros(4, 64)
    weight[3, 5] = 1e6
    with pytest.raises(UsageError, match=r"row 3 of the weight is not finite in float16 \(largest magnitude 1e\+06\)"):
        NMSparse.pack(weight)
    assert NMSparse.pack(weight, dtype=torch.bfloat16).dense().max() == torch.tensor(1e6).bfloat16()
