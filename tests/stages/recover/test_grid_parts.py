"""What training a grid moves: what runs in the loop is what is written, of every encoding with grids of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept
from layerwise.stages.recover.grid_parts import GridParts, as_stored
from layerwise.stages.recover.qat import Codes
from layerwise.stages.recover.qat import Params as QatParams
from layerwise.stages.recover.step_size import Params, Steps

MENUS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"bits": 3, "group_size": 8, "sym": False}),
    ("magnitude", {"sparsity": 0.5, "then": {"bits": 3, "group_size": 8, "sym": False}}),
    ("magnitude", {"pattern": "2:4", "then": {"bits": 4, "group_size": 8}}),
    ("magnitude", {"sparsity": 0.5, "block": [1, 8], "then": {"bits": 3, "group_size": 8, "sym": False}}),
    ("magnitude", {"sparsity": 0.4, "block": [4, 6], "then": {"bits": 2, "group_size": 8}}),
]


@pytest.mark.parametrize(("method", "menu"), MENUS)
@pytest.mark.parametrize("train", ["step_size", "qat"])
def test_what_is_trained_is_what_is_written(
    make_levels: Callable[..., list[Level]], method: str, menu: dict[str, Any], train: str
) -> None:
    weight = torch.randn((12, 44), generator=torch.Generator().manual_seed(0))
    (level,) = make_levels(method, weight, **menu)
    part = Steps("unit", level, Params()) if train == "step_size" else Codes("unit", level, weight, QatParams())
    torch.testing.assert_close(part.tensors()["unit"], level.decode(), rtol=1e-6, atol=1e-7)
    generator = torch.Generator().manual_seed(1)
    for leaf in part.free.values():
        leaf.add_(0.2 * torch.randn(leaf.shape, generator=generator))
    made = part.levels()["unit"]
    torch.testing.assert_close(made.decode(), part.tensors()["unit"].detach(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(made.decode(), level.decode())
    assert made.size_bytes == level.size_bytes
    if "mask" in level.tensors:
        assert torch.equal(kept(made), kept(level))


@pytest.mark.parametrize(("method", "menu"), MENUS)
def test_parts_that_are_not_moved_are_stored_as_they_were(
    make_levels: Callable[..., list[Level]], method: str, menu: dict[str, Any]
) -> None:
    weight = torch.randn((12, 44), generator=torch.Generator().manual_seed(2))
    (level,) = make_levels(method, weight, **menu)
    parts = GridParts.of(level)
    stored = as_stored(level, parts.key, parts.scale, parts.zero if "zero" in level.tensors else None)
    for key, tensor in stored.items():
        assert torch.equal(tensor, level.tensors[key]), key
