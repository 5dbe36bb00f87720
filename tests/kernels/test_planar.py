"""Planar words against the layout's definition, one code at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import planar
from layerwise.kernels.planar import pack, unpack

shapes = st.tuples(st.integers(1, 40), st.integers(1, 600))
widths = st.sampled_from(planar.BITS)
groups = st.sampled_from([-1, 16, 32, 48, 64, 128])
seeds = st.integers(0, 2**31 - 1)


def random_codes(shape: tuple[int, int], bits: int, seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def bits_of(words: Tensor, row: int, n: int) -> int:
    """A word as a number without sign."""
    return int(words[row, n]) & 0xFFFF


@given(shapes, widths, groups, seeds)
def test_unpacking_gives_back_the_codes(shape: tuple[int, int], bits: int, group_size: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    unpacked = unpack(*pack(codes, bits, group_size), bits, group_size, shape)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@given(shapes, widths, groups)
def test_the_size_is_that_of_whole_blocks_of_sixteen_rows(shape: tuple[int, int], bits: int, group_size: int) -> None:
    words, high = pack(torch.zeros(shape, dtype=torch.uint8), bits, group_size)
    n, k = (planar.padded(*pair) for pair in zip(shape, (16, planar.block_columns(bits, group_size)), strict=True))
    planes = [words] if high is None else [words, high]
    assert all(plane.dtype == torch.int16 and plane.shape[1] == n for plane in planes)
    assert sum(plane.numel() * 2 for plane in planes) * 8 == n * k * bits


@pytest.mark.parametrize(("bits", "group_size", "run"), [(2, 64, 32), (4, 128, 32), (8, 32, 32), (8, -1, 64)])
def test_field_i_of_word_row_r_holds_column_i_times_the_run_plus_r(bits: int, group_size: int, run: int) -> None:
    per_word = 16 // bits
    n, k = 3, 2 * run * per_word
    codes = random_codes((n, k), bits, seed=1)
    words, high = pack(codes, bits, group_size)
    assert high is None
    for column in range(k):
        block, inside = divmod(column, run * per_word)
        field, r = divmod(inside, run)
        for row in range(n):
            assert bits_of(words, block * run + r, row) >> (field * bits) & (2**bits - 1) == codes[row, column]


def test_three_bits_are_a_plane_of_two_and_one_of_the_upper_bit_over_two_blocks() -> None:
    codes = random_codes((2, 512), 3, seed=2)
    words, high = pack(codes, 3, 128)
    assert high is not None
    for column in range(512):
        field, r = divmod(column % 128, 16)
        upper_field = column % 256 // 16
        for row in range(2):
            lower = bits_of(words, column // 128 * 16 + r, row) >> (2 * field) & 3
            upper = bits_of(high, column // 256 * 16 + r, row) >> planar.UPPER_BITS[upper_field] & 1
            assert lower + 4 * upper == codes[row, column]


def test_each_bit_of_an_upper_word_belongs_to_one_field() -> None:
    assert sorted(planar.UPPER_BITS) == list(range(16))


@pytest.mark.parametrize("bits", planar.BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_no_field_reaches_over_the_border_of_a_group(bits: int, group_size: int) -> None:
    run = planar.field_columns(bits, group_size)
    assert run >= 16  # what a tensor core multiplies
    assert group_size == -1 or group_size % run == 0


def test_a_width_without_a_layout_is_refused() -> None:
    with pytest.raises(UsageError, match=r"5-bit codes have no planar layout \(known: 2, 3, 4, 8\)"):
        pack(torch.zeros((1, 1), dtype=torch.uint8), 5, 128)
