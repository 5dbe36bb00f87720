import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from layerwise.solvers._hull import climb

WHOLE = st.integers(0, 9).map(float)
REAL = st.floats(0, 1e9, allow_subnormal=False).filter(lambda x: x == 0 or x > 1e-200)  # quotients stay finite


@st.composite
def tables(draw, numbers=WHOLE):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    table = arrays(np.float64, shape, elements=numbers, fill=st.nothing())
    costs, losses = draw(table), draw(table)
    missing = draw(arrays(np.int64, shape, elements=st.integers(0, 5), fill=st.nothing())) == 0
    missing[:, draw(st.integers(0, shape[1] - 1))] = False
    costs[missing] = losses[missing] = np.inf
    return costs, losses


def vertices(costs, losses):
    """Levels on the lower convex hull of one unit, by definition and in fractions: no mixture of two others is as good.

    Of several levels with the same cost and loss, the first.
    """
    points = [(Fraction(c), Fraction(v)) for c, v in zip(costs, losses, strict=True) if np.isfinite(c)]
    points = list(dict.fromkeys(points))

    def beaten(point):
        others = [other for other in points if other != point]
        if any(c <= point[0] and v <= point[1] for c, v in others):
            return True
        return any(
            a[0] < point[0] < b[0] and a[1] + (b[1] - a[1]) * (point[0] - a[0]) / (b[0] - a[0]) <= point[1]
            for a, b in itertools.permutations(others, 2)
        )

    return sorted((float(c), float(v)) for c, v in points if not beaten((c, v)))


def climbed(steps, costs, losses, unit):
    levels = [int(steps.start[unit]), *steps.after[steps.unit == unit].tolist()]
    return [(costs[unit, level], losses[unit, level]) for level in levels]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(given_tables=tables())
def test_each_unit_climbs_the_vertices_of_its_lower_hull_from_cheap_to_dear(given_tables):
    costs, losses = given_tables
    steps = climb(costs, losses)
    for unit in range(len(costs)):
        assert climbed(steps, costs, losses, unit) == vertices(costs[unit], losses[unit])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(given_tables=tables(numbers=REAL))
def test_on_real_numbers_no_level_lies_below_the_climb(given_tables):
    costs, losses = given_tables
    steps = climb(costs, losses)
    for unit in range(len(costs)):
        hull = climbed(steps, costs, losses, unit)
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(hull))
        there = np.isfinite(costs[unit])
        below = np.interp(costs[unit, there], *zip(*hull, strict=True))
        assert (costs[unit, there] >= hull[0][0]).all()
        assert (losses[unit, there] >= below * (1 - 1e-9)).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(given_tables=tables() | tables(numbers=REAL))
def test_prices_fall_and_are_gain_per_cost(given_tables):
    costs, losses = given_tables
    steps = climb(costs, losses)
    assert (np.diff(steps.price) <= 0).all()
    assert (steps.cost > 0).all() and (steps.gain > 0).all()
    assert steps.price * steps.cost == pytest.approx(steps.gain, rel=1e-9)
    choice = steps.choice(len(steps.unit))
    rows = np.arange(len(costs))
    assert losses[rows, choice].tolist() == losses.min(axis=1).tolist()
    for n_steps in range(len(steps.unit)):
        before, after = steps.choice(n_steps), steps.choice(n_steps + 1)
        assert np.flatnonzero(before != after).tolist() == [steps.unit[n_steps]]
        assert costs[rows, after].sum() - costs[rows, before].sum() == pytest.approx(
            steps.cost[n_steps], abs=1e-12 * costs[rows, after].sum()
        )


def test_of_equal_costs_the_climb_starts_at_the_least_loss():
    steps = climb(np.array([[2.0, 1.0, 1.0]]), np.array([[0.0, 5.0, 3.0]]))
    assert (steps.start.tolist(), steps.after.tolist(), steps.price.tolist()) == ([2], [0], [3.0])


def test_of_equal_slopes_the_longest_step_is_taken():
    steps = climb(np.array([[0.0, 1.0, 2.0, 3.0]]), np.array([[3.0, 2.0, 1.0, 0.5]]))
    assert (steps.after.tolist(), steps.price.tolist()) == ([2, 3], [1.0, 0.5])


def test_a_price_beyond_all_numbers_is_the_largest_one():
    steps = climb(np.array([[0.0, 1e-300]]), np.array([[1e10, 0.0]]))
    assert steps.price.tolist() == [np.finfo(np.float64).max]
