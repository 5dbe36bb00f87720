import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import Problem, dp, ilp


def test_of_equal_losses_the_cheaper_allocation_is_taken():
    costs, losses = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 2.0]]), np.array([[1.0, 1.0, 2.0], [4.0, 4.0, 4.0]])
    assert dp(Problem(costs={"bits": costs}, budgets={"bits": 9.0}, losses=losses)).choice.tolist() == [1, 0]


def test_several_budgets_are_refused(random_tables):
    with pytest.raises(UsageError, match="one budget, found resource0, resource1"):
        dp(random_tables(4, 3, seed=0, n_budgets=2))


def test_costs_without_a_budget_do_not_count(random_tables):
    two = random_tables(10, 4, seed=0, n_budgets=2)
    one = Problem(costs=two.costs, budgets={"resource1": two.budgets["resource1"]}, losses=two.losses)
    assert dp(one).loss == pytest.approx(ilp(one).loss, rel=1e-9)


@pytest.mark.parametrize("max_states", [1, 10, 100, 1000])
def test_too_many_states_give_a_feasible_answer_between_true_bounds(max_states, random_tables):
    for seed in range(3):
        problem = random_tables(40, 5, seed)
        exact, rough = dp(problem), dp(problem, max_states=max_states)
        assert (exact.status, rough.status) == ("optimal", "feasible")
        assert problem.feasible(rough.choice)
        assert rough.lower_bound * (1 - 1e-9) <= exact.loss <= rough.loss * (1 + 1e-9)
        assert rough.gap == pytest.approx((rough.loss - rough.lower_bound) / rough.loss)


def test_the_rounded_answer_is_as_good_as_the_optimum_of_a_budget_smaller_by_a_step_per_unit(random_tables):
    problem, max_states = random_tables(40, 5, seed=0), 200
    room = problem.budgets["resource0"] - problem.reachable("resource0")[0]
    smaller = problem.budgets["resource0"] - 40 * room / max_states
    tight = Problem(costs=problem.costs, losses=problem.losses, budgets={"resource0": smaller})
    assert dp(problem, max_states=max_states).loss <= dp(tight).loss * (1 + 1e-9)


def test_equal_layers_need_no_more_states_than_multiples_of_their_cost():
    rng = np.random.default_rng(0)
    costs = np.tile(np.arange(5.0) * 4096, (200, 1))
    problem = Problem(costs={"bits": costs}, budgets={"bits": 400 * 4096.0}, losses=rng.random((200, 5)))
    assert dp(problem, max_states=401).status == "optimal"


def test_max_states_must_be_positive(tied_units):
    with pytest.raises(UsageError, match="max_states"):
        dp(tied_units, max_states=0)


@pytest.mark.parametrize("max_states", [1, 2, 5, 10])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_few_states_never_give_a_wrong_optimum_or_bound(max_states, problems, brute_force, data):
    """Blocks meet again behind their units, so one that outgrew the states must not be lost on the way."""
    form = data.draw(st.sampled_from([{"nested": 3}, {"nested": 3, "real": True}, {"reverse": True}]))
    problem = data.draw(problems(max_units=5, max_levels=4, negative=True, **form))
    optimum = brute_force(problem)
    assume(optimum is not None)
    solution = dp(problem, max_states=max_states)
    assert problem.feasible(solution.choice)
    assert solution.lower_bound <= optimum + 1e-12 * abs(optimum)
    if solution.status == "optimal":
        assert solution.objective == pytest.approx(optimum, rel=1e-9, abs=1e-9)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_nested_blocks_are_decided_as_by_enumeration(problems, brute_force, data):
    problem = data.draw(problems(max_units=6, max_levels=3, nested=3, negative=True))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            dp(problem)
        return
    solution = dp(problem)
    assert (solution.loss, solution.lower_bound, solution.status) == (optimum, optimum, "optimal")
    assert problem.feasible(solution.choice)


def test_a_block_that_outgrows_the_states_is_not_taken_for_solved():
    """Dropped, the block costs and loses little; kept, its four layers have more allocations than states."""
    layers = [[1.0, 2.0, 4.0, 5.0]] * 4
    costs, losses = [[0.0, 1.0, 9.0, 9.0], *layers], [[0.0, 2.0, 9.0, 9.0], *[[1.1, 1.0, 0.8, 0.0]] * 4]
    problem = Problem(costs={"bits": costs}, losses=losses, nested={(0, 1): [1, 2, 3, 4]}, budgets={"bits": 19.0})
    for max_states in range(1, 12):
        rough = dp(problem, max_states=max_states)
        assert problem.feasible(rough.choice)
        assert rough.lower_bound <= dp(problem).loss + 1e-12
        assert rough.status == "feasible" or rough.loss == pytest.approx(dp(problem).loss)


@pytest.mark.parametrize("budget", [{}, {"resource0": math.inf}, {"resource0": 1e9}])
def test_without_a_limit_in_the_way_few_states_are_enough(budget, random_tables):
    problem = replace(random_tables(60, 5, seed=0), budgets=budget)
    solution = dp(problem, max_states=1)
    assert (solution.status, solution.gap) == ("optimal", 0.0)
    assert solution.loss == pytest.approx(problem.losses.min(axis=1).sum(), rel=1e-12)


def test_without_a_limit_a_block_of_equal_losses_is_the_cheapest():
    costs = [[3.0, 2.0, 1.0], [2.0, 1.0, 5.0], [9.0, 9.0, 4.0]]
    losses = [[1.0, 1.0, 4.0], [0.0, 0.0, 7.0], [2.0, 2.0, 5.0]]
    problem = Problem(costs={"bits": costs}, losses=losses, nested={(0, 2): [1, 2]})
    assert dp(problem).choice.tolist() == [1, 1, 0]
    dropped = replace(problem, losses=[[1.0, 1.0, 3.0], *losses[1:]])
    assert dp(dropped).cost == {"bits": 1.0}
