import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import Problem, branch

KINDS = {
    "real": {"real": True},
    "real, two resources": {"real": True, "n_budgets": 2},
    "three resources": {"n_budgets": 3, "negative": True},
    "nested, two resources": {"nested": 3, "n_budgets": 2, "negative": True},
    "nested, real": {"nested": 3, "real": True},
    "nested, reverse": {"nested": 3, "reverse": True, "real": True},
}


def rounding(problem):
    """Losses may cancel out, so errors are counted from the largest entry."""
    table = problem.losses if problem.minimize == "loss" else problem.costs[problem.minimize]
    return 1e-12 * np.abs(table[problem.available]).max()


def widths(rng, shape):
    """From 1e-9 to 1e9 in one table."""
    return 10.0 ** rng.uniform(-9, 9, shape)


def broken(rng, shape):
    """Around 1e-9, and here and there 1e9."""
    return np.where(rng.random(shape) < 0.3, 1e9, 1e-9 * rng.random(shape))


def between(problem, share):
    """With every budget at this share of the way from the least to the greatest cost."""
    ends = {resource: problem.reachable(resource) for resource in problem.costs}
    return replace(problem, budgets={name: low + share * (high - low) for name, (low, high) in ends.items()})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_optimum_is_that_of_the_enumeration_and_proven(kind, problems, brute_force, data):
    problem = data.draw(problems(max_units=5, max_levels=3, **KINDS[kind]))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            branch(problem)
        return
    solution = branch(problem)
    assert problem.feasible(solution.choice)
    assert solution.objective == pytest.approx(optimum, rel=1e-9, abs=rounding(problem))
    assert solution.lower_bound <= optimum + rounding(problem)
    assert (solution.status, solution.gap <= 1e-9) == ("optimal", True)


@pytest.mark.parametrize("limits", [{"max_states": 1}, {"max_states": 2}, {"max_states": 7}, {"time_limit": 0.0}])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_cut_short_it_gives_a_feasible_answer_and_a_true_bound(limits, problems, brute_force, data):
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    problem = data.draw(problems(max_units=5, max_levels=3, **kind))
    optimum = brute_force(problem)
    assume(optimum is not None)
    solution = branch(problem, **limits)
    assert problem.feasible(solution.choice)
    assert solution.lower_bound <= optimum + rounding(problem)
    assert optimum - rounding(problem) <= solution.objective
    assert (solution.status == "optimal") == (solution.gap <= 1e-9)
    assert solution.status in ("optimal", "time_limit" if "time_limit" in limits else "feasible")


@pytest.mark.parametrize("max_states", [1, 3, 30])
@pytest.mark.parametrize("n_budgets", [1, 2])
def test_the_bound_takes_account_of_what_was_left_out(n_budgets, max_states, random_tables):
    optimal = 0
    for seed in range(10):
        problem = random_tables(25, 4, seed, n_budgets=n_budgets)
        rough, optimum = branch(problem, max_states=max_states), branch(problem).loss
        assert rough.lower_bound <= optimum * (1 + 1e-12)
        assert optimum * (1 - 1e-9) <= rough.loss
        optimal += rough.status == "optimal"
    assert max_states > 1 or optimal < 10


@pytest.mark.parametrize("nested", [{}, {(0, 0): [1, 2, 3]}])
@pytest.mark.parametrize("losses", [widths, broken])
@pytest.mark.parametrize("costs", [widths, broken])
def test_numbers_of_all_magnitudes_in_one_table_are_solved_to_nine_digits(costs, losses, nested, brute_force):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        tables = {"a": costs(rng, (5, 3)), "b": costs(rng, (5, 3))}
        problem = between(Problem(costs=tables, losses=losses(rng, (5, 3)), nested=nested), rng.random())
        optimum = brute_force(problem)
        if optimum is not None:
            solution = branch(problem)
            assert solution.loss == pytest.approx(optimum, rel=1e-9, abs=0)
            assert solution.lower_bound <= optimum * (1 + 1e-12)
            assert solution.status == "optimal"


def test_a_price_far_above_the_losses_does_not_hide_the_gap():
    """The budget is used up; counted on whole costs, the price of its tolerance would drown the losses."""
    costs = np.array([[4.97e-6, 52.0], [7.25427384, 1.3e7], [8.3e-8, 1.36e-7]])
    losses = [[5.0, 4.0], [1.0, 2.0], [6.0, 4.0]]
    solution = branch(Problem(costs={"bytes": costs}, losses=losses, budgets={"bytes": costs[:, 0].sum()}))
    assert (solution.choice.tolist(), solution.status) == ([0, 0, 0], "optimal")
    assert solution.gap <= 1e-12


def test_a_catastrophic_level_inside_a_block_does_not_blunt_the_answer(brute_force):
    rng = np.random.default_rng(1)
    losses = 1e-9 * rng.random((6, 3))
    losses[:, 0] = 1e9
    losses[0] = 0.0, 1e-9, 3e-8  # the last level drops the block
    costs = {"bits": rng.random((6, 3)).cumsum(axis=1)}
    problem = between(Problem(costs=costs, losses=losses, nested={(0, 2): [1, 2, 3]}), 0.6)
    solution = branch(problem)
    assert solution.loss == pytest.approx(brute_force(problem), rel=1e-9, abs=0)
    assert solution.status == "optimal"


@pytest.mark.parametrize("seed", range(4))
def test_losses_that_fall_exactly_as_costs_rise_leave_a_subset_sum(seed, brute_force):
    """No level has a penalty at the right price: only how well the budget is filled counts."""
    costs = np.random.default_rng(seed).integers(1, 1000, (7, 3)).astype(float)
    problem = Problem(costs={"bytes": costs}, losses=1000 - costs, budgets={"bytes": 3217.0})
    assert branch(problem).loss == brute_force(problem)


def test_a_common_divisor_of_the_costs_sharpens_the_bound():
    costs = np.tile([0.0, 4096.0], (30, 1))
    problem = Problem(costs={"bits": costs}, losses=np.tile([1.0, 0.0], (30, 1)), budgets={"bits": 10.9 * 4096})
    solution = branch(problem, max_states=1)
    assert (solution.loss, solution.lower_bound, solution.status) == (20.0, 20.0, "optimal")


@pytest.mark.parametrize(("n_units", "n_budgets"), [(60, 1), (25, 2)])
def test_larger_tables_agree_with_another_solver(n_units, n_budgets, random_tables, milp_optimum):
    for seed in range(2):
        problem = random_tables(n_units, 5, seed, n_budgets=n_budgets)
        solution = branch(problem)
        assert solution.loss == pytest.approx(milp_optimum(problem), rel=1e-9)
        assert solution.status == "optimal"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_order_of_the_units_does_not_change_the_loss(problems, data):
    problem = data.draw(problems(n_budgets=2, real=True))
    problem = replace(problem, groups=(), fixed={})
    order = data.draw(st.permutations(range(problem.shape[0])))
    costs = {name: table[order] for name, table in problem.costs.items()}
    shuffled = replace(problem, costs=costs, losses=problem.losses[order], units=None)
    try:
        solution = branch(problem)
    except InfeasibleBudget:
        with pytest.raises(InfeasibleBudget):
            branch(shuffled)
        return
    assert branch(shuffled).loss == pytest.approx(solution.loss, rel=1e-9)


def test_the_same_problem_has_the_same_answer(random_tables):
    problem = random_tables(40, 5, seed=0, n_budgets=2)
    first, second = branch(problem), branch(problem)
    assert (first.choice.tolist(), first.lower_bound) == (second.choice.tolist(), second.lower_bound)


def test_limits_that_are_out_of_reach_only_together_are_named():
    costs = {"bytes": [[0.0, 4.0]] * 3, "ms": [[4.0, 0.0]] * 3}
    problem = Problem(costs=costs, losses=np.zeros((3, 2)), budgets={"bytes": 4.0, "ms": 6.0})
    with pytest.raises(InfeasibleBudget, match="only jointly infeasible: within 4 bytes, the least reachable ms is 8"):
        branch(problem)


def test_a_loss_limit_that_is_met_exactly_is_met():
    costs, losses = np.array([[1.0, 2.0, 4.0]] * 4), np.array([[0.75, 0.5, 0.25]] * 4)
    for levels in itertools.combinations_with_replacement(range(3), 4):
        limit = losses[range(4), levels].sum()
        solution = branch(Problem(costs={"ms": costs}, losses=losses, minimize="ms", max_loss=limit))
        assert solution.loss <= limit
        assert solution.cost["ms"] <= costs[range(4), levels].sum()
        assert solution.lower_bound == solution.cost["ms"]


def test_units_that_interact_go_to_the_integer_program(brute_force):
    problem = Problem(
        costs={"bits": [[1.0, 2.0]] * 3},
        losses=[[1.0, 0.0]] * 3,
        budgets={"bits": 5.0},
        interactions={((0, 1), (1, 1)): 3.0},
    )
    solution = branch(problem)
    assert (solution.loss, solution.status) == (brute_force(problem), "optimal")


def test_max_states_must_be_positive(tied_units):
    with pytest.raises(UsageError, match="max_states must be at least 1"):
        branch(tied_units, max_states=0)


def test_without_limits_every_unit_has_its_best_level(tied_units):
    free = replace(tied_units, budgets={"bits": math.inf})
    assert (branch(free).choice.tolist(), branch(free).gap) == ([1, 1, 1], 0.0)


def test_a_catastrophic_level_does_not_blunt_the_prices_of_two_budgets():
    rng = np.random.default_rng(0)
    bits, sizes = np.array([2.0, 3.0, 4.0, 8.0]), rng.uniform(1, 3, 60)[:, None]
    costs = {"bits": sizes * bits, "ms": rng.uniform(1, 3, (60, 4)) * np.array([1.5, 2.0, 3.0, 4.0])}
    losses = rng.lognormal(0, 1, 60)[:, None] * 4.0 ** -np.arange(4) * 1e-9
    losses[:, 0] = 1e9
    ends = Problem(costs=costs, losses=losses)
    budgets = {resource: sum(ends.reachable(resource)) / 2 for resource in costs}
    solution = branch(Problem(costs=costs, losses=losses, budgets=budgets))
    assert solution.status == "optimal"
    assert solution.loss < 1e-6
