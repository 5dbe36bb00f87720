"""Published rules for densities as losses: their least sum within a budget is what the papers' own procedures give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from layerwise.solvers import Problem, ilp
from layerwise.stages.levels.database import LevelEntry, UnitEntry
from layerwise.stages.profile.densities import LAMBDA, erk_losses, owl_losses
from layerwise.stages.profile.pruned import count_outliers, lamp_loss
from layerwise.testing.statistics import example_unit

STEP = 0.01
NEAR = 2.5 * STEP
"""A step, and what the steps of others, which are not as large, leave of a budget."""
DENSITIES = np.arange(0, 1 + STEP / 2, STEP)
SHAPES = [(100, 100), (200, 50), (400, 25), (20, 500), (90, 110)]  # as large as each other, so that steps are alike
SIZES = np.array([rows * columns for rows, columns in SHAPES])


def units() -> list[UnitEntry]:
    """Units with a level for every percent of density."""
    found = []
    for number, shape in enumerate(SHAPES):
        unit = replace(example_unit(*shape), name=f"unit-{number}", block=number)
        levels = [LevelEntry(f"{d:.2f}", {}, {"parameters": d * shape[0] * shape[1]}) for d in DENSITIES]
        found.append(UnitEntry(unit, None, tuple(levels)))
    return found


def solved(losses: list[list[float | None]], density: float) -> NDArray[Any]:
    """Density of each unit where the losses sum up to the least within a budget."""
    costs = SIZES[:, None] * DENSITIES
    problem = Problem({"kept": costs}, {"kept": density * SIZES.sum()}, np.array(losses, dtype=float))
    return DENSITIES[ilp(problem).choice]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.4, 0.7])
def test_erk_gives_densities_in_proportion_until_layers_are_full(density: float) -> None:
    raw = np.array([sum(shape) for shape in SHAPES]) / SIZES
    full = np.zeros(len(raw), dtype=bool)
    while True:  # the published loop: what would be denser than dense is dense, and the rest shares what is left
        epsilon = (density * SIZES.sum() - SIZES[full].sum()) / (raw * SIZES)[~full].sum()
        over = ~full & (epsilon * raw > 1)
        if not over.any():
            break
        full |= over
    expected = np.where(full, 1, epsilon * raw)
    assert np.abs(solved(erk_losses(units()), density) - expected).max() <= NEAR
    assert full.any() == (density > 0.5)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_owl_spreads_densities_by_the_share_of_outliers(density: float) -> None:
    shares = np.array([0.01, 0.05, 0.02, 0.09, 0.03])
    scaled = (shares - shares.min()) / (shares.max() - shares.min()) * LAMBDA * 2  # the published lines
    expected = scaled - (scaled * SIZES).sum() / SIZES.sum() + density
    counts = {f"unit-{n}": (round(10_000 * share), 10_000) for n, share in enumerate(shares)}
    found = solved(owl_losses(units(), counts), density)
    assert np.abs(found - expected).max() <= NEAR
    assert found.max() - found.min() == pytest.approx(2 * LAMBDA, abs=NEAR)


def test_lamp_scores_are_those_of_the_paper_and_a_threshold_on_all_of_them_has_the_least_sum() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(4, 5)) * scale for scale in (1, 3)]
    scores = []
    for weight in weights:
        squares = weight.flatten() ** 2
        scores.append(np.array([square / squares[squares >= square].sum() for square in squares]).reshape(4, 5))
    threshold = np.sort(np.concatenate([score.flatten() for score in scores]))[15]
    chosen = 0.0
    for weight, score in zip(weights, scores, strict=True):
        pruned = score < threshold
        loss = lamp_loss(torch.from_numpy(weight), torch.from_numpy(pruned))
        assert loss == pytest.approx(score[pruned].sum())
        chosen += loss
    by_size = [np.sort(score.flatten()).cumsum() for score in scores]
    others = [(by_size[0][k - 1] if k else 0) + (by_size[1][14 - k] if k < 15 else 0) for k in range(16)]
    assert chosen == pytest.approx(min(others))
    assert lamp_loss(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)) == 0


def test_outliers_are_weights_whose_inputs_make_them_large() -> None:
    weight, norms = torch.ones(2, 10), torch.ones(2, 10)
    norms[:, 3] = 100.0
    assert count_outliers(weight, norms) == 2


def test_the_rules_are_measured_and_followed_by_a_search(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Any]
) -> None:
    bench = new_bench(model_folder("llama"))
    statistics = bench.run("calibrate", {"statistics": ["hessian"]})
    menu = [{"method": "magnitude", "sparsity": [0.2, 0.4, 0.6, 0.8]}, {"method": "dense"}]
    made = bench.run("compress", {"menu": menu}, statistics=statistics.out)
    profile = bench.run("profile", {"metrics": ["erk", "lamp", "owl"]}, database=made.out, statistics=statistics.out)
    for loss in ("erk", "lamp", "owl"):
        told = [row["value"] for row in profile.rows["profile"] if row["metric"] == loss]
        assert told and all(value is not None for value in told)
        params = {"solver": "ilp", "loss": loss, "budgets": {"density": 0.5}}
        found = bench.run("allocate", params, database=made.out, profile=profile.out)
        (allocation,) = found.rows["allocations"]
        assert len(set(allocation["levels"])) > 1
