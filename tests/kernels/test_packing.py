"""Packing against Python's whole numbers, which are bit streams of any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.kernels.packing import pack, unpack, words_per_row

shapes = st.tuples(st.integers(1, 5), st.integers(1, 130))
widths = st.integers(1, 8)
seeds = st.integers(0, 2**31 - 1)


def random_codes(shape: tuple[int, int], bits: int, seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def packed_row(codes: list[int], bits: int) -> list[int]:
    """One row as a single number, cut into words that are read as signed."""
    stream = sum(code << (place * bits) for place, code in enumerate(codes))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(shapes, widths, seeds)
def test_each_row_is_one_stream_of_bits_least_significant_first(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [packed_row(row, bits) for row in codes.tolist()]


@given(shapes, widths, seeds)
def test_unpacking_gives_back_the_codes(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    unpacked = unpack(pack(codes, bits), bits, shape[1])
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_greatest_codes_fill_every_bit_and_the_rest_of_the_last_word_is_zero(bits: int) -> None:
    n = 37
    words = pack(torch.full((1, n), 2**bits - 1), bits)[0].tolist()
    assert sum((word & 0xFFFFFFFF).bit_count() for word in words) == n * bits
    assert len(words) == words_per_row(n, bits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_codes_of_any_integer_dtype_and_stride_pack_alike(dtype: torch.dtype) -> None:
    codes = random_codes((6, 45), 5, seed=3)
    assert torch.equal(pack(codes.T.contiguous().T.to(dtype), 5), pack(codes, 5))


def test_a_wrong_number_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="33 codes of 4 bits take 5 words a row, not 4"):
        unpack(torch.zeros((2, 4), dtype=torch.int32), 4, 33)
