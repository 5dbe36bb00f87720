"""Repairs in closed form against oracles in float64, and what they leave as it is, over all ways to store a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.levels.adapted import below, with_adapter
from layerwise.stages.levels.grid import grid_columns, grid_level
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept
from layerwise.stages.models.network import Unit, View
from layerwise.stages.recover import REPAIRS, UnitRepair, find_repair

CLOSED = [name for name in REPAIRS if find_repair(name).params.scope == "unit"]
ROWS, COLUMNS = 12, 21
HALF = 2.0**-11  # of a float16, relative


def skewed(seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and inputs of which a few directions are a thousand times as strong as the others."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn((ROWS, COLUMNS), generator=generator)
    turn = torch.linalg.qr(torch.randn((COLUMNS, COLUMNS), generator=generator))[0]
    strength = torch.logspace(1.5, -1.5, COLUMNS)
    return W, torch.randn((tokens, COLUMNS), generator=generator) * strength @ turn


def task(W: Tensor, level: Level, X: Tensor) -> UnitRepair:
    unit = Unit("unit", "unit", "linear", 0, (ROWS, COLUMNS), (0,), View("unit.weight"))
    statistics = {"hessian": (X.T @ X).float()}
    return UnitRepair(unit, level, W, statistics.__getitem__)


def repaired(method: str, given: UnitRepair, **params: Any) -> Level:
    repair = find_repair(method)
    made: Level = repair.run(given, repair.params.model_validate({"method": method, **params}))
    return made


def output_error(W: Tensor, level: Level, X: Tensor) -> float:
    H = (X.T @ X).float().double()
    E = W.double() - level.decode().double()
    return float(((E @ H) * E).sum())


@pytest.fixture(scope="module")
def all_levels(make_levels: Callable[..., list[Any]]) -> list[tuple[Tensor, Tensor, Level]]:
    """Weights, inputs and levels, of every way to store a weight that a compressed model may hold."""
    W, X = skewed()
    H, keep = (X.T @ X).float(), W.abs() > 0.5
    magnitudes = torch.stack([X.square().sum(0), X.abs().sum(0), X.abs().amax(0), X.sum(0)])
    known = {"hessian": H, "channels": magnitudes}
    grid: dict[str, Any] = {"group_size": 8}
    asked: list[tuple[str, dict[str, Any], Tensor | None]] = [
        ("rtn", {"bits": [2, 3, 8], **grid}, None),
        ("rtn", {"bits": 2, **grid, "sym": False}, keep),
        ("rtn", {"bits": 3, **grid, "scale_bits": 6, "scale_group": 2}, None),
        ("rtn", {"bits": 3, **grid, "scale_bits": 4}, keep),
        ("rtn", {"bits": 2, **grid, "group_along": "outputs"}, None),
        ("gptq", {"bits": [2, 4], **grid, "sym": False, "desc_act": True}, None),
        ("gptq", {"bits": 2, **grid}, keep),
        ("trellis_nearest", {"bits": 2}, None),
        ("magnitude", {"sparsity": [0.3, 0.6], "pattern": "2:4"}, None),
        ("magnitude", {"sparsity": 0.5, "block": [1, 8], "then": {"bits": 2, **grid}}, None),
        ("magnitude", {"sparsity": 0.3, "block": [2, 4], "then": {"bits": 3, **grid, "sym": False}}, None),
    ]
    made = [level for method, menu, mask in asked for level in make_levels(method, W, known, keep=mask, **menu)]
    input_scale = torch.linspace(0.5, 2, COLUMNS).half().float()
    (nearest,) = make_levels("rtn", W / input_scale, bits=3, **grid)
    codes, scale, _, _ = grid_columns(nearest)
    zero = torch.full_like(scale, 4)
    made.append(grid_level("scaled", dict(nearest.recipe), codes, scale=scale, zero=zero, input_scale=input_scale))
    return [(W, X, level) for level in made]


def each(all_levels: list[tuple[Tensor, Tensor, Level]], method: str) -> Iterator[tuple[Tensor, Tensor, Level]]:
    fits = find_repair(method).params.model_validate({"method": method}).misfit
    return ((W, X, level) for W, X, level in all_levels if fits(level.recipe) is None)


FIXED = ("codes", "zero", "g_idx", "mask", "input_scale", "scale_codes", "stream")


@pytest.mark.parametrize("method", CLOSED)
def test_the_structure_of_the_level_below_survives_bit_for_bit(
    all_levels: list[tuple[Tensor, Tensor, Level]], method: str
) -> None:
    encodings = set()
    for W, X, level in each(all_levels, method):
        base = below(repaired(method, task(W, level, X)))
        encodings.add(base.recipe["encoding"])
        assert base.recipe["encoding"] == level.recipe["encoding"]
        assert base.tensors.keys() == level.tensors.keys()
        for name, tensor in level.tensors.items():
            if method != "refit" or name in FIXED:
                assert torch.equal(base.tensors[name], tensor), f"{level.name}: {name}"
        if "mask" in level.tensors:
            assert not base.decode()[~kept(level)].any()
        if method != "refit":
            assert torch.equal(base.decode(), level.decode())
            assert (base.name, dict(base.recipe)) == (level.name, dict(level.recipe))
    assert encodings >= {"grid", "masked_grid", "block_grid", "mask"}


@pytest.mark.parametrize("method", CLOSED)
def test_only_stated_bytes_are_added(all_levels: list[tuple[Tensor, Tensor, Level]], method: str) -> None:
    for W, X, level in each(all_levels, method):
        made = repaired(method, task(W, level, X), **({} if method == "refit" else {"rank": 3}))
        added = 0 if method == "refit" else 3 * (ROWS + COLUMNS) * 2
        assert made.size_bytes == level.size_bytes + added
        assert made.stored_bits == level.stored_bits + 8 * added
        assert made.parameters == level.parameters + added // 2


@pytest.mark.parametrize("rank", [1, 4, ROWS])
def test_eora_is_the_best_fit_of_the_output_error_and_beats_the_best_fit_of_the_weight_error(
    all_levels: list[tuple[Tensor, Tensor, Level]], rank: int
) -> None:
    """With H = L Lᵀ, no product of rank r leaves less than the discarded singular values of E L (Eckart and Young)."""
    for W, X, level in all_levels:
        E = (W.double() - level.decode().double()).numpy()
        L = np.linalg.cholesky((X.T @ X).float().double().numpy())
        discarded = float((np.linalg.svd(E @ L, compute_uv=False)[rank:] ** 2).sum())
        given = task(W, level, X)
        exact = repaired("eora", given, rank=rank, damp_percent=0, dtype="float32")
        before = output_error(W, level, X)
        assert output_error(W, exact, X) == pytest.approx(discarded, rel=1e-4, abs=1e-9 * before)
        stored = output_error(W, repaired("eora", given, rank=rank, damp_percent=0), X)
        assert stored == pytest.approx(discarded, rel=0.01, abs=40 * rank * HALF**2 * before * COLUMNS)
        if rank < ROWS:
            plain = output_error(W, repaired("svd", given, rank=rank, dtype="float32"), X)
            assert output_error(W, exact, X) < 0.9 * plain


def test_svd_leaves_the_discarded_singular_values(all_levels: list[tuple[Tensor, Tensor, Level]]) -> None:
    for W, X, level in all_levels:
        E = W.double() - level.decode().double()
        made = repaired("svd", task(W, level, X), rank=5, dtype="float32")
        left = (W.double() - made.decode().double()).square().sum()
        assert float(left) == pytest.approx(float((torch.linalg.svdvals(E)[5:] ** 2).sum()), rel=1e-5)


def test_eora_makes_do_with_fewer_tokens_than_inputs(all_levels: list[tuple[Tensor, Tensor, Level]]) -> None:
    W, X, level = all_levels[0]
    few = X[:6]
    made = repaired("eora", task(W, level, few), rank=6, damp_percent=0, dtype="float32")
    assert output_error(W, made, few) < 1e-6 * output_error(W, level, few)
    assert float(made.tensors["A"].abs().max()) < 1e3, "directions that no input has are left alone"


def test_an_adapter_over_an_adapter_is_stacked_onto_it(all_levels: list[tuple[Tensor, Tensor, Level]]) -> None:
    W, X, level = all_levels[0]
    once = repaired("eora", task(W, level, X), rank=2)
    twice = repaired("svd", task(W, once, X), rank=3)
    assert twice.recipe["rank"] == 5
    assert torch.equal(below(twice).decode(), level.decode())
    assert output_error(W, twice, X) < output_error(W, once, X) < output_error(W, level, X)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_refitted_rows_are_never_worse_and_undamped_they_are_least_squares(
    all_levels: list[tuple[Tensor, Tensor, Level]], damp: float
) -> None:
    for W, X, level in each(all_levels, "refit"):
        made = repaired("refit", task(W, level, X), damp_percent=damp)
        H = (X.T @ X).float().double()
        E_before, E_after = (W.double() - one.decode().double() for one in (level, made))
        before, after = ((E @ H * E).sum(1) for E in (E_before, E_after))
        assert (after <= before).all(), level.name
        if damp == 0:
            best = least_squares(W, level, X)
            close = after.numpy() <= best + 0.02 * (before.numpy() - best) + 1e-3 * before.numpy()
            assert close.mean() > 0.8, level.name  # the rest is what rounding to float16 (or a smallest scale) leaves


def least_squares(W: Tensor, level: Level, X: Tensor) -> Any:
    """The least output error of each row over all values of what may move, by numpy's solver on the inputs."""
    found = []
    rows = X.double().numpy()
    decoded = level.decode().double().numpy()
    for row in range(ROWS):
        target = rows @ W[row].double().numpy()
        if level.recipe["encoding"] == "mask":
            columns = rows[:, kept(level)[row].numpy()]
        else:
            columns = np.stack([rows @ part for part in parts_of(level, decoded[row])], 1)
        solution = np.linalg.lstsq(columns, target, rcond=None)[0]
        found.append(float(((target - columns @ solution) ** 2).sum()))
    return np.array(found)


def parts_of(level: Level, row: Any) -> list[Any]:
    """A decoded row cut into what has one scale."""
    recipe = level.recipe
    group = np.arange(COLUMNS) // recipe["group_size"]
    if "g_idx" in level.tensors:
        group = level.tensors["g_idx"].numpy()
    if recipe.get("scale_bits", 16) < 16:
        group = group * 0 if recipe["scale_group"] == -1 else group // recipe["scale_group"]
    return [np.where(group == number, row, 0) for number in range(group.max() + 1)]


def test_refit_goes_on_below_an_adapter(all_levels: list[tuple[Tensor, Tensor, Level]]) -> None:
    W, X, level = all_levels[0]
    once = repaired("eora", task(W, level, X), rank=2)
    made = repaired("refit", task(W, once, X))
    assert torch.equal(made.tensors["A"], once.tensors["A"])
    assert made.recipe["base"]["repairs"] == ["refit"]
    assert output_error(W, made, X) < output_error(W, once, X)


def test_what_is_not_finite_is_refused(all_levels: list[tuple[Tensor, Tensor, Level]]) -> None:
    W, X, level = all_levels[0]
    broken = W.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"weight error has 1 NaN"):
        repaired("eora", task(broken, level, X))
    with pytest.raises(NotFinite, match="Hessian has"):
        repaired("refit", task(W, level, X * torch.inf))
    with pytest.raises(NotFinite, match="adapter has NaN or Inf, or values too large"):
        with_adapter(level, torch.full((1, COLUMNS), torch.inf), torch.ones(ROWS, 1), method="svd")
