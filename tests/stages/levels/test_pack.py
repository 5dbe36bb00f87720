"""Packed for a kernel, a level means what it decodes to, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from layerwise.kernels.dense import Dense
from layerwise.kernels.packed import rebuild
from layerwise.kernels.packing import pack
from layerwise.stages.compress.dense import Params as DenseParams
from layerwise.stages.compress.dense import dense
from layerwise.stages.compress.gptq import Params as GptqParams
from layerwise.stages.compress.gptq import gptq
from layerwise.stages.compress.rtn import Params as RtnParams
from layerwise.stages.compress.rtn import rtn
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.pack import KERNEL_BITS, kind, pack_level, pack_or_dense

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
def test_a_packed_grid_is_the_decoded_level_bit_for_bit(shape: tuple[int, int], group_size: int, sym: bool) -> None:
    params = RtnParams(bits=KERNEL_BITS, group_size=group_size, sym=sym)
    for level in rtn(random_weight(shape), None, params):
        packed = pack_level(level)
        assert packed is not None
        assert packed.shape == shape
        assert torch.equal(packed.dense(), level.decode())
        assert torch.equal(rebuild(packed.settings, packed.tensors).dense(), level.decode())


@pytest.mark.parametrize(("group_size", "columns"), itertools.product([16, 32], [64, 40, 75]))
@pytest.mark.parametrize("sym", [True, False])
def test_groups_formed_in_the_order_of_activations_are_packed_with_their_order(
    group_size: int, columns: int, sym: bool
) -> None:
    params = GptqParams(bits=KERNEL_BITS, group_size=group_size, desc_act=True, sym=sym)
    for level in gptq(random_weight((12, columns)), hessian(columns), params):
        assert "g_idx" in level.tensors
        packed = pack_level(level)
        assert packed is not None
        assert "ordered" in packed.label
        assert torch.equal(packed.dense(), level.decode())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dense_level_is_packed_as_it_is(dtype: torch.dtype) -> None:
    (level,) = dense(random_weight((6, 10)).to(dtype), None, DenseParams())
    packed = pack_level(level)
    assert isinstance(packed, Dense)
    assert packed.size_bytes == level.size_bytes
    assert torch.equal(packed.dense(), level.decode())


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_a_width_without_a_kernel_runs_as_its_dense_weight(bits: int) -> None:
    (level,) = rtn(random_weight((6, 40)), None, RtnParams(bits=[bits], group_size=16))
    assert pack_level(level) is None
    packed = pack_or_dense(level)
    assert packed.label == "dense"
    assert torch.equal(packed.dense(), level.decode())


def test_groups_of_unequal_sizes_have_no_kernel() -> None:
    codes = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(0))
    uneven = torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32)
    tensors = {"codes": pack(codes, 4), "scale": torch.ones((4, 2)).half(), "g_idx": uneven}
    recipe = {"encoding": "grid", "method": "any", "bits": 4, "group_size": 3, "sym": True}
    assert pack_level(Level("odd", recipe, (4, 6), tensors)) is None


def test_an_encoding_that_nobody_packs_has_no_kernel() -> None:
    assert pack_level(Level("new", {"encoding": "trellis"}, (1, 1), {})) is None


# --- what is timed once ---


def entries() -> list[dict[str, Any]]:
    """Every pair of bits, group and symmetry, by two methods, and one with an order."""
    grids = itertools.product(KERNEL_BITS, [-1, 32, 128], [True, False], ["rtn", "gptq"])
    plain = [{"encoding": "grid", "bits": b, "group_size": g, "sym": s, "method": m} for b, g, s, m in grids]
    return [*plain, *(entry | {"desc_act": True} for entry in plain if entry["method"] == "gptq")]


def test_levels_of_one_kind_and_shape_have_one_label() -> None:
    labels: dict[str, set[str]] = {}
    weight, H = random_weight((4, 256)), hessian(256)
    for entry in entries():
        arguments = {"bits": [entry["bits"]], "group_size": entry["group_size"], "sym": entry["sym"]}
        if entry["method"] == "rtn":
            (level,) = rtn(weight, None, RtnParams(**arguments))
        else:
            (level,) = gptq(weight, H, GptqParams(**arguments, desc_act=entry.get("desc_act", False)))
        assert kind(level.recipe) == kind(entry)
        packed = pack_level(level)
        assert packed is not None
        labels.setdefault(kind(entry), set()).add(packed.label)
    assert all(len(found) == 1 for found in labels.values())
    assert len(labels) == len({label for found in labels.values() for label in found}) == 4 * 2 * (3 + 2)


def test_widths_without_a_kernel_and_unknown_encodings_are_kinds_of_their_own() -> None:
    six = {"encoding": "grid", "bits": 6, "group_size": 32, "sym": True}
    assert kind(six) == kind({**six, "group_size": 64}) != kind({**six, "bits": 5})
    assert kind({"encoding": "dense"}) == "dense"
    new = {"encoding": "trellis", "rate": 2}
    assert kind(new) == kind(dict(reversed(new.items()))) != kind({**new, "rate": 3})
