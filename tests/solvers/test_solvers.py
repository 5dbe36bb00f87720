"""What every solver in SOLVERS promises, and what the exact ones promise beyond that."""

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

FORMS = {
    "one budget": {},
    "several budgets": {"n_budgets": 2},
    "nested": {"nested": 1},
    "nested twice": {"nested": 2, "max_units": 5},
    "nested deeply": {"nested": 3, "max_units": 5},
    "interactions": {"interactions": True},
    "all together": {"n_budgets": 2, "nested": 3, "interactions": True},
    "reverse": {"reverse": True},
    "reverse with budgets": {"n_budgets": 2, "reverse": True, "nested": 3},
    "reverse with interactions": {"reverse": True, "interactions": True, "nested": 3},
}
"""Kinds of problems, as arguments of the strategy `problems`. A solver takes all of them but those in REFUSED."""

INTERACTING = {"interactions", "all together", "reverse with interactions"}
REFUSED = {
    "dp": {"several budgets", "reverse with budgets", *INTERACTING},
    "greedy": INTERACTING,
    "lagrange": INTERACTING,
    "branch": {"reverse with interactions"},
    "ilp": {"reverse with interactions"},
    "lp": {"reverse with interactions"},
}
EXACT = {name: SOLVERS[name] for name in ("ilp", "dp", "brute", "branch") if name in SOLVERS}
INCOMPLETE = {"uniform", "bisect"}
"""They look at some allocations only, so they may find none where there is one."""


@pytest.fixture(scope="session", params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture(scope="session", params=sorted(set(EXACT) - {"brute"}))
def exact(request):
    return EXACT[request.param]


def unpermuted(solution, order):
    choice = np.empty_like(solution.choice)
    choice[order] = solution.choice
    return choice


def check_shortage(error, problem):
    """The message of an infeasible problem: which limit, what could be reached, how much is missing."""
    limits = {**problem.budgets, "loss": problem.max_loss}
    assert error.budget == limits[error.resource]
    assert error.reachable > error.budget
    assert error.resource in error.message
    assert f"short by {error.reachable - error.budget:.6g}" in error.message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_answer_keeps_the_limits_and_tells_its_true_loss_and_cost(name, form, problems, sums, brute_force, data):
    problem = data.draw(problems(**{"max_units": 4, "max_levels": 3, "negative": True, **FORMS[form]}))
    optimum = brute_force(problem)
    try:
        solution = SOLVERS[name](problem)
    except InfeasibleBudget as error:
        assert optimum is None or name in INCOMPLETE
        check_shortage(error, problem)
        return
    except UsageError:
        assert form in REFUSED.get(name, ())
        return
    true = sums(problem, solution.choice.tolist())
    assert {**solution.cost, "loss": solution.loss} == pytest.approx(true)
    assert solution.objective == pytest.approx(true[problem.minimize])
    assert problem.feasible(solution.choice)
    assert all(true[resource] <= limit for resource, limit in problem.limits.items())
    assert all(len(set(solution.choice[list(group)])) == 1 for group in problem.groups)
    assert solution.choice.tolist() == problem.canonical(solution.choice).tolist()
    assert solution.objective >= optimum - 1e-9
    assert solution.lower_bound is None or solution.lower_bound <= optimum + 1e-9
    if name in EXACT:
        assert solution.objective == pytest.approx(optimum, rel=1e-9, abs=1e-9)
        assert solution.status == "optimal"
        assert solution.lower_bound == pytest.approx(optimum, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in SOLVERS for form in REFUSED.get(name, ())])
def test_what_a_solver_does_not_take_is_refused(name, form):
    pair = {((0, 0), (1, 0)): 1.0} if FORMS[form].get("interactions") else {}
    tables = {f"resource{index}": np.ones((2, 2)) for index in range(1 + ("budgets" in form))}
    reverse = {"minimize": "resource0", "max_loss": 9.0} if FORMS[form].get("reverse") else {}
    budgets = dict.fromkeys(tables, 2.0)
    problem = Problem(costs=tables, losses=np.ones((2, 2)), budgets=budgets, interactions=pair, **reverse)
    with pytest.raises(UsageError):
        SOLVERS[name](problem)


def test_the_same_problem_has_the_same_answer_and_stays_as_it_was(solver, random_tables):
    problem = random_tables(8, 4, seed=3)
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


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"uniform"}))
def test_solvers_by_losses_refuse_a_problem_without(name, tied_units):
    with pytest.raises(UsageError, match="needs losses"):
        SOLVERS[name](replace(tied_units, losses=None))


def test_importing_the_solvers_loads_nothing_heavy():
    heavy = ["torch", "ray", "transformers", "pulp", "scipy", "optuna", "pandas"]
    code = f"import sys, layerwise.solvers; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
