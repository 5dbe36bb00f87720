from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget
from layerwise.solvers import Problem, greedy, ilp


def test_the_best_trade_per_cost_is_taken_first():
    costs, losses = np.array([[1.0, 2.0], [1.0, 3.0]]), np.array([[5.0, 3.0], [5.0, 2.0]])
    assert greedy(Problem(costs={"bits": costs}, budgets={"bits": 4.0}, losses=losses)).choice.tolist() == [1, 0]
    assert greedy(Problem(costs={"bits": costs}, budgets={"bits": 5.0}, losses=losses)).choice.tolist() == [1, 1]


def test_a_bump_in_the_loss_curve_does_not_hide_the_level_behind_it():
    costs, losses = np.array([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]), np.array([[9.0, 9.5, 1.0], [9.0, 7.0, 6.0]])
    solution = greedy(Problem(costs={"bits": costs}, budgets={"bits": 6.0}, losses=losses))
    assert solution.choice.tolist() == [2, 0]


def test_when_the_best_jump_does_not_fit_a_smaller_one_is_taken():
    costs, losses = np.array([[2.0, 3.0, 6.0]]), np.array([[9.0, 8.0, 0.0]])
    assert greedy(Problem(costs={"bits": costs}, budgets={"bits": 5.0}, losses=losses)).choice.tolist() == [1]


def test_a_level_that_is_better_at_no_cost_is_taken_even_when_nothing_is_left():
    costs, losses = np.array([[2.0, 2.0], [2.0, 3.0]]), np.array([[9.0, 8.0], [9.0, 0.0]])
    assert greedy(Problem(costs={"bits": costs}, budgets={"bits": 4.0}, losses=losses)).choice.tolist() == [1, 0]


def test_the_scarce_resource_decides_between_equal_gains():
    costs = {"bytes": np.array([[0.0, 1.0], [0.0, 3.0]]), "ms": np.array([[0.0, 3.0], [0.0, 1.0]])}
    losses = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert greedy(Problem(costs=costs, losses=losses, budgets={"bytes": 100.0, "ms": 3.0})).choice.tolist() == [0, 1]
    assert greedy(Problem(costs=costs, losses=losses, budgets={"bytes": 3.0, "ms": 100.0})).choice.tolist() == [1, 0]


def test_on_the_hull_of_equal_steps_greedy_is_optimal():
    rng = np.random.default_rng(0)
    losses = -np.sort(-rng.random((20, 1)) * 2.0 ** -np.arange(5), axis=1)  # convex in every unit
    for budget in range(20, 90, 7):
        problem = Problem(costs={"bits": np.tile(np.arange(5.0), (20, 1))}, budgets={"bits": budget}, losses=losses)
        assert greedy(problem).loss == pytest.approx(ilp(problem).loss, rel=1e-9)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_several_budgets_hold_whenever_any_allocation_holds_them(problems, brute_force, data):
    problem = data.draw(problems(n_budgets=2))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            greedy(problem)
        return
    solution = greedy(problem)
    assert problem.feasible(solution.choice)
    assert solution.loss >= optimum * (1 - 1e-9)


@pytest.mark.parametrize("n_budgets", [1, 2])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_nested_blocks_keep_the_budgets_whenever_any_allocation_does(n_budgets, problems, brute_force, data):
    problem = data.draw(problems(n_budgets=n_budgets, nested=3, negative=True, max_levels=3))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            greedy(problem)
        return
    solution = greedy(problem)
    assert problem.feasible(solution.choice)
    assert solution.loss >= optimum - 1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_without_a_budget_every_block_has_its_best_allocation(problems, brute_force, data):
    problem = replace(data.draw(problems(n_budgets=2, nested=3, negative=True, max_levels=3)), budgets={})
    assert greedy(problem).loss == brute_force(problem)


def test_a_block_is_kept_once_it_pays_with_its_layers():
    """The block loses 9 when dropped; kept, it costs 1 and its layers at least 4."""
    costs, losses = [[1.0, 0.0], [2.0, 4.0], [2.0, 4.0]], [[0.0, 9.0], [3.0, 1.0], [2.0, 1.5]]
    problem = Problem(costs={"bits": costs}, losses=losses, nested={(0, 1): [1, 2]})
    answers = {budget: greedy(replace(problem, budgets={"bits": budget})).loss for budget in (0.0, 4.9, 5.0, 7.0, 9.0)}
    assert answers == {0.0: 9.0, 4.9: 9.0, 5.0: 5.0, 7.0: 3.0, 9.0: 2.5}
