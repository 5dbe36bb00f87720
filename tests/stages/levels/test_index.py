"""Masks in few bits, against itertools, the entropy, and themselves read back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.stages.levels.index import index_bits, read_fields, read_index, store_index, write_fields
from layerwise.stages.levels.level import Level


def stored(keep: Tensor, pattern: tuple[int, int] | None = None, block: tuple[int, int] | None = None) -> Level:
    tensors, recipe = store_index(keep, pattern, block)
    level = Level("m", {"encoding": "mask", **recipe}, (keep.shape[0], keep.shape[1]), tensors)
    assert torch.equal(read_index(level), keep)
    coding = recipe.get("index", {"coding": "bitmask"})["coding"]
    if coding != "bitmask":  # whose rows begin with a byte
        assert level.size_bytes == -(-index_bits(level) // 8)
    return level


def random_mask(shape: tuple[int, int], share: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 90)),
    st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 1.0]),
    st.integers(0, 9),
)
def test_any_mask_comes_back_and_takes_no_more_than_a_bit_for_each_weight(
    shape: tuple[int, int], share: float, seed: int
) -> None:
    assert index_bits(stored(random_mask(shape, share, seed))) <= shape[0] * shape[1]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.3])
def test_a_mask_without_structure_takes_little_more_than_its_entropy(share: float) -> None:
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    level = stored(random_mask((250, 400), share))
    assert level.recipe["index"]["coding"] == "enumerated"
    assert entropy - 0.01 < index_bits(level) / 100_000 < entropy + 0.05


def test_a_half_is_kept_as_a_bitmask() -> None:
    assert "index" not in stored(random_mask((50, 400), 0.5)).recipe


@pytest.mark.parametrize("columns", [96, 45, 3])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (5, 7), (8, 16), (16, 32), (31, 32)])
def test_a_pattern_takes_the_bits_of_its_choices(pattern: tuple[int, int], columns: int) -> None:
    n, m = pattern
    generator = torch.Generator().manual_seed(1)
    keep = torch.zeros((20, columns), dtype=torch.bool)
    for row in range(20):
        for start in range(0, columns, m):
            size = min(m, columns - start)
            keep[row, start + torch.randperm(size, generator=generator)[: -(-size * n // m)]] = True
    level = stored(keep, pattern)
    bits = 20 * -(-columns // m) * math.ceil(math.log2(math.comb(m, n)))
    assert index_bits(level) <= bits
    if columns == 96 and pattern != (31, 32):
        assert index_bits(level) == bits
        assert level.recipe["index"]["coding"] == "n_m"
    less = keep & random_mask((20, columns), 0.8)  # as an earlier pruning leaves it
    stored(less, pattern)


def test_a_common_pattern_is_found_without_being_told() -> None:
    keep = torch.tensor([[True, False, True, False], [False, False, True, True]]).repeat(9, 16)
    assert stored(keep).recipe["index"] == {"coding": "n_m", "bits": 18 * 16 * 3, "pattern": [2, 4]}


def test_choices_are_numbered_as_itertools_orders_them() -> None:
    """Of 2 of 4, by their last place, then by the first."""
    choices = sorted(itertools.combinations(range(4), 2), key=lambda places: places[::-1])
    keep = torch.zeros((1, 24), dtype=torch.bool)
    for group, places in enumerate(choices):
        keep[0, [4 * group + place for place in places]] = True
    tensors, _ = store_index(keep, (2, 4))
    assert read_fields(tensors["mask"], torch.full((6,), 3)).tolist() == list(range(6))


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 16), st.integers(1, 16)))
def test_whole_blocks_are_counted_once(shape: tuple[int, int], block: tuple[int, int]) -> None:
    tall, wide = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    blocks = random_mask((tall, wide), 0.5)
    keep = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    assert index_bits(stored(keep, block=block)) <= tall * wide


@given(st.lists(st.tuples(st.integers(0, 62), st.integers(0, 2**62 - 1)), min_size=1, max_size=30))
def test_fields_of_any_width_are_read_as_they_were_written(fields: list[tuple[int, int]]) -> None:
    widths = torch.tensor([width for width, _ in fields])
    values = torch.tensor([value % 2**width for width, value in fields])
    stream = write_fields(values, widths)
    whole = sum(int(value) << int(start) for value, start in zip(values, widths.cumsum(0) - widths, strict=True))
    assert bytes(stream.tolist()) == whole.to_bytes(-(-int(widths.sum()) // 8), "little")
    assert torch.equal(read_fields(stream, widths), values)
    assert torch.equal(read_fields(stream, widths[1:], int(widths[0])), values[1:])
