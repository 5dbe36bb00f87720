"""Trellis-coded levels: what feedback gains, what a level is, and what cannot be coded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.kernels.hadamard import rotate_both
from layerwise.kernels.trellis_code import SIGMA
from layerwise.stages.compress import find_compressor, trellis
from layerwise.stages.compress.trellis import Params
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.trellis import tiles_of

Make = Callable[..., list[Level]]


def layer(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight, one in fifty of which stands out, and the Hessian of inputs with strong common directions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 3 * columns
    X = torch.randn((columns, tokens), generator=generator)
    X += 2 * torch.randn((columns, 3), generator=generator) @ torch.randn((3, tokens), generator=generator)
    X *= 0.2 + torch.rand((columns, 1), generator=generator)
    weight = torch.randn((rows, columns), generator=generator) * 0.05
    weight[torch.rand(weight.shape, generator=generator) < 0.02] *= 10
    return weight, X @ X.T


def output_error(level: Level, weight: Tensor, hessian: Tensor) -> float:
    D, W, H = level.decode().double() - weight.double(), weight.double(), hessian.double()
    return (((D @ H) * D).sum() / ((W @ H) * W).sum()).item()


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (40, 100)])
def test_feedback_and_rotation_lower_the_error_of_the_output(make_levels: Make, rows: int, columns: int) -> None:
    weight, hessian = layer(rows, columns)
    menu: dict[str, Any] = {"bits": [2, 3], "state_bits": 10}
    with_feedback = make_levels("trellis", weight, {"hessian": hessian}, **menu)
    nearest = make_levels("trellis_nearest", weight, **menu)
    scalar: dict[str, Any] = {"bits": [2, 3], "group_size": 16}
    published = make_levels("gptq", weight, {"hessian": hessian}, **scalar, desc_act=False, grid="minmax")
    searched = make_levels("gptq", weight, {"hessian": hessian}, **scalar)
    for ours, near, theirs, best in zip(with_feedback, nearest, published, searched, strict=True):
        error = output_error(ours, weight, hessian)
        assert error < 0.3 * output_error(near, weight, hessian)
        assert error < 0.5 * output_error(theirs, weight, hessian)
        assert error < output_error(best, weight, hessian)
        assert ours.effective_bits < theirs.effective_bits - 0.8


def test_the_narrower_a_tile_the_more_is_made_up_for(make_levels: Make) -> None:
    weight, hessian = layer(64, 64)
    errors = [
        output_error(
            make_levels("trellis", weight, {"hessian": hessian}, bits=2, state_bits=10, columns=columns)[0],
            weight,
            hessian,
        )
        for columns in (1, 4, 16)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * errors[-1]


def test_a_level_decodes_to_what_was_encoded_bit_for_bit(make_levels: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes that the feedback saw are those that the stream holds."""
    seen = []

    def refit(W: Tensor, C: Tensor, H: Tensor | None, scale: Tensor) -> Tensor:
        seen.append(C)
        return scale

    monkeypatch.setattr(trellis, "_refit", refit)
    for shape in [(32, 64), (33, 70), (5, 7)]:
        weight, hessian = layer(*shape)
        for level in make_levels("trellis", weight, {"hessian": hessian}, bits=[1, 2.5, 4], state_bits=10):
            assert torch.equal(tiles_of(level).decode(level.tensors["stream"]).double(), seen.pop(0))


@pytest.mark.parametrize("scales", ["weight", "row"])
def test_the_scale_is_the_best_for_its_codes(make_levels: Make, scales: str) -> None:
    weight, hessian = layer(32, 64)
    (level,) = make_levels("trellis", weight, {"hessian": hessian}, bits=2, state_bits=10, scales=scales)
    best = output_error(level, weight, hessian)
    for factor in (0.99, 1.01):
        tensors = {**level.tensors, "scale": level.tensors["scale"] * factor}
        assert output_error(Level(level.name, level.recipe, level.shape, tensors), weight, hessian) > best
    assert level.tensors["scale"].shape == ((1,) if scales == "weight" else (32,))


def test_a_turned_weight_has_no_outliers() -> None:
    weight, _ = layer(64, 64)
    assert (weight.abs().max() / weight.std()).item() > 8
    turned = rotate_both(weight, 0)
    assert (turned.abs().max() / turned.std()).item() < 5


def test_units_that_read_one_input_share_its_rotation(make_levels: Make) -> None:
    q, hessian = layer(32, 64)
    gate, _ = layer(96, 64, seed=1)
    levels = [make_levels("trellis", W, {"hessian": hessian}, bits=2, state_bits=10)[0] for W in (q, gate)]
    assert levels[0].recipe["seed"] == levels[1].recipe["seed"] == 0  # and the width decides the rest


def test_what_was_pruned_costs_nothing_to_keep_so(make_levels: Make) -> None:
    weight, hessian = layer(32, 64)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    menu: dict[str, Any] = {"bits": 2, "state_bits": 10}
    (pruned,) = make_levels("trellis", weight * keep, {"hessian": hessian}, keep=keep, **menu)
    assert not pruned.decode()[~keep].any()
    assert pruned.parameters == int(keep.sum())
    assert pruned.stored_bits == 2 * weight.numel() + weight.numel() + 32
    # With every other weight free, those that are kept have about four bits each; the columns are as uneven as before.
    assert output_error(pruned, weight * keep, hessian) < 0.05


def test_few_tokens_and_tiny_weights_are_no_matter(make_levels: Make) -> None:
    weight, hessian = layer(32, 64, tokens=9)
    (level,) = make_levels("trellis", weight, {"hessian": hessian}, bits=2, state_bits=10)
    assert output_error(level, weight, hessian) < 0.1
    (tiny,) = make_levels("trellis", weight * 1e-12, {"hessian": hessian}, bits=2, state_bits=10)
    assert torch.allclose(tiny.decode() * 1e12, level.decode(), rtol=1e-2, atol=1e-2)
    assert output_error(tiny, weight * 1e-12, hessian) < 0.1


def test_a_hessian_that_cannot_be_used_is_refused(make_levels: Make) -> None:
    weight, hessian = layer(4, 20)
    with pytest.raises(NotFinite, match="no calibration token reached this layer"):
        make_levels("trellis", weight, {"hessian": hessian * 0}, bits=2)
    with pytest.raises(NotFinite, match="not positive definite, whatever the damping"):
        make_levels("trellis", weight, {"hessian": -hessian}, bits=2)
    with pytest.raises(NotFinite, match="too large for a float16 scale"):
        make_levels("trellis", weight * 1e8, {"hessian": hessian}, bits=2, scales="row")


@pytest.mark.parametrize(
    ("menu", "name"),
    [
        ({}, "trellis-2b-L12"),
        ({"bits": 2.5, "state_bits": 16}, "trellis-2.5b-L16"),
        ({"columns": 4, "scales": "row", "seed": 3, "percdamp": 0.05}, "trellis-2b-L12-c4-rows-seed3-damp0.05"),
    ],
)
def test_entries_that_make_different_levels_give_them_different_names(menu: dict[str, Any], name: str) -> None:
    params = Params.model_validate({"method": "trellis", "bits": 2, **menu})
    assert params.level_names() == [name]
    fallback = params.fallback()
    assert fallback.nominal_bits() == params.nominal_bits()


@pytest.mark.parametrize("menu", [{"bits": 2.3}, {"bits": 5}, {"bits": [2, 2]}, {"bits": 2, "state_bits": 9}])
def test_what_the_code_does_not_allow_is_refused(menu: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"multiple of 0.125|less than or equal to 4|twice|greater than or equal to 10"
    ):
        find_compressor("trellis").params.model_validate({"method": "trellis", **menu})


def test_a_value_has_the_spread_of_four_bytes() -> None:
    assert pytest.approx(147.8 / 128, rel=1e-3) == SIGMA  # QTIP's constant
