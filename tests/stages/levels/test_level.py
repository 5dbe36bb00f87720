"""What a level means and what it costs, counted by hand."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.packing import pack
from layerwise.stages.levels.adapted import with_adapter
from layerwise.stages.levels.block_grid import block_grid_level
from layerwise.stages.levels.dense import dense_level
from layerwise.stages.levels.files import open_unit, read_level, write_unit
from layerwise.stages.levels.grid import grid_columns
from layerwise.stages.levels.index import pack_mask, unpack_mask
from layerwise.stages.levels.level import ENCODINGS, Level, find_encoding
from layerwise.stages.levels.low_rank import low_rank_level
from layerwise.stages.levels.mask import kept, mask_level
from layerwise.stages.levels.masked_grid import masked_grid_level
from layerwise.stages.levels.parent import parent_level
from layerwise.stages.levels.sliced import sliced_level
from layerwise.stages.levels.trellis import trellis_level


def random_grid(
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
        tensors["zero"] = pack(zero.reshape(1, -1), bits)
    if g_idx is not None:
        tensors["g_idx"] = g_idx
    recipe = {"encoding": "grid", "method": "any", "bits": bits, "group_size": group_size, "sym": sym}
    return Level("some", recipe, shape, tensors), codes, scale, zero


@pytest.mark.parametrize(
    ("sym", "effective_bits"), [(False, Fraction(3) + Fraction(19, 128)), (True, Fraction(3) + Fraction(16, 128))]
)
def test_three_bits_in_groups_of_128_cost_19_or_16_bits_more_per_group(sym: bool, effective_bits: Fraction) -> None:
    level, *_ = random_grid((8, 256), 3, 128, sym=sym)
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
    level, *_ = random_grid((rows, columns), bits, group_size, sym=False)
    assert level.stored_bits == rows * (columns * bits + groups * (16 + bits))
    words = rows * -(-columns * bits // 32) + -(-rows * groups * bits // 32)
    assert level.size_bytes == 4 * words + 2 * rows * groups


def test_a_stored_column_order_is_paid_for() -> None:
    g_idx = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.int32)
    with_index, *_ = random_grid((4, 6), 4, 3, sym=True, g_idx=g_idx)
    without, *_ = random_grid((4, 6), 4, 3, sym=True)
    assert with_index.stored_bits - without.stored_bits == 32 * 6
    assert with_index.size_bytes - without.size_bytes == 4 * 6


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (70, 32), (7, 3), (20, -1), (20, 128)])
def test_a_grid_decodes_to_code_minus_zero_times_scale_exactly(columns: int, group_size: int, sym: bool) -> None:
    level, codes, scale, zero = random_grid((5, columns), 3, group_size, sym=sym)
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
    level, codes, scale, zero = random_grid((2, 6), 4, 3, sym=False, g_idx=g_idx)
    expected = (codes - zero[:, g_idx]).double() * scale.double()[:, g_idx]
    assert torch.equal(level.decode().double(), expected)


def test_the_parts_of_a_grid_come_back_unpacked() -> None:
    level, codes, scale, zero = random_grid((3, 10), 5, 4, sym=False)
    found_codes, found_scale, found_zero, group = grid_columns(level)
    assert torch.equal(found_codes, codes.to(torch.uint8))
    assert torch.equal(found_scale, scale)
    assert found_zero is not None
    assert torch.equal(found_zero, zero.to(torch.uint8))
    assert group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)])
def test_a_dense_level_is_the_weight_at_the_width_of_its_dtype(dtype: torch.dtype, width: int) -> None:
    weight = torch.randn((4, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    level = dense_level(weight)
    assert level.recipe["dtype"] == str(dtype).removeprefix("torch.")
    assert level.bits == level.effective_bits == width
    assert level.size_bytes == 24 * width // 8
    assert level.parameters == 24
    assert torch.equal(level.decode(), weight.float())


# --- masks ---

shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))


@st.composite
def pruned(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight and what is kept of it: anything from nothing to all."""
    rows, columns = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    keep = torch.rand((rows, columns), generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return torch.randn((rows, columns), generator=generator).to(dtype), keep


def mask_size(level: Level) -> tuple[int, int]:
    """Bits and bytes of the mask: one for each weight, rows from whole bytes, or as many as `test_index.py` counts."""
    rows, columns = level.shape
    index = level.recipe.get("index")
    if index is None:
        return rows * columns, rows * -(-columns // 8)
    assert index["bits"] < rows * columns
    return index["bits"], -(-index["bits"] // 8)


@given(pruned())
def test_a_mask_is_numpys_packed_bits_and_comes_back(case: tuple[Tensor, Tensor]) -> None:
    _, keep = case
    mask = pack_mask(keep)
    assert mask.dtype == torch.uint8
    assert (mask.numpy() == np.packbits(keep.numpy(), axis=1, bitorder="little")).all()
    assert torch.equal(unpack_mask(mask, keep.shape[1]), keep)


@given(pruned())
def test_a_pruned_level_is_its_kept_weights_and_zeros(case: tuple[Tensor, Tensor]) -> None:
    weight, keep = case
    level = mask_level("m", {"method": "any", "sparsity": 0.5}, weight, keep)
    assert torch.equal(level.decode(), torch.where(keep, weight.float(), torch.zeros(())))
    assert torch.equal(kept(level), keep)
    count, width, (rows, columns) = int(keep.sum()), 8 * weight.element_size(), weight.shape
    assert level.parameters == count
    assert level.bits == count * width / (rows * columns)
    bits, size = mask_size(level)
    assert level.stored_bits == bits + count * width
    assert level.size_bytes == size + count * weight.element_size()
    assert level.costs["flops"] == 2 * count


@given(pruned(), st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 4, 16]), st.booleans(), st.booleans())
def test_a_pruned_grid_is_the_grid_with_zeros_for_what_is_pruned(
    case: tuple[Tensor, Tensor], bits: int, group_size: int, sym: bool, ordered: bool
) -> None:
    _, keep = case
    rows, columns = keep.shape
    groups = 1 if group_size == -1 else -(-columns // group_size)
    shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) % groups
    g_idx = shuffled.to(torch.int32) if ordered else None
    dense, codes, scale, zero = random_grid((rows, columns), bits, group_size, sym=sym, g_idx=g_idx)
    recipe = {"method": "any", "bits": bits, "group_size": group_size, "sym": sym}
    level = masked_grid_level("m", recipe, codes, keep=keep, scale=scale, zero=zero, group=g_idx)
    assert torch.equal(level.decode(), dense.decode() * keep)
    assert not level.decode()[~keep].any()
    count = int(keep.sum())
    overhead = rows * groups * (16 + (0 if sym else bits)) + (32 * columns if ordered else 0)
    assert level.parameters == count
    mask_bits, mask_bytes = mask_size(level)
    assert level.stored_bits == mask_bits + count * bits + overhead
    assert level.bits == count * bits / (rows * columns)
    zeros = 0 if sym else 4 * -(-rows * groups * bits // 32)
    index = 4 * columns if ordered else 0
    assert level.size_bytes == mask_bytes + 4 * -(-count * bits // 32) + 2 * rows * groups + zeros + index


def test_what_is_kept_of_some_groups_is_zero_elsewhere_and_pays_one_bit_for_each_group() -> None:
    part, *_ = random_grid((4, 24), 3, 8, sym=True)
    level = sliced_level("part", "any", part, (10, 24), groups=5, kept=[1, 4], rows=((0, 2),))
    whole = torch.zeros(10, 24)
    whole[[2, 3, 8, 9]] = part.decode()
    assert torch.equal(level.decode(), whole)
    assert level.parameters == 4 * 24
    assert level.stored_bits == part.stored_bits + 5
    assert level.size_bytes == part.size_bytes + 1
    columns = sliced_level("part", "any", part, (4, 60), groups=5, kept=[1, 4], columns=((0, 12),))
    assert torch.equal(columns.decode()[:, [*range(12, 24), *range(48, 60)]], part.decode())
    assert int((columns.decode() != 0).sum()) == int((part.decode() != 0).sum())


def test_a_product_counts_everything_of_both_factors() -> None:
    A, B = torch.ones((2, 24)).half(), torch.ones((6, 2))
    level = low_rank_level("product", {"method": "any"}, dense_level(A), dense_level(B))
    assert level.parameters == 2 * (24 + 6)
    assert level.costs["flops"] == 2 * 2 * (24 + 6)
    assert level.stored_bits == 8 * level.size_bytes == 16 * 2 * 24 + 32 * 6 * 2
    assert level.bits == level.stored_bits / (6 * 24)
    assert torch.equal(level.decode(), torch.full((6, 24), 2.0))


# --- parents, and what all encodings have in common ---


@pytest.mark.parametrize("name", ["keep", "drop", "narrow"])
def test_a_parents_level_stores_nothing_and_stands_for_no_weight(name: str) -> None:
    level = parent_level(name)
    assert (level.name, level.recipe["encoding"], level.shape, dict(level.tensors)) == (name, name, (0, 0), {})
    assert set(level.costs.values()) == {0}
    assert level.bits == level.effective_bits == 0
    assert level.encoding.pack(level) is None
    with pytest.raises(UsageError, match=f"level {name} of a parent stands for no weight"):
        level.decode()


def examples() -> dict[str, Level]:
    """A level of every encoding."""
    weight = torch.randn((6, 24), generator=torch.Generator().manual_seed(0)).half()
    keep = weight.abs() > 0.6
    grid, codes, scale, zero = random_grid((6, 24), 3, 8, sym=False)
    recipe = {key: value for key, value in grid.recipe.items() if key != "encoding"}
    generator = torch.Generator().manual_seed(2)
    A, B = (torch.randn(shape, generator=generator).half() for shape in ((2, 24), (6, 2)))
    return {
        "dense": dense_level(weight),
        "low_rank": low_rank_level("product", {"method": "any"}, dense_level(A), dense_level(B)),
        "adapted": with_adapter(grid, A, B, method="any"),
        "grid": grid,
        "mask": mask_level("mask", {"method": "any", "sparsity": 0.5}, weight, keep),
        "masked_grid": masked_grid_level("masked", recipe, codes, keep=keep, scale=scale, zero=zero),
        "block_grid": block_grid_level(
            "blocks",
            {**recipe, "sparsity": 0.5, "block": [2, 4]},
            codes,
            keep=torch.tensor([[True, False, True]]).repeat_interleave(4, 1).repeat(6, 2),
            scale=scale,
            zero=zero,
        ),
        "trellis": trellis_level(
            "coded",
            {"method": "any", "bits": 2, "state_bits": 12, "columns": 24, "seed": 0},
            (6, 24),
            torch.randint(0, 256, (6 * 24 * 2 // 8,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8),
            scale=torch.ones(1),
        ),
        "keep": parent_level("keep"),
        "drop": parent_level("drop"),
        "narrow": parent_level("narrow"),
        "sliced": sliced_level("part", "any", dense_level(weight), (12, 24), groups=6, kept=[1, 2, 5], rows=((0, 2),)),
    }


def test_every_encoding_of_the_table_is_tried_here() -> None:
    assert set(examples()) == set(ENCODINGS)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_are_those_of_the_tensors_in_the_file_and_a_level_comes_back_from_it(
    encoding: str, tmp_path: Path
) -> None:
    level = examples()[encoding]
    file = write_unit(tmp_path, "unit", [level])
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header == level.size_bytes == level.costs["bytes"]
    assert level.stored_bits <= 8 * level.size_bytes
    found = read_level(*open_unit(tmp_path, "unit"), level.name)
    assert (found.name, found.recipe, found.shape) == (level.name, level.recipe, level.shape)
    assert found.tensors.keys() == level.tensors.keys()
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in level.tensors.items())
    assert found.costs == level.costs
    assert find_encoding(encoding).label(level.recipe)
    if level.n_weights:
        assert torch.equal(found.decode(), level.decode())
        assert level.decode().dtype == torch.float32
        factors = level.recipe.get("rank", 0) * sum(level.shape)
        assert level.parameters <= level.n_weights + factors
        if encoding != "low_rank":  # a product has more weights than parameters
            assert int(level.decode().count_nonzero()) <= level.parameters


def test_an_encoding_of_another_version_is_named() -> None:
    level = Level("new", {"encoding": "lattice"}, (1, 1), {})
    with pytest.raises(UsageError, match="unknown encoding 'lattice'") as caught:
        level.decode()
    assert "another version of layerwise" in (caught.value.hint or "")
