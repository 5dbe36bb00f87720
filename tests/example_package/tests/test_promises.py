"""What the package adds keeps the promises of its kind: the suites of layerwise, run on it."""

from pathlib import Path

import pytest
import torch
from layerwise_example.ternary import nearest_ternary
from layerwise_example.ternary_encoding import ternary_level

from layerwise.stages.calibrate import find_statistic
from layerwise.testing import (
    Bench,
    check_stage,
    compressor_promises,
    encoding_promises,
    search_promises,
    solver_promises,
    statistic_promises,
)
from layerwise.testing.solvers import Claims
from layerwise.testing.statistics import random_inputs

SIZES = [-1, 64, 21, 8, 7]


def levels():
    signs = random_inputs(rows=5, columns=21).clamp(-1, 1).round()
    scales = [random_inputs(2, 5, 1 if size == -1 else -(-21 // size)).abs() for size in SIZES]
    return [
        ternary_level(f"ternary-{size}", {"method": "ternary", "group_size": size}, signs, scale)
        for size, scale in zip(SIZES, scales, strict=True)
    ]


PROMISES = [
    *encoding_promises("ternary", levels()),
    *statistic_promises("input_range"),
    *compressor_promises("ternary", [{}, {"group_size": [-1, 7, 8]}]),
    *solver_promises("exchange", Claims(refuses={"reverse with interactions"})),
    *search_promises("climb"),
]


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_a_promise_is_kept(promise):
    promise()


def test_the_stage_keeps_its_promises(tmp_path: Path):
    bench = Bench(tmp_path)
    statistics = bench.run("calibrate", {"statistics": ["input_range"]})
    levels = bench.run("compress", {"menu": [{"method": "ternary", "group_size": [-1, 16]}]}, statistics=statistics)
    check_stage(bench, "sizes", {"unit": "KiB"}, database=levels)


def test_no_ternary_weight_is_nearer():
    """Against all 3^7 sign patterns of each row, each with its own best scale."""
    W, importance = random_inputs(4, 6, 7).double(), random_inputs(5, 1, 7)[0].double().square()
    signs, scale = nearest_ternary(W, importance, 7)
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 7)
    found = (importance * (W - signs * scale).square()).sum(1)
    for row, error in zip(W, found, strict=True):
        weight = (importance * patterns.square()).sum(1).clamp(min=1e-300)
        best = ((importance * patterns * row).sum(1) / weight).clamp(min=0)
        errors = (importance * (row - patterns * best[:, None]).square()).sum(1)
        assert errors.min() * (1 - 1e-12) <= error <= errors.min() * (1 + 1e-4)  # the scale is rounded to float16


def test_the_range_of_inputs_holds_them_and_zero():
    X = random_inputs() - 3
    low, high = find_statistic("input_range").measure(X)
    assert torch.equal(low, X.amin(0).clamp(max=0))
    assert torch.equal(high, X.amax(0).clamp(min=0))
