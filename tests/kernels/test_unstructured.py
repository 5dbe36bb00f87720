"""Unstructured packing against the dense weight, and against runs cut by a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.packed import rebuild
from layerwise.kernels.unstructured import DTYPES, Unstructured

shapes = st.tuples(st.integers(1, 12), st.integers(1, 3000))
densities = st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)


def sparse(shape: tuple[int, int], density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).half()
    return torch.where(torch.rand(shape, generator=generator) < density, weight, torch.zeros_like(weight))


def bits(weight: Tensor) -> Tensor:
    """Of float32: what tells 0 and -0 apart."""
    return weight.float().view(torch.int32)


def scattered(mask: Tensor, values: Tensor) -> Tensor:
    """What a mask and its kept values mean."""
    weight = torch.zeros(mask.shape)
    weight[mask] = values.float()
    return weight


def count_runs(row: list[float]) -> int:
    """How many runs a row takes, one nonzero after the other."""
    runs, length, first = 0, 8, 0
    for column, value in enumerate(row):
        if value == 0:
            continue
        if length == 8 or column - first > 255:
            runs, length, first = runs + 1, 0, column
        length += 1
    return runs


@settings(deadline=None, max_examples=50)
@given(shapes, densities, seeds)
def test_the_weight_comes_back(shape: tuple[int, int], density: float, seed: int) -> None:
    weight = sparse(shape, density, seed)
    packed = Unstructured.pack(weight)
    assert torch.equal(packed.dense(), weight.float())
    assert torch.equal(rebuild(packed.settings, packed.tensors).dense(), weight.float())


@settings(deadline=None, max_examples=50)
@given(shapes, densities, seeds, dtypes)
def test_what_a_mask_keeps_comes_back_bit_for_bit(
    shape: tuple[int, int], density: float, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    values = torch.randn(int(mask.sum()), generator=generator).to(dtype)
    values[::5] = 0.0
    values[1::5] = -0.0  # pruned weights that an update made zero are kept as they are
    packed = Unstructured.from_mask(mask, values)
    assert packed.values.dtype == dtype
    assert torch.equal(bits(packed.dense()), bits(scattered(mask, values)))
    assert torch.equal(bits(rebuild(packed.settings, packed.tensors).dense()), bits(scattered(mask, values)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3, 7).bool(),
        torch.ones(5, 1001).bool(),
        torch.tensor([[False] * 300, [True] * 300, [False] * 300]),
        torch.eye(1, 65536).bool() | torch.eye(1, 65536).bool().flip(1),
    ],
    ids=["nothing kept", "all kept", "empty first and last row", "the ends of the longest row"],
)
def test_masks_at_their_ends(mask: Tensor, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edge = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 4, -0.0, 0.0], dtype=dtype)
    values = edge.repeat(-(-int(mask.sum()) // 6))[: int(mask.sum())]
    packed = Unstructured.from_mask(mask, values)
    assert torch.equal(bits(packed.dense()), bits(scattered(mask, values)))


def test_a_weight_keeps_its_dtype_unless_another_is_asked_for() -> None:
    weight = torch.tensor([[0.1, 0.0, 1e-9]])
    assert torch.equal(bits(Unstructured.pack(weight).dense()), bits(weight))
    rounded = Unstructured.pack(weight, torch.float16)
    assert rounded.values.dtype == torch.float16
    assert torch.equal(rounded.dense(), weight.half().float())
    assert rounded.zeros_percent == 67, "what rounds to zero is not kept"


@settings(deadline=None, max_examples=50)
@given(shapes, densities, seeds)
def test_its_size_is_26_bytes_a_run_and_4_a_row(shape: tuple[int, int], density: float, seed: int) -> None:
    weight = sparse(shape, density, seed)
    runs = sum(count_runs(row) for row in weight.tolist())
    assert Unstructured.pack(weight).size_bytes == 26 * runs + 4 * (shape[0] + 1)


def test_a_gap_of_255_columns_stays_in_the_run_and_one_of_256_ends_it() -> None:
    weight = torch.zeros(2, 600)
    weight[0, [3, 258]] = 1
    weight[1, [3, 259]] = 1
    packed = Unstructured.pack(weight)
    assert packed.starts.tolist() == [0, 1, 3]
    assert packed.firsts.tolist() == [3, 3, 259]


def test_first_columns_use_all_sixteen_bits() -> None:
    weight = torch.zeros(1, 65536)
    weight[0, [0, 40000, 65535]] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(Unstructured.pack(weight).dense(), weight)


def test_the_label_says_how_many_zeros_there_are() -> None:
    assert Unstructured.pack(sparse((64, 512), 0.1, seed=0)).label == "unstructured-fp16-90%"
    assert Unstructured.pack(torch.zeros(4, 4).bfloat16()).label == "unstructured-bf16-100%"
    kept_zeros = Unstructured.from_mask(torch.ones(4, 4).bool(), torch.zeros(16))
    assert kept_zeros.label == "unstructured-fp32-0%", "they are read and multiplied as others are"


def test_what_cannot_be_packed_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="a row of 65537 columns cannot be packed"):
        Unstructured.pack(torch.zeros(1, 65537))
    with pytest.raises(UsageError, match="row 1 of the weight is not finite"):
        Unstructured.pack(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(UsageError, match="row 0 of the weight is not finite in float16"):
        Unstructured.pack(torch.tensor([[70000.0]]), torch.float16)
    with pytest.raises(UsageError, match="stored in float16, bfloat16, float32, not in float64"):
        Unstructured.pack(torch.zeros(1, 8).double())
    with pytest.raises(UsageError, match="the mask keeps 3 weights, but there are 2"):
        Unstructured.from_mask(torch.ones(1, 3).bool(), torch.ones(2))
