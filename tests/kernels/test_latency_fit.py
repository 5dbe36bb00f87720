"""Lines and curves through times, against scipy's linear programming and isotonic regression, and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression, linprog

from layerwise.errors import UsageError
from layerwise.kernels.latency_fit import fit_affine, interpolate_rows, isotonic

sizes = st.integers(1, 1000)
times = st.integers(1, 1000).map(lambda value: value / 8)
points = st.lists(st.tuples(sizes, times), min_size=2, max_size=9).filter(lambda ps: len({s for s, _ in ps}) > 1)


def least_deviation(cloud: list[tuple[float, float]]) -> float:
    """min sum |t0 + slope · size - ms| over t0, slope >= 0, as a linear program with one error per point."""
    n = len(cloud)
    size, ms = np.array(cloud, dtype=float).T
    above = np.column_stack([np.ones(n), size, -np.eye(n)])
    below = np.column_stack([-np.ones(n), -size, -np.eye(n)])
    answer = linprog([0, 0, *[1] * n], np.vstack([above, below]), np.concatenate([ms, -ms]), bounds=(0, None))
    return float(answer.fun)


@given(points)
def test_no_line_that_neither_falls_nor_starts_below_zero_lies_nearer(cloud: list[tuple[float, float]]) -> None:
    line = fit_affine(cloud)
    assert line.t0_ms >= 0
    assert line.bytes_per_ms > 0
    deviation = sum(abs(line.milliseconds(size) - ms) for size, ms in cloud)
    assert deviation == pytest.approx(least_deviation(cloud), rel=1e-6, abs=1e-6)


def test_a_line_is_found_again_though_one_row_is_far_off() -> None:
    exact = [(size, 0.5 + size / 2e6) for size in (10**6, 4 * 10**6, 10**7, 3 * 10**7, 6 * 10**7)]
    line = fit_affine([*exact, (2 * 10**7, 90.0)])
    assert line.t0_ms == pytest.approx(0.5)
    assert line.gigabytes_per_second == pytest.approx(2.0)
    assert line.shapes == 6


def test_the_error_is_that_on_shapes_left_out() -> None:
    line = fit_affine([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0), (5.0, 10.0)])
    assert line.worst == pytest.approx(0.5)  # without the last the others say 5 where 10 was measured
    assert line.error == pytest.approx(0.0)  # without one of the others the rest still give it


def test_two_shapes_fit_exactly_and_have_no_error_to_report() -> None:
    line = fit_affine([(10.0, 3.0), (20.0, 5.0)])
    assert line.milliseconds(10) == pytest.approx(3.0)
    assert line.milliseconds(20) == pytest.approx(5.0)
    assert math.isnan(line.error)


def test_one_size_makes_no_line() -> None:
    with pytest.raises(UsageError, match="at least two sizes"):
        fit_affine([(10.0, 3.0), (10.0, 5.0)])


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=30))
def test_isotonic_regression_is_scipys(values: list[float]) -> None:
    np.testing.assert_allclose(isotonic(values), isotonic_regression(values).x, rtol=1e-9)


def test_between_measured_rows_times_are_straight_in_logarithms() -> None:
    known = {1: 1.0, 16: 2.0, 256: 9.0}
    for m in (2, 5, 16, 100, 255):
        expected = np.exp(np.interp(np.log(m), np.log(list(known)), np.log(list(known.values()))))
        assert interpolate_rows(known, m) == pytest.approx(expected)


def test_more_rows_never_take_less_time() -> None:
    known = {1: 1.0, 4: 3.0, 8: 2.0, 16: 4.0}
    curve = [interpolate_rows(known, m) for m in range(1, 17)]
    assert curve == sorted(curve, key=lambda ms: ms or 0.0)
    assert curve[3] == curve[7] == pytest.approx(2.5)  # a rise and a dip are noise about their mean


@pytest.mark.parametrize("m", [0.5, 300])
def test_nothing_is_read_off_beyond_what_was_measured(m: int) -> None:
    assert interpolate_rows({1: 1.0, 256: 9.0}, m) is None


@pytest.mark.parametrize(("m", "known"), [(16, True), (17, False), (32, False), (48, True), (64, True), (65, False)])
def test_nothing_is_joined_across_rows_where_a_kernel_works_in_another_way(m: int, known: bool) -> None:
    measured = {1: 1.0, 16: 1.1, 33: 2.0, 64: 2.2, 128: 4.0}
    assert (interpolate_rows(measured, m, [16, 64]) is not None) is known
