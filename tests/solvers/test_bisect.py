import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import Problem, bisect

COSTS = np.array([[4.0, 2.0, 1.0]] * 4)
LOSSES = np.array([[0.0, 1.0, 4.0], [0.0, 2.0, 9.0], [0.0, 3.0, 5.0], [0.0, 8.0, 20.0]])


def recorded(problem, factor=1.0):
    seen = []

    def evaluate(choice):
        seen.append(tuple(choice.tolist()))
        return problem.loss(choice) * factor

    return evaluate, seen


def test_the_least_harm_per_saved_cost_comes_first():
    problem = Problem(costs={"bits": COSTS}, losses=LOSSES, budgets={"bits": 12.0})
    assert bisect(problem).choice.tolist() == [1, 1, 0, 0]
    tighter = Problem(costs={"bits": COSTS}, losses=LOSSES, budgets={"bits": 9.0})
    assert bisect(tighter).choice.tolist() == [1, 1, 2, 0]


def test_the_reverse_form_goes_as_far_as_the_loss_allows():
    problem = Problem(costs={"bits": COSTS}, losses=LOSSES, minimize="bits", max_loss=3.5)
    solution = bisect(problem)
    assert (solution.choice.tolist(), solution.loss, solution.objective) == ([1, 1, 0, 0], 3.0, 12.0)


def test_an_interaction_puts_off_the_downgrade_that_it_makes_worse():
    pair = {((0, 1), (1, 1)): 50.0}
    problem = Problem(costs={"bits": COSTS}, losses=LOSSES, budgets={"bits": 12.0}, interactions=pair)
    assert bisect(problem).choice.tolist() == [1, 0, 1, 0]


def test_dropping_a_block_is_one_downgrade_that_takes_its_layers_along():
    costs = np.array([[1.0, 0.0], [4.0, 2.0], [4.0, 2.0]])
    losses = np.array([[0.0, 3.0], [0.0, 4.0], [0.0, 4.0]])
    nested = {(0, 1): [1, 2]}
    solution = bisect(Problem(costs={"bits": costs}, losses=losses, nested=nested, budgets={"bits": 8.0}))
    assert (solution.choice.tolist(), solution.loss, solution.cost) == ([1, 0, 0], 3.0, {"bits": 0.0})


def test_the_measured_limit_is_met_with_about_the_logarithm_of_the_path_in_measurements():
    rng = np.random.default_rng(0)
    losses = np.cumsum(rng.random((60, 4)), axis=1)
    problem = Problem(costs={"bits": np.tile([8.0, 4.0, 3.0, 2.0], (60, 1))}, losses=losses)
    evaluate, seen = recorded(problem, factor=2.0)
    solution = bisect(problem, evaluate, limit=200.0)
    assert solution.loss == evaluate(solution.choice) <= 200.0
    assert len(set(seen)) == len(seen) - 1 <= 1 + math.ceil(math.log2(180))  # the last one was asked for just above
    half = Problem(costs=problem.costs, losses=losses, minimize="bits", max_loss=100.0)
    assert solution.choice.tolist() == bisect(half).choice.tolist()


def test_max_loss_is_the_limit_on_the_measured_loss_of_the_reverse_form():
    problem = Problem(costs={"bits": COSTS}, losses=LOSSES, minimize="bits", max_loss=7.0)
    evaluate, _ = recorded(problem, factor=2.0)
    solution = bisect(problem, evaluate)
    assert (solution.choice.tolist(), solution.loss, solution.objective) == ([1, 1, 0, 0], 6.0, 12.0)


def test_budgets_and_the_measured_limit_hold_together():
    problem = Problem(costs={"bits": COSTS}, losses=LOSSES, budgets={"bits": 12.0})
    evaluate, seen = recorded(problem)
    assert bisect(problem, evaluate, limit=1e9).choice.tolist() == [2, 2, 2, 2]
    assert all(problem.feasible(choice) for choice in seen)
    with pytest.raises(InfeasibleBudget, match=r"within the budgets has a measured loss of 3, above the limit 2"):
        bisect(problem, evaluate, limit=2.0)


def test_a_failed_measurement_is_beyond_the_limit_and_an_exception_passes():
    problem = Problem(costs={"bits": COSTS}, losses=LOSSES)
    answer = bisect(problem, lambda choice: math.nan if choice.any() else 0.0, limit=1.0)
    assert (answer.choice.tolist(), answer.loss) == ([0, 0, 0, 0], 0.0)
    with pytest.raises(InfeasibleBudget, match="nan"):
        bisect(problem, lambda choice: math.nan, limit=1.0)
    with pytest.raises(ZeroDivisionError):
        bisect(problem, lambda choice: 1 / 0, limit=1.0)


def test_measuring_and_a_limit_go_together():
    problem = Problem(costs={"bits": COSTS}, losses=LOSSES)
    with pytest.raises(UsageError, match="nothing to measure"):
        bisect(problem, limit=1.0)
    with pytest.raises(UsageError, match="against a limit"):
        bisect(problem, lambda choice: 0.0)


def test_where_the_path_misses_all_budgets_at_once_it_says_what_the_nearest_point_needs():
    crossed = {"ms": np.array([[1.0, 4.0]]), "bytes": np.array([[4.0, 1.0]])}
    with pytest.raises(InfeasibleBudget, match=r"the nearest needs 4 \w+, above the limit 2 \(short by 2\)"):
        bisect(Problem(costs=crossed, losses=np.array([[0.0, 1.0]]), budgets={"ms": 2.0, "bytes": 2.0}))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_with_one_budget_and_no_interactions_it_finds_something_whenever_there_is_something(problems, data):
    problem = data.draw(problems(negative=True, nested=3))
    try:
        problem.check_budgets()
    except InfeasibleBudget:
        with pytest.raises(InfeasibleBudget):
            bisect(problem)
    else:
        assert problem.feasible(bisect(problem).choice)
