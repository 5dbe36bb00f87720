import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import Problem, branch, frontier

KINDS = {
    "plain": {},
    "two resources": {"n_budgets": 2},
    "negative losses": {"negative": True},
    "nested": {"nested": 3},
    "nested, two resources": {"nested": 3, "n_budgets": 2},
}
"""All of these numbers are sums of quarters, so that nothing is rounded and points can be compared exactly."""


def pareto(problem, sums):
    """The non-dominated (cost, loss) of all allocations, by enumeration."""
    n_units, n_levels = problem.shape
    points = []
    for choice in itertools.product(range(n_levels), repeat=n_units):
        tied = all(len({choice[unit] for unit in group}) == 1 for group in problem.groups)
        true = sums(problem, choice) if tied else {"loss": math.inf}
        if math.isfinite(true["loss"]):
            points.append((true["resource0"], true["loss"]))
    kept = []
    for point in sorted(set(points)):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def lower_hull(points):
    """Vertices of the lower convex hull of points with rising cost and falling loss."""

    def above(a, b, c):
        return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])

    hull = []
    for point in points:
        exact = tuple(map(Fraction, point))
        while len(hull) > 1 and above(hull[-2], hull[-1], exact):
            hull.pop()
        hull.append(exact)
    return [(float(cost), float(loss)) for cost, loss in hull]


def points(curve):
    return list(zip(curve.costs.tolist(), curve.losses.tolist(), strict=True))


def free(data, problems, **kind):
    """A problem whose budgets are left aside."""
    return replace(data.draw(problems(max_units=5, max_levels=3, **kind)), budgets={})


def check_points_are_real(problem, curve):
    for index in range(len(curve)):
        solution = curve.solution(index)
        assert solution.choice.tolist() == curve.choice(index).tolist()
        assert problem.feasible(solution.choice)
        assert solution.cost[curve.over] == pytest.approx(curve.costs[index], rel=1e-12, abs=1e-12)
        assert solution.loss == pytest.approx(curve.losses[index], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_hull_has_every_vertex_and_no_point_beside_it(kind, problems, sums, data):
    problem = free(data, problems, **KINDS[kind])
    curve, best = frontier(problem, over="resource0"), pareto(problem, sums)
    assert set(lower_hull(best)) <= set(points(curve)) <= set(best)
    assert lower_hull(points(curve)) == lower_hull(best)
    assert not curve.exact
    check_points_are_real(problem, curve)
    assert all(curve.solution(index).status == "optimal" for index in range(len(curve)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_exact_frontier_is_all_that_is_not_dominated(kind, problems, sums, data):
    problem = free(data, problems, **KINDS[kind])
    curve = frontier(problem, over="resource0", exact=True)
    assert points(curve) == pareto(problem, sums)
    assert curve.exact
    check_points_are_real(problem, curve)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_on_real_numbers_no_allocation_is_better_than_the_exact_frontier(problems, sums, data):
    problem = free(data, problems, real=True, nested=3)
    curve, best = frontier(problem, over="resource0", exact=True), pareto(problem, sums)
    check_points_are_real(problem, curve)
    assert (np.diff(curve.costs) > 0).all() and (np.diff(curve.losses) < 0).all()
    rounding = 1e-12 * best[-1][0], 1e-12 * best[0][1]
    for cost, loss in best:
        assert ((curve.costs <= cost + rounding[0]) & (curve.losses <= loss + rounding[1])).any()


def test_decimals_that_are_equal_but_for_rounding_are_one_point():
    costs = [[0.6, 0.9, 1.1], [0.0, 0.1, 0.9], [1.1, 0.2, 0.3], [1.0, 0.5, 0.3]]
    losses = [[0.9, 0.3, 0.4], [0.7, 0.6, 0.1], [0.0, 1.0, 0.9], [1.0, 0.6, 0.9]]
    curve = frontier(Problem(costs={"bits": costs}, losses=losses), over="bits", exact=True)
    assert np.diff(curve.costs).min() > 1e-3
    assert np.diff(curve.losses).max() < -1e-3


@pytest.mark.parametrize("max_states", [1, 2, 3, 10])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_coarse_frontier_is_real_and_within_a_step_per_unit(max_states, problems, sums, data):
    problem = free(data, problems, nested=data.draw(st.integers(0, 3)), real=data.draw(st.booleans()))
    curve, best = frontier(problem, over="resource0", exact=True, max_states=max_states), pareto(problem, sums)
    check_points_are_real(problem, curve)
    assert (np.diff(curve.costs) > 0).all() and (np.diff(curve.losses) < 0).all()
    low, high = problem.reachable("resource0")
    coarse = problem.shape[0] * (high - low) / max_states * (not curve.exact)
    for cost, loss in best:
        near = curve.costs <= cost + coarse + 1e-9 * high
        assert (near & (curve.losses <= loss * (1 + 1e-9))).any()


@pytest.mark.parametrize("arguments", [{}, {"exact": True}, {"exact": True, "max_states": 3}])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), share=st.floats(-0.2, 1.2))
def test_at_a_budget_the_bound_is_true_and_the_loss_at_best_that_of_branch(arguments, problems, data, share):
    problem = free(data, problems, nested=3, negative=True)
    curve = frontier(problem, over="resource0", **arguments)
    low, high = problem.reachable("resource0")
    budget = data.draw(st.sampled_from([low + share * (high - low), low, high, *curve.costs.tolist()]))
    within = replace(problem, budgets={"resource0": budget})
    try:
        solution = curve.at(budget)
    except InfeasibleBudget as error:
        assert (error.resource, error.reachable) == ("resource0", curve.costs[0])
        if curve.exact or not arguments.get("exact"):
            with pytest.raises(InfeasibleBudget):
                branch(within)
        return
    optimum = branch(within).loss
    assert within.feasible(solution.choice)
    assert solution.loss >= optimum - 1e-9
    assert solution.lower_bound is None or solution.lower_bound <= optimum + 1e-9
    assert solution.lower_bound is not None or arguments.get("exact")
    if curve.exact or solution.status == "optimal":
        assert solution.loss == pytest.approx(optimum, abs=1e-9)


def test_between_two_points_of_the_hull_the_bound_is_the_line_between_them():
    problem = Problem(costs={"bits": [[1.0, 3.0]]}, losses=[[8.0, 2.0]])
    between = frontier(problem, over="bits").at(2.0)
    assert (between.choice.tolist(), between.status) == ([0], "feasible")
    assert between.lower_bound == pytest.approx(5.0)
    exact = frontier(problem, over="bits", exact=True).at(2.0)
    assert (exact.choice.tolist(), exact.lower_bound, exact.status) == ([0], 8.0, "optimal")


def test_many_layers_have_the_optima_of_branch(random_tables):
    problem = replace(random_tables(60, 5, seed=0), budgets={})
    hull = frontier(problem, over="resource0")
    for index in np.linspace(0, len(hull) - 1, 8).astype(int).tolist():
        budget = {"resource0": float(hull.costs[index])}
        assert hull.losses[index] == pytest.approx(branch(replace(problem, budgets=budget)).loss, rel=1e-9)
    share = 1 + 1e-3 * 60 / 2  # a step per unit over a range that is 2.5 times the least cost
    rough = frontier(problem, over="resource0", exact=True, max_states=1000)
    assert not rough.exact
    for index in range(0, len(hull), 25):
        assert rough.at(hull.costs[index] * share).loss <= hull.losses[index] * (1 + 1e-9)
    assert rough.losses[-1] == pytest.approx(hull.losses[-1], rel=1e-12)


def test_a_block_climbs_by_the_asked_resource_whatever_else_it_costs(sums):
    """In milliseconds the second layer level is the cheap one."""
    costs = {"resource0": [[1.0, 0.0], [2.0, 4.0], [2.0, 3.0]], "ms": [[9.0, 0.0], [400.0, 4.0], [400.0, 3.0]]}
    problem = Problem(costs=costs, losses=[[0.0, 9.0], [3.0, 1.0], [2.0, 1.5]], nested={(0, 1): [1, 2]})
    assert set(lower_hull(pareto(problem, sums))) <= set(points(frontier(problem, over="resource0")))


def test_the_reverse_form_and_a_budget_on_the_resource_are_left_aside(tied_units):
    expected = points(frontier(tied_units, over="bits"))
    assert expected == [(7.0, 9.5), (11.0, 5.25), (14.0, 2.25)]
    reverse = replace(tied_units, budgets={}, minimize="bits", max_loss=3.0)
    assert points(frontier(reverse, over="bits")) == expected
    assert frontier(tied_units, over="bits").choice(2).tolist() == [1, 1, 1]


def test_what_it_does_not_take_is_refused(tied_units):
    with pytest.raises(UsageError, match="no resource bytes; the problem has bits"):
        frontier(tied_units, over="bytes")
    with pytest.raises(UsageError, match="needs losses"):
        frontier(replace(tied_units, losses=None), over="bits")
    with pytest.raises(UsageError, match="here units interact"):
        frontier(replace(tied_units, interactions={((0, 0), (2, 0)): 1.0}), over="bits")
    two = Problem(costs={"bits": [[1.0]], "ms": [[1.0]]}, losses=[[1.0]], budgets={"ms": 2.0})
    with pytest.raises(UsageError, match="leaves no room for a budget of ms"):
        frontier(two, over="bits")
    assert len(frontier(replace(two, budgets={"ms": math.inf}), over="bits")) == 1


@pytest.mark.parametrize("exact", [False, True])
def test_points_are_counted_from_either_end_and_no_further(exact, tied_units):
    curve = frontier(tied_units, over="bits", exact=exact)
    assert curve.choice(-1).tolist() == curve.choice(len(curve) - 1).tolist()
    for index in (len(curve), -len(curve) - 1):
        with pytest.raises(UsageError, match=f"the frontier has {len(curve)} points, found index {index}"):
            curve.choice(index)
    frame = curve.to_frame()
    assert frame.columns.tolist() == ["bits", "loss"]
    assert frame.to_numpy().tolist() == [list(point) for point in points(curve)]


def test_a_range_that_vanishes_beside_the_cheapest_cost_still_has_a_coarse_frontier():
    problem = Problem(costs={"bits": [[1e-12, 0.0], [16384.0, np.inf]]}, losses=[[0.0, 1.0], [0.0, np.inf]])
    curve = frontier(problem, over="bits", exact=True, max_states=1)
    assert curve.losses.tolist() in ([0.0], [1.0, 0.0])
    assert all(problem.feasible(curve.choice(index)) for index in range(len(curve)))
