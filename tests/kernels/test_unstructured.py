"""Unstructured packing against the dense weight, and against runs cut by a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.packed import rebuild
from layerwise.kernels.unstructured import Unstructured

shapes = st.tuples(st.integers(1, 12), st.integers(1, 3000))
densities = st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
seeds = st.integers(0, 2**31 - 1)


def sparse(shape: tuple[int, int], density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).half()
    return torch.where(torch.rand(shape, generator=generator) < density, weight, torch.zeros_like(weight))


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


def test_rows_that_are_too_long_and_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="a row of 65537 columns cannot be packed"):
        Unstructured.pack(torch.zeros(1, 65537))
    with pytest.raises(UsageError, match="row 1 of the weight is not finite"):
        Unstructured.pack(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(UsageError, match="stored in float16 or bfloat16, not float32"):
        Unstructured.pack(torch.zeros(1, 8), dtype=torch.float32)
