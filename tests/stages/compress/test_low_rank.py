"""Low rank: the optimum in closed form, and ranks that fit each weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from layerwise.errors import NotFinite, UsageError
from layerwise.stages.compress import Task, find_compressor, gptq
from layerwise.stages.levels.adapted import below
from layerwise.testing.statistics import example_unit

ROWS, COLUMNS = 24, 40


@pytest.fixture(scope="module")
def layer() -> tuple[NDArray[Any], NDArray[Any]]:
    """A weight (out, in), and inputs (tokens, in) of which few directions carry most."""
    rng = np.random.default_rng(3)
    spread = np.diag(np.geomspace(30, 0.1, COLUMNS)) @ np.linalg.qr(rng.normal(size=(COLUMNS, COLUMNS)))[0]
    return rng.normal(size=(ROWS, COLUMNS)), rng.normal(size=(400, COLUMNS)) @ spread


def made(layer: tuple[NDArray[Any], NDArray[Any]], method: str, **menu: Any) -> list[Any]:
    weight, inputs = (torch.from_numpy(part) for part in layer)
    unit = example_unit(*weight.shape)
    task = Task({unit.name: weight}, lambda *_: inputs.T @ inputs, {unit.name: unit})
    compressor = find_compressor(method)
    return compressor.run(task, compressor.params.model_validate({"method": method, **menu}))[unit.name]


def output_error(layer: tuple[NDArray[Any], NDArray[Any]], approximation: NDArray[Any]) -> float:
    weight, inputs = layer
    return float(np.square(inputs @ (weight - approximation).T).sum())


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_no_product_of_that_rank_has_outputs_nearer_to_the_layers(
    layer: tuple[NDArray[Any], NDArray[Any]], rank: int
) -> None:
    weight, inputs = layer
    (level,) = made(layer, "low_rank", ranks=rank, dtype="float32", damp_percent=0)
    U, sigma, Vt = np.linalg.svd(inputs @ weight.T, full_matrices=False)  # Eckart and Young, of the outputs themselves
    least = float(np.square(sigma[rank:]).sum())
    assert np.linalg.matrix_rank(level.decode().numpy(), tol=1e-3) == rank
    assert output_error(layer, level.decode().numpy()) == pytest.approx(least, rel=1e-4)
    assert level.recipe["energy"] == pytest.approx(1 - least / float(np.square(sigma).sum()), abs=1e-9)
    U, values, Vt = np.linalg.svd(weight, full_matrices=False)
    plain = output_error(layer, (U[:, :rank] * values[:rank]) @ Vt[:rank])
    assert plain > 1.2 * least, "plain SVD does not know that few directions carry most"


def test_ranks_follow_the_share_of_parameters_and_the_tail_of_the_singular_values(
    layer: tuple[NDArray[Any], NDArray[Any]],
) -> None:
    weight, inputs = layer
    levels = made(layer, "low_rank", parameters=[0.25, 0.5], energy=[0.5, 0.9, 0.999999], damp_percent=0)
    for level, share in zip(levels, [0.25, 0.5], strict=False):
        assert level.parameters == level.recipe["rank"] * (ROWS + COLUMNS)
        assert level.parameters <= share * weight.size < level.parameters + ROWS + COLUMNS
    squares = np.square(np.linalg.svd(inputs @ weight.T, compute_uv=False))
    kept = np.cumsum(squares) / squares.sum()
    wanted = [int(np.argmax(kept >= share)) + 1 for share in (0.5, 0.9)]
    assert [level.recipe["rank"] for level in levels[2:]] == [*wanted, 14], "15 of rank 24 save nothing"
    assert [level.stored_bits for level in levels] == [16 * level.parameters for level in levels]


def test_a_rank_that_saves_nothing_is_refused_for_the_unit_with_the_greatest_that_does() -> None:
    compressor = find_compressor("low_rank")
    params = compressor.params.model_validate({"method": "low_rank", "ranks": [14, 15]})
    unit = example_unit(ROWS, COLUMNS)
    assert "rank 15 of a 24 x 40 weight saves nothing: at most 14 does" in str(params.refuses(unit))
    assert params.refuses(replace(unit, shape=(64, 64))) is None
    assert "never smaller" in str(params.refuses(replace(unit, shape=(1, 64))))
    with pytest.raises(ValueError, match="at least one of them"):
        compressor.params.model_validate({"method": "low_rank"})


def test_the_second_factor_makes_up_for_the_rounding_of_the_first(layer: tuple[NDArray[Any], NDArray[Any]]) -> None:
    weight, inputs = layer
    (level,) = made(layer, "low_rank", ranks=8, then={"bits": 4, "group_size": 8})
    from layerwise.stages.levels.low_rank import factors_of

    A = factors_of(level)[0].decode().double().numpy()
    B = np.linalg.lstsq(inputs @ A.T, inputs @ weight.T, rcond=None)[0].T
    best = output_error(layer, B @ A)
    assert best <= output_error(layer, level.decode().numpy()) < 1.3 * best
    assert level.stored_bits < 8 * 8 * (ROWS + COLUMNS)


def test_taking_turns_never_loses_to_one_turn_and_keeps_codes_on_their_grid(
    layer: tuple[NDArray[Any], NDArray[Any]],
) -> None:
    errors = []
    for rounds in (1, 2, 10):
        (level,) = made(layer, "lq_lora", bits=2, group_size=8, rank=3, rounds=rounds)
        errors.append(output_error(layer, level.decode().numpy()))
        assert below(level).recipe["encoding"] == "grid"
        assert level.stored_bits == below(level).stored_bits + 16 * 3 * (ROWS + COLUMNS)
    (alone,) = made(layer, "gptq", bits=2, group_size=8)
    damping = 1.01  # what counts by damping is no part of this error
    assert errors[2] <= errors[1] * damping <= errors[0] * damping**2 < output_error(layer, alone.decode().numpy())


def test_a_weight_that_was_pruned_is_refused(layer: tuple[NDArray[Any], NDArray[Any]]) -> None:
    weight, inputs = (torch.from_numpy(part) for part in layer)
    unit = example_unit(*weight.shape)
    keep = torch.rand(weight.shape) > 0.5
    for method, menu in (("low_rank", {"ranks": 2}), ("lq_lora", {"bits": 4})):
        compressor = find_compressor(method)
        task = Task({unit.name: weight}, lambda *_: inputs.T @ inputs, {unit.name: unit}, {unit.name: keep})
        with pytest.raises(NotFinite, match="pruned before"):
            compressor.run(task, compressor.params.model_validate({"method": method, **menu}))


def test_the_names_do_not_collide_with_those_of_gptq() -> None:
    lq = find_compressor("lq_lora").params.model_validate({"method": "lq_lora", "bits": [2, 3]})
    assert not set(lq.level_names()) & set(gptq.Params(bits=(2, 3)).level_names())
    with pytest.raises(UsageError):
        find_compressor("lqlora")
