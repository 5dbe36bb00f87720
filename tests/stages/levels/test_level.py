"""What a level means and what it costs, counted by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.packing import pack
from layerwise.stages.levels.level import Level, grid_columns


def grid_level(
    shape: tuple[int, int], bits: int, group_size: int, *, sym: bool, g_idx: Tensor | None = None, seed: int = 0
) -> tuple[Level, Tensor, Tensor, Tensor]:
    """A level of random parts, and those parts: codes, scale, zero."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    scale = torch.rand((rows, groups), generator=generator).half()
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    tensors = {"codes": pack(codes, bits), "scale": scale}
    if sym:
        zero = torch.full((rows, groups), 2 ** (bits - 1))
    else:
        tensors["zero"] = pack(zero, bits)
    if g_idx is not None:
        tensors["g_idx"] = g_idx
    recipe = {"encoding": "grid", "method": "any", "bits": bits, "group_size": group_size, "sym": sym}
    return Level("some", recipe, shape, tensors), codes, scale, zero


@pytest.mark.parametrize(
    ("sym", "effective_bits"), [(False, Fraction(3) + Fraction(19, 128)), (True, Fraction(3) + Fraction(16, 128))]
)
def test_three_bits_in_groups_of_128_cost_19_or_16_bits_more_per_group(sym: bool, effective_bits: Fraction) -> None:
    level, *_ = grid_level((8, 256), 3, 128, sym=sym)
    assert level.bits == 3
    assert level.effective_bits == effective_bits
    assert level.stored_bits == effective_bits * 8 * 256


@pytest.mark.parametrize(
    ("columns", "group_size", "groups"), [(256, 128, 2), (100, 32, 4), (33, 32, 2), (50, -1, 1), (50, 128, 1)]
)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_effective_bits_count_every_stored_bit_and_bytes_count_the_padding_too(
    columns: int, group_size: int, groups: int, bits: int
) -> None:
    rows = 3
    level, *_ = grid_level((rows, columns), bits, group_size, sym=False)
    assert level.stored_bits == rows * (columns * bits + groups * (16 + bits))
    words = -(-columns * bits // 32) + -(-groups * bits // 32)
    assert level.size_bytes == rows * (4 * words + 2 * groups)


def test_a_stored_column_order_is_paid_for() -> None:
    g_idx = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.int32)
    with_index, *_ = grid_level((4, 6), 4, 3, sym=True, g_idx=g_idx)
    without, *_ = grid_level((4, 6), 4, 3, sym=True)
    assert with_index.stored_bits - without.stored_bits == 32 * 6
    assert with_index.size_bytes - without.size_bytes == 4 * 6


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (70, 32), (7, 3), (20, -1), (20, 128)])
def test_a_grid_decodes_to_code_minus_zero_times_scale_exactly(columns: int, group_size: int, sym: bool) -> None:
    level, codes, scale, zero = grid_level((5, columns), 3, group_size, sym=sym)
    size = columns if group_size == -1 else group_size
    W = level.decode()
    assert W.dtype == torch.float32
    for row in range(5):
        for column in range(columns):
            group = column // size
            expected = (int(codes[row, column]) - int(zero[row, group])) * Fraction(float(scale[row, group]))
            assert Fraction(float(W[row, column])) == expected


def test_a_stored_column_order_says_which_scale_each_column_uses() -> None:
    g_idx = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.int32)
    level, codes, scale, zero = grid_level((2, 6), 4, 3, sym=False, g_idx=g_idx)
    expected = (codes - zero[:, g_idx]).double() * scale.double()[:, g_idx]
    assert torch.equal(level.decode().double(), expected)


def test_the_parts_of_a_grid_come_back_unpacked() -> None:
    level, codes, scale, zero = grid_level((3, 10), 5, 4, sym=False)
    found_codes, found_scale, found_zero, group = grid_columns(level)
    assert torch.equal(found_codes, codes.to(torch.uint8))
    assert torch.equal(found_scale, scale)
    assert found_zero is not None
    assert torch.equal(found_zero, zero.to(torch.uint8))
    assert group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)])
def test_a_dense_level_is_the_weight_at_the_width_of_its_dtype(dtype: torch.dtype, width: int) -> None:
    weight = torch.randn((4, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    level = Level("dense", {"encoding": "dense", "method": "dense"}, (4, 6), {"weight": weight})
    assert level.bits == level.effective_bits == width
    assert level.size_bytes == 24 * width // 8
    assert torch.equal(level.decode(), weight.float())


def test_an_encoding_of_another_version_is_named() -> None:
    level = Level("new", {"encoding": "trellis"}, (1, 1), {})
    with pytest.raises(UsageError, match="level new: unknown encoding 'trellis'"):
        level.decode()
