"""Packed for a kernel, a level means what it decodes to, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerwise.kernels.dense import Dense
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import rebuild
from layerwise.kernels.packing import pack
from layerwise.kernels.unstructured import Unstructured
from layerwise.stages.apply.packed import pack_or_dense
from layerwise.stages.levels.dense import dense_level
from layerwise.stages.levels.grid import KERNEL_BITS
from layerwise.stages.levels.level import Level, find_encoding
from layerwise.stages.levels.mask import mask_level

SHAPES = [(24, 64), (7, 40), (16, 33), (5, 300)]
"""Even, with a ragged last group, and odd."""


def random_weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 0.1


def hessian(columns: int) -> torch.Tensor:
    inputs = torch.randn((2 * columns, columns), generator=torch.Generator().manual_seed(columns))
    inputs *= torch.linspace(0.2, 3, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    return inputs.T @ inputs


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 2, 16, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_grid_is_the_decoded_level_bit_for_bit(
    make_levels: Callable[..., list[Level]], shape: tuple[int, int], group_size: int, sym: bool
) -> None:
    for level in make_levels("rtn", random_weight(shape), bits=KERNEL_BITS, group_size=group_size, sym=sym):
        packed = level.encoding.pack(level)
        assert packed is not None
        assert packed.shape == shape
        assert torch.equal(packed.dense(), level.decode())
        assert torch.equal(rebuild(packed.settings, packed.tensors).dense(), level.decode())


@pytest.mark.parametrize(("group_size", "columns"), itertools.product([16, 32], [64, 40, 75]))
@pytest.mark.parametrize("sym", [True, False])
def test_groups_formed_in_the_order_of_activations_are_packed_with_their_order(
    make_levels: Callable[..., list[Level]], group_size: int, columns: int, sym: bool
) -> None:
    menu = {"bits": KERNEL_BITS, "group_size": group_size, "desc_act": True, "sym": sym}
    for level in make_levels("gptq", random_weight((12, columns)), {"hessian": hessian(columns)}, **menu):
        assert "g_idx" in level.tensors
        packed = level.encoding.pack(level)
        assert packed is not None
        assert "ordered" in packed.label
        assert torch.equal(packed.dense(), level.decode())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dense_level_is_packed_as_it_is(dtype: torch.dtype) -> None:
    level = dense_level(random_weight((6, 10)).to(dtype))
    packed = level.encoding.pack(level)
    assert isinstance(packed, Dense)
    assert packed.size_bytes == level.size_bytes
    assert torch.equal(packed.dense(), level.decode())


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_a_width_without_a_kernel_runs_as_its_dense_weight(make_levels: Callable[..., list[Level]], bits: int) -> None:
    (level,) = make_levels("rtn", random_weight((6, 40)), bits=bits, group_size=16)
    assert level.encoding.pack(level) is None
    packed = pack_or_dense(level)
    assert packed.label == "dense"
    assert torch.equal(packed.dense(), level.decode())


def test_groups_of_unequal_sizes_have_no_kernel() -> None:
    codes = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(0))
    uneven = torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32)
    tensors = {"codes": pack(codes, 4), "scale": torch.ones((4, 2)).half(), "g_idx": uneven}
    recipe = {"encoding": "grid", "method": "any", "bits": 4, "group_size": 3, "sym": True}
    level = Level("odd", recipe, (4, 6), tensors)
    assert level.encoding.pack(level) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_packed_mask_is_the_decoded_level_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, share: float
) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    level = mask_level("m", {"method": "any", "sparsity": 1 - share}, random_weight(shape).to(dtype), keep)
    packed = level.encoding.pack(level)
    assert packed is not None
    assert torch.equal(packed.dense(), level.decode())
    assert torch.equal(rebuild(packed.settings, packed.tensors).dense(), level.decode())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3", "8:16", "16:32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pattern_is_packed_for_its_kernel_where_there_is_one(
    make_levels: Callable[..., list[Level]], shape: tuple[int, int], pattern: str, dtype: torch.dtype
) -> None:
    """For N:M kernels with values of 16 bits and groups of 16 at most; others as single weights."""
    (level,) = make_levels("magnitude", random_weight(shape).to(dtype), pattern=pattern)
    packed = level.encoding.pack(level)
    taken = dtype != torch.float32 and pattern != "16:32"
    assert isinstance(packed, NMSparse if taken else Unstructured)
    assert torch.equal(packed.dense(), level.decode())
    assert torch.equal(rebuild(packed.settings, packed.tensors).dense(), level.decode())
    assert (level.encoding.label(level.recipe) == packed.label) or not taken


def test_what_no_kernel_takes_runs_as_its_dense_weight(make_levels: Callable[..., list[Level]]) -> None:
    weight = random_weight((6, 40))
    keep = weight > 0
    (level,) = make_levels("rtn", weight, keep=keep, bits=4, group_size=16)
    double = mask_level(
        "m", {"method": "any", "sparsity": 0.5}, weight.double(), keep
    )  # a kernel holds 32 bits at most
    for one in (level, double):
        assert one.encoding.pack(one) is None
        assert torch.equal(pack_or_dense(one).dense(), one.decode())


# --- what is timed once ---


def entries() -> list[dict[str, Any]]:
    """Every pair of bits, group and symmetry, by two methods, and one with an order."""
    grids = itertools.product(KERNEL_BITS, [-1, 32, 128], [True, False], ["rtn", "gptq"])
    plain = [{"encoding": "grid", "bits": b, "group_size": g, "sym": s, "method": m} for b, g, s, m in grids]
    return [*plain, *(entry | {"desc_act": True} for entry in plain if entry["method"] == "gptq")]


def test_levels_of_one_kind_and_shape_have_one_label(make_levels: Callable[..., list[Level]]) -> None:
    labels: dict[str, set[str]] = {}
    weight, H = random_weight((4, 256)), hessian(256)
    for entry in entries():
        arguments = {"bits": [entry["bits"]], "group_size": entry["group_size"], "sym": entry["sym"]}
        if entry["method"] == "rtn":
            (level,) = make_levels("rtn", weight, **arguments)
        else:
            (level,) = make_levels("gptq", weight, {"hessian": H}, **arguments, desc_act=entry.get("desc_act", False))
        assert level.encoding.label(level.recipe) == find_encoding("grid").label(entry)
        packed = level.encoding.pack(level)
        assert packed is not None
        labels.setdefault(level.encoding.label(entry), set()).add(packed.label)
    assert all(len(found) == 1 for found in labels.values())
    assert len(labels) == len({label for found in labels.values() for label in found}) == 4 * 2 * (3 + 2)


def test_widths_without_a_kernel_are_kinds_of_their_own() -> None:
    label = find_encoding("grid").label
    six = {"encoding": "grid", "bits": 6, "group_size": 32, "sym": True}
    assert label(six) == label({**six, "group_size": 64}) != label({**six, "bits": 5})
    recipe = {**six, "sparsity": 0.5, "dtype": "float16"}
    labels = {find_encoding(name).label(recipe) for name in ("dense", "mask", "masked_grid", "drop")}
    assert len(labels) == 4
