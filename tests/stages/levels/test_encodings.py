"""Every encoding of the table keeps what `layerwise.testing` says that encodings promise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from layerwise.stages.levels.dense import dense_level
from layerwise.stages.levels.grid import grid_level
from layerwise.stages.levels.level import ENCODINGS, Level
from layerwise.stages.levels.mask import mask_level
from layerwise.stages.levels.masked_grid import masked_grid_level
from layerwise.stages.levels.parent import parent_level
from layerwise.testing import Promise, encoding_promises

ROWS, COLUMNS = 5, 21  # odd, so that words and bytes are padded


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(0)).to(dtype)


def grids() -> Iterator[tuple[str, dict[str, object], Tensor, dict[str, Tensor | None]]]:
    """Every width and group size, symmetric or not, in order or not."""
    generator = torch.Generator().manual_seed(1)
    for bits in range(2, 9):
        for size, sym, ordered in [(-1, True, True), (8, False, True), (7, True, False), (7, False, False)]:
            groups = 1 if size == -1 else -(-COLUMNS // size)
            codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
            scale = torch.rand((ROWS, groups), generator=generator) + 0.5
            zero = torch.randint(0, 2**bits, (ROWS, groups), generator=generator).float()
            order = torch.randperm(COLUMNS, generator=generator)
            group = None if ordered else (torch.arange(COLUMNS) // size)[order]
            recipe = {"method": "made up", "bits": bits, "group_size": size, "sym": sym, "desc_act": not ordered}
            yield f"{bits}b-{size}-{sym}-{ordered}", recipe, codes, {"scale": scale, "zero": zero, "group": group}


def levels() -> dict[str, list[Level]]:
    keep = weight() > 0.3
    found: dict[str, list[Level]] = {name: [] for name in ENCODINGS}
    for name, recipe, codes, parts in grids():
        found["grid"].append(grid_level(name, dict(recipe), codes, **parts))  # type: ignore[arg-type]
        found["masked_grid"].append(masked_grid_level(name, dict(recipe), codes, keep=keep, **parts))  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found["dense"].append(dense_level(weight(dtype)))
        for mask in (keep, torch.zeros_like(keep), torch.ones_like(keep)):
            share = 1 - mask.float().mean().item()
            found["mask"].append(
                mask_level(f"{dtype}-{share:.2f}", {"method": "made up", "sparsity": share}, weight(dtype), mask)
            )
    return found | {name: [parent_level(name)] for name in ("keep", "drop")}


def test_every_encoding_of_the_table_is_tried_here() -> None:
    assert all(levels().values())


@pytest.mark.parametrize(
    "promise", [promise for name, some in levels().items() for promise in encoding_promises(name, some)], ids=str
)
def test_an_encoding_keeps_its_promises(promise: Promise) -> None:
    promise()
