"""Block-sparse packing against the quantized weight with its blocks set to zero by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.packed import rebuild

layouts = st.sampled_from(
    [
        {"bits": 4, "group_size": 128, "block": (64, 256)},
        {"bits": 4, "group_size": 32, "block": (16, 128)},
        {"bits": 2, "group_size": 64, "block": (32, 256)},
        {"bits": 3, "group_size": 128, "block": (128, 256)},
        {"bits": 8, "group_size": -1, "block": (64, 128)},
    ]
)
shapes = st.tuples(st.integers(1, 200), st.integers(1, 700))


def parts(shape: tuple[int, int], layout: dict[str, Any], sym: bool, density: float, seed: int) -> dict[str, Any]:
    """Random codes, scales and zero points, and which blocks are kept."""
    (n, k), (rows, columns), generator = shape, layout["block"], torch.Generator().manual_seed(seed)
    groups = 1 if layout["group_size"] == -1 else -(-k // layout["group_size"])
    top = 2 ** layout["bits"]
    return {
        "codes": torch.randint(0, top, shape, generator=generator, dtype=torch.uint8),
        "scale": torch.rand(n, groups, generator=generator).half(),
        "zero": None if sym else torch.randint(0, top, (n, groups), generator=generator, dtype=torch.uint8),
        "keep": torch.rand(-(-n // rows), -(-k // columns), generator=generator) < density,
    }


def dense(given_parts: dict[str, Any], layout: dict[str, Any]) -> Tensor:
    """The weight element by element: (code - zero) · scale, and 0 where its block is not kept."""
    codes, scale, zero, keep = (given_parts[name] for name in ("codes", "scale", "zero", "keep"))
    (n, k), (rows, columns) = codes.shape, layout["block"]
    group = torch.arange(k) // (k if layout["group_size"] == -1 else layout["group_size"])
    zeros = torch.full((n, k), 2 ** (layout["bits"] - 1)) if zero is None else zero[:, group]
    kept = keep[torch.arange(n)[:, None] // rows, torch.arange(k)[None, :] // columns]
    return torch.where(kept, (codes.float() - zeros.float()) * scale[:, group].float(), torch.tensor(0.0))


@settings(deadline=None, max_examples=40)
@given(shapes, layouts, st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**31 - 1))
def test_the_weight_comes_back_with_its_blocks_zero(
    shape: tuple[int, int], layout: dict[str, Any], sym: bool, density: float, seed: int
) -> None:
    made = parts(shape, layout, sym, density, seed)
    packed = BlockSparse.pack(**made, **layout)
    assert torch.equal(packed.dense(), dense(made, layout))
    again = rebuild(packed.settings, packed.tensors)
    assert again.settings == packed.settings
    assert torch.equal(again.dense(), dense(made, layout))


@settings(deadline=None, max_examples=40)
@given(shapes, layouts, st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**31 - 1))
def test_its_size_goes_with_the_kept_blocks(
    shape: tuple[int, int], layout: dict[str, Any], sym: bool, density: float, seed: int
) -> None:
    made = parts(shape, layout, sym, density, seed)
    rows, columns = layout["block"]
    kept, tiles = int(made["keep"].sum()), made["keep"].shape[0]
    groups = 1 if layout["group_size"] == -1 else columns // layout["group_size"]
    block_bytes = rows * (columns * layout["bits"] // 8 + groups * (2 if sym else 3))
    assert BlockSparse.pack(**made, **layout).size_bytes == max(kept, 1) * block_bytes + 4 * (kept + 1 + tiles + 1)


def test_the_label_says_how_many_blocks_are_zero() -> None:
    layout = {"bits": 4, "group_size": 128, "block": (64, 256)}
    made = parts((128, 512), layout, True, 0.0, seed=0)
    made["keep"][0, 1] = True
    assert BlockSparse.pack(**made, **layout).label == "int4-g128-sym-blocks75%"


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"bits": 4, "group_size": 128, "block": (48, 256)}, "a power of two from 16 is needed"),
        ({"bits": 4, "group_size": 128, "block": (64, 192)}, "blocks of 192 columns do not fit 4-bit words"),
        ({"bits": 2, "group_size": 64, "block": (64, 128)}, "which hold 256 columns together"),
        ({"bits": 4, "group_size": 256, "block": (64, 128)}, "cut through groups of 256"),
        ({"bits": 5, "group_size": 128, "block": (64, 128)}, "5-bit codes have no planar layout"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(layout: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BlockSparse.pack(**parts((64, 256), layout, True, 1.0, seed=0), **layout)


def test_a_mask_of_another_shape_is_refused() -> None:
    layout = {"bits": 4, "group_size": 128, "block": (64, 256)}
    made = parts((128, 512), layout, True, 1.0, seed=0) | {"keep": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(UsageError, match="has 2 x 2 blocks; keep is 2 x 3"):
        BlockSparse.pack(**made, **layout)
