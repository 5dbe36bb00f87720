"""Rounding to nearest, against a search over every code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.stages.compress.rtn import Params, rtn
from layerwise.stages.levels.level import grid_columns


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(48, 16), (45, 16), (30, -1), (30, 128), (5, 1)])
def test_every_weight_gets_the_nearest_point_of_its_groups_grid(columns: int, group_size: int, sym: bool) -> None:
    weight = random_weight(4, columns)
    for level in rtn(weight, None, Params(bits=(2, 3, 5), group_size=group_size, sym=sym)):
        codes, scale, zero, group = grid_columns(level)
        bits = level.recipe["bits"]
        zero = torch.full(scale.shape, 2.0 ** (bits - 1)) if zero is None else zero.float()
        points = (torch.arange(2**bits) - zero[:, group, None]) * scale.float()[:, group, None]
        distance = (points - weight[..., None]).abs()
        error = (level.decode() - weight).abs()
        assert torch.equal(error, distance.amin(2))
        assert torch.equal(points.gather(2, codes[..., None].long())[..., 0], level.decode())


@pytest.mark.parametrize("sym", [True, False])
def test_the_last_group_may_be_shorter(sym: bool) -> None:
    weight = random_weight(3, 21)
    params = Params(bits=(4,), group_size=8, sym=sym)
    (level,) = rtn(weight, None, params)
    parts = [rtn(part.contiguous(), None, params)[0].decode() for part in weight.split(8, dim=1)]
    assert level.tensors["scale"].shape == (3, 3)
    assert torch.equal(level.decode(), torch.cat(parts, dim=1))


def test_more_bits_never_raise_the_error() -> None:
    weight = random_weight(16, 64)
    levels = rtn(weight, None, Params(bits=(2, 3, 4, 5, 6, 7, 8), group_size=32))
    errors = [float((level.decode() - weight).square().sum()) for level in levels]
    assert errors == sorted(errors, reverse=True)
