"""Fronts, ranks, volumes and comparisons are what their definitions say, taken word by word."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import UsageError
from layerwise.solvers import (
    Comparison,
    compare,
    crowding_distance,
    hypervolume,
    knee,
    non_dominated,
    non_dominated_ranks,
)


def point_sets(coordinate, max_size=30, dimensions=(1, 4), min_size=0):
    """Lists of points, all of one dimension."""
    rows = st.integers(*dimensions).map(lambda d: st.lists(coordinate, min_size=d, max_size=d))
    return rows.flatmap(lambda row: st.lists(row, min_size=min_size, max_size=max_size))


WHOLE = st.integers(0, 4).map(float)
ANY = st.one_of(WHOLE, st.sampled_from([math.nan, math.inf, -math.inf]), st.floats())


def beats(a: list[float], b: list[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def covers(a: list[float], b: list[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))


def front_by_pairs(points: list[list[float]]) -> list[bool]:
    known = [point for point in points if not any(map(math.isnan, point))]
    return [point in known and not any(beats(other, point) for other in known) for point in points]


@given(point_sets(ANY))
def test_the_front_is_what_comparing_all_pairs_gives(points: list[list[float]]) -> None:
    assert non_dominated(points).tolist() == front_by_pairs(points)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_equal_points_are_on_the_front_together(points: list[tuple[int, int]]) -> None:
    front = non_dominated(points)
    assert all(front[i] == front[points.index(point)] for i, point in enumerate(points))


@given(point_sets(ANY, min_size=1).map(np.array), st.randoms())
def test_the_order_of_the_points_does_not_matter(points: np.ndarray, random: object) -> None:
    order = np.random.default_rng(random.getrandbits(32)).permutation(len(points))
    assert non_dominated(points[order]).tolist() == non_dominated(points)[order].tolist()
    assert non_dominated_ranks(points[order]).tolist() == non_dominated_ranks(points)[order].tolist()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_front_is_that_of_optuna(dimensions: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng = np.random.default_rng(dimensions)
    for points in [rng.integers(0, 6, (40, dimensions)).astype(float), rng.normal(size=(40, dimensions))]:
        study = optuna.create_study(directions=["minimize"] * dimensions)
        study.add_trials([optuna.trial.create_trial(values=point.tolist()) for point in points])
        best = sorted(trial.number for trial in study.best_trials)
        assert np.flatnonzero(non_dominated(points)).tolist() == best


def test_no_points_have_no_front() -> None:
    for dimensions in (1, 2, 3):
        empty = np.empty((0, dimensions))
        assert non_dominated(empty).shape == (0,)
        assert non_dominated_ranks(empty).shape == (0,)
        assert crowding_distance(empty).shape == (0,)
        assert hypervolume(empty, [1.0] * dimensions) == 0
    assert non_dominated([]).shape == (0,)
    assert hypervolume([], [1.0, 1.0]) == 0


def test_a_large_front_is_a_falling_staircase() -> None:
    points = np.random.default_rng(0).normal(size=(100_000, 2)).round(3)
    front = points[non_dominated(points)]
    stairs = np.unique(front, axis=0)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(stairs))
    assert all(((stairs <= point).all(axis=1)).any() for point in points[:1000])


def test_a_plane_of_many_points_in_three_dimensions_is_all_front() -> None:
    points = np.random.default_rng(0).dirichlet([1, 1, 1], 2000).round(12)
    points[:, 2] = 1 - points[:, 0] - points[:, 1]
    assert non_dominated(points).all()
    assert non_dominated(np.concatenate([points, points + 1e-3])).sum() >= 2000


@pytest.mark.parametrize("points", [[1.0, 2.0], 3.0, [[]], [[[1.0]]]])
def test_what_is_no_array_of_points_is_refused(points: object) -> None:
    with pytest.raises(UsageError, match=r"points are an array \(points, coordinates\), found shape"):
        non_dominated(points)


@given(point_sets(ANY, max_size=20))
def test_ranks_are_the_fronts_that_are_left_when_earlier_ones_are_taken_away(points: list[list[float]]) -> None:
    expected = np.full(len(points), -1)
    for rank in range(len(points)):
        left = [point if expected[i] < 0 else [math.nan] * len(point) for i, point in enumerate(points)]
        expected[front_by_pairs(left)] = rank
    known = expected >= 0
    found = non_dominated_ranks(points)
    assert found[known].tolist() == expected[known].tolist()
    assert set(found[~known]) <= {max(1, expected.max(initial=0) + 1)}
    assert ((found == 0) == non_dominated(points)).all()


def test_crowding_is_the_example_worked_by_hand() -> None:
    points = [[0, 10], [1, 6], [2, 5], [4, 1], [10, 0]]
    expected = [math.inf, 2 / 10 + 5 / 10, 3 / 10 + 5 / 10, 8 / 10 + 5 / 10, math.inf]
    assert crowding_distance(points) == pytest.approx(expected)


@given(point_sets(st.floats(-100, 100), dimensions=(2, 2), min_size=1))
def test_crowding_on_a_front_without_copies_is_debs_loop(points: list[list[float]]) -> None:
    front = [list(point) for point in {tuple(p) for p, on in zip(points, front_by_pairs(points), strict=True) if on}]
    expected = dict.fromkeys(map(tuple, front), 0.0)
    for axis in range(2):
        line = sorted(front, key=lambda point: point[axis])
        expected[tuple(line[0])] = expected[tuple(line[-1])] = math.inf
        for before, point, after in zip(line, line[1:], line[2:], strict=False):
            expected[tuple(point)] += (after[axis] - before[axis]) / (line[-1][axis] - line[0][axis])
    assert crowding_distance(front) == pytest.approx([expected[tuple(point)] for point in front])


def test_a_copy_is_crowded_and_takes_nothing_from_the_first() -> None:
    front = [[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]
    assert crowding_distance([*front, *front]).tolist() == [math.inf, 2.0, math.inf, 0, 0, 0]


def test_unknown_points_are_crowded_and_a_constant_coordinate_counts_for_nothing() -> None:
    points = [[0.0, 2.0], [math.nan, 0.0], [1.0, 1.0], [math.inf, -1.0], [2.0, 0.0]]
    assert crowding_distance(points).tolist() == [math.inf, 0, 2.0, 0, math.inf]
    with_constant = [[*point, 7.0] for point in points]
    assert crowding_distance(with_constant).tolist() == [math.inf, 0, 2.0, 0, math.inf]
    assert crowding_distance([[1.0, 1.0], [1.0, 1.0]]).tolist() == [math.inf, 0]


@given(point_sets(ANY, max_size=7), st.integers(1, 6))
def test_the_hypervolume_is_that_of_inclusion_and_exclusion(points: list[list[float]], worst: int) -> None:
    reference = [float(worst)] * (len(points[0]) if points else 2)
    inside = [point for point in points if all(x < worst for x in point)]
    if any(-math.inf in point for point in inside):
        assert hypervolume(points, reference) == math.inf
        return
    points = [point for point in points if point not in inside or min(point) > -1e3]
    inside = [point for point in inside if min(point) > -1e3]
    signed = [
        (-1) ** (size + 1) * math.prod(worst - max(axis) for axis in zip(*some, strict=True))
        for size in range(1, len(inside) + 1)
        for some in itertools.combinations(inside, size)
    ]
    # The terms of the oracle cancel: as many roundings as terms, each relative to the greatest.
    allowed = 1e-15 * max([1.0, *map(abs, signed)]) * (len(signed) + 1)
    assert hypervolume(points, reference) == pytest.approx(math.fsum(signed), abs=allowed)


@given(point_sets(st.integers(0, 5), max_size=12, dimensions=(1, 4)))
def test_the_hypervolume_counts_the_cells_of_a_grid(points: list[list[int]]) -> None:
    dimensions = len(points[0]) if points else 1
    cells = itertools.product(range(5), repeat=dimensions)
    assert hypervolume(points, [5.0] * dimensions) == sum(any(covers(p, list(cell)) for p in points) for cell in cells)


def test_the_hypervolume_of_many_points_in_three_dimensions_agrees_with_sampling() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(60, 3)) ** 0.5
    samples = rng.uniform(size=(100_000, 3))
    share = (points[:, None] <= samples).all(axis=2).any(axis=0).mean()
    # Four standard deviations of a share over so many samples, at most 4 * 0.5 / sqrt(100,000).
    assert hypervolume(points, [1, 1, 1]) == pytest.approx(share, abs=0.0064)


def test_points_beyond_the_reference_add_nothing() -> None:
    assert hypervolume([[1, 1], [0, 3], [3, 0], [2, 0], [math.nan, 0]], [2, 3]) == 2
    assert hypervolume([[2, 2]], [2, 2]) == 0
    with pytest.raises(UsageError, match="must be finite"):
        hypervolume([[1, 1]], [2, math.inf])
    with pytest.raises(UsageError, match=r"shape \(3,\), but points have 2"):
        hypervolume([[1, 1]], [2, 2, 2])


def test_the_knee_of_a_corner_is_the_corner() -> None:
    assert knee([2, 3, 4, 8], [10, 1, 0.9, 0.8]) == 1
    assert knee([8, 4, 3, 2], [0.8, 0.9, 1, 10]) == 2


@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=12),
    st.lists(st.integers(1, 50), min_size=2, max_size=12),
    st.floats(0.001, 1000),
)
def test_the_knee_is_the_point_furthest_below_the_chord_in_any_unit(
    steps: list[int], drops: list[int], unit: float
) -> None:
    size = min(len(steps), len(drops))
    x, y = np.cumsum([0, *steps[:size]]) * 1.0, -np.cumsum([0, *drops[:size]]) * 1.0
    a, b = np.array([x[0], y[0]]), np.array([x[-1], y[-1]])
    # Twice the area of the triangle (a, b, point) over the chord's length, after stretching the front to a square.
    u, v = (x - x[0]) / (b[0] - a[0]), (y - b[1]) / (a[1] - b[1])
    distance = ((1 - u) - v) / math.sqrt(2)
    found = knee(x * unit, y / unit)
    if distance.max() < 1e-9:
        assert found is None
    else:
        assert found is not None
        assert distance[found] == pytest.approx(distance.max(), abs=1e-9)


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1], [1]), ([1, 2], [2, 1]), ([1, 2, 3], [3, 2, 1]), ([1, 2, 3], [3, 2.9, 0]),
                 ([1, 1, 1], [3, 3, 3])]
)  # fmt: skip
def test_a_front_that_does_not_bend_has_no_knee(x: list[float], y: list[float]) -> None:
    assert knee(x, y) is None


def test_a_point_that_is_not_finite_does_not_hide_the_knee() -> None:
    assert knee([1, 2, 3, 4, 8], [math.inf, 10, 1, 0.9, 0.8]) == 2
    assert knee([2, math.nan, 3, 4, 8], [10, 5, 1, 0.9, 0.8]) == 2
    with pytest.raises(UsageError, match="as many x as y"):
        knee([1, 2, 3], [1, 2])


def test_a_spectrum_bends_where_its_noise_begins() -> None:
    values = np.concatenate([2.0 ** -np.arange(8), 2.0**-8 * 0.99 ** np.arange(50)])
    assert knee(range(len(values)), np.log(values)) == 8
    assert knee(range(20), np.log(2.0 ** -np.arange(20))) is None


FRONTS = st.lists(st.tuples(WHOLE, WHOLE, WHOLE).map(list), min_size=1, max_size=8)


@given(FRONTS, FRONTS)
def test_a_comparison_is_its_two_definitions(a: list[list[float]], b: list[list[float]]) -> None:
    def epsilon(first: list[list[float]], second: list[list[float]]) -> float:
        shifts = [float(shift) for shift in range(-4, 5)]  # all that whole numbers from 0 to 4 can differ by
        return min(s for s in shifts if all(any(covers([x - s for x in p], q) for p in first) for q in second))

    def coverage(first: list[list[float]], second: list[list[float]]) -> float:
        return sum(any(covers(p, q) for p in first) for q in second) / len(second)

    first = [point for point, on in zip(a, front_by_pairs(a), strict=True) if on]
    second = [point for point, on in zip(b, front_by_pairs(b), strict=True) if on]
    found = compare(a, b)
    assert found == Comparison(
        epsilon(first, second), epsilon(second, first), coverage(first, second), coverage(second, first)
    )
    assert (found.epsilon_ab <= 0) == (found.coverage_ab == 1)


def test_a_front_equals_itself_and_a_better_one_covers_it() -> None:
    front = np.array([[1.0, 4.0], [2.0, 2.0], [4.0, 1.0]])
    assert compare(front, front) == Comparison(0, 0, 1, 1)
    assert compare(front - 0.5, front) == Comparison(-0.5, 0.5, 1, 0)
    assert compare(front[1:], front) == Comparison(1, 0, 2 / 3, 1)


def test_infinite_coordinates_are_compared_and_unknown_points_left_out() -> None:
    a = [[1.0, math.inf], [2.0, 1.0], [math.nan, 0.0]]
    assert compare(a, a) == Comparison(0, 0, 1, 1)
    assert compare(a, [[0.0, 1.0]]) == Comparison(2, 0, 0, 1)
    assert compare([[1.0, math.inf]], [[1.0, 1.0]]) == Comparison(math.inf, 0, 0, 1)
    with pytest.raises(UsageError, match="needs points, found 2 and 0"):
        compare(a, [[math.nan, 1.0]])
    with pytest.raises(UsageError, match="2 and 3 coordinates"):
        compare(a, [[1.0, 1.0, 1.0]])
