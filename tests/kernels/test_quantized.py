"""The quantized format against its formula, one weight at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import planar
from layerwise.kernels.packed import rebuild
from layerwise.kernels.quantized import Quantized

sizes = st.tuples(st.integers(1, 20), st.integers(1, 300))
widths = st.sampled_from(planar.BITS)
groups = st.sampled_from([-1, 5, 32, 64, 100, 128, 512])
seeds = st.integers(0, 2**31 - 1)

Parts = tuple[Tensor, Tensor, Tensor | None]


def random_parts(n: int, k: int, bits: int, group_size: int, sym: bool, seed: int = 0) -> Parts:
    """codes (n, k), scale (n, groups), zero (n, groups)."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, count, generator=generator) + 0.01).half()
    zero = None if sym else torch.randint(0, 2**bits, (n, count), generator=generator, dtype=torch.uint8)
    return codes, scale, zero


def exact(parts: Parts, bits: int, group_size: int, order: Tensor | None) -> list[list[float]]:
    """(code - zero) · scale in Python's floats, which hold it exactly."""
    codes, scale, zero = (part if part is None else part.tolist() for part in parts)
    n, k = parts[0].shape
    place = list(range(k)) if order is None else torch.argsort(order).tolist()
    group = [0 if group_size == -1 else place[column] // group_size for column in range(k)]
    offset = [[2 ** (bits - 1)] * len(row) for row in scale] if zero is None else zero
    return [[(codes[i][j] - offset[i][group[j]]) * scale[i][group[j]] for j in range(k)] for i in range(n)]


@given(sizes, widths, groups, st.booleans(), st.booleans(), seeds)
def test_dense_is_code_minus_zero_times_scale_bit_for_bit(
    size: tuple[int, int], bits: int, group_size: int, sym: bool, ordered: bool, seed: int
) -> None:
    parts = random_parts(*size, bits, group_size, sym, seed)
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed)) if ordered else None
    packed = Quantized.pack(*parts, bits=bits, group_size=group_size, order=order)
    assert packed.dense().dtype == torch.float32
    assert packed.dense().double().tolist() == exact(parts, bits, group_size, order)
    assert torch.equal(packed.codes(), parts[0])


@given(sizes, widths, groups, st.booleans(), seeds)
def test_it_is_rebuilt_from_what_is_saved(
    size: tuple[int, int], bits: int, group_size: int, sym: bool, seed: int
) -> None:
    packed = Quantized.pack(*random_parts(*size, bits, group_size, sym, seed), bits=bits, group_size=group_size)
    again = rebuild(packed.settings, packed.tensors)
    assert torch.equal(again.dense(), packed.dense())
    assert again.label == packed.label


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "size_bytes"),
    [
        (4, 128, True, 32 * 256 // 2 + 2 * 32 * 2),
        (4, 32, False, 32 * 256 // 2 + 3 * 32 * 8),
        (3, 64, True, 32 * 256 * 3 // 8 + 2 * 32 * 4),
        (2, 128, True, 32 * 256 // 4 + 2 * 32 * 2),
        (8, -1, True, 32 * 256 + 2 * 32),
    ],
)
def test_nothing_is_stored_beside_codes_scales_and_zeros(
    bits: int, group_size: int, sym: bool, size_bytes: int
) -> None:
    packed = Quantized.pack(*random_parts(32, 256, bits, group_size, sym), bits=bits, group_size=group_size)
    assert packed.size_bytes == size_bytes


def test_groups_beyond_the_last_column_have_scale_zero() -> None:
    packed = Quantized.pack(*random_parts(3, 70, 4, 32, sym=False), bits=4, group_size=32)
    assert packed.k_padded == 128
    assert packed.scale.shape == (4, 16)
    assert not packed.scale[3].any()
    assert not packed.scale[:, 3:].any()


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "ordered", "label"),
    [
        (4, 128, True, False, "int4-g128-sym"),
        (3, 64, False, False, "int3-g64-asym"),
        (8, -1, True, False, "int8-channel-sym"),
        (4, 128, True, True, "int4-g128-sym-ordered"),
    ],
)
def test_the_label_says_what_decides_its_time(bits: int, group_size: int, sym: bool, ordered: bool, label: str) -> None:
    order = torch.arange(64).flip(0) if ordered else None
    packed = Quantized.pack(*random_parts(2, 64, bits, group_size, sym), bits=bits, group_size=group_size, order=order)
    assert packed.label == label


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    codes, scale, zero = random_parts(4, 100, 4, 32, sym=False)
    with pytest.raises(
        UsageError, match="scale of a 4 x 100 weight with groups of 32 columns must be 4 x 4, not 4 x 3"
    ):
        Quantized.pack(codes, scale[:, :3], zero, bits=4, group_size=32)
    with pytest.raises(UsageError, match="zero of a 4 x 100 weight with groups of 32 columns must be 4 x 4, not 4 x 1"):
        Quantized.pack(codes, scale, scale.new_zeros((4, 1)), bits=4, group_size=32)
    with pytest.raises(UsageError, match="order must hold each of the 100 columns once"):
        Quantized.pack(codes, scale, zero, bits=4, group_size=32, order=torch.zeros(100, dtype=torch.int64))
