"""What every solver of separable problems promises, and what the exact ones promise beyond that."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import SOLVERS, Problem, dp, greedy, ilp, uniform

EXACT = {"ilp": ilp, "dp": dp}


@pytest.fixture(scope="session", params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture(scope="session", params=EXACT)
def exact(request):
    return EXACT[request.param]


def unpermuted(solution, order):
    choice = np.empty_like(solution.choice)
    choice[order] = solution.choice
    return choice


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_answer_keeps_the_budget_and_tells_its_true_loss_and_cost(solver, problems, brute_force, data):
    problem = data.draw(problems())
    optimum = brute_force(problem)
    try:
        solution = solver(problem)
    except InfeasibleBudget as error:
        assert optimum is None or solver is uniform  # a mixture may fit where no common level does
        assert error.resource == "resource0"
        assert error.reachable > error.budget
        return
    rows = np.arange(problem.shape[0])
    assert solution.loss == pytest.approx(math.fsum(problem.losses[rows, solution.choice]))
    assert solution.cost["resource0"] == pytest.approx(math.fsum(problem.costs["resource0"][rows, solution.choice]))
    assert solution.cost["resource0"] <= problem.budgets["resource0"] * (1 + 1e-9)
    assert all(len(set(solution.choice[list(group)])) == 1 for group in problem.groups)
    assert solution.loss >= optimum * (1 - 1e-9)
    assert solution.lower_bound is None or solution.lower_bound <= optimum * (1 + 1e-9)


def test_the_same_problem_has_the_same_answer_and_stays_as_it_was(solver, random_tables):
    problem = random_tables(12, 4, seed=3)
    before = {resource: table.copy() for resource, table in problem.costs.items()}
    first, second = solver(problem), solver(problem)
    assert first.choice.tolist() == second.choice.tolist()
    assert (first.loss, first.cost, first.status) == (second.loss, second.cost, second.status)
    assert all(np.array_equal(before[resource], table) for resource, table in problem.costs.items())


def test_a_budget_below_the_least_reachable_cost_names_the_shortfall(solver, tied_units):
    short = replace(tied_units, budgets={"bits": 6.5})
    with pytest.raises(InfeasibleBudget, match=r"6\.5 bits is below the least reachable 7 \(short by 0\.5\)") as caught:
        solver(short)
    assert (caught.value.resource, caught.value.reachable) == ("bits", 7.0)
    assert solver(replace(tied_units, budgets={"bits": 7.0})).choice.tolist() == [0, 0, 0]


def test_without_a_budget_in_the_way_the_dearest_and_best_level_is_taken(solver, tied_units):
    for budgets in ({}, {"bits": math.inf}, {"bits": 14.0}):
        assert solver(replace(tied_units, budgets=budgets)).choice.tolist() == [1, 1, 1]


def test_one_unit_with_one_level_is_solved(solver):
    solution = solver(Problem(costs={"bits": [[0.0]]}, budgets={"bits": 0.0}, losses=[[7.0]]))
    assert (solution.choice.tolist(), solution.loss, solution.cost) == ([0], 7.0, {"bits": 0.0})


def test_greedy_lies_between_uniform_and_the_optimum_on_tables_like_a_models(random_tables):
    for seed in range(5):
        problem = random_tables(40, 5, seed)
        assert ilp(problem).loss * (1 - 1e-9) <= greedy(problem).loss <= uniform(problem).loss


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_solvers_agree_with_enumeration_and_with_another_solver(exact, problems, brute_force, milp_optimum, data):
    problem = data.draw(problems())
    optimum = brute_force(problem)
    assert milp_optimum(problem) == (None if optimum is None else pytest.approx(optimum, rel=1e-9))
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            exact(problem)
        return
    solution = exact(problem)
    assert solution.loss == pytest.approx(optimum, rel=1e-9)
    assert solution.status == "optimal"
    assert solution.gap == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_solvers_agree_with_enumeration_on_real_numbers_of_any_size(exact, problems, brute_force, data):
    problem = data.draw(problems(max_units=4, real=True))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            exact(problem)
    else:
        assert exact(problem).loss == pytest.approx(optimum, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("seed", range(3))
def test_exact_solvers_agree_to_nine_digits_on_56_layers_with_5_levels(seed, random_tables, milp_optimum):
    problem = random_tables(56, 5, seed)
    optimum = milp_optimum(problem)
    assert ilp(problem).loss == pytest.approx(optimum, rel=1e-9)
    assert ilp(problem, backend="CBC").loss == pytest.approx(optimum, rel=1e-9)
    assert dp(problem).loss == pytest.approx(optimum, rel=1e-9)


def test_a_tighter_budget_never_lowers_the_loss(exact, random_tables):
    losses = [exact(random_tables(15, 4, seed=1, budget=share)).loss for share in np.linspace(0, 1, 12)]
    assert losses == sorted(losses, reverse=True)


def test_the_order_of_the_units_does_not_matter(exact, random_tables):
    problem = random_tables(15, 4, seed=2)
    order = np.random.default_rng(0).permutation(15)
    shuffled = replace(
        problem, costs={"resource0": problem.costs["resource0"][order]}, losses=problem.losses[order], units=None
    )
    solution = exact(shuffled)
    assert solution.loss == exact(problem).loss
    assert unpermuted(solution, order).tolist() == exact(problem).choice.tolist()


def test_one_catastrophic_level_does_not_blunt_the_answer(exact, random_tables, milp_optimum):
    problem = random_tables(12, 4, seed=5)
    losses = problem.losses.copy()
    losses[:, 0] = 1e9  # what a broken 2-bit level may look like beside losses around 1e-3
    optimum = milp_optimum(replace(problem, losses=np.where(losses == 1e9, np.inf, losses)))
    assert exact(replace(problem, losses=losses)).loss == pytest.approx(optimum, rel=1e-9)


def test_solvers_by_losses_refuse_a_problem_without(tied_units):
    for solve in (greedy, ilp, dp):
        with pytest.raises(UsageError, match="needs losses"):
            solve(replace(tied_units, losses=None))


def test_importing_the_solvers_loads_nothing_heavy():
    heavy = ["torch", "ray", "transformers", "pulp", "scipy", "optuna", "pandas"]
    code = f"import sys, layerwise.solvers; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
