"""Blocks that go as a whole: which ones, against trying all of them; and what a kernel takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.packed import rebuild
from layerwise.stages.calibrate.channels import CHANNELS
from layerwise.stages.compress.sparsegpt import Params
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept
from layerwise.stages.models.network import Unit

Make = Callable[..., list[Level]]
DAMP = 0.01


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and inputs (tokens, in) that depend on each other, of uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn((4 * columns, columns), generator=generator)
    X = X @ (torch.eye(columns) + 0.4 * torch.randn((columns, columns), generator=generator))
    X *= 0.1 + torch.rand(columns, generator=generator) ** 2
    return torch.randn((rows, columns), generator=generator) * 0.05, X


def damped(X: Tensor) -> NDArray[np.float64]:
    H = (X.double().T @ X.double()).numpy()
    found: NDArray[np.float64] = H + DAMP * np.diag(H).mean() * np.eye(len(H))
    return found


def without(W: NDArray[np.float64], H: NDArray[np.float64], rows: slice, first: int, last: int) -> float:
    """The least error that later columns can leave once some columns of some rows are zero."""
    lost = -W[rows, first:last]
    total = 0.0
    for row in lost:
        later = np.linalg.lstsq(H[last:, last:], -H[last:, first:last] @ row, rcond=None)[0]
        change = np.concatenate([np.zeros(first), row, later])
        total += float(change @ H @ change)
    return total


@pytest.mark.parametrize(
    ("shape", "block"), [((6, 16), (2, 4)), ((5, 14), (2, 4)), ((4, 12), (1, 3)), ((6, 12), (6, 12))]
)
def test_the_block_that_goes_first_is_the_one_that_later_columns_make_up_for_best(
    make_levels: Make, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    for seed in range(4):
        W, X = layer(*shape, seed)
        H, exact = damped(X), W.double().numpy()
        starts = list(itertools.product(range(0, shape[0], block[0]), range(0, shape[1], block[1])))
        errors = {
            (top, left): without(exact, H, slice(top, top + block[0]), left, min(left + block[1], shape[1]))
            for top, left in starts
        }
        menu = {"sparsity": 0.5 / len(starts), "block": list(block), "block_size": 1}  # one block
        (level,) = make_levels("sparsegpt", W, {"hessian": X.double().T @ X.double()}, **menu)
        gone = {(int(r) // block[0] * block[0], int(c) // block[1] * block[1]) for r, c in (~kept(level)).nonzero()}
        assert gone == {min(errors, key=errors.__getitem__)}
        E = level.decode().double().numpy() - exact
        assert float(np.einsum("ij,jk,ik->", E, H, E)) == pytest.approx(min(errors.values()), rel=1e-5)


def test_blocks_of_second_order_lose_less_than_those_of_least_size(make_levels: Make) -> None:
    for seed, block in itertools.product(range(3), ([1, 8], [4, 8], [16, 16])):
        W, X = layer(32, 64, seed)
        statistics = {"hessian": X.double().T @ X.double(), "channels": CHANNELS.measure(X)}
        errors = []
        for method in ("sparsegpt", "wanda", "magnitude"):
            (level,) = make_levels(method, W, statistics, sparsity=0.5, block=block)
            assert level.name == f"{method}-50%-{block[0]}x{block[1]}"
            E = level.decode().double() - W.double()
            errors.append(float((E @ X.double().T).square().sum()))
        assert errors[0] < min(errors[1:])


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_runs_of_a_row_and_their_grids_take_the_bits_of_what_is_kept(make_levels: Make, method: str, sym: bool) -> None:
    """GQSA's format: a group is there with its scale, or not at all."""
    W, X = layer(24, 64)
    then = {"bits": 4, "group_size": 16, "sym": sym}
    (level,) = make_levels(method, W, {"hessian": X.double().T @ X.double()}, sparsity=0.5, block=[1, 16], then=then)
    assert level.recipe["encoding"] == "block_grid"
    groups = 24 * 4 // 2
    assert level.tensors["scale"].shape == (groups,)
    assert level.parameters == groups * 16
    index = level.recipe["index"]["bits"]
    assert index <= 24 * 4
    assert level.stored_bits == groups * (16 * 4 + 16 + (0 if sym else 4)) + index
    assert level.encoding.pack(level) is None
    assert level.encoding.label(level.recipe) == "no kernel: blocks of 1x16"


@pytest.mark.parametrize(
    ("bits", "block", "group_size", "packs"),
    [
        (4, (16, 128), 32, True),
        (4, (64, 256), 128, True),
        (2, (16, 256), -1, True),
        (3, (32, 256), 64, True),
        (8, (16, 128), 128, True),
        (4, (24, 128), 32, False),
        (4, (8, 128), 32, False),
        (4, (16, 64), 32, False),
        (2, (16, 128), 32, False),
        (5, (16, 128), 32, False),
        (4, (16, 128), 48, False),
    ],
)
@pytest.mark.parametrize("sym", [True, False])
def test_blocks_of_the_kernels_shape_pack_for_it_and_others_say_why_not(
    make_levels: Make, bits: int, block: tuple[int, int], group_size: int, packs: bool, sym: bool
) -> None:
    weight = torch.randn((70, 600), generator=torch.Generator().manual_seed(bits))
    then = {"bits": bits, "group_size": group_size, "sym": sym}
    (level,) = make_levels("magnitude", weight, sparsity=0.5, block=list(block), then=then)
    packed, label = level.encoding.pack(level), level.encoding.label(level.recipe)
    assert label.startswith("no kernel: ") != packs
    if not packs:
        assert packed is None
        return
    assert isinstance(packed, BlockSparse)
    assert torch.equal(packed.dense(), level.decode())
    assert torch.equal(rebuild(packed.settings, packed.tensors).dense(), level.decode())
    assert label.rpartition("-")[0] == packed.label.rpartition("-")[0]


def test_what_an_earlier_pruning_left_of_blocks_is_stored(make_levels: Make) -> None:
    W, X = layer(16, 32)
    before = torch.rand(16, 32, generator=torch.Generator().manual_seed(6)) > 0.3
    before[:4, :8] = False
    for then in ({}, {"then": {"bits": 8, "group_size": 8}}):
        for method in ("sparsegpt", "magnitude"):
            (level,) = make_levels(
                method,
                W * before,
                {"hessian": X.double().T @ X.double()},
                keep=before,
                sparsity=0.25,
                block=[4, 8],
                **then,
            )
            assert not level.decode()[~before].any()
            assert not kept(level)[:4, :8].any(), "what is gone already goes first"
            assert level.parameters < before.sum()


@pytest.mark.parametrize(
    "menu",
    [
        {"pattern": "2:4", "block": [1, 4]},
        {"pattern": "2:4", "compare": "layer"},
        {"sparsity": 0.5, "block": [1, 4], "compare": "layer"},
        {"sparsity": 0.5, "block": [0, 4]},
        {"sparsity": 0.5, "block": [4]},
        {"sparsity": 0.5, "block": 16},
    ],
)
def test_blocks_that_are_none_are_refused(menu: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Params.model_validate(menu)


def test_blocks_would_reach_over_the_groups_of_a_convolution() -> None:
    unit = Unit("conv", "conv", "convolution", 0, (12, 20), (0,), groups=2)
    assert Params(sparsity=0.5, block=(2, 4)).refuses(unit) is not None
