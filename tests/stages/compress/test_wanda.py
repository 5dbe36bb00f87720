"""Wanda and what pruning methods share, against a loop over rows written from the paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from layerwise.stages.calibrate.channels import CHANNELS
from layerwise.stages.compress import magnitude, wanda
from layerwise.stages.compress.pruning import keep_largest_of_rows, keep_pattern
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept
from layerwise.stages.models.network import Unit

Make = Callable[..., list[Level]]


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and inputs (tokens, in) of uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn((3 * columns, columns), generator=generator) * (0.1 + torch.rand(columns, generator=generator))
    return torch.randn((rows, columns), generator=generator), X


def saliency(W: Tensor, X: Tensor) -> NDArray[np.float64]:
    """|W_ij| · ‖X_j‖, eq. 1."""
    found: NDArray[np.float64] = np.abs(W.double().numpy()) * np.linalg.norm(X.double().numpy(), axis=0)
    return found


@pytest.mark.parametrize("sparsity", [0.5, 0.25, 0.75])
def test_of_every_row_the_weights_of_least_saliency_go(make_levels: Make, sparsity: float) -> None:
    W, X = layer(12, 40)
    (level,) = make_levels("wanda", W, {"channels": CHANNELS.measure(X)}, sparsity=sparsity)
    scores = saliency(W, X)
    for row, keep in enumerate(kept(level).numpy()):
        order = np.argsort(scores[row])
        assert set(np.flatnonzero(~keep)) == set(order[: int(40 * sparsity)])
    assert torch.equal(level.decode(), W * kept(level))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (5, 7)])
def test_of_every_group_n_of_greatest_saliency_are_kept(make_levels: Make, n: int, m: int) -> None:
    W, X = layer(6, 42)
    (level,) = make_levels("wanda", W, {"channels": CHANNELS.measure(X)}, pattern=f"{n}:{m}")
    assert level.name == f"wanda-{n}:{m}"
    scores, keep = saliency(W, X), kept(level).numpy()
    for row in range(6):
        for start in range(0, 42, m):
            group = scores[row, start : start + m]
            count = -(-len(group) * n // m)
            assert set(np.flatnonzero(keep[row, start : start + m])) == set(np.argsort(group)[len(group) - count :])


def test_convolutions_in_groups_have_norms_of_their_own(make_levels: Make) -> None:
    (W, X), (_, Y) = layer(8, 12), layer(8, 12, seed=1)
    channels = torch.stack([CHANNELS.measure(X), CHANNELS.measure(Y)])
    (both,) = make_levels("wanda", W, {"channels": channels}, sparsity=0.5)
    for rows, inputs in ((slice(0, 4), X), (slice(4, 8), Y)):
        (alone,) = make_levels("wanda", W[rows], {"channels": CHANNELS.measure(inputs)}, sparsity=0.5)
        assert torch.equal(kept(both)[rows], kept(alone))
    unit = Unit("conv", "conv", "convolution", 0, (8, 12), (0,), groups=2)
    assert wanda.Params(sparsity=0.5).refuses(unit) is None


@given(st.integers(1, 9), st.integers(1, 30), st.floats(0.01, 0.99), st.integers(1, 7))
def test_counts_are_exact_whatever_divides(rows: int, columns: int, share: float, n: int) -> None:
    scores = torch.zeros(rows, columns)  # all ties
    keep = keep_largest_of_rows(scores, share)
    gone = (~keep).sum(1)
    assert int(gone.sum()) == math.ceil(share * rows * columns - 1e-6)
    assert int(gone.max() - gone.min()) <= 1
    assert bool((keep.int().diff(dim=1) <= 0).all()), "of equals the earlier are kept"
    groups = keep_pattern(scores, (n, 8))
    assert int(groups.sum()) == rows * (columns // 8 * n + -(-(columns % 8) * n // 8))


def test_an_earlier_pruning_counts_and_stays(make_levels: Make) -> None:
    W, X = layer(8, 32)
    X[:, :8] = 0  # these score nothing, and yet what was pruned before goes first
    before = torch.rand(8, 32, generator=torch.Generator().manual_seed(5)) > 0.2
    statistics = {"channels": CHANNELS.measure(X)}
    for level in make_levels("wanda", W * before, statistics, keep=before, sparsity=0.5, pattern="2:4"):
        assert not kept(level)[~before].any()
    assert make_levels("wanda", W * before, statistics, keep=before, sparsity=0.5)[0].parameters == W.numel() // 2


def test_what_is_kept_is_rounded_to_nearest_and_pruned_weights_take_no_code(make_levels: Make) -> None:
    W, X = layer(10, 48)
    statistics = {"channels": CHANNELS.measure(X)}
    (plain,) = make_levels("wanda", W, statistics, pattern="2:4")
    then = {"bits": [2, 4], "group_size": 16, "grid": "minmax"}
    for level, bits in zip(make_levels("wanda", W, statistics, pattern="2:4", then=then), (2, 4), strict=True):
        assert level.name == f"wanda-2:4-{bits}b-g16-minmax"
        assert torch.equal(kept(level), kept(plain))
        scale = level.tensors["scale"].double().repeat_interleave(16, 1)
        half = 2 ** (bits - 1)
        nearest = (W.double() / scale).round().clamp(-half, half - 1) * scale
        assert torch.equal(level.decode().double(), nearest * kept(plain))
        assert level.bits == pytest.approx(bits / 2)


def test_grids_weigh_columns_by_their_inputs(make_levels: Make) -> None:
    """One column carries nearly all of the output: its error falls against grids that count all columns the same."""
    W, X = layer(64, 16)
    X[:, 3] *= 30
    then = {"bits": 2, "group_size": 16}
    (level,) = make_levels("wanda", W, {"channels": CHANNELS.measure(X)}, pattern="3:4", then=then)
    (plain,) = make_levels("magnitude", W, pattern="3:4", then=then)
    error, other = ((found.decode() - W)[:, 3].square()[kept(found)[:, 3]].mean() for found in (level, plain))
    assert error < 0.5 * other


@pytest.mark.parametrize(
    ("menu", "names"),
    [
        ({"sparsity": 0.5, "mask_structure": "2:4"}, ["wanda-50%", "wanda-2:4"]),
        ({"pattern": ["1:2", "31:32"]}, ["wanda-1:2", "wanda-31:32"]),
        (
            {"sparsity": [0.5, 0.6], "then": {"bits": [3, 4]}},
            [f"wanda-{share}-{bits}b-g128" for share in ("50%", "60%") for bits in (3, 4)],
        ),
    ],
)
def test_names_tell_amount_and_grid(menu: dict[str, Any], names: list[str]) -> None:
    params = wanda.Params.model_validate(menu)
    assert params.level_names() == names
    assert params.fallback() == magnitude.Params.model_validate(menu)


@pytest.mark.parametrize(
    "menu",
    [
        {},
        {"sparsity": []},
        *({"pattern": text} for text in ("4:2", "2:2", "0:4", "2-4", "2:64", "half", "2:4:8", ["2:4", "2:4"], 2.4)),
        {"sparsity": 0.5, "then": {}},
        {"sparsity": 0.5, "then": {"bits": 1}},
        {"sparsity": 0.5, "then": {"bits": 4, "group_size": 0}},
    ],
)
def test_what_no_mask_can_be_is_refused(menu: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        wanda.Params.model_validate(menu)
