"""Uniform grids: properties that hold for any weights, and the formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.compress.grid import (
    GridParams,
    check_finite,
    dequantize,
    fit,
    quantize,
)
from layerwise.stages.levels.grid import grid_level
from layerwise.stages.levels.scales import SMALLEST_SCALE

magnitudes = st.sampled_from([1e-9, 1e-6, 1e-4, 0.02, 1.0, 300.0, 3e4])
groups_of_weights = st.builds(
    lambda values, magnitude, shift: torch.tensor(values, dtype=torch.float64) * magnitude + shift * magnitude,
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40),
    magnitudes,
    st.sampled_from([-1.5, 0.0, 1.5]),
)
widths = st.integers(2, 8)


def fitted(w: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    return fit(w.amin(), w.amax(), 2**bits - 1, sym)


@given(groups_of_weights, widths, st.booleans())
def test_rounding_is_off_by_half_a_step_at_most_and_beyond_the_ends_gives_the_end(
    w: Tensor, bits: int, sym: bool
) -> None:
    scale, zero = fitted(w, bits, sym)
    max_code = 2**bits - 1
    lowest, highest = (dequantize(torch.tensor(float(code)), scale, zero) for code in (0, max_code))
    rounded = dequantize(quantize(w, scale, zero, max_code), scale, zero)
    nearest = w.clamp(lowest, highest)
    # Half a step, and the rounding of w / scale in float64.
    assert ((rounded - nearest).abs() <= scale / 2 * (1 + 1e-9)).all()


@given(groups_of_weights, widths, st.booleans())
def test_a_grid_covers_its_weights_but_for_the_rounding_of_scale_and_zero(w: Tensor, bits: int, sym: bool) -> None:
    scale, zero = fitted(w, bits, sym)
    lowest, highest = (dequantize(torch.tensor(float(code)), scale, zero) for code in (0, 2**bits - 1))
    # A symmetric grid ends half a step short of the greatest weight, an asymmetric one is shifted by half a step at
    # most; float16 rounds the scale by 2⁻¹¹ of itself or half a subnormal, once for each of the 2^b steps.
    slack = scale / 2 + 2**bits * torch.clamp(scale * 2**-11, min=2.0**-25)
    assert (w >= lowest - slack).all()
    assert (w <= highest + slack).all()


@given(groups_of_weights, widths, st.booleans())
def test_scale_and_zero_are_what_will_be_stored(w: Tensor, bits: int, sym: bool) -> None:
    scale, zero = fitted(w, bits, sym)
    assert scale.half().double() == scale > 0
    assert zero == zero.round()
    assert 0 <= zero <= 2**bits - 1
    assert dequantize(zero, scale, zero) == 0


@given(groups_of_weights, widths, st.booleans())
def test_points_of_a_grid_stay_where_they_are(w: Tensor, bits: int, sym: bool) -> None:
    scale, zero = fitted(w, bits, sym)
    codes = torch.arange(2**bits, dtype=torch.float64)
    assert torch.equal(quantize(dequantize(codes, scale, zero), scale, zero, 2**bits - 1), codes)


@given(st.floats(1e-12, 7e4), st.booleans())
def test_the_scale_is_the_nearest_float16(exact: float, near_a_tie: bool) -> None:
    with np.errstate(over="ignore"):
        if near_a_tie:  # so near that float32 would call it one
            below = np.float64(np.float16(min(exact, 6e4)))
            exact = float((below + np.float64(np.nextafter(np.float16(below), np.float16(np.inf)))) / 2 * (1 + 1e-12))
        expected = max(float(np.float64(exact).astype(np.float16)), SMALLEST_SCALE)
    found, _ = fit(torch.tensor(-exact, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64), 2, sym=True)
    assert float(found) == expected


def test_the_formulas_are_those_of_the_format() -> None:
    low, high = torch.tensor(-0.75), torch.tensor(1.5)
    scale, zero = fit(low, high, 15, sym=True)
    assert (float(scale), float(zero)) == (float(torch.tensor(1.5 / 7.5).half()), 8)
    scale, zero = fit(low, high, 15, sym=False)
    assert (float(scale), float(zero)) == (float(torch.tensor(2.25 / 15).half()), 5)


def test_an_asymmetric_range_always_contains_zero() -> None:
    scale, zero = fit(torch.tensor([3.0, -9.0]), torch.tensor([9.0, -3.0]), 3, sym=False)
    assert scale.tolist() == [3.0, 3.0]
    assert zero.tolist() == [0.0, 3.0]


def test_several_bit_widths_at_once_are_as_one_by_one() -> None:
    w = torch.randn((5, 30), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    max_code = torch.tensor([[3.0], [7.0], [255.0]], dtype=torch.float64)
    for sym in (True, False):
        together = fit(w.amin(1), w.amax(1), max_code, sym)
        for row, bits in enumerate((2, 3, 8)):
            alone = fit(w.amin(1), w.amax(1), 2**bits - 1, sym)
            assert all(torch.equal(a[row], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-12])
def test_a_group_too_small_for_float16_becomes_zeros(value: float, sym: bool) -> None:
    w = torch.full((7,), value, dtype=torch.float64)
    scale, zero = fitted(w, 8, sym)
    assert float(scale) == SMALLEST_SCALE
    assert not dequantize(quantize(w, scale, zero, 255), scale, zero).any()


def test_a_scale_too_large_for_float16_is_refused() -> None:
    w = torch.tensor([[1e6, 1.0]])
    scale, zero = fit(w.amin(1, keepdim=True), w.amax(1, keepdim=True), 3, sym=True)
    recipe = {"method": "rtn", "bits": 2, "group_size": -1, "sym": True}
    with pytest.raises(NotFinite, match="level big: a group's weights are too large for a float16 scale"):
        grid_level("big", recipe, torch.zeros((1, 2)), scale=scale, zero=zero)


def test_what_is_not_finite_is_counted() -> None:
    check_finite("weight", torch.zeros(3))
    with pytest.raises(NotFinite, match="the weight has 2 NaN or Inf among its 3 values"):
        check_finite("weight", torch.tensor([torch.inf, 0.0, torch.nan]))


@pytest.mark.parametrize(
    ("menu", "names"),
    [
        ({"bits": 3}, ["any-3b-g128"]),
        ({"bits": [2, 8], "group_size": 32}, ["any-2b-g32", "any-8b-g32"]),
        ({"wbits": [4], "group_size": -1, "symmetric": False}, ["any-4b-row-asym"]),
        ({"num_bits": 4, "sym": False}, ["any-4b-g128-asym"]),
    ],
)
def test_a_menu_may_use_the_names_of_other_tools(menu: dict[str, object], names: list[str]) -> None:
    assert GridParams.model_validate({"method": "any", **menu}).level_names() == names


@pytest.mark.parametrize(
    ("menu", "place"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": [3, 9]}, "bits"),
        ({"bits": []}, "bits"),
        ({"bits": [3, 3]}, "bits"),
        ({}, "bits"),
        ({"bits": "three"}, "bits"),
        ({"bits": 3, "group_size": 0}, "group_size"),
        ({"bits": 3, "group_size": -2}, "group_size"),
        ({"bits": 3, "group": 128}, "group"),
    ],
)
def test_a_mistake_in_a_menu_is_placed(menu: dict[str, object], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GridParams.model_validate({"method": "any", **menu})
    assert {error["loc"][0] for error in caught.value.errors()} == {place}
