"""Pruning by magnitude, against sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from layerwise.stages.compress.magnitude import Params, magnitude
from layerwise.stages.compress.pruning import keep_largest
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=40),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_what_is_kept_is_the_head_of_a_stable_sort(values: list[float], share: float) -> None:
    keep = keep_largest(torch.tensor(values), share).numpy()
    count = len(values) - math.ceil(share * len(values) - 1e-6)
    order = np.argsort(-np.array(values), kind="stable")
    assert set(np.flatnonzero(keep)) == set(order[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 20), (5, 33), (1, 1)])
def test_the_error_is_the_least_that_so_many_zeros_can_have(
    make_levels: Callable[..., list[Level]], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    sparsity = (0.1, 0.5, 0.85)
    squares = np.sort(weight.double().numpy().ravel() ** 2)
    for level, share in zip(make_levels("magnitude", weight, sparsity=sparsity), sparsity, strict=True):
        zeros = math.ceil(share * weight.numel() - 1e-6)
        W = level.decode()
        assert level.parameters == weight.numel() - zeros
        assert torch.equal(W[kept(level)], weight.float()[kept(level)]), "what is kept is kept as it was"
        assert level.tensors["values"].dtype == dtype
        assert float((W.double() - weight.double()).square().sum()) == pytest.approx(squares[:zeros].sum(), rel=1e-12)


def test_torch_keeps_the_same(make_levels: Callable[..., list[Level]]) -> None:
    weight: Tensor = torch.randn((8, 32), generator=torch.Generator().manual_seed(3))
    (level,) = make_levels("magnitude", weight, sparsity=0.75)
    expected = torch.zeros(256, dtype=torch.bool)
    expected[weight.abs().flatten().topk(64).indices] = True
    assert torch.equal(kept(level).flatten(), expected)


@pytest.mark.parametrize(
    ("sparsity", "names"),
    [(0.5, ["50%"]), ([0.5, 0.625], ["50%", "62.5%"]), ([1 / 3, 0.001], ["33.33%", "0.1%"])],
)
def test_names_tell_the_share(sparsity: Any, names: list[str]) -> None:
    params = Params.model_validate({"method": "magnitude", "sparsity": sparsity})
    assert params.level_names() == [f"magnitude-{name}" for name in names]
    assert magnitude.__module__ == Params.__module__


@pytest.mark.parametrize("sparsity", [0, 1, 1.5, -0.1, [], [0.5, 0.5], [0.5, 0.50000001]])
def test_a_share_that_is_none_or_stands_twice_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValidationError):
        Params.model_validate({"method": "magnitude", "sparsity": sparsity})
