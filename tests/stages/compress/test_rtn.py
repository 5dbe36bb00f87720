"""Rounding to nearest, against a search over every code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layerwise.stages.levels.grid import grid_columns
from layerwise.stages.levels.level import Level


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(48, 16), (45, 16), (30, -1), (30, 128), (5, 1)])
def test_every_weight_gets_the_nearest_point_of_its_groups_grid(
    make_levels: Callable[..., list[Level]], columns: int, group_size: int, sym: bool
) -> None:
    weight = random_weight(4, columns)
    for level in make_levels("rtn", weight, bits=(2, 3, 5), group_size=group_size, sym=sym):
        codes, scale, zero, group = grid_columns(level)
        bits = level.recipe["bits"]
        zero = torch.full(scale.shape, 2.0 ** (bits - 1)) if zero is None else zero.float()
        points = (torch.arange(2**bits) - zero[:, group, None]) * scale.float()[:, group, None]
        distance = (points - weight[..., None]).abs()
        error = (level.decode() - weight).abs()
        assert torch.equal(error, distance.amin(2))
        assert torch.equal(points.gather(2, codes[..., None].long())[..., 0], level.decode())


@pytest.mark.parametrize("sym", [True, False])
def test_the_last_group_may_be_shorter(make_levels: Callable[..., list[Level]], sym: bool) -> None:
    weight = random_weight(3, 21)
    menu = {"bits": (4,), "group_size": 8, "sym": sym}
    (level,) = make_levels("rtn", weight, **menu)
    parts = [make_levels("rtn", part.contiguous(), **menu)[0].decode() for part in weight.split(8, dim=1)]
    assert level.tensors["scale"].shape == (3, 3)
    assert torch.equal(level.decode(), torch.cat(parts, dim=1))


def test_more_bits_never_raise_the_error(make_levels: Callable[..., list[Level]]) -> None:
    weight = random_weight(16, 64)
    levels = make_levels("rtn", weight, bits=(2, 3, 4, 5, 6, 7, 8), group_size=32)
    errors = [float((level.decode() - weight).square().sum()) for level in levels]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("sym", [True, False])
def test_what_was_pruned_stays_pruned_and_the_rest_is_rounded_as_without_it(
    make_levels: Callable[..., list[Level]], sym: bool
) -> None:
    weight = random_weight(6, 45)
    keep = weight.abs() > 0.7
    menu = {"bits": (2, 3, 8), "group_size": 16, "sym": sym}
    plain = make_levels("rtn", weight * keep, **menu)
    for level, dense in zip(make_levels("rtn", weight * keep, keep=keep, **menu), plain, strict=True):
        assert torch.equal(level.decode(), dense.decode() * keep)
        assert level.recipe["encoding"] == "masked_grid"
        assert (level.name, level.parameters) == (dense.name, int(keep.sum()))
