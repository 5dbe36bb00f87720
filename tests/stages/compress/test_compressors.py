"""What every compressor promises, ours and those of other packages alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import NotFinite, UsageError
from layerwise.stages.compress import compressor_names, find_compressor
from layerwise.stages.levels.database import describe

MENUS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "rtn": [{"bits": [2, 4, 8], "group_size": 8}, {"bits": 3, "group_size": -1, "sym": False}],
    "gptq": [
        {"bits": [2, 4, 8], "group_size": 8},
        {"bits": 3, "group_size": -1, "sym": False, "desc_act": True},
        {"bits": [3, 5], "group_size": 7, "desc_act": True},
        {"bits": [3, 5], "group_size": 7, "desc_act": "static", "sym": False},
    ],
}
each_case = pytest.mark.parametrize(
    ("name", "menu"),
    [pytest.param(name, menu, id=f"{name}-{number}") for name in MENUS for number, menu in enumerate(MENUS[name])],
)


def unit(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (6, 20) and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn((20, 20), generator=generator)
    X = mix @ torch.randn((20, 100), generator=generator)
    return torch.randn((6, 20), generator=generator), X @ X.T


def parsed(name: str, menu: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    compressor = find_compressor(name)
    return compressor.run, compressor.params.model_validate({"method": name, **menu})


def test_every_compressor_of_the_table_is_tried_here() -> None:
    assert set(MENUS) == set(compressor_names())


@each_case
def test_levels_come_in_the_order_of_their_announced_names(name: str, menu: dict[str, Any]) -> None:
    run, params = parsed(name, menu)
    assert [level.name for level in run(*unit(), params)] == params.level_names()


@each_case
def test_neither_weight_nor_hessian_is_changed(name: str, menu: dict[str, Any]) -> None:
    weight, hessian = unit()
    run, params = parsed(name, menu)
    run(weight, hessian, params)
    assert all(torch.equal(a, b) for a, b in zip((weight, hessian), unit(), strict=True))


@each_case
def test_the_same_unit_gives_the_same_levels(name: str, menu: dict[str, Any]) -> None:
    run, params = parsed(name, menu)
    for first, second in zip(run(*unit(), params), run(*unit(), params), strict=True):
        assert first.recipe == second.recipe
        assert first.tensors.keys() == second.tensors.keys()
        assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


@each_case
def test_a_level_says_how_it_was_made_in_json_and_decodes_to_the_shape_of_its_weight(
    name: str, menu: dict[str, Any]
) -> None:
    weight, hessian = unit()
    run, params = parsed(name, menu)
    for level in run(weight, hessian, params):
        assert json.loads(json.dumps(level.recipe, allow_nan=False)) == level.recipe
        assert level.recipe["method"] == name
        assert level.shape == level.decode().shape == weight.shape
        assert level.decode().dtype == torch.float32
        assert level.bits <= level.effective_bits <= 8 * level.size_bytes / weight.numel()


@each_case
def test_what_makes_levels_of_bfloat16_weights_sees_their_values(name: str, menu: dict[str, Any]) -> None:
    weight, hessian = unit()
    run, params = parsed(name, menu)
    for stored, widened in zip(
        run(weight.bfloat16(), hessian, params), run(weight.bfloat16().float(), hessian, params), strict=True
    ):
        assert torch.equal(stored.decode(), widened.decode())


@each_case
def test_weights_in_any_layout_of_memory_give_the_same_levels(name: str, menu: dict[str, Any]) -> None:
    weight, hessian = unit()
    run, params = parsed(name, menu)
    turned = weight.T.contiguous().T
    for plain, strided in zip(run(weight, hessian, params), run(turned, hessian, params), strict=True):
        assert torch.equal(plain.decode(), strided.decode())


@each_case
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(name: str, menu: dict[str, Any], bad: float) -> None:
    weight, hessian = unit()
    weight[2, 3] = bad
    run, params = parsed(name, menu)
    with pytest.raises(NotFinite, match="the weight has 1 NaN or Inf among its 120 values"):
        run(weight, hessian, params)


@each_case
def test_the_error_falls_with_the_bits(name: str, menu: dict[str, Any]) -> None:
    weight, hessian = unit()
    run, params = parsed(name, menu)
    levels = sorted(run(weight, hessian, params), key=lambda level: level.bits)
    errors = [describe(level, weight, hessian)["output_error"] for level in levels]
    assert errors == sorted(errors, reverse=True)


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 'gtpq' \\(did you mean 'gptq'\\?\\)"):
        find_compressor("gtpq")


def test_menus_are_checked_without_loading_torch() -> None:
    modules = ["layerwise.stages.levels.database", *(f"layerwise.stages.compress.{name}" for name in MENUS)]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
